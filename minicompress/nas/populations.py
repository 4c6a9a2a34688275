"""Evolution: with age as the only death, and with several losses."""

import random
from collections import deque

from .driver import Strategy, search
from .history import History
from .pareto import Points, crowding, fronts
from .spaces import Arch, Space
from .strategies import Evaluate, positive


def evolve(
    space: Space,
    evaluate: Evaluate,
    *,
    evaluations: int | None,
    population: int = 20,
    sample: int = 5,
    seed: int = 0,
    batch: int = 1,
    **how,
) -> History:
    """Search by regularized evolution: the oldest dies, not the worst.

    Parameters
    ----------
    space
        what can be drawn and mutated.
    evaluate
        ``evaluate(arch)`` -> loss.
    evaluations
        at most so many, the first population included.
    population
        how many live; the first are random.
    sample
        how many are drawn, with replacement, for each parent, which is the
        best of them; 1 is a random walk.  The paper takes 100 and 25.
    seed
        of everything that is drawn.
    batch
        children before the oldest die; 1 in the paper.
    how
        seconds, executor, log, progress: as in `search`.

    Returns
    -------
    History

    Raises
    ------
    ValueError, RuntimeError
        As `search`; also if population, sample or batch is less than 1.

    References
    ----------
    Real et al., Regularized Evolution for Image Classifier Architecture
    Search, AAAI 2019, arXiv:1802.01548, algorithm 1.

    Examples
    --------
    >>> space = Space({f"bit{i}": (0, 1) for i in range(16)})
    >>> def zeros(arch):
    ...     return 16 - sum(arch.values())
    >>> evolve(space, zeros, evaluations=300).best.loss
    0.0
    """
    ages = evolution(space, population, sample, seed, batch)
    how |= {"evaluations": evaluations, "several": False}
    return search(ages, evaluate, **how)


def evolution(
    space: Space, population: int, sample: int, seed: int, batch: int
) -> Strategy:
    """Let the best of a few have a mutated child, and the oldest die."""
    positive(population=population, sample=sample, batch=batch)
    rng = random.Random(seed)
    archs = [space.sample(rng) for _ in range(population)]
    losses = yield archs
    members = deque(zip(losses, archs, strict=True), maxlen=population)
    while True:
        groups = [rng.choices(members, k=sample) for _ in range(batch)]
        parents = [min(group, key=lambda m: m[0])[1] for group in groups]
        archs = [mutated(space, parent, rng) for parent in parents]
        losses = yield archs
        members.extend(zip(losses, archs, strict=True))  # the oldest fall out


def mutated(space: Space, arch: Arch, rng: random.Random) -> Arch:
    """Change one choice; if no change is valid, draw something else."""
    try:
        return space.mutate(arch, rng)
    except ValueError:
        return space.sample(rng)


def nsga2(
    space: Space,
    evaluate: Evaluate,
    *,
    evaluations: int | None,
    population: int = 20,
    seed: int = 0,
    **how,
) -> History:
    """Search for a front of compromises between several losses.

    Parents and children compete for the places of the next population: less
    dominated ones come first, and among equals those with distant neighbors.
    A child takes each choice from one of two parents, then one is changed.

    Parameters
    ----------
    space
        what can be drawn, crossed and mutated.
    evaluate
        ``evaluate(arch)`` -> tuple of losses, for instance error and latency.
    evaluations
        at most so many, the first population included.
    population
        how many live, and how many children they have together.
    seed
        of everything that is drawn.
    how
        seconds, executor, log, progress: as in `search`.

    Returns
    -------
    History
        See its `front()`, and `hypervolume`.

    Raises
    ------
    ValueError, RuntimeError
        As `search`; also if the population is less than 1.

    References
    ----------
    Deb et al., A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II,
    IEEE Transactions on Evolutionary Computation 6(2), 2002, section III-C.

    Examples
    --------
    >>> space = Space({"a": range(10), "b": range(10), "c": range(10)})
    >>> def losses(arch):
    ...     a, b, c = arch.values()
    ...     return a + abs(b - 5) + c, 9 - a + abs(b - 5) + c
    >>> history = nsga2(space, losses, evaluations=300)
    >>> sorted(record.loss for record in history.front())[:3]
    [(0.0, 9.0), (1.0, 8.0), (2.0, 7.0)]
    """
    steps = generations(space, population, seed)
    how |= {"evaluations": evaluations, "several": True}
    return search(steps, evaluate, **how)


def generations(space: Space, population: int, seed: int) -> Strategy:
    """Keep the best of parents and children."""
    positive(population=population)
    rng = random.Random(seed)
    members = {}  # each architecture once
    archs = [space.sample(rng) for _ in range(population)]
    while True:
        losses = yield archs
        members |= zip(map(space.encode, archs), losses, strict=True)
        pairs = list(members.items())
        order = best_first(list(members.values()))
        members = dict(pairs[i] for i in order[:population])
        parents = [space.decode(positions) for positions in members]
        archs = [born(space, parents, rng) for _ in range(population)]


def best_first(losses: Points) -> list[int]:
    """Order by fronts, and each front from the loneliest to the crowded."""
    order = []
    for F in fronts(losses):
        distance = dict(zip(F, crowding([losses[i] for i in F]), strict=True))
        order += sorted(F, key=distance.get, reverse=True)
    return order


def born(space: Space, parents: list[Arch], rng: random.Random) -> Arch:
    """Cross two parents, winners of binary tournaments, and mutate."""
    n = len(parents)  # best first: the earlier one wins
    a, b = (min(rng.randrange(n), rng.randrange(n)) for _ in range(2))
    return mutated(space, space.cross(parents[a], parents[b], rng), rng)
