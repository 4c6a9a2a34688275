"""Strategies without a memory: at random, one by one, and by elimination.

A strategy is a generator that yields a batch of architectures and is sent
the list of their losses; `search` does the rest.  How large a batch is does
not depend on who evaluates it, so one worker and many find the same.
"""

import itertools
import random
from collections.abc import Callable, Sequence

from .driver import STALE, Strategy, search
from .history import History
from .journal import Loss, key
from .spaces import Arch, Space

Evaluate = Callable[..., Loss]


def random_search(
    space: Space,
    evaluate: Evaluate,
    *,
    evaluations: int | None,
    seed: int = 0,
    batch: int = 1,
    **how,
) -> History:
    """Draw architectures at random: the baseline of every search.

    Every valid one has the same chance.  One that is drawn again costs
    nothing: in effect this draws without replacement.  The chance that n
    draws miss the best fraction q is about (1 − q)ⁿ.

    Parameters
    ----------
    space
        what can be drawn.
    evaluate
        ``evaluate(arch)`` -> a loss or a tuple of losses.
    evaluations
        at most so many.
    seed
        of everything that is drawn.
    batch
        proposals at a time.
    how
        seconds, executor, log, progress: as in `search`.

    Returns
    -------
    History

    Raises
    ------
    ValueError, RuntimeError
        As `search`.

    References
    ----------
    Li, Talwalkar, Random Search and Reproducibility for Neural Architecture
    Search, UAI 2019, arXiv:1902.07638.

    Examples
    --------
    >>> space = Space({"a": range(10), "b": range(10)})
    >>> def loss(arch):
    ...     return (arch["a"] - 3) ** 2 + (arch["b"] - 7) ** 2
    >>> random_search(space, loss, evaluations=100).best.arch
    {'a': 3, 'b': 7}
    """
    draws = drawing(space, seed, batch)
    return search(draws, evaluate, evaluations=evaluations, **how)


def drawing(space: Space, seed: int, batch: int) -> Strategy:
    """Draw at random, for ever."""
    positive(batch=batch)
    rng = random.Random(seed)
    while True:
        yield [space.sample(rng) for _ in range(batch)]


def exhaustive(
    space: Space,
    evaluate: Evaluate,
    *,
    evaluations: int | None = None,
    batch: int = 1,
    **how,
) -> History:
    """Evaluate every architecture: the truth, where it can be afforded.

    Parameters
    ----------
    space
        in the order in which it is enumerated.
    evaluate
        ``evaluate(arch)`` -> a loss or a tuple of losses.
    evaluations
        at most so many; None: all.
    batch
        proposals at a time.
    how
        seconds, executor, log, progress: as in `search`.

    Returns
    -------
    History

    Raises
    ------
    ValueError, RuntimeError
        As `search`.

    Examples
    --------
    >>> space = Space({"a": range(10), "b": range(10)})
    >>> exhaustive(space, lambda arch: abs(arch["a"] * arch["b"] - 56))
    History(100 records, cost 100, best 0, stopped by: the strategy)
    """
    members = listing(space, batch)
    return search(members, evaluate, evaluations=evaluations, **how)


def listing(space: Space, batch: int) -> Strategy:
    """Go through the space."""
    positive(batch=batch)
    members = iter(space)
    while some := list(itertools.islice(members, batch)):
        yield some


def halving(
    space: Space,
    evaluate: Evaluate,
    *,
    evaluations: int,
    resources: Sequence[float] = (45, 90, 180),
    seed: int = 0,
    **how,
) -> History:
    """Search by successive halving: many start, the better ones go on.

    Every rung costs the same: the first trains many architectures a little,
    and from one to the next the number shrinks as the resource grows.

    Parameters
    ----------
    space
        what can be drawn.
    evaluate
        ``evaluate(arch, resource)`` -> loss; trains anew for each resource.
    evaluations
        budget in whole evaluations, those with the last resource; it decides
        how many start.
    resources
        ascending: steps, images, epochs.  The last one is a whole evaluation.
    seed
        of everything that is drawn.
    how
        seconds, executor, log, progress: as in `search`.

    Returns
    -------
    History
        Fewer start if the space has fewer.

    Raises
    ------
    ValueError, RuntimeError
        As `search`; also if the budget brings nobody to the last resource.

    References
    ----------
    Jamieson, Talwalkar, Non-stochastic Best Arm Identification and
    Hyperparameter Optimization, AISTATS 2016, arXiv:1502.07943.

    Examples
    --------
    >>> space = Space({"a": range(10), "b": range(10)})
    >>> def loss(arch, steps):
    ...     return abs(arch["a"] * arch["b"] - 56) + 1 / steps
    >>> history = halving(space, loss, evaluations=12, resources=(1, 2, 4))
    >>> [sum(r.cost == c for r in history.records) for c in (0.25, 0.5, 1)]
    [16, 8, 4]
    """
    rounds = rungs(space, evaluations, tuple(resources), seed)
    how |= {"evaluations": evaluations, "full": max(resources)}
    return search(rounds, evaluate, several=False, **how)


def rungs(
    space: Space, evaluations: float, resources: tuple[float, ...], seed: int
) -> Strategy:
    """Evaluate with more and more resources what was good with fewer."""
    if not all(a < b for a, b in itertools.pairwise((0, *resources))):
        raise ValueError(f"resources: {resources} do not ascend")
    share = evaluations * resources[-1] / len(resources)  # of each rung
    sizes = [int(share / resource) for resource in resources]
    if not sizes[-1]:
        raise ValueError(
            f"evaluations: {evaluations} are fewer than {len(resources)} rungs"
        )
    archs = different(space, sizes[0], random.Random(seed))
    for n, resource in zip([*sizes[1:], 0], resources, strict=True):
        losses = yield [(arch, resource) for arch in archs]
        ranked = sorted(zip(losses, archs, strict=True), key=lambda m: m[0])
        archs = [arch for _, arch in ranked[:n]]


def different(space: Space, n: int, rng: random.Random) -> list[Arch]:
    """Draw n different architectures, fewer if 10,000 draws brought no new."""
    found, misses = {}, 0
    while len(found) < n and misses < STALE:
        arch = space.sample(rng)
        misses = misses + 1 if key((arch,)) in found else 0
        found[key((arch,))] = arch
    return list(found.values())


def positive(**values: float) -> None:
    """Refuse what is not positive."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: {value} is not positive")
