"""Factor the language model of the zoo; let what is left train on.

    python chapters/experiments/factored_text.py

All 18 matrices of its blocks become two thin ones each, at a share of their
numbers, by five rules: SVD, FWSVD, ASVD, DRONE, and DRONE matrix after matrix
on inputs from those before.  The rules that need inputs or gradients see
passages of the training text, three draws of them; FWSVD's gradients are those
of the loss of one passage with the true next characters.  Then the same
numbers are spent unevenly, by singular values and by what the validation text
loses when one matrix alone is factored.  At last some of the networks and the
dense one train for some more steps; the rate is chosen on the validation text
by the first seed.  Ctrl-C is harmless: the same command goes on from where it
stopped.
"""

from functools import partial

import _stamp
import torch
from _pruning import Store
from tqdm import tqdm

from minicompress import (
    calibrate,
    data,
    lowrank,
    measure,
    prune,
    storage,
    train,
    zoo,
)

NAME = "reference-lm"
RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
SPENT = (0.7, 0.5, 0.3)  # budgets for ranks that differ
DRAWS, PASSAGES, SIZE = 3, 64, 16
TRIED = (0.1, 0.2, 0.3, 0.5, 0.7, 0.9)  # of a matrix, for the sensitivity
SEEN = 64  # windows of the validation text that show it
SEEDS, STEPS, BATCH, RATES = 3, 150, 8, (3e-4, 1e-3, 3e-3)
TUNED = (  # what trains on: rule, ratio
    ("dense", 1),
    ("svd", 0.5),
    ("drone", 0.7),
    ("drone", 0.5),
    ("drone", 0.3),
    ("measured", 0.5),
)


class Bench:
    """The network, the texts, and what its matrices see."""

    def __init__(self, store):
        self.store = store
        self.model, self.task = zoo.load(NAME), zoo.task(NAME)
        self.context = self.model.config["context"]
        tokenizer = data.Tokenizer()
        self.ids = tokenizer.encode(self.task.train)
        self.seen = tokenizer.encode(self.task.val)[: SEEN * self.context + 1]
        self.weights = {
            name: layer.weight.detach()
            for name, layer in calibrate.layers(
                self.model, where=self.chosen
            ).items()
        }
        self.shapes = {n: tuple(w.shape) for n, w in self.weights.items()}
        self.numbers = sum(w.numel() for w in self.weights.values())
        self.cache = {}

    @staticmethod
    def chosen(name, w):
        return name.startswith("blocks")

    def passages(self, draw, size=SIZE):
        """Draw passages of the training text, and the next characters."""
        return train.passages(
            self.ids,
            length=self.context,
            size=size,
            steps=PASSAGES // size,
            seed=1000 + draw,
        )

    def stats(self, draw):
        """Record the inputs of all matrices for one draw."""
        if ("stats", draw) not in self.cache:
            self.cache["stats", draw] = calibrate.inputs(
                self.model, self.passages(draw), where=self.chosen
            )
        return self.cache["stats", draw]

    def fisher(self, draw):
        """Square the gradients of the loss of single passages."""
        if ("fisher", draw) not in self.cache:
            found = prune.gradients(
                self.model, self.passages(draw, size=1), where=self.chosen
            )
            self.cache["fisher", draw] = {n: m.square for n, m in found.items()}
        return self.cache["fisher", draw]

    def bits(self, model, split="test"):
        return round(zoo.quality(model, self.task, split), 4)

    def quick(self, codes):
        """Measure on a part of the validation text, some matrices factored."""
        model = lowrank.factorize(self.model, codes)
        return train.bits_per_char(model, self.seen)


def uniform(shapes, ratio):
    """Give every matrix the rank that leaves a share of its numbers."""
    return {
        name: max(1, int(ratio * lowrank.break_even(*shape)))
        for name, shape in shapes.items()
    }


def factors(bench, rule, ranks, draw):
    """Factor the matrices that have a rank."""
    ranks = {n: r for n, r in ranks.items() if r}
    if rule == "svd":
        make = {n: partial(lowrank.svd, bench.weights[n]) for n in ranks}
    elif rule == "fwsvd":
        fisher = bench.fisher(draw)
        make = {
            n: partial(lowrank.fwsvd, bench.weights[n], fisher[n])
            for n in ranks
        }
    elif rule == "asvd":
        stats = bench.stats(draw)
        make = {
            n: partial(lowrank.asvd, bench.weights[n], stats[n].mean_abs)
            for n in ranks
        }
    else:
        f = {"drone": lowrank.drone, "features": lowrank.features}[rule]
        stats = bench.stats(draw)
        make = {n: partial(f, bench.weights[n], stats[n].H) for n in ranks}
    return {n: make[n](rank=r) for n, r in ranks.items()}


def factored(bench, rule, ranks, draw=0):
    """Factor the network by one of the rules."""
    if rule == "dense":
        return bench.model
    if rule == "drone in order":
        return lowrank.factorize_in_order(
            bench.model,
            list(bench.passages(draw)),
            lambda name, W, stats: lowrank.drone(W, stats.H, rank=ranks[name]),
            where=bench.chosen,
        )
    return lowrank.factorize(bench.model, factors(bench, rule, ranks, draw))


def cost(bench, model):
    """Count the numbers, the arithmetic for a passage, and the bytes."""
    x = torch.zeros(1, bench.context, dtype=torch.long)
    return {
        "parameters": measure.params(model),
        "macs": measure.macs(model, x),
        "bytes": len(storage.dumps(model)),
    }


def one_shot(bench, rule, ratio, draw):
    ranks = uniform(bench.shapes, ratio)
    return bench.bits(factored(bench, rule, ranks, draw))


def sensitivity(bench):
    """Measure what every matrix alone loses, {name: {rank: (cost, loss)}}."""
    before, table = train.bits_per_char(bench.model, bench.seen), {}
    for name, (m, n) in tqdm(bench.shapes.items(), desc="sensitivity"):
        table[name] = {0: (m * n, 0.0)}  # 0: as it is
        for ratio in TRIED:
            rank = int(ratio * lowrank.break_even(m, n))
            code = factors(bench, "drone", {name: rank}, 0)
            loss = bench.quick(code) - before
            table[name][rank] = (rank * (m + n), round(loss, 5))
    return table


def tables(bench):
    """List ranks, costs and losses of all matrices, in several ways."""
    plain = {n: lowrank.spectrum(w) for n, w in bench.weights.items()}
    aware = {
        n: lowrank.spectrum(w, bench.stats(0)[n].H)
        for n, w in bench.weights.items()
    }
    relative = {n: s / s.norm() for n, s in aware.items()}
    table = {
        "weights": lowrank.rank_table(plain, bench.shapes),
        "outputs": lowrank.rank_table(aware, bench.shapes),
        "relative outputs": lowrank.rank_table(relative, bench.shapes),
    }
    table["relative, none dense"] = {
        n: {r: x for r, x in own.items() if r}
        for n, own in table["relative outputs"].items()
    }
    found = bench.store.get("sensitivity", partial(sensitivity, bench))
    table["measured"] = {
        n: {int(r) or None: tuple(x) for r, x in own.items()}
        for n, own in found.items()
    }
    return table


def spent(bench, table, ratio):
    """Spend a share of the numbers by a table; measure the network."""
    ranks = lowrank.choose_ranks(table, budget=ratio * bench.numbers)
    entries = [table[n][r] for n, r in ranks.items()]
    model = factored(bench, "drone", ranks)
    return {
        "numbers": round(sum(c for c, _ in entries) / bench.numbers, 4),
        "predicted": round(sum(loss for _, loss in entries), 4),
        "ranks": list(ranks.values()),
        "val": bench.bits(model, "val"),
        "bits": bench.bits(model),
    }


def spectra(bench):
    """Say how fast the singular values fall, matrix by matrix."""
    rows = []
    for name, w in bench.weights.items():
        both = [
            lowrank.spectrum(w),
            lowrank.spectrum(w, bench.stats(0)[name].H),
        ]
        rows.append(
            {
                "name": name,
                "shape": bench.shapes[name],
                "energy 0.9": [
                    lowrank.energy_rank(s, energy=0.9) for s in both
                ],
                "noise": lowrank.noise_rank(both[0], bench.shapes[name]),
                "values": [
                    [float(f"{x:.3g}") for x in (s / s[0]).tolist()[::4]]
                    for s in both
                ],
            }
        )
    return rows


def tuned(bench, model, seed, lr):
    """Train for some more steps."""
    feed = train.passages(
        bench.ids, length=bench.context, size=BATCH, steps=STEPS, seed=seed
    )
    model = train.fit(model, feed, lr=lr, clip=1.0, seed=seed)
    return {"val": bench.bits(model, "val"), "bits": bench.bits(model)}


def tune(bench, ranks_by_measure):
    """Let some of the networks train on, at the rate of the first seed."""
    found = {}
    for rule, ratio in tqdm(TUNED, desc="more steps"):
        if rule == "measured":
            model = factored(bench, "drone", ranks_by_measure)
        else:
            model = factored(bench, rule, uniform(bench.shapes, ratio))
        rates = {
            lr: bench.store.get(
                f"tuned/{rule}/{ratio}/0/{lr}",
                partial(tuned, bench, model, 0, lr),
            )
            for lr in RATES
        }
        lr = min(rates, key=lambda lr: rates[lr]["val"])
        rows = [
            bench.store.get(
                f"tuned/{rule}/{ratio}/{seed}/{lr}",
                partial(tuned, bench, model, seed, lr),
            )
            for seed in range(SEEDS)
        ]
        found[f"{rule}, {ratio}"] = {
            "before": bench.bits(model),
            "rate": lr,
            "bits": [row["bits"] for row in rows],
            **cost(bench, model),
        }
    return found


def main():
    store = Store(__file__)
    bench = Bench(store)
    rules = ("svd", "fwsvd", "asvd", "features", "drone", "drone in order")
    jobs = [
        (rule, ratio, draw)
        for rule in rules
        for ratio in RATIOS
        for draw in range(1 if rule == "svd" else DRAWS)
    ]
    rows = {}
    for job in tqdm(jobs, desc="one shot"):
        rule, ratio, _ = job
        bits = store.get(str(job), partial(one_shot, bench, *job))
        rows.setdefault(rule, {}).setdefault(ratio, []).append(bits)
    table = tables(bench)
    uneven = {
        name: {
            ratio: store.get(
                f"spent/{name}/{ratio}", partial(spent, bench, own, ratio)
            )
            for ratio in SPENT
        }
        for name, own in table.items()
    }
    _stamp.write(
        __file__,
        {
            "text": bench.task.hash,
            "dense": {
                "bits": bench.bits(bench.model),
                **cost(bench, bench.model),
            },
            "numbers": bench.numbers,
            "passages": PASSAGES,
            "cost": {
                ratio: cost(
                    bench,
                    factored(bench, "svd", uniform(bench.shapes, ratio)),
                )
                for ratio in RATIOS
            },
            "one shot": rows,
            "spent": uneven,
            "spectra": store.get("spectra", partial(spectra, bench)),
            "steps": STEPS,
            "tuned": tune(
                bench,
                dict(
                    zip(
                        bench.shapes,
                        uneven["measured"][0.5]["ranks"],
                        strict=True,
                    )
                ),
            ),
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
