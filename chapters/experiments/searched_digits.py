"""Train every network of the space of small networks for digits.

    python chapters/experiments/searched_digits.py

The table against which chapter 10 judges its searches: 882 networks, three
seeds, and 45, 90 or 180 steps, each with a schedule of its own.  300 digits
train, all others but the test part validate (997), 500 test.  Two processes
share the work.  Ctrl-C is harmless: the same command goes on from where it
stopped.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from functools import cache

import _stamp
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minicompress import data, measure, nas, train

SEEDS, STEPS = 3, (45, 90, 180)
SIZE, LR, PER_CLASS = 50, 3e-2, 30
WORKERS = 2


@cache
def parts():
    """Return the images and labels that train, validate and test."""
    task = data.digits()
    X, y = task.train
    few, rest = data.few(y, PER_CLASS, seed=0)
    pairs = zip((X[rest], y[rest]), task.val, strict=True)
    val = [torch.cat(pair) for pair in pairs]
    return (X[few], y[few]), tuple(val), task.test


def trained(arch, steps, seed):
    """Train one network; the seed decides its start and its batches."""
    fit, _, _ = parts()
    torch.manual_seed(seed)
    net = nas.digits_network(arch)
    epochs = -(-steps * SIZE // len(fit[0]))
    feed = train.batches(*fit, size=SIZE, epochs=epochs, seed=seed)
    return train.fit(net, feed, lr=LR, steps=steps, seed=seed)


def errors(net, X, y):
    """Return the number of errors and the cross-entropy in millinats."""
    with train.evaluating(net):
        logits = net(X)
    wrong = (logits.argmax(-1) != y).sum().item()
    return [wrong, round(1000 * F.cross_entropy(logits, y).item())]


def row(arch):
    """Train one network with all seeds and numbers of steps."""
    _, val, test = parts()
    net = nas.digits_network(arch)
    found = {
        "params": measure.params(net),
        "macs": measure.macs(net, test[0][:1]),
    }
    for steps in STEPS:
        nets = [trained(arch, steps, seed) for seed in range(SEEDS)]
        found[str(steps)] = [
            [*errors(net, *val), *errors(net, *test)] for net in nets
        ]
    return found


def main():
    space = nas.digits_space()
    log = _stamp.ROOT / "build" / "experiments"
    log.mkdir(parents=True, exist_ok=True)
    log /= f"searched_digits-{_stamp.code_hash(__file__)}.jsonl"
    log.touch()
    lines = map(json.loads, log.read_text("utf8").splitlines())
    known = {tuple(positions): found for positions, found in lines}
    missing = [a for a in space if space.encode(a) not in known]
    with (
        ProcessPoolExecutor(
            WORKERS, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
        log.open("a", encoding="utf8") as file,
    ):
        rows = zip(missing, pool.map(row, missing), strict=True)
        for arch, found in tqdm(rows, total=len(missing)):
            known[space.encode(arch)] = found
            print(
                json.dumps([space.encode(arch), found]), file=file, flush=True
            )
    _, val, test = parts()
    results = {
        "choices": space.choices,
        "sizes": {"val": len(val[0]), "test": len(test[0])},
        "seeds": SEEDS,
        "columns": "val errors, val mnats, test errors, test mnats",
        "rows": [known[space.encode(arch)] for arch in space],
    }
    _stamp.write(__file__, results)


if __name__ == "__main__":
    main()
