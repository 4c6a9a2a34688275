"""Which sparsity for which layer of a CNN: an agent against simple rules.

The layers of the digits CNN may each lose one of eight fractions of their
weights, and what is left shares 16 values; nothing is trained.  All 4,096
combinations are evaluated once, so that the best within a budget is known.
AMC, random draws under its own clipping and others look for it by the loss on
validation data; what each finds is then measured on test data.
"""

from copy import deepcopy
from functools import partial
from itertools import product

import _stamp
import torch
from _pruning import Store
from tqdm import tqdm

from minicompress import (
    data,
    entropy,
    pipeline,
    quantize,
    storage,
    train,
    zoo,
)

SPARSITIES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
BITS = 4
BUDGETS = (6000, 7000, 8000)  # bytes of the codes, without header and biases
EVALUATIONS, SEEDS = 100, 10
MARKS = (25, 50, 100)
WARM = (0.25, 0.5)  # fractions of the evaluations that are drawn at random


class Space:
    """Every choice for every layer, decoded, with its bytes."""

    def __init__(self, model):
        makers = {s: pipeline.Choice(s, BITS) for s in SPARSITIES}
        coders = (entropy.huffman,)
        self.model, self.task = deepcopy(model), data.digits()
        made = pipeline.options(model, makers, coders=coders)
        self.names = [*made]
        self.costs = {
            n: {s: storage.payload(c) for s, c in own.items()}
            for n, own in made.items()
        }
        self.weights = {
            n: {s: c.decode() for s, c in own.items()}
            for n, own in made.items()
        }
        self.made = made

    def changed(self, choice):
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, s in choice.items():
                own[name].copy_(self.weights[name][s])
        return self.model

    def loss(self, choice):
        X, y = self.task.val
        with torch.no_grad():
            return float(train.cross_entropy(self.changed(choice), (X, y)))

    def test(self, choice):
        accuracy = train.accuracy(self.changed(choice), *self.task.test)
        return round(100 * accuracy, 2)

    def bytes(self, choice):
        return sum(self.costs[n][s] for n, s in choice.items())


def everything(space):
    """Evaluate all combinations: {sparsities: loss}."""
    found = {}
    for arch in tqdm([*product(SPARSITIES, repeat=len(space.names))]):
        found[key(arch)] = round(
            space.loss(dict(zip(space.names, arch, strict=True))), 5
        )
    return found


def key(arch):
    return " ".join(map(str, arch))


def searches(space, losses, budget):
    """Run the agent and its control, on the losses that are known."""

    def evaluate(choice):
        return losses[key(choice.values())]

    own = dict(space.model.named_parameters())
    features = {n: tuple(own[n].flatten(1).shape) for n in space.names}
    agents = {
        f"AMC, {w:.0%} at random": partial(
            pipeline.amc, features=features, warm_up=w
        )
        for w in WARM
    }
    found = {}
    for name, search in {**agents, "random": pipeline.random_within}.items():
        rows = []
        for seed in range(SEEDS):
            history = search(
                space.costs,
                evaluate,
                budget=budget,
                evaluations=EVALUATIONS,
                seed=seed,
            )
            best = history.curve()[1]
            rows.append(
                {
                    "loss": [round(best[n - 1], 4) for n in MARKS],
                    "test": space.test(history.best.arch),
                    "later": round(mean(history.records[MARKS[1] :]), 3),
                }
            )
        found[name] = {k: [r[k] for r in rows] for k in rows[0]}
    return found


def mean(records):
    return sum(r.loss for r in records) / len(records)


def rules(space, losses, budget, table):
    """Pick without a search: the same for all, by sensitivities, the best."""
    within = [
        arch
        for arch in product(SPARSITIES, repeat=len(space.names))
        if space.bytes(dict(zip(space.names, arch, strict=True))) <= budget
    ]
    same = [a for a in within if len({*a}) == 1]
    picked = {
        "one sparsity": min(same, key=lambda a: losses[key(a)], default=None),
        "knapsack": tuple(quantize.knapsack(table, budget=budget).values()),
        "greedy": tuple(quantize.greedy(table, budget=budget).values()),
        "best of all": min(within, key=lambda a: losses[key(a)]),
    }
    found = {"within the budget": len(within)}
    for name, arch in picked.items():
        if arch is None:
            continue
        choice = dict(zip(space.names, arch, strict=True))
        found[name] = {
            "choice": arch,
            "bytes": space.bytes(choice),
            "loss": round(losses[key(arch)], 4),
            "test": space.test(choice),
            "rank": sum(losses[key(a)] < losses[key(arch)] for a in within),
        }
    return found


def main():
    model, store = zoo.load("digits-cnn"), Store(__file__)
    space = Space(model)
    losses = store.get("all", partial(everything, space))

    def loss(net):
        return float(train.cross_entropy(net, space.task.val).detach())

    table = quantize.sensitivity(model, space.made, loss)
    own = model.state_dict()
    _stamp.write(
        __file__,
        {
            "layers": space.names,
            "sparsities": SPARSITIES,
            "bits": BITS,
            "evaluations": EVALUATIONS,
            "marks": MARKS,
            "evaluations of the knapsack": len(SPARSITIES) * len(space.names),
            "original": {
                "loss": round(loss(model), 4),
                "test": round(100 * train.accuracy(model, *space.task.test), 2),
                "bytes": sum(4 * own[n].numel() for n in space.names),
            },
            "budgets": {
                str(b): {
                    "rules": rules(space, losses, b, table),
                    "searches": searches(space, losses, b),
                }
                for b in BUDGETS
            },
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
