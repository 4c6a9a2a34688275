"""Repairs against least squares, explicit OBS and exhaustive search."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import codes, obs, prune, storage


def case(out=6, n=12, rows=200, seed=0, dtype=torch.float64):
    """Weights and the second moments of strongly correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(out, n, generator=g, dtype=dtype)
    mix = torch.randn(n, n, generator=g, dtype=dtype)
    X = torch.randn(rows, n, generator=g, dtype=dtype) @ (mix + 1)
    return W, X.T @ X / rows, X


def loss(W, code, H):
    return obs.layer_loss(W, code.decode(), H).sum()


def masked(W, mask):
    """What masking alone gives: a repair with its update switched off."""
    return codes.sparse(W, mask)


def keep_of(code):
    assert isinstance(code, codes.Sparse)
    return code.mask


def explicit(W, H, choose):
    """SparseGPT from scratch: invert the rest of H for every column."""
    W = W.clone()
    n = W.shape[1]
    d2 = torch.stack([torch.linalg.inv(H[j:, j:])[0, 0] for j in range(n)])
    mask = torch.ones(W.shape, dtype=torch.bool)
    for j in range(n):
        choose(j, W, d2, mask)
        Hinv = torch.linalg.inv(H[j:, j:])
        step = torch.where(mask[:, j], 0, W[:, j]) / Hinv[0, 0]
        W[:, j:] -= torch.outer(step, Hinv[0])
        W[:, j] *= mask[:, j]
    return W, mask


class TestLeastSquares:
    def test_is_the_regression_of_the_outputs_on_the_kept_inputs(self):
        W, H, X = case()
        mask = prune.magnitude(W, sparsity=0.5)
        got = prune.least_squares(W, mask, H, damp=0).decode()
        for w, m, q in zip(W, mask, got, strict=True):
            want = torch.linalg.lstsq(X[:, m], X @ w).solution
            torch.testing.assert_close(q[m], want, rtol=1e-7, atol=1e-8)
            assert (q[~m] == 0).all()

    @settings(deadline=None, max_examples=30)
    @given(
        st.integers(1, 16),
        st.floats(0, 1),
        st.sampled_from([1e-6, 0.01, 1.0]),
        st.integers(0, 2**16),
    )
    def test_never_raises_the_loss_of_masking(self, n, sparsity, damp, seed):
        W, H, _ = case(n=n, seed=seed)
        mask = prune.magnitude(W, sparsity=sparsity)
        code = prune.least_squares(W, mask, H, damp=damp)
        assert torch.equal(keep_of(code), mask)
        before = loss(W, masked(W, mask), H)
        assert loss(W, code, H) <= before * (1 + 1e-9) + 1e-12

    def test_the_update_is_what_helps(self):
        W, H, _ = case(out=32, n=24, rows=500)
        mask = prune.magnitude(W, sparsity=0.5)
        best = loss(W, prune.least_squares(W, mask, H), H)
        assert best < 0.5 * loss(W, masked(W, mask), H)

    def test_nothing_to_do(self):
        W, H, _ = case()
        for mask in (torch.ones_like(W), torch.zeros_like(W)):
            got = prune.least_squares(W, mask.bool(), H, damp=0)
            torch.testing.assert_close(got.decode(), W * mask)
        D = H.diagonal().diag()  # no correlation: nothing can help
        mask = prune.magnitude(W, sparsity=0.5)
        got = prune.least_squares(W, mask, D)
        torch.testing.assert_close(got.decode(), W * mask)

    def test_chunks_of_rows_are_seamless(self, monkeypatch):
        W, H, _ = case()
        mask = prune.magnitude(W, sparsity=0.5)
        whole = prune.least_squares(W, mask, H)
        monkeypatch.setattr("minicompress.prune.repair.CHUNK", 4 * 144)
        chunks = prune.least_squares(W, mask, H)  # 4 rows, then 2
        torch.testing.assert_close(whole.decode(), chunks.decode())
        one = [
            prune.least_squares(w[None], m[None], H).decode()
            for w, m in zip(W, mask, strict=True)
        ]
        torch.testing.assert_close(whole.decode(), torch.cat(one))

    def test_few_samples_and_dead_inputs(self):
        W, _, X = case(dtype=torch.float32)
        X = X[:4].clone()
        X[:, 3] = 0
        H = X.T @ X / 4
        mask = prune.magnitude(W, sparsity=0.3)
        got = prune.least_squares(W, mask, H)
        assert got.values.dtype == torch.float32
        assert got.decode().isfinite().all()
        assert loss(W, got, H) <= loss(W, masked(W, mask), H)
        with pytest.raises(ValueError, match="larger damp"):
            prune.least_squares(W, mask, H, damp=0)


class TestSurgeon:
    def test_one_removal_is_the_best_of_all(self):
        W, H, X = case(out=3, n=6)
        got = prune.surgeon(W, H, sparsity=1 / 6, damp=0)
        for w, m, q in zip(W, got.mask, got.decode(), strict=True):
            losses = []
            for gone in range(6):
                rest = [j for j in range(6) if j != gone]
                fit = torch.linalg.lstsq(X[:, rest], X @ w).solution
                error = (X[:, rest] @ fit - X @ w).square().mean()
                losses.append(error)
            assert (~m).nonzero().item() == int(torch.stack(losses).argmin())
            error = (X @ (q - w)).square().mean()
            torch.testing.assert_close(error, min(losses))

    def test_equals_the_sequence_of_single_removals(self):
        """Sequential OBS = removal of the group = refit of the survivors."""
        W, H, _ = case()
        got = prune.surgeon(W, H, sparsity=0.5, damp=0).decode()
        for w, want in zip(W, got, strict=True):
            w, Hinv, left = w[None], torch.linalg.inv(H), list(range(12))
            for _ in range(6):
                score = prune.obs(w[:, left], Hinv[left][:, left])
                q = left[int(score.argmin())]
                w, Hinv = obs.surgeon(w, Hinv, q), obs.downdate(Hinv, q)
                left.remove(q)
            torch.testing.assert_close(w[0], want, rtol=1e-6, atol=1e-7)
            # the group formula: -H^-1 E (E^T H^-1 E)^-1 E^T w
        gone = got[0] == 0
        Hinv, w = torch.linalg.inv(H), W[0]
        delta = torch.linalg.solve(Hinv[gone][:, gone], w[gone])
        torch.testing.assert_close(
            w - Hinv[:, gone] @ delta, got[0], rtol=1e-6, atol=1e-7
        )
        cost = w[gone] @ delta
        torch.testing.assert_close(cost, obs.layer_loss(w[None], got[:1], H)[0])

    def test_greedy_is_near_the_best_of_all_masks(self):
        """With mild correlations; with strong ones it can be far off."""
        W, _, X = case(out=100, n=8)
        mix = case(out=8, n=8, seed=1)[0]
        X = torch.linalg.qr(X).Q @ (torch.eye(8) + 0.3 * mix)
        H = X.T @ X
        best = torch.full((100,), torch.inf, dtype=torch.float64)
        for kept in itertools.combinations(range(8), 4):
            mask = torch.zeros(100, 8, dtype=torch.bool)
            mask[:, kept] = True
            code = prune.least_squares(W, mask, H, damp=0)
            best = best.minimum(obs.layer_loss(W, code.decode(), H))
        greedy = prune.surgeon(W, H, sparsity=0.5, damp=0)
        mine = obs.layer_loss(W, greedy.decode(), H)
        assert (mine >= best * (1 - 1e-9)).all()
        assert (mine <= best * (1 + 1e-9)).sum() > 60  # rows of 100
        assert mine.sum() < 1.1 * best.sum()

    def test_diagonal_moments_leave_obd_and_no_update(self):
        W, H, _ = case()
        D = H.diagonal().diag()
        got = prune.surgeon(W, D, sparsity=0.5, damp=0)
        mask = prune.keep_rows(prune.obd(W, D.diagonal()), sparsity=0.5)
        assert torch.equal(got.mask, mask)
        torch.testing.assert_close(got.decode(), W * mask)
        got = prune.obc(W, D, sparsity=0.5, damp=0)
        mask = prune.keep(prune.obd(W, D.diagonal()), sparsity=0.5)
        assert torch.equal(got.mask, mask)

    def test_rows_share_the_budget_of_obc(self):
        W, H, _ = case(out=16)
        W[:8] *= 0.1
        rows, layer = (
            f(W, H, sparsity=0.5) for f in (prune.surgeon, prune.obc)
        )
        assert (rows.mask.sum(1) == 6).all()
        assert int(layer.mask.sum()) == 16 * 6
        assert layer.mask[8:].sum() > layer.mask[:8].sum()
        assert loss(W, layer, H) < 0.8 * loss(W, rows, H)

    def test_obc_takes_each_row_in_its_own_order(self):
        W, H, _ = case()
        nested = torch.ones_like(W, dtype=torch.bool)
        for k in range(0, 73, 6):
            mask = prune.obc(W, H, sparsity=k / 72).mask
            assert int((~mask).sum()) == k
            assert (nested | ~mask).all()
            nested = mask
            # the greedy trace of a row depends on how many it loses only
            for w, m in zip(W, mask, strict=True):
                alone = prune.surgeon(
                    w[None], H, sparsity=float((~m).sum() / 12)
                )
                assert torch.equal(alone.mask[0], m)


class TestSparseGPT:
    def test_equals_obs_from_left_to_right(self):
        W, H, _ = case()

        def choose(j, W, d2, mask):
            if j % 5 == 0:
                a, b = j, min(j + 5, 12)
                score = W[:, a:b] ** 2 / d2[a:b]
                gone = round(0.5 * 6 * b) - round(0.5 * 6 * a)
                lost = score.flatten().argsort()[:gone]
                part = torch.ones(score.numel(), dtype=torch.bool)
                part[lost] = False
                mask[:, a:b] = part.view_as(score)

        want, mask = explicit(W, H, choose)
        got = prune.sparsegpt(W, H, sparsity=0.5, damp=0, block=5)
        assert torch.equal(got.mask, mask)
        torch.testing.assert_close(got.decode(), want, rtol=0, atol=1e-9)

    def test_n_of_m_is_chosen_when_the_group_is_reached(self):
        W, H, _ = case()

        def choose(j, W, d2, mask):
            if j % 4 == 0:
                score = W[:, j : j + 4] ** 2 / d2[j : j + 4]
                top = score.topk(2, 1).indices
                mask[:, j : j + 4] = False
                mask[:, j : j + 4].scatter_(1, top, True)

        want, mask = explicit(W, H, choose)
        for block in (1, 6, 128):
            got = prune.sparsegpt(W, H, n=2, m=4, damp=0, block=block)
            assert torch.equal(got.mask, mask)
            torch.testing.assert_close(got.decode(), want, rtol=0, atol=1e-9)
        assert (mask.view(6, 3, 4).sum(-1) == 2).all()

    def test_without_correlation_it_is_wanda_over_the_layer(self):
        W, H, _ = case()
        D = H.diagonal().diag()
        norm = D.diagonal().sqrt()
        got = prune.sparsegpt(W, D, sparsity=0.5, damp=0)
        mask = prune.keep(prune.wanda_score(W, norm), sparsity=0.5)
        assert torch.equal(got.mask, mask)
        assert torch.equal(got.decode(), W * mask)  # nothing moved
        one = prune.sparsegpt(W[:1], D, sparsity=0.5, damp=0)
        assert torch.equal(one.mask, prune.wanda(W[:1], norm, sparsity=0.5))

    def test_what_the_update_and_the_order_are_worth(self):
        W, H, X = case(out=64, n=32, rows=500)
        gpt = prune.sparsegpt(W, H, sparsity=0.5)
        off = masked(W, gpt.mask)  # knocked out
        refit = prune.least_squares(W, gpt.mask, H)
        wanda = masked(W, prune.wanda(W, X.norm(dim=0), sparsity=0.5))
        plain = masked(W, prune.keep_rows(W.abs(), sparsity=0.5))
        greedy = prune.surgeon(W, H, sparsity=0.5)
        losses = [loss(W, c, H) for c in (greedy, refit, gpt, off)]
        assert losses == sorted(losses)
        assert losses[2] < 0.7 * losses[3]
        # data-aware masks beat magnitude, which beats nothing
        assert losses[2] < loss(W, wanda, H) < loss(W, plain, H)

    @settings(deadline=None, max_examples=30)
    @given(
        st.integers(1, 7),
        st.integers(1, 20),
        st.floats(0, 1),
        st.integers(1, 24),
        st.integers(0, 2**16),
    )
    def test_removes_exactly_what_was_asked(
        self, out, n, sparsity, block, seed
    ):
        W, H, _ = case(out=out, n=n, seed=seed)
        before = W.clone(), H.clone()
        code = prune.sparsegpt(W, H, sparsity=sparsity, block=block)
        assert int((~code.mask).sum()) == round(sparsity * out * n)
        assert code.shape == (out, n)
        A = obs.damped(H)
        refit = prune.least_squares(W, code.mask, H)
        assert loss(W, refit, A) <= loss(W, code, A) * (1 + 1e-9) + 1e-12
        assert torch.equal(W, before[0])
        assert torch.equal(H, before[1])

    @pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"n": 2, "m": 4}])
    def test_pruning_and_rounding_in_one_pass(self, how):
        joint = apart = 0
        for seed in range(8):
            W, H, _ = case(out=16, n=24, seed=seed)
            plain = prune.sparsegpt(W, H, **how)
            same = prune.sparsegpt(W, H, **how, grid=torch.clone)
            assert torch.equal(same.decode(), plain.decode())
            step = W.abs().amax(1) / 3  # a scale for each row, 3 bits
            both = prune.sparsegpt(
                W, H, **how, grid=lambda w, step=step: (w / step).round() * step
            )
            k = both.decode() / step[:, None]
            torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-12)
            assert both.mask.sum() == plain.mask.sum()
            assert not both.decode()[~both.mask].any()
            then = (plain.decode() / step[:, None]).round() * step[:, None]
            joint += obs.layer_loss(W, both.decode(), H).sum()
            apart += obs.layer_loss(W, then, H).sum()
        assert joint < 0.9 * apart

    def test_rounding_without_pruning_is_the_plain_sweep(self):
        W, H, _ = case()
        got = prune.sparsegpt(W, H, sparsity=0, grid=torch.round)
        want, _ = obs.sweep(W, H, lambda *_: lambda i, w: w.round())
        assert torch.equal(got.decode(), want)

    def test_half_types_and_files(self):
        W, H, _ = case(dtype=torch.float32)
        code = prune.sparsegpt(W.bfloat16(), H, sparsity=0.5)
        assert code.values.dtype == torch.bfloat16
        model = torch.nn.Linear(12, 6)
        code = prune.sparsegpt(model.weight.detach(), H, sparsity=0.5)
        state = {"weight": code, "bias": model.bias.detach()}
        data = storage.dumps(model, state)
        again = storage.loads(data, like=model)
        assert torch.equal(again.weight, code.decode())

    @pytest.mark.parametrize("f", [prune.sparsegpt, prune.surgeon, prune.obc])
    @pytest.mark.parametrize(
        ("kwargs", "word"),
        [
            ({"sparsity": 1.5}, "sparsity"),
            ({"sparsity": -0.1}, "sparsity"),
            ({"H": torch.eye(3), "sparsity": 0.5}, "H must"),
            ({"damp": -1.0, "sparsity": 0.5}, "damp"),
        ],
    )
    def test_bad_arguments_are_named(self, f, kwargs, word):
        kwargs = {"W": torch.ones(2, 4), "H": torch.eye(4), **kwargs}
        with pytest.raises(ValueError, match=word):
            f(**kwargs)

    @pytest.mark.parametrize(
        ("kwargs", "word"),
        [
            ({}, "either"),
            ({"sparsity": 0.5, "n": 2, "m": 4}, "either"),
            ({"n": 2}, "either"),
            ({"m": 4}, "either"),
            ({"n": 2, "m": 3}, "evenly"),
            ({"n": 5, "m": 4}, "evenly"),
        ],
    )
    def test_one_way_of_choosing(self, kwargs, word):
        with pytest.raises(ValueError, match=word):
            prune.sparsegpt(torch.ones(2, 4), torch.eye(4), **kwargs)

    def test_masks_must_match(self):
        W, H = torch.ones(2, 4), torch.eye(4)
        for mask in (torch.ones(2, 4), torch.ones(2, 3, dtype=torch.bool)):
            with pytest.raises(ValueError, match="mask"):
                prune.least_squares(W, mask, H)
