"""Inputs made from a teacher: stored moments, entropies, and inversion."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import models, train
from minicompress.distill import datafree as D
from minicompress.distill import invert, jsd, logits, teaching


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g)


def slope(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


def remember(model, x):
    """Let the BatchNorm layers store the moments of exactly this batch."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.momentum = 1.0
            m.reset_running_stats()
    with torch.no_grad():
        model.train()(x)
    return model.eval()


class TestMoments:
    def test_by_numpy(self):
        x = rand(3, 2, 4, 5).double()
        mean, var = torch.tensor([0.5, 1.0]), torch.tensor([1.0, 2.0])
        a = x.numpy().transpose(1, 0, 2, 3).reshape(2, -1)
        want = np.linalg.norm(a.mean(1) - mean.numpy())
        want += np.linalg.norm(a.var(1, ddof=1) - var.numpy())
        assert D.moments_loss(x, mean, var).item() == pytest.approx(want)

    @settings(deadline=None, max_examples=15)
    @given(st.integers(0, 99), st.sampled_from([(9, 4), (3, 4, 5, 5)]))
    def test_zero_for_the_moments_that_are_stored(self, seed, shape):
        x = 5 + 3 * rand(*shape, seed=seed)
        layer = nn.BatchNorm1d(4) if len(shape) == 2 else nn.BatchNorm2d(4)
        remember(layer, x)
        mean, var = layer.running_mean, layer.running_var
        assert D.moments_loss(x, mean, var) < 1e-4
        assert slope(lambda x: D.moments_loss(x, mean, var), x).isfinite().all()
        # each of the two alone is not enough
        close = torch.testing.assert_close
        shifted = D.moments_loss(x + 1, mean, var)
        close(shifted, torch.tensor(2.0), rtol=0, atol=1e-4)  # ||(1,1,1,1)||
        assert D.moments_loss(2 * x - mean.mean(), mean, var) > 1

    def test_no_nan_where_the_distance_is_exactly_zero(self):
        x = torch.tensor([[-1.0], [1.0]])
        zero, two = torch.zeros(1), torch.full((1,), 2.0)
        assert D.moments_loss(x, zero, two) == 0
        assert not slope(lambda x: D.moments_loss(x, zero, two), x).any()

    def test_a_whole_network(self):
        torch.manual_seed(0)
        x = rand(8, 1, 12, 12)
        teacher = remember(models.CNN(channels=(4, 8)), x)
        # the second layer saw what the first made of *this* batch; in
        # evaluation mode that is normalized with n - 1, so nearly the same
        assert D.batchnorm_loss(teacher, x) < 0.01
        assert D.batchnorm_loss(teacher, rand(8, 1, 12, 12, seed=1) + 1) > 0.5
        each = []
        for norm in teacher.norms:
            norm.register_forward_pre_hook(
                lambda m, args: each.append(
                    D.moments_loss(args[0], m.running_mean, m.running_var)
                )
            )
        other = 2 * rand(8, 1, 12, 12, seed=2) + 1
        teacher(other)
        total = D.batchnorm_loss(teacher, other)
        assert torch.equal(total, each[0] + each[1])
        # the mistake: layers that normalize by the batch while matching
        assert torch.equal(D.batchnorm_loss(teacher.train(), other), total)
        each.clear()
        teacher(other)
        assert (sum(each) - total).abs() > 0.1

    def test_the_teacher_is_not_touched(self):
        teacher = models.CNN(channels=(4, 8)).train()
        before = {k: t.clone() for k, t in teacher.state_dict().items()}
        x = rand(8, 1, 12, 12).requires_grad_()
        D.batchnorm_loss(teacher, x).backward()
        assert x.grad.any()
        assert teacher.training and teacher.norms[0].training
        assert all(p.grad is None for p in teacher.parameters())
        assert not teacher.norms[0]._forward_pre_hooks
        for k, t in teacher.state_dict().items():
            assert torch.equal(t, before[k])

    def test_bad_arguments_are_named(self):
        x, one = rand(4, 2), torch.ones(2)
        for call, words in (
            (lambda: D.moments_loss(x[:1], one, one), r"x .*\(1, 2\)"),
            (lambda: D.moments_loss(x, one[:1], one), r"mean .*\(1,\)"),
            (lambda: D.batchnorm_loss(nn.Linear(2, 2), x), "teacher: "),
            (
                lambda: D.batchnorm_loss(
                    nn.BatchNorm1d(2, track_running_stats=False), x
                ),
                "teacher: ",
            ),
            (lambda: D.total_variation(x), r"x .*\(4, 2\)"),
        ):
            with pytest.raises(ValueError, match=words):
                call()


class TestTerms:
    def test_total_variation_by_numpy(self):
        x = rand(2, 3, 4, 5)
        a = x.numpy()
        want = np.abs(np.diff(a, axis=2)).mean()
        want += np.abs(np.diff(a, axis=3)).mean()
        assert D.total_variation(x).item() == pytest.approx(want, rel=1e-5)
        assert D.total_variation(torch.full((1, 1, 3, 3), 7.0)) == 0
        assert D.total_variation(x + 5).item() == pytest.approx(want, rel=1e-5)

    def test_one_hot(self):
        v = rand(6, 4)
        want = -v.log_softmax(1).max(1).values.mean()
        torch.testing.assert_close(D.one_hot_loss(v), want)
        assert D.one_hot_loss(100 * v) < D.one_hot_loss(v)
        flat = D.one_hot_loss(torch.zeros(2, 4)).item()
        assert flat == pytest.approx(math.log(4))
        assert slope(D.one_hot_loss, v).any()

    def test_activation(self):
        f = rand(3, 4, 2)
        want = -np.abs(f.numpy()).sum((1, 2)).mean()
        assert D.activation_loss(f).item() == pytest.approx(want, rel=1e-6)
        assert D.activation_loss(2 * f) < D.activation_loss(f)

    @settings(deadline=None, max_examples=30)
    @given(st.integers(0, 999), st.integers(2, 10), st.floats(0, 50))
    def test_balance_is_at_most_log_classes(self, seed, classes, scale):
        v = scale * rand(6, classes, seed=seed).double()
        mean = v.softmax(1).mean(0).numpy()
        want = (mean * np.log(np.maximum(mean, 1e-300))).sum()
        got = D.balance_loss(v).item()
        assert got == pytest.approx(want, abs=1e-12)
        assert -math.log(classes) - 1e-9 <= got <= 1e-9

    def test_balance_is_best_when_each_class_occurs_as_often(self):
        sure = 1e3 * torch.eye(5, dtype=torch.float64)
        best = D.balance_loss(sure.repeat(3, 1)).item()
        assert best == pytest.approx(-math.log(5))
        assert D.balance_loss(sure[:1]).item() == 0
        # being sure and being balanced are two different wishes
        assert D.one_hot_loss(sure[:1]) == 0
        assert slope(D.balance_loss, rand(4, 3)).any()

    def test_balance_works_against_one_class_for_all(self):
        torch.manual_seed(0)
        layer = nn.Linear(6, 4)

        def made(weight):
            x = (2 * rand(16, 6)).requires_grad_()
            opt = torch.optim.Adam([x], lr=0.1)
            for _ in range(200):
                v = layer(x)
                loss = D.one_hot_loss(v) + weight * D.balance_loss(v)
                opt.zero_grad()
                loss.backward()
                opt.step()
            assert D.one_hot_loss(v) < 0.2  # without: 0.9
            return D.balance_loss(v).item() + math.log(4)

        assert made(5.0) < 0.02
        assert made(0.0) > 0.2


class TestDisagreement:
    @settings(deadline=None, max_examples=15)
    @given(st.integers(0, 2**16), st.floats(0.1, 30))
    def test_value_by_numpy(self, seed, scale):
        z, v = (scale * rand(4, 3, seed=seed + i).double() for i in (0, 1))
        q, p = z.softmax(1).numpy(), v.softmax(1).numpy()
        m = (p + q) / 2
        js = (p * np.log(p / m) + q * np.log(q / m)).sum() / 2 / 4
        got = D.disagreement_loss(z, v).item()
        assert got == pytest.approx(1 - js, abs=1e-12)
        assert 1 - math.log(2) <= got <= 1
        assert D.disagreement_loss(v, z).item() == pytest.approx(got)
        assert D.disagreement_loss(v, v + 5).item() == pytest.approx(1)

    def test_gradient_by_finite_differences_into_both(self):
        z, v = (rand(3, 4, seed=i).double().requires_grad_() for i in (0, 1))
        assert torch.autograd.gradcheck(D.disagreement_loss, (z, v))
        for g in torch.autograd.grad(D.disagreement_loss(z, v), (z, v)):
            assert g.any()
        # jsd alone, a loss for students, would leave the teacher out
        (g,) = torch.autograd.grad(jsd(z, v), v, allow_unused=True)
        assert g is None

    def test_gradient_into_the_inputs_of_two_networks(self):
        torch.manual_seed(0)
        a, b = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()
        x = rand(4, 5).double().requires_grad_()
        f = lambda x: D.disagreement_loss(a(x), b(x))  # noqa: E731
        assert torch.autograd.gradcheck(f, x)
        # the mistake: as if one of them did not see the inputs
        half = lambda x: D.disagreement_loss(a(x), b(x).detach())  # noqa: E731
        assert not torch.allclose(slope(half, x.detach()), slope(f, x.detach()))


@pytest.fixture(scope="module")
def setting():
    """Return inputs of three classes, bars in three places, and a teacher."""
    y = torch.arange(180) % 3
    X = 0.3 * rand(180, 1, 9, 9) + 1
    for k in range(3):
        X[y == k, :, 3 * k : 3 * k + 2] += 1.0
    X[y == 2] = X[y == 2].transpose(2, 3)  # the last ones stand upright
    torch.manual_seed(0)
    teacher = train.fit(
        models.CNN(channels=(8, 16), classes=3),
        train.batches(X, y, size=30, epochs=10),
        lr=0.02,
    )
    assert train.accuracy(teacher, X, y) > 0.95
    return teacher, X, y


class TestInvert:
    def test_inputs_have_the_wanted_classes_and_moments(self, setting):
        teacher, _, _ = setting
        shape = (31, 1, 9, 9)
        x, labels = invert(teacher, shape, 3, steps=50)
        assert x.shape == shape and x.dtype == torch.float32
        assert labels.bincount().tolist() == [11, 10, 10]
        assert train.accuracy(teacher, x, labels) == 1
        assert D.batchnorm_loss(teacher, x) < 0.3 * D.batchnorm_loss(
            teacher, rand(*shape)
        )
        # the term is what does it
        loose, _ = invert(teacher, shape, 3, steps=50, bn=0)
        near = D.batchnorm_loss(teacher, x)
        assert near < 0.3 * D.batchnorm_loss(teacher, loose)
        rough, _ = invert(teacher, shape, 3, steps=50, tv=0)
        smooth, _ = invert(teacher, shape, 3, steps=50, tv=1)
        assert D.total_variation(smooth) < 0.9 * D.total_variation(rough)
        small, _ = invert(teacher, shape, 3, steps=50, bn=0, l2=10)
        assert small.square().mean() < 0.5 * loose.square().mean()

    def test_a_student_learns_from_them(self, setting):
        teacher, X, y = setting
        x, labels = invert(teacher, (96, 1, 9, 9), 3, steps=80)
        torch.manual_seed(1)
        student = train.fit(
            models.MLP(widths=(81, 16, 3)),
            train.batches(x, labels, size=32, epochs=30),
            teaching.taught(teacher, logits.hinton, temperature=2.0),
            lr=0.01,
        )
        assert train.accuracy(student, X, y) > 0.6  # chance: 0.33

    def test_seeded_and_the_teacher_is_left_alone(self, setting):
        teacher, _, _ = setting
        teacher = models.build("CNN", teacher.config).train()
        before = {k: t.clone() for k, t in teacher.state_dict().items()}
        torch.manual_seed(5)
        state = torch.get_rng_state()
        args = teacher, (6, 1, 9, 9), 3
        a, labels = invert(*args, steps=3)
        b, _ = invert(*args, steps=3)
        c, _ = invert(*args, steps=3, seed=1)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        assert not a.requires_grad
        assert labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert teacher.training
        assert all(p.grad is None for p in teacher.parameters())
        for k, t in teacher.state_dict().items():
            assert torch.equal(t, before[k])
        with torch.no_grad():  # gradients are switched on where needed
            assert torch.equal(invert(*args, steps=3)[0], a)

    def test_one_step_by_hand(self, setting):
        teacher, _, _ = setting
        x = rand(6, 1, 9, 9)  # the noise of seed 0
        y = torch.arange(6) % 3

        def loss(x):
            ce = F.cross_entropy(teacher(x), y)
            near = 2 * D.batchnorm_loss(teacher, x)
            smooth = 3 * D.total_variation(x)
            return ce + near + smooth + 4 * x.square().mean()

        got, _ = invert(
            teacher, (6, 1, 9, 9), 3, steps=1, lr=0.1, bn=2, tv=3, l2=4
        )
        # Adam's first step has the length lr whatever the gradient
        step = 0.1 * slope(loss, x).sign()
        torch.testing.assert_close(got, x - step, rtol=0, atol=1e-4)

    @pytest.mark.parametrize("seed", range(3))
    def test_a_student_moves_them_to_where_it_is_wrong(self, setting, seed):
        teacher, X, y = setting
        torch.manual_seed(seed)
        student = train.fit(  # knows the data, but not all of the teacher
            models.CNN(channels=(4, 4), classes=3),
            train.batches(X, y, size=30, epochs=8, seed=seed),
            lr=0.01,
        ).train()
        student.zero_grad()
        before = {k: t.clone() for k, t in student.state_dict().items()}

        def divergence(**options):
            shape, options = (12, 1, 9, 9), {"seed": seed, **options}
            x, labels = invert(teacher, shape, 3, steps=40, **options)
            assert train.accuracy(teacher, x, labels) == 1
            with train.evaluating(student), train.evaluating(teacher):
                return jsd(student(x), teacher(x)).item()

        none = divergence()
        some, much = (
            divergence(student=student, compete=c) for c in (1.0, 3.0)
        )
        assert none < some < much
        assert much > 1.2 * none
        assert student.training
        assert all(p.grad is None for p in student.parameters())
        for k, t in student.state_dict().items():
            assert torch.equal(t, before[k])

    def test_one_step_with_a_student_by_hand(self, setting):
        teacher, _, _ = setting
        torch.manual_seed(3)
        student = models.CNN(channels=(4, 4), classes=3).double().eval()
        x = rand(6, 1, 9, 9)

        def loss(x):
            z, v = student.float()(x), teacher(x)
            q, p = z.softmax(1), v.softmax(1)
            m = (p + q) / 2
            js = (p * (p / m).log() + q * (q / m).log()).sum(1).mean() / 2
            ce = F.cross_entropy(v, torch.arange(6) % 3)
            return ce - 50 * js

        got, _ = invert(
            *(teacher, (6, 1, 9, 9), 3),
            **dict(steps=1, lr=0.1, bn=0, tv=0, l2=0),
            **dict(student=student.double(), compete=50.0),
        )
        grad = slope(loss, x)
        clear = grad.abs() > 1e-6  # a sign of rounding is no sign
        assert clear.float().mean() > 0.9
        step = 0.1 * grad.sign()
        far = ((got - (x - step)).abs() > 1e-3) & clear
        assert not far.any()

    def test_bounds(self, setting):
        teacher, _, _ = setting
        x, _ = invert(teacher, (4, 1, 9, 9), 3, steps=5, bounds=(0, 1))
        assert x.min() == 0 and x.max() == 1
        with pytest.raises(ValueError, match="bounds"):
            invert(teacher, (4, 1, 9, 9), 3, bounds=(1, 0))

    def test_a_teacher_without_statistics(self):
        torch.manual_seed(0)
        teacher = models.MLP(widths=(16, 32, 3))
        with pytest.raises(ValueError, match="bn=0"):
            invert(teacher, (6, 1, 4, 4), 3, steps=5)
        x, labels = invert(teacher, (6, 1, 4, 4), 3, steps=60, bn=0)
        assert train.accuracy(teacher, x, labels) == 1
        teacher.double()
        x, labels = invert(teacher, (6, 16), 3, steps=60, bn=0, tv=0)
        assert x.dtype == torch.float64
        assert train.accuracy(teacher, x, labels) == 1

    def test_bad_arguments_are_named(self, setting):
        teacher, _, _ = setting
        for shape, classes, options, words in (
            ((6, 1, 9, 9), 4, {}, r"classes: 4.*\(6, 3\)"),
            ((6,), 3, {}, "shape"),
            ((0, 1, 9, 9), 3, {}, "shape"),
            ((6, 1, 9, 9), 3, {"steps": 0}, "steps"),
        ):
            with pytest.raises(ValueError, match=words):
                invert(teacher, shape, classes, **options)
