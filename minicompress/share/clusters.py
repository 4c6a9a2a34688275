"""Few values for many weights: k-means of single numbers.

Numbers can be sorted, and a cluster of sorted numbers is an interval of
them.  So a clustering is a list of K - 1 borders, what a step of k-means
needs are differences of running sums, and the best of all clusterings can be
found: by dynamic programming, not by luck.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import codes

BINS = 1024  # at least, of the histogram that `kmeans` starts from


def kmeans(
    w: Tensor,
    *,
    bits: int,
    clusters: int | None = None,
    start: str = "histogram",
    steps: int = 300,
    seed: int = 0,
    weight: Tensor | None = None,
) -> codes.Codebook:
    """Give every weight the nearest of K shared values.

    The squared error Σ m_i (w_i - c_{a_i})² is lowered by turns: a weight
    goes to the nearest centroid, a centroid to the mean of its weights.
    Where this ends depends on where it starts.

    Parameters
    ----------
    w
        weights, any shape; of a pruned layer those that are left, so that
        zeros get no centroid: ``replace(s, values=kmeans(s.values, ...))``.
    bits
        of an index, 1 to 8.
    clusters
        K, 2^bits if left out.
    start
        "histogram": the best clusters of a histogram.  Up to 1024 different
        weights have a bin each; the result then is that of `optimal`.
        "linear": evenly spaced from the smallest to the largest weight;
        "density": evenly spaced in the share of weights that are smaller;
        "random": K of the weights.
    steps
        at most; it ends earlier when no border moves any more.
    seed
        of the random start.
    weight
        as w, what an error there costs, m: a Fisher diagonal, say.  1 for
        all of them if left out.

    Returns
    -------
    Codebook
        Decodes to the shape of w.  Centroids rise and are in w's dtype; of
        fewer different weights than K each is a centroid of its own.

    Raises
    ------
    ValueError
        If w is empty or not finite, or an argument is out of range.

    References
    ----------
    Han et al., Deep Compression, arXiv:1510.00149, section 3: the other
    three starts.
    Choi et al., Towards the Limit of Network Quantization,
    arXiv:1612.01543: weighted by the diagonal of the Hessian.

    Examples
    --------
    >>> w = torch.tensor([[0.0, 1.0, 8.0], [9.0, 1.1, 0.0]])
    >>> code = kmeans(w, bits=1)
    >>> code
    Codebook(Ints(uint8[2, 3], 1), float32[2])
    >>> code.decode()
    tensor([[0.5250, 0.5250, 8.5000],
            [8.5000, 0.5250, 0.5250]])
    """
    K = _count(bits, clusters)
    if start not in STARTS:
        raise ValueError(f"start must be one of {[*STARTS]}, got {start!r}")
    if steps < 0:
        raise ValueError(f"steps must not be negative, got {steps}")
    data = _sorted(w, weight)
    if len(data.x) <= K:
        return _codebook(w, data.x, bits)
    c = STARTS[start](data, K, seed)
    ends = None
    for _ in range(steps):
        before, ends = ends, _without_empty(data, _nearest(data, c))
        if before is not None and torch.equal(before, ends):
            break
        c = data.means(ends)
    return _codebook(w, c, bits)


def optimal(
    w: Tensor,
    *,
    bits: int,
    clusters: int | None = None,
    weight: Tensor | None = None,
) -> codes.Codebook:
    """Find the K shared values with the least squared error there is.

    With the weights sorted, the first j of them are clustered best into k
    intervals if the last interval begins at the best i and the i before it
    are clustered best into k - 1::

        D[k, j] = min over i of D[k-1, i] + error(i, j)

    Parameters
    ----------
    w, bits, clusters, weight
        as in `kmeans`.  Takes O(K n log n) time and 4 K n bytes for n
        different weights: seconds for 16 clusters of 10^5.

    Returns
    -------
    Codebook
        As `kmeans` does.

    References
    ----------
    Wang and Song, Ckmeans.1d.dp: Optimal k-means Clustering in One
    Dimension by Dynamic Programming, The R Journal 3(2), 2011.

    Examples
    --------
    Here k-means from a bad start stays where it began:

    >>> w = torch.tensor([0.0, 1.0, 10.0, 11.0, 20.0, 21.0])
    >>> optimal(w, bits=2, clusters=3).centroids
    tensor([ 0.5000, 10.5000, 20.5000])
    >>> kmeans(w, bits=2, clusters=3, start="random", seed=2).centroids
    tensor([ 0.0000,  1.0000, 15.5000])
    """
    K = _count(bits, clusters)
    data = _sorted(w, weight)
    if len(data.x) <= K:
        return _codebook(w, data.x, bits)
    ends = best_intervals(data.S0, data.S1, K)
    return _codebook(w, data.means(ends), bits)


@dataclass(frozen=True)
class Data:
    """Different weights, sorted, with running sums.

    Parameters
    ----------
    x
        (n,) rising, float64.
    center
        their mean: sums of numbers far from 0 would lose digits.
    S0, S1
        (n + 1,) sums of m and of m (x - center) over the first i.
    """

    x: Tensor
    center: Tensor
    S0: Tensor
    S1: Tensor

    def means(self, ends: Tensor) -> Tensor:
        """Return the mean of each cluster, from borders (K + 1,)."""
        mean = self.S1[ends].diff() / self.S0[ends].diff() + self.center
        # of one number it is that number, in the last digit too: 0 stays 0
        return mean.maximum(self.x[ends[:-1]]).minimum(self.x[ends[1:] - 1])


def best_intervals(S0: Tensor, S1: Tensor, K: int) -> Tensor:
    """Cut n sorted numbers into the K intervals with the least error.

    The error is Σ m x² less what the clusters explain, Σ S1² / S0 of each,
    so that the largest G[k, j] = G[k-1, i] + (S1_j - S1_i)² / (S0_j - S0_i)
    is looked for.  The best i never falls when j rises: once it is known for
    every second j, the others are looked for between their neighbors' (here
    all of one round together), and a layer costs n log n instead of n².

    Parameters
    ----------
    S0, S1
        (n + 1,) running sums of the masses and of mass times number.
    K
        at most n.

    Returns
    -------
    (K + 1,) borders, from 0 to n.
    """
    n = len(S0) - 1
    G = S1.square() / S0  # one interval; 0 / 0 is never looked at
    cuts = []
    for k in range(2, K + 1):
        best = torch.full((2 * (n + 1),), n - 1)  # for j = k - 1, k, ...
        best[0] = k - 1
        H = torch.full_like(G, -torch.inf)
        step = 1 << (n - k + 1).bit_length()
        while step := step // 2:
            p = torch.arange(step, n - k + 2, 2 * step)
            j = p + (k - 1)
            low, high = best[p - step], best[p + step].minimum(j - 1)
            best[p], H[j] = _largest(G, S0, S1, low, high, j)
        cuts.append(best[: n - k + 2].int())  # a copy
        G = H
    ends = [n]
    for k in range(K, 1, -1):
        ends.append(int(cuts[k - 2][ends[-1] - (k - 1)]))
    return torch.tensor([0, *ends[::-1]])


def _largest(G, S0, S1, low, high, j) -> tuple[Tensor, Tensor]:
    """For each j find the i from low to high with the largest G[k, j]."""
    many = high - low + 1
    row = torch.repeat_interleave(torch.arange(len(j)), many)
    i = torch.arange(len(row)) + (low - (many.cumsum(0) - many))[row]
    at = j[row]
    value = G[i] + (S1[at] - S1[i]).square() / (S0[at] - S0[i])
    most = G.new_full(j.shape, -torch.inf)
    most = most.scatter_reduce(0, row, value, "amax")
    hit = value == most[row]
    return high.scatter_reduce(0, row[hit], i[hit], "amin"), most


def _histogram(data: Data, K: int, seed: int) -> Tensor:
    """Start from the best clusters of bins that hold a few weights each.

    Bins should be narrow where weights are dense, as the best cells are:
    their number in an interval grows like the integral of density^(1/3).  A
    gap between neighbors is 1 / density, so gap^(2/3) is summed up; the
    number of weights beside it, in case one outlier takes all of that.
    """
    n, bins = len(data.x), max(BINS, 16 * K)
    ends = torch.arange(n + 1)
    if n > bins:
        mass = data.S0[2:] - data.S0[:-2]  # of two neighbors
        place = (mass * data.x.diff().square()).pow(1 / 3).cumsum(0)
        place = place / place[-1] + ends[1:-1] / n
        marks = torch.linspace(0, float(place[-1]), bins).to(place)
        inner = torch.searchsorted(place, marks[:-1]) + 1
        ends = torch.cat([ends[:1], inner.unique(), ends[-1:]])
    S0, S1 = data.S0[ends], data.S1[ends]
    return data.means(ends[best_intervals(S0, S1, K)])


def _linear(data: Data, K: int, seed: int) -> Tensor:
    share = torch.linspace(0, 1, K, dtype=torch.float64)
    return data.x[0] + share * (data.x[-1] - data.x[0])


def _density(data: Data, K: int, seed: int) -> Tensor:
    share = (torch.arange(K, dtype=torch.float64) + 0.5) / K
    return data.x[torch.searchsorted(data.S0[1:], share * data.S0[-1])]


def _random(data: Data, K: int, seed: int) -> Tensor:
    dice = torch.Generator().manual_seed(seed)
    some = torch.randperm(len(data.x), generator=dice)[:K]
    return data.x[some].sort().values


STARTS = {
    "histogram": _histogram,
    "linear": _linear,
    "density": _density,
    "random": _random,
}


def _nearest(data: Data, c: Tensor) -> Tensor:
    """Return the borders (K + 1,) between what is nearest to each c."""
    ends = torch.full((len(c) + 1,), len(data.x))
    ends[0] = 0
    ends[1:-1] = torch.searchsorted(data.x, (c[1:] + c[:-1]) / 2)
    return ends


def _without_empty(data: Data, ends: Tensor) -> Tensor:
    """Move the border of an empty cluster to where it explains most.

    That is the middle of another cluster: its mean splits it in two.
    """
    if ends.diff().all():
        return ends
    size, ends = len(ends), ends.unique()
    while len(ends) < size:
        first, last = ends[:-1], ends[1:]
        cut = torch.searchsorted(data.x, data.means(ends), right=True)
        cut = cut.maximum(first + 1).minimum(last - 1)
        left, right = (
            data.S0[cut] - data.S0[first],
            data.S0[last] - data.S0[cut],
        )
        mean = (data.S1[last] - data.S1[first]) / (left + right)
        off = data.S1[cut] - data.S1[first] - left * mean
        gain = off.square() * (1 / left + 1 / right)
        gain = torch.where(left > 0, gain, -1.0)  # a single number
        ends = torch.cat([ends, cut[gain.argmax()][None]]).sort().values
    return ends


def _sorted(w: Tensor, weight: Tensor | None) -> Data:
    if not w.is_floating_point() or not w.numel():
        raise ValueError(
            "w must be floating point and not empty, got "
            f"{w.dtype} of {tuple(w.shape)}"
        )
    v = w.detach().flatten().cpu()
    if not v.isfinite().all():
        raise ValueError(f"w {tuple(w.shape)} must be finite")
    v = v if v.dtype == torch.float64 else v.float()
    if weight is None:
        rising = torch.from_numpy(np.sort(v.numpy()))  # faster than torch's
        x, m = rising.unique_consecutive(return_counts=True)
    else:
        x, m = _weighted(w, v, weight)
    x, m = x.double(), m.double()
    center = (m * x).sum() / m.sum()

    def running(y):
        return torch.nn.functional.pad(y.cumsum(0), (1, 0))

    return Data(x, center, running(m), running(m * (x - center)))


def _weighted(w: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the different numbers that count, and the mass of each."""
    m = weight.detach().flatten().double().cpu()
    good = weight.shape == w.shape and m.isfinite().all() and m.min() >= 0
    if not good or m.max() == 0:
        raise ValueError(
            f"weight must have the shape of w {tuple(w.shape)}, none of it "
            f"negative and not all 0, got {tuple(weight.shape)}"
        )
    x, at = v[m > 0].unique(return_inverse=True)
    return x, m.new_zeros(len(x)).index_add(0, at, m[m > 0])


def _codebook(w: Tensor, c: Tensor, bits: int) -> codes.Codebook:
    c = c.to(w.device, w.dtype)
    middle = (c[1:].double() + c[:-1].double()) / 2
    v = w.detach().double().contiguous()
    index = torch.bucketize(v, middle, out_int32=True)
    return codes.Codebook(codes.Ints(index, bits), c)


def _count(bits: int, clusters: int | None) -> int:
    if type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    K = 2**bits if clusters is None else clusters
    if not 1 <= K <= 2**bits:
        raise ValueError(f"clusters must be 1 to {2**bits}, got {clusters}")
    return K
