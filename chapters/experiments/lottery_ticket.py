"""Winning tickets on ten MLPs for digits, with the controls they need.

Each network is trained, loses a fifth of its weights, is reset to its first
weights, and so on.  Every ticket is trained from there, and beside it the
same masks on other first weights, random masks with as many weights in each
layer on the same first weights, and fine-tuning of the trained network with
the ticket's masks.  All get the same number of steps; "early" is the
accuracy after a tenth of them, at a constant learning rate.
"""

import _stamp
import torch
from _criteria import quality
from _pruning import Store
from tqdm import tqdm

from minicompress import data, models, prune, through, train

SEEDS, ROUNDS, SHARE = 10, 16, 0.2
EPOCHS, EARLY, LR = 40, 4, 1e-3
SHOWN = (3, 5, 7, 9, 11, 13, 15)  # rounds whose controls are trained
START, OTHER = 0, 1000  # seeds of the first weights


def network(seed):
    torch.manual_seed(seed)
    return models.MLP()


def feeds(task, epochs):
    return [
        train.batches(*task.train, size=32, epochs=epochs, seed=seed)
        for seed in range(SEEDS)
    ]


def fit(nets, task, epochs=EPOCHS):
    return train.fit_many(
        nets, feeds(task, epochs), lr=LR, schedule=train.constant
    )


def tickets(task):
    """Return the masks of every round, for every seed."""
    density = prune.geometric(ROUNDS, per_round=SHARE)[-1]
    found = []
    for seed, feed in enumerate(tqdm(feeds(task, EPOCHS))):
        rounds = []  # the masks with which each training started

        def run(net, feed=feed, rounds=rounds):
            own = through.tensors(net)
            rounds.append({name: t["mask"] for name, t in own.items()})
            return train.fit(net, feed, lr=LR, schedule=train.constant)

        start = network(START + seed)
        _, last = prune.lottery(start, run, sparsity=1 - density, rounds=ROUNDS)
        found.append([*rounds[1:], last])
    return found


def measured(nets, masks, task):
    """Train with the masks held; quality early and at the end."""
    held = [prune.masked(n, m) for n, m in zip(nets, masks, strict=True)]
    return {
        "early": [quality(n, task) for n in fit(held, task, EARLY)],
        "end": [quality(n, task) for n in fit(held, task)],
    }


def shuffled(masks, seed):
    """Draw other places, as many in each layer."""
    return {
        n: prune.random(m, sparsity=prune.sparsity(m), seed=seed)
        for n, m in masks.items()
    }


def main():
    store, task = Store(__file__), data.digits()
    path = store.path.with_suffix(".pt")
    if not path.exists():
        torch.save(tickets(task), path)
    masks = torch.load(path)
    starts = [network(START + s) for s in range(SEEDS)]
    others = [network(OTHER + s) for s in range(SEEDS)]
    trained = fit(starts, task)
    full = [{n: w > -1 for n, w in prune.magnitudes(m).items()} for m in starts]
    rows = []
    for k in tqdm(SHOWN):
        mine = [m[k - 1] for m in masks]
        random = [shuffled(m, seed) for seed, m in enumerate(mine)]
        runs = {
            "ticket": (starts, mine),
            "other weights": (others, mine),
            "random mask": (starts, random),
            "fine-tuned": (trained, mine),
        }
        for name, (nets, kept) in runs.items():
            row = store.get(
                f"{k}/{name}", lambda n=nets, m=kept: measured(n, m, task)
            )
            rows.append(
                {"round": k, "sparsity": prune.sparsity(mine[0]), "run": name}
                | row
            )
    dense = store.get("dense", lambda: measured(starts, full, task))
    longer = store.get("longer", lambda: measured(trained, full, task))
    _stamp.write(
        __file__,
        {"dense": dense, "dense, trained on": longer, "rows": rows},
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
