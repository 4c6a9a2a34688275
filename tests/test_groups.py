"""Groups of channels: sizes and slices by hand, and every wiring exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import example, randomized
from torch import nn
from wirings import WIRINGS

from minicompress import models, prune
from minicompress.prune import units


def found(model, x):
    return {g.name: g for g in prune.groups(model, x)}


class TestWirings:
    @pytest.mark.parametrize("name", list(WIRINGS))
    def test_sizes_and_function(self, name):
        torch.manual_seed(0)
        build, shape, sizes = WIRINGS[name]
        model = randomized(build())
        x = torch.randn(shape, dtype=torch.float64)
        groups = prune.groups(model, x)
        assert {g.name: g.size for g in groups} == sizes
        for seed in range(3):
            g = torch.Generator().manual_seed(seed)
            keep = {
                n: torch.rand(k, generator=g) < 0.6 for n, k in sizes.items()
            }
            for mask in keep.values():
                mask[seed % len(mask)] = True
            small = prune.remove_channels(model, keep, x)
            masked = prune.mask_channels(model, keep, x)
            y = torch.randn(shape, dtype=torch.float64)  # not the traced one
            for a, b in zip(leaves(small(y)), leaves(masked(y)), strict=True):
                assert torch.allclose(a, b, rtol=0, atol=1e-10)


def leaves(y):
    return torch.utils._pytree.tree_leaves(y)


class TestByHand:
    def test_residual_network(self):
        model = models.ResNet((4, 6), blocks=2, inputs=3)
        groups = found(model, torch.randn(1, 3, 8, 8))
        assert {n: g.size for n, g in groups.items()} == {
            "conv": 4,
            "blocks.0.conv1": 4,
            "blocks.1.conv1": 4,
            "blocks.2.conv1": 6,
            "blocks.2.conv2": 6,
            "blocks.3.conv1": 6,
        }
        stream = groups["conv"].slices
        assert {s.name for s in stream if s.role == "out"} == {
            "conv.weight",
            "blocks.0.conv2.weight",
            "blocks.1.conv2.weight",
        }
        assert {s.name for s in stream if s.role == "in"} == {
            "blocks.0.conv1.weight",
            "blocks.1.conv1.weight",
            "blocks.2.conv1.weight",
            "blocks.2.shortcut.0.weight",
        }
        norms = ("norm", "blocks.0.norm2", "blocks.1.norm2")
        entries = ("weight", "bias", "running_mean", "running_var")
        assert {s.name for s in stream if s.role == "along"} == {
            f"{norm}.{entry}" for norm in norms for entry in entries
        }

    def test_flatten_makes_a_channel_many_columns(self):
        groups = found(models.LeNet5(), torch.randn(1, 1, 28, 28))
        columns = groups["conv2"].slices[-1]
        assert (columns.name, columns.axis) == ("fc1.weight", 1)
        by_hand = torch.arange(50).repeat_interleave(16)
        assert torch.equal(columns.unit, by_hand)

    def test_concatenation_keeps_offsets(self):
        model, x = example("DenseNet")
        slices = {
            s.name: s.unit.tolist() for s in found(model, x)["convs.1"].slices
        }
        assert slices["convs.2.weight"] == [-1] * 7 + [0, 1, 2]
        assert slices["transition.weight"] == [-1] * 7 + [0, 1, 2] + [-1] * 3

    def test_appended_zeros_stay(self):
        model, x = example("ResNet")
        slices = {(s.name, s.axis): s for s in found(model, x)["stem"].slices}
        made = slices["blocks.1.c.weight", 0].unit.tolist()
        assert made == [0, 1, 2, 3, 4, 5, -1, -1, -1, -1]

    def test_head_is_a_block_of_rows_and_columns(self):
        model = models.LM(vocab=9, width=16, layers=2, heads=4, ff=8)
        groups = found(model, torch.zeros(1, 5, dtype=torch.long))
        slices = groups["blocks.1.attention.q"].slices
        assert {
            (s.name.rpartition("attention.")[2], s.axis) for s in slices
        } == {
            ("q.weight", 0),
            ("q.bias", 0),
            ("k.weight", 0),
            ("k.bias", 0),
            ("v.weight", 0),
            ("v.bias", 0),
            ("out.weight", 1),
        }
        for s in slices:
            assert s.unit.tolist() == [h for h in range(4) for _ in range(4)]

    def test_fused_heads_lie_three_times_in_one_layer(self):
        model, x = example("ViT")
        slices = {
            s.name: s.unit.tolist() for s in found(model, x)["qkv"].slices
        }
        heads = [h for h in range(4) for _ in range(3)]
        assert slices["qkv.weight"] == slices["qkv.bias"] == heads * 3
        assert slices["out.weight"] == heads

    def test_key_goes_with_all_queries_that_share_it(self):
        model, x = example("Llama")
        slices = {s.name: s.unit.tolist() for s in found(model, x)["q"].slices}
        assert slices["q.weight"] == [0] * 4 + [1] * 4
        assert slices["kv.weight"] == [0, 0, 1, 1] * 2

    def test_group_of_a_convolution_is_one_unit(self):
        model, x = example("ResNeXt")
        slices = {
            s.name: s.unit.tolist()
            for s in found(model, x)["blocks.2.a"].slices
        }
        assert slices["blocks.2.a.weight"] == [0] * 4 + [1] * 4
        assert slices["blocks.2.b.weight"] == [0] * 4 + [1] * 4

    def test_inputs_and_outputs_stay(self):
        net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
        assert list(found(net, torch.zeros(1, 4))) == ["0"]
        assert found(net[:1], torch.zeros(1, 4)) == {}

    def test_width_that_is_the_output_stays(self):
        ids = torch.zeros(1, 5, dtype=torch.long)
        model = models.Encoder(vocab=9, width=8, layers=1, heads=2, ff=6)
        assert {n: g.size for n, g in found(model, ids).items()} == {
            "blocks.0.attention.q": 2,
            "blocks.0.up": 6,
        }

    def test_batch_does_not_matter(self):
        model, x = example("ViT")
        one, two = found(model, x[:1]), found(model, x)
        assert repr(one) == repr(two)

    def test_two_runs_are_the_same(self):
        model, x = example("MobileNet")
        for a, b in zip(
            *[prune.groups(model, x) for _ in range(2)], strict=True
        ):
            assert repr(a) == repr(b)
            for s, t in zip(a.slices, b.slices, strict=True):
                assert torch.equal(s.unit, t.unit)


@settings(deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19))),
    parts=st.integers(1, 3),
)
def test_classes_by_brute_force(pairs, parts):
    root = list(range(20))
    for a, b in pairs:
        low, high = sorted((root[a], root[b]))
        root = [low if r == high else r for r in root]
    joined = [
        tuple(torch.tensor(pairs[i::parts]).T)
        for i in range(parts)
        if pairs[i::parts]
    ]
    assert units.classes(20, joined).tolist() == root
