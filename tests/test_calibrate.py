"""Statistics of layer inputs against direct computation."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import calibrate


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def batches(*sizes, n=5):
    torch.manual_seed(1)
    return [torch.randn(size, n) for size in sizes]


def test_statistics_of_a_linear_layer():
    model, data = mlp(), batches(4, 1, 6)
    stats = calibrate.inputs(model, data)
    assert list(stats) == ["0.weight", "2.weight"]
    X = F.relu(model[0](torch.cat(data))).detach().double()
    s = stats["2.weight"]
    assert s.count == 11
    torch.testing.assert_close(s.gram, X.T @ X, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(s.H, X.T @ X / 11, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(s.norm, X.norm(dim=0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(s.mean, X.mean(0))
    torch.testing.assert_close(s.mean_abs, X.abs().mean(0))
    assert torch.equal(s.low.double(), X.amin(0))
    assert torch.equal(s.high.double(), X.amax(0))
    assert repr(s) == "Stats(11 samples of 7 inputs)"


def test_leading_dimensions_are_samples():
    model = nn.Sequential(nn.Linear(5, 2))
    x = torch.randn(3, 4, 5)
    s = calibrate.inputs(model, [x])["0.weight"]
    flat = calibrate.inputs(model, [x.reshape(12, 5)])["0.weight"]
    assert s.count == 12
    assert torch.equal(s.gram, flat.gram)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=2),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"),
        nn.Conv2d(4, 6, (1, 4), padding="same"),
        nn.Conv2d(4, 6, 3, groups=2, padding=1),
        nn.Conv2d(4, 8, 3, groups=4, padding_mode="reflect", padding=1),
    ],
)
def test_a_convolution_is_a_product_with_its_samples(conv):
    x = torch.randn(2, 4, 9, 8)
    y = conv(x)
    X = calibrate.samples(conv, x)
    g = conv.groups
    W = conv.weight.reshape(g, conv.out_channels // g, -1)
    X = X if g > 1 else X[None]
    Y = (X @ W.mT).permute(0, 2, 1).flatten(0, 1)  # (out, samples)
    Y = Y.reshape(-1, 2, *y.shape[2:]).transpose(0, 1)
    torch.testing.assert_close(
        Y + conv.bias[:, None, None], y, rtol=1e-4, atol=1e-5
    )
    s = calibrate.inputs(nn.Sequential(conv), [x])["0.weight"]
    assert s.count == X.shape[1]
    torch.testing.assert_close(
        s.gram.reshape(g, *s.gram.shape[-2:]),
        X.double().mT @ X.double(),
        rtol=1e-4,
        atol=1e-3,
    )
    assert s.norm.shape == s.low.shape == X.mean(1).squeeze(0).shape


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 20))
def test_how_the_data_are_cut_does_not_matter(sizes, rows):
    model = nn.Sequential(nn.Linear(5, 2))
    data = batches(*sizes)
    if not sum(sizes):
        with pytest.warns(UserWarning, match="0.weight"):
            assert calibrate.inputs(model, data) == {}
        return
    cut = calibrate.inputs(model, data, rows=rows)["0.weight"]
    whole = calibrate.inputs(model, [torch.cat(data)], rows=rows)["0.weight"]
    assert cut.count == whole.count == sum(sizes)
    torch.testing.assert_close(cut.gram, whole.gram, rtol=1e-5, atol=1e-5)
    assert torch.equal(cut.high, whole.high)
    assert torch.equal(cut.sample.sort(0).values, whole.sample.sort(0).values)
    assert len(cut.sample) == min(rows, sum(sizes))


def test_the_sample_is_drawn_evenly_from_all_batches():
    model = nn.Sequential(nn.Linear(1, 1))
    data = [torch.full((500, 1), float(i)) for i in range(4)]
    s = calibrate.inputs(model, data, rows=400)["0.weight"]
    shares = torch.stack([(s.sample == i).sum() for i in range(4)])
    # hypergeometric: 100 expected of each, standard deviation 7.7
    assert (shares - 100).abs().max() < 5 * 7.7


def test_float32_sums_do_not_drift():
    model = nn.Sequential(nn.Linear(1, 1))
    data = [torch.full((1, 1), 1e4)] + [torch.ones(1, 1)] * 100
    s = calibrate.inputs(model, data)["0.weight"]
    assert s.gram.item() == 1e8 + 100  # float32 alone would give 1e8


def test_the_model_is_left_as_it_was():
    model = mlp()
    model.insert(1, nn.Dropout())
    model.train()
    model[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    a = calibrate.inputs(model, batches(4))
    b = calibrate.inputs(model, batches(4))
    assert torch.equal(a["3.weight"].gram, b["3.weight"].gram)  # no dropout
    assert model.training
    assert model[1].training
    assert not model[0].training
    assert not any(m._forward_pre_hooks for m in model.modules())
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k])
    assert not a["0.weight"].sample.requires_grad


def test_hooks_are_removed_after_an_error():
    model = mlp().train()
    with pytest.raises(RuntimeError):
        calibrate.inputs(model, [torch.randn(2, 5), torch.randn(2, 6)])
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_layers_that_are_never_called_are_named():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.warns(UserWarning, match="self_attn.out_proj.weight"):
        stats = calibrate.inputs(model, [torch.randn(2, 3, 8)])
    assert sorted(stats) == ["linear1.weight", "linear2.weight"]


def test_a_layer_that_occurs_twice_is_recorded_under_both_names():
    layer = nn.Linear(5, 5)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = calibrate.inputs(model, [x])
    assert stats["0.weight"] is stats["2.weight"]
    X = torch.cat([x, layer(x).tanh()]).detach().double()
    torch.testing.assert_close(
        stats["0.weight"].gram, X.T @ X, rtol=1e-5, atol=1e-5
    )


class Shared(nn.Module):
    """Two layers with one weight and biases of their own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize("only", ["", "a", "b"])
def test_layers_that_share_a_weight_are_recorded_together(only):
    model, x = Shared(), torch.randn(4, 5)
    stats = calibrate.inputs(
        model, [x], where=lambda name, w: name.startswith(only)
    )
    assert list(stats) == [f"{n}.weight" for n in only or "ab"]
    X = torch.cat([x, model.a(x).tanh()]).detach().double()
    for s in stats.values():
        assert s.count == 8
        torch.testing.assert_close(s.gram, X.T @ X, rtol=1e-5, atol=1e-5)


def test_sequential_compresses_a_shared_weight_once():
    model, x = Shared(), torch.randn(4, 5)
    seen = []

    def half(name, layer, stats):
        seen.append((name, stats.count))
        return layer.weight / 2

    new = calibrate.sequential(model, [x], half)
    assert seen == [("a.weight", 8)]
    assert torch.equal(new.a.weight, model.a.weight / 2)
    assert new.a.weight is new.b.weight


def test_where_forward_and_tuples():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 2)
            self.b = nn.Linear(3, 3)

        def forward(self, x, y):
            return self.a(input=x), self.b(y)

    data = [(torch.ones(1, 2), torch.ones(4, 3))]
    stats = calibrate.inputs(Two(), data, forward=lambda m, b: m(*b))
    assert [s.count for s in stats.values()] == [1, 4]
    stats = calibrate.inputs(
        Two(),
        data,
        forward=lambda m, b: m(*b),
        where=lambda name, w: name == "b.weight" and w.shape == (3, 3),
    )
    assert list(stats) == ["b.weight"]
    pairs = [(x, torch.zeros(len(x))) for x in batches(2, 3)]
    assert calibrate.inputs(mlp(), pairs)["0.weight"].count == 5
    with pytest.raises(ValueError, match="where"):
        calibrate.inputs(mlp(), pairs, where=lambda name, w: False)


def test_sequential_sees_the_compressed_layers_before():
    model, data = mlp(), batches(8, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = {}

    def compress(name, layer, stats):
        seen[name] = stats
        return layer.weight.round()

    new = calibrate.sequential(model, data, compress)
    X = torch.cat(data)
    hidden = F.relu(F.linear(X, model[0].weight.round(), model[0].bias))
    hidden = hidden.detach().double()
    torch.testing.assert_close(
        seen["2.weight"].gram, hidden.T @ hidden, rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        seen["0.weight"].gram, calibrate.inputs(model, data)["0.weight"].gram
    )
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k])
        want = v.round() if "weight" in k else v
        assert torch.equal(new.state_dict()[k], want)


def test_sequential_goes_by_calls_not_by_names():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(2, 2)
            self.first = nn.Linear(2, 2)

        def forward(self, x):
            return self.last(self.first(x))

    order = []

    class Code:
        def __init__(self, w):
            self.w = w

        def decode(self):
            return self.w

    def compress(name, layer, stats):
        order.append(name)
        return Code(torch.zeros_like(layer.weight))

    new = calibrate.sequential(Backwards(), [torch.ones(1, 2)], compress)
    assert order == ["first.weight", "last.weight"]
    assert not new.first.weight.any()


def test_sequential_names_what_is_wrong():
    model = mlp()
    with pytest.raises(ValueError, match=r"0\.weight: .*\(3,\).*\(7, 5\)"):
        calibrate.sequential(model, batches(2), lambda *_: torch.zeros(3))
    nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(ValueError, match=r"2\.weight.*bake"):
        calibrate.sequential(model, batches(2), lambda n, m, s: m.weight)
