"""Exact MACs, and the time to import."""

import statistics
import subprocess
import sys

import torch
from torch import nn

from minicompress import measure, models

from ..test_measure import mobilenet, resnet
from .harness import Row

MODULES = "codes, entropy, measure, storage"


def rows():
    yield from macs_rows()
    yield import_row()


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
