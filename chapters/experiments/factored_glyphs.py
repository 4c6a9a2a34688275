"""Every way to factor the convolutions of a CNN for glyphs.

    python chapters/experiments/factored_glyphs.py
    python chapters/experiments/factored_glyphs.py latency    times anew

The 3 × 3 convolutions of the zoo's network, but the first, are factored to a
fraction of their MACs: each to the largest rank that stays below it.  The
networks are measured as they are, with batch norms counted anew, and after a
short training; beside them the dense network trained for as long, and a
thinner one of the same MACs trained from scratch for as long as the training
and the fine-tuning took.  A seed draws the images that data-aware methods
see, the start of CP and the order of the fine-tuning.  The learning rate of
each row is chosen on validation data by seed 0.  Times are ratios to the
dense network within one run.
"""

import sys
from copy import deepcopy
from functools import partial
from statistics import median

import _stamp
import torch
from _pruning import Store
from tqdm import tqdm

from minicompress import (
    calibrate,
    lowrank,
    measure,
    models,
    prune,
    storage,
    train,
    zoo,
)

SEEDS, EPOCHS, MORE, SIZE = 3, 15, 1, 64  # EPOCHS: those of the zoo
BUDGETS = (0.6, 0.4, 0.25, 0.15)
RATES, DENSE_RATES = (1e-3, 3e-3, 1e-2), (1e-4, 3e-4, 1e-3)
LAYERS = ("convs.1", "convs.2", "convs.3")
SEEN = 512  # training images
THIN_SEEDS, THIN_LR, THIN_DECAY = 2, 3e-3, 0.05  # the recipe of the zoo
BATCHES, ROUNDS, REPEATS = (1, 32), 5, 15


def by_rank(rank, weights, conv, budget):
    """Find the largest rank whose weights are within the budget."""
    most = budget * conv.weight.numel()
    return max(r for r in range(1, rank + 1) if r == 1 or weights(r) <= most)


def channels(conv, budget, seed, H=None):
    out, *rest = conv.weight.shape
    n = torch.Size(rest).numel()
    r = by_rank(out, lambda r: r * (n + out), conv, budget)
    return lowrank.channels(conv, rank=r, H=H)


def spatial(conv, budget, seed):
    out, n, kh, kw = conv.weight.shape
    r = by_rank(
        min(n * kh, kw * out), lambda r: r * (n * kh + kw * out), conv, budget
    )
    return lowrank.spatial(conv, rank=r)


def tucker2(conv, budget, seed):
    """The same fraction of the channels on both sides."""
    out, n, kh, kw = conv.weight.shape

    def ranks(t):
        return max(1, t * out // 100), max(1, t * n // 100)

    def weights(t):
        r, s = ranks(t)
        return n * s + s * r * kh * kw + r * out

    return lowrank.tucker2(
        conv, ranks=ranks(by_rank(100, weights, conv, budget))
    )


def cp(conv, budget, seed):
    r = by_rank(
        conv.weight.numel(),
        lambda r: r * sum(conv.weight.shape),
        conv,
        budget,
    )
    return lowrank.cp(conv, rank=r, seed=seed)


def separable(conv, budget, seed, H=None):
    out, n, kh, kw = conv.weight.shape
    r = by_rank(
        min(out, kh * kw), lambda r: r * n * (kh * kw + out), conv, budget
    )
    return lowrank.separable(conv, terms=r, H=H)


METHODS = {  # what to call, and whether it sees data
    "channels": (channels, False),
    "channels, data-aware": (channels, True),
    "spatial": (spatial, False),
    "Tucker-2": (tucker2, False),
    "CP": (cp, False),
    "separable": (separable, False),
    "separable, data-aware": (separable, True),
}


class Bench:
    """The network, its task, and what its layers see."""

    def __init__(self):
        self.model = zoo.load("glyphs-cnn")
        self.task = zoo.task("glyphs-cnn")
        self.x = self.task.train[0][:1]
        self.macs = measure.macs(self.model, self.x)
        self.stats = [
            calibrate.inputs(self.model, self.images(s)) for s in range(SEEDS)
        ]

    def images(self, seed):
        X, _ = self.task.train
        dice = torch.Generator().manual_seed(seed)
        return X[torch.randperm(len(X), generator=dice)[:SEEN]].split(128)

    def factored(self, method, budget, seed):
        make, aware = METHODS[method]
        model = deepcopy(self.model)
        for name in LAYERS:
            H = {"H": self.stats[seed][f"{name}.weight"].H} if aware else {}
            conv = self.model.get_submodule(name)
            model.set_submodule(name, make(conv, budget, seed, **H))
        return model

    def thin(self, budget, seed=0):
        """Build the widest network within the MACs of the factored ones."""
        layers = measure.macs_by_layer(self.model, self.x)
        most = self.macs - (1 - budget) * sum(layers[n] for n in LAYERS)
        torch.manual_seed(50 + seed)
        for width in range(100, 0, -1):
            sizes = [max(1, c * width // 100) for c in (16, 32, 64, 128)]
            model = models.CNN(channels=sizes, classes=36)
            if measure.macs(model, self.x) <= most:
                return model
        raise ValueError(f"no network has {most} MACs")

    def percent(self, model, split="test"):
        return round(100 * zoo.quality(model, self.task, split), 2)

    def tuned(self, model, lr, seed, split="test"):
        feed = train.batches(
            *self.task.train, size=SIZE, epochs=MORE, seed=100 + seed
        )
        return self.percent(train.fit(model, feed, lr=lr), split)

    def scratch(self, budget, seed):
        feed = train.batches(
            *self.task.train, size=SIZE, epochs=EPOCHS + MORE, seed=seed
        )
        optimizer = partial(torch.optim.AdamW, weight_decay=THIN_DECAY)
        model = train.fit(
            self.thin(budget, seed),
            feed,
            lr=THIN_LR,
            optimizer=optimizer,
            clip=1.0,
        )
        return self.percent(model)

    def cost(self, model):
        return {
            "params": measure.params(model),
            "macs": measure.macs(model, self.x),
            "bytes": len(storage.dumps(model)),
        }

    def once(self, method, budget, seed):
        """Measure a factored network without training."""
        model = self.factored(method, budget, seed)
        errors = {}
        for name in LAYERS:
            W = self.model.get_submodule(name).weight.detach()
            K = lowrank.dense_kernel(model.get_submodule(name))
            errors[name] = round(float((K - W).norm() / W.norm()), 4)
        anew = prune.renormalize(model, self.images(10 + seed))
        return {
            "errors": errors,
            "plain": self.percent(model),
            "norms": self.percent(anew),
            **self.cost(model),
        }

    def times(self, size):
        """Return {network: time / time of the dense one}, the median."""
        nets = {"dense": self.model}
        for budget in BUDGETS:
            for method, (_, aware) in METHODS.items():
                if not aware:  # the same layers
                    nets[f"{method}/{budget}"] = self.factored(
                        method, budget, 0
                    )
            nets[f"thin/{budget}"] = self.thin(budget).eval()
        x = self.task.test[0][:size]
        calls = {name: partial(net, x) for name, net in nets.items()}
        ratios = {name: [] for name in nets}
        for _ in range(ROUNDS):
            found = measure.compare(calls, repeats=REPEATS)
            for name, timing in found.items():
                ratios[name].append(timing.median / found["dense"].median)
        dense = 1e3 * found["dense"].median
        return {"dense, ms": round(dense, 3)} | {
            name: round(median(r), 3) for name, r in ratios.items()
        }


def choose(store, key, rates, quality):
    """Choose a learning rate on validation data."""
    found = {lr: store.get(f"{key}/{lr}", partial(quality, lr)) for lr in rates}
    return max(found, key=found.get)


def timed(store, bench):
    if "latency" in sys.argv:
        for size in BATCHES:
            store.values.pop(f"latency/{size}", None)
    return {
        size: store.get(f"latency/{size}", partial(bench.times, size))
        for size in BATCHES
    }


def factored(store, bench, method, budget):
    """Measure one way to factor, before and after the fine-tuning."""
    key = f"{method}/{budget}"
    found = [
        store.get(f"once/{key}/{s}", partial(bench.once, method, budget, s))
        for s in range(SEEDS)
    ]

    def tuned(lr, seed, split="test"):
        model = bench.factored(method, budget, seed)
        return bench.tuned(model, lr, seed, split)

    lr = choose(store, f"lr/{key}", RATES, lambda lr: tuned(lr, 0, "val"))
    accuracy = [
        store.get(f"tuned/{key}/{lr}/{s}", partial(tuned, lr, s))
        for s in range(SEEDS)
    ]
    return (
        {"method": method, "budget": budget}
        | {k: found[0][k] for k in ("params", "macs", "bytes", "errors")}
        | {k: [f[k] for f in found] for k in ("plain", "norms")}
        | {"lr": lr, "tuned": accuracy}
    )


def thin(store, bench, budget):
    """Measure a network that had so few channels from the start."""
    accuracy = [
        store.get(f"thin/{budget}/{s}", partial(bench.scratch, budget, s))
        for s in range(THIN_SEEDS)
    ]
    return {
        "method": "thin, from scratch",
        "budget": budget,
        **bench.cost(bench.thin(budget)),
        "lr": THIN_LR,
        "tuned": accuracy,
    }


def dense(store, bench):
    """Measure the whole network, and after the same fine-tuning."""

    def tuned(lr, seed, split="test"):
        return bench.tuned(bench.model, lr, seed, split)

    lr = choose(store, "lr/dense", DENSE_RATES, lambda lr: tuned(lr, 0, "val"))
    accuracy = [
        store.get(f"dense/{lr}/{s}", partial(tuned, lr, s))
        for s in range(SEEDS)
    ]
    cost = bench.cost(bench.model)
    plain = bench.percent(bench.model)
    return {**cost, "plain": plain, "lr": lr, "tuned": accuracy}


def main():
    store, bench = Store(__file__), Bench()
    latency = timed(store, bench)
    plans = [(m, b) for b in BUDGETS for m in METHODS]
    rows = [factored(store, bench, *p) for p in tqdm(plans, desc="factored")]
    rows += [thin(store, bench, b) for b in tqdm(BUDGETS, desc="from scratch")]
    for row in rows:
        name = f"{row['method'].split(',')[0]}/{row['budget']}"
        row["time"] = {size: latency[size][name] for size in BATCHES}
    _stamp.write(
        __file__,
        {
            "layers": LAYERS,
            "epochs": [EPOCHS, MORE],
            "dense": dense(store, bench)
            | {"ms": {size: latency[size]["dense, ms"] for size in BATCHES}},
            "rows": rows,
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
