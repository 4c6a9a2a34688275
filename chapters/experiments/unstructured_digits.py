"""Every criterion of unstructured pruning on ten MLPs for digits.

Each network is trained from its own seed.  It is pruned without training,
with training after the pruning, with training while it is pruned, or before
any training; the last gets as many steps in all as the others together.
"""

import _stamp
import torch
from _criteria import look, table
from _pruning import layers

from minicompress import data, models, train

SEEDS = 10
EPOCHS, MORE = 60, 20  # training, and training after the pruning
LR = 3e-3


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
    sights = []
    for seed, net in enumerate(nets):
        dice = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(X), generator=dice)[:256]
        batch = X[some], y[some]
        sights.append(look(net, layers(net), [batch], draws=64))
    found = table(
        __file__,
        sights,
        task,
        tune=lambda nets, lr: train.fit_many(nets, feeds(), lr=lr),
        feeds=feeds,
        lrs=(1e-3, 3e-3, 1e-2, 3e-2),
        starts=starts,
        begin=lambda nets: train.fit_many(nets, feeds(EPOCHS + MORE, 0), lr=LR),
    )
    _stamp.write(__file__, found)


if __name__ == "__main__":
    with train.threads(1):
        main()
