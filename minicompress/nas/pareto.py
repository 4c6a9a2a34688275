"""Several losses at once: who dominates whom, and how good a front is."""

import math
from collections.abc import Sequence

import numpy as np

Points = Sequence[Sequence[float]]


def dominates(p: Sequence[float], q: Sequence[float]) -> bool:
    """Tell whether p is nowhere worse than q and somewhere better.

    Parameters
    ----------
    p, q
        losses, equally many.

    Examples
    --------
    >>> dominates((1, 5), (2, 5)), dominates((1, 5), (1, 5))
    (True, False)
    """
    pairs = list(zip(p, q, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def fronts(points: Points) -> list[list[int]]:
    """Sort points into fronts: the best, the best of the others, and so on.

    Memory and time grow with the square of the number of points.

    Parameters
    ----------
    points
        (points, losses).

    Returns
    -------
    list of list of int
        Positions, ascending in each front.  Equal points share a front.

    Raises
    ------
    ValueError
        If the points have not equally many losses, or one is nan.

    References
    ----------
    Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II,
    IEEE Transactions on Evolutionary Computation 6(2), 2002, section III-A.

    Examples
    --------
    >>> fronts([(1, 5), (2, 3), (4, 1), (3, 3), (5, 5)])
    [[0, 1, 2], [3], [4]]
    """
    P = _matrix(points)
    N = len(P)
    worse, better = np.zeros((2, N, N), bool)
    for column in P.T:
        worse |= column[:, None] > column
        better |= column[:, None] < column
    D = better & ~worse  # D[p, q]: p dominates q
    n = D.sum(0)  # by how many others a point is dominated
    found = []
    while (n == 0).any():
        F = np.flatnonzero(n == 0)
        found.append(F.tolist())
        n -= D[F].sum(0)
        n[F] = -1
    return found


def front(points: Points) -> list[int]:
    """Find the points that no other one dominates.

    Parameters
    ----------
    points
        (points, losses).

    Returns
    -------
    list of int
        Positions, ascending; equal points are all in it.

    Raises
    ------
    ValueError
        As `fronts`.

    Examples
    --------
    >>> front([(1, 5), (2, 3), (3, 3), (4, 1)])
    [0, 1, 3]
    """
    return fronts(points)[0] if len(points) else []


def crowding(points: Points) -> list[float]:
    """Measure how lonely each point of a front is.

    For each loss, the distance between the two neighbors, as a fraction of
    the range; the sum of these.  Both ends count as infinitely lonely.

    Parameters
    ----------
    points
        (points, losses) of one front.

    Returns
    -------
    list of float

    Raises
    ------
    ValueError
        As `fronts`.

    References
    ----------
    Deb et al. 2002, section III-B.

    Examples
    --------
    >>> crowding([(0, 4), (1, 2), (4, 0)])
    [inf, 2.0, inf]
    """
    P = _matrix(points)
    distance = np.zeros(len(P))
    for column in P.T:
        order = np.argsort(column, kind="stable")
        v = column[order]
        distance[order[[0, -1]]] = math.inf
        if -math.inf < v[0] < v[-1] < math.inf:
            distance[order[1:-1]] += (v[2:] - v[:-2]) / (v[-1] - v[0])
    return distance.tolist()


def hypervolume(points: Points, reference: Sequence[float]) -> float:
    """Measure what points dominate up to a reference point.

    A sweep along the last loss: between one point and the next, the slice
    dominated by the points so far does not change, and its size is a
    hypervolume with one loss less.

    Parameters
    ----------
    points
        (points, losses), any number of losses.
    reference
        what is just no longer acceptable, one number for each loss; points
        that are not better in everything add nothing.

    Returns
    -------
    float
        In the product of the losses' units; larger = better.

    Raises
    ------
    ValueError
        As `fronts`, or if the reference has another number of losses.

    References
    ----------
    Zitzler, Thiele, Multiobjective Evolutionary Algorithms: A Comparative
    Case Study and the Strength Pareto Approach, IEEE Transactions on
    Evolutionary Computation 3(4), 1999.

    Examples
    --------
    >>> hypervolume([(1, 5), (2, 3), (4, 1)], (6, 6))
    17.0
    """
    P = _matrix([*points, reference])[:-1]
    r = np.asarray(reference, float)
    P = P[(r > P).all(1)]
    if not len(P):
        return 0.0
    if len(r) == 1:
        return float(r[0] - P.min())
    P = P[front(P)]
    P = P[np.argsort(P[:, -1])]
    heights = np.diff(P[:, -1], append=r[-1])
    slices = [(P[: i + 1, :-1], h) for i, h in enumerate(heights) if h]
    return float(sum(h * hypervolume(S, r[:-1]) for S, h in slices))


def _matrix(points: Points) -> np.ndarray:
    """Return points (points, losses) as float64."""
    if any(np.ndim(p) != 1 or len(p) != len(points[0]) for p in points):
        raise ValueError("points: each needs losses, equally many")
    if not len(points):
        return np.empty((0, 0))
    P = np.array([[float(x) for x in p] for p in points])
    if np.isnan(P).any():
        raise ValueError(f"points: nan in {P[np.isnan(P).any(1)][0]}")
    return P
