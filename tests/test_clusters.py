"""Clusters of weights against brute force, scikit-learn and closed forms."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import nn

from minicompress import codes, entropy, models, share, storage, through, train
from minicompress.share.clusters import BINS, STARTS

# a unit normal distribution, least mean squared error of 2^b levels
NORMAL = {1: 0.363380, 2: 0.117482, 3: 0.034548, 4: 0.009501, 5: 0.002505}


@pytest.fixture(autouse=True)
def one_thread():
    with train.threads(1):
        yield


def drawn(*size, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=g, dtype=dtype)


def squared(w, code, m=1.0):
    return float((m * (code.decode().double() - w.double()).square()).sum())


def brute(w, K, m=None):
    """Try every way to cut the sorted numbers into K parts or fewer."""
    w, order = w.double().sort()
    m = torch.ones_like(w) if m is None else m.double()[order]
    best = math.inf
    for k in range(1, min(K, len(w)) + 1):
        for cuts in itertools.combinations(range(1, len(w)), k - 1):
            total = 0.0
            for a, b in itertools.pairwise((0, *cuts, len(w))):
                part, mass = w[a:b], m[a:b]
                if mass.sum() > 0:
                    mean = (mass * part).sum() / mass.sum()
                    total += float((mass * (part - mean).square()).sum())
            best = min(best, total)
    return best


def table(w, K):
    """Fill in the whole table of the dynamic program, column by column."""
    x = np.sort(w.numpy())
    n = len(x)
    cost = np.full((n + 1, n + 1), np.inf)
    for i in range(n):
        for j in range(i + 1, n + 1):
            cost[i, j] = ((x[i:j] - x[i:j].mean()) ** 2).sum()
    D = cost[0]
    for _ in range(K - 1):
        D = (D[:, None] + cost).min(0)
    return D[n]


SHAPES = {
    "normal": lambda: drawn(30_000),
    "float32": lambda: drawn(30_000, dtype=torch.float32),
    "bfloat16": lambda: drawn(30_000).bfloat16(),
    "heavy tails": lambda: drawn(30_000) / drawn(30_000, seed=1).abs(),
    "an outlier": lambda: torch.cat(
        [drawn(30_000), torch.tensor([1e3], dtype=torch.float64)]
    ),
    "outliers": lambda: torch.cat([drawn(30_000), 1e4 * drawn(3, seed=1)]),
    "two heaps": lambda: torch.cat(
        [drawn(15_000) * 1e-3 - 1, drawn(15_000, seed=1) + 1]
    ),
    "mostly zeros": lambda: drawn(30_000) * (drawn(30_000, seed=1) > 1.5),
    "far from zero": lambda: 1e6 + drawn(30_000),
}

numbers = st.lists(st.integers(-20, 20), min_size=1, max_size=9)


class TestOptimal:
    @given(numbers, st.integers(1, 4))
    @settings(deadline=None, max_examples=150)
    def test_nothing_is_better(self, values, K):
        w = torch.tensor(values, dtype=torch.float64)
        got = squared(w, share.optimal(w, bits=2, clusters=K))
        assert got == pytest.approx(brute(w, K), abs=1e-9)

    @given(numbers, st.integers(1, 4), st.integers(0, 99))
    @settings(deadline=None, max_examples=100)
    def test_nothing_is_better_where_errors_differ_in_cost(self, v, K, seed):
        w = torch.tensor(v, dtype=torch.float64)
        m = drawn(len(v), seed=seed).relu()
        m[0] += 0.1
        got = squared(w, share.optimal(w, bits=2, clusters=K, weight=m), m)
        assert got == pytest.approx(brute(w, K, m), abs=1e-9)

    @pytest.mark.parametrize("K", [1, 2, 3, 8, 16, 99])
    def test_is_the_table(self, K):
        w = drawn(200)
        got = squared(w, share.optimal(w, bits=7, clusters=K))
        assert got == pytest.approx(table(w, K), rel=1e-9)

    def test_more_clusters_never_cost_more(self):
        w = drawn(300)
        errors = [
            squared(w, share.optimal(w, bits=6, clusters=K))
            for K in range(1, 41)
        ]
        assert all(a > b for a, b in itertools.pairwise(errors))
        # and each new one helps less: the error is convex in K
        gains = -np.diff(errors)
        assert (np.diff(gains) <= 1e-12).all()

    def test_two_clusters_of_symmetric_weights_are_signs(self):
        w = drawn(300)
        w = torch.cat([w, -w])
        alpha = w.abs().mean()
        code = share.optimal(w, bits=1)
        want = torch.stack([-alpha, alpha])
        torch.testing.assert_close(code.centroids, want)
        assert torch.equal(code.decode() > 0, w > 0)

    def test_is_k_means_of_its_own_result(self):
        w = drawn(400)
        code = share.optimal(w, bits=4)
        a = code.index.values
        means = torch.stack([w[a == k].mean() for k in range(16)])
        torch.testing.assert_close(code.centroids, means)
        near = (w[:, None] - code.centroids).abs().argmin(1)
        assert torch.equal(a.long(), near)


class TestKmeans:
    @pytest.mark.parametrize("start", STARTS)
    @pytest.mark.parametrize("bits", [1, 2, 4, 6])
    def test_ends_where_nothing_moves(self, start, bits):
        w = drawn(60, 50)
        code = share.kmeans(w, bits=bits, start=start, steps=10_000)
        a, c = code.index.values.long(), code.centroids
        assert code.shape == w.shape and c.shape == (2**bits,)
        assert (c.diff() > 0).all()
        assert torch.equal(a, (w[..., None] - c).abs().argmin(-1))
        means = torch.stack([w[a == k].mean() for k in range(2**bits)])
        torch.testing.assert_close(c, means)
        best = squared(w, share.optimal(w, bits=bits))
        assert squared(w, code) >= best * (1 - 1e-12)

    @pytest.mark.parametrize("start", STARTS)
    def test_no_step_raises_the_error(self, start):
        w = drawn(2000)
        errors = [
            squared(w, share.kmeans(w, bits=3, start=start, steps=n))
            for n in range(15)
        ]
        assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(errors))
        if start == "random":
            assert errors[-1] < 0.8 * errors[0]

    @pytest.mark.parametrize("bits", [2, 4])
    def test_linear_start_is_that_of_scikit_learn(self, bits):
        w = drawn(3000)
        low, high = w.aminmax()
        start = np.linspace(float(low), float(high), 2**bits)[:, None]
        peer = KMeans(2**bits, init=start, n_init=1, max_iter=300, tol=0)
        peer.fit(w[:, None].numpy())
        code = share.kmeans(w, bits=bits, start="linear")
        want = torch.from_numpy(np.sort(peer.cluster_centers_[:, 0]))
        torch.testing.assert_close(code.centroids, want)
        assert squared(w, code) == pytest.approx(peer.inertia_, rel=1e-9)

    def test_starts_are_where_they_should_be(self):
        w = torch.arange(1.0, 101.0).square()  # dense at the left

        def begin(start, **options):
            code = share.kmeans(w, bits=2, start=start, steps=0, **options)
            return code.centroids

        want = torch.linspace(1, 10_000, 4)
        torch.testing.assert_close(begin("linear"), want)
        # the middle of each quarter of the weights
        want = torch.tensor([13.0, 38.0, 63.0, 88.0]).square()
        assert torch.equal(begin("density"), want)
        assert torch.isin(begin("random"), w).all()
        assert torch.equal(begin("random"), begin("random"))
        assert not torch.equal(begin("random"), begin("random", seed=1))
        best = share.optimal(w, bits=2)
        torch.testing.assert_close(begin("histogram"), best.centroids)

    def test_one_bin_for_each_weight_is_optimal(self):
        for seed in range(5):
            w = drawn(BINS, seed=seed)
            best = share.optimal(w, bits=4)
            got = share.kmeans(w, bits=4)
            assert torch.equal(got.index.values, best.index.values)

    @pytest.mark.parametrize("kind", SHAPES)
    @pytest.mark.parametrize("bits", [2, 4])
    def test_the_default_is_always_good(self, kind, bits):
        w = SHAPES[kind]()
        best = squared(w, share.optimal(w, bits=bits))
        got = squared(w, share.kmeans(w, bits=bits))
        assert best * (1 - 1e-9) <= got <= 1.0005 * best

    @pytest.mark.parametrize("bits", NORMAL)
    def test_a_normal_distribution(self, bits):
        n = 1_000_001
        p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        w = torch.special.ndtri(p)
        got = squared(w, share.kmeans(w, bits=bits)) / n
        assert got == pytest.approx(NORMAL[bits], rel=5e-4)

    def test_other_starts_are_not_always_good(self):
        w = SHAPES["two heaps"]()
        best = squared(w, share.kmeans(w, bits=4))
        for start in ("linear", "density", "random"):
            code = share.kmeans(w, bits=4, start=start)
            assert squared(w, code) > 1.1 * best

    @given(st.lists(st.integers(-8, 8), min_size=1), st.sampled_from([*STARTS]))
    @settings(deadline=None)
    def test_few_different_weights_come_back(self, values, start):
        w = torch.tensor(values, dtype=torch.float32) / 3
        K = len(w.unique())
        code = share.kmeans(w, bits=5, start=start)
        assert torch.equal(code.decode(), w)
        assert torch.equal(code.centroids, w.unique())
        code = share.kmeans(w, bits=5, clusters=K, start=start)
        assert torch.equal(code.decode(), w)

    @given(numbers, st.integers(1, 5), st.sampled_from([*STARTS]))
    @settings(deadline=None, max_examples=150)
    def test_no_cluster_is_empty(self, values, K, start):
        w = torch.tensor(values, dtype=torch.float64) ** 5
        code = share.kmeans(w, bits=3, clusters=K, start=start)
        assert len(code.index.values.unique()) == min(K, len(w.unique()))
        assert code.centroids.isfinite().all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_zeros_that_are_alone_stay_zero(self, dtype):
        w = drawn(1000, dtype=dtype)
        w[w.abs() < 1.0] = 0
        for f in (share.kmeans, share.optimal):
            code = f(w + 0, bits=4)
            assert torch.equal(code.decode() == 0, w == 0)

    def test_an_empty_cluster_goes_where_it_helps(self):
        w = torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0], dtype=torch.float64)
        code = share.kmeans(w, bits=2, start="linear")
        want = squared(w, share.optimal(w, bits=2))
        assert squared(w, code) == pytest.approx(want)

    def test_neighbors_in_the_last_digit(self):
        one = torch.ones(6, dtype=torch.float64)
        for k in range(1, 6):  # steps that no mean can lie between
            one[k] = torch.nextafter(one[k - 1], one.new_tensor(2.0))
        for start in STARTS:
            code = share.kmeans(one, bits=2, start=start)
            assert code.index.values.unique().numel() >= 3
            assert (code.decode() - one).abs().max() <= 2**-51

    @given(
        st.floats(0.01, 100), st.floats(-100, 100), st.sampled_from([*STARTS])
    )
    @settings(deadline=None, max_examples=30)
    def test_moves_along_with_the_weights(self, by, shift, start):
        w = drawn(300)
        plain = share.kmeans(w, bits=3, start=start)
        moved = share.kmeans(by * w + shift, bits=3, start=start)
        want = by * plain.centroids + shift
        torch.testing.assert_close(moved.centroids, want, rtol=1e-9, atol=1e-9)

    def test_far_from_zero_no_digits_are_lost(self):
        w = drawn(5000)
        near, far = share.kmeans(w, bits=4), share.kmeans(w + 1e7, bits=4)
        assert torch.equal(near.index.values, far.index.values)

    @pytest.mark.parametrize("start", ["histogram", "linear", "density"])
    def test_a_cost_of_two_is_the_weight_twice(self, start):
        w = drawn(3000)
        m = torch.randint(0, 4, (3000,), generator=torch.Generator())
        both = share.kmeans(w, bits=3, start=start, weight=m)
        again = share.kmeans(w.repeat_interleave(m), bits=3, start=start)
        torch.testing.assert_close(both.centroids, again.centroids)

    def test_costs_matter_only_to_each_other(self):
        w, m = drawn(2000), drawn(2000, seed=1).square()
        plain = share.kmeans(w, bits=3)
        same = share.kmeans(w, bits=3, weight=torch.full_like(w, 7))
        torch.testing.assert_close(same.centroids, plain.centroids)
        a = share.kmeans(w, bits=3, weight=m)
        b = share.kmeans(w, bits=3, weight=1e-12 * m)
        torch.testing.assert_close(a.centroids, b.centroids)
        assert squared(w, a, m) < squared(w, plain, m)
        assert squared(w, a) > squared(w, plain)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(), (7,), (4, 3, 3, 3)])
    def test_shapes_and_types(self, dtype, shape):
        w = drawn(*shape).to(dtype)
        for f in (share.kmeans, share.optimal):
            code = f(w, bits=2)
            assert code.decode().dtype == code.centroids.dtype == dtype
            assert code.index.bits == 2 and code.shape == shape
            half = w.abs().max() * 2**-7
            if shape == (7,):
                assert (code.decode() - w).abs().max() < 100 * half

    def test_nothing_else_changes(self):
        w = drawn(20, 30).requires_grad_()
        m = drawn(20, 30, seed=1).square()
        before, cost = w.detach().clone(), m.clone()
        state = torch.random.get_rng_state()
        for start in STARTS:
            code = share.kmeans(w, bits=3, start=start, weight=m)
            assert not code.centroids.requires_grad
        share.optimal(w.T, bits=3)  # not contiguous
        assert torch.equal(w, before) and torch.equal(m, cost)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_errors(self):
        w = drawn(4, 5)
        for bits in (0, 9, 2.0):
            with pytest.raises(ValueError, match=f"1 to 8, got {bits}"):
                share.kmeans(w, bits=bits)
        for K in (0, 5):
            with pytest.raises(ValueError, match=f"1 to 4, got {K}"):
                share.optimal(w, bits=2, clusters=K)
        with pytest.raises(ValueError, match="start must be one of"):
            share.kmeans(w, bits=2, start="best")
        with pytest.raises(ValueError, match="steps must not be negative"):
            share.kmeans(w, bits=2, steps=-1)
        with pytest.raises(ValueError, match=r"int64 of \(3,\)"):
            share.kmeans(torch.arange(3), bits=2)
        with pytest.raises(ValueError, match=r"not empty, got .* of \(0,\)"):
            share.kmeans(w[0, :0], bits=2)
        with pytest.raises(ValueError, match=r"w \(2,\) must be finite"):
            share.kmeans(torch.tensor([1.0, math.nan]), bits=2)
        for m in (w, torch.zeros(4, 5), torch.ones(5), w.abs() * math.inf):
            with pytest.raises(ValueError, match=r"weight must have the shape"):
                share.kmeans(w, bits=2, weight=m)


class TestSizes:
    def test_the_example_of_the_paper(self):
        """16 weights of 32 bits and 4 centroids: 512 / 160 bits."""
        w = drawn(4, 4, dtype=torch.float32)
        size = storage.payload(share.kmeans(w, bits=2))
        assert storage.payload(w) / size == 3.2

    @pytest.mark.parametrize("bits", [1, 3, 8])
    def test_indices_and_centroids(self, bits):
        w = drawn(100, 100, dtype=torch.float32)
        size = storage.payload(share.kmeans(w, bits=bits))
        assert size == 10_000 * bits / 8 + 4 * 2**bits

    def test_pruned_first(self):
        """Deep Compression: prune, share what is left, Huffman code."""
        w = drawn(64, 100, dtype=torch.float32)
        s = codes.sparse(w, w.abs() > 1.5)
        shared = replace(s, values=share.kmeans(s.values, bits=4))
        assert torch.equal(shared.decode() == 0, ~s.mask)
        together = share.kmeans(s.decode(), bits=4)  # the mistake
        assert squared(w, shared) < squared(w, together)
        assert (shared.values.centroids.abs() > 1.5).all()
        index = entropy.huffman(shared.values.index)
        coded = replace(shared, values=replace(shared.values, index=index))
        model = nn.Linear(100, 64, bias=False)
        again = storage.loads(
            storage.dumps(model, {"weight": coded}), like=model
        )
        assert torch.equal(again.weight, shared.decode())


class Mine(nn.Module):
    """Not from the library: a convolution, tied matrices, a bias."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, dtype=dtype)
        self.a = nn.Linear(12, 12, dtype=dtype)
        self.b = nn.Linear(12, 12, dtype=dtype)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(self.conv(x).relu().flatten(1)).relu())


def mine(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Mine(**options)


def images(n=64, seed=0, dtype=torch.float64):
    x = drawn(n, 1, 4, 4, seed=seed, dtype=dtype)
    return x, x.flatten(1)[:, :12].argmax(1)


def pruned(w, bits=2):
    s = codes.sparse(w, w.abs() >= w.abs().median())
    return replace(s, values=share.kmeans(s.values, bits=bits))


def viewed(w):
    flat = share.kmeans(w.flatten(1), bits=2)
    return codes.View(flat, tuple(w.shape))


def padded(w):
    """Rows in groups of 5, and a View that cuts the last ones."""
    book = share.kmeans(codes.groups(w.flatten(1), 5), bits=3)
    flat = codes.View(book, tuple(w.flatten(1).shape))
    return codes.View(flat, tuple(w.shape))


def huffman(w):
    s = pruned(w)
    index = entropy.huffman(s.values.index)
    return replace(s, values=replace(s.values, index=index))


KINDS = {
    "codebook": lambda w: share.kmeans(w, bits=3),
    "sparse": pruned,
    "view": viewed,
    "padded": padded,
    "huffman": huffman,
}


class TestCluster:
    @pytest.mark.parametrize("kind", KINDS)
    def test_gradient_of_a_centroid_is_the_sum_over_its_members(self, kind):
        model, (x, y) = mine(), images()
        state = codes.encode(model, KINDS[kind])
        plain = through.bake(share.cluster(model, state))
        train.cross_entropy(plain, (x, y)).backward()
        clustered = share.cluster(model, state)
        train.cross_entropy(clustered, (x, y)).backward()
        for name in ("conv", "a"):
            layer = getattr(clustered, name).parametrizations.weight
            c, g = layer[0].centroids, getattr(plain, name).weight.grad
            w = getattr(plain, name).weight
            own = w != 0  # not what was pruned
            want = torch.stack([g[own & (w == v)].sum() for v in c])
            torch.testing.assert_close(c.grad, want)
            assert layer.original.grad is None
        torch.testing.assert_close(clustered.b.bias.grad, plain.b.bias.grad)

    @pytest.mark.parametrize("kind", KINDS)
    def test_starts_at_the_code_and_ends_in_the_file(self, kind):
        model = mine()
        state = codes.encode(model, KINDS[kind])
        clustered = share.cluster(model, state)
        dense = codes.decode(state)
        for name in ("conv.weight", "a.weight"):
            module, key = name.split(".")
            w = getattr(getattr(clustered, module), key)
            assert torch.equal(w, dense[name])
        feed = train.batches(*images(), size=16, epochs=3)
        tuned = train.fit(clustered, feed, lr=0.03)
        baked, new = through.bake(tuned), share.encode_clustered(tuned, state)
        got = codes.decode(new)
        for name, w in baked.state_dict().items():
            assert torch.equal(got[name], w)
        assert type(new["conv.weight"]) is type(state["conv.weight"])
        assert new["a.weight"] is new["b.weight"]
        again = storage.loads(storage.dumps(baked, new), like=mine())
        x, _ = images(seed=1)
        assert torch.equal(again(x), tuned(x))
        assert len(storage.dumps(baked, new)) == len(
            storage.dumps(model, state)
        )

    def test_who_shares_is_settled(self):
        model = mine()
        state = codes.encode(model, pruned)
        clustered = share.cluster(model, state)
        feed = train.batches(*images(), size=16, epochs=3)
        tuned = train.fit(clustered, feed, lr=0.03)
        new = share.encode_clustered(tuned, state)
        for name in ("conv.weight", "a.weight"):
            before, after = state[name], new[name]
            assert torch.equal(before.mask, after.mask)
            index = before.values.index.values
            assert torch.equal(index, after.values.index.values)
            assert not torch.equal(
                before.values.centroids, after.values.centroids
            )
            assert torch.equal(after.decode() == 0, ~before.mask)
        assert not torch.equal(new["a.bias"], model.a.bias)

    def test_only_centroids_and_the_rest_are_trained(self):
        model = mine()
        state = codes.encode(model, KINDS["codebook"])
        clustered = share.cluster(model, state)
        trained = {
            n.rpartition(".")[2]: p.numel()
            for n, p in clustered.named_parameters()
            if p.requires_grad and "conv" in n
        }
        assert trained == {"centroids": 8, "bias": 3}
        feed = train.batches(*images(), size=16, epochs=2)
        sgd = torch.optim.SGD

        def decayed(parameters, lr):
            return sgd(parameters, lr=lr, weight_decay=0.5)

        tuned = train.fit(clustered, feed, lr=0.1, optimizer=decayed)
        kept = tuned.conv.parametrizations.weight.original
        assert torch.equal(kept, model.conv.weight)
        assert all(p.requires_grad for p in model.parameters())
        baked = through.bake(tuned)
        assert all(p.requires_grad for p in baked.parameters())

    def test_training_makes_up_for_most_of_the_rounding(self):
        torch.manual_seed(0)
        feed = train.batches(*images(512), size=32, epochs=20)
        dense = train.fit(mine(), feed, lr=0.01)
        state = codes.encode(dense, lambda w: share.kmeans(w, bits=2))
        clustered = share.cluster(dense, state)
        tuned = train.fit(clustered, feed, lr=0.01)
        with torch.no_grad():
            before, after, best = (
                float(train.cross_entropy(m, images(512)))
                for m in (clustered, tuned, dense)
            )
        assert before - after > 0.5 * (before - best) > 0

    def test_to_bring_weights_back_is_one_step_of_k_means(self):
        """With the squared distance to w for a loss, centroids are means."""
        model = nn.Linear(9, 7, dtype=torch.float64)
        start = share.kmeans(model.weight, bits=2, start="random", steps=0)
        clustered = share.cluster(model, {"weight": start})

        def loss(m, batch):
            return (m.weight - model.weight.detach()).square().sum()

        tuned = train.fit(clustered, [0] * 400, loss, lr=0.1)
        got = share.encode_clustered(tuned, {"weight": start})["weight"]
        a = start.index.values
        for k, c in enumerate(got.centroids):
            want = model.weight[a == k].mean()
            torch.testing.assert_close(c, want, rtol=1e-3, atol=1e-4)

    def test_networks_train_together_as_alone(self):
        nets = [models.MLP(widths=(6, 8, 3)) for _ in range(2)]
        X = drawn(64, 6, dtype=torch.float32)
        feed = train.batches(X, X[:, :3].argmax(1), size=16, epochs=4)
        for code in (KINDS["codebook"], pruned):
            states = [codes.encode(m, code) for m in nets]
            starts = [
                share.cluster(m, s) for m, s in zip(nets, states, strict=True)
            ]
            together = train.fit_many(starts, [feed, feed], lr=0.01)
            for got, start, state in zip(together, starts, states, strict=True):
                want = train.fit(start, feed, lr=0.01)
                a = codes.decode(share.encode_clustered(got, state))
                b = codes.decode(share.encode_clustered(want, state))
                for name in a:
                    torch.testing.assert_close(
                        a[name], b[name], rtol=1e-3, atol=1e-4
                    )

    def test_part_of_the_weights(self):
        model = mine(dtype=torch.bfloat16)
        state = {"conv.weight": share.kmeans(model.conv.weight, bits=2)}
        clustered = share.cluster(model, state)
        assert clustered.conv.weight.dtype == torch.bfloat16
        new = share.encode_clustered(clustered, state)
        assert isinstance(new["conv.weight"], codes.Codebook)
        assert torch.equal(new["a.weight"], model.a.weight)
        assert new["a.weight"] is new["b.weight"]

    def test_nothing_else_changes(self):
        model = mine()
        before = {n: p.clone() for n, p in model.named_parameters()}
        state = codes.encode(model, KINDS["codebook"])
        old = state["a.weight"].centroids.clone()
        clustered = share.cluster(model, state)
        feed = train.batches(*images(), size=16, epochs=1)
        share.encode_clustered(train.fit(clustered, feed, lr=0.1), state)
        share.encode_clustered(clustered, state)
        assert torch.equal(state["a.weight"].centroids, old)
        for n, p in model.named_parameters():
            assert torch.equal(p, before[n])

    def test_errors(self):
        model = mine()
        code = share.kmeans(model.a.weight, bits=2)
        with pytest.raises(ValueError, match="state holds no code"):
            share.cluster(model, dict(model.state_dict()))
        with pytest.raises(ValueError, match=r"c\.weight: .* no such param"):
            share.cluster(model, {"c.weight": code})
        with pytest.raises(ValueError, match=r"conv\.weight: .*\(12, 12\)"):
            share.cluster(model, {"conv.weight": code})
        single = replace(code, centroids=code.centroids.float())
        with pytest.raises(ValueError, match=r"a\.weight: .* torch.float32"):
            share.cluster(model, {"a.weight": single})
        scaled = codes.Scaled(code, 2.0)
        with pytest.raises(ValueError, match=r"a\.weight: no centroids .*Sca"):
            share.cluster(model, {"a.weight": scaled})
        with pytest.raises(ValueError, match=r"a\.weight: the model has no"):
            share.encode_clustered(model, {"a.weight": code})
