"""Learned masks against sampling, closed forms and weights that return."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import prune, through, train

wide = st.floats(-50, 50)


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def uniform(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=g, dtype=torch.float64)


def stored(model):
    """Return the weight behind everything that is attached to it."""
    return model.parametrizations.weight.original


def share_open(log_alpha, n=100_000):
    one = torch.ones(n, dtype=torch.float64)
    gates = torch.full_like(one, log_alpha)
    return prune.hard_concrete(one, gates, uniform(n)).gt(0).double().mean()


class TestHardConcrete:
    @pytest.mark.parametrize("log_alpha", [-4.0, -1.6, 0.3, 2.0])
    def test_as_many_gates_open_as_expected(self, log_alpha):
        p = prune.expected_l0(torch.tensor(log_alpha)).item()
        sigma = math.sqrt(p * (1 - p) / 100_000)
        assert abs(share_open(log_alpha) - p) < 4 * sigma

    def test_number_of_the_paper(self):
        p = prune.expected_l0(torch.tensor(0.3)).item()
        assert p == pytest.approx(0.8697, abs=5e-5)
        # below zero with the stretch that opens 1/12 of the sigmoid
        half = torch.tensor(2 / 3 * math.log(1 / 11))
        assert prune.expected_l0(half).item() == pytest.approx(0.5)

    @settings(deadline=None, max_examples=50)
    @given(wide, st.floats(0, 1), wide)
    def test_the_gate_by_the_letters_of_the_paper(self, a, u, w):
        args = torch.tensor([w, a, u], dtype=torch.float64)
        got = prune.hard_concrete(args[:1], args[1:2], args[2:]).item()
        s = u  # where the logit is infinite
        if 0 < u < 1:
            x = (math.log(u) - math.log1p(-u) + a) / (2 / 3)
            # the sigmoid, whatever the sign of x
            s = math.exp(min(x, 0)) / (1 + math.exp(-abs(x)))
        z = min(1.0, max(0.0, s * (1.1 + 0.1) - 0.1))
        assert got == pytest.approx(w * z, rel=1e-9, abs=1e-12)

    def test_exactly_shut_and_exactly_open_both_happen(self):
        w = rand(1000)
        out = prune.hard_concrete(w, torch.zeros_like(w), uniform(1000))
        for part in (out == 0, out == w, (out != 0) & (out != w)):
            assert part.sum() > 100

    def test_limits(self):
        w, far = rand(50), torch.full((50,), 100.0, dtype=torch.float64)
        for noise in (uniform(50), None):
            assert torch.equal(prune.hard_concrete(w, far, noise), w)
            assert not prune.hard_concrete(w, -far, noise).any()
        assert prune.expected_l0(far).item() == pytest.approx(50)
        assert prune.expected_l0(-far).item() == pytest.approx(0)

    def test_gradients(self):
        w, a, u = rand(20), rand(20, seed=1), uniform(20)
        w.requires_grad_()
        a.requires_grad_()
        for f in (
            lambda w, a: prune.hard_concrete(w, a, u),
            prune.hard_concrete,
            lambda w, a: prune.expected_l0(a),
        ):
            assert torch.autograd.gradcheck(f, (w, a))

    def test_noise_at_its_ends_does_no_harm(self):
        a = torch.zeros(2, requires_grad=True)
        out = prune.hard_concrete(torch.ones(2), a, torch.tensor([0.0, 1.0]))
        out.sum().backward()
        assert out.tolist() == [0, 1]
        assert a.grad.tolist() == [0, 0]

    def test_a_gate_for_each_row(self):
        W = rand(3, 4)
        rows = torch.tensor([[-9.0], [0.0], [9.0]], dtype=torch.float64)
        out = prune.hard_concrete(W, rows)
        torch.testing.assert_close(out, W * torch.tensor([[0.0], [0.5], [1]]))
        for bad in (torch.zeros(3), torch.zeros(2, 1), torch.zeros(1, 1, 1)):
            with pytest.raises(ValueError, match="log_alpha"):
                prune.hard_concrete(W, bad)
        with pytest.raises(ValueError, match="noise"):
            prune.hard_concrete(W, rows, uniform(3, 4))

    def test_drawn_in_training_and_fixed_in_evaluation(self):
        model = through.attach(
            nn.Linear(20, 5),
            "weight",
            prune.HardConcrete(),
            log_alpha=nn.Parameter(torch.zeros(5, 20)),
        )
        model.train()
        torch.manual_seed(0)
        one, two = model.weight, model.weight
        assert not torch.equal(one, two)
        torch.manual_seed(0)
        noise = torch.rand(5, 20)
        want = prune.hard_concrete(stored(model), torch.zeros(5, 20), noise)
        assert torch.equal(one, want)
        model.eval()
        assert torch.equal(model.weight, stored(model) / 2)
        assert torch.equal(through.bake(model).weight, model.weight)

    def test_finds_the_inputs_that_matter(self):
        """3 of 10 inputs: with the penalty exactly they stay."""
        X = rand(200, 10).float()
        truth = torch.zeros(1, 10)
        truth[0, [1, 4, 8]] = torch.tensor([2.0, -1.0, 0.5])
        y = X @ truth.T + 0.1 * rand(200, 1, seed=1).float()
        model = through.attach(
            nn.Linear(10, 1, bias=False),
            "weight",
            prune.HardConcrete(),
            log_alpha=nn.Parameter(torch.full((1, 10), 2.0)),
        )

        def penalized(strength, model, batch):
            gates = through.tensors(model)["weight"]["log_alpha"]
            fit = F.mse_loss(model(batch[0]), batch[1])
            return fit + strength * prune.expected_l0(gates)

        kept = {}
        for strength in (0.0, 0.05):
            loss = partial(penalized, strength)
            new = train.fit(model, [(X, y)] * 300, loss, lr=0.1)
            kept[strength] = through.bake(new).weight != 0
        assert torch.equal(kept[0.05], truth != 0)
        assert kept[0.0].sum() > 3  # knocked out


class TestSplice:
    @settings(deadline=None, max_examples=50)
    @given(st.integers(0, 2**16), st.integers(0, 5), st.integers(0, 5))
    def test_is_the_rule_of_the_paper(self, seed, a, b):
        low, high = sorted((a, b))
        scores = (5 * uniform(20, seed=seed)).round()  # often a threshold
        mask = uniform(20, seed=seed + 1) > 0.5
        got = prune.splice(mask, scores, low=low, high=high)
        for m, s, new in zip(mask, scores, got, strict=True):
            want = False if s < low else True if s >= high else bool(m)
            assert bool(new) == want
        # once more changes nothing
        again = prune.splice(got, scores, low=low, high=high)
        assert torch.equal(again, got)

    def test_one_threshold_forgets_the_past(self):
        scores = rand(50)
        for mask in (scores > 9, scores < 9):
            got = prune.splice(mask, scores, low=0.2, high=0.2)
            assert torch.equal(got, prune.threshold(scores, 0.2))

    def test_the_gradient_reaches_every_weight(self):
        w = rand(4, 5).requires_grad_()
        mask = rand(4, 5, seed=1) > 0
        g = rand(4, 5, seed=2)
        out = prune.spliced(w, mask)
        assert torch.equal(out, w * mask)
        (out * g).sum().backward()
        assert torch.equal(w.grad, g)

    def test_a_weight_cut_by_mistake_comes_back(self):
        """Its true value is 1, but it starts below the threshold."""
        X = rand(100, 2)
        y = X @ torch.tensor([[1.0], [1.0]], dtype=torch.float64)
        start = nn.Linear(2, 1, bias=False).double()
        with torch.no_grad():
            start.weight.copy_(torch.tensor([[1.0, 0.01]]))

        def after(f):
            model = through.attach(
                start, "weight", f, mask=torch.tensor([[True, True]])
            )
            opt = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(60):
                if step % 10 == 0:
                    mask = through.tensors(model)["weight"]["mask"]
                    scores = stored(model).abs()
                    new = prune.splice(mask, scores, low=0.1, high=0.3)
                    mask.copy_(new)
                    if step == 0:
                        assert new.tolist() == [[True, False]]
                opt.zero_grad()
                F.mse_loss(model(X), y).backward()
                opt.step()
            return through.bake(model).weight

        torch.testing.assert_close(
            after(prune.spliced), torch.ones(1, 2).double(), atol=1e-3, rtol=0
        )
        plain = after(lambda w, mask: w * mask)  # knocked out
        assert plain[0, 1] == 0

    def test_bad_arguments_are_named(self):
        mask, scores = torch.ones(3, dtype=torch.bool), torch.ones(3)
        for bad in (torch.ones(3), mask[:2]):
            with pytest.raises(ValueError, match="mask"):
                prune.splice(bad, scores, low=0, high=1)
        for low in (2.0, math.nan):
            with pytest.raises(ValueError, match="low"):
                prune.splice(mask, scores, low=low, high=1)
        with pytest.raises(ValueError, match="nan"):
            prune.splice(mask, scores * math.nan, low=0, high=1)


class TestRefined:
    @pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (4, 4)])
    def test_gradient_is_exactly_that_of_the_paper(self, n, m):
        w = rand(6, 8).requires_grad_()
        g = rand(6, 8, seed=1)
        out = prune.sr_ste(w, n=n, m=m, decay=0.3)
        (out * g).sum().backward()
        mask = prune.n_m(w.abs(), n=n, m=m)
        assert torch.equal(out, w * mask)
        assert torch.equal(w.grad, g + 0.3 * w.detach() * ~mask)

    def test_decay_is_the_gradient_of_a_penalty_on_what_is_out(self):
        w = rand(6, 8).requires_grad_()
        g = rand(6, 8, seed=1)
        mask = prune.n_m(w.abs())
        out = through.straight(w, w * mask)
        penalty = 0.3 / 2 * (w * ~mask).square().sum()
        ((out * g).sum() + penalty).backward()
        want, w.grad = w.grad, None
        (prune.sr_ste(w, decay=0.3) * g).sum().backward()
        torch.testing.assert_close(w.grad, want, rtol=1e-15, atol=0)

    def test_every_forward_holds_the_pattern_while_the_choice_moves(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        names = ["0.weight", "2.weight"]
        masks = []

        def look(step, model, loss):
            W = model[0].weight
            assert ((W.view(16, 2, 4) != 0).sum(-1) == 2).all()
            masks.append(W != 0)

        X = rand(64, 8).float()
        y = (X[:, :4] * X[:, 4:]).sign()
        new = train.fit(
            through.attach(model, names, prune.sr_ste),
            [(X, y)] * 100,
            lambda m, b: F.mse_loss(m(b[0]), b[1]),
            lr=0.03,
            on_step=look,
        )
        assert not torch.equal(masks[0], masks[-1])  # weights came back
        for layer in (through.bake(new)[0], through.bake(new)[2]):
            kept = layer.weight != 0
            assert (kept.view(len(kept), -1, 4).sum(-1) == 2).all()

    def test_decay_settles_the_choice(self):
        """Both weights want to be 1, and one of them is out.

        Where it is out its gradient is -2, and -2 + decay w is zero at
        w = 2 / decay: below 1 it stays out, without decay it grows.
        """

        def after(decay):
            w = torch.tensor([[1.0, 0.9]], requires_grad=True)
            opt = torch.optim.SGD([w], lr=0.1)
            first = []
            for _ in range(100):
                opt.zero_grad()
                y = prune.sr_ste(w, n=1, m=2, decay=decay)
                (y - 1).square().sum().backward()
                opt.step()
                first.append(bool(y[0, 0] != 0))
            return w, sum(a != b for a, b in pairwise(first))

        w, changes = after(4.0)
        assert changes == 0
        torch.testing.assert_close(w.detach(), torch.tensor([[1.0, 0.5]]))
        assert after(0.0)[1] > 20

    def test_a_kernel_and_half_precision(self):
        K = rand(4, 4, 2, 2).bfloat16().requires_grad_()
        out = prune.sr_ste(K)
        assert torch.equal(out != 0, prune.n_m(K.abs()))
        out.sum().backward()
        assert K.grad.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="divisible"):
            prune.sr_ste(rand(2, 6))
