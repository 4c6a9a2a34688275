"""Networks with the same function as a pre-norm language model.

`loud` and `principal` give it outliers; `prepared` takes outliers away, in
the ways that are published.  All of them change nothing but rounding errors.
"""

from copy import deepcopy

import torch
from torch import nn

from minicompress import calibrate, prune, quantize

LOUD, TIMES = (5, 77), 50  # channels, and how much larger they become
WAYS = ("plain", "smooth", "folded", "rotated", "rotated, all")


def body(name, w):
    return name.startswith("blocks")


def pairs(model, ids):
    """List the norms of the blocks, and the layers that read them."""
    found = quantize.norm_readers(model, ids)
    return [(n, readers) for n, readers in found if n.startswith("blocks")]


def loud(model, ids):
    """Make two channels behind every norm larger; what reads them, smaller."""
    s = torch.ones(model.tokens.embedding_dim)
    s[list(LOUD)] = 1 / TIMES
    for norm, readers in pairs(model, ids):
        model = quantize.move_scales(model, norm, readers, s)
    return model


def principal(model, batches):
    """Rotate the stream to its principal components: few large channels."""
    plain = folded(model)
    return prune.rotated(plain, prune.principal(plain, batches)[1])


def loud_keys(model, channel=3):
    """Make a channel of the keys of every head larger, and q smaller."""
    model = deepcopy(model)
    with torch.no_grad():
        for block in model.blocks:
            a = block.attention
            for layer, by in ((a.k, TIMES), (a.q, 1 / TIMES)):
                layer.weight[channel :: a.head_dim] *= by
                layer.bias[channel :: a.head_dim] *= by
    return model


def prepared(model, way, batches, *, seed=0, alpha=0.5):
    """Change a network so that its activations are easier to round.

    way      one of WAYS: SmoothQuant; norms without scales; those, and the
             stream rotated; and also the inputs of out and down, at run time
    batches  what SmoothQuant sees
    seed     of the signs of the rotations
    """
    if way == "smooth":
        stats = calibrate.inputs(model, batches, where=body)
        found = pairs(model, batches[0][0][:1])
        return quantize.smooth(model, stats, pairs=found, alpha=alpha)
    if way != "plain":
        model = folded(model)
    if way.startswith("rotated"):
        model = rotated(model, seed)
    return online(model, seed) if way == "rotated, all" else model


def folded(model):
    """Move the scales of the norms into the layers behind them."""
    old = isinstance(model.norm, nn.LayerNorm)
    return prune.without_scales(model) if old else model


def rotated(model, seed):
    """Rotate what flows from block to block, by a random Hadamard matrix."""
    n = model.tokens.embedding_dim
    signs = quantize.random_signs(n, seed=seed)
    return prune.rotated(model, quantize.turn(torch.eye(n), signs))


class Turn(nn.Module):
    """Rotate while the network runs: signs and a Hadamard matrix."""

    def __init__(self, signs):
        super().__init__()
        self.register_buffer("signs", signs)

    def forward(self, x):
        return quantize.turn(x, self.signs)


def online(model, seed):
    """Turn what the layers behind attention and GELU read, at run time."""
    model = deepcopy(model)
    for block in model.blocks:
        for parent, name in ((block.attention, "out"), (block, "down")):
            layer = getattr(parent, name)
            signs = quantize.random_signs(layer.in_features, seed=seed)
            with torch.no_grad():
                layer.weight.copy_(quantize.turn(layer.weight, signs))
            setattr(parent, name, nn.Sequential(Turn(signs), layer))
    return model


def outliers(model, batches):
    """Compare the largest input of every channel with that of the median."""
    rows = {}
    for name, s in calibrate.inputs(model, batches, where=body).items():
        top = torch.maximum(s.high.abs(), s.low.abs())
        rows[name.removesuffix(".weight").removesuffix(".1")] = {
            "largest": round(float(top.max()), 2),
            "ratio": round(float(top.max() / top.median()), 2),
            "from 6": int((top >= 6).sum()),
        }
    return rows
