"""Factors of matrices against SVDs, the papers' formulas and layers."""

import io

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import calibrate, codes, lowrank, measure, models, storage

SHAPES = [(9, 6), (6, 9), (7, 7)]


def normal(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def data(n, samples=40, seed=1, rank=None):
    """Make inputs (samples, n) that are far from white, and their H."""
    rank = rank or n
    X = normal(samples, rank, seed=seed) * torch.logspace(0, -2, rank)
    X = X @ normal(rank, n, seed=seed + 1)
    return X, X.T @ X / samples


def truncated(M, rank):
    """Truncate by scipy's SVD, with LAPACK's other driver."""
    U, s, Vh = scipy.linalg.svd(np.asarray(M), lapack_driver="gesvd")
    return torch.tensor((U[:, :rank] * s[:rank]) @ Vh[:rank])


def output_error(W, new, X):
    return float((X @ (W - new).T).square().sum())


def close(a, b, **kwargs):
    torch.testing.assert_close(a, b, **kwargs)


METHODS = {
    "svd": lambda W, rank: lowrank.svd(W, rank=rank),
    "asvd": lambda W, rank: lowrank.asvd(
        W, torch.arange(1.0, W.shape[1] + 1), rank=rank
    ),
    "fwsvd": lambda W, rank: lowrank.fwsvd(W, normal(*W.shape) ** 2, rank=rank),
    "drone": lambda W, rank: lowrank.drone(W, data(W.shape[1])[1], rank=rank),
    "features": lambda W, rank: lowrank.features(
        W, data(W.shape[1])[1], rank=rank
    ),
}


class TestSVD:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rank", [1, 3, 6])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_is_the_truncated_svd(self, shape, rank, dtype):
        W = normal(*shape, dtype=dtype)
        code = lowrank.svd(W, rank=rank)
        assert code.u.shape == (shape[0], rank)
        assert code.v.shape == (rank, shape[1])
        close(code.decode(), truncated(W, rank).to(dtype))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_loses_the_squared_values_left_out(self, shape):
        W = normal(*shape)
        s = np.linalg.svd(W.numpy(), compute_uv=False)
        for rank in range(1, min(shape) + 1):
            D = W - lowrank.svd(W, rank=rank).decode()
            assert float(D.square().sum()) == pytest.approx(
                (s[rank:] ** 2).sum(), abs=1e-12
            )
            spectral = s[rank] if rank < len(s) else 0
            assert float(torch.linalg.matrix_norm(D, 2)) == pytest.approx(
                spectral, abs=1e-12
            )

    def test_factors_are_balanced(self):
        W = normal(8, 5)
        code = lowrank.svd(W, rank=4)
        s = torch.linalg.svdvals(W)[:4]
        close(code.u.T @ code.u, torch.diag(s))
        close(code.v @ code.v.T, torch.diag(s))

    def test_nested(self):
        W = normal(8, 5)
        big, small = lowrank.svd(W, rank=4), lowrank.svd(W, rank=2)
        close(big.u[:, :2] @ big.v[:2], small.decode())

    def test_turns_with_the_matrix(self):
        W = normal(6, 5)
        Q = torch.linalg.qr(normal(6, 6, seed=3)).Q
        R = torch.linalg.qr(normal(5, 5, seed=4)).Q
        turned = lowrank.svd(Q @ W @ R, rank=2).decode()
        close(turned, Q @ lowrank.svd(W, rank=2).decode() @ R)

    @pytest.mark.parametrize("shape", [(600, 200), (200, 600)])
    @pytest.mark.parametrize("fall", [0, -1, -3, -6])
    def test_float32_is_as_good_as_the_svd(self, shape, fall):
        """Spectra from flat to 1e-6: where the Gram matrix would not do."""
        k = min(shape)
        U = torch.linalg.qr(normal(shape[0], k)).Q
        V = torch.linalg.qr(normal(shape[1], k, seed=1)).Q
        s = torch.logspace(0, fall, k, dtype=torch.float64)
        W = ((U * s) @ V.T).float()
        exact = torch.linalg.svdvals(W.double())
        for rank in (1, 25, 100, 180):
            D = W.double() - lowrank.svd(W, rank=rank).decode().double()
            tail = exact[rank:].square().sum().sqrt()
            # what float32 factors can hold: their own rounding
            noise = 2e-7 * exact.norm()
            assert D.norm() <= 1.0001 * tail + noise

    def test_where_float32_products_would_not_do(self):
        """The check of precision is what saves a steep spectrum."""
        U = torch.linalg.qr(normal(60, 60)).Q
        s = torch.logspace(0, -6, 60, dtype=torch.float64)
        W = ((U * s) @ U.T).float()
        Q = torch.linalg.eigh(W @ W.T).eigenvectors[:, -40:]
        good = W - lowrank.svd(W, rank=40).decode()
        assert (W - Q @ Q.T @ W).norm() > 1.5 * good.norm()

    def test_half_precision(self):
        W = normal(20, 10).to(torch.bfloat16)
        code = lowrank.svd(W, rank=3)
        assert code.u.dtype == code.v.dtype == torch.bfloat16
        close(code.decode(), truncated(W.float(), 3).float(), atol=0.05, rtol=0)

    def test_ranks_that_are_not_there(self):
        for W in (torch.zeros(4, 3), normal(4, 1) @ normal(1, 3, seed=1)):
            code = lowrank.svd(W, rank=3)
            assert code.u.isfinite().all() and code.v.isfinite().all()
            close(code.decode(), W)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
    def test_full_rank_is_exact(self, m, n, seed):
        W = normal(m, n, seed=seed, dtype=torch.float32)
        new = lowrank.svd(W, rank=min(m, n)).decode()
        close(new, W, atol=1e-5, rtol=1e-5)


class TestDrone:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rank", [1, 3, 5])
    def test_the_papers_double_svd(self, shape, rank):
        """DRONE, theorem 1, with samples in columns as in the paper."""
        W = normal(*shape)
        X, H = data(shape[1])
        UW, SW, VW = np.linalg.svd(W.numpy(), full_matrices=False)
        UX, SX, _ = np.linalg.svd(X.T.numpy(), full_matrices=False)
        Z = np.diag(SW) @ VW @ UX @ np.diag(SX)
        Zk = truncated(Z, rank).numpy()
        M = VW.T @ np.diag(1 / SW) @ Zk @ np.diag(1 / SX) @ UX.T
        new = lowrank.drone(W, H, rank=rank, damp=0).decode()
        if shape[0] <= shape[1]:  # W M is unique, as UW is square
            close(new, torch.tensor(W.numpy() @ M))
        want = torch.tensor(UW @ Zk @ np.diag(1 / SX) @ UX.T)
        close(new, want)
        close(new, truncated(W @ X.T, rank) @ torch.linalg.pinv(X.T))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_loses_the_squared_values_left_out(self, shape):
        W = normal(*shape)
        X, H = data(shape[1])
        s = torch.linalg.svdvals(X @ W.T)
        for rank in range(1, min(shape) + 1):
            new = lowrank.drone(W, H, rank=rank, damp=0).decode()
            assert output_error(W, new, X) == pytest.approx(
                float(s[rank:].square().sum()), abs=1e-10
            )

    @pytest.mark.parametrize("shape", SHAPES)
    def test_svd_llm_writes_it_with_cholesky(self, shape):
        W = normal(*shape)
        _, H = data(shape[1])
        S = torch.linalg.cholesky(H)
        want = truncated(W @ S, 3) @ torch.linalg.inv(S)
        close(lowrank.drone(W, H, rank=3, damp=0).decode(), want)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("factor", [1, 7.5])
    def test_white_inputs_give_the_svd(self, shape, factor):
        W = normal(*shape)
        H = factor * torch.eye(shape[1])
        new = lowrank.drone(W, H, rank=3).decode()
        close(new, lowrank.svd(W, rank=3).decode())

    def test_no_other_is_nearer(self):
        """Descent on the factors from many places does not get below."""
        W = normal(5, 4)
        X, H = data(4)
        best = output_error(W, lowrank.drone(W, H, rank=2, damp=0).decode(), X)
        found = []
        for seed in range(5):
            u = normal(5, 2, seed=seed)
            for _ in range(200):  # least squares for one factor, the other
                Z = X @ torch.linalg.lstsq(u, W).solution.T
                v = torch.linalg.lstsq(X, Z).solution.T
                u = torch.linalg.lstsq(X @ v.T, X @ W.T).solution.T
            found.append(output_error(W, u @ v, X))
        assert min(found) >= best * (1 - 1e-9)
        assert min(found) == pytest.approx(best, rel=1e-3)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("damp", [0, 1e-9])
    def test_inputs_of_low_rank(self, shape, damp):
        """Rank 3 is enough, although W has full rank and H no inverse."""
        W = normal(*shape)
        X, H = data(shape[1], rank=3)
        assert np.linalg.matrix_rank(H.numpy()) == 3
        scale = output_error(W, 0 * W, X)
        for rank in (3, 5):
            new = lowrank.drone(W, H, rank=rank, damp=damp).decode()
            assert output_error(W, new, X) < 1e-12 * scale
        new = lowrank.drone(W, H, rank=2, damp=damp).decode()
        assert output_error(W, new, X) > 1e-9 * scale

    def test_damping_counts_what_was_not_seen(self):
        """Without damping a direction without inputs is left to chance."""
        W = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        H = torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0]))
        new = lowrank.drone(W, H, rank=2).decode()
        close(new, torch.diag(torch.tensor([1.0, 0.0, 0.0, 4.0])))

    def test_much_damping_gives_the_svd(self):
        W = normal(6, 5)
        _, H = data(5)
        new = lowrank.drone(W, H, rank=2, damp=1e9).decode()
        close(new, lowrank.svd(W, rank=2).decode(), atol=1e-6, rtol=0)

    def test_order_and_number_of_samples_do_not_matter(self):
        W = normal(6, 5)
        X, H = data(5)
        mixed = torch.linalg.qr(normal(40, 40, seed=9)).Q @ X
        twice = torch.cat([X, X])
        want = lowrank.drone(W, H, rank=2).decode()
        for Y in (mixed, twice):
            close(lowrank.drone(W, Y.T @ Y / len(Y), rank=2).decode(), want)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(2, 8), st.integers(2, 8), st.integers(0, 99))
    def test_nearer_than_all_others(self, m, n, seed):
        W = normal(m, n, seed=seed)
        X, H = data(n, seed=seed)
        rank = min(m, n) // 2
        aware = lowrank.drone(W, H, rank=rank, damp=0).decode()
        best = output_error(W, aware, X)
        others = [
            lowrank.svd(W, rank=rank),
            lowrank.asvd(W, X.abs().mean(0), rank=rank),
            lowrank.fwsvd(W, normal(m, n, seed=seed + 7) ** 2, rank=rank),
            lowrank.features(W, H, rank=rank),
        ]
        for code in others:
            assert best <= output_error(W, code.decode(), X) * (1 + 1e-9)

    @pytest.mark.parametrize("shape", [(96, 32), (32, 96)])
    def test_float32(self, shape):
        """Inputs that differ in size by 1e4, as in encoders."""
        W = normal(*shape)
        X, H = data(shape[1], samples=400)
        X[:, 3] *= 1e4
        H = X.T @ X / len(X)
        exact = lowrank.drone(W, H, rank=12, damp=0).decode()
        new = lowrank.drone(W.float(), H, rank=12, damp=0).decode().double()
        rounding = (1e-6 * output_error(W, 0 * W, X) ** 0.5) ** 2
        a, b = output_error(W, exact, X), output_error(W, new, X)
        assert b <= 1.0002 * a + rounding

    def test_is_the_principal_components_of_the_outputs(self):
        W = normal(5, 8)
        X, H = data(8)
        Y = (X @ W.T).numpy()
        _, Q = np.linalg.eigh(Y.T @ Y)
        Q = torch.tensor(Q[:, -2:].copy())
        close(lowrank.drone(W, H, rank=2, damp=0).decode(), Q @ Q.T @ W)


class TestWeighted:
    """FWSVD and ASVD: diagonal weights of the inputs."""

    @pytest.mark.parametrize("shape", SHAPES)
    def test_fwsvd_is_the_weighted_optimum(self, shape):
        """Against alternating weighted least squares, and the formula."""
        W = normal(*shape)
        F = normal(*shape, seed=5) ** 2
        D = F.sum(0).sqrt()
        new = lowrank.fwsvd(W, F, rank=2).decode()
        close(new, truncated(W * D, 2) / D)

        def loss(A):
            return float((D * (W - A)).square().sum())

        v = normal(2, shape[1], seed=6)
        for _ in range(500):
            u = torch.linalg.lstsq((v * D).T, (W * D).T).solution.T
            v = torch.linalg.lstsq(u, W).solution
        assert loss(u @ v) == pytest.approx(loss(new), rel=1e-6)
        plain = lowrank.svd(W, rank=2).decode()
        assert loss(new) < loss(plain)
        assert (W - new).norm() > (W - plain).norm()

    def test_fwsvd_weighs_inputs_and_not_outputs(self):
        """The paper's layout is the transposed one."""
        W = torch.diag(torch.tensor([3.0, 2.0]))
        F = torch.tensor([[0.0, 9.0], [1.0, 0.0]])  # input 2 counts most
        new = lowrank.fwsvd(W, F, rank=1).decode()
        close(new, torch.diag(torch.tensor([0.0, 2.0])))

    def test_what_weighs_nothing_needs_no_division(self):
        W = normal(6, 5)
        F = torch.ones(6, 5)
        F[:, 2] = 0
        for code in (
            lowrank.fwsvd(W, F, rank=3),
            lowrank.asvd(W, F[0], rank=3),
        ):
            assert code.u.isfinite().all() and code.v.isfinite().all()
            rest = [0, 1, 3, 4]
            want = truncated(W[:, rest], 3)
            close(code.decode()[:, rest], want)
            # of the input without weight, what the outputs' space allows
            U = torch.linalg.svd(W[:, rest]).U[:, :3]
            close(code.decode()[:, 2], U @ U.T @ W[:, 2])

    @pytest.mark.parametrize("shape", SHAPES)
    def test_asvd_is_its_formula(self, shape):
        W = normal(*shape)
        size = normal(shape[1], seed=5).abs()
        for alpha in (0.5, 1.0):
            S = size**alpha
            new = lowrank.asvd(W, size, rank=2, alpha=alpha).decode()
            close(new, truncated(W * S, 2) / S)

    def test_equal_weights_give_the_svd(self):
        W = normal(6, 5)
        want = lowrank.svd(W, rank=2).decode()
        close(lowrank.fwsvd(W, 3 * torch.ones(6, 5), rank=2).decode(), want)
        close(lowrank.asvd(W, 3 * torch.ones(5), rank=2).decode(), want)
        size = normal(5, seed=5).abs()
        close(lowrank.asvd(W, size, rank=2, alpha=0).decode(), want)

    def test_fwsvd_is_drone_with_a_diagonal(self):
        W, F = normal(6, 5), normal(6, 5, seed=5) ** 2
        H = torch.diag(F.sum(0))
        want = lowrank.drone(W, H, rank=2, damp=0).decode()
        close(lowrank.fwsvd(W, F, rank=2).decode(), want)


class TestFeatures:
    def test_projects_the_inputs(self):
        W = normal(4, 6)
        X, H = data(6)
        P = torch.tensor(np.linalg.svd(X.numpy())[2][:3].T.copy())
        close(lowrank.features(W, H, rank=3).decode(), W @ P @ P.T)

    def test_is_drone_for_an_orthogonal_matrix(self):
        W = torch.linalg.qr(normal(6, 6)).Q
        _, H = data(6)
        want = lowrank.drone(W, H, rank=2, damp=0).decode()
        close(lowrank.features(W, H, rank=2).decode(), want)

    def test_is_worse_when_the_layer_ignores_what_is_large(self):
        W = normal(6, 6) * torch.logspace(-2, 0, 6)
        X, H = data(6)
        X, H = X * torch.logspace(0, -1, 6), None
        H = X.T @ X / len(X)
        errors = [
            output_error(W, f(W, H, rank=2).decode(), X)
            for f in (lowrank.drone, lowrank.features)
        ]
        assert errors[0] < 0.5 * errors[1]


class TestAll:
    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.float64, torch.bfloat16]
    )
    @pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
    def test_types_and_inputs(self, name, dtype, shape):
        W = normal(*shape, dtype=dtype).requires_grad_()
        before = W.detach().clone()
        state = torch.random.get_rng_state()
        code = METHODS[name](W, 3)
        assert type(code) is codes.Factors and code.shape == shape
        assert code.u.dtype == code.v.dtype == dtype
        assert code.u.is_contiguous() and code.v.is_contiguous()
        assert not code.u.requires_grad
        assert torch.equal(W.detach(), before)
        assert torch.equal(torch.random.get_rng_state(), state)
        close(code.u.norm(dim=0), code.v.norm(dim=1), rtol=0.02, atol=0)

    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("shape", [(7, 5), (5, 7)])
    def test_full_rank_is_exact(self, name, shape):
        W = normal(*shape)
        full = METHODS[name](W, 5).decode()
        if name == "features" and shape == (5, 7):  # 5 of 7 inputs are kept
            assert (full - W).norm() > 0.01
        else:
            close(full, W)

    @pytest.mark.parametrize("name", METHODS)
    def test_errors(self, name):
        f = METHODS[name]
        for rank in (0, 6):
            with pytest.raises(ValueError, match=f"1 to 5 .*got {rank}"):
                f(normal(7, 5), rank)
        with pytest.raises(ValueError, match=r"matrix .*\(2, 3, 4\)"):
            f(normal(2, 3, 4), 1)
        with pytest.raises(ValueError, match=r"floating-point .*int64"):
            f(torch.ones(2, 2, dtype=torch.long), 1)
        for bad in (torch.inf, -torch.inf, torch.nan):
            W = normal(7, 5)
            W[1, 1] = bad
            with pytest.raises(ValueError, match=r"W \(7, 5\) must be finite"):
                f(W, 1)

    @pytest.mark.parametrize("name", METHODS)
    @pytest.mark.parametrize("shape", [(80, 30), (30, 80), (40, 40)])
    def test_float32_agrees_with_float64(self, name, shape):
        """A flat spectrum, for which float32 products will do."""
        W = normal(*shape)
        rough, exact = METHODS[name](W.float(), 5), METHODS[name](W, 5)
        D = rough.decode() - exact.decode()
        assert D.norm() < 1e-4 * exact.decode().norm()

    def test_errors_of_the_statistics(self):
        W = normal(7, 5)
        for f in (lowrank.drone, lowrank.features):
            with pytest.raises(ValueError, match=r"H must be \(5, 5\)"):
                f(W, torch.eye(7), rank=1)
        with pytest.raises(ValueError, match=r"size must be \(5,\).*\(7,\)"):
            lowrank.asvd(W, torch.ones(7), rank=1)
        with pytest.raises(ValueError, match=r"fisher must be \(7, 5\)"):
            lowrank.fwsvd(W, torch.ones(5, 7), rank=1)
        for bad in (-1.0, torch.nan, torch.inf):
            with pytest.raises(ValueError, match="finite and not negative"):
                lowrank.asvd(W, torch.full((5,), bad), rank=1)
        with pytest.raises(ValueError, match="H must be finite"):
            lowrank.drone(W, torch.full((5, 5), torch.nan), rank=1)
        with pytest.raises(ValueError, match="damp must be at least 0"):
            lowrank.drone(W, torch.eye(5), rank=1, damp=-1)


class TestRoot:
    @pytest.mark.parametrize("rank", [1, 3, 5])
    def test_squares_to_h(self, rank):
        _, H = data(5, rank=rank)
        S = lowrank.root(H)
        close(S @ S.T, H)

    def test_damped(self):
        H = 4 * torch.eye(3)
        close(lowrank.root(H, damp=1.25), 3 * torch.eye(3).double())


class Users(nn.Module):
    """A user's own network, with a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.twice = nn.Linear(8, 8, bias=False)
        self.again = self.twice
        self.inner = nn.ModuleDict({"last": nn.Linear(8, 3)})

    def forward(self, x):
        x = self.again(torch.relu(self.twice(self.first(x))))
        return self.inner["last"](x)


def network(cls=Users, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(**kwargs)


def decoded(model, new):
    """Compute with the dense product of the factors in place of a weight."""
    state = model.state_dict()
    weights = {n if n.endswith("weight") else f"{n}.weight": n for n in new}
    state |= {w: new[n].decode() for w, n in weights.items()}
    other = network(type(model))
    other.load_state_dict(state)
    return other


class TestFactorize:
    def test_computes_what_the_product_computes(self):
        model, x = network(), normal(5, 6, dtype=torch.float32)
        new = {
            "first.weight": lowrank.svd(model.first.weight, rank=2),
            "inner.last": lowrank.svd(model.inner["last"].weight, rank=1),
        }
        small = lowrank.factorize(model, new)
        close(small(x), decoded(model, new)(x))
        assert not torch.allclose(small(x), model(x), atol=1e-3)
        a, b = small.first
        assert type(a) is type(b) is nn.Linear
        assert a.bias is None and torch.equal(b.bias, model.first.bias)
        assert (a.in_features, a.out_features) == (6, 2)
        assert (b.in_features, b.out_features) == (2, 8)

    def test_parameters_and_arithmetic(self):
        model = network(models.MLP, widths=[64, 40, 10])
        name = next(iter(calibrate.layers(model)))
        W = model.get_parameter(name)
        small = lowrank.factorize(model, {name: lowrank.svd(W, rank=8)})
        x = torch.zeros(1, 64)
        saved = 64 * 40 - 8 * (64 + 40)
        assert measure.params(model) - measure.params(small) == saved
        assert measure.macs(model, x) - measure.macs(small, x) == saved

    def test_the_file_is_smaller_and_loads(self):
        model = network(models.MLP, widths=[64, 40, 10])
        name = next(iter(calibrate.layers(model)))
        W = model.get_parameter(name)
        small = lowrank.factorize(model, {name: lowrank.svd(W, rank=8)})
        file = storage.dumps(small)
        back, x = storage.loads(file), normal(3, 64, dtype=torch.float32)
        assert torch.equal(back(x), small(x))
        saved = 4 * (64 * 40 - 8 * (64 + 40))
        least = len(storage.dumps(model)) - saved
        assert least <= len(file) <= least + 200  # the layers' description

    def test_a_users_model_loads_beside_its_class(self):
        model = network()
        code = lowrank.svd(model.first.weight, rank=2)
        small = lowrank.factorize(model, {"first": code})
        file = io.BytesIO(storage.dumps(small)).getvalue()
        back = storage.loads(file, like=small)
        x = normal(3, 6, dtype=torch.float32)
        assert torch.equal(back(x), small(x))

    def test_factors_of_codes(self):
        """Factors that are stored in few bits are put in as they decode."""
        model = network()
        code = codes.Factors(
            codes.Scaled(codes.Ints(torch.ones(8, 2).byte(), 4), 0.5),
            torch.ones(2, 6),
        )
        small = lowrank.factorize(model, {"first": code})
        close(small.first[1].weight, torch.full((8, 2), 0.5))

    def test_a_layer_that_is_used_twice_stays_one(self):
        model, x = network(), normal(5, 6, dtype=torch.float32)
        code = lowrank.svd(model.twice.weight, rank=3)
        small = lowrank.factorize(model, {"twice.weight": code})
        assert small.twice is small.again
        close(small(x), decoded(model, {"twice": code, "again": code})(x))
        both = {"twice.weight": code, "again.weight": code}
        again = lowrank.factorize(model, both)
        assert again.twice is again.again
        assert measure.params(again) == measure.params(small)

    def test_layers_that_share_a_weight_share_its_factors(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        model[2].weight = model[0].weight
        before = measure.params(model)
        code = lowrank.svd(model[0].weight, rank=2)
        small = lowrank.factorize(model, {"2": code})
        for i in (0, 1):
            assert small[0][i].weight is small[2][i].weight
        assert torch.equal(small[0][1].bias, model[0].bias)
        assert torch.equal(small[2][1].bias, model[2].bias)
        assert before - measure.params(small) == 36 - 24

    def test_a_module_takes_the_place_of_another_layer(self):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        new = lowrank.separable(model[0])
        small = lowrank.factorize(model, {"0": new})
        assert small[0] is new and type(model[0]) is nn.Conv2d

    def test_the_model_itself(self):
        layer = network(nn.Linear, in_features=6, out_features=4)
        for name in ("", "weight"):
            code = lowrank.svd(layer.weight, rank=2)
            pair = lowrank.factorize(layer, {name: code})
            assert [tuple(m.weight.shape) for m in pair] == [(2, 6), (4, 2)]

    def test_keeps_types_modes_and_what_is_frozen(self):
        model = network().to(torch.bfloat16).eval()
        model.first.requires_grad_(False)
        code = codes.Factors(torch.ones(8, 2), torch.ones(2, 6))
        small = lowrank.factorize(model, {"first": code})
        assert not any(m.training for m in small.first.modules())
        assert not any(p.requires_grad for p in small.first.parameters())
        kinds = {p.dtype for p in small.parameters()}
        assert kinds == {torch.bfloat16}

    def test_inputs_stay_as_they_are(self):
        model = network()
        before = {n: p.clone() for n, p in model.named_parameters()}
        code = lowrank.svd(model.first.weight, rank=2)
        u = code.u.clone()
        state = torch.random.get_rng_state()
        small = lowrank.factorize(model, {"first": code})
        assert torch.equal(torch.random.get_rng_state(), state)
        with torch.no_grad():
            for p in small.parameters():
                p.zero_()
        assert torch.equal(code.u, u)
        assert type(model.first) is nn.Linear
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n])

    def test_can_be_trained(self):
        model, x = network(), normal(5, 6, dtype=torch.float32)
        code = lowrank.svd(model.first.weight, rank=2)
        small = lowrank.factorize(model, {"first": code})
        small(x).square().sum().backward()
        assert all(p.grad is not None for p in small.parameters())

    def test_errors(self):
        model = network()
        code = lowrank.svd(model.first.weight, rank=2)

        def fails(model, name, match, code=code):
            with pytest.raises(ValueError, match=match):
                lowrank.factorize(model, {name: code})

        fails(model, "second", "second: the model has no such layer")
        fails(model, "inner.weight", "inner.weight: is ModuleDict")
        fails(model, "twice", r"make \(8, 6\), the weight is \(8, 8\)")
        fails(nn.Sequential(nn.Conv2d(6, 8, 1)), "0", "0: is Conv2d")
        attention = nn.MultiheadAttention(8, 2)  # uses its layer uncalled
        fails(attention, "out_proj", "out_proj: is NonDynamically")
        tied = models.LM(vocab=8, width=6, heads=2, ff=8, layers=1, context=4)
        fails(tied, "head.weight", "shared with Embedding, where it would")


class TestInOrder:
    @staticmethod
    def make(name, W, stats):
        return lowrank.drone(W, stats.H, rank=2, damp=0)

    def test_every_layer_sees_what_the_factored_make(self):
        model, x = network(), normal(50, 6, dtype=torch.float32)
        new = lowrank.factorize_in_order(
            model, [x], self.make, where=lambda n, w: not n.startswith("in")
        )
        kinds = [type(m).__name__ for m in (new.first, new.twice)]
        assert kinds == ["Sequential"] * 2
        assert type(new.inner["last"]) is nn.Linear
        with torch.no_grad():
            h = x @ (new.first[1].weight @ new.first[0].weight).T
            h = h + model.first.bias
            a = torch.relu(model.twice(h))  # the input of the second call
        H = torch.cat([h, a]).double()
        H = H.T @ H / len(H)
        want = lowrank.drone(model.twice.weight, H, rank=2, damp=0)
        made = new.twice[1].weight @ new.twice[0].weight
        close(made, want.decode(), atol=1e-4, rtol=1e-3)

    def test_is_nearer_than_at_once(self):
        """The last layer is fitted to what it will see."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(
                *(m for _ in range(4) for m in (nn.Linear(12, 12), nn.ReLU()))
            )
        x = normal(400, 12, dtype=torch.float32)

        def rank(name, W, stats):
            return lowrank.drone(W, stats.H, rank=5)

        stats = calibrate.inputs(model, [x])
        once = {
            n: rank(n, layer.weight, stats[n])
            for n, layer in calibrate.layers(model).items()
        }
        new = [
            lowrank.factorize(model, once),
            lowrank.factorize_in_order(
                model, [x], rank, where=lambda n, w: True
            ),
        ]
        W = model[6].weight.detach()
        errors = []
        for m in new:
            with torch.no_grad():
                inputs = m[:6](x)
                made = m[6][1].weight @ m[6][0].weight
                errors.append(output_error(W, made, inputs))
        assert errors[1] < errors[0]
