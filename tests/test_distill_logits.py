"""Distillation losses against closed forms, torch's own and their limits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import models, train
from minicompress.distill import logits as L
from minicompress.distill import records, teaching, weighting

SEEDS = st.integers(0, 2**16)
TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0, 4.0, 20.0])


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def case(n=6, classes=5, seed=0):
    """Return student's and teacher's logits and labels."""
    z, v = 3 * rand(n, classes, seed=seed), 3 * rand(n, classes, seed=seed + 1)
    g = torch.Generator().manual_seed(seed + 2)
    return z, v, torch.randint(classes, (n,), generator=g)


def slope(f, z):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(f(z), z)[0]


def close(a, b, **options):
    torch.testing.assert_close(a, b, **options)


def softmax(x, T=1.0):
    e = np.exp(np.asarray(x) / T)
    return e / e.sum(-1, keepdims=True)


# The published ways to get the loss wrong.
def without_teacher(z, v, y, *, temperature, alpha):
    return F.cross_entropy(z, y)


def swapped(z, v, y, *, temperature, alpha):
    T = temperature
    log_p, log_q = (v / T).log_softmax(-1), (z / T).log_softmax(-1)
    soft = T**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    return (1 - alpha) * F.cross_entropy(z, y) + alpha * soft


def without_square(z, v, y, *, temperature, alpha):
    soft = L.kl(z, v, temperature)
    return (1 - alpha) * F.cross_entropy(z, y) + alpha * soft


def mean_over_everything(z, v, y, *, temperature, alpha):
    T = temperature
    soft = T**2 * F.kl_div(
        (z / T).log_softmax(-1), (v / T).softmax(-1), reduction="none"
    )
    soft = soft.mean()  # over samples and classes, as KLDivLoss() does
    return (1 - alpha) * F.cross_entropy(z, y) + alpha * soft


def probabilities_for_logs(z, v, y, *, temperature, alpha):
    T = temperature
    soft = T**2 * F.kl_div(
        (z / T).softmax(-1), (v / T).softmax(-1), reduction="batchmean"
    )
    return (1 - alpha) * F.cross_entropy(z, y) + alpha * soft


def softened_labels(z, v, y, *, temperature, alpha):
    soft = temperature**2 * L.kl(z, v, temperature)
    return (1 - alpha) * F.cross_entropy(z / temperature, y) + alpha * soft


def rectified(z, v, y, *, temperature, alpha):
    return L.hinton(z, v.relu(), y, temperature=temperature, alpha=alpha)


def rectified_student(z, v, y, *, temperature, alpha):
    return L.hinton(z.relu(), v, y, temperature=temperature, alpha=alpha)


MISTAKES = [
    without_teacher,
    swapped,
    without_square,
    mean_over_everything,
    probabilities_for_logs,
    softened_labels,
    rectified,
    rectified_student,
]


def follows_the_formula(loss, T=4.0, alpha=0.7):
    """Say whether value and gradient are those of K1, by numpy."""
    z, v, y = case()
    n, rows = len(z), np.arange(len(z))
    p, q, hard = softmax(v, T), softmax(z, T), softmax(z)
    soft = (p * (np.log(p) - np.log(q))).sum(1)
    each = -(1 - alpha) * np.log(hard[rows, y]) + alpha * T**2 * soft
    onehot = np.eye(z.shape[1])[y]
    grad = ((1 - alpha) * (hard - onehot) + alpha * T * (q - p)) / n
    run = lambda z: loss(z, v, y, temperature=T, alpha=alpha)  # noqa: E731
    return np.allclose(run(z), each.mean(), rtol=1e-12) and np.allclose(
        slope(run, z), grad, rtol=1e-10, atol=1e-14
    )


class TestHinton:
    def test_value_and_gradient_are_the_closed_form(self):
        assert follows_the_formula(L.hinton)
        assert follows_the_formula(L.hinton, T=1.0, alpha=0.5)

    @pytest.mark.parametrize("loss", MISTAKES, ids=lambda f: f.__name__)
    def test_the_check_above_rejects(self, loss):
        assert not follows_the_formula(loss)

    @settings(deadline=None, max_examples=30)
    @given(SEEDS, TEMPERATURES, st.floats(0, 1))
    def test_torch_agrees(self, seed, T, alpha):
        z, v, y = case(seed=seed)
        soft = F.kl_div(
            F.log_softmax(z / T, 1),
            F.softmax(v / T, 1),
            reduction="batchmean",
        )
        close(L.kl(z, v, T), soft)
        want = (1 - alpha) * F.cross_entropy(z, y) + alpha * T**2 * soft
        got = L.hinton(z, v, y, temperature=T, alpha=alpha)
        close(got, want)
        each = torch.full((len(z),), alpha, dtype=z.dtype)
        close(L.hinton(z, v, y, temperature=T, alpha=each), want)

    @settings(deadline=None, max_examples=20)
    @given(SEEDS, TEMPERATURES)
    def test_gradient_of_the_soft_term(self, seed, T):
        z, v, _ = case(seed=seed)
        want = (L.soften(z, T) - L.soften(v, T)) / T / len(z)
        close(slope(lambda z: L.kl(z, v, T), z), want)

    def test_hot_limit_is_logit_matching_of_centered_logits(self):
        z, v, _ = case()
        T, classes = 1e4, z.shape[1]
        center = lambda x: x - x.mean(1, keepdim=True)  # noqa: E731
        a, b = center(z), center(v)
        want = L.matching(a, b) / classes
        got = T**2 * L.kl(z, v, T)
        close(got, want, rtol=1e-3, atol=0)
        assert (got - L.matching(z, v) / classes).abs() > 0.1 * want
        grad = slope(lambda z: T**2 * L.kl(z, v, T), z)
        close(grad, (a - b) / classes / len(z), rtol=5e-3, atol=1e-5)

    def test_the_square_keeps_the_gradient_when_the_temperature_doubles(self):
        z, v, _ = case()
        at = {T: slope(lambda z, T=T: L.kl(z, v, T), z) for T in (500, 1000)}
        ratio = at[1000].norm() / at[500].norm()
        assert abs(ratio - 1 / 4) < 1e-3
        assert abs(4 * ratio - 1) < 4e-3

    def test_cross_entropy_with_soft_targets_has_the_same_gradient(self):
        z, v, _ = case()
        p = L.soften(v, 3.0)
        ce = lambda z: F.cross_entropy(z / 3, p)  # noqa: E731
        close(slope(lambda z: L.kl(z, v, 3.0), z), slope(ce, z))
        entropy = -(p * p.log()).sum(1).mean()
        close(L.kl(z, v, 3.0), ce(z) - entropy)

    @settings(deadline=None, max_examples=20)
    @given(SEEDS, TEMPERATURES)
    def test_nothing_to_learn_from_oneself(self, seed, T):
        z, _, y = case(seed=seed)
        only = dict(temperature=T, alpha=1)
        assert L.hinton(z, z, y, **only) == 0
        assert slope(lambda x: L.hinton(x, z, y, **only), z).abs().max() < 1e-12

    @settings(deadline=None, max_examples=20)
    @given(SEEDS, TEMPERATURES, st.floats(-50, 50))
    def test_a_constant_on_all_logits_changes_nothing(self, seed, T, c):
        z, v, _ = case(seed=seed)
        close(L.kl(z - c, v + c, T), L.kl(z, v, T))

    def test_temperature_only_spreads(self):
        v = case()[1]

        def entropy(T):
            p = L.soften(v, T)
            return -(p * p.log()).sum(1)

        Ts = np.geomspace(0.5, 50, 20)
        order = v.argsort(1)
        for T in Ts:
            assert torch.equal(L.soften(v, T).argsort(1), order)
            p = L.soften(v, T)
            mean = (p * v).sum(1, keepdim=True)
            var = (p * (v - mean) ** 2).sum(1)
            h = 1e-4 * T
            rate = (entropy(T + h) - entropy(T - h)) / (2 * h)
            close(rate, var / T**3, rtol=1e-5, atol=1e-9)
        hs = torch.stack([entropy(T) for T in Ts])
        assert (hs.diff(dim=0) > 0).all()
        close(entropy(1e5), torch.full_like(hs[0], math.log(v.shape[1])))

    def test_a_uniform_teacher_is_label_smoothing(self):
        z, _, y = case()
        for eps in (0.0, 0.1, 0.7, 1.0):
            want = F.cross_entropy(z, y, label_smoothing=eps)
            close(L.label_smoothing(z, y, eps=eps), want)
            flat = torch.full_like(z, 7.0)
            teach = lambda z, e=eps, f=flat: L.hinton(  # noqa: E731
                z, f, y, temperature=1.0, alpha=e
            )
            close(teach(z) + eps * math.log(z.shape[1]), want)
            smooth = lambda z, e=eps: F.cross_entropy(  # noqa: E731
                z, y, label_smoothing=e
            )
            close(slope(teach, z), slope(smooth, z))

    def test_a_certain_teacher_is_the_label(self):
        z, _, y = case()
        v = 1e5 * F.one_hot(y, z.shape[1]).double()
        close(L.kl(z, v, 1.0), F.cross_entropy(z, y))
        for alpha in (0.0, 0.3, 1.0):
            got = L.hinton(z, v, y, temperature=1.0, alpha=alpha)
            close(got, F.cross_entropy(z, y))
        other = L.hinton(z, -v, y, temperature=3.0, alpha=0.0)
        close(other, F.cross_entropy(z, y))  # alpha 0: the teacher is mute

    def test_part_label_part_dark_knowledge(self):
        """Born-again networks: the labels, weighted by the teacher's
        confidence, and what it says about the other classes."""
        z, v, y = case()
        p, onehot = L.soften(v, 1.0), F.one_hot(y, 5).double()
        sure = (p * onehot).sum(1, keepdim=True)
        dark = p * (1 - onehot) / (1 - sure)
        q = L.soften(z, 1.0)
        want = sure * (q - onehot) + (1 - sure) * (q - dark)
        close(slope(lambda z: L.kl(z, v, 1.0), z), want / len(z))

    def test_the_teacher_gets_no_gradient(self):
        z, v, y = case()
        z.requires_grad_(), v.requires_grad_()
        for loss in (L.hinton, L.dkd, L.matching):
            out = loss(z, v, y)
            assert torch.autograd.grad(out, v, allow_unused=True) == (None,)
        out = L.kl(z, v, 2.0)
        assert torch.autograd.grad(out, v, allow_unused=True) == (None,)

    def test_inputs_are_left_alone_and_precision_is_the_students(self):
        z, v, y = case()
        before = z.clone(), v.clone(), y.clone()
        wide = L.hinton(z, v, y), L.dkd(z, v, y)
        for a, b in zip((z, v, y), before, strict=True):
            assert torch.equal(a, b)
        half = v.half()
        assert L.hinton(z, half, y).dtype == torch.float64
        assert L.hinton(z, half, y) == L.hinton(z, half.double(), y)
        close(L.hinton(z, half, y), wide[0], rtol=5e-3, atol=0)

    def test_without_labels(self):
        z, v, y = case()
        assert L.hinton(z, v, None, alpha=1) == L.hinton(z, v, y, alpha=1)
        with pytest.raises(ValueError, match="y is None"):
            L.hinton(z, v, None)

    def test_tokens_are_samples(self):
        z, v, y = case(n=6)
        shaped = z.view(2, 3, 5), v.view(2, 3, 5), y.view(2, 3)
        for loss in (L.hinton, L.dkd, L.matching):
            close(loss(*shaped), loss(z, v, y))
        close(L.label_smoothing(shaped[0], shaped[2]), L.label_smoothing(z, y))

    @settings(deadline=None, max_examples=20)
    @given(SEEDS, st.floats(0, 1), st.integers(1, 5))
    def test_tokens_without_a_label_do_not_count(self, seed, alpha, n):
        z, v, y = case(seed=seed)
        y[n:] = -100  # as next_tokens puts it
        options = dict(temperature=2.0, alpha=alpha)
        got = L.hinton(z, v, y, **options)
        close(got, L.hinton(z[:n], v[:n], y[:n], **options))
        close(L.hinton(z, v, y, alpha=0.0), F.cross_entropy(z, y))
        smooth = F.cross_entropy(z, y, label_smoothing=0.2)
        close(L.label_smoothing(z, y, eps=0.2), smooth)
        for a, b in zip(
            L.mutual([z, v], y), L.mutual([z[:n], v[:n]], y[:n]), strict=True
        ):
            close(a, b)
        grad = slope(lambda z: L.hinton(z, v, y, **options), z)
        assert not grad[n:].any()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_classes_that_are_ruled_out(self, dtype):
        z, v, y = case(classes=4)
        z, v, y = z.to(dtype), v.to(dtype), y % 3
        want = L.kl(z[:, :3], v[:, :3], 2.0), L.dkd(z[:, :3], v[:, :3], y)
        z[:, 3] = v[:, 3] = -math.inf
        got = L.kl(z, v, 2.0), L.dkd(z, v, y)
        for a, b in zip(got, want, strict=True):
            close(a, b)
        grad = slope(lambda z: L.hinton(z, v, y), z)
        assert grad.isfinite().all() and grad[:, :3].all()
        # only the teacher rules it out: the student learns to avoid it
        z[:, 3] = 5.0
        grad = slope(lambda z: L.hinton(z, v, y), z)
        assert grad.isfinite().all() and (grad[:, 3] > 0).all()

    def test_half_precision_and_weights_of_another_one(self):
        z, v, y = case()
        wide = L.hinton(z, v, y)
        for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
            got = L.hinton(z.to(dtype), v, y)
            assert got.dtype == dtype
            close(got.double(), wide, rtol=rtol, atol=0)
            alpha = torch.full((6,), 0.9, dtype=torch.float64)
            assert L.hinton(z.to(dtype), v, y, alpha=alpha).dtype == dtype

    def test_the_temperature_may_be_a_tensor(self):
        z, v, y = case()
        T = torch.tensor(3.0, dtype=torch.float64)
        close(
            L.hinton(z, v, y, temperature=T), L.hinton(z, v, y, temperature=3.0)
        )

    def test_each_sample_can_have_its_own_weight(self):
        z, v, y = case()
        alpha = weighting.entropy_weight(v)
        each = [
            L.hinton(z[i : i + 1], v[i : i + 1], y[i : i + 1], alpha=float(a))
            for i, a in enumerate(alpha)
        ]
        close(L.hinton(z, v, y, alpha=alpha), torch.stack(each).mean())

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda z, v, y: L.hinton(z, v[:2], y), r"v .*\(2, 5\)"),
            (lambda z, v, y: L.hinton(z, v, y[:2]), r"y .*\(2,\)"),
            (lambda z, v, y: L.hinton(z, v, y.int()), "y .*int32"),
            (lambda z, v, y: L.hinton(z, v, y, temperature=0), "temperature"),
            (lambda z, v, y: L.hinton(z, v, y, alpha=1.1), "alpha .* 1.1"),
            (lambda z, v, y: L.hinton(z, v, y, alpha=z), r"alpha .*\(6, 5\)"),
            (lambda z, v, y: L.kl(z[0], v[0], 1.0), r"v .*\(5,\)"),
            (lambda z, v, y: L.hinton(z[:0], v[:0], y[:0]), r"z: .*\(0, 5\)"),
            (lambda z, v, y: L.matching(z[:, :0], v[:, :0]), r"z: .*\(6, 0\)"),
            (lambda z, v, y: L.matching(z, v.T), r"v .*\(5, 6\)"),
            (lambda z, v, y: L.soften(v, math.nan), "temperature"),
            (lambda z, v, y: L.dkd(z, v, None), "y: "),
            (lambda z, v, y: L.label_smoothing(z, y, eps=2), "eps"),
            (lambda z, v, y: L.mutual([z], y), "logits"),
            (lambda z, v, y: weighting.annealed(z, v, t=0), "t must"),
            (
                lambda z, v, y: weighting.uncertainty([z.sum()], y),
                r"log_var .*\(1,\)",
            ),
            (lambda z, v, y: weighting.entropy_weight(v[:, :1]), "v must"),
        ],
    )
    def test_bad_arguments_are_named(self, call, words):
        with pytest.raises(ValueError, match=words):
            call(*case())


class TestRectifiedLogits:
    """The published mistake: a ReLU between the last layer and the softmax."""

    def test_what_the_teacher_knew_of_the_unlikely_classes_is_gone(self):
        v = torch.tensor([[5.0, -1.0, -6.0, -9.0]])
        p, wrong = L.soften(v, 4.0)[0], L.soften(v.relu(), 4.0)[0]
        assert (p.diff() < 0).all()  # a ranking
        assert (wrong[1:] == wrong[1]).all()  # no ranking any more
        assert L.kl(v.relu(), v, 4.0) > 0.1
        assert p[0] > wrong[0] + 0.1  # and less certain than it was

    def test_a_perfect_student_of_it_is_not_the_teacher(self):
        _, v, y = case()
        z = torch.zeros_like(v, requires_grad=True)
        opt = torch.optim.SGD([z], lr=8.0)
        for _ in range(250):
            opt.zero_grad()
            L.hinton(z, v.relu(), y, temperature=2.0, alpha=1).backward()
            opt.step()
        assert L.kl(z, v.relu(), 2.0) < 1e-6
        assert L.kl(z, v, 2.0) > 0.05

    def test_a_student_with_it_can_not_follow_and_stops_learning(self):
        v, z = torch.tensor([[4.0, -4.0, -4.0]]), torch.full((1, 3), -1.0)
        grad = slope(lambda z: L.kl(z.relu(), v, 2.0), z)
        assert not grad.any()
        assert slope(lambda z: L.kl(z, v, 2.0), z).all()

    def test_the_loop_hands_over_the_logits_as_they_are(self):
        """No ReLU on the way: a negative logit of the label still learns."""
        teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        with torch.no_grad():
            student.bias.fill_(-99.0)
        x, y = rand(8, 4).float(), torch.arange(8) % 3
        loss = teaching.taught(teacher, temperature=2.0, alpha=0.5)
        loss(student, (x, y)).backward()
        assert student.bias.grad.all()
        cut = nn.Sequential(student, nn.ReLU())
        student.zero_grad()
        loss(cut, (x, y)).backward()
        assert not student.bias.grad.any()

    def test_a_baseline_with_it_lends_any_teacher_a_gain(self):
        """Compared with a crippled baseline even a teacher who adds nothing
        seems to help; compared with an honest one he does not."""
        y = torch.arange(300) % 6
        X = 2.0 * rand(6, 8, seed=5)[y].float() + rand(300, 8, seed=6).float()
        feeds = [train.batches(X, y, epochs=12, seed=s) for s in range(8)]
        torch.manual_seed(0)
        students = [
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
            for _ in range(8)
        ]
        cut = [nn.Sequential(*student, nn.ReLU()) for student in students]
        teacher = nn.Linear(8, 6).requires_grad_(False)  # knows nothing
        nn.init.zeros_(teacher.weight), nn.init.zeros_(teacher.bias)
        taught = teaching.taught(teacher, temperature=1.0, alpha=0.1)

        def accuracy(students, *loss):
            fitted = train.fit_many(students, feeds, *loss, lr=0.02)
            each = [train.accuracy(model, X, y) for model in fitted]
            return torch.tensor(each)

        honest, crippled = accuracy(students), accuracy(cut)
        distilled = accuracy(students, taught)
        assert (distilled - crippled).mean() > 0.1  # "distillation helps"
        assert (distilled - honest).abs().mean() < 0.02


class TestMatching:
    def test_by_numpy(self):
        z, v, _ = case()
        want = ((z - v).numpy() ** 2).sum(1).mean() / 2
        assert L.matching(z, v).item() == pytest.approx(want, rel=1e-14)
        close(slope(lambda z: L.matching(z, v), z), (z - v) / len(z))

    def test_it_sees_the_mean_logit_that_a_softmax_does_not(self):
        z, v, _ = case()
        c = 3.0
        gap = (z - v).mean()
        extra = z.shape[1] * (c * gap + c**2 / 2)
        close(L.matching(z + c, v), L.matching(z, v) + extra)
        close(L.kl(z + c, v, 2.0), L.kl(z, v, 2.0))


class TestDKD:
    @settings(deadline=None, max_examples=30)
    @given(SEEDS, TEMPERATURES)
    def test_with_beta_one_minus_p_it_is_kd(self, seed, T):
        z, v, y = case(seed=seed)
        for i in range(len(z)):
            one = z[i : i + 1], v[i : i + 1], y[i : i + 1]
            beta = 1 - L.soften(v, T)[i, y[i]].item()
            got = L.dkd(*one, alpha=1, beta=beta, temperature=T)
            want = L.hinton(*one, temperature=T, alpha=1)
            close(got, want, rtol=1e-6, atol=1e-9)

    def test_terms_by_numpy(self):
        z, v, y = (x.numpy() for x in case())
        T = 3.0
        p, q = softmax(v, T), softmax(z, T)
        rows, keep = np.arange(len(y)), np.eye(5)[y] == 0
        b, s = p[rows, y], q[rows, y]
        tckd = b * np.log(b / s) + (1 - b) * np.log((1 - b) / (1 - s))
        ph, qh = (x[keep].reshape(-1, 4) for x in (p, q))
        ph, qh = (x / x.sum(1, keepdims=True) for x in (ph, qh))
        nckd = (ph * np.log(ph / qh)).sum(1)
        want = T**2 * (2 * tckd + 5 * nckd).mean()
        got = L.dkd(*case(), alpha=2, beta=5, temperature=T)
        assert got.item() == pytest.approx(want, rel=1e-12)

    def test_a_sure_teacher_still_teaches_the_rest(self):
        v = torch.tensor([[40.0, 2.0, 0.0]])
        z, y = torch.zeros(1, 3), torch.tensor([0])
        rest = slice(1, 3)
        hinted = slope(lambda z: L.kl(z, v, 1.0), z)[0, rest].diff()
        decoupled = slope(lambda z: L.dkd(z, v, y, temperature=1), z)
        assert hinted.abs() < 1e-6
        assert decoupled[0, rest].diff() > 1
        assert decoupled.isfinite().all()

    def test_two_classes_have_no_rest(self):
        z, v, y = case(classes=2)
        got = L.dkd(z, v, y, alpha=1, beta=99, temperature=2)
        close(got, L.hinton(z, v, y, temperature=2, alpha=1))

    def test_zero_for_the_teacher_itself(self):
        z, _, y = case()
        assert L.dkd(z, z, y) == 0
        assert slope(lambda x: L.dkd(x, z, y), z).abs().max() < 1e-12


class TestMutual:
    def test_by_its_definition(self):
        y = case()[2]
        peers = [rand(6, 5, seed=k) for k in range(3)]
        for k, got in enumerate(L.mutual(peers, y)):
            others = [
                F.kl_div(
                    peers[k].log_softmax(1),
                    peers[j].softmax(1),
                    reduction="batchmean",
                )
                for j in range(3)
                if j != k
            ]
            want = F.cross_entropy(peers[k], y) + sum(others) / 2
            close(got, want)

    def test_twins_teach_each_other_nothing(self):
        z, _, y = case()
        for loss in L.mutual([z, z.clone(), z.clone()], y):
            close(loss, F.cross_entropy(z, y))
        grad = slope(lambda x: L.mutual([x, z], y)[0], z)
        close(grad, slope(lambda x: F.cross_entropy(x, y), z))

    def test_two_are_symmetric_and_peers_are_detached(self):
        z, v, y = case()
        a, b = L.mutual([z, v], y)
        assert [a, b] == L.mutual([v, z], y)[::-1]
        z.requires_grad_(), v.requires_grad_()
        losses = L.mutual([z, v], y)
        own = torch.autograd.grad(losses[0], z, retain_graph=True)[0]
        both = torch.autograd.grad(sum(losses), [z, v])
        close(both[0], own)
        first = L.mutual([z, v], y)[0]
        assert torch.autograd.grad(first, v, allow_unused=True) == (None,)


class TestWeighting:
    def test_annealing_ends_at_logit_matching(self):
        z, v, _ = case()
        for t in range(1, 11):
            part = 1 - (t - 1) / 10
            want = ((z - part * v) ** 2).sum(1).mean()
            close(weighting.annealed(z, v, t=t, tau_max=10), want)
        close(weighting.annealed(z, v, t=1), 2 * L.matching(z, v))
        # the first stage asks for almost nothing, the last for the teacher
        assert weighting.annealed(v / 10, v, t=10) < 1e-12
        assert weighting.annealed(v, v, t=1) == 0

    def test_the_best_variance_is_the_loss(self):
        losses = torch.tensor([0.2, 1.0, 7.0], dtype=torch.float64)
        best = losses.log()
        got = weighting.uncertainty(list(losses), best)
        close(got, (0.5 + 0.5 * losses.log()).sum())
        f = lambda s: weighting.uncertainty(list(losses), s)  # noqa: E731
        assert slope(f, best).abs().max() < 1e-12
        for seed in range(10):
            assert f(best + rand(3, seed=seed)) > got

    def test_constant_variances_are_constant_weights(self):
        """With 1 / (2 sigma^2) = 1 - alpha and alpha: Hinton's loss."""
        z, v, y = case()
        alpha, T = 0.3, 2.0
        log_var = -torch.tensor([2 * (1 - alpha), 2 * alpha]).double().log()
        terms = [F.cross_entropy(z, y), T**2 * L.kl(z, v, T)]
        want = L.hinton(z, v, y, temperature=T, alpha=alpha)
        got = weighting.uncertainty(terms, log_var)
        close(got - log_var.sum() / 2, want)

    @settings(deadline=None, max_examples=30)
    @given(SEEDS, st.integers(2, 12), st.floats(0, 60))
    def test_entropy_weights(self, seed, classes, scale):
        v = scale * rand(4, classes, seed=seed)
        w = weighting.entropy_weight(v)
        assert ((w >= 0) & (w <= 1 + 1e-12)).all()
        p = softmax(v)
        want = -(p * np.log(np.maximum(p, 1e-300))).sum(1) / np.log(classes)
        assert np.allclose(w, want, atol=1e-12)

    def test_variances_are_learned_as_part_of_the_model(self):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        model.log_var = nn.Parameter(torch.zeros(2))
        X = rand(20, 3).float()
        targets = X[:, :1] * 1.0, 5 * torch.randn(20, 1)

        def loss(model, x):
            out = model(x)
            each = [
                (out[:, i : i + 1] - targets[i]).square().mean()
                for i in range(2)
            ]
            return weighting.uncertainty(each, model.log_var)

        fitted = train.fit(model, [X] * 300, loss, lr=0.1)
        assert fitted.log_var[1] > fitted.log_var[0] + 2


def noisy_teacher():
    torch.manual_seed(3)
    body = [nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)]
    return nn.Sequential(*body, nn.Linear(16, 3))


class TestTaught:
    def test_the_teacher_is_in_evaluation_mode_and_put_back(self):
        teacher, student = noisy_teacher().train(), nn.Linear(4, 3)
        teacher[1].eval()  # a mixture of modes
        x, y = rand(8, 4).float(), torch.arange(8) % 3
        stats = {k: t.clone() for k, t in teacher.state_dict().items()}
        got = teaching.taught(teacher, temperature=2.0)(student, (x, y))
        assert [m.training for m in teacher] == [True, False, True, True]
        for k, t in teacher.state_dict().items():
            assert torch.equal(t, stats[k])
        noise = teacher(x)  # the mistake: dropout still on
        wrong = L.hinton(student(x), noise, y, temperature=2.0)
        right = L.hinton(student(x), teacher.eval()(x), y, temperature=2.0)
        assert got == right
        assert (got - wrong).abs() > 1e-3

    def test_the_student_runs_as_it_is(self):
        teacher, student = nn.Linear(4, 3), noisy_teacher().train()
        x, y = rand(8, 4).float(), torch.arange(8) % 3
        loss = teaching.taught(teacher)
        assert loss(student, (x, y)) != loss(student, (x, y))  # dropout
        assert student.training
        loss(student, (x, y)).backward()
        assert all(p.grad is None for p in teacher.parameters())
        assert all(p.grad is not None for p in student.parameters())

    def test_the_teacher_matters(self):
        """Switched off (alpha 0), any two teachers are the same."""
        x, y = rand(8, 4).float(), torch.arange(8) % 3
        student = nn.Linear(4, 3)
        torch.manual_seed(0)
        teachers = nn.Linear(4, 3), nn.Linear(4, 3)
        for alpha, same in ((0.0, True), (0.9, False)):
            a, b = (
                teaching.taught(t, alpha=alpha)(student, (x, y))
                for t in teachers
            )
            assert (a == b) == same

    def test_a_student_becomes_its_teacher_without_labels(self):
        teacher, X = noisy_teacher().eval(), rand(256, 4).float()
        feed = train.batches(X, epochs=60)
        loss = teaching.taught(teacher, temperature=2.0, alpha=1)
        torch.manual_seed(0)
        student = nn.Linear(4, 3)
        fitted = train.fit(student, feed, loss, lr=0.05)
        before, after = loss(student, X), loss(fitted, X)
        assert after < 1e-3 < 0.01 < before
        assert loss(fitted, (X,)) == after

    def test_at_the_teacher_there_is_nothing_left_to_learn(self):
        """Born again at the weights of one's teacher: gradient zero."""
        teacher = noisy_teacher().eval()
        x, y = rand(8, 4).float(), torch.arange(8) % 3
        for alpha, stuck in ((1.0, True), (0.9, False)):
            student = noisy_teacher().eval()
            loss = teaching.taught(teacher, alpha=alpha)
            loss(student, (x, y)).backward()
            grad = max(p.grad.abs().max() for p in student.parameters())
            assert (grad < 1e-6) == stuck

    def test_other_losses(self):
        teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        batch = x, y = rand(8, 4).float(), torch.arange(8) % 3
        z, v = student(x), teacher(x)
        got = teaching.taught(teacher, L.matching)(student, batch)
        assert got == L.matching(z, v)
        got = teaching.taught(teacher, L.dkd, beta=2.0)(student, batch)
        assert got == L.dkd(z, v, y, beta=2.0)
        got = teaching.taught(teacher, weighting.annealed, t=3)(student, x)
        assert got == weighting.annealed(z, v, t=3)

    def test_language_models(self):
        torch.manual_seed(0)
        config = {"vocab": 7, "layers": 1, "heads": 2, "context": 6}
        teacher = models.LM(width=16, **config)
        student = models.LM(width=8, **config)
        ids = torch.randint(7, (200,))
        feed = train.passages(ids, length=6, size=8, steps=30)
        loss = teaching.taught(teacher, temperature=1.0, alpha=1)
        fitted = train.fit(student, feed, loss, lr=0.02)
        x, y = next(iter(feed))
        z, v = (m(x).flatten(0, 1) for m in (student, teacher))
        close(loss(student, (x, y)), L.kl(z, v, 1.0))
        assert loss(fitted, (x, y)) < 0.5 * loss(student, (x, y))

    def test_cached_is_the_same(self):
        teacher, student = noisy_teacher(), nn.Linear(4, 3)
        x, y = rand(8, 4).float(), torch.arange(8) % 3
        v = records.teacher_logits(teacher, x)
        want = teaching.taught(teacher, temperature=3.0)(student, (x, y))
        got = teaching.cached(temperature=3.0)(student, (x, y, v))
        close(got, want)
        free = teaching.cached(L.matching)(student, (x, v))
        assert free == L.matching(student(x), v)
        with pytest.raises(ValueError, match="batch"):
            teaching.cached()(student, (x, y, v, v))
        with pytest.raises(ValueError, match="batch"):
            teaching.taught(teacher)(student, (x, y, v))

    def test_many_students_at_once(self):
        teacher = noisy_teacher()
        X, y = rand(40, 4).float(), torch.arange(40) % 3
        v = records.teacher_logits(teacher, X)
        torch.manual_seed(1)
        students = [nn.Linear(4, 3) for _ in range(3)]
        cases = (
            (teaching.taught(teacher), (X, y)),
            (teaching.cached(), (X, y, v)),
            (teaching.cached(L.dkd), (X, y, v)),
        )
        for loss, data in cases:
            feeds = [train.batches(*data, size=20, seed=s) for s in range(3)]
            together = train.fit_many(students, feeds, loss)
            for student, feed, got in zip(
                students, feeds, together, strict=True
            ):
                alone = train.fit(student, feed, loss)
                close(got.weight, alone.weight)


class TestLineages:
    def test_each_learns_from_the_one_before(self):
        seen = []

        def teach(teacher, student):
            seen.append((teacher, student))
            return student + "'"

        assert teaching.chain("T", ["a", "b"], teach) == ["a'", "b'"]
        assert seen == [("T", "a"), ("a'", "b")]
        seen.clear()
        assert teaching.generations(str, teach, 3) == ["0'", "1'", "2'"]
        assert seen == [(None, "0"), ("0'", "1"), ("1'", "2")]

    @settings(deadline=None, max_examples=20)
    @given(TEMPERATURES, st.integers(1, 4))
    def test_ensemble_averages_the_soft_targets(self, T, n):
        torch.manual_seed(n)
        models = [nn.Linear(4, 3).double() for _ in range(n)]
        x = 9 * rand(5, 4)
        got = L.soften(teaching.ensemble(models, temperature=T)(x), T)
        want = torch.stack([L.soften(m(x), T) for m in models]).mean(0)
        close(got, want)

    def test_ensemble_reaches_the_mode_of_its_members(self):
        both = teaching.ensemble([noisy_teacher().train(), noisy_teacher()])
        x = rand(8, 4).float()
        with train.evaluating(both):
            assert torch.equal(both(x), both(x))
        assert both.models[0][2].training
        with pytest.raises(ValueError, match="models"):
            teaching.ensemble([])
        with pytest.raises(ValueError, match="temperature"):
            teaching.ensemble([both], temperature=0)


class Interrupted(Exception):
    pass


class Counting(nn.Module):
    """Counts the rows it sees, and stops at the n-th."""

    def __init__(self, stop=math.inf):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.drop = nn.Linear(4, 3), nn.Dropout(0.5)
        self.rows, self.stop = 0, stop

    def forward(self, x):
        if self.rows + len(x) > self.stop:
            raise Interrupted
        self.rows += len(x)
        return self.drop(self.body(x))


class TestTeacherLogits:
    X = rand(10, 4).float()

    def want(self):
        return Counting().eval()(self.X).detach()

    def test_evaluation_mode_and_no_gradient(self):
        teacher = Counting().train()
        got = records.teacher_logits(teacher, self.X, size=3)
        close(got, self.want())
        assert teacher.drop.training
        assert not got.requires_grad

    def test_second_time_it_is_read(self, tmp_path):
        path = tmp_path / "v.pt"
        first = records.teacher_logits(Counting(), self.X, path=path)
        other = Counting()
        again = records.teacher_logits(other, self.X, path=path)
        assert other.rows == 0
        assert torch.equal(first, again)
        assert [p.name for p in tmp_path.iterdir()] == ["v.pt"]

    def test_stopped_and_taken_up_again(self, tmp_path):
        path = tmp_path / "v.pt"
        with pytest.raises(Interrupted):
            records.teacher_logits(Counting(7), self.X, size=3, path=path)
        other = Counting()
        got = records.teacher_logits(other, self.X, size=3, path=path)
        assert other.rows == 4  # six were in the file
        close(got, self.want())
        assert len(torch.load(path)["logits"]) == 10

    def test_saved_now_and_then(self, tmp_path, monkeypatch):
        monkeypatch.setattr(records, "EVERY", -1)
        path, sizes = tmp_path / "v.pt", []

        class Watching(Counting):
            def forward(self, x):
                done = path.exists() and len(torch.load(path)["logits"])
                sizes.append(int(done))
                return super().forward(x)

        records.teacher_logits(Watching(), self.X, size=3, path=path)
        assert sizes == [0, 3, 6, 9]

    def test_half_precision(self, tmp_path):
        path = tmp_path / "v.pt"
        for _ in range(2):
            got = records.teacher_logits(
                Counting(), self.X, path=path, dtype=torch.float16
            )
            assert torch.equal(got, self.want().half())

    def test_a_foreign_file(self, tmp_path):
        path = tmp_path / "v.pt"
        records.teacher_logits(Counting(), self.X, path=path)

        class Other(Counting):
            pass

        changed = Counting()
        with torch.no_grad():
            changed.body.bias[0] += 1e-6
        for teacher, X, dtype, word in (
            (changed, self.X, torch.float32, "another weights"),
            (Other(), self.X, torch.float32, "another teacher"),
            (Counting(), self.X + 1, torch.float32, "another inputs"),
            (Counting(), self.X[:5], torch.float32, "another inputs"),
            (Counting(), self.X, torch.float16, "another dtype"),
        ):
            with pytest.raises(ValueError, match=f"v.pt: .*{word}"):
                records.teacher_logits(teacher, X, path=path, dtype=dtype)
        torch.save({"step": 3}, path)
        with pytest.raises(ValueError, match=r"v\.pt"):
            records.teacher_logits(Counting(), self.X, path=path)

    def test_a_damaged_file(self, tmp_path):
        path = tmp_path / "v.pt"
        records.teacher_logits(Counting(), self.X, path=path)
        whole = path.read_bytes()
        for n in (0, 10, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:n])
            with pytest.raises(ValueError, match=r"v\.pt"):
                records.teacher_logits(Counting(), self.X, path=path)
        at = whole.index(self.want().numpy().tobytes()[:16])
        path.write_bytes(whole[:at] + b"\0" + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"v\.pt"):
            records.teacher_logits(Counting(), self.X, path=path)

    def test_bad_arguments(self, tmp_path):
        with pytest.raises(ValueError, match="no folder"):
            path = tmp_path / "none" / "v.pt"
            records.teacher_logits(Counting(), self.X, path=path)
        with pytest.raises(ValueError, match="X "):
            records.teacher_logits(Counting(), self.X[:0])
        with pytest.raises(ValueError, match="size"):
            records.teacher_logits(Counting(), self.X, size=0)
        with pytest.raises(ValueError, match="teacher"):
            records.teacher_logits(nn.Flatten(0), self.X)
