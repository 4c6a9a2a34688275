"""Every criterion of unstructured pruning on the language model of the zoo.

The embedding, which is also the output layer, stays as it is.  There is one
trained model; the three seeds draw the passages that the criteria see and
those of the training after the pruning.  Pruning before training is left
out: it would need the whole training for each number; OBC for its time.
"""

import _stamp
from _criteria import look, table
from _pruning import layers

from minicompress import data, train, zoo

SEEDS = 3
MORE = 60  # steps of 8 passages, after the pruning


def main():
    task = zoo.task("reference-lm")
    net = zoo.load("reference-lm")
    ids = data.Tokenizer().encode(task.train)

    def feeds(steps=MORE, seed=100):
        return [
            train.passages(ids, length=128, size=8, steps=steps, seed=seed + s)
            for s in range(SEEDS)
        ]

    def fit(nets, lr):
        pairs = zip(nets, feeds(), strict=True)
        return [train.fit(n, b, lr=lr, clip=1.0) for n, b in pairs]

    sights = [
        look(net, layers(net, leave=("head",)), list(b), draws=8)
        for b in feeds(8, 0)
    ]
    found = table(
        __file__,
        sights,
        task,
        tune=fit,
        feeds=feeds,
        leave=("OBC",),
        lrs=(1e-4, 3e-4, 1e-3, 3e-3),
    )
    _stamp.write(__file__, found)


if __name__ == "__main__":
    with train.threads(1):
        main()
