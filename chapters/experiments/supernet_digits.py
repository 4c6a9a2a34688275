"""Judge 882 networks for digits by the weights of one that contains them all.

    python chapters/experiments/supernet_digits.py

Needs the table of searched_digits.py, trained on the same 300 digits.
Supernets (width 8, 5×5 everywhere) are trained in four ways at equal cost,
counted in networks × steps: one random path, the sandwich rule, the sandwich
rule with in-place distillation, and one random path with weights of their own
for each operation; two of them also for a shorter or a longer time.  300 random
members are then judged on the validation digits by their inherited weights,
with BatchNorm's averages measured anew and, every third, as they are.  This
is compared with the table: rank correlation, and what the choice is worth.
At last the chosen networks train on.  Learning rates are chosen on the
validation digits by the first seed.  Ctrl-C is harmless: the same command
goes on from where it stopped.
"""

import json
import random
from collections import OrderedDict
from functools import cache, partial

import _stamp
import torch
from _pruning import Store
from searched_digits import SIZE, errors, parts
from torch import nn
from tqdm import tqdm

from minicompress import nas, train
from minicompress.nas import chains

SEEDS, STEPS = 3, 180
LAYERS = [f"layer{i}" for i in range(1, 5)]
LARGEST = {"width": 8, **dict.fromkeys(LAYERS, "conv5")}
SMALLEST = {"width": 4, **dict.fromkeys(LAYERS, "skip")}
SANDWICH = {"paths": 2, "extremes": (LARGEST, SMALLEST)}
WAYS = {
    "single path": {"paths": 1},
    "sandwich": SANDWICH,
    "distilled": {**SANDWICH, "distill": True},
    "separate": {"paths": 1},
}
COST, COSTS = 1440, {"single path": (360, 5760), "distilled": (5760,)}
RATES = (1e-2, 3e-2)
SEEN = 40  # members that choose the rate
THIRD, LOOKS, TOP, DRAWS = 3, 50, 10, 2000
MORE, MORE_RATES = (45, 180), (3e-3, 1e-2)
SPACE = list(nas.digits_space())
JUDGED = sorted(random.Random(1).sample(range(len(SPACE)), 300))


def separate(arch):
    """Build a member in which the name of a layer tells its operation."""
    net = nas.digits_network(arch)
    for name in LAYERS:
        block = OrderedDict({arch[name]: getattr(net, name)})
        setattr(net, name, nn.Sequential(block))
    return net


def largest(way):
    """Build the untrained supernet."""
    net = nas.digits_network(LARGEST)
    for name in LAYERS if way == "separate" else ():
        c = LARGEST["width"] * (1 if name in LAYERS[:2] else 2)
        ops = {op: chains.operation(op, c) for op in chains.OPS}
        setattr(net, name, nn.ModuleDict(ops))
    return net


@cache
def member(way, position):
    """Build a member without memory; only its structure is used."""
    build = separate if way == "separate" else nas.digits_network
    with torch.device("meta"):
        return build(SPACE[position])


def feed(steps, seed):
    fit, _, _ = parts()
    epochs = -(-steps * SIZE // len(fit[0]))
    return train.batches(*fit, size=SIZE, epochs=epochs, seed=seed)


@cache
def supernet(way, cost, lr, seed):
    """Train a supernet for as many networks × steps."""
    options = WAYS[way]
    steps = cost // (options["paths"] + len(options.get("extremes", ())))
    positions = {tuple(a.items()): i for i, a in enumerate(SPACE)}
    torch.manual_seed(seed)
    return nas.fit_supernet(
        largest(way),
        lambda arch: member(way, positions[tuple(arch.items())]),
        nas.digits_space(),
        feed(steps, seed),
        lr=lr,
        steps=steps,
        seed=seed,
        **options,
    )


def inherited(large, way, position, anew=True):
    """Cut a network out of a supernet."""
    net = nas.subnet(large, member(way, position))
    fit, _, _ = parts()
    return nas.recalibrate(net, [fit[0]]) if anew else net


def judge(net):
    """Count validation errors; a tie is decided by the cross-entropy."""
    _, val, _ = parts()
    wrong, mnats = errors(net, *val)
    return round(wrong + min(mnats, 999_999) / 1e6, 6)


def judged(way, cost, lr, seed):
    """Judge members, some also with the averages of the supernet."""
    large, some = supernet(way, cost, lr, seed), JUDGED[::THIRD]
    return {
        "anew": [judge(inherited(large, way, i)) for i in JUDGED],
        "as it is": [judge(inherited(large, way, i, False)) for i in some],
    }


def rate(store, way):
    """Choose the learning rate by some members and the first seed."""
    some = random.Random(0).sample(range(len(SPACE)), SEEN)
    found = {
        lr: store.get(
            f"rate/{way}/{lr}",
            lambda lr=lr: sum(
                judge(inherited(supernet(way, COST, lr, 0), way, i))
                for i in some
            ),
        )
        for lr in RATES
    }
    return min(found, key=found.get)


def specialized(way, lr, seed, position):
    """Measure a chosen network as it is, and after more training."""
    _, val, test = parts()
    net = inherited(supernet(way, COST, lr, seed), way, position)
    found = {"0": errors(net, *test)[0]}
    for steps in MORE:
        nets = [
            train.fit(net, feed(steps, 100 + seed), lr=r, steps=steps)
            for r in MORE_RATES
        ]
        best = min(nets, key=lambda n: errors(n, *val))
        found[str(steps)] = errors(best, *test)[0]
    return found


class Table:
    """What the networks are worth when each is trained alone."""

    def __init__(self):
        path = _stamp.RESULTS / "searched_digits.json"
        self.rows = json.loads(path.read_text("utf8"))["rows"]
        runs = torch.tensor([row[str(STEPS)] for row in self.rows]).double()
        self.val, test = runs[..., 0], runs[..., 2]  # (networks, seeds)
        self.truth = test.mean(1) / 5  # per cent of 500
        width = torch.tensor([SPACE[i]["width"] for i in JUDGED])
        quarter = self.truth[JUDGED].argsort(stable=True)[: len(JUDGED) // 4]
        self.parts = {
            "all": torch.arange(len(JUDGED)),
            "width 4": (width == 4).nonzero()[:, 0],
            "width 8": (width == 8).nonzero()[:, 0],
            "best quarter": quarter,
        }

    def regret(self, position):
        return (self.truth[position] - self.truth.min()).item()

    def ranks(self, guess):
        """Correlate a guess with the truth, in all and in parts."""
        truth = self.truth[JUDGED]
        return {
            name: correlations(guess[i], truth[i])
            for name, i in self.parts.items()
        }

    def random(self, trainings):
        """Average the regret of the best of some networks, trained once."""
        rng, total = random.Random(0), 0.0
        for _ in range(DRAWS):
            some = rng.sample(range(len(SPACE)), trainings)
            seed = rng.randrange(SEEDS)
            best = min(some, key=lambda i: self.val[i, seed].item())
            total += self.regret(best)
        return round(total / DRAWS, 2)

    def choices(self, guess):
        """Say what is lost by believing a guess."""
        rng, looks = random.Random(0), 0.0
        known = dict(zip(JUDGED, guess.tolist(), strict=True))
        for _ in range(DRAWS):
            some = rng.sample(JUDGED, LOOKS)
            looks += self.regret(min(some, key=known.get))
        top = sorted(JUDGED, key=known.get)[:TOP]
        trained = min(top, key=lambda i: self.val[i, 0].item())
        return {
            "first": round(self.regret(top[0]), 2),
            f"first of {LOOKS}": round(looks / DRAWS, 2),
            f"trained {TOP}": round(self.regret(trained), 2),
        }


def correlations(guess, truth):
    """Return Kendall's and Spearman's coefficient."""
    found = nas.kendall(guess, truth), nas.spearman(guess, truth)
    return [round(x, 3) for x in found]


def summary(table, runs):
    """Compare the supernets of all seeds with the table."""
    guesses, before = (
        torch.tensor([run[name] for run in runs], dtype=torch.float64)
        for name in ("anew", "as it is")
    )
    some = {"anew": guesses[:, ::THIRD], "as it is": before}
    mean, truth = guesses.mean(0), table.truth[JUDGED[::THIRD]]
    return {
        "mean error": percent(guesses),
        "ranks": [table.ranks(guess) for guess in guesses],
        "regret": [table.choices(guess) for guess in guesses],
        "three together": {
            "ranks": table.ranks(mean),
            "regret": table.choices(mean),
        },
        "some": {
            name: {
                "mean error": percent(x),
                "ranks": [correlations(g, truth) for g in x],
            }
            for name, x in some.items()
        },
    }


def percent(counts):
    """Average the validation errors of members, for each seed."""
    _, val, _ = parts()
    return [round(100 * x.mean().item() / len(val[0]), 1) for x in counts]


def alone(table, position):
    """Return the test errors of a network from scratch, for each seed."""
    row = table.rows[position]
    return {n: [run[2] for run in row[n]] for n in ("45", "180")}


def ceiling(table):
    """Measure how well one training each foretells the truth."""
    return [table.ranks(table.val[JUDGED, seed]) for seed in range(SEEDS)]


def main():
    store = Store(__file__)
    rates, runs, tuned = {}, {}, {}
    for way in WAYS:
        rates[way] = rate(store, way)
        for cost in sorted({COST, *COSTS.get(way, ())}):
            runs[way, cost] = [
                store.get(
                    f"judged/{way}/{cost}/{seed}",
                    partial(judged, way, cost, rates[way], seed),
                )
                for seed in tqdm(range(SEEDS), desc=f"{way}, {cost}")
            ]
        tuned[way] = []
        for seed, run in enumerate(runs[way, COST]):
            first = JUDGED[run["anew"].index(min(run["anew"]))]
            found = store.get(
                f"tuned/{way}/{seed}",
                partial(specialized, way, rates[way], seed, first),
            )
            tuned[way].append((first, found))
    table = Table()
    trainings = sorted({cost // STEPS for _, cost in runs})
    _stamp.write(
        __file__,
        {
            "seeds": SEEDS,
            "rates": rates,
            "trainings": trainings,
            "random": {
                str(n + more): table.random(n + more)
                for n in trainings
                for more in (0, TOP)
            },
            "mean error alone": percent(table.val[JUDGED].T),
            "one training": ceiling(table),
            "supernets": {
                f"{way}, {cost // STEPS}": summary(table, run)
                for (way, cost), run in runs.items()
            },
            "judged": JUDGED,
            "errors of seed 0": {
                way: [int(x) for x in runs[way, COST][0]["anew"]]
                for way in WAYS
            },
            "more steps": {
                way: [
                    {
                        "arch": SPACE[first],
                        "inherited": found,
                        "alone": alone(table, first),
                    }
                    for first, found in rows
                ]
                for way, rows in tuned.items()
            },
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
