"""Which rank: by energy, by noise, or by what all layers together may cost.

A rank is worth what it adds to the outputs.  With the singular values s of W,
or of W S as `drone` sees it, rank r leaves out Σ_{i>r} s_i²; `rank_table`
lists that beside what r costs, and `choose_ranks` spends a budget.
"""

import heapq
import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from .matrices import root

Cost = Callable[[str, int | None], float]
Table = Mapping[str, Mapping[int | None, tuple[float, float]]]


def spectrum(W: Tensor, H: Tensor | None = None) -> Tensor:
    """List the singular values of W, or those that count for its outputs.

    Parameters
    ----------
    W
        (out, in) weights.
    H
        (in, in) second moments E[x x^T] of the inputs.

    Returns
    -------
    (min(out, in),) float64
        Falling: of W, or with H of W S, S S^T = H.  The squares of those
        after the first r add up to what `svd`, or `drone` without damping,
        loses with rank r.  Values below 1.5e-8 of the largest are rounding.

    Examples
    --------
    >>> W = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    >>> spectrum(W)
    tensor([3., 2.], dtype=torch.float64)
    >>> spectrum(W, torch.tensor([[1.0, 0.0], [0.0, 9.0]]))
    tensor([6., 3.], dtype=torch.float64)
    """
    if W.ndim != 2:
        raise ValueError(f"W must be (out, in), got {tuple(W.shape)}")
    M, n = W.detach().double(), W.shape[1]
    if H is not None and H.shape != (n, n):
        raise ValueError(
            f"H must be {(n, n)} for W {tuple(W.shape)}, got {tuple(H.shape)}"
        )
    if H is not None and W.shape[0] <= n:
        G = M @ H.double() @ M.T
    else:
        M = M if H is None else M @ root(H)
        G = M.T @ M if M.shape[0] > n else M @ M.T
    return torch.linalg.eigvalsh(G).clamp(min=0).sqrt().flip(0)


def energy_rank(s: Tensor, *, energy: float) -> int:
    """Find the smallest rank that keeps a share of the squared length.

    Parameters
    ----------
    s
        (k,) singular values, falling.
    energy
        share of Σ s_i² that is kept, above 0 to 1; to 1e-12, so that 1 does
        not ask for what is rounding only.

    Returns
    -------
    int
        0 if all are zero.

    Examples
    --------
    >>> energy_rank(torch.tensor([3.0, 2.0, 1.0]), energy=0.9)
    2
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, got {energy}")
    kept = _falling(s, "s").square().cumsum(0)
    enough = (energy - 1e-12) * kept[-1]
    return int((kept < enough).sum()) + 1 if kept[-1] > 0 else 0


def noise_rank(s: Tensor, shape: tuple[int, int]) -> int:
    """Count the singular values that a matrix of noise would not have.

    Of a matrix of low rank plus white noise, the values above a multiple of
    the median give the nearest estimate that a threshold can: 2.858 times
    the median for a square matrix.

    Parameters
    ----------
    s
        (min(shape),) singular values of the whole matrix, falling.
    shape
        of the matrix.

    References
    ----------
    Gavish and Donoho, The Optimal Hard Threshold for Singular Values is
    4/√3, arXiv:1305.5870.

    Examples
    --------
    >>> noise_rank(torch.tensor([9.0, 1.1, 1.0, 0.9]), (4, 4))
    1
    """
    if s.shape != (min(shape),):
        raise ValueError(f"s must be ({min(shape)},), got {tuple(s.shape)}")
    s = _falling(s, "s")
    b = min(shape) / max(shape)
    best = 2 * (b + 1) + 8 * b / (b + 1 + math.sqrt(b * b + 14 * b + 1))
    return int((s > s.quantile(0.5) * math.sqrt(best / _median(b))).sum())


def _median(b: float) -> float:
    """Find the median of the squared singular values of white noise."""
    low, high = (1 - math.sqrt(b)) ** 2, (1 + math.sqrt(b)) ** 2
    # the Marchenko-Pastur density over t = middle - half · cos(angle): what
    # is a root at both ends becomes a sine, smooth enough for a sum
    angle = (np.arange(100_000) + 0.5) * (math.pi / 100_000)
    t = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    share = (np.sin(angle) ** 2 / t).cumsum()
    return float(np.interp(share[-1] / 2, share, t))


def break_even(out: int, inputs: int) -> float:
    """Give the rank at which two factors cost what the matrix costs.

    Parameters
    ----------
    out, inputs
        sizes of the matrix.

    Examples
    --------
    >>> break_even(1000, 1000), break_even(4000, 1000)
    (500.0, 800.0)
    """
    return out * inputs / (out + inputs)


def rank_table(
    spectra: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    *,
    step: int = 1,
    cost: Cost | None = None,
) -> dict[str, dict[int | None, tuple[float, float]]]:
    """List what each rank of each layer costs, and what it loses.

    Parameters
    ----------
    spectra
        {name: (min(out, in),) singular values, falling}, of `spectrum`.
        Layers are compared as they are; with s / s.norm() a layer's loss is
        relative to its size.
    shapes
        {name: (out, in)}.
    step
        ranks are its multiples.
    cost
        ``cost(name, rank)``, and ``cost(name, None)`` of the layer as it
        is, for instance seconds that were measured; math.inf for a rank
        that is not to be had.  By default the numbers that are stored.

    Returns
    -------
    {name: {rank: (cost, loss)}}
        Loss is Σ_{i>r} s_i².  The rank None stands for the layer as it is,
        which loses nothing; ranks that cost as much, from `break_even` on,
        are not listed.

    Examples
    --------
    >>> s = {"a": torch.tensor([3.0, 2.0, 1.0])}
    >>> rank_table(s, {"a": (3, 4)})
    {'a': {1: (7, 5.0), None: (12, 0.0)}}
    """
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    if spectra.keys() != shapes.keys():
        names = sorted(spectra.keys() ^ shapes.keys())
        raise ValueError(f"spectra and shapes differ in {names}")

    def numbers(name, rank):
        m, n = shapes[name]
        return m * n if rank is None else rank * (m + n)

    cost, table = cost or numbers, {}
    for name, s in spectra.items():
        k = min(shapes[name])
        if s.shape != (k,):
            raise ValueError(f"{name}: s must be ({k},), got {tuple(s.shape)}")
        tail = _falling(s, name).square().flip(0).cumsum(0).flip(0).tolist()
        tail.append(0.0)
        own = {r: (cost(name, r), tail[r]) for r in range(step, k + 1, step)}
        whole = cost(name, None)
        table[name] = {r: x for r, x in own.items() if x[0] < whole}
        table[name][None] = (whole, 0.0)
    return table


def choose_ranks(table: Table, *, budget: float) -> dict[str, int | None]:
    """Spend a budget on the ranks that lower the loss most for their cost.

    From the cheapest choice of every layer on, the step is taken again and
    again that gains most per cost, of those that fit.  As singular values
    fall, the next rank gains most at first: s_{r+1}² / (out + in).  Where
    they have become even, the last step gains more, back to the layer as it
    is; a layer with a flat spectrum never stops on the way.

    Parameters
    ----------
    table
        {name: {rank or None: (cost, loss)}}, of `rank_table` or measured.
        Without its None a layer is factored in any case.
    budget
        of all layers together, in the unit of the costs.

    Returns
    -------
    {name: rank, or None for a layer that stays as it is}
        If the losses add up, no choice of this cost has a smaller loss,
        unless a better step did not fit any more; the last steps fill what
        is left.

    Raises
    ------
    ValueError
        If the cheapest choices exceed the budget.

    Examples
    --------
    >>> s = {"a": torch.tensor([3.0, 2.0, 1.0]), "b": torch.ones(3)}
    >>> table = rank_table(s, {"a": (3, 9), "b": (3, 9)})
    >>> choose_ranks(table, budget=38)
    {'a': 2, 'b': 1}
    """
    options = {name: _options(name, own) for name, own in table.items()}
    place = dict.fromkeys(options, 0)  # in the list of a layer's options
    left = budget - sum(cost[0] for _, cost, _ in options.values())
    if left < 0:
        raise ValueError(
            f"budget: {budget}, but the cheapest choices take {budget - left}"
        )
    heap = []

    def offer(name):
        _, cost, loss = options[name]
        price, gain = cost - cost[place[name]], loss[place[name]] - loss
        fits = (gain > 0) & (price <= left)
        if fits.any():
            # what costs nothing more comes first
            rate = np.where(fits, gain / np.maximum(price, 1e-200), -1)
            i = int(rate.argmax())
            heapq.heappush(heap, (-rate[i], name, i, price[i]))

    for name in options:
        offer(name)
    while heap:
        _, name, i, price = heapq.heappop(heap)
        if price <= left:
            place[name], left = i, left - price
        offer(name)
    return {name: options[name][0][i] for name, i in place.items()}


def _options(name: str, own: Mapping) -> tuple[list, np.ndarray, np.ndarray]:
    """Sort a layer's choices by cost; leave out what is not to be had."""
    had = {r: x for r, x in own.items() if x[0] < math.inf}
    if not had or not all(map(np.isfinite, sum(had.values(), ()))):
        raise ValueError(f"table: {name} needs choices with finite entries")
    ranks = sorted(had, key=had.get)
    cost, loss = np.array([had[r] for r in ranks], dtype=float).T
    return ranks, cost, loss


def _falling(s: Tensor, name: str) -> Tensor:
    s = s.detach().double()
    if s.ndim != 1 or not len(s) or not (s.diff() <= 0).all() or s[-1] < 0:
        raise ValueError(
            f"{name}: singular values must fall and not be negative, got "
            f"shape {tuple(s.shape)}"
        )
    return s
