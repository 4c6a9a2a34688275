"""What makes up for removed channels, and choices by reconstruction."""

import itertools
from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy import optimize
from shapes import randomized
from sklearn import linear_model
from torch import nn

from minicompress import models, prune


def mlp(width=8, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))
    return model.double(), torch.randn(64, 5, dtype=torch.float64)


def convs(padding=0, bias=True, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=padding, bias=bias),
    )
    return model.double(), torch.randn(4, 1, 9, 9, dtype=torch.float64)


def without(model, x, *units, name="0"):
    [group] = prune.groups(model, x)
    keep = {name: torch.ones(group.size, dtype=torch.bool)}
    keep[name][list(units)] = False
    return [group], keep


class TestFold:
    def test_a_constant_unit_goes_without_a_trace(self):
        model, x = mlp()
        with torch.no_grad():
            model[0].weight[2] = 0
            model[0].bias[2] = 1.5
        groups, keep = without(model, x, 2)
        folded = prune.fold_means(model, groups, keep, [x])
        small = prune.remove_channels(folded, keep, x)
        assert torch.allclose(small(x), model(x))
        plain = prune.remove_channels(model, keep, x)
        assert (plain(x) - model(x)).abs().max() > 0.01

    @pytest.mark.parametrize("bias", [True, False])
    def test_exact_inside_a_padded_image_and_wrong_at_its_border(self, bias):
        model, x = convs(padding=1, bias=bias)
        with torch.no_grad():
            model[0].weight[3] = 0
            model[0].bias[3] = 1.0
        groups, keep = without(model, x, 3)
        # what the paper folds: the constant times the whole kernel
        shift = model[2].weight[:, 3].sum((1, 2))
        folded = deepcopy(model)
        if bias:
            folded[2].bias.data += shift
        else:
            folded[2].bias = nn.Parameter(shift.detach())
        small = prune.remove_channels(folded, keep, x)
        error = (small(x) - model(x)).abs()
        assert error[:, :, 1:-1, 1:-1].max() < 1e-12
        assert error[:, :, 0].max() > 0.01
        # the mean over all positions is the best single number
        best = prune.fold_means(model, groups, keep, [x])
        best = prune.remove_channels(best, keep, x)
        assert ((best(x) - model(x)) ** 2).sum() < (error**2).sum()

    def test_without_padding_it_is_exact(self):
        model, x = convs()
        with torch.no_grad():
            model[0].weight[3] = 0
            model[0].bias[3] = 1.0
        groups, keep = without(model, x, 3)
        folded = prune.fold_means(model, groups, keep, [x])
        small = prune.remove_channels(folded, keep, x)
        assert torch.allclose(small(x), model(x))

    def test_mean_of_the_output_stays(self):
        model, x = mlp()
        groups, keep = without(model, x, 0, 3, 5)
        folded = prune.fold_means(model, groups, keep, x.split(16))
        small = prune.remove_channels(folded, keep, x)
        assert torch.allclose(small(x).mean(0), model(x).mean(0))

    def test_the_model_is_left_alone(self):
        model, x = convs(bias=False)
        before = deepcopy(model.state_dict())
        groups, keep = without(model, x, 0)
        prune.fold_means(model, groups, keep, [x])
        prune.refit(model, groups, keep, [x])
        assert model[2].bias is None
        after = model.state_dict()
        assert all(torch.equal(after[n], t) for n, t in before.items())


class TestRefit:
    def test_is_least_squares_with_an_intercept(self):
        model, x = mlp()
        groups, keep = without(model, x, 1, 4)
        fitted = prune.refit(model, groups, keep, x.split(16), damp=0.0)
        with torch.no_grad():
            a = model[:2](x)[:, keep["0"]]
            A = torch.cat([a, torch.ones(len(a), 1)], 1).numpy()
            want = np.linalg.lstsq(A, model(x).numpy(), rcond=None)[0]
        W = fitted[2].weight[:, keep["0"]].detach().numpy()
        assert np.allclose(W.T, want[:-1])
        assert np.allclose(fitted[2].bias.detach().numpy(), want[-1])
        assert (fitted[2].weight[:, ~keep["0"]] == 0).all()

    def test_a_copy_takes_over(self):
        model, x = convs(padding=1)
        with torch.no_grad():
            model[0].weight[4] = model[0].weight[1]
            model[0].bias[4] = model[0].bias[1]
        groups, keep = without(model, x, 4)
        fitted = prune.refit(model, groups, keep, [x], damp=1e-12)
        small = prune.remove_channels(fitted, keep, x)
        assert torch.allclose(small(x), model(x))

    @pytest.mark.parametrize("gone", [(0,), (1, 2), (0, 3, 5)])
    def test_closer_than_the_mean_and_that_closer_than_nothing(self, gone):
        for model, x in (mlp(), convs(), convs(padding=1, bias=False)):
            groups, keep = without(model, x, *gone)

            def error(net, keep=keep, x=x, model=model):
                small = prune.remove_channels(net, keep, x)
                return ((small(x) - model(x)) ** 2).sum().item()

            fold = prune.fold_means(model, groups, keep, [x])
            fit = prune.refit(model, groups, keep, [x], damp=1e-9)
            assert error(fit) < error(fold) < error(model)

    def test_readers_of_several_groups(self):
        """A residual stream and the layers inside, all at once."""
        torch.manual_seed(0)
        config = {"vocab": 20, "width": 16, "layers": 2, "heads": 4, "ff": 24}
        model = randomized(models.LM(**config, context=8))
        ids = torch.randint(0, 20, (16, 8))
        groups = prune.groups(model, ids)
        keep = {
            g.name: torch.arange(g.size) % 3 != 0
            for g in groups
            if g.name != "tokens"
        }
        fit = prune.refit(model, groups, keep, [ids])
        error = {
            name: (prune.remove_channels(net, keep, ids)(ids) - model(ids))
            .square()
            .mean()
            for name, net in (("plain", model), ("refit", fit))
        }
        assert error["refit"] < error["plain"]

    def test_a_reader_of_another_kind(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3))
        x = torch.randn(2, 1, 9)
        groups, keep = without(model, x, 0)
        with pytest.raises(
            ValueError, match=r"2\.weight reads units, but Conv1d"
        ):
            prune.refit(model, groups, keep, [x])


class TestRenormalize:
    def test_statistics_of_the_data(self):
        torch.manual_seed(0)
        model = randomized(models.CNN(channels=(4, 6)))
        x = torch.randn(32, 1, 8, 8, dtype=torch.float64)
        found = prune.renormalize(model, [x])
        a = model.convs[0](x)
        assert torch.allclose(found.norms[0].running_mean, a.mean((0, 2, 3)))
        assert torch.allclose(found.norms[0].running_var, a.var((0, 2, 3)))
        assert found.norms[0].momentum == model.norms[0].momentum
        assert not any(m.training for m in found.modules())
        whole = prune.renormalize(model, x.split(8))
        means = [model.convs[0](b).mean((0, 2, 3)) for b in x.split(8)]
        assert torch.allclose(
            whole.norms[0].running_mean, torch.stack(means).mean(0)
        )

    def test_dropout_stays_off_and_weights_stay(self):
        model = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(4, 3), nn.BatchNorm1d(3)
        )
        x = torch.randn(64, 4)
        found = prune.renormalize(model.train(), [x])
        assert torch.allclose(found[2].running_mean, model[1](x).mean(0))
        assert torch.equal(found[1].weight, model[1].weight)
        assert model.training
        assert (model[2].running_mean == 0).all()

    def test_no_norm(self):
        with pytest.raises(ValueError, match="no batch norm with statistics"):
            prune.renormalize(nn.Linear(2, 2), [torch.zeros(1, 2)])


class TestContributions:
    def test_products_of_outputs(self):
        torch.manual_seed(0)
        W, x = torch.randn(3, 6).double(), torch.randn(50, 6).double()
        unit = torch.tensor([0, 0, 1, -1, 2, 1])
        G = prune.contributions(W, x.T @ x / 50, unit)
        y = [x[:, unit == c] @ W[:, unit == c].T for c in range(3)]
        for c, d in itertools.product(range(3), repeat=2):
            assert torch.isclose(G[c, d], (y[c] * y[d]).sum(1).mean())

    def test_shapes(self):
        with pytest.raises(ValueError, match=r"H must be \(in, in\) and unit"):
            prune.contributions(torch.ones(2, 3), torch.eye(2), torch.arange(3))


def gram(n=7, seed=0, rank=20):
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(rank, n, generator=g, dtype=torch.float64) + 0.3
    return y.T @ y


class TestThiNet:
    def test_each_step_removes_the_one_that_is_missed_least(self):
        G = gram()
        order = prune.thinet(G).argsort(stable=True)
        gone = []
        for _ in range(4):
            left = [c for c in range(7) if c not in gone]
            cost = {c: G[[*gone, c]][:, [*gone, c]].sum() for c in left}
            gone.append(min(cost, key=cost.get))
        assert order[:4].sort().values.tolist() == sorted(gone)

    def test_scores_are_errors(self):
        G = torch.diag(torch.tensor([3.0, 1.0, 2.0]))
        want = torch.tensor([6 / 6, 1 / 6, 3 / 6])
        assert torch.allclose(prune.thinet(G), want)

    def test_optimal_if_contributions_are_orthogonal(self):
        g = torch.Generator().manual_seed(0)
        size = torch.rand(8, generator=g)
        order = prune.thinet(torch.diag(size)).argsort()
        for k in range(1, 8):
            best = min(
                itertools.combinations(range(8), k),
                key=lambda c: float(size[list(c)].sum()),
            )
            assert set(order[:k].tolist()) == set(best)

    @pytest.mark.parametrize("seed", range(5))
    def test_near_the_best_set(self, seed):
        G = gram(8, seed)
        order = prune.thinet(G).argsort(stable=True)

        def cost(c):
            return float(G[list(c)][:, list(c)].sum())

        for k in (2, 4):
            best = min(map(cost, itertools.combinations(range(8), k)))
            chance = np.mean([*map(cost, itertools.combinations(range(8), k))])
            assert best <= cost(order[:k].tolist()) <= chance


class TestLasso:
    def test_uses_what_scikit_learn_uses(self):
        g = torch.Generator().manual_seed(1)
        Y = torch.randn(400, 8, generator=g, dtype=torch.float64)
        Y *= torch.linspace(0.3, 2, 8)
        y = Y.sum(1)
        scores = prune.lasso(Y.T @ Y / 400) * (Y.T @ Y / 400).sum()
        for penalty in (0.1, 0.5, 1.0, 2.0):
            fit = linear_model.Lasso(alpha=penalty, fit_intercept=False)
            used = fit.fit(Y.numpy(), y.numpy()).coef_ != 0
            clear = (scores / penalty).log().abs() > 0.1  # the grid's step
            assert (scores > penalty)[clear].tolist() == (
                used[clear.numpy()].tolist()
            )

    def test_largest_penalty_that_uses_anything(self):
        G = gram()
        top = G.sum(1).abs().max() / G.sum()
        assert torch.isclose(prune.lasso(G).max(), top, rtol=0.1)


class TestScores:
    def test_the_unit_that_is_missed_least(self):
        model, x = mlp(width=6)
        groups = prune.groups(model, x)
        scores = prune.reconstruction_scores(model, groups, x.split(16))["0"]
        errors = []
        for unit in range(6):
            small = prune.remove_channels(
                model, {"0": torch.arange(6) != unit}, x
            )
            errors.append(((small(x) - model(x)) ** 2).sum(1).mean())
        first = int(scores.argmin())
        assert first == int(torch.stack(errors).argmin())
        y = model(x) - model[2].bias
        energy = (y**2).sum(1).mean()
        assert torch.isclose(scores[first], errors[first] / energy, rtol=1e-4)

    def test_nobody_reads(self):
        class Ends(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(3, 4)

            def forward(self, x):
                return self.a(x).relu().sum(-1)

        x = torch.ones(1, 3)
        groups = prune.groups(Ends(), x)
        if groups:
            with pytest.raises(ValueError, match="no layer reads"):
                prune.reconstruction_scores(Ends(), groups, [x])


class TestShrinkage:
    def test_gradient_of_a_scale_is_its_sign(self):
        norm = nn.BatchNorm2d(3)
        norm.weight.data = torch.tensor([0.5, -2.0, 1.0])
        loss = prune.slimming(nn.Sequential(nn.Conv2d(1, 3, 1), norm))
        assert loss.item() == 3.5
        [g] = torch.autograd.grad(loss, norm.weight)
        assert g.tolist() == [1, -1, 1]

    def test_a_norm_with_scale_zero_says_its_shift(self):
        norm = nn.BatchNorm2d(2).eval()
        norm.weight.data.zero_()
        norm.bias.data = torch.tensor([0.25, -1.0])
        y = norm(torch.randn(3, 2, 4, 4))
        assert (y[:, 0] == 0.25).all()
        assert (y[:, 1] == -1).all()

    def test_no_norm(self):
        with pytest.raises(ValueError, match="it has no norm with a scale"):
            prune.slimming(nn.Linear(2, 2))

    def test_group_lasso_by_hand(self):
        model, x = mlp(width=4)
        loss = prune.group_lasso(model, prune.groups(model, x))
        want = 5**0.5 * model[0].weight.norm(dim=1).sum()
        assert torch.isclose(loss, want)
        [g] = torch.autograd.grad(loss, model[0].weight)
        unit = model[0].weight / model[0].weight.norm(dim=1, keepdim=True)
        assert torch.allclose(g, 5**0.5 * unit)

    @pytest.mark.parametrize("step", [0.0, 0.1, 0.5, 3.0])
    def test_soft_shrink_minimizes(self, step):
        g = torch.Generator().manual_seed(0)
        W = torch.randn(3, 2, generator=g, dtype=torch.float64)
        found = prune.soft_shrink(W, step=step)
        for row, got in zip(W.numpy(), found.numpy(), strict=True):

            def cost(v, row=row):
                fit = ((v - row) ** 2).sum() / 2
                return fit + step * 2**0.5 * np.linalg.norm(v)

            best = optimize.minimize(cost, row, method="Nelder-Mead").x
            assert np.allclose(got, best, atol=1e-3)

    def test_rows_of_one_are_soft_thresholding(self):
        w = torch.linspace(-2, 2, 9)[:, None]
        want = torch.nn.functional.softshrink(w, 0.6)
        assert torch.allclose(prune.soft_shrink(w, step=0.6), want)

    def test_negative_step(self):
        with pytest.raises(ValueError, match="step must be at least 0"):
            prune.soft_shrink(torch.ones(2, 2), step=-0.1)
