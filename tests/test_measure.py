"""Counts against closed forms, meters against what they must read."""

import itertools
import math
import time
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from minicompress import codes, measure, models, storage, through

# ---- networks of the literature, as small functions


def conv_bn(a, b, k, stride=1, groups=1, relu=True):
    parts = [
        nn.Conv2d(a, b, k, stride, k // 2, groups=groups, bias=False),
        nn.BatchNorm2d(b),
    ]
    return nn.Sequential(*parts, *([nn.ReLU()] if relu else []))


class Residual(nn.Module):
    def __init__(self, body, skip):
        super().__init__()
        self.body, self.skip = body, skip

    def forward(self, x):
        return F.relu(self.body(x) + self.skip(x))


def resnet(blocks, bottleneck):
    """ResNet for 224×224; the 3×3 convolution of a bottleneck strides."""
    stem = [conv_bn(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    layers, a = [], 64
    for stage, n in enumerate(blocks):
        for i in range(n):
            stride = 2 if stage and not i else 1
            w = 64 << stage
            b = 4 * w if bottleneck else w
            if bottleneck:
                body = nn.Sequential(
                    conv_bn(a, w, 1),
                    conv_bn(w, w, 3, stride),
                    conv_bn(w, b, 1, relu=False),
                )
            else:
                body = nn.Sequential(
                    conv_bn(a, w, 3, stride), conv_bn(w, b, 3, relu=False)
                )
            same = a == b and stride == 1
            skip = nn.Identity() if same else conv_bn(a, b, 1, stride, 1, False)
            layers.append(Residual(body, skip))
            a = b
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(a, 1000)]
    return nn.Sequential(*stem, *layers, *head)


def mobilenet(separable=True):
    """MobileNetV1 1.0-224, or its version with full convolutions."""
    plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)]
    plan += [(512, 1)] * 5 + [(1024, 2), (1024, 1)]
    layers, a = [conv_bn(3, 32, 3, 2)], 32
    for b, stride in plan:
        if separable:
            layers += [conv_bn(a, a, 3, stride, groups=a), conv_bn(a, b, 1)]
        else:
            layers += [conv_bn(a, b, 3, stride)]
        a = b
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000)]
    return nn.Sequential(*layers, *head)


def on_meta(make, *args):
    with torch.device("meta"):
        return make(*args)


IMAGE = (1, 3, 224, 224)


@pytest.mark.parametrize(
    ("make", "shape", "params", "macs"),
    [
        (models.lenet_300_100, (1, 784), 266_610, 266_200),
        (models.LeNet5, (1, 1, 28, 28), 431_080, 2_293_000),
        (lambda: resnet((2, 2, 2, 2), False), IMAGE, 11_689_512, 1_814_073_344),
        (lambda: resnet((3, 4, 6, 3), False), IMAGE, 21_797_672, 3_663_761_408),
        (lambda: resnet((3, 4, 6, 3), True), IMAGE, 25_557_032, 4_089_184_256),
        (mobilenet, IMAGE, 4_231_976, 568_740_352),
        (lambda: mobilenet(False), IMAGE, 29_294_088, 4_867_293_184),
        (
            lambda: models.ResNet((16, 32, 64), blocks=3, inputs=3),
            (1, 3, 32, 32),
            272_474,
            # option A counts 40,551,040; B adds two 1×1 projections
            40_551_040 + 16 * 32 * 16 * 16 + 32 * 64 * 8 * 8,
        ),
    ],
    ids=[
        "LeNet-300-100",
        "LeNet-5",
        "ResNet-18",
        "ResNet-34",
        "ResNet-50",
        "MobileNet",
        "full-MobileNet",
        "ResNet-20",
    ],
)
def test_published_counts(make, shape, params, macs):
    model = on_meta(make)
    assert measure.params(model) == params
    assert measure.macs(model, torch.empty(shape)) == macs


def test_a_transformer_is_counted_with_its_attention():
    width, ff, layers, n = 768, 3072, 12, 128
    model = on_meta(models.Encoder)
    ids = torch.zeros(1, n, dtype=torch.long)
    block = n * (4 * width**2 + 2 * width * ff) + 2 * n * n * width
    assert measure.macs(model, ids) == layers * block == 11_173_625_856
    mask = torch.ones(1, n, dtype=torch.bool)
    assert measure.macs(model, ids, mask) == layers * block
    by_layer = measure.macs_by_layer(model, ids)
    assert by_layer["blocks.3.attention"] == 2 * n * n * width
    assert sum(by_layer.values()) == layers * block


def test_a_module_in_two_places_counts_twice_and_keeps_its_weights():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer))
    weight = layer.weight
    assert measure.macs(model, torch.zeros(3, 4)) == 2 * 16
    assert layer.weight is weight
    assert weight.device == torch.device("cpu")
    assert measure.params(model) == 20


def test_a_tied_language_model():
    model = models.LM(vocab=50, width=16, layers=2, heads=2, ff=32, context=8)
    ids = torch.zeros(1, 8, dtype=torch.long)
    block = 8 * (4 * 16**2 + 2 * 16 * 32) + 2 * 8 * 8 * 16
    assert measure.macs(model, ids) == 2 * block + 8 * 16 * 50
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) > len(list(model.parameters()))
    untied = models.LM(
        vocab=50, width=16, layers=2, heads=2, ff=32, context=8, tied=False
    )
    assert measure.params(untied) - measure.params(model) == 50 * 16


@pytest.mark.parametrize(
    ("layer", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)]
)
def test_recurrent_layers_are_counted(layer, gates):
    model = layer(5, 7, num_layers=2, batch_first=True)
    want = 3 * gates * 7 * ((5 + 7) + (7 + 7))
    assert measure.macs(model, torch.zeros(2, 3, 5)) == want


def test_attention_of_torch_is_counted():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    want = 3 * (4 * 8**2 + 2 * 8 * 16) + 2 * 3**2 * 8
    assert measure.macs(layer, torch.zeros(2, 3, 8)) == want


def test_the_batch_is_divided_out_and_the_model_untouched():
    model = models.CNN().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    one = measure.macs(model, torch.zeros(1, 1, 8, 8))
    assert measure.macs(model, torch.zeros(7, 1, 8, 8)) == one
    assert model.training
    for k, v in model.state_dict().items():
        assert v.device.type == "cpu"
        assert torch.equal(v, before[k])
    mask = {"head.weight": torch.zeros(10, 64)}
    new = through.attach(model, mask, lambda w, m: w * m, m=mask)
    assert measure.macs(new, torch.zeros(1, 1, 8, 8)) == one  # zeros count
    with pytest.raises(ValueError, match="multiple of the batch"):
        measure.macs(_Odd(), torch.zeros(2, 3))


class _Odd(nn.Module):
    """Does work that is not a multiple of the batch."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x[:1] @ self.w


class _Looks(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_vectors_are_multiplied_too():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x @ self.w + torch.zeros(1)

    assert measure.macs_by_layer(Vector(), torch.zeros(4, 3)) == {"": 3}


@pytest.mark.parametrize(
    ("model", "inputs", "word"),
    [
        (_Looks(), (torch.zeros(1, 3),), "without values"),
        (_Looks(), (), "inputs"),
        (_Looks(), (3,), "inputs"),
        (_Looks(), (torch.zeros(0, 3),), "empty"),
    ],
)
def test_what_cannot_be_counted_says_so(model, inputs, word):
    with pytest.raises(ValueError, match=word):
        measure.macs(model, *inputs)


def test_parameters_that_share_memory_count_once():
    a, b = nn.Linear(3, 4), nn.Linear(3, 4)
    with torch.no_grad():
        a.weight[0] = 0
    b.weight = nn.Parameter(a.weight.data)  # not the same object
    model = nn.Sequential(a, b, a)
    assert measure.params(model) == 12 + 4 + 4
    assert measure.nonzero(model) == 9 + 4 + 4


# ---- time and memory


def test_latency_reads_what_a_function_takes():
    t = measure.latency(time.sleep, 0.01, repeats=5, warmup=1)
    assert 0.01 <= t.low <= t.median <= t.high
    assert t.repeats == 5
    assert str(t).endswith(")")
    assert " ms (" in str(t)


def test_latency_sets_and_restores():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append((self.training, torch.get_num_threads()))
            assert torch.is_inference_mode_enabled()
            return x

    threads, model = torch.get_num_threads(), Spy()
    measure.latency(model, torch.zeros(1), repeats=2, warmup=3, threads=2)
    assert seen == [(False, 2)] * 5
    assert model.training
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="repeats=0"):
        measure.latency(model, torch.zeros(1), repeats=0)


def test_compare_takes_turns():
    order = []
    measure.compare(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        repeats=3,
        warmup=1,
    )
    assert order == ["a", "b"] * 4


@pytest.mark.parametrize("batch", [1, 16])
def test_peak_memory_of_an_mlp_is_its_closed_form(batch):
    widths = (20, 300, 50, 10)
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    x = torch.zeros(batch, 20)
    # largest when a ReLU reads one tensor and writes another, or a linear
    # layer turns a wide one into a narrow one; the input is not counted
    pairs = [(0, 300), (300, 300), (300, 50), (50, 50), (50, 10), (10, 10)]
    want = 4 * batch * max(a + b for a, b in pairs)
    assert measure.peak_memory(nn.Sequential(*layers), x) == want
    layers = [
        nn.ReLU(inplace=True) if i % 2 else m for i, m in enumerate(layers)
    ]
    want = 4 * batch * (300 + 50)
    assert measure.peak_memory(nn.Sequential(*layers), x) == want


def test_views_and_inputs_take_no_memory():
    x = torch.zeros(100)
    assert measure.peak_memory(lambda: x.view(10, 10).T[2:]) == 0
    assert measure.peak_memory(lambda: x.add_(1)) == 0
    assert measure.peak_memory(lambda: (x + 1).view(10, 10).T) == 400

    def loop():
        for _ in range(5):
            x + 1

    assert measure.peak_memory(loop) == 400


def test_shapes_without_values_take_no_memory():
    def f():
        with torch.device("meta"):
            shapes = nn.Linear(100, 100)
        return deepcopy(shapes), torch.zeros(10) + 1

    assert measure.peak_memory(f) == 2 * 40


def test_a_training_step_keeps_activations_and_checkpoints_do_not():
    layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))
    x = torch.zeros(1024, 64)
    one = 4 * 1024 * 64

    def step(run):
        h = x
        for layer in layers:
            h = run(lambda t, layer=layer: layer(t).tanh().tanh(), h)
        h.sum().backward()
        for p in layers.parameters():
            p.grad = None

    kept = measure.peak_memory(step, lambda f, h: f(h))
    less = measure.peak_memory(
        step, lambda f, h: checkpoint(f, h, use_reentrant=False)
    )
    assert kept >= 8 * 2 * one  # two outputs of tanh in each layer
    # one input for each layer, and the inside of one layer at a time
    assert less < (8 + 5) * one


def test_machine_and_its_roof():
    m = measure.machine(size=128)
    assert m.peak > 0
    assert m.bandwidth > 0
    assert m.threads == 1
    assert measure.roofline(100, 1, peak=10, bandwidth=1) == 10
    assert measure.roofline(1, 100, peak=10, bandwidth=1) == 100
    assert measure.amdahl(1, 4) == 4
    assert measure.amdahl(0.9, math.inf) == pytest.approx(10)
    with pytest.raises(ValueError, match="fraction"):
        measure.amdahl(1.5, 2)


# ---- fidelity


def test_sqnr_of_uniform_rounding_is_six_decibels_a_bit():
    x = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    x = 2 * x - 1
    for bits in (4, 8):
        step = 2 / 2**bits
        got = measure.sqnr(x, ((x / step - 0.5).round() + 0.5) * step)
        assert got == pytest.approx(20 * math.log10(2) * bits, abs=0.02)
    assert measure.sqnr(x, x) == math.inf
    with pytest.raises(ValueError, match="w_hat"):
        measure.sqnr(x, x[1:])


def test_relative_error_is_the_error_of_the_output():
    torch.manual_seed(0)
    W, E, X = torch.randn(4, 6), torch.randn(4, 6), torch.randn(50, 6)
    want = (X @ E.T).norm() / (X @ W.T).norm()
    got = measure.relative_error(W, W + E, X.T @ X / 50)
    assert got == pytest.approx(want.item(), rel=1e-5)
    assert measure.relative_error(W, W, X.T @ X) == 0
    with pytest.raises(ValueError, match="H must"):
        measure.relative_error(W, W, torch.eye(4))


def test_agreement_ignores_the_labels():
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0], [0.0, 9.0]])
    assert measure.agreement(a, a * 7) == 1
    assert measure.agreement(a, -a) == 0
    assert measure.agreement(a, a.flip(0)) == 0
    assert measure.agreement(a, a[[0, 1, 1, 3]]) == 0.75


# ---- reports


def int8(w):
    scale = w.abs().max() / 127
    q = ((w / scale).round() + 128).to(torch.uint8)
    return codes.Affine(codes.Ints(q, 8), scale, 128)


def test_bytes_are_the_length_of_the_file(tmp_path):
    model = models.MLP()
    state = codes.encode(model, int8)
    card = measure.report(model, state, name="int8")
    assert storage.save(tmp_path / "m", model, state) == card.bytes
    assert (tmp_path / "m").stat().st_size == card.bytes
    assert card.bits_per_weight == 8 * card.bytes / 6570
    assert card.bytes < measure.report(model).bytes / 3
    assert card.macs is card.latency is card.quality is None
    small = models.MLP((64, 10))
    assert measure.report(small, like=model).bits_per_weight == (
        8 * measure.report(small).bytes / 6570
    )


def test_what_is_measured_is_what_the_file_holds():
    model = models.MLP()
    state = codes.encode(model, lambda w: codes.sparse(w, w > 0))
    seen = []

    def metric(loaded, batches):
        seen.append(loaded)
        return sum(batches)

    card = measure.report(
        model,
        state,
        example=torch.zeros(2, 64),
        repeats=2,
        batches=[1, 2],
        metric=metric,
    )
    assert card.quality == 3.0
    assert seen[0] is not model
    for name, w in codes.decode(state).items():
        assert torch.equal(seen[0].state_dict()[name], w)
    zeros = sum(int((w <= 0).sum()) for w in model.parameters() if w.ndim > 1)
    biases = sum(int((b == 0).sum()) for b in model.parameters() if b.ndim == 1)
    assert card.nonzero == 6570 - zeros - biases
    assert card.macs == 64 * 64 + 64 * 32 + 32 * 10
    assert card.peak_memory == 2 * 4 * 128
    assert card.latency.repeats == 2
    assert measure.report(model, metric=lambda m: 0.5).quality == 0.5


def test_a_foreign_model_needs_nothing_special():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    card = measure.report(model, example=torch.zeros(1, 4))
    assert (card.params, card.macs) == (23, 18)


def test_report_names_what_is_missing():
    with pytest.raises(ValueError, match="example"):
        measure.report(models.MLP(), repeats=3)
    with pytest.raises(ValueError, match="metric"):
        measure.report(models.MLP(), batches=[])


def test_table_shows_what_was_measured():
    t = measure.Timing(0.00123456, 0.001, 0.002, 10, 1)
    rows = [
        measure.Report("a|b<c", 1000, 1000, 4_096, 32.768, macs=10_000),
        measure.Report("d", 1000, 10, 999, 7.992, quality=0.97512, latency=t),
    ]
    table = measure.table(rows, quality="accuracy")
    assert table.header == (
        "model",
        "params",
        "non-zero",
        "file",
        "bits/weight",
        "MACs",
        "latency",
        "accuracy",
    )
    assert table.rows[0][2:] == (
        "1,000",
        "4.1 kB",
        "32.8",
        "10,000",
        "–",
        "–",
    )
    assert table.rows[1][2:] == (
        "10",
        "999 B",
        "7.99",
        "–",
        "1.23 ms",
        "0.975",
    )
    assert "a|b<c" in str(table)
    assert "a\\|b<c" in table._repr_markdown_()
    assert "a|b&lt;c" in table._repr_html_()
    assert table._repr_markdown_().count("\n") == 3
    assert table._repr_html_().count("<tr>") == 3
    assert len({len(line) for line in str(table).split("\n")}) == 1
    alone = measure.table(rows[:1])
    assert alone.header == ("model", "params", "file", "bits/weight", "MACs")
