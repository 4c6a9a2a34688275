"""Masks that training itself decides: learned, spliced, refreshed.

Each function here is an f for `through.attach`, or goes with one.  They
differ in how a weight that is masked now hears from the loss: through a
random gate that is sometimes open, or through a gradient that passes the
mask as if it were not there (straight-through).
"""

import math

import torch
from torch import Tensor, nn

from ..through import straight
from .masks import n_m
from .selection import check

BETA = 2 / 3  # temperature: below 1 most gates are nearly open or shut
LOW, HIGH = -0.1, 1.1  # the interval that is clipped to 0..1


def hard_concrete(
    w: Tensor, log_alpha: Tensor, noise: Tensor | None = None
) -> Tensor:
    """Multiply a weight by a gate whose openness is trained.

    A sigmoid is stretched beyond 0 and 1 and clipped, so that the gate is
    exactly 0 or exactly 1 with positive probability and has a gradient in
    between.

    Parameters
    ----------
    w
        weights, any shape.
    log_alpha
        as w, one number for each gate; an axis of size 1 shares them,
        (out, 1) gates whole rows.  Positive = rather open.
    noise
        as log_alpha, uniform from 0 to 1: a gate drawn at random, for
        training.  None: the gate without chance, for the test.

    Returns
    -------
    as w; exactly zero where the gate is shut.

    References
    ----------
    Louizos, Welling, Kingma, Learning Sparse Neural Networks through L0
    Regularization, arXiv:1712.01312, equations 10, 11 and 13.

    Examples
    --------
    >>> log_alpha = torch.tensor([-9.0, 0.0, 9.0])
    >>> hard_concrete(torch.full((3,), 4.0), log_alpha)
    tensor([0., 2., 4.])
    """
    sizes = zip(log_alpha.shape, w.shape, strict=False)
    if log_alpha.ndim != w.ndim or any(a not in (1, b) for a, b in sizes):
        raise ValueError(
            f"log_alpha must have shape {tuple(w.shape)}, or 1 for an axis, "
            f"got {tuple(log_alpha.shape)}"
        )
    if noise is not None and noise.shape != log_alpha.shape:
        raise ValueError(
            f"noise must have shape {tuple(log_alpha.shape)}, "
            f"got {tuple(noise.shape)}"
        )
    if noise is None:
        s = log_alpha.sigmoid()
    else:
        s = ((noise.logit() + log_alpha) / BETA).sigmoid()
    return w * (s * (HIGH - LOW) + LOW).clamp(0, 1)


class HardConcrete(nn.Module):
    """`hard_concrete` with fresh noise in training, none in evaluation.

    Like dropout it follows ``model.train()`` and ``model.eval()``, which
    reach it because `through.attach` makes it a part of the model: bake in
    evaluation mode.

    Examples
    --------
    >>> from minicompress import through
    >>> gates = nn.Parameter(torch.tensor([[-9.0, 9.0]]))
    >>> model = through.attach(
    ...     nn.Linear(2, 1), "weight", HardConcrete(), log_alpha=gates
    ... )
    >>> through.bake(model.eval()).weight != 0
    tensor([[False,  True]])
    """

    def forward(self, w: Tensor, log_alpha: Tensor) -> Tensor:
        """Draw a gate in training, as dropout from torch's own generator."""
        noise = torch.rand_like(log_alpha) if self.training else None
        return hard_concrete(w, log_alpha, noise)


def expected_l0(log_alpha: Tensor) -> Tensor:
    """Compute the expected number of gates that are not shut.

    Unlike the number itself it has a gradient: add a multiple of it to the
    loss.

    Parameters
    ----------
    log_alpha
        one number for each gate of `hard_concrete`, any shape.

    Returns
    -------
    Scalar, 0 to the number of gates.

    References
    ----------
    Louizos, Welling, Kingma, Learning Sparse Neural Networks through L0
    Regularization, arXiv:1712.01312, equation 12.

    Examples
    --------
    >>> round(expected_l0(torch.tensor([0.3, -99.0])).item(), 4)
    0.8697
    """
    return (log_alpha - BETA * math.log(-LOW / HIGH)).sigmoid().sum()


def splice(mask: Tensor, scores: Tensor, *, low: float, high: float) -> Tensor:
    """Cut the weights below `low`, take back those from `high` on.

    In between all stays as it was, so that a weight near the threshold
    does not come and go.  To come back it must be trained while it is
    masked: mask by `spliced`.

    Parameters
    ----------
    mask
        bool, True = kept so far.
    scores
        as mask, larger = more important; `|w|` in the paper.
    low, high
        thresholds; with low = high the past does not matter.

    Returns
    -------
    bool mask of the same shape.

    References
    ----------
    Guo, Yao, Chen, Dynamic Network Surgery for Efficient DNNs,
    arXiv:1608.04493, equation 3.

    Examples
    --------
    >>> mask = torch.tensor([True, True, False, False])
    >>> scores = torch.tensor([1.0, 2.0, 2.0, 3.0])
    >>> splice(mask, scores, low=1.5, high=2.5)
    tensor([False,  True, False,  True])
    """
    check(scores)
    if mask.dtype != torch.bool or mask.shape != scores.shape:
        raise ValueError(
            f"mask must be bool of shape {tuple(scores.shape)}, got "
            f"{mask.dtype} of {tuple(mask.shape)}"
        )
    if not low <= high:
        raise ValueError(f"low must be at most high, got {low=}, {high=}")
    scores = scores.detach()
    return (scores >= high) | (mask & (scores >= low))


def spliced(w: Tensor, mask: Tensor) -> Tensor:
    """Mask a weight, but let the gradient reach all of it.

    A weight that is masked goes on learning what it would be worth; with
    w * mask its gradient is zero and it stays what it is.

    Parameters
    ----------
    w
        weights, any shape.
    mask
        as w, True = keep.

    Returns
    -------
    as w; exactly zero where masked.

    References
    ----------
    Guo, Yao, Chen, Dynamic Network Surgery for Efficient DNNs,
    arXiv:1608.04493, equation 2.

    Examples
    --------
    >>> w = torch.tensor([2.0, 3.0], requires_grad=True)
    >>> (5 * spliced(w, torch.tensor([True, False]))).sum().backward()
    >>> w.grad
    tensor([5., 5.])
    """
    return straight(w, w * mask)


def sr_ste(w: Tensor, *, n: int = 2, m: int = 4, decay: float = 2e-4) -> Tensor:
    """Keep n of each m neighbors, chosen anew whenever w is used.

    The gradient passes the mask, and ``decay * w`` is added to it where w
    is masked: what is out shrinks, so that the choice settles.

    Parameters
    ----------
    w
        (out, in) weights or a kernel (out, in, kh, kw), as for `n_m`.
    n, m
        how many stay in a group, and its size.
    decay
        lambda of the paper.  It is added in every backward pass, once for
        each use of w: divide it by the number of passes in a step.

    Returns
    -------
    as w, with at most n non-zeros in each group.

    References
    ----------
    Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks
    From Scratch, arXiv:2102.04010, section 3 (SR-STE).

    Examples
    --------
    >>> w = torch.tensor([[4.0, 3.0, 2.0, 1.0]], requires_grad=True)
    >>> y = sr_ste(w, decay=0.5)
    >>> y.sum().backward()
    >>> w.grad
    tensor([[1.0000, 1.0000, 2.0000, 1.5000]])
    """
    return _Refined.apply(w, n_m(w.detach().abs(), n=n, m=m), decay)


class _Refined(torch.autograd.Function):
    """Forward mask * w, backward g + decay * (1 - mask) * w."""

    @staticmethod
    def forward(ctx, w: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(w, mask)
        ctx.decay = decay
        return w * mask

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None]:
        w, mask = ctx.saved_tensors
        return g + ctx.decay * w * ~mask, None, None
