"""Uniform grids against torch's fake quantization, bounds and laws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
