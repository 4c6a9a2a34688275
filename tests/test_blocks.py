"""Microscaling against the definition, torch's float8 and exact bytes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import quantize, storage
from minicompress.quantize import E2M1, E2M3, E3M2, E4M3, E5M2, every_number

FORMATS = [E2M1, E2M3, E3M2, E4M3, E5M2]


def drawn(seed, *size):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*(size or (4, 96)), generator=g)


def blocks_of(x, size):
    pad = torch.nn.functional.pad(x, (0, -x.shape[-1] % size))
    return pad.reshape(-1, size)


class TestMicroscaling:
    @pytest.mark.parametrize("fmt", FORMATS)
    def test_block_by_block(self, fmt):
        W = drawn(0) * 10
        got = quantize.microscaling(W, fmt).decode()
        numbers = every_number(fmt).float()
        for w, q in zip(blocks_of(W, 32), blocks_of(got, 32), strict=True):
            exponent = math.floor(math.log2(float(w.abs().max())))
            scale = 2.0 ** (exponent - math.floor(math.log2(fmt.largest)))
            assert torch.isin(q / scale, numbers).all()
            nearest = (w[:, None] / scale - numbers).abs().amin(1) * scale
            torch.testing.assert_close((q - w).abs(), nearest)

    @pytest.mark.parametrize(
        ("fmt", "dtype"),
        [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)],
    )
    def test_eight_bits_are_those_of_torch(self, fmt, dtype):
        W = drawn(0, 1, 32)
        W /= W.abs().max() / 0.9  # largest 0.9: the scale is 2^-1 / 2^top
        got = quantize.microscaling(W, fmt).decode()
        scale = 2.0 ** (-1 - math.floor(math.log2(fmt.largest)))
        want = (W / scale).clamp(-fmt.largest, fmt.largest).to(dtype)
        assert torch.equal(got, want.float() * scale)

    def test_what_is_too_large_becomes_the_largest(self):
        W = torch.tensor([[7.9, 6.9, 4.9, 0.1]])
        assert quantize.mxfp4(W).decode().tolist() == [[6, 6, 4, 0]]

    @given(
        seed=st.integers(0, 999),
        power=st.integers(-20, 20),
        fmt=st.sampled_from(FORMATS),
    )
    @settings(max_examples=40, deadline=None)
    def test_powers_of_two_pass_through(self, seed, power, fmt):
        W = drawn(seed)
        a = quantize.microscaling(W, fmt).decode()
        b = quantize.microscaling(W * 2.0**power, fmt).decode()
        assert torch.equal(b, a * 2.0**power)
        assert torch.equal(quantize.microscaling(-W, fmt).decode(), -a)
        again = quantize.microscaling(a, fmt).decode()
        assert torch.equal(again, a)

    def test_a_block_does_not_see_another(self):
        W = drawn(0)
        loud = torch.cat([W, 1e6 * W], 1)
        got = quantize.mxfp4(loud).decode()
        assert torch.equal(got[:, :96], quantize.mxfp4(W).decode())

    @pytest.mark.parametrize(
        ("fmt", "bits"), [(E2M1, 4.25), (E2M3, 6.25), (E4M3, 8.25)]
    )
    def test_bytes(self, fmt, bits):
        W = drawn(0, 256, 256)
        code = quantize.microscaling(W, fmt)
        numbers = len(code.x.x.centroids) + len(code.x.by.centroids)
        exact = W.numel() * bits / 8
        assert storage.payload(code) == exact + 4 * numbers
        assert len(code.x.by.centroids) < 8

    @pytest.mark.parametrize("n", [1, 31, 33])
    def test_ragged_rows(self, n):
        W = drawn(0, 3, n)
        code = quantize.mxfp4(W)
        padded = torch.nn.functional.pad(W, (0, 64 - n))
        want = quantize.mxfp4(padded).decode()[:, :n]
        assert torch.equal(code.decode(), want)

    def test_extremes(self):
        for W in (
            torch.zeros(2, 32),
            torch.full((1, 32), 3e38),
            torch.full((1, 32), 1e-37),
            torch.full((1, 32), 1e-45),
        ):
            got = quantize.mxfp4(W).decode()
            assert got.isfinite().all()
            assert ((got - W).abs() <= W.abs() / 4 + 2.0**-126).all()


class TestNVFP4:
    def test_block_by_block(self):
        W = drawn(0) * 3
        code = quantize.nvfp4(W)
        whole = float(W.abs().max() / 6 / 448)
        assert float(code.x.by.by) == pytest.approx(whole)
        numbers = every_number(E2M1).float()
        scales = code.x.by.decode().flatten()
        pairs = zip(
            blocks_of(W, 16), blocks_of(code.decode(), 16), scales, strict=True
        )
        for w, q, s in pairs:
            want = torch.tensor(float(w.abs().max() / 6) / whole)
            # torch's own float8: the scale is a number of E4M3
            assert float(s) == pytest.approx(
                whole * float(want.to(torch.float8_e4m3fn)), rel=1e-5
            )
            nearest = (w[:, None] / s - numbers).abs().amin(1) * s
            torch.testing.assert_close(
                (q - w).abs(), nearest, atol=1e-6, rtol=1e-5
            )

    def test_bytes(self):
        W = drawn(0, 256, 256)
        code = quantize.nvfp4(W)
        numbers = len(code.x.x.centroids) + len(code.x.by.x.centroids)
        exact = W.numel() * 4.5 / 8
        assert storage.payload(code) == exact + 4 * numbers + 4
        assert numbers < 64
        model = torch.nn.Linear(256, 256, bias=False)
        data = storage.dumps(model, {"weight": code})
        again = storage.loads(data, like=model)
        assert torch.equal(again.weight, code.decode())

    def test_what_finer_scales_are_worth(self):
        W = drawn(0, 64, 256)

        def error(code):
            return float((code.decode() - W).square().mean())

        mx, nv = error(quantize.mxfp4(W)), error(quantize.nvfp4(W))
        large = error(quantize.nvfp4(W, block=32))
        small = error(quantize.microscaling(W, E2M1, block=16))
        # a smaller block alone is not what helps
        assert nv < large < min(small, mx)
        assert nv < 0.75 * min(small, mx)

    def test_zeros_and_a_block_too_small_for_its_scale(self):
        assert (quantize.nvfp4(torch.zeros(2, 16)).decode() == 0).all()
        W = torch.cat([torch.full((1, 16), 1e6), torch.full((1, 16), 1e-6)], 1)
        got = quantize.nvfp4(W).decode()
        torch.testing.assert_close(got[:, :16], W[:, :16])
        assert (got[:, 16:] == 0).all()


@pytest.mark.parametrize("f", [quantize.mxfp4, quantize.nvfp4])
class TestBoth:
    def test_shapes_types_and_input(self, f):
        W = drawn(0, 3, 2, 40)
        kept = W.clone()
        code = f(W)
        assert code.shape == code.decode().shape == W.shape
        assert torch.equal(W, kept)
        half = W.bfloat16()
        assert torch.equal(f(half).decode(), f(half.float()).decode())

    def test_bad_arguments(self, f):
        with pytest.raises(ValueError, match="W must be"):
            f(torch.tensor([1.0, torch.nan]))
        with pytest.raises(ValueError, match="W must be"):
            f(torch.ones(4).int())


def test_bad_formats_and_blocks():
    with pytest.raises(ValueError, match="at most 8 bits"):
        quantize.microscaling(drawn(0), quantize.FLOAT16)
    with pytest.raises(ValueError, match="block"):
        quantize.nvfp4(drawn(0), block=0)
