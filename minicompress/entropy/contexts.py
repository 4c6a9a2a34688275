"""Context modeling: what came before tells how likely the next bit is.

Huffman and rANS know how often each integer occurs, wherever it stands.  But
what pruning leaves is not spread evenly: some rows and columns keep many
weights and others none, and a weight's neighbors tell something of it.  Here
every bit is predicted from what was decoded before it, by a logistic
regression that learns on the way; an arithmetic coder makes bytes of it.  No
table travels along.

Both sides must predict the same to the last digit, on every machine.  So
only + - * / and square roots are used: IEEE 754 rounds those exactly.
"""

import math
from array import array
from collections import defaultdict
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .. import bits as packing
from ..codes import Code
from .arithmetic import LEAST, Decoder, Encoder
from .tables import check_fields

RATE, DAMPING = 0.35, 0.5  # of the steps that the regression makes


@dataclass(frozen=True, eq=False, repr=False)
class Contextual(Code):
    """Integers in an arithmetic code that adapts to them.

    Made by `contextual`.

    Parameters
    ----------
    stream : uint8 Tensor
        The digits, base 256, of a number from 0 to 1.
    bits : int
        Width of the integers, 1 to 16.
    shape : tuple of int
        Shape of the decoded tensor; its axes are the contexts.
    """

    stream: Tensor
    bits: int
    shape: tuple[int, ...]

    def __post_init__(self):
        check_fields(self)
        n, most = math.prod(self.shape), (len(self.stream) + 4) / LEAST
        if n > most:
            raise ValueError(
                f"Contextual: {n} integers in {len(self.stream)} bytes, which "
                f"hold {most:.0f} at most"
            )

    def decode(self):
        coder = Decoder(self.stream.tolist())
        values = _code(coder, self.shape, self.bits)
        flat = torch.tensor(values, dtype=packing.dtype(self.bits))
        return flat.reshape(self.shape).to(self.stream.device)


def contextual(ints: Code) -> Contextual:
    """Code integers by what their rows, columns and neighbors were like.

    An integer is coded as "is it 0?" and then bit by bit, highest first.
    Takes some microseconds for each of these decisions: it is meant for
    small models, where each byte counts.  A short list has little to learn
    from.

    Parameters
    ----------
    ints : Ints, or any code of integers
        The shape matters: give the mask of a (300, 784) matrix that looks
        at 28×28 pixels as (300, 28, 28).

    References
    ----------
    Wiedemann et al., DeepCABAC: A Universal Compression Algorithm for Deep
    Neural Networks, arXiv:1907.11900: binary decisions, adaptive contexts.
    There a context is one counter; here the counters of all contexts are
    added up, as logits, as Mahoney's mixing does (Adaptive Weighing of
    Context Models for Lossless Data Compression, 2005).

    Examples
    --------
    Four rows of 28 are full; by frequency alone that takes 57 bytes:

    >>> from minicompress.codes import Ints
    >>> mask = torch.zeros(28, 28, dtype=torch.uint8)
    >>> mask[::7] = 1
    >>> x = contextual(Ints(mask, bits=1))
    >>> x
    Contextual(uint8[8], 1, (28, 28))
    >>> torch.equal(x.decode(), mask)
    True
    """
    coder, flat, shape = Encoder(), ints.decode().reshape(-1), tuple(ints.shape)
    _code(coder, shape, ints.bits, flat.tolist())
    stream = torch.tensor(list(coder.finish()), dtype=torch.uint8)
    return Contextual(stream.to(flat.device), ints.bits, shape)


def _code(coder, shape, bits, given=None) -> array:
    """Send integers through a coder, and return them.

    `given` are the integers; None if the decoder is to find them.
    """
    strides = [math.prod(shape[k + 1 :]) for k in range(len(shape))]
    axes = [[(k, at) for at in range(size)] for k, size in enumerate(shape)]
    terms = [defaultdict(lambda: [0.0, DAMPING]) for _ in range(1 << bits)]
    past = array("H")
    for i, place in enumerate(product(*axes)):
        near = [
            past[i - stride] if at else 0
            for (_, at), stride in zip(place, strides, strict=True)
        ]
        keys = ["all", *place, len(near) - near.count(0)]
        keys += [("before", k, v) for k, v in enumerate(near)]
        if len(shape) > 2:
            keys.append(place[1:])
        v = given[i] if given else 0
        past.append(_integer(coder, terms, keys, bits, v))
    return past


def _integer(coder, terms, keys, bits, v) -> int:
    """Code one integer: is it 0, and if not, its bits from the highest on."""
    if not _decide(coder, terms[0], keys, v > 0):
        return 0
    node = 1  # the bits so far, behind a 1
    for j in range(bits - 1, -1, -1) if bits > 1 else ():
        node = 2 * node + _decide(coder, terms[node], keys, v >> j & 1)
    return node - (1 << bits) if bits > 1 else 1


def _decide(coder, terms, keys, bit) -> int:
    """Predict a bit, code it, learn from it."""
    own = [terms[key] for key in keys]
    x = 0.0
    for theta, _ in own:  # not `sum`, which rounds otherwise since 3.12
        x += theta
    p = sigmoid(x)
    bit = coder.bit(p, bit)
    error = bit - p
    for term in own:  # gradient of the log-likelihood, steps as in AdaGrad
        term[1] += error * error
        term[0] += RATE * error / math.sqrt(term[1])
    return bit


def sigmoid(x: float) -> float:
    """Give 1 / (1 + e^-x) nearly, from what rounds alike everywhere."""
    e = 1 + min(abs(x), 12.0) / 1024
    for _ in range(10):
        e *= e  # (1 + x / 1024)^1024
    return 1 / (1 + e) if x < 0 else e / (1 + e)
