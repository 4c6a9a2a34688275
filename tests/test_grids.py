"""Uniform grids against torch's fake quantization, bounds and laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import minimize_scalar
from scipy.special import lambertw, rel_entr
from scipy.stats import norm

from minicompress import codes, quantize, storage

WIDTHS = st.integers(2, 8)
EACH = st.sampled_from(["tensor", "row", 1, 3, 4, 16])


def drawn(seed, *size):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*(size or (5, 12)), generator=g)


def parts(code):
    return code.x if isinstance(code, codes.View) else code


class TestTorch:
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_symmetric_for_the_tensor(self, bits):
        W, top = drawn(0), 2 ** (bits - 1) - 1
        scale = W.abs().max() / top
        want = torch.fake_quantize_per_tensor_affine(
            W, float(scale), 0, -top, top
        )
        found = quantize.min_max(W, bits=bits, each="tensor", symmetric=True)
        assert torch.allclose(found.decode(), want, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_affine_for_each_row(self, bits):
        W, levels = drawn(1) + 0.7, 2**bits - 1
        low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
        scale = (high - low) / levels
        zero = torch.round(-low / scale).int()
        want = torch.fake_quantize_per_channel_affine(
            W, scale, zero, 0, 0, levels
        )
        found = quantize.min_max(W, bits=bits)
        assert torch.allclose(found.decode(), want, rtol=1e-6, atol=1e-6)


class TestLaws:
    @given(seed=st.integers(0, 999), bits=WIDTHS, each=EACH, s=st.booleans())
    @settings(max_examples=60, deadline=None)
    def test_error_is_at_most_half_a_step(self, seed, bits, each, s):
        W = drawn(seed, 4, 10)
        code = quantize.min_max(W, bits=bits, each=each, symmetric=s)
        inner = parts(code)
        error = W - code.decode()
        if isinstance(code, codes.View):
            error = codes.groups(error, each)
        # the ends of an affine grid are moved by at most half a step
        limit = inner.scale * (0.5 if s else 1.0)
        assert (error.abs() <= limit * (1 + 1e-4) + 1e-7).all()

    @given(seed=st.integers(0, 999), bits=WIDTHS, each=EACH, s=st.booleans())
    @settings(max_examples=40, deadline=None)
    def test_a_second_time_changes_nothing(self, seed, bits, each, s):
        once = quantize.min_max(
            drawn(seed), bits=bits, each=each, symmetric=s
        ).decode()
        twice = quantize.min_max(once, bits=bits, each=each, symmetric=s)
        assert torch.allclose(twice.decode(), once, rtol=1e-5, atol=1e-6)

    @given(seed=st.integers(0, 999), bits=WIDTHS, each=EACH, s=st.booleans())
    @settings(max_examples=40, deadline=None)
    def test_zero_stays_zero(self, seed, bits, each, s):
        W = drawn(seed) + 3
        W[:, ::3] = 0
        code = quantize.min_max(W, bits=bits, each=each, symmetric=s)
        assert (code.decode()[:, ::3] == 0).all()

    @given(seed=st.integers(0, 999), bits=WIDTHS)
    def test_symmetric_is_odd_and_order_is_kept(self, seed, bits):
        W = drawn(seed)

        def q(W):
            code = quantize.min_max(W, bits=bits, each="tensor", symmetric=True)
            return code.decode()

        assert torch.equal(q(-W), -q(W))
        order = W.flatten().argsort()
        assert (q(W).flatten()[order].diff() >= 0).all()

    def test_every_bit_is_worth_six_decibels(self):
        W = torch.rand(1 << 16, generator=torch.Generator().manual_seed(0))

        def decibels(bits):
            error = quantize.min_max(W, bits=bits, each="tensor").decode() - W
            return 10 * math.log10(W.square().mean() / error.square().mean())

        for bits in range(4, 10):  # noise of step^2 / 12, step 1 / (2^b - 1)
            levels = 2**bits - 1
            want = 20 * math.log10((2 * levels + 1) / levels)
            assert abs(decibels(bits + 1) - decibels(bits) - want) < 0.05
        assert abs(want - 6.02) < 0.02

    def test_the_input_stays(self):
        W = drawn(0)
        before = W.clone()
        quantize.min_max(W, bits=3, each=4)
        assert torch.equal(W, before)


class TestEdges:
    @pytest.mark.parametrize("s", [True, False])
    @pytest.mark.parametrize("each", ["tensor", "row", 4])
    def test_all_zero(self, s, each):
        code = quantize.min_max(
            torch.zeros(3, 8), bits=4, each=each, symmetric=s
        )
        assert (code.decode() == 0).all()

    @pytest.mark.parametrize("value", [2.5, -2.5])
    @pytest.mark.parametrize("s", [True, False])
    def test_a_constant_comes_back(self, value, s):
        W = torch.full((2, 4), value)
        code = quantize.min_max(W, bits=4, symmetric=s)
        assert torch.allclose(code.decode(), W)

    def test_a_row_is_not_disturbed_by_another(self):
        W = drawn(0)
        louder = torch.cat([W, 1000 * W[:1]])
        one = quantize.min_max(W, bits=4).decode()
        assert torch.equal(quantize.min_max(louder, bits=4).decode()[:5], one)
        shared = quantize.min_max(louder, bits=4, each="tensor").decode()
        assert (shared[:5] == 0).all()

    def test_kernels(self):
        W = drawn(0, 4, 3, 3, 3)
        code = quantize.min_max(W, bits=8)
        assert code.decode().shape == W.shape
        assert code.scale.shape == (4, 1, 1, 1)

    @pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
    def test_bytes_of_groups(self, bits):
        W = drawn(0, 16, 64)
        code = quantize.min_max(W, bits=bits, each=32)
        want = 16 * 64 * bits // 8 + 32 * 4 + math.ceil(32 * bits / 8)
        assert storage.payload(code) == want

    def test_errors(self):
        with pytest.raises(ValueError, match="bits must be 2 to 16, got 1"):
            quantize.min_max(drawn(0), bits=1, symmetric=True)
        with pytest.raises(ValueError, match=r"W \(2,\) must be finite"):
            quantize.min_max(torch.tensor([1.0, torch.nan]), bits=4)
        with pytest.raises(ValueError, match=r'each must be "tensor", "row"'):
            quantize.min_max(drawn(0), bits=4, each="column")
        with pytest.raises(ValueError, match="got 0"):
            quantize.min_max(drawn(0), bits=4, each=0)


def squared(W, code):
    return float((code.decode().double() - W).square().sum())


class TestPercentile:
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("each", ["tensor", "row", 4])
    def test_all_of_them_is_min_max(self, each, symmetric):
        how = {"bits": 4, "each": each, "symmetric": symmetric}
        W = drawn(0)
        got = quantize.percentile(W, share=1, **how)
        want = quantize.min_max(W, **how)
        assert torch.equal(got.decode(), want.decode())

    @pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
    def test_symmetric_leaves_out_the_largest(self, share):
        W = drawn(0, 4, 100)
        got = quantize.percentile(W, bits=4, symmetric=True, share=share)
        want = np.quantile(
            W.abs().numpy(), share, axis=1, method="inverted_cdf"
        )
        top = torch.tensor(want)[:, None]
        assert torch.allclose(got.scale * 7, top)
        inside = (W.abs() <= top * (1 + 1e-6)).double().mean(1)
        assert torch.allclose(inside, torch.tensor(share, dtype=torch.double))

    def test_asymmetric_leaves_out_half_at_each_end(self):
        W = drawn(0, 4, 100)
        got = quantize.percentile(W, bits=8, share=0.9)
        ordered = W.sort(1).values
        want = quantize.min_max(ordered[:, 5:95], bits=8)
        assert torch.equal(got.scale, want.scale)
        assert torch.equal(got.zero.values, want.zero.values)
        outside = W.lt(ordered[:, 5:6]) | W.gt(ordered[:, 94:95])
        assert (outside.sum(1) == 10).all()

    def test_one_outlier_costs_all_others_their_grid(self):
        W = drawn(0, 1, 1000)
        W[0, 0] = 100
        rest = W[:, 1:]
        for symmetric in (True, False):
            how = {"bits": 4, "symmetric": symmetric}
            clipped = quantize.percentile(W, **how, share=0.998)
            plain = quantize.min_max(W, **how)
            error = (clipped.decode() - W)[:, 1:].square().sum()
            assert error < 0.1 * (plain.decode() - W)[:, 1:].square().sum()
            assert (plain.decode()[:, 1:] == 0).double().mean() > 0.99
            assert clipped.decode().max() < 2 * rest.abs().max()

    @pytest.mark.parametrize("share", [0, -0.1, 1.1])
    def test_bad_share(self, share):
        with pytest.raises(ValueError, match="share"):
            quantize.percentile(drawn(0), bits=4, share=share)


class TestMSE:
    @given(seed=st.integers(0, 999), bits=WIDTHS, each=EACH, s=st.booleans())
    @settings(max_examples=40, deadline=None)
    def test_never_worse_than_min_max(self, seed, bits, each, s):
        W, how = drawn(seed), {"bits": bits, "each": each, "symmetric": s}
        best = quantize.mse(W, **how)
        assert squared(W, best) <= squared(W, quantize.min_max(W, **how)) * (
            1 + 1e-5
        )
        zero = parts(best).zero
        if not s:
            assert isinstance(zero, codes.Ints)  # a whole number
        # with the grid as it is, no integer is better
        again = quantize.nearest(W, best)
        assert torch.equal(parts(again).q.values, parts(best).q.values)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_not_worse_than_other_rules(self, symmetric):
        W = torch.cat([drawn(0, 4, 500), drawn(1, 4, 500) ** 3])
        how = {"bits": 4, "symmetric": symmetric}
        best = squared(W, quantize.mse(W, **how))
        for share in (0.9, 0.99, 0.999):
            other = quantize.percentile(W, **how, share=share)
            assert best < squared(W, other)
        assert best < squared(W, quantize.kl(W, **how))

    def test_close_to_the_best_of_all_steps_and_zeros(self):
        W = drawn(0, 40, 64)
        best = torch.full((40,), torch.inf)
        low, high = W.amin(1), W.amax(1)
        for zero in range(16):
            for part in torch.linspace(0.3, 1.1, 161):
                s = (part * (high - low) / 15)[:, None]
                q = ((W / s).round() + zero).clamp(0, 15)
                error = (s * (q - zero) - W).square().sum(1)
                best = torch.minimum(best, error)
        found = squared(W, quantize.mse(W, bits=4))
        assert found < 1.03 * float(best.sum())
        assert found < 0.95 * squared(W, quantize.min_max(W, bits=4))

    @pytest.mark.parametrize(
        ("bits", "step", "error"),
        [
            (2, 1.22401, 0.190174),
            (3, 0.65077, 0.046860),
            (4, 0.35341, 0.012889),
            (5, 0.19325, 0.003693),
        ],
    )
    def test_the_normal_distribution(self, bits, step, error):
        n = 200_001
        share = (torch.arange(n, dtype=torch.float64) + 0.5) / n
        W = torch.special.ndtri(share)
        code = quantize.mse(
            W,
            bits=bits,
            each="tensor",
            symmetric=True,
            shrink=tuple(torch.linspace(0.1, 1, 20).tolist()),
            steps=200,
        )
        assert float(code.scale) == pytest.approx(step, rel=2e-3)
        assert squared(W, code) / n == pytest.approx(error, rel=2e-3)

    def test_turns_help(self):
        W = drawn(0, 64, 64)
        how = {"bits": 4, "shrink": (1.0,)}
        errors = [squared(W, quantize.mse(W, steps=n, **how)) for n in range(5)]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] == pytest.approx(
            squared(W, quantize.min_max(W, bits=4))
        )
        assert errors[4] < 0.95 * errors[0]

    @pytest.mark.parametrize("how", [{"shrink": ()}, {"shrink": (0.0,)}])
    def test_bad_search(self, how):
        with pytest.raises(ValueError, match="shrink"):
            quantize.mse(drawn(0), bits=4, **how)
        with pytest.raises(ValueError, match="steps"):
            quantize.mse(drawn(0), bits=4, steps=-1)


class TestEntropy:
    def test_few_distinct_numbers_keep_their_range(self):
        g = torch.Generator().manual_seed(0)
        W = torch.randint(-64, 65, (5000,), generator=g) * 0.1
        W[0] = 6.4
        how = {"bits": 8, "each": "tensor", "symmetric": True}
        got = quantize.kl(W, **how)
        assert torch.equal(got.scale, quantize.min_max(W, **how).scale)

    @pytest.mark.parametrize("bits", [4, 6])
    def test_by_hand(self, bits):
        W, bins, levels = drawn(0, 2000), 100, 2 ** (bits - 1)
        x = W.abs().double().numpy()
        h, edges = np.histogram(x, bins, (0, x.max()))
        found = {}
        for i in range(levels, bins + 1):
            P = h[:i].astype(float)
            Q = np.zeros(i)
            level = np.arange(i) * levels // i
            for k in range(levels):
                used = (level == k) & (h[:i] > 0)
                if used.any():
                    Q[used] = h[:i][level == k].sum() / used.sum()
            P[-1] += h[i:].sum()
            with np.errstate(divide="ignore"):
                found[i] = rel_entr(P / P.sum(), Q / Q.sum()).sum()
        i = min(found, key=found.get)
        end = min((i + 0.5) * edges[1], x.max())
        got = quantize.kl(
            W, bits=bits, each="tensor", symmetric=True, bins=bins
        )
        assert float(got.scale) * (levels - 1) == pytest.approx(end, rel=1e-5)

    def test_cuts_a_long_tail_but_not_the_whole(self):
        W = drawn(0, 20_000)
        W[:3] = 50
        got = quantize.kl(W, bits=4, each="tensor", symmetric=True)
        assert 2 < float(got.scale * 7) < 5

    def test_follows_the_unit(self):
        W = drawn(0, 3, 500)
        a = quantize.kl(W, bits=4, bins=256)
        b = quantize.kl(8 * W, bits=4, bins=256)
        assert torch.equal(b.scale, 8 * a.scale)
        assert torch.equal(b.q.values, a.q.values)

    def test_asymmetric_covers_only_where_numbers_are(self):
        W = drawn(0, 5000).abs()
        got = quantize.kl(W, bits=4, each="tensor")
        assert int(got.zero.values) == 0
        assert float(got.scale * 15) <= float(W.max()) * (1 + 1e-6)

    def test_bad_bins(self):
        with pytest.raises(ValueError, match="bins"):
            quantize.kl(drawn(0), bits=8, bins=128)


class TestClip:
    GAUSS = (1.711, 2.152, 2.559, 2.936, 3.287, 3.615, 3.924)
    LAPLACE = (2.831, 3.897, 5.029, 6.205, 7.413, 8.646, 9.897)

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_the_paper(self, bits):
        gauss = quantize.aciq_clip(1.0, bits=bits)
        laplace = quantize.aciq_clip(1.0, bits=bits, shape="laplace")
        assert gauss == pytest.approx(self.GAUSS[bits - 2], abs=5e-4)
        assert laplace == pytest.approx(self.LAPLACE[bits - 2], abs=5e-4)
        # the root of c e^c = 3 4^b, by scipy
        assert laplace == pytest.approx(lambertw(3 * 4**bits).real)
        assert quantize.aciq_clip(2.5, bits=bits) == pytest.approx(2.5 * gauss)

    def test_is_the_minimum_of_the_error(self):
        def error(c):
            inside = c * c / (3 * 4**4)
            return (
                inside
                + 2 * quad(lambda x: (x - c) ** 2 * norm.pdf(x), c, 12)[0]
            )

        best = minimize_scalar(error, bounds=(1, 5), method="bounded").x
        assert quantize.aciq_clip(1.0, bits=4) == pytest.approx(best, rel=1e-4)

    @pytest.mark.parametrize("shape", ["gauss", "laplace"])
    def test_close_to_the_best_clip_of_a_million_numbers(self, shape):
        g = torch.Generator().manual_seed(0)
        x = torch.randn(1_000_000, generator=g)
        if shape == "laplace":
            u = torch.rand(1_000_000, generator=g) - 0.5
            x = -u.sign() * torch.log1p(-2 * u.abs())
        clip = quantize.aciq_clip(1.0, bits=6, shape=shape)

        def error(c):
            step = 2 * c / 2**6  # 2^b cells, a level in the middle of each
            q = ((x.clamp(-c, c) / step).floor() + 0.5).clamp(-31.5, 31.5)
            return float((q * step - x).square().mean())

        tries = torch.linspace(0.8, 1.2, 21) * clip
        best = min(tries.tolist(), key=error)
        assert clip == pytest.approx(best, rel=0.03)
        assert error(clip) < 1.005 * error(best)

    @pytest.mark.parametrize(
        ("kwargs", "word"),
        [
            ({"spread": 0.0, "bits": 4}, "spread"),
            ({"spread": math.inf, "bits": 4}, "spread"),
            ({"spread": 1.0, "bits": 0}, "bits"),
            ({"spread": 1.0, "bits": 4, "shape": "cauchy"}, "shape"),
        ],
    )
    def test_bad_arguments(self, kwargs, word):
        with pytest.raises(ValueError, match=word):
            quantize.aciq_clip(**kwargs)


@pytest.mark.parametrize(
    "rule", [quantize.min_max, quantize.percentile, quantize.mse, quantize.kl]
)
class TestEveryRule:
    @pytest.mark.parametrize("each", ["tensor", "row", 5])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_one_shape_of_code(self, rule, each, symmetric):
        W = drawn(0, 4, 3, 13)
        kept = W.clone()
        code = rule(W, bits=3, each=each, symmetric=symmetric)
        same = quantize.min_max(W, bits=3, each=each, symmetric=symmetric)
        assert repr(code) == repr(same)
        assert code.shape == code.decode().shape == W.shape
        assert torch.equal(W, kept)

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_zeros_and_constants(self, rule, symmetric):
        for value in (0.0, 2.5, -2.5):
            W = torch.full((2, 6), value)
            code = rule(W, bits=4, each=4, symmetric=symmetric)
            assert torch.allclose(code.decode(), W)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_types(self, rule, dtype):
        W = drawn(0, 2, 5000).to(dtype)
        code = rule(W, bits=6)
        assert code.scale.dtype == dtype
        error = (code.decode() - W).square().mean()
        assert error < 0.1 * code.scale.square().max() + 0.002

    def test_chunks_are_seamless(self, rule, monkeypatch):
        W = drawn(0, 30, 20)
        whole = rule(W, bits=4)
        monkeypatch.setattr("minicompress.quantize.grids.CHUNK", 7 * 20)
        parts = rule(W, bits=4)  # seven rows at a time
        assert torch.equal(parts.q.values, whole.q.values)
        assert torch.equal(parts.scale, whole.scale)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_bad_weights(self, rule, value):
        W = drawn(0)
        W[2, 3] = value
        with pytest.raises(ValueError, match=r"W \(5, 12\) must be finite"):
            rule(W, bits=4)
        with pytest.raises(ValueError, match="W must be"):
            rule(torch.ones(2, 3).int(), bits=4)
        with pytest.raises(ValueError, match="W must be"):
            rule(torch.ones(0, 3), bits=4)


class TestAllRules:
    def test_mse_has_the_least_error_on_a_long_tail(self):
        """One side short, the other long: the outputs of a GELU."""
        x = torch.nn.functional.gelu(2 * drawn(5, 1 << 14).pow(3))
        for bits in (3, 4, 6, 8):
            one = {"bits": bits, "each": "tensor"}

            def error(code):
                return float((x - code.decode()).square().mean())

            others = [
                quantize.min_max(x, **one),
                quantize.kl(x, **one),
                *(
                    quantize.percentile(x, share=s, **one)
                    for s in (0.9999, 0.999, 0.99, 0.98, 0.96)
                ),
            ]
            least = min(map(error, others))
            assert error(quantize.mse(x, **one)) <= 1.001 * least, bits
