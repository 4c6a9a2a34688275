"""Scores against exact loss changes, autograd gates and conservation laws."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import models, prune, through, train


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def quadratic(n=8, seed=0):
    """Return a Hessian, its minimum and the loss 1/2 (w-w*)^T H (w-w*)."""
    A = rand(n + 3, n, seed=seed)
    H, best = A.T @ A, rand(n, seed=seed + 1)
    return H, best, lambda w: 0.5 * (w - best) @ H @ (w - best)


def without(w, i):
    w = w.clone()
    w[i] = 0
    return w


def mlp(*widths, bias=True):
    torch.manual_seed(0)
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def batch(n=6, inputs=5, classes=3):
    return rand(n, inputs, seed=3), torch.arange(n) % classes


def names(model):
    return [n for n, p in model.named_parameters() if p.ndim >= 2]


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model, before):
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class TestFormulas:
    @settings(deadline=None, max_examples=25)
    @given(st.integers(0, 2**16))
    def test_the_two_terms_are_the_exact_change_of_a_quadratic(self, seed):
        H, best, loss = quadratic(seed=seed)
        w = best + rand(8, seed=seed + 2)
        g = H @ (w - best)
        for i in range(8):
            change = loss(without(w, i)) - loss(w)
            second = prune.obd(w, H.diagonal())[i]
            torch.testing.assert_close(change, second - g[i] * w[i])
            first = (change - second).abs()
            torch.testing.assert_close(prune.taylor(w, g)[i], first)

    def test_obd_is_the_exact_rise_at_the_minimum(self):
        H, best, loss = quadratic()
        exact = torch.stack([loss(without(best, i)) for i in range(8)])
        torch.testing.assert_close(prune.obd(best, H.diagonal()), exact)
        # H proportional to I: the ranking of the magnitudes
        order = prune.obd(best, torch.tensor(3.0)).argsort()
        assert torch.equal(order, best.abs().argsort())

    def test_the_gradient_alone_is_noise_at_a_minimum(self):
        """The counter-example to pruning where the gradient is small."""
        X = rand(40, 8) * torch.logspace(-2, 0, 8, dtype=torch.float64)
        y = X @ rand(8, seed=1)
        w = torch.linalg.lstsq(X, y).solution.requires_grad_()
        (g,) = torch.autograd.grad((X @ w - y).square().mean(), w)
        assert prune.gradient(g).max() < 1e-14
        H = 2 * X.T @ X / 40
        w = w.detach()
        rise = [(X @ without(w, i) - y).square().mean() for i in range(8)]
        rise = torch.stack(rise)
        torch.testing.assert_close(prune.obd(w, H.diagonal()), rise)
        assert rise.max() > 1000 * rise.min()  # there is much to rank
        assert not torch.equal(g.abs().argsort(), rise.argsort())

    def test_obs_is_the_rise_after_the_best_correction(self):
        H, best, loss = quadratic()
        Hinv = torch.linalg.inv(H)
        scores = prune.obs(best[None], Hinv)[0]
        for q in range(8):
            # KKT: [H e; e^T 0] [delta; multiplier] = [0; -w_q]
            K = torch.zeros(9, 9, dtype=torch.float64)
            K[:8, :8] = H
            K[q, 8] = K[8, q] = 1
            right = torch.zeros(9, dtype=torch.float64)
            right[8] = -best[q]
            delta = torch.linalg.solve(K, right)[:8]
            torch.testing.assert_close(scores[q], loss(best + delta))
        assert (scores <= prune.obd(best, H.diagonal())).all()
        D = H.diagonal()
        torch.testing.assert_close(
            prune.obs(best[None], (1 / D).diag())[0], prune.obd(best, D)
        )

    @settings(deadline=None, max_examples=25)
    @given(
        st.integers(1, 30), st.sampled_from([1e-5, 0.1, 10]), st.integers(0, 99)
    )
    def test_inverse_fisher_is_the_inverse(self, samples, damp, seed):
        g = rand(samples, 8, seed=seed)
        F2 = g.T @ g / samples + damp * torch.eye(8, dtype=g.dtype)
        got = prune.inverse_fisher(g, damp=damp)
        torch.testing.assert_close(
            got, torch.linalg.inv(F2), rtol=1e-7, atol=1e-7
        )
        torch.testing.assert_close(got @ F2, torch.eye(8, dtype=g.dtype))
        single = prune.inverse_fisher(g.float(), damp=damp)
        want = prune.inverse_fisher(g.float().double(), damp=damp)
        assert torch.equal(single, want.float())

    def test_inverse_fisher_knows_what_its_diagonal_does_not(self):
        """Two inputs alike: either can go, its weight moves to the other."""
        g = rand(200, 3)
        g[:, 1] = g[:, 0] + 0.01 * g[:, 1]
        w = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
        together = prune.obs(w[None], prune.inverse_fisher(g, damp=1e-6))[0]
        alone = prune.fisher(w, g.square().mean(0))
        assert together[:2].max() < 0.01 * together[2]
        assert alone[:2].min() > 2 * alone[2]

    def test_wanda_squared_is_the_exact_error_of_zeroing_one_weight(self):
        W, X = rand(3, 5), rand(20, 5, seed=1)
        scores = prune.wanda_score(W, X.norm(dim=0))
        for i in range(3):
            for j in range(5):
                Q = W.clone()
                Q[i, j] = 0
                error = (X @ (Q - W).T).square().sum()
                torch.testing.assert_close(scores[i, j] ** 2, error)
        H = 2 * X.T @ X
        torch.testing.assert_close(scores**2, prune.obd(W, H.diagonal()))

    def test_wanda_compares_within_rows(self):
        W, norm = rand(6, 10), rand(10, seed=1).abs()
        W[0] *= 100
        mask = prune.wanda(W, norm, sparsity=0.3)
        assert ((~mask).sum(1) == 3).all()
        gone = (W.abs() * norm).argsort(1)[:, :3]
        assert torch.equal((~mask).nonzero()[:, 1], gone.sort(1).values.ravel())
        # unit norms: magnitude by rows
        ones = prune.wanda(W, torch.ones(10), sparsity=0.3)
        assert torch.equal(ones, prune.keep_rows(W.abs(), sparsity=0.3))
        assert not torch.equal(ones, mask)  # the norms matter

    def test_wanda_on_a_kernel_is_wanda_on_its_matrix(self):
        K, norm = rand(4, 3, 2, 2), rand(12, seed=1).abs()
        mask = prune.wanda(K, norm, sparsity=0.5)
        want = prune.wanda(K.flatten(1), norm, sparsity=0.5)
        assert torch.equal(mask.flatten(1), want)

    def test_norms_too_large_for_half_precision(self):
        W = torch.tensor([[1.0, 2.0]], dtype=torch.float16)
        scores = prune.wanda_score(W, torch.tensor([3e5, 2e5]).double())
        assert torch.equal(scores, torch.tensor([[3e5, 4e5]]))

    def test_snr_prefers_sharp_posteriors(self):
        mu = torch.tensor([1.0, 1.0, 0.1])
        sigma = torch.tensor([0.1, 1.0, 0.01])
        got = prune.snr(mu, sigma)
        torch.testing.assert_close(got, torch.tensor([100.0, 1.0, 100.0]))

    @pytest.mark.parametrize(
        ("call", "word"),
        [
            (lambda: prune.taylor(torch.ones(2), torch.ones(3)), "g must"),
            (lambda: prune.fisher(torch.ones(2), torch.ones(1)), "g2 must"),
            (lambda: prune.snr(torch.ones(2), torch.ones(1)), "sigma must"),
            (lambda: prune.obs(torch.ones(1, 2), torch.eye(3)), "Hinv"),
            (lambda: prune.inverse_fisher(torch.ones(3), damp=1), "g must"),
            (lambda: prune.inverse_fisher(torch.ones(0, 3), damp=1), "g must"),
            (lambda: prune.inverse_fisher(torch.ones(2, 3), damp=0), "damp"),
            (
                lambda: prune.wanda_score(torch.ones(1, 2), torch.ones(3)),
                "norm",
            ),
        ],
    )
    def test_bad_shapes_are_named(self, call, word):
        with pytest.raises(ValueError, match=word):
            call()


class TestEntropy:
    def test_constant_two_valued_and_uniform_channels(self):
        B = 16
        f = torch.stack(
            [
                torch.full((160,), 0.3),
                torch.arange(160) % 2 / 1.0,
                torch.arange(160) % B / (B - 1),
            ],
            1,
        )
        got = prune.channel_entropy(f, bins=B)
        want = torch.tensor([0, math.log(2), math.log(B)], dtype=torch.float64)
        torch.testing.assert_close(got, want)
        assert got[0] == 0  # and so pruned first

    @settings(deadline=None, max_examples=25)
    @given(st.integers(2, 20), st.integers(0, 2**16))
    def test_relabelling_the_bins_changes_nothing(self, bins, seed):
        g = torch.Generator().manual_seed(seed)
        f = torch.randint(bins, (50, 1), generator=g)
        f[0], f[1] = 0, bins - 1  # so that value k falls into bin k
        relabeled = torch.randperm(bins, generator=g)[f]
        both = torch.cat([f, relabeled], 1).double()
        a, b = prune.channel_entropy(both, bins=bins)
        torch.testing.assert_close(a, b)
        p = torch.bincount(f[:, 0]) / 50.0
        want = -sum(x * math.log(x) for x in p.tolist() if x)
        assert a.item() == pytest.approx(want, abs=1e-6)

    def test_maps_are_averaged_first(self):
        acts = rand(30, 4, 3, 2)
        torch.testing.assert_close(
            prune.channel_entropy(acts),
            prune.channel_entropy(acts.mean((2, 3))),
        )

    def test_one_range_for_the_layer_unmasks_tiny_noise(self):
        f = torch.cat([rand(500, 1), 1e-3 * rand(500, 1, seed=1)], 1)
        wide, tiny = prune.channel_entropy(f)
        # a range of its own makes the noise look as informative
        alone = prune.channel_entropy(f[:, 1:])[0]
        assert tiny < 0.5 * wide < alone

    def test_bias_is_that_of_miller_and_madow(self):
        f = torch.rand(100, 3000, generator=torch.Generator().manual_seed(0))
        f[0], f[1] = 0, 1
        bias = math.log(8) - prune.channel_entropy(f, bins=8).mean().item()
        assert bias == pytest.approx(7 / 200, rel=0.1)

    @pytest.mark.parametrize(
        ("acts", "bins", "word"),
        [
            (torch.ones(3), 4, "acts"),
            (torch.ones(0, 3), 4, "acts"),
            (torch.tensor([[1.0, math.nan]]), 4, "finite"),
            (torch.ones(3, 3), 1, "bins"),
        ],
    )
    def test_bad_arguments_are_named(self, acts, bins, word):
        with pytest.raises(ValueError, match=word):
            prune.channel_entropy(acts, bins=bins)


class TestCollectors:
    def test_moments_equal_the_per_sample_gradients_of_vmap(self):
        model = mlp(5, 7, 3)
        X, y = batch()

        def loss(weights, x, label):
            out = torch.func.functional_call(model, weights, (x[None],))
            return F.cross_entropy(out, label[None])

        weights = {n: p.detach() for n, p in model.named_parameters()}
        each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
        want = each(weights, X, y)
        before = snapshot(model)
        got = prune.gradients(model, [(X[:4], y[:4]), (X[4:], y[4:])])
        assert list(got) == names(model)
        for name, (mean, square) in got.items():
            torch.testing.assert_close(mean, want[name].mean(0))
            torch.testing.assert_close(square, want[name].square().mean(0))
        unchanged(model, before)

    def test_squaring_the_mean_is_not_the_fisher_information(self):
        model = mlp(5, 3)
        X, y = batch(60)
        data = [(X, y)] * 400
        model = train.fit(model, data, lr=0.1)
        m = prune.gradients(model, [(X, y)])["0.weight"]
        # at the minimum the mean is gone, the squares are not
        assert m.mean.square().max() < 1e-3 * m.square.min()

    def test_fisher_is_the_curvature_where_the_model_is_right(self):
        """With labels drawn from the model itself, E[g^2] = diag(H)."""
        torch.manual_seed(0)
        model = nn.Linear(3, 2).double()
        X = rand(4, 3)
        H = prune.curvature(
            model,
            [X],
            lambda m, x: F.cross_entropy(m(x), m(x).softmax(1).detach()),
            draws=1500,
        )["weight"]
        p = model(X).softmax(1).detach()
        F2 = torch.zeros(2, 3, dtype=torch.float64)
        for k in range(2):  # exact expectation over both labels
            g = (p - F.one_hot(torch.tensor(k), 2))[:, :, None] * X[:, None]
            F2 += (p[:, k, None, None] * g.square()).mean(0)
        assert (H - F2).abs().max() < 0.1 * F2.max()

    def test_curvature_is_the_diagonal_of_the_hessian(self):
        model, (X, y) = mlp(5, 4, 3), batch()
        model[1] = nn.Tanh()
        name = "0.weight"

        def loss(w):
            out = torch.func.functional_call(model, {name: w}, (X,))
            return F.cross_entropy(out, y)

        w = model[0].weight.detach()
        H = torch.autograd.functional.hessian(loss, w).reshape(20, 20)
        only = lambda n, p: n == name  # noqa: E731
        got = prune.curvature(model, [(X, y)], draws=1500, where=only)
        error = (got[name].ravel() - H.diagonal()).abs()
        # variance of one draw: the squares beside the diagonal
        rest = H - H.diagonal().diag()
        sigma = (2 * rest.square().sum(1) / 1500).sqrt()
        assert (error < 5 * sigma).all()

    def test_nested_batches_dropout_and_frozen_weights(self):
        model = mlp(5, 3)
        model.append(nn.Dropout())
        model.train().requires_grad_(False)
        X, y = batch()
        got = prune.gradients(
            model,
            [{"x": X, "y": [y]}],
            lambda m, b: F.cross_entropy(m(b["x"]), b["y"][0]),
        )
        want = prune.gradients(model.eval(), [(X, y)])
        assert torch.equal(got["0.weight"].square, want["0.weight"].square)
        assert not any(p.requires_grad for p in model.parameters())

    def test_a_language_model_with_fused_attention(self):
        torch.manual_seed(0)
        model = models.LM(vocab=7, width=8, layers=1, heads=2, context=4)
        ids = torch.arange(8).view(2, 4) % 7
        data = ids, ids.roll(-1, 1)
        for scores in (
            prune.grasp(model, data),
            prune.snip(model, data),
            prune.curvature(model, [data], draws=1),
            prune.synflow(model, ids),
        ):
            assert all(s.isfinite().all() for s in scores.values())
            assert any(s.any() for s in scores.values())

    def test_a_linear_loss_has_no_curvature(self):
        model = mlp(5, 3)
        got = prune.curvature(model, [rand(2, 5)], lambda m, x: m(x).sum())
        assert not got["0.weight"].any()

    def test_bad_arguments_are_named(self):
        model = mlp(5, 3)
        for f in (prune.gradients, prune.curvature):
            with pytest.raises(ValueError, match="batches"):
                f(model, [])
            with pytest.raises(ValueError, match="where"):
                f(model, [batch()], where=lambda n, w: False)
        with pytest.raises(ValueError, match="draws"):
            prune.curvature(model, [batch()], draws=0)


class TestAtInitialization:
    def test_snip_is_the_gradient_of_gates_at_one(self):
        model, data = mlp(5, 7, 3), batch()
        weights = dict(model.named_parameters())
        gates = {
            n: torch.ones_like(weights[n], requires_grad=True)
            for n in names(model)
        }
        gated = {n: gates[n] * weights[n].detach() for n in gates}
        out = torch.func.functional_call(model, gated, (data[0],))
        loss = F.cross_entropy(out, data[1])
        want = torch.autograd.grad(loss, list(gates.values()))
        total = sum(g.abs().sum() for g in want)
        before = snapshot(model)
        got = prune.snip(model, data)
        for g, s in zip(want, got.values(), strict=True):
            torch.testing.assert_close(s, g.abs() / total)
        assert sum(s.sum() for s in got.values()).item() == pytest.approx(1)
        unchanged(model, before)

    def test_grasp_predicts_what_happens_to_the_gradient_norm(self):
        model, (X, y) = mlp(5, 4, 3), batch()
        model[1] = nn.Tanh()  # smooth: finite differences apply
        weights = {n: p.detach() for n, p in model.named_parameters()}
        chosen = names(model)

        def flow(weights):
            inner = {n: weights[n].requires_grad_() for n in chosen}
            out = torch.func.functional_call(model, {**weights, **inner}, (X,))
            loss = F.cross_entropy(out, y)
            g = torch.autograd.grad(loss, list(inner.values()))
            return sum(x.square().sum() for x in g)

        scores = prune.grasp(model, (X, y))
        eps = 1e-5
        for name in chosen:
            for i in range(0, weights[name].numel(), 3):
                ends = []
                for sign in (1, -1):
                    moved = {n: w.clone() for n, w in weights.items()}
                    moved[name].view(-1)[i] *= 1 - sign * eps
                    ends.append(flow(moved))
                # shrinking the weight by a fraction eps: -2 eps w (H g)
                slope = (ends[0] - ends[1]) / (2 * eps)
                want = -2 * scores[name].view(-1)[i]
                torch.testing.assert_close(slope, want, rtol=1e-5, atol=1e-9)

    def test_synflow_conserves_the_flow(self):
        model = mlp(6, 9, 8, 4)
        s = prune.synflow(model, torch.zeros(3, 6))
        product = torch.ones(6, dtype=torch.float64)
        for layer in model[::2]:
            product = layer.weight.detach().abs() @ product
        R = product.sum()
        for score in s.values():
            assert (score >= 0).all()
            torch.testing.assert_close(score.sum(), R)
        first, second, third = s.values()
        torch.testing.assert_close(first.sum(1), second.sum(0))
        torch.testing.assert_close(second.sum(1), third.sum(0))

    def test_synflow_conserves_the_flow_through_convolutions(self):
        torch.manual_seed(0)
        model = models.CNN().train()
        before = snapshot(model)
        s = prune.synflow(model, torch.zeros(2, 1, 28, 28))
        totals = torch.stack([x.sum() for x in s.values()])
        torch.testing.assert_close(totals, totals[:1].expand_as(totals))
        assert totals[0] > 0
        units = list(s.values())
        torch.testing.assert_close(
            units[0].sum((1, 2, 3)), units[1].sum((0, 2, 3))
        )
        unchanged(model, before)
        assert model.training

    def test_synflow_survives_a_depth_that_float32_does_not(self):
        model = mlp(*[64] * 80).float()
        s = prune.synflow(model, torch.zeros(1, 64))
        assert all(x.isfinite().all() for x in s.values())
        assert s["0.weight"].sum() > torch.finfo(torch.float32).max

    def test_steps_avoid_the_layer_collapse_of_one_step(self):
        """At the most any method can reach: one path, one weight a layer."""
        model = mlp(20, 100, 20, 5, bias=False)
        x = torch.zeros(1, 20)
        total = sum(p.numel() for p in model.parameters())
        sparsity = 1 - 6 / total
        masks = prune.synflow_masks(model, x, sparsity=sparsity)
        kept = [int(m.sum()) for m in masks.values()]
        assert sum(kept) == 6
        assert min(kept) >= 1
        # and a signal still comes through
        with torch.no_grad():
            for name, w in model.named_parameters():
                w.copy_(w.abs() * masks[name])
            assert model(torch.ones(1, 20, dtype=w.dtype)).sum() > 0
        once = prune.synflow_masks(
            mlp(20, 100, 20, 5), x, sparsity=sparsity, rounds=1
        )
        assert min(int(m.sum()) for m in once.values()) == 0

    def test_what_synflow_removed_does_not_come_back(self):
        model, x = mlp(2, 1, 1, 1), torch.zeros(1, 2)
        half = prune.synflow_masks(model, x, sparsity=0.5, rounds=1)
        assert not half["0.weight"].any()  # now every score is zero
        most = prune.synflow_masks(model, x, sparsity=0.75, rounds=2)
        assert all((half[n] | ~m).all() for n, m in most.items())
        assert sum(int(m.sum()) for m in most.values()) == 1

    @settings(deadline=None, max_examples=10)
    @given(st.floats(0, 1), st.integers(1, 5))
    def test_synflow_masks_are_exact(self, sparsity, rounds):
        masks = prune.synflow_masks(
            mlp(4, 6, 3), torch.zeros(1, 4), sparsity=sparsity, rounds=rounds
        )
        assert sum(int((~m).sum()) for m in masks.values()) == round(
            sparsity * 42
        )

    def test_bad_arguments_are_named(self):
        model, x = mlp(4, 3), torch.zeros(1, 4)
        with pytest.raises(ValueError, match="rounds"):
            prune.synflow_masks(model, x, sparsity=0.5, rounds=0)
        with pytest.raises(ValueError, match="sparsity"):
            prune.synflow_masks(model, x, sparsity=1.5)


class TestMovement:
    def test_scores_follow_the_formula_for_frozen_weights(self):
        model, (X, y) = mlp(5, 3), batch()
        model.requires_grad_(False)
        masked = through.attach(
            model,
            "0.weight",
            prune.movement,
            scores=nn.Parameter(torch.zeros(3, 5, dtype=torch.float64)),
            sparsity=torch.tensor(0.6, dtype=torch.float64),
        )
        opt = torch.optim.SGD(
            [p for p in masked.parameters() if p.requires_grad], lr=0.5
        )
        W, b = model[0].weight, model[0].bias
        S = torch.zeros(3, 5, dtype=torch.float64)
        for _ in range(10):
            mask = prune.keep(S, sparsity=0.6)
            used = (W * mask).requires_grad_()
            (g,) = torch.autograd.grad(F.cross_entropy(X @ used.T + b, y), used)
            S = S - 0.5 * g * W
            opt.zero_grad()
            F.cross_entropy(masked(X), y).backward()
            opt.step()
        got = through.tensors(masked)["0.weight"]["scores"]
        torch.testing.assert_close(got.detach(), S)
        assert (g * W)[~mask].abs().min() > 0  # also where the mask is zero

    def test_direction_counts_and_size_does_not(self):
        """w1 = 0.1 grows towards 1, w2 = 5 shrinks towards 1."""
        w = torch.tensor([0.1, 5.0], requires_grad=True)
        scores = torch.zeros(2, requires_grad=True)
        opt = torch.optim.SGD([w, scores], lr=0.05)
        history = [scores.detach().clone()]
        for _ in range(20):
            out = prune.movement(w, scores, 0.0)
            opt.zero_grad()
            (out - 1).square().sum().backward()
            opt.step()
            history.append(scores.detach().clone())
        steps = torch.stack(history).diff(dim=0)
        assert (steps[:, 0] > 0).all()
        assert (steps[:, 1] < 0).all()
        assert w[0] < w[1]  # magnitude would keep the other one
        assert prune.keep(scores, sparsity=0.5).tolist() == [True, False]

    def test_values_are_exact_and_gradients_reach_everything(self):
        w = rand(4, 4).float().requires_grad_()
        scores = (1e8 * rand(4, 4, seed=1)).float().requires_grad_()
        out = prune.movement(w, scores, 0.5)
        mask = prune.keep(scores, sparsity=0.5)
        assert torch.equal(out.detach(), w.detach() * mask)
        (3 * out).sum().backward()
        assert torch.equal(scores.grad, 3 * w.detach())
        assert torch.equal(w.grad, 3.0 * mask)

    def test_shapes_are_checked(self):
        with pytest.raises(ValueError, match="scores"):
            prune.movement(torch.ones(2), torch.ones(3), 0.5)
