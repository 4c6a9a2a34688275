"""One and two bits: brute force, closed forms, and training through them."""

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import (
    codes,
    entropy,
    models,
    quantize,
    storage,
    through,
    train,
)

EACH = st.sampled_from(["tensor", "row", 1, 3, 4, 16])
RULES = {
    "binary": quantize.binary,
    "ternary": quantize.ternary,
    "twn": quantize.twn,
    "bitnet": lambda W, each: quantize.bitnet(W),
}


def drawn(seed, *size, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*(size or (5, 12)), generator=g, dtype=dtype)


def quantiles(kind, n=1 << 16):
    """Place n samples of a distribution of mean size 1 or σ = 1 evenly."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    if kind == "normal":
        return math.sqrt(2) * torch.special.erfinv(2 * u - 1)
    if kind == "laplace":  # β = 1
        return -(1 - 2 * (u - 0.5).abs()).log() * (u - 0.5).sign()
    return 2 * u - 1  # uniform


def inner(code):
    return inner(code.x) if isinstance(code, codes.View) else code


def energy(W, code):
    """Sum what is lost of each row (rows,)."""
    return (W.double() - code.decode().double()).square().flatten(1).sum(1)


def left(W, code):
    """Compute the fraction of the energy that is lost."""
    return (energy(W, code).sum() / W.double().square().sum()).item()


def brute(w, levels):
    """Try all T for one row: the least ‖w - α T‖² over α >= 0 too."""
    T = torch.tensor(list(itertools.product(levels, repeat=len(w))))
    T = T.double()
    dot = (T @ w.double()).clamp(min=0)
    return (
        w.double().square().sum() - dot**2 / T.square().sum(1).clamp(1)
    ).min()


class TestBinary:
    @given(st.integers(0, 999), st.integers(1, 9))
    @settings(max_examples=40, deadline=None)
    def test_beats_all_signs(self, seed, n):
        W = drawn(seed, 1, n)
        got = energy(W, quantize.binary(W))[0]
        torch.testing.assert_close(
            got, brute(W[0], (-1, 1)), atol=1e-6, rtol=1e-5
        )

    def test_residual_is_the_energy_without_the_mean_size(self):
        W = drawn(0, 4, 3, 3, 3, dtype=torch.float64)
        rows = W.flatten(1)
        want = rows.square().sum(1) - rows.abs().sum(1).square() / 27
        torch.testing.assert_close(energy(W, quantize.binary(W)), want)

    def test_of_normal_weights(self):
        x = quantiles("normal")[None]
        code = quantize.binary(x)
        assert abs(code.by.item() - 0.79788) < 1e-4
        assert abs(left(x, code) - 0.36338) < 1e-4

    def test_zero_is_positive(self):
        W = torch.tensor([[0.0, -0.0, -2.0, 2.0]])
        want = torch.tensor([[1.0, 1.0, -1.0, 1.0]])
        assert torch.equal(quantize.binary(W).decode(), want)

    def test_a_scale_for_each_is_never_worse(self):
        W = drawn(0, 8, 64) * torch.arange(1.0, 9)[:, None]
        lost = [
            left(W, quantize.binary(W, each=e)) for e in ("tensor", "row", 16)
        ]
        assert lost[0] > 1.2 * lost[1] > 1.2 * lost[2]

    @pytest.mark.parametrize(
        "each, scales", [("tensor", 1), ("row", 16), (32, 48)]
    )
    def test_one_bit_on_disk(self, each, scales):
        W = drawn(0, 16, 96)
        code = quantize.binary(W, each=each)
        levels = 2
        assert storage.payload(code) == 16 * 96 // 8 + 4 * scales + levels


class TestSketch:
    @pytest.mark.parametrize("f", [quantize.sketch, quantize.refined_sketch])
    def test_every_term_helps(self, f):
        W = drawn(0, 6, 50, dtype=torch.float64)
        lost = [energy(W, f(W, terms=t)) for t in range(1, 7)]
        for before, after in itertools.pairwise(lost):
            assert (after < before).all()

    @given(st.integers(0, 999), st.integers(1, 2))
    @settings(max_examples=40, deadline=None)
    def test_the_fit_is_never_worse_with_the_same_signs(self, seed, terms):
        W = drawn(seed, 5, 20, dtype=torch.float64)
        plain = quantize.sketch(W, terms=terms)
        fitted = quantize.refined_sketch(W, terms=terms)
        assert (energy(W, fitted) <= energy(W, plain) + 1e-12).all()

    @pytest.mark.parametrize("terms", [3, 4, 5])
    def test_the_fit_helps_with_more_terms(self, terms):
        W = drawn(0, 50, 100, dtype=torch.float64)
        plain = energy(W, quantize.sketch(W, terms=terms))
        fitted = energy(W, quantize.refined_sketch(W, terms=terms))
        assert (fitted < plain).double().mean() > 0.9
        assert fitted.sum() < 0.9 * plain.sum()

    def test_against_the_papers_loop(self):
        w = drawn(0, 1, 30, dtype=torch.float64)
        r, B = w[0].clone(), []
        for _ in range(3):
            B.append(torch.where(r >= 0, 1.0, -1.0).double())
            a = torch.linalg.lstsq(torch.stack(B, 1), w[0]).solution
            r = w[0] - torch.stack(B, 1) @ a
        got = quantize.refined_sketch(w, terms=3)
        torch.testing.assert_close(got.decode()[0], w[0] - r)

    @pytest.mark.parametrize("f", [quantize.sketch, quantize.refined_sketch])
    def test_one_term_is_binary_and_nothing_left_is_no_harm(self, f):
        W = drawn(0, 4, 3, 3, 3)
        got = f(W, terms=1)
        assert torch.equal(got.decode(), quantize.binary(W).decode())
        assert f(W, terms=3).decode().shape == W.shape
        W = torch.tensor([[2.0, -2.0, 2.0], [0.0, 0.0, 0.0]])
        torch.testing.assert_close(f(W, terms=3).decode(), W)

    def test_bits_on_disk(self):
        code = quantize.sketch(drawn(0, 16, 96), terms=3)
        assert storage.payload(code) == 3 * (16 * 96 // 8 + 4 * 16 + 2)

    def test_errors(self):
        for f in (quantize.sketch, quantize.refined_sketch):
            with pytest.raises(ValueError, match=r"terms must be .* got 0"):
                f(drawn(0), terms=0)


class TestTernary:
    @given(st.integers(0, 999), st.integers(1, 8))
    @settings(max_examples=40, deadline=None)
    def test_beats_every_ternary_vector(self, seed, n):
        W = drawn(seed, 1, n)
        W = W.mul(2).round() / 2 if seed % 2 else W  # equal sizes
        got = energy(W, quantize.ternary(W))[0]
        torch.testing.assert_close(
            got, brute(W[0], (-1, 0, 1)), atol=1e-6, rtol=1e-5
        )

    @pytest.mark.parametrize(
        "kind, threshold, alpha, lost, kept",
        [
            ("normal", 0.6120, 1.2240, 0.19017, 0.5405),
            ("laplace", 1.0, 2.0, 0.2642, math.exp(-1)),
            ("uniform", 1 / 3, 2 / 3, 1 / 9, 2 / 3),
        ],
    )
    def test_closed_forms(self, kind, threshold, alpha, lost, kept):
        """The threshold is 0.767, 1 and 2/3 of the mean size."""
        x = quantiles(kind)[None]
        code = quantize.ternary(x)
        T = code.x.decode() != 0
        assert abs(x[T].abs().min().item() - threshold) < 2e-3
        assert abs(code.by.item() - alpha) < 2e-3
        assert abs(left(x, code) - lost) < 2e-4
        assert abs(T.double().mean().item() - kept) < 1e-3

    def test_the_optimum_rounds_to_the_nearest_level(self):
        W = drawn(0, 6, 80)
        code = quantize.ternary(W)
        nearest = (W / code.by).round().clamp(-1, 1)
        assert torch.equal(nearest, code.x.decode().float())

    def test_the_rule_of_the_paper_is_near(self):
        x = quantiles("normal")[None]
        assert abs(left(x, quantize.twn(x)) - 0.19162) < 1e-4
        size = x.abs()
        mask = size > 0.7 * size.mean()
        want = x.sign() * mask * size[mask].mean()
        torch.testing.assert_close(quantize.twn(x).decode(), want)

    @given(st.integers(0, 999), EACH, st.sampled_from([0.0, 0.5, 0.7, 1.0]))
    @settings(max_examples=40, deadline=None)
    def test_never_worse_than_a_threshold(self, seed, each, factor):
        W = drawn(seed, 4, 10)
        rule = quantize.twn(W, each=each, factor=factor)
        assert left(W, quantize.ternary(W, each=each)) <= left(W, rule) + 1e-6

    def test_factor_0_is_binary_where_there_is_no_zero(self):
        W = drawn(0)
        got = quantize.twn(W, factor=0).decode()
        assert torch.equal(got, quantize.binary(W).decode())

    def test_entropy_of_the_optimum(self):
        index = quantize.ternary(quantiles("normal")[None]).x.index
        p = index.values.flatten().bincount() / index.values.numel()
        assert abs(-(p * p.log2()).sum().item() - 1.536) < 1e-3

    def test_errors(self):
        with pytest.raises(ValueError, match=r"factor must be .* got -1"):
            quantize.twn(drawn(0), factor=-1)


class TestBitnet:
    def test_against_the_papers_formula(self):
        W = drawn(0, 6, 9)
        gamma = W.abs().mean()
        want = (W / (gamma + 1e-9)).round().clamp(-1, 1) * gamma
        torch.testing.assert_close(quantize.bitnet(W).decode(), want)

    def test_of_normal_weights(self):
        x = quantiles("normal")[None]
        code = quantize.bitnet(x)
        p = code.x.index.values.flatten().bincount() / x.numel()
        assert abs(1 - p[1].item() - 0.690) < 1e-3
        assert abs(left(x, code) - 0.2632) < 2e-4
        assert abs(-(p * p.log2()).sum().item() - 1.583) < 1e-3

    def test_is_worse_than_the_optimum_with_the_same_zeros(self):
        W = drawn(0, 64, 64)
        kept = quantize.bitnet(W).decode() != 0
        fitted = W.sign() * kept * W[kept].abs().mean()
        poor = left(W, quantize.bitnet(W))
        fair = ((W - fitted).square().sum() / W.square().sum()).item()
        assert left(W, quantize.ternary(W, each="tensor")) < fair < poor

    def test_does_not_reproduce_itself_but_ternary_does(self):
        once = quantize.bitnet(drawn(0, 8, 64)).decode()
        twice = quantize.bitnet(once)
        factor = (once != 0).double().mean().item()
        assert torch.allclose(twice.decode(), once * factor)
        again = quantize.ternary(once, each="tensor")
        assert torch.equal(again.decode(), once)

    def test_multiplies_by_additions_only(self):
        W, x = drawn(0, 4, 16), drawn(1, 16)
        code = quantize.bitnet(W)
        T, gamma = inner(code).x.decode().view(4, 16), inner(code).by.item()
        sums = [x[t == 1].sum() - x[t == -1].sum() for t in T]
        torch.testing.assert_close(code.decode() @ x, gamma * torch.stack(sums))


class TestRules:
    @pytest.mark.parametrize("rule", RULES)
    @given(st.integers(0, 99), EACH, st.sampled_from([0.5, 4.0]))
    @settings(max_examples=20, deadline=None)
    def test_scale_with_the_weights_and_are_odd(self, rule, seed, each, c):
        W = drawn(seed, 4, 10)
        once = RULES[rule](W, each=each).decode()
        assert torch.equal(RULES[rule](c * W, each=each).decode(), c * once)
        assert torch.equal(RULES[rule](-W, each=each).decode(), -once)

    @pytest.mark.parametrize("rule", ["binary", "ternary", "twn"])
    @given(st.integers(0, 99), EACH)
    @settings(max_examples=20, deadline=None)
    def test_reproduce_themselves(self, rule, seed, each):
        once = RULES[rule](drawn(seed, 4, 10), each=each).decode()
        assert torch.equal(RULES[rule](once, each=each).decode(), once)

    @pytest.mark.parametrize("rule", ["binary", "ternary", "twn"])
    def test_a_short_group_is_not_padded_with_zeros(self, rule):
        W = drawn(0, 3, 10)
        got = RULES[rule](W, each=4).decode()
        for start in (0, 4, 8):
            part = W[:, start : start + 4].clone()
            want = RULES[rule](part, each="row").decode()
            assert torch.equal(got[:, start : start + 4], want)

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("each", ["tensor", "row", 4])
    def test_all_zero_and_constant(self, rule, each):
        zero = RULES[rule](torch.zeros(3, 8), each=each).decode()
        assert torch.equal(zero, torch.zeros(3, 8))
        W = torch.full((3, 8), -2.5)
        assert torch.equal(RULES[rule](W, each=each).decode(), W)

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_types_files_and_inputs(self, rule, dtype):
        W = drawn(0, 4, 3, 3, 3).to(dtype)
        before = W.clone()
        code = RULES[rule](W, each="row")
        assert torch.equal(W, before)
        assert inner(code).by.dtype == dtype
        assert code.shape == W.shape
        model = nn.Module()
        model.w = nn.Parameter(W.to(torch.float32))
        data = storage.dumps(model, {"w": code})
        back = storage.loads(data, like=model)
        assert torch.equal(back.w, code.decode().float())

    @pytest.mark.parametrize("rule", RULES)
    def test_errors(self, rule):
        for bad in (torch.tensor([[torch.nan]]), torch.empty(0, 3)):
            with pytest.raises(ValueError, match=r"W .* must be finite"):
                RULES[rule](bad, each="row")
        if rule != "bitnet":
            for each in ("column", 0, True):
                with pytest.raises(ValueError, match=f"got {each!r}"):
                    RULES[rule](drawn(0), each=each)


class TestTrits:
    @given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 13), EACH)
    @settings(max_examples=40, deadline=None)
    def test_the_same_numbers(self, seed, out, n, each):
        code = quantize.ternary(drawn(seed, out, n), each=each)
        assert torch.equal(quantize.trits(code).decode(), code.decode())

    def test_five_in_a_byte(self):
        W = drawn(0, 123, 100)
        code = quantize.ternary(W)
        small = quantize.trits(code)
        table = 243 * 5 * 2 / 8  # and three levels of a byte each
        want = 12_300 // 5 + math.ceil(table) + 3 + 4 * 123
        assert storage.payload(small) == want
        assert storage.payload(code) == 12_300 * 2 // 8 + 3 + 4 * 123

    @pytest.mark.parametrize("n, pays", [(6000, False), (6150, True)])
    def test_pays_from_6100_weights_on(self, n, pays):
        code = quantize.ternary(drawn(0, 1, n))
        small = storage.payload(quantize.trits(code))
        assert (small < storage.payload(code)) == pays

    def test_survives_a_file(self):
        model = nn.Linear(7, 9, bias=False)
        code = quantize.trits(quantize.ternary(model.weight.detach()))
        back = storage.loads(storage.dumps(model, {"weight": code}), like=model)
        assert torch.equal(back.weight, code.decode())

    def test_other_codes(self):
        w = drawn(0)
        one, two = torch.tensor(0.5), torch.tensor(0.25)
        code = quantize.ttq_code(w, one, two)
        assert torch.equal(quantize.trits(code).decode(), code.decode())
        for bad in (quantize.binary(w), quantize.min_max(w, bits=2)):
            with pytest.raises(ValueError, match="code must be ternary"):
                quantize.trits(bad)

    def test_entropy_coding_comes_closer_to_the_bound(self):
        code = quantize.ternary(quantiles("normal")[None])
        index = entropy.rans(code.x.index)
        bits = 8 * storage.payload(index) / index.shape[1]
        assert 1.536 < bits < 1.6


class TestDistinct:
    @pytest.mark.parametrize("values, bits", [(1, 1), (2, 1), (3, 2), (5, 3)])
    def test_lossless(self, values, bits):
        W = drawn(0, values)[torch.arange(40).view(4, 10) % values]
        code = quantize.distinct(W)
        assert torch.equal(code.decode(), W)
        assert code.index.bits == bits

    def test_errors(self):
        with pytest.raises(ValueError, match="65537 values"):
            quantize.distinct(torch.arange(65537.0))
        with pytest.raises(ValueError, match="must be finite"):
            quantize.distinct(torch.tensor([torch.inf]))


def gradient(f, w, *others):
    """Return the gradients of sum(f · g) for a fixed random g."""
    inputs = [x.clone().requires_grad_() for x in (w, *others)]
    out = f(*inputs)
    g = drawn(7, *w.shape, dtype=w.dtype)
    return g, torch.autograd.grad((out * g).sum(), inputs)


class TestGradients:
    W = drawn(0, 4, 9) * 1.5  # some outside -1...1

    @pytest.mark.parametrize(
        "f", [quantize.binary_connect, quantize.sign_activation]
    )
    def test_signs_pass_it_inside_and_stop_it_outside(self, f):
        g, (got,) = gradient(f, self.W)
        assert torch.equal(got, g * (self.W.abs() <= 1))
        assert 0 < (got == 0).sum() < got.numel()
        assert torch.equal(f(self.W), torch.where(self.W >= 0, 1.0, -1.0))
        edge = torch.tensor([-1.0, 0.0, 1.0])
        g, (got,) = gradient(f, edge)
        assert torch.equal(got, g)
        assert torch.equal(f(edge), torch.tensor([-1.0, 1.0, 1.0]))

    def test_xnor(self):
        g, (got,) = gradient(quantize.xnor_weights, self.W)
        alpha = self.W.abs().mean(1, keepdim=True)
        want = g * (1 / 9 + alpha * (self.W.abs() <= 1))
        torch.testing.assert_close(got, want)

    def test_xnor_leaves_out_the_other_weights_of_a_row(self):
        """The derivative of α by the chain rule has n terms, theirs one."""
        w = self.W[:1] / 9  # all inside
        g, (got,) = gradient(quantize.xnor_weights, w)

        def full(w):  # sign by its straight-through value, α as it is
            B = w.sign() + (w - w.detach())
            return w.abs().mean(1, keepdim=True) * B

        _, (true,) = gradient(full, w)
        B = w.sign()
        cross = ((g * B).sum() - g * B) * B / 9
        torch.testing.assert_close(true - got, cross)

    @pytest.mark.parametrize(
        "f", [quantize.twn_weights, quantize.bitnet_weights]
    )
    def test_ternary_weights_pass_all(self, f):
        g, (got,) = gradient(f, self.W)
        assert torch.equal(got, g)

    def test_ttq(self):
        p, n = torch.tensor(0.7), torch.tensor(0.4)
        f = partial(quantize.ttq, threshold=0.3)
        g, (latent, positive, negative) = gradient(f, self.W, p, n)
        delta = 0.3 * self.W.abs().max()
        over, under = (s * self.W > delta for s in (1, -1))
        torch.testing.assert_close(positive, g[over].sum())
        torch.testing.assert_close(negative, -g[under].sum())
        want = torch.where(over, p * g, torch.where(under, n * g, g))
        torch.testing.assert_close(latent, want)
        values = torch.where(over, p, torch.where(under, -n, 0.0))
        assert torch.equal(f(self.W, p, n), values)

    def test_ttq_by_finite_differences(self):
        w = self.W.double()
        p, n = (torch.tensor(v, dtype=torch.float64) for v in (0.7, 0.4))
        g, (_, positive, negative) = gradient(quantize.ttq, w, p, n)
        h = 1e-6

        def out(p, n):
            return (g * quantize.ttq(w, p, n)).sum()

        torch.testing.assert_close(
            positive, (out(p + h, n) - out(p - h, n)) / (2 * h)
        )
        torch.testing.assert_close(
            negative, (out(p, n + h) - out(p, n - h)) / (2 * h)
        )

    def test_stochastic_sign(self):
        w = torch.tensor([-2.0, -0.5, 0.0, 0.8, 2.0]).repeat(20_000, 1)
        g = torch.Generator().manual_seed(0)
        x = quantize.stochastic_sign(w, generator=g)
        assert set(x.unique().tolist()) == {-1, 1}
        mean = torch.tensor([-1.0, -0.5, 0.0, 0.8, 1.0])
        # four standard deviations of a mean of 20,000
        assert ((x.mean(0) - mean).abs() <= 4 / math.sqrt(20_000)).all()
        assert (x[:, 0] == -1).all() and (x[:, 4] == 1).all()
        again = torch.Generator().manual_seed(0)
        assert torch.equal(quantize.stochastic_sign(w, generator=again), x)
        grad, (got,) = gradient(quantize.stochastic_sign, w[:9])
        assert torch.equal(got, grad * (w[:9].abs() <= 1))

    def test_bitnet_activations_are_rounded_per_token(self):
        x = drawn(0, 3, 5, 8)
        top = x.abs().amax(-1, keepdim=True)
        want = (127 * x / top).round().clamp(-128, 127) * top / 127
        f = partial(quantize.round_now, bits=8, each="token", symmetric=True)
        torch.testing.assert_close(f(x), want)
        g, (got,) = gradient(f, x)
        torch.testing.assert_close(got, g)


TRAINED = {  # how to train, and how to store what was trained
    "binary_connect": (quantize.binary_connect, quantize.distinct),
    "xnor": (quantize.xnor_weights, quantize.binary),
    "twn": (quantize.twn_weights, quantize.twn),
    "twn_groups": (
        partial(quantize.twn_weights, each=7),
        partial(quantize.ternary, each=7),
    ),
    "bitnet": (
        quantize.bitnet_weights,
        partial(quantize.ternary, each="tensor"),
    ),
}


def matrices(name, w):
    return w.ndim == 2


def task(seed=0, n=400):
    X = drawn(seed, n, 10)
    return X, (X[:, :2].prod(1) > 0).long()


def mlp(seed=0, width=24):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.MLP(widths=(10, width, 2))


def numbers(model, value):
    weights = dict(model.named_parameters())
    names = [n for n, w in weights.items() if matrices(n, w)]
    return {n: nn.Parameter(torch.tensor(value)) for n in names}


class TestTraining:
    @pytest.mark.parametrize("method", TRAINED)
    def test_the_code_is_exactly_what_was_trained(self, method):
        f, rule = TRAINED[method]
        X, y = task()
        model = through.attach(mlp(), matrices, f)
        feed = train.batches(X, y, epochs=3, seed=0)
        baked = through.bake(train.fit(model, feed, lr=0.02))
        state = codes.encode(baked, rule, where=matrices)
        decoded = codes.decode(state)
        for name, w in baked.named_parameters():
            assert torch.equal(decoded[name], w), name
        assert train.accuracy(baked, X, y) > train.accuracy(mlp(), X, y)

    def test_ttq_learns_its_levels_and_is_stored_exactly(self):
        X, y = task()
        start = numbers(mlp(), 0.2)
        model = through.attach(
            mlp(), matrices, quantize.ttq, positive=start, negative=start
        )
        feed = train.batches(X, y, epochs=5, seed=0)
        model = train.fit(model, feed, lr=0.02)
        levels, baked = through.tensors(model), through.bake(model)
        for i, layer in enumerate(model.layers):
            own = levels[f"layers.{i}.weight"]
            assert own["positive"] != own["negative"]
            latent = layer.parametrizations.weight.original
            code = quantize.ttq_code(latent, **own)
            assert torch.equal(code.decode(), baked.layers[i].weight)
            listed = quantize.distinct(baked.layers[i].weight)
            assert torch.equal(listed.decode(), baked.layers[i].weight)

    @pytest.mark.parametrize("method", [*TRAINED, "ttq", "stochastic"])
    def test_many_networks_at_once(self, method):
        """With `fit_many`, each as if it were alone."""
        X, y = task()
        extra = {}
        if method == "ttq":
            start = numbers(mlp(), 0.2)
            f, extra = quantize.ttq, {"positive": start, "negative": start}
        elif method == "stochastic":
            f = quantize.stochastic_sign
        else:
            f = TRAINED[method][0]
        nets = [through.attach(mlp(s), matrices, f, **extra) for s in (0, 1)]
        feeds = [train.batches(X, y, epochs=2, seed=s) for s in (0, 1)]
        sgd = {"optimizer": torch.optim.SGD, "lr": 0.05}
        many = train.fit_many(nets, feeds, **sgd)
        assert not torch.equal(
            many[0].layers[0].weight, many[1].layers[0].weight
        )
        if method != "stochastic":
            alone = train.fit(nets[0], feeds[0], **sgd)
            for a, b in zip(
                alone.parameters(), many[0].parameters(), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    def test_latent_weights_are_clipped(self):
        X, y = task()
        model = through.attach(mlp(), matrices, quantize.binary_connect)
        feed = train.batches(X, y, epochs=3, seed=0)
        fit = partial(train.fit, model, feed, lr=0.3)

        def largest(model):
            latents = [
                layer.parametrizations.weight.original for layer in model.layers
            ]
            return max(w.abs().max().item() for w in latents)

        assert largest(fit(on_step=quantize.clip_latent)) == 1
        assert largest(fit()) > 1
        assert largest(model) < 1  # it was not touched

    @pytest.mark.parametrize("method", ["xnor", "twn"])
    def test_the_quantizer_is_in_the_loop(self, method):
        """Trained through its rounding a network loses less by it."""
        (f, rule), (X, y) = TRAINED[method], task()

        def rounded(model):
            state = codes.encode(model, rule, where=matrices)
            model.load_state_dict(codes.decode(state))
            return train.accuracy(model, X, y)

        gain = 0
        for seed in range(3):
            net = mlp(seed, width=64)
            feed = train.batches(X, y, epochs=20, seed=seed)
            gain -= rounded(train.fit(net, feed, lr=0.02)) / 3
            net = through.attach(net, matrices, f)
            gain += rounded(through.bake(train.fit(net, feed, lr=0.02))) / 3
        assert gain > 0.05

    def test_a_binary_layer_trains(self):
        """Signs of the inputs too, behind a norm."""
        X, y = task()

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(10, 32)
                self.norm = nn.BatchNorm1d(32)
                self.hidden = nn.Linear(32, 32, bias=False)
                self.last = nn.Linear(32, 2)

            def forward(self, x):
                x = quantize.sign_activation(self.norm(self.first(x)))
                return self.last(F.relu(self.hidden(x)))

        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = Net()
        net = through.attach(net, "hidden.weight", quantize.xnor_weights)
        feed = train.batches(X, y, epochs=20, seed=0)
        net = through.bake(train.fit(net, feed, lr=0.02))
        assert train.accuracy(net, X, y) > 0.9
        with torch.no_grad():  # and runs on packed bits
            x = net.norm(net.first(X))
            W = net.hidden.weight
            a, b = quantize.pack_signs(x), quantize.pack_signs(W)
            alpha = quantize.binary(W).by.T
            got = quantize.xnor_matmul(a, b, k=32) * alpha
            want = net.hidden(quantize.sign_activation(x))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def test_ttq_errors(self):
        with pytest.raises(ValueError, match=r"negative must be one .*\(2,\)"):
            quantize.ttq_code(drawn(0), torch.tensor(1.0), torch.ones(2))
