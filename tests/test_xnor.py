"""Products of packed signs against products of signs."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import quantize
from minicompress.quantize import xnor


def drawn(seed, *size):
    """Draw small whole numbers: many are 0, whose sign is 1."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, size, generator=g).float()


def signs(x):
    return torch.where(x >= 0, 1.0, -1.0)


def unpacked(words, k):
    """Read bit i of word w of vector j: the sign of x[j, 64 w + i]."""
    shifts = torch.arange(64)
    bits = words[:, None, :] >> shifts[:, None] & 1  # (words, 64, n)
    return 2.0 * bits.flatten(0, 1)[:k].T - 1


class TestPack:
    @given(st.integers(0, 99), st.integers(0, 5), st.integers(1, 200))
    @settings(max_examples=40, deadline=None)
    def test_every_sign_is_there(self, seed, n, k):
        x = drawn(seed, n, k)
        words = quantize.pack_signs(x)
        assert words.dtype == torch.int64
        assert words.shape == (-(-k // 64), n)
        assert torch.equal(unpacked(words, k), signs(x))

    def test_what_a_word_does_not_need_is_zero(self):
        words = quantize.pack_signs(torch.ones(2, 67))
        assert torch.equal(words, torch.tensor([[-1, -1], [7, 7]]))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_types(self, dtype):
        x = drawn(0, 3, 70)
        words = quantize.pack_signs(x.to(dtype))
        assert torch.equal(words, quantize.pack_signs(x))

    def test_a_32nd_of_the_bytes(self):
        x = torch.zeros(128, 256)
        assert quantize.pack_signs(x).nbytes * 32 == x.nbytes

    def test_errors(self):
        for bad in (torch.zeros(3), torch.zeros(3, 0)):
            with pytest.raises(ValueError, match="x must be"):
                quantize.pack_signs(bad)


class TestMatmul:
    @given(
        st.integers(0, 99),
        st.integers(0, 9),
        st.integers(0, 9),
        st.integers(1, 200),
    )
    @settings(max_examples=60, deadline=None)
    def test_equals_the_product_of_signs(self, seed, m, n, k):
        A, B = drawn(seed, m, k), drawn(seed + 1, n, k)
        a, b = quantize.pack_signs(A), quantize.pack_signs(B)
        got = quantize.xnor_matmul(a, b, k=k)
        assert got.dtype == torch.int32
        assert torch.equal(got.float(), signs(A) @ signs(B).T)

    @pytest.mark.parametrize("cache", [1, 50, 128, 10**6])
    def test_chunks_are_seamless(self, monkeypatch, cache):
        A, B = drawn(0, 37, 130), drawn(1, 50, 130)
        a, b = quantize.pack_signs(A), quantize.pack_signs(B)
        monkeypatch.setattr(xnor, "CACHE", cache)
        got = quantize.xnor_matmul(a, b, k=130)
        assert torch.equal(got.float(), signs(A) @ signs(B).T)

    def test_more_signs_than_sixteen_bits_count(self):
        k = 70_000
        a = quantize.pack_signs(torch.ones(1, k))
        b = quantize.pack_signs(-torch.ones(1, k))
        assert quantize.xnor_matmul(a, a, k=k).item() == k
        assert quantize.xnor_matmul(a, b, k=k).item() == -k

    def test_k_matters_and_the_padding_does_not(self):
        A = drawn(0, 4, 65)
        a = quantize.pack_signs(A)
        right = quantize.xnor_matmul(a, a, k=65)
        wrong = quantize.xnor_matmul(a, a, k=128)  # as if it were data
        assert torch.equal(wrong - right, torch.full((4, 4), 63).int())

    def test_a_binary_layer(self):
        """α sign(W) sign(x) from packed bits, with the α of the code."""
        W, x = drawn(0, 6, 100) + 0.5, drawn(1, 3, 100)
        code = quantize.binary(W)
        a, b = quantize.pack_signs(x), quantize.pack_signs(code.decode())
        got = quantize.xnor_matmul(a, b, k=100) * code.by.T
        want = signs(x) @ code.decode().T
        torch.testing.assert_close(got, want)

    def test_the_inputs_stay(self):
        a, b = (quantize.pack_signs(drawn(s, 5, 70)) for s in (0, 1))
        before = a.clone(), b.clone()
        quantize.xnor_matmul(a, b, k=70)
        assert torch.equal(a, before[0]) and torch.equal(b, before[1])

    def test_errors(self):
        a, b = (quantize.pack_signs(torch.ones(2, k)) for k in (64, 65))
        with pytest.raises(ValueError, match=r"a \(1, 2\) and b \(2, 2\)"):
            quantize.xnor_matmul(a, b, k=64)
        for k in (0, 65):
            with pytest.raises(ValueError, match=f"k={k}"):
                quantize.xnor_matmul(a, a, k=k)
        with pytest.raises(ValueError, match=r"b must be .*float32"):
            quantize.xnor_matmul(a, torch.ones(1, 2), k=64)


class TestConv:
    @given(
        st.integers(0, 99),
        st.sampled_from([1, 3, 63, 64, 65]),
        st.sampled_from([(1, 1), (3, 3), (2, 3)]),
        st.integers(1, 2),
        st.integers(0, 2),
    )
    @settings(max_examples=40, deadline=None)
    def test_equals_torch_with_zero_padding(
        self, seed, channels, size, stride, padding
    ):
        x, W = drawn(seed, 2, channels, 6, 5), drawn(seed, 4, channels, *size)
        got = quantize.xnor_conv2d(x, W, stride=stride, padding=padding)
        want = F.conv2d(signs(x), signs(W), stride=stride, padding=padding)
        assert got.dtype == torch.int32
        assert torch.equal(got.float(), want)

    def test_padding_by_a_sign_is_something_else(self):
        """What the border would add if nobody subtracted it."""
        x, W = drawn(0, 1, 8, 5, 5), drawn(1, 3, 8, 3, 3)
        one = F.conv2d(F.pad(signs(x), (1,) * 4, value=1.0), signs(W))
        got = quantize.xnor_conv2d(x, W, padding=1).float()
        inner = (..., slice(1, -1), slice(1, -1))
        assert torch.equal(one[inner], got[inner])
        assert not torch.equal(one, got)

    def test_scale_is_a_box_filter_of_the_mean_size(self):
        x = drawn(0, 2, 5, 7, 6)
        box = torch.full((1, 1, 3, 3), 1 / 9)
        want = F.conv2d(x.abs().mean(1, True), box, stride=2, padding=1)
        got = quantize.xnor_scale(x, size=3, stride=2, padding=1)
        torch.testing.assert_close(got, want)

    def test_scales_bring_the_convolution_back(self):
        """Exact where all sizes in a window and in a kernel are equal."""
        x, W = (
            3 * signs(drawn(0, 1, 8, 5, 5)),
            0.5 * signs(drawn(1, 4, 8, 3, 3)),
        )
        alpha = W.abs().mean((1, 2, 3))[:, None, None]
        K = quantize.xnor_scale(x, size=3)
        got = quantize.xnor_conv2d(x, W) * K * alpha
        torch.testing.assert_close(got, F.conv2d(x, W))

    def test_errors(self):
        x, W = torch.ones(1, 2, 5, 5), torch.ones(4, 3, 3, 3)
        with pytest.raises(ValueError, match=r"\(1, 2, 5, 5\) and \(4, 3"):
            quantize.xnor_conv2d(x, W)
        with pytest.raises(ValueError, match="x must be"):
            quantize.xnor_conv2d(x[0], W)
