"""Prefix codes: their lengths by Huffman's rule, and their words."""

import heapq

import numpy as np
import torch
from torch import Tensor

LIMIT = 16  # bits of the longest code word: 2^16 symbols still fit


def code_lengths(counts: Tensor, *, limit: int = LIMIT) -> Tensor:
    """Find the lengths of the best prefix code for these counts.

    Merge the two rarest symbols until one is left; a symbol's length is the
    number of merges it took part in.  Ties go to the older entry, so the
    result is the same everywhere.

    Parameters
    ----------
    counts : integer Tensor (K,)
        Occurrences of each symbol.
    limit : int
        Longest code word allowed, in bits.

    Returns
    -------
    int64 Tensor (K,), on the CPU
        Bits of each code word; 0 for symbols that do not occur.

    Raises
    ------
    ValueError
        If more than 2^limit symbols occur.

    Examples
    --------
    >>> code_lengths(torch.tensor([5, 2, 0, 1]))
    tensor([1, 2, 0, 2])
    """
    if counts.numel() and int(counts.min()) < 0:
        raise ValueError(f"counts must not be negative, got {counts.min()}")
    counts = counts.cpu()
    present = counts.nonzero().flatten()
    if len(present) > 1 << limit:
        raise ValueError(f"{len(present)} symbols need more than limit={limit}")
    heap = [(c, i) for i, c in enumerate(counts[present].tolist())]
    parent = [0] * (2 * len(heap))
    heapq.heapify(heap)
    node = len(heap)
    while len(heap) > 1:
        a, i = heapq.heappop(heap)
        b, j = heapq.heappop(heap)
        parent[i] = parent[j] = node
        heapq.heappush(heap, (a + b, node))
        node += 1
    depth = [0] * node
    for i in range(node - 2, -1, -1):  # from the root down
        depth[i] = depth[parent[i]] + 1
    found = torch.tensor(depth[: len(present)], dtype=torch.int64)
    if len(present) == 1:
        found[0] = 1
    if len(present) > 1 and int(found.max()) > limit:
        found = package_merge(counts[present], limit)
    lengths = torch.zeros(counts.numel(), dtype=torch.int64)
    lengths[present] = found
    return lengths


def package_merge(counts: Tensor, limit: int) -> Tensor:
    """Find the best prefix code whose words have at most `limit` bits.

    Every symbol may buy one bit at each of `limit` levels.  On the way down
    the cheapest pairs of a level are packed and offered at the next one;
    2K - 2 purchases at the last level make a complete code.

    Parameters
    ----------
    counts : integer Tensor (K,)
        Positive, 2 <= K <= 2^limit.
    limit : int

    Returns
    -------
    int64 Tensor (K,)

    References
    ----------
    L. L. Larmore, D. S. Hirschberg, "A fast algorithm for optimal
    length-limited Huffman codes", J. ACM 37(3), 1990.

    Examples
    --------
    >>> package_merge(torch.tensor([8, 4, 2, 1]), limit=2)
    tensor([2, 2, 2, 2])
    """
    counts = counts.cpu().numpy()
    order = np.argsort(counts, kind="stable")
    leaves = counts[order].astype(np.int64)
    packages, levels = leaves[:0], []
    for _ in range(limit):
        items = np.concatenate([leaves, packages])
        rank = np.argsort(items, kind="stable")
        levels.append(rank < leaves.size)  # which of the sorted are symbols
        items = items[rank][: items.size // 2 * 2]
        packages = items[0::2] + items[1::2]
    lengths = np.zeros(leaves.size, np.int64)
    take = 2 * leaves.size - 2
    for is_leaf in reversed(levels):
        bought = int(is_leaf[:take].sum())
        lengths[order[:bought]] += 1
        take = 2 * (take - bought)
    return torch.from_numpy(lengths)


def canonical(lengths: Tensor) -> Tensor:
    """Choose the code words: in order of length, then symbol, counting up.

    Parameters
    ----------
    lengths : int64 Tensor (K,)
        0 for symbols without a code word.

    Returns
    -------
    int64 Tensor (K,)
        The word of symbol s is the lowest ``lengths[s]`` bits of entry s.

    Raises
    ------
    ValueError
        If the lengths break Kraft's inequality Σ 2^-l <= 1.

    Examples
    --------
    >>> canonical(torch.tensor([1, 3, 2, 3]))  # 0, 110, 10, 111
    tensor([0, 6, 2, 7])
    """
    longest = max(int(lengths.max()), 0) if lengths.numel() else 0
    share = torch.where(lengths > 0, 1 << (longest - lengths), 0)
    if int(share.sum()) > 1 << longest:
        raise ValueError("lengths break Kraft's inequality: sum of 2^-l > 1")
    # a word of l bits covers 2^-l of the line from 0 to 1: lay them end to end
    order = lengths.argsort(stable=True)
    start = torch.empty_like(share)
    start[order] = share[order].cumsum(0) - share[order]
    return torch.where(lengths > 0, start >> (longest - lengths), 0)
