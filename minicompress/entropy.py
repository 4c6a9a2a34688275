"""Entropy coding: frequent integers get fewer bits.  Huffman and rANS.

Both coders take integers of known width (`codes.Ints`) and return a code that
decodes to the same integers; everything the decoder needs lies in its fields.
They look at how often each integer occurs and at nothing else, so no file of
theirs can be shorter than `bound`.

References
----------
D. A. Huffman, "A method for the construction of minimum-redundancy codes",
Proc. IRE 40(9), 1952.  J. Duda, "Asymmetric numeral systems", 2013,
arXiv:1311.2540.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import bits as packing
from .codes import Code, Ints

LIMIT = 16  # bits of the longest code word: 2^16 symbols still fit
LOW = 1 << 16  # a rANS state lies in [2^16, 2^32) between two symbols
BLOCK = 1 << 14  # bytes that the Huffman decoder looks at together
LANES = 2048  # rANS states side by side, at most
STEPS = 1 << 15  # symbols per lane, at most: bounds the time of a decoder


def counts(ints: Code) -> Tensor:
    """Count how often each integer occurs.

    Parameters
    ----------
    ints : Ints, Huffman or Rans

    Returns
    -------
    int64 Tensor (2^bits,)

    Examples
    --------
    >>> counts(Ints(torch.tensor([0, 3, 3]), bits=2))
    tensor([1, 0, 0, 2])
    """
    flat = ints.decode().reshape(-1)
    return torch.bincount(flat, minlength=1 << ints.bits)


def entropy(counts: Tensor) -> float:
    """Compute the order-0 entropy H = -Σ p log2 p.

    Parameters
    ----------
    counts : Tensor (K,)
        Occurrences of each symbol; zeros are allowed.

    Returns
    -------
    float
        Bits per symbol; 0 for an empty source.

    References
    ----------
    C. E. Shannon, "A mathematical theory of communication", 1948.

    Examples
    --------
    >>> entropy(torch.tensor([2, 1, 1]))
    1.5
    """
    c = counts[counts > 0].double()
    p = c / c.sum()
    return float((p * -p.log2()).sum())


def bound(ints: Code) -> float:
    """Give the bits below which no order-0 coder can go on average.

    A sequence with these counts is one of n! / (c_1! ... c_K!) equally
    likely ones; naming it takes the base-2 logarithm of that number.

    Examples
    --------
    >>> round(bound(Ints(torch.tensor([0, 0, 1, 1]), bits=1)), 3)  # log2 6
    2.585
    """
    c = counts(ints).double()
    return float(torch.lgamma(c.sum() + 1) - torch.lgamma(c + 1).sum()) / (
        math.log(2)
    )


def code_lengths(counts: Tensor, *, limit: int = LIMIT) -> Tensor:
    """Find the lengths of the best prefix code for these counts.

    Merge the two rarest symbols until one is left; a symbol's length is the
    number of merges it took part in.  Ties go to the older entry, so the
    result is the same everywhere.

    Parameters
    ----------
    counts : integer Tensor (K,)
        Occurrences of each symbol.
    limit : int
        Longest code word allowed, in bits.

    Returns
    -------
    int64 Tensor (K,)
        Bits of each code word; 0 for symbols that do not occur.

    Raises
    ------
    ValueError
        If more than 2^limit symbols occur.

    Examples
    --------
    >>> code_lengths(torch.tensor([5, 2, 0, 1]))
    tensor([1, 2, 0, 2])
    """
    if counts.numel() and int(counts.min()) < 0:
        raise ValueError(f"counts must not be negative, got {counts.min()}")
    present = counts.nonzero().flatten()
    if len(present) > 1 << limit:
        raise ValueError(f"{len(present)} symbols need more than limit={limit}")
    heap = [(c, i) for i, c in enumerate(counts[present].tolist())]
    parent = [0] * (2 * len(heap))
    heapq.heapify(heap)
    node = len(heap)
    while len(heap) > 1:
        a, i = heapq.heappop(heap)
        b, j = heapq.heappop(heap)
        parent[i] = parent[j] = node
        heapq.heappush(heap, (a + b, node))
        node += 1
    depth = [0] * node
    for i in range(node - 2, -1, -1):  # from the root down
        depth[i] = depth[parent[i]] + 1
    found = torch.tensor(depth[: len(present)], dtype=torch.int64)
    if len(present) == 1:
        found[0] = 1
    if len(present) > 1 and int(found.max()) > limit:
        found = package_merge(counts[present], limit)
    lengths = torch.zeros(counts.numel(), dtype=torch.int64)
    lengths[present] = found
    return lengths


def package_merge(counts: Tensor, limit: int) -> Tensor:
    """Find the best prefix code whose words have at most `limit` bits.

    Every symbol may buy one bit at each of `limit` levels.  On the way down
    the cheapest pairs of a level are packed and offered at the next one;
    2K - 2 purchases at the last level make a complete code.

    Parameters
    ----------
    counts : integer Tensor (K,)
        Positive, 2 <= K <= 2^limit.
    limit : int

    Returns
    -------
    int64 Tensor (K,)

    References
    ----------
    L. L. Larmore, D. S. Hirschberg, "A fast algorithm for optimal
    length-limited Huffman codes", J. ACM 37(3), 1990.

    Examples
    --------
    >>> package_merge(torch.tensor([8, 4, 2, 1]), limit=2)
    tensor([2, 2, 2, 2])
    """
    order = np.argsort(counts.numpy(), kind="stable")
    leaves = counts.numpy()[order].astype(np.int64)
    packages, levels = leaves[:0], []
    for _ in range(limit):
        items = np.concatenate([leaves, packages])
        rank = np.argsort(items, kind="stable")
        levels.append(rank < leaves.size)  # which of the sorted are symbols
        items = items[rank][: items.size // 2 * 2]
        packages = items[0::2] + items[1::2]
    lengths = np.zeros(leaves.size, np.int64)
    take = 2 * leaves.size - 2
    for is_leaf in reversed(levels):
        bought = int(is_leaf[:take].sum())
        lengths[order[:bought]] += 1
        take = 2 * (take - bought)
    return torch.from_numpy(lengths)


def canonical(lengths: Tensor) -> Tensor:
    """Choose the code words: in order of length, then symbol, counting up.

    Parameters
    ----------
    lengths : int64 Tensor (K,)
        0 for symbols without a code word.

    Returns
    -------
    int64 Tensor (K,)
        The word of symbol s is the lowest ``lengths[s]`` bits of entry s.

    Raises
    ------
    ValueError
        If the lengths break Kraft's inequality Σ 2^-l <= 1.

    Examples
    --------
    >>> canonical(torch.tensor([1, 3, 2, 3]))  # 0, 110, 10, 111
    tensor([0, 6, 2, 7])
    """
    longest = max(int(lengths.max()), 0) if lengths.numel() else 0
    share = torch.where(lengths > 0, 1 << (longest - lengths), 0)
    if int(share.sum()) > 1 << longest:
        raise ValueError("lengths break Kraft's inequality: sum of 2^-l > 1")
    # a word of l bits covers 2^-l of the line from 0 to 1: lay them end to end
    order = lengths.argsort(stable=True)
    start = torch.empty_like(share)
    start[order] = share[order].cumsum(0) - share[order]
    return torch.where(lengths > 0, start >> (longest - lengths), 0)


@dataclass(frozen=True, eq=False, repr=False)
class Huffman(Code):
    """Integers as the concatenation of their Huffman code words.

    Made by `huffman`.  A source with a single symbol has an empty stream.

    Parameters
    ----------
    stream : uint8 Tensor
        The code words in order, first bit highest; the last byte is filled
        up with zeros.
    table : Ints of 5 bits
        The code lengths by symbol: l - 1 for a symbol of length l,
        16 + k for 2^k symbols without a code word.
    bits : int
        Width of the integers, 1 to 16.
    shape : tuple of int
        Shape of the decoded tensor.
    """

    stream: Tensor
    table: Ints
    bits: int
    shape: tuple[int, ...]

    def __post_init__(self):
        _check_fields(self)
        if not isinstance(self.table, Ints) or self.table.bits != 5:
            raise ValueError(f"Huffman: table must be 5-bit, got {self.table}")

    def lengths(self) -> Tensor:
        """Return the code lengths (2^bits,) that `table` describes."""
        symbols, values = _read_gaps(self.table.values, 16, self.bits)
        lengths = torch.zeros(1 << self.bits, dtype=torch.int64)
        lengths[symbols] = torch.from_numpy(values + 1)
        return lengths

    def decode(self):
        n, lengths = math.prod(self.shape), self.lengths()
        symbols = lengths.nonzero().flatten()
        stream = self.stream.cpu().numpy()
        if symbols.numel() < 2:
            return _constant(self, symbols)
        words = canonical(lengths)
        if int(((1 << LIMIT) >> lengths[symbols]).sum()) != 1 << LIMIT:
            raise ValueError("Huffman: the code lengths leave code words over")
        if not n <= 8 * stream.size <= n * LIMIT + 7:
            raise ValueError(f"Huffman: {n} words in {stream.size} bytes")
        # every 16-bit window begins with exactly one code word
        order = symbols[
            (words[symbols] << (LIMIT - lengths[symbols])).argsort()
        ]
        repeats = (1 << LIMIT) >> lengths[order]
        symbol = order.repeat_interleave(repeats).to(packing.dtype(self.bits))
        length = lengths[order].repeat_interleave(repeats)
        values = _decode_words(stream, symbol.numpy(), length.numpy(), n)
        return _output(self, values)


def huffman(ints: Code) -> Huffman:
    """Code integers with a Huffman code made for them.

    Parameters
    ----------
    ints : Ints, or any code of integers

    Returns
    -------
    Huffman
        ``H <= L < H + 1`` for L stream bits and H bits of entropy a symbol.

    Examples
    --------
    >>> huffman(Ints(torch.tensor([0, 0, 1, 0, 2, 0, 0, 3]), bits=2))
    Huffman(uint8[2], Ints(uint8[4], 5), 2, (8,))
    """
    lengths = code_lengths(counts(ints).cpu())
    symbols = lengths.nonzero().flatten().numpy()
    table = _write_gaps(symbols, lengths.numpy()[symbols] - 1, 16)
    flat = ints.decode().reshape(-1).cpu()
    stream = np.zeros(0, np.uint8)
    if symbols.size > 1:
        words = canonical(lengths).numpy()
        stream = _encode_words(flat.numpy(), words, lengths.numpy())
    return Huffman(
        torch.from_numpy(stream), Ints(table, 5), ints.bits, tuple(ints.shape)
    )


def huffman_slow(code: Huffman) -> list[int]:
    """Decode bit by bit, as Huffman described it: read until a word is met.

    The loop that `Huffman.decode` replaces; the tests compare the two.
    """
    lengths = code.lengths()
    words = canonical(lengths)
    book = {
        (int(lengths[s]), int(words[s])): s
        for s in lengths.nonzero().flatten().tolist()
    }
    values, length, word = [], 0, 0
    for byte in code.stream.tolist():
        for place in range(7, -1, -1):
            length, word = length + 1, word << 1 | byte >> place & 1
            if (length, word) in book:
                values.append(book[length, word])
                length = word = 0
    return values[: math.prod(code.shape)]


def _encode_words(values, words, lengths):
    """Concatenate the code words of `values` (n,) -> bytes."""
    parts, rest = [], np.zeros(0, np.uint8)
    for lo in range(0, values.size, 1 << 18):
        part = values[lo : lo + (1 << 18)]
        length, word = lengths[part], words[part]
        start = rest.size + np.cumsum(length) - length
        line = np.zeros(rest.size + int(length.sum()), np.uint8)  # a bit each
        line[: rest.size] = rest
        for j in range(int(length.max())):  # bit j of all words that have one
            has = (length > j).nonzero()[0]
            line[start[has] + j] = word[has] >> (length[has] - 1 - j) & 1
        whole = line.size // 8 * 8
        parts.append(np.packbits(line[:whole]))
        rest = line[whole:]
    return np.concatenate([*parts, np.packbits(rest)])


def _decode_words(stream, symbol, length, n):
    """Decode `n` values; `symbol` and `length` are looked up by window.

    A word must be read before the next one's position is known, which is a
    slow chain.  So look up the word at *every* bit position, compose the
    jumps "next word" four times to get "sixteen words on", walk along those,
    and fill in the fifteen words between for all of them together.
    """
    data = np.concatenate([stream, np.zeros(2, np.uint8)]).astype(np.int64)
    found, total, at = [], 0, 0  # at: position of the next word, in bits
    for lo in range(0, stream.size, BLOCK):
        m = min(BLOCK, stream.size - lo)
        three = data[lo : lo + m] << 16 | data[lo + 1 : lo + 1 + m] << 8
        three |= data[lo + 2 : lo + 2 + m]
        window = (three[:, None] >> np.arange(8, 0, -1) & 0xFFFF).reshape(-1)
        # positions beyond the block lead to themselves
        end = 8 * m
        step = np.arange(end + LIMIT)
        step[:end] += length[window]
        far = step
        for _ in range(4):
            far = far[far]
        view, p, starts = memoryview(far), at - 8 * lo, []
        while p < end:
            starts.append(p)
            p = view[p]
        at = 8 * lo + p
        table = np.empty((len(starts), 16), np.int64)
        table[:, 0] = starts
        for i in range(1, 16):
            table[:, i] = step[table[:, i - 1]]
        spots = table[table < end]
        found.append(symbol[window[spots]])
        total += spots.size
        if total >= n:
            at = 8 * lo + int(step[spots[n - 1 - (total - spots.size)]])
            break
    if total < n or (at + 7) // 8 != stream.size:
        raise ValueError(f"Huffman: the stream does not hold {n} code words")
    return np.concatenate([np.zeros(0, symbol.dtype), *found])[:n]


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
        _check_fields(self)
        n = math.prod(self.shape)
        least = min(LANES, -(-n // STEPS))
        if type(self.lanes) is not int or not least <= self.lanes <= LANES:
            raise ValueError(
                f"Rans: lanes must lie in {least} to {LANES} for {n} values, "
                f"got {self.lanes!r}"
            )
        if not _is_bytes(self.table):
            raise ValueError(f"Rans: table must be bytes, got {self.table!r}")

    def decode(self):
        symbols, freq = frequencies(self.table, self.bits)
        if symbols.numel() < 2:
            return _constant(self, symbols)
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
        return _output(self, values)


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
    >>> code = rans(Ints(torch.tensor([0] * 990 + [1] * 10), bits=1))
    >>> code.stream.numel(), len(huffman(code).stream)
    (14, 125)
    """
    c = counts(ints).cpu()
    symbols = c.nonzero().flatten()
    table = _frequency_table(symbols, c[symbols])
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
        flat = ints.decode().reshape(-1).cpu().numpy()
        states, words = _encode_lanes(flat, full, lanes)
        stream = np.concatenate(
            [states.astype("<u4").view(np.uint8), words.view(np.uint8)]
        )
    return Rans(
        torch.from_numpy(stream), table, lanes, ints.bits, tuple(ints.shape)
    )


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


def frequencies(table: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Read a frequency table: which symbols occur, and their slots.

    Byte 0 stands for one slot; byte ``1 + 8e + m`` for about
    ``1 + (1 + m/8) * 2^e`` slots, a floating-point number with three bits
    after the point, scaled so that all slots together are exactly 2^14 (2^16
    above 2^13 symbols); byte ``240 + k`` for 2^k symbols that do not occur.

    Parameters
    ----------
    table : uint8 Tensor (T,)
    bits : int
        Width of the integers.

    Returns
    -------
    (int64 Tensor (K,), int64 Tensor (K,))
        The symbols, ascending, and their positive frequencies.

    Raises
    ------
    ValueError
        If the table goes beyond symbol 2^bits - 1.
    """
    symbols, level = _read_gaps(table, 240, bits)
    k = symbols.size
    if k == 0:
        none = torch.zeros(0, dtype=torch.int64)
        return none, none
    spare = (1 << (14 if k <= 1 << 13 else 16)) - k
    e, m = np.divmod(np.maximum(level - 1, 0), 8)
    weight = np.where(level, 8 + m << e, 0)
    weight = weight if weight.any() else np.ones(k, np.int64)
    share, left = np.divmod(weight * spare, weight.sum())
    # the slots that rounding down left over go to the largest remainders
    more = np.argsort(-left, kind="stable")[: spare - int(share.sum())]
    share[more] += 1
    return torch.from_numpy(symbols), torch.from_numpy(share + 1)


def _frequency_table(symbols: Tensor, counts: Tensor) -> Tensor:
    """Write the table from which `frequencies` gets close to `counts`."""
    total = 1 << (14 if symbols.numel() <= 1 << 13 else 16)
    slots = counts.numpy() / max(int(counts.sum()), 1) * total - 1
    m, e = np.frexp(np.maximum(slots, 0))  # slots = m * 2^e, m in [1/2, 1)
    level = 1 + 8 * (e - 1) + np.rint(16 * m - 8).astype(np.int64)
    level = np.where(slots < 0.5, 0, np.maximum(level, 1))
    return _write_gaps(symbols.numpy(), level, 240)


def _write_gaps(symbols, values, first) -> Tensor:
    """List `values`; before each, the gap to its symbol as powers of two."""
    gaps = np.diff(symbols, prepend=-1) - 1
    powers = np.arange(16)
    tokens = np.empty((symbols.size, 17), np.int64)
    tokens[:, :16] = np.where(gaps[:, None] >> powers & 1, first + powers, -1)
    tokens[:, 16] = values
    return torch.from_numpy(tokens[tokens >= 0].astype(np.uint8))


def _read_gaps(table: Tensor, first: int, bits: int):
    """Undo `_write_gaps` -> symbols (K,), values (K,)."""
    tokens = table.cpu().numpy().astype(np.int64).reshape(-1)
    is_gap = tokens >= first
    steps = np.where(is_gap, 1 << np.maximum(tokens - first, 0), 1)
    ends = np.cumsum(steps)
    if ends.size and ends[-1] > 1 << bits:
        raise ValueError(f"table: {ends[-1]} symbols do not fit bits={bits}")
    return ends[~is_gap] - 1, tokens[~is_gap]


def _check_fields(code) -> None:
    name, shape = type(code).__name__, code.shape
    if type(code.bits) is not int or not 1 <= code.bits <= 16:
        raise ValueError(f"{name}: bits must be 1 to 16, got {code.bits!r}")
    if not isinstance(shape, tuple) or not all(
        type(n) is int and n >= 0 for n in shape
    ):
        raise ValueError(f"{name}: shape must be a tuple, got {shape!r}")
    if max(math.prod(shape), *shape, 0) >= 1 << 40:
        raise ValueError(f"{name}: shape {shape} is too large to be true")
    if not _is_bytes(code.stream):
        raise ValueError(f"{name}: stream must be bytes, got {code.stream!r}")


def _is_bytes(x) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.uint8 and x.dim() == 1


def _constant(code, symbols: Tensor) -> Tensor:
    """Decode a source of at most one symbol, whose stream is empty."""
    if code.stream.numel() or (math.prod(code.shape) and not symbols.numel()):
        raise ValueError(f"{type(code).__name__}: table and stream disagree")
    fill = int(symbols[0]) if symbols.numel() else 0
    return torch.full(code.shape, fill, dtype=packing.dtype(code.bits))


def _output(code, values) -> Tensor:
    return torch.from_numpy(values).to(code.stream.device).reshape(code.shape)
