"""What experiments share: the weights to prune, files, kept results."""

import json
from dataclasses import replace
from pathlib import Path

import _stamp

from minicompress import calibrate, codes, entropy, storage

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
SCRATCH = Path(__file__).parents[2] / "build" / "experiments"


def layers(model, leave=()):
    """Name the weights of linear layers and convolutions, not of `leave`."""
    names = calibrate.layers(model)
    return [n for n in names if not n.startswith(tuple(leave))]


def smallest(w, mask):
    """Store the kept weights with the cheaper kind of positions."""
    dense = codes.sparse(w, mask)
    steps = [codes.gaps(mask, bits=n) for n in range(1, 9)]
    best = min(steps, key=storage.payload)
    gaps = replace(dense, mask=replace(best, steps=entropy.huffman(best.steps)))
    return min([dense, gaps], key=storage.payload)


def file_bytes(model, masks):
    """Write the pruned model to a file; return the length of the file."""
    state = dict(codes.encode(model, lambda w: w))
    for name, mask in masks.items():
        state[name] = smallest(state[name], mask)
    return len(storage.dumps(model, state))


class Store:
    """Results that are kept as they come, so that a run can be resumed."""

    def __init__(self, script):
        name = f"{Path(script).stem}-{_stamp.code_hash(script)}.json"
        self.path = SCRATCH / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.values = {}
        if self.path.exists():
            self.values = json.loads(self.path.read_text("utf8"))

    def get(self, key, compute):
        """Return what is stored under a key, or compute and store it."""
        if key not in self.values:
            self.values[key] = compute()
            self.path.write_text(json.dumps(self.values), "utf8")
        return self.values[key]
