"""Answers that change and their certainty, against independent counts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import recall_score

from minicompress import measure
from minicompress.measure import (
    calibration_error,
    exemplars,
    negative_flips,
    per_class,
    reliability,
    temperature,
)


def drawn(seed, n=500, classes=6, sharp=1.0):
    """Draw labels from the probabilities that the logits state."""
    dice = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(n, classes, generator=dice)
    y = torch.multinomial(z.softmax(1), 1, generator=dice)[:, 0]
    return sharp * z, y


def nll(z, y):
    return F.cross_entropy(z.double(), y).item()


class TestPerClass:
    def test_is_the_recall_of_scikit_learn(self):
        z, y = drawn(0)
        want = recall_score(y, z.argmax(1), average=None)
        assert per_class(z, y).numpy() == pytest.approx(want, abs=1e-15)

    def test_the_mean_over_samples_is_the_accuracy(self):
        z, y = drawn(1)
        share = torch.bincount(y, minlength=6) / len(y)
        accuracy = (z.argmax(1) == y).double().mean()
        assert (per_class(z, y) * share).sum() == pytest.approx(accuracy)

    def test_absent_classes_are_nan_also_where_they_are_predicted(self):
        got = per_class(torch.eye(4)[[0, 3, 1]], torch.tensor([0, 0, 1]))
        assert got[:2].tolist() == [0.5, 1.0]
        assert got[2:].isnan().all()

    def test_texts_have_one_more_axis(self):
        z, y = drawn(2, n=60)
        got = per_class(z.view(4, 15, 6), y.view(4, 15))
        assert torch.equal(got, per_class(z, y))


class TestFlips:
    def test_closed_form(self):
        before = torch.eye(3)[[0, 1, 2, 0, 1]]
        after = torch.eye(3)[[0, 2, 2, 1, 0]]
        y = torch.tensor([0, 1, 2, 1, 2])
        # kept, lost, kept, won, wrong in another way
        assert negative_flips(before, after, y) == 0.2
        assert negative_flips(after, before, y) == 0.2
        assert measure.agreement(before, after) == 0.4

    @given(st.integers(0, 10_000))
    @settings(max_examples=30, deadline=None)
    def test_laws(self, seed):
        z, y = drawn(seed, n=40)
        other = drawn(seed + 1, n=40)[0]
        lost, won = negative_flips(z, other, y), negative_flips(other, z, y)

        def accuracy(a):
            return (a.argmax(1) == y).double().mean().item()

        # both change the accuracy by their difference, and only disagreement
        # can flip
        assert accuracy(other) - accuracy(z) == pytest.approx(won - lost)
        assert lost + won <= 1 - measure.agreement(z, other) + 1e-12
        assert negative_flips(z, z, y) == 0

    def test_exemplars_by_counting(self):
        dice = torch.Generator().manual_seed(0)
        before = torch.randn(5, 40, 3, generator=dice)
        after = torch.randn(4, 40, 3, generator=dice)

        def modal(z):  # bincount, then the first of the largest
            columns = z.argmax(-1).T.numpy()
            return [np.bincount(c, minlength=3).argmax() for c in columns]

        want = [
            a != b for a, b in zip(modal(before), modal(after), strict=True)
        ]
        got = exemplars(before, after)
        assert got.tolist() == want
        assert 0 < sum(want) < 40
        assert not exemplars(before, before.flip(0)).any()

    def test_exemplars_of_one_model_each_are_disagreement(self):
        a, b = drawn(0)[0], drawn(1)[0]
        got = exemplars(a[None], b[None]).double().mean().item()
        assert got == pytest.approx(1 - measure.agreement(a, b))

    def test_a_vote_hides_a_single_other_model(self):
        a, b = torch.eye(2)[[0, 0]], torch.eye(2)[[0, 1]]
        assert not exemplars(torch.stack([a] * 3), torch.stack([a, a, b])).any()
        assert exemplars(torch.stack([a] * 3), torch.stack([a, b, b])).any()


class TestCalibration:
    @pytest.mark.parametrize("bins", [1, 4, 15, 40])
    def test_curve_is_that_of_scikit_learn(self, bins):
        z, y = drawn(3, sharp=2.0)
        confidence, accuracy, count = reliability(z, y, bins=bins)
        p, guess = z.double().softmax(1).max(1)
        true, mean = calibration_curve(guess == y, p, n_bins=bins)
        full = count > 0
        assert accuracy[full].numpy() == pytest.approx(true)
        assert confidence[full].numpy() == pytest.approx(mean)
        assert accuracy[~full].isnan().all()
        assert confidence[~full].isnan().all()
        assert count.sum() == len(y)

    def test_bins_are_closed_on_the_right(self):
        # confidence exactly 1/2 and exactly 1
        z = torch.tensor([[0.0, 0.0], [900.0, 0.0]])
        count = reliability(z, torch.tensor([0, 0]), bins=2)[2]
        assert count.tolist() == [1, 1]
        count = reliability(z[:1], torch.tensor([0]), bins=4)[2]
        assert count.tolist() == [0, 1, 0, 0]

    def test_error_by_a_loop(self):
        z, y = drawn(4, sharp=3.0)
        p, guess = z.double().softmax(1).max(1)
        want = 0.0
        for m in range(1, 16):
            inside = [
                (c, a == t)
                for c, a, t in zip(
                    p.tolist(), guess.tolist(), y.tolist(), strict=True
                )
                if (m - 1) / 15 < c <= m / 15
            ]
            want += abs(sum(a - c for c, a in inside)) / len(y)
        assert calibration_error(z, y) == pytest.approx(want, abs=1e-12)

    def test_one_bin_compares_means(self):
        z, y = drawn(5, sharp=2.0)
        p, guess = z.double().softmax(1).max(1)
        want = abs(p.mean() - (guess == y).double().mean())
        assert calibration_error(z, y, bins=1) == pytest.approx(want.item())

    def test_ends(self):
        y = torch.tensor([0, 1, 2, 1])
        sure = 1e4 * F.one_hot(y, 3).double()
        assert calibration_error(sure, y) == 0
        assert calibration_error(sure, (y + 1) % 3) == 1
        even, y = torch.zeros(30, 3), torch.arange(30) % 3
        assert calibration_error(even, y) == pytest.approx(0, abs=1e-12)

    def test_honest_labels_have_a_small_error_and_sharper_logits_do_not(self):
        z, y = drawn(6, n=50_000)
        assert calibration_error(z, y) < 0.01  # noise: 1 / sqrt(n / bins)
        assert calibration_error(3 * z, y) > 0.1

    @given(st.integers(0, 10_000), st.integers(1, 30))
    @settings(max_examples=30, deadline=None)
    def test_a_merged_bin_hides_errors(self, seed, bins):
        z, y = drawn(seed, n=60, sharp=2.0)
        fine = calibration_error(z, y, bins=2 * bins)
        coarse = calibration_error(z, y, bins=bins)
        assert 0 <= coarse <= fine + 1e-12 <= 1 + 1e-12


class TestTemperature:
    @pytest.mark.parametrize("sharp", [0.05, 0.5, 1.0, 4.0, 1e3])
    def test_minimizes_the_cross_entropy(self, sharp):
        z, y = drawn(7, sharp=sharp)
        best = minimize_scalar(
            lambda b: nll(math.exp(b) / sharp * z.double(), y),
            bounds=(-3, 3),
            method="bounded",
            options={"xatol": 1e-9},
        )
        got = temperature(z, y)
        assert got == pytest.approx(sharp / math.exp(best.x), rel=1e-6)

    def test_undoes_a_scale(self):
        z, y = drawn(8, n=50_000)
        assert temperature(z, y) == pytest.approx(1, abs=0.02)
        assert temperature(7 * z, y) == pytest.approx(7 * temperature(z, y))

    def test_two_classes_have_a_closed_form(self):
        # right in a share a of the cases, always by a margin m: m / T = logit
        for a in (0.55, 0.75, 0.99):
            z = torch.tensor([[3.0, 0.0]]).repeat(100, 1)
            y = (torch.arange(100) >= round(100 * a)).long()
            want = 3 / math.log(a / (1 - a))
            assert temperature(z, y) == pytest.approx(want, rel=1e-9)

    def test_no_answer_changes_and_the_error_shrinks(self):
        z, y = drawn(9, n=5000, sharp=3.0)
        cool = z / temperature(z, y)
        assert measure.agreement(z, cool) == 1
        assert nll(cool, y) < nll(z, y)
        assert calibration_error(cool, y) < calibration_error(z, y) / 3

    @given(st.integers(0, 10_000), st.floats(0.01, 100))
    @settings(max_examples=30, deadline=None)
    def test_slope_is_zero_at_the_minimum(self, seed, sharp):
        z, y = drawn(seed, n=50, sharp=sharp)
        z = z.double()
        b = torch.tensor(1 / temperature(z, y), dtype=torch.double)
        b.requires_grad_()
        F.cross_entropy(b * z, y).backward()
        assert abs(b.grad.item()) < 1e-7 * z.abs().max()

    def test_shifted_logits_are_the_same_probabilities(self):
        z, y = drawn(10)
        shift = torch.randn(len(z), 1)
        same = temperature(z.double() + shift, y)
        assert same == pytest.approx(temperature(z, y), rel=1e-9)

    def test_steep_and_flat_starts_are_reached(self):
        z, y = drawn(11)
        want = temperature(z, y)
        for scale in (1e-6, 1e6):
            got = temperature(scale * z.double(), y)
            assert got == pytest.approx(scale * want, rel=1e-7)

    def test_no_minimum(self):
        y = torch.arange(4)
        with pytest.raises(ValueError, match="all 4 samples are right"):
            temperature(torch.eye(4), y)
        assert temperature(-torch.eye(4), y) == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_stay_and_any_float_will_do(dtype):
    z, y = drawn(12)
    z = z.to(dtype).requires_grad_()
    kept, labels = z.detach().clone(), y.clone()
    exact = z.detach().double()
    for f in (per_class, calibration_error, temperature):
        assert torch.as_tensor(f(z, y)).equal(torch.as_tensor(f(exact, y)))
    assert negative_flips(z, exact, y.int()) == 0
    assert torch.equal(z, kept)
    assert torch.equal(y, labels)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (
            lambda: per_class(torch.eye(3), torch.arange(2)),
            r"\(3, 3\) and \(2,",
        ),
        (lambda: per_class(torch.eye(3), torch.arange(3) + 1), "1 ... 3"),
        (lambda: per_class(torch.eye(3), -torch.arange(3)), "below 3 classes"),
        (lambda: per_class(torch.eye(3), torch.rand(3)), "float32"),
        (lambda: per_class(torch.empty(0, 3), torch.arange(0)), "not empty"),
        (lambda: per_class(torch.tensor(1.0), torch.arange(1)), "classes"),
        (lambda: temperature(torch.eye(3) / 0, torch.arange(3)), "finite"),
        (
            lambda: negative_flips(
                torch.eye(3), torch.eye(3)[:2], torch.arange(3)
            ),
            "after must be",
        ),
        (
            lambda: reliability(torch.eye(3), torch.arange(3), bins=0),
            "bins=0",
        ),
        (lambda: exemplars(torch.eye(3), torch.eye(3)), "models, samples"),
        (
            lambda: exemplars(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)),
            "same samples",
        ),
    ],
)
def test_errors_name_the_argument(call, word):
    with pytest.raises(ValueError, match=word):
        call()
