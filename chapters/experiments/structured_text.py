"""Heads and hidden units of the zoo's language model, by every criterion.

First one kind of unit at a time, without training.  Then half of the heads
and half of the hidden units, with a short training afterwards: on the text,
or taught by the whole model; beside them the small architecture trained from
scratch, and the whole model trained on.
"""

from functools import cache, partial

import _stamp
import torch
from _pruning import Store
from tqdm import tqdm

from minicompress import data, distill, measure, models, prune, train, zoo

DRAWS, SEEN, LENGTH, SIZE = 3, 8, 128, 8  # batches for calibration
MORE, RATES = 150, (1e-3, 3e-3, 1e-2)  # steps after the pruning
SCRATCH = 2000
CRITERIA = (
    "random",
    "L1 of rows",
    "geometric median",
    "Taylor, mean of |g|",
    "Fisher",
    "entropy",
    "ThiNet",
    "lasso",
)
KINDS = {"heads": "attention.q", "hidden units": "up"}
PLANS = [
    ("heads", 0.25),
    ("heads", 0.5),
    ("hidden units", 0.25),
    ("hidden units", 0.5),
    ("hidden units", 0.75),
]
WIDTHS = (120, 112, 96, 80, 64)  # of 128
TRAINED = ("random", "L1 of rows", "Taylor, mean of |g|", "ThiNet")


class Subject:
    """The model, the passages of one draw, and all scores from them."""

    def __init__(self, model, task, draw):
        self.model, self.task, self.draw = model, task, draw
        self.ids = data.Tokenizer().encode(task.train)
        self.batches = list(self.feed(SEEN, 1000 + draw))
        self.x = self.batches[0][0][:2]
        self.groups = prune.groups(model, self.x)

    def feed(self, steps, seed):
        return train.passages(
            self.ids, length=LENGTH, size=SIZE, steps=steps, seed=seed
        )

    @cache  # noqa: B019
    def scores(self, criterion):
        m, g, b = self.model, self.groups, self.batches
        if criterion == "random":
            dice = torch.Generator().manual_seed(self.draw)
            return {x.name: torch.rand(x.size, generator=dice) for x in g}
        if criterion in ("Taylor, mean of |g|", "Fisher"):
            gates = self.gates()
            if criterion == "Fisher":
                return {n: x.square().mean(0) / 2 for n, x in gates.items()}
            return {n: x.abs().mean(0) for n, x in gates.items()}
        if criterion == "entropy":
            acts = prune.unit_activations(m, g, b)
            return {n: prune.channel_entropy(x) for n, x in acts.items()}
        rule = prune.lasso if criterion == "lasso" else prune.thinet
        inner = [x for x in g if x.name != "tokens"]
        return {
            "L1 of rows": lambda: prune.filter_norms(m, g),
            "geometric median": lambda: prune.filter_distances(m, g),
        }.get(
            criterion,
            lambda: prune.reconstruction_scores(m, inner, b, rule=rule),
        )()

    @cache  # noqa: B019
    def gates(self):
        return prune.gates(self.model, self.groups, self.batches)

    def keep(self, criterion, shares):
        """Keep the best units; `shares` says of which kinds how many go."""
        keep = {}
        for kind, share in shares.items():
            scores = {
                n: s
                for n, s in self.scores(criterion).items()
                if n.endswith(KINDS[kind])
            }
            keep |= prune.keep_units(
                self.groups, scores, sparsity=share, select=prune.keep_each
            )
        return keep

    def nets(self, keep):
        folded = prune.fold_means(self.model, self.groups, keep, self.batches)
        fitted = prune.refit(self.model, self.groups, keep, self.batches)
        nets = {"plain": self.model, "means": folded, "refit": fitted}
        return {
            name: prune.remove_channels(net, keep, self.x)
            for name, net in nets.items()
        }


def once(subject, criterion, kind, share):
    nets = subject.nets(subject.keep(criterion, {kind: share}))
    bits = {n: round(zoo.quality(m, subject.task), 4) for n, m in nets.items()}
    return {"parameters": measure.params(nets["plain"])} | bits


def tune(net, subject, lr, *, teacher=None, steps=MORE, split="test"):
    loss = train.cross_entropy
    if teacher is not None:
        loss = distill.taught(
            teacher, partial(distill.hinton, temperature=1.0, alpha=0.9)
        )
    feed = subject.feed(steps, subject.draw)
    net = train.fit(net, feed, loss, lr=lr, clip=1.0, seed=subject.draw)
    return round(zoo.quality(net, subject.task, split), 4)


HALF = {"heads": 0.5, "hidden units": 0.5}


def after(subject, lr, criterion, start, taught):
    nets = subject.nets(subject.keep(criterion, HALF))
    teacher = subject.model if taught else None
    return {
        "before": round(zoo.quality(nets[start], subject.task), 4),
        "after": tune(nets[start], subject, lr, teacher=teacher),
    }


def stream(subject, width):
    """Narrow the residual stream: by coordinates, by directions."""
    m, n = subject.model, subject.model.tokens.embedding_dim
    nets = {"directions": prune.sliced(m, subject.batches, width=width)}
    for c in ("random", "L1 of rows", "Taylor, mean of |g|"):
        scores = {"tokens": subject.scores(c)["tokens"]}
        keep = prune.keep_units(subject.groups, scores, sparsity=1 - width / n)
        nets[c] = prune.remove_channels(m, keep, subject.x)
    bits = {
        k: round(zoo.quality(net, subject.task), 4) for k, net in nets.items()
    }
    counts = {k: measure.params(net) for k, net in nets.items()}
    return {"bits": bits, "parameters": counts}


def from_scratch(subject, lr, steps=SCRATCH, split="test"):
    """Train the small architecture anew, for many times as many steps."""
    config = subject.model.config
    torch.manual_seed(subject.draw)
    whole = models.LM(**config)
    scores = prune.filter_norms(whole, prune.groups(whole, subject.x))
    keep = {
        n: torch.arange(len(s)) < len(s) // 2
        for n, s in scores.items()
        if n != "tokens"
    }
    net = prune.remove_channels(whole, keep, subject.x)
    return tune(net, subject, lr, steps=steps, split=split)


def main():
    store, task = Store(__file__), zoo.task("reference-lm")
    model = zoo.load("reference-lm")
    subjects = [Subject(model, task, draw) for draw in range(DRAWS)]

    def each(key, compute, *args):
        return [
            store.get(f"{key}/{s.draw}", partial(compute, s, *args))
            for s in subjects
        ]

    rows = []
    for kind, share in tqdm(PLANS, desc="once"):
        for c in CRITERIA:
            found = each(f"once/{kind}/{share}/{c}", once, c, kind, share)
            row = {k: [f[k] for f in found] for k in found[0]}
            row["parameters"] = row["parameters"][0]
            rows.append({"kind": kind, "share": share, "criterion": c, **row})

    streams = [
        {"width": w, "draws": each(f"stream/{w}", stream, w)}
        for w in tqdm(WIDTHS, desc="stream")
    ]

    def choose(quality):
        """Choose a learning rate on the validation text, by one draw."""
        found = {lr: quality(subjects[0], lr) for lr in RATES}
        return min(found, key=found.get)

    lrs = {
        "pruned": lambda s, lr: tune(
            s.nets(s.keep("L1 of rows", HALF))["plain"], s, lr, split="val"
        ),
        "dense": lambda s, lr: tune(s.model, s, lr, split="val"),
        "scratch": lambda s, lr: from_scratch(s, lr, SCRATCH // 4, "val"),
    }
    lrs = {
        name: store.get(f"lr/{name}", partial(choose, f))
        for name, f in tqdm(lrs.items(), desc="learning rates")
    }
    lr = lrs["pruned"]
    trained = []
    plans = [(c, "plain", False) for c in TRAINED]
    plans += [("random", "refit", False), ("ThiNet", "refit", False)]
    plans += [("Taylor, mean of |g|", "plain", True), ("ThiNet", "refit", True)]
    for c, start, taught in tqdm(plans, desc="trained"):
        found = each(f"after/{c}/{start}/{taught}", after, lr, c, start, taught)
        trained.append(
            {
                "criterion": c,
                "start": start,
                "taught": taught,
                **{k: [f[k] for f in found] for k in found[0]},
            }
        )
    _stamp.write(
        __file__,
        {
            "lr": lrs,
            "steps": {"after": MORE, "scratch": SCRATCH},
            "parameters": measure.params(model),
            "dense": round(zoo.quality(model, task), 4),
            "dense, trained on": each(
                "longer", lambda s: tune(model, s, lrs["dense"])
            ),
            "from scratch": each("scratch", from_scratch, lrs["scratch"]),
            "rows": rows,
            "streams": streams,
            "trained": trained,
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
