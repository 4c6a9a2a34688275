"""How much to listen to whom: weights that follow the training.

In `hinton` one number, alpha, divides the attention between labels and
teacher for good.  Here it depends on the time, the task or the sample.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .logits import matching, soften


def annealed(
    z: Tensor,
    v: Tensor,
    y: Tensor | None = None,
    *,
    t: int,
    tau_max: int = 10,
) -> Tensor:
    """Regress the teacher's logits scaled down, ||z - Phi(t) v||^2.

    Phi(t) = 1 - (t - 1) / tau_max.  The first stage of training lets t fall
    from tau_max to 1, so that the targets grow from v / tau_max to v; the
    second stage is cross-entropy with the labels alone.

    Parameters
    ----------
    z, v, y
        as for `matching`.
    t
        1 to tau_max; give each value its share of the epochs.
    tau_max
        the first t.

    Returns
    -------
    Scalar, sum of squares over classes, mean over samples: twice `matching`.

    References
    ----------
    Jafari et al., Annealing Knowledge Distillation, arXiv:2104.07163.

    Examples
    --------
    >>> z, v = torch.tensor([[0.0, 0.0]]), torch.tensor([[4.0, 0.0]])
    >>> [annealed(z, v, t=t, tau_max=4).item() for t in (4, 3, 2, 1)]
    [1.0, 4.0, 9.0, 16.0]
    """
    if not 1 <= t <= tau_max:
        raise ValueError(f"t must be from 1 to {tau_max=}, got {t}")
    return 2 * matching(z, (1 - (t - 1) / tau_max) * v)


def uncertainty(losses: Sequence[Tensor], log_var: Tensor) -> Tensor:
    """Weigh losses by variances that are learned beside the model.

    The sum over the tasks of L / (2 sigma^2) + log sigma.  A loss that stays
    large gets a small weight; the logarithm forbids ignoring them all.  The
    best sigma^2 is L itself, which leaves 1/2 + 1/2 log L.

    Parameters
    ----------
    losses
        k scalars, larger than 0.
    log_var
        (k,) log sigma^2; make it an nn.Parameter *of the model* that is
        trained, starting from 0.

    Returns
    -------
    Scalar.

    References
    ----------
    Kendall, Gal, Cipolla, Multi-Task Learning Using Uncertainty to Weigh
    Losses for Scene Geometry and Semantics, arXiv:1705.07115.

    Examples
    --------
    >>> losses = [torch.tensor(2.0), torch.tensor(0.5)]
    >>> uncertainty(losses, torch.zeros(2))
    tensor(1.2500)
    """
    if not losses or log_var.shape != (len(losses),):
        raise ValueError(
            f"log_var must have shape ({len(losses)},), one for each of "
            f"losses, got {tuple(log_var.shape)}"
        )
    return (torch.stack([*losses]) * (-log_var).exp() + log_var).sum() / 2


def entropy_weight(v: Tensor) -> Tensor:
    """Measure how unsure a model is of each sample, H(p) / log(classes).

    As ``alpha=entropy_weight(z)`` in `hinton` it lets the teacher speak
    where the student hesitates; as ``alpha=1 - entropy_weight(v)`` where
    the teacher does not.

    Parameters
    ----------
    v
        logits (n, classes), of two classes or more.

    Returns
    -------
    (n,) from 0, sure, to 1, no idea; without gradient.

    Examples
    --------
    >>> entropy_weight(torch.tensor([[3.0, 3.0], [0.0, 999.0]]))
    tensor([1., 0.])
    """
    if v.ndim < 2 or v.shape[-1] < 2:
        raise ValueError(f"v must be (n, classes >= 2), got {tuple(v.shape)}")
    p = soften(v.detach(), 1.0)
    return torch.special.entr(p).sum(-1) / math.log(v.shape[-1])
