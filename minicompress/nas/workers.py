"""Evaluate architectures here, in other processes, or on other machines."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    wait,
)

RESTARTS = 3
PATIENCE = 5.0  # seconds
Answer = tuple[tuple, tuple]  # a task; its loss and seconds


class Crew:
    """Whoever evaluates.

    Parameters
    ----------
    evaluate
        ``evaluate(*task) -> loss``.
    executor
        None, an Executor, or a function that makes one, which is then shut
        down at the end and made again when it breaks.
    """

    def __init__(
        self,
        evaluate: Callable,
        executor: Executor | Callable[[], Executor] | None,
    ):
        self.evaluate = evaluate
        given = isinstance(executor, Executor) or not callable(executor)
        self.make = None if given else executor
        self.pool = executor if given else executor()
        if not isinstance(self.pool, Executor | None):
            raise ValueError(f"executor: {executor!r} is or makes no Executor")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.make:
            self.pool.shutdown()

    def run(
        self, tasks: Iterable[tuple], left: Callable[[], float]
    ) -> Iterator[Answer]:
        """Evaluate tasks and yield the answers as they come.

        If the pool breaks, nobody knows whose fault it was: all that had not
        finished is tried again together, and after `RESTARTS` times one by
        one, so that the culprit is alone when it strikes again.

        Parameters
        ----------
        tasks
            different from one another.
        left
            tells how many seconds are left; when there are none, nothing is
            begun, and the answers end.
        """
        tasks, broken = list(tasks), 0
        while tasks and left() > 0:
            some = tasks if broken < RESTARTS else tasks[:1]
            try:
                for task, answer in self._together(some, left):
                    tasks.remove(task)
                    yield task, answer
            except BrokenExecutor as error:
                broken += 1
                self._mend(error, some, broken)

    def _together(self, tasks, left):
        if self.pool is not None:
            return together(self.pool, self.evaluate, list(tasks), left)
        return alone(self.evaluate, list(tasks), left)

    def _mend(self, error: BrokenExecutor, tasks: list, broken: int) -> None:
        if self.make is None:
            raise RuntimeError(
                "executor: a worker died, and with it the pool; a function "
                "that makes a pool in place of the pool would have been "
                "called again"
            ) from error
        if broken > RESTARTS:
            raise RuntimeError(
                f"evaluate: the pool broke {broken} times, and the last time "
                f"nothing ran but {tasks[0]}"
            ) from error
        self.pool.shutdown()
        self.pool = self.make()


def alone(
    evaluate: Callable, tasks: list[tuple], left: Callable[[], float]
) -> Iterator[Answer]:
    """Evaluate one task after the other in this process."""
    for task in tasks:
        if left() <= 0:
            return
        try:
            answer = timed(evaluate, *task)
        except Exception as error:
            note(error, task)
            raise
        yield task, answer


def together(
    pool: Executor,
    evaluate: Callable,
    tasks: list[tuple],
    left: Callable[[], float],
) -> Iterator[Answer]:
    """Hand all tasks to a pool and yield the answers as they come.

    After an error, or when the time is over, what has not begun is called
    off; what runs is waited for and kept, and then the error is raised.
    """
    futures, error = {}, None
    try:
        for task in tasks:
            futures[pool.submit(timed, evaluate, *task)] = task
    except BrokenExecutor as broken:
        error = broken
    waiting, last = set(futures), None
    try:
        while waiting:
            limited = not error and 0 < left() < PATIENCE
            seconds = left() if limited else PATIENCE
            done, waiting = wait(waiting, seconds, FIRST_COMPLETED)
            if not done and (last is None or last.done()):
                last = nudge(pool)
            for future in done:
                failed = failure(future)
                if failed is None:
                    yield futures[future], future.result()
                else:
                    error = error or note(failed, futures[future])
            if error or left() <= 0:
                waiting = {f for f in waiting if not f.cancel()}
    finally:
        for future in waiting:
            future.cancel()
    if error:
        raise error


def nudge(pool: Executor) -> Future | None:
    """Submit next to nothing, so that a pool looks after its workers.

    Python's process pools watch the workers that they had when something was
    last submitted: one that was started by that is waited for in vain if it
    dies.
    """
    try:
        return pool.submit(int)
    except RuntimeError:  # it has just found out, or is shut down
        return None


def failure(future: Future) -> BaseException | None:
    """Return the error with which a future has ended, if it has."""
    return CancelledError() if future.cancelled() else future.exception()


def note(error: BaseException, task: tuple) -> BaseException:
    """Note which architecture an error is about; a broken pool is no one's."""
    if not isinstance(error, BrokenExecutor):
        error.add_note(f"while evaluating {', '.join(map(str, task))}")
    return error


def timed(evaluate: Callable, arch: dict, *resource: float) -> tuple:
    """Return the loss of an architecture and the seconds that it took.

    One nan makes all losses infinite: a training that diverged is not good
    for being short.
    """
    start = time.perf_counter()
    value = evaluate(dict(arch), *resource)
    seconds = time.perf_counter() - start
    several = isinstance(value, tuple | list)
    loss = tuple(number(x, arch) for x in (value if several else [value]))
    if any(map(math.isnan, loss)):
        loss = (math.inf,) * len(loss)
    return (loss if several else loss[0]), seconds


def number(x: object, arch: dict) -> float:
    """Return a number of Python, NumPy or PyTorch as a float."""
    try:
        if hasattr(x, "__float__"):  # which strings lack
            return float(x)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ValueError(f"evaluate: {x!r} is no loss, for {arch}")
