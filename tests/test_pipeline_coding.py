"""The shortest way to write integers against trying all, and laws."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from trees import trees

from minicompress import codes, entropy, models, pipeline, share, storage

COMPACT = partial(storage.dumps, compact=True)
CODERS = {
    "none": (),
    "fast": pipeline.FAST,
    "slow": pipeline.SLOW,
    "one": (entropy.contextual,),
}


def noise(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g)


def some(shape, density, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=g) < density


def shared(shape=(20, 30), density=0.1, bits=2, seed=0):
    w, mask = noise(*shape, seed=seed), some(shape, density, seed)
    code = codes.sparse(w, mask)
    return replace(code, values=share.kmeans(code.values, bits=bits))


class TestSmallest:
    @settings(max_examples=60, deadline=None)
    @given(
        st.sampled_from([(), (3,), (2, 4), (5, 8), (2, 3, 2, 2)]).flatmap(
            lambda shape: trees(shape=shape)
        ),
        st.sampled_from([*CODERS]),
    )
    def test_decodes_to_the_same_bits(self, code, coders):
        best = pipeline.smallest(code, coders=CODERS[coders])
        before, after = codes.value(code), codes.value(best)
        assert before.dtype == after.dtype
        assert before.shape == after.shape
        assert torch.equal(before.nan_to_num(), after.nan_to_num())

    @settings(max_examples=30, deadline=None)
    @given(trees(shape=(5, 8)))
    def test_is_never_longer(self, code):
        if not isinstance(code, codes.Code):
            return
        best = pipeline.smallest(code, coders=pipeline.SLOW)
        size = pipeline.file_bytes
        assert size(best) <= size(code)
        again = pipeline.smallest(best, coders=pipeline.SLOW)
        assert size(again) <= size(best)

    @pytest.mark.parametrize("n", [0, 1, 10, 100, 1000])
    @pytest.mark.parametrize("dumps", [storage.dumps, COMPACT])
    def test_is_the_best_of_the_coders(self, n, dumps):
        g = torch.Generator().manual_seed(n)
        values = (torch.rand(n, generator=g) ** 4 * 7).long()
        top = int(values.max()) if n else 0
        ints = codes.Ints(values, max(1, top.bit_length()))
        size = partial(pipeline.file_bytes, dumps=dumps)
        ways = [ints, *(coder(ints) for coder in pipeline.SLOW)]
        best = pipeline.smallest(ints, coders=pipeline.SLOW, dumps=dumps)
        assert size(best) <= min(map(size, ways))

    def test_needs_no_more_bits_than_the_largest(self):
        ints = codes.Ints(torch.tensor([0, 5, 3]), 16)
        assert pipeline.smallest(ints).bits == 3

    def test_leaves_the_width_of_gaps_alone(self):
        # with 2 bits in place of 4 a step of 3 would mean "skip"
        mask = torch.zeros(8, dtype=torch.bool)
        mask[[3, 5]] = True
        gaps = codes.gaps(mask, bits=4)
        assert int(gaps.steps.values.max()) == 3
        best = pipeline.smallest(gaps)
        assert best.steps.bits == 4
        assert torch.equal(best.decode(), mask)

    @pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.5, 1.0])
    def test_tries_all_ways_to_write_a_mask(self, density):
        w, mask = noise(40, 50), some((40, 50), density)
        code = codes.sparse(w, mask)
        ways = [code]
        for coder in (lambda x: x, *pipeline.FAST):
            ways += [replace(code, mask=coder(codes.Ints(mask.byte(), 1)))]
            for bits in range(1, 9):
                gaps = codes.gaps(mask, bits=bits)
                steps = coder(gaps.steps)
                ways += [replace(code, mask=replace(gaps, steps=steps))]
        least = min(map(pipeline.file_bytes, ways))
        best = pipeline.smallest(code)
        # of all widths it codes two: those guessed right, to a byte or two
        assert least <= pipeline.file_bytes(best) <= least + 2
        assert torch.equal(best.decode(), code.decode())

    def test_context_modeling_sees_the_matrix(self):
        # half of the columns are empty: nothing that counts alone can know
        mask = some((32, 64), 0.5) & some((1, 64), 0.5, seed=1)
        code = codes.sparse(noise(32, 64), mask)
        size = pipeline.file_bytes
        fast = pipeline.smallest(code)
        slow = pipeline.smallest(code, coders=pipeline.SLOW)
        assert isinstance(slow.mask, entropy.Contextual)
        assert size(slow) < size(fast) - 50

    def test_uses_the_grid_of_the_mask(self):
        # half of the rows of the images no unit looks at
        mask = some((8, 16, 16), 0.5)
        mask[:, ::2] = False
        w = noise(8, 256)
        values = share.kmeans(w[mask.view(8, 256)], bits=1)
        code = codes.Sparse(mask, values, (8, 256))
        flat = replace(code, mask=mask.view(8, 256))
        one = (entropy.contextual,)
        on_grid = pipeline.smallest(code, coders=one)
        assert torch.equal(on_grid.decode(), flat.decode())
        in_rows = pipeline.smallest(flat, coders=one)
        size = pipeline.file_bytes
        assert size(on_grid) < size(in_rows)

    def test_tensors_pass_through(self):
        x = noise(3)
        assert pipeline.smallest(x) is x

    def test_codes_that_are_coded_are_coded_again(self):
        ints = codes.Ints(torch.zeros(1000).int(), 8)
        poor = entropy.rans(codes.Ints(torch.arange(10) % 3, 8))
        book = codes.Codebook(poor, noise(256))
        best = pipeline.smallest(book)
        assert best.index.bits == 2
        assert pipeline.file_bytes(pipeline.smallest(ints)) < 150

    def test_leaves_its_input(self):
        code = shared()
        before = code.decode().clone()
        pipeline.smallest(code, coders=pipeline.SLOW)
        assert torch.equal(code.decode(), before)


class TestMerged:
    @pytest.mark.parametrize("bits", [1, 3, 8])
    def test_decodes_to_the_same(self, bits):
        code = shared(bits=bits)
        one = pipeline.merged(code)
        assert torch.equal(one.decode(), code.decode())
        assert one.centroids[0] == 0

    def test_has_the_entropy_of_both_lists(self):
        # H(position) n + H(value) kept, up to what one counts too much
        code = shared((100, 100), density=0.1, bits=3)
        H = entropy.entropy
        one = pipeline.merged(code).index
        mask = codes.Ints(code.mask.byte(), 1)
        apart = 10_000 * H(entropy.counts(mask))
        apart += len(code.values.index.values) * H(
            entropy.counts(code.values.index)
        )
        assert 10_000 * H(entropy.counts(one)) == pytest.approx(apart)

    def test_half_precision_stays(self):
        code = shared()
        book = replace(code.values, centroids=code.values.centroids.half())
        one = pipeline.merged(replace(code, values=book))
        assert one.centroids.dtype == torch.float16

    def test_needs_shared_values(self):
        w = noise(4, 4)
        with pytest.raises(ValueError, match="no shared values"):
            pipeline.merged(codes.sparse(w, w > 0))


class TestCoded:
    def test_ties_stay_ties(self):
        model = models.LM(vocab=11, width=8, heads=2, layers=1, ff=8, context=4)
        state = codes.encode(model, partial(share.kmeans, bits=2))
        tied = {len(v) for v in groups(state) if len(v) > 1}
        best = pipeline.coded(state)
        assert {len(v) for v in groups(best) if len(v) > 1} == tied
        again = storage.loads(storage.dumps(model, best))
        want = codes.decode(state)
        for name, w in again.state_dict().items():
            assert torch.equal(w, want[name]), name


def groups(state):
    found = {}
    for name, x in state.items():
        found.setdefault(id(x), []).append(name)
    return found.values()


class TestHalved:
    def test_is_torch_half_everywhere(self):
        book = share.kmeans(noise(4, 4).double(), bits=2)
        state = {"a": noise(3), "b": book, "n": torch.tensor(3)}
        state["tied"] = state["a"]
        half = pipeline.halved(state)
        assert torch.equal(half["a"], state["a"].half())
        assert half["tied"] is half["a"]
        assert half["n"] is state["n"]
        assert torch.equal(half["b"].centroids, book.centroids.half())
        assert half["b"].index is not None
        assert state["a"].dtype == torch.float32

    def test_where_says_which(self):
        state = {"weight": noise(2), "bias": noise(2)}
        half = pipeline.halved(state, lambda name: name == "bias")
        assert half["weight"] is state["weight"]
        assert half["bias"].dtype == torch.float16

    def test_names_what_is_too_large(self):
        with pytest.raises(ValueError, match=r"scale: 1e\+06 is above 65504"):
            pipeline.halved({"scale": torch.tensor([1.0, 1e6])})

    def test_infinity_is_no_overflow(self):
        x = torch.tensor([torch.inf, 1.0])
        assert torch.equal(pipeline.halved({"x": x})["x"], x.half())


class TestStates:
    def test_sparse_state_decodes_to_the_model(self):
        model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
        with torch.no_grad():
            model[0].weight[some((4, 6), 0.7)] = 0
        state = pipeline.sparse_state(model)
        assert isinstance(state["0.weight"], codes.Sparse)
        assert isinstance(state["2.weight"], torch.Tensor)
        small = pipeline.realized(model, state)
        for a, b in zip(model.parameters(), small.parameters(), strict=True):
            assert torch.equal(a, b)
            assert a is not b

    def test_file_bytes_is_a_file(self):
        code = shared((6, 5))
        model = nn.Linear(5, 6, bias=False)
        whole = len(storage.dumps(model, {"weight": code}))
        assert pipeline.file_bytes(code) == whole - len("weight") + len("w")
