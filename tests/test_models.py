"""Models against published counts, closed forms and a plain numpy twin."""

import copy
import json
import math
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minicompress import models
from minicompress.models import CNN, LM, MLP, Encoder, LeNet5, ResNet, build

TINY = [
    (MLP, {"widths": (6, 5, 3)}, (2, 6)),
    (LeNet5, {"classes": 7}, (2, 1, 28, 28)),
    (CNN, {"channels": (4, 6), "classes": 3, "inputs": 2}, (2, 2, 8, 8)),
    (ResNet, {"channels": (4, 6), "blocks": 2, "classes": 3}, (2, 1, 8, 8)),
    (LM, {"vocab": 11, "width": 8, "layers": 2, "heads": 2, "ff": 12}, None),
    (LM, {"vocab": 11, "width": 8, "heads": 2, "tied": False}, None),
    (Encoder, {"vocab": 11, "width": 8, "layers": 2, "heads": 2}, None),
    (Encoder, {"vocab": 11, "width": 8, "heads": 4, "pooler": True}, None),
]
IDS = [f"{kind.__name__}-{i}" for i, (kind, _, _) in enumerate(TINY)]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def ids(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(11, shape, generator=generator)


def example(shape) -> torch.Tensor:
    torch.manual_seed(0)
    return ids(2, 7) if shape is None else torch.randn(shape)


def macs(model: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2


# ---- sizes that others have published


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (models.lenet_300_100, 266_610),
        (LeNet5, 431_080),
        (lambda: ResNet((16, 32, 64), blocks=3, inputs=3), 272_474),
        (lambda: ResNet((16, 32, 64), blocks=18, inputs=3), 1_730_714),
        (lambda: LM(50257, 768, 12, 12, 3072, 1024), 124_439_808),
        (lambda: Encoder(pooler=True), 109_482_240),
        (lambda: Encoder(vocab=28996, pooler=True), 108_310_272),
        (
            lambda: Encoder(
                width=1024, layers=24, heads=16, ff=4096, pooler=True
            ),
            335_141_888,
        ),
        (
            lambda: Encoder(
                width=312, layers=4, heads=12, ff=1200, pooler=True
            ),
            14_350_248,
        ),
        # DistilBERT has no table of types
        (lambda: Encoder(layers=6, types=1), 66_362_880 + 768),
    ],
)
def test_parameter_count_is_the_published_one(make, count):
    with torch.device("meta"):
        assert parameters(make()) == count


def test_macs_are_the_published_ones():
    with torch.device("meta"):
        lenet, image = LeNet5(), torch.empty(1, 1, 28, 28)
        assert macs(lenet, image) == 2_293_000
        assert macs(models.lenet_300_100(), image) == 266_200
        resnet = ResNet((16, 32, 64), blocks=3, inputs=3)
        projections = 16 * 32 * 16**2 + 32 * 64 * 8**2
        image = torch.empty(1, 3, 32, 32)
        assert macs(resnet, image) == 40_551_040 + projections
        tokens = torch.zeros(1, 128, dtype=torch.long)
        per_token = 12 * 768**2 + 2 * 128 * 768
        assert macs(Encoder(), tokens) == 12 * 128 * per_token


def test_block_of_bert_base_has_the_published_size():
    with torch.device("meta"):
        assert parameters(Encoder(layers=1).blocks[0]) == 7_087_872


@pytest.mark.parametrize("tied", [True, False])
def test_tied_table_is_counted_once(tied):
    model = LM(vocab=11, width=8, heads=2, tied=tied)
    assert (model.head.weight is model.tokens.weight) == tied
    twin = LM(vocab=11, width=8, heads=2, tied=not tied)
    difference = parameters(twin) - parameters(model)
    assert difference == (88 if tied else -88)


# ---- configurations


@pytest.mark.parametrize(("kind", "config", "shape"), TINY, ids=IDS)
def test_model_is_rebuilt_from_json(kind, config, shape):
    model = kind(**config)
    text = json.dumps(model.config)
    assert json.loads(text) == model.config
    twin = build(kind.__name__, json.loads(text))
    assert type(twin) is kind and twin.config == model.config
    twin.load_state_dict(model.state_dict())
    x = example(shape)
    assert torch.equal(twin.eval()(x), model.eval()(x))


@pytest.mark.parametrize(("kind", "config", "shape"), TINY, ids=IDS)
def test_meta_model_has_the_same_shapes_and_output(kind, config, shape):
    real = kind(**config).eval()
    with torch.device("meta"):
        model = kind(**config).eval()
    assert all(t.is_meta for t in model.state_dict().values())
    have = {n: (t.shape, t.dtype) for n, t in model.state_dict().items()}
    want = {n: (t.shape, t.dtype) for n, t in real.state_dict().items()}
    assert have == want
    x = example(shape)
    assert model(x.to("meta")).shape == real(x).shape


@pytest.mark.parametrize(("kind", "config", "shape"), TINY, ids=IDS)
def test_all_weights_get_gradients(kind, config, shape):
    model = kind(**config)
    out = model(example(shape))
    out = model.pool(out) if config.get("pooler") else out
    out.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0 or name.endswith("k.bias"), name


@pytest.mark.parametrize(
    ("name", "config", "word"),
    [
        ("Mlp", {}, "name"),
        (["MLP"], {}, "name"),
        ("MLP", [64, 10], "config"),
        ("MLP", {"width": [4, 2]}, "width"),
        ("MLP", {"widths": [4]}, "widths"),
        ("MLP", {"widths": []}, "widths"),
        ("MLP", {"widths": 4}, "widths"),
        ("MLP", {"widths": [4, 0]}, "widths"),
        ("MLP", {"widths": [4, 2.0]}, "widths"),
        ("MLP", {"widths": [4, True]}, "widths"),
        ("MLP", {"widths": [4, 2**24 + 1]}, "widths"),
        ("MLP", {"widths": [4] * 129}, "widths"),
        ("LeNet5", {"classes": "10"}, "classes"),
        ("LeNet5", {"classes": -1}, "classes"),
        ("CNN", {"channels": "34"}, "channels"),
        ("ResNet", {"blocks": 129}, "blocks"),
        ("ResNet", {"channels": [4] * 100, "blocks": 100}, "blocks"),
        ("LM", {}, "vocab"),
        ("LM", {"vocab": 5, "layers": 129}, "layers"),
        ("LM", {"vocab": 5, "width": 10, "heads": 3}, "heads"),
        ("LM", {"vocab": 5, "tied": 1}, "tied"),
        ("Encoder", {"vocab": None}, "vocab"),
        ("Encoder", {"positions": 2**40}, "positions"),
        ("Encoder", {"self": 1}, "self"),
    ],
)
def test_wrong_configuration_is_named(name, config, word):
    with torch.device("meta"), pytest.raises(ValueError, match=word):
        build(name, config)


def test_largest_models_build_fast_without_memory():
    most = {"layers": 128, "width": 2**24, "ff": 2**24}
    began = time.process_time()
    with torch.device("meta"):
        build("LM", {"vocab": 2**24, "context": 2**24, **most})
        build("ResNet", {"channels": [2**24] * 128})
        build("MLP", {"widths": [2**24] * 128})
    assert time.process_time() - began < 5


# ---- what the networks compute


def test_images_may_come_flat_or_gray():
    x = torch.rand(3, 1, 8, 8)
    model = CNN(channels=(4, 5)).eval()
    want = model(x)
    assert torch.equal(model(x.flatten(1)), want)
    assert torch.equal(model(x.squeeze(1)), want)
    with pytest.raises(ValueError, match="65 pixels"):
        model(torch.zeros(3, 65))


def test_lenet5_is_linear_in_front_of_its_pooling():
    # without ReLU after a convolution, doubling the input doubles the first
    # layers (their biases set to zero), whatever the sign
    model = LeNet5()
    for layer in (model.conv1, model.conv2, model.fc1):
        nn.init.zeros_(layer.bias)
    x = torch.randn(2, 28, 28)
    seen = []
    model.fc1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model(x), model(2 * x)
    torch.testing.assert_close(2 * seen[0][0], seen[1][0])
    assert (seen[0][0] < 0).any()


def test_residual_block_without_its_branch_is_the_shortcut():
    model = ResNet((4,), blocks=1).eval()
    block = model.blocks[0]
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 4, 8, 8)  # not negative: the last ReLU changes nothing
    assert torch.equal(block(x), x)


def test_later_tokens_do_not_change_earlier_logits():
    torch.manual_seed(0)
    model = LM(vocab=11, width=16, layers=2, heads=4, ff=20).double().eval()
    a, b = ids(3, 9), ids(3, 9)
    b[:, 5] = (b[:, 5] + 1) % 11
    before, after = model(a), model(b)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax((0, 2)).min() > 1e-6


def test_earlier_tokens_do_change_later_logits():
    model = LM(vocab=11, width=16, layers=2, heads=4, ff=20).double().eval()
    a, b = ids(3, 9), ids(3, 9)
    b[:, 0] = (b[:, 0] + 1) % 11
    assert (model(a) - model(b)).abs().amax((0, 2)).min() > 1e-9


def test_padding_does_not_change_the_tokens():
    torch.manual_seed(0)
    model = Encoder(vocab=11, width=16, layers=2, heads=4, ff=20)
    model = model.double().eval()
    x = ids(3, 9)
    mask = torch.arange(9) < torch.tensor([[9], [5], [1]])
    other = torch.where(mask, x, (x + 3) % 11)
    torch.testing.assert_close(model(x, mask)[mask], model(other, mask)[mask])
    assert not torch.allclose(model(x)[mask], model(other)[mask])
    short = model(x[1:2, :5])  # the same tokens without any padding
    torch.testing.assert_close(model(x, mask)[1:2, :5], short)


def test_encoder_looks_both_ways_and_at_the_types():
    model = Encoder(vocab=11, width=16, layers=2, heads=4, ff=20).double()
    a, b = ids(1, 9), ids(1, 9)
    b[:, 8] = (b[:, 8] + 1) % 11
    assert not torch.allclose(model(a)[:, 0], model(b)[:, 0])
    zero = torch.zeros_like(a)
    assert torch.equal(model(a), model(a, types=zero))
    assert not torch.allclose(model(a), model(a, types=zero + 1))


def test_too_long_a_text_is_named():
    for model in (LM(11, 8, context=4), Encoder(11, 8, 1, 2, positions=4)):
        assert model(ids(2, 4)).shape[1] == 4
        with pytest.raises(ValueError, match=r"5 tokens.*4"):
            model(ids(2, 5))


def test_pool_needs_a_pooler():
    with pytest.raises(ValueError, match="pooler"):
        Encoder(11, 8, 1, 2).pool(torch.zeros(1, 3, 8))


# ---- a second implementation, one token and one head at a time


def norm(x, layer):
    mean, var = x.mean(), x.var()
    scale = (x - mean) / np.sqrt(var + layer.eps)
    return scale * layer.weight.numpy() + layer.bias.numpy()


def linear(x, layer):
    return layer.weight.numpy() @ x + layer.bias.numpy()


def attend(x, layer, causal):
    """Attention over a list of vectors, by loops."""
    q, k, v = ([linear(t, f) for t in x] for f in (layer.q, layer.k, layer.v))
    d, heads = layer.head_dim, len(q[0]) // layer.head_dim
    out = []
    for i in range(len(x)):
        seen = range(i + 1) if causal else range(len(x))
        parts = []
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            score = [q[i][part] @ k[j][part] / math.sqrt(d) for j in seen]
            weight = np.exp(score) / np.exp(score).sum()
            parts.append(
                sum(w * v[j][part] for w, j in zip(weight, seen, strict=True))
            )
        out.append(linear(np.concatenate(parts), layer.out))
    return out


def mlp(x, block):
    hidden = linear(x, block.up)
    erf = np.array([math.erf(h / math.sqrt(2)) for h in hidden])
    return linear(hidden * (1 + erf) / 2, block.down)


def shaken(model):
    """Move the weights away from the zeros and ones of a fresh model."""
    torch.manual_seed(1)
    model = model.double().eval().requires_grad_(False)
    for p in model.parameters():
        p += 0.3 * torch.randn_like(p)
    return model


def test_lm_equals_the_loops():
    model = shaken(LM(11, 8, layers=2, heads=2, ff=12, context=6))
    x = ids(1, 6)
    h = [
        (model.tokens.weight[t] + model.positions.weight[i]).numpy()
        for i, t in enumerate(x[0])
    ]
    for block in model.blocks:
        a = attend([norm(t, block.norm1) for t in h], block.attention, True)
        h = [t + u for t, u in zip(h, a, strict=True)]
        h = [t + mlp(norm(t, block.norm2), block) for t in h]
    want = [model.tokens.weight.numpy() @ norm(t, model.norm) for t in h]
    np.testing.assert_allclose(model(x)[0], want, rtol=1e-10, atol=1e-10)


def test_encoder_equals_the_loops():
    model = shaken(Encoder(11, 8, layers=2, heads=2, ff=12, positions=6))
    x, types = ids(1, 6), torch.tensor([[0, 0, 1, 1, 1, 0]])
    e = model.tokens(x) + model.positions.weight + model.types(types)
    h = [norm(t, model.norm) for t in e[0].numpy()]
    for block in model.blocks:
        a = attend(h, block.attention, False)
        h = [norm(t + u, block.norm1) for t, u in zip(h, a, strict=True)]
        h = [norm(t + mlp(t, block), block.norm2) for t in h]
    got = model(x, types=types)[0]
    np.testing.assert_allclose(got, h, rtol=1e-10, atol=1e-10)


# ---- transformed models run: widths are read from the layers


def test_removing_a_head_equals_silencing_it():
    model = shaken(LM(11, 12, layers=2, heads=3, ff=16))
    silent, small = copy.deepcopy(model), copy.deepcopy(model)
    rows = torch.arange(12) // 4 != 1  # without the second head
    silent.blocks[0].attention.out.weight[:, ~rows] = 0
    attention = small.blocks[0].attention
    for name in "qkv":
        layer = getattr(attention, name)
        new = nn.Linear(12, 8).double().requires_grad_(False)
        new.weight[:], new.bias[:] = layer.weight[rows], layer.bias[rows]
        setattr(attention, name, new)
    attention.out.weight = nn.Parameter(attention.out.weight[:, rows])
    x = ids(2, 9)
    torch.testing.assert_close(small(x), silent(x))
    assert not torch.allclose(model(x), small(x))


def test_models_run_with_factors_and_without_a_block():
    model = LM(11, 8, layers=3, heads=2, ff=12)
    for block in model.blocks:
        block.attention.q = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8))
        block.up, block.down = nn.Linear(8, 5), nn.Linear(5, 8)
    del model.blocks[1]
    assert model(ids(2, 9)).shape == (2, 9, 11)
    cnn = CNN(channels=(4, 6, 8))
    cnn.convs[0], cnn.norms[0] = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)
    cnn.convs[1] = nn.Conv2d(3, 6, 3, padding=1)
    assert cnn(torch.rand(2, 1, 12, 12)).shape == (2, 10)
