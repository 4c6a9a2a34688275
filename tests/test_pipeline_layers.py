"""The table per layer against files, and Deep Compression's own terms."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from minicompress import codes, entropy, pipeline, quantize, share, storage

COMPACT = partial(storage.dumps, compact=True)


def sparse(shape=(40, 50), density=0.1, bits=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g)
    code = codes.sparse(w, torch.rand(shape, generator=g) < density)
    if bits is None:
        return code
    return replace(code, values=share.kmeans(code.values, bits=bits))


def only(x):
    (cost,) = pipeline.layer_costs({"w": x})
    return cost


class TestLayerCosts:
    def test_floats(self):
        x = torch.randn(4, 8)
        cost = only(x)
        assert (cost.params, cost.kept, cost.bytes) == (32, 32, 128)
        assert cost.value_bits == cost.value_coded == cost.coded == 32
        assert cost.index_bits is cost.index_coded is None
        assert cost.percent == 100
        assert only(x.half()).value_bits == 16

    def test_shared_values_of_fixed_width(self):
        code = share.kmeans(torch.randn(16, 16), bits=3)
        cost = only(code)
        assert cost.value_bits == cost.value_coded == 3
        assert cost.bytes == 256 * 3 // 8 + 8 * 4

    def test_what_is_pruned_and_shared(self):
        code = sparse(bits=4)
        kept = len(code.values.index.values)
        cost = only(code)
        assert cost.kept == kept
        assert cost.value_bits == pytest.approx(4, abs=8 / kept)
        # bits of the best gaps, counted by hand: a step each, and fillers
        places = code.mask.flatten().nonzero().flatten().tolist()
        gaps = [b - a - 1 for a, b in zip([-1, *places], places, strict=False)]
        by_hand = min(
            k * sum(g // (2**k - 1) + 1 for g in gaps) for k in range(1, 9)
        )
        assert cost.index_bits == pytest.approx(by_hand / kept, abs=8 / kept)
        assert cost.index_coded == pytest.approx(2000 / kept)  # a bitmap

    def test_entropy_coding_shows_in_coded_alone(self):
        code = sparse(bits=4)
        mask = codes.gaps(code.mask, bits=4)
        mask = replace(mask, steps=entropy.huffman(mask.steps))
        index = entropy.huffman(code.values.index)
        coded = replace(
            code, mask=mask, values=replace(code.values, index=index)
        )
        before, after = only(code), only(coded)
        assert after.value_bits == before.value_bits
        assert after.index_bits == before.index_bits
        kept = after.kept
        assert after.value_coded == 8 * storage.payload(index) / kept
        assert after.index_coded == 8 * storage.payload(mask) / kept
        assert after.coded == after.value_coded + after.index_coded
        assert after.bytes == storage.payload(coded)

    def test_one_list_for_both(self):
        code = sparse(bits=2)
        one = pipeline.merged(code)
        coded = replace(one, index=entropy.rans(one.index))
        cost = only(coded)
        assert cost.kept == len(code.values.index.values)
        assert cost.value_bits == pytest.approx(2, abs=8 / cost.kept)
        assert cost.index_bits == only(code).index_bits
        assert cost.value_coded is cost.index_coded is None
        assert cost.coded == 8 * storage.payload(coded.index) / cost.kept
        on_a_grid = codes.View(replace(coded), (20, 100))
        assert only(on_a_grid) == replace(cost, name="w")

    def test_integers_on_a_grid_and_factors(self):
        w = torch.randn(16, 64)
        assert only(quantize.min_max(w, bits=4)).value_bits == 4
        u, v = torch.randn(16, 2), torch.randn(2, 64)
        cost = only(codes.Factors(u, share.kmeans(v, bits=2)))
        # 32 floats and 128 times two bits, for 1024 positions
        assert cost.value_bits == (32 * 32 + 128 * 2) / 1024

    def test_rows_and_paper_example_of_ratios(self):
        # FACTS C2: density 0.1, 5 bits a value, 5 bits a gap
        code = sparse((200, 200), bits=5)
        mask = codes.gaps(code.mask, bits=5)
        cost = only(replace(code, mask=mask))
        fillers = 0.9**31 / (1 - 0.9**31)
        by_formula = 32 / (0.1 * (5 + 5 * (1 + fillers)))
        ratio = 4 * cost.params / (cost.bytes - 32 * 4)
        assert ratio == pytest.approx(by_formula, rel=0.03)

    def test_tied_weights_count_once(self):
        x = torch.randn(2, 3)
        costs = pipeline.layer_costs({"a": x, "b": x, "c": x.clone()})
        assert [c.name for c in costs] == ["a", "c"]

    def test_empty_and_all_zero(self):
        assert only(torch.zeros(0)).params == 0
        cost = only(sparse(density=0.0))
        assert cost.kept == 0 and cost.coded >= 0
        assert math.isfinite(cost.percent)


class TestLayerTable:
    def model(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 3))
        state = pipeline.plain(model)
        state = state | {"0.weight": sparse(bits=3)}
        return model, pipeline.coded(pipeline.halved(state))

    @pytest.mark.parametrize("dumps", [storage.dumps, COMPACT])
    def test_bytes_add_up_to_the_file(self, dumps):
        model, state = self.model()
        table = pipeline.layer_table(model, state, dumps=dumps)
        names, sizes = list(zip(*table.rows, strict=True))[:2]
        assert names == ("0.weight", "2.weight", "the rest", "header", "file")
        *parts, whole = (int(s.replace(",", "")) for s in sizes)
        assert whole == sum(parts) == len(dumps(model, state))

    def test_paper_in_brackets(self):
        model, state = self.model()
        paper = {
            "0.weight": {"kept %": 8, "value bits": (6, 5.1)},
            "file": {"% of fp32": 2.5},
        }
        table = pipeline.layer_table(model, state, paper=paper)
        rows = {
            row[0]: dict(zip(table.header, row, strict=True))
            for row in table.rows
        }
        assert rows["0.weight"]["kept %"].endswith(" (8)")
        assert rows["0.weight"]["value bits"].endswith("(6 → 5.1)")
        assert rows["file"]["% of fp32"].endswith(" (2.5)")
        assert "(" not in rows["2.weight"]["kept %"]

    @pytest.mark.parametrize(
        "paper", [{"lost": {"kept %": 8}}, {"file": {"lost": 8}}]
    )
    def test_rows_and_columns_that_there_are_not(self, paper):
        with pytest.raises(ValueError, match=r"paper: .*lost"):
            pipeline.layer_table(*self.model(), paper=paper)

    def test_all_weights_have_a_row_when_all_are_coded(self):
        model, state = self.model()
        bias = share.kmeans(model[0].bias.detach(), bits=3)
        table = pipeline.layer_table(model, state | {"0.bias": bias})
        assert "0.bias" in [row[0] for row in table.rows]
