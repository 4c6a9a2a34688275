"""One search by one process, by a pool and by Dask: the same result.

Workers find what is evaluated in a module of their own, which a fixture
writes into a folder: as a user's `evaluate` would be installed there.
"""

import importlib
import json
import logging
import multiprocessing
import os
import threading
import time
from concurrent.futures import (
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from minicompress import nas
from minicompress.nas import workers

SPACE = nas.Space({name: range(4) for name in "abcd"})
MODULE = '''
import os, signal, time

def total(arch, resource=1):
    return abs(sum(arch.values()) - 5) + 1 / resource

def several(arch):
    return sum(arch.values()), abs(arch["a"] - 3) + arch["b"]

def fails(arch):
    if arch["a"] == 3:
        raise KeyError("oops")
    return total(arch)

class Dies:
    """Kill this process, the first time that an architecture comes."""

    def __init__(self, folder, who, always=False, slow=""):
        self.folder, self.who, self.always = str(folder), who, always
        self.slow = slow

    def __call__(self, arch):
        name = "-".join(map(str, arch.values()))
        with open(os.path.join(self.folder, name), "a") as file:
            file.write("x")
        again = os.path.getsize(os.path.join(self.folder, name)) > 1
        if name == self.who and (self.always or not again):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.002)
        if name == self.slow:
            self.wait_for_three_deaths()
        return total(arch)

    def wait_for_three_deaths(self):
        mark, end = os.path.join(self.folder, self.who), time.time() + 5
        while time.time() < end:
            time.sleep(0.05)
            if os.path.exists(mark) and os.path.getsize(mark) >= 3:
                end = min(end, time.time() + 0.5)
'''

RUNS = {
    "random_search": (nas.random_search, {"batch": 4}),
    "exhaustive": (nas.exhaustive, {"batch": 16}),
    "evolve": (nas.evolve, {"population": 6, "sample": 3, "batch": 3}),
    "reinforce": (nas.reinforce, {"lr": 0.1, "batch": 4}),
    "halving": (nas.halving, {"resources": (1, 2, 4)}),
    "nsga2": (nas.nsga2, {"population": 6}),
}


@pytest.fixture(scope="module")
def cheap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    (folder / "cheap_losses.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)  # what this starts looks there, too
        yield importlib.import_module("cheap_losses")


def processes(method="forkserver"):
    """Make a pool; the server has imported the library once for all."""
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["minicompress.nas"])
    return ProcessPoolExecutor(2, mp_context=context)


@pytest.fixture(scope="module")
def spawned(cheap):
    with processes("spawn") as pool:
        yield pool


def dask_processes():
    return [p for p in multiprocessing.active_children() if "Dask" in p.name]


@pytest.fixture(scope="module")
def dask(cheap):
    """Two worker processes, quietly, on ports that the system chooses.

    A task may lose one worker, and with the second one it is given up.
    """
    why = "distributed is not installed"
    distributed = pytest.importorskip("distributed", reason=why)
    config = pytest.importorskip("dask").config
    with (
        config.set({"distributed.scheduler.allowed-failures": 1}),
        distributed.LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address=":0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        assert len(dask_processes()) == 2
        yield client
    assert not dask_processes()


def run(name, cheap, **how):
    f, options = RUNS[name]
    evaluate = cheap.several if name == "nsga2" else cheap.total
    return f(SPACE, evaluate, evaluations=30, **options, **how)


def sum_of(arch):
    return float(sum(arch.values()))


class Drowsy(Executor):
    """Do what was submitted when the next thing is submitted."""

    def __init__(self):
        self.asleep = []

    def submit(self, f, /, *args):
        for future, g, given in self.asleep:
            future.set_result(g(*given))
        self.asleep = [(Future(), f, args)]
        return self.asleep[0][0]


class TestSameResult:
    @pytest.mark.parametrize("name", RUNS)
    def test_of_spawned_processes(self, cheap, spawned, name):
        assert run(name, cheap, executor=spawned) == run(name, cheap)

    @pytest.mark.parametrize("name", RUNS)
    def test_of_dask(self, cheap, dask, name):
        executor = dask.get_executor(pure=False)
        assert run(name, cheap, executor=executor) == run(name, cheap)

    @pytest.mark.parametrize("name", RUNS)
    def test_of_threads(self, cheap, name):
        pool = lambda: ThreadPoolExecutor(3)  # noqa: E731
        assert run(name, cheap, executor=pool) == run(name, cheap)

    def test_of_forked_processes(self, cheap):
        found = run("evolve", cheap, executor=processes)
        assert found == run("evolve", cheap)

    def test_of_a_function_that_is_sent_by_value(self, dask):
        def local(arch):
            return arch["a"] + os.getpid() * 0

        executor = dask.get_executor(pure=False)
        how = {"evaluations": 20, "batch": 5}
        found = nas.random_search(SPACE, local, executor=executor, **how)
        assert found == nas.random_search(SPACE, local, **how)

    def test_work_is_shared(self, dask):
        def who(arch):
            import time

            time.sleep(0.01)
            return os.getpid()

        executor = dask.get_executor(pure=False)
        history = nas.exhaustive(
            SPACE, who, evaluations=20, batch=10, executor=executor
        )
        found = {int(r.loss) for r in history.records}
        assert len(found) == 2 and os.getpid() not in found

    def test_a_log_can_change_hands(self, cheap, spawned, dask, tmp_path):
        """Begun here, continued by a pool, ended by Dask."""
        f, options = RUNS["evolve"]
        options = options | {"log": tmp_path / "log"}
        f(SPACE, cheap.total, evaluations=10, **options)
        f(SPACE, cheap.total, evaluations=20, executor=spawned, **options)
        last = dask.get_executor(pure=False)
        found = f(SPACE, cheap.total, evaluations=30, executor=last, **options)
        assert found == run("evolve", cheap)
        assert len((tmp_path / "log").read_text().splitlines()) == 31


def evaluated(folder):
    """Count how often each architecture was begun."""
    return {p.name: p.stat().st_size for p in folder.iterdir()}


VICTIM = "1-2-0-3"  # number 100 of `exhaustive`
HOW = {"evaluations": 110, "batch": 110}


class TestWorkersThatDie:
    def check(self, cheap, history, folder):
        whole = nas.exhaustive(SPACE, cheap.total, **HOW)
        assert history == whole
        times = evaluated(folder)
        assert times[VICTIM] == 2
        return times

    def test_a_pool_is_made_again(self, cheap, tmp_path):
        made = []

        def pool():
            made.append(processes())
            return made[-1]

        history = nas.exhaustive(
            SPACE, cheap.Dies(tmp_path, VICTIM), executor=pool, **HOW
        )
        times = self.check(cheap, history, tmp_path)
        assert len(made) == 2
        # only what had not finished: it, its neighbor, what was in between
        assert sum(n > 1 for n in times.values()) <= 5
        with pytest.raises(RuntimeError, match="after shutdown"):
            made[-1].submit(int)

    def test_dask_tries_again_by_itself(self, cheap, dask, tmp_path):
        history = nas.exhaustive(
            SPACE,
            cheap.Dies(tmp_path, VICTIM),
            executor=dask.get_executor(pure=False),
            **HOW,
        )
        self.check(cheap, history, tmp_path)

    def test_a_pool_that_was_given_is_not(self, cheap, tmp_path):
        log, marks = tmp_path / "log", tmp_path / "marks"
        marks.mkdir()
        how = {"log": log, **HOW}
        dies = cheap.Dies(marks, VICTIM)
        with (
            processes() as pool,
            pytest.raises(RuntimeError, match="executor: a worker died"),
        ):
            nas.exhaustive(SPACE, dies, executor=pool, **how)
        lines = log.read_text().splitlines()[1:]
        done = {
            "-".join(map(str, json.loads(line)["task"][0].values()))
            for line in lines
        }
        assert len(done) > 80 and VICTIM not in done
        self.check(cheap, nas.exhaustive(SPACE, dies, **how), marks)
        times = evaluated(marks)
        assert all(times[name] == 1 for name in done)

    def test_one_that_always_kills_is_found_out(self, cheap, tmp_path):
        log, marks = tmp_path / "log", tmp_path / "marks"
        marks.mkdir()
        dies = cheap.Dies(marks, "0-0-1-1", always=True)
        message = r"broke 4 times.*'a': 0, 'b': 0, 'c': 1, 'd': 1"
        with pytest.raises(RuntimeError, match=message) as caught:
            nas.exhaustive(
                SPACE,
                dies,
                batch=12,
                log=log,
                executor=processes,
            )
        assert isinstance(caught.value.__cause__, BrokenProcessPool)
        assert evaluated(marks)["0-0-1-1"] == 4
        # those before it are in the log
        assert len(log.read_text().splitlines()) >= 1 + 5

    @pytest.mark.parametrize("batch", (2, 3))
    def test_the_innocent_are_not_accused(
        self, cheap, tmp_path, monkeypatch, batch
    ):
        """The first one never ends before the second kills the pool: only
        where each is alone can they be told apart.

        With two the pool would not notice: it has looked at its workers when
        it starts the last one.
        """
        monkeypatch.setattr(workers, "PATIENCE", 0.1)
        log, marks = tmp_path / "log", tmp_path / "marks"
        marks.mkdir()
        dies = cheap.Dies(marks, "0-0-0-1", always=True, slow="0-0-0-0")
        how = {"batch": batch, "executor": processes, "log": log}
        message = r"'a': 0, 'b': 0, 'c': 0, 'd': 1"
        with pytest.raises(RuntimeError, match=message):
            nas.exhaustive(SPACE, dies, **how)
        assert evaluated(marks)["0-0-0-1"] == 4
        lines = map(json.loads, log.read_text().splitlines()[1:])
        done = [tuple(line["task"][0].values()) for line in lines]
        assert (0, 0, 0, 0) in done and (0, 0, 0, 1) not in done

    def test_a_pool_that_waits_for_a_submission_gets_one(self, monkeypatch):
        monkeypatch.setattr(workers, "PATIENCE", 0.01)
        history = nas.exhaustive(
            SPACE, sum_of, batch=4, evaluations=8, executor=Drowsy()
        )
        assert [r.loss for r in history.records] == [
            sum_of(r.arch) for r in history.records
        ]
        assert len(history.records) == 8

    def test_dask_gives_up_on_it_too(self, cheap, dask, tmp_path):
        """Alone: of several on one worker it cannot tell who is guilty."""
        from distributed import KilledWorker

        dies = cheap.Dies(tmp_path, "0-0-0-2", always=True)
        executor = dask.get_executor(pure=False)
        with pytest.raises(KilledWorker) as caught:
            nas.exhaustive(SPACE, dies, batch=1, executor=executor)
        (note,) = caught.value.__notes__
        assert note == "while evaluating {'a': 0, 'b': 0, 'c': 0, 'd': 2}"


class TestErrors:
    def test_keep_what_finished(self, cheap, tmp_path):
        log = tmp_path / "log"
        how = {"batch": 256, "log": log}
        with pytest.raises(KeyError, match="oops") as caught:
            nas.exhaustive(
                SPACE,
                cheap.fails,
                executor=processes,
                **how,
            )
        assert "while evaluating {'a': 3" in caught.value.__notes__[0]
        done = len(log.read_text().splitlines()) - 1
        assert done >= 192 - 2  # what comes before, but for what overtook
        history = nas.exhaustive(SPACE, cheap.total, **how)
        assert len(history.records) == 256

    def test_of_dask_are_the_workers_own(self, cheap, dask):
        with pytest.raises(KeyError, match="oops") as caught:
            nas.exhaustive(
                SPACE,
                cheap.fails,
                batch=256,
                executor=dask.get_executor(pure=False),
            )
        assert "'a': 3" in caught.value.__notes__[0]

    def test_a_function_that_cannot_be_sent(self):
        with pytest.raises(Exception, match=r"local object|pickle") as caught:
            nas.random_search(
                SPACE,
                lambda arch: 0,
                evaluations=2,
                executor=processes,
            )
        assert "while evaluating" in caught.value.__notes__[0]

    def test_a_future_that_others_call_off(self):
        class Refuses(Executor):
            def submit(self, *task):
                future = Future()
                future.cancel()
                future.set_running_or_notify_cancel()
                return future

        with pytest.raises(workers.CancelledError) as caught:
            nas.random_search(SPACE, len, evaluations=1, executor=Refuses())
        assert "while evaluating" in caught.value.__notes__[0]


class TestSeconds:
    def test_what_runs_is_finished_and_nothing_is_begun(self):
        begun, lock = [], threading.Lock()

        def slow(arch):
            with lock:
                begun.append(arch)
            time.sleep(0.2)
            return 0

        history = nas.exhaustive(
            SPACE,
            slow,
            batch=100,
            seconds=0.3,
            executor=lambda: ThreadPoolExecutor(2),
        )
        assert history.stopped == "seconds"
        assert 2 <= len(history.records) <= 4
        found = [tuple(r.arch.values()) for r in history.records]
        assert found == sorted(tuple(arch.values()) for arch in begun)

    def test_dask(self, dask):
        def slow(arch):
            import time

            time.sleep(0.2)
            return 0

        executor = dask.get_executor(pure=False)
        # workers that were restarted a moment ago are there when this ends
        nas.exhaustive(SPACE, slow, batch=8, evaluations=8, executor=executor)
        start = time.monotonic()
        history = nas.exhaustive(
            SPACE, slow, batch=256, seconds=1, executor=executor
        )
        assert time.monotonic() - start < 15  # all would take 25 s
        assert history.stopped == "seconds"
        # calling off takes a moment for each, in which others are begun
        assert 1 <= len(history.records) <= 100


class TestExecutorIsLeftAsItWas:
    def test_one_that_was_given_stays_open(self, cheap):
        with ThreadPoolExecutor(1) as pool:
            run("evolve", cheap, executor=pool)
            assert pool.submit(int, "7").result() == 7

    def test_one_that_was_made_is_shut_down(self, cheap):
        made = []

        def pool():
            made.append(ThreadPoolExecutor(1))
            return made[-1]

        run("evolve", cheap, executor=pool)
        (only,) = made
        with pytest.raises(RuntimeError, match="after shutdown"):
            only.submit(int)

    def test_order_of_completion_does_not_matter(self):
        """Answers in reverse: records and strategy never notice."""

        def uneven(arch):
            time.sleep(0.01 * (arch["a"] == 0))
            return sum(arch.values())

        pool = lambda: ThreadPoolExecutor(4)  # noqa: E731
        how = {"evaluations": 40, "population": 5, "batch": 4}
        found = nas.evolve(SPACE, uneven, executor=pool, **how)
        assert found == nas.evolve(SPACE, uneven, **how)


def test_the_library_does_not_import_dask():
    folder = Path(nas.__file__).parent
    lines = [
        line.split()
        for path in folder.rglob("*.py")
        for line in path.read_text("utf8").splitlines()
    ]
    imported = {w[1] for w in lines if w[:1] in (["import"], ["from"])}
    assert {"math", "tqdm.auto"} <= imported
    assert not any(n.startswith(("dask", "distributed")) for n in imported)
