"""Integers only: exact identities, simulations, and real kernels."""

import math
from copy import deepcopy
from functools import cache, partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minicompress import models, quantize, zoo
from minicompress.quantize import conversion, int8, integers

EIGHT = partial(quantize.min_max, bits=8, each="tensor")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn(seed, *size):
    return torch.randn(*size, generator=generator(seed))


def whole(seed, low, high, *size):
    return torch.randint(low, high, size, generator=generator(seed))


class NoFloats(TorchDispatchMode):
    """Raise as soon as an operation takes or makes a real number."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in (*args, out):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                raise AssertionError(f"{func} handles {t.dtype}")
        return out


@cache
def trained(name):
    """Give a network of the zoo, its integer version and its tests."""
    model, task = zoo.load(name), zoo.task(name)
    net = quantize.integer_model(model, task.train[0][:500])
    X, y = task.test
    with torch.no_grad():
        q = torch.cat([net.forward(net.encode(x)) for x in X.split(250)])
        return model, net, X, y, q


class TestArithmetic:
    @given(seed=st.integers(0, 999), zx=st.integers(0, 255))
    def test_zero_points_are_exact(self, seed, zx):
        qx, qw = whole(seed, 0, 256, 4, 30), whole(seed + 1, 0, 256, 3, 30)
        zw = whole(seed + 2, 0, 256, 3)
        found = quantize.zero_point_product(qx, zx, qw, zw)
        want = (qx.double() - zx) @ (qw.double() - zw[:, None]).T
        assert torch.equal(found.double(), want)
        assert found.dtype == torch.int32

    def test_how_many_terms_are_safe(self):
        n = quantize.safe_terms()
        assert n * 127 * 127 < 2**31 <= (n + 1) * 127 * 127
        q = torch.full((1, n), 127, dtype=torch.int32)
        assert int(q @ q.T) == n * 127 * 127
        q = torch.full((1, n + 1), 127, dtype=torch.int32)
        assert int(q @ q.T) < 0  # around the corner

    @given(st.floats(2.0**-30, 2.0**28))
    def test_a_factor_has_31_bits(self, factor):
        M0, shift = quantize.fixed_point(
            torch.tensor(factor, dtype=torch.float64)
        )
        assert 2**30 <= int(M0) < 2**31
        found = int(M0) / 2 ** int(shift)
        assert math.isclose(found, factor, rel_tol=2**-31)

    def test_a_mantissa_that_rounds_up_to_one(self):
        M0, shift = quantize.fixed_point(
            torch.tensor(1 - 2.0**-40, dtype=torch.float64)
        )
        assert (int(M0), int(shift)) == (2**30, 30)

    @given(
        acc=st.integers(-(2**31), 2**31 - 1), factor=st.floats(2.0**-30, 1.0)
    )
    def test_rescaling_by_exact_integers(self, acc, factor):
        M0, shift = quantize.fixed_point(
            torch.tensor([factor], dtype=torch.float64)
        )
        found = quantize.rescale(torch.tensor([acc]).int(), M0, shift)
        a, s = acc * int(M0), int(shift)  # Python's integers have no end
        assert int(found) == (2 * a + 2**s) // 2 ** (s + 1)

    @pytest.mark.parametrize("factor", [0.0, -1.0, 2.0**-40, 2.0**31])
    def test_errors(self, factor):
        with pytest.raises(ValueError, match="factor must be"):
            quantize.fixed_point(torch.tensor([factor]))


class TestSteps:
    def test_padding_is_the_zero_of_the_input(self):
        conv = nn.Conv2d(2, 3, 3, padding=1)
        conv.weight.data, conv.bias.data = drawn(0, 3, 2, 3, 3), drawn(1, 3)
        x = drawn(2, 4, 2, 6, 6) + 0.5
        net = quantize.integer_model(nn.Sequential(conv), x)
        (step,) = net.steps
        q = net.encode(x)
        padded = nn.functional.pad(q.int(), (1, 1, 1, 1), value=step.zero_in)
        bare = integers.Product(**(vars(step) | {"padding": (0, 0)}))
        assert step.zero_in > 0
        assert torch.equal(bare(padded), step(q))

    def test_a_convolution_is_its_patches(self):
        conv = nn.Conv2d(2, 3, 3, stride=2)
        conv.weight.data = drawn(0, 3, 2, 3, 3)
        x = drawn(2, 4, 2, 7, 7)
        net = quantize.integer_model(nn.Sequential(conv), x)
        (step,) = net.steps
        q = net.encode(x)
        patches = q.unfold(2, 3, 2).unfold(3, 3, 2).permute(0, 2, 3, 1, 4, 5)
        found = quantize.zero_point_product(
            patches.flatten(3).flatten(0, 2),
            step.zero_in,
            step.weight.flatten(1),
            0,
        )
        want = step.sums(q) - step.bias[:, None, None]
        assert torch.equal(
            found, want.permute(0, 2, 3, 1).flatten(0, 2).contiguous()
        )

    def test_pooling(self):
        q = whole(0, 0, 256, 2, 3, 6, 6).to(torch.uint8)
        found = integers.MaxPool(2)(q)
        assert found.dtype == torch.uint8
        assert torch.equal(found, nn.functional.max_pool2d(q.float(), 2).byte())
        total = integers.SumPositions()(q)
        assert torch.equal(total.double() / 36, q.double().mean((2, 3), True))

    def test_relu_is_a_limit_of_the_range(self):
        torch.manual_seed(0)
        layer, x = nn.Linear(4, 8), drawn(0, 50, 4)
        net = quantize.integer_model(nn.Sequential(layer, nn.ReLU()), x)
        assert net.steps[0].least == net.zero_out == 0
        step = net.steps[0]
        raised = integers.Product(**(vars(step) | {"zero_out": 9, "least": 9}))
        assert int(raised(net.encode(x)).min()) == 9


class TestNetworks:
    @pytest.mark.parametrize("name", ["digits-mlp", "glyphs-cnn"])
    def test_the_simulation_gives_the_same_integers(self, name):
        _, net, X, _, q = trained(name)
        for x, want in zip(X.split(250), q.split(250), strict=True):
            assert torch.equal(net.simulate(net.encode(x)), want)

    @pytest.mark.parametrize("name", ["digits-mlp", "glyphs-cnn"])
    def test_accuracy(self, name):
        model, _, X, y, q = trained(name)
        with torch.no_grad():
            right = (model(X).argmax(1) == y).float().mean()
        found = (q.argmax(1) == y).float().mean()
        assert abs(float(found - right)) <= 0.005

    @pytest.mark.parametrize("name", ["digits-mlp", "glyphs-cnn"])
    def test_there_is_no_real_number_inside(self, name):
        _, net, X, _, q = trained(name)
        inputs = net.encode(X[:8])
        with NoFloats():
            assert torch.equal(net.forward(inputs), q[:8])
        with pytest.raises(AssertionError, match="handles"), NoFloats():
            net.simulate(inputs)

    def test_within_one_of_rounding_by_hand(self):
        """Weights and activations on their grids, in real arithmetic."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        x = drawn(0, 200, 8)
        net = quantize.integer_model(model, x)
        hidden = model[1](model[0](x))
        y = EIGHT(x)
        for layer, out in ((model[0], hidden), (model[2], model(x))):
            rule = partial(quantize.min_max, bits=8, symmetric=True)
            a = y.decode() @ rule(layer.weight).decode().T + layer.bias
            a = a.relu() if layer is model[0] else a
            grid = EIGHT(out)
            zero = float(grid.zero.values)
            q = (torch.round(a / grid.scale) + zero).clamp(0, 255)
            y = type(grid)(q, grid.scale, grid.zero)
        away = (net.forward(net.encode(x)).double() - q.double()).abs()
        assert away.max() <= 1
        assert (away == 0).float().mean() > 0.98

    def test_the_mean_goes_into_the_factor(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ).eval()
        x = drawn(0, 20, 1, 8, 8)
        net = quantize.integer_model(model, x)
        error = (net(x) - model(x)).norm() / model(x).norm()
        assert error < 0.02
        assert net.steps[-1].zero_in == 36 * net.steps[0].zero_out

    def test_rows_without_weights_keep_their_bias(self):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        layer.weight.data[1], layer.bias.data[1] = 0, 0.7
        layer.weight.data[2] *= 1e-12
        x = drawn(0, 20, 4)
        net = quantize.integer_model(nn.Sequential(layer), x)
        error = (net(x) - layer(x))[:, 1:].abs().max()
        assert error < 0.501 * net.scale_out

    def test_calibration_outside_of_the_range_saturates(self):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(4, 3)), drawn(0, 20, 4)
        net = quantize.integer_model(model, x)
        assert int(net.encode(1000 * x).max()) == 255
        assert net(1000 * x).abs().max() <= 256 * net.scale_out

    def test_the_model_stays(self):
        model = models.CNN((4, 6), classes=3)
        before = deepcopy(model.state_dict())
        quantize.integer_model(model, drawn(0, 5, 1, 8, 8))
        assert model.training
        for name, t in model.state_dict().items():
            assert torch.equal(t, before[name])

    @pytest.mark.parametrize(
        ("layers", "match"),
        [
            ([nn.Conv2d(2, 2, 1), nn.GELU()], "no integer version of GELU"),
            ([nn.Conv2d(2, 2, 1, groups=2)], "no groups or dilation"),
            ([nn.Conv2d(2, 2, 3, padding="same")], "a number of zeros"),
            ([nn.Conv2d(2, 2, 1), nn.MaxPool2d(2), nn.ReLU()], "directly"),
            ([nn.Conv2d(2, 2, 1), nn.AdaptiveAvgPool2d(1)], "must end with"),
            ([nn.Conv2d(2, 2, 1), nn.AdaptiveAvgPool2d(2)], "only the mean"),
            ([nn.Conv2d(2, 2, 1), nn.MaxPool2d(2, 1)], "no integer version"),
        ],
    )
    def test_errors(self, layers, match):
        with pytest.raises(ValueError, match=match):
            quantize.integer_model(nn.Sequential(*layers), drawn(0, 2, 2, 4, 4))

    def test_more_errors(self):
        x = drawn(0, 5, 4)
        with pytest.raises(ValueError, match=r"must be MLP, CNN or nn\."):
            quantize.integer_model(nn.Linear(4, 2), x)
        with pytest.raises(ValueError, match="8 bits, got 4"):
            quantize.integer_model(
                nn.Sequential(nn.Linear(4, 2)),
                x,
                rule=partial(quantize.min_max, bits=4, each="tensor"),
            )
        long = nn.Linear(70_000, 1)
        long.weight.data.fill_(1.0)
        with pytest.raises(ValueError, match="could leave int32"):
            conversion.integer_model(nn.Sequential(long), torch.rand(2, 70_000))


class TestKernels:
    @given(
        seed=st.integers(0, 999),
        rows=st.integers(1, 40),
        n=st.integers(1, 70),
        out=st.integers(1, 40),
    )
    @example(seed=0, rows=1, n=1, out=2)  # torch._int_mm gives zeros here
    @settings(max_examples=25, deadline=None)
    def test_all_give_the_exact_sums(self, seed, rows, n, out):
        x = whole(seed, -127, 128, rows, n).to(torch.int8)
        q = whole(seed + 1, -127, 128, out, n).to(torch.int8)
        want = quantize.zero_point_product(x, 0, q, 0).float()
        for prepare in quantize.kernels().values():
            assert torch.equal(prepare(q)(x), want)

    def test_one_that_is_wrong_is_not_used(self, monkeypatch):
        def wrong(q):
            return lambda x: int8.reference(q)(x) + 1

        wrong.__name__ = "int_mm"
        monkeypatch.setattr(int8, "int_mm", wrong)
        assert "int_mm" not in int8.kernels.__wrapped__()

        def missing(q):
            raise AttributeError("no such operator")

        monkeypatch.setattr(int8, "onednn", missing)
        assert list(int8.kernels.__wrapped__()) == ["reference"]

    def test_a_layer_on_every_kernel(self):
        torch.manual_seed(0)
        layer, x = nn.Linear(96, 40), drawn(0, 3, 5, 96)
        want = quantize.Int8Linear(layer, "reference")(x)
        for name in quantize.kernels():
            assert torch.equal(quantize.Int8Linear(layer, name)(x), want)
        assert (want - layer(x)).norm() / layer(x).norm() < 0.02
        assert quantize.Int8Linear(layer)(x[0, 0]).shape == (40,)

    def test_it_is_llm_int8_without_outliers(self):
        layer, x = nn.Linear(64, 24, bias=False), drawn(0, 9, 64)
        want = quantize.int8_with_outliers(x, layer.weight, threshold=torch.inf)
        assert torch.allclose(quantize.Int8Linear(layer)(x), want, atol=1e-5)

    def test_a_zero_input(self):
        layer = nn.Linear(8, 4)
        y = quantize.Int8Linear(layer)(torch.zeros(1, 8))
        assert torch.equal(y[0], layer.bias)

    def test_errors(self):
        with pytest.raises(ValueError, match="no 'fast' here, only"):
            quantize.Int8Linear(nn.Linear(2, 2), "fast")
