"""Compare two contestants fairly, and say whether a goal is met.

Every file ``bench_NAME.py`` in this folder has one function ``rows()`` that
yields `Row` objects; ``python -m tests.benchmarks [NAME ...]`` finds the files,
prints one table and exits with 1 if a goal is missed.  The protocol:

* times are compared by `ratio`, never taken alone: both contestants run in
  one process, on one thread, turn by turn, and each is represented by its
  median, so that a busy machine slows both down;
* a peer is imported by `peer("name")`; where it is not installed that raises
  `Missing`, and the rows that need it are yielded as ``skipped(...)``;
* a row states what is measured (with the size of the problem), our value and
  the peer's, the ratio, the goal in words, and whether it is met.
"""

import contextlib
import importlib
import io
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch


class Missing(Exception):
    """A peer is not installed."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Parameters
    ----------
    what : str
        What is measured, with sizes.
    ours, peer : str
        Both values with units; the peer's is "" for an absolute goal.
    ratio : float or None
        Ours over the peer's; None for a skipped row.
    goal : str
        For instance ">= 1.5x torchao's speed".
    met : bool or None
        None for a skipped row.
    """

    what: str
    ours: str
    peer: str
    ratio: float | None
    goal: str
    met: bool | None


def skipped(what: str, goal: str, why: object) -> Row:
    """Make the row of a comparison that could not run."""
    return Row(what, "", str(why), None, goal, None)


def peer(name: str):
    """Import the module `name` without its noise, or raise `Missing`."""
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"{name.partition('.')[0]} not installed") from error
    finally:
        logging.disable(quiet)


def times(
    f: Callable[[], object],
    g: Callable[[], object],
    *,
    runs: int = 15,
    warm_up: int = 2,
) -> tuple[float, float]:
    """Measure two contestants turn by turn.

    Parameters
    ----------
    f, g : callables without arguments
    runs : int
        Turns that count.
    warm_up : int
        Turns before them that do not.

    Returns
    -------
    (float, float)
        Median seconds of `f` and of `g`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = ([], [])
    try:
        for turn in range(warm_up + runs):
            # who comes first changes, so that neither always finds its
            # data in the cache the other has just filled
            order = (0, 1) if turn % 2 else (1, 0)
            for i in order:
                start = time.perf_counter()
                (f, g)[i]()
                if turn >= warm_up:
                    seconds[i].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def ratio(f: Callable[[], object], g: Callable[[], object], **kwargs) -> float:
    """Compute the time of `f` over the time of `g`; arguments as in `times`."""
    ours, theirs = times(f, g, **kwargs)
    return ours / theirs


def speed_row(
    what: str,
    f: Callable[[], object],
    g: Callable[[], object],
    *,
    n: int,
    unit: str,
    least: float,
    name: str,
    **kwargs,
) -> Row:
    """Compare speeds: `n` items by `f` (ours) and by `g` (the peer `name`).

    Parameters
    ----------
    what : str
    f, g : callables without arguments
    n : int
        Items that one call handles.
    unit : str
        Name of an item, for instance "values".
    least : float
        Goal: our speed is at least this multiple of the peer's.
    name : str
        The peer, for the column of the goal.

    Returns
    -------
    Row
    """
    ours, theirs = times(f, g, **kwargs)
    return Row(
        what,
        f"{n / ours / 1e6:,.0f} M {unit}/s",
        f"{n / theirs / 1e6:,.0f} M {unit}/s",
        theirs / ours,
        f">= {least:g}x {name}",
        theirs / ours >= least,
    )


def time_row(
    what: str,
    f: Callable[[], object],
    g: Callable[[], object],
    name: str,
    most: float,
    **kwargs,
) -> Row:
    """Compare times of one call: by `f` (ours) and by `g` (the peer `name`).

    Parameters
    ----------
    what : str
    f, g : callables without arguments
    name : str
        The peer, for the column of the goal.
    most : float
        Goal: our time is at most this multiple of the peer's.

    Returns
    -------
    Row
    """
    ours, theirs = times(f, g, **{"runs": 5, "warm_up": 1, **kwargs})
    return Row(
        what,
        f"{ours:.3f} s",
        f"{theirs:.3f} s",
        ours / theirs,
        f"<= {most:g}x {name}",
        ours <= most * theirs,
    )
