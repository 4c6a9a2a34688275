"""Search by gradient against closed forms and exact second derivatives."""

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from minicompress import measure, nas, storage, train


@pytest.fixture(autouse=True)
def _one_thread():
    with train.threads(1):
        yield


class Scale(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return self.by * x


class Square(nn.Module):
    def forward(self, x):
        return x * x


class Cell(nn.Module):
    """A user's module: mixtures inside, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.parts = nn.ModuleDict(
            {
                "first": nas.Mixed(
                    {
                        "skip": nn.Identity(),
                        "tanh": nn.Tanh(),
                        "linear": nn.Linear(4, 4),
                    }
                ),
                "second": nas.Mixed(
                    {"none": Scale(0.0), "norm": nn.BatchNorm1d(4)}
                ),
            }
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.inner(x)
        x = self.parts["first"](x) + self.parts["second"](x)
        return self.head(self.parts["first"](x))


def cell(seed=0, alpha=0.5):
    torch.manual_seed(seed)
    model = Cell().double()
    with torch.no_grad():
        for mixed in model.parts.values():
            mixed.alpha.normal_(0, alpha)
    return model


def batch(seed, n=16):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=g, dtype=torch.float64)
    return x, torch.randint(2, (n,), generator=g)


def feeds(steps=5, first=0):
    return [batch(first + i) for i in range(steps)]


class TestMixed:
    def test_is_the_weighted_sum(self):
        ops = {"a": Scale(2.0), "b": Scale(-1.0), "c": nn.ReLU()}
        mixed, x = nas.Mixed(ops).double(), batch(0)[0]
        mixed.alpha.data = torch.tensor([0.1, -2.0, 1.3]).double()
        e = [math.exp(a) for a in mixed.alpha.tolist()]
        want = (e[0] * 2 * x - e[1] * x + e[2] * x.clamp(min=0)) / sum(e)
        torch.testing.assert_close(mixed(x), want)

    @given(st.lists(st.floats(-5, 5), min_size=2, max_size=6))
    def test_gradient_of_alpha_sums_to_0(self, alphas):
        ops = {f"op{i}": Scale(i + 1.0) for i in range(len(alphas))}
        mixed = nas.Mixed(ops)
        mixed.alpha.data = torch.tensor(alphas, dtype=torch.float64)
        x = batch(0)[0]
        mixed(x).square().sum().backward()
        assert abs(mixed.alpha.grad.sum()) < 1e-9 * x.square().sum() * 36
        # a number added to every α changes nothing
        before = mixed(x)
        mixed.alpha.data += 3
        torch.testing.assert_close(mixed(x), before)

    def test_one_hot_alpha_is_the_discrete_network(self):
        model, (x, _) = cell().eval(), batch(0)
        for op in ("skip", "tanh", "linear"):
            for mixed, chosen in zip(
                model.parts.values(), (op, "norm"), strict=True
            ):
                mixed.alpha.data.fill_(0)
                mixed.alpha.data[list(mixed.ops).index(chosen)] = 1e4
            found = nas.discretize(model)
            torch.testing.assert_close(
                found(x), model(x), rtol=1e-12, atol=1e-12
            )
            assert nas.strongest(model)["parts.first"] == op

    def test_errors(self):
        with pytest.raises(ValueError, match="at least one"):
            nas.Mixed({})
        for name in ("conv.3", "pop"):
            with pytest.raises(ValueError, match=f"ops: a bad name.*{name}"):
                nas.Mixed({name: nn.Identity()})
        mixed = nas.Mixed({"a": nn.Linear(3, 1), "b": nn.Linear(3, 3)})
        # would broadcast
        with pytest.raises(ValueError, match=r"'a': \(4, 1\), 'b': \(4, 3\)"):
            mixed(torch.zeros(4, 3))


class Quadratic(nn.Module):
    """f = m w with m = Σ p_o c_o: the loss is exactly quadratic in w."""

    def __init__(self, alpha, w=0.7):
        super().__init__()
        ops = {f"op{i}": Scale(c) for i, c in enumerate((2.0, -1.0, 0.5))}
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))
        self.mixed = nas.Mixed(ops).double()
        self.mixed.alpha.data = torch.tensor(alpha, dtype=torch.float64)

    def forward(self, x):
        return self.mixed(self.w * x)


def squares(model, b):
    return (0.5 * (model(1.0) - b) ** 2).sum()


double = partial(torch.tensor, dtype=torch.float64)
ALPHAS = st.lists(st.floats(-2, 2), min_size=3, max_size=3)


class TestAlphaGradient:
    @given(ALPHAS, st.floats(-2, 2), st.floats(-2, 2))
    def test_first_order_closed_form(self, alpha, a, b):
        model = Quadratic(alpha)
        found = nas.alpha_gradient(model, double(a), double(b), squares)
        c = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
        p = torch.tensor(alpha, dtype=torch.float64).softmax(0)
        m, w = (p * c).sum(), 0.7
        want = (m * w - b) * w * p * (c - m)  # dm/dα = p (c - m)
        torch.testing.assert_close(found["mixed.alpha"], want)

    @given(ALPHAS, st.floats(-2, 2), st.floats(-2, 2), st.floats(0.01, 1))
    def test_second_order_closed_form(self, alpha, a, b, xi):
        """d/dα of ½ (m w' - b)² with w' = w - ξ (m w - a) m."""
        model = Quadratic(alpha)
        found = nas.alpha_gradient(model, double(a), double(b), squares, xi=xi)
        c = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
        p = torch.tensor(alpha, dtype=torch.float64).softmax(0)
        m, w = (p * c).sum(), 0.7
        new = w - xi * (m * w - a) * m
        dm = (m * new - b) * (new - m * xi * (2 * m * w - a))
        torch.testing.assert_close(
            found["mixed.alpha"], dm * p * (c - m), rtol=1e-6, atol=1e-9
        )

    @pytest.mark.parametrize("xi", [0.01, 0.3, 1.0])
    def test_second_order_is_the_derivative_through_the_step(self, xi):
        """Against autograd through w' = w - ξ ∇L: exact second derivatives."""
        model = cell().eval()
        train_batch, val_batch = batch(0), batch(1)
        state = dict(model.named_parameters())
        alphas = {n for n in state if n.endswith("alpha")}
        at = {n: p.detach().requires_grad_() for n, p in state.items()}

        def loss(tensors, data):
            call = partial(functional_call, model, tensors)
            return train.cross_entropy(lambda x: call((x,)), data)

        names = [n for n in at if n not in alphas]
        grads = torch.autograd.grad(
            loss(at, train_batch),
            [at[n] for n in names],
            create_graph=True,
        )
        moved = {n: at[n] - xi * g for n, g in zip(names, grads, strict=True)}
        value = loss({n: at[n] for n in alphas} | moved, val_batch)
        want = torch.autograd.grad(value, [at[n] for n in sorted(alphas)])
        found = nas.alpha_gradient(model, train_batch, val_batch, xi=xi)
        assert sorted(found) == sorted(alphas)
        first = nas.alpha_gradient(model, train_batch, val_batch)
        for n, w in zip(sorted(alphas), want, strict=True):
            torch.testing.assert_close(found[n], w, rtol=1e-3, atol=1e-6)
            # the difference that the second order makes is real
            assert (first[n] - w).norm() > 20 * (found[n] - w).norm()

    def test_second_order_tends_to_the_first(self):
        model, a, b = cell(), batch(0), batch(1)
        first = nas.alpha_gradient(model, a, b)
        zero = nas.alpha_gradient(model, a, b, xi=0.0)
        tiny = nas.alpha_gradient(model, a, b, xi=1e-9)
        for n in first:
            assert torch.equal(first[n], zero[n])
            torch.testing.assert_close(tiny[n], first[n])

    def test_sums_to_0_over_operations(self):
        for xi in (0.0, 0.3):
            found = nas.alpha_gradient(cell(), batch(0), batch(1), xi=xi)
            for g in found.values():
                assert g.norm() > 1e-4
                assert abs(g.sum()) < 1e-9

    def test_the_data_matter(self):
        """Knock-out: with one batch for both, α would move elsewhere."""
        model, a, b = cell(), batch(0), batch(1)
        for xi in (0.0, 0.3):
            right = nas.alpha_gradient(model, a, b, xi=xi)
            same = nas.alpha_gradient(model, a, a, xi=xi)
            for n in right:
                assert (right[n] - same[n]).norm() > 0.1 * right[n].norm()

    @pytest.mark.parametrize("xi", [0.0, 0.3])
    def test_the_model_stays_as_it_is(self, xi):
        model, a, b = cell().train(), batch(0), batch(1)
        before = deepcopy(model.state_dict())
        nas.alpha_gradient(model, a, b, xi=xi)
        for name, t in model.state_dict().items():  # running averages too
            assert torch.equal(t, before[name]), name
        assert all(p.grad is None for p in model.parameters())
        assert model.training

    def test_a_loss_that_does_not_hang_on_w(self):
        """‖∇_{w'} L_val‖ = 0: there is no direction to look in."""
        model = Quadratic([0.1, 0.2, 0.3], w=0.0)
        one = torch.tensor(1.0)
        found = nas.alpha_gradient(
            model, one, one, lambda m, b: (0 * m(1.0)).sum(), xi=0.5
        )
        assert found["mixed.alpha"].tolist() == [0, 0, 0]

    @pytest.mark.parametrize("xi", [0.0, 0.3])
    def test_parts_that_are_not_used(self, xi):
        model, a, b = cell(), batch(0), batch(1)
        want = nas.alpha_gradient(model, a, b, xi=xi)
        model.spare = nas.Mixed({"linear": nn.Linear(2, 2)}).double()
        found = nas.alpha_gradient(model, a, b, xi=xi)
        assert found.pop("spare.alpha").tolist() == [0]
        torch.testing.assert_close(found, want)

    def test_one_alpha_for_two_mixtures(self):
        """As in the paper's cells, where all of one kind share α."""

        def pair(tied):
            torch.manual_seed(0)
            layers = [nn.Linear(3, 3)]
            for _ in range(2):
                ops = {"skip": nn.Identity(), "tanh": nn.Tanh()}
                layers += [nas.Mixed(ops), nn.Linear(3, 3)]
            model = nn.Sequential(*layers).double()
            if tied:
                model[3].alpha = model[1].alpha
            return model

        a, b = batch(0), batch(1)
        apart = nas.alpha_gradient(pair(False), a, b)
        tied = nas.alpha_gradient(pair(True), a, b)
        assert list(tied) == ["1.alpha"]
        torch.testing.assert_close(tied["1.alpha"], sum(apart.values()))

    def test_errors(self):
        a = batch(0)
        with pytest.raises(ValueError, match="no Mixed operation"):
            nas.alpha_gradient(nn.Linear(3, 2), a, a)
        with pytest.raises(ValueError, match="no weights to train"):
            nas.alpha_gradient(nas.Mixed({"skip": nn.Identity()}), a, a)
        frozen = cell()
        for mixed in frozen.parts.values():
            mixed.alpha.requires_grad_(False)
        with pytest.raises(ValueError, match="no alpha to train"):
            nas.alpha_gradient(frozen, a, a)


OPTIONS = {"lr": 0.1, "alpha_lr": 0.01}


class TestDarts:
    @pytest.mark.parametrize("order", [1, 2])
    def test_algorithm_1(self, order):
        """Against the same two optimizers, written out."""
        model, rates = cell(), [0.1 * f for f in (1.0, 0.5, 0.25)]
        want = deepcopy(model).train()
        named = dict(want.named_parameters())
        alpha = {n: p for n, p in named.items() if n.endswith("alpha")}
        w = [p for n, p in named.items() if n not in alpha]
        adam = torch.optim.Adam(
            alpha.values(), 0.01, betas=(0.5, 0.999), weight_decay=1e-3
        )
        velocity = [torch.zeros_like(p) for p in w]
        for i, rate in enumerate(rates):
            g = nas.alpha_gradient(
                want, batch(i), batch(9 + i), xi=rate * (order == 2)
            )
            for n, p in alpha.items():
                p.grad = g[n]
            adam.step()
            value = train.cross_entropy(want, batch(i))
            for p, v, g in zip(
                w, velocity, torch.autograd.grad(value, w), strict=True
            ):
                v.mul_(0.9).add_(g + 3e-4 * p.detach())
                p.data -= rate * v
        found = nas.darts(
            model,
            feeds(3),
            feeds(3, first=9),
            order=order,
            schedule=lambda done: 0.5 ** int(3 * done),
            clip=None,
            **OPTIONS,
        )
        for n, t in found.state_dict().items():
            torch.testing.assert_close(t, want.state_dict()[n])

    def test_the_orders_differ(self):
        found = [
            nas.darts(cell(), feeds(), feeds(first=9), order=order, **OPTIONS)
            for order in (1, 2)
        ]
        a, b = (m.parts["first"].alpha for m in found)
        assert (a - b).abs().max() > 1e-4

    @pytest.mark.parametrize("order", [1, 2])
    def test_is_repeatable_and_leaves_the_model(self, order):
        model = cell()
        model.inner = nn.Sequential(model.inner, nn.Dropout(0.3))
        before = deepcopy(model.state_dict())
        random = torch.get_rng_state()

        def run(seed):
            return nas.darts(
                model,
                feeds(),
                feeds(first=9),
                order=order,
                seed=seed,
                **OPTIONS,
            ).state_dict()

        a, b, c = run(3), run(3), run(4)
        assert all(torch.equal(a[n], b[n]) for n in a)
        assert not all(torch.equal(a[n], c[n]) for n in a)
        for n, t in model.state_dict().items():
            assert torch.equal(t, before[n])
        assert torch.equal(torch.get_rng_state(), random)

    def test_each_batch_moves_the_running_averages_once(self):
        norm = (
            nas.darts(cell(), feeds(), feeds(first=9), order=2, **OPTIONS)
            .parts["second"]
            .ops["norm"]
        )
        assert norm.num_batches_tracked == 5

    def test_on_step_sees_alpha_move(self):
        seen = []

        def note(step, model, loss):
            share = nas.strengths(model)["parts.first"]["skip"]
            seen.append((step, share, loss))

        found = nas.darts(
            cell(), feeds(), feeds(first=9), on_step=note, **OPTIONS
        )
        steps, shares, losses = zip(*seen, strict=True)
        assert steps == (1, 2, 3, 4, 5)
        assert len({*shares}) == 5
        assert shares[-1] == nas.strengths(found)["parts.first"]["skip"]
        assert all(type(x) is float for x in losses)
        assert not found.training
        assert all(p.grad is None for p in found.parameters())

    @pytest.mark.parametrize("order", [1, 2])
    @pytest.mark.parametrize("useful", ["skip", "tanh", "square"])
    def test_finds_the_operation_that_made_the_data(self, order, useful):
        """Weights that fit one operation only, and are nearly left there."""
        torch.manual_seed(0)
        ops = {"skip": nn.Identity(), "tanh": nn.Tanh(), "square": Square()}
        layers = nn.Linear(3, 8), nas.Mixed(ops), nn.Linear(8, 2)
        start = nn.Sequential(*layers).double()
        teacher = deepcopy(start)
        teacher[1] = ops[useful]

        def loss(model, data):
            return F.mse_loss(model(data[0]), teacher(data[0]).detach())

        found = nas.darts(
            start,
            feeds(100),
            feeds(100, first=1000),
            loss,
            order=order,
            lr=1e-3,
            alpha_lr=0.1,
            alpha_decay=0.0,
        )
        assert nas.strengths(found)["1"][useful] > 0.8

    def test_frozen_weights_stay(self):
        model = cell()
        model.head.requires_grad_(False)
        found = nas.darts(model, feeds(), feeds(first=9), **OPTIONS)
        assert torch.equal(found.head.weight, model.head.weight)
        assert not torch.equal(found.inner.weight, model.inner.weight)

    def test_dicts_and_types(self):
        """Batches of another kind, float32."""

        def loss(model, data):
            return train.cross_entropy(model, (data["x"].float(), data["y"]))

        def named(pairs):
            return [dict(zip("xy", pair, strict=True)) for pair in pairs]

        found = nas.darts(
            cell().float(),
            named(feeds()),
            named(feeds(first=9)),
            loss,
            order=2,
            **OPTIONS,
        )
        assert {p.dtype for p in found.parameters()} == {torch.float32}

    def test_errors(self):
        with pytest.raises(ValueError, match="1 or 2, got 3"):
            nas.darts(cell(), feeds(), feeds(), order=3)
        with pytest.raises(ValueError, match="ended after 3 of 5 steps"):
            nas.darts(cell(), feeds(5), feeds(3))
        with pytest.raises(ValueError, match="no Mixed operation"):
            nas.darts(nn.Linear(3, 2), feeds(), feeds())
        with pytest.raises(ValueError, match="steps: needed"):
            nas.darts(cell(), iter(feeds()), feeds())


class TestDiscretize:
    def test_takes_the_strongest(self):
        model = cell()
        model.parts["first"].alpha.data = torch.tensor([0.1, 0.3, 0.2])
        model.parts["second"].alpha.data = torch.tensor([9.0, -9.0])
        before = deepcopy(model.state_dict())
        found = nas.discretize(model)
        assert isinstance(found.parts["first"], nn.Tanh)
        # "none" has the larger α, but is not compared
        assert isinstance(found.parts["second"], nn.BatchNorm1d)
        assert not any(n.endswith("alpha") for n in found.state_dict())
        for n, t in model.state_dict().items():
            assert torch.equal(t, before[n])
        found.head.weight.data.zero_()
        assert model.head.weight.abs().sum() > 0

    def test_ignore(self):
        model = cell()
        model.parts["second"].alpha.data = torch.tensor([9.0, -9.0])
        assert nas.strongest(model)["parts.second"] == "norm"
        assert nas.strongest(model, ignore=())["parts.second"] == "none"
        found = nas.discretize(model, ignore=())
        assert isinstance(found.parts["second"], Scale)
        with pytest.raises(ValueError, match="leaves none of"):
            nas.discretize(model, ignore=("none", "norm"))

    def test_mixtures_in_mixtures_and_alone(self):
        inner = nas.Mixed({"a": nn.ReLU(), "b": nn.Tanh()})
        outer = nas.Mixed({"c": nn.Identity(), "d": inner})
        outer.alpha.data[1] = inner.alpha.data[1] = 1
        assert isinstance(nas.discretize(outer), nn.Tanh)
        assert nas.strongest(outer) == {"": "d", "ops.d": "b"}

    def test_one_mixture_in_two_places_stays_one(self):
        mixed = nas.Mixed({"a": nn.Linear(3, 3), "b": nn.ReLU()})
        found = nas.discretize(nn.Sequential(mixed, nn.Tanh(), mixed))
        assert found[0] is found[2]

    def test_errors(self):
        for f in (nas.discretize, nas.strongest, nas.strengths):
            with pytest.raises(ValueError, match="no Mixed operation"):
                f(nn.Linear(2, 2))


class TestDigits:
    @settings(max_examples=10, deadline=None)
    @given(st.sampled_from(list(nas.digits_space())))
    def test_holds_every_network_of_the_space(self, arch):
        """One-hot α and the rest of the mixture make `digits_network`."""
        torch.manual_seed(0)
        mixture = nas.digits_mixture(arch["width"]).eval()
        for path, mixed in mixture.named_children():
            if path in arch:
                mixed.alpha.data[list(mixed.ops).index(arch[path])] = 1e4
        assert {"width": arch["width"], **nas.strongest(mixture)} == arch
        found = nas.discretize(mixture)
        want = nas.digits_network(arch).eval()
        want.load_state_dict(found.state_dict())  # the same names
        x = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(found(x), want(x))
        torch.testing.assert_close(mixture(x), want(x))
        assert measure.params(found) == measure.params(want)

    def test_is_stored_as_ordinary_layers(self):
        mixture = nas.digits_mixture(4, ops=("conv3", "pool"))
        found = nas.discretize(mixture).eval()
        plain = nas.digits_network(
            {"width": 4, **dict.fromkeys(nas.strongest(mixture), "conv3")}
        )
        data = storage.dumps(found)
        again = storage.loads(data, like=plain).eval()
        x = torch.rand(3, 64)
        assert torch.equal(again(x), found(x))
