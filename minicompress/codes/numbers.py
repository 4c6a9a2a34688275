"""Codes of single numbers: integers, grids, codebooks, scales."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .tree import Code, brief, broadcast, need, need_array, real, shape, value

CHUNK = 1 << 17  # numbers


@dataclass(frozen=True, eq=False, repr=False)
class Ints(Code):
    """Unsigned integers that take `bits` bits each on disk.

    Parameters
    ----------
    values : Tensor
        Integers in ``[0, 2**bits)``; uint8 if ``bits <= 8``, else int32.
    bits : int
        1 to 16.

    Examples
    --------
    >>> Ints(torch.tensor([1, 3, 2]), 2)
    Ints(uint8[3], 2)
    """

    values: Tensor
    bits: int

    def __post_init__(self):
        need(
            type(self.bits) is int and 1 <= self.bits <= 16,
            f"Ints: bits must be an integer from 1 to 16, got {self.bits!r}",
        )
        v = self.values
        need(
            isinstance(v, Tensor) and not v.is_floating_point(),
            f"Ints: values must be an integer tensor, got {brief(v)}",
        )
        if v.numel() and not v.is_meta:
            low, high = (int(x) for x in v.aminmax())
            need(
                low >= 0 and high < 1 << self.bits,
                f"Ints: values must lie in [0, {1 << self.bits}) for "
                f"{self.bits} bits, got {low} to {high}",
            )
        kind = torch.uint8 if self.bits <= 8 else torch.int32
        object.__setattr__(self, "values", v.to(kind))

    @property
    def shape(self):
        return tuple(self.values.shape)

    def decode(self):
        return self.values


@dataclass(frozen=True, eq=False, repr=False)
class Affine(Code):
    """Integers on a uniform grid: ``scale * (q - zero)``.

    Parameters
    ----------
    q : Tensor or Code
        Integers.
    scale : Tensor, Code or float
        Step of the grid, in units of the weight; broadcasts against `q`.
    zero : Tensor, Code or int
        The whole number that stands for 0; broadcasts against `q`.
    """

    q: Tensor | Code
    scale: Tensor | Code | float
    zero: Tensor | Code | int = 0

    def __post_init__(self):
        need_array("Affine", q=self.q)
        broadcast("Affine", self.q, self.scale, self.zero)

    @property
    def shape(self):
        return broadcast("Affine", self.q, self.scale, self.zero)

    def decode(self):
        return by_rows(
            lambda q, scale, zero: scale * (real(q) - zero),
            self.q,
            self.scale,
            self.zero,
        )


@dataclass(frozen=True, eq=False, repr=False)
class Codebook(Code):
    """Shared values: ``centroids[index]``.

    Parameters
    ----------
    index : Tensor or Code
        Integers in ``[0, K)``, any shape.
    centroids : Tensor or Code
        (K,) values, or (K, d) vectors for product quantization.
    """

    index: Tensor | Code
    centroids: Tensor | Code

    def __post_init__(self):
        need_array("Codebook", index=self.index, centroids=self.centroids)
        need(
            len(shape(self.centroids)) >= 1,
            "Codebook: centroids must have at least one dimension",
        )

    @property
    def shape(self):
        return shape(self.index) + shape(self.centroids)[1:]

    def decode(self):
        index, centroids = value(self.index), value(self.centroids)
        if index.numel() and int(index.max()) >= len(centroids):
            raise ValueError(
                f"Codebook: index {int(index.max())} is out of range for "
                f"{len(centroids)} centroids"
            )
        # .long(): torch takes a uint8 index for a mask
        return by_rows(lambda part: centroids[part.long()], index)


@dataclass(frozen=True, eq=False, repr=False)
class Scaled(Code):
    """``x * by``, broadcast: scales of binary, ternary and NF4 weights."""

    x: Tensor | Code
    by: Tensor | Code | float

    def __post_init__(self):
        need_array("Scaled", x=self.x)
        broadcast("Scaled", self.x, self.by)

    @property
    def shape(self):
        return broadcast("Scaled", self.x, self.by)

    def decode(self):
        return by_rows(lambda x, by: real(x) * by, self.x, self.by)


@dataclass(frozen=True, eq=False, repr=False)
class Rotated(Code):
    """A matrix whose inputs were rotated: ``hadamard(x) * signs``.

    Parameters
    ----------
    x : Tensor or Code
        ``hadamard(w * signs)``, (..., d) with d a power of two.
    signs : Tensor or Code
        (d,), +1 and -1, or 0 and 1 as one bit each: 0 stands for -1.
    """

    x: Tensor | Code
    signs: Tensor | Code

    def __post_init__(self):
        need_array("Rotated", x=self.x, signs=self.signs)
        s = shape(self.x)
        need(
            bool(s) and shape(self.signs) == s[-1:],
            f"Rotated: signs {shape(self.signs)} must match the last "
            f"dimension of x {s}",
        )

    @property
    def shape(self):
        return shape(self.x)

    def decode(self):
        signs = real(self.signs)
        return hadamard(real(self.x)) * torch.where(signs > 0, 1.0, -1.0)


def by_rows(f: Callable[..., Tensor], *xs: Tensor | Code | float) -> Tensor:
    """Compute f of decoded xs, elementwise, on rows that fit the cache.

    Every pass over a large tensor is a trip to the memory; f may need
    several.
    """
    xs = [torch.as_tensor(value(x)) for x in xs]
    full = torch.broadcast_shapes(*(x.shape for x in xs))
    rows = full[0] if full else 1
    step = max(1, CHUNK * rows // max(1, math.prod(full)))
    if step >= rows:
        return f(*xs)
    out = None
    parts = zip(*(x.expand(full).split(step) for x in xs), strict=True)
    for i, part in enumerate(parts):
        y = f(*part)
        out = y.new_empty((rows, *y.shape[1:])) if out is None else out
        out[i * step : i * step + len(y)] = y
    return out


def hadamard(x: Tensor) -> Tensor:
    """Multiply the last axis by the orthonormal Hadamard matrix.

    The matrix is symmetric and its own inverse; the fast transform takes
    d log2(d) additions.

    Parameters
    ----------
    x : Tensor
        (..., d), d a power of two.
    """
    d = x.shape[-1]
    if d < 1 or d & (d - 1):
        raise ValueError(f"x: the last axis must be a power of two, got {d}")
    y, step = x, 1
    while step < d:
        y = y.reshape(*x.shape[:-1], -1, 2, step)
        a, b = y.unbind(-2)
        y = torch.stack([a + b, a - b], -2)
        step *= 2
    return y.reshape(x.shape) / math.sqrt(d)
