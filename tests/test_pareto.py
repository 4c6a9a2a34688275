"""Dominance, fronts, crowding and hypervolume against brute force."""

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import nas

INF = math.inf


def point_lists(losses, least=0, most=12):
    point = st.tuples(*[st.integers(0, 6)] * losses)
    return st.lists(point, min_size=least, max_size=most)


several = st.integers(1, 3).flatmap(point_lists)


def beats(p, q):
    """Dominance from its other definition: p <= q and p != q."""
    return all(a <= b for a, b in zip(p, q, strict=True)) and p != q


def front_of(points, indices):
    return [
        i
        for i in indices
        if not any(beats(points[j], points[i]) for j in indices)
    ]


def unit_cubes(points, reference):
    """Count the cells of the integer grid that a point dominates."""
    grid = [()]
    for r in reference:
        grid = [(*cell, x) for cell in grid for x in range(r)]
    return sum(
        any(all(a <= c for a, c in zip(p, cell, strict=True)) for p in points)
        for cell in grid
    )


class TestDominates:
    @given(st.tuples(*[st.integers(0, 2)] * 6))
    def test_is_a_strict_partial_order(self, numbers):
        p, q, r = numbers[:2], numbers[2:4], numbers[4:]
        assert not nas.dominates(p, p)
        assert not (nas.dominates(p, q) and nas.dominates(q, p))
        if nas.dominates(p, q) and nas.dominates(q, r):
            assert nas.dominates(p, r)
        assert nas.dominates(p, q) == beats(p, q)

    def test_needs_equally_many(self):
        with pytest.raises(ValueError, match="zip"):
            nas.dominates((1, 2), (1, 2, 3))


class TestFronts:
    @given(several)
    def test_are_what_remains_undominated_turn_by_turn(self, points):
        found, rest = [], list(range(len(points)))
        while rest:
            found.append(front_of(points, rest))
            rest = [i for i in rest if i not in found[-1]]
        assert nas.fronts(points) == found

    @given(several)
    def test_front_is_the_first(self, points):
        assert nas.front(points) == front_of(points, range(len(points)))

    def test_keeps_all_of_equal_points(self):
        points = [(2, 2), (1, 3), (1, 3), (2, 2), (3, 3), (3, 3)]
        assert nas.fronts(points) == [[0, 1, 2, 3], [4, 5]]

    def test_many_random_points_at_once(self):
        rng = random.Random(0)
        points = [(rng.random(), rng.random()) for _ in range(300)]
        found = nas.fronts(points)
        assert sorted(i for F in found for i in F) == list(range(300))
        assert found[0] == front_of(points, range(300))
        for better, worse in pairwise(found):
            for i in worse:
                assert any(beats(points[j], points[i]) for j in better)

    def test_of_one_loss_are_its_values_in_order(self):
        assert nas.fronts([(3,), (1,), (2,), (1,)]) == [[1, 3], [2], [0]]

    def test_infinite_losses_come_last(self):
        points = [(INF, INF), (1, 9), (INF, 0)]
        assert nas.fronts(points) == [[1, 2], [0]]

    def test_of_nothing(self):
        assert nas.fronts([]) == nas.front([]) == nas.crowding([]) == []

    @pytest.mark.parametrize(
        ("points", "message"),
        [
            ([(1, 2), (1,)], "equally many"),
            ([1.0, 2.0], "needs losses"),
            ([(1, 2), (math.nan, 3)], r"nan in \[nan  3.\]"),
        ],
    )
    def test_refuses(self, points, message):
        for f in (nas.fronts, nas.front, nas.crowding):
            with pytest.raises(ValueError, match=message):
                f(points)


class TestCrowding:
    def test_by_hand(self):
        # ranges 10 and 100; the two in the middle have neighbors 2 apart
        points = [(10, 0), (0, 100), (2, 80), (6, 30)]
        assert nas.crowding(points) == [
            INF,
            INF,
            pytest.approx(6 / 10 + 70 / 100),
            pytest.approx(8 / 10 + 80 / 100),
        ]

    @given(point_lists(2, 3), st.integers(1, 9), st.integers(-5, 5))
    def test_does_not_depend_on_units(self, points, scale, shift):
        other = [(scale * a + shift, b) for a, b in points]
        assert nas.crowding(other) == pytest.approx(nas.crowding(points))

    def test_ends_are_infinitely_lonely_and_copies_are_not(self):
        distance = nas.crowding([(0, 2), (1, 1), (1, 1), (1, 1), (2, 0)])
        assert distance[0] == distance[4] == INF
        assert distance[2] == 0

    def test_a_loss_that_is_the_same_for_all_does_not_count(self):
        points = [(0, 7, 3), (1, 7, 2), (3, 7, 0)]
        assert nas.crowding(points)[1] == 2.0

    def test_infinite_losses_leave_the_rest_alone(self):
        distance = nas.crowding([(0, 4), (1, 3), (2, 1), (INF, 0)])
        assert distance == [INF, 0.75, 0.75, INF]


class TestHypervolume:
    def test_of_the_staircase(self):
        assert nas.hypervolume([(1, 5), (2, 3), (4, 1)], (6, 6)) == 17

    @settings(max_examples=60)
    @given(
        st.integers(1, 4).flatmap(
            lambda d: st.tuples(
                point_lists(d, 0, 6), st.tuples(*[st.integers(1, 5)] * d)
            )
        )
    )
    def test_counts_the_cells_of_a_grid(self, case):
        points, reference = case
        want = unit_cubes(points, reference)
        assert nas.hypervolume(points, reference) == want

    @given(point_lists(3), st.tuples(*[st.integers(0, 6)] * 3))
    def test_grows_with_every_point_that_is_not_dominated(self, points, new):
        before = nas.hypervolume(points, (7, 7, 7))
        after = nas.hypervolume([*points, new], (7, 7, 7))
        known = any(p == new or beats(p, new) for p in points)
        assert after == before if known else after > before

    @given(point_lists(2, 1))
    def test_only_the_front_counts(self, points):
        front = [points[i] for i in nas.front(points)]
        whole = nas.hypervolume(points, (7, 7))
        assert nas.hypervolume(front, (7, 7)) == whole
        assert nas.hypervolume(points[::-1] * 2, (7, 7)) == whole

    def test_points_beyond_the_reference_add_nothing(self):
        assert nas.hypervolume([(1, 6), (7, 0), (6, 6)], (6, 6)) == 0
        assert nas.hypervolume([], (6, 6)) == 0

    def test_refuses_a_reference_of_another_size(self):
        with pytest.raises(ValueError, match="equally many"):
            nas.hypervolume([(1, 2)], (3, 3, 3))

    def test_weighted_sums_miss_what_the_front_has(self):
        """A point above the line between two others is on the front, but
        no weighted sum of the losses chooses it."""
        points = [(0, 10), (6, 6), (10, 0)]
        assert nas.front(points) == [0, 1, 2]
        chosen = {
            min(points, key=lambda p: w * p[0] + (1 - w) * p[1])
            for w in [i / 1000 for i in range(1001)]
        }
        assert chosen == {(0, 10), (10, 0)}
