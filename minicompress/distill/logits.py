"""Losses on logits: what a student can learn from a teacher's outputs.

Throughout, z are the student's logits, v the teacher's, y the labels.  A
softmax at temperature T turns z/T and v/T into the probabilities q_T and
p_T.  Losses are means over the samples, in nats unless said otherwise, and
no gradient ever reaches v.  Any leading axes count as samples, so that a
language model's (N, T, vocab) with labels (N, T) works as well.  Where the
label is -100, as `next_tokens` puts it, `hinton` and `mutual` count nothing.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .texts import IGNORED


def soften(v: Tensor, temperature: float) -> Tensor:
    """Turn logits into probabilities at a temperature, softmax(v / T).

    The order of the classes stays; the higher T, the closer the
    probabilities come to each other.

    Parameters
    ----------
    v
        logits (..., classes).
    temperature
        T > 0; at 1 these are the model's own probabilities.

    Returns
    -------
    as v, each row sums to 1.

    References
    ----------
    Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network,
    arXiv:1503.02531, equation 1.

    Examples
    --------
    >>> soften(torch.tensor([0.0, 4.0]), 4.0)
    tensor([0.2689, 0.7311])
    """
    return (v / _positive(temperature)).softmax(-1)


def kl(z: Tensor, v: Tensor, temperature: float) -> Tensor:
    """Compute D_KL(p_T || q_T), how much the student misses of the teacher.

    The teacher's p stands first in the formula, the student's z first among
    the arguments, as in all losses here.  The gradient with respect to the
    z of one sample is (q_T - p_T) / T.

    Parameters
    ----------
    z
        student's logits (n, classes).
    v
        teacher's logits (n, classes); its dtype and device may differ.
    temperature
        T > 0, for both.

    Returns
    -------
    Scalar, nats per sample ("batchmean"), without the factor T^2.

    Examples
    --------
    >>> v, z = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    >>> round(kl(z, v, 1.0).item(), 4), kl(v, v, 1.0).item()
    (0.3278, 0.0)
    """
    return _divergence(z, v, temperature).mean()


def hinton(
    z: Tensor,
    v: Tensor,
    y: Tensor | None,
    *,
    temperature: float = 4.0,
    alpha: float | Tensor = 0.9,
) -> Tensor:
    """Mix the loss on labels with the loss on the teacher's soft targets.

    (1 - alpha) CE(y, z) + alpha T^2 D_KL(p_T || q_T).  The gradient of the
    divergence falls as 1/T^2; the factor keeps the mix when T changes.

    Parameters
    ----------
    z, v
        as for `kl`.
    y
        int64 labels (n,); None for inputs without labels, with alpha=1.
    temperature
        T > 0 of the soft term.  The labels are learned at 1, and so the
        student is used.
    alpha
        weight of the teacher, 0 to 1; or one for each sample (n,), such as
        `entropy_weight` of v.

    Returns
    -------
    Scalar, nats.

    References
    ----------
    Hinton, Vinyals, Dean, Distilling the Knowledge in a Neural Network,
    arXiv:1503.02531, section 2.

    Examples
    --------
    >>> z, v = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> y = torch.tensor([0])
    >>> round(hinton(z, v, y, temperature=1.0, alpha=0.5).item(), 4)
    0.5105
    """
    if isinstance(alpha, Tensor):
        if alpha.shape not in ((), z.shape[:-1]):
            raise ValueError(
                f"alpha must have shape {tuple(z.shape[:-1])}, "
                f"got {tuple(alpha.shape)}"
            )
        alpha = alpha.to(z)
    elif not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    soft = temperature**2 * _divergence(z, v, temperature)
    if y is None:
        if isinstance(alpha, Tensor) or alpha != 1:
            raise ValueError(f"y is None: alpha must be 1, got {alpha}")
        return soft.mean()
    return _mean((1 - alpha) * _cross_entropy(z, y) + alpha * soft, y)


def matching(z: Tensor, v: Tensor, y: Tensor | None = None) -> Tensor:
    """Regress the logits themselves, 1/2 ||z - v||^2.

    If all rows have mean zero, this divided by the number of classes is the
    limit of T^2 D_KL(p_T || q_T) for T to infinity.  If not, it also asks
    for the teacher's mean logit, which no softmax can see.

    Parameters
    ----------
    z, v
        as for `kl`.
    y
        not used; it is here so that `taught` can hand it over.

    Returns
    -------
    Scalar, half the sum of squares over classes, mean over samples.

    References
    ----------
    Ba and Caruana, Do Deep Nets Really Need to be Deep?, arXiv:1312.6184;
    the limit: arXiv:1503.02531, section 2.1.

    Examples
    --------
    >>> matching(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 1.0]]))
    tensor(2.5000)
    """
    return (z - _teacher(v, z)).square().sum(-1).mean() / 2


def dkd(
    z: Tensor,
    v: Tensor,
    y: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Teach target against rest, and the rest among itself, separately.

    T^2 (alpha TCKD + beta NCKD).  TCKD is the divergence of (p_t, 1 - p_t),
    t being the label; NCKD that of the other classes renormalized.  The
    divergence of `kl` is TCKD + (1 - p_t) NCKD: a teacher who is sure
    silences what it knows of the other classes, a fixed beta does not.

    This is the teacher's part only.  As in the paper the loss on the labels
    is added by the caller: ``F.cross_entropy(z, y) + dkd(z, v, y)``.

    Parameters
    ----------
    z, v
        as for `kl`.
    y
        int64 labels (n,).
    alpha, beta
        weights of TCKD and NCKD.
    temperature
        T > 0, for both models.

    Returns
    -------
    Scalar, nats.

    References
    ----------
    Zhao et al., Decoupled Knowledge Distillation, arXiv:2203.08679.

    Examples
    --------
    >>> z, v = torch.zeros(1, 3), torch.tensor([[9.0, 2.0, 0.0]])
    >>> y = torch.tensor([0])
    >>> round(dkd(z, v, y, alpha=0.0, beta=1.0, temperature=1.0).item(), 4)
    0.3278
    """
    v = _teacher(v, z)
    _labels(y, z)
    classes = z.shape[-1]
    offsets = torch.arange(1, classes, device=z.device)
    others = (y[..., None] + offsets) % classes  # (n, classes - 1)

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (logits / _positive(temperature)).log_softmax(-1)
        target = log_p.gather(-1, y[..., None])  # (n, 1)
        rest = log_p.gather(-1, others)
        both = torch.cat([target, rest.logsumexp(-1, keepdim=True)], -1)
        return both, rest

    # log-probabilities are logits too: at T = 1 kl renormalizes them
    tckd, nckd = (
        kl(b, a, 1.0) for a, b in zip(split(v), split(z), strict=True)
    )
    return temperature**2 * (alpha * tckd + beta * nckd)


def label_smoothing(z: Tensor, y: Tensor, *, eps: float = 0.1) -> Tensor:
    """Learn from labels and from a teacher who knows nothing.

    That is `hinton` at T = 1 with alpha = eps and a teacher with equal
    logits.  The constant eps log(classes), the entropy of that teacher, is
    added to make it the cross-entropy with (1 - eps) onehot(y) +
    eps / classes; it has no gradient.

    Parameters
    ----------
    z
        logits (n, classes).
    y
        int64 labels (n,).
    eps
        share of the uniform distribution, 0 to 1.

    Returns
    -------
    Scalar, nats.

    References
    ----------
    Szegedy et al., Rethinking the Inception Architecture for Computer
    Vision, arXiv:1512.00567, section 7.

    Examples
    --------
    >>> z, y = torch.tensor([[2.0, 0.0]]), torch.tensor([0])
    >>> round(label_smoothing(z, y, eps=0.2).item(), 4)
    0.3269
    """
    if not 0 <= eps <= 1:
        raise ValueError(f"eps must be from 0 to 1, got {eps}")
    ignorant = torch.zeros_like(z)
    loss = hinton(z, ignorant, y, temperature=1.0, alpha=eps)
    return loss + eps * math.log(z.shape[-1])


def mutual(logits: Sequence[Tensor], y: Tensor) -> list[Tensor]:
    """Let several students learn from the labels and from each other.

    Each one's loss is CE(y, z_k) plus the mean divergence D_KL(p_j || p_k)
    from its peers j, who get no gradient from it.  So the sum of all losses
    trains each student by its own.

    Parameters
    ----------
    logits
        two or more (n, classes), one for each student.
    y
        int64 labels (n,).

    Returns
    -------
    A scalar for each student, nats.

    References
    ----------
    Zhang et al., Deep Mutual Learning, arXiv:1706.00384.

    Examples
    --------
    >>> logits = [torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])]
    >>> [round(x.item(), 4) for x in mutual(logits, torch.tensor([0]))]
    [1.021, 0.5607]
    """
    if len(logits) < 2:
        raise ValueError(f"logits: two students or more, got {len(logits)}")
    losses = []
    for k, z in enumerate(logits):
        peers = [_divergence(z, v, 1.0) for j, v in enumerate(logits) if j != k]
        each = _cross_entropy(z, y) + sum(peers) / len(peers)
        losses.append(_mean(each, y))
    return losses


def _divergence(z: Tensor, v: Tensor, temperature: float) -> Tensor:
    """Compute D_KL(p_T || q_T) of each sample (n,)."""
    log_p = (_teacher(v, z) / _positive(temperature)).log_softmax(-1)
    log_q = (z / temperature).log_softmax(-1)
    # a class that is ruled out: 0 times a number is 0, 0 inf is not
    least = torch.finfo(z.dtype).min
    log_p, log_q = log_p.clamp_min(least), log_q.clamp_min(least)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    """Compute the cross-entropy of each sample with its label (n,)."""
    _labels(y, z)
    each = F.cross_entropy(z.flatten(0, -2), y.flatten(), reduction="none")
    return each.view(y.shape)


def _mean(each: Tensor, y: Tensor) -> Tensor:
    """Average over the samples that have a label, as F.cross_entropy does."""
    counts = y != IGNORED  # not an index: vmap can not batch that
    return (each * counts).sum() / counts.sum()


def _teacher(v: Tensor, z: Tensor) -> Tensor:
    """Cut v off from its gradient and give it the dtype and device of z."""
    if not z.numel():
        raise ValueError(f"z: there are no samples in {tuple(z.shape)}")
    if z.ndim < 2 or v.shape != z.shape:
        raise ValueError(
            f"v must have the shape of z, (n, classes), got {tuple(v.shape)} "
            f"for {tuple(z.shape)}"
        )
    return v.detach().to(z)


def _labels(y: Tensor | None, z: Tensor) -> None:
    if y is None:
        raise ValueError("y: this loss needs labels, got None")
    if z.ndim < 2 or y.shape != z.shape[:-1] or y.dtype != torch.int64:
        raise ValueError(
            f"y must be int64 of shape {tuple(z.shape[:-1])}, "
            f"got {y.dtype} of {tuple(y.shape)}"
        )


def _positive(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return temperature
