"""Bit allocation against brute force, closed forms and optimizers."""

import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import codes, models, quantize, storage

SOLVERS = [quantize.greedy, quantize.lagrangian, quantize.knapsack]

entries = st.tuples(st.integers(0, 30), st.floats(0, 10))
tables = st.lists(
    st.lists(entries, min_size=1, max_size=4), min_size=1, max_size=6
).map(lambda rows: {f"{i}": dict(enumerate(r)) for i, r in enumerate(rows)})


def brute_force(table, budget):
    """Return the smallest sum of losses of all assignments that fit."""
    best = math.inf
    for pick in itertools.product(*(own.values() for own in table.values())):
        if sum(b for b, _ in pick) <= budget:
            best = min(best, sum(loss for _, loss in pick))
    return best


def least(table):
    return sum(min(b for b, _ in own.values()) for own in table.values())


def most(table):
    return sum(max(b for b, _ in own.values()) for own in table.values())


def convex(layers=12, seed=0):
    """Losses σ² 4^-b of layers of many sizes, for 1 to 8 bits."""
    g = np.random.default_rng(seed)
    sizes = g.integers(10, 1000, layers)
    harm = 10.0 ** g.uniform(-2, 2, layers)
    return {
        f"layer {i}": {
            b: (int(n * b) // 8, float(h * 4.0**-b)) for b in range(1, 9)
        }
        for i, (n, h) in enumerate(zip(sizes, harm, strict=True))
    }


class TestSolvers:
    @given(tables, st.integers(0, 60))
    @settings(max_examples=150, deadline=None)
    def test_knapsack_is_brute_force(self, table, more):
        budget = least(table) + more
        choice = quantize.knapsack(table, budget=budget)
        size, loss = quantize.predicted(table, choice)
        assert list(choice) == list(table) and size <= budget
        want = brute_force(table, budget)
        assert math.isclose(loss, want, rel_tol=1e-9, abs_tol=1e-9)

    @given(tables, st.integers(0, 60))
    @settings(max_examples=150, deadline=None)
    def test_knapsack_then_greedy_then_lagrangian(self, table, more):
        budget = least(table) + more
        losses = []
        for solve in SOLVERS:
            choice = solve(table, budget=budget)
            size, loss = quantize.predicted(table, choice)
            assert size <= budget and choice.keys() == table.keys()
            losses.append(loss)
        greedy, lagrangian, knapsack = losses
        assert knapsack <= greedy + 1e-9
        assert greedy <= lagrangian + 1e-9

    @given(tables)
    @settings(max_examples=50, deadline=None)
    def test_with_room_for_all_each_layer_takes_its_best(self, table):
        want = sum(min(x for _, x in own.values()) for own in table.values())
        for solve in SOLVERS:
            choice = solve(table, budget=most(table))
            loss = quantize.predicted(table, choice)[1]
            assert math.isclose(loss, want, rel_tol=1e-9, abs_tol=1e-9)

    @pytest.mark.parametrize("solve", SOLVERS)
    def test_all_bits_or_the_fewest(self, solve):
        table = convex()
        ends = [solve(table, budget=f(table)) for f in (least, most)]
        assert [set(c.values()) for c in ends] == [{1}, {8}]

    def test_lagrangian_misses_what_lies_above_the_hull(self):
        # 2 bits lie above the line from 1 bit to 3, so no price picks them
        table = {
            "a": {1: (10, 1.0), 2: (20, 0.6), 3: (30, 0.0)},
            "b": {1: (10, 0.07), 2: (20, 0.06)},
        }
        at = {s: s(table, budget=30) for s in SOLVERS}
        assert at[quantize.lagrangian] == {"a": 1, "b": 1}
        assert at[quantize.greedy] == {"a": 2, "b": 1}
        losses = [quantize.predicted(table, at[s])[1] for s in SOLVERS]
        assert losses == pytest.approx([0.67, 1.07, 0.67])
        at = {s: s(table, budget=40) for s in SOLVERS}
        assert at[quantize.knapsack] == {"a": 3, "b": 1}

    def test_greedy_can_be_led_astray(self):
        table = {
            "a": {2: (10, 1.0), 4: (11, 0.8)},  # 0.2 for a byte
            "b": {2: (10, 1.0), 4: (20, 0.1)},  # 0.09 for a byte
        }
        assert quantize.greedy(table, budget=30) == {"a": 4, "b": 2}
        assert quantize.knapsack(table, budget=30) == {"a": 2, "b": 4}

    @pytest.mark.parametrize("bits", [1.5, 2, 3, 5])
    def test_convex_losses_are_nearly_solved_by_one_price(self, bits):
        table = convex()
        budget = int(bits * least(table))
        losses = [
            quantize.predicted(table, s(table, budget=budget))[1]
            for s in SOLVERS
        ]
        assert losses[2] <= losses[0] <= losses[1] <= 1.3 * losses[2]
        # what a price picks is the best for the bytes that it takes
        taken = quantize.lagrangian(table, budget=budget)
        size, loss = quantize.predicted(table, taken)
        best = quantize.knapsack(table, budget=size)
        assert quantize.predicted(table, best)[1] == pytest.approx(loss)

    @pytest.mark.parametrize("solve", SOLVERS)
    def test_a_layer_that_hurts_more_never_gets_fewer_bits(self, solve):
        table, before = convex(), 0
        budget = 3 * least(table)
        for factor in (1, 3, 10, 1e3, 1e6):
            own = table["layer 5"].items()
            louder = {b: (size, factor * x) for b, (size, x) in own}
            bits = solve(table | {"layer 5": louder}, budget=budget)["layer 5"]
            assert bits >= before
            before = bits
        assert before == 8

    @pytest.mark.parametrize("solve", SOLVERS)
    def test_more_bytes_never_hurt(self, solve):
        table = convex(6)
        losses = [
            quantize.predicted(table, solve(table, budget=b))[1]
            for b in range(least(table), most(table), 97)
        ]
        if solve is not quantize.greedy:  # which promises no such thing
            assert losses == sorted(losses, reverse=True)
        assert losses[-1] < losses[0]

    def test_many_layers_and_a_large_budget_stay_exact(self):
        table = convex(48)
        scaled = {
            n: {b: (1000 * size, x) for b, (size, x) in own.items()}
            for n, own in table.items()
        }
        budget = 3 * least(table)
        a = quantize.knapsack(table, budget=budget)
        assert quantize.knapsack(scaled, budget=1000 * budget + 999) == a

    def test_scipy_finds_the_same_integers(self):
        table = convex(20)
        budget = 3 * least(table)
        entries = [e for own in table.values() for e in own.values()]
        size, loss = map(np.array, zip(*entries, strict=True))
        one_each = np.kron(np.eye(20), np.ones(8))
        found = scipy.optimize.milp(
            loss,
            integrality=1,
            bounds=(0, 1),
            constraints=[(one_each, 1, 1), (size, -np.inf, budget)],
            options={"mip_rel_gap": 0},
        )
        choice = quantize.knapsack(table, budget=budget)
        assert quantize.predicted(table, choice)[1] == pytest.approx(
            found.fun, rel=1e-6
        )

    def test_the_table_stays(self):
        table = convex(3)
        before = {n: dict(own) for n, own in table.items()}
        for solve in SOLVERS:
            solve(table, budget=most(table) // 2)
        assert table == before

    @pytest.mark.parametrize("solve", SOLVERS)
    def test_errors(self, solve):
        table = {"a": {4: (40, 0.1), 2: (20, 0.3)}, "b": {2: (5, 0.0)}}
        with pytest.raises(ValueError, match=r"24 bytes, .* take 25"):
            solve(table, budget=24)
        with pytest.raises(ValueError, match="table: b has no choice"):
            solve(table | {"b": {}}, budget=99)
        for bad in ((10, math.nan), (-1, 0.0)):
            with pytest.raises(ValueError, match=r"table: b, 2 needs .* got"):
                solve(table | {"b": {2: bad}}, budget=99)


class Two(nn.Module):
    """Two weights that are multiplied: what one loses depends on the other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1)
        with torch.no_grad():
            self.a.weight.fill_(2.0)
            self.b.weight.fill_(3.0)


def fixed(x):
    return codes.Affine(codes.Ints(torch.tensor([[1]]), 1), x)


class TestSensitivity:
    def test_one_layer_at_a_time(self):
        model = Two()
        options = {
            "a.weight": {1: fixed(1.5), 2: fixed(2.0)},
            "b.weight": {1: fixed(1.0)},
        }

        def metric(m):
            return (6 - m.a.weight * m.b.weight).item()

        table = quantize.sensitivity(model, options, metric)
        assert table == {
            "a.weight": {1: (1, 1.5), 2: (1, 0.0)},
            "b.weight": {1: (1, 4.0)},
        }
        both = {n: own[1] for n, own in options.items()}
        _, sum_of_both = quantize.predicted(table, dict.fromkeys(both, 1))
        assert sum_of_both == 5.5
        assert quantize.damage(model, both, metric) == 4.5  # not additive
        assert model.a.weight == 2 and model.b.weight == 3

    def test_bytes_are_those_of_the_file(self):
        torch.manual_seed(0)
        model = models.MLP(widths=(16, 16, 8))
        weights = {n: w for n, w in model.named_parameters() if w.ndim == 2}
        options = {
            n: {b: quantize.min_max(w, bits=b) for b in (2, 4)}
            for n, w in weights.items()
        }
        table = quantize.sensitivity(model, options, lambda m: 0.0)
        sizes = []
        for b in (2, 4):
            made = {n: own[b] for n, own in options.items()}
            state = codes.encode(model, codes.value, lambda n, w: False)
            sizes.append(len(storage.dumps(model, state | made)))
        two, four = (
            quantize.predicted(table, dict.fromkeys(options, b))[0]
            for b in (2, 4)
        )
        assert sizes[1] - sizes[0] == four - two

    def test_tied_weights_change_together(self):
        torch.manual_seed(0)
        lm = models.LM(vocab=11, width=8, layers=1, heads=2, ff=16, context=6)
        code = quantize.min_max(lm.tokens.weight, bits=2)

        def metric(m):
            assert m.head.weight is m.tokens.weight
            return (m.head.weight - lm.head.weight).abs().sum().item()

        want = (code.decode() - lm.head.weight).abs().sum()
        got = quantize.damage(lm, {"head.weight": code}, metric)
        assert got == pytest.approx(want.item())

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="c: the model has no such"):
            quantize.damage(Two(), {"c": fixed(1.0)}, lambda m: 0.0)


class TestWaterFilling:
    def test_the_example_of_equal_distortion(self):
        v = torch.tensor([4, 1, 0.25, 0.0625])
        b = quantize.water_filling(v, torch.ones(4), bits=3)
        assert b.tolist() == [4.5, 3.5, 2.5, 1.5]
        assert (v * 4.0**-b).unique().numel() == 1

    @given(st.integers(1, 8), st.floats(0.01, 6), st.integers(0, 999))
    @settings(max_examples=60, deadline=None)
    def test_optimality(self, layers, bits, seed):
        g = torch.Generator().manual_seed(seed)
        v = 10 ** (2 * torch.randn(layers, generator=g).double())
        n = torch.randint(1, 500, (layers,), generator=g).double()
        b = quantize.water_filling(v, n, bits=bits)
        assert (b >= 0).all()
        assert math.isclose((n * b).sum(), bits * n.sum(), abs_tol=1e-6)
        D = v * 4.0**-b  # distortion: the water level, or all of the variance
        level = D[b > 0].mean()
        torch.testing.assert_close(D[b > 0], level.expand((b > 0).sum()))
        assert (v[b == 0] <= level * (1 + 1e-9)).all()

    def test_scipy_finds_no_better_share(self):
        v, n = np.array([5.0, 0.3, 1e-4]), np.array([10.0, 300.0, 50.0])
        b = quantize.water_filling(
            torch.tensor(v), torch.tensor(n), bits=2
        ).numpy()

        def total(b):
            return (n * v * 4.0**-b).sum()

        found = scipy.optimize.minimize(
            total,
            np.full(3, 2.0),
            bounds=[(0, None)] * 3,
            constraints={"type": "eq", "fun": lambda b: n @ b - 2 * n.sum()},
        )
        assert total(b) <= found.fun * (1 + 1e-6)
        assert b[2] == 0

    def test_a_layer_without_variance(self):
        v = torch.tensor([1.0, 0.0])
        b = quantize.water_filling(v, torch.tensor([1, 3]), bits=1)
        assert b.tolist() == [4, 0]
        assert quantize.water_filling(0 * v, torch.ones(2), bits=1).sum() == 0

    def test_errors(self):
        v = torch.tensor([1.0, -1.0])
        with pytest.raises(ValueError, match="each of 2 layers"):
            quantize.water_filling(v, torch.ones(2), bits=1)
        with pytest.raises(ValueError, match="sizes must be positive"):
            quantize.water_filling(v.abs(), torch.zeros(2), bits=1)
        with pytest.raises(ValueError, match="bits must be at least 0, got -1"):
            quantize.water_filling(v.abs(), torch.ones(2), bits=-1)


class TestBySize:
    @given(st.integers(2, 6), st.floats(3, 8), st.integers(0, 999))
    @settings(max_examples=40, deadline=None)
    def test_the_rule_between_any_two(self, layers, decibels, seed):
        g = torch.Generator().manual_seed(seed)
        n = torch.randint(1, 10_000, (layers,), generator=g).double()
        b = quantize.by_size(n, bits=6, decibels=decibels)
        assert math.isclose((n * b).sum(), 6 * n.sum(), rel_tol=1e-9)
        for i, j in itertools.combinations(range(layers), 2):
            want = 10 * math.log10(n[i] / n[j]) / decibels
            assert math.isclose(b[j] - b[i], want, abs_tol=1e-9)

    def test_scipy_finds_no_better_share(self):
        n = np.array([100.0, 400.0, 3000.0])

        def noise(b):
            return (10 ** (-6.0206 * b / 10)).sum()

        found = scipy.optimize.minimize(
            noise,
            np.full(3, 5.0),
            constraints={"type": "eq", "fun": lambda b: n @ b - 5 * n.sum()},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        b = quantize.by_size(torch.tensor(n), bits=5).numpy()
        assert noise(b) <= found.fun * (1 + 1e-9)
        assert np.abs(b - found.x).max() < 0.05
        assert noise(b) < 0.6 * noise(np.full(3, 5.0))
