"""Uniform grids: how a range of numbers becomes a few integers.

A weight w is stored as the integer q with w = scale * (q - zero), nearly.
Which range the integers cover, and how many weights share it, is all that
there is to choose.  Every rule here makes this choice and then rounds to
nearest: smallest to largest (`min_max`), all but the rarest weights
(`percentile`), or the range with the smallest error (`mse`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import codes

Zero = Tensor | int
Fit = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Zero]]

CHUNK = 1 << 18  # weights that are worked on together: they fit the cache


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

    def fit(x, low, high):
        return span(low, high, bits, symmetric)

    return on_lines(W, bits, each, symmetric, fit)


def percentile(
    W: Tensor,
    *,
    bits: int,
    each: str | int = "row",
    symmetric: bool = False,
    share: float = 0.999,
) -> codes.Code:
    """Round to a grid that leaves out the rarest weights on either side.

    What is outside becomes the nearest end of the grid: a few weights lose
    much, all others lie on a finer grid.

    Parameters
    ----------
    W, bits, each, symmetric
        as in `min_max`.
    share
        of the weights that share a grid, how many lie inside its range,
        above 0 to 1.  A symmetric grid leaves out those with the largest
        magnitude, an asymmetric one half of them at each end.  1 is
        `min_max`.  The padding of a short last group counts as zeros.

    Returns
    -------
    Code
        As from `min_max`.

    References
    ----------
    Wu et al., Integer Quantization for Deep Learning Inference: Principles
    and Empirical Evaluation, arXiv:2004.09602, section 3.3.

    Examples
    --------
    >>> w = torch.tensor([[-1.0, 0.0, 2.0, 0.4, 90.0]])
    >>> percentile(w, bits=2, share=0.6).decode()
    tensor([[0.0000, 0.0000, 2.0000, 0.6667, 2.0000]])
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")

    def fit(x, low, high):
        n = x.shape[1]
        out = round((1 - share) * n)  # weights outside
        if symmetric:
            high = x.abs().kthvalue(max(n - out, 1), 1, keepdim=True).values
            return span(-high, high, bits, symmetric)
        out = min(out // 2, (n - 1) // 2)  # on either side
        low = x.kthvalue(1 + out, 1, keepdim=True).values
        high = x.kthvalue(n - out, 1, keepdim=True).values
        return span(low, high, bits, symmetric)

    return on_lines(W, bits, each, symmetric, fit)


def mse(
    W: Tensor,
    *,
    bits: int,
    each: str | int = "row",
    symmetric: bool = False,
    shrink: tuple[float, ...] = (1, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.35),
    steps: int = 3,
) -> codes.Code:
    """Round to the grid with the least squared error that a search finds.

    The grid of `min_max`, shrunk a little or a lot at one end or both, is
    where the search starts.  Then it takes turns: for a grid the best
    integers are the nearest, and for integers the best grid is a straight
    line through the points (q, w), by least squares.

    Parameters
    ----------
    W, bits, each, symmetric
        as in `min_max`.
    shrink
        fractions of the range of `min_max` that are tried first.
    steps
        turns that follow from the best of them.

    Returns
    -------
    Code
        As from `min_max`, and with 1 in `shrink` never with a larger sum
        of squared errors (but for rounding the scale to W's type).

    References
    ----------
    Nagel et al., A White Paper on Neural Network Quantization,
    arXiv:2106.08295, section 3.1: the error as the measure of a range.
    Lloyd, Least Squares Quantization in PCM, 1982: taking turns.

    Examples
    --------
    >>> w = torch.tensor([[-1.0, -0.9, 1.1, 1.0, 0.1, 3.0]])
    >>> for rule in min_max, mse:
    ...     error = w - rule(w, bits=2).decode()
    ...     print(round(float(error.square().sum()), 2))
    0.59
    0.53
    """
    if not shrink or min(shrink) <= 0 or steps < 0:
        raise ValueError(
            "shrink must hold fractions above 0 and steps be at least 0, got "
            f"{shrink=} and {steps=}"
        )
    top = top_code(bits, symmetric)

    def fit(x, low, high):
        widest, zero = span(low, high, bits, symmetric)
        # how good the best grid is so far, its step and its zero
        best = torch.full_like(widest, torch.inf), widest, zero
        far = torch.maximum(-low, high)
        for part in shrink:
            _, best = _try(x, part * widest, zero, top, best)
            if not symmetric:  # or only the end that is farther out
                near = low.maximum(-part * far), high.minimum(part * far)
                _, best = _try(x, *span(*near, bits, False), top, best)
        scale, zero = best[1:]
        p, _ = _try(x, scale, zero, top, best)
        for _ in range(steps):
            scale, zero = _line(x, p, scale, zero, top, symmetric)
            p, best = _try(x, scale, zero, top, best)
        return best[1:]

    return on_lines(W, bits, each, symmetric, fit)


def _try(
    x: Tensor, scale: Tensor, zero: Zero, top: int, best: tuple
) -> tuple[Tensor, tuple]:
    """Round to a grid; keep it where its error is the smallest so far."""
    p = to_codes(x, scale, zero, top).sub_(zero)  # steps away from 0
    error = torch.addcmul(x, p, scale, value=-1).square_()
    error = error.sum(1, keepdim=True)
    least, old, old_zero = best
    better = error < least
    if isinstance(zero, Tensor):
        zero = torch.where(better, zero, old_zero)
    return p, (
        torch.where(better, error, least),
        torch.where(better, scale, old),
        zero,
    )


def _line(
    x: Tensor, p: Tensor, scale: Tensor, zero: Zero, top: int, symmetric: bool
) -> tuple[Tensor, Zero]:
    """Fit x = scale (p - shift) by least squares, with a whole shift."""
    xp = (x * p).sum(1, keepdim=True)
    pp = p.square().sum(1, keepdim=True)
    if not symmetric:
        n = x.shape[1]
        sx, sp = x.sum(1, keepdim=True), p.sum(1, keepdim=True)
        # x = slope p + offset; 0 is at p = -offset / slope
        slope = (n * xp - sp * sx) / (n * pp - sp.square()).clamp(min=1)
        offset = (sx - slope * sp) / n
        shift = torch.round(-offset / torch.where(slope > 0, slope, scale))
        shift = (zero + shift).clamp(0, top) - zero  # stays within the codes
        zero = zero + shift
        xp = xp - shift * sx
        pp = pp - 2 * shift * sp + n * shift.square()
    fitted = xp / pp.clamp(min=1)
    return torch.where(fitted > 0, fitted, scale), zero


def on_lines(
    W: Tensor, bits: int, each: str | int, symmetric: bool, fit: Fit
) -> codes.Code:
    """Fit a grid to all weights that share one, and round to nearest.

    Parameters
    ----------
    W, bits, each, symmetric
        as in `min_max`.
    fit
        from the lines (m, k) of weights, each of which shares a grid, and
        the smallest and largest of each (m, 1) to their scale (m, 1) and
        zero, (m, 1) or the middle code if symmetric.
    """
    _check(W, bits, symmetric)
    lines, shape, shared = in_lines(W.detach(), each)
    work = torch.float64 if W.dtype == torch.float64 else torch.float32
    kind = torch.uint8 if bits <= 8 else torch.int32
    q = torch.empty_like(lines, dtype=kind)
    top, grids = top_code(bits, symmetric), []
    rows = max(1, CHUNK // max(1, lines.shape[1]))
    for some, out in zip(lines.split(rows), q.split(rows), strict=True):
        x = some.to(work)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        if not (low.isfinite() & high.isfinite()).all():
            raise ValueError(f"W {tuple(W.shape)} must be finite")
        scale, zero = fit(x, low, high)
        scale = a_step(scale.to(W.dtype))
        out.copy_(to_codes(x, scale.to(work), zero, top))
        grids.append((scale, zero))
    scale, zero = zip(*grids, strict=True)
    stored = zero[0]
    if not symmetric:
        stored = codes.Ints(torch.cat(zero).int().reshape(shared), bits)
    code = codes.Affine(
        codes.Ints(q.reshape(shape), bits),
        torch.cat(scale).reshape(shared),
        stored,
    )
    return codes.View(code, tuple(W.shape)) if type(each) is int else code


def span(
    low: Tensor, high: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Zero]:
    """Lay the grid of `min_max` over a range: its scale and its zero."""
    if symmetric:
        middle = 2 ** (bits - 1) - 1
        return a_step(torch.maximum(-low, high) / middle), middle
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = a_step((high - low) / (2**bits - 1))
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)


def to_codes(x: Tensor, scale: Tensor, zero: Zero, top: int) -> Tensor:
    """Round to the nearest point of a grid 0..top, ties to even."""
    return torch.round(x / scale).add_(zero).clamp_(0, top)


def top_code(bits: int, symmetric: bool) -> int:
    """Give the largest code: a symmetric grid leaves one code unused."""
    return 2**bits - 1 - symmetric


def _check(W: Tensor, bits: int, symmetric: bool) -> None:
    if not 1 + symmetric <= bits <= 16:
        raise ValueError(f"bits must be {1 + symmetric} to 16, got {bits}")
    if not W.is_floating_point() or not W.numel():
        raise ValueError(
            "W must be floating point and not empty, got "
            f"{W.dtype} of {tuple(W.shape)}"
        )


def in_lines(
    W: Tensor, each: str | int
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Lay W out with one line per grid; the shapes of weights and scales."""
    if each == "tensor":
        return W.reshape(1, -1), tuple(W.shape), (1,) * W.ndim
    if each == "row" and W.ndim:
        rows = len(W) if W.ndim > 1 else 1
        shared = (rows, *(1,) * (W.ndim - 1))
        return W.reshape(rows, -1), tuple(W.shape), shared
    if type(each) is int and each >= 1 and W.ndim:
        x = codes.groups(W, each)
        return x.reshape(-1, each), tuple(x.shape), (*x.shape[:-1], 1)
    raise ValueError(
        f'each must be "tensor", "row" or a number of weights, for W '
        f"{tuple(W.shape)}, got {each!r}"
    )


def a_step(size: Tensor) -> Tensor:
    """Use 1 where all weights are 0: any step does."""
    return torch.where(size > 0, size, torch.ones_like(size))
