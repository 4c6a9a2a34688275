"""Channels removed by us and by Torch-Pruning, and what it buys.

Torch-Pruning changes the model that it gets.  Ours leaves it as it is, and
runs the result beside the masked model before it returns it; so the time of
the peer is that of pruning a copy.

With half of the channels norms and pooling still take half of their time, not
a quarter.  They count for less where images lie with their channels last (max
pooling is faster then) and in wide networks.  The goals are the same for all,
and the narrow CNN of the zoo misses that at batch 32.
"""

import warnings
from copy import deepcopy

import torch
from torch import Tensor, nn

from minicompress import measure, models, prune, storage, zoo

from ..shapes import SHAPES, example, randomized
from .harness import Missing, Row, peer, skipped, times

PEER = "Torch-Pruning"
RESNETS = {
    "ResNet-20": models.ResNet((16, 32, 64), blocks=3, inputs=3),
    "ResNet-18 widths": models.ResNet((64, 128, 256, 512), blocks=2, inputs=3),
}
CNNS = (16, 32)  # filters of the first layer: the zoo's, and twice as wide
LAYOUTS = [  # batch, layout, the most of the dense time
    (1, torch.contiguous_format, 0.6),
    (32, torch.contiguous_format, 0.4),
    (32, torch.channels_last, 0.4),
]
COPY = f"{PEER} on a copy"
TIME, MACS, EXACT = f"<= 3x {COPY}", f"= {PEER} +- 1 %", "<= 1e-5 of the output"


def rows():
    torch.manual_seed(0)
    try:
        tp = peer("torch_pruning")
    except Missing as missing:
        tp = missing
    for name, model in RESNETS.items():
        what = f"half of the channels of {name}, 3 x 32 x 32"
        model = randomized(model).float()
        yield from resnet_rows(tp, what, model, torch.randn(1, 3, 32, 32))
    yield shapes_row(tp)
    for width in CNNS:
        yield from cnn_rows([width * 2**i for i in range(4)])
    yield from language_rows()


def halves(groups, model: nn.Module) -> dict[str, Tensor]:
    """Keep the half of each group whose rows have the largest L1 norms."""
    sizes = prune.filter_norms(model, groups)
    return prune.keep_units(groups, sizes, sparsity=0.5, select=prune.keep_each)


def smaller(model: nn.Module, x: Tensor) -> nn.Module:
    return prune.remove_channels(
        model, halves(prune.groups(model, x), model), x
    )


def peers_smaller(tp, model: nn.Module, x: Tensor) -> nn.Module:
    model = deepcopy(model)
    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    importance = tp.importance.GroupMagnitudeImportance(
        p=1, group_reduction="sum", normalizer=None
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tp.pruner.BasePruner(
            model, x, importance, pruning_ratio=0.5, ignored_layers=last[-1:]
        ).step()
    return model


def peers_removed(tp, model: nn.Module, keep, x: Tensor) -> nn.Module:
    """Remove the same channels as ours with the peer's graph."""
    model = deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(model, x)
    for name, mask in keep.items():
        gone = (~mask).nonzero()[:, 0].tolist()
        layer = model.get_submodule(name)
        graph.get_pruning_group(layer, tp.prune_conv_out_channels, gone).prune()
    return model


def resnet_rows(tp, what: str, model: nn.Module, x: Tensor):
    small = smaller(model, x)
    a = measure.macs(small, x)
    keep = halves(prune.groups(model, x), model)
    masked = prune.mask_channels(model, keep, x)
    error = deviation(small, masked, x)
    if isinstance(tp, Missing):
        for end, goal in (("", TIME), (", MACs", MACS)):
            yield skipped(what + end, goal, tp)
        theirs = str(tp)
    else:
        f, g = (
            lambda: smaller(model, x),
            lambda: peers_smaller(tp, model, x),
        )
        yield time_row(what, *times(f, g, runs=25), 3, COPY)
        b = measure.macs(g(), x)
        met = abs(a / b - 1) <= 0.01
        yield Row(f"{what}, MACs", f"{a:,}", f"{b:,}", a / b, MACS, met)
        theirs = deviation(peers_removed(tp, model, keep, x), masked, x)
        theirs = f"{PEER} with the same channels {theirs:.1e}"
    yield Row(
        f"{what}, error against the masked network",
        f"{error:.1e}, {theirs}",
        "",
        None,
        EXACT,
        error <= 1e-5,
    )


def deviation(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    x = torch.randn_like(x) if x.is_floating_point() else x
    with torch.inference_mode():
        a, b = model.eval()(x), other.eval()(x)
    return ((a - b).abs().max() / b.abs().max()).item()


def shapes_row(tp) -> Row:
    """Count the test networks that still run with half of each group."""
    what = "networks of tests/shapes.py that run when halved"
    goal = "= all, equal to the masked ones"
    ours = [n for n in SHAPES if exact(*example(n))]
    if isinstance(tp, Missing):
        return skipped(what, goal, tp)
    theirs = [n for n in SHAPES if runs(tp, *example(n))]
    failed = ", ".join(n for n in SHAPES if n not in theirs)
    return Row(
        what,
        f"{len(ours)} of {len(SHAPES)}",
        f"{PEER} {len(theirs)}, without {failed}",
        len(ours) / len(theirs),
        goal,
        len(ours) == len(SHAPES),
    )


def exact(model: nn.Module, x: Tensor) -> bool:
    keep = halves(prune.groups(model, x), model)
    small = prune.remove_channels(model, keep, x)
    return deviation(small, prune.mask_channels(model, keep, x), x) <= 1e-5


def runs(tp, model: nn.Module, x: Tensor) -> bool:
    shape = model(x).shape
    try:
        return peers_smaller(tp, model, x)(x).shape == shape
    except (RuntimeError, IndexError):
        return False


def cnn_rows(channels: list[int]):
    """Time a CNN, its half, and as many zeros somewhere in its weights."""
    model = models.CNN(channels=channels, classes=36).eval()
    x = torch.randn(32, 1, 28, 28)
    small = smaller(model, x[:1])
    for net in (model, small):
        assert measure.macs(net, x) == closed_form(net)
    again = storage.loads(storage.dumps(small))
    assert torch.equal(again(x), small(x))
    part = measure.macs(small, x) / measure.macs(model, x)
    half = f"half of the channels ({part:.1%} of the MACs)"
    share = measure.params(small) / measure.params(model)
    zeros = deepcopy(model)
    for layer in (*zeros.convs, zeros.head):
        w = layer.weight.data
        w *= prune.magnitude(w, sparsity=1 - share)
    nets = {"dense": model, half: small, f"{1 - share:.1%} zeros": zeros}
    name = "CNN " + "-".join(map(str, channels))
    for batch, layout, most in LAYOUTS:
        y = x[:batch].to(memory_format=layout)
        calls = {}
        for what, net in nets.items():
            net = deepcopy(net).to(memory_format=layout)
            calls[what] = lambda net=net, y=y: net(y)
        t = {k: v.median for k, v in measure.compare(calls, repeats=50).items()}
        last = ", channels last" * (layout is torch.channels_last)
        dense, pruned, silent = t.values()
        _, _, masked = t
        what = f"{name}, batch {batch}{last}"
        than = "the dense time"
        yield time_row(f"{what}, {half}", pruned, dense, most, than)
        yield Row(
            f"{what}, {masked}",
            f"{1e3 * silent:.2f} ms",
            f"{1e3 * dense:.2f} ms",
            silent / dense,
            f">= 0.9x {than}: no gain",
            silent >= 0.9 * dense,
        )


def closed_form(model: models.CNN) -> int:
    side, total = 28, model.head.weight.numel()
    for conv in model.convs:
        total += side**2 * conv.weight.numel()
        side //= 2
    return total


def language_rows():
    """Remove half of the heads and of the hidden units, not of the width."""
    model = zoo.load("reference-lm").eval()
    x = torch.randint(0, 97, (8, 128))
    groups = [g for g in prune.groups(model, x) if g.name != "tokens"]
    keep = halves(groups, model)
    small = prune.remove_channels(model, keep, x)
    for net in (model, small):
        assert measure.macs(net, x) == language_macs(net, 128)
    again = storage.loads(storage.dumps(small))
    assert torch.equal(again(x), small(x))
    t = measure.compare({"small": lambda: small(x), "all": lambda: model(x)})
    part = measure.macs(small, x) / measure.macs(model, x)
    what = "reference-lm, half of the heads and hidden units"
    yield time_row(
        f"{what} ({part:.1%} of the MACs), 8 x 128 tokens",
        t["small"].median,
        t["all"].median,
        0.7,
        "the dense time",
    )
    error = deviation(small, prune.mask_channels(model, keep, x), x)
    yield Row(
        f"{what}, error against the masked network",
        f"{error:.1e}",
        "",
        None,
        EXACT,
        error <= 1e-5,
    )


def language_macs(model: models.LM, tokens: int) -> int:
    total = tokens * model.head.weight.numel()
    for block in model.blocks:
        a = block.attention
        layers = (a.q, a.k, a.v, a.out, block.up, block.down)
        total += tokens * sum(layer.weight.numel() for layer in layers)
        total += 2 * tokens**2 * a.q.out_features  # q by k, weights by v
    return total


def time_row(what: str, a: float, b: float, most: float, than: str) -> Row:
    return Row(
        what,
        f"{1e3 * a:.2f} ms",
        f"{1e3 * b:.2f} ms",
        a / b,
        f"<= {most:g}x {than}",
        a <= most * b,
    )
