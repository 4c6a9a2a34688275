"""Accuracy against bits for every way to round, on ten MLPs for digits.

Each network is trained from its own seed.  Its weights are rounded after
that training, or while it is trained for another third of it; the network
that is trained on without rounding is the one to compare those with.
"""

import _stamp
import torch
from _rounding import WHILE, table

from minicompress import data, models, train

SEEDS = 10
EPOCHS, MORE = 60, 20  # training, and training with the rounding
LR = 3e-3
BOTH = ("LSQ, tensor", "LSQ, row")  # the inputs of the layers as well


def main():
    task = data.digits()

    def feeds(epochs=MORE, seed=100):
        return [
            train.batches(*task.train, size=32, epochs=epochs, seed=seed + s)
            for s in range(SEEDS)
        ]

    starts = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        starts.append(models.MLP())
    nets = train.fit_many(starts, feeds(EPOCHS, 0), lr=LR)
    X, y = task.train
    seen = []
    for seed in range(SEEDS):
        dice = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(X), generator=dice)[:256]
        seen.append([(X[some], y[some])])
    trained = {m: [(b, None) for b in how.bits] for m, how in WHILE.items()}
    for method in BOTH:
        trained[method] += [(b, b) for b in (2, 3, 4, 8)]
    trained["LSQ, row"] += [(b, ("PACT", b)) for b in (2, 3, 4)]
    found = table(
        __file__,
        nets,
        task,
        calibration=seen,
        tune=lambda nets, lr: train.fit_many(nets, feeds(), lr=lr),
        trained=trained,
    )
    _stamp.write(__file__, found)


if __name__ == "__main__":
    with train.threads(1):
        main()
