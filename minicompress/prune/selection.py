"""Selection: the order statistic behind a mask, found without sorting."""

import torch
from torch import Tensor


def check(scores: Tensor, name: str = "scores") -> None:
    """Refuse nan, which has no rank; the maximum is nan if anything is."""
    if scores.numel() and scores.detach().max().isnan():
        raise ValueError(f"{name} {tuple(scores.shape)} holds nan")


def count(sparsity: float, n: int, name: str = "sparsity") -> int:
    """Say how many of n weights a sparsity removes."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {sparsity}")
    return round(sparsity * n)


def working_copy(x: Tensor) -> Tensor:
    """Copy for a selection, which reorders it; numpy has no bfloat16."""
    small = x.is_floating_point() and x.dtype.itemsize < 4
    return x.detach().to(
        torch.float32 if small else x.dtype,
        copy=True,
        memory_format=torch.contiguous_format,
    )


def cut(x: Tensor, removed: int) -> float:
    """Find the smallest score that stays if so many go.  Reorders x."""
    x = x.view(-1)
    if removed == len(x):
        return torch.inf
    if x.is_cpu:  # numpy selects in place; torch would sort out indices too
        array = x.numpy()
        array.partition(removed)
        return array[removed].item()
    return x.kthvalue(removed + 1).values.item()


def above(
    scores: list[Tensor], t: float, kept: int, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Mask scores >= t, then remove the last of those equal to t."""
    # A number is rounded to the type of the tensor it is compared with.
    flat = [s.detach().flatten().to(dtype or s.dtype) for s in scores]
    masks = [s >= t for s in flat]
    surplus = sum(int(m.count_nonzero()) for m in masks) - kept
    for s, m in zip(reversed(flat), reversed(masks), strict=True):
        if surplus <= 0:
            break
        last = (s == t).nonzero()[-surplus:, 0]
        m[last] = False
        surplus -= len(last)
    return [m.view(s.shape) for m, s in zip(masks, scores, strict=True)]


def ranks(lanes: Tensor) -> Tensor:
    """Count for each lane (m, groups) how many of its group go before it.

    Every pair is compared once, all pairs at one distance together; a tie
    counts for the lower index.
    """
    m = len(lanes)
    dtype = torch.uint8 if m <= 256 else torch.int32
    # As if every comparison were lost; a win takes one off.
    start = torch.arange(m - 1, -1, -1, dtype=dtype, device=lanes.device)
    ranks = start[:, None].repeat(1, lanes.shape[1])
    for d in range(1, m):
        wins = (lanes[:-d] >= lanes[d:]).view(torch.uint8)
        ranks[:-d] -= wins
        ranks[d:] += wins
    return ranks
