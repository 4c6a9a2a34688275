"""Where to cut a range off, from what its numbers look like as a whole.

`kl` looks at a histogram and keeps the distribution as it was as well as the
levels allow; `aciq_clip` knows the distribution and weighs what is cut off
against a finer step.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .. import codes
from .grids import on_lines, span


def kl(
    W: Tensor,
    *,
    bits: int,
    each: str | int = "row",
    symmetric: bool = False,
    bins: int = 2048,
) -> codes.Code:
    """Round to the grid that keeps the distribution of ‖w‖ best (entropy).

    For every number i of bins of the histogram, P is what clipping at bin i
    makes of it: the bins behind are added to the last one.  Q is what
    2^(b-1) levels can tell of the first i bins: neighbors are merged, and
    their sum is spread evenly over those that were not empty.  The i with
    the smallest D_KL(P‖Q) is where the range ends.  It needs thousands of
    numbers: of a few, it keeps next to none.

    Parameters
    ----------
    W, bits, each, symmetric
        as in `min_max`; the paper has 8 bits, one grid for a whole tensor
        of activations, symmetric.
    bins
        of the histogram, more than 2^(bits-1).

    Returns
    -------
    Code
        As from `min_max`, with a range cut at the same distance from 0 on
        both sides.

    Raises
    ------
    ValueError
        As `min_max`, and if there are too few bins.

    References
    ----------
    Migacz, 8-bit Inference with TensorRT, GPU Technology Conference 2017.

    Examples
    --------
    >>> w = torch.randn(1 << 14, generator=torch.Generator().manual_seed(0))
    >>> w[0] = 100  # one outlier
    >>> kl(w, bits=4, each="tensor", symmetric=True).decode().max() < 4
    tensor(True)
    """
    levels = 2 ** (bits - 1)
    if bins <= levels:
        raise ValueError(f"bins must be more than {levels}, got {bins}")

    def fit(x, low, high):
        most = torch.maximum(-low, high)
        ends = [_kl_end(line, levels, bins) for line in x.abs()]
        end = torch.minimum(torch.stack(ends)[:, None], most)
        low, high = torch.maximum(low, -end), torch.minimum(high, end)
        return span(low, high, bits, symmetric)

    return on_lines(W, bits, each, symmetric, fit)


def _kl_end(x: Tensor, levels: int, bins: int) -> Tensor:
    """Find the end of the range for magnitudes x (n,)."""
    most = x.max().double()
    if most == 0:
        return most.to(x.dtype)
    place = (x.double() / most * bins).long().clamp(max=bins - 1)
    h = torch.bincount(place, minlength=bins).double()
    counts = torch.arange(levels, bins + 1, device=x.device)
    i = counts[_divergence(h, counts[:, None], levels).argmin()]
    return ((i + 0.5) * most / bins).to(x.dtype)


def _divergence(h: Tensor, i: Tensor, levels: int) -> Tensor:
    """Compute D_KL(P‖Q) for a histogram that is clipped to i bins (c, 1).

    Q is constant in a level of n bins that hold S numbers, q = S / n, so its
    part of the sum, sum h log q, is S log(S / n), from sums up to a bin.
    """

    def up_to(x):
        return torch.nn.functional.pad(x.cumsum(0), (1, 0))

    total, filled = up_to(h), up_to((h > 0).double())
    # level k has the bins j with k <= j levels / i < k + 1
    edge = -(-torch.arange(levels + 1, device=h.device) * i // levels)
    S, n = total[edge].diff(dim=1), filled[edge].diff(dim=1).clamp(min=1)
    last, tail = h[i - 1], total[-1] - total[i]  # (c, 1): the tail joins last
    p = up_to(torch.xlogy(h, h))[i - 1] + torch.xlogy(last + tail, last + tail)
    q = torch.xlogy(S, S / n).sum(1, keepdim=True)
    q = q + torch.xlogy(tail, S[:, -1:] / n[:, -1:])
    divergence = (p - q) / total[-1] + (total[i] / total[-1]).log()
    # where the tail falls on an empty bin, Q has nothing to answer
    lost = (last == 0) & (tail > 0)
    return divergence.masked_fill(lost, torch.inf)[:, 0]


def aciq_clip(spread: float, *, bits: int, shape: str = "gauss") -> float:
    """Give the clip with the least mean squared error, by formula.

    A range from -c to c loses what lies outside and, inside, a step squared
    over 12, with 2^b steps of 2c / 2^b::

        gauss    (c^2 + s^2) erfc(c / √2s) - √(2/π) c s exp(-c^2 / 2s^2)
        laplace  2 s^2 exp(-c / s)
                 + c^2 / (3 * 4^b)

    Parameters
    ----------
    spread
        s: standard deviation of a normal distribution, or mean magnitude of
        a Laplace distribution.
    bits
        of an integer.
    shape
        "gauss" or "laplace".

    Returns
    -------
    float
        c, in the unit of `spread`.

    References
    ----------
    Banner et al., Post Training 4-bit Quantization of Convolutional Networks
    for Rapid-Deployment, arXiv:1810.05723, section 3.

    Examples
    --------
    >>> round(aciq_clip(1.0, bits=4), 3)
    2.559
    """
    if not (spread > 0 and math.isfinite(spread)) or not 1 <= bits <= 16:
        raise ValueError(
            "spread must be above 0 and bits 1 to 16, got "
            f"{spread=} and {bits=}"
        )
    step = 1 / (3 * 4**bits)  # what the step costs, over c^2

    def gauss(c):  # half the derivative of the error, for s = 1
        tail = math.sqrt(2 / math.pi) * math.exp(-c * c / 2)
        return c * math.erfc(c / math.sqrt(2)) - tail + c * step

    def laplace(c):
        return -math.exp(-c) + c * step

    if shape not in ("gauss", "laplace"):
        raise ValueError(f'shape must be "gauss" or "laplace", got {shape!r}')
    return spread * _root(gauss if shape == "gauss" else laplace, 0, 64)


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """Halve an interval until it holds the root of an increasing f."""
    for _ in range(60):
        middle = (low + high) / 2
        if f(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
