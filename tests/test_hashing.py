"""HashedNets against plain loops, least squares and laws of hashing."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import codes, models, share, storage, through, train

# what is hashed with SplitMix64 in Python's own integers
FULL = (1 << 64) - 1


def split_mix(x):
    x = x * 0x9E3779B97F4A7C15 & FULL
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & FULL
    x = (x ^ x >> 27) * 0x94D049BB133111EB & FULL
    return x ^ x >> 31


def bucket(seed, place, size):
    x = split_mix(place + (seed << 20))
    return (x >> 1 & (1 << 62) - 1) % size, 1 - 2 * (x & 1)


def drawn(seed, *size, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)


def design(seed, shape, size):
    """The matrix that takes the values to all weights."""
    A = np.zeros((math.prod(shape), size))
    for place in range(len(A)):
        k, sign = bucket(seed, place, size)
        A[place, k] = sign
    return A


class Own(nn.Module):
    """A model of somebody else: odd names, a table, a convolution, a tie."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.mix = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.ReLU())
        self.scale = nn.Parameter(torch.ones(8))
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x):
        h = self.mix(self.words(x).transpose(1, 2)).transpose(1, 2)
        return self.out(h * self.scale)


class TestHashed:
    @given(
        st.integers(1, 5),
        st.integers(1, 6),
        st.integers(1, 40),
        st.integers(0, 2**32 - 1),
    )
    @settings(max_examples=30, deadline=None)
    def test_is_the_least_squares_solution(self, out, inputs, size, seed):
        W = drawn(1, out, inputs)
        code = share.hashed(W, size=size, seed=seed)
        A = design(seed, W.shape, size)
        want, *_ = np.linalg.lstsq(A, W.numpy().ravel(), rcond=None)
        np.testing.assert_allclose(code.values.numpy(), want, atol=1e-12)
        got = code.decode().numpy().ravel()
        np.testing.assert_allclose(got, A @ want, atol=1e-12)

    def test_an_empty_bucket_holds_zero(self):
        code = share.hashed(drawn(0, 2, 2), size=50)
        used = {bucket(0, place, 50)[0] for place in range(4)}
        unused = sorted({*range(50)} - used)
        assert len(unused) >= 46
        assert (code.values[unused] == 0).all()

    def test_without_collisions_it_is_an_ordinary_weight(self):
        """K as large as that, h is one to one on six places."""
        W, size = drawn(0, 2, 3, dtype=torch.float32), 4096
        assert len({bucket(7, place, size)[0] for place in range(6)}) == 6
        assert torch.equal(share.hashed(W, size=size, seed=7).decode(), W)

    def test_a_hashed_weight_comes_back(self):
        W = codes.Hashed(3, drawn(0, 10), (20, 30)).decode()
        code = share.hashed(W, size=10, seed=3)
        torch.testing.assert_close(code.values, drawn(0, 10))
        other = share.hashed(W, size=10, seed=4).decode()
        assert (other - W).square().sum() > 0.9 * W.square().sum()

    def test_keeps_the_share_of_a_random_subspace(self):
        """A projection on K of n dimensions keeps K / n of the square."""
        W = drawn(0, 100, 100)
        kept = [
            share.hashed(W, size=1000, seed=s).decode().square().sum()
            for s in range(20)
        ]
        share_kept = torch.stack(kept) / W.square().sum()
        # each is Beta(K/2, (n-K)/2): 0.1 with a deviation of 0.0042
        assert abs(share_kept.mean() - 0.1) < 4 * 0.0042 / math.sqrt(20)

    def test_large_weights_are_hashed_in_parts_that_fit_together(self):
        W = drawn(0, 70, 1000)
        index, sign = codes.buckets(5, torch.arange(70_000), 9)
        sums = np.bincount(index, (W.flatten() * sign).numpy())
        want = torch.from_numpy(sums / np.bincount(index))
        got = share.hashed(W, size=9, seed=5).values
        torch.testing.assert_close(got, want)

    @pytest.mark.parametrize(
        "dtype", [torch.bfloat16, torch.float32, torch.float64]
    )
    def test_types_and_shapes(self, dtype):
        W = drawn(0, 3, 2, 5, 5, dtype=dtype)
        before = W.clone()
        code = share.hashed(W, size=20)
        assert code.decode().dtype == dtype
        assert code.decode().shape == code.shape == W.shape
        assert torch.equal(W, before)
        exact = share.hashed(W.double(), size=20).values
        assert torch.equal(code.values, exact.to(dtype))

    def test_a_mean_of_many_is_exact_in_float32(self):
        """Sums in float32 would be off by 1e-4 of the mean here."""
        W = drawn(0, 1000, 1000, dtype=torch.float32) + 100
        got = share.hashed(W, size=1).values.double()
        exact = share.hashed(W.double(), size=1).values
        torch.testing.assert_close(got, exact, rtol=1e-7, atol=0)

    def test_errors(self):
        with pytest.raises(ValueError, match="size must be at least 1, got 0"):
            share.hashed(torch.ones(2, 2), size=0)
        with pytest.raises(ValueError, match=r"W must be .*int64 of \(2, 2\)"):
            share.hashed(torch.ones(2, 2).long(), size=1)
        with pytest.raises(ValueError, match=r"not empty, got .*\(0, 2\)"):
            share.hashed(torch.ones(0, 2), size=1)
        with pytest.raises(ValueError, match="seed"):
            share.hashed(torch.ones(2, 2), size=1, seed=-1)


class TestHashedWeights:
    def test_are_what_the_code_decodes_to(self):
        values = drawn(0, 7, dtype=torch.float32)
        got = share.hashed_weights(torch.empty(5, 6), values, 3)
        assert torch.equal(got, codes.Hashed(3, values, (5, 6)).decode())
        got = share.hashed_weights(torch.empty(5, 6), values, torch.tensor(3))
        assert torch.equal(got, codes.Hashed(3, values, (5, 6)).decode())

    def test_gradient_is_the_signed_sum_over_a_bucket(self):
        values = drawn(0, 4).requires_grad_()
        G = drawn(1, 5, 6)
        share.hashed_weights(torch.empty(5, 6), values, 9).backward(G)
        want = torch.zeros(4, dtype=torch.float64)
        for place, g in enumerate(G.flatten()):
            k, sign = bucket(9, place, 4)
            want[k] += sign * g
        torch.testing.assert_close(values.grad, want)
        w = torch.empty(5, 6).double()
        assert torch.autograd.gradcheck(
            lambda v: share.hashed_weights(w, v, 9), values
        )

    def test_the_latent_weight_gets_no_gradient(self):
        w = drawn(0, 5, 6).requires_grad_()
        values = drawn(0, 4).requires_grad_()
        share.hashed_weights(w, values, 9).sum().backward()
        assert w.grad is None


class TestHashFeatures:
    @pytest.mark.parametrize("size", [1, 7, 100])
    def test_times_the_values_is_the_layer(self, size):
        values, x = drawn(0, size), drawn(1, 3, 2, 6)
        W = codes.Hashed(5, values, (4, 6)).decode()
        phi = share.hash_features(x, out=4, size=size, seed=5)
        assert phi.shape == (3, 2, 4, size)
        torch.testing.assert_close(phi @ values, F.linear(x, W))

    def test_its_definition(self):
        x = drawn(0, 6)
        phi = share.hash_features(x, out=2, size=3, seed=8)
        want = torch.zeros(2, 3, dtype=torch.float64)
        for i in range(2):
            for j in range(6):
                k, sign = bucket(8, 6 * i + j, 3)
                want[i, k] += sign * x[j]
        torch.testing.assert_close(phi, want)

    def test_inner_products_are_unbiased(self):
        """Mean <x, y> and the variance of Weinberger et al., lemma 2."""
        x, y, size, draws = drawn(0, 12), drawn(1, 12), 5, 4000
        both = torch.stack([x, y])
        found = []
        for seed in range(draws):
            a, b = share.hash_features(both, out=1, size=size, seed=seed)[:, 0]
            found.append(a @ b)
        found = torch.stack(found)
        same = (x * y).square().sum()
        variance = x.square().sum() * y.square().sum() - same
        variance = (variance + (x @ y).square() - same) / size
        error = (variance / draws).sqrt()
        assert abs(found.mean() - x @ y) < 4 * error
        assert 0.9 < found.var() / variance < 1.1

    def test_without_signs_they_would_be_biased(self):
        """The knock-out: what the second hash is for."""
        x = drawn(0, 12).abs()
        found = []
        for seed in range(500):
            index, _ = codes.buckets(seed, torch.arange(12), 5)
            phi = torch.zeros(5).double().index_add(0, index, x)
            found.append(phi @ phi)
        assert torch.stack(found).mean() > 2 * (x @ x)

    def test_errors_and_types(self):
        x = torch.ones(2, 3, dtype=torch.bfloat16)
        assert share.hash_features(x, out=1, size=4).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="size must be at least 1, got 0"):
            share.hash_features(x, out=1, size=0)
        with pytest.raises(ValueError, match="out must be at least 1, got 0"):
            share.hash_features(x, out=0, size=1)


class TestHashedLayers:
    def test_what_requires_gradients_is_what_is_stored(self):
        model = models.MLP()
        net = share.hashed_layers(model, ratio=1 / 8)
        sizes = [
            round(p.numel() / 8) if p.ndim == 2 else p.numel()
            for p in model.parameters()
        ]
        trained = [p.numel() for p in net.parameters() if p.requires_grad]
        assert sum(trained) == sum(sizes)
        x = drawn(0, 5, 64, dtype=torch.float32)
        assert net(x).shape == (5, 10)

    def test_every_weight_has_its_own_hash(self):
        """With one seed, layers of a shape would share a pattern."""
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
        net = share.hashed_layers(model, ratio=1 / 4)
        seeds = [int(t["seed"]) for t in through.tensors(net).values()]
        assert len(set(seeds)) == 4
        # none is a shifted copy of another either: 2^20 places a seed
        n = torch.tensor(seeds).sort().values.diff()
        assert n.min() > 1000
        a, b = (codes.buckets(s, torch.arange(256), 64)[0] for s in seeds[:2])
        assert (a == b).float().mean() < 0.1

    def test_the_start_has_the_variance_of_the_layer(self):
        torch.manual_seed(0)
        model = models.MLP(widths=(200, 300, 10))
        net = share.hashed_layers(model, ratio=1 / 16)
        for layer, new in zip(model.layers, net.layers, strict=True):
            ratio = new.weight.std() / layer.weight.std()
            size = layer.weight.numel() / 16
            # a uniform distribution: the deviation of the standard
            # deviation of K numbers is 1 / sqrt(5 K) of it
            assert abs(ratio - 1) < 4 / math.sqrt(5 * size)
            means = share.hashed(layer.weight, size=int(size)).decode()
            assert means.std() < 0.3 * layer.weight.std()

    def test_all_values_are_used_where_there_are_enough_weights(self):
        net = share.hashed_layers(nn.Linear(64, 64), ratio=1 / 64)
        (tensors,) = through.tensors(net).values()
        used = net.weight.abs().unique()
        assert torch.equal(used, tensors["values"].detach().abs().unique())

    def test_seeds_decide_all(self):
        model = nn.Linear(16, 8)
        first, again, other = (
            share.hashed_layers(model, ratio=1 / 4, seed=s).weight
            for s in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first.abs().unique(), other.abs().unique())
        assert not torch.equal(first.sign(), other.sign())

    def test_leaves_the_model_and_the_dice_alone(self):
        model = Own()
        before = {n: p.clone() for n, p in model.named_parameters()}
        dice = torch.random.get_rng_state()
        share.hashed_layers(model, ratio=1 / 4)
        assert torch.equal(torch.random.get_rng_state(), dice)
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) and p.requires_grad

    def test_tied_weights_stay_tied(self):
        net = share.hashed_layers(Own(), ratio=1 / 4)
        assert torch.equal(net.words.weight, net.out.weight)
        x = torch.arange(12).view(2, 6)
        net(x).sum().backward()
        state = share.encode_hashed(net)
        assert state["words.weight"] is state["out.weight"]
        baked = through.bake(net)
        assert baked.words.weight is baked.out.weight

    def test_where_and_errors(self):
        net = share.hashed_layers(
            Own(), ratio=1 / 4, where=lambda name, w: name == "mix.0.weight"
        )
        assert list(through.tensors(net)) == ["mix.0.weight"]
        for ratio in (0, 1.5):
            with pytest.raises(ValueError, match=f"at most 1, got {ratio}"):
                share.hashed_layers(Own(), ratio=ratio)
        with pytest.raises(ValueError, match="selects no parameter"):
            share.hashed_layers(Own(), ratio=0.5, where=lambda n, w: False)


class TestTraining:
    def problem(self):
        X = drawn(0, 64, 12, dtype=torch.float32)
        return X, (X[:, :3].sum(1) > 0).long()

    def trained(self, seed=0, **options):
        torch.manual_seed(seed)
        net = share.hashed_layers(
            models.MLP(widths=(12, 32, 2)), ratio=1 / 8, seed=seed
        )
        feed = train.batches(*self.problem(), size=16, epochs=30, seed=seed)
        return net, feed

    def test_learns_and_the_code_is_bit_for_bit(self):
        torch.set_num_threads(1)
        start, feed = self.trained()
        net = train.fit(start, feed, lr=1e-2)
        X, y = self.problem()
        assert train.accuracy(net, X, y) > 0.9 > train.accuracy(start, X, y)
        state = share.encode_hashed(net)
        baked = through.bake(net)
        decoded = codes.decode(state)
        assert decoded.keys() == baked.state_dict().keys()
        for name, w in baked.state_dict().items():
            assert torch.equal(decoded[name], w), name
        file = storage.dumps(models.MLP(widths=(12, 32, 2)), state)
        again = storage.loads(file)
        assert torch.equal(again(X), baked(X))
        dense = len(storage.dumps(baked))
        assert len(file) < dense - (12 * 32 + 64) * 4 * 0.7

    def test_many_at_once_are_those_one_by_one(self):
        """Each network has its own hashes, also under vmap."""
        torch.set_num_threads(1)
        pairs = [self.trained(seed) for seed in range(3)]
        together = train.fit_many(*map(list, zip(*pairs, strict=True)), lr=1e-2)
        for net, (start, feed) in zip(together, pairs, strict=True):
            alone = train.fit(start, feed, lr=1e-2)
            got, want = share.encode_hashed(net), share.encode_hashed(alone)
            for name in ("layers.0.weight", "layers.1.weight"):
                assert got[name].seed == want[name].seed
                torch.testing.assert_close(
                    got[name].values, want[name].values, rtol=1e-3, atol=1e-4
                )

    def test_the_code_does_not_change_with_the_model(self):
        net, _ = self.trained()
        state = share.encode_hashed(net)
        before = state["layers.0.weight"].values.clone()
        with torch.no_grad():
            for p in net.parameters():
                p.zero_()
        assert torch.equal(state["layers.0.weight"].values, before)

    def test_only_what_is_hashed_is_encoded(self):
        mask = torch.tensor([[True, False], [True, True]])
        other = through.attach(
            nn.Linear(2, 2), "weight", lambda w, m: w * m, m=mask
        )
        with pytest.raises(ValueError, match="none of its weights is hashed"):
            share.encode_hashed(other)
        with pytest.raises(ValueError, match="none of its weights is hashed"):
            share.encode_hashed(nn.Linear(2, 2))
        both = nn.Sequential(other, nn.Linear(2, 2))
        both = share.hashed_layers(
            both, ratio=1, where=lambda name, w: name == "1.weight"
        )
        state = share.encode_hashed(both)
        assert isinstance(state["1.weight"], codes.Hashed)
        assert isinstance(state["0.weight"], torch.Tensor)
        assert state["0.weight"][0, 1] == 0

    def test_a_trained_layer_starts_from_its_nearest_values(self):
        layer = nn.Linear(8, 4)
        code = share.hashed(layer.weight, size=16, seed=5)
        net = through.attach(
            layer,
            "weight",
            share.hashed_weights,
            values=nn.Parameter(code.values),
            seed=torch.tensor(code.seed),
        )
        assert torch.equal(net.weight, code.decode())
        again = share.encode_hashed(net)["weight"]
        assert again.seed == 5 and torch.equal(again.values, code.values)
