"""The smallest file of the encoder: its theory against brute force."""

import itertools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minicompress import codes, models, pipeline, storage

pytest.importorskip("sklearn")  # that encoder_file imports indirectly

sys.path.insert(0, str(Path(__file__).parents[1] / "chapters/experiments"))
try:
    import _large
    import _steps as steps
    import encoder_file as file
finally:
    sys.path.pop(0)

RESULT = Path(file.__file__).parents[1] / "results" / "encoder_file.json"
WORDS = ["[PAD]", *(f"[unused{i}]" for i in range(9)), "[CLS]", "[SEP]"]
WORDS += ["the", "of", "and", "word", "rare", "##s"]


def encoder(seed=0, **more):
    torch.manual_seed(seed)
    sizes = {"vocab": 50, "width": 12, "layers": 2, "heads": 2, "ff": 20}
    model = models.Encoder(**sizes, positions=10, **more)
    with torch.no_grad():  # larger than at the start of a training
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.5)
    return model.eval()


def ids(n, T, seed=0):
    """Draw texts in which no token occurs twice."""
    dice = torch.Generator().manual_seed(seed)
    return torch.stack(
        [torch.randperm(50, generator=dice)[:T] for _ in range(n)]
    )


def normal(*shape, seed=0):
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=dice)


def moments(n, seed=0):
    """Second moments that are far from diagonal."""
    A = normal(n, 2 * n, seed=seed).double()
    A = A + 0.9 * A.roll(1, 0)
    return A @ A.T / (2 * n)


def embedding(model, x):
    with torch.no_grad():
        return F.normalize(model(x).mean(1))


class TestGradients:
    def test_against_the_gradient_of_each_text(self):
        model, batches = encoder(), [ids(3, 5), ids(2, 4, seed=1)]
        found, M = steps.gradients(model, batches, seed=7)
        dice = torch.Generator().manual_seed(7)
        name = "blocks.1.up.weight"
        W = model.get_parameter(name)
        H, s, table = 0, 0, 0
        for batch in batches:
            z = torch.randn(len(batch), 12, generator=dice)
            for text, direction in zip(batch, z, strict=True):
                v = F.normalize(model(text[None]).mean(1))[0]
                wanted = [W, model.tokens.weight]
                G, g = torch.autograd.grad(v @ direction, wanted)
                H = H + (G.T @ G).double() / 5
                s = s + (G @ G.T).diagonal().double() / 5
                table = table + (g.T @ g).double() / 5  # no token twice
        assert torch.allclose(found[name].H, H, rtol=1e-3, atol=1e-6)
        part = s / s.sum()
        part = part.clamp(min=steps.FLOOR * part.mean())
        assert torch.allclose(found[name].s, part, rtol=1e-3)
        assert torch.allclose(M, table, rtol=1e-3, atol=1e-6)

    def test_model_is_left_alone(self):
        model = encoder()
        before = {n: p.clone() for n, p in model.named_parameters()}
        steps.gradients(model, [ids(2, 4)])
        assert all(
            torch.equal(before[n], p) for n, p in model.named_parameters()
        )
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks for m in model.modules())

    def test_names_are_those_of_linear_layers(self):
        found, M = steps.gradients(encoder(), [ids(2, 4)])
        assert len(found) == 12 and M.shape == (12, 12)
        assert found["blocks.0.down.weight"].H.shape == (20, 20)
        assert found["blocks.0.down.weight"].s.shape == (12,)

    def test_predicts_how_far_the_embedding_moves(self):
        # one token: the product of factors is exact, for one row s too
        model, text = encoder(), ids(1, 1)
        found, _ = steps.gradients(model, [text.expand(20_000, 1)])
        name = "blocks.1.attention.out.weight"
        row = int(found[name].s.argmax())
        W = model.get_parameter(name)
        D = torch.zeros_like(W)
        D[row] = 1e-3 * normal(12, seed=3)
        before = embedding(model, text)
        with torch.no_grad():
            W += D
        moved = (embedding(model, text) - before).square().sum()
        assert steps.felt(D, found[name]) == pytest.approx(
            float(moved), rel=0.1
        )


class TestFelt:
    def test_is_the_double_sum(self):
        D, H = normal(3, 4), moments(4)
        weight = steps.Weight(H, torch.tensor([1.0, 2.0, 5.0]).double())
        d, h = D.double().numpy(), H.numpy()
        want = sum(
            s * np.einsum("j,jk,k", d[i], h, d[i])
            for i, s in enumerate([1, 2, 5])
        )
        assert steps.felt(D, weight) == pytest.approx(want)


class TestSteps:
    def test_powers(self):
        x = normal(100).exp()
        code = steps.on_powers(x)
        ratio = (code.decode().float() / x).log2().abs()
        assert ratio.max() <= 1 / 8 + 1e-3  # and half precision
        assert torch.equal(
            torch.round(4 * code.decode().float().log2()),
            torch.round(4 * x.log2()),
        )

    def test_one_power(self):
        assert (
            steps.on_powers(torch.full((3, 1), 4.0)).decode().tolist()
            == [[4.0]] * 3
        )

    def test_shorter_keeps_the_integers(self):
        often = codes.Ints((normal(5000) > 2).int(), 4)
        once = codes.Ints(torch.arange(16), 4)
        assert storage.payload(steps.shorter(often)) < 5000 / 8
        assert steps.shorter(once) is once
        assert torch.equal(steps.shorter(often).decode(), often.values)

    def test_listed(self):
        q = torch.tensor([[-3, 0, 5], [1, 1, 1]], dtype=torch.int32)
        assert torch.equal(steps.listed(q, 0.5).decode(), 0.5 * q)
        assert steps.listed(0 * q, 0.5).decode().abs().sum() == 0

    def test_every_weight_costs_the_same(self):
        W, s = normal(60, 40, seed=1), normal(60, seed=2).exp().double()
        weight, c = steps.Weight(moments(40), s), 0.02
        code = steps.by_gptq(W, weight.H, steps.even(weight, c))
        lost = (code.decode() - W).square().mul(s[:, None]) > 0
        assert lost.any()
        cost = steps.felt(code.decode() - W, weight)
        assert cost == pytest.approx(W.numel() * c**2 / 12, rel=0.1)

    def test_even_steps_need_fewer_bits_than_one_step(self):
        W, s = normal(60, 400, seed=1), normal(60, seed=2).exp().double()
        weight = steps.Weight(moments(400), s)
        even = steps.by_gptq(W, weight.H, steps.even(weight, 0.1))
        cost = steps.felt(even.decode() - W, weight)
        low, high = 1e-3, 1.0
        for _ in range(20):  # one step that loses as much
            step = math.sqrt(low * high)
            one = steps.by_gptq(W, weight.H, step)
            worse = steps.felt(one.decode() - W, weight) > cost
            low, high = (low, step) if worse else (step, high)
        assert storage.payload(even) < storage.payload(one)

    def test_nearest(self):
        W = normal(7, 9)
        code = steps.by_nearest(W, 0.25)
        assert torch.equal(code.decode(), torch.round(4 * W) / 4)

    def test_too_fine_steps(self):
        with pytest.raises(ValueError, match="too fine"):
            steps.by_gptq(normal(3, 4), moments(4), 1e-6)

    def test_weights_are_left_alone(self):
        W = normal(6, 5)
        before = W.clone()
        weight = steps.Weight(moments(5), torch.ones(6).double())
        steps.by_gptq(W, weight.H, steps.even(weight, 0.1))
        steps.by_nearest(W, 0.1)
        assert torch.equal(W, before)


class TestTurned:
    def table(self, rows=3000, width=16, seed=0):
        return 0.1 * normal(rows, width, seed=seed) @ moments(width).float()

    def cost(self, E, code, M, p):
        e = (code.decode() - E).double()
        return float((((e @ M) * e).sum(1) * p).sum())

    def test_cost_is_that_of_the_step(self):
        E, M = self.table(), moments(16, seed=1)
        p = 1 / torch.arange(1, 3001).double()
        code = steps.turned(E, M, p, 1e-3)
        ratio = self.cost(E, code, M, p) / (E.numel() * 1e-6 / 12)
        # the damping of M makes the real errors a little cheaper
        assert 0.8 < ratio < 1.1

    def test_fewer_bytes_than_one_step_for_the_same_cost(self):
        E, M, p = self.table(), moments(16, seed=1), torch.ones(3000).double()
        code = steps.turned(E, M, p, 0.3)
        cost, step = self.cost(E, code, M, p), 1.0
        while self.cost(E, one := steps.by_nearest(E, step), M, p) > cost:
            step *= 0.9
        assert storage.payload(code) < 0.8 * storage.payload(one)

    def test_rows_that_do_not_count_take_nothing(self):
        E, M, p = self.table(), moments(16), torch.ones(3000).double()
        p[1000:] = 1e-12
        code = steps.turned(E, M, p, 0.03)
        whole = steps.turned(E, M, torch.ones(3000).double(), 0.03)
        # a third, and the tables of the coder
        assert storage.payload(code) < 0.6 * storage.payload(whole)
        # they become the mean of those that count
        assert code.decode()[1000:].std(0).max() < 1e-6

    def test_a_table_of_low_rank_has_few_directions(self):
        E = normal(3000, 3) @ normal(3, 16, seed=1)
        p = torch.ones(3000).double()
        code = steps.turned(E, torch.eye(16).double(), p, 0.05, parts=1)
        assert codes.shape(code.a.x.v)[0] == 3

    def test_what_is_read_is_what_was_written(self):
        model = encoder()
        E = model.tokens.weight.detach()
        p = torch.ones(50).double()
        made = {"tokens.weight": steps.turned(E, moments(12), p, 0.1)}
        state = pipeline.halved(pipeline.plain(model)) | made
        again = storage.loads(storage.dumps(model, state))
        want = made["tokens.weight"].decode()
        assert torch.equal(again.tokens.weight, want)


class TestLikely:
    def test_unused_tokens_do_not_count(self):
        for p in (steps.alike(WORDS), steps.zipf(WORDS)):
            assert (p[1:10] <= 1e-12).all()
            assert (p[10:] > 0.01).all()

    def test_alike(self):
        assert steps.alike(WORDS)[[0, 12, 17]].tolist() == [1 / 9] * 3

    def test_half_of_the_likelihood_is_even(self):
        p = steps.zipf(WORDS)[12:]
        assert (p[:-1] > p[1:]).all()
        assert (p > 1 / 18).all()

    def test_ends_of_a_text_are_as_likely_as_anything(self):
        p = steps.zipf(WORDS)
        assert p[10] == p[11] == p.max()

    def test_later_positions_count_less(self):
        p = steps.places(512)
        assert torch.equal(p[:64], torch.full((64,), 1 / 64).double())
        assert (p[64:-1] > p[65:]).all() and p[256] == 64 / 256**2

    def test_only_seen_tokens(self):
        known = {"a": [10, 12, 11]}
        tokenizer = SimpleNamespace(encode=lambda t: torch.tensor(known[t]))
        p = file.seen_only(WORDS, ["a"], tokenizer)
        assert (p > 1e-9).nonzero().flatten().tolist() == [10, 11, 12]


class TestCoarsest:
    @pytest.mark.parametrize("power", [1.3, 2.0, 3.5])
    @pytest.mark.parametrize("guess", [1e-3, 0.1, 20.0])
    def test_finds_the_step(self, power, guess):
        tried = []

        def loss(x):
            tried.append(x)
            return 0.3 * x**power

        x = file.coarsest(loss, 0.01, guess)
        assert 0.97 * 0.01 <= loss(x) <= 0.01
        assert len(tried) <= 7

    def test_takes_the_best_of_those_tried(self):
        x = file.coarsest(lambda x: 0.001 if x < 1 else 1.0, 0.01, 2.0, tries=5)
        assert x < 1

    def test_says_so_if_there_is_none(self):
        with pytest.raises(ValueError, match="no step is good enough"):
            file.coarsest(lambda x: 1.0, 0.01, 1.0)


class TestParts:
    def bench(self):
        model = encoder()
        names = [n for n, p in model.named_parameters() if "blocks" in n]
        names = [n for n in names if model.get_parameter(n).ndim > 1]
        return SimpleNamespace(
            model=model,
            names=names,
            weight=lambda n: model.get_parameter(n).detach(),
            state=lambda made: pipeline.halved(pipeline.plain(model)) | made,
        )

    def test_without_pooler(self):
        model = encoder(pooler=True)
        small = file.without_pooler(model)
        assert small.pooler is None
        assert torch.equal(small(ids(2, 5)), model(ids(2, 5)))

    def test_parts_are_all_of_the_file_but_the_header(self):
        bench = self.bench()
        state = bench.state(file.in_8_bits(bench))
        sizes = file.parts(state)
        data = storage.dumps(bench.model, state)
        header = int.from_bytes(data[5:9], "little")
        assert sum(sizes.values()) == len(data) - header - 13
        assert sizes["tokens"] > 50 * 12 and sizes["positions"] > 10 * 12

    def test_8_bits_for_what_has_no_code(self):
        bench = self.bench()
        own = {"tokens.weight": codes.Ints(torch.zeros(50, 12).byte(), 1)}
        made = file.in_8_bits(bench, own)
        assert set(made) == set(dict(bench.model.named_parameters()))
        assert made["tokens.weight"] is own["tokens.weight"]
        for n in ("norm.weight", "blocks.0.up.bias", "types.weight"):
            W = bench.weight(n)
            wide = float(W.max().clamp(min=0) - W.min().clamp(max=0))
            assert (made[n].decode() - W).abs().max() <= wide / 255 / 2 + 1e-6

    def test_rungs_make_what_the_model_has(self):
        bench = self.bench()
        bench.words = [*WORDS, *(f"w{i}" for i in range(50 - len(WORDS)))]
        bench.gradients = steps.gradients(bench.model, [ids(20, 8)])
        bench.inputs = {
            n: moments(bench.weight(n).shape[1]) for n in bench.names
        }
        for make, guess in file.RUNGS.values():
            state = bench.state(make(bench, guess / 5 if guess else (8, 8)))
            model = storage.loads(storage.dumps(bench.model, state))
            x = 10 + ids(4, 6, seed=9) % 40  # not the unused ones
            near = embedding(model, x) * embedding(bench.model, x)
            assert near.sum(1).min() > 0.99, make

    def test_int8_linear_layers(self):
        bench = self.bench()
        fast = _large.in_int8(bench.model)
        x = ids(4, 6)
        near = (embedding(fast, x) * embedding(bench.model, x)).sum(1)
        assert near.min() > 0.99
        assert not torch.equal(fast(x), bench.model(x))

    def test_first_blocks(self):
        model = encoder()
        short = file.first_blocks(model, 1)
        x = ids(2, 5)
        before = model.norm(
            model.tokens(x)
            + model.positions(torch.arange(5))
            + model.types(torch.zeros_like(x))
        )
        assert torch.allclose(short(x), model.blocks[0](before), atol=1e-5)
        assert len(model.blocks) == 2


class TestTexts:
    def test_batches_hold_every_text_once_without_padding(self):
        def encode(text, length):
            return torch.tensor([ord(c) for c in text[:length]])

        tokenizer = SimpleNamespace(encode=encode)
        texts = ["ab", "c", "de", "f", "ghi", "jk"]
        found = file.batches(tokenizer, texts, size=2)
        back = ["".join(map(chr, row)) for b in found for row in b.tolist()]
        assert sorted(back) == sorted(texts)
        assert all(len(b) <= 2 for b in found)

    def test_random_words(self):
        words = ["the", "##ing", "ab", "[unused7]", "word", "12a"]
        texts = file.random_words(words, 20)
        assert {w for t in texts for w in t.split()} == {"the", "word"}
        assert all(len(t.split()) == 30 for t in texts)
        assert texts == file.random_words(words, 20)


@pytest.fixture(scope="module")
def result():
    return json.loads(RESULT.read_text("utf8"))


class TestResult:
    """What is stored is what the chapter says, with margins."""

    def rungs(self, result, target):
        rows = [r for r in result["ladder"] if r.get("target") == target]
        return {r["name"]: r for r in rows if r["name"] in file.RUNGS}

    @pytest.mark.parametrize("target", file.TARGETS)
    def test_every_rung_is_good_enough(self, result, target):
        rungs = self.rungs(result, target)
        assert list(rungs) == list(file.RUNGS)
        assert all(r["val"] >= target for r in rungs.values())
        assert all(abs(r["test"] - r["val"]) < 0.006 for r in rungs.values())

    @pytest.mark.parametrize("target", file.TARGETS)
    def test_every_idea_makes_it_smaller(self, result, target):
        size = {n: r["bytes"] for n, r in self.rungs(result, target).items()}
        for alone in ("coded", "GPTQ"):
            assert size["GPTQ, coded"] < size[alone] < size["rounding"]
        for a, b in itertools.pairwise(list(size)[3:]):
            assert size[b] < size[a]
        assert size["even steps"] < 0.85 * size["GPTQ, coded"]

    def test_smallest(self, result):
        plain = {r["name"]: r["bytes"] for r in result["ladder"]}
        good, fair = (result["smallest"][str(t)] for t in file.TARGETS)
        assert good["bytes"] < result["float32"]["bytes"] / 10
        assert good["bytes"] < plain["int8"] / 2.5
        assert fair["bytes"] < 0.7 * good["bytes"]
        assert good["sha256"] != fair["sha256"]
        assert result["parts"] == good["parts"]
        assert 0 < good["bytes"] - sum(good["parts"].values()) < 10_000

    def test_a_table_of_our_tokens_only_is_no_good_for_others(self, result):
        (ours,) = [r for r in result["ladder"] if "only" in r["name"]]
        whole = result["smallest"][str(file.TARGETS[0])]
        assert ours["bytes"] < whole["bytes"] - 1_000_000
        assert ours["other"] < whole["other"] - 0.05
        assert ours["random"] < whole["random"] - 0.3

    def test_prediction(self, result):
        found = result["blocks alone"]
        # first order, and calibrated on other text
        assert 1 < found["val"] / found["predicted"] < 2

    def test_reading_a_file_changes_no_time(self, result):
        for count in ("1 texts", "32 texts"):
            ratio = result["times"][count]["ratio"]
            assert 0.8 < ratio["read from the file"] < 1.25
            assert ratio["4 of 6 blocks"] < 0.85
