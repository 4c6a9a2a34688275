"""Rounded activations: torch's fake quantization, laws, and training."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import calibrate, models, quantize, storage, through, train

EIGHT = partial(quantize.min_max, bits=8, each="tensor")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def drawn(seed, *size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def mlp(seed=0):
    torch.manual_seed(seed)
    return models.MLP(widths=(4, 8, 3))


class TestFake:
    @given(
        seed=st.integers(0, 999),
        bits=st.integers(1, 8),
        scale=st.floats(0.01, 2),
        at=st.floats(0, 1),
    )
    @settings(max_examples=60, deadline=None)
    def test_value_and_gradient_are_those_of_torch(self, seed, bits, scale, at):
        top = 2**bits - 1
        zero = round(at * top)
        # away from ties, where multiplying by 1 / scale may differ
        g = torch.Generator().manual_seed(seed)
        q = torch.randint(-top, 2 * top, (50,), generator=g)
        q = q + 0.8 * torch.rand(50, generator=g) - 0.4
        x = (q * scale).requires_grad_()
        x2 = x.detach().clone().requires_grad_()
        g = drawn(seed, 50)
        y = quantize.fake(x, torch.tensor(scale), torch.tensor(zero), bits=bits)
        y2 = torch.fake_quantize_per_tensor_affine(x2, scale, zero, 0, top)
        (y * g).sum().backward()
        (y2 * g).sum().backward()
        assert torch.allclose(y, y2, rtol=1e-5)
        assert torch.equal(x.grad, x2.grad)

    def test_for_each_row(self):
        x = drawn(0, 5, 9).requires_grad_()
        scale = torch.tensor([0.1, 0.2, 0.3, 0.05, 1.0])
        zero = torch.tensor([3, 7, 0, 15, 8]).int()
        y = quantize.fake(x, scale[:, None], zero[:, None], bits=4)
        want = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, 0, 15)
        assert torch.allclose(y, want, rtol=1e-5, atol=1e-7)
        (got,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(got, torch.autograd.grad(want.sum(), x)[0])

    def test_the_value_is_exactly_on_the_grid(self):
        x = (drawn(0, 1000) * 1e6).requires_grad_()
        scale = torch.tensor(0.1)
        y = quantize.fake(x, scale, 8, bits=4)
        assert set(y.tolist()) <= {
            (scale * (q - 8)).item() for q in torch.arange(16)
        }

    def test_twice_is_once(self):
        x = drawn(0, 100)
        once = quantize.fake(x, 0.3, 7, bits=4)
        assert torch.equal(quantize.fake(once, 0.3, 7, bits=4), once)

    def test_scale_and_zero_get_no_gradient(self):
        scale = torch.tensor(0.1, requires_grad=True)
        x = drawn(0, 4).requires_grad_()
        quantize.fake(x, scale, 8, bits=4).sum().backward()
        assert scale.grad is None

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_types(self, dtype):
        x = drawn(0, 100).to(dtype)
        y = quantize.fake(x, torch.tensor(0.25), 8, bits=4)
        assert y.dtype == dtype
        assert torch.equal(y, (x / 0.25).round().clamp(-8, 7) * 0.25)

    def test_under_vmap(self):
        x, scale = drawn(0, 3, 5), torch.tensor([0.1, 0.2, 0.3])
        f = partial(quantize.fake, bits=4)
        y = torch.func.vmap(lambda x, s: f(x, s, 8))(x, scale)
        assert torch.equal(y, f(x, scale[:, None], 8))

    def test_errors(self):
        with pytest.raises(ValueError, match="bits must be 1 to 16, got 0"):
            quantize.fake(torch.ones(2), 1.0, 0, bits=0)
        with pytest.raises(ValueError, match=r"x \(2,\) must be floating"):
            quantize.fake(torch.ones(2).int(), 1.0, 0, bits=4)


class TestRoundNow:
    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_it_is_min_max(self, bits, symmetric):
        x = drawn(0, 6, 10) + 0.3
        f = partial(quantize.round_now, bits=bits, symmetric=symmetric)
        rule = partial(quantize.min_max, bits=bits, symmetric=symmetric)
        for each, name in (("tensor", "tensor"), ("token", "row")):
            want = rule(x, each=name).decode()
            assert torch.allclose(f(x, each=each), want, atol=1e-6)

    def test_images(self):
        x = drawn(0, 3, 2, 4, 4)
        y = quantize.round_now(x, bits=3, each="image")
        for image, found in zip(x, y, strict=True):
            want = quantize.min_max(image, bits=3, each="tensor").decode()
            assert torch.allclose(found, want, atol=1e-6)

    @given(seed=st.integers(0, 999), k=st.floats(0.01, 100))
    @settings(max_examples=30, deadline=None)
    def test_scale_equivariant(self, seed, k):
        x = drawn(seed, 4, 7)
        a = quantize.round_now(x, bits=4)
        b = quantize.round_now(k * x, bits=4)
        # what lies on a tie may go either way
        same = (b - k * a).abs() < 1e-4 * b.abs().max()
        assert same.float().mean() > 0.9

    def test_tokens_do_not_disturb_each_other(self):
        x = drawn(0, 4, 7)
        louder = torch.cat([x, 1000 * x[:1]])
        f = partial(quantize.round_now, bits=4)
        assert torch.equal(f(louder, each="token")[:4], f(x, each="token"))
        assert not torch.equal(f(louder)[:4], f(x))

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_all_zero_and_the_gradient(self, symmetric):
        x = torch.zeros(2, 3, requires_grad=True)
        y = quantize.round_now(x, symmetric=symmetric)
        y.sum().backward()
        assert (y == 0).all()
        assert (x.grad == 1).all()

    def test_errors(self):
        with pytest.raises(ValueError, match="got 'row' for x"):
            quantize.round_now(torch.ones(2, 3), each="row")
        with pytest.raises(ValueError, match="bits must be 2 to 16, got 1"):
            quantize.round_now(torch.ones(2, 3), bits=1, symmetric=True)


class TestOnInputs:
    def test_every_layer_sees_the_change(self):
        model, x = mlp(), drawn(0, 5, 4)
        new = quantize.on_inputs(model, lambda x, k: k * x, k=torch.tensor(2.0))
        one, two = model.layers
        want = two(2 * torch.relu(one(2 * x)))
        assert torch.allclose(new(x), want)

    def test_each_layer_its_own(self):
        model, x = mlp(), drawn(0, 5, 4)
        k = {
            "layers.0.weight": torch.tensor(3.0),
            "layers.1.weight": torch.tensor(0.5),
        }
        new = quantize.on_inputs(model, lambda x, k: k * x, k=k)
        one, two = model.layers
        assert torch.allclose(new(x), two(0.5 * torch.relu(one(3 * x))))

    def test_where(self):
        model, x = mlp(), drawn(0, 5, 4)
        new = quantize.on_inputs(
            model, torch.zeros_like, where=lambda name, w: name == "layers.1"
            ".weight"
        )  # fmt: skip
        assert torch.equal(new(x), model.layers[1].bias.expand(5, 3))

    def test_convolutions_and_keywords(self):
        torch.manual_seed(0)
        conv, x = nn.Conv2d(2, 3, 3, padding=1), drawn(0, 2, 2, 5, 5)
        new = quantize.on_inputs(conv, torch.neg)
        assert torch.equal(new(x), conv(-x))
        assert torch.equal(new(input=x), conv(-x))

    def test_a_copy_looks_up_its_own_tensors(self):
        model = quantize.on_inputs(
            nn.Linear(2, 1), lambda x, k: k * x, k=torch.tensor(1.0)
        )
        copy = deepcopy(model)
        copy.on_input.k.fill_(0.0)
        x = torch.ones(1, 2)
        assert torch.equal(copy(x)[0], copy.bias)
        assert not torch.equal(model(x)[0], model.bias)

    def test_one_layer_under_two_names(self):
        layer = nn.Linear(2, 2, bias=False)
        model = nn.Sequential(layer, layer)
        new = quantize.on_inputs(model, lambda x: 2 * x)
        x = torch.ones(1, 2)
        assert torch.allclose(new(x), 4 * model(x))

    def test_off_gives_the_model_back(self, tmp_path):
        model, x = mlp(), drawn(0, 5, 4)
        new = quantize.dynamic(model, bits=2)
        assert not torch.equal(new(x), model(x))
        back = quantize.off(new)
        assert torch.equal(back(x), model(x))
        assert list(back.state_dict()) == list(model.state_dict())
        assert not any(m._forward_pre_hooks for m in back.modules())
        storage.save(tmp_path / "m.mc", back)
        with torch.no_grad():
            assert torch.equal(storage.load(tmp_path / "m.mc")(x), model(x))
        assert not torch.equal(new(x), model(x))

    def test_calibration_sees_what_the_layer_computes_with(self):
        new = quantize.on_inputs(nn.Linear(2, 1), torch.round)
        stats = calibrate.inputs(new, [torch.tensor([[0.4, 2.6]])])["weight"]
        assert stats.mean.tolist() == [0, 3]

    def test_together_with_computed_weights(self):
        model = nn.Linear(2, 1, bias=False)
        new = through.attach(model, "weight", torch.zeros_like)
        new = quantize.on_inputs(new, torch.round)
        assert new(torch.ones(2)) == 0
        assert list(quantize.off(through.bake(new)).state_dict()) == ["weight"]

    def test_errors(self):
        model = quantize.dynamic(mlp())
        with pytest.raises(ValueError, match=r"layers.0.weight: its input is"):
            quantize.dynamic(model)
        with pytest.raises(ValueError, match=r"layers.1.weight: k holds"):
            quantize.on_inputs(
                mlp(),
                lambda x, k: x,
                k={"layers.0.weight": torch.ones(1)},
            )
        with pytest.raises(ValueError, match="a convolution needs"):
            quantize.dynamic(nn.Conv2d(1, 1, 1), each="token")
        with pytest.raises(ValueError, match="bits must be"):
            quantize.dynamic(mlp(), bits=0)


class TestStatic:
    def test_the_range_is_that_of_all_samples(self):
        layer = nn.Linear(3, 2)
        batches = [drawn(i, 100, 3) for i in range(5)]
        new = quantize.static(layer, batches, rule=EIGHT, rows=4)
        x = torch.cat(batches)
        scale, zero = new.on_input.scale, new.on_input.zero
        want = (x.max() - x.min()) / 255
        assert torch.isclose(scale, want)
        assert zero == torch.round(-x.min() / want)

    def test_it_saturates(self):
        layer, x = nn.Linear(3, 2), drawn(0, 50, 3)
        new = quantize.static(layer, [x], rule=EIGHT)
        top = torch.full((1, 3), float(x.max()))
        assert torch.allclose(new(50 * top), new(top), atol=1e-6)
        assert torch.allclose(new(top), layer(top), atol=0.05)
        assert not torch.allclose(layer(50 * top), layer(top), atol=0.05)

    def test_it_does_not_depend_on_the_batch(self):
        model, x = mlp(), drawn(0, 50, 4)
        new = quantize.static(model, [x], rule=EIGHT)
        assert torch.allclose(new(x)[:1], new(x[:1]), atol=1e-6)
        now = quantize.dynamic(model, bits=3)
        assert not torch.allclose(now(x)[:1], now(x[:1]), atol=1e-3)

    def test_eight_bits_are_close(self):
        for model, x in (
            (mlp(), drawn(0, 50, 4)),
            (models.CNN((4, 6), classes=3).eval(), drawn(0, 9, 1, 8, 8)),
        ):
            new = quantize.static(model, [x], rule=EIGHT)
            error = (new(x) - model(x)).norm() / model(x).norm()
            assert error < 0.02
            coarse = partial(quantize.min_max, bits=2, each="tensor")
            new = quantize.static(model, [x], rule=coarse)
            assert (new(x) - model(x)).norm() / model(x).norm() > 0.05

    @pytest.mark.parametrize("symmetric", [True, False])
    def test_against_torch(self, symmetric):
        layer, x = nn.Linear(3, 2), drawn(0, 50, 3)
        rule = partial(EIGHT, symmetric=symmetric)
        new = quantize.static(layer, [x], rule=rule)
        f = new.on_input
        rounded = torch.fake_quantize_per_tensor_affine(
            x, float(f.scale), int(f.zero), 0, 255
        )
        assert torch.allclose(new(x), layer(rounded), atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_types(self, dtype):
        model, x = mlp().to(dtype), drawn(0, 50, 4).to(dtype)
        for new in (
            quantize.static(model, [x], rule=EIGHT),
            quantize.dynamic(model, each="token"),
        ):
            y, want = new(x), model(x)
            assert y.dtype == dtype
            assert (y - want).norm() / want.norm() < 0.02

    def test_errors(self):
        with pytest.raises(ValueError, match=r"weight: rule must choose one"):
            quantize.static(
                nn.Linear(3, 2),
                [drawn(0, 9, 3)],
                rule=partial(quantize.min_max, bits=8, each=4),
            )


def data(n=256):
    X = drawn(0, n, 4)
    return X, (X[:, 0] * X[:, 1] > 0).long() + (X[:, 2] > 1).long()


class TestTraining:
    @pytest.mark.parametrize("kind", ["static", "dynamic"])
    def test_one_network_or_many_is_the_same(self, kind):
        X, y = data()

        def prepared(seed):
            if kind == "static":
                rule = partial(quantize.min_max, bits=3, each="tensor")
                return quantize.static(mlp(seed), [X], rule=rule)
            return quantize.dynamic(mlp(seed), bits=3)

        starts = [prepared(seed) for seed in range(3)]
        feeds = [
            train.batches(X, y, epochs=2, seed=s, size=64) for s in range(3)
        ]
        together = train.fit_many(starts, feeds, lr=0.01)
        for start, feed, found in zip(starts, feeds, together, strict=True):
            alone = train.fit(start, feed, lr=0.01)
            for a, b in zip(
                alone.state_dict().values(),
                found.state_dict().values(),
                strict=True,
            ):
                assert torch.allclose(a.double(), b.double(), atol=1e-4)

    def test_it_adapts_to_coarse_activations(self):
        X, y = data(1024)
        feed = train.batches(X, y, epochs=20, seed=0, size=64)
        model = train.fit(mlp(), feed, lr=0.01)
        rule = partial(quantize.min_max, bits=1, each="tensor")
        coarse = quantize.static(model, [X], rule=rule)
        aware = train.fit(coarse, feed, lr=0.01)

        def loss(m):
            return float(train.cross_entropy(m, (X, y)).detach())

        assert loss(aware) < loss(coarse) - 0.1

    def test_trained_tensors(self):
        X, y = data()
        k = nn.Parameter(torch.tensor(0.1))
        model = quantize.on_inputs(mlp(), lambda x, k: k * x, k=k)
        feed = train.batches(X, y, epochs=2, seed=0, size=64)
        after = train.fit(model, feed, lr=0.05)
        assert after.layers[0].on_input.k != 0.1
        assert k == 0.1
