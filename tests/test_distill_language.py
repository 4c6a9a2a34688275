"""Language distillation on a vocabulary so small that all texts are listed."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import distill, models, train

VOCAB, LENGTH = 3, 4
LOSSES = [distill.forward_kl, distill.reverse_kl, distill.jsd]


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


@functools.cache
def lm(seed):
    """Return a model that is far from uniform and looks at all it sees."""
    torch.manual_seed(seed)
    model = models.LM(
        vocab=VOCAB, width=8, layers=1, heads=2, ff=8, context=6, tied=False
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.8 if p.ndim == 2 else 0.3))
    return model.requires_grad_(False)


@functools.cache
def texts(prompt=(0,)):
    """List all texts of LENGTH tokens after the prompt."""
    ends = itertools.product(range(VOCAB), repeat=LENGTH)
    return torch.tensor([[*prompt, *end] for end in ends])


def likelihoods(model):
    return distill.log_likelihood(model, texts())


def expected(values, model):
    """Average over all texts as often as the model would write them."""
    return (likelihoods(model).exp() * values).sum()


def each(loss, student, teacher, ids):
    """Return the loss of each text, summed over its tokens."""
    z, v = student(ids[:, :-1]), teacher(ids[:, :-1])
    rows = zip(z, v, strict=True)
    return torch.stack([loss(a, b) * LENGTH for a, b in rows])


class TestDivergences:
    def test_by_hand(self):
        z, v = rand(2, 3, 5), rand(2, 3, 5, seed=1)
        q, p = (2 * z).softmax(-1), (2 * v).softmax(-1)
        m = 0.3 * p + 0.7 * q
        kl = lambda a, b: (a * (a / b).log()).sum() / 6  # noqa: E731
        for loss, want in (
            (distill.forward_kl, kl(p, q)),
            (distill.reverse_kl, kl(q, p)),
            (
                functools.partial(distill.jsd, beta=0.3),
                0.3 * kl(p, m) + 0.7 * kl(q, m),
            ),
        ):
            torch.testing.assert_close(loss(z, v, temperature=0.5), want)

    def test_forward_is_torch_kl_div(self):
        z, v = rand(6, 5), rand(6, 5, seed=1)
        want = F.kl_div(z.log_softmax(-1), v.softmax(-1), reduction="batchmean")
        torch.testing.assert_close(distill.forward_kl(z, v), want)

    @settings(deadline=None, max_examples=25)
    @given(st.integers(0, 2**16), st.floats(0.05, 0.95))
    def test_laws(self, seed, beta):
        z, v = 5 * rand(4, 3, seed=seed), 5 * rand(4, 3, seed=seed + 1)
        forward, reverse = distill.forward_kl(z, v), distill.reverse_kl(z, v)
        # swapped arguments: the other divergence
        torch.testing.assert_close(distill.forward_kl(v, z), reverse)
        assert (forward - reverse).abs() > 1e-9
        js = distill.jsd(z, v, beta=beta)
        torch.testing.assert_close(distill.jsd(v, z, beta=1 - beta), js)
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert 0 <= js <= entropy + 1e-12
        half = distill.jsd(z, v)
        torch.testing.assert_close(distill.jsd(v, z), half)
        assert half <= math.log(2) + 1e-12
        for loss in LOSSES:
            torch.testing.assert_close(loss(z + 3, v - 2), loss(z, v))
            assert loss(z, z).abs() < 1e-15

    def test_jsd_tends_to_both_divergences(self):
        z, v = rand(4, 3), rand(4, 3, seed=1)
        for beta, want in (
            (1e-6, distill.forward_kl(z, v)),
            (1 - 1e-6, distill.reverse_kl(z, v)),
        ):
            scaled = distill.jsd(z, v, beta=beta) / min(beta, 1 - beta)
            torch.testing.assert_close(scaled, want, rtol=1e-4, atol=0)

    @pytest.mark.parametrize("loss", LOSSES)
    def test_padding_does_not_count(self, loss):
        mask = torch.tensor([[True] * 3, [True, False, False]])
        z, v = rand(2, 3, 5), rand(2, 3, 5, seed=1)
        rows = [z[mask], v[mask]]
        got = loss(z, v, mask=mask)
        torch.testing.assert_close(got, loss(*rows))
        # the mistake: zeros at the padding, and its length in the mean
        wrong = loss(z * mask[..., None], v * mask[..., None])
        torch.testing.assert_close(wrong * 6 / 4, got)
        z[~mask] = math.nan
        z.requires_grad_()
        loss(z, v, mask=mask).backward()
        assert torch.equal(loss(z, v, mask=mask), got)
        assert (z.grad[~mask] == 0).all()
        assert z.grad[mask].abs().min() > 0

    @pytest.mark.parametrize("loss", LOSSES)
    def test_only_the_student_receives_a_gradient(self, loss):
        z, v = rand(4, 3).requires_grad_(), rand(4, 3, seed=1).requires_grad_()
        loss(z, v).backward()
        assert v.grad is None
        assert torch.autograd.gradcheck(lambda z: loss(z, v.detach()), z)
        before = z.grad
        (other,) = torch.autograd.grad(loss(z, v.detach().flip(1)), z)
        assert not torch.allclose(before, other)

    def test_a_token_that_the_teacher_forbids(self):
        z, v = rand(2, 3).requires_grad_(), rand(2, 3, seed=1)
        v[:, 2] = -math.inf
        q, p = z.softmax(-1), v.softmax(-1)
        m = (p + q) / 2
        kl = lambda a, b: (a * (a / b).log()).sum() / 2  # noqa: E731
        forward = kl(p[:, :2], q[:, :2])
        both = kl(p[:, :2], m[:, :2]) / 2 + kl(q, m) / 2
        for loss, want in ((distill.forward_kl, forward), (distill.jsd, both)):
            got = loss(z, v)
            torch.testing.assert_close(got, want)
            (g,) = torch.autograd.grad(got, z)
            assert g.isfinite().all()
        assert distill.reverse_kl(z, v) > 1e300

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    @pytest.mark.parametrize("loss", LOSSES)
    def test_a_token_that_both_forbid(self, loss, dtype):
        z, v = rand(2, 3).to(dtype), rand(2, 3, seed=1).to(dtype)
        want = loss(z[:, :2], v[:, :2])
        z[:, 2] = v[:, 2] = -math.inf
        z.requires_grad_()
        got = loss(z, v)
        torch.testing.assert_close(got, want)
        (g,) = torch.autograd.grad(got, z)
        assert g.isfinite().all() and g[:, :2].all()

    @pytest.mark.parametrize("loss", LOSSES)
    def test_precision_is_the_students(self, loss):
        z, v = rand(4, 3), rand(4, 3, seed=1)
        for dtype in (torch.float32, torch.bfloat16):
            assert loss(z.to(dtype), v).dtype == dtype
            assert loss(z, v.to(dtype)).dtype == torch.float64
        torch.testing.assert_close(
            loss(z.float(), v), loss(z, v).float(), rtol=1e-5, atol=0
        )

    def test_one_gaussian_for_two(self):
        """Forward covers both modes, reverse picks one."""
        x = torch.linspace(-14, 14, 1401, dtype=torch.float64)
        both = torch.stack([-((x - 3) ** 2) / 2, -((x + 3) ** 2) / 2])
        v = both.logsumexp(0)[None]

        def fit(loss, start):
            mu = torch.tensor(start).double().requires_grad_()
            log_sigma = torch.zeros(()).double().requires_grad_()
            opt = torch.optim.LBFGS(
                [mu, log_sigma], max_iter=60, line_search_fn="strong_wolfe"
            )

            def closure():
                opt.zero_grad()
                z = -(((x - mu) / log_sigma.exp()) ** 2) / 2
                value = loss(z[None], v)
                value.backward()
                return value

            opt.step(closure)
            return mu.item(), log_sigma.exp().item(), closure().item()

        mu, sigma, _ = fit(distill.forward_kl, 1.0)
        assert mu == pytest.approx(0, abs=1e-4)
        assert sigma == pytest.approx(10**0.5, abs=1e-3)
        for sign in (-1, 1):
            mu, sigma, value = fit(distill.reverse_kl, sign * 2.0)
            assert mu == pytest.approx(sign * 2.98, abs=0.01)
            assert sigma == pytest.approx(1.02, abs=0.01)
            assert value == pytest.approx(0.689, abs=0.001)
            assert value < math.log(2)


class TestSequences:
    def test_likelihoods_are_a_distribution(self):
        total = likelihoods(lm(0)).exp().sum()
        assert total.item() == pytest.approx(1)
        one = texts()[5:6]
        log_p = lm(0)(one[:, :-1]).log_softmax(-1)[0]
        want = sum(log_p[t, one[0, t + 1]] for t in range(LENGTH))
        got = distill.log_likelihood(lm(0), one)[0]
        torch.testing.assert_close(got, want)
        rest = distill.log_likelihood(lm(0), one, prompt=3)[0]
        torch.testing.assert_close(
            rest, log_p[2, one[0, 3]] + log_p[3, one[0, 4]]
        )

    def test_the_loss_of_sequences_is_that_of_their_tokens(self):
        """The chain rule, exact: sum over texts = sum over positions."""
        p, q = lm(0), lm(1)
        sequence = expected(-likelihoods(q), p)
        tokens = 0.0
        for t in range(LENGTH):
            # all beginnings of t tokens, as often as the teacher writes them
            heads = torch.unique(texts()[:, : t + 1], dim=0)
            weight = torch.ones(len(heads)).double()
            if t:
                weight = distill.log_likelihood(p, heads).exp()
            P = p(heads)[:, -1].softmax(-1)
            log_q = q(heads)[:, -1].log_softmax(-1)
            tokens += (weight * -(P * log_q).sum(-1)).sum()
        torch.testing.assert_close(tokens, sequence)

    def test_word_level_on_the_teachers_texts_is_unbiased(self):
        """Its mean over all texts is KL of the whole texts."""
        p, q = lm(0), lm(1)
        whole = expected(likelihoods(p) - likelihoods(q), p)
        words = each(distill.forward_kl, q, p, texts())
        torch.testing.assert_close(expected(words, p), whole)
        # on the student's own texts it is something else
        assert (expected(words, q) - whole).abs() > 0.05
        # and from samples
        prompts = torch.zeros(3000, 1, dtype=torch.long)
        ids = distill.continuations(p, prompts, length=LENGTH)
        rows, count = ids.unique(dim=0, return_counts=True)
        values = each(distill.forward_kl, q, p, rows)
        values = values.repeat_interleave(count)
        error = values.std() / 3000**0.5
        assert (values.mean() - whole).abs() < 4 * error
        assert error < 0.05 * whole

    def test_reverse_on_the_students_texts_is_unbiased(self):
        p, q = lm(0), lm(1)
        whole = expected(likelihoods(q) - likelihoods(p), q)
        words = each(distill.reverse_kl, q, p, texts())
        torch.testing.assert_close(expected(words, q), whole)
        assert (expected(words, p) - whole).abs() > 0.05  # "offline"

    def test_samples_have_the_models_frequencies(self):
        n = 4000
        prompts = torch.zeros(n, 1, dtype=torch.long)
        ids = distill.continuations(lm(0), prompts, length=LENGTH, seed=3)
        code = ids[:, 1:] @ VOCAB ** torch.arange(LENGTH).flip(0)
        seen = torch.bincount(code, minlength=VOCAB**LENGTH) / n
        p = likelihoods(lm(0)).exp()
        assert ((seen - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()
        assert (seen - p).abs().sum() < 0.2
        cold = distill.continuations(
            lm(0), prompts[:500], length=LENGTH, temperature=0.2
        )
        warm = distill.log_likelihood(lm(0), ids).mean()
        assert distill.log_likelihood(lm(0), cold).mean() > warm + 0.3

    def test_seeds(self):
        prompts = torch.zeros(8, 1, dtype=torch.long)
        draw = functools.partial(
            distill.continuations, lm(0), prompts, length=6
        )
        assert torch.equal(draw(), draw(seed=0))
        assert not torch.equal(draw(), draw(seed=1))
        state = torch.get_rng_state()
        draw()
        assert torch.equal(state, torch.get_rng_state())
        torch.manual_seed(0)
        first, second = draw(seed=None), draw(seed=None)
        assert not torch.equal(first, second)
        torch.manual_seed(0)
        assert torch.equal(draw(seed=None), first)

    def test_greedy_takes_the_largest_each_time(self):
        prompts = torch.tensor([[0, 2], [1, 1]])
        ids = distill.continuations(
            lm(0), prompts, length=7, temperature=0
        )  # beyond the context of 6
        assert torch.equal(ids[:, :2], prompts)
        for t in range(2, 9):
            window = ids[:, max(0, t - 6) : t]
            assert torch.equal(lm(0)(window)[:, -1].argmax(-1), ids[:, t])

    @pytest.mark.parametrize("seed", range(4))
    def test_beam_finds_the_likeliest_text(self, seed):
        prompts = torch.tensor([[0], [1]])
        find = functools.partial(distill.beam, lm(seed), prompts, length=LENGTH)
        greedy = distill.continuations(
            lm(seed), prompts, length=LENGTH, temperature=0
        )
        assert torch.equal(find(width=1), greedy)
        wide = find(width=VOCAB ** (LENGTH - 1))
        for i in range(2):
            every = texts((i,))
            best = distill.log_likelihood(lm(seed), every).argmax()
            assert torch.equal(wide[i], every[best])
        score = functools.partial(distill.log_likelihood, lm(seed))
        assert (score(wide) >= score(find(width=2))).all()

    def test_beam_beats_greedy_somewhere(self):
        prompts = torch.tensor([[0], [1], [2]])
        gains = [
            distill.log_likelihood(
                lm(s), distill.beam(lm(s), prompts, length=5)
            )
            - distill.log_likelihood(
                lm(s),
                distill.continuations(lm(s), prompts, length=5, temperature=0),
            )
            for s in range(6)
        ]
        assert torch.cat(gains).max() > 0.05
        assert torch.cat(gains).min() > -0.05

    def test_labels_leave_the_prompt_out(self):
        ids = texts()[:7]
        for prompt in (1, 2, 4):
            batch = distill.next_tokens(ids, prompt=prompt)
            loss = train.cross_entropy(lm(1), batch)
            log_q = distill.log_likelihood(lm(1), ids, prompt=prompt)
            want = -log_q.sum() / (7 * (5 - prompt))
            torch.testing.assert_close(loss, want)


def dropout():
    """Return a language model with dropout: it must not be in use."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Embedding(VOCAB, 8), nn.Dropout(0.5), nn.Linear(8, VOCAB)
    ).train()
    model.config = {"context": 6}
    return model


class TestOnPolicy:
    def test_without_fraction_it_is_the_divergence_on_the_text(self):
        p, q, ids = lm(0), lm(1), texts()[::7]
        for prompt in (1, 3):
            loss = distill.on_policy(
                p, prompt=prompt, divergence=distill.jsd, fraction=0, beta=0.2
            )
            z, v = (m(ids)[:, prompt - 1 :] for m in (q, p))
            want = distill.jsd(z, v, beta=0.2)
            torch.testing.assert_close(loss(q, (ids, None)), want)

    def test_the_student_writes_after_the_prompt(self):
        p, q = lm(0), lm(1)
        ids = torch.zeros(5, 6, dtype=torch.long)
        ids[:, 1] = torch.arange(5) % 3
        loss = distill.on_policy(p, prompt=2)
        torch.manual_seed(4)
        got = loss(q, (ids,))
        torch.manual_seed(4)
        torch.rand(())  # the coin
        own = distill.continuations(q, ids[:, :2], length=4, seed=None)
        want = distill.reverse_kl(q(own)[:, 1:], p(own)[:, 1:])
        torch.testing.assert_close(got, want)
        assert not torch.equal(own, ids)

    def test_the_fraction_is_a_probability(self):
        ids = texts()[:4]
        text = distill.on_policy(lm(0), prompt=1, fraction=0)
        on_text = text(lm(1), (ids,))
        mixed = distill.on_policy(lm(0), prompt=1, fraction=0.3)
        torch.manual_seed(0)
        same = sum((mixed(lm(1), (ids,)) == on_text).item() for _ in range(60))
        assert 32 <= same <= 52  # 42 expected, standard deviation 3.5

    def test_modes_are_evaluation_for_the_teacher_and_the_sampling(self):
        teacher, student = dropout(), dropout()
        loss = distill.on_policy(teacher, prompt=1, fraction=0)
        ids = texts()[:4]
        with train.evaluating(student):
            got = [loss(student, (ids,)) for _ in range(2)]
        assert got == [0, 0]  # the same weights, no dropout on either side
        assert teacher.training
        assert student.training
        loss(student, (ids,)).backward()  # in training the student has it
        assert student[0].weight.grad is not None
        assert teacher[0].weight.grad is None
        greedy = [
            distill.continuations(student, ids[:, :1], length=9, temperature=0)
            for _ in range(2)
        ]
        assert torch.equal(*greedy)
        assert student.training

    def test_trains_the_same_way_twice_and_closer_to_the_teacher(self):
        teacher = lm(0)
        student = models.LM(
            vocab=VOCAB, width=8, layers=1, heads=2, ff=8, context=6
        ).double()
        feed = train.batches(texts(), size=27, epochs=12)
        loss = distill.on_policy(teacher, prompt=1, fraction=0.5)
        first, second = (
            train.fit(student, feed, loss, lr=0.03) for _ in range(2)
        )
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

        def distance(q):
            log_q = likelihoods(q)
            return (log_q.exp() * (log_q - likelihoods(teacher))).sum()

        assert distance(first) < 0.7 * distance(student)


class TestPolicyGradient:
    @staticmethod
    def gradients():
        """Return q, the true gradient and that of each pair of samples."""
        z, v = rand(VOCAB).requires_grad_(), 2 * rand(VOCAB, seed=1)
        true = torch.autograd.grad(distill.reverse_kl(z[None], v[None]), z)[0]
        log_p = v.log_softmax(-1)

        def estimate(function, y):
            value = function(z.log_softmax(-1)[y], log_p[y])
            return torch.autograd.grad(value, z)[0]

        return z.detach().softmax(-1), true, estimate

    def mean_and_variance(self, function):
        """Go through all pairs of samples, as often as they are drawn."""
        q, true, estimate = self.gradients()
        pairs = [*itertools.product(range(VOCAB), repeat=2)]
        g = torch.stack([estimate(function, torch.tensor(y)) for y in pairs])
        weight = torch.stack([q[a] * q[b] for a, b in pairs])[:, None]
        mean = (weight * g).sum(0)
        return true, mean, (weight * (g - mean).square()).sum()

    def test_is_unbiased(self):
        true, mean, _ = self.mean_and_variance(distill.policy_gradient)
        torch.testing.assert_close(mean, true)
        assert true.abs().max() > 0.1

    def test_without_a_baseline_it_is_noisier(self):
        """An offset of the logits' scale, as long texts have, drowns it."""

        def bare(log_q, log_p):
            return (log_q * (log_q - log_p + 5).detach()).mean()

        def ours(log_q, log_p):
            return distill.policy_gradient(log_q, log_p - 5)

        true, mean, noise = self.mean_and_variance(bare)
        torch.testing.assert_close(mean, true)  # right all the same
        _, same, less = self.mean_and_variance(ours)
        torch.testing.assert_close(same, true)
        assert less < 0.2 * noise

    def test_a_baseline_with_the_sample_itself_is_biased(self):
        def biased(log_q, log_p):
            cost = (log_q - log_p).detach()
            return (log_q * (cost - cost.mean())).mean()

        true, mean, _ = self.mean_and_variance(biased)
        torch.testing.assert_close(mean, true / 2)

    def test_of_whole_texts(self):
        """All texts as the samples: near the gradient of the enumeration."""
        p = lm(0)
        q = models.LM(
            vocab=VOCAB, width=8, layers=1, heads=2, ff=8, context=6
        ).double()
        log_q = likelihoods(q)
        weights = [*q.parameters()]
        kl = (log_q.exp() * (log_q - likelihoods(p))).sum()
        true = torch.autograd.grad(kl, weights)
        prompts = torch.zeros(4000, 1, dtype=torch.long)
        y = distill.continuations(q, prompts, length=LENGTH)
        value = distill.policy_gradient(
            distill.log_likelihood(q, y), distill.log_likelihood(p, y)
        )
        got = torch.autograd.grad(value, weights)
        true, got = (torch.cat([g.flatten() for g in gs]) for gs in (true, got))
        assert torch.cosine_similarity(true, got, dim=0) > 0.9
        assert 0.8 < got.norm() / true.norm() < 1.25

    def test_the_teacher_receives_no_gradient(self):
        log_q, log_p = (rand(4, seed=i).requires_grad_() for i in (0, 1))
        distill.policy_gradient(log_q, log_p).backward()
        assert log_p.grad is None
        assert log_q.grad.sum().abs() < 1e-15  # the baseline


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: distill.forward_kl(rand(2, 3), rand(3, 3)), r"v must .*2, 3"),
        (
            lambda: distill.jsd(
                rand(2, 3), rand(2, 3), mask=torch.ones(2, 3).bool()
            ),
            r"mask must be bool of shape \(2,\)",
        ),
        (
            lambda: distill.reverse_kl(
                rand(2, 3), rand(2, 3), mask=torch.zeros(2).bool()
            ),
            "no token",
        ),
        (
            lambda: distill.forward_kl(rand(2, 3), rand(2, 3), temperature=0),
            "temperature",
        ),
        (
            lambda: distill.jsd(rand(2, 3), rand(2, 3), temperature=math.nan),
            "temperature",
        ),
        (lambda: distill.jsd(rand(2, 3), rand(2, 3), beta=1), "beta"),
        (
            lambda: distill.continuations(lm(0), torch.zeros(3), length=1),
            r"prompts: .*\(3,\)",
        ),
        (
            lambda: distill.continuations(lm(0), texts(), length=0),
            "length must",
        ),
        (
            lambda: distill.continuations(
                lm(0), texts(), length=1, temperature=-1
            ),
            "temperature",
        ),
        (lambda: distill.beam(lm(0), texts(), length=1, width=0), "width"),
        (lambda: distill.next_tokens(texts(), prompt=5), "prompt: 5"),
        (
            lambda: distill.log_likelihood(lm(0), texts(), prompt=0),
            "prompt: 0",
        ),
        (
            lambda: distill.on_policy(lm(0), prompt=1, fraction=2),
            "fraction",
        ),
        (
            lambda: distill.on_policy(lm(0), prompt=9)(lm(1), (texts(),)),
            "prompt: 9",
        ),
        (lambda: distill.policy_gradient(rand(1), rand(1)), "log_q"),
        (lambda: distill.policy_gradient(rand(2), rand(3)), "log_p"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
