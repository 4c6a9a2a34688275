"""Folding, equalization and bias correction: the function must stay."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import calibrate, models, quantize, storage
from minicompress.quantize import folding


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def drawn(seed, *size):
    return torch.randn(*size, generator=generator(seed))


def lived(model, seed=0):
    """Give norms the statistics and weights of a trained model."""
    g = generator(seed)
    for m in model.modules():
        if isinstance(m, folding.NORMS) and m.running_var is not None:
            m.running_mean.normal_(generator=g)
            m.running_var.uniform_(0.1, 3.0, generator=g)
            if m.affine:
                m.weight.data.normal_(generator=g)
                m.bias.data.normal_(generator=g)
    return model.eval()


def norms(model):
    return [m for m in model.modules() if isinstance(m, folding.NORMS)]


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


class Preactivated(nn.Module):
    """The sum reads what the convolution returns, beside the norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        y = self.conv(x)
        return y + self.norm(y)


class TestFolding:
    @pytest.mark.parametrize(
        ("model", "size"),
        [
            (models.CNN((4, 6), classes=3), (5, 1, 8, 8)),
            (models.ResNet((4, 6), classes=3), (5, 1, 8, 8)),
            (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (5, 6)),
            (
                nn.Sequential(
                    nn.Conv2d(4, 8, 3, groups=2),
                    nn.BatchNorm2d(8, affine=False),
                ),
                (5, 4, 6, 6),
            ),
        ],
    )
    def test_the_function_stays(self, model, size):
        torch.manual_seed(0)
        model = lived(deepcopy(model))
        x = drawn(1, *size)
        before = deepcopy(model.state_dict())
        new = quantize.fold_norms(model, x)
        assert norms(model)
        assert not norms(new)
        assert relative(new(x), model(x)) < 1e-6
        for name, t in model.state_dict().items():
            assert torch.equal(t, before[name])

    @pytest.mark.parametrize("kind", [models.CNN, models.ResNet])
    def test_a_folded_model_can_be_stored(self, kind, tmp_path):
        model = lived(kind((4, 6), classes=3))
        x = drawn(0, 2, 1, 8, 8)
        new = quantize.fold_norms(model, x)
        path = tmp_path / "folded.mc"
        storage.save(path, new)
        with torch.no_grad():
            assert torch.equal(storage.load(path)(x), new(x))

    def test_by_hand(self):
        norm = lived(nn.BatchNorm1d(3))
        W, b = drawn(0, 3, 5), drawn(1, 3)
        W2, b2 = quantize.folded(W, b, norm)
        by = norm.weight / (norm.running_var + norm.eps).sqrt()
        assert torch.allclose(W2, W * by[:, None], rtol=1e-6)
        want = (b - norm.running_mean) * by + norm.bias
        assert torch.allclose(b2, want, rtol=1e-5, atol=1e-6)

    def test_epsilon_counts(self):
        norm = nn.BatchNorm1d(1, eps=3.0).eval()
        W, _ = quantize.folded(torch.ones(1, 1), None, norm)
        assert W.item() == 0.5

    def test_in_double_it_is_exact_to_double(self):
        model = lived(models.CNN((4, 6), classes=3).double())
        x = drawn(0, 3, 1, 8, 8).double()
        assert relative(quantize.fold_norms(model, x)(x), model(x)) < 1e-14

    def test_bfloat16(self):
        model = lived(models.CNN((4, 6), classes=3)).bfloat16()
        x = drawn(0, 3, 1, 8, 8).bfloat16()
        new = quantize.fold_norms(model, x)
        assert relative(new(x).float(), model(x).float()) < 0.02
        same = quantize.equalize(new, [("convs.0", "convs.1")])
        assert same.convs[0].weight.dtype == torch.bfloat16
        assert relative(same(x).float(), new(x).float()) < 0.02

    def test_what_cannot_be_folded_stays(self):
        x = drawn(0, 4, 2, 6, 6)
        shared = nn.Conv2d(2, 2, 1)
        for model in (
            nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)),
            nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.BatchNorm2d(2)),
            nn.Sequential(shared, nn.BatchNorm2d(2), shared),
            nn.Sequential(
                nn.Conv2d(2, 2, 1),
                nn.BatchNorm2d(2, track_running_stats=False),
            ),
        ):
            new = quantize.fold_norms(lived(model), x)
            assert len(norms(new)) == 1
            with torch.no_grad():
                assert torch.equal(new(x), model(x))

    def test_a_second_reader_is_noticed(self):
        with pytest.raises(ValueError, match="something besides the layers"):
            quantize.fold_norms(lived(Preactivated()), drawn(0, 2, 2, 3, 3))

    def test_errors(self):
        norm = nn.BatchNorm1d(3, track_running_stats=False)
        with pytest.raises(ValueError, match="no running statistics"):
            quantize.folded(torch.ones(3, 2), None, norm)
        with pytest.raises(ValueError, match=r"3 channels, W \(2, 2\)"):
            quantize.folded(torch.ones(2, 2), None, nn.BatchNorm1d(3))


def ranges(one, two, groups=1):
    """Compare both sides channel by channel, by loops."""
    one, two = one.detach(), two.detach()
    r1 = [float(row.abs().max()) for row in one]
    rows, c = len(two) // groups, len(one)
    r2 = []
    for i in range(c):
        group, inside = divmod(i, c // groups)
        part = two[group * rows : (group + 1) * rows]
        places = part.shape[1] * groups // c
        part = part[:, inside * places : (inside + 1) * places]
        r2.append(float(part.abs().max()))
    return torch.tensor(r1), torch.tensor(r2)


class TestEqualization:
    @given(seed=st.integers(0, 999), groups=st.sampled_from([1, 2, 4]))
    @settings(max_examples=30, deadline=None)
    def test_both_sides_get_the_geometric_mean(self, seed, groups):
        W1 = drawn(seed, 4, 3)
        W2 = drawn(seed + 1, 8, 4 // groups, 3, 3)
        r1, r2 = ranges(W1, W2, groups)
        A, _, B = quantize.equalized(W1, None, W2, groups=groups)
        for r in ranges(A, B, groups):
            assert torch.allclose(r, (r1 * r2).sqrt(), rtol=1e-5)

    def test_linear_layers(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
        model[0].weight.data *= torch.logspace(-2, 2, 7)[:, None]
        x = drawn(0, 9, 5)
        new = quantize.equalize(model, [("0", "2")])
        assert relative(new(x), model(x)) < 1e-6
        r1, r2 = ranges(new[0].weight, new[2].weight)
        assert torch.allclose(r1, r2, rtol=1e-5)
        # the ranges were far apart before
        assert ranges(model[0].weight, model[2].weight)[0].max() > 10

    @pytest.mark.parametrize("groups", [1, 2, 6])
    def test_convolutions_and_a_flattened_image(self, groups):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 6, 3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 12, 3, groups=groups),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 4, 3),
        )
        x = drawn(0, 3, 1, 10, 10)
        new = quantize.equalize(model, [("0", "3"), ("3", "6")])
        assert relative(new(x), model(x)) < 1e-5
        assert relative(new[0].weight, model[0].weight) > 0.01
        a = ranges(new[0].weight, new[3].weight, groups)
        b = ranges(new[3].weight, new[6].weight)
        assert torch.allclose(*a, rtol=2e-2)
        assert torch.allclose(*b, rtol=2e-2)

    def test_a_trained_network_with_pooling(self):
        x = drawn(0, 3, 1, 28, 28).abs()
        torch.manual_seed(0)
        model = quantize.fold_norms(lived(models.CNN((4, 6, 8))), x)
        pairs = [("convs.0", "convs.1"), ("convs.1", "convs.2")]
        new = quantize.equalize(model, [*pairs, ("convs.2", "head")])
        assert relative(new(x), model(x)) < 1e-5

    @pytest.mark.parametrize("bend", [nn.ReLU6(), nn.GELU(), nn.Sigmoid()])
    def test_other_bends_break_it(self, bend):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), bend, nn.Linear(7, 3))
        model[0].weight.data *= torch.logspace(-2, 2, 7)[:, None]
        new = quantize.equalize(model, [("0", "2")])
        x = drawn(0, 9, 5)
        assert relative(new(x), model(x)) > 0.01

    def test_it_helps_one_grid_for_the_tensor(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        by = torch.logspace(-2, 2, 32)
        model[0].weight.data *= by[:, None]
        model[0].bias.data *= by
        model[2].weight.data /= by
        x = drawn(0, 50, 16)

        def error(model):
            new = deepcopy(model)
            for layer in (new[0], new[2]):
                code = quantize.min_max(layer.weight, bits=8, each="tensor")
                layer.weight.data = code.decode()
            return relative(new(x), model(x))

        assert error(quantize.equalize(model, [("0", "2")])) < 0.02
        assert error(model) > 0.1

    def test_dead_channels_stay(self):
        W1, W2 = drawn(0, 3, 4), drawn(1, 2, 3)
        W1[0], W2[:, 1] = 0, 0
        A, b, B = quantize.equalized(W1, torch.ones(3), W2)
        assert torch.equal(A[:2], W1[:2])
        assert torch.equal(B[:, :2], W2[:, :2])
        assert b[:2].tolist() == [1, 1]

    def test_the_model_stays(self):
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
        before = deepcopy(model.state_dict())
        quantize.equalize(model, [("0", "2")])
        for name, t in model.state_dict().items():
            assert torch.equal(t, before[name])

    def test_errors(self):
        with pytest.raises(ValueError, match=r"W2 \(2, 5\) with groups=1"):
            quantize.equalized(torch.ones(3, 2), None, torch.ones(2, 5))
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        with pytest.raises(ValueError, match=r"1 is no nn.Linear"):
            quantize.equalize(model, [("0", "1")])


class TestBiasCorrection:
    def rounded(self, model):
        new = deepcopy(model)
        for layer in calibrate.layers(new).values():
            code = quantize.min_max(layer.weight, bits=2)
            layer.weight.data = code.decode()
        return new

    @pytest.mark.parametrize(
        "layer",
        [
            nn.Linear(5, 3),
            nn.Linear(5, 3, bias=False),
            nn.Conv2d(4, 6, 3, padding=1),
            nn.Conv2d(4, 6, 3, padding=1, groups=2, stride=2),
        ],
    )
    def test_the_mean_error_is_zero(self, layer):
        linear = isinstance(layer, nn.Linear)
        layer.weight.data = drawn(1, *layer.weight.shape)
        x = drawn(0, *((64, 5) if linear else (8, 4, 7, 7))) + 1
        stats = calibrate.inputs(layer, [x])
        new = self.rounded(layer)
        fixed = quantize.correct_biases(layer, new, stats)
        axes = 0 if linear else (0, 2, 3)
        error = (fixed(x) - layer(x)).mean(axes).abs().max()
        assert error < 1e-5
        assert (new(x) - layer(x)).mean(axes).abs().max() > 0.05
        assert torch.equal(fixed.weight, new.weight)

    def test_without_an_error_nothing_changes(self):
        model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
        stats = calibrate.inputs(model, [drawn(0, 8, 4)])
        new = quantize.correct_biases(model, model, stats)
        assert new[0].bias is None
        assert torch.equal(new[1].bias, model[1].bias)

    def test_tied_weights_stay_tied(self):
        model = models.LM(vocab=9, width=8, layers=1, heads=2, ff=8, context=4)
        ids = torch.tensor([[1, 2, 3]])
        stats = calibrate.inputs(model, [ids])
        new = quantize.correct_biases(model, self.rounded(model), stats)
        assert new.head.weight is new.tokens.weight

    def test_errors(self):
        with pytest.raises(ValueError, match=r"mean \(3,\) do not fit"):
            quantize.correct_bias(
                torch.ones(2, 2), torch.ones(2, 2), torch.ones(3)
            )


def test_modules_that_run_twice_are_not_readers():
    twice = nn.Linear(2, 2)
    model = nn.Sequential(twice, twice, nn.ReLU())
    find = partial(folding.readers, model, torch.ones(1, 2))
    assert find((nn.Linear,), (nn.ReLU,)) == {}
