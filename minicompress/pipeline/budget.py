"""From choices and a budget in bytes to a file that fits.

`to_budget` picks a choice for each weight by the knapsack of
`quantize.allocate`, writes the file, and corrects itself until the whole file
fits, header and all; `to_quality` looks for the smallest such budget.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from tqdm.auto import tqdm

from .. import quantize, storage
from ..codes import State
from .choices import Metric, Options, Table
from .coding import Dumps
from .states import halved, plain, put, realized


@dataclass(frozen=True, eq=False)
class Plan:
    """A choice for each weight, and what it comes to.

    Parameters
    ----------
    choice
        {name: choice}.
    state
        {name: Tensor or Code} of the whole model, for `storage`.
    bytes
        length of the file.
    loss
        sum of what the choices cost alone; together they may cost more.
    """

    choice: dict
    state: State
    bytes: int
    loss: float

    def __repr__(self) -> str:
        lines = [f"{self.bytes:,} bytes, predicted loss {self.loss:.4g}"]
        return "\n".join(
            [*lines, *(f"{n}: {c}" for n, c in self.choice.items())]
        )


def to_budget(
    model: nn.Module,
    made: Options,
    table: Table,
    *,
    budget: int,
    rest: State | None = None,
    solve: Callable[..., dict] = quantize.knapsack,
    dumps: Dumps = storage.dumps,
) -> Plan:
    """Choose for each weight so that the whole file fits into the budget.

    Parameters
    ----------
    model
        left as it is.
    made, table
        of `options` and `losses`.
    budget
        bytes of the file, header and all.
    rest
        the state of everything that has no choice; in half precision by
        default.
    solve
        `quantize.knapsack`, `quantize.lagrangian` or `quantize.greedy`.
    dumps
        writes the file.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If no file is that small; says how small the smallest is.

    References
    ----------
    Yao et al., HAWQ-V3, arXiv:2011.10680, for the problem without a header.

    Examples
    --------
    >>> from .choices import losses, menu, options
    >>> model = nn.Linear(64, 64)
    >>> made = options(model, menu(sparsities=(0, 0.5), bits=(1, 2, 4)))
    >>> def error(m):
    ...     return (m.weight - model.weight).square().sum().item()
    >>> table = losses(model, made, error)
    >>> plan = to_budget(model, made, table, budget=2000)
    >>> plan.bytes == len(storage.dumps(model, plan.state)) <= 2000
    True
    """
    rest = halved(plain(model)) if rest is None else rest

    def plan(choice):
        state = put(rest, {n: made[n][c] for n, c in choice.items()})
        loss = quantize.predicted(table, choice)[1]
        return Plan(choice, state, len(dumps(model, state)), loss)

    def by(entry):
        return plan({n: min(own, key=entry(own)) for n, own in table.items()})

    best = by(lambda own: lambda c: own[c][::-1])
    if best.bytes <= budget:
        return best
    least = by(lambda own: own.get)
    if least.bytes > budget:
        raise ValueError(
            f"budget: {budget} bytes, but the smallest file takes {least.bytes}"
        )
    cheapest = quantize.predicted(table, least.choice)[0]
    room = cheapest + budget - least.bytes  # of the codes alone
    while room > cheapest:
        found = plan(solve(table, budget=room))
        if found.bytes <= budget:
            return found
        room -= found.bytes - budget  # other codes have longer entries
    return least


def to_quality(
    model: nn.Module,
    made: Options,
    table: Table,
    *,
    quality: Metric,
    floor: float,
    steps: int = 12,
    progress: bool = False,
    **how,
) -> Plan:
    """Find the smallest file that is good enough, by halving the budgets.

    Parameters
    ----------
    model, made, table
        as for `to_budget`.
    quality
        from a model to a number, larger = better (for bits per character,
        their negative), on validation data.  Assumed to grow with the bytes;
        where it does not, a smaller file may be missed.
    floor
        the least of it that is good enough.
    steps
        budgets that are tried, at most.
    progress
        show a bar.
    how
        rest, solve, dumps: as for `to_budget`.

    Returns
    -------
    Plan
        The smallest of those tried whose quality is at least the floor.
        Ctrl-C ends the search with the best one so far.

    Raises
    ------
    ValueError
        If the largest file is not good enough.
    """
    best = to_budget(model, made, table, budget=sys.maxsize, **how)
    found = quality(realized(model, best.state))
    if not found >= floor:
        raise ValueError(
            f"floor: {floor}, but the largest file, {best.bytes} bytes, has "
            f"a quality of {found:g}"
        )
    low, high = 0, best.bytes
    try:
        for _ in tqdm(range(steps), desc="budgets", disable=not progress):
            if high - low < 2:
                break
            middle = (low + high) // 2
            try:
                plan = to_budget(model, made, table, budget=middle, **how)
            except ValueError:
                low = middle
                continue
            if quality(realized(model, plan.state)) >= floor:
                best, high = plan, plan.bytes
            else:
                low = middle
    except KeyboardInterrupt:
        pass
    return best
