"""Huffman coding: code words one after another, and back."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import bits as packing
from ..codes import Code, Ints
from .prefix import LIMIT, canonical, code_lengths
from .statistics import counts
from .tables import check_fields, constant, output, read_gaps, write_gaps

BLOCK = 1 << 14  # bytes that the decoder looks at together


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
        check_fields(self)
        if not isinstance(self.table, Ints) or self.table.bits != 5:
            raise ValueError(f"Huffman: table must be 5-bit, got {self.table}")

    def lengths(self) -> Tensor:
        """Return the code lengths (2^bits,) that `table` describes."""
        symbols, values = read_gaps(self.table.values, 16, self.bits)
        lengths = torch.zeros(1 << self.bits, dtype=torch.int64)
        lengths[symbols] = torch.from_numpy(values + 1)
        return lengths

    def decode(self):
        n, lengths = math.prod(self.shape), self.lengths()
        symbols = lengths.nonzero().flatten()
        stream = self.stream.cpu().numpy()
        if symbols.numel() < 2:
            return constant(self, symbols)
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
        return output(self, values)


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
    table = write_gaps(symbols, lengths.numpy()[symbols] - 1, 16)
    flat = ints.decode().reshape(-1)
    stream = np.zeros(0, np.uint8)
    if symbols.size > 1:
        words = canonical(lengths).numpy()
        stream = _encode_words(flat.cpu().numpy(), words, lengths.numpy())
    stream = torch.from_numpy(stream).to(flat.device)  # where it decodes to
    return Huffman(stream, Ints(table, 5), ints.bits, tuple(ints.shape))


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
