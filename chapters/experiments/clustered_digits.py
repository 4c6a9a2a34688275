"""Shared values for the weights of ten MLPs for digits, against their bits.

Each network is trained from its own seed.  Its weights are clustered from
four starts; then the centroids are trained for another third of the training.
Beside them stand uniform rounding, one codebook for all layers, errors
weighted by the Fisher information, soft weight-sharing, and networks that
were pruned before, with and without the zeros among what is clustered.
"""

from functools import partial
from itertools import product

import _stamp
import torch
from _clusters import (
    STARTS,
    coded,
    each_layer,
    kept_values,
    one_book,
    packed,
    row,
    search,
    shortened,
    trained,
    weights,
    zero_share,
)
from _pruning import Store, layers
from torch import nn
from tqdm import tqdm

from minicompress import data, models, prune, quantize, share, through, train

SEEDS = 10
EPOCHS, MORE = 60, 20  # training, and training of the centroids
LR = 3e-3
TUNED = (1, 2, 3, 4)  # bits
SPARSITIES, KEPT = (0.8, 0.9), (2, 3, 4)
SOFT = (0.03, 0.1)  # weights of the penalty; 1 would be Bayes' rule
ZEROS = (0.5, 0.9, 0.99)  # held for the component at 0
COMPONENTS, SHAPE, RATE = 17, 250.0, 0.00625  # and the hyper-prior: σ = 0.005


class Soft(nn.Module):
    """A network and the mixture that its weights are drawn to."""

    def __init__(self, net, names, zeros):
        super().__init__()
        self.net, self.names = net, names
        flat = torch.cat([w.flatten() for w in self.weights()]).detach()
        self.mixture = share.Mixture(flat, clusters=COMPONENTS, zeros=zeros)

    def weights(self):
        found = dict(self.net.named_parameters())
        return [found[n] for n in self.names]

    def forward(self, x):
        prior = share.precision_penalty(
            self.mixture.log_variances, shape=SHAPE, rate=RATE
        )
        return self.net(x), self.mixture(*self.weights()) + prior

    def collapsed(self):
        parts = self.mixture.components()
        pairs = zip(self.names, self.weights(), strict=True)
        return {n: packed(share.collapse(w, *parts).decode()) for n, w in pairs}


class Lab:
    """The networks, how they are trained on, and the rows so far."""

    def __init__(self):
        self.task, self.store, self.rows = data.digits(), Store(__file__), []
        starts = []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            starts.append(models.MLP())
        self.nets = train.fit_many(starts, self.feeds(EPOCHS, 0), lr=LR)
        self.names = layers(self.nets[0])

    def feeds(self, epochs=MORE, seed=100):
        X, y = self.task.train
        return [
            train.batches(X, y, size=32, epochs=epochs, seed=seed + s)
            for s in range(SEEDS)
        ]

    def tune(self, nets, lr, loss=train.cross_entropy, epochs=MORE):
        return train.fit_many(nets, self.feeds(epochs), loss, lr=lr)

    def plain(self, nets):
        return row(nets, [{}] * SEEDS, self.task)

    def add(self, compute, **what):
        key = "/".join(map(str, what.values()))
        self.rows.append(what | self.store.get(key, compute))
        return self.rows[-1]

    def once(self, nets, mades, **what):
        return self.add(lambda: row(nets, mades(), self.task, nets), **what)

    def centroids(self, nets, mades, lr, epochs=MORE, **what):
        tune = partial(self.tune, epochs=epochs)
        job = partial(trained, nets, mades, self.task, tune)
        return self.add(lambda: search(job, lr), **what)


def from_start(nets, names, start, bits):
    return [
        each_layer(net, names, bits=bits, start=start, seed=seed)
        for seed, net in enumerate(nets)
    ]


def without_training(lab):
    """Cluster and round the networks as they are."""
    nets, names = lab.nets, lab.names
    cost = [
        {n: m.square for n, m in prune.gradients(net, [lab.task.train]).items()}
        for net in nets
    ]

    def by_fisher(bits):
        for net, m in zip(nets, cost, strict=True):
            found = weights(net, names).items()
            yield {n: share.kmeans(w, bits=bits, weight=m[n]) for n, w in found}

    def uniform(bits, each):
        rule = partial(quantize.min_max, bits=bits, each=each)
        return [coded(net, names, rule) for net in nets]

    makers = {s: partial(from_start, nets, names, s) for s in STARTS}
    makers |= {
        "one book": lambda bits: [one_book(n, names, bits) for n in nets],
        "Fisher": lambda bits: list(by_fisher(bits)),
        "min-max, tensor": partial(uniform, each="tensor"),
        "min-max, row": partial(uniform, each="row"),
    }
    for bits in tqdm(range(1, 9), desc="once"):
        for how, make in makers.items():
            lab.once(nets, partial(make, bits), when="once", how=how, bits=bits)


def with_training(lab, lr):
    """Train the centroids; or train on, and cluster what comes of that."""
    later, rates = lab.tune(lab.nets, lr), {}
    half = lab.tune(lab.nets, lr, epochs=MORE // 2)
    for bits in tqdm(TUNED, desc="trained"):
        for how in STARTS:
            what = {"how": how, "bits": bits}
            made = from_start(lab.nets, lab.names, how, bits)
            lr = rates.get(how, 1e-2)
            found = lab.centroids(lab.nets, made, lr, when="trained", **what)
            rates[how] = found["lr"]
            make = partial(from_start, later, lab.names, how, bits)
            lab.once(later, make, when="after more training", **what)
        made = from_start(half, lab.names, "histogram", bits)
        what = {"when": "half of each", "how": "histogram", "bits": bits}
        lab.centroids(half, made, 3e-3, epochs=MORE // 2, **what)


def drawn_together(lab, by, held):
    """Train with the mixture in the loss, and collapse."""
    n = len(lab.task.train[0])

    def loss(model, batch):
        logits, penalty = model(batch[0])
        error = nn.functional.cross_entropy(logits, batch[1])
        return error + by * penalty / n

    begin = [Soft(net, lab.names, held) for net in lab.nets]
    end = lab.tune(begin, 1e-2, loss)
    nets, made = [s.net for s in end], [s.collapsed() for s in end]
    before = lab.plain(nets)["test"]
    found = row(nets, made, lab.task, nets)
    return found | {"before collapse": before, "zeros": zero_share(made)}


def masked(net, names, sparsity):
    found = weights(net, names).items()
    masks = {n: prune.magnitude(w, sparsity=sparsity) for n, w in found}
    return prune.masked(net, masks)


def with_zeros(w, **options):
    """The mistake: what was pruned is clustered like everything else."""
    return shortened(share.kmeans(w, **options))


def pruned(lab, sparsity):
    """Prune, train what is left, cluster it."""
    begin = [masked(net, lab.names, sparsity) for net in lab.nets]

    def cut(lr):
        return [through.bake(net) for net in lab.tune(begin, lr)]

    key = f"pruned/{sparsity}"
    lr = lab.store.get(key, lambda: search(lambda r: lab.plain(cut(r)), 1e-2))
    nets, same = cut(lr["lr"]), {"when": "pruned", "sparsity": sparsity}

    def stored(make, **options):
        rule = partial(make, **options)
        return [coded(net, lab.names, rule) for net in nets]

    lab.once(nets, partial(stored, kept_values), how="not clustered", **same)
    for bits in KEPT:
        for start in ("histogram", "linear"):
            for make in (packed, with_zeros):
                made = stored(make, bits=bits, start=start)
                what = {"how": start, "bits": bits, "rule": make.__name__}
                found = lab.once(nets, lambda made=made: made, **same, **what)
                found["zeros"] = zero_share(made)
        what = {"sparsity": sparsity, "how": "histogram", "bits": bits}
        made = stored(packed, bits=bits)
        lab.centroids(nets, made, 3e-3, when="pruned, trained", **what)


def main():
    lab = Lab()
    without_training(lab)
    longer = lab.store.get(
        "longer",
        lambda: search(lambda lr: lab.plain(lab.tune(lab.nets, lr)), 3e-2),
    )
    with_training(lab, longer["lr"])
    for by, held in tqdm([*product(SOFT, ZEROS)], desc="soft"):
        job = partial(drawn_together, lab, by, held)
        lab.add(job, when="soft", by=by, held=held)
    for sparsity in tqdm(SPARSITIES, desc="pruned"):
        pruned(lab, sparsity)
    found = weights(lab.nets[0], lab.names).values()
    _stamp.write(
        __file__,
        {
            "weights": sum(w.numel() for w in found),
            "epochs": [EPOCHS, MORE],
            "dense": lab.plain(lab.nets),
            "dense, trained on": longer,
            "rows": lab.rows,
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
