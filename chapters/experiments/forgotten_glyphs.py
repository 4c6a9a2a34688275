"""What compressed networks forget, at equal accuracy, on CNNs for glyphs.

Every way to compress is set on validation data so that it loses the same
accuracy, half a point or two; its knob is the fraction that is kept, found on
a few seeds and then used for all.  Beside them stand networks that were not
compressed: another seed, the same one trained on, and, as inaccurate as the
compressed ones, another seed trained for a shorter time.  The test images
come from a rendering seed of their own: 2,000 are too few for 36 classes.

In the long tail a third of the classes has a tenth of its training images;
the seeds take turns in which third.
"""

from copy import deepcopy
from functools import cache, partial
from itertools import islice

import _stamp
import numpy as np
import torch
import torch.nn.functional as F
from _pruning import Store, layers
from tqdm import tqdm

from minicompress import (
    data,
    distill,
    lowrank,
    measure,
    models,
    prune,
    share,
    through,
    train,
)

SEEDS, TWIN, CLASSES, CHANNELS = 6, 30, 36, (16, 32, 64, 128)
DIFFICULTY, HARD = 0.75, 1.0  # of the training images; of the hard ones
STEPS, MORE, SIZE = 500, 100, 64  # training, and after a compression
LR, TUNE = 1e-2, 3e-3
LOSSES = (2.0, 0.5)  # points of accuracy on validation data
SOUGHT, NEAR = 2, 0.3  # seeds on which the knob is found; points to miss by
TAIL = 0.1  # of the images that a rare class keeps
NAMES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
QUANTILES = (0.5, 0.95, 0.99)
CLEAR = [i for i, c in enumerate(NAMES) if c not in "0O"]


def fresh(seed):
    torch.manual_seed(seed)
    return models.CNN(channels=CHANNELS, classes=CLASSES)


def rendered(n, difficulty, seed):
    task = data.glyphs(n, difficulty=difficulty, seed=seed)
    X, y = zip(task.train, task.val, task.test, strict=True)
    return torch.cat(X), torch.cat(y)


def garbage(X, y, n=500):
    """Make images that show no character, or two of them."""
    dice = torch.Generator().manual_seed(0)
    pixels = torch.rand(n, 1, 28, 28, generator=dice)
    order = pixels.flatten(1).argsort(1)
    other = (y[n : 2 * n] != y[:n])[:, None, None, None]
    return {
        "noise": torch.rand(n, 1, 28, 28, generator=dice),
        "shuffled": X[:n].flatten(1).gather(1, order).view(n, 1, 28, 28),
        "overlaid": X[:n].maximum(X[n : 2 * n] * other),
    }


def rare(seed):
    return torch.arange(CLASSES) % 3 == seed % 3


def written(logits):
    """Write one character for each answer."""
    return "".join(NAMES[i] for i in logits.argmax(1).tolist())


class Bench:
    """The images, the whole networks, and every way to compress them."""

    def __init__(self, place, tail=False):
        self.place, self.tail = place, tail
        self.whole = data.glyphs(difficulty=DIFFICULTY).train
        self.val = rendered(4_000, DIFFICULTY, 2)
        self.test = rendered(9_000, DIFFICULTY, 1)
        self.hard = rendered(2_000, HARD, 3)
        self.garbage = garbage(*self.test)

    @cache  # noqa: B019
    def images(self, seed):
        X, y = self.whole
        if not self.tail:
            return X, y
        few = torch.zeros(len(y), dtype=torch.bool)
        for c in rare(seed).nonzero():
            rows = (y == c).nonzero()[:, 0]
            few[rows[round(TAIL * len(rows)) :]] = True
        return X[~few], y[~few]

    def fit(self, net, seed, steps, lr, teacher=None):
        net = net.to(memory_format=torch.channels_last)
        X, y = self.images(seed)
        epochs = -(-steps // (len(X) // SIZE))
        feed = train.batches(X, y, size=SIZE, epochs=epochs, seed=seed)
        loss = distill.taught(teacher) if teacher else train.cross_entropy
        return train.fit(net, islice(feed, steps), loss, lr=lr, steps=steps)

    @cache  # noqa: B019
    def dense(self, seed):
        path = self.place / f"{'tail' if self.tail else 'plain'}-{seed}.pt"
        if not path.exists():
            net = self.fit(fresh(seed), seed, STEPS, LR)
            torch.save(net.state_dict(), path)
        net = fresh(seed).to(memory_format=torch.channels_last)
        net.load_state_dict(torch.load(path))
        return net.eval()

    def tune(self, net, seed, teacher=None):
        return self.fit(net, seed, MORE, TUNE, teacher)

    def another(self, seed, kept):
        return self.dense(seed + TWIN)

    def shorter(self, seed, kept):
        seed = seed + TWIN
        return self.fit(fresh(seed), seed, round(kept * STEPS), LR)

    def longer(self, seed, kept):
        return self.tune(deepcopy(self.dense(seed)), seed)

    def pruned(self, seed, kept):
        return prune.one_shot(self.dense(seed), sparsity=1 - kept)[0]

    def retrained(self, seed, kept, teacher=None):
        net, masks = prune.one_shot(self.dense(seed), sparsity=1 - kept)
        net = self.tune(prune.masked(net, masks), seed, teacher)
        return through.bake(net)

    def retaught(self, seed, kept):
        return self.retrained(seed, kept, self.dense(seed))

    def clustered(self, seed, kept):
        """Share values, 32 · kept a layer; the last layers may have one
        more, so that there are steps between two whole numbers."""
        net = deepcopy(self.dense(seed))
        names = layers(net)
        total = round(32 * kept * len(names))
        with torch.no_grad():
            for i, name in enumerate(names):
                w = net.get_parameter(name)
                K = (total + i) // len(names)
                w.copy_(share.kmeans(w, bits=8, clusters=K).decode())
        return net

    def channels(self, seed, kept):
        net, x = self.dense(seed), self.test[0][:1]
        scores = prune.filter_norms(net, prune.groups(net, x))

        def cost(net):
            return measure.macs(net, x)

        budget, each = kept * cost(net), prune.keep_each
        keep = prune.within(
            net, scores, x, cost=cost, budget=budget, select=each
        )
        return self.tune(prune.remove_channels(net, keep, x), seed)

    def factored(self, seed, kept):
        net, new = self.dense(seed), {}
        for i in (1, 2, 3):  # the first has one input channel
            out, n, kh, kw = net.convs[i].weight.shape
            most = kept * out * n * kh * kw
            k = max(  # of n inputs, and twice as many of the outputs
                k
                for k in range(1, n + 1)
                if k == 1 or n * k + 2 * k * k * kh * kw + 2 * k * out <= most
            )
            new[f"convs.{i}"] = lowrank.tucker2(net.convs[i], ranks=(2 * k, k))
        return self.tune(lowrank.factorize(net, new), seed)

    # ---- what is measured

    def accuracy(self, net):
        return 100 * train.accuracy(net, *self.val, size=256)

    def record(self, net):
        """Measure all that depends on one network alone."""
        net = net.to(memory_format=torch.channels_last)

        def logits(X):
            with torch.no_grad():
                return torch.cat([net(x) for x in X.split(256)]).double()

        (Xv, v), (X, y), (Xh, h) = self.val, self.test, self.hard
        zv, z, zh = logits(Xv), logits(X), logits(Xh)
        T = measure.temperature(zv, v)
        trash = {name: logits(x) for name, x in self.garbage.items()}

        def sure(z):
            return round(100 * z.softmax(1).max(1)[0].mean().item(), 2)

        def error(z, y):
            return round(100 * measure.calibration_error(z, y), 3)

        return {
            "val": round(100 * (zv.argmax(1) == v).double().mean().item(), 2),
            "answers": written(z),
            "hard": written(zh),
            "temperature": round(T, 4),
            "ece": [error(z, y), error(z / T, y)],
            "ece, hard": [error(zh, h), error(zh / T, h)],
            "nats": [
                round(F.cross_entropy(a, y).item(), 5) for a in (z, z / T)
            ],
            "sure": {k: [sure(a), sure(a / T)] for k, a in trash.items()},
        }


WAYS = {  # the grid of what is kept, from mild to strong; None: no knob
    "another seed": (Bench.another, None),
    "trained on": (Bench.longer, None),
    "another seed, trained shorter": (Bench.shorter, (0.8, 0.6, 0.4)),
    "pruned, trained": (Bench.retrained, (0.3, 0.15, 0.08)),
    "clustered": (Bench.clustered, (0.6, 0.4, 0.3, 0.24, 0.2, 0.17)),
    "pruned": (Bench.pruned, (0.7, 0.6, 0.5, 0.42)),
    "channels removed": (Bench.channels, (0.7, 0.5, 0.35, 0.22)),
    "pruned, taught": (Bench.retaught, (0.3, 0.15, 0.08)),
    "low rank": (Bench.factored, (0.6, 0.35, 0.2, 0.12)),
}
SLIGHTLY = ("clustered", "pruned", "pruned, trained")
IN_TAIL = (
    "another seed, trained shorter",
    "pruned, trained",
    "clustered",
    "pruned",
)


def grid(store, bench, way, title):
    """Return what is lost on validation data along the knob, rising."""
    make, kept = WAYS[way]

    def lost(k):
        nets = [(bench.dense(s), make(bench, s, k)) for s in range(SOUGHT)]
        pairs = [(bench.accuracy(a), bench.accuracy(b)) for a, b in nets]
        return round(sum(a - b for a, b in pairs) / SOUGHT, 3)

    found = [
        store.get(f"grid/{title}/{way}/{k}", partial(lost, k)) for k in kept
    ]
    return np.maximum.accumulate(found) + 1e-9 * np.arange(len(kept))


def records(store, bench, way, kept, title):
    """Make a network of every seed, and measure it."""

    def one(seed):
        if way == "dense":
            return bench.record(bench.dense(seed))
        return bench.record(WAYS[way][0](bench, seed, kept))

    return [
        store.get(f"{title}/{way}/{kept}/{s}", partial(one, s))
        for s in range(SEEDS)
    ]


def match(store, bench, way, loss, title, dense):
    """Find what to keep for a loss; correct it once if it is missed."""
    lost, aim, tries = grid(store, bench, way, title), loss, []
    for _ in range(2):
        kept = float(np.exp(np.interp(aim, lost, np.log(WAYS[way][1]))))
        found = records(store, bench, way, kept, title)
        pairs = zip(dense, found, strict=True)
        miss = sum(a["val"] - b["val"] for a, b in pairs) / SEEDS - loss
        tries.append((abs(miss), kept, found))
        if abs(miss) <= NEAR:
            break
        aim = loss - miss
    return min(tries, key=lambda t: t[0])[1:]


def run(store, bench, plans, title):
    """Make and measure everything; return {(way, loss): kept, records}."""
    dense = records(store, bench, "dense", None, title)
    found = {("dense", 0.0): (None, dense)}
    for way, loss in tqdm(plans, desc=title):
        if WAYS[way][1]:
            made = match(store, bench, way, loss, title, dense)
        else:
            made = None, records(store, bench, way, None, title)
        found[way, loss] = made
    return found


# ---- what is counted, from the answers alone


def read(records, key="answers"):
    """Return the answers (seeds, images)."""
    texts = [r[key] for r in records]
    return torch.tensor([[int(c, CLASSES) for c in text] for text in texts])


def right(answers, y):
    """Return per cent right in each class, (seeds, classes)."""
    hits = (answers == y).double()
    each = [hits[:, y == c].mean(1) for c in range(CLASSES)]
    return 100 * torch.stack(each, 1)


def rounded(values, digits=2):
    return [round(v, digits) for v in torch.as_tensor(values).tolist()]


def analyzed(change):
    """Tell the classes' own changes from what differs from seed to seed.

    An analysis of variance of (seeds, classes), the mean of a seed aside.
    """
    S, C = change.shape
    d = change - change.mean(1, keepdim=True)
    between = S * d.mean(0).var().item()
    noise = (d - d.mean(0)).square().sum().item() / ((S - 1) * (C - 1))
    return {
        "sd": round((between / S) ** 0.5, 3),
        "sd without noise": round(max(0, (between - noise) / S) ** 0.5, 3),
        "F": round(between / noise, 2),
    }


def by_chance(dense, twins, y, draws=1000):
    """Return F of two halves of the dense networks: median, 95 %, 99 %."""
    every = torch.cat([right(read(r), y)[:, CLEAR] for r in (dense, twins)])
    dice = torch.Generator().manual_seed(0)
    halves = [torch.randperm(len(every), generator=dice) for _ in range(draws)]
    found = [analyzed(every[h[:SEEDS]] - every[h[SEEDS:]])["F"] for h in halves]
    return rounded(torch.tensor(found).quantile(torch.tensor(QUANTILES)))


def compared(a, b, twins, y):
    """Compare answers after and before (seeds, images), class by class.

    The twins judge how hard a class or an image is.
    """
    change, error = right(a, y) - right(b, y), 100 - right(twins, y).mean(0)
    # 0 and O hardly differ: what one loses, the other gains by chance
    clear, error = change[:, CLEAR], error[CLEAR]
    hardest = error.argsort(descending=True)[: len(error) // 3]
    lost = -clear.mean(0)
    apart = measure.exemplars(*(F.one_hot(x, CLASSES).float() for x in (b, a)))
    hits = (twins == y).double().mean(0)
    flips = ((b == y) & (a != y)).double()
    judged = {
        "correlation with error": torch.stack([lost, error]).corrcoef()[0, 1],
        "share of hardest third": 100 * lost[hardest].sum() / lost.sum(),
        "twins right on flips": 100 * (flips * hits).sum() / flips.sum(),
        "twins right on exemplars": 100 * hits[apart].mean(),
    }
    if torch.equal(a, twins):  # they do not judge themselves
        judged = dict.fromkeys(judged, torch.tensor(torch.nan))
    return {
        "agreement": rounded(100 * (a == b).double().mean(1)),
        "negative flips": rounded(100 * flips.mean(1)),
        "change": rounded(change.mean(0)),
        "classes": analyzed(clear),
        "exemplars": round(100 * apart.double().mean().item(), 2),
        **{k: round(v.item(), 2) for k, v in judged.items() if v == v},
    }


def row(way, loss, kept, records, dense, twins, bench):
    """Describe the networks that one way gave, seed by seed."""
    y, h = bench.test[1], bench.hard[1]
    a, b = read(records), read(dense)
    columns = {k: lambda r, k=k: r[k] for k in ("nats", "ece", "ece, hard")}
    for k in bench.garbage:
        columns[f"sure, {k}"] = lambda r, k=k: r["sure"][k]
    return {
        "way": way,
        "loss": loss,
        "kept": kept and round(kept, 4),
        "accuracy": rounded(right(a, y).mean(1)),
        "hard": rounded(100 * (read(records, "hard") == h).double().mean(1)),
        **(compared(a, b, read(twins), y) if way != "dense" else {}),
        "temperature": rounded([r["temperature"] for r in records], 3),
        **{  # as they are, and with the temperature
            name: [rounded(x, 3) for x in zip(*map(of, records), strict=True)]
            for name, of in columns.items()
        },
    }


def tail_row(way, loss, kept, records, dense, bench):
    """Compare rare classes with frequent ones."""
    y = bench.test[1]
    few = torch.stack([rare(s) for s in range(SEEDS)])
    before, after = right(read(dense), y), right(read(records), y)

    def of(values, mask):
        return rounded((values * mask).sum(1) / mask.sum(1))

    return {
        "way": way,
        "loss": loss,
        "kept": kept and round(kept, 4),
        "accuracy": rounded(after.mean(1)),
        "rare": [of(before, few), of(after, few)],
        "frequent": [of(before, ~few), of(after, ~few)],
    }


def main():
    store = Store(__file__)
    place = store.path.with_suffix("")
    place.mkdir(exist_ok=True)
    bench, tail = Bench(place), Bench(place, tail=True)
    large, small = LOSSES
    rows = run(store, tail, [(w, large) for w in IN_TAIL], "tail")
    plans = [(w, large if grid else 0.0) for w, (_, grid) in WAYS.items()]
    plans += [(w, small) for w in SLIGHTLY]
    plain = run(store, bench, plans, "plain")
    dense, twins = plain["dense", 0.0][1], plain["another seed", 0.0][1]
    uncut = rows["dense", 0.0][1]
    _stamp.write(
        __file__,
        {
            "difficulty": [DIFFICULTY, HARD],
            "steps": [STEPS, MORE],
            "images": {k: len(getattr(bench, k)[1]) for k in ("val", "test")},
            "error": rounded(100 - right(read(twins), bench.test[1]).mean(0)),
            "F by chance": by_chance(dense, twins, bench.test[1]),
            "rows": [
                row(*what, *found, dense, twins, bench)
                for what, found in plain.items()
            ],
            "tail": [
                tail_row(*what, *found, uncut, tail)
                for what, found in rows.items()
            ],
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
