"""Levels that are not evenly spaced: a table, and an index for each weight.

Where the weights are dense the levels are too.  `lloyd` asks the weights
themselves, `nf4` assumes that they are normal, and `powers_of_two` makes a
product a shift of bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import codes
from .grids import CHUNK, in_lines, min_max


def nf4_levels() -> Tensor:
    """List the 16 levels of NF4: quantiles of a normal distribution.

    0 is a level, 8 lie above and 7 below it, evenly spaced in probability
    on either side; the largest magnitude is 1.

    Returns
    -------
    (16,) float32, rising.

    References
    ----------
    Dettmers et al., QLoRA, arXiv:2305.14314, section 3 and appendix E.

    Examples
    --------
    >>> nf4_levels()[7:10]
    tensor([0.0000, 0.0796, 0.1609])
    """
    # the quantile that becomes 1: 1 - (1/30 + 1/32) / 2 in the paper's code
    end = 0.9677083

    def normal(n):
        share = torch.linspace(end, 0.5, n, dtype=torch.float64)
        return torch.special.ndtri(share)[:-1]  # the last is 0

    levels = torch.cat([normal(9), -normal(8), torch.zeros(1)])
    return (levels / levels.max()).sort().values.float()


def nf4(W: Tensor, *, each: str | int = 64) -> codes.Code:
    """Round to the nearest level of NF4, times the largest of a group.

    Parameters
    ----------
    W
        weights, (out, ...) or any shape.
    each
        which weights share a scale, as in `min_max`.

    Returns
    -------
    Code
        Decodes to the shape of W: 4 bits for a weight and, in W's type, a
        scale for a group.  `small_scales` makes those small too.

    References
    ----------
    Dettmers et al., QLoRA, arXiv:2305.14314, section 3.

    Examples
    --------
    >>> nf4(torch.tensor([[2.0, -2.0, 0.1, 0.9]])).decode()
    tensor([[ 2.0000, -2.0000,  0.1592,  0.8814]])

    Double quantization is one field that is replaced:

    >>> from dataclasses import replace
    >>> code = nf4(torch.randn(64, 1024))
    >>> double = replace(code.x, by=small_scales(code.x.by))
    >>> code = replace(code, x=double)
    """
    _check(W)
    return on_levels(W, nf4_levels(), each, lambda most: most)


def small_scales(scale: Tensor, *, bits: int = 8, each: int = 256) -> codes.Sum:
    """Store scales in few bits: their mean, and what differs on a grid.

    With 8 bits, a group of 64 weights and 256 scales in a group this takes
    8 / 64 + 32 / (64 * 256) = 0.127 bits of a weight in place of 0.5.

    Parameters
    ----------
    scale
        any shape, in which the result decodes.
    bits
        of a scale.
    each
        how many scales share a scale of their own.

    References
    ----------
    Dettmers et al., QLoRA, arXiv:2305.14314, section 3: double quantization.

    Examples
    --------
    >>> scale = torch.tensor([0.3, 0.4, 0.8])
    >>> small_scales(scale).decode()
    tensor([0.2992, 0.4008, 0.8000])
    """
    mean = scale.mean()
    flat = min_max(
        (scale - mean).flatten(), bits=bits, each=each, symmetric=True
    )
    return codes.Sum(codes.View(flat, tuple(scale.shape)), mean)


def powers_of_two(
    W: Tensor, *, bits: int, each: str | int = "row"
) -> codes.Code:
    """Round to 0 or to a power of two with a sign: products become shifts.

    The largest power is the one nearest to the largest magnitude m,
    2^floor(log2(4 m / 3)); b bits name it, the 2^(b-1) - 2 powers below it,
    their negatives and 0.

    Parameters
    ----------
    W, each
        as in `nf4`.
    bits
        of a weight, 2 to 8.

    Returns
    -------
    Code
        Decodes to the shape of W.

    References
    ----------
    Zhou et al., Incremental Network Quantization, arXiv:1702.03044,
    equations 2 to 4.  There a code fewer is used.

    Examples
    --------
    >>> powers_of_two(torch.tensor([[3.1, -0.9, 0.2]]), bits=3).decode()
    tensor([[ 4., -1.,  0.]])
    """
    _check(W)
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    powers = 0.5 ** torch.arange(2.0 ** (bits - 1) - 1)  # 1, 1/2, 1/4, ...
    levels = torch.cat([-powers, torch.zeros(1), powers]).sort().values

    def largest(most):
        # frexp: 4 m / 3 = f 2^e with f from 1/2 to 1
        return torch.ldexp(torch.ones_like(most), (most * 4 / 3).frexp()[1] - 1)

    return on_levels(W, levels, each, largest)


def lloyd(W: Tensor, *, bits: int, steps: int = 10_000) -> codes.Codebook:
    """Round to the 2^b levels with the least squared error for these weights.

    Parameters
    ----------
    W
        weights, any shape; all of them share the levels.
    bits
        of a weight, 1 to 8.
    steps
        of `lloyd_levels`.

    Returns
    -------
    Codebook
        Decodes to the shape of W.

    Examples
    --------
    >>> lloyd(torch.tensor([[0.0, 1.0, 8.0, 9.0]]), bits=1).decode()
    tensor([[0.5000, 0.5000, 8.5000, 8.5000]])
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    levels = lloyd_levels(W, count=2**bits, steps=steps)
    index = nearest_level(W.detach().to(levels), levels)
    return codes.Codebook(codes.Ints(index, bits), levels.to(W.dtype))


def lloyd_levels(x: Tensor, *, count: int, steps: int = 10_000) -> Tensor:
    """Find levels where each is the mean of what is nearest to it.

    A step makes every level the mean of its cell; the borders of the cells
    then are the midpoints between levels.  Neither can raise the error, so
    this ends, in a minimum that need not be the lowest.

    Parameters
    ----------
    x
        samples, any shape.
    count
        levels.
    steps
        at most; it ends earlier when the error falls by less than 1e-12.

    Returns
    -------
    (count,) rising, float64 if x is, else float32.

    References
    ----------
    Lloyd, Least Squares Quantization in PCM, IEEE Transactions on
    Information Theory 28, 1982.
    Max, Quantizing for Minimum Distortion, 1960.

    Examples
    --------
    >>> x = torch.special.ndtri(torch.linspace(0, 1, 100_001)[1:-1])
    >>> lloyd_levels(x, count=2).abs().mean()  # normal: sqrt(2 / pi)
    tensor(0.7978)
    """
    _check(x)
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.detach().double().flatten().sort().values
    if not x[[0, -1]].isfinite().all():
        raise ValueError(f"x must be finite, it has {len(x)} numbers")
    values = x.unique_consecutive()
    if len(values) <= count:  # each has a level of its own
        spare = values[-1:].expand(count - len(values))
        return torch.cat([values, spare]).to(dtype)
    n = len(x)
    total = torch.cat([x.new_zeros(1), x.cumsum(0)])  # of the first i
    places = (torch.arange(count, device=x.device) * 2 + 1) * n // (2 * count)
    levels, gained = x[places], 0.0
    for _ in range(steps):
        border = torch.searchsorted(x, _midpoints(levels))
        ends = torch.nn.functional.pad(border, (1, 0))
        ends = torch.nn.functional.pad(ends, (0, 1), value=n)
        number, sums = ends.diff(), total[ends].diff()
        levels = torch.where(number > 0, sums / number.clamp(min=1), levels)
        # the error is the sum of x^2 less what the levels explain
        explains = float((sums * levels).sum())
        if explains - gained <= 1e-12 * explains:
            break
        gained = explains
    return levels.to(dtype)


def on_levels(
    W: Tensor,
    levels: Tensor,
    each: str | int,
    scale: Callable[[Tensor], Tensor],
) -> codes.Code:
    """Round to the nearest of some levels, times a scale of their own.

    Parameters
    ----------
    W
        weights, (out, ...) or any shape.
    levels
        (K,) rising, at most 256.
    each
        which weights share a scale, as in `min_max`.
    scale
        from the largest magnitude of those that share one to their scale.

    Returns
    -------
    Code
        Decodes to the shape of W; scales have W's type.
    """
    lines, shape, shared = in_lines(W.detach(), each)
    levels = levels.to(W.device)
    index = torch.empty_like(lines, dtype=torch.uint8)
    rows, scales = max(1, CHUNK // lines.shape[1]), []
    for some, out in zip(lines.split(rows), index.split(rows), strict=True):
        most = some.abs().amax(1, keepdim=True)
        if not most.isfinite().all():
            raise ValueError(f"W {tuple(W.shape)} must be finite")
        by = scale(torch.where(most > 0, most, torch.ones_like(most)))
        out.copy_(nearest_level(some.to(levels) / by.to(levels), levels))
        scales.append(by)
    bits = max(1, (len(levels) - 1).bit_length())
    book = codes.Codebook(codes.Ints(index.reshape(shape), bits), levels)
    code = codes.Scaled(book, torch.cat(scales).reshape(shared))
    return codes.View(code, tuple(W.shape)) if type(each) is int else code


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Find the nearest level for each number; the lower of two equals.

    Parameters
    ----------
    x
        any shape.
    levels
        (K,) rising, in the type of x.

    Returns
    -------
    Indices in the shape of x, uint8 up to 256 levels, else int64.
    """
    middle = _midpoints(levels)
    if len(middle) > 31:
        index = torch.bucketize(x, middle)
        return index.byte() if len(levels) <= 256 else index
    index = torch.zeros_like(x, dtype=torch.uint8)
    for m in middle.tolist():  # faster than a search in so short a list
        index += x > m
    return index


def _midpoints(levels: Tensor) -> Tensor:
    return (levels[1:] + levels[:-1]) / 2


def _check(W: Tensor) -> None:
    if not W.is_floating_point() or not W.numel():
        raise ValueError(
            "W must be floating point and not empty, got "
            f"{W.dtype} of {tuple(W.shape)}"
        )
