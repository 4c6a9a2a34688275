"""Factored convolutions against SVDs, numpy, closed forms and dense ones."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import calibrate, codes, lowrank, measure, models, storage

OPTIONS = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (2, 1), "dilation": (1, 2)},
    {"padding": "same", "dilation": 2, "bias": False},
    {"padding": "valid"},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (1, 2), "padding_mode": "circular", "stride": 2},
    {"padding": 2, "padding_mode": "replicate"},
    {"kernel_size": (2, 4), "padding": (0, 2)},
    {"kernel_size": (4, 2), "padding": "same"},
    {"kernel_size": (1, 3), "dilation": 2},
    {"kernel_size": 1, "stride": 2},
]


def layer(seed=0, dtype=torch.float64, **kwargs):
    sizes = {"in_channels": 5, "out_channels": 7, "kernel_size": 3} | kwargs
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Conv2d(**sizes).to(dtype)


def images(seed=0, n=4, channels=5, size=9):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, size, size + 1, generator=g).double()
    return F.avg_pool2d(x, 2, 1)  # neighbors are correlated


def tensor(*shape, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)


def random_rank(K, rank, seed=0):
    """A kernel that is a sum of `rank` products of vectors."""
    parts = [tensor(n, rank, seed=seed + i) for i, n in enumerate(K)]
    return torch.einsum("or,ir,hr,wr->oihw", *parts)


def squared(conv, new):
    return (lowrank.dense_kernel(new) - conv.weight).square().sum()


def moments(conv, x):
    (stats,) = calibrate.inputs(nn.Sequential(conv), [x]).values()
    return stats.H


def at_full_rank(conv):
    """Every way to factor a kernel without a loss; by name."""
    out, n, kh, kw = conv.weight.shape
    P = tensor(n * kh * kw, 2)
    H = torch.eye(len(P)) + P @ P.T
    return {
        "channels": lambda: lowrank.channels(conv, rank=min(out, n * kh * kw)),
        "data-aware": lambda: lowrank.channels(
            conv, rank=min(out, n * kh * kw), H=H
        ),
        "spatial": lambda: lowrank.spatial(conv, rank=min(n * kh, out * kw)),
        "tucker2": lambda: lowrank.tucker2(conv, ranks=(out, n)),
    }


def at_low_rank(conv):
    return {
        "channels": lambda: lowrank.channels(conv, rank=2),
        "spatial": lambda: lowrank.spatial(conv, rank=2),
        "tucker2": lambda: lowrank.tucker2(conv, ranks=(3, 2)),
        "cp": lambda: lowrank.cp(conv, rank=4, rounds=3),
        "separable": lambda: lowrank.separable(conv),
    }


EXACT, ALL = [*at_full_rank(layer())], [*at_low_rank(layer())]
OURS = [name for name in ALL if name != "separable"]  # that has its own tests


class TestEveryPipeline:
    @pytest.mark.filterwarnings("ignore:Using padding='same'")
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("method", EXACT)
    def test_is_exact_at_full_rank(self, method, options):
        conv, x = layer(**options), images()
        new = at_full_rank(conv)[method]()
        torch.testing.assert_close(new(x), conv(x))
        torch.testing.assert_close(lowrank.dense_kernel(new), conv.weight)

    @pytest.mark.filterwarnings("ignore:Using padding='same'")
    @pytest.mark.parametrize("options", OPTIONS, ids=str)
    @pytest.mark.parametrize("method", ALL)
    def test_computes_what_its_kernel_says(self, method, options):
        conv, x = layer(**options), images()
        new = at_low_rank(conv)[method]()
        dense = layer(**options)
        with torch.no_grad():
            dense.weight.copy_(lowrank.dense_kernel(new))
        exact = method == "separable" and conv.kernel_size == (1, 1)
        assert torch.allclose(dense.weight, conv.weight) == exact
        torch.testing.assert_close(new(x), dense(x))

    @pytest.mark.parametrize("method", OURS)
    def test_ordinary_layers_of_the_same_type_and_mode(self, method):
        conv = layer(dtype=torch.bfloat16).eval()
        new = at_low_rank(conv)[method]()
        assert {type(m) for m in new} == {nn.Conv2d}
        assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
        assert not any(m.training for m in new.modules())
        assert at_low_rank(conv.train())[method]()[0].training
        *first, last = new
        assert torch.equal(last.bias, conv.bias)
        assert all(m.bias is None for m in first)
        assert all(p.requires_grad for p in new.parameters())

    @pytest.mark.parametrize("method", OURS)
    def test_nothing_else_changes(self, method):
        conv = layer()
        before, state = conv.weight.clone(), torch.random.get_rng_state()
        one, two = (at_low_rank(conv)[method]() for _ in range(2))
        assert torch.equal(conv.weight, before)
        assert torch.equal(torch.random.get_rng_state(), state)
        for a, b in zip(one.parameters(), two.parameters(), strict=True):
            assert torch.equal(a, b)
        assert one[-1].bias is not conv.bias

    @pytest.mark.parametrize("method", OURS)
    def test_a_kernel_of_zeros(self, method):
        conv = layer()
        nn.init.zeros_(conv.weight)
        new = at_low_rank(conv)[method]()
        assert (lowrank.dense_kernel(new) == 0).all()
        assert all(p.isfinite().all() for p in new.parameters())

    @pytest.mark.parametrize("method", OURS)
    def test_groups_are_refused(self, method):
        conv = layer(out_channels=5, groups=5)
        with pytest.raises(ValueError, match="groups=1, got 5"):
            at_low_rank(conv)[method]()
        # its weight is (in, out, kh, kw): the shapes would fit
        conv = nn.ConvTranspose2d(6, 6, 3)
        with pytest.raises(ValueError, match=r"must be an nn\.Conv2d"):
            at_low_rank(conv)[method]()

    def test_parameters_and_arithmetic(self):
        """The formulas, and a window of 1 × 1, where nothing is won."""
        n, out, kh, kw, r, s = 6, 8, 3, 5, 4, 2
        conv = layer(
            in_channels=n,
            out_channels=out,
            kernel_size=(kh, kw),
            padding=(1, 2),
            bias=False,
        )
        formulas = {
            lowrank.channels(conv, rank=r): r * (n * kh * kw + out),
            lowrank.spatial(conv, rank=r): r * (n * kh + kw * out),
            lowrank.tucker2(conv, ranks=(r, s)): (
                n * s + s * r * kh * kw + r * out
            ),
            lowrank.cp(conv, rank=r, rounds=1): r * (n + kh + kw + out),
        }
        x = images(channels=n, n=1)
        pixels = x[0, 0].numel()
        for new, want in formulas.items():
            assert measure.params(new) == want
            # stride 1 and a full padding: each weight meets each pixel
            assert measure.macs(new, x) == want * pixels
        one = layer(kernel_size=1, bias=False)
        r = 3  # of at most 5 · 7 / (5 + 7)
        assert measure.params(lowrank.channels(one, rank=r)) == r * (5 + 7)
        assert measure.params(lowrank.spatial(one, rank=r)) == r * (5 + 7)
        assert measure.params(lowrank.cp(one, rank=r)) == r * (5 + 7 + 2)

    @pytest.mark.parametrize("method", OURS)
    def test_a_window_of_one_pixel_is_a_matrix(self, method):
        """All of them are then the same: Eckart and Young."""
        conv = layer(kernel_size=1)
        new = {
            "channels": lambda: lowrank.channels(conv, rank=2),
            "spatial": lambda: lowrank.spatial(conv, rank=2),
            "tucker2": lambda: lowrank.tucker2(conv, ranks=(2, 2)),
            "cp": lambda: lowrank.cp(conv, rank=2, rounds=300, ridge=1e-9),
        }[method]()
        s = torch.linalg.svdvals(conv.weight.flatten(1))
        torch.testing.assert_close(
            squared(conv, new), s[2:].square().sum(), rtol=1e-6, atol=0
        )

    @pytest.mark.parametrize("method", ALL)
    def test_in_a_model_and_its_file(self, method):
        torch.manual_seed(0)
        model = models.CNN(channels=(4, 6), classes=3).eval()
        conv = model.convs[1]
        new = at_low_rank(conv)[method]()
        model.convs[1] = new
        again = storage.loads(storage.dumps(model))
        x = torch.randn(2, 1, 8, 8)
        assert torch.equal(again(x), model(x))
        assert [type(m) for m in again.convs[1]] == [nn.Conv2d] * len(new)

    def test_layers_that_look_twice_are_refused(self):
        twice = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, (3, 1)))
        with pytest.raises(ValueError, match=r"\(3, 1\) after \(3, 3\)"):
            lowrank.dense_kernel(twice)


class TestChannels:
    @pytest.mark.parametrize("rank", [1, 3, 6])
    def test_loses_the_singular_values_that_were_left_out(self, rank):
        conv = layer()
        W = conv.weight.detach().flatten(1).numpy()
        s = np.linalg.svd(W, compute_uv=False)
        got = squared(conv, lowrank.channels(conv, rank=rank)).item()
        assert got == pytest.approx((s[rank:] ** 2).sum())

    def test_white_inputs_change_nothing(self):
        conv = layer()
        plain = lowrank.channels(conv, rank=2)
        white = lowrank.channels(conv, rank=2, H=3 * torch.eye(45))
        torch.testing.assert_close(
            lowrank.dense_kernel(white), lowrank.dense_kernel(plain)
        )

    @pytest.mark.parametrize("rank", [1, 4])
    def test_the_responses_are_as_near_as_that_rank_allows(self, rank):
        """Independent: principal components of the outputs themselves."""
        conv, x = layer(padding=1, stride=2, bias=False), images(n=50)
        H = moments(conv, x)
        new = lowrank.channels(conv, rank=rank, H=H, damp=0)
        Y = conv(x).transpose(0, 1).flatten(1).detach().numpy()  # (out, N)
        U, s, _ = np.linalg.svd(Y, full_matrices=False)
        want = U[:, :rank] @ U[:, :rank].T @ Y
        got = new(x).transpose(0, 1).flatten(1).detach().numpy()
        np.testing.assert_allclose(got, want, atol=1e-9)
        plain = lowrank.channels(conv, rank=rank)
        worse = plain(x).transpose(0, 1).flatten(1).detach().numpy()
        lost = (s[rank:] ** 2).sum()
        assert ((got - Y) ** 2).sum() == pytest.approx(lost)
        assert ((worse - Y) ** 2).sum() > 1.02 * lost

    def test_inputs_of_low_rank_need_few_filters(self):
        """Full-rank weights, but patches that lie in three directions."""
        conv = layer()
        P = tensor(45, 3)
        H = P @ P.T
        new = lowrank.channels(conv, rank=3, H=H, damp=1e-12)
        E = (lowrank.dense_kernel(new) - conv.weight).flatten(1) @ P
        assert E.norm() < 1e-5 * (conv.weight.flatten(1) @ P).norm()
        assert squared(conv, new) > 0.1 * conv.weight.square().sum()

    def test_errors(self):
        for rank in (0, 8):
            with pytest.raises(ValueError, match=f"1 to 7.*got {rank}"):
                lowrank.channels(layer(), rank=rank)
        with pytest.raises(ValueError, match=r"H must be \(45, 45\)"):
            lowrank.channels(layer(), rank=2, H=torch.eye(9))


class TestSpatial:
    @pytest.mark.parametrize("rank", [1, 5, 14])
    @pytest.mark.parametrize("size", [(3, 3), (2, 4)])
    def test_loses_the_singular_values_that_were_left_out(self, rank, size):
        conv = layer(kernel_size=size)
        K = conv.weight.detach().numpy()
        M = K.transpose(1, 2, 3, 0).reshape(5 * size[0], size[1] * 7)
        s = np.linalg.svd(M, compute_uv=False)
        rank = min(rank, len(s))
        got = squared(conv, lowrank.spatial(conv, rank=rank)).item()
        want = (s[rank:] ** 2).sum()
        assert got == pytest.approx(want, rel=1e-9, abs=1e-20)

    def test_a_sobel_filter_has_rank_one(self):
        conv = nn.Conv2d(1, 1, 3, bias=False)
        K = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
        with torch.no_grad():
            conv.weight.copy_(K)
        column, row = lowrank.spatial(conv, rank=1)
        assert column.weight.shape == (1, 1, 3, 1)
        got = column.weight[0, 0] @ row.weight[0, 0]
        torch.testing.assert_close(got, K)

    def test_stride_and_padding_stay_on_their_side(self):
        conv = layer(stride=(2, 3), padding=(1, 2), dilation=(2, 1))
        column, row = lowrank.spatial(conv, rank=2)
        assert (column.stride, row.stride) == ((2, 1), (1, 3))
        assert (column.padding, row.padding) == ((1, 0), (0, 2))
        assert (column.dilation, row.dilation) == ((2, 1), (1, 1))

    def test_errors(self):
        for rank in (0, 16):
            with pytest.raises(ValueError, match=f"1 to 15.*got {rank}"):
                lowrank.spatial(layer(), rank=rank)


def unfolded(K, way):
    return K.movedim(way, 0).flatten(1)


def tails(K, ranks):
    """What each way cuts off, as the sum of squared singular values."""
    return [
        torch.linalg.svdvals(unfolded(K, way))[r:].square().sum()
        for way, r in enumerate(ranks)
    ]


def tucker_error(K, ranks, rounds):
    code = lowrank.tucker2_code(K, ranks=ranks, rounds=rounds)
    return (code.decode() - K).square().sum()


class TestTucker:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 1000))
    def test_bounds_of_hosvd_hold_and_rounds_help(self, r_out, r_in, seed):
        K, ranks = tensor(7, 5, 2, 3, seed=seed), (r_out, r_in)
        cut, slack = tails(K, ranks), 1e-12 * K.square().sum()
        errors = [tucker_error(K, ranks, rounds) for rounds in (0, 1, 2, 5)]
        assert errors[0] <= sum(cut) + slack
        for error in errors:
            assert error >= max(cut) - slack
        for before, after in pairwise(errors):
            assert after <= before + slack

    def test_rounds_make_a_difference(self):
        K = tensor(7, 5, 2, 3)
        assert tucker_error(K, (2, 2), 10) < 0.999 * tucker_error(K, (2, 2), 0)

    def test_hosvd_by_numpy(self):
        K, (r, s) = tensor(7, 5, 2, 3), (3, 2)
        k = K.numpy()
        A = np.linalg.svd(k.reshape(7, -1))[0][:, :r]
        B = np.linalg.svd(k.transpose(1, 0, 2, 3).reshape(5, -1))[0][:, :s]
        want = np.einsum("oihw,oa,pa,ib,jb->pjhw", k, A, A, B, B)
        code = lowrank.tucker2_code(K, ranks=(r, s), rounds=0)
        np.testing.assert_allclose(code.decode().numpy(), want, atol=1e-12)

    def test_one_full_way_is_the_best_there_is(self):
        """With all inputs kept, Tucker is the SVD of (out, rest)."""
        K = tensor(7, 5, 2, 3)
        error = tucker_error(K, (3, 5), rounds=0)
        torch.testing.assert_close(error, tails(K, (3, 5))[0])

    def test_no_basis_of_that_size_is_better_near_the_result(self):
        """A stationary point: turned bases do not lower the error."""
        K = tensor(6, 5, 2, 2)
        code = lowrank.tucker2_code(K, ranks=(2, 2), rounds=200)
        least = (code.decode() - K).square().sum()
        for seed in range(50):
            A = torch.linalg.qr(code.u + 0.03 * tensor(6, 2, seed=seed)).Q
            B = torch.linalg.qr(code.v.T + 0.03 * tensor(5, 2, seed=seed)).Q
            near = torch.einsum("oihw,oa,pa,ib,jb->pjhw", K, A, A, B, B)
            assert (near - K).square().sum() > least

    def test_a_kernel_of_those_ranks_comes_back(self):
        K = torch.einsum(
            "abhw,oa,ib->oihw", tensor(3, 2, 3, 3), tensor(7, 3), tensor(5, 2)
        )
        code = lowrank.tucker2_code(K, ranks=(3, 2))
        torch.testing.assert_close(code.decode(), K)

    def test_code_and_layers_are_the_same_numbers(self):
        conv = layer(padding=1)
        new = lowrank.tucker2(conv, ranks=(4, 3))
        code = lowrank.tucker2_code(conv.weight, ranks=(4, 3))
        assert isinstance(code, codes.Factors)
        torch.testing.assert_close(new[0].weight[:, :, 0, 0], code.v)
        torch.testing.assert_close(new[1].weight, code.core)
        torch.testing.assert_close(new[2].weight[:, :, 0, 0], code.u)
        torch.testing.assert_close(lowrank.dense_kernel(new), code.decode())
        assert not code.u.requires_grad

    def test_bases_are_orthonormal_and_types_are_kept(self):
        code = lowrank.tucker2_code(tensor(7, 5, 3, 3), ranks=(4, 3))
        eye = torch.eye(4, dtype=torch.float64)
        torch.testing.assert_close(code.u.T @ code.u, eye)
        torch.testing.assert_close(code.v @ code.v.T, eye[:3, :3])
        for dtype in (torch.float32, torch.bfloat16):
            K = tensor(7, 5, 3, 3, dtype=dtype)
            code = lowrank.tucker2_code(K, ranks=(4, 3))
            assert {code.u.dtype, code.v.dtype, code.core.dtype} == {dtype}

    def test_the_file_holds_the_factors(self):
        conv = layer(dtype=torch.float32, bias=False)
        code = lowrank.tucker2_code(conv.weight, ranks=(4, 3))
        assert storage.payload(code) == 4 * (7 * 4 + 4 * 3 * 9 + 3 * 5)
        file = storage.dumps(conv, {"weight": code})
        again = storage.loads(file, like=conv)
        assert torch.equal(again.weight, code.decode())

    def test_errors(self):
        for ranks in ((8, 5), (7, 6), (0, 1), (1, 0)):
            with pytest.raises(ValueError, match=r"1 to \(7, 5\), got"):
                lowrank.tucker2(layer(), ranks=ranks)
        with pytest.raises(ValueError, match="rounds must be at least 0"):
            lowrank.tucker2(layer(), ranks=(2, 2), rounds=-1)
        with pytest.raises(ValueError, match=r"K must be .* got \(3, 4\)"):
            lowrank.tucker2_code(torch.zeros(3, 4), ranks=(2, 2))


def rebuilt(factors):
    a, b, c, d = factors
    return torch.einsum("or,ir,hr,wr->oihw", a, b, c, d)


def cp_loss(K, rounds, *, rank=4, ridge=1e-2, seed=0):
    """Return the error² and the term beside it, for K scaled to norm 1."""
    factors = lowrank.cp_factors(
        K, rank=rank, rounds=rounds, ridge=ridge, seed=seed
    )
    error = (rebuilt(factors) - K).square().sum() / K.square().sum()
    scale = K.norm() ** 0.25
    term = sum((f / scale).square().sum() for f in factors)
    return error, ridge * term


class TestCP:
    def test_a_kernel_of_low_rank_comes_back(self):
        K = random_rank((7, 5, 3, 3), rank=3)
        tries = [
            lowrank.cp_factors(K, rank=3, rounds=500, ridge=1e-10, seed=seed)
            for seed in range(3)
        ]
        best = min((rebuilt(f) - K).norm() / K.norm() for f in tries)
        assert best < 1e-4

    @pytest.mark.parametrize("ridge", [1e-2, 1e-3])
    def test_what_is_minimized_falls_with_every_round(self, ridge):
        K = tensor(7, 5, 3, 3)
        totals = [
            sum(cp_loss(K, rounds, ridge=ridge)) for rounds in range(1, 12)
        ]
        for before, after in pairwise(totals):
            assert after <= before * (1 + 1e-12)
        assert totals[-1] < 0.99 * totals[0]

    def test_a_round_by_numpy(self):
        """One sweep of normal equations, written out."""
        K, r, mu = tensor(4, 3, 2, 2), 2, 1e-3
        start = torch.Generator().manual_seed(5)
        F = [
            torch.randn(n, r, generator=start, dtype=torch.float64).numpy()
            for n in K.shape
        ]
        F = [f / np.linalg.norm(f, axis=0) * (1 / r) ** 0.25 for f in F]
        k = K.numpy() / np.linalg.norm(K.numpy())
        for way, text in enumerate(("ir,hr,wr", "or,hr,wr", "or,ir,wr")):
            others = [f for j, f in enumerate(F) if j != way]
            target = text.replace(",", "").replace("r", "") + "r"
            Z = np.einsum(f"{text}->{target}", *others).reshape(-1, r)
            M = np.moveaxis(k, way, 0).reshape(K.shape[way], -1)
            # ridge regression as least squares with rows √μ I below
            rows = np.vstack([Z, mu**0.5 * np.eye(r)])
            right = np.hstack([M, np.zeros((len(M), r))])
            F[way] = np.linalg.lstsq(rows, right.T, rcond=None)[0].T
        a, b, c, _ = F
        Z = np.einsum("or,ir,hr->oihr", a, b, c).reshape(-1, r)
        rows = np.vstack([Z, mu**0.5 * np.eye(r)])
        M = np.hstack([np.moveaxis(k, 3, 0).reshape(2, -1), np.zeros((2, r))])
        F[3] = np.linalg.lstsq(rows, M.T, rcond=None)[0].T
        want = np.einsum("or,ir,hr,wr->oihw", *F) * K.norm().item()
        got = lowrank.cp_factors(K, rank=r, rounds=1, seed=5, ridge=mu)
        np.testing.assert_allclose(rebuilt(got).numpy(), want, atol=1e-10)

    def test_the_vectors_of_a_product_have_one_length(self):
        factors = lowrank.cp_factors(tensor(7, 5, 3, 3), rank=4)
        lengths = torch.stack([f.norm(dim=0) for f in factors])
        torch.testing.assert_close(lengths, lengths[:1].expand(4, 4))

    def test_degeneracy_and_what_the_ridge_does_about_it(self):
        """De Silva and Lim's tensor: rank 3, but rank 2 comes arbitrarily
        near, by two products that grow and cancel."""
        x, y = torch.eye(2, dtype=torch.float64)
        K = sum(
            torch.einsum("i,j,k->ijk", *(y if j == i else x for j in range(3)))
            for i in range(3)
        )

        def largest(rounds, ridge):
            a, b, c = lowrank.cp_factors(
                K, rank=2, rounds=rounds, ridge=ridge, seed=1
            )
            new = torch.einsum("ir,jr,kr->ijk", a, b, c)
            size = (a.norm(dim=0) * b.norm(dim=0) * c.norm(dim=0)).max()
            return size / K.norm(), (new - K).norm() / K.norm()

        sizes, errors = zip(
            *(largest(n, 1e-10) for n in (30, 300, 3000)), strict=True
        )
        assert sizes[2] > 1.5 * sizes[1] > 2 * sizes[0]
        assert errors[2] < errors[1] < errors[0]
        size, error = largest(3000, 1e-3)
        assert size < 2 < sizes[2]
        assert error > errors[2]

    def test_too_much_ridge_leaves_nothing(self):
        K = tensor(7, 5, 3, 3)
        assert cp_loss(K, 100, ridge=0.3)[0] > 0.999

    def test_two_seeds_two_optima(self):
        K = tensor(7, 5, 3, 3)
        losses = [cp_loss(K, 30, seed=seed)[0].item() for seed in range(4)]
        assert len(set(losses)) == 4

    def test_works_on_any_number_of_ways(self):
        W = tensor(6, 4)
        u, v = lowrank.cp_factors(W, rank=2, rounds=200, ridge=1e-9)
        s = torch.linalg.svdvals(W)
        torch.testing.assert_close(
            (u @ v.T - W).square().sum(), s[2:].square().sum()
        )

    def test_types_and_errors(self):
        factors = lowrank.cp_factors(
            tensor(7, 5, 3, 3, dtype=torch.bfloat16), rank=2, rounds=1
        )
        assert {f.dtype for f in factors} == {torch.bfloat16}
        for wrong in ({"rank": 0}, {"rounds": 0}, {"ridge": 0.0}):
            with pytest.raises(ValueError, match="must be at least 1"):
                lowrank.cp(layer(), **{"rank": 2} | wrong)
