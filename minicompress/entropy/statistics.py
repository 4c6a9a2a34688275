"""How often each integer occurs, and what that promises a coder."""

import math

import torch
from torch import Tensor

from ..codes import Code


def counts(ints: Code) -> Tensor:
    """Count how often each integer occurs.

    Parameters
    ----------
    ints : Ints, Huffman or Rans

    Returns
    -------
    int64 Tensor (2^bits,)

    Examples
    --------
    >>> from minicompress.codes import Ints
    >>> counts(Ints(torch.tensor([0, 3, 3]), bits=2))
    tensor([1, 0, 0, 2])
    """
    flat = ints.decode().reshape(-1)
    return torch.bincount(flat, minlength=1 << ints.bits)


def entropy(counts: Tensor) -> float:
    """Compute the order-0 entropy H = -Σ p log2 p.

    Parameters
    ----------
    counts : Tensor (K,)
        Occurrences of each symbol; zeros are allowed.

    Returns
    -------
    float
        Bits per symbol; 0 for an empty source.

    References
    ----------
    C. E. Shannon, "A mathematical theory of communication", 1948.

    Examples
    --------
    >>> entropy(torch.tensor([2, 1, 1]))
    1.5
    """
    c = counts[counts > 0].double()
    p = c / c.sum()
    return float((p * -p.log2()).sum())


def bound(ints: Code) -> float:
    """Give the bits below which no order-0 coder can go on average.

    A sequence with these counts is one of n! / (c_1! ... c_K!) equally
    likely ones; naming it takes the base-2 logarithm of that number.

    Examples
    --------
    >>> from minicompress.codes import Ints
    >>> round(bound(Ints(torch.tensor([0, 0, 1, 1]), bits=1)), 3)  # log2 6
    2.585
    """
    c = counts(ints).double()
    return float(torch.lgamma(c.sum() + 1) - torch.lgamma(c + 1).sum()) / (
        math.log(2)
    )
