"""Product quantization against scikit-learn, brute force and closed forms."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import nn

from minicompress import calibrate, codes, models, obs, share, storage, through
from minicompress.share import products


def drawn(seed, *size, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)


def moments(seed, n, samples=200):
    """Second moments of inputs of which neighbors are alike."""
    X = drawn(seed, samples, n + 4).unfold(1, 5, 1).mean(2)
    return X.T @ X / samples


def squared(W, code):
    return float((code.decode() - W).square().sum())


def loss(W, code, H):
    return float(obs.layer_loss(W, code.decode(), H).sum())


def parts(code):
    """Index (out, s) and centroids of a code."""
    while isinstance(code, codes.View):
        code = code.x
    return code.index.decode().long(), code.centroids


def blocks(H, d):
    """The blocks on the diagonal, the last one perhaps smaller."""
    return [H[a : a + d, a : a + d] for a in range(0, len(H), d)]


class TestProduct:
    @pytest.mark.parametrize("length, bits", [(1, 3), (2, 4), (4, 3), (8, 2)])
    def test_nothing_is_nearer_and_centroids_are_means(self, length, bits):
        W = drawn(0, 30, 16)
        code = share.product(W, length=length, bits=bits, rounds=1000)
        index, C = parts(code)
        V = W.reshape(30, -1, length)
        assert C.shape == (2**bits, length) and index.shape == V.shape[:2]
        D = torch.cdist(V.flatten(0, 1), C)
        assert torch.equal(D.argmin(1), index.flatten())
        for k, c in enumerate(C):
            torch.testing.assert_close(c, V[index == k].mean(0))

    @pytest.mark.parametrize("length, bits", [(1, 4), (3, 3), (4, 5)])
    def test_from_the_same_start_scikit_learn_ends_alike(self, length, bits):
        V = drawn(0, 40, 6, length)
        eye = torch.eye(length, dtype=V.dtype).expand(6, -1, -1)
        dice = torch.Generator().manual_seed(0)
        start = products.spread(V, eye, 2**bits, dice)
        dice.manual_seed(0)
        index, C = products.kmeans_vectors(V, eye, 2**bits, 1000, dice)
        flat = V.flatten(0, 1).numpy()
        peer = KMeans(2**bits, init=start.numpy(), n_init=1, tol=0).fit(flat)
        np.testing.assert_allclose(C.numpy(), peer.cluster_centers_, atol=1e-9)
        assert np.array_equal(index.flatten().numpy(), peer.labels_)

    def test_as_good_as_scikit_learn_from_its_own_starts(self):
        W = drawn(0, 64, 64)
        ours = [
            squared(W, share.product(W, length=4, bits=5, seed=s, rounds=300))
            for s in range(5)
        ]
        flat = W.view(-1, 4).numpy()
        peer = [
            KMeans(32, n_init=1, random_state=s, tol=0).fit(flat).inertia_
            for s in range(5)
        ]
        assert np.mean(ours) < 1.01 * np.mean(peer)

    @pytest.mark.parametrize("seed", range(6))
    def test_length_1_is_scalar_clustering(self, seed):
        """Eight heaps that no start by k-means++ can confuse."""
        heaps = torch.arange(8.0).double() * 10
        W = heaps.repeat(12).view(8, 12) + 0.1 * drawn(0, 8, 12)
        code = share.product(W, length=1, bits=3, seed=seed)
        means = W.reshape(-1, 8).mean(0)  # of the columns i mod 8
        torch.testing.assert_close(parts(code)[1].sort(0).values[:, 0], means)
        scalar = share.kmeans(W, bits=3)
        torch.testing.assert_close(code.decode(), scalar.decode())

    def test_never_below_the_best_partition_and_mostly_there(self):
        """All partitions of six vectors into two clusters."""
        sides = torch.tensor([*itertools.product([True, False], repeat=6)])
        reached = 0
        for seed in range(20):
            W = drawn(seed, 3, 4)
            V = W.reshape(6, 2)
            best = min(
                sum(
                    float((V[side] - V[side].mean(0)).square().sum())
                    for side in (one, ~one)
                    if side.any()
                )
                for one in sides
            )
            found = [
                squared(W, share.product(W, length=2, bits=1, seed=s))
                for s in range(10)
            ]
            assert min(found) > best - 1e-9
            reached += min(found) < best + 1e-9
        assert reached >= 18

    def test_more_rounds_and_more_centroids_are_no_worse(self):
        W = drawn(0, 50, 24)
        by_rounds = [
            squared(W, share.product(W, length=3, bits=4, rounds=r))
            for r in range(12)
        ]
        assert by_rounds == sorted(by_rounds, reverse=True)
        assert by_rounds[-1] < 0.95 * by_rounds[0]
        by_bits = [
            squared(W, share.product(W, length=3, bits=b)) for b in range(1, 9)
        ]
        assert by_bits == sorted(by_bits, reverse=True)

    def test_longer_vectors_gain_at_the_same_rate(self):
        """What the codebook costs aside: of correlated weights much more."""
        W = drawn(0, 80, 80).repeat_interleave(4, 1)
        W += 0.1 * drawn(1, 80, 320)
        scalar = squared(W, share.product(W, length=1, bits=2))
        vector = squared(W, share.product(W, length=4, bits=8))
        assert vector < 0.2 * scalar

    def test_as_many_vectors_as_there_are_cost_nothing(self):
        W = drawn(0, 4, 2).repeat(5, 6)  # (20, 12): 4 different rows of 2
        code = share.product(W, length=2, bits=3)
        assert torch.equal(code.decode(), W)
        assert len(parts(code)[1]) == 4  # and no more are stored
        W = drawn(0, 5, 8)
        assert torch.equal(share.product(W, length=8, bits=16).decode(), W)

    def test_every_centroid_is_used(self):
        """Two far heaps of many, and repairs that take from them."""
        W = torch.cat([drawn(0, 500, 4) * 1e-3, 1 + drawn(1, 500, 4) * 1e-3])
        index, C = parts(share.product(W, length=2, bits=6))
        assert torch.equal(index.unique(), torch.arange(64))
        assert len(C.unique(dim=0)) == 64

    def test_a_cluster_that_stays_empty_keeps_its_centroid(self):
        V, C = drawn(0, 4, 1, 2), drawn(1, 3, 2)
        index = torch.tensor([[0], [2], [2], [0]])
        G = torch.eye(2, dtype=V.dtype)[None]
        new = products.centers(V, G, index, C)
        want = torch.stack([V[[0, 3], 0].mean(0), C[1], V[[1, 2], 0].mean(0)])
        torch.testing.assert_close(new, want)

    def test_a_start_far_away_is_repaired(self, monkeypatch):
        """All vectors are nearest to one of the 16 that are drawn."""

        def far(V, G, count, dice):
            C = torch.full((count, V.shape[2]), 100.0, dtype=V.dtype)
            C[3] = 0
            return C

        monkeypatch.setattr(products, "spread", far)
        W = drawn(0, 50, 8)
        code = share.product(W, length=2, bits=4, rounds=100)
        assert torch.equal(parts(code)[0].unique(), torch.arange(16))
        monkeypatch.undo()
        good = share.product(W, length=2, bits=4, rounds=100)
        assert squared(W, code) < 1.5 * squared(W, good)

    def test_assigns_by_the_distance_it_returns(self):
        V, C = drawn(0, 9, 3, 2), drawn(1, 5, 2)
        G = torch.stack([moments(s, 2) for s in range(3)])
        index, error = products.assign(V, G, C)
        D = V[:, :, None] - C  # (n, s, K, d)
        want = torch.einsum("nskd,sde,nske->nsk", D, G, D).min(-1)
        assert torch.equal(index, want.indices)
        torch.testing.assert_close(error, want.values)

    def test_an_empty_cluster_gets_the_worst_vector(self):
        index = torch.tensor([[0, 0], [3, 3]])
        error = torch.tensor([[1.0, 4.0], [2.0, 3.0]])
        filled = products.fill(index, error, 4)
        assert {filled[0, 1].item(), filled[1, 1].item()} == {1, 2}
        assert filled[0, 0] == 0 and filled[1, 0] == 3
        assert index.tolist() == [[0, 0], [3, 3]]

    def test_constant_and_pruned_weights(self):
        code = share.product(torch.full((6, 8), 0.3), length=4, bits=4)
        assert (code.decode() == 0.3).all() and len(parts(code)[1]) == 1
        W = drawn(0, 40, 40).abs() + 2
        W[:, :20] = 0  # far from all others: a cluster of its own
        got = share.product(W, length=2, bits=5).decode()
        assert (got[:, :20] == 0).all()

    def test_seeds_decide(self):
        W = drawn(0, 30, 20)
        first, again, other = (
            share.product(W, length=4, bits=4, seed=s).decode()
            for s in (1, 1, 2)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)

    def test_large_weights_are_assigned_in_parts(self, monkeypatch):
        W = drawn(0, 33, 24)
        whole = share.product(W, length=3, bits=4).decode()
        monkeypatch.setattr(products, "CHUNK", 50)  # three vectors
        assert torch.equal(share.product(W, length=3, bits=4).decode(), whole)

    @pytest.mark.parametrize(
        "dtype", [torch.bfloat16, torch.float32, torch.float64]
    )
    def test_types_and_nothing_else_changes(self, dtype):
        W, dice = drawn(0, 30, 10, dtype=dtype), torch.random.get_rng_state()
        H, before = moments(0, 10), W.clone()
        code = share.product(W, length=4, bits=3, H=H)
        assert code.decode().dtype == parts(code)[1].dtype == dtype
        assert code.decode().shape == code.shape == (30, 10)
        assert torch.equal(W, before) and torch.equal(H, moments(0, 10))
        assert torch.equal(torch.random.get_rng_state(), dice)
        rough = share.product(W, length=4, bits=1, H=H)
        assert loss(W.double(), code, H) < loss(W.double(), rough, H)

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"length": 0}, r"length must be 1 to 8 for W \(4, 8\), got 0"),
            ({"length": 9}, r"length must be 1 to 8 for W \(4, 8\), got 9"),
            ({"bits": 0}, "bits must be 1 to 16, got 0"),
            ({"bits": 17}, "bits must be 1 to 16, got 17"),
            ({"each": "row"}, 'each must be "tensor" or "columns", got'),
            ({"rounds": -1}, "rounds must be at least 0, got -1"),
            ({"H": torch.eye(4)}, r"H must be \(8, 8\) for W \(4, 8\), got"),
            ({"damp": -1, "H": torch.eye(8)}, "damp must be at least 0"),
            ({"W": torch.ones(4, 8).long()}, r"W must be .*int64"),
            ({"W": torch.ones(8)}, r"W must be .*\(8,\)"),
            ({"W": torch.full((4, 8), torch.inf)}, r"\(4, 8\) must be finite"),
        ],
    )
    def test_errors(self, options, message):
        options = {"W": drawn(0, 4, 8), "length": 2, "bits": 2} | options
        with pytest.raises(ValueError, match=message):
            share.product(options.pop("W"), **options)


class TestPadding:
    @pytest.mark.parametrize("each", ["tensor", "columns"])
    def test_a_short_last_vector_moves_no_centroid(self, each):
        """Only true weights count, in the index and in the centroids."""
        W = drawn(0, 60, 10) + 5  # zeros as weights would be far away
        code = share.product(W, length=4, bits=3, each=each, rounds=1000)
        assert code.decode().shape == (60, 10)
        index, C = parts(code)
        V = codes.groups(W, 4)
        mask = codes.groups(torch.ones_like(W), 4)
        D = (V[:, :, None] - C).square() * mask[:, :, None]  # (n, s, K, d)
        D = D.sum(-1)
        if each == "tensor":
            assert torch.equal(D.argmin(-1), index)
        for k, c in enumerate(C):
            mine, true = V[index == k], mask[index == k]
            number = true.sum(0)
            want = (mine * true).sum(0) / number
            torch.testing.assert_close(c[number > 0], want[number > 0])

    def test_its_bits_are_counted(self):
        W = drawn(0, 60, 10, dtype=torch.float32)
        code = share.product(W, length=4, bits=3)
        # 60 rows of ceil(10 / 4) indices of 3 bits, 8 vectors of 4 floats
        assert storage.payload(code) == 60 * 3 * 3 // 8 + 1 + 8 * 4 * 4

    def test_ragged_kernels(self):
        W = drawn(0, 8, 3, 3, 3)
        code = share.product(W, length=4, bits=7)  # 27 weights a row
        assert torch.equal(code.decode(), W)  # 56 vectors for 7 bits
        assert share.product(W, length=4, bits=3).decode().shape == W.shape


class TestColumns:
    def test_every_block_of_columns_has_its_own_codebook(self):
        W = drawn(0, 50, 12)
        code = share.product(W, length=3, bits=3, each="columns")
        index, C = parts(code)
        assert C.shape == (4 * 8, 3)
        assert torch.equal(index // 8, torch.arange(4).expand(50, 4))
        for j in range(4):
            peer = W[:, 3 * j : 3 * j + 3]
            assert squared(peer, replace_block(code, j)) < squared(
                peer, share.product(peer, length=3, bits=2)
            )

    def test_one_block_is_the_whole(self):
        W = drawn(0, 50, 4)
        own = share.product(W, length=4, bits=3, each="columns")
        one = share.product(W, length=4, bits=3)
        assert torch.equal(own.decode(), one.decode())

    def test_error_is_less_and_the_codebooks_larger(self):
        W = drawn(0, 64, 32, dtype=torch.float32)
        own = share.product(W, length=4, bits=4, each="columns")
        one = share.product(W, length=4, bits=4)
        assert squared(W, own) < squared(W, one)
        extra = storage.payload(own) - storage.payload(one)
        # seven more codebooks, and where each of the eight starts
        assert extra == 7 * 16 * 4 * 4 + 8 * 4

    def test_blocks_with_few_different_vectors(self):
        """Codebooks of different lengths lie in one another's place."""
        W = drawn(0, 30, 6)
        W[:, 2:4] = W[:2, 2:4].repeat(15, 1)
        code = share.product(W, length=2, bits=4, each="columns")
        assert len(parts(code)[1]) == 16 + 2 + 16
        assert torch.equal(code.decode()[:, 2:4], W[:, 2:4])

    def test_with_moments_only_the_assignment_changes(self):
        """G cancels in the normal equations of a block: means."""
        W, H = drawn(0, 50, 8), moments(0, 8)
        code = share.product(
            W, length=4, bits=3, each="columns", H=H, damp=0, rounds=1000
        )
        index, C = parts(code)
        V = W.reshape(50, 2, 4)
        for k, c in enumerate(C):
            torch.testing.assert_close(c, V[index == k].mean(0))


def replace_block(code, j):
    """The code of one block of columns, of length 3 and 3 bits."""
    index, C = parts(code)
    return codes.View(codes.Codebook(index[:, j : j + 1], C), (len(index), 3))


class TestMoments:
    @pytest.mark.parametrize("each", ["tensor", "columns"])
    @pytest.mark.parametrize("length", [1, 3, 5])
    def test_white_inputs_change_nothing(self, each, length):
        W = drawn(0, 40, 12)
        options = {"length": length, "bits": 3, "each": each}
        plain = share.product(W, **options)
        white = share.product(W, **options, H=4 * torch.eye(12))
        torch.testing.assert_close(white.decode(), plain.decode())

    def test_one_gram_for_all_is_clustering_in_its_metric(self):
        """G = L L^T for every block: scikit-learn on the rows V L."""
        V, G = drawn(0, 40, 6, 3), moments(0, 3)
        L = torch.linalg.cholesky(G)
        all_alike = G.expand(6, 3, 3)
        dice = torch.Generator().manual_seed(0)
        start = products.spread(V, all_alike, 8, dice)
        dice.manual_seed(0)
        index, C = products.kmeans_vectors(V, all_alike, 8, 1000, dice)
        turned = (V.flatten(0, 1) @ L).numpy()
        peer = KMeans(8, init=(start @ L).numpy(), n_init=1, tol=0).fit(turned)
        assert np.array_equal(index.flatten().numpy(), peer.labels_)
        np.testing.assert_allclose(
            (C @ L).numpy(), peer.cluster_centers_, atol=1e-9
        )

    def test_the_result_cannot_be_improved_by_a_step(self):
        """Each index is the best, each centroid solves least squares."""
        W, H = drawn(0, 40, 10), moments(0, 10)
        code = share.product(W, length=4, bits=3, H=H, damp=0, rounds=1000)
        index, C = parts(code)
        G = blocks(H, 4)
        best = torch.empty_like(index)
        for j, g in enumerate(G):
            v = W[:, 4 * j : 4 * j + 4]
            D = v[:, None] - C[None, :, : len(g)]  # (out, K, d)
            best[:, j] = torch.einsum("nkd,de,nke->nk", D, g, D).argmin(1)
        assert torch.equal(best, index)
        for k, c in enumerate(C):
            rows, right = [], []
            for j, g in enumerate(G):
                root = torch.linalg.cholesky(g).T
                full = F.pad(root, (0, 4 - len(g)))
                for i in (index[:, j] == k).nonzero().squeeze(1):
                    rows.append(full)
                    right.append(root @ W[i, 4 * j : 4 * j + 4])
            want = torch.linalg.lstsq(
                torch.cat(rows), torch.cat(right), driver="gelsd"
            )
            torch.testing.assert_close(c, want.solution, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("seed", range(5))
    def test_the_outputs_are_closer(self, seed):
        W, H = drawn(seed, 60, 24), moments(seed, 24)
        plain = share.product(W, length=4, bits=5)
        aware = share.product(W, length=4, bits=5, H=H)
        assert loss(W, aware, H) < 0.8 * loss(W, plain, H)
        assert squared(W, aware) > squared(W, plain)

    def test_the_error_falls_with_the_rounds(self):
        """What falls is the loss that the blocks see."""
        W, H = drawn(0, 50, 22), moments(0, 22)
        seen = torch.block_diag(*blocks(H, 4))
        found = [
            loss(
                W,
                share.product(W, length=4, bits=4, H=H, damp=0, rounds=r),
                seen,
            )
            for r in range(12)
        ]
        assert found == sorted(found, reverse=True)
        assert found[-1] < 0.9 * found[0]

    def test_dead_inputs_and_few_samples(self):
        W = drawn(0, 30, 8)
        X = drawn(1, 3, 8)  # of rank 3
        X[:, 5] = 0
        H = X.T @ X / 3
        got = share.product(W, length=4, bits=3, H=H).decode()
        assert got.isfinite().all()
        H = torch.diag(torch.tensor([1.0, 1, 0, 0, 1, 1, 1, 0]).double())
        options = {"length": 4, "bits": 3, "each": "columns", "damp": 0}
        code = share.product(W, H=H, **options)
        W[:, [2, 3, 7]] = 0  # no input meets these weights
        again = share.product(W, H=H, **options)
        assert loss(W, again, H) == pytest.approx(loss(W, code, H))
        whole = share.product(W, length=4, bits=3, H=H, damp=0)
        assert whole.decode().isfinite().all()

    def test_weights_that_no_input_meets_make_no_vectors_different(self):
        W = drawn(0, 30, 2)
        W[:, 0] = W[:4, 0].repeat(8)[:30]
        H = torch.diag(torch.tensor([1.0, 0]).double())
        code = share.product(W, length=2, bits=3, H=H, damp=0)
        assert len(parts(code)[1]) == 4
        assert torch.equal(code.decode()[:, 0], W[:, 0])

    def test_a_singular_block_is_named(self):
        H = torch.ones(4, 4).double()
        with pytest.raises(ValueError, match="H is singular: use a larger"):
            share.product(drawn(0, 9, 4), length=2, bits=1, H=H, damp=0)


class TestResidual:
    def test_one_term_is_a_product(self):
        W = drawn(0, 20, 12)
        one = share.residual(W, terms=1, length=3, bits=3)
        assert torch.equal(
            one.decode(), share.product(W, length=3, bits=3).decode()
        )

    def test_each_term_takes_what_is_left(self):
        W, H = drawn(0, 40, 12), moments(0, 12)
        options = {"length": 3, "bits": 3, "H": H}
        code = share.residual(W, terms=3, **options)
        first = code.a.a
        second = share.product(W - first.decode(), **options)
        assert torch.equal(code.a.b.decode(), second.decode())
        errors = [loss(W, c, H) for c in (first, code.a, code)]
        assert errors == sorted(errors, reverse=True)
        assert errors[2] < 0.3 * errors[0]

    def test_two_small_codebooks_for_the_rate_of_a_large_one(self):
        W = drawn(0, 80, 32, dtype=torch.float32)
        two = share.residual(W, terms=2, length=4, bits=4)
        one = share.product(W, length=4, bits=8)
        # 2 · 16 vectors and 256
        saved = (256 - 32) * 4 * 4
        assert storage.payload(one) - storage.payload(two) == saved
        assert squared(W, one) < squared(W, two)

    def test_types_and_errors(self):
        W = drawn(0, 20, 12, dtype=torch.bfloat16)
        code = share.residual(W, terms=3, length=3, bits=3)
        assert parts(code.b)[1].dtype == torch.bfloat16
        with pytest.raises(ValueError, match="terms must be at least 1, got 0"):
            share.residual(W, terms=0, length=3, bits=3)


class Own(nn.Module):
    """A model of somebody else."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.top = nn.Linear(8, 5)

    def forward(self, x):
        return self.top(self.body(x).mean((2, 3)))


class TestModels:
    @pytest.mark.parametrize("each", ["tensor", "columns"])
    def test_a_file_gives_the_same_predictions(self, each):
        model, x = models.CNN(channels=(8, 16)), torch.rand(4, 1, 8, 8)
        state = codes.encode(
            model,
            lambda W: share.product(W, length=9, bits=3, each=each),
            lambda name, W: W.ndim == 4,
        )
        new = models.CNN(channels=(8, 16))
        new.load_state_dict(codes.decode(state))
        again = storage.loads(storage.dumps(model, state))
        assert torch.equal(again(x), new.eval()(x))

    def test_a_kernel_is_cut_into_its_windows(self):
        W = drawn(0, 6, 4, 3, 3)
        index, C = parts(share.product(W, length=9, bits=2))
        assert index.shape == (6, 4)
        D = torch.cdist(W.reshape(24, 9), C)
        assert torch.equal(D.argmin(1), index.flatten())

    def test_layer_by_layer_on_somebody_elses_model(self):
        torch.manual_seed(0)
        model, x = Own(), torch.rand(8, 3, 6, 6)
        made = {}

        def compress(name, layer, stats):
            W = layer.weight.detach()
            made[name] = share.product(W, length=4, bits=4, H=stats.H)
            return made[name]

        new = calibrate.sequential(model, [x], compress)
        assert torch.equal(new.top.weight, made["top.weight"].decode())
        state = codes.encode(model, codes.value, lambda n, w: False) | made
        again = storage.loads(storage.dumps(model, state), like=Own())
        assert torch.equal(again(x), new(x))
        assert (new(x) - model(x)).abs().max() > 0

    def test_the_vectors_can_be_trained(self):
        """dL/dc_k is the sum over the members of k, as for scalars."""
        layer = nn.Linear(8, 6)
        code = share.product(layer.weight, length=4, bits=2)
        index, C = parts(code)

        def looked_up(w, centroids):
            book = replace(code.x, centroids=centroids)
            return replace(code, x=book).decode()

        net = through.attach(
            layer, "weight", looked_up, centroids=nn.Parameter(C)
        )
        assert torch.equal(net.weight, code.decode())
        G = drawn(0, 6, 8, dtype=torch.float32)
        (net.weight * G).sum().backward()
        (tensors,) = through.tensors(net).values()
        want = torch.zeros_like(C)
        want.index_add_(0, index.flatten(), G.reshape(-1, 4))
        torch.testing.assert_close(tensors["centroids"].grad, want)

    def test_smaller_centroids_are_one_field(self):
        W = drawn(0, 64, 64, dtype=torch.float32)
        code = share.product(W, length=4, bits=6)
        half = replace(code.x, centroids=code.x.centroids.half())
        half = replace(code, x=half)
        assert storage.payload(code) - storage.payload(half) == 64 * 4 * 2
        assert squared(W, half) < 1.0001 * squared(W, code)
