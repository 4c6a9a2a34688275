"""Scores of untrained networks against numpy and counting by hand."""

import math
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minicompress import nas

ARCH = {
    "layer1": "conv3",
    "layer2": "pool",
    "layer3": "conv5",
    "layer4": "skip",
}


class Users(nn.Module):
    """A model that is not from this library, with everything in it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.gain = nn.Parameter(torch.ones(3, 1, 1))
        self.drop = nn.Dropout(0.0)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        x = x + self.gain * F.relu(self.norm(self.conv(x)))
        return self.head(self.drop(x).mean((-1, -2)))


def users():
    torch.manual_seed(0)
    return Users()


def images(n=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 1, 4, 4, generator=g)


LABELS = torch.tensor([0, 1, 0, 1, 1, 0])
PROXIES = {
    "grad_norm": lambda m, x: nas.grad_norm(m, (x, LABELS)),
    "snip": lambda m, x: nas.snip(m, (x, LABELS)),
    "synflow": nas.synflow,
    "naswot": nas.naswot,
}
EACH = pytest.mark.parametrize("proxy", PROXIES.values(), ids=PROXIES.keys())


def mlp(widths, bias=False, seed=0):
    torch.manual_seed(seed)
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias, dtype=torch.float64), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def matrices(net):
    return [p.detach().numpy() for p in net.parameters()]


@EACH
class TestAll:
    @pytest.mark.parametrize("training", [True, False])
    def test_the_model_stays_as_it_is(self, proxy, training):
        model, x = users().train(training), images()
        before = deepcopy(model.state_dict())
        x_before, random = x.clone(), torch.get_rng_state()
        found = proxy(model, x)
        assert type(found) is float
        assert math.isfinite(found)
        for name, t in model.state_dict().items():  # running averages too
            assert torch.equal(t, before[name]), name
        assert all(p.grad is None for p in model.parameters())
        assert all(m.training is training for m in model.modules())
        assert torch.equal(x, x_before)
        assert torch.equal(torch.get_rng_state(), random)
        assert proxy(model, x) == found

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_types(self, proxy, dtype):
        rounded = users().bfloat16()  # the same numbers in both types
        model, x = deepcopy(rounded).to(dtype), images().bfloat16().to(dtype)
        want = proxy(rounded.float(), x.float())
        # near zero a ReLU may switch when its input is rounded
        rel = 1e-5 if dtype == torch.float64 else 0.05
        assert math.isclose(proxy(model, x), want, rel_tol=rel)

    def test_a_network_of_the_space(self, proxy):
        g = torch.Generator().manual_seed(0)
        x = torch.rand(6, 64, generator=g)
        torch.manual_seed(0)
        found = [
            proxy(nas.digits_network({"width": c, **ARCH}), x) for c in (4, 64)
        ]
        # no proxy is invariant to width
        assert abs(found[1] - found[0]) > 0.2


class TestGradients:
    def test_softmax_regression_by_hand(self):
        net = nn.Linear(3, 2).double()
        W, b = matrices(net)
        X = images()[:, 0, 0, :3].double()
        z = X.numpy() @ W.T + b
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        d = (p - np.eye(2)[LABELS.numpy()]) / 6  # ∂L/∂z
        dW, db = d.T @ X.numpy(), d.sum(0)
        want = np.linalg.norm(dW) + np.linalg.norm(db)
        assert math.isclose(nas.grad_norm(net, (X, LABELS)), want)
        want = np.abs(W * dW).sum() + np.abs(b * db).sum()
        assert math.isclose(nas.snip(net, (X, LABELS)), want)

    @given(c=st.floats(0.1, 10))
    def test_snip_is_invariant_to_rescaling(self, c):
        """Weights c W and V / c make the same network of ReLUs."""
        net, X = mlp([4, 5, 2]), images()[:, 0, 0].double()
        other = deepcopy(net)
        with torch.no_grad():
            other[0].weight.mul_(c)
            other[2].weight.div_(c)
        a, b = (nas.snip(m, (X, LABELS)) for m in (net, other))
        assert math.isclose(a, b)

    def test_grad_norm_is_not(self):
        net, X = mlp([4, 5, 2]), images()[:, 0, 0].double()
        other = deepcopy(net)
        with torch.no_grad():
            other[0].weight.mul_(10)
            other[2].weight.div_(10)
        a, b = (nas.grad_norm(m, (X, LABELS)) for m in (net, other))
        assert b > 2 * a

    def test_frozen_weights_do_not_count(self):
        net, X = mlp([4, 5, 2]), images()[:, 0, 0].double()
        whole = nas.grad_norm(net, (X, LABELS))
        parts = []
        for i in (0, 2):
            part = deepcopy(net).requires_grad_(False)
            part[i].requires_grad_(True)
            parts.append(nas.grad_norm(part, (X, LABELS)))
        assert math.isclose(sum(parts), whole)
        assert min(parts) > 0

    def test_a_parameter_that_is_not_used(self):
        net = nn.Linear(4, 2)
        net.spare = nn.Parameter(torch.ones(3))
        X = images()[:, 0, 0]
        del (plain := deepcopy(net)).spare
        for f in (nas.grad_norm, nas.snip):
            assert f(net, (X, LABELS)) == f(plain, (X, LABELS))

    def test_batch_statistics_in_training_mode(self):
        """A batch that is scaled and shifted as a whole looks the same."""
        net = nn.Sequential(
            nn.BatchNorm1d(4, eps=1e-12), nn.Linear(4, 2)
        ).double()
        X = images()[:, 0, 0].double()
        a, b = (nas.grad_norm(net, (x, LABELS)) for x in (X, 5 * X + 3))
        assert math.isclose(a, b, rel_tol=1e-6)
        a, b = (nas.grad_norm(net.eval(), (x, LABELS)) for x in (X, 5 * X + 3))
        assert b > 1.5 * a

    @pytest.mark.parametrize("f", [nas.grad_norm, nas.snip])
    def test_another_loss(self, f):
        net, x = nn.Linear(2, 1, bias=False), torch.tensor([[3.0, 4.0]])
        once = f(net, x, loss=lambda m, x: m(x).sum())
        twice = f(net, x, loss=lambda m, x: -2 * m(x).sum())
        assert math.isclose(twice, 2 * once)

    @pytest.mark.parametrize("f", [nas.grad_norm, nas.snip])
    def test_errors(self, f):
        with pytest.raises(ValueError, match="no weights that require"):
            f(nn.ReLU(), (images(), LABELS))


class TestSynflow:
    @pytest.mark.parametrize("widths", [[3, 1], [3, 4, 2], [4, 6, 5, 3]])
    def test_layer_sums_equal_R(self, widths):
        net = mlp(widths)
        Ws = [np.abs(W) for W in matrices(net)]
        R = np.linalg.multi_dot([W.T for W in Ws]) if len(Ws) > 1 else Ws[0]
        flow = math.exp(nas.synflow(net, torch.zeros(2, widths[0])))
        assert math.isclose(flow, len(Ws) * R.sum())

    def test_one_layer_alone(self):
        """θ ∂R/∂θ of one layer: what is left when others are constants."""
        net, x = mlp([3, 4, 5, 2]), torch.zeros(1, 3)
        Ws = [np.abs(W) for W in matrices(net)]
        R = (Ws[2] @ Ws[1] @ Ws[0]).sum()
        for W, before, after in zip(
            Ws,
            (np.ones(3), Ws[0] @ np.ones(3), Ws[1] @ Ws[0] @ np.ones(3)),
            (np.ones(2) @ Ws[2] @ Ws[1], np.ones(2) @ Ws[2], np.ones(2)),
            strict=True,
        ):
            assert math.isclose((W * np.outer(after, before)).sum(), R)
        assert math.isclose(math.exp(nas.synflow(net, x)), 3 * R)

    def test_biases_add_the_paths_that_start_at_them(self):
        net = mlp([3, 4, 2], bias=True)
        W, b, V, c = map(np.abs, matrices(net))
        through_W, from_b = (V @ W).sum(), (V @ b).sum()
        want = through_W + from_b + (through_W + from_b) + c.sum()
        flow = math.exp(nas.synflow(net, torch.zeros(1, 3)))
        assert math.isclose(flow, want)

    def test_a_convolution_counts_its_paths(self):
        conv = nn.Conv2d(1, 1, 3, padding=1, bias=False)
        want = 0.0  # each weight meets the ones that padding leaves it
        for i in range(3):
            for j in range(3):
                met = (4 - abs(i - 1)) * (5 - abs(j - 1))
                want += met * abs(conv.weight[0, 0, i, j].item())
        flow = math.exp(nas.synflow(conv, torch.zeros(1, 1, 4, 5)))
        assert math.isclose(flow, want, rel_tol=1e-6)

    def test_signs_data_and_norms_do_not_matter(self):
        net, x = mlp([3, 4, 2]), torch.zeros(1, 3)
        other = deepcopy(net)
        with torch.no_grad():
            other[0].weight.neg_()
            other[2].weight[0].neg_()
        found = nas.synflow(net, x)
        assert nas.synflow(other, x) == found
        assert nas.synflow(net, torch.randn(7, 3) * 100) == found
        for norm in (
            nn.BatchNorm1d(4),
            nn.LayerNorm(4),
            nn.RMSNorm(4),
            nn.GroupNorm(2, 4),
        ):
            normed = nn.Sequential(net[0], norm, *net[1:])
            normed[1].weight.data.fill_(7)
            assert nas.synflow(normed, x) == found

    @given(c=st.floats(0.01, 100))
    def test_a_factor_on_one_layer(self, c):
        net, x = mlp([3, 4, 2]), torch.zeros(1, 3)
        other = deepcopy(net)
        with torch.no_grad():
            other[2].weight.mul_(c)
        grown = nas.synflow(other, x) - nas.synflow(net, x)
        assert math.isclose(grown, math.log(c), abs_tol=1e-9)

    def test_dropout_is_off(self):
        net, x = mlp([3, 4, 2]), torch.zeros(1, 3)
        dropped = nn.Sequential(net[0], nn.Dropout(0.5), *net[1:]).train()
        assert nas.synflow(dropped, x) == nas.synflow(net, x)

    def test_frozen_weights_count(self):
        net, x = mlp([3, 4, 2]), torch.zeros(1, 3)
        frozen = deepcopy(net).requires_grad_(False)
        assert nas.synflow(frozen, x) == nas.synflow(net, x)

    def test_deep_networks_do_not_overflow_float32(self):
        net = nn.Sequential(*[nn.Linear(64, 64, bias=False)] * 100)
        with torch.no_grad():
            net[0].weight.fill_(1.0)
        found = nas.synflow(net, torch.zeros(1, 64))
        # one matrix in 100 places: the sum over them, of R = 64^101
        assert math.isclose(found, math.log(100) + 101 * math.log(64))

    def test_nothing_flows(self):
        net = mlp([3, 4, 2])
        with torch.no_grad():
            net[2].weight.zero_()
        assert nas.synflow(net, torch.zeros(1, 3)) == -math.inf

    def test_errors(self):
        with pytest.raises(ValueError, match=r"torch.int64 of \(1, 3\)"):
            nas.synflow(mlp([3, 2]), torch.zeros(1, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match=r"\(0, 3\)"):
            nas.synflow(mlp([3, 2]), torch.zeros(0, 3))
        with pytest.raises(ValueError, match="no parameters"):
            nas.synflow(nn.ReLU(), torch.zeros(1, 3))


def by_counting(codes):
    """log |det K|, each entry counted."""
    codes = np.asarray(codes)
    K = [[int((a == b).sum()) for b in codes] for a in codes]
    return np.linalg.slogdet(np.array(K, dtype=float))[1]


class TestNaswot:
    def test_counted_by_hand(self):
        net, X = mlp([4, 9, 8, 2]), images()[:, 0, 0].double()
        W, V, _ = matrices(net)
        first = X.numpy() @ W.T
        second = np.maximum(first, 0) @ V.T
        codes = np.concatenate([first > 0, second > 0], 1)
        assert math.isclose(nas.naswot(net, X), by_counting(codes))

    def test_two_equal_inputs_are_singular(self):
        net, X = mlp([4, 40, 2]), images()[:, 0, 0].double()
        assert math.isfinite(nas.naswot(net, X))
        for i in range(5):
            twice = X.clone()
            twice[5] = X[i]
            assert nas.naswot(net, twice) == -math.inf
            # the same code is enough
            twice[5] = 3 * X[i]
            assert nas.naswot(net, twice) == -math.inf

    def test_all_distinct_is_the_maximum(self):
        """Of all pairs of codes those that differ everywhere score most."""
        best = -math.inf
        for other in range(16):
            x = torch.ones(2, 4)
            x[1] = torch.tensor([(other >> k & 1) * 2.0 - 1 for k in range(4)])
            found = nas.naswot(nn.ReLU(), x)
            distance = 4 - bin(other).count("1")
            # det K = 4² - (4 - d)²
            det = 16 - (4 - distance) ** 2
            want = math.log(det) if det else -math.inf
            assert math.isclose(found, want, abs_tol=1e-12)
            best = max(best, found)
        assert math.isclose(best, 2 * math.log(4))  # N log N_A

    @pytest.mark.parametrize("seed", range(3))
    def test_the_bound(self, seed):
        """Hadamard: det K <= N_A^N, as the diagonal is N_A."""
        net = mlp([4, 30, 2], seed=seed)
        X = images(seed=seed)[:, 0, 0].double()
        assert nas.naswot(net, X) < 6 * math.log(30)

    def test_more_inputs_than_units(self):
        """K has rank N_A + 1 at most."""
        codes = torch.eye(4)[:, :3]  # no two alike
        assert math.isfinite(nas.naswot(nn.ReLU(), codes))
        x = torch.tensor([[i & 1, i >> 1 & 1, i >> 2] for i in range(8)])
        assert nas.naswot(nn.ReLU(), x.double()) == -math.inf

    def test_order_and_scale_do_not_matter(self):
        net, X = mlp([4, 40, 2]), images()[:, 0, 0].double()
        found = nas.naswot(net, X)
        assert math.isclose(nas.naswot(net, X.flip(0)), found)
        assert math.isclose(nas.naswot(net, X * 3), found)

    @pytest.mark.parametrize(
        "relu",
        [
            F.relu,
            torch.relu,
            lambda x: x.relu(),
            lambda x: F.relu(input=x),
            lambda x: F.relu(x, inplace=True),
            torch.relu_,
            nn.ReLU(inplace=True),
        ],
    )
    def test_every_way_to_write_it(self, relu):
        class Own(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.first, _, self.last = net

            def forward(self, x):
                return self.last(relu(self.first(x)))

        net, X = mlp([4, 40, 2]), images()[:, 0, 0].double()
        assert nas.naswot(Own(net), X) == nas.naswot(net, X)

    def test_one_module_in_two_places_counts_twice(self):
        torch.manual_seed(0)
        relu, last = nn.ReLU(), nn.Linear(40, 40)
        one = nn.Sequential(nn.Linear(4, 40), relu, last, relu)
        two = nn.Sequential(one[0], nn.ReLU(), last, nn.ReLU())
        X = images()[:, 0, 0]
        assert nas.naswot(one, X) == nas.naswot(two, X)
        assert nas.naswot(one, X) > nas.naswot(two[:2], X)

    def test_errors(self):
        with pytest.raises(ValueError, match="Linear without ReLUs"):
            nas.naswot(nn.Linear(4, 4), torch.zeros(2, 4))
        rows = nn.Sequential(nn.Flatten(0), nn.ReLU())
        with pytest.raises(ValueError, match=r"2 inputs.* \{8\} rows"):
            nas.naswot(rows, torch.zeros(2, 4))
