"""Gradient checkpointing: the same gradients, and the memory it promises."""

import copy
import io
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import measure, models, train
from minicompress.train import memory

UNIT = 1000  # numbers in an activation of a chain


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g)


def noisy():
    """Build three parts that draw numbers and keep averages."""
    torch.manual_seed(0)

    def part(a, b):
        return nn.Sequential(
            nn.Linear(a, b), nn.BatchNorm1d(b), nn.Tanh(), nn.Dropout(0.4)
        )

    return nn.Sequential(part(3, 8), part(8, 8), nn.Linear(8, 3))


def data(n=24):
    return rand(n, 3), torch.arange(n) % 3


def lm():
    torch.manual_seed(0)
    return models.LM(vocab=11, width=8, layers=3, heads=2, ff=16, context=6)


def blocks(model):
    return [f"blocks.{i}" for i in range(len(model.blocks))]


def gradients(model, batch, seed=0):
    """Return the loss and the gradients of one step in training mode."""
    torch.manual_seed(seed)
    loss = train.cross_entropy(model.train(), batch)
    return [loss, *torch.autograd.grad(loss, [*model.parameters()])]


def alike(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and alike(a.values(), b.values())


def chain(n, k):
    """Build n layers, each of which keeps its output, in k segments."""
    sizes = [len(part) for part in torch.arange(n).tensor_split(k)]
    return nn.Sequential(
        *[nn.Sequential(*[nn.Tanh() for _ in range(m)]) for m in sizes]
    )


def segments(model):
    return [str(i) for i in range(len(model))]


class TestGradients:
    @settings(deadline=None, max_examples=6)
    @given(st.sets(st.sampled_from(["", "0", "1", "1.0", "1.3", "2"])))
    def test_the_same_bits_with_dropout_and_batchnorm(self, names):
        plain = noisy()
        light = train.recompute(plain, names)
        for seed in range(2):
            want = gradients(plain, data(), seed)
            assert alike(gradients(light, data(), seed), want)
        assert same_state(plain, light)  # the averages too

    def test_random_numbers_that_are_not_put_back_are_another_dropout(
        self, monkeypatch
    ):
        plain = noisy()
        light = train.recompute(plain, ["0"])
        careless = partial(memory.checkpoint, preserve_rng_state=False)
        monkeypatch.setattr(memory, "checkpoint", careless)
        (loss, *want), (same, *got) = (
            gradients(model, data()) for model in (plain, light)
        )
        assert loss == same
        assert not alike(got, want)

    def test_buffers_that_are_not_put_back_move_twice(self, monkeypatch):
        plain = noisy()
        light = train.recompute(plain, ["0"])
        twice = lambda module: (nullcontext(), nullcontext())  # noqa: E731
        monkeypatch.setattr(memory, "_contexts", twice)
        assert alike(gradients(plain, data()), gradients(light, data()))
        assert not same_state(plain, light)

    @pytest.mark.parametrize("momentum", [0.1, 1.0, None])
    def test_averages_of_batchnorm(self, momentum):
        plain = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum), nn.Tanh())
        light = train.recompute(plain, ["0"])
        for seed in range(3):
            for model in (plain, light):
                model(rand(9, 3, seed=seed)).sum().backward()
        assert light[0].num_batches_tracked == 3
        assert same_state(plain, light)

    def test_two_batches_forward_before_one_backward(self):
        plain = noisy()
        light = train.recompute(plain, ["0", "1"])
        for model in (plain, light):
            torch.manual_seed(0)
            parts = [model(rand(9, 3, seed=i)).square() for i in (1, 2)]
            sum(part.sum() for part in parts).backward()
        assert same_state(plain, light)
        grads = [[p.grad for p in m.parameters()] for m in (plain, light)]
        assert alike(*grads)

    def test_a_forward_that_uses_the_buffer_it_changes(self):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("top", torch.ones(()))
                self.register_buffer("none", None)

            def forward(self, x):
                self.top = 0.5 * self.top + x.detach().abs().max()
                return (x / self.top).tanh()

        plain = nn.Sequential(nn.Linear(3, 3), Scaled())
        light = train.recompute(plain, ["1"])
        assert alike(gradients(light, data()), gradients(plain, data()))
        assert same_state(plain, light)

    def test_language_model_with_tied_tables(self):
        ids = torch.arange(24).view(4, 6) % 11
        plain = lm()
        light = train.recompute(plain, blocks(plain))
        assert light.head.weight is light.tokens.weight
        batch = ids, ids.roll(-1, 1)
        assert alike(gradients(light, batch), gradients(plain, batch))

    def test_a_graph_can_be_gone_through_again(self):
        model = train.recompute(noisy(), ["0", "1"])
        loss = model(data()[0]).square().sum()
        weights = [*model.parameters()]
        once = torch.autograd.grad(loss, weights, retain_graph=True)
        assert alike(torch.autograd.grad(loss, weights), once)
        assert model[0][1].num_batches_tracked == 1


class Blend(nn.Module):
    """A part whose arguments have the names of checkpoint's own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, *, context_fn, debug=1.0):
        return self.layer(x).tanh() * context_fn * debug


class TestModel:
    def test_fit_gives_the_same_weights(self):
        ids = torch.randint(11, (99,), generator=torch.Generator())
        feed = train.passages(ids, length=6, size=4, steps=8)
        light = train.recompute(lm(), blocks(lm()))
        fitted = train.fit(light, feed)
        assert same_state(fitted, train.fit(lm(), feed))
        assert not same_state(fitted, light)

    def test_fit_with_dropout_and_a_checkpoint(self, tmp_path):
        feed = train.batches(*data(), size=8, epochs=3)
        want = train.fit(noisy(), feed)
        light = train.recompute(noisy(), ["0", "1"])
        got = train.fit(light, feed, checkpoint=tmp_path / "run")
        assert same_state(got, want)
        # the file of one serves the other
        read = train.fit(noisy(), feed, checkpoint=tmp_path / "run")
        assert same_state(read, want)

    def test_the_original_is_left_alone(self):
        model = noisy()
        before = copy.deepcopy(model.state_dict())
        train.recompute(model, ["0"])(rand(5, 3)).sum().backward()
        assert alike(model.state_dict().values(), before.values())
        assert "forward" not in vars(model[0])
        assert all(p.grad is None for p in model.parameters())

    def test_copies_are_models_of_their_own(self):
        first = train.recompute(noisy(), ["0"])
        second = copy.deepcopy(first)
        with torch.no_grad():
            second[0][0].weight.zero_()
            second[0][0].bias.zero_()
        x = data()[0]
        assert first.eval()(x).std(0).min() > 0
        assert second.eval()(x).std(0).max() == 0
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        third = noisy()
        third.load_state_dict(torch.load(file))
        assert same_state(first, third)

    def test_how_often_the_parts_run(self):
        def runs(model, call):
            count = [0]

            def note(module, args):
                count[0] += 1

            for layer in model.modules():
                if isinstance(layer, nn.Tanh):
                    layer.register_forward_pre_hook(note)
            call(model)
            return count[0]

        x = rand(4).requires_grad_()
        step = lambda model: model(x).sum().backward()  # noqa: E731
        plain = chain(9, 3)
        once = train.recompute(plain, segments(plain))
        assert runs(chain(9, 3), step) == 9
        assert runs(once, step) == 18
        again = train.recompute(train.recompute(plain, ["1"]), ["0", "1", "2"])
        assert runs(again, step) == 18  # not three times

        def evaluate(model):
            with train.evaluating(model):
                model(x)

        light = train.recompute(plain, segments(plain))
        assert runs(light, evaluate) == 9

    def test_keyword_arguments_are_kept_like_the_others(self):
        class Whole(nn.Module):
            def __init__(self):
                super().__init__()
                self.part = Blend()

            def forward(self, x, scale):
                return self.part(x, context_fn=scale, debug=0.5)

        plain, x, t = Whole(), rand(5, 3), rand(5, 3, seed=1)
        light = train.recompute(plain, ["part"])
        got, want = (
            torch.autograd.grad(m(x, t).sum(), [*m.parameters()])
            for m in (light, plain)
        )
        assert alike(got, want)
        assert train.saved_bytes(lambda: light(x, t)) == x.nbytes + t.nbytes

    def test_names_what_the_model_does_not_have(self):
        with pytest.raises(ValueError, match=r"names: .*\['7', '0.9'\]"):
            train.recompute(noisy(), ["0", "7", "0.9"])


class TestMemory:
    def test_saved_by_an_mlp(self):
        """The input of each layer, log q and the labels, and one count."""
        n, widths = 32, (20, 50, 30, 10)
        model = models.MLP(widths=widths)
        batch = rand(n, 20), torch.arange(n) % 10
        got = train.saved_bytes(lambda: train.cross_entropy(model, batch))
        numbers = n * sum(widths)  # the last width: of log q
        assert got == 4 * numbers + 8 * n + 4

    @pytest.mark.parametrize("frozen", [False, True])
    def test_weights_do_not_count_nor_what_is_shared(self, frozen):
        layer = nn.Linear(20, 30, bias=False).requires_grad_(not frozen)
        x = rand(4, 5, 20).requires_grad_()
        saved = partial(train.saved_bytes, lambda: layer(x))
        # three axes: what is saved are views, of x and the weight
        assert saved() == (0 if frozen else x.nbytes)
        twice = train.saved_bytes(lambda: (layer(x), layer(x)))
        assert twice == saved()
        half = train.saved_bytes(lambda: x[:2].exp().sum() + x.square().sum())
        assert half == x.nbytes // 2 + x.nbytes  # a result, and x itself

    def test_what_is_dropped_does_not_count(self):
        x = rand(UNIT).requires_grad_()

        def f():
            x.exp().sum()  # a graph that nobody holds
            return x.tanh()

        assert train.saved_bytes(f) == 4 * UNIT
        assert train.saved_bytes(lambda: x.detach().tanh()) == 0
        with pytest.raises(ValueError, match="f: it returns None"):
            train.saved_bytes(lambda: None)

    def test_backward_still_works_inside(self):
        model, batch = noisy(), data()
        seen = []

        def f():
            seen.append(gradients(model, batch))
            return seen[-1][0]

        assert train.saved_bytes(f) == 0  # all is freed
        assert alike(seen[0], gradients(noisy(), batch))

    @pytest.mark.parametrize("n", [16, 36, 60])
    def test_the_law_of_the_square_root(self, n):
        """n / k + k units at the peak, exactly, where k divides n."""
        x = rand(UNIT).requires_grad_()
        unit, scalars = x.nbytes, 2 * 4  # the sum and its own gradient

        def step(model):
            model(x).sum().backward()
            x.grad = None

        peaks = {}
        for k in (k for k in range(1, n + 1) if n % k == 0):
            plain = chain(n, k)
            light = train.recompute(plain, segments(plain))
            # in between: outputs of all layers, or inputs of all segments
            assert train.saved_bytes(lambda m=plain: m(x)) == n * unit
            assert train.saved_bytes(lambda m=light: m(x)) == k * unit
            peaks[k] = measure.peak_memory(step, light)
            assert peaks[k] == (n // k + k) * unit + scalars
            assert measure.peak_memory(step, plain) == (n + 1) * unit + scalars
        best = min(peaks, key=peaks.get)
        assert abs(best - math.sqrt(n)) < 2
        if n in (16, 36):
            assert best == math.isqrt(n)

    def test_a_language_model_keeps_only_the_streams_between_blocks(self):
        ids = torch.arange(24).view(4, 6) % 11
        batch, plain = (ids, ids.roll(-1, 1)), lm()
        light = train.recompute(plain, blocks(plain))
        head = copy.deepcopy(plain)
        head.blocks = nn.ModuleList()
        saved = [
            train.saved_bytes(lambda m=m: train.cross_entropy(m, batch))
            for m in (head, light, plain)
        ]
        stream = 4 * 6 * 8 * 4  # N, T, width, bytes
        # without a block the norm keeps the stream too: one is the same
        assert saved[1] == saved[0] + 3 * stream
        assert saved[2] > saved[1] + 3 * 9 * stream
