"""Whole files of LeNet-300-100 and LeNet-5 against Deep Compression's table.

The networks are those that `chapters/experiments/compressed_mnist.py` made
and put into the zoo; their bytes are counted and, where MNIST is at hand
(MINICOMPRESS_DATA names its folder), their errors.  The mean over seeds is in
`chapters/results/compressed_mnist.json`.
"""

import json
from pathlib import Path

from minicompress import data, measure, models, zoo

from .harness import Row, skipped

RESULTS = Path(__file__).parents[2] / "chapters/results/compressed_mnist.json"
# file: network, ratio of the paper and its error, ours to reach
GOALS = {
    "mnist-lenet-300-100": (models.lenet_300_100, 40, 1.58, 250, 1.6),
    "mnist-lenet-5": (models.LeNet5, 39, 0.74, 300, 0.8),
    "mnist-lenet-5-smaller": (models.LeNet5, 39, 0.74, 800, 1.0),
}


def rows():
    try:
        task = data.mnist()
    except (OSError, ValueError) as error:
        task, why = None, error
    for name, (build, paper, error, ratio, most) in GOALS.items():
        goal = f">= {ratio}x at <= {most} % error"
        if name not in zoo.compressed():
            yield skipped(name, goal, "not in the zoo")
            continue
        full, size = build(), zoo.path(name).stat().st_size
        small, dense = zoo.load(name), 4 * measure.params(full)
        shapes = {n: w.shape for n, w in full.state_dict().items()}
        assert shapes == {n: w.shape for n, w in small.state_dict().items()}
        what, ours = f"{name}: whole file", f"{size:,} B, {dense / size:.0f}x"
        if task is None:
            yield skipped(what, goal, why)
            continue
        wrong = 100 * (1 - zoo.quality(small, task))
        yield Row(
            what,
            f"{ours}, {wrong:.2f} %",
            f"{paper}x, {error} %",
            dense / size / paper,
            goal,
            dense / size >= ratio and wrong <= most + 1e-9,
        )
    yield from seeds()


def seeds():
    """Check the goals for the mean over the seeds, as stored."""
    runs = {}
    if RESULTS.exists():
        runs = json.loads(RESULTS.read_text("utf8"))["runs"]
    for name, (_, paper, error, ratio, most) in GOALS.items():
        own = runs.get(name.removeprefix("mnist-").replace("-s", ", s"), [])
        what, goal = f"{name}: seeds, stored", f">= {ratio}x at <= {most} %"
        if not own:
            yield skipped(what, goal, "no results")
            continue
        wrong = [row["test"] for row in own]
        least = min(row["ratio"] for row in own)
        mean = sum(wrong) / len(wrong)
        yield Row(
            what,
            f"{least:.0f}x at least, {mean:.2f} % ({min(wrong)}-{max(wrong)})",
            f"{paper}x, {error} %",
            least / paper,
            goal,
            least >= ratio and mean <= most + 1e-9,
        )
