"""The rounded cache: streaming, bytes, bounds and a language model."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import models, quantize, storage, train

LAYERS, HEADS, WIDTH = 2, 2, 16


def drawn(seed, *size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def small_lm():
    torch.manual_seed(0)
    return models.LM(
        vocab=11, width=WIDTH, layers=LAYERS, heads=HEADS, ff=32, context=24
    )


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


class TestGrids:
    @pytest.mark.parametrize("bits", [1, 2, 4, 8])
    def test_keys_by_loops(self, bits):
        K = drawn(0, 2, 12, 3)
        found = quantize.quantize_keys(K, bits=bits, group=4).decode()
        for n in range(2):
            for start in range(0, 12, 4):
                for channel in range(3):
                    x = K[n, start : start + 4, channel]
                    step = (x.max() - x.min()) / (2**bits - 1)
                    want = torch.round((x - x.min()) / step) * step + x.min()
                    y = found[n, start : start + 4, channel]
                    # scale and low are float16: 11 significant bits
                    slack = 2**-10 * x.abs().max()
                    flipped = (y - want).abs() > step / 2
                    assert ((y - want).abs() <= slack)[~flipped].all()
                    assert ((y - x).abs() <= step / 2 + slack).all()

    @given(
        seed=st.integers(0, 999),
        bits=st.integers(1, 8),
        group=st.sampled_from([None, 2, 4]),
    )
    @settings(max_examples=40, deadline=None)
    def test_values_are_within_half_a_step(self, seed, bits, group):
        V = drawn(seed, 3, 5, 8)
        found = quantize.quantize_values(V, bits=bits, group=group).decode()
        blocks = V.unflatten(-1, (-1, group or 8))
        low, high = blocks.aminmax(dim=-1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        error = (found - V).unflatten(-1, (-1, group or 8)).abs()
        slack = 2**-10 * blocks.abs().amax(-1, keepdim=True)
        assert (error <= step / 2 + slack).all()

    def test_the_axis_matters(self):
        K = drawn(0, 64, 16)
        K[:, 3] += 50  # one channel that is large for all tokens
        by_channel = quantize.quantize_keys(K, bits=2, group=32).decode()
        by_token = quantize.quantize_values(K, bits=2).decode()
        rest = [c for c in range(16) if c != 3]
        assert relative(by_channel[:, rest], K[:, rest]) < 0.5
        assert relative(by_token[:, rest], K[:, rest]) > 0.9
        # and the other way round: one large token
        V = drawn(1, 64, 16)
        V[5] *= 50
        others = [t for t in range(32) if t != 5]
        by_channel = quantize.quantize_keys(V, bits=2, group=32).decode()
        by_token = quantize.quantize_values(V, bits=2).decode()
        assert relative(by_token[others], V[others]) < 0.5
        assert relative(by_channel[others], V[others]) > 0.9

    @pytest.mark.parametrize("bits", [2, 4])
    def test_bytes(self, bits):
        n = 2 * HEADS * 64 * 32
        K = drawn(0, 2, HEADS, 64, 32)
        keys = quantize.quantize_keys(K, bits=bits, group=32)
        values = quantize.quantize_values(K, bits=bits)
        assert storage.payload(keys) == n * (bits + 32 / 32) / 8
        assert storage.payload(values) == n * (bits + 32 / 32) / 8

    def test_a_constant_and_bfloat16(self):
        K = torch.full((4, 2), 3.0)
        assert torch.equal(
            quantize.quantize_keys(K, bits=2, group=4).decode(), K
        )
        V = drawn(0, 4, 8).bfloat16()
        found = quantize.quantize_values(V, bits=8).decode()
        assert relative(found, V.float()) < 0.01

    def test_errors(self):
        f = quantize.quantize_keys
        with pytest.raises(ValueError, match=r"K \(5, 2\), got 4"):
            f(torch.ones(5, 2), bits=2, group=4)
        with pytest.raises(ValueError, match="bits must be 1 to 8, got 9"):
            f(torch.ones(4, 2), bits=9, group=4)
        with pytest.raises(ValueError, match=r"K \(1, 4, 2\) must be finite"):
            f(torch.full((4, 2), 1e6), bits=2, group=4)
        with pytest.raises(ValueError, match=r"V \(4, 6\), got 4"):
            quantize.quantize_values(torch.ones(4, 6), bits=2, group=4)


class TestCache:
    @given(
        cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
        window=st.integers(0, 7),
        group=st.integers(1, 5),
    )
    @settings(max_examples=40, deadline=None)
    def test_streaming_is_batch(self, cuts, window, group):
        K, V = drawn(0, 2, sum(cuts), 4), drawn(1, 2, sum(cuts), 4)
        start = quantize.Cache(bits=3, group=group, window=window)
        stream = start
        for k, v in zip(K.split(cuts, 1), V.split(cuts, 1), strict=True):
            stream = stream.append(k, v)
        batch = start.append(K, V)
        for a, b in zip(stream.decode(), batch.decode(), strict=True):
            assert torch.equal(a, b)
        # and both are the functions on whole groups, then what is left
        n = max(0, (sum(cuts) - window) // group) * group
        assert len(batch) == len(stream) == sum(cuts)
        assert torch.equal(batch.recent[0], K[:, n:])
        if n:
            old = quantize.quantize_keys(K[:, :n], bits=3, group=group)
            assert torch.equal(batch.decode()[0][:, :n], old.decode())
            old = quantize.quantize_values(V[:, :n], bits=3)
            assert torch.equal(batch.decode()[1][:, :n], old.decode())

    def test_old_groups_are_never_touched(self):
        cache, codes = quantize.Cache(bits=2, group=4, window=2), []
        for token in drawn(0, 40, 1, 8):
            before = cache
            cache = cache.append(token, token)
            assert cache.keys[: len(codes)] == tuple(codes)
            codes = list(cache.keys)
            assert len(before) == len(cache) - 1
        assert len(codes) == 9

    def test_bytes_follow_the_formula(self):
        bits, g, window, d, n = 2, 32, 32, 32, 32 * 5 + 7
        K = drawn(0, 2, 4, n, d)
        cache = quantize.Cache(bits=bits, group=g, window=window).append(K, K)
        old = (n - window) // g * g
        a = 2 * 4 * 2  # batch, heads, keys and values
        want = a * d * (old * (bits + 32 / g) / 8 + (n - old) * 4)
        assert cache.payload() == want

    def test_errors(self):
        with pytest.raises(ValueError, match="bits must be 1 to 8"):
            quantize.Cache(bits=0)
        with pytest.raises(ValueError, match="got 0 and 3"):
            quantize.Cache(bits=2, group=0, window=3)
        with pytest.raises(ValueError, match="cache is empty"):
            quantize.Cache(bits=2).decode()
        full = quantize.Cache(bits=2).append(torch.ones(1, 2), torch.ones(1, 2))
        with pytest.raises(ValueError, match="must be empty, it holds 1"):
            quantize.CachedLM(small_lm(), full)


@given(seed=st.integers(0, 999), size=st.floats(0.001, 10))
@settings(max_examples=60, deadline=None)
def test_attention_moves_no_more_than_the_largest_error(seed, size):
    a = 3 * drawn(seed, 20).double()
    b = a + size * drawn(seed + 1, 20).double()
    moved = (a.softmax(0) - b.softmax(0)).abs().sum()
    assert moved <= (a - b).abs().max() + 1e-12


class TestLanguageModel:
    def ids(self, n=20):
        g = torch.Generator().manual_seed(0)
        return torch.randint(0, 11, (3, n), generator=g)

    def test_unrounded_it_is_the_plain_forward(self):
        model, ids = small_lm(), self.ids()
        exact = quantize.CachedLM(model, quantize.Cache(bits=2, window=24))
        assert torch.allclose(exact(ids), model(ids), atol=1e-5)

    def test_more_bits_are_closer(self):
        model, ids = small_lm(), self.ids()
        make = partial(quantize.Cache, group=4, window=4)
        errors = [
            relative(quantize.CachedLM(model, make(bits=b))(ids), model(ids))
            for b in (1, 2, 4, 8)
        ]
        assert errors == sorted(errors, reverse=True)
        assert errors[0] > 1e-3
        assert errors[-1] < 0.1 * errors[0]

    def test_the_first_tokens_do_not_change(self):
        model, ids = small_lm(), self.ids()
        cache = quantize.Cache(bits=1, group=4, window=4)
        y, want = quantize.CachedLM(model, cache)(ids), model(ids)
        assert torch.allclose(y[:, :7], want[:, :7], atol=1e-5)
        assert not torch.allclose(y[:, 8:], want[:, 8:], atol=1e-3)

    def test_bits_per_character(self):
        model, ids = small_lm().eval(), self.ids(60).flatten()
        cached = quantize.CachedLM(model, quantize.Cache(bits=2, window=24))
        a = train.bits_per_char(cached, ids)
        b = train.bits_per_char(model, ids)
        assert math.isclose(a, b, rel_tol=1e-5)
