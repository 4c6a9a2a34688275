"""Rounding against explicit surgery, nearest planes and exhaustive search."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import codes, obs, quantize, storage

GRIDS = [
    {"each": "tensor"},
    {"each": "row"},
    {"each": 4},
    {"each": 5},  # 12 is no multiple: the last group is padded
    {"each": 4, "symmetric": True},
    {"each": "row", "symmetric": True},
]
METHODS = [
    partial(quantize.adaround, steps=300),
    quantize.obq,
    quantize.gptq,
]


def case(out=6, n=12, rows=200, seed=0, dtype=torch.float64):
    """Weights and the second moments of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(out, n, generator=g, dtype=dtype)
    mix = torch.randn(n, n, generator=g, dtype=dtype)
    X = torch.randn(rows, n, generator=g, dtype=dtype) @ (mix + 0.5)
    return W, X.T @ X / rows


def loss(W, code, H):
    return float(obs.layer_loss(W, code.decode().to(W), H).sum())


def inner(code):
    return code.x if isinstance(code, codes.View) else code


def integers(code):
    return inner(code).q.values


def unbounded(W):
    """A grid of step 1 that nothing here leaves."""
    q = torch.zeros(W.shape, dtype=torch.int32)
    return codes.Affine(codes.Ints(q, 16), 1.0, 1 << 15)


def explicit(W, H, at):
    """GPTQ from scratch: invert the rest of H for every column."""
    W, n = W.clone(), W.shape[1]
    price = torch.zeros(len(W), dtype=W.dtype)
    for j in range(n):
        Hinv = torch.linalg.inv(H[j:, j:])
        q = at(j, W)
        error = (W[:, j] - q) / Hinv[0, 0]
        price += (W[:, j] - q) ** 2 / Hinv[0, 0]
        W[:, j:] -= torch.outer(error, Hinv[0])
        W[:, j] = q
    return W, price


def cheapest(W, H, candidates):
    """The least loss over all products of the candidates of each weight."""
    total = 0.0
    for w, options in zip(W, candidates, strict=True):
        tries = torch.tensor(list(itertools.product(*options)), dtype=W.dtype)
        total += float(obs.layer_loss(w.expand_as(tries), tries, H).min())
    return total


class TestNearest:
    @pytest.mark.parametrize("how", GRIDS)
    def test_weights_on_their_own_grid(self, how):
        W, _ = case()
        grid = quantize.min_max(W, bits=3, **how)
        code = quantize.nearest(W, grid)
        assert torch.equal(integers(code), integers(grid))
        assert torch.equal(code.decode(), grid.decode())
        assert inner(code).scale is inner(grid).scale

    @pytest.mark.parametrize("how", GRIDS)
    def test_new_weights_go_to_the_nearest_of_all_points(self, how):
        W, _ = case()
        new = 1.5 * case(seed=1)[0]
        grid = quantize.min_max(W, bits=3, **how)
        code = inner(grid)
        top = 6 if how.get("symmetric") else 7
        points = torch.stack(
            [
                codes.View(
                    codes.Affine(
                        torch.full(code.q.shape, k), code.scale, code.zero
                    ),
                    (6, 12),
                ).decode()
                for k in range(top + 1)
            ]
        )
        got = (quantize.nearest(new, grid).decode() - new).abs()
        want = (points - new).abs().amin(0)
        torch.testing.assert_close(got, want)

    def test_ties_go_to_the_even_integer(self):
        x = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5]])
        got = quantize.nearest(x, unbounded(x))
        assert got.decode().tolist() == [[-2, 0, 0, 2, 2]]

    def test_a_symmetric_grid_stays_symmetric(self):
        W, _ = case()
        grid = quantize.min_max(W, bits=3, symmetric=True)
        far = quantize.nearest(100 * W, grid).decode()
        assert torch.equal(quantize.nearest(-100 * W, grid).decode(), -far)
        torch.testing.assert_close(far.abs().amax(1), W.abs().amax(1))

    def test_a_batch_on_the_grid_of_a_tensor(self):
        x = torch.rand(5, 2, 7)
        grid = quantize.min_max(torch.rand(9, 7), bits=8, each="tensor")
        code = quantize.nearest(x, grid)
        q, s = inner(grid), float(inner(grid).scale)
        zero = int(q.zero.values)
        want = torch.fake_quantize_per_tensor_affine(x, s, zero, 0, 255)
        torch.testing.assert_close(code.decode(), want)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_types(self, dtype):
        W = case(dtype=torch.float32)[0].to(dtype)
        grid = quantize.min_max(W, bits=8, each=4)
        assert inner(grid).scale.dtype == dtype
        again = quantize.nearest(W, grid)
        assert torch.equal(integers(again), integers(grid))

    def test_bad_arguments_are_named(self):
        W, _ = case()
        grid = quantize.min_max(W, bits=3)
        with pytest.raises(ValueError, match="grid must be"):
            quantize.nearest(W, codes.Scaled(W, 2.0))
        with pytest.raises(ValueError, match="does not fit"):
            quantize.nearest(torch.ones(5, 12), grid)
        with pytest.raises(ValueError, match="nan"):
            quantize.nearest(torch.full((6, 12), torch.nan), grid)


class TestStochastic:
    def test_nothing_changes_on_average(self):
        x = torch.linspace(-0.8, 0.9, 18).repeat(20_000, 1)
        ends = torch.tensor([[-1.0, 1.0]])
        grid = quantize.min_max(ends, bits=3, each="tensor")
        g = torch.Generator().manual_seed(0)
        got = quantize.stochastic(x, grid, generator=g).decode()
        step = float(inner(grid).scale)
        # five standard errors of a coin that lands a step apart
        assert (got.mean(0) - x[0]).abs().max() < 5 * step / 2 / 20_000**0.5
        plain = quantize.nearest(x, grid).decode()
        assert (plain.mean(0) - x[0]).abs().max() > 0.3 * step
        assert (got - x).square().mean() > (plain - x).square().mean()

    def test_only_the_two_neighbors(self):
        W, _ = case()
        grid = quantize.min_max(W, bits=4, each=4)
        got = quantize.stochastic(W, grid).decode()
        step = inner(grid).scale.expand(6, 3, 4).reshape(6, 12)
        assert ((got - W).abs() <= step * (1 + 1e-9)).all()

    def test_points_stay_and_seeds_repeat(self):
        W, _ = case()
        grid = quantize.min_max(W, bits=4)
        on = torch.round(W * 4)  # exactly on the points
        assert torch.equal(
            quantize.stochastic(on, unbounded(W)).decode().double(), on
        )
        a, b = (
            quantize.stochastic(
                W, grid, generator=torch.Generator().manual_seed(3)
            )
            for _ in range(2)
        )
        assert torch.equal(integers(a), integers(b))


class TestSequential:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("how", GRIDS)
    def test_without_correlation_it_is_rounding(self, method, how):
        W, H = case(dtype=torch.float32)
        grid = quantize.min_max(W, bits=3, **how)
        for D in (torch.eye(12), H.diagonal().diag()):
            code = method(W, D, grid)
            assert torch.equal(integers(code), integers(grid))

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("how", GRIDS)
    def test_keeps_the_grid_and_lowers_the_loss(self, method, how):
        before = after = 0
        for seed in range(4):
            W, H = case(seed=seed)
            kept = W.clone(), H.clone()
            grid = quantize.min_max(W, bits=3, **how)
            code = method(W, H, grid)
            assert inner(code).scale is inner(grid).scale
            assert inner(code).zero is inner(grid).zero
            assert int(integers(code).max()) <= 7 - how.get("symmetric", 0)
            assert torch.equal(W, kept[0])
            assert torch.equal(H, kept[1])
            before += loss(W, grid, H)
            after += loss(W, code, H)
        assert after < 0.9 * before

    @pytest.mark.parametrize("method", METHODS)
    def test_never_better_than_the_best_of_all(self, method):
        for seed in range(3):
            W, H = case(out=3, n=5, seed=seed)
            grid = quantize.min_max(W, bits=2)
            every = torch.arange(4).expand(3, 4)
            points = codes.Affine(
                every, inner(grid).scale, inner(grid).zero
            ).decode()
            best = cheapest(W, H, [[p.tolist()] * 5 for p in points])
            assert best <= loss(W, method(W, H, grid), H) * (1 + 1e-9)

    @pytest.mark.parametrize("method", METHODS)
    def test_types_and_dead_inputs(self, method):
        W, H = case(dtype=torch.float32)
        H[3], H[:, 3] = 0, 0
        for dtype in (torch.bfloat16, torch.float32):
            grid = quantize.min_max(W.to(dtype), bits=4, each=4)
            code = method(W.to(dtype), H, grid)
            assert inner(code).scale.dtype == dtype
            assert code.decode().isfinite().all()

    @pytest.mark.parametrize("method", METHODS)
    def test_bad_arguments_are_named(self, method):
        W, H = case()
        grid = quantize.min_max(W, bits=3)
        with pytest.raises(ValueError, match="H must"):
            method(W, H[:3, :3], grid)
        with pytest.raises(ValueError, match="shape of W"):
            method(W[:5], H, grid)
        with pytest.raises(ValueError, match="grid must be"):
            method(W, H, quantize.nf4(W))


class TestGPTQ:
    @pytest.mark.parametrize("how", GRIDS)
    def test_is_surgery_in_a_fixed_order(self, how):
        W, H = case()
        grid = quantize.min_max(W, bits=3, **how)

        def at(j, V):
            return quantize.nearest(V, grid).decode()[:, j]

        want, price = explicit(W, H, at)
        got = quantize.gptq(W, H, grid, damp=0)
        torch.testing.assert_close(got.decode(), want)
        # what every column costs when it is fixed is all that is lost
        found = obs.layer_loss(W, got.decode(), H)
        torch.testing.assert_close(found, price)

    @settings(deadline=None, max_examples=25)
    @given(
        st.integers(1, 24),
        st.sampled_from(GRIDS),
        st.booleans(),
        st.integers(0, 2**16),
    )
    def test_blocks_change_nothing(self, block, how, renew, seed):
        W, H = case(seed=seed)
        grid = quantize.min_max(W, bits=3, **how)
        if how["each"] == "tensor":
            renew = False
        rule = partial(quantize.min_max, bits=3, **how) if renew else None
        got = quantize.gptq(W, H, grid, block=block, renew=rule)
        want = quantize.gptq(W, H, grid, renew=rule)
        assert torch.equal(integers(got), integers(want))

    @pytest.mark.parametrize("n", [2, 5, 12])
    def test_is_the_nearest_plane_of_babai_backwards(self, n):
        W, H = case(n=n)
        W = 20 * W
        got = quantize.gptq(W, H, unbounded(W), damp=0).decode()
        # columns backwards: Babai fixes the last coordinate first
        A = H.flip(0, 1).numpy()
        R = np.linalg.cholesky(A).T  # A = R^T R, R upper triangular
        for w, q in zip(W.flip(1).numpy(), got.flip(1), strict=True):
            target = R @ w
            z = np.zeros(n)
            for i in reversed(range(n)):
                z[i] = np.rint(target[i] / R[i, i])
                target = target - z[i] * R[:, i]
            assert q.tolist() == z.tolist()

    def test_each_column_adds_at_most_a_quarter_of_a_step_squared(self):
        W, H = case()
        got = quantize.gptq(W, H, unbounded(W), damp=0)
        d = obs.factor(H, damp=0).diagonal()
        assert loss(W, got, H) <= len(W) * float((0.25 / d.square()).sum())

    def test_not_always_better_than_rounding(self):
        losses = []
        for seed in range(300):
            W, H = case(out=1, n=3, seed=seed)
            grid = quantize.min_max(W, bits=2)
            losses.append(
                loss(W, quantize.gptq(W, H, grid), H) - loss(W, grid, H)
            )
        losses = torch.tensor(losses)
        assert (losses > 1e-9).any()
        assert losses.mean() < 0

    def test_an_order_is_a_permutation_of_the_problem(self):
        W, H = case()
        grid = quantize.min_max(W, bits=3)
        o = obs.activation_order(H)
        got = quantize.gptq(W, H, grid, order=o)
        same = quantize.gptq(W[:, o], H[o][:, o], grid)
        assert torch.equal(integers(got)[:, o], integers(same))

    def test_with_an_order_groups_keep_their_grids(self):
        W, H = case()
        grid = quantize.min_max(W, bits=3, each=4)
        o = obs.activation_order(H)
        got = quantize.gptq(W, H, grid, order=o, damp=0)
        s = inner(grid).scale.expand(6, 3, 4).reshape(6, 12)[:, o]
        z = inner(grid).zero.values.expand(6, 3, 4).reshape(6, 12)[:, o]

        def at(j, V):
            q = ((V[:, j] / s[:, j]).round() + z[:, j]).clamp(0, 7)
            return s[:, j] * (q - z[:, j])

        want, _ = explicit(W[:, o], H[o][:, o], at)
        torch.testing.assert_close(got.decode()[:, o], want)

    @pytest.mark.parametrize("each", [3, 4, 5])
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_renewed_grids_are_those_of_the_weights_by_then(
        self, each, symmetric
    ):
        W, H = case()
        rule = partial(quantize.min_max, bits=3, symmetric=symmetric)
        grid = rule(W, each=each)
        got = quantize.gptq(W, H, grid, renew=rule, damp=0)
        current = {}

        def at(j, V):
            if j % each == 0:
                current["grid"] = rule(V[:, j : j + each])
            x = V[:, j - j % each :][:, :each]
            return quantize.nearest(x, current["grid"]).decode()[:, j % each]

        want, _ = explicit(W, H, at)
        torch.testing.assert_close(got.decode(), want)
        # the first group meets W as it was, the others do not
        new, old = inner(got).scale[..., 0], inner(grid).scale[..., 0]
        assert torch.equal(new[:, 0], old[:, 0])
        assert not torch.isclose(new[:, 1:], old[:, 1:]).any()
        by_group = partial(rule, each=each)
        same = quantize.gptq(W, H, grid, renew=by_group, damp=0)
        assert torch.equal(same.decode(), got.decode())

    def test_renewing_a_row_at_its_start_changes_nothing(self):
        W, H = case()
        rule = partial(quantize.min_max, bits=3)
        grid = rule(W)
        got = quantize.gptq(W, H, grid, renew=rule)
        assert torch.equal(got.decode(), quantize.gptq(W, H, grid).decode())

    def test_bad_renewals_are_named(self):
        W, H = case()
        grid = quantize.min_max(W, bits=3, each=4)
        rule = partial(quantize.min_max, bits=3)
        with pytest.raises(ValueError, match="not both"):
            quantize.gptq(W, H, grid, renew=rule, order=torch.arange(12))
        for wrong in (
            partial(quantize.min_max, bits=4),
            partial(quantize.min_max, bits=3, symmetric=True),
            partial(quantize.min_max, bits=3, each=2),
        ):
            with pytest.raises(ValueError, match="renew must"):
                quantize.gptq(W, H, grid, renew=wrong)

    def test_padding_stays_zero_and_the_file_is_exact(self):
        W, H = case(dtype=torch.float32)
        model = torch.nn.Linear(12, 6, bias=False)
        grid = quantize.min_max(W, bits=3, each=5)
        code = quantize.gptq(W, H, grid)
        q, zero = integers(code)[:, 2, 2:], code.x.zero.values[:, 2]
        assert (q == zero).all()
        # 6 x 15 weights of 3 bits, 18 scales, 18 zeros of 3 bits
        assert storage.payload(code) == -(-90 * 3 // 8) + 18 * 4 + 7
        data = storage.dumps(model, {"weight": code})
        again = storage.loads(data, like=model)
        assert torch.equal(again.weight, code.decode())

    def test_few_samples(self):
        W, _ = case(n=40, dtype=torch.float32)
        X = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
        H = X.T @ X / 8
        grid = quantize.min_max(W, bits=3)
        code = quantize.gptq(W, H, grid)
        assert loss(W, code, H) < 0.5 * loss(W, grid, H)
        with pytest.raises(ValueError, match="larger damp"):
            quantize.gptq(W, H, grid, damp=0)


class TestOBQ:
    @pytest.mark.parametrize("seed", range(4))
    def test_first_is_the_cheapest(self, seed):
        W, H = case(out=1, n=6, seed=seed)
        grid = quantize.min_max(W, bits=2)
        # an independent greedy: solve for the free weights every time
        w, free, s = W[0].clone(), list(range(6)), inner(grid).scale[0]
        while free:
            Hinv = torch.linalg.inv(H[free][:, free])
            q = quantize.nearest(w[None], grid).decode()[0]
            price = [
                float((w[j] - q[j]) ** 2 / Hinv[i, i])
                for i, j in enumerate(free)
            ]
            outside = [float((w[j] - q[j]).abs() - s / 2) for j in free]
            i = int(np.argmin(price))
            if max(outside) > 1e-9:  # beyond the ends: first of all
                i = int(np.argmax(outside))
            j = free[i]
            w[free] -= (w[j] - q[j]) / Hinv[i, i] * Hinv[i]
            w[j] = q[j]
            free.remove(j)
        got = quantize.obq(W, H, grid, damp=0)
        torch.testing.assert_close(got.decode()[0], w)

    def test_rows_do_not_see_one_another(self):
        W, H = case()
        grid = quantize.min_max(W, bits=3)
        whole = quantize.obq(W, H, grid).decode()
        for i in range(len(W)):
            row = W[i : i + 1]
            one = quantize.obq(row, H, quantize.min_max(row, bits=3))
            assert torch.equal(one.decode()[0], whole[i])


class TestAdaRound:
    def test_the_example(self):
        W = torch.tensor([[0.4, 0.4]])
        H = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        grid = quantize.min_max(torch.tensor([[0.0, 3.0]]), bits=2)
        assert loss(W, quantize.nearest(W, grid), H) == pytest.approx(0.608)
        for seed in (None, 1, 2):
            g = None if seed is None else torch.Generator().manual_seed(seed)
            code = quantize.adaround(W, H, grid, generator=g)
            assert loss(W, code, H) == pytest.approx(0.088)

    def test_between_the_best_of_all_and_rounding(self):
        near = 0
        for seed in range(4):
            W, H = case(out=3, n=8, seed=seed)
            grid = quantize.min_max(W, bits=3)
            s = inner(grid).scale
            down = torch.floor(W / s) * s
            z = inner(grid).zero.values.double()
            low, high = -z * s, (7 - z) * s
            down, up = down.clamp(low, high), (down + s).clamp(low, high)
            options = torch.stack([down, up], 2).tolist()
            best = cheapest(W, H, options)
            code = quantize.adaround(W, H, grid)
            found, plain = loss(W, code, H), loss(W, grid, H)
            assert best * (1 - 1e-9) <= found <= plain
            # nothing but up and down
            q = code.decode()
            assert (torch.isclose(q, down) | torch.isclose(q, up)).all()
            near += found < 1.3 * best
        assert near >= 3

    def test_is_the_same_every_time(self):
        W, H = case()
        grid = quantize.min_max(W, bits=3, each=4)
        a, b = (quantize.adaround(W, H, grid, steps=50) for _ in range(2))
        assert torch.equal(integers(a), integers(b))

    def test_units_do_not_matter(self):
        W, H = case()
        grid = quantize.min_max(W, bits=3)
        small = quantize.min_max(W / 64, bits=3)
        a = quantize.adaround(W, H, grid, steps=100)
        b = quantize.adaround(W / 64, 1024 * H, small, steps=100)
        assert torch.equal(integers(a), integers(b))

    def test_what_the_second_term_is_worth(self):
        W, H = case(out=16, n=24)
        grid = quantize.min_max(W, bits=3)
        without = quantize.adaround(W, H, grid, weight=0)
        found = quantize.adaround(W, H, grid)
        # it starts at W, where the first term alone has little to say
        assert loss(W, found, H) < 0.8 * loss(W, without, H)
        assert loss(W, found, H) < 0.5 * loss(W, grid, H)

    def test_inside_no_grad(self):
        W, H = case()
        grid = quantize.min_max(W, bits=3)
        with torch.no_grad():
            code = quantize.adaround(W, H, grid, steps=20)
        assert not code.decode().requires_grad

    @pytest.mark.parametrize("how", [{"steps": 0}, {"lr": 0.0}])
    def test_bad_arguments_are_named(self, how):
        W, H = case()
        with pytest.raises(ValueError, match="steps and lr"):
            quantize.adaround(W, H, quantize.min_max(W, bits=3), **how)


def test_the_family_in_order():
    """Correlated inputs: what each method is worth on one layer."""
    W, H = case(out=32, n=48, rows=1000)
    grid = quantize.mse(W, bits=3)
    plain = loss(W, grid, H)
    gptq = loss(W, quantize.gptq(W, H, grid), H)
    obq = loss(W, quantize.obq(W, H, grid), H)
    ada = loss(W, quantize.adaround(W, H, grid), H)
    assert max(ada, obq) < 0.8 * gptq < 0.5 * plain
