"""Do two measures put networks in the same order?"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Numbers = Sequence[float] | Tensor


def kendall(a: Numbers, b: Numbers) -> float:
    """Compare two orders by pairs: Kendall's τ, ties accounted for (τ-b).

    Of the pairs of networks, C are in the same order under a and b and D in
    opposite orders; with n_a and n_b pairs that are not tied in a and in b::

        τ = (C - D) / sqrt(n_a n_b)

    Without ties, (1 + τ) / 2 is the probability that a puts two networks in
    the order of b.

    Parameters
    ----------
    a, b
        (n,) a number for each network.  Scores are good if large and losses
        if small: give one of them a minus.  Infinite numbers have a place in
        the order too.

    Returns
    -------
    float
        From -1 (reversed) to 1 (the same order); nan if a or b is constant
        and so puts nothing in order.

    Raises
    ------
    ValueError
        If the lengths differ or are below 2, or something is nan.

    References
    ----------
    Kendall, The Treatment of Ties in Ranking Problems, Biometrika 33, 1945.

    Examples
    --------
    >>> kendall([1, 2, 3, 4], [1, 3, 2, 4])  # 5 pairs as in a, one reversed
    0.6666666666666666
    """
    a, b = (_positions(x).int() for x in _pair(a, b))
    up_a, up_b = ((x[:, None] - x).sign() for x in (a, b))  # (n, n)
    agree = (up_a * up_b).sum().item()
    untied = [up.abs().sum().item() for up in (up_a, up_b)]
    return agree / math.sqrt(math.prod(untied)) if all(untied) else math.nan


def spearman(a: Numbers, b: Numbers) -> float:
    """Compare two orders by ranks: Spearman's ρ, ties sharing a mean rank.

    It is the correlation coefficient of the ranks.

    Parameters, Returns, Raises
        as for `kendall`.

    References
    ----------
    Spearman, The Proof and Measurement of Association between Two Things,
    American Journal of Psychology 15, 1904.

    Examples
    --------
    >>> spearman([1, 2, 3, 4], [1, 3, 2, 4])  # 1 - 6 (1 + 1) / (4 (16 - 1))
    0.8
    """
    a, b = (_mean_ranks(_positions(x)) for x in _pair(a, b))
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt((a @ a).item() * (b @ b).item())
    return (a @ b).item() / size if size else math.nan


def _pair(a: Numbers, b: Numbers) -> tuple[Tensor, Tensor]:
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(
            "a and b must be equally long, with two numbers or more, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    for name, x in (("a", a), ("b", b)):
        if x.isnan().any():
            raise ValueError(f"{name}: {int(x.isnan().sum())} numbers are nan")
    return a.detach(), b.detach()


def _positions(x: Tensor) -> Tensor:
    """Replace numbers by their places in the order, equal ones by one."""
    return x.unique(return_inverse=True)[1]


def _mean_ranks(places: Tensor) -> Tensor:
    """Number all from 1; those in one place get the mean of their numbers."""
    count = places.bincount()
    ranks = count.cumsum(0) - (count - 1) / 2
    return ranks.double()[places]
