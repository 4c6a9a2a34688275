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
    "errors of 10,000 on MNIST, T = 20 against plain": "< 1 [paper 0.51]",
    "threes misread by a student that never saw one": "<= 2 % [paper 1.4 %]",
}


def rows():
    sys.path.insert(0, str(SCRIPT.parent))
    import _stamp

    if _stamp.stale(SCRIPT):
        for what, goal in GOALS.items():
            yield skipped(what, goal, "results missing or stale")
        return
    path = CHAPTERS / "results" / f"{SCRIPT.stem}.json"
    runs = json.loads(path.read_text("utf8"))["runs"]
    (errors, less), (threes, few) = GOALS.items()
    ours, peer = (mean(r["all"] for r in runs[n]) for n in ("T=20", "plain"))
    yield Row(
        errors, f"{ours:.1f}", f"{peer:.1f}", ours / peer, less, ours < peer
    )
    wrong = mean(r["with bias"]["of 3"] for r in runs["no 3"])
    share = wrong / 1010
    yield Row(threes, f"{share:.1%}", "1,010 threes", share, few, share <= 0.02)
