"""Codes that build a tensor from smaller ones."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .tree import (
    Code,
    broadcast,
    need,
    need_array,
    need_shape,
    real,
    shape,
    value,
)


@dataclass(frozen=True, eq=False, repr=False)
class Factors(Code):
    """A low-rank product: ``u @ v``, or Tucker-2 when there is a core.

    Parameters
    ----------
    u : Tensor or Code
        (out, r).
    v : Tensor or Code
        (r, in), or (s, in) with a core.
    core : Tensor or Code, optional
        (r, s, height, width); the result is then a convolution kernel
        (out, in, height, width).
    """

    u: Tensor | Code
    v: Tensor | Code
    core: Tensor | Code | None = None

    def __post_init__(self):
        need_array("Factors", u=self.u, v=self.v)
        u, v = shape(self.u), shape(self.v)
        if self.core is None:
            ok = len(u) == len(v) == 2 and u[1] == v[0]
        else:
            c = shape(self.core)
            ok = len(u) == len(v) == 2 and len(c) == 4
            ok = ok and c[:2] == (u[1], v[0])
        core = "" if self.core is None else f" and core {shape(self.core)}"
        need(ok, f"Factors: u {u}, v {v}{core} do not chain")

    @property
    def shape(self):
        window = () if self.core is None else shape(self.core)[2:]
        return (shape(self.u)[0], shape(self.v)[1], *window)

    def decode(self):
        parts = (self.u, self.v, self.core)
        parts = [real(x) for x in parts if x is not None]
        dtype = max((x.dtype for x in parts), key=lambda d: d.itemsize)
        u, v, *core = (x.to(dtype) for x in parts)
        if not core:
            return u @ v
        half = torch.tensordot(u, core[0], 1)  # (out, s, height, width)
        return torch.tensordot(half, v, ([1], [0])).permute(0, 3, 1, 2)


@dataclass(frozen=True, eq=False, repr=False)
class Sum(Code):
    """``a + b``: a quantized base and its adapter, or outliers kept apart."""

    a: Tensor | Code
    b: Tensor | Code

    def __post_init__(self):
        need_array("Sum", a=self.a, b=self.b)
        broadcast("Sum", self.a, self.b)

    @property
    def shape(self):
        return broadcast("Sum", self.a, self.b)

    def decode(self):
        return real(self.a) + real(self.b)


@dataclass(frozen=True, eq=False, repr=False)
class Hashed(Code):
    """A tensor whose entries are picked, with a sign, by a hash.

    Parameters
    ----------
    seed : int
        Seed of the hash; the indices are computed, never stored.
    values : Tensor or Code
        (K,), the shared values.
    shape : tuple of int
        Shape of the result.

    References
    ----------
    Chen et al., "Compressing Neural Networks with the Hashing Trick",
    arXiv:1504.04788, equation 4 (the signs: equation 7).
    """

    seed: int
    values: Tensor | Code
    shape: tuple[int, ...]

    def __post_init__(self):
        need_array("Hashed", values=self.values)
        need_shape("Hashed", self.shape)
        need(
            type(self.seed) is int and 0 <= self.seed < 1 << 32,
            f"Hashed: seed must be in [0, 2**32), got {self.seed!r}",
        )
        s = shape(self.values)
        need(
            len(s) == 1 and s[0] > 0,
            f"Hashed: values must be one-dimensional, not empty, got {s}",
        )

    def decode(self):
        values = value(self.values)
        w = values.new_empty(math.prod(self.shape))
        # in parts: the hash needs a dozen times the memory of the weights
        for start in range(0, len(w), 1 << 16):
            part = w[start : start + (1 << 16)]
            places = torch.arange(start, start + len(part), device=w.device)
            index, sign = buckets(self.seed, places, len(values))
            part.copy_(values[index] * sign)
        return w.reshape(self.shape)


@dataclass(frozen=True, eq=False, repr=False)
class View(Code):
    """The same numbers in another shape; the last axis may carry padding.

    Parameters
    ----------
    x : Tensor or Code
        As many numbers as `shape` has, or more: then they are read as
        ``(*shape[:-1], more)`` and each row is cut to ``shape[-1]``.
    shape : tuple of int
        Shape of the result.
    """

    x: Tensor | Code
    shape: tuple[int, ...]

    def __post_init__(self):
        need_array("View", x=self.x)
        need_shape("View", self.shape)
        rows, have = math.prod(self.shape[:-1]), math.prod(shape(self.x))
        exact = have == math.prod(self.shape)
        padded = bool(self.shape) and rows > 0 and have % rows == 0
        need(
            exact or (padded and have // rows > self.shape[-1]),
            f"View: {shape(self.x)} cannot be read as {self.shape}",
        )

    def decode(self):
        x = value(self.x)
        if x.numel() == math.prod(self.shape):
            return x.reshape(self.shape)
        return x.reshape(*self.shape[:-1], -1)[..., : self.shape[-1]]


def groups(w: Tensor, size: int) -> Tensor:
    """Cut the last axis into groups of `size`, padding with zeros.

    Parameters
    ----------
    w : Tensor
        (..., n).
    size : int
        Weights that share one scale.

    Returns
    -------
    Tensor
        (..., ceil(n / size), size); `View` with ``w.shape`` undoes it.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    padded = nn.functional.pad(w, (0, -w.shape[-1] % size))
    return padded.reshape(*w.shape[:-1], -1, size)


def buckets(seed: int, places: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Hash positions into k buckets, with a sign each.

    Parameters
    ----------
    seed : int
        In [0, 2**32).
    places : Tensor
        int64 positions, any shape.
    k : int
        Number of buckets.

    Returns
    -------
    index, sign : Tensor
        In the shape of `places`: int64 in [0, k), and float32 -1 or +1.  The
        same on every platform: the SplitMix64 finalizer in wrapping int64.
    """

    def mix(x, shift, factor):
        high = (x >> shift) & ((1 << (64 - shift)) - 1)  # a logical shift
        return (x ^ high) * factor

    x = (places + (seed << 20)) * -0x61C8864680B583EB
    x = mix(x, 30, -0x40A7B892E31B1A47)
    x = mix(x, 27, -0x6B2FB644ECCEEE15)
    x = mix(x, 31, 1)
    index = ((x >> 1) & ((1 << 62) - 1)) % k
    return index, 1.0 - 2.0 * (x & 1)
