"""Memory and time of a compression block by block.

The weights are drawn when they are asked for, as a file would be read, so
that whatever is in memory was put there by `pipeline.streamed`.  Where there
is a GPU, one block of the shapes of LLaMA-2-7B is compressed on it.
"""

import math
import tempfile
import zlib
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from minicompress import measure, models, pipeline, quantize

from .harness import Row, skipped, times

WIDTH, SEEN = 256, (8, 64)
FEW, MANY = 4, 16


class Drawn(dict):
    """Random tensors of a model's shapes, made anew for each look."""

    def __getitem__(self, name):
        like = super().__getitem__(name)
        dice = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        scale = like.shape[-1] ** -0.5 if like.ndim > 1 else 0.1
        return scale * torch.randn(like.shape, generator=dice)


class Llama(nn.Module):
    """The matrices of a block of LLaMA-2-7B, connected as there."""

    def __init__(self, width=4096, ff=11008):
        super().__init__()
        for name in ("q", "k", "v", "out"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.gate = nn.Linear(width, ff, bias=False)
        self.up = nn.Linear(width, ff, bias=False)
        self.down = nn.Linear(ff, width, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x):
        y = self.norm1(x)
        q, k, v = (
            f(y).unflatten(-1, (-1, 128)).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def gptq(W, x, each=64):
    rule = partial(quantize.min_max, bits=4)
    return quantize.gptq(W, x.H.float(), rule(W, each=each), renew=rule)


def compress(layers, whole=False):
    """Compress a language model of so many blocks, read as it goes or not."""
    with torch.device("meta"):
        model = models.LM(
            vocab=512, width=WIDTH, layers=layers, ff=4 * WIDTH, context=64
        )
    tensors = Drawn(model.state_dict())
    if whole:
        tensors = {name: tensors[name] for name in tensors}
    dice = torch.Generator().manual_seed(0)
    batches = [torch.randint(512, SEEN, generator=dice)]
    with tempfile.TemporaryDirectory() as folder:
        pipeline.streamed(model, tensors, batches, gptq, folder)


def rows():
    """Compare depths, and reading as it goes with all at once."""
    few, many = (measure.peak_memory(compress, n) for n in (FEW, MANY))
    what = f"GPTQ of a language model of width {WIDTH}, block by block"
    yield Row(
        f"{what}: memory of {MANY} blocks against {FEW}",
        f"{many / 1e6:.1f} MB",
        f"{few / 1e6:.1f} MB",
        many / few,
        "<= 1.02x",
        many <= 1.02 * few,
    )
    whole = measure.peak_memory(compress, MANY, True)
    yield Row(
        f"{what}: memory of {MANY} blocks against all in memory",
        f"{many / 1e6:.1f} MB",
        f"{whole / 1e6:.1f} MB",
        many / whole,
        "<= 0.5x",
        many <= 0.5 * whole,
    )
    pair = partial(compress, FEW), partial(compress, FEW, True)
    ours, theirs = times(*pair, runs=5)
    r = ours / theirs
    yield Row(
        f"{what}: time against all in memory",
        f"{ours:.2f} s",
        f"{theirs:.2f} s",
        r,
        "<= 1.15x",
        r <= 1.15,
    )
    yield on_gpu()


def on_gpu() -> Row:
    """Compress one large block on a GPU; compare its peak with a formula.

    At the widest matrix (n inputs, m outputs) there are the block and its
    codes, 5 bytes a weight, moments and factor of H, 32 n² bytes, and two
    copies of W, 8 m n bytes.
    """
    what = "a block of LLaMA-2-7B's shapes by GPTQ, group 128, on a GPU: peak"
    goal = "<= 1.1x the formula"
    if not torch.cuda.is_available():
        return skipped(what, goal, "no GPU")
    with torch.device("meta"):
        model = nn.ModuleDict({"blocks": nn.ModuleList([Llama()])})
    tensors = Drawn(model.state_dict())
    dice = torch.Generator().manual_seed(0)
    batches = [torch.randn(1, 2048, 4096, generator=dice) for _ in range(8)]
    torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        pipeline.streamed(
            model,
            tensors,
            batches,
            partial(gptq, each=128),
            folder,
            forward=lambda m, x: m["blocks"][0](x),
            device="cuda",
        )
    peak = torch.cuda.max_memory_allocated()
    weights = sum(math.prod(w.shape) for w in model.parameters())
    formula = 5 * weights + 32 * 11008**2 + 8 * 4096 * 11008
    return Row(
        what,
        f"{peak / 1e9:.2f} GB",
        f"{formula / 1e9:.2f} GB",
        peak / formula,
        goal,
        peak <= 1.1 * formula,
    )
