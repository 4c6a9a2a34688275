"""Traces and eigenvalues of the Hessian against the whole Hessian."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian

from minicompress import models, quantize, train


def drawn(*size, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=g, dtype=torch.float64)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(seed=0, n=30):
    X = drawn(n, 4, seed=seed)
    return X, (X[:, :3] + drawn(n, 3, seed=seed + 50)).argmax(1)


def whole(model, batch, name):
    """Return the Hessian of one weight as a matrix (n, n)."""
    own = dict(model.named_parameters())

    def loss(w):
        def run(x):
            return functional_call(model, own | {name: w}, (x,))

        return train.cross_entropy(run, batch)

    n = own[name].numel()
    return hessian(loss)(own[name].detach()).reshape(n, n).detach()


class Quadratic(nn.Module):
    """Loss 1/2 wᵀ A w, whose Hessian is A."""

    def __init__(self, A):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, len(A), dtype=A.dtype))

    def forward(self, A):
        return 0.5 * (self.w @ A @ self.w.T).sum()


def quadratic(A, find, **options):
    return find(Quadratic(A), [A], lambda m, A: m(A), **options)["w"]


def symmetric(n=6):
    A = drawn(n, n)
    return A + A.T


class TestTraces:
    def test_unbiased_with_the_variance_of_rademacher(self):
        A = symmetric()
        draws = torch.tensor(
            [
                quadratic(A, quantize.hessian_traces, probes=1, seed=s)
                for s in range(3000)
            ]
        )
        off = A.square().sum() - A.diagonal().square().sum()
        spread = math.sqrt(2 * off / 3000)
        assert abs(draws.mean() - A.trace()) < 4 * spread
        assert abs(draws.var() / (2 * off) - 1) < 0.15
        gaussian = 2 * A.square().sum()  # what normal probes would have
        assert draws.var() < 0.9 * gaussian

    def test_a_diagonal_needs_one_probe(self):
        A = torch.tensor([3.0, 5.0, -2.0]).diag()
        assert quadratic(A, quantize.hessian_traces, probes=1) == 6

    def test_more_probes_are_the_mean_of_more(self):
        A = symmetric()
        errors = [
            max(
                abs(
                    quadratic(A, quantize.hessian_traces, probes=p, seed=s)
                    - A.trace().item()
                )
                for s in range(10)
            )
            for p in (1, 400)
        ]
        assert errors[1] < 0.2 * errors[0]

    def test_each_layer_of_a_network(self):
        model, data = net(), batch()
        found = quantize.hessian_traces(model, [data], probes=400)
        assert list(found) == ["0.weight", "2.weight"]
        for name, trace in found.items():
            H = whole(model, data, name)
            off = H.square().sum() - H.diagonal().square().sum()
            spread = math.sqrt(2 * off / 400)
            assert abs(trace - H.trace()) < 4 * spread
            assert spread < 0.15 * H.trace()

    def test_batches_are_averaged(self):
        model = net()
        both = [batch(0), batch(1)]
        one = tuple(torch.cat(part) for part in zip(*both, strict=True))
        kwargs = {"probes": 5, "seed": 3}
        a = quantize.hessian_traces(model, both, **kwargs)
        b = quantize.hessian_traces(model, [one], **kwargs)
        assert a == pytest.approx(b)

    def test_a_transformer_and_its_tied_table(self):
        torch.manual_seed(0)
        lm = models.LM(vocab=11, width=8, layers=1, heads=2, ff=16, context=6)
        ids = torch.randint(11, (4, 7))
        traces = quantize.hessian_traces(
            lm, [(ids[:, :-1], ids[:, 1:])], probes=2
        )
        assert "tokens.weight" in traces and "head.weight" not in traces
        assert all(math.isfinite(t) for t in traces.values())

    def test_a_linear_loss_has_none(self):
        found = quantize.hessian_traces(
            nn.Linear(3, 2), [torch.ones(1, 3)], lambda m, x: m(x).sum()
        )
        assert found == {"weight": 0}


class TestEigenvalues:
    @pytest.mark.parametrize("flip", [1, -1])
    def test_the_largest_in_size(self, flip):
        A = flip * (symmetric() + 3 * torch.ones(6, 6).double())
        values = torch.linalg.eigvalsh(A)
        want = values[values.abs().argmax()].item()
        got = quadratic(A, quantize.top_eigenvalues, steps=500, tolerance=1e-10)
        assert got == pytest.approx(want, rel=1e-6)

    def test_each_layer_of_a_network(self):
        model, data = net(), batch()
        found = quantize.top_eigenvalues(model, [data], tolerance=1e-8)
        for name, value in found.items():
            want = torch.linalg.eigvalsh(whole(model, data, name))[-1]
            assert value == pytest.approx(want.item(), rel=1e-3)

    def test_a_linear_loss_has_none(self):
        found = quantize.top_eigenvalues(
            nn.Linear(3, 2), [torch.ones(1, 3)], lambda m, x: m(x).sum()
        )
        assert found == {"weight": 0}


class TestHawq:
    def test_by_hand(self):
        W = drawn(3, 8).float()
        options = {"w": {b: quantize.min_max(W, bits=b) for b in (2, 4)}}
        table = quantize.hawq_table(options, {"w": W}, {"w": 48.0})
        for b, (size, loss) in table["w"].items():
            error = (options["w"][b].decode() - W).square().sum().item()
            assert loss == pytest.approx(2 * error)
            assert size >= 3 * b
        assert table["w"][2][1] > table["w"][4][1]
        none = quantize.hawq_table(options, {"w": W}, {"w": -1.0})
        assert none["w"][2][1] == 0

    def test_it_is_the_mean_loss_of_noise_without_direction(self):
        # E[1/2 eᵀ H e] = 1/2 (Tr H / n) E‖e‖²
        A = symmetric() + 6 * torch.eye(6).double()
        e = drawn(20_000, 6, seed=1)
        loss = 0.5 * ((e @ A) * e).sum(1)
        omega = A.trace() / 6 * e.square().sum(1).mean()
        assert abs(loss.mean() - omega / 2) < 5 * loss.std() / math.sqrt(2e4)


class TestEdges:
    def test_the_model_stays(self):
        model = net().train()
        model[0].weight.requires_grad_(False)
        before = {n: w.clone() for n, w in model.state_dict().items()}
        quantize.hessian_traces(model, [batch()], probes=1)
        quantize.top_eigenvalues(model, [batch()], steps=2)
        assert model.training and not model[0].weight.requires_grad
        assert all(p.grad is None for p in model.parameters())
        after = model.state_dict()
        assert all(torch.equal(after[n], w) for n, w in before.items())

    @pytest.mark.parametrize(
        "find", [quantize.hessian_traces, quantize.top_eigenvalues]
    )
    def test_errors(self, find):
        with pytest.raises(ValueError, match="batches: there are none"):
            find(net(), [])
        with pytest.raises(ValueError, match="where selects no parameter"):
            find(net(), [batch()], where=lambda n, w: False)

    def test_too_few(self):
        with pytest.raises(ValueError, match=r"probes must .* got 0"):
            quantize.hessian_traces(net(), [batch()], probes=0)
        with pytest.raises(ValueError, match=r"steps must .* got 0"):
            quantize.top_eigenvalues(net(), [batch()], steps=0)
