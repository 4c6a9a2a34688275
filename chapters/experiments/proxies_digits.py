"""Guess how good networks for digits will be, without training them.

    python chapters/experiments/proxies_digits.py

Each of the 882 networks of `searched_digits` is scored at its initial
weights on 64 of the training digits, for each of its three seeds.  The truth
is the test error after 180 steps, of the other two seeds, so that nothing is
judged by its own start.  Beside the proxies stand what needs no look at the
network (parameters, MACs) and what needs a training (validation errors after
45, 90 and 180 steps).
"""

import json
import random

import _stamp
import torch
from _pruning import Store
from searched_digits import SEEDS, parts
from tqdm import tqdm

from minicompress import nas, train

BATCH, DRAWS, TOP = 64, 2000, 10
PROXIES = {
    "grad norm": lambda net, x, y: nas.grad_norm(net, (x, y)),
    "SNIP": lambda net, x, y: nas.snip(net, (x, y)),
    "SynFlow": lambda net, x, y: nas.synflow(net, x),
    "NASWOT": lambda net, x, y: nas.naswot(net, x),
}


def scored(arch, seed):
    """Score one network at the weights from which its training starts."""
    X, y = parts()[0]
    order = torch.randperm(
        len(X), generator=torch.Generator().manual_seed(seed)
    )
    x, y = X[order[:BATCH]], y[order[:BATCH]]
    torch.manual_seed(seed)
    net = nas.digits_network(arch)
    return [float(f"{f(net, x, y):.4g}") for f in PROXIES.values()]


def scores(archs, seed):
    return [scored(arch, seed) for arch in tqdm(archs, desc=f"seed {seed}")]


def mean(numbers):
    numbers = list(numbers)
    return sum(numbers) / len(numbers)


def places(archs, rows):
    """Name the sets of networks within which orders are compared."""
    everything = range(len(rows))
    found = {"all": everything}
    for width in (4, 8):
        found[f"width {width}"] = [
            i for i in everything if archs[i]["width"] == width
        ]
    by_macs = sorted(everything, key=lambda i: rows[i]["macs"])
    third = len(rows) // 3
    for n, name in enumerate(("small", "middle", "large")):
        end = len(rows) if n == 2 else (n + 1) * third
        found[f"MACs: {name} third"] = by_macs[n * third : end]
    by_error = sorted(
        everything, key=lambda i: sum(r[2] for r in rows[i]["180"])
    )
    found["best quarter"] = by_error[: len(rows) // 4]
    return found


def equal_macs(rows):
    """Group networks that cost the same, in groups of ten or more."""
    groups = {}
    for i, row in enumerate(rows):
        groups.setdefault(row["macs"], []).append(i)
    return [group for group in groups.values() if len(group) >= 10]


def agreement(f, score, truth, places):
    """Compare scores with the truth for each seed, within some networks."""
    return [
        f([score[s][i] for i in places], [truth[s][i] for i in places])
        for s in range(SEEDS)
    ]


def among_equals(f, score, truth, groups):
    """Compare only networks with equal MACs: a mean over the groups."""
    pairs = [(g, agreement(f, score, truth, g)) for g in groups]
    sums = []
    for s in range(SEEDS):
        known = [(len(g), t[s]) for g, t in pairs if t[s] == t[s]]  # no nan
        total = sum(n for n, _ in known)
        sums.append(sum(n * t for n, t in known) / total if total else None)
    return sums


def regret(score, truth, val, s):
    """Return what the first costs, and the best on validation of ten.

    Networks with equal scores come in a random order.
    """
    rng, best, found = random.Random(s), max(truth[s]), []
    for _ in range(DRAWS if len({*score[s]}) < len(score[s]) else 1):
        order = sorted(
            range(len(truth[s])), key=lambda i: (-score[s][i], rng.random())
        )
        ten = max(order[:TOP], key=lambda i: val[s][i])
        found.append((best - truth[s][order[0]], best - truth[s][ten]))
    return [mean(column) for column in zip(*found, strict=True)]


def blind(truth, val, s):
    """Return the same for networks that are drawn at random."""
    rng, best, found = random.Random(s), max(truth[s]), []
    for _ in range(DRAWS):
        some = rng.sample(range(len(truth[s])), TOP)
        ten = max(some, key=lambda i: val[s][i])
        found.append((best - truth[s][some[0]], best - truth[s][ten]))
    return [mean(column) for column in zip(*found, strict=True)]


def rounded(numbers, digits=3):
    return [None if x is None else round(x, digits) for x in numbers]


def main():
    store, archs = Store(__file__), list(nas.digits_space())
    path = _stamp.RESULTS / "searched_digits.json"
    table = json.loads(path.read_text("utf8"))
    rows, size = table["rows"], table["sizes"]["test"]
    guesses = [
        store.get(f"{seed}", lambda seed=seed: scores(archs, seed))
        for seed in range(SEEDS)
    ]
    # larger is better everywhere; percent of the test digits
    errors = [[r["180"][s][2] for r in rows] for s in range(SEEDS)]
    truth = [
        [
            -100 / size * mean(errors[o][i] for o in range(SEEDS) if o != s)
            for i in range(len(rows))
        ]
        for s in range(SEEDS)
    ]
    val = [[-r["180"][s][0] for r in rows] for s in range(SEEDS)]
    contestants = {
        "parameters": [[r["params"] for r in rows]] * SEEDS,
        "MACs": [[r["macs"] for r in rows]] * SEEDS,
    }
    for k, name in enumerate(PROXIES):
        contestants[name] = [[g[k] for g in seed] for seed in guesses]
    for steps in ("45", "90", "180"):
        contestants[f"{steps} steps"] = [
            [-r[steps][s][0] for r in rows] for s in range(SEEDS)
        ]
    sets, groups = places(archs, rows), equal_macs(rows)
    found, regrets = [], {}
    for name, score in tqdm(contestants.items()):
        for f in (nas.kendall, nas.spearman):
            taus = {
                place: rounded(agreement(f, score, truth, where))
                for place, where in sets.items()
            }
            if name != "MACs":
                within = among_equals(f, score, truth, groups)
                taus["equal MACs"] = rounded(within)
            found.append({"score": name, "by": f.__name__, **taus})
        pairs = [regret(score, truth, val, s) for s in range(SEEDS)]
        regrets[name] = [rounded(x, 2) for x in zip(*pairs, strict=True)]
    pairs = [blind(truth, val, s) for s in range(SEEDS)]
    regrets["random"] = [rounded(x, 2) for x in zip(*pairs, strict=True)]
    _stamp.write(
        __file__,
        {
            "table": table["stamp"]["code"],
            "batch": BATCH,
            "sets": {name: len(where) for name, where in sets.items()},
            "equal MACs": [len(groups), sum(map(len, groups))],
            "rows": found,
            "regret": regrets,
            "seeds agree": {
                name: [
                    round(nas.kendall(score[a], score[b]), 3)
                    for a, b in ((0, 1), (0, 2), (1, 2))
                ]
                for name, score in contestants.items()
                if name in PROXIES
            },
            "proxies": list(PROXIES),
            "scores": [[g[k] for g in guesses[0]] for k in range(len(PROXIES))],
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
