"""What a search has found."""

import math
from dataclasses import dataclass, field

from .journal import Loss
from .pareto import front
from .spaces import Arch


@dataclass(frozen=True)
class Record:
    """One evaluation.

    Parameters
    ----------
    arch
        what was evaluated.
    loss
        a number, or several: smaller = better, inf if one was nan.
    cost
        fraction of a whole evaluation: 1, or less with fewer resources.
    seconds
        that it took the worker; does not count when records are compared.
    """

    arch: Arch
    loss: Loss
    cost: float = 1.0
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, repr=False)
class History:
    """What a search has evaluated.

    Parameters
    ----------
    records
        in the order in which the strategy proposed them first, whoever was
        evaluated faster.
    stopped
        why the search ended.

    Examples
    --------
    >>> records = Record({"n": 8}, 0.5), Record({"n": 16}, 0.25)
    >>> history = History(records, "evaluations")
    >>> history
    History(2 records, cost 2, best 0.25, stopped by: evaluations)
    >>> history.best.arch
    {'n': 16}
    """

    records: tuple[Record, ...]
    stopped: str

    @property
    def whole(self) -> list[Record]:
        """The records of whole evaluations."""
        return [r for r in self.records if r.cost == 1]

    @property
    def cost(self) -> float:
        """Sum of the costs."""
        return sum(r.cost for r in self.records)

    @property
    def best(self) -> Record:
        """The whole evaluation with the smallest loss, the first of equals.

        Raises
        ------
        ValueError
            If there is none, or each has several losses.
        """
        if not self.whole:
            raise ValueError("history: nothing was wholly evaluated")
        if isinstance(self.whole[0].loss, tuple):
            raise ValueError(
                "history: several losses have no best, but front()"
            )
        return min(self.whole, key=lambda r: r.loss)

    def curve(self) -> tuple[list[float], list[float]]:
        """Return the costs so far and the best losses so far.

        Before the first whole evaluation the best loss is infinite.
        """
        costs, bests, cost, best = [], [], 0.0, math.inf
        for record in self.records:
            cost += record.cost
            best = min(best, record.loss) if record.cost == 1 else best
            costs.append(cost)
            bests.append(best)
        return costs, bests

    def front(self) -> list[Record]:
        """Return the whole evaluations that no other one dominates."""
        losses = [r.loss for r in self.whole]
        points = [x if isinstance(x, tuple) else (x,) for x in losses]
        return [self.whole[i] for i in front(points)]

    def __repr__(self):
        several = any(isinstance(r.loss, tuple) for r in self.whole)
        best = f"front of {len(self.front())}" if several else "best none"
        if self.whole and not several:
            best = f"best {self.best.loss:g}"
        return (
            f"History({len(self.records)} records, cost {self.cost:g}, "
            f"{best}, stopped by: {self.stopped})"
        )
