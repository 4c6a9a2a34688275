"""A linear layer in int8 against the same in float32.

Our time includes rounding the inputs; the weights are prepared once, as a
network would.  Where the machine has no exact int8 kernel the rows are
skipped.
"""

import torch
from torch import nn

from minicompress import quantize

from .harness import Row, skipped, times

SIZE = 4096
GOALS = {1: 0.6, 32: 0.6}  # rows of inputs: share of the time of float32


def rows():
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(SIZE, SIZE, bias=False)
    layer.weight = nn.Parameter(torch.randn(SIZE, SIZE, generator=g), False)
    kernel = next(iter(quantize.kernels()))
    ours = quantize.Int8Linear(layer)
    for n, most in GOALS.items():
        what = f"int8 linear layer {SIZE} x {SIZE}, {n} inputs ({kernel})"
        goal = f"<= {most:g}x float32"
        if kernel == "reference":
            yield skipped(what, goal, "no exact int8 kernel here")
            continue
        x = torch.randn(n, SIZE, generator=g)
        error = (ours(x) - layer(x)).norm() / layer(x).norm()
        assert error < 0.02
        a, b = times(lambda x=x: ours(x), lambda x=x: layer(x))
        yield Row(
            what,
            f"{a * 1e3:,.2f} ms",
            f"{b * 1e3:,.2f} ms",
            a / b,
            goal,
            a / b <= most,
        )
