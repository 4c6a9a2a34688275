"""A small CNN on glyphs: labels, soft labels, features and relations.

The teacher is the CNN of the zoo.  Every student gets the same number of
steps on the same images, 1,000 or 8,000, and begins at the same weights.
The learning rate is chosen for the labels alone, for each loss on features
a rate and a weight with 1,000 images, all by validation accuracy with seeds
of their own.  A teacher that has seen the same 1,000 images as its student,
and none besides, tells how much of a gain is knowledge of other images.
"""

from functools import partial

import _stamp
import torch
import torch.nn.functional as F
from _lessons import dkd, flattened, hard, smoothed
from _pruning import Store
from tqdm import tqdm

from minicompress import data, distill, models, train, zoo

SEEDS, STEPS, SIZE, LONGER = 5, 800, 64, 4
IMAGES = (1000, 8000)
CHANNELS = (4, 8, 16, 32)
RATES = (1e-2, 3e-2)
WEIGHTS = {
    "hint": (10.0, 100.0, 1000.0),
    "attention": (1.0, 10.0, 100.0),
    "relations": (1.0, 10.0, 100.0),
}
TEMPERATURES = (1.0, 4.0, 8.0)
STAGES = [f"norms.{i}" for i in range(4)]
GUIDED = 2  # the stage whose features are hints
WIDTHS = CHANNELS[GUIDED], 64  # there, of the student and of the teacher


def student(seed):
    torch.manual_seed(seed)
    net = models.CNN(channels=CHANNELS, classes=36)
    torch.manual_seed(seed)
    # a part that its forward does not call: only hints train it
    net.regressor = distill.regressor(*WIDTHS, dims=2)
    return net


def seen_by(model, x):
    """Return the logits, the features of every stage, the last embedding."""
    with distill.record(model, STAGES) as seen:
        z = model(x)
    features = [F.relu(seen[name]) for name in STAGES]
    return z, features, features[-1].mean((2, 3))


def lessons(teacher, X):
    """Compute what the teacher has to say of each image, once for all."""
    rows = []
    with train.evaluating(teacher):
        for x in tqdm(X.split(500), desc="teacher"):
            v, features, embedding = seen_by(teacher, x)
            maps = [distill.attention_map(A) for A in features]
            rows.append((v, features[GUIDED], embedding, *maps))
    return [torch.cat(column) for column in zip(*rows, strict=True)]


def hint(net, batch, *, weight):
    x, y, _, guide, _, *_ = batch
    z, features, _ = seen_by(net, x)
    near = distill.hint(features[GUIDED], guide, net.regressor)
    return F.cross_entropy(z, y) + weight * near / guide[0].numel()


def attention(net, batch, *, weight, alpha=0.0):
    x, y, v, _, _, *maps = batch
    z, features, _ = seen_by(net, x)
    loss = distill.hinton(z, v, y, temperature=4.0, alpha=alpha)
    for A, map in zip(features, maps, strict=True):
        own = distill.attention_map(A)
        loss = loss + weight * (own - map).norm(dim=1).mean() / 2
    return loss


def relations(net, batch, *, weight):
    x, y, _, _, t, *_ = batch
    z, _, s = seen_by(net, x)
    near = distill.rkd_distance(s, t) + 2 * distill.rkd_angle(s, t)
    return F.cross_entropy(z, y) + weight * near


def on_logits(loss, **options):
    taught = distill.cached(loss, **options)
    return lambda net, batch: taught(net, batch[:3])


MANY = ("hard", "T=1", "T=4", "hint", "attention", "relations")
FEATURES = {"hint": hint, "attention": attention, "relations": relations}


def losses(weights):
    soft = {
        f"T={T:g}": on_logits(distill.hinton, temperature=T, alpha=0.9)
        for T in TEMPERATURES
    }
    inside = {
        name: partial(loss, weight=weights[name])
        for name, loss in FEATURES.items()
    }
    both = partial(attention, weight=weights["attention"], alpha=0.9)
    return {
        "hard": hard,
        "smoothed": smoothed,
        **soft,
        "T=4, flattened": on_logits(flattened),
        "DKD": on_logits(dkd),
        **inside,
        "T=4 + attention": both,
    }


def chosen(y, n, seed):
    if n == len(y):
        return torch.arange(n)
    return data.few(y, n // 36, seed=seed)[0]


def fit(start, parts, loss, seed, lr, steps=STEPS):
    epochs = -(-steps * SIZE // len(parts[0])) + 1
    feed = train.batches(*parts, size=SIZE, epochs=epochs, seed=seed)
    return train.fit(start, feed, loss, lr=lr, steps=steps, seed=seed)


def run(task, taught, n, loss, seed, lr, split="test", steps=STEPS):
    X, y = task.train
    at = chosen(y, n, seed)
    parts = [t[at] for t in (X, y, *taught)]
    net = fit(student(seed), parts, loss, seed, lr, steps)
    return round(100 * train.accuracy(net, *getattr(task, split)), 2)


def own_teacher(task, n, seed, lr):
    """Distil from a large network that saw the student's images only."""
    X, y = task.train
    at = chosen(y, n, seed)
    torch.manual_seed(1000 + seed)
    large = models.CNN(channels=(16, 32, 64, 128), classes=36)
    teacher = fit(large, (X[at], y[at]), train.cross_entropy, seed, 3e-3)
    V = distill.teacher_logits(teacher, X[at])
    loss = distill.cached(distill.hinton, temperature=4.0, alpha=0.9)
    net = fit(student(seed), (X[at], y[at], V), loss, seed, lr)
    both = (teacher, net)
    return [round(100 * train.accuracy(m, *task.test), 2) for m in both]


def main():
    store = Store(__file__)
    teacher, task = zoo.load("glyphs-cnn"), zoo.task("glyphs-cnn")
    taught = lessons(teacher, task.train[0])
    args = task, taught

    def validated(name, n, loss, lr):
        """Average the validation accuracy of two seeds of their own."""
        scores = [
            store.get(
                f"val/{n}/{name}/{lr}/{seed}",
                partial(run, *args, n, loss, seed, lr, "val"),
            )
            for seed in (100, 101)
        ]
        return sum(scores) / 2

    rates = {
        n: max(RATES, key=lambda lr, n=n: validated("hard", n, hard, lr))
        for n in IMAGES
    }
    pairs = {}
    for name, loss in tqdm(FEATURES.items(), desc="weights"):
        scores = {
            (w, lr): validated(
                f"{name} {w:g}", 1000, partial(loss, weight=w), lr
            )
            for w in WEIGHTS[name]
            for lr in RATES
        }
        pairs[name] = max(scores, key=scores.get)
    weights = {name: w for name, (w, _) in pairs.items()}
    inside = {name: lr for name, (_, lr) in pairs.items()}
    found = {}
    for n in IMAGES:
        for name, loss in tqdm(losses(weights).items(), desc=f"{n} images"):
            if n > 1000 and name not in MANY:
                continue
            rate = inside.get(name, rates[n]) if n == 1000 else rates[n]
            for seed in range(SEEDS):
                value = store.get(
                    f"{n}/{name}/{rate}/{seed}",
                    partial(run, *args, n, loss, seed, rate),
                )
                found.setdefault(f"{n}/{name}", []).append(value)
    # is the gain one of speed?  More steps, and a larger rate, for both
    others = {
        "longer": (rates[1000], {"steps": LONGER * STEPS}),
        "faster": (2 * rates[1000], {}),
    }
    for kind, (rate, more) in others.items():
        for name in ("hard", "T=4"):
            loss = losses(weights)[name]
            for seed in tqdm(range(SEEDS), desc=f"{name}, {kind}"):
                value = store.get(
                    f"{kind}/{name}/{seed}",
                    partial(run, *args, 1000, loss, seed, rate, **more),
                )
                found.setdefault(f"1000/{name}, {kind}", []).append(value)
    for seed in tqdm(range(SEEDS), desc="own teachers"):
        large, small = store.get(
            f"own/{seed}", partial(own_teacher, task, 1000, seed, rates[1000])
        )
        found.setdefault("1000/own teacher", []).append(large)
        found.setdefault("1000/T=4, own teacher", []).append(small)
    _stamp.write(
        __file__,
        {
            "teacher": 100 * zoo.quality(teacher, task),
            "parameters": sum(
                p.numel()
                for name, p in student(0).named_parameters()
                if not name.startswith("regressor")
            ),
            "rates": rates,
            "weights": weights,
            "rates of features": inside,
            "validation": {
                name: value
                for name, value in store.values.items()
                if name.startswith("val/")
            },
            "runs": found,
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
