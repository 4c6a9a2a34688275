"""Signs T and sizes α: the rules, for storing and for training alike.

Weights come as rows that share an α, and in float64: then the mean size of
weights that are α T already, with α in float32 or less, is α bit for bit.
"""

import torch
from torch import Tensor

from .grids import in_lines

Count = Tensor | int  # weights that share an α, padding aside


def checked(W: Tensor) -> Tensor:
    """Raise ValueError unless W is finite floating point and not empty."""
    W = W.detach()
    if not W.is_floating_point() or not W.isfinite().all() or not W.numel():
        raise ValueError(
            f"W {tuple(W.shape)} must be finite floating point and not empty"
        )
    return W


def shared(W: Tensor, each: str | int) -> tuple[Tensor, Count]:
    """Lay out what shares an α as rows, in float64, and count the weights."""
    rows = in_lines(W, each)[0].double()
    if type(each) is int:  # the last group of a row may be padded
        real = in_lines(torch.ones_like(W), each)[0].double()
        return rows, real.sum(1, keepdim=True)
    return rows, rows.shape[1]


def by_sign(rows: Tensor, n: Count) -> tuple[Tensor, Tensor]:
    """Choose the signs, of 0 too, and the mean size."""
    return sign(rows), rows.abs().sum(1, keepdim=True) / n


def by_threshold(
    rows: Tensor, n: Count, factor: float
) -> tuple[Tensor, Tensor]:
    """Keep what is larger than a multiple of the mean size."""
    size = rows.abs()
    return kept(rows, size > factor * size.sum(1, keepdim=True) / n)


def by_mean(rows: Tensor, n: Count) -> tuple[Tensor, Tensor]:
    """Round multiples of the mean size to -1, 0, 1; any step does for 0."""
    gamma = rows.abs().sum(1, keepdim=True) / n
    tiny = torch.finfo(rows.dtype).tiny
    return (rows / gamma.clamp(min=tiny)).round().clamp(-1, 1), gamma


def regions(w: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Mark what is above the threshold, and what is below its negative."""
    delta = threshold * w.abs().amax()
    return w > delta, w < -delta


def sign(x: Tensor) -> Tensor:
    """Compute the sign with sign(0) = 1: there are only two values."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def kept(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Give the kept weights their signs and their mean size."""
    total = (rows.abs() * mask).sum(1, keepdim=True)
    return rows.sign() * mask, total / mask.sum(1, keepdim=True).clamp(min=1)
