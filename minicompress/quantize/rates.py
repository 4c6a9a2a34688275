"""Bits as real numbers: what rate-distortion theory says of their share."""

import torch
from torch import Tensor


def water_filling(variances: Tensor, sizes: Tensor, *, bits: float) -> Tensor:
    """Share bits so that every weight of every layer has the same error.

    A Gaussian source of variance σ² described with b bits a number keeps an
    error of σ² 4^-b.  With the geometric mean GM of the variances, each
    counted as often as its layer has weights, the smallest sum is at::

        b = bits + 1/2 log2(σ² / GM)

    A layer for which that is below 0 gets no bits, and the others share.

    Parameters
    ----------
    variances
        (layers,), at least 0.
    sizes
        (layers,) weights in each.
    bits
        mean over all weights.

    Returns
    -------
    (layers,) bits, real numbers, float64.

    References
    ----------
    Cover and Thomas, Elements of Information Theory, theorem 10.3.3.

    Examples
    --------
    >>> variances = torch.tensor([4.0, 1.0, 0.25, 0.0625])
    >>> water_filling(variances, torch.ones(4), bits=3)
    tensor([4.5000, 3.5000, 2.5000, 1.5000], dtype=torch.float64)
    """
    n = _sizes(sizes, bits)
    if variances.shape != n.shape or not (variances >= 0).all():
        raise ValueError(
            f"variances must be at least 0, one for each of {len(n)} layers"
        )
    half = 0.5 * variances.double().log2()
    active = half > -torch.inf
    while active.any():
        total = bits * n.sum() - (n * half)[active].sum()
        b = half + total / n[active].sum()
        if (b[active] >= 0).all():
            return torch.where(active, b, 0.0)
        active = active & (b > 0)
    return torch.zeros_like(n)


def by_size(sizes: Tensor, *, bits: float, decibels: float = 6.0206) -> Tensor:
    """Share bits between layers so that the output has the best SQNR.

    The noise-to-signal ratios of the layers add up, and each falls by κ
    decibels for a bit.  The smallest sum for a number of bits is where::

        b_j - b_i = 10 log10(n_i / n_j) / κ

    Layers with more weights get fewer bits, for there a bit costs more.

    Parameters
    ----------
    sizes
        (layers,) weights in each.
    bits
        mean over all weights.
    decibels
        κ: 6.02 in theory, less when the range is clipped to suit the bits.

    Returns
    -------
    (layers,) bits, real numbers, float64.

    References
    ----------
    Lin, Talathi, Annapureddy, Fixed Point Quantization of Deep Convolutional
    Networks, arXiv:1511.06393.

    Examples
    --------
    >>> by_size(torch.tensor([100, 400]), bits=4).round(decimals=2)
    tensor([4.8000, 3.8000], dtype=torch.float64)
    """
    n = _sizes(sizes, bits)
    b = -10 * n.log10() / decibels
    return b + bits - (n * b).sum() / n.sum()


def _sizes(sizes: Tensor, bits: float) -> Tensor:
    if sizes.ndim != 1 or not len(sizes) or not (sizes > 0).all():
        raise ValueError(
            f"sizes must be positive, one for each layer, got {sizes}"
        )
    if not bits >= 0:
        raise ValueError(f"bits must be at least 0, got {bits}")
    return sizes.double()
