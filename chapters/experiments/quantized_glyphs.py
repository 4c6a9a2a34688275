"""Accuracy against bits for ways to round, on the CNN for glyphs of the zoo.

There is one trained model; the three seeds draw the images that the methods
see, and those of the training with the rounding in place, half an epoch.
The norms stay floating point and are not merged with the convolutions.
"""

from itertools import islice

import _stamp
import torch
from _rounding import table

from minicompress import train, zoo

SEEDS = 3
MORE = 60  # steps of 64 images, with the rounding in place
AFTER = {
    "min-max, tensor": (1, 2, 3, 4, 5, 6, 8),
    "min-max, row": (1, 2, 3, 4, 5, 6, 8),
    "min-max, group": (2, 3, 4),
    "MSE, row": (1, 2, 3, 4, 5, 6, 8),
    "MSE, group": (2, 3, 4),
    "GPTQ, row": (2, 3, 4, 5, 6),
    "GPTQ, group": (2, 3, 4),
    "AdaRound, row": (2, 3, 4),
    "binary, row": (1,),
    "ternary, row": (1.58,),
}
TRAINED = {
    "STE, row": ((2, None), (3, None), (4, None)),
    "LSQ, row": ((2, None), (3, None), (4, None), (2, 2), (4, 4), (8, 8)),
    "DoReFa": ((2, None),),
    "XNOR, weights": ((1, None),),
    "TWN": ((1.58, None),),
    "BitNet b1.58": ((1.58, None),),
}


def main():
    task, net = zoo.task("glyphs-cnn"), zoo.load("glyphs-cnn")
    X, y = task.train

    def feeds():
        for seed in range(SEEDS):
            feed = train.batches(X, y, size=64, epochs=1, seed=100 + seed)
            yield list(islice(feed, MORE))

    def tune(nets, lr):
        pairs = zip(nets, feeds(), strict=True)
        return [train.fit(n, b, lr=lr) for n, b in pairs]

    seen = []
    for seed in range(SEEDS):
        dice = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(X), generator=dice)[:256]
        seen.append([(X[some], y[some])])
    found = table(
        __file__,
        [net] * SEEDS,
        task,
        calibration=seen,
        after=AFTER,
        tune=tune,
        start=1e-3,
        trained=TRAINED,
    )
    _stamp.write(__file__, found)


if __name__ == "__main__":
    with train.threads(1):
        main()
