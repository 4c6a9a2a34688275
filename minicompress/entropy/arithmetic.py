"""Arithmetic coding of bits whose probabilities are known.

A message is an interval of [0, 1): each bit cuts it in two, in proportion to
the probabilities, and one part goes on.  The code is the shortest number in
the last interval.
"""

import math

ONE = 1 << 16  # probabilities are multiples of 1 / ONE
EDGE = 1 << 4  # and at least EDGE / ONE, at most 1 - EDGE / ONE
LEAST = -math.log2(1 - EDGE / ONE) / 8  # bytes that a bit takes at least
WHOLE, TOP = 1 << 32, 1 << 24


class Encoder:
    """Turn bits and their probabilities into bytes.

    References
    ----------
    Martin, Range encoding: an algorithm for removing redundancy from a
    digitised message, 1979.
    """

    def __init__(self):
        self.low, self.range, self.out = 0, WHOLE, bytearray()

    def bit(self, p: float, bit: int) -> int:
        """Code a bit that is 1 with probability p; return it."""
        part = cut(self.range, p)
        rest = self.range - part
        self.range = part if bit else rest
        self.low += rest if bit else 0
        while self.range < TOP:
            self._shift()
            self.range <<= 8
        return bit

    def finish(self) -> bytes:
        """Return the code: the interval's number with the fewest digits."""
        end = self.low + self.range - 1
        for digits in range(5):
            rough = end >> 8 * (4 - digits) << 8 * (4 - digits)
            if rough >= self.low:
                break
        self.low, long = rough, len(self.out)
        for _ in range(4):
            self._shift()
        return bytes(self.out[:long]) + self.out[long:].rstrip(b"\0")

    def _shift(self) -> None:
        """Move the highest byte of low to the output."""
        if self.low >= WHOLE:  # a carry runs through the bytes before
            at = len(self.out) - 1
            while self.out[at] == 255:
                self.out[at] = 0
                at -= 1
            self.out[at] += 1
            self.low -= WHOLE
        self.out.append(self.low >> 24)
        self.low = (self.low << 8) % WHOLE


class Decoder:
    """Read bits back; the bytes after the last one are zeros."""

    def __init__(self, data):
        self.data, self.at, self.range = data, 4, WHOLE
        head = [*data[:4], 0, 0, 0, 0][:4]
        self.code = int.from_bytes(bytes(head), "big")

    def bit(self, p: float, _=None) -> int:
        """Read a bit that is 1 with probability p."""
        part = cut(self.range, p)
        rest = self.range - part
        bit = int(self.code >= rest)
        self.range = part if bit else rest
        self.code -= rest if bit else 0
        while self.range < TOP:
            byte = self.data[self.at] if self.at < len(self.data) else 0
            self.code, self.at = self.code << 8 | byte, self.at + 1
            self.range <<= 8
        return bit


def cut(size: int, p: float) -> int:
    """Give the upper part of an interval, the one of a bit of 1."""
    return size * min(max(int(p * ONE), EDGE), ONE - EDGE) >> 16
