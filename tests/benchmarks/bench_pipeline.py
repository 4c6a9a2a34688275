"""Bytes of a pruned layer whose weights share values, and of a budget.

The mask is drawn at random, so nothing but the frequencies can be known: no
coder gets below the entropy bound of the list in which zero is a value.
"""

import lzma
from dataclasses import replace

import torch

from minicompress import codes, entropy, pipeline, prune, share, zoo

from .harness import Row


def rows():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(300, 784, generator=g)
    code = codes.sparse(w, prune.magnitude(w, sparsity=0.98))
    code = replace(code, values=share.kmeans(code.values, bits=2))
    least = entropy.bound(pipeline.merged(code).index) / 8
    what = "layer (300, 784), 98 % removed, 4 values"
    for name, coders, most in (
        ("fast", pipeline.FAST, 1.05),
        ("slow", pipeline.SLOW, 1.05),
    ):
        size = pipeline.file_bytes(pipeline.smallest(code, coders=coders))
        yield Row(
            f"{what}: file, {name} coders",
            f"{size:,} B",
            f"{least:,.0f} B",
            size / least,
            f"<= {most}x the entropy of positions and values",
            size <= most * least,
        )
    raw = pipeline.merged(code).index.values.numpy().tobytes()
    theirs = len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    yield Row(
        f"{what}: file, slow coders",
        f"{size:,} B",
        f"{theirs:,} B",
        size / theirs,
        "<= 0.9x lzma of its integers",
        size <= 0.9 * theirs,
    )
    yield budget_row()


def budget_row() -> Row:
    """Fill a budget of a tenth of a network, header and all."""
    model, coders = zoo.load("glyphs-cnn"), (entropy.huffman,)
    choices = pipeline.menu(sparsities=(0, 0.5, 0.8), bits=(2, 3, 4))
    made = pipeline.options(model, choices, coders=coders)
    own = dict(model.named_parameters())

    def error(small):
        pairs = small.named_parameters()
        return sum((w - own[n]).square().sum().item() for n, w in pairs)

    table = pipeline.losses(model, made, error)
    most = sum(w.numel() * 4 for w in own.values()) // 10
    plan = pipeline.to_budget(model, made, table, budget=most)
    return Row(
        "glyphs CNN: file within a budget of 10 % of fp32",
        f"{plan.bytes:,} B",
        f"{most:,} B",
        plan.bytes / most,
        "0.97 to 1 of the budget",
        0.97 * most <= plan.bytes <= most,
    )
