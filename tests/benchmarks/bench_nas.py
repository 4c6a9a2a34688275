"""Searches: what the driver costs, what two workers gain, sorting fronts.

An evaluation of 1 ms is far shorter than any training: what the driver adds
to it is the most that it can ever cost.
"""

import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from minicompress import nas

from .harness import Row, time_row, times

SPACE = nas.Space({name: range(8) for name in "abcd"})
N = 200


def rows():
    with tempfile.TemporaryDirectory() as folder:
        yield driver_row("the driver", None)
        yield driver_row("the driver and a log", Path(folder))
    yield workers_row()
    yield fronts_row(2000)


def short(arch: dict) -> float:
    """Take 1 ms, by the clock."""
    end = time.perf_counter() + 1e-3
    while time.perf_counter() < end:
        pass
    return float(sum(arch.values()))


def busy(arch: dict) -> float:
    """Keep a processor busy for some 20 ms."""
    return float(sum(i * i for i in range(300_000)) % 97 + arch["a"])


def driver_row(name: str, folder: Path | None) -> Row:
    """Compare an evolution with as many bare calls."""
    runs = iter(range(1000))

    def searched():
        log = folder and folder / f"log{next(runs)}"
        return nas.evolve(SPACE, short, evaluations=N, log=log)

    history = searched()
    archs = [record.arch for record in history.records]
    ours, bare = times(searched, lambda: [*map(short, archs)], runs=7)
    return Row(
        f"{name}, for each evaluation of 1 ms",
        f"{(ours - bare) / N * 1e6:,.0f} µs",
        f"{bare / N * 1e6:,.0f} µs",
        ours / bare,
        "<= 1.1x bare calls",
        ours <= 1.1 * bare,
    )


def workers_row() -> Row:
    """Compare two worker processes with none."""
    how = {"evaluations": 40, "batch": 10, "population": 10}
    with ProcessPoolExecutor(2) as pool:
        return time_row(
            "40 evaluations that keep a processor busy, 2 workers",
            lambda: nas.evolve(SPACE, busy, executor=pool, **how),
            lambda: nas.evolve(SPACE, busy, **how),
            "one process",
            0.65,
        )


def fronts_row(n: int) -> Row:
    """Compare fronts by matrices with front after front by definition."""
    rng = random.Random(0)
    points = [(rng.random(), rng.random()) for _ in range(n)]
    return time_row(
        f"{len(nas.fronts(points))} fronts of {n:,} points",
        lambda: nas.fronts(points),
        lambda: slow_fronts(points),
        "the definition in Python",
        0.2,
        runs=1,
        warm_up=0,
    )


def slow_fronts(points: list[tuple]) -> list[list[int]]:
    """Peel off front after front by comparing all that are left."""
    found, rest = [], list(range(len(points)))
    while rest:
        P = [points[i] for i in rest]
        F = [
            i
            for i, p in zip(rest, P, strict=True)
            if not any(nas.dominates(q, p) for q in P)
        ]
        found.append(F)
        rest = [i for i in rest if i not in F]
    return found
