"""Bytes of a code: in a file, and in memory while it is decoded."""

import math
from collections.abc import Iterator
from dataclasses import fields

import torch
from torch import Tensor

from minicompress import codes
from minicompress.codes import Code


def walk(x) -> Iterator[Tensor | Code]:
    """Yield `x` and everything inside it, codes and tensors."""
    if isinstance(x, (Tensor, Code)):
        yield x
    if isinstance(x, Code):
        for f in fields(x):
            yield from walk(getattr(x, f.name))


def payload(x: Tensor | Code) -> int:
    """Count the bytes that `x` takes in a file, its header entry aside.

    Examples
    --------
    >>> payload(codes.Ints(torch.zeros(10, dtype=torch.uint8), 3))
    4
    """
    if isinstance(x, codes.Ints):
        return (math.prod(x.shape) * x.bits + 7) // 8
    if isinstance(x, Code):
        inside = (getattr(x, f.name) for f in fields(x))
        return sum(payload(y) for y in inside if isinstance(y, (Tensor, Code)))
    if x.dtype == torch.bool:
        return (x.numel() + 7) // 8
    return x.numel() * x.dtype.itemsize


def footprint(x: Tensor | Code) -> int:
    """Count the bytes of memory that decoding `x` is allowed to take."""
    return sum(
        4 * math.prod(y.shape)
        if isinstance(y, Code)
        else y.numel() * y.dtype.itemsize
        for y in walk(x)
    )
