"""Run any strategy: budgets, a log, and one worker or many."""

import inspect
import math
import time
from collections.abc import Callable, Generator
from concurrent.futures import Executor
from contextlib import closing
from pathlib import Path

from tqdm.auto import tqdm

from .history import History, Record
from .journal import Journal, Loss, key
from .spaces import Arch, Space
from .workers import Crew

# yields batches of architectures, or of (architecture, resource), and is
# sent the list of their losses
Strategy = Generator[list, list, None]
STALE = 10_000


def search(
    strategy: Strategy,
    evaluate: Callable[..., Loss],
    *,
    evaluations: float | None = None,
    seconds: float | None = None,
    full: float = 1,
    several: bool | None = None,
    executor: Executor | Callable[[], Executor] | None = None,
    log: str | Path | None = None,
    progress: bool = False,
) -> History:
    """Run a strategy until a budget is used up.

    An architecture that is proposed again gets its known loss and costs
    nothing.  If a log is given, a search that was killed goes on where it
    stopped when the same call is made again: the strategy runs once more,
    and the log answers what it can.

    Parameters
    ----------
    strategy
        a new generator that yields lists of architectures and is sent the
        lists of their losses.  It decides by these and by a seed alone.  In
        place of an architecture it can yield (architecture, resource).
    evaluate
        ``evaluate(arch)`` or ``evaluate(arch, resource)`` -> a loss or a
        tuple of losses, smaller = better.  A nan makes it infinite.  It is
        sent to the workers with each architecture: a function that loads its
        data there, once (`functools.cache`), is better than one that brings
        them along.
    evaluations
        at most so many, known ones not counted; one with less than the full
        resource counts as a fraction.
    seconds
        wall clock, sessions before this one included.  When it is over,
        nothing is begun, and what runs is finished.
    full
        resource of a whole evaluation.
    several
        whether `evaluate` has to return several losses; None: either.
    executor
        None evaluates in this process.  An Executor evaluates a batch in
        parallel (processes: ProcessPoolExecutor; machines: Dask's
        ``client.get_executor(pure=False)``); the result is the same.  A
        function that makes an Executor is called again when a worker dies.
    log
        a file of JSON lines, made if it is missing.  Keeps what identifies
        the search: its strategy's name and arguments, the choices of the
        space; not `evaluate`, nor what `valid` says.
    progress
        show a bar.

    Returns
    -------
    History
        `stopped` is "evaluations", "seconds", "the strategy" (it ended), or
        "nothing new" (in 10,000 proposals in a row).

    Raises
    ------
    ValueError
        If the log is another search's or damaged, or a loss is no number.
    RuntimeError
        If a pool broke that cannot be made again, or an architecture breaks
        each one.  What `evaluate` itself raises is raised with a note that
        names the architecture.  All that was evaluated is in the log.

    Examples
    --------
    >>> import random
    >>> def climb(space, seed):
    ...     rng = random.Random(seed)
    ...     best = space.sample(rng)
    ...     (least,) = yield [best]
    ...     while True:
    ...         arch = space.mutate(best, rng)
    ...         (loss,) = yield [arch]
    ...         if loss <= least:
    ...             best, least = arch, loss
    >>> space = Space({name: range(8) for name in "abc"})
    >>> search(climb(space, 0), lambda arch: sum(arch.values()), evaluations=40)
    History(40 records, cost 40, best 0, stopped by: evaluations)
    """
    limits = {"evaluations": evaluations, "seconds": seconds}
    for name, limit in limits.items():
        if limit is not None and not limit >= 0:
            raise ValueError(f"{name}: {limit} is no limit")
    with (
        Journal(log, described(strategy)) as journal,
        Crew(evaluate, executor) as crew,
        tqdm(total=evaluations, disable=not progress) as bar,
    ):
        run = Run(journal, crew, bar, evaluations, seconds, full, several)
        stopped = run(strategy)
    return History(tuple(run.records.values()), stopped)


class Run:
    """A search while it runs."""

    def __init__(self, journal, crew, bar, evaluations, seconds, full, several):
        self.journal, self.crew, self.bar = journal, crew, bar
        self.full, self.several = full, several
        self.budget = math.inf if evaluations is None else evaluations * full
        self.seconds = math.inf if seconds is None else seconds
        self.start = time.perf_counter() - journal.elapsed
        self.records: dict[str, Record] = {}

    def __call__(self, strategy: Strategy) -> str:
        """Ask, evaluate and answer; return why it ended."""
        losses, stale = None, 0
        while stale < STALE:
            if self.budget == 0:
                return "evaluations"
            try:
                tasks = [self.task(x) for x in strategy.send(losses)]
            except StopIteration:
                return "the strategy"
            keys = [key(task) for task in tasks]
            pairs = zip(keys, tasks, strict=True)
            new = {k: t for k, t in pairs if k not in self.records}
            affordable = self.affordable(new)
            self.evaluate(affordable)
            if not all(k in self.records for k in affordable):
                return "seconds"
            if len(affordable) < len(new):
                return "evaluations"
            losses = [self.records[k].loss for k in keys]
            stale = 0 if new else stale + max(1, len(keys))
        return "nothing new"

    def task(self, proposal: Arch | tuple[Arch, float]) -> tuple:
        """Return the arguments of `evaluate`."""
        task = proposal if isinstance(proposal, tuple) else (proposal,)
        arch, resource = (*task, self.full)[:2]
        if not isinstance(arch, dict) or not 0 < resource <= self.full:
            raise ValueError(f"strategy: {proposal!r} cannot be evaluated")
        return task

    def affordable(self, tasks: dict[str, tuple]) -> dict[str, tuple]:
        """Keep the first tasks, as far as the budget reaches."""
        kept = {}
        for k, task in tasks.items():
            resource = (*task, self.full)[1]
            if resource > self.budget:
                break
            self.budget -= resource
            kept[k] = task
        return kept

    def elapsed(self) -> float:
        """Return the seconds since the search began."""
        return time.perf_counter() - self.start

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.seconds - self.elapsed()

    def evaluate(self, tasks: dict[str, tuple]) -> None:
        """Record the tasks whose losses are known or can be found in time."""
        known = self.journal.known
        unknown = [task for k, task in tasks.items() if k not in known]
        # closed at once if something goes wrong: calls off what waits
        with closing(self.crew.run(unknown, self.left)) as answers:
            for task, (loss, took) in answers:
                self.check(task, loss)
                self.journal.write(task, loss, took, self.elapsed())
        for k, task in tasks.items():
            if k in known:
                self.records[k] = self.record(task, *known[k])

    def check(self, task: tuple, loss: Loss) -> None:
        """Refuse one loss for several, or several for one."""
        if self.several not in (None, isinstance(loss, tuple)):
            wanted = "several losses" if self.several else "one loss"
            raise ValueError(f"evaluate: {loss} is not {wanted}, for {task[0]}")

    def record(self, task: tuple, loss: Loss, took: float) -> Record:
        """Count an evaluation."""
        arch, resource = (*task, self.full)[:2]
        self.bar.update(resource / self.full)
        return Record(arch, loss, resource / self.full, took)


def described(strategy: Strategy) -> dict:
    """Return what identifies a search: the strategy's name and arguments."""
    new = inspect.isgenerator(strategy) and (
        inspect.getgeneratorstate(strategy) == inspect.GEN_CREATED
    )
    if not new:
        raise ValueError(f"strategy: {strategy!r} is no new generator")
    options = inspect.getgeneratorlocals(strategy)
    plainly = {name: plain(value) for name, value in options.items()}
    return {"strategy": strategy.__name__, **plainly}


def plain(value: object) -> object:
    """Return something that JSON keeps in place of any argument."""
    if isinstance(value, Space):
        return {name: list(v) for name, v in value.choices.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    simple = isinstance(value, str | int | float | bool | None)
    return value if simple else type(value).__qualname__
