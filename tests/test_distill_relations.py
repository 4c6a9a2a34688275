"""Relational losses: loops over pairs and triples, and what must not matter."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import distill

LOSSES = [distill.rkd_distance, distill.rkd_angle]


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def moved(x, seed, scale):
    """Rotate, scale and shift the samples."""
    d = x.shape[1]
    Q = torch.linalg.qr(rand(d, d, seed=seed)).Q
    return scale * x @ Q + rand(d, seed=seed + 1)


def huber(a):
    a = abs(a)
    return 0.5 * a * a if a < 1 else a - 0.5


def test_distance_by_hand():
    s, t = rand(5, 3), 3 * rand(5, 7, seed=1)
    pairs = [*itertools.permutations(range(5), 2)]

    def psi(x):
        d = {(i, j): (x[i] - x[j]).norm() for i, j in pairs}
        mean = sum(d.values()) / len(pairs)
        return {pair: d[pair] / mean for pair in pairs}

    a, b = psi(s), psi(t)
    want = sum(huber(a[p] - b[p]) for p in pairs) / len(pairs)
    torch.testing.assert_close(distill.rkd_distance(s, t), want)


def test_angle_by_hand():
    s, t = rand(5, 3), rand(5, 7, seed=1)
    triples = [*itertools.permutations(range(5), 3)]

    def psi(x, i, j, k):
        a, b = x[i] - x[j], x[k] - x[j]
        return a @ b / (a.norm() * b.norm())

    for i, j, k in triples:  # the vertex is in the middle
        torch.testing.assert_close(distill.angles(s)[i, j, k], psi(s, i, j, k))
    want = sum(huber(psi(s, *c) - psi(t, *c)) for c in triples) / len(triples)
    torch.testing.assert_close(distill.rkd_angle(s, t), want)


def test_large_differences_count_linearly():
    """Three samples, two of them far from the third: psi beyond 1."""
    s = torch.tensor([[0.0], [0.0], [0.0], [9.0]]).double()
    t = torch.tensor([[0.0], [9.0], [9.0], [9.0]]).double()
    a, b = distill.distances(s), distill.distances(t)
    assert (a - b).abs().max() > 1
    total = sum(huber((a - b)[i, j].item()) for i in range(4) for j in range(4))
    assert distill.rkd_distance(s, t).item() == pytest.approx(total / 12)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**16), st.floats(0.01, 100))
def test_rotation_shift_and_scale_do_not_matter(seed, scale):
    x = rand(6, 4, seed=seed)
    y = moved(x, seed, scale)
    torch.testing.assert_close(distill.distances(x), distill.distances(y))
    torch.testing.assert_close(distill.angles(x), distill.angles(y))
    for loss in LOSSES:
        assert loss(y, x) < 1e-20
        assert loss(x, rand(6, 3, seed=seed + 9)) > 1e-4


def test_a_stretch_along_one_axis_does_matter():
    x = rand(6, 2)
    y = x * torch.tensor([1.0, 3.0])
    assert distill.rkd_distance(y, x) > 1e-3
    assert distill.rkd_angle(y, x) > 1e-3


def test_the_mean_distance_leaves_the_diagonal_out():
    psi = distill.distances(rand(7, 3))
    torch.testing.assert_close(psi.sum() / 42, torch.tensor(1.0).double())
    assert (psi.diagonal() == 0).all()


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**16))
def test_two_samples_are_always_at_distance_one(seed):
    psi = distill.distances(rand(2, 3, seed=seed))
    assert psi[0, 1].item() == pytest.approx(1)
    loss = distill.rkd_distance(rand(2, 3, seed=seed), rand(2, 5, seed=1))
    assert loss < 1e-28


@pytest.mark.parametrize("loss", LOSSES)
class TestGradients:
    def test_is_that_of_finite_differences(self, loss):
        s, t = rand(5, 3).requires_grad_(), rand(5, 4, seed=1)
        assert torch.autograd.gradcheck(lambda s: loss(s, t), s)

    def test_only_the_student_receives_one(self, loss):
        s, t = rand(5, 3).requires_grad_(), rand(5, 4, seed=1).requires_grad_()
        loss(s, t).backward()
        assert s.grad.abs().max() > 0
        assert t.grad is None

    def test_comes_from_the_teacher(self, loss):
        s = rand(5, 3).requires_grad_()
        first, second = (
            torch.autograd.grad(loss(s, rand(5, 4, seed=i)), s)[0]
            for i in (1, 2)
        )
        assert not torch.allclose(first, second)

    def test_is_finite_where_samples_coincide(self, loss):
        s = rand(5, 3)
        s[1] = s[0]
        s.requires_grad_()
        (g,) = torch.autograd.grad(loss(s, rand(5, 4, seed=1)), s)
        assert g.isfinite().all()
        assert 0 < g.abs().max() < 100
        same = torch.ones(5, 3).requires_grad_()  # a student that collapsed
        value = loss(same, rand(5, 4, seed=1).float())
        (g,) = torch.autograd.grad(value, same)
        assert value > 0
        assert (g == 0).all()

    def test_vanishes_at_the_teacher(self, loss):
        s = rand(5, 3).requires_grad_()
        (g,) = torch.autograd.grad(loss(s, s.detach()), s)
        assert (g == 0).all()

    def test_descent_brings_the_relations_closer(self, loss):
        s, t = rand(6, 2).requires_grad_(), rand(6, 8, seed=1)
        before = loss(s, t).item()
        for _ in range(50):
            (g,) = torch.autograd.grad(loss(s, t), s)
            s = (s - g).detach().requires_grad_()
        assert loss(s, t) < 0.8 * before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: distill.rkd_distance(rand(1, 2), rand(1, 2)), "at least 2"),
        (lambda: distill.rkd_angle(rand(2, 2), rand(2, 2)), "at least 3"),
        (lambda: distill.rkd_angle(rand(3, 2, 2), rand(3, 2)), "s must"),
        (lambda: distill.rkd_distance(rand(3, 2), rand(4, 2)), r"t must.*3"),
    ],
)
def test_bad_shapes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
