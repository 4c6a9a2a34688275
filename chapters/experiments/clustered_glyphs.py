"""Shared values for the weights of the CNN for glyphs of the zoo.

There is one trained network; the three seeds draw the random start, and the
images of the training of the centroids, half an epoch.  Norms are trained
along, but not clustered.
"""

from functools import partial

import _stamp
from _clusters import STARTS, coded, each_layer, row, search, trained, weights
from _pruning import Store, layers
from tqdm import tqdm

from minicompress import quantize, train, zoo

SEEDS = 3
ONCE, TUNED = (1, 2, 3, 4, 5, 6), (1, 2, 3)  # bits
STEPS = 60  # of 64 images, in the training of the centroids


def main():
    task, net = zoo.task("glyphs-cnn"), zoo.load("glyphs-cnn")
    store, names, rows = Store(__file__), layers(net), []
    nets, plain = [net] * SEEDS, [{}] * SEEDS

    def tune(nets, lr):
        tuned = []
        for seed, start in enumerate(nets):
            feed = train.batches(
                *task.train, size=64, epochs=1, seed=100 + seed
            )
            tuned.append(train.fit(start, feed, lr=lr, steps=STEPS))
        return tuned

    def add(compute, **what):
        key = "/".join(map(str, what.values()))
        rows.append(what | store.get(key, compute))
        return rows[-1]

    def uniform(bits, each):
        rule = partial(quantize.min_max, bits=bits, each=each)
        return [coded(net, names, rule)]

    def from_start(bits, start):
        seeds = range(SEEDS if start == "random" else 1)
        return [
            each_layer(net, names, bits=bits, start=start, seed=seed)
            for seed in seeds
        ]

    makers = {s: partial(from_start, start=s) for s in STARTS}
    makers |= {
        "min-max, tensor": partial(uniform, each="tensor"),
        "min-max, row": partial(uniform, each="row"),
    }

    def once(make, bits):
        made = make(bits)
        some = nets[: len(made)]
        return row(some, made, task, some)

    for bits in tqdm(ONCE, desc="once"):
        for how, make in makers.items():
            job = partial(once, make, bits)
            add(job, when="once", how=how, bits=bits)

    longer = store.get(
        "longer",
        lambda: search(lambda lr: row(tune(nets, lr), plain, task), 1e-4),
    )
    rates = {}
    for bits in tqdm(TUNED[::-1], desc="trained"):
        for how in STARTS:
            made = makers[how](bits)
            made *= SEEDS // len(made)
            job = partial(trained, nets, made, task, tune)
            found = add(
                partial(search, job, rates.get(how, 1e-3)),
                when="trained",
                how=how,
                bits=bits,
            )
            rates[how] = found["lr"]
    found = weights(net, names).values()
    _stamp.write(
        __file__,
        {
            "weights": sum(w.numel() for w in found),
            "steps": STEPS,
            "dense": row(nets[:1], plain[:1], task),
            "dense, trained on": longer,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
