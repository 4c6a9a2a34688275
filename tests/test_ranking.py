"""Rank correlation against scipy, definitions and laws."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from minicompress import nas

BOTH = pytest.mark.parametrize("f", [nas.kendall, nas.spearman])
SCIPY = {
    nas.kendall: scipy.stats.kendalltau,
    nas.spearman: scipy.stats.spearmanr,
}
numbers = st.integers(-3, 3)
pairs = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=12)


def columns(rows):
    return [list(column) for column in zip(*rows, strict=True)]


@BOTH
class TestBoth:
    @given(rows=pairs)
    def test_scipy_with_ties(self, f, rows):
        a, b = columns(rows)
        assume(len({*a}) > 1 and len({*b}) > 1)
        assert math.isclose(f(a, b), SCIPY[f](a, b).statistic, abs_tol=1e-12)

    def test_scipy_on_many(self, f):
        rng = np.random.default_rng(0)
        a = rng.normal(size=300)
        b = (a + rng.normal(size=300)).round(1)
        assert math.isclose(f(a, b), SCIPY[f](a, b).statistic)

    @given(rows=pairs)
    def test_laws(self, f, rows):
        a, b = columns(rows)
        assume(len({*a}) > 1 and len({*b}) > 1)
        tau = f(a, b)
        assert tau == f(b, a)
        assert math.isclose(f(a, [-x for x in b]), -tau, abs_tol=1e-12)
        assert -1 <= tau <= 1
        # only the order counts
        assert f([math.exp(x) for x in a], b) == tau
        assert f(a, a) == 1

    def test_the_extremes(self, f):
        assert f([1, 5, 7], [0.1, 0.2, 9]) == 1
        assert f([1, 5, 7], [9, 0.2, 0.1]) == -1

    def test_infinite_scores_have_a_place(self, f):
        """NASWOT gives -inf to a network that maps two inputs to one code."""
        inf = math.inf
        assert f([-inf, 1, 2, -inf], [3, 4, 9, 0]) == f(
            [-7, 1, 2, -7], [3, 4, 9, 0]
        )
        assert f([-inf, 0, inf], [1, 2, 3]) == 1

    def test_a_constant_orders_nothing(self, f):
        assert math.isnan(f([1, 1, 1], [1, 2, 3]))
        assert math.isnan(f([1, 2, 3], [0, 0, 0]))

    def test_close_numbers_are_not_equal(self, f):
        a = torch.tensor([1.0, 1.0 + 1e-12, 1.0 + 2e-12], dtype=torch.float64)
        assert f(a, [0, 1, 2]) == 1

    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.bfloat16, torch.int64]
    )
    def test_tensors_stay_as_they_are(self, f, dtype):
        a = torch.tensor([3, 1, 2], dtype=dtype)
        b = torch.tensor([3.0, 2.0, 1.0], requires_grad=True)
        found = f(a, b)
        assert type(found) is float
        assert found == f([3, 1, 2], [3, 2, 1])
        assert a.tolist() == [3, 1, 2]

    @pytest.mark.parametrize(
        "a, b",
        [([1, 2], [1, 2, 3]), ([1], [1]), ([], []), ([[1, 2]], [[1, 2]])],
    )
    def test_lengths(self, f, a, b):
        with pytest.raises(ValueError, match="equally long"):
            f(a, b)

    def test_nan(self, f):
        with pytest.raises(ValueError, match="b: 1 numbers are nan"):
            f([1, 2], [math.nan, 1])


class TestKendall:
    def test_pairs_by_hand(self):
        """τ-b from its definition, pair by pair."""
        a, b = [1, 2, 2, 5, 4, 4], [3, 1, 2, 2, 6, 6]
        same = opposite = tied_a = tied_b = 0
        for i, j in itertools.combinations(range(6), 2):
            product = (a[i] - a[j]) * (b[i] - b[j])
            same += product > 0
            opposite += product < 0
            tied_a += a[i] == a[j]
            tied_b += b[i] == b[j]
        want = (same - opposite) / math.sqrt((15 - tied_a) * (15 - tied_b))
        assert math.isclose(nas.kendall(a, b), want)

    def test_is_a_probability_without_ties(self):
        g = torch.Generator().manual_seed(0)
        a, b = torch.rand(2, 40, generator=g)
        right = [
            (a[i] < a[j]) == (b[i] < b[j])
            for i, j in itertools.combinations(range(40), 2)
        ]
        want = sum(map(bool, right)) / len(right)
        assert math.isclose((1 + nas.kendall(a, b)) / 2, want)

    def test_independent_orders_average_to_zero(self):
        """Over all orders: mean 0 and variance 2 (2n + 5) / 9n (n - 1)."""
        taus = [
            nas.kendall(range(5), order)
            for order in itertools.permutations(range(5))
        ]
        assert abs(sum(taus)) < 1e-9
        variance = sum(t * t for t in taus) / len(taus)
        assert math.isclose(variance, 2 * 15 / (9 * 5 * 4))


class TestSpearman:
    def test_the_formula_without_ties(self):
        for order in itertools.permutations(range(1, 6)):
            d2 = sum((i - r) ** 2 for i, r in enumerate(order, 1))
            want = 1 - 6 * d2 / (5 * 24)
            found = nas.spearman(range(1, 6), order)
            assert math.isclose(found, want, abs_tol=1e-12)
