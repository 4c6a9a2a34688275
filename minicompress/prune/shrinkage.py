"""Losses that make whole channels small while the network is trained.

Pruning afterwards removes what training has already given up.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .channel_scores import NORMS, unit_sums
from .dependencies import Group


def slimming(model: nn.Module) -> Tensor:
    """Add up the scales `|gamma|` of all norms: the loss of network slimming.

    Parameters
    ----------
    model
        in training; add this to its loss with a factor of about 1e-4, and
        exempt the scales from weight decay, which does not make sparse.

    Returns
    -------
    A scalar with a gradient; that of a scale is its sign.

    Raises
    ------
    ValueError
        If there is no norm with a scale.

    References
    ----------
    Liu et al., Learning Efficient Convolutional Networks through Network
    Slimming, arXiv:1708.06519, equation 1.

    Examples
    --------
    >>> slimming(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))).item()
    8.0
    """
    scales = [
        m.weight.abs().sum()
        for m in model.modules()
        if isinstance(m, NORMS) and m.weight is not None
    ]
    if not scales:
        raise ValueError("model: it has no norm with a scale")
    return torch.stack(scales).sum()


def group_lasso(model: nn.Module, groups: Iterable[Group]) -> Tensor:
    """Add up the lengths of all units: a penalty that empties some of them.

    The sum of sqrt(n) ‖w‖ over units, with n the number of weights w that
    make one.  A length has a kink at zero, which the sum of squares has not:
    that is why whole units vanish.

    Parameters
    ----------
    model
        in training.
    groups
        of this model, from `groups`.

    Returns
    -------
    A scalar with a gradient.

    References
    ----------
    Wen et al., Learning Structured Sparsity in Deep Neural Networks,
    arXiv:1608.03665, equation 3.
    Yuan and Lin, Model selection and estimation in regression with grouped
    variables, J. R. Stat. Soc. B 68, 2006 (the factor sqrt(n)).
    """
    squares = {n: w.square() for n, w in model.named_parameters()}
    ones = {n: torch.ones_like(w) for n, w in squares.items()}
    total = 0.0
    for group in groups:
        length = unit_sums(group, squares).clamp(min=1e-12).sqrt()
        total = total + (unit_sums(group, ones).sqrt() * length).sum()
    return total


def soft_shrink(W: Tensor, *, step: float) -> Tensor:
    """Shorten every row by the same amount, and short ones to zero.

    The proximal step of the group lasso: of all V it minimizes
    ‖V - W‖^2 / 2 + step sqrt(n) * (sum of ‖v‖ over the rows v).

    Parameters
    ----------
    W
        (units, ...), one row for each unit.
    step
        learning rate times strength of the penalty.

    Returns
    -------
    as W.

    References
    ----------
    Yuan and Lin 2006, section 2.

    Examples
    --------
    >>> soft_shrink(torch.tensor([[3.0], [-0.5]]), step=1.0)
    tensor([[2.],
            [-0.]])
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    rows = W.flatten(1)
    length = rows.norm(dim=1, keepdim=True)
    shorter = length - step * math.sqrt(rows.shape[1])
    factor = shorter.clamp(min=0) / length.clamp(min=torch.finfo(W.dtype).tiny)
    return (rows * factor).view_as(W)
