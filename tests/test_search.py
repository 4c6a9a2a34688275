"""The driver of all searches: budgets, the log, errors."""

import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minicompress import nas
from minicompress.nas import journal, workers

ROOT = Path(__file__).parents[1]
SPACE = nas.Space({name: range(6) for name in "abc"})
A, B, C = [{"n": i} for i in range(3)]


def total(arch):
    return sum(arch.values())


def climb(space, seed):
    """A user's own strategy."""
    rng = random.Random(seed)
    best = space.sample(rng)
    (least,) = yield [best]
    while True:
        arch = space.mutate(best, rng)
        (loss,) = yield [arch]
        if loss <= least:
            best, least = arch, loss


def propose(*batches):
    """Propose fixed batches and remember what came back, in `answers`."""
    for batch in batches:
        answers.append((yield list(batch)))


answers = []


@pytest.fixture(autouse=True)
def _forget():
    answers.clear()


class Counted:
    """An evaluation that remembers what it was asked."""

    def __init__(self, f=total):
        self.f, self.asked = f, []

    def __call__(self, arch, *resource):
        self.asked.append((*arch.values(), *resource))
        return self.f(arch)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    now = SimpleNamespace(seconds=0.0)
    fake = SimpleNamespace(perf_counter=lambda: now.seconds)
    monkeypatch.setattr("minicompress.nas.driver.time", fake)
    return now


def slow(clock, seconds=3.0):
    def evaluate(arch):
        clock.seconds += seconds
        return total(arch)

    return Counted(evaluate)


class TestHistory:
    def test_keeps_the_order_of_proposal_and_what_was_found(self):
        history = nas.search(propose([B, A], [C]), total)
        assert [r.arch for r in history.records] == [B, A, C]
        assert [r.loss for r in history.records] == [1, 0, 2]
        assert history.best.arch == A
        assert history.stopped == "the strategy"
        assert answers == [[1, 0], [2]]

    def test_curve(self):
        losses = iter([5.0, 7.0, 2.0, 3.0])
        batch = [(A, 2), (A, 4), (B, 4), (C, 1)]
        history = nas.search(
            propose(batch), lambda arch, r: next(losses), full=4
        )
        costs, bests = history.curve()
        assert costs == [0.5, 1.5, 2.5, 2.75]
        assert bests == [math.inf, 7, 2, 2]
        assert history.cost == 2.75
        assert history.best.arch == B  # the loss 5 was not a whole one

    def test_the_best_is_the_first_of_equals(self):
        history = nas.search(propose([A, B, C]), lambda arch: 1)
        assert history.best.arch == A

    def test_front(self):
        losses = {0: (1, 2), 1: (2, 2), 2: (0, 9)}
        history = nas.search(propose([A, B, C]), lambda a: losses[a["n"]])
        assert [r.arch for r in history.front()] == [A, C]
        assert repr(history) == (
            "History(3 records, cost 3, front of 2, stopped by: the strategy)"
        )
        with pytest.raises(ValueError, match="several losses"):
            history.best  # noqa: B018

    def test_front_of_single_losses_are_the_best(self):
        history = nas.search(propose([A, B, C]), lambda a: abs(a["n"] - 1))
        assert [r.arch for r in history.front()] == [B]

    def test_of_nothing(self):
        history = nas.search(propose([A]), total, evaluations=0)
        assert history == nas.History((), "evaluations")
        assert "best none" in repr(history)
        assert history.curve() == ([], []) and history.front() == []
        with pytest.raises(ValueError, match="nothing was wholly"):
            history.best  # noqa: B018

    def test_seconds_do_not_tell_records_apart(self):
        assert nas.Record(A, 1.0, 1.0, 2.0) == nas.Record(A, 1.0, 1.0, 9.0)
        assert nas.Record(A, 1.0) != nas.Record(A, 2.0)

    def test_seconds_are_those_of_evaluate(self):
        history = nas.search(propose([A]), lambda arch: time.sleep(0.02) or 0)
        assert 0.02 <= history.records[0].seconds < 2


class TestBudget:
    def test_known_ones_cost_nothing(self):
        evaluate = Counted()
        strategy = propose([A, B, A], [B, A], [C], [A])
        history = nas.search(strategy, evaluate, evaluations=4)
        assert evaluate.asked == [(0,), (1,), (2,)]
        assert answers == [[0, 1, 0], [1, 0], [2], [0]]
        assert len(history.records) == 3

    def test_the_order_of_names_does_not_matter(self):
        evaluate = Counted()
        nas.search(propose([{"a": 1, "b": 2}, {"b": 2, "a": 1}]), evaluate)
        assert len(evaluate.asked) == 1

    @pytest.mark.parametrize("evaluations", [2, 2.5])
    def test_the_last_batch_is_cut(self, evaluations):
        evaluate, strategy = Counted(), propose([A, B, C], [A])
        history = nas.search(strategy, evaluate, evaluations=evaluations)
        assert evaluate.asked == [(0,), (1,)]
        assert history.stopped == "evaluations"
        assert answers == []  # it is not told of half a batch

    def test_is_over_before_another_proposal(self):
        history = nas.search(propose([A, B], [C]), total, evaluations=2)
        assert history.stopped == "evaluations" and answers == []

    def test_parts_of_evaluations_add_up_exactly(self):
        archs = [{"n": i} for i in range(40)]
        batch = [(arch, 3) for arch in archs]
        history = nas.search(propose(batch), Counted(), evaluations=1, full=30)
        assert len(history.records) == 10
        assert history.cost == pytest.approx(1)

    def test_a_resource_is_passed_on_and_told_apart(self):
        evaluate = Counted()
        nas.search(propose([(A, 1), (A, 2), (A, 1)]), evaluate, full=2)
        assert evaluate.asked == [(0, 1), (0, 2)]

    def test_ends_when_nothing_new_comes(self):
        def stuck():
            while True:
                count.append((yield [A, B]))

        count = []
        history = nas.search(stuck(), total, evaluations=99)
        assert history.stopped == "nothing new"
        assert len(history.records) == 2 and len(count) == 5000

    def test_ends_when_nothing_comes(self):
        def empty():
            while True:
                yield []

        history = nas.search(empty(), total)
        assert history == nas.History((), "nothing new")

    def test_seconds(self, clock):
        evaluate = slow(clock)
        history = nas.search(climb(SPACE, 0), evaluate, seconds=10)
        assert len(evaluate.asked) == 4  # begun after 0, 3, 6 and 9 s
        assert history.stopped == "seconds"

    def test_seconds_end_a_batch_too(self, clock):
        strategy = propose([A, B, C])
        history = nas.search(strategy, slow(clock), seconds=5)
        assert [r.arch for r in history.records] == [A, B]

    def test_seconds_of_all_sessions_are_summed(self, clock, tmp_path):
        log = tmp_path / "log"
        how = {"log": log, "evaluations": 100}
        first = nas.search(climb(SPACE, 0), slow(clock), seconds=10, **how)
        clock.seconds += 1000  # between sessions
        evaluate = slow(clock)
        again = nas.search(climb(SPACE, 0), evaluate, seconds=10, **how)
        assert again == first and evaluate.asked == []
        more = nas.search(climb(SPACE, 0), evaluate, seconds=20, **how)
        assert len(evaluate.asked) == 3  # begun after 12, 15 and 18 s
        assert more.records[:4] == first.records

    def test_what_is_proposed_cannot_be_changed_by_evaluate(self):
        def spoil(arch):
            return arch.pop("n")

        history = nas.search(propose([A, B]), spoil)
        assert [r.arch for r in history.records] == [{"n": 0}, {"n": 1}]

    @pytest.mark.parametrize("name", ["evaluations", "seconds"])
    @pytest.mark.parametrize("limit", [-1, math.nan])
    def test_refuses_limits(self, name, limit):
        with pytest.raises(ValueError, match=f"{name}: {limit} is no limit"):
            nas.search(propose([A]), total, **{name: limit})


class TestLosses:
    @pytest.mark.parametrize(
        "value", [2, 2.0, True + 1, np.float32(2), torch.tensor(2.0)]
    )
    def test_may_be_any_number(self, value):
        history = nas.search(propose([A]), lambda arch: value)
        assert history.records[0].loss == 2.0
        assert type(history.records[0].loss) is float

    def test_several_may_come_in_a_list(self):
        values = [1, torch.tensor(2.0)]
        history = nas.search(propose([A]), lambda arch: values)
        assert history.records[0].loss == (1.0, 2.0)

    def test_nan_is_infinitely_bad(self):
        losses = iter([math.nan, 5.0])
        history = nas.search(propose([A, B]), lambda arch: next(losses))
        assert history.best.arch == B
        assert answers == [[math.inf, 5.0]]

    def test_one_nan_spoils_all_losses(self):
        history = nas.search(propose([A]), lambda arch: (math.nan, 1.0))
        assert history.records[0].loss == (math.inf, math.inf)

    @pytest.mark.parametrize(
        "value", [None, "0.5", 1j, [1, "2"], torch.ones(2), {}]
    )
    def test_refuses_what_is_no_number(self, value):
        with pytest.raises(ValueError, match=r"is no loss, for \{'n': 1\}"):
            nas.search(propose([B]), lambda arch: value)

    def test_refuses_several_for_one(self, tmp_path):
        how = {"evaluations": 5, "log": tmp_path / "log"}
        with pytest.raises(ValueError, match=r"\(1.0, 2.0\) is not one loss"):
            nas.evolve(SPACE, lambda arch: (1, 2), **how)
        # what was refused is not in the log
        assert len(nas.evolve(SPACE, total, **how).records) == 5

    def test_refuses_one_for_several(self):
        with pytest.raises(ValueError, match=r"1.0 is not several losses"):
            nas.nsga2(SPACE, lambda arch: 1, evaluations=5)


class TestErrors:
    @pytest.mark.parametrize(
        "strategy", [[A], iter([[A]]), lambda: None, "evolve"]
    )
    def test_needs_a_generator(self, strategy):
        with pytest.raises(ValueError, match="is no new generator"):
            nas.search(strategy, total)

    def test_needs_a_new_generator(self):
        used = propose([A], [B])
        next(used)
        with pytest.raises(ValueError, match="is no new generator"):
            nas.search(used, total)

    @pytest.mark.parametrize("proposal", [3, (A, 0), (A, 2), ("x", 1)])
    def test_refuses_other_proposals(self, proposal):
        with pytest.raises(ValueError, match="cannot be evaluated"):
            nas.search(propose([proposal]), lambda *task: 0.0)

    @pytest.mark.parametrize("executor", [2, lambda: 2])
    def test_refuses_what_is_no_executor(self, executor):
        with pytest.raises(ValueError, match=r"executor: .* no Executor"):
            nas.search(propose([A]), total, executor=executor)

    def test_of_evaluate_name_the_architecture_and_keep_the_log(self, tmp_path):
        def fails(arch, *resource):
            if arch["n"] == 2:
                raise KeyError("oops")
            return total(arch)

        log = tmp_path / "log"
        with pytest.raises(KeyError, match="oops") as caught:
            nas.search(propose([A, B, (C, 1)]), fails, log=log)
        assert caught.value.__notes__ == ["while evaluating {'n': 2}, 1"]
        evaluate = Counted()
        nas.search(propose([A, B, (C, 1)]), evaluate, log=log)
        assert evaluate.asked == [(2, 1)]


class TestLog:
    def lines(self, log):
        return [json.loads(line) for line in log.read_text().splitlines()]

    def test_is_json_and_identifies_the_search(self, tmp_path):
        log = tmp_path / "deep" / "down" / "log.jsonl"
        nas.evolve(SPACE, total, evaluations=8, population=4, log=log)
        header, *lines = self.lines(log)
        assert header == {
            "strategy": "evolution",
            "space": {name: [0, 1, 2, 3, 4, 5] for name in "abc"},
            "population": 4,
            "sample": 5,
            "seed": 0,
            "batch": 1,
        }
        assert len(lines) == 8
        for line in lines:
            assert line["loss"] == total(line["task"][0])
        elapsed = [line["elapsed"] for line in lines]
        assert elapsed == sorted(elapsed)

    def test_is_written_at_once(self, tmp_path):
        seen = []

        def look(arch):
            seen.append(len(log.read_text().splitlines()))
            return 0

        log = tmp_path / "log"
        nas.search(propose([A, B], [C]), look, log=log)
        assert seen == [1, 2, 3]

    @pytest.mark.parametrize("kept", range(1, 12))
    def test_continues_wherever_it_was_cut(self, tmp_path, kept):
        """Between lines and in the middle of one."""
        log = tmp_path / "log"
        how = {"evaluations": 10, "population": 4, "log": log}
        whole = nas.evolve(SPACE, total, **how)
        lines = log.read_bytes().splitlines(keepends=True)
        for torn in (0, 1, 7):
            rest = b"".join(lines[kept:])[:torn]
            log.write_bytes(b"".join(lines[:kept]) + rest)
            evaluate = Counted()
            assert nas.evolve(SPACE, evaluate, **how) == whole
            done = [r["task"][0] for r in map(json.loads, lines[1:kept])]
            want = [r.arch for r in whole.records if r.arch not in done]
            assert evaluate.asked == [tuple(a.values()) for a in want]
            assert len(self.lines(log)) == 11

    @pytest.mark.parametrize("left", [0, 5])
    def test_begins_anew_if_the_header_is_torn(self, tmp_path, left):
        log = tmp_path / "log"
        nas.search(climb(SPACE, 0), total, evaluations=3, log=log)
        log.write_bytes(log.read_bytes()[:left])
        nas.search(climb(SPACE, 0), total, evaluations=3, log=log)
        assert len(self.lines(log)) == 4

    def test_a_finished_search_can_be_given_more(self, tmp_path):
        log, evaluate = tmp_path / "log", Counted()
        how = {"log": log, "population": 5}
        nas.evolve(SPACE, total, evaluations=12, **how)
        more = nas.evolve(SPACE, evaluate, evaluations=20, **how)
        assert len(evaluate.asked) == 8
        assert more == nas.evolve(SPACE, total, evaluations=20, population=5)

    def test_keeps_every_float(self, tmp_path):
        losses = [0.1 + 0.2, 1e-300, math.inf, -1 / 3]
        archs = [{"n": i} for i in range(4)]
        for _ in range(2):
            history = nas.search(
                propose(archs), lambda a: losses[a["n"]], log=tmp_path / "log"
            )
            assert [r.loss for r in history.records] == losses

    def test_keeps_several_losses_and_resources(self, tmp_path):
        log = tmp_path / "log"
        batch = [(A, 1), (A, 2), (B, 2)]
        first = nas.search(
            propose(batch), lambda a, r: (a["n"], r), full=2, log=log
        )
        again = nas.search(propose(batch), None, full=2, log=log)
        assert again == first
        assert again.records[1].loss == (0.0, 2.0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seed": 1}, "seed is 0 there and 1 here"),
            ({"sample": 2}, "sample is 5 there and 2 here"),
            ({"space": nas.Space({"a": (1, 2)})}, "space is .* there"),
        ],
    )
    def test_refuses_another_search(self, tmp_path, change, message):
        log = tmp_path / "log"
        how = {"space": SPACE, "evaluate": total, "evaluations": 3}
        nas.evolve(**how, log=log)
        before = log.read_bytes()
        with pytest.raises(ValueError, match=f"log: .*log.*{message}"):
            nas.evolve(**(how | change), log=log)
        assert log.read_bytes() == before

    def test_refuses_another_strategy(self, tmp_path):
        log = tmp_path / "log"
        nas.random_search(SPACE, total, evaluations=3, log=log)
        with pytest.raises(ValueError, match="strategy is 'drawing' there"):
            nas.evolve(SPACE, total, evaluations=3, log=log)

    @pytest.mark.parametrize(
        ("number", "line", "message"),
        [
            (1, "hello", "line 1 of .*log is damaged"),
            (3, '{"task": [{"a"', "line 3 of .*log is damaged"),
            (3, "[1, 2]", "line 3 of .*log is damaged"),
            (2, '{"task": [{}]}', "line 2 of .*log is no evaluation"),
            (
                4,
                '{"task":[{}],"loss":"x","seconds":1,"elapsed":1}',
                "line 4 of .*log is no evaluation",
            ),
        ],
    )
    def test_says_where_it_is_damaged(self, tmp_path, number, line, message):
        log = tmp_path / "log"
        nas.search(climb(SPACE, 0), total, evaluations=4, log=log)
        lines = log.read_text().splitlines()
        lines[number - 1] = line
        log.write_text("\n".join(lines) + "\n")
        with pytest.raises(ValueError, match=message):
            nas.search(climb(SPACE, 0), total, evaluations=4, log=log)

    def test_arguments_that_are_no_numbers_are_named_by_their_type(
        self, tmp_path
    ):
        def strategy(rng, sizes, f):
            yield [{"n": rng.choice(sizes)}]

        log = tmp_path / "log"
        nas.search(strategy(random.Random(0), (1, 2), total), total, log=log)
        assert self.lines(log)[0] == {
            "strategy": "strategy",
            "rng": "Random",
            "sizes": [1, 2],
            "f": "function",
        }


KILLED = """
import sys, time
from minicompress import nas

def evaluate(arch):
    time.sleep(0.01)
    return sum(arch.values())

space = nas.Space({name: range(6) for name in "abc"})
nas.evolve(space, evaluate, evaluations=150, population=10, log=sys.argv[1])
"""


def test_a_killed_search_goes_on_where_it_stopped(tmp_path):
    log = tmp_path / "log"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, log], cwd=ROOT, env={"PATH": ""}
    )
    limit = time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < 30:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    lines = log.read_text().splitlines()[1:]
    lines = lines if log.read_bytes().endswith(b"\n") else lines[:-1]
    done = {tuple(json.loads(line)["task"][0].values()) for line in lines}
    assert 29 <= len(done) < 150

    evaluate = Counted()
    how = {"evaluations": 150, "population": 10}
    history = nas.evolve(SPACE, evaluate, **how, log=log)
    assert history == nas.evolve(SPACE, total, **how)
    assert not done & {*evaluate.asked}
    assert len(done) + len(evaluate.asked) == 150


def test_a_strategy_of_five_lines():
    history = nas.search(climb(SPACE, 1), total, evaluations=60)
    assert history.best.loss == 0
    assert history == nas.search(climb(SPACE, 1), total, evaluations=60)


def test_shows_a_bar(capsys):
    nas.search(propose([A, B]), total, evaluations=2, progress=True)
    assert "2.0/2" in capsys.readouterr().err
    nas.search(propose([A, B]), total, evaluations=2)
    assert capsys.readouterr().err == ""


def test_tasks_have_one_name_in_memory_and_in_a_log():
    task = ({"b": 1, "a": None}, 45)
    back = json.loads(json.dumps(task))
    assert journal.key(task) == journal.key(back)
    assert workers.timed(lambda arch, r: r, *task)[0] == 45.0
