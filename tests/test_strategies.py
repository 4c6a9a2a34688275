"""Strategies against tables, closed forms and simulations."""

import inspect
import itertools
import math
import random
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare, hypergeom

from minicompress import nas
from minicompress.nas import policies, populations, strategies

SPACE = nas.Space({name: range(5) for name in "abcd"})
EVEN = SPACE.where(lambda arch: sum(arch.values()) % 2 == 0)
BITS = nas.Space({f"bit{i}": (0, 1) for i in range(16)})


@cache
def table(seed=0):
    """A loss without any structure: one random number per member."""
    rng = random.Random(seed)
    losses = {tuple(arch.values()): rng.random() for arch in SPACE}
    return lambda arch, *resource: losses[tuple(arch.values())]


def several(arch):
    return table(0)(arch), table(1)(arch)


def zeros(arch):
    return len(arch) - sum(arch.values())


SINGLE = {
    "random_search": (nas.random_search, {}),
    "evolve": (nas.evolve, {"population": 8, "sample": 3}),
    "reinforce": (nas.reinforce, {"lr": 0.3}),
    "halving": (nas.halving, {"resources": (1, 2, 4)}),
}
ALL = {**SINGLE, "nsga2": (nas.nsga2, {"population": 8})}


def run(name, *, space=SPACE, evaluate=None, evaluations=60, **how):
    f, options = ALL[name]
    default = several if name == "nsga2" else table()
    evaluate = evaluate or default
    how = options | how
    return f(space, evaluate, evaluations=evaluations, **how)


class TestEvery:
    @pytest.mark.parametrize("name", SINGLE)
    @pytest.mark.parametrize("seed", range(5))
    def test_is_never_better_than_the_whole_table(self, name, seed):
        truth = nas.exhaustive(SPACE, table())
        found = run(name, seed=seed)
        assert found.best.loss >= truth.best.loss
        assert found.best.loss == table()(found.best.arch)

    @pytest.mark.parametrize("name", ALL)
    def test_repeats_itself_with_the_same_seed(self, name):
        state = random.getstate()
        assert run(name, seed=3) == run(name, seed=3)
        assert run(name, seed=3) != run(name, seed=4)
        assert random.getstate() == state  # no global randomness

    @pytest.mark.parametrize("name", ALL)
    @pytest.mark.parametrize("evaluations", [3, 29, 60])
    def test_keeps_to_its_budget(self, name, evaluations):
        asked = []
        default = several if name == "nsga2" else table()

        def evaluate(arch, resource=4):
            asked.append((tuple(arch.values()), resource))
            return default(arch)

        history = run(name, evaluate=evaluate, evaluations=evaluations)
        assert len({*asked}) == len(asked) == len(history.records)
        assert sum(r / 4 for _, r in asked) <= evaluations
        if name != "halving":  # what cannot be shared equally is left
            assert history.cost == evaluations
            assert history.stopped == "evaluations"

    @pytest.mark.parametrize("name", ALL)
    def test_never_leaves_the_space(self, name):
        history = run(name, space=EVEN, evaluations=50)
        assert all(EVEN.accepts(r.arch) for r in history.records)
        assert all(SPACE.encode(r.arch) for r in history.records)

    @pytest.mark.parametrize("name", ALL)
    def test_ends_when_the_space_is_used_up(self, name):
        tiny = nas.Space({"a": (0, 1), "b": (0, 1), "c": (0,), "d": (0,)})
        history = run(name, space=tiny, evaluations=50)
        assert history.stopped in ("nothing new", "the strategy")
        whole = [r.arch for r in history.whole]
        assert len(whole) <= 4
        if name != "reinforce":  # which may converge before
            assert sorted(map(SPACE.encode, whole)) == [
                SPACE.encode(arch) for arch in tiny
            ]

    @pytest.mark.parametrize("name", ALL)
    def test_survives_trainings_that_diverge(self, name):
        default = several if name == "nsga2" else table()

        def evaluate(arch, *resource):
            return default(arch) if arch["a"] else math.nan

        if name == "nsga2":
            evaluate = lambda arch: (  # noqa: E731
                several(arch) if arch["a"] else (math.nan, 0.0)
            )
        history = run(name, evaluate=evaluate, evaluations=60)
        best = history.front() if name == "nsga2" else [history.best]
        assert any(r.arch["a"] == 0 for r in history.records)
        assert all(r.arch["a"] for r in best)

    @pytest.mark.parametrize("name", ALL)
    def test_survives_if_all_diverge(self, name):
        bad = (math.nan, 1) if name == "nsga2" else math.nan
        history = run(name, evaluate=lambda *task: bad, evaluations=30)
        assert len(history.records) >= 30

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("random_search", {"batch": 0}, "batch: 0 is not positive"),
            ("evolve", {"batch": 0}, "batch: 0"),
            ("evolve", {"population": 0}, "population: 0"),
            ("evolve", {"sample": 0}, "sample: 0"),
            ("reinforce", {"lr": 0}, "lr: 0"),
            ("reinforce", {"batch": -1}, "batch: -1"),
            ("nsga2", {"population": 0}, "population: 0"),
            ("halving", {"resources": (4, 2)}, r"\(4, 2\) do not ascend"),
            ("halving", {"resources": (0, 2)}, r"\(0, 2\) do not ascend"),
            ("halving", {"evaluations": 2}, "2 are fewer than 3 rungs"),
        ],
    )
    def test_refuses(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            run(name, **options)

    @pytest.mark.parametrize("name", ALL)
    def test_refuses_unknown_options(self, name):
        with pytest.raises(TypeError, match="'second'"):
            run(name, second=3)


class TestRandom:
    def test_draws_all_in_effect_without_replacement(self):
        history = nas.random_search(SPACE, table(), evaluations=625)
        assert len(history.records) == 625
        assert history.best == nas.exhaustive(SPACE, table()).best

    def test_hits_the_best_twentieth_as_often_as_counted(self):
        """1 − (1 − q)ⁿ = 0.953 with replacement, without it 0.960."""
        n, q, runs = 60, 31 / 625, 300
        good = sorted(table()(arch) for arch in SPACE)[30]
        hits = sum(
            nas.random_search(
                SPACE, table(), evaluations=n, seed=s, batch=n
            ).best.loss
            <= good
            for s in range(runs)
        )
        assert round(1 - (1 - q) ** n, 3) == 0.953
        p = 1 - hypergeom(625, 31, n).pmf(0)
        assert round(p, 3) == 0.960
        assert binomtest(hits, runs, p).pvalue > 0.01
        # one draw in place of 60 hits as often as the good are many
        assert binomtest(hits, runs, q).pvalue < 1e-9

    def test_a_batch_changes_nothing(self):
        one = nas.random_search(SPACE, table(), evaluations=50)
        many = nas.random_search(SPACE, table(), evaluations=50, batch=7)
        assert one == many

    def test_several_losses(self):
        history = nas.random_search(SPACE, several, evaluations=625)
        points = [several(arch) for arch in SPACE]
        want = sorted(points[i] for i in nas.front(points))
        assert sorted(r.loss for r in history.front()) == want


class TestExhaustive:
    @pytest.mark.parametrize("batch", [1, 4, 1000])
    def test_is_the_table(self, batch):
        history = nas.exhaustive(EVEN, table(), batch=batch)
        assert [r.arch for r in history.records] == list(EVEN)
        assert history.best.loss == min(map(table(), EVEN))
        assert history.stopped == "the strategy"

    def test_a_part_of_it(self):
        history = nas.exhaustive(SPACE, table(), evaluations=10)
        assert [r.arch for r in history.records] == list(SPACE)[:10]


class TestEvolution:
    def driven(self, losses, *, population=6, sample=200, batch=1, n=60):
        """Run the generator by hand; return all it proposed, in order."""
        strategy = populations.evolution(SPACE, population, sample, 0, batch)
        seen, found = [], None
        while len(seen) < n:
            archs = strategy.send(found)
            found = [losses(arch) for arch in archs]
            seen += archs
        return seen

    @pytest.mark.parametrize("population", [1, 3, 6])
    def test_parents_are_the_best_of_the_youngest(self, population):
        """So many are drawn that the best living one is always among them:
        every child is one change away from the best of the last P."""
        f = table()
        seen = self.driven(f, population=population)
        immortal = 0  # children of the best ever, had it not died
        for i in range(population, len(seen)):
            living = seen[i - population : i]
            parent = min(living, key=f)
            assert distance(parent, seen[i]) == 1
            immortal += distance(min(seen[:i], key=f), seen[i]) == 1
        assert immortal < len(seen) - population

    def test_a_batch_is_born_before_anyone_dies(self):
        f, P, batch = table(), 6, 4
        seen = self.driven(f, population=P, batch=batch)
        for i in range(P, len(seen) - batch + 1, batch):
            parent = min(seen[i - P : i], key=f)
            children = seen[i : i + batch]
            assert all(distance(parent, child) == 1 for child in children)

    def test_with_a_sample_of_one_losses_do_not_matter(self):
        walks = [self.driven(table(seed), sample=1, n=100) for seed in range(2)]
        assert walks[0] == walks[1]
        others = [self.driven(table(s), sample=2, n=100) for s in range(2)]
        assert others[0] != others[1]

    def test_parents_are_drawn_evenly_with_a_sample_of_one(self):
        """From a population of which each member is far from the others."""
        space = nas.Space({f"x{i}": range(8) for i in range(8)})
        counts = Counter()
        for seed in range(600):
            strategy = populations.evolution(space, 4, 1, seed, 1)
            first = strategy.send(None)
            (child,) = strategy.send([0.0] * 4)
            counts[min(range(4), key=lambda i: distance(first[i], child))] += 1
        assert chisquare([counts[i] for i in range(4)]).pvalue > 0.01

    def test_reaches_all_ones(self):
        """And faster than random draws, of which 300 have a chance of 0.5 %
        to find one in 2¹⁶."""
        histories = [
            nas.evolve(BITS, zeros, evaluations=300, seed=s) for s in range(10)
        ]
        assert [h.best.loss for h in histories] == [0] * 10
        drawn = [
            nas.random_search(BITS, zeros, evaluations=300, seed=s).best.loss
            for s in range(10)
        ]
        assert min(drawn) > 0

    def test_selection_matters(self):
        """Knocked out, with a sample of one, it wanders about."""
        losses = [
            nas.evolve(BITS, zeros, evaluations=300, sample=1, seed=s).best.loss
            for s in range(5)
        ]
        assert min(losses) > 0

    def test_jumps_where_no_single_change_is_valid(self):
        corners = SPACE.where(lambda arch: len({*arch.values()}) == 1)
        history = nas.evolve(corners, table(), evaluations=5, population=2)
        assert len(history.records) == 5

    def test_a_population_larger_than_the_budget_is_random_search(self):
        how = {"evaluations": 10, "seed": 5}
        a = nas.evolve(SPACE, table(), population=99, **how)
        b = nas.random_search(SPACE, table(), **how)
        assert a == b


def distance(a, b):
    return sum(a[name] != b[name] for name in a)


class TestReinforce:
    @given(
        st.lists(st.floats(-3, 3), min_size=2, max_size=5),
        st.floats(-10, 10),
        st.integers(0, 9),
    )
    def test_expected_gradient_has_a_closed_form(self, z, b, seed):
        """π ⊙ (R − E R), whatever the baseline."""
        R = np.random.default_rng(seed).normal(size=len(z))
        pi = np.array(policies.softmax(z))
        found = sum(
            pi[i] * (R[i] - b) * np.array(policies.score(z, i))
            for i in range(len(z))
        )
        np.testing.assert_allclose(found, pi * (R - pi @ R), atol=1e-12)

    def test_score_is_the_gradient_of_the_logarithm(self):
        z = torch.randn(
            4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()
        for i in range(4):
            (g,) = torch.autograd.grad(z.log_softmax(0)[i], z)
            assert policies.score(z.tolist(), i) == pytest.approx(g.tolist())

    def test_softmax_of_large_numbers(self):
        assert policies.softmax([1e4, 1e4, -1e4]) == [0.5, 0.5, 0.0]

    def test_a_step_by_hand(self):
        """Two architectures, baseline and step checked by autograd."""
        lr, decay = 0.7, 0.9
        strategy = policies.policy(SPACE, lr, decay, 0, 2)
        theta = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
        b, losses = None, None
        for step in range(4):
            archs = strategy.send(losses)
            state = inspect.getgeneratorlocals(strategy)
            found = torch.tensor(list(state["logits"].values()))
            torch.testing.assert_close(found.double(), theta.detach())
            losses = [2.0 * step + 1, 5.0]
            R = [-x for x in losses]
            mean = sum(R) / 2
            b = mean if b is None else b
            J = sum(
                (r - b) * theta.log_softmax(1)[range(4), SPACE.encode(arch)]
                for r, arch in zip(R, archs, strict=True)
            )
            (g,) = torch.autograd.grad(J.sum() / 2, theta)
            theta = (theta + lr * g).detach().requires_grad_()
            b = decay * b + (1 - decay) * mean

    @pytest.mark.parametrize("seed", range(5))
    def test_converges_on_a_bandit(self, seed):
        space = nas.Space({"arm": range(4)})
        losses = [0.7, 0.5, 0.2, 0.6]
        strategy = policies.policy(space, 0.5, 0.95, seed, 1)
        archs = strategy.send(None)
        for _ in range(2000):
            archs = strategy.send([losses[a["arm"]] for a in archs])
        z = inspect.getgeneratorlocals(strategy)["logits"]["arm"]
        assert policies.softmax(z)[2] > 0.95

    def test_draws_what_the_policy_says(self):
        rng = random.Random(0)
        space = nas.Space({"arm": range(3)})
        z = {"arm": [0.0, 1.0, 2.0]}
        arms = Counter(
            policies.acted(space, z, rng)["arm"] for _ in range(5000)
        )
        want = [5000 * p for p in policies.softmax(z["arm"])]
        assert chisquare([arms[i] for i in range(3)], want).pvalue > 0.01

    def test_a_policy_that_wants_only_what_is_not_valid_does_not_hang(self):
        z = {name: [100.0, 0, 0, 0, 0] for name in SPACE.choices}
        never = SPACE.where(lambda arch: sum(arch.values()) > 8)
        arch = policies.acted(never, z, random.Random(0))
        assert never.accepts(arch)

    def test_learns(self):
        """Of its last draws more are good than of as many random ones."""
        space = nas.Space({name: range(10) for name in "abc"})
        loss = lambda arch: sum(arch.values()) / 27  # noqa: E731
        found = nas.reinforce(space, loss, evaluations=150, lr=1.0)
        late = [r.loss for r in found.records[-50:]]
        drawn = nas.random_search(space, loss, evaluations=50)
        assert sum(late) / 50 < 0.6 * sum(r.loss for r in drawn.records) / 50


class TestHalving:
    def halved(self, evaluations=30, **how):
        how = {"resources": (45, 90, 180)} | how
        return nas.halving(SPACE, table(), evaluations=evaluations, **how)

    def by_rung(self, history):
        groups = itertools.groupby(history.records, key=lambda r: r.cost)
        return [(cost, list(group)) for cost, group in groups]

    def test_rungs_cost_the_same(self):
        rungs = self.by_rung(self.halved())
        assert [(c, len(g)) for c, g in rungs] == [
            (0.25, 40),
            (0.5, 20),
            (1, 10),
        ]
        assert self.halved().cost == 30

    def test_the_better_ones_go_on(self):
        rungs = [group for _, group in self.by_rung(self.halved())]
        for group, following in itertools.pairwise(rungs):
            ranked = sorted(group, key=lambda r: r.loss)
            want = [r.arch for r in ranked[: len(following)]]
            assert [r.arch for r in following] == want

    def test_all_that_start_differ(self):
        (_, first), *_ = self.by_rung(self.halved(evaluations=300))
        assert len({SPACE.encode(r.arch) for r in first}) == len(first) == 400

    @pytest.mark.parametrize("evaluations", [3, 7, 10.5, 31])
    @pytest.mark.parametrize("resources", [(1,), (1, 3), (2, 3, 5), (1, 4, 16)])
    def test_never_costs_more_than_it_may(self, evaluations, resources):
        history = self.halved(evaluations, resources=resources)
        assert history.cost <= evaluations + 1e-9
        assert history.stopped in ("the strategy", "evaluations")
        assert len(history.whole) == int(evaluations / len(resources))

    def test_one_rung_is_random_search(self):
        history = self.halved(20, resources=[7])
        other = nas.random_search(SPACE, table(), evaluations=20)
        assert history.records == other.records

    def test_finds_the_best_that_starts_if_rungs_agree(self):
        history = self.halved()
        assert history.best.loss == min(r.loss for r in history.records)

    def test_is_told_the_resource(self):
        asked = Counter()
        nas.halving(
            SPACE,
            lambda a, r: asked.update([r]) or 0.0,
            evaluations=6,
            resources=(10, 20),
        )
        assert asked == {10: 6, 20: 3}

    def test_a_small_space_starts_as_a_whole(self):
        tiny = nas.Space({"a": range(3)})
        found = strategies.different(tiny, 10, random.Random(0))
        assert sorted(arch["a"] for arch in found) == [0, 1, 2]


class TestNsga2:
    def test_order_is_rank_then_distance(self):
        rng = random.Random(0)
        points = [(rng.randrange(9), rng.randrange(9)) for _ in range(40)]
        order = populations.best_first(points)
        assert sorted(order) == list(range(40))
        keys = {}
        for rank, F in enumerate(nas.fronts(points)):
            for i, d in zip(
                F, nas.crowding([points[i] for i in F]), strict=True
            ):
                keys[i] = rank, -d
        assert [keys[i] for i in order] == sorted(keys.values())

    def test_keeps_the_best_of_parents_and_children(self):
        strategy = populations.generations(SPACE, 10, 0)
        pool, losses = [], None
        for _ in range(8):
            archs = strategy.send(losses)
            if losses:
                members = inspect.getgeneratorlocals(strategy)["members"]
                points = list(pool.values())
                order = populations.best_first(points)[:10]
                want = [list(pool)[i] for i in order]
                assert list(members) == want
                pool = dict(members)
            else:
                pool = {}
            losses = [several(arch) for arch in archs]
            pool |= zip(map(SPACE.encode, archs), losses, strict=True)

    def test_children_come_from_two_parents_and_one_change(self):
        rng = random.Random(0)
        parents = [{n: i for n in SPACE.choices} for i in range(3)]
        for _ in range(200):
            child = populations.born(SPACE, parents, rng)
            pairs = itertools.combinations_with_replacement(range(3), 2)
            changes = [sum(v not in p for v in child.values()) for p in pairs]
            assert min(changes) <= 1

    def test_better_parents_have_more_children(self):
        """Of n in order, the tournament of two takes i with probability
        (2 (n − i) − 1) / n²."""
        n, rng = 5, random.Random(0)
        rest = {name: (0, 1) for name in "uvwxyz"}
        space = nas.Space({"a": range(5), **rest})
        parents = [dict.fromkeys(space.choices, 0) | {"a": i} for i in range(n)]
        counts = Counter()
        for _ in range(4000):
            child = populations.born(space, parents, rng)
            if any(child[name] for name in rest):
                counts[child["a"]] += 1  # here "a" comes from a parent
        p = [(2 * (n - i) - 1) / n**2 for i in range(n)]
        want = [counts.total() * x for x in p]
        assert chisquare([counts[i] for i in range(n)], want).pvalue > 0.01

    def test_finds_a_known_front(self):
        space = nas.Space({n: range(10) for n in "abcd"})

        def losses(arch):
            a, b, c, d = arch.values()
            waste = abs(b - 5) + abs(c - 2) + abs(d - 7)
            return a + waste, 9 - a + waste

        history = nas.nsga2(space, losses, evaluations=700, seed=1)
        found = sorted({r.loss for r in history.front()})
        assert found == [(a, 9 - a) for a in range(10)]

    def test_has_a_larger_hypervolume_than_random_search(self):
        def losses(arch):  # ones that lead, zeros that trail
            bits = "".join(map(str, arch.values()))
            return len(bits.lstrip("1")), len(bits.rstrip("0"))

        volumes = []
        for seed in range(6):
            found = [
                f(BITS, losses, evaluations=200, seed=seed)
                for f in (nas.nsga2, nas.random_search)
            ]
            volumes.append(
                [
                    nas.hypervolume([r.loss for r in h.front()], (17, 17))
                    for h in found
                ]
            )
        assert all(ours > drawn for ours, drawn in volumes)

    def test_no_member_twice(self):
        tiny = nas.Space({"a": range(3), "b": range(3), "c": (0,), "d": (0,)})
        strategy = populations.generations(tiny, 20, 0)
        archs = strategy.send(None)
        for _ in range(3):
            archs = strategy.send([several(arch) for arch in archs])
            members = inspect.getgeneratorlocals(strategy)["members"]
            assert len(members) <= 9 and len(archs) == 20
