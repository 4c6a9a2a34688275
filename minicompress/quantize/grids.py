"""Uniform grids: how a range of numbers becomes a few integers.

A weight w is stored as the integer q with w = scale * (q - zero), nearly.
Which range the integers cover, and how many weights share it, is all that
there is to choose.
"""

import torch
from torch import Tensor

from .. import codes


def min_max(
    W: Tensor, *, bits: int, each: str | int = "row", symmetric: bool = False
) -> codes.Code:
    """Round to integers whose grid spans from the smallest to the largest.

    With an asymmetric grid, low = min(w, 0) and high = max(w, 0)::

        scale = (high - low) / (2^b - 1),    zero = round(-low / scale)

    so that 0 is a point of the grid, and padding and pruned weights stay
    exactly 0.  A symmetric grid has the same number of points on both sides:
    scale = max ‖w‖ / (2^(b-1) - 1), and one of the 2^b codes is not used.

    Parameters
    ----------
    W
        weights, (out, ...) or any shape.
    bits
        of an integer, 1 to 16; a symmetric grid needs 2.
    each
        which weights share a grid: "tensor" all of them, "row" those of an
        output, a number g as many neighbors along the last axis (the last
        group of a row may be shorter).
    symmetric
        whether the grid has its middle at 0.

    Returns
    -------
    Code
        Decodes to the shape of W.  Scales are stored as W's type.

    Raises
    ------
    ValueError
        If W is not finite, or `bits` or `each` are out of range.

    References
    ----------
    Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, arXiv:1712.05877, equations 1 and 13.

    Examples
    --------
    >>> w = torch.tensor([[-1.0, 0.0, 2.0, 0.4]])
    >>> min_max(w, bits=2).decode()
    tensor([[-1.,  0.,  2.,  0.]])
    """
    W = _checked(W, bits, symmetric)
    rows, axes = _shared(W, each)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = _step(rows.abs().amax(axes, keepdim=True) / top)
        q = torch.round(rows / scale) + top  # from 0 on
        zero: codes.Code | int = top
    else:
        low = rows.amin(axes, keepdim=True).clamp(max=0)
        high = rows.amax(axes, keepdim=True).clamp(min=0)
        scale = _step((high - low) / (2**bits - 1))
        at = torch.round(-low / scale).clamp(0, 2**bits - 1)
        q = (torch.round(rows / scale) + at).clamp(0, 2**bits - 1)
        zero = codes.Ints(at.int(), bits)
    code = codes.Affine(codes.Ints(q.int(), bits), scale, zero)
    if isinstance(each, int):
        return codes.View(code, tuple(W.shape))
    return code


def _checked(W: Tensor, bits: int, symmetric: bool) -> Tensor:
    if not 1 + symmetric <= bits <= 16:
        raise ValueError(f"bits must be {1 + symmetric} to 16, got {bits}")
    W = W.detach()
    if not W.is_floating_point() or not W.isfinite().all():
        raise ValueError(f"W {tuple(W.shape)} must be finite floating point")
    return W


def _shared(W: Tensor, each: str | int) -> tuple[Tensor, tuple[int, ...]]:
    """Lay W out so that what shares a grid varies along the given axes."""
    if each == "tensor":
        return W, tuple(range(W.ndim))
    if each == "row" and W.ndim:
        return W, tuple(range(1, W.ndim)) or (0,)
    if type(each) is int and each >= 1 and W.ndim:
        return codes.groups(W, each), (-1,)
    raise ValueError(
        f'each must be "tensor", "row" or a number of weights, for W '
        f"{tuple(W.shape)}, got {each!r}"
    )


def _step(scale: Tensor) -> Tensor:
    """Use 1 where all weights are 0: any step does."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
