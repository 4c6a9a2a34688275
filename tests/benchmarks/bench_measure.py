"""Exact MACs, the time to import, and the speed of the OBS loop."""

import statistics
import subprocess
import sys

import torch
from torch import nn

from minicompress import measure, models, obs

from ..test_measure import mobilenet, resnet
from .harness import Row, times

MODULES = "codes, entropy, measure, storage"


def rows():
    yield from macs_rows()
    yield import_row()
    for n in (1024, 4096):
        yield sweep_row(n)


def macs_rows():
    """Compare the counts with the closed forms of the literature."""
    image = (1, 3, 224, 224)
    cases = {
        "LeNet-300-100": (models.lenet_300_100, (1, 784), 266_200),
        "LeNet-5": (models.LeNet5, (1, 1, 28, 28), 2_293_000),
        "ResNet-18": (
            lambda: resnet((2, 2, 2, 2), False),
            image,
            1_814_073_344,
        ),
        "ResNet-50": (lambda: resnet((3, 4, 6, 3), True), image, 4_089_184_256),
        "MobileNet": (mobilenet, image, 568_740_352),
        "BERT-base, 128 tokens": (models.Encoder, (1, 128), 11_173_625_856),
        "LSTM 64 to 128, 10 steps": (
            lambda: nn.LSTM(64, 128, batch_first=True),
            (1, 10, 64),
            10 * 4 * 128 * (64 + 128),
        ),
    }
    for name, (make, shape, want) in cases.items():
        with torch.device("meta"):
            model = make()
        ids = name.startswith("BERT")
        x = torch.zeros(shape, dtype=torch.long if ids else torch.float32)
        got = measure.macs(model, x)
        yield Row(
            f"MACs of {name}",
            f"{got:,}",
            f"{want:,}",
            got / want,
            "= closed form",
            got == want,
        )


def import_row(runs: int = 5) -> Row:
    """Time our imports in a fresh interpreter, after torch's own."""
    script = (
        "import time; a = time.process_time(); import torch\n"
        "b = time.process_time(); import minicompress\n"
        f"from minicompress import {MODULES}\n"
        "print(b - a, time.process_time() - b)"
    )
    command = [sys.executable, "-c", script]
    printed = [
        subprocess.run(command, capture_output=True, text=True, check=True)
        for _ in range(runs)
    ]
    pairs = [map(float, p.stdout.split()) for p in printed]
    torchs, ours = map(statistics.median, zip(*pairs, strict=True))
    return Row(
        f"import minicompress ({MODULES}), CPU time",
        f"{torchs + ours:.3f} s",
        f"torch alone {torchs:.3f} s",
        (torchs + ours) / torchs,
        "<= torch's own + 0.1 s",
        ours <= 0.1,
    )


def sweep_row(n: int) -> Row:
    """Compare `obs.sweep` with GPTQ written as in the paper's listing."""
    g = torch.Generator().manual_seed(0)
    W = torch.randn(n, n, generator=g)
    X = torch.randn(2 * n, n, generator=g)
    X = X @ (torch.randn(n, n, generator=g) / n**0.5)
    H = X.T @ X / len(X)
    step = W.abs().amax(1) / 7

    def grid(w):
        return (w / step).round_().clamp_(-8, 7).mul_(step)

    def choose(block, d, columns):
        return lambda i, w: grid(w)

    def swept():
        return obs.sweep(W, H, choose)[0]

    def listed():
        return listing(W, H, grid)

    losses = [obs.layer_loss(W, f(), H).sum().item() for f in (swept, listed)]
    ours, peer = times(swept, listed, runs=9 if n < 2000 else 3, warm_up=0)
    same = abs(losses[0] / losses[1] - 1) < 1e-3
    return Row(
        f"obs.sweep, int4 rounding of {n} x {n}",
        f"{ours:.2f} s",
        f"{peer:.2f} s",
        ours / peer,
        "<= 0.6x the paper's listing, same loss to 0.1 %",
        same and ours / peer <= 0.6,
    )


def listing(W, H, grid, block=128):
    """GPTQ: invert H, factor the inverse, update columns block by block."""
    W, n = W.clone(), W.shape[1]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(obs.damped(H)))
    U = torch.linalg.cholesky(inverse, upper=True)
    Q = torch.zeros_like(W)
    for a in range(0, n, block):
        b = min(a + block, n)
        W1, U1 = W[:, a:b].clone(), U[a:b, a:b]
        E = torch.zeros_like(W1)
        for i in range(b - a):
            w = W1[:, i]
            Q[:, a + i] = q = grid(w)
            E[:, i] = e = (w - q) / U1[i, i]
            W1[:, i:] -= e[:, None] @ U1[i, None, i:]
        W[:, b:] -= E @ U[a:b, b:]
    return Q
