"""Relational distillation: not where the samples lie, but how to each other.

Distances and angles between the samples of a batch do not depend on the
width of the embedding, so no regressor is needed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rkd_distance(s: Tensor, t: Tensor) -> Tensor:
    """Compare the student's distances between samples with the teacher's.

    Each side is measured in units of its own mean distance.  The paper
    adds up over the pairs; here it is their mean, so that the weight of
    the loss does not depend on the batch.

    Parameters
    ----------
    s
        (B, width) the student's embeddings of B samples, B at least 2.
    t
        (B, any width) the teacher's; no gradient reaches them.

    Returns
    -------
    Scalar: the Huber loss (threshold 1), averaged over the pairs i != j.

    References
    ----------
    Park et al., Relational Knowledge Distillation, arXiv:1904.05068,
    section 3.2.1.

    Examples
    --------
    >>> s = torch.tensor([[0.0], [1.0], [2.0]])
    >>> t = torch.tensor([[0.0, 5.0], [3.0, 9.0], [6.0, 13.0]])
    >>> rkd_distance(s, t).item()  # the same line, five times as long
    0.0
    """
    _check(s, t, 2)
    pairs = ~torch.eye(len(s), dtype=torch.bool, device=s.device)
    psi_s, psi_t = distances(s), distances(t.detach()).to(s.dtype)
    return F.huber_loss(psi_s[pairs], psi_t[pairs])


def rkd_angle(s: Tensor, t: Tensor) -> Tensor:
    """Compare the student's angles between samples with the teacher's.

    Time and memory grow as B^3; the mean is over triples, as in
    `rkd_distance` over pairs.

    Parameters
    ----------
    s
        (B, width) the student's embeddings of B samples, B at least 3.
    t
        (B, any width) the teacher's; no gradient reaches them.

    Returns
    -------
    Scalar: the Huber loss (threshold 1) of the cosines, averaged over the
    triples of three different samples.

    References
    ----------
    Park et al., Relational Knowledge Distillation, arXiv:1904.05068,
    section 3.2.2.

    Examples
    --------
    >>> t = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    >>> turned = torch.tensor([[0.0, 7.0], [0.0, 0.0], [-7.0, 0.0]])
    >>> rkd_angle(turned, t).item()
    0.0
    """
    _check(s, t, 3)
    same = torch.eye(len(s), dtype=torch.bool, device=s.device)
    triples = ~(same[:, :, None] | same[:, None] | same[None])
    psi_s, psi_t = angles(s), angles(t.detach()).to(s.dtype)
    return F.huber_loss(psi_s[triples], psi_t[triples])


def distances(x: Tensor) -> Tensor:
    """Measure distances in units of the mean over the pairs i != j.

    Parameters
    ----------
    x
        (B, width) embeddings, B at least 2.

    Returns
    -------
    (B, B); all zero if all samples are alike.

    Examples
    --------
    >>> distances(torch.tensor([[0.0], [1.0], [3.0]]))
    tensor([[0.0000, 0.5000, 1.5000],
            [0.5000, 0.0000, 1.0000],
            [1.5000, 1.0000, 0.0000]])
    """
    length, _ = _lengths(x[:, None] - x[None])  # (B, B)
    mean = length.sum() / (len(x) * (len(x) - 1))
    return length / mean.clamp_min(torch.finfo(x.dtype).tiny)


def angles(x: Tensor) -> Tensor:
    """Compute the cosine of the angle at sample j between i and k.

    Parameters
    ----------
    x
        (B, width) embeddings.

    Returns
    -------
    (B, B, B), at [i, j, k]; 0 where i or k coincides with j.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    >>> angles(x)[0, 1, 2]  # 45 degrees
    tensor(0.7071)
    """
    e = x[:, None] - x[None]  # (B, B, width)
    length, apart = _lengths(e)
    e = e * (apart / length.where(apart, 1))[..., None]
    return torch.einsum("ijd,kjd->ijk", e, e)


def _lengths(e: Tensor) -> tuple[Tensor, Tensor]:
    """Return lengths whose gradient at 0 is 0, and where they are not 0."""
    square = e.square().sum(-1)
    apart = square > 0
    # a root has no gradient at 0: it must not even be computed there
    return square.where(apart, 1).sqrt() * apart, apart


def _check(s: Tensor, t: Tensor, least: int) -> None:
    if s.ndim != 2 or len(s) < least:
        raise ValueError(
            f"s must be (B, width) with B at least {least}, "
            f"got {tuple(s.shape)}"
        )
    if t.ndim != 2 or len(t) != len(s):
        raise ValueError(f"t must be ({len(s)}, width), got {tuple(t.shape)}")
