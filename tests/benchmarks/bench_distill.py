"""The MNIST experiment of the paper on distillation, beside its numbers.

Takes more than an hour of one core, so it is not repeated here: the rows
read what ``chapters/experiments/distilled_mnist.py`` has stored, and are
skipped where that is missing or was computed with other code.
``make experiments`` computes it anew where MINICOMPRESS_DATA names a folder
with MNIST.
"""

import json
import sys
from pathlib import Path
from statistics import mean

from .harness import Row, skipped

CHAPTERS = Path(__file__).resolve().parents[2] / "chapters"
SCRIPT = CHAPTERS / "experiments" / "distilled_mnist.py"
GOALS = {
    "T=20": "fewer errors than the plain student; in the paper 0.51x",
    "shifted, T=20": "fewer errors than the student on shifted inputs",
}


def rows():
    sys.path.insert(0, str(SCRIPT.parent))
    import _stamp

    if _stamp.stale(SCRIPT):
        for name, goal in GOALS.items():
            yield skipped(f"MNIST, {name}", goal, "results missing or stale")
        return
    path = CHAPTERS / "results" / f"{SCRIPT.stem}.json"
    runs = json.loads(path.read_text("utf8"))["runs"]
    errors = {n: mean(r["all"] for r in some) for n, some in runs.items()}
    for name, goal in GOALS.items():
        base = "shifted" if name.startswith("shifted") else "plain"
        yield Row(
            f"errors of 10,000 on MNIST, {name} against {base}, "
            f"mean of {len(runs[name])} seeds",
            f"{errors[name]:.1f}",
            f"{errors[base]:.1f}",
            errors[name] / errors[base],
            goal,
            errors[name] < errors[base],
        )
