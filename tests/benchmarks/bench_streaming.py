"""Memory and time of a compression block by block.

The weights are drawn when they are asked for, as a file would be read, so
that whatever is in memory was put there by `pipeline.streamed`.
"""

import tempfile
import zlib
from functools import partial

import torch

from minicompress import measure, models, pipeline, quantize

from .harness import Row, times

WIDTH, SEEN = 256, (8, 64)
FEW, MANY = 4, 16


class Drawn(dict):
    """Random tensors of a model's shapes, made anew for each look."""

    def __getitem__(self, name):
        like = super().__getitem__(name)
        dice = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        scale = like.shape[-1] ** -0.5 if like.ndim > 1 else 0.1
        return scale * torch.randn(like.shape, generator=dice)


def gptq(W, x):
    rule = partial(quantize.min_max, bits=4)
    return quantize.gptq(W, x.H.float(), rule(W, each=64), renew=rule)


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
