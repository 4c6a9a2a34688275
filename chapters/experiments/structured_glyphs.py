"""Every criterion of structured pruning on three CNNs for glyphs.

All networks of a row have the same MACs, to within one channel.  The same
networks are measured as they are, with batch norms counted anew, with their
readers refit, and after a short training; beside them the dense network
trained for as long, and the small architecture trained from scratch.
"""

from functools import cache, partial

import _stamp
import torch
from _pruning import Store
from tqdm import tqdm

from minicompress import data, distill, measure, models, prune, train

SEEDS, CHANNELS = 3, (16, 32, 64, 128)
EPOCHS, MORE, SIZE = 8, 2, 64  # training, and after the pruning
LR = 1e-2  # of the whole networks; 3e-3 is two points worse on validation data
BUDGETS = (0.75, 0.5, 0.25, 0.1)  # of the MACs
TRAINED = (0.5, 0.25)
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
SLIMMING = 1e-2  # of 1e-3, 3e-3, 1e-2 the best on validation data, at 3e-3
SEEN = 8  # batches of 64 training images that the criteria see
CRITERIA = (
    "random",
    "L1 of filters",
    "L2 of filters",
    "geometric median",
    "BatchNorm scale",
    "Taylor, mean of |g|",
    "Taylor, square of mean g",
    "Fisher",
    "entropy",
    "zeros (APoZ)",
    "ThiNet",
    "lasso",
)
AFTER = (  # of these the networks are trained on
    "random",
    "L1 of filters",
    "geometric median",
    "BatchNorm scale",
    "Taylor, mean of |g|",
    "entropy",
    "zeros (APoZ)",
    "ThiNet",
)
GLOBAL = ("L1 of filters", "Taylor, mean of |g|", "Fisher", "ThiNet")


def feed(task, epochs, seed):
    return train.batches(*task.train, size=SIZE, epochs=epochs, seed=seed)


def fresh(seed, channels=CHANNELS):
    torch.manual_seed(seed)
    return models.CNN(channels=channels, classes=36)


def slim(model, batch):
    return train.cross_entropy(model, batch) + SLIMMING * prune.slimming(model)


class Subject:
    """One trained network, the batches it shows, and all scores of it."""

    def __init__(self, model, task, seed):
        self.model, self.task, self.seed = model, task, seed
        X, y = task.train
        dice = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(X), generator=dice)[: SEEN * SIZE]
        parts = some.split(SIZE)
        self.batches = [(X[part], y[part]) for part in parts]
        self.x = X[:2]
        self.groups = prune.groups(model, self.x)
        self.macs = self.cost(model)

    def cost(self, model):
        return measure.macs(model, self.x[:1])

    @cache  # noqa: B019
    def gates(self):
        return prune.gates(self.model, self.groups, self.batches)

    @cache  # noqa: B019
    def scores(self, criterion):
        m, g, b = self.model, self.groups, self.batches
        by_gate = {
            "Taylor, mean of |g|": lambda x: x.abs().mean(0),
            "Taylor, square of mean g": lambda x: x.mean(0).square(),
            "Fisher": lambda x: x.square().mean(0) / 2,
        }
        if criterion in by_gate:
            f = by_gate[criterion]
            return {n: f(x) for n, x in self.gates().items()}
        if criterion == "random":
            dice = torch.Generator().manual_seed(self.seed)
            return {x.name: torch.rand(x.size, generator=dice) for x in g}
        if criterion == "entropy":
            acts = prune.unit_activations(m, g, b)
            return {n: prune.channel_entropy(x) for n, x in acts.items()}
        if criterion == "zeros (APoZ)":
            acts = prune.unit_activations(m, g, b, of=positive)
            return {n: x.mean(0) for n, x in acts.items()}
        return {
            "L1 of filters": lambda: prune.filter_norms(m, g),
            "L2 of filters": lambda: prune.filter_norms(m, g, p=2),
            "geometric median": lambda: prune.filter_distances(m, g),
            "BatchNorm scale": lambda: prune.norm_scales(m, g),
            "ThiNet": lambda: prune.reconstruction_scores(m, g, b),
            "lasso": lambda: prune.reconstruction_scores(
                m, g, b, rule=prune.lasso
            ),
        }[criterion]()

    def keep(self, criterion, budget, rule="each"):
        scores, select = self.scores(criterion), prune.keep_each
        if rule.startswith("global"):
            select = prune.keep_global
            by = torch.linalg.vector_norm if "length" in rule else torch.mean
            scores = prune.normalized(scores, by=by)
        return prune.within(
            self.model,
            scores,
            self.x,
            cost=self.cost,
            budget=budget * self.macs,
            select=select,
        )

    def removed(self, keep):
        return prune.remove_channels(self.model, keep, self.x)

    def refit(self, keep):
        wide = prune.refit(self.model, self.groups, keep, self.batches)
        return prune.remove_channels(wide, keep, self.x)


def positive(x):
    return (x > 0).float()


def percent(model, task, split="test"):
    return round(100 * train.accuracy(model, *getattr(task, split)), 2)


def once(subject, criterion, budget, rule):
    """Measure one way to prune, without training."""
    keep = subject.keep(criterion, budget, rule)
    small, refit = subject.removed(keep), subject.refit(keep)
    nets = {
        "plain": small,
        "norms": prune.renormalize(small, subject.batches),
        "refit": refit,
        "refit, norms": prune.renormalize(refit, subject.batches),
    }
    return {
        "kept": [int(mask.sum()) for mask in keep.values()],
        "macs": round(subject.cost(small) / subject.macs, 4),
    } | {name: percent(net, subject.task) for name, net in nets.items()}


def tune(net, subject, lr, *, epochs=MORE, teacher=None, split="test"):
    """Train a small network on; a teacher makes it distillation."""
    loss = train.cross_entropy
    if teacher is not None:
        loss = distill.taught(
            teacher, partial(distill.hinton, temperature=4.0, alpha=0.9)
        )
    batches = feed(subject.task, epochs, 100 + subject.seed)
    return percent(train.fit(net, batches, loss, lr=lr), subject.task, split)


def tuned(subject, lr, criterion, budget, start="plain", teacher=False):
    keep = subject.keep(criterion, budget)
    net = (subject.removed if start == "plain" else subject.refit)(keep)
    teacher = subject.model if teacher else None
    return tune(net, subject, lr, teacher=teacher)


def in_rounds(subject, lr, budget, rounds, teacher):
    """Prune by Taylor scores in rounds; the training is divided up."""
    steps = MORE * -(-len(subject.task.train[0]) // SIZE) // rounds
    whole = subject.model
    turn = iter(range(rounds))

    def fit(net):
        batches = feed(subject.task, MORE, 100 + subject.seed + next(turn))
        loss = train.cross_entropy
        if teacher:
            loss = distill.taught(
                whole, partial(distill.hinton, temperature=4.0, alpha=0.9)
            )
        return train.fit(net, batches, loss, lr=lr, steps=steps)

    def score(net, groups):
        g = prune.gates(net, groups, subject.batches)
        return {n: x.abs().mean(0) for n, x in g.items()}

    small = prune.shrink(
        whole,
        score,
        subject.x,
        cost=subject.cost,
        budget=budget * subject.macs,
        train=fit,
        rounds=rounds,
        select=prune.keep_each,
    )
    return percent(small, subject.task)


def from_scratch(subject, lr, budget, factor, split="test"):
    """Train the small architecture from new weights, at the pruned cost.

    For `factor` times as many steps as training and fine-tuning took.
    """
    keep = subject.keep("L1 of filters", budget)
    channels = [int(mask.sum()) for mask in keep.values()]
    net = fresh(50 + subject.seed, channels)
    epochs = round((EPOCHS + MORE) * factor)
    batches = feed(subject.task, epochs, 200 + subject.seed)
    return percent(train.fit(net, batches, lr=lr), subject.task, split)


def main():
    store, task = Store(__file__), data.glyphs(difficulty=1.0)
    place = store.path.with_suffix("")
    place.mkdir(exist_ok=True)

    def trained(kind, seed, loss):
        path = place / f"{kind}-{seed}.pt"
        net = fresh(seed)
        batches = feed(task, EPOCHS, seed)
        if not path.exists():
            net = train.fit(net, batches, loss, lr=LR, progress=True)
            torch.save(net.state_dict(), path)
        net.load_state_dict(torch.load(path))
        return Subject(net.eval(), task, seed)

    subjects = [
        trained("plain", seed, train.cross_entropy) for seed in range(SEEDS)
    ]
    slimmed = [trained("slim", seed, slim) for seed in range(SEEDS)]

    def each(key, compute, *args, of=subjects):
        return [
            store.get(f"{key}/{s.seed}", partial(compute, s, *args)) for s in of
        ]

    def choose(quality, subjects):
        """Choose a learning rate on validation data."""
        found = {lr: sum(quality(s, lr) for s in subjects) for lr in RATES}
        return max(found, key=found.get)

    lrs = {
        "pruned": lambda s, lr: tune(
            s.removed(s.keep("L1 of filters", 0.25)), s, lr, split="val"
        ),
        "dense": lambda s, lr: tune(s.model, s, lr, split="val"),
        "scratch": lambda s, lr: from_scratch(s, lr, 0.25, 1, "val"),
    }
    lrs = {
        name: store.get(f"lr/{name}", partial(choose, f, subjects[:2]))
        for name, f in tqdm(lrs.items(), desc="learning rates")
    }
    lr = lrs["pruned"]
    rows = []

    def add(key, compute, *args, of=subjects, **what):
        rows.append({**what, "accuracy": each(key, compute, *args, of=of)})

    plans = [(c, "each") for c in CRITERIA] + [(c, "global") for c in GLOBAL]
    plans.append(("Taylor, mean of |g|", "global, by length"))
    for criterion, rule in tqdm(plans, desc="once"):
        for budget in BUDGETS:
            key = f"once/{criterion}/{rule}/{budget}"
            found = each(key, once, criterion, budget, rule)
            rows.append(
                {
                    "when": "once",
                    "criterion": criterion,
                    "rule": rule,
                    "budget": budget,
                    **{k: [f[k] for f in found] for k in found[0]},
                }
            )
    for budget in tqdm(TRAINED, desc="trained"):
        what = {"budget": budget}
        for c in AFTER:
            add(
                f"after/{c}/{budget}",
                tuned,
                lr,
                c,
                budget,
                when="after",
                criterion=c,
                **what,
            )
        for c in ("random", "ThiNet"):
            add(
                f"refit/{c}/{budget}",
                tuned,
                lr,
                c,
                budget,
                "refit",
                when="after",
                criterion=f"{c}, refit first",
                **what,
            )
        add(
            f"slimming/{budget}",
            tuned,
            lr,
            "BatchNorm scale",
            budget,
            of=slimmed,
            when="after",
            criterion="network slimming",
            **what,
        )
        add(
            f"taught/{budget}",
            tuned,
            lr,
            "Taylor, mean of |g|",
            budget,
            "plain",
            True,
            when="after",
            criterion="Taylor, distilled",
            **what,
        )
        for teacher, name in ((False, ""), (True, ", distilled")):
            add(
                f"rounds/{teacher}/{budget}",
                in_rounds,
                lr,
                budget,
                4,
                teacher,
                when="after",
                criterion=f"Taylor, 4 rounds{name}",
                **what,
            )
        for factor, name in ((1, "as many steps"), (2, "twice as many")):
            add(
                f"scratch/{budget}/{name}",
                from_scratch,
                lrs["scratch"],
                budget,
                factor,
                when="after",
                criterion=f"from scratch, {name}",
                **what,
            )
    _stamp.write(
        __file__,
        {
            "lr": lrs,
            "macs": subjects[0].macs,
            "channels": list(CHANNELS),
            "epochs": [EPOCHS, MORE],
            "dense": [percent(s.model, task) for s in subjects],
            "slimmed": [percent(s.model, task) for s in slimmed],
            "dense, trained on": each("longer", lambda s: tune(s.model, s, lr)),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
