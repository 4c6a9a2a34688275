"""Range asymmetric numeral systems, many states side by side."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import bits as packing
from ..codes import Code
from .statistics import counts
from .tables import (
    check_fields,
    constant,
    frequencies,
    frequency_table,
    is_bytes,
    output,
)

LOW = 1 << 16  # a state lies in [2^16, 2^32) between two symbols
LANES = 2048  # states side by side, at most
STEPS = 1 << 15  # symbols per lane, at most: bounds the time of a decoder


@dataclass(frozen=True, eq=False, repr=False)
class Rans(Code):
    """Integers coded by range asymmetric numeral systems.

    Made by `rans`.  A source with a single symbol has an empty stream.

    Parameters
    ----------
    stream : uint8 Tensor
        The state of every lane (32 bits), then the 16-bit words in the order
        in which the decoder reads them, all lowest byte first.
    table : uint8 Tensor
        The frequencies by symbol, rounded like floating-point numbers: see
        `frequencies`.
    lanes : int
        Value i belongs to lane ``i % lanes``.
    bits : int
        Width of the integers, 1 to 16.
    shape : tuple of int
        Shape of the decoded tensor.
    """

    stream: Tensor
    table: Tensor
    lanes: int
    bits: int
    shape: tuple[int, ...]

    def __post_init__(self):
        check_fields(self)
        n = math.prod(self.shape)
        least = min(LANES, -(-n // STEPS))
        if type(self.lanes) is not int or not least <= self.lanes <= LANES:
            raise ValueError(
                f"Rans: lanes must lie in {least} to {LANES} for {n} values, "
                f"got {self.lanes!r}"
            )
        if not is_bytes(self.table):
            raise ValueError(f"Rans: table must be bytes, got {self.table!r}")

    def decode(self):
        symbols, freq = frequencies(self.table, self.bits)
        if symbols.numel() < 2:
            return constant(self, symbols)
        n, total = math.prod(self.shape), int(freq.sum())
        data = self.stream.cpu().numpy()
        head = 4 * self.lanes
        if data.size < head or data.size % 2:
            raise ValueError(f"Rans: the stream has {data.size} bytes")
        # even the most frequent symbol adds to the states: half its
        # information is a safe lower bound for what it must have cost
        least = math.log2(total / int(freq.max())) / 2
        if n > 8 * data.size / least:
            raise ValueError(f"Rans: {n} values in {data.size} bytes")
        kind = packing.dtype(self.bits)
        symbol = symbols.to(kind).repeat_interleave(freq).numpy()
        states = data[:head].view("<u4").astype(np.int64)
        words = data[head:].view("<u2").astype(np.int64)
        if (states < LOW).any():
            raise ValueError("Rans: a state of the stream is below 2^16")
        values = _decode_lanes(states, words, symbol, freq.numpy(), n)
        return output(self, values)


def rans(ints: Code, *, lanes: int | None = None) -> Rans:
    """Code integers with interleaved rANS coders.

    Parameters
    ----------
    ints : Ints, or any code of integers
    lanes : int, optional
        States side by side.  Each costs 32 bits once; many of them make the
        vectorized loop short.  By default they cost about 0.5 % of the
        stream, and 1.5 % from a million values on, where speed counts.

    Returns
    -------
    Rans
        About ``n * H`` bits, however skewed the source: unlike a code word,
        a symbol may cost a fraction of a bit.

    References
    ----------
    J. Duda, "Asymmetric numeral systems", 2013, arXiv:1311.2540, section 2.
    F. Giesen, "Interleaved entropy coders", 2014, arXiv:1402.3392.

    Examples
    --------
    >>> from minicompress.codes import Ints
    >>> from minicompress.entropy import huffman
    >>> code = rans(Ints(torch.tensor([0] * 990 + [1] * 10), bits=1))
    >>> code.stream.numel(), len(huffman(code).stream)
    (14, 125)
    """
    flat = ints.decode().reshape(-1)
    c = counts(ints).cpu()
    symbols = c.nonzero().flatten()
    table = frequency_table(symbols, c[symbols])
    _, freq = frequencies(table, ints.bits)
    n, total = int(c.sum()), int(freq.sum())
    if lanes is None:
        cost = float((c[symbols] * (total / freq.double()).log2()).sum())
        share = 0.005 if n < 1 << 20 else 0.015
        lanes = min(LANES, max(int(share * cost / 32), -(-n // STEPS), 1))
    stream = np.zeros(0, np.uint8)
    if symbols.numel() > 1:
        full = np.zeros(c.numel(), np.int64)
        full[symbols] = freq.numpy()
        states, words = _encode_lanes(flat.cpu().numpy(), full, lanes)
        stream = np.concatenate(
            [states.astype("<u4").view(np.uint8), words.view(np.uint8)]
        )
    stream = torch.from_numpy(stream).to(flat.device)  # where it decodes to
    return Rans(stream, table, lanes, ints.bits, tuple(ints.shape))


def rans_slow(values: list[int], freq: list[int]) -> tuple[int, list[int]]:
    """Encode with one state, as Duda wrote it: (final state, words).

    A symbol that owns f of the 2^M slots takes log2(2^M / f) bits: the state
    x, one large number, becomes about ``x * 2^M / f``.  When it would leave
    [2^16, 2^32), its lowest 16 bits are moved out first.  The decoder works
    backwards, so the values are taken from the last to the first.

    Examples
    --------
    >>> rans_slow([0, 1, 0], freq=[3, 1])
    (466036, [])
    """
    total = sum(freq)
    x, words = LOW, []
    for s in reversed(values):
        f, start = freq[s], sum(freq[:s])
        if x >= (LOW << 16) // total * f:
            words.append(x & 0xFFFF)
            x >>= 16
        x = x // f * total + start + x % f
    return x, words[::-1]


def rans_undo(x: int, words: list[int], freq: list[int], n: int) -> list[int]:
    """Decode what `rans_slow` made.

    Examples
    --------
    >>> rans_undo(466036, [], freq=[3, 1], n=3)
    [0, 1, 0]
    """
    total, words, values = sum(freq), iter(words), []
    owner = [s for s, f in enumerate(freq) for _ in range(f)]  # of each slot
    for _ in range(n):
        slot = x % total
        s = owner[slot]
        values.append(s)
        x = freq[s] * (x // total) + slot - sum(freq[:s])
        if x < LOW:
            x = x << 16 | next(words)
    return values


def _encode_lanes(values, freq, lanes):
    """Run `rans_slow` on all lanes at once -> states (lanes,), words.

    The states are held as ``x + 1/2`` in float64, which is exact below 2^52
    and divides faster than integers: (x + 1/2) / f is never so close to a
    whole number that rounding could change its integer part.
    """
    total, n = int(freq.sum()), values.size
    # one more symbol, which owns every slot and so leaves a state as it is,
    # fills up the last step
    f = np.append(np.maximum(freq, 1), total).astype(np.float64)
    start = np.append(np.cumsum(freq) - freq, 0).astype(np.float64)
    limit, inverse, gap = (LOW << 16) // total * f, 1 / f, total - f
    steps = np.full((-(-n // lanes), lanes), freq.size, np.int32)
    steps.reshape(-1)[:n] = values
    x, words = np.full(lanes, LOW + 0.5), [np.zeros(0, "<u2")]
    for hi in range(len(steps), 0, -16):
        s = steps[max(hi - 16, 0) : hi][::-1].astype(np.intp)
        for most, q, g, b in zip(
            limit[s], inverse[s], gap[s], start[s], strict=True
        ):
            full = (x > most).nonzero()[0]
            out = x.take(full).astype(np.int64)
            words.append(out.astype("<u2"))  # the lowest 16 bits
            x[full] = (out >> 16) + 0.5
            # x // f * total + x % f + b = x + (x // f) * (total - f) + b
            q *= x
            np.floor(q, out=q)
            q *= g
            x += q
            x += b
    return x.astype(np.int64), np.concatenate(words[::-1])


def _decode_lanes(x, words, symbol, freq, n):
    """Run `rans_undo` on all lanes at once -> values (n,)."""
    total = int(freq.sum())
    shift, mask = total.bit_length() - 1, total - 1
    width = freq.repeat(freq)  # by slot: f, and the slot's place in its symbol
    place = np.arange(total) - (np.cumsum(freq) - freq).repeat(freq)
    values, lanes, at = np.empty(n, symbol.dtype), x.size, 0
    for lo in range(0, n, lanes):
        out = values[lo : lo + lanes]
        y = x[: out.size]
        slot = y & mask
        symbol.take(slot, out=out, mode="clip")
        y >>= shift
        y *= width.take(slot)
        y += place.take(slot)
        low = (y < LOW).nonzero()[0]
        if at + low.size > words.size:
            raise ValueError("Rans: the stream ends too early")
        y[low] = y[low] << 16 | words[at : at + low.size]
        at += low.size
    if at < words.size or (x != LOW).any():
        raise ValueError("Rans: the stream does not end where it began")
    return values
