"""Masks: which weights stay, given how important each of them is.

A mask is a bool tensor, True where a weight is kept.  Every rule here keeps
the largest scores and removes exactly as many weights as it was asked to:
among equal scores the one with the lowest index is kept.  The rules differ
in which weights compete with one another: those of a tensor, of all tensors,
of a row, or of a group of four.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .selection import above, check, count, cut, ranks, working_copy

CHUNK = 1 << 19  # scores that a compare network handles at a time


def keep(scores: Tensor, *, sparsity: float) -> Tensor:
    """Keep the largest scores of a tensor (local, unstructured).

    Selection takes linear time: only one order statistic is found, nothing
    is sorted.

    Parameters
    ----------
    scores
        any shape, larger = more important.
    sparsity
        fraction to remove, 0 to 1.

    Returns
    -------
    bool mask of the same shape; exactly ``round(sparsity * numel)`` entries
    are False.

    Raises
    ------
    ValueError
        If a score is nan or the sparsity is not between 0 and 1.

    Examples
    --------
    >>> keep(torch.tensor([3.0, 1.0, 1.0, 2.0]), sparsity=0.25)
    tensor([ True,  True, False,  True])
    """
    check(scores)
    removed = count(sparsity, scores.numel())
    t = cut(working_copy(scores), removed)
    return above([scores], t, scores.numel() - removed)[0]


def magnitude(W: Tensor, *, sparsity: float) -> Tensor:
    """Keep the largest weights of a tensor by magnitude.

    No other mask with as many weights has a smaller `‖W - mask * W‖`.

    Parameters
    ----------
    W
        weights, any shape.
    sparsity
        fraction to remove, 0 to 1.

    Returns
    -------
    bool mask of the same shape, as from ``keep(W.abs(), ...)`` but with one
    copy of W at a time in memory.

    References
    ----------
    Han et al., Learning both Weights and Connections for Efficient Neural
    Networks, arXiv:1506.02626, section 3.

    Examples
    --------
    >>> magnitude(torch.tensor([[0.1, -3.0], [2.0, -0.2]]), sparsity=0.5)
    tensor([[False,  True],
            [ True, False]])
    """
    W = W.detach()
    check(W, "W")
    removed = count(sparsity, W.numel())
    # The selection reorders its copy, so |W| is computed a second time.
    t = cut(working_copy(W).abs_(), removed)
    return above([W.abs()], t, W.numel() - removed)[0]


def keep_each(
    scores: Mapping[str, Tensor],
    *,
    sparsity: float,
    rule: Callable[..., Tensor] = keep,
) -> dict[str, Tensor]:
    """Keep the largest scores of every tensor by itself.

    Parameters
    ----------
    scores
        {name: scores of any shape}.
    sparsity
        fraction to remove from each tensor, 0 to 1.
    rule
        ``rule(scores, sparsity=...) -> mask``; `keep` or `keep_rows`.

    Returns
    -------
    {name: bool mask}.
    """
    return {n: rule(s, sparsity=sparsity) for n, s in scores.items()}


def keep_global(
    scores: Mapping[str, Tensor], *, sparsity: float
) -> dict[str, Tensor]:
    """Keep the largest scores of all tensors together: one threshold.

    Layers whose scores are small lose more, and may lose everything: scores
    must be comparable between layers.

    Parameters
    ----------
    scores
        {name: scores of any shape}.
    sparsity
        fraction to remove from all tensors together, 0 to 1.

    Returns
    -------
    {name: bool mask}; among equal scores those of the first names stay.

    Examples
    --------
    >>> layers = {"a": torch.tensor([1.0, 5.0]), "b": torch.tensor([2.0, 3.0])}
    >>> keep_global(layers, sparsity=0.5)
    {'a': tensor([False,  True]), 'b': tensor([False,  True])}
    """
    for name, s in scores.items():
        check(s, f"scores[{name!r}]")
    if not scores:
        return {}
    total = sum(s.numel() for s in scores.values())
    removed = count(sparsity, total)
    everything = torch.cat([s.detach().flatten() for s in scores.values()])
    dtype = everything.dtype  # the widest of all
    if dtype.is_floating_point and dtype.itemsize < 4:
        everything = everything.float()
    t = cut(everything, removed)
    del everything
    masks = above([*scores.values()], t, total - removed, dtype)
    return dict(zip(scores, masks, strict=True))


def keep_rows(scores: Tensor, *, sparsity: float) -> Tensor:
    """Keep the largest scores of every output row.

    Parameters
    ----------
    scores
        (out, ...), for instance (out, in) or (out, in, kh, kw).
    sparsity
        fraction to remove from each row, 0 to 1.

    Returns
    -------
    bool mask of the same shape; ``round(sparsity * in)`` entries of each
    row are False, in the number of weights of a row.

    References
    ----------
    Sun et al., Wanda, arXiv:2306.11695, section 3 (comparison group).

    Examples
    --------
    >>> keep_rows(torch.tensor([[1.0, 2.0], [9.0, 8.0]]), sparsity=0.5)
    tensor([[False,  True],
            [ True, False]])
    """
    check(scores)
    if scores.ndim < 2:
        raise ValueError(f"scores must have rows, got {tuple(scores.shape)}")
    s = scores.detach().flatten(1)
    n = s.shape[1]
    removed = count(sparsity, n)
    if removed == n:
        return torch.zeros_like(scores, dtype=torch.bool)
    copy = working_copy(s)
    if copy.is_cpu:
        copy.numpy().partition(removed, axis=1)
        t = copy[:, removed, None]
    else:
        t = copy.kthvalue(removed + 1, dim=1, keepdim=True).values
    t = t.to(s.dtype)  # (out, 1)
    mask = s >= t
    if int(mask.count_nonzero()) > (n - removed) * len(s):
        surplus = mask.sum(1, keepdim=True) - (n - removed)
        tied = surplus[:, 0].nonzero()[:, 0]  # rows that keep too many
        equal = s[tied] == t[tied]
        spare = equal.sum(1, keepdim=True) - surplus[tied]
        mask[tied] &= ~equal | (equal.cumsum(1) <= spare)
    return mask.view(scores.shape)


def n_m(scores: Tensor, *, n: int = 2, m: int = 4) -> Tensor:
    """Keep the n largest of every m consecutive scores of a row.

    Parameters
    ----------
    scores
        (out, in) or (in,).  A kernel (out, in, kh, kw) counts as the
        matrix (out, in * kh * kw) that its layer multiplies by, so that its
        groups run along the inputs in memory order.
    n
        how many stay in a group.
    m
        size of a group; divides the length of a row.

    Returns
    -------
    bool mask of the same shape with exactly n True in each group.

    References
    ----------
    Mishra et al., Accelerating Sparse Deep Neural Networks,
    arXiv:2104.08378, section 3 (2:4).
    Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks
    From Scratch, arXiv:2102.04010.

    Examples
    --------
    >>> n_m(torch.tensor([5.0, 1.0, 4.0, 3.0]))
    tensor([ True, False,  True, False])
    """
    check(scores)
    if not 0 <= n <= m or m < 1:
        raise ValueError(f"n must be at most m, both positive: got {n}:{m}")
    row = scores.shape[1:].numel() if scores.ndim > 1 else scores.numel()
    if row % m:
        raise ValueError(
            f"scores: rows of {row} are not divisible by m={m}, "
            f"shape {tuple(scores.shape)}"
        )
    groups = scores.detach().reshape(-1, m)
    mask = torch.empty_like(
        groups, dtype=torch.bool, memory_format=torch.contiguous_format
    )
    rows = max(1, CHUNK // m)
    for part, out in zip(groups.split(rows), mask.split(rows), strict=True):
        torch.lt(ranks(torch.stack(part.unbind(1))).T, n, out=out)
    return mask.view(scores.shape)


def threshold(scores: Tensor, tau: float) -> Tensor:
    """Keep the scores that are at least tau; how many is left to the data.

    Parameters
    ----------
    scores
        any shape.
    tau
        threshold; Han et al. take a multiple of the standard deviation
        of each layer's weights.

    Returns
    -------
    bool mask of the same shape.

    References
    ----------
    Han et al., arXiv:1506.02626, section 4.

    Examples
    --------
    >>> threshold(torch.tensor([1.0, 2.0, 3.0]), 2)
    tensor([False,  True,  True])
    """
    check(scores)
    return scores.detach() >= tau


def random(W: Tensor, *, sparsity: float, seed: int = 0) -> Tensor:
    """Remove weights by lot: the baseline that a score has to beat.

    Parameters
    ----------
    W
        gives shape and device.
    sparsity
        fraction to remove, 0 to 1.
    seed
        decides which.

    Returns
    -------
    bool mask of the shape of W, exactly ``round(sparsity * numel)`` False.

    Examples
    --------
    >>> int(random(torch.zeros(10, 10), sparsity=0.3).sum())
    70
    """
    dice = torch.Generator().manual_seed(seed)
    order = torch.randperm(W.numel(), generator=dice)
    mask = torch.ones(W.numel(), dtype=torch.bool)
    mask[order[: count(sparsity, W.numel())]] = False
    return mask.view(W.shape).to(W.device)


def rigl(W: Tensor, grad: Tensor, mask: Tensor, *, fraction: float) -> Tensor:
    """Drop the smallest weights and grow where the gradient is largest.

    A weight that grows has to start at 0, so that the update changes the
    function only through the weights that are dropped.

    Parameters
    ----------
    W
        weights, any shape.
    grad
        dense gradient, also of the weights that are masked.
    mask
        bool, True = kept so far.
    fraction
        of the kept weights to replace, 0 to 1.

    Returns
    -------
    bool mask with as many True as before.  A dropped weight may come back
    at once if its gradient is among the largest.

    References
    ----------
    Evci et al., Rigging the Lottery, arXiv:1911.11134, section 3.

    Examples
    --------
    >>> W, grad = torch.tensor([3.0, 0.1, 0.0]), torch.tensor([0.0, 1.0, 2.0])
    >>> rigl(W, grad, torch.tensor([True, True, False]), fraction=0.5)
    tensor([ True, False,  True])
    """
    check(W, "W")
    check(grad, "grad")
    if not W.shape == grad.shape == mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool and W, grad, mask of one shape, got "
            f"{tuple(W.shape)}, {tuple(grad.shape)}, {tuple(mask.shape)}"
        )
    kept, n = int(mask.count_nonzero()), mask.numel()
    moved = count(fraction, kept, "fraction")
    dropped = n - kept + moved  # the masked ones go first
    stays = W.detach().abs().masked_fill(~mask, -torch.inf)
    stays = keep(stays, sparsity=dropped / n if n else 0)
    grows = grad.detach().abs().masked_fill(stays, -torch.inf)
    return stays | keep(grows, sparsity=1 - moved / n if n else 1)


def sparsity(mask: Tensor | Mapping[str, Tensor]) -> float:
    """Compute which fraction of the weights is removed.

    Parameters
    ----------
    mask
        bool tensor, or {name: bool tensor}, which count together.

    Returns
    -------
    Between 0 and 1.

    Examples
    --------
    >>> sparsity(torch.tensor([True, False, False, False]))
    0.75
    """
    masks = mask.values() if isinstance(mask, Mapping) else [mask]
    kept = sum(int(m.count_nonzero()) for m in masks)
    total = sum(m.numel() for m in masks)
    if not total:
        raise ValueError("mask is empty")
    return 1 - kept / total
