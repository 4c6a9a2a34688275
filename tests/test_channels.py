"""Pruned equals masked, counts by closed form, and clear errors."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPES, example, randomized
from torch import nn

from minicompress import measure, models, prune, storage

seeds = st.integers(0, 2**31)
IDS = torch.randint(0, 40, (2, 7))
BOOK = {
    "MLP": (lambda: models.MLP((16, 12, 8, 4)), torch.randn(3, 16)),
    "LeNet5": (models.LeNet5, torch.randn(2, 1, 28, 28)),
    "CNN": (
        lambda: models.CNN(channels=(4, 6, 8)),
        torch.randn(2, 1, 8, 8),
    ),
    "ResNet": (
        lambda: models.ResNet((4, 6), blocks=2, inputs=3),
        torch.randn(2, 3, 8, 8),
    ),
    "LM": (
        lambda: models.LM(
            vocab=40, width=16, layers=2, heads=4, ff=20, context=8
        ),
        IDS,
    ),
    "Encoder": (
        lambda: models.Encoder(
            vocab=40, width=16, layers=2, heads=4, ff=20, positions=8
        ),
        IDS,
    ),
}


def book(name, seed=0):
    torch.manual_seed(seed)
    build, x = BOOK[name]
    return randomized(build()), x.double() if x.is_floating_point() else x


def draw(groups, seed, p=0.5):
    """Draw masks that leave something of each axis."""
    g = torch.Generator().manual_seed(seed)
    while True:
        keep = {x.name: torch.rand(x.size, generator=g) < p for x in groups}
        stays = all(
            ((s.unit < 0) | keep[x.name][s.unit.clamp(min=0)]).any()
            for x in groups
            for s in x.slices
        )
        if stays and all(mask.any() for mask in keep.values()):
            return keep


def halves(groups):
    return {g.name: torch.arange(g.size) % 2 == 0 for g in groups}


def equal(a, b):
    return torch.allclose(
        a, b, rtol=0, atol=1e-10 * max(1, b.abs().max().item())
    )


CASES = [(book, name) for name in BOOK] + [(example, name) for name in SHAPES]


@pytest.fixture(scope="module")
def traced():
    """The networks and their groups, found once."""
    found = {}
    for make, name in CASES:
        model, x = make(name)
        found[make, name] = model, x, prune.groups(model, x)
    return found


class TestFunction:
    @pytest.mark.parametrize(("make", "name"), CASES)
    def test_pruned_is_masked(self, traced, make, name):
        model, x, groups = traced[make, name]

        @settings(max_examples=6, deadline=None)
        @given(seed=seeds)
        def check(seed):
            keep = draw(groups, seed)
            small = prune.remove_channels(model, keep, x)
            masked = prune.mask_channels(model, keep, x)
            assert equal(small(x), masked(x))
            assert measure.params(small) <= measure.params(model)

        check()

    @pytest.mark.parametrize(("make", "name"), CASES)
    def test_half_is_smaller_and_another_function(self, traced, make, name):
        model, x, groups = traced[make, name]
        small = prune.remove_channels(model, halves(groups), x)
        assert measure.params(small) < 0.8 * measure.params(model)
        assert measure.macs(small, x) < 0.8 * measure.macs(model, x)
        assert not torch.allclose(small(x), model(x), atol=1e-4)

    @pytest.mark.parametrize(("make", "name"), CASES)
    def test_pruned_network_has_the_groups_that_are_left(
        self, traced, make, name
    ):
        model, x, groups = traced[make, name]
        keep = halves(groups)
        again = prune.groups(prune.remove_channels(model, keep, x), x)
        sizes = {g.name: g.size for g in again}
        for g in groups:
            left = int(keep[g.name].sum())
            # not there: the last group of a convolution is an ordinary
            # one, and the last unit of a layer has to stay
            if name not in ("ResNeXt", "Own"):
                assert sizes.get(g.name, 1) == left

    @pytest.mark.parametrize(("make", "name"), CASES)
    def test_all_kept_is_the_model(self, traced, make, name):
        model, x, groups = traced[make, name]
        keep = {g.name: torch.ones(g.size, dtype=torch.bool) for g in groups}
        assert torch.equal(prune.remove_channels(model, keep, x)(x), model(x))
        assert torch.equal(prune.mask_channels(model, keep, x)(x), model(x))

    @pytest.mark.parametrize(("make", "name"), CASES)
    def test_original_is_untouched(self, traced, make, name):
        model, x, groups = traced[make, name]
        before, text = deepcopy(model.state_dict()), repr(model)
        prune.remove_channels(model, halves(groups), x)
        prune.mask_channels(model, halves(groups), x)
        after = model.state_dict()
        assert repr(model) == text and list(after) == list(before)
        assert all(torch.equal(after[n], before[n]) for n in before)

    @pytest.mark.parametrize("name", [n for _, n in CASES[: len(BOOK)]])
    def test_gate_on_what_layers_read(self, traced, name):
        """An oracle without groups: set inputs of layers to zero."""
        model, x, groups = traced[book, name]
        groups = [g for g in groups if g.name != "tokens"]
        keep = draw(groups, 3)
        gated = deepcopy(model)
        for g in groups:
            for s in g.slices:
                if s.role == "in":
                    layer = gated.get_submodule(s.name.rpartition(".")[0])
                    stays = (s.unit < 0) | keep[g.name][s.unit.clamp(min=0)]
                    layer.register_forward_pre_hook(gate(stays))
        small = prune.remove_channels(model, keep, x)
        assert equal(small(x), gated(x))


def gate(stays):
    def hook(layer, args):
        axis = 1 if isinstance(layer, nn.Conv2d) else -1
        shape = [1] * args[0].ndim
        shape[axis] = -1
        return (args[0] * stays.view(shape),)

    return hook


class TestByHand:
    def test_one_filter_by_hand(self):
        torch.manual_seed(0)
        model = randomized(
            nn.Sequential(
                nn.Conv2d(1, 3, 3),
                nn.BatchNorm2d(3),
                nn.ReLU(),
                nn.Conv2d(3, 2, 3),
            )
        )
        x = torch.randn(1, 1, 8, 8).double()
        keep = torch.tensor([True, False, True])
        small = prune.remove_channels(model, {"0": keep}, x)
        old, new = model.state_dict(), small.state_dict()
        for name in old:
            want = old[name]
            if name == "3.weight":
                want = want[:, keep]
            elif name != "3.bias" and want.ndim:
                want = want[keep]
            assert torch.equal(new[name], want), name
        assert small[0].out_channels == small[3].in_channels == 2
        assert small[1].num_features == 2

    def test_heads_removed_are_parameters_saved(self):
        # Michel et al.: a head is 4 matrices of width × d, and 3 biases.
        model, x = book("LM")
        keep = {"blocks.0.attention.q": torch.tensor([1, 0, 1, 1]) > 0}
        small = prune.remove_channels(model, keep, x)
        saved = measure.params(model) - measure.params(small)
        assert saved == 4 * 16 * 4 + 3 * 4

    def test_macs_of_a_cnn(self):
        model = models.CNN(channels=(8, 12, 16), classes=5)
        x = torch.randn(1, 1, 16, 16)
        left = {"convs.0": 5, "convs.1": 4, "convs.2": 9}
        keep = {
            g.name: torch.arange(g.size) < left[g.name]
            for g in prune.groups(model, x)
        }
        small = prune.remove_channels(model, keep, x)
        a, b, c = left.values()
        assert measure.macs(small, x) == (
            256 * 9 * a + 64 * 9 * a * b + 16 * 9 * b * c + c * 5
        )
        assert measure.params(small) == (
            9 * (a + a * b + b * c) + 2 * (a + b + c) + 5 * c + 5
        )

    def test_half_of_the_channels_are_a_quarter_of_the_macs(self):
        model = models.ResNet((16, 32), blocks=2, inputs=4)
        x = torch.randn(1, 4, 8, 8)
        small = prune.remove_channels(model, halves(prune.groups(model, x)), x)
        # all but the first layer and the last, which lose one side only
        first = 64 * 9 * 4 * 16
        last = 32 * 10
        inner = measure.macs(model, x) - first - last
        assert measure.macs(small, x) == inner // 4 + (first + last) // 2

    def test_width_and_heads_of_a_language_model(self):
        model = models.LM(
            vocab=40, width=16, layers=1, heads=4, ff=20, context=8
        )
        keep = {
            "tokens": torch.arange(16) < 10,
            "blocks.0.attention.q": torch.arange(4) < 3,
            "blocks.0.up": torch.arange(20) < 7,
        }
        small = prune.remove_channels(model, keep, IDS)
        d, inner, ff = 10, 12, 7
        assert measure.params(small) == (
            (40 + 8) * d
            + 3 * (d * inner + inner)
            + inner * d
            + d
            + d * ff
            + ff
            + ff * d
            + d
            + 3 * 2 * d
        )
        assert small.head.weight is small.tokens.weight

    def test_a_unit_that_nobody_reads_is_free(self):
        model, x = book("CNN")
        model.convs[1].weight.data[:, 2] = 0
        keep = {"convs.0": torch.arange(4) != 2}
        small = prune.remove_channels(model, keep, x)
        assert equal(small(x), model(x))

    def test_constant_channel_in_the_bias_is_wrong_at_the_border(self):
        torch.manual_seed(0)
        model = randomized(
            nn.Sequential(
                nn.Conv2d(1, 2, 3, padding=1),
                nn.BatchNorm2d(2),
                nn.ReLU(),
                nn.Conv2d(2, 1, 3, padding=1),
            )
        )
        model[1].weight.data[1], model[1].bias.data[1] = 0, 0.7
        x = torch.randn(1, 1, 6, 6).double()
        keep = {"0": torch.tensor([True, False])}
        small = prune.remove_channels(model, keep, x)
        # The channel is 0.7 everywhere; removal leaves its effect out.
        effect = (model(x) - small(x)).detach()
        added = 0.7 * model[3].weight[0, 1].sum().detach()
        assert (effect - added)[..., 1:-1, 1:-1].abs().max() < 1e-12
        assert (effect - added).abs().max() > 0.01
        assert equal(small(x), prune.mask_channels(model, keep, x)(x))


class TestStorage:
    @pytest.mark.parametrize("name", list(BOOK))
    def test_round_trip(self, traced, name):
        model, x, groups = traced[book, name]
        keep = draw(groups, 5)
        small = prune.remove_channels(model, keep, x).eval()
        data = storage.dumps(small)
        again = storage.loads(data)
        assert torch.equal(again(x), small(x))
        assert len(data) < len(storage.dumps(model))
        assert storage.dumps(again) == data

    def test_own_module_loads_like_the_pruned_one(self, traced):
        model, x, groups = traced[example, "MobileNet"]
        small = prune.remove_channels(model, halves(groups), x)
        again = storage.loads(storage.dumps(small), like=small)
        assert torch.equal(again(x), small(x))


class Reads(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between, width=6):
        super().__init__()
        self.a, self.b = nn.Linear(4, width), nn.Linear(width, 2)
        self.between = Between(between)

    def forward(self, x):
        return self.b(self.between(self.a(x)))


class Between(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


def written(x):
    y = x.new_zeros(len(x), 6)
    y[:, :6] = x
    return y


class TestErrors:
    x = torch.randn(3, 4)
    keep = torch.arange(6) < 3

    def fails(self, model, keep, x, *words):
        for call in (prune.remove_channels, prune.mask_channels):
            with pytest.raises(ValueError) as error:
                call(model, keep, x)
            for word in words:
                assert word in str(error.value)

    @pytest.mark.parametrize(
        ("between", "op"),
        [
            (lambda x: torch.fft.rfft(x, 10).abs()[:, :6], "aten._fft_r2c"),
            (lambda x: x.softmax(-1), "aten._softmax"),
            (lambda x: x.cumsum(-1), "aten.cumsum"),
            (lambda x: x / x.sum(-1, keepdim=True), "aten.sum"),
            (lambda x: x.sort(-1).values, "aten.sort"),
            (lambda x: torch.cat([x[:, :2], x[:, 2:]], 1), "aten.slice"),
            (lambda x: x.roll(1, -1), "aten.roll"),
            (lambda x: x[:, [1, 0, 2, 3, 5, 4]], "aten.index"),
            (lambda x: F.layer_norm(x, x.shape[1:]), "aten.layer_norm"),
            (lambda x: x + torch.ones(6), "aten.add"),
            (lambda x: x @ torch.eye(6), "aten.matmul"),
            (written, "aten.copy_"),
            (lambda x: x[x > -9].view(-1, 6), "aten.index"),
            (lambda x: x.view(torch.int32).view(torch.float32), "aten.view"),
            (lambda x: nn.LayerNorm(6).forward(x), "aten.layer_norm"),
        ],
    )
    def test_names_what_needs_all_channels(self, between, op):
        model = Reads(between)
        assert prune.groups(model, self.x) == []
        self.fails(model, {"a": self.keep}, self.x, "'a'", op)

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_names_the_module(self, kind, dtype):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.rnn = nn.Linear(4, 6), kind(6, 5)
                self.b, self.c = nn.Linear(5, 7), nn.Linear(7, 2)

            def forward(self, x):
                return self.c(F.relu(self.b(self.rnn(self.a(x))[0])))

        model, x = Net().to(dtype), self.x.to(dtype)
        assert [g.name for g in prune.groups(model, x)] == ["b"]
        self.fails(model, {"a": self.keep}, x, f"{kind.__name__} 'rnn'")

    def test_attention_of_torch_stays_and_the_rest_shrinks(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 8),
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True),
            nn.Linear(8, 2),
        ).eval()
        x = torch.randn(2, 5, 4)
        assert [g.name for g in prune.groups(model, x)] == ["1.linear1"]
        small = prune.remove_channels(
            model, {"1.linear1": torch.arange(12) < 5}, x
        )
        assert small[1].linear2.in_features == 5
        assert torch.allclose(
            small(x),
            prune.mask_channels(model, {"1.linear1": torch.arange(12) < 5}, x)(
                x
            ),
            atol=1e-6,
        )
        self.fails(
            model,
            {"0": torch.arange(8) < 4},
            x,
            "MultiheadAttention '1.self_attn'",
        )

    def test_size_written_in_a_forward(self):
        model = Reads(lambda x: x.view(-1, 6))
        with pytest.raises(ValueError, match="'between' does not run"):
            prune.remove_channels(model, {"a": self.keep}, self.x)

    def test_heads_written_in_a_forward(self):
        def attend(x):  # 4 heads whatever remains: narrower ones
            y = x.view(1, 3, 4, -1).transpose(1, 2)
            return (
                F.scaled_dot_product_attention(y, y, y)
                .transpose(1, 2)
                .flatten(2)
            )

        model = Reads(attend, width=16)
        x = torch.randn(1, 3, 4)
        [group] = prune.groups(model, x)
        keep = {group.name: torch.arange(4) < 2}
        with pytest.raises(ValueError, match="something else"):
            prune.remove_channels(model, keep, x)

    def test_keep(self):
        model = Reads(torch.relu)
        for keep, word in [
            ({"c": self.keep}, "'c'"),
            ({"b": self.keep[:2]}, "output"),
            ({"a": self.keep[:5]}, "(6,)"),
            ({"a": self.keep.float()}, "bool"),
            ({"a": [True] * 6}, "bool"),
            ({"a": self.keep & False}, "nothing"),
        ]:
            self.fails(model, keep, self.x, "keep", word)

    def test_weight_that_the_forward_also_measures(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.tokens = nn.Embedding(7, 6)

            def forward(self, ids):
                w = self.tokens.weight
                return self.tokens(ids) @ w.T / w.T.norm(dim=0)

        ids = torch.zeros(1, 3, dtype=torch.long)
        assert prune.groups(Net(), ids) == []
        self.fails(Net(), {"tokens": self.keep}, ids, "tokens.weight is used")

    def test_name_of_a_layer_inside_a_group(self):
        model, x = book("ResNet")
        self.fails(
            model, {"blocks.0.conv2": torch.arange(4) < 2}, x, "group 'conv'"
        )

    def test_inputs_that_do_not_fit(self):
        with pytest.raises(ValueError, match="Linear 'a'"):
            prune.groups(Reads(torch.relu), torch.randn(3, 5))

    def test_part_of_a_concatenation_may_not_vanish(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 2), nn.Linear(4, 2)
                self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 1)

            def forward(self, x):
                y = torch.cat([self.a(x), self.b(x)], 1)
                return self.d(y + self.c(x))

        keep = torch.arange(4) < 2
        self.fails(Net(), {"a": keep}, self.x, "b.weight")


class TestCare:
    def test_modes_and_gradients_stay(self):
        model, x = book("CNN")
        model.train()
        model.norms[1].eval()
        model.convs[0].weight.requires_grad_(False)
        small = prune.remove_channels(
            model, {"convs.0": torch.arange(4) > 1}, x
        )
        modes = [m.training for m in model.modules()]
        assert [m.training for m in small.modules()] == modes
        assert not small.convs[0].weight.requires_grad
        assert small.convs[1].weight.requires_grad
        assert not model._forward_hooks and not model.norms[0]._forward_hooks

    def test_small_model_trains(self):
        model, x = book("ResNet")
        small = prune.remove_channels(
            model, halves(prune.groups(model, x)), x
        ).train()
        small(x).square().sum().backward()
        assert all(p.grad is not None for p in small.parameters())

    def test_weights_that_are_computed_stay(self):
        model = Reads(torch.relu)
        nn.utils.parametrizations.weight_norm(model.b)
        with pytest.raises(ValueError, match=r"aten\.linear in"):
            prune.remove_channels(
                model, {"a": torch.arange(6) < 3}, torch.randn(3, 4)
            )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_other_types(self, dtype):
        model, x = book("ResNet")
        model, x = model.to(dtype), x.to(dtype)
        keep = halves(prune.groups(model, x))
        small = prune.remove_channels(model, keep, x)
        assert small.head.weight.dtype == dtype
