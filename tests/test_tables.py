"""Tables of levels against published ones, scipy and brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from minicompress import codes, quantize, storage
from minicompress.quantize.tables import nearest_level

# the table of the paper's code
NF4 = (
    "-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 "
    "-0.28444138169288635 -0.18477343022823334 -0.09105003625154495 0 "
    "0.07958029955625534 0.16093020141124725 0.24611230194568634 "
    "0.33791524171829224 0.44070982933044434 0.5626170039176941 "
    "0.7229568362236023 1"
)
# a unit normal distribution, least mean squared error of 2^b levels
LLOYD = {1: 0.363380, 2: 0.117482, 3: 0.034548, 4: 0.009501, 5: 0.002505}


def drawn(seed, *size):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*(size or (6, 20)), generator=g)


def normal(n=1_000_001):
    """A sample of a normal distribution without chance: its quantiles."""
    share = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return torch.special.ndtri(share)


def squared(W, code):
    return float((code.decode() - W).square().sum())


class TestNF4:
    def test_the_published_levels(self):
        want = torch.tensor([float(x) for x in NF4.split()])
        assert (quantize.nf4_levels() - want).abs().max() < 1.2e-7

    def test_by_scipy(self):
        end = 0.9677083
        assert end == pytest.approx(1 - (1 / 30 + 1 / 32) / 2, abs=5e-8)
        up = norm.ppf(np.linspace(end, 0.5, 9))[:-1]
        down = -norm.ppf(np.linspace(end, 0.5, 8))[:-1]
        want = np.sort(np.concatenate([up, [0], down])) / up.max()
        assert np.abs(quantize.nf4_levels().numpy() - want).max() < 1e-7

    @pytest.mark.parametrize("each", ["tensor", "row", 4, 7])
    def test_nothing_is_nearer(self, each):
        W = drawn(0)
        code = quantize.nf4(W, each=each)
        inner = code.x if isinstance(code, codes.View) else code
        scale = inner.by
        if isinstance(code, codes.View):
            scale = scale.expand(inner.shape).reshape(6, -1)[:, :20]
        points = scale[..., None] * quantize.nf4_levels()
        want = (points - W[..., None]).abs().amin(-1)
        got = (code.decode() - W).abs()
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)

    def test_the_largest_and_zero_come_back(self):
        W = drawn(0, 4, 64)
        W[:, 5] = 0
        got = quantize.nf4(W).decode()
        at = W.abs().argmax(1, keepdim=True)
        torch.testing.assert_close(got.gather(1, at), W.gather(1, at))
        assert (got[:, 5] == 0).all()
        assert (quantize.nf4(torch.zeros(3, 8)).decode() == 0).all()

    def test_not_meant_for_the_squared_error(self):
        W = drawn(0, 64, 64)
        best = quantize.lloyd(W / W.abs().amax(1, keepdim=True), bits=4)
        levels = quantize.tables.on_levels(
            W, best.centroids, "row", lambda most: most
        )
        nf4, grid = quantize.nf4(W), quantize.min_max(W, bits=4)
        assert squared(W, levels) < squared(W, nf4) < squared(W, grid)

    def test_double_quantization_is_one_field(self):
        W = drawn(0, 128, 512)
        code = quantize.nf4(W)
        single = storage.payload(code)
        small = quantize.small_scales(code.x.by)
        double = replace(code, x=replace(code.x, by=small))
        extra = 8 * storage.payload(small) / W.numel()
        # 1024 scales in 4 groups of 256, and their mean
        assert 8 * storage.payload(code.x.by) / W.numel() == 0.5
        assert extra == pytest.approx(0.127, abs=6e-4)
        assert storage.payload(double) == single - 4096 + 1024 + 4 * 4 + 4
        assert squared(W, double) < 1.01 * squared(W, code)
        model = torch.nn.Linear(512, 128, bias=False)
        data = storage.dumps(model, {"weight": double})
        again = storage.loads(data, like=model)
        assert torch.equal(again.weight, double.decode())
        bits = 8 * len(data) / W.numel()
        assert bits == pytest.approx(4.127, abs=0.07)  # and a header

    def test_small_scales(self):
        scale = drawn(1, 30, 20, 1).abs() + 0.1
        small = quantize.small_scales(scale)
        assert small.shape == scale.shape
        error = (small.decode() - scale).abs().max()
        spread = (scale - scale.mean()).abs().max()
        assert error <= spread / 127 / 2 * 1.001
        coarse = quantize.small_scales(scale, bits=4, each=64)
        assert (coarse.decode() - scale).abs().max() > 4 * error

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_types(self, dtype):
        W = drawn(0).to(dtype)
        code = quantize.nf4(W)
        assert code.x.by.dtype == dtype
        near = quantize.nf4(W.float())
        assert torch.equal(code.x.x.index.values, near.x.x.index.values)


class TestPowersOfTwo:
    @given(seed=st.integers(0, 999), bits=st.integers(2, 8))
    @settings(max_examples=40, deadline=None)
    def test_every_weight_is_a_power_or_zero(self, seed, bits):
        W = drawn(seed) * 10 ** (seed % 7 - 3)
        got = quantize.powers_of_two(W, bits=bits).decode()
        fraction, exponent = got.abs().frexp()
        assert ((fraction == 0.5) | (got == 0)).all()
        for row, q in zip(exponent, got, strict=True):
            used = row[q != 0]
            assert used.max() - used.min() <= 2 ** (bits - 1) - 2
        if bits > 4:  # a power is at most a third off
            big = W.abs() > W.abs().amax(1, keepdim=True) / 4
            error = ((got - W) / W).abs()
            assert error[big].max() <= 1 / 3 + 1e-6

    def test_nothing_is_nearer(self):
        W = drawn(0)
        got = quantize.powers_of_two(W, bits=4)
        powers = got.by * 0.5 ** torch.arange(7)
        points = torch.cat([-powers, torch.zeros(6, 1), powers], 1)
        want = (points[:, None] - W[:, :, None]).abs().amin(-1)
        torch.testing.assert_close((got.decode() - W).abs(), want)

    @pytest.mark.parametrize(
        ("largest", "power"), [(1.4, 1), (1.6, 2), (2.9, 2), (3.1, 4)]
    )
    def test_the_largest_power(self, largest, power):
        W = torch.tensor([largest])
        assert quantize.powers_of_two(W, bits=3).decode() == power

    def test_two_bits_are_three_values(self):
        got = quantize.powers_of_two(drawn(0), bits=2)
        assert got.x.centroids.tolist() == [-1, 0, 1]

    @pytest.mark.parametrize("bits", [1, 9])
    def test_bad_bits(self, bits):
        with pytest.raises(ValueError, match="bits must be 2 to 8"):
            quantize.powers_of_two(drawn(0), bits=bits)


class TestLloyd:
    @pytest.mark.parametrize("bits", range(1, 6))
    def test_the_normal_distribution(self, bits):
        x = normal()
        code = quantize.lloyd(x, bits=bits)
        error = squared(x, code) / len(x)
        # the quantiles leave out the ends of the tails
        assert error == pytest.approx(LLOYD[bits], rel=1e-3)
        c = code.centroids
        torch.testing.assert_close(c, -c.flip(0), atol=2e-5, rtol=1e-4)
        # the error is 1 - sum of p c^2
        p = torch.bincount(code.index.values.long()) / len(x)
        assert error == pytest.approx(
            float(x.square().mean() - (p * c.square()).sum()), abs=1e-7
        )

    def test_known_levels(self):
        x = normal()
        one = quantize.lloyd_levels(x, count=2)
        two = quantize.lloyd_levels(x, count=4)
        assert float(one[1]) == pytest.approx((2 / torch.pi) ** 0.5, abs=1e-5)
        assert float(two[2]) == pytest.approx(0.45278, abs=1e-4)
        assert float(two[3]) == pytest.approx(1.51042, abs=1e-4)

    def test_high_rate(self):
        x = normal(200_001)
        code = quantize.lloyd(x, bits=7)
        want = 3**0.5 * torch.pi / 2 * 4.0**-7  # Panter and Dite
        assert squared(x, code) / len(x) == pytest.approx(want, rel=0.04)

    def test_levels_are_the_means_of_their_cells(self):
        x = drawn(0, 2000)
        code = quantize.lloyd(x, bits=3)
        index = code.index.values
        for k, level in enumerate(code.centroids):
            torch.testing.assert_close(
                level, x[index == k].mean(), atol=1e-5, rtol=1e-5
            )
        nearest = (x[:, None] - code.centroids).abs().argmin(1)
        assert torch.equal(nearest, index.long())

    def test_every_step_lowers_the_error(self):
        x = drawn(0, 2000) ** 3
        errors = [
            squared(x, quantize.lloyd(x, bits=3, steps=n)) for n in range(20)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 0.8 * errors[0]

    def test_close_to_the_best_of_all_cuts(self):
        near = 0
        for seed in range(10):
            x = drawn(seed, 14)
            ordered = x.sort().values
            best = min(
                sum(
                    float((part - part.mean()).square().sum())
                    for part in ordered.tensor_split(cut)
                )
                for cut in itertools.combinations(range(1, 14), 3)
            )
            found = squared(x, quantize.lloyd(x, bits=2))
            assert found >= best * (1 - 1e-5)
            near += found < 1.3 * best
        assert near >= 6  # a minimum, not always the lowest

    def test_few_distinct_weights_come_back(self):
        W = torch.tensor([[1.0, -2.0, 1.0], [0.5, 0.5, -2.0]])
        code = quantize.lloyd(W, bits=2)
        assert torch.equal(code.decode(), W)
        assert torch.equal(quantize.lloyd(W[:, :1], bits=1).decode(), W[:, :1])

    def test_bytes_and_types(self):
        W = drawn(0, 64, 64)
        code = quantize.lloyd(W, bits=3)
        assert storage.payload(code) == 64 * 64 * 3 // 8 + 8 * 4
        for dtype in (torch.float64, torch.bfloat16):
            other = quantize.lloyd(W.to(dtype), bits=3)
            assert other.decode().dtype == dtype

    def test_bad_arguments_are_named(self):
        with pytest.raises(ValueError, match="bits"):
            quantize.lloyd(drawn(0), bits=9)
        with pytest.raises(ValueError, match="count"):
            quantize.lloyd_levels(drawn(0), count=0)
        with pytest.raises(ValueError, match="finite"):
            quantize.lloyd(torch.tensor([0.0, torch.nan, 1.0]), bits=1)


class TestNearestLevel:
    @pytest.mark.parametrize("count", [1, 2, 16, 33, 300])
    def test_by_distance(self, count):
        x = drawn(0, 500)
        levels = drawn(1, count).sort().values
        want = (x[:, None] - levels).abs().argmin(1)
        assert torch.equal(nearest_level(x, levels).long(), want)

    @pytest.mark.parametrize("count", [3, 40])
    def test_of_two_equals_the_lower(self, count):
        levels = torch.arange(count).float()
        x = levels[:-1] + 0.5
        assert torch.equal(nearest_level(x, levels).float(), levels[:-1])


@pytest.mark.parametrize(
    "f",
    [
        quantize.nf4,
        lambda W, **k: quantize.powers_of_two(W, bits=4, **k),
    ],
)
class TestScaledLevels:
    def test_shapes_chunks_and_input(self, f, monkeypatch):
        W = drawn(0, 30, 4, 20)
        kept = W.clone()
        whole = f(W, each=8)
        assert whole.shape == whole.decode().shape == W.shape
        monkeypatch.setattr("minicompress.quantize.tables.CHUNK", 56)
        assert torch.equal(f(W, each=8).decode(), whole.decode())
        assert torch.equal(W, kept)

    def test_bytes(self, f):
        W = drawn(0, 64, 128)
        code = f(W, each=32)
        levels = len(code.x.x.centroids)
        want = 64 * 128 // 2 + 64 * 4 * 4 + levels * 4
        assert storage.payload(code) == want

    def test_bad_arguments(self, f):
        W = drawn(0)
        for bad in (torch.nan, torch.inf):
            W[0, 0] = bad
            with pytest.raises(ValueError, match=r"W \(6, 20\) must be finite"):
                f(W)
        with pytest.raises(ValueError, match="W must be"):
            f(torch.ones(3).int())
        with pytest.raises(ValueError, match="each"):
            f(drawn(0), each="column")
