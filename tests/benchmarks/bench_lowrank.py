"""Factors against torch's SVD, and thin layers against the dense one.

The data-aware factors are given H, so that its Cholesky factor is part of
their time.  The time of a layer is that of its call with the bias.
"""

import torch
from torch import nn

from minicompress import lowrank

from .harness import Row, time_row

OUT, IN = 4096, 1024


def rows():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(OUT, IN, generator=g) * 0.02
    X = torch.randn(2 * IN, IN, generator=g)
    X = X * (torch.rand(IN, generator=g) * 2 + 0.1)  # of unequal size
    yield from svd_rows(W, X.T @ X / len(X))
    for n in (1024, 4096):
        for batch in (1, 32):
            for part in (4, 8, 16):
                yield layer_row(n, batch, part)


def svd_rows(W: torch.Tensor, H: torch.Tensor):
    rank = IN // 8
    what = f"rank {rank} of {OUT} x {IN}"
    runs = {"runs": 7}

    def peer():
        return torch.linalg.svd(W, full_matrices=False)

    def plain():
        return lowrank.svd(W, rank=rank)

    def aware():
        return lowrank.drone(W, H, rank=rank)

    yield time_row(what, plain, peer, "torch.linalg.svd", 0.35, **runs)
    yield time_row(
        f"{what}, data-aware", aware, peer, "torch.linalg.svd", 0.6, **runs
    )
    U, s, Vh = peer()
    ours = float((W - plain().decode()).norm())
    theirs = float((W - (U[:, :rank] * s[:rank]) @ Vh[:rank]).norm())
    yield Row(
        f"{what}: error",
        f"{ours:.6g}",
        f"{theirs:.6g}",
        ours / theirs,
        "<= 1.0001x torch.linalg.svd",
        ours <= 1.0001 * theirs,
    )


def layer_row(n: int, batch: int, part: int) -> Row:
    """Time a layer of rank n / part; the goal is for n / 8."""
    dense = nn.Linear(n, n)
    thin = nn.Sequential(
        nn.Linear(n, n // part, bias=False), nn.Linear(n // part, n)
    )
    x = torch.randn(batch, n)
    # many calls, so that a call of microseconds is measured too
    calls = max(1, 2**27 // (n * n * batch))

    def run(layer):
        with torch.inference_mode():
            for _ in range(calls):
                layer(x)

    # 2 / part of the arithmetic, and a second call
    most = {4: 0.8, 8: 0.45, 16: 0.35}[part]
    return time_row(
        f"{calls} calls of rank {n}/{part}, {n} x {n}, batch {batch}",
        lambda: run(thin),
        lambda: run(dense),
        "dense",
        most,
        runs=9,
    )
