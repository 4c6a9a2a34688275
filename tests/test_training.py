"""Quantization-aware training: gradients, oracles, and exact files."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import codes, models, prune, quantize, storage, through, train

VALUES = torch.tensor([0.33, -2.4, 5.0, -0.1, 1.26], dtype=torch.float64)


def drawn(*size, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*size, generator=g, dtype=dtype)


def slopes(f, *tensors, up=None):
    """Return f and the gradients of its sum, or of its product with `up`."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    y = f(*tensors)
    y.backward(torch.ones_like(y) if up is None else up)
    return y.detach(), *[t.grad for t in tensors]


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return models.MLP(widths=(6, 8, 3)).to(dtype)


def names(model):
    return [n for n, w in model.named_parameters() if w.ndim == 2]


def task(seed=0):
    X = drawn(64, 6, seed=seed)
    return train.batches(X, X[:, :3].argmax(1), size=16, epochs=5, seed=seed)


def with_lsq(model, *, bits, each="tensor"):
    weights = dict(model.named_parameters())
    steps = {
        n: nn.Parameter(quantize.lsq_scale(weights[n], bits=bits, each=each))
        for n in names(model)
    }
    return through.attach(
        model, names(model), partial(quantize.lsq, bits=bits), scale=steps
    )


METHODS = {
    **{
        f"ste {each}": (
            partial(quantize.ste, each=each),
            partial(quantize.ste_code, each=each),
            2,
        )
        for each in ("tensor", "row", 4)
    },
    "dorefa": (quantize.dorefa_weights, quantize.dorefa_code, 1),
}


class TestSte:
    @pytest.mark.parametrize("each", ["tensor", "row", 1, 4, 5, 100])
    @pytest.mark.parametrize("bits", [2, 3, 8])
    def test_is_min_max_and_all_gradient_passes(self, each, bits):
        w, up = drawn(3, 10), drawn(3, 10, seed=1)
        y, g = slopes(partial(quantize.ste, bits=bits, each=each), w, up=up)
        rule = partial(quantize.min_max, symmetric=True)
        want = rule(w, bits=bits, each=each).decode()
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
        assert torch.equal(g, up)
        code = quantize.ste_code(w, bits=bits, each=each)
        assert torch.equal(code.decode(), y)

    def test_kernels_and_zeros(self):
        w = drawn(4, 3, 3, 3)
        w[1] = 0
        y = quantize.ste(w, bits=4)
        assert y.shape == w.shape and (y[1] == 0).all()

    def test_with_many_bits_it_trains_like_floating_point(self):
        model, (X, _) = net(), next(iter(task()))
        fine, coarse = (
            through.attach(model, names(model), partial(quantize.ste, bits=b))
            for b in (16, 2)
        )
        ends = [train.fit(m, task(), lr=0.01)(X) for m in (model, fine, coarse)]
        torch.testing.assert_close(ends[1], ends[0], rtol=0.01, atol=0.01)
        assert (ends[2] - ends[0]).abs().max() > 0.1

    def test_a_latent_weight_swings_around_a_target_off_the_grid(self):
        # with L = (Q(w) - t)^2 / 2 no grid point is right, and none is kept
        t, scale, w = 0.3, torch.tensor(1.0), torch.tensor([2.2])
        seen = []
        for _ in range(4000):
            q, g = slopes(
                lambda w: quantize.lsq(w, scale, bits=4),
                w,
                up=quantize.lsq(w, scale, bits=4) - t,
            )
            w = w - 0.01 * g
            seen.append(q.item())
        assert set(seen[1000:]) == {0.0, 1.0}
        assert abs(sum(seen[1000:]) / 3000 - t) < 0.01


class TestLsq:
    def test_the_gradient_of_the_step_by_hand(self):
        s = torch.tensor(0.5, dtype=torch.float64)
        each = [
            slopes(partial(quantize.lsq, bits=3, count=1), v, s)
            for v in VALUES[:, None]
        ]
        found = torch.stack([g for _, _, g in each]) * math.sqrt(3)
        want = torch.tensor([0.34, -4, 3, 0.2, 0.48], dtype=torch.float64)
        torch.testing.assert_close(found, want)
        assert [g.item() for _, g, _ in each] == [1, 0, 0, 1, 1]
        assert [y.item() for y, _, _ in each] == [0.5, -2, 1.5, 0, 1.5]

    @given(
        st.integers(2, 8),
        st.booleans(),
        st.floats(0.01, 2),
        st.integers(0, 999),
    )
    @settings(max_examples=40, deadline=None)
    def test_torch_has_the_same_gradients(self, bits, signed, step, seed):
        v, up = drawn(7, 5, seed=seed), drawn(7, 5, seed=seed + 1)
        low = -(2 ** (bits - 1)) if signed else 0
        high = low + 2**bits - 1

        def oracle(v, s):
            return torch._fake_quantize_learnable_per_tensor_affine(
                v, s, torch.zeros(1), low, high, 1 / math.sqrt(35 * high)
            )

        # torch asks whether v is inside after rounding, the paper before
        out = (v / step - (v / step).clamp(low, high)).abs()
        v = torch.where((out > 0) & (out <= 0.5), 0.3 * step, v)
        f = partial(quantize.lsq, bits=bits, signed=signed)
        got = slopes(f, v, torch.tensor([step]), up=up)
        want = slopes(oracle, v, torch.tensor([step]), up=up)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("bits", "best"), [(2, 1.04839), (3, 0.60182), (4, 0.33861)]
    )
    def test_the_true_gradient_finds_the_best_step_for_a_gaussian(
        self, bits, best
    ):
        # quantiles of the normal distribution stand for all of it
        p = (torch.arange(50_000, dtype=torch.float64) + 0.5) / 50_000
        v = math.sqrt(2) * torch.erfinv(2 * p - 1)

        def descend(gradient):
            s = torch.tensor(1.2 * best, dtype=torch.float64)
            for _ in range(250):
                s = s - 0.5 * best**2 * gradient(s)
            return s.item()

        def error(s):
            return (v - quantize.lsq(v, s, bits=bits)).square().mean()

        def true(s):  # the integers do not move with the step
            k = quantize.lsq(v, s, bits=bits) / s
            return 2 * ((s * k - v) * k).mean()

        def learned(s):
            unscaled = math.sqrt(len(v) * (2 ** (bits - 1) - 1))
            return slopes(error, s)[1] * unscaled

        assert abs(descend(true) - best) < 2e-3 * best
        # that of LSQ ends at a larger step: a surrogate, nearly as good
        step = descend(learned)
        assert 1.003 * best < step < 1.06 * best
        true_error, found = (
            error(torch.tensor(x).double()) for x in (best, step)
        )
        assert true_error < found < 1.006 * true_error

    def test_a_step_for_each_row_learns_by_itself(self):
        v, s = drawn(3, 8), torch.tensor([[0.2], [0.5], [1.0]])
        y, gv, gs = slopes(partial(quantize.lsq, bits=3), v, s)
        for i in range(3):
            one = slopes(partial(quantize.lsq, bits=3), v[i], s[i])
            for a, b in zip((y[i], gv[i], gs[i]), one, strict=True):
                torch.testing.assert_close(a, b)

    def test_the_scale_of_the_gradient_is_not_in_the_value(self):
        v, s = drawn(9), torch.tensor(0.3)
        few, many = (
            slopes(partial(quantize.lsq, bits=4, count=n), v, s)
            for n in (1, 100)
        )
        assert torch.equal(few[0], many[0])
        assert torch.equal(few[1], many[1])
        torch.testing.assert_close(few[2], 10 * many[2])

    def test_a_negative_step_is_the_same_grid(self):
        v, s = drawn(9), torch.tensor(0.3)
        a = slopes(partial(quantize.lsq, bits=3), v, s)
        b = slopes(partial(quantize.lsq, bits=3), v, -s)
        assert torch.equal(a[0], b[0]) and torch.equal(a[2], -b[2])
        made = [quantize.lsq_code(v, x, bits=3).decode() for x in (s, -s)]
        assert torch.equal(*made) and torch.equal(made[0], a[0])

    def test_learning_the_step_helps(self):
        model = with_lsq(net(), bits=2)
        held = through.attach(
            net(),
            names(net()),
            partial(quantize.lsq, bits=2),
            scale={
                n: 3 * t["scale"] for n, t in through.tensors(model).items()
            },
        )
        learned = train.fit(with_lsq(net(), bits=2), task(), lr=0.02)
        batch = next(iter(task()))
        held = train.fit(held, task(), lr=0.02)
        assert train.cross_entropy(learned, batch) < train.cross_entropy(
            held, batch
        )

    def test_first_step(self):
        v = torch.tensor([[1.0, -3.0], [2.0, 6.0]])
        scale = quantize.lsq_scale(v, bits=3, each="row")
        want = torch.tensor([[4.0], [8.0]]) / math.sqrt(3)
        torch.testing.assert_close(scale, want)
        one = quantize.lsq_scale(v, bits=2, signed=False)
        torch.testing.assert_close(one, torch.tensor(6 / math.sqrt(3)))
        assert quantize.lsq_scale(0 * v, bits=4) == 1


class TestDorefa:
    def test_levels(self):
        w = torch.linspace(-3, 3, 601)
        y = quantize.dorefa_weights(w, bits=2)
        want = torch.tensor([-1, -1 / 3, 1 / 3, 1])
        torch.testing.assert_close(y.unique(), want)
        one = quantize.dorefa_weights(w, bits=1)
        assert one.unique().tolist() == [-w.abs().mean(), w.abs().mean()]

    def test_the_gradient_is_that_of_tanh(self):
        w, up = drawn(5, 4), drawn(5, 4, seed=1)
        got = slopes(partial(quantize.dorefa_weights, bits=3), w, up=up)[1]
        smooth = slopes(lambda w: w.tanh() / w.tanh().abs().amax(), w, up=up)
        torch.testing.assert_close(got, smooth[1])
        one = slopes(partial(quantize.dorefa_weights, bits=1), w, up=up)[1]
        assert torch.equal(one, up)

    def test_activations(self):
        a = torch.tensor([-0.5, 0.0, 0.2, 0.9, 1.0, 1.7])
        y, g = slopes(partial(quantize.dorefa_activations, bits=1), a)
        assert y.tolist() == [0, 0, 0, 1, 1, 1]
        assert g.tolist() == [0, 1, 1, 1, 1, 0]

    @pytest.mark.parametrize("bits", [1, 2, 4])
    def test_the_random_gradient_is_right_on_average(self, bits):
        d = drawn(2, 6)
        g = torch.Generator().manual_seed(0)
        draws = torch.stack(
            [
                quantize.dorefa_gradient(d, bits=bits, generator=g)
                for _ in range(4000)
            ]
        )
        off = (draws.mean(0) - d).abs()
        assert (off <= 5 * draws.std(0) / math.sqrt(4000) + 1e-6).all()
        for i in range(2):  # the levels of each sample span its own range
            m = d[i].abs().max()
            k = (draws[:, i] / (2 * m) + 0.5) * (2**bits - 1)
            torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-4)
            assert draws[:, i].abs().max() <= m * (1 + 1e-5)

    def test_zeros(self):
        w = torch.zeros(2, 3)
        assert quantize.dorefa_weights(w, bits=3).isfinite().all()
        assert quantize.dorefa_gradient(w, bits=8).abs().max() == 0


class TestPact:
    def test_clips_and_rounds(self):
        x = torch.tensor([-1.0, 0.4, 0.9, 1.5, 1.6, 9.0])
        alpha = torch.tensor(1.5)
        y, gx, ga = slopes(partial(quantize.pact, bits=2), x, alpha)
        torch.testing.assert_close(
            y, torch.tensor([0, 0.5, 1.0, 1.5, 1.5, 1.5])
        )
        assert gx.tolist() == [0, 1, 1, 0, 0, 0]
        assert ga == 3

    def test_with_many_bits_it_is_the_formula_of_the_paper(self):
        x, alpha = drawn(50, dtype=torch.float64), torch.tensor(0.8)
        want = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
        got = quantize.pact(x, alpha.double(), bits=16)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)

    def test_torch_rounds_alike(self):
        x, alpha = 3 * drawn(50), torch.tensor(1.3)
        scale = 1.3 / 15
        want = torch.fake_quantize_per_tensor_affine(x, scale, 0, 0, 15)
        got = quantize.pact(x, alpha, bits=4)
        torch.testing.assert_close(got, want)


class TestFiles:
    @pytest.mark.parametrize("bits", [1, 2, 3, 5, 8])
    @pytest.mark.parametrize("method", METHODS)
    def test_what_was_trained_is_what_is_read(self, method, bits):
        f, code, least = METHODS[method]
        bits = max(bits, least)
        model = net()
        tuned = through.attach(model, names(model), partial(f, bits=bits))
        self.same(train.fit(tuned, task(), lr=0.02), partial(code, bits=bits))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("each", ["tensor", "row"])
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_learned_steps(self, bits, each, dtype):
        tuned = with_lsq(net(), bits=bits, each=each)
        tuned = train.fit(tuned, task(), lr=0.02).to(dtype)
        self.same(tuned, partial(quantize.lsq_code, bits=bits))

    def same(self, tuned, code):
        model = through.bake(tuned)
        state = quantize.encode_trained(tuned, code)
        data = storage.dumps(model, state)
        want, got = model.state_dict(), storage.loads(data).state_dict()
        assert list(got) == list(want)
        assert all(torch.equal(got[n], want[n]) for n in want)
        for n, x in state.items():
            assert isinstance(x, codes.Code) == (n in through.tensors(tuned))

    def test_bytes(self):
        w = drawn(16, 32)
        for bits in (2, 3, 4):
            for code, steps in (
                (quantize.ste_code(w, bits=bits), 16),
                (quantize.ste_code(w, bits=bits, each="tensor"), 1),
                (quantize.lsq_code(w, torch.tensor(0.1), bits=bits), 1),
                (quantize.dorefa_code(w, bits=bits), 1),
            ):
                assert storage.payload(code) == 64 * bits + 4 * steps
        assert storage.payload(quantize.dorefa_code(w, bits=1)) == 64 + 12

    def test_either_weight_gives_the_code_of_lsq(self):
        v, s = drawn(100), torch.tensor(0.37)
        latent = quantize.lsq_code(v, s, bits=4)
        rounded = quantize.lsq_code(latent.decode(), s, bits=4)
        assert torch.equal(latent.q.values, rounded.q.values)

    def test_a_mask_before_the_rounding(self):
        model = net()
        masks = prune.keep_each(
            {n: dict(model.named_parameters())[n] for n in names(model)},
            sparsity=0.5,
        )
        tuned = through.attach(
            prune.masked(model, masks),
            names(model),
            partial(quantize.ste, bits=4),
        )
        self.same(
            train.fit(tuned, task(), lr=0.02),
            partial(quantize.ste_code, bits=4),
        )

    def test_tied_layers_are_written_once(self):
        torch.manual_seed(0)
        lm = models.LM(vocab=11, width=8, layers=1, heads=2, ff=16, context=6)
        tuned = through.attach(
            lm, "tokens.weight", partial(quantize.ste, bits=4)
        )
        state = quantize.encode_trained(
            tuned, partial(quantize.ste_code, bits=4)
        )
        assert state["tokens.weight"] is state["head.weight"]
        again = storage.loads(storage.dumps(through.bake(tuned), state))
        assert again.head.weight is again.tokens.weight
        assert torch.equal(again.head.weight, tuned.head.weight)

    def test_nothing_attached(self):
        with pytest.raises(ValueError, match="nothing is attached"):
            quantize.encode_trained(net(), quantize.ste_code)


class TestMany:
    @pytest.mark.parametrize("method", [*METHODS, "lsq"])
    def test_networks_train_together_as_alone(self, method):
        def tuned(seed):
            if method == "lsq":
                return with_lsq(net(seed), bits=3)
            f = partial(METHODS[method][0], bits=3)
            return through.attach(net(seed), names(net(seed)), f)

        feeds = [list(task(seed)) for seed in range(2)]
        together = train.fit_many([tuned(0), tuned(1)], feeds, lr=0.01, steps=4)
        for seed, got in enumerate(together):
            want = train.fit(tuned(seed), feeds[seed], lr=0.01, steps=4)
            for a, b in zip(got.parameters(), want.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    def test_activations_in_vmap(self):
        x, alpha = drawn(3, 5), torch.tensor([0.5, 1.0, 2.0])
        each = torch.vmap(partial(quantize.pact, bits=3))(x, alpha)
        alone = [
            quantize.pact(a, b, bits=3) for a, b in zip(x, alpha, strict=True)
        ]
        assert torch.equal(each, torch.stack(alone))
        step = partial(quantize.lsq, bits=3, signed=False, count=5)
        each = torch.vmap(step)(x, alpha)
        alone = [step(a, b) for a, b in zip(x, alpha, strict=True)]
        assert torch.equal(each, torch.stack(alone))


class TestLossScale:
    def test_keeps_what_float16_would_lose(self):
        g = torch.tensor(2.9e-8)
        assert g.half() == 0
        scale = quantize.LossScale()
        assert abs((g * scale.value).half().float() / scale.value - g) < 3e-11

    def test_comes_back_after_an_overflow(self):
        scale = quantize.LossScale(4.0, every=3)
        found = []
        for finite in (False, False, True, True, True, True, True, True):
            scale = scale.after(finite)
            found.append(scale.value)
        assert found == [2, 1, 1, 1, 2, 2, 2, 4]


class TestInputs:
    def test_stay(self):
        w, s = drawn(4, 6), torch.tensor(0.3)
        before = w.clone(), s.clone()
        for f in (
            partial(quantize.ste, bits=3, each=4),
            partial(quantize.ste_code, bits=3),
            partial(quantize.dorefa_weights, bits=3),
            partial(quantize.dorefa_code, bits=1),
            partial(quantize.dorefa_gradient, bits=3),
            lambda w: quantize.lsq(w, s, bits=3),
            lambda w: quantize.lsq_code(w, s, bits=3),
            lambda w: quantize.pact(w, s, bits=3),
        ):
            f(w)
            assert torch.equal(w, before[0]) and torch.equal(s, before[1])

    def test_errors(self):
        w, s = drawn(4, 6), torch.tensor(0.3)
        for f in (quantize.ste, quantize.ste_code):
            with pytest.raises(ValueError, match="bits must be 2 to 16, got 1"):
                f(w, bits=1)
            with pytest.raises(ValueError, match=r"W \(4, 6\), got 'column'"):
                f(w, bits=4, each="column")
        with pytest.raises(ValueError, match="bits must be 2 to 16, got 1"):
            quantize.lsq(w, s, bits=1)
        with pytest.raises(ValueError, match="bits must be 1 to 16, got 17"):
            quantize.lsq_code(w, s, bits=17, signed=False)
        with pytest.raises(ValueError, match='"tensor" or "row", got 4'):
            quantize.lsq_scale(w, bits=4, each=4)
        for f in (
            quantize.dorefa_weights,
            quantize.dorefa_activations,
            quantize.dorefa_gradient,
            partial(quantize.pact, alpha=s),
        ):
            with pytest.raises(ValueError, match="bits must be 1 to 16, got 0"):
                f(w, bits=0)
