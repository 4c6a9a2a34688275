"""Microscaling: tiny floating-point numbers that share an 8-bit scale.

A block of 16 or 32 neighbors has a scale of 8 bits; each of them is a
floating-point number of 4 to 8 bits.  The codes below are tables of the
numbers that occur, so that a file holds exactly the bits of the format.
"""

import torch
from torch import Tensor

from .. import codes
from .formats import E2M1, E4M3, FloatFormat, to_float


def microscaling(W: Tensor, fmt: FloatFormat, *, block: int = 32) -> codes.View:
    """Round blocks to a format and a power of two that they share (MX).

    The power brings the largest magnitude m into the top binade of the
    format, where a number may still be too large and becomes the largest::

        scale = 2^(floor(log2 m) - floor(log2 largest))

    Parameters
    ----------
    W
        weights, (..., in).
    fmt
        of an element, at most 8 bits: `E2M1` (MXFP4), `E2M3` or `E3M2`
        (MXFP6), `E4M3` or `E5M2` (MXFP8).
    block
        neighbors along the last axis that share a scale.

    Returns
    -------
    View
        Decodes to the shape of W, float32.  A scale takes 8 bits, as in
        E8M0; which powers occur is a short table.

    Raises
    ------
    ValueError
        If W is not finite or the format has more than 8 bits.

    References
    ----------
    Rouhani et al., Microscaling Data Formats for Deep Learning,
    arXiv:2310.10537, algorithm 1.
    OCP Microscaling Formats (MX) Specification 1.0, section 6.3.

    Examples
    --------
    >>> microscaling(torch.tensor([[0.3, 5.0, -7.9]]), E2M1).decode()
    tensor([[ 0.5000,  4.0000, -6.0000]])
    """
    if fmt.bits > 8:
        raise ValueError(f"fmt must have at most 8 bits, got {fmt.bits}: {fmt}")
    x = _blocks(W, block)
    # frexp: m = f 2^e with f from 1/2 to 1, so floor(log2 m) is e - 1
    e = x.abs().amax(-1, keepdim=True).frexp()[1]
    top = torch.tensor(fmt.largest).frexp()[1]
    power = (e - top).clamp(-126, 127)  # E8M0 has -127 too, float32 not fully
    q = to_float(torch.ldexp(x, -power), fmt)
    scale = _named(torch.ldexp(torch.ones_like(power, dtype=x.dtype), power), 8)
    return codes.View(codes.Scaled(_named(q, fmt.bits), scale), tuple(W.shape))


def mxfp4(W: Tensor) -> codes.View:
    """Round to MXFP4: E2M1 in blocks of 32, 4.25 bits for a weight.

    Parameters
    ----------
    W
        weights, (..., in).

    Returns
    -------
    View
        As from `microscaling`.

    References
    ----------
    Rouhani et al., Microscaling Data Formats for Deep Learning,
    arXiv:2310.10537, table 1.

    Examples
    --------
    >>> mxfp4(torch.tensor([[0.3, 5.0, -7.9]])).decode()
    tensor([[ 0.5000,  4.0000, -6.0000]])
    """
    return microscaling(W, E2M1)


def nvfp4(W: Tensor, *, block: int = 16) -> codes.View:
    """Round to NVFP4: E2M1 in blocks of 16 with an E4M3 scale, 4.5 bits.

    A scale that need not be a power of two brings the largest of a block to
    6, the largest number of E2M1.  One float32 for the tensor brings the
    largest scale to 448, the largest number of E4M3.

    Parameters
    ----------
    W
        weights, (..., in).
    block
        neighbors along the last axis that share a scale.

    Returns
    -------
    View
        Decodes to the shape of W, float32.

    References
    ----------
    NVIDIA, Pretraining Large Language Models with NVFP4, arXiv:2509.25149,
    section 2 and appendix B.

    Examples
    --------
    >>> nvfp4(torch.tensor([[0.4, 5.0, -7.5]])).decode()
    tensor([[ 0.6250,  5.0000, -7.5000]])
    """
    x = _blocks(W, block)
    wanted = x.abs().amax(-1, keepdim=True) / E2M1.largest
    whole = wanted.max() / E4M3.largest
    whole = torch.where(whole > 0, whole, torch.ones_like(whole))
    by = to_float(wanted / whole, E4M3)  # (..., blocks, 1)
    step = by * whole
    q = to_float(x / torch.where(step > 0, step, torch.inf), E2M1)
    scale = codes.Scaled(_named(by, E4M3.bits), whole)
    return codes.View(codes.Scaled(_named(q, E2M1.bits), scale), tuple(W.shape))


def _blocks(W: Tensor, block: int) -> Tensor:
    if not W.is_floating_point() or not W.numel() or not W.isfinite().all():
        raise ValueError(
            "W must be floating point, finite and not empty, got "
            f"{W.dtype} of {tuple(W.shape)}"
        )
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    return codes.groups(W.detach().float(), block)


def _named(x: Tensor, bits: int) -> codes.Codebook:
    """Name numbers by their places in the list of those that occur."""
    numbers, index = x.unique(return_inverse=True)
    return codes.Codebook(codes.Ints(index, bits), numbers)
