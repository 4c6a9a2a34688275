"""Ranks against counts, brute force and random matrices."""

import itertools
import math

import numpy as np
import pytest
import scipy.integrate
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import lowrank


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def falling(n, seed=0):
    return normal(n, seed=seed).abs().sort(descending=True).values


def best(table, budget):
    """Try every combination of choices."""
    found = (math.inf, None)
    for pick in itertools.product(*table.values()):
        entries = [t[r] for t, r in zip(table.values(), pick, strict=True)]
        cost, loss = map(sum, zip(*entries, strict=True))
        if cost <= budget:
            found = min(found, (loss, cost))
    return found[0]


def total(table, choice):
    entries = [table[name][rank] for name, rank in choice.items()]
    return tuple(map(sum, zip(*entries, strict=True)))


class TestSpectrum:
    @pytest.mark.parametrize("shape", [(9, 6), (6, 9), (7, 7)])
    def test_is_numpys(self, shape):
        W = normal(*shape)
        s = np.linalg.svd(W.numpy(), compute_uv=False)
        torch.testing.assert_close(lowrank.spectrum(W), torch.tensor(s))

    @pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
    @pytest.mark.parametrize("rank", [9, 2])
    def test_of_the_outputs(self, shape, rank):
        W = normal(*shape)
        X = normal(30, rank) @ normal(rank, shape[1], seed=1)
        s = torch.linalg.svdvals(X @ W.T)[:6] / 30**0.5
        found = lowrank.spectrum(W, X.T @ X / 30)
        torch.testing.assert_close(found, s, atol=1e-6, rtol=1e-6)

    @pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
    def test_is_what_the_factors_lose(self, shape):
        W, X = normal(*shape), normal(30, shape[1], seed=1)
        H = X.T @ X / 30
        cases = [
            (lowrank.spectrum(W), lowrank.svd(W, rank=2), torch.eye(shape[1])),
            (lowrank.spectrum(W, H), lowrank.drone(W, H, rank=2, damp=0), H),
        ]
        for s, code, moments in cases:
            D = W - code.decode()
            loss = torch.trace(D @ moments.double() @ D.T)
            torch.testing.assert_close(loss, s[2:].square().sum())

    def test_types_and_errors(self):
        W = normal(4, 3).to(torch.bfloat16)
        assert lowrank.spectrum(W).dtype == torch.float64
        with pytest.raises(ValueError, match=r"W must be \(out, in\)"):
            lowrank.spectrum(torch.zeros(3))
        with pytest.raises(ValueError, match=r"H must be \(3, 3\)"):
            lowrank.spectrum(W, torch.eye(4))


class TestEnergyRank:
    def test_squares_count(self):
        s = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0])
        # squares 4 of 8; unsquared it would be 2 of 6
        assert lowrank.energy_rank(s, energy=0.5) == 1
        assert lowrank.energy_rank(s, energy=0.51) == 2

    @pytest.mark.parametrize("energy", [0.1, 0.25, 0.5, 0.85, 0.9, 1.0])
    @pytest.mark.parametrize("n", [1, 7, 20])
    def test_of_a_flat_spectrum(self, energy, n):
        want = math.ceil(round(energy * n, 9))
        assert lowrank.energy_rank(torch.ones(n), energy=energy) == want

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("k", [1, 4])
    def test_all_of_a_matrix_of_low_rank(self, k, dtype):
        W = (normal(30, k) @ normal(k, 20, seed=1)).to(dtype)
        assert lowrank.energy_rank(lowrank.spectrum(W), energy=1) == k
        assert lowrank.energy_rank(torch.linalg.svdvals(W), energy=1) == k

    @settings(max_examples=50, deadline=None)
    @given(st.integers(1, 20), st.integers(0, 99), st.floats(0.01, 1))
    def test_is_the_smallest(self, n, seed, energy):
        s = falling(n, seed)
        r = lowrank.energy_rank(s, energy=energy)
        share = [
            float(s[:i].square().sum() / s.square().sum()) for i in (r, r - 1)
        ]
        assert share[0] >= energy - 1e-9
        assert share[1] < energy
        less = lowrank.energy_rank(s, energy=energy / 2)
        assert less <= r

    def test_zero_and_errors(self):
        assert lowrank.energy_rank(torch.zeros(3), energy=0.9) == 0
        for energy in (0, 1.01):
            with pytest.raises(ValueError, match=f"got {energy}"):
                lowrank.energy_rank(torch.ones(3), energy=energy)
        for s in (torch.tensor([1.0, 2.0]), -torch.ones(2), torch.ones(0)):
            with pytest.raises(ValueError, match="s: singular values"):
                lowrank.energy_rank(s, energy=0.5)
        with pytest.raises(ValueError, match="singular values"):
            lowrank.energy_rank(torch.tensor([1.0, torch.nan]), energy=0.5)


class TestNoiseRank:
    @pytest.mark.parametrize("shape", [(200, 200), (300, 100), (100, 300)])
    @pytest.mark.parametrize("rank", [0, 3])
    def test_noise_has_rank_zero(self, shape, rank):
        signal = normal(shape[0], max(rank, 1)) @ normal(max(rank, 1), shape[1])
        W = signal * (rank > 0) + normal(*shape, seed=1)
        s = torch.linalg.svdvals(W)
        assert lowrank.noise_rank(s, shape) == rank

    @pytest.mark.parametrize("b, omega", [(1, 2.8582), (0.5, 2.1711)])
    def test_the_papers_factor(self, b, omega):
        """2.858 for squares; and by integrating the density."""
        n = 2001
        shape = (n, round(n / b))
        s = torch.ones(n, dtype=torch.float64)
        for factor, rank in ((omega - 2e-3, 0), (omega + 2e-3, 1)):
            s[0] = factor
            assert lowrank.noise_rank(s, shape) == rank
        low, high = (1 - b**0.5) ** 2, (1 + b**0.5) ** 2

        def density(t):
            root = math.sqrt(max(0.0, (high - t) * (t - low)))
            return root / (2 * math.pi * b * t)

        limit = 2 * (b + 1) + 8 * b / (b + 1 + math.sqrt(b * b + 14 * b + 1))
        median = limit / omega**2
        share, _ = scipy.integrate.quad(density, low, median, limit=200)
        assert share == pytest.approx(0.5, abs=1e-4)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"s must be \(3,\)"):
            lowrank.noise_rank(torch.ones(4), (3, 4))


class TestBreakEven:
    @pytest.mark.parametrize("m, n", [(8, 8), (9, 6), (100, 3)])
    def test_is_where_factors_save_nothing(self, m, n):
        r = lowrank.break_even(m, n)
        assert r * (m + n) == pytest.approx(m * n)
        assert r < min(m, n)


class TestRankTable:
    def test_costs_and_losses(self):
        s = {"a": torch.tensor([3.0, 2.0, 2.0, 1.0])}
        table = lowrank.rank_table(s, {"a": (4, 12)})
        assert table == {"a": {1: (16, 9.0), 2: (32, 5.0), None: (48, 0.0)}}

    @pytest.mark.parametrize("shape", [(6, 6), (5, 9), (1, 4)])
    def test_stops_before_break_even(self, shape):
        table = lowrank.rank_table({"a": falling(min(shape))}, {"a": shape})
        ranks = [r for r in table["a"] if r]
        even = lowrank.break_even(*shape)
        assert ranks == [r for r in range(1, min(shape) + 1) if r < even]

    def test_steps(self):
        table = lowrank.rank_table({"a": falling(64)}, {"a": (64, 64)}, step=8)
        assert list(table["a"]) == [8, 16, 24, None]

    def test_seconds_in_place_of_numbers(self):
        """Ranks that were not measured, or are slower, are not listed."""
        seconds = {("a", 2): 3.0, ("a", 4): 9.0, ("a", None): 8.0}

        def cost(name, rank):
            return seconds.get((name, rank), math.inf)

        s = torch.tensor([2.0, 1.0, 1.0, 1.0])
        table = lowrank.rank_table({"a": s}, {"a": (4, 4)}, cost=cost)
        assert table == {"a": {2: (3.0, 2.0), None: (8.0, 0.0)}}

    def test_errors(self):
        s, shapes = {"a": torch.ones(3)}, {"a": (3, 4)}
        with pytest.raises(ValueError, match="step must be at least 1, got 0"):
            lowrank.rank_table(s, shapes, step=0)
        with pytest.raises(ValueError, match=r"differ in \['a', 'b'\]"):
            lowrank.rank_table(s, {"b": (3, 4)})
        with pytest.raises(ValueError, match=r"a: s must be \(4,\)"):
            lowrank.rank_table(s, {"a": (4, 4)})
        with pytest.raises(ValueError, match="a: singular values must fall"):
            lowrank.rank_table({"a": torch.arange(3.0)}, shapes)


class TestChooseRanks:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 999), st.floats(0, 1))
    def test_is_the_best_for_its_cost(self, seed, part):
        """Of equal shapes; without the way back losses are convex."""
        shapes = dict.fromkeys("abc", (5, 8))
        spectra = {n: falling(5, seed + i) for i, n in enumerate(shapes)}
        table = lowrank.rank_table(spectra, shapes)
        for own in table.values():
            del own[None]
        least = 3 * 13
        budget = least + part * (3 * 3 * 13 - least)
        cost, loss = total(table, lowrank.choose_ranks(table, budget=budget))
        assert cost <= budget
        assert loss == pytest.approx(best(table, budget))

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 999), st.floats(0, 1))
    def test_any_shapes(self, seed, part):
        """At most one step of the hull worse than the best."""
        shapes = {"a": (4, 9), "b": (6, 6), "c": (7, 3)}
        spectra = {
            n: falling(min(shape), seed + i)
            for i, (n, shape) in enumerate(shapes.items())
        }
        table = lowrank.rank_table(spectra, shapes)
        least = sum(min(own.values())[0] for own in table.values())
        most = sum(own[None][0] for own in table.values())
        budget = least + part * (most - least)
        cost, loss = total(table, lowrank.choose_ranks(table, budget=budget))
        assert cost <= budget
        least_loss = best(table, budget)
        step = max(max(x[1] for x in own.values()) for own in table.values())
        assert least_loss <= loss + 1e-12
        assert loss <= least_loss + step

    def test_is_the_best_at_every_step_of_its_way(self):
        """Budgets at which no better step had to be passed over."""
        shapes = {"a": (4, 9), "b": (6, 6), "c": (7, 3)}
        spectra = {n: falling(min(s)) for n, s in shapes.items()}
        table = lowrank.rank_table(spectra, shapes)
        places = {n: min(own, key=own.get) for n, own in table.items()}
        seen = 0
        while True:  # the same greedy steps, written out
            cost, loss = total(table, places)
            assert loss == pytest.approx(best(table, cost))
            assert lowrank.choose_ranks(table, budget=cost) == places
            seen += 1
            steps = []
            for n, own in table.items():
                paid, lost = own[places[n]]
                for r, (x, y) in own.items():
                    if x > paid:
                        steps.append(((lost - y) / (x - paid), n, r))
            if not steps:
                break
            _, name, rank = max(steps, key=lambda step: step[0])
            places[name] = rank
        assert seen > 4 and set(places.values()) == {None}

    def test_the_rule_of_singular_values(self):
        """Greedy by s² / (out + in) while spectra fall steeply."""
        shapes = {"a": (20, 20), "b": (40, 20)}
        spectra = {
            "a": torch.logspace(0, -8, 20),
            "b": torch.logspace(0.3, -6, 20),
        }
        worth = sorted(
            (-float(s**2) / sum(shapes[n]), n)
            for n, values in spectra.items()
            for s in values[1:5]
        )
        bought = [n for _, n in worth[:4]]
        budget = 100 + sum(sum(shapes[n]) for n in bought)
        table = lowrank.rank_table(spectra, shapes)
        choice = lowrank.choose_ranks(table, budget=budget)
        assert choice == {n: 1 + bought.count(n) for n in shapes}

    def test_a_flat_spectrum_never_stops_on_the_way(self):
        shapes = dict.fromkeys("abcd", (8, 8))
        table = lowrank.rank_table(dict.fromkeys(shapes, torch.ones(8)), shapes)
        choice = lowrank.choose_ranks(table, budget=2 * 64 + 2 * 16)
        assert sorted(choice.values(), key=str) == [1, 1, None, None]

    def test_enough_for_all(self):
        shapes = {"a": (4, 9), "b": (6, 6)}
        spectra = {n: falling(min(s)) for n, s in shapes.items()}
        table = lowrank.rank_table(spectra, shapes)
        choice = lowrank.choose_ranks(table, budget=72)
        assert choice == {"a": None, "b": None}

    def test_a_smaller_step_fills_what_is_left(self):
        table = {"a": {1: (1, 9.0), 2: (2, 8.5), None: (9, 0.0)}}
        assert lowrank.choose_ranks(table, budget=8) == {"a": 2}

    def test_costs_that_do_not_rise(self):
        """Measured seconds: a larger rank may be as fast, or faster."""
        table = {"a": {1: (2.0, 9.0), 2: (2.0, 4.0), 3: (1.5, 5.0)}}
        assert lowrank.choose_ranks(table, budget=1.9) == {"a": 3}
        assert lowrank.choose_ranks(table, budget=2) == {"a": 2}

    @pytest.mark.parametrize("unit", [1e-9, 1e9])
    def test_the_unit_of_cost_does_not_matter(self, unit):
        shapes = {"a": (16, 30), "b": (30, 16)}
        spectra = {n: falling(16, i) for i, n in enumerate(shapes)}

        def choose(unit):
            def cost(name, rank):
                return unit * (480 if rank is None else 46 * rank)

            table = lowrank.rank_table(spectra, shapes, cost=cost)
            return lowrank.choose_ranks(table, budget=unit * 500.5)

        assert choose(unit) == choose(1)

    def test_is_monotone_and_changes_nothing(self):
        shapes = {"a": (16, 30), "b": (30, 16)}
        spectra = {n: falling(16, i) for i, n in enumerate(shapes)}
        table = lowrank.rank_table(spectra, shapes, step=2)
        before = {n: dict(own) for n, own in table.items()}
        losses = [
            total(table, lowrank.choose_ranks(table, budget=b))[1]
            for b in range(192, 961, 96)
        ]
        assert losses == sorted(losses, reverse=True) and losses[-1] == 0
        assert {n: dict(own) for n, own in table.items()} == before

    def test_errors(self):
        table = {"a": {1: (7, 5.0), None: (12, 0.0)}}
        with pytest.raises(ValueError, match=r"budget: 6, .* take 7"):
            lowrank.choose_ranks(table, budget=6)
        for own in ({}, {1: (math.inf, 0.0)}, {1: (1, math.nan)}):
            with pytest.raises(ValueError, match="b needs choices"):
                lowrank.choose_ranks({**table, "b": own}, budget=99)
