"""Every criterion of unstructured pruning on three CNNs for glyphs.

As `unstructured_digits`, with shorter training: two epochs, and half an
epoch after the pruning.  OBC would take too long for the wide layers.
"""

from itertools import islice

import _stamp
import torch
from _criteria import look, table
from _pruning import layers

from minicompress import data, models, train

SEEDS = 3
STEPS, MORE = 250, 60  # of 64 images: training, and after the pruning
LR = 3e-3


def main():
    task = data.glyphs(difficulty=1.0)

    def feeds(steps=MORE, seed=100):
        epochs = -(-steps * 64 // len(task.train[0]))
        epochwise = (
            train.batches(*task.train, size=64, epochs=epochs, seed=seed + s)
            for s in range(SEEDS)
        )
        return [list(islice(feed, steps)) for feed in epochwise]

    def fit(nets, steps, lr, seed):
        pairs = zip(nets, feeds(steps, seed), strict=True)
        return [train.fit(n, b, lr=lr) for n, b in pairs]

    starts = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        starts.append(models.CNN(channels=(16, 32, 64, 128), classes=36))
    nets = fit(starts, STEPS, LR, 0)
    X, y = task.train
    sights = []
    for seed, net in enumerate(nets):
        dice = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(X), generator=dice)[:256]
        batch = X[some], y[some]
        sights.append(look(net, layers(net), [batch], draws=16))
    found = table(
        __file__,
        sights,
        task,
        tune=lambda nets, lr: fit(nets, MORE, lr, 100),
        feeds=feeds,
        leave=("OBC",),
        lrs=(3e-4, 1e-3, 3e-3, 1e-2),
        starts=starts,
        begin=lambda nets: fit(nets, STEPS + MORE, LR, 0),
    )
    _stamp.write(__file__, found)


if __name__ == "__main__":
    with train.threads(1):
        main()
