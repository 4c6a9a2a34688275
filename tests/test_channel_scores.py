"""Scores of channels and heads against gates, loops and other libraries."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from shapes import SHAPES, example, randomized
from torch import nn
from torch.nn.utils import prune as theirs

from minicompress import models, prune, train

IDS = torch.arange(24).view(4, 6) % 20


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def cnn():
    torch.manual_seed(0)
    model = randomized(models.CNN(channels=(4, 6), classes=3))
    return model, torch.randn(5, 1, 8, 8, dtype=torch.float64)


def lm():
    torch.manual_seed(0)
    config = {"vocab": 20, "width": 16, "layers": 2, "heads": 4, "ff": 12}
    return randomized(models.LM(**config, context=8)), IDS


def squares(model, x):
    return model(x).square().sum()


def named(groups):
    return {group.name: group for group in groups}


class TestSums:
    @pytest.mark.parametrize("name", SHAPES)
    @pytest.mark.parametrize("role", ["out", "in", "along"])
    def test_every_entry_counts_once(self, name, role):
        model, x = example(name)
        tensors = dict(model.named_parameters())
        values = {n: torch.rand_like(t) for n, t in tensors.items()}
        for group in prune.groups(model, x):
            found = prune.unit_sums(group, values, role=role)
            for unit in range(group.size):
                want = sum(
                    values[part.name]
                    .index_select(
                        part.axis, (part.unit == unit).nonzero()[:, 0]
                    )
                    .sum()
                    for part in group.slices
                    if part.role == role and part.name in values
                )
                assert torch.isclose(
                    found[unit].double(), torch.as_tensor(want).double()
                )

    @pytest.mark.parametrize("name", SHAPES)
    def test_all_roles_are_the_parameters_that_go(self, name):
        model, x = example(name)
        ones = {n: torch.ones_like(p) for n, p in model.named_parameters()}
        for group in prune.groups(model, x):
            keep = torch.ones(group.size, dtype=torch.bool)
            keep[0] = False
            try:
                small = prune.remove_channels(model, {group.name: keep}, x)
            except ValueError:
                continue  # the only unit of one of several layers
            gone = sum(p.numel() for p in model.parameters()) - sum(
                p.numel() for p in small.parameters()
            )
            counted = sum(
                prune.unit_sums(group, ones, role=role)[0]
                for role in ("out", "in", "along")
            )
            # a weight inside the group, made and read by it, counts twice
            assert gone <= counted <= 2 * gone

    def test_unknown_role(self):
        group = prune.groups(mlp(), torch.zeros(1, 5).double())[0]
        with pytest.raises(ValueError, match=r"role must be .* got 'rows'"):
            prune.unit_sums(group, {}, role="rows")


class TestNorms:
    @pytest.mark.parametrize("p", [1, 2])
    def test_masks_are_those_of_torch(self, p):
        model, x = cnn()
        groups = prune.groups(model, x)
        scores = prune.filter_norms(model, groups, p=p)
        keep = prune.keep_units(
            groups, scores, sparsity=0.5, select=prune.keep_each
        )
        for i, conv in enumerate(deepcopy(model).convs):
            theirs.ln_structured(conv, "weight", amount=0.5, n=p, dim=0)
            mask = conv.weight_mask.flatten(1).all(1)
            assert torch.equal(keep[f"convs.{i}"], mask)

    def test_length_of_rows(self):
        model = mlp()
        [found] = prune.filter_norms(
            model, prune.groups(model, torch.zeros(1, 5).double()), p=2
        ).values()
        assert torch.allclose(found, model[0].weight.norm(dim=1))

    def test_heads_are_all_rows_of_a_head(self):
        model, x = lm()
        found = prune.filter_norms(model, prune.groups(model, x))
        a = model.blocks[1].attention
        rows = [
            m.weight.abs().sum(1).view(4, 4).sum(1) for m in (a.q, a.k, a.v)
        ]
        assert torch.allclose(found["blocks.1.attention.q"], sum(rows))

    def test_only_one_and_two(self):
        with pytest.raises(ValueError, match="p must be 1 or 2, got 3"):
            prune.filter_norms(mlp(), [], p=3)


class TestDistances:
    def test_by_hand(self):
        W = torch.randn(6, 2, 3)
        found = prune.geometric_median(W)
        for i in range(6):
            each = [(W[i] - W[j]).norm() for j in range(6)]
            assert torch.isclose(found[i], torch.stack(each).sum())

    def test_a_shift_of_all_filters_changes_nothing(self):
        W = torch.randn(5, 4, dtype=torch.float64)
        shifted = prune.geometric_median(W + torch.randn(4))
        assert torch.allclose(prune.geometric_median(W), shifted)
        norms = W.norm(dim=1)
        assert not torch.allclose((W + 1).norm(dim=1), norms)

    def test_a_copy_goes_before_a_small_filter(self):
        W = torch.eye(4)[:, :, None]
        W = torch.cat([W, W[:1], 0.01 * torch.randn(1, 4, 1) + 3])
        assert (
            prune.geometric_median(W)[[0, 4]].max()
            < (prune.geometric_median(W)[5])
        )

    def test_layers_that_make_the_same_units_are_added(self):
        torch.manual_seed(0)
        model = randomized(models.ResNet((4,), blocks=2)).double()
        x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
        groups = prune.groups(model, x)
        found = prune.filter_distances(model, groups)["conv"]
        makers = [model.conv, *(b.conv2 for b in model.blocks)]
        want = sum(prune.geometric_median(m.weight) for m in makers)
        assert torch.allclose(found, want)


class TestScales:
    def test_scale_of_the_norm_behind(self):
        model, x = cnn()
        found = prune.norm_scales(model, prune.groups(model, x))
        for i, norm in enumerate(model.norms):
            assert torch.equal(found[f"convs.{i}"], norm.weight.detach().abs())

    def test_no_norm(self):
        groups = prune.groups(mlp(), torch.zeros(1, 5).double())
        with pytest.raises(ValueError, match="passes no norm with a scale"):
            prune.norm_scales(mlp(), groups)


def gated(model, layer, axis, entries, x):
    """Derive the loss by a gate on the inputs of a layer, entry by entry."""
    m = torch.ones(entries, dtype=torch.float64, requires_grad=True)
    shape = [1] * 4
    shape[axis] = entries

    def hook(module, args):
        return args[0] * m.view(shape[: args[0].ndim])

    handle = layer.register_forward_pre_hook(hook)
    out = []
    for sample in x.split(1):
        [g] = torch.autograd.grad(squares(model, sample), m)
        out.append(g)
    handle.remove()
    return torch.stack(out)


class TestGates:
    def test_of_a_hidden_layer(self):
        model, x = mlp(), torch.randn(4, 5, dtype=torch.float64)
        found = prune.gates(model, prune.groups(model, x), [x], squares)["0"]
        assert found.shape == (4, 7)
        assert torch.allclose(found, gated(model, model[2], 1, 7, x))

    def test_of_channels_behind_a_batch_norm(self):
        model, x = cnn()
        found = prune.gates(model, prune.groups(model, x), [x], squares)
        want = gated(model, model.convs[1], 1, 4, x)
        assert torch.allclose(found["convs.0"], want)
        want = gated(model, model.head, 1, 6, x)
        assert torch.allclose(found["convs.1"], want)

    def test_of_heads(self):
        model, x = lm()
        found = prune.gates(model, prune.groups(model, x), [x], squares)
        out = model.blocks[0].attention.out
        m = torch.ones(4, dtype=torch.float64, requires_grad=True)
        handle = out.register_forward_pre_hook(
            lambda layer, args: args[0] * m.repeat_interleave(4)
        )
        want = [
            torch.autograd.grad(squares(model, row[None]), m)[0] for row in x
        ]
        handle.remove()
        name = "blocks.0.attention.q"
        assert torch.allclose(found[name], torch.stack(want))

    def test_through_a_flattened_image(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)
        ).double()
        x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
        [found] = prune.gates(
            model, prune.groups(model, x), [x], squares
        ).values()
        want = gated(model, model[3], 1, 12, x)
        assert torch.allclose(found, want.view(3, 3, 4).sum(2))

    def test_mean_is_that_of_the_mean_gradient(self):
        model, x = cnn()
        y = torch.tensor([0, 1, 2, 0, 1])
        groups = prune.groups(model, x)
        mean = prune.gradients(model, [(x, y)])
        tensors = dict(model.named_parameters())
        products = {n: m.mean * tensors[n] for n, m in mean.items()}
        found = prune.gates(model, groups, [(x[:2], y[:2]), (x[2:], y[2:])])
        for group in groups:
            want = prune.unit_sums(group, products, role="in")
            assert torch.allclose(found[group.name].mean(0), want)

    def test_first_order_is_exact_for_a_linear_loss(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1)).double()
        x = torch.randn(6, 5, dtype=torch.float64)
        groups = prune.groups(model, x)

        def loss(model, x):
            return model(x).mean()

        found = prune.gates(model, groups, [x], loss)["0"].mean(0)
        for unit in range(7):
            keep = {"0": torch.arange(7) != unit}
            small = prune.remove_channels(model, keep, x)
            rise = loss(small, x) - loss(model, x)
            assert torch.isclose(rise, -found[unit])

    def test_rows_before_a_batch_norm_in_training_sum_to_zero(self):
        model, x = cnn()
        model.train()
        loss = squares(model, x)
        W = model.convs[0].weight
        [g] = torch.autograd.grad(loss, W)
        rows = (g * W).flatten(1).sum(1).detach()
        assert rows.abs().max() < 1e-4 * (g * W).abs().sum()
        model.eval()
        found = prune.gates(model, prune.groups(model, x), [x], squares)
        assert found["convs.0"].mean(0).abs().max() > 1e-2

    def test_nothing_is_changed(self):
        model, x = cnn()
        model.train()
        before = deepcopy(model.state_dict())
        prune.gates(model, prune.groups(model, x), [x], squares)
        after = model.state_dict()
        assert all(torch.equal(after[n], t) for n, t in before.items())
        assert model.training

    def test_no_samples(self):
        model, x = cnn()
        with pytest.raises(ValueError, match="batches: there are no samples"):
            prune.gates(model, prune.groups(model, x), [])


class TestActivations:
    def test_channels_are_averaged_over_positions(self):
        model, x = cnn()
        groups = prune.groups(model, x)
        found = prune.unit_activations(model, groups, [x[:2], (x[2:], None)])
        a = F.relu(model.norms[0](model.convs[0](x)))
        assert torch.allclose(found["convs.0"], F.max_pool2d(a, 2).mean((2, 3)))

    def test_share_that_is_not_zero(self):
        model, x = cnn()
        found = prune.unit_activations(
            model,
            prune.groups(model, x),
            [x],
            of=lambda a: (a > 0).double(),
        )
        a = F.max_pool2d(F.relu(model.norms[0](model.convs[0](x))), 2)
        assert torch.allclose(found["convs.0"], (a > 0).double().mean((2, 3)))

    def test_a_head_is_the_mean_of_its_features(self):
        model, x = lm()
        seen = []
        handle = model.blocks[1].attention.out.register_forward_pre_hook(
            lambda layer, args: seen.append(args[0])
        )
        model(x)
        handle.remove()
        found = prune.unit_activations(model, prune.groups(model, x), [x])
        want = seen[0].reshape(-1, 4, 4).mean(2)  # (tokens, heads)
        assert torch.allclose(found["blocks.1.attention.q"], want)

    def test_a_constant_channel_has_no_entropy(self):
        model, x = cnn()
        with torch.no_grad():
            model.norms[0].weight[2] = 0
            model.norms[0].bias[2] = 0.7
        acts = prune.unit_activations(model, prune.groups(model, x), [x])
        H = prune.channel_entropy(acts["convs.0"])
        assert H[2] == 0
        assert H[0] > 1

    def test_hooks_are_gone(self):
        model, x = cnn()
        prune.unit_activations(model, prune.groups(model, x), [x])
        assert not any(m._forward_pre_hooks for m in model.modules())

    def test_a_reader_that_is_not_called(self):
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

            def forward(self, x):
                return F.linear(self.a(x).relu(), self.b.weight)

        model, x = Functional(), torch.randn(2, 3)
        groups = prune.groups(model, x)
        with pytest.raises(ValueError, match=r"reader of .* was not called"):
            prune.unit_activations(model, groups, [x])


class TestNormalized:
    def test_mean_or_length_one(self):
        scores = {"a": torch.tensor([3.0, 4.0]), "b": torch.rand(5)}
        for s in prune.normalized(scores).values():
            assert torch.isclose(s.mean(), torch.tensor(1.0))
        length = torch.linalg.vector_norm
        for s in prune.normalized(scores, by=length).values():
            assert torch.isclose(s.norm(), torch.tensor(1.0))

    def test_by_their_length_wide_layers_lose_first(self):
        scores = {"narrow": torch.ones(4), "wide": torch.ones(16)}
        even = prune.normalized(scores)
        assert even["narrow"][0] == even["wide"][0]
        uneven = prune.normalized(scores, by=torch.linalg.vector_norm)
        assert uneven["narrow"][0] == 2 * uneven["wide"][0]

    def test_zeros_stay(self):
        found = prune.normalized({"a": torch.zeros(3)})
        assert torch.equal(found["a"], torch.zeros(3))


def test_scores_find_the_units_that_matter():
    """Of twice as many units as it takes, half are noise: they go first."""
    torch.manual_seed(0)
    X = torch.randn(256, 6)
    y = (X[:, 0] * X[:, 1] > 0).long()
    net = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
    feed = train.batches(X, y, size=32, epochs=40)
    net = train.fit(net, feed, lr=1e-2)
    with torch.no_grad():  # six units that nobody listens to
        net[2].weight[:, ::2] *= 1e-4
    groups = prune.groups(net, X[:1])
    scores = {
        "gates": prune.gates(net, groups, [(X, y)])["0"].abs().mean(0),
        "thinet": prune.reconstruction_scores(net, groups, [X])["0"],
    }
    for name, s in scores.items():
        assert s[::2].max() < s[1::2].max() / 10, name
