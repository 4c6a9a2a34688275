"""Factor the published encoder without retraining; measure what is lost.

    python chapters/experiments/factored_encoder.py

All 36 matrices of its blocks become two thin ones each, at a share of their
numbers.  The measures are those of pruned_encoder.py: a linear probe on few
labels, paired over its draws, the cosine to the embedding of the dense encoder
and the nearest neighbors.  What needs inputs sees passages of the language
reference and no docstring; FWSVD sees the gradients of a linear probe's loss
on 135 labeled docstrings, one at a time.  Further draws of passages are
measured on a seventh of the docstrings.  How much a method is fitted to its
passages is measured by the error of the layers' outputs: on those passages,
on other passages of the same text, and on docstrings, for 8 to 512 passages.
Ctrl-C is harmless: the same command goes on from where it stopped.
"""

from copy import deepcopy
from functools import partial

import _pruning
import _stamp
import pruned_encoder
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minicompress import calibrate, data, lowrank, measure, storage, train, zoo

RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
RULES = ("svd", "fwsvd", "asvd", "features", "drone", "drone by block")
FEW = (0.7, 0.5)  # ratios at which more is compared
TRIED, SHOWN = (0.3, 0.5, 0.7, 0.9), 16  # of a matrix; passages that show it
DRAWS, PASSAGES, LENGTH, SIZE = 3, 64, pruned_encoder.LENGTH, 16
COUNTS, LEFT_OUT = (8, 32, 128, 512), 64
DAMPS = (0, 0.01, 0.1)
EACH = 7  # further draws: 4 of the 28 docstrings of a class
STEP = 4  # of ranks that differ


def uniform(shapes, ratio):
    """Give every matrix the rank that leaves a share of its numbers."""
    return {
        name: int(ratio * lowrank.break_even(*shape))
        for name, shape in shapes.items()
    }


class Bench:
    """The encoder, its matrices, and the texts that they see."""

    def __init__(self):
        self.texts = pruned_encoder.Bench()
        self.model = self.texts.dense
        self.weights = pruned_encoder.blocks(self.model)
        self.shapes = {n: tuple(w.shape) for n, w in self.weights.items()}
        self.numbers = sum(w.numel() for w in self.weights.values())
        self.reference = self.texts.embed(self.model)
        self.penalty = pruned_encoder.tuned(self.reference, self.texts.y)
        self.cache = {}

    def known(self, key, compute):
        """Keep what several jobs need, for as long as the script runs."""
        if key not in self.cache:
            self.cache[key] = compute()
        return self.cache[key]

    def passages(self, count, seed, split="train"):
        """Draw passages of the language reference, in batches."""

        def read():
            return self.texts.tokenizer.encode(getattr(data.reference(), split))

        ids = self.known(split, read)
        dice = torch.Generator().manual_seed(seed)
        starts = 1 + torch.randint(len(ids) - LENGTH, (count,), generator=dice)
        rows = torch.stack([ids[s : s + LENGTH - 2] for s in starts.tolist()])
        rows = F.pad(rows, (1, 1))
        rows[:, 0], rows[:, -1] = ids[0], ids[-1]  # [CLS] and [SEP]
        return list(rows.split(SIZE))

    def stats(self, count=PASSAGES, seed=0, split="train"):
        """Record the inputs of the matrices on passages."""
        return self.known(
            (count, seed, split),
            lambda: self.inputs(self.passages(count, seed, split)),
        )

    def few(self):
        return self.texts.texts[::EACH]  # they lie class by class

    def docstrings(self):
        """Record the inputs of the matrices on a seventh of the texts."""

        def record():
            tokenizer = self.texts.tokenizer
            rows = [tokenizer.encode(t, LENGTH)[None] for t in self.few()]
            return self.inputs(rows)  # one by one: no padding

        return self.known("docstrings", record)

    def inputs(self, batches):
        return calibrate.inputs(
            self.model, batches, where=lambda n, w: n in self.weights
        )

    def fisher(self):
        """Square the gradients of a probe's loss, text by text."""

        def differentiate():
            t = self.texts
            found = pruned_encoder.moments(
                self.model, t.tokenizer, self.reference, t.y, t.texts
            )
            return {n: m.square for n, m in found.items()}

        return self.known("fisher", differentiate)

    def cosine(self, model):
        """Compare a seventh of the embeddings with those of the dense one."""
        E = zoo.embed(model, self.texts.tokenizer, self.few(), length=LENGTH)
        return round(float((E * self.reference[::EACH]).sum(1).mean()), 4)


def by_block(bench, ranks, seed):
    """Factor block by block, each on inputs from those before."""
    model, made = deepcopy(bench.model), {}
    batches = bench.passages(PASSAGES, seed)
    for i in range(len(model.blocks)):
        part = deepcopy(model)
        part.blocks = part.blocks[: i + 1]  # what follows is not needed
        stats = calibrate.inputs(
            part, batches, where=lambda n, w, i=i: n.startswith(f"blocks.{i}.")
        )
        new = {
            n: lowrank.drone(bench.weights[n], s.H, rank=ranks[n])
            for n, s in stats.items()
        }
        with torch.no_grad():
            for n, code in new.items():
                model.get_parameter(n).copy_(code.decode())
        made |= new
    return made


def factors(bench, rule, ranks, seed=0, damp=0.01, count=PASSAGES):
    """Factor the matrices that have a rank, {name: Factors}."""
    ranks = {n: r for n, r in ranks.items() if r}
    if rule == "drone by block":
        return by_block(bench, ranks, seed)
    made = {}
    for n, rank in ranks.items():
        W = bench.weights[n]
        if rule == "svd":
            made[n] = lowrank.svd(W, rank=rank)
        elif rule == "fwsvd":
            made[n] = lowrank.fwsvd(W, bench.fisher()[n], rank=rank)
        elif rule == "asvd":
            size = bench.stats(count, seed)[n].mean_abs
            made[n] = lowrank.asvd(W, size, rank=rank)
        elif rule == "features":
            H = bench.stats(count, seed)[n].H
            made[n] = lowrank.features(W, H, rank=rank)
        else:
            H = bench.stats(count, seed)[n].H
            made[n] = lowrank.drone(W, H, rank=rank, damp=damp)
    return made


def measured(bench, model):
    """Take all measures of pruned_encoder.py."""
    t = bench.texts
    return t.measure(model, bench.reference, bench.penalty)


def cost(model):
    """Count the numbers, the arithmetic for a text, and the bytes."""
    return {
        "parameters": measure.params(model),
        "macs": measure.macs(model, torch.zeros(1, LENGTH, dtype=torch.long)),
        "bytes": len(storage.dumps(model)),
    }


def one_shot(bench, rule, ratio):
    """Factor all matrices at one ratio; take all measures."""
    ranks = uniform(bench.shapes, ratio)
    model = lowrank.factorize(bench.model, factors(bench, rule, ranks))
    return {"rule": rule, "ratio": ratio, **measured(bench, model)}


def again(bench, rule, ratio, seed):
    """Do it with other passages; measure the cosine on few texts."""
    ranks = uniform(bench.shapes, ratio)
    made = factors(bench, rule, ranks, seed)
    cosine = bench.cosine(lowrank.factorize(bench.model, made))
    return {"rule": rule, "ratio": ratio, "draw": seed, "cosine": cosine}


def sensitivity(bench):
    """Measure what every matrix alone loses, {name: {rank: (cost, loss)}}."""
    ids = torch.cat(bench.passages(SHOWN, 0, "val"))

    def embed(model):
        with train.evaluating(model):
            return F.normalize(model(ids).mean(1))

    own, table = embed(bench.model), {}
    for name, (m, n) in tqdm(bench.shapes.items(), desc="sensitivity"):
        table[name] = {0: (m * n, 0.0)}  # 0: as it is
        for ratio in TRIED:
            rank = int(ratio * lowrank.break_even(m, n))
            code = factors(bench, "drone", {name: rank})
            E = embed(lowrank.factorize(bench.model, code))
            loss = 1 - float((E * own).sum(1).mean())
            table[name][rank] = (rank * (m + n), round(loss, 6))
    return table


def tables(bench, store):
    """List ranks, costs and losses of all matrices, in several ways."""
    stats = bench.stats()
    spectra = {
        n: lowrank.spectrum(w, stats[n].H) for n, w in bench.weights.items()
    }
    relative = {n: s / s.norm() for n, s in spectra.items()}
    table = {
        "outputs": lowrank.rank_table(spectra, bench.shapes, step=STEP),
        "relative": lowrank.rank_table(relative, bench.shapes, step=STEP),
    }
    table["relative, none dense"] = {
        n: {r: x for r, x in own.items() if r}
        for n, own in table["relative"].items()
    }
    found = store.get("sensitivity", partial(sensitivity, bench))
    table["measured"] = {
        n: {int(r) or None: tuple(x) for r, x in own.items()}
        for n, own in found.items()
    }
    return table


def spent(bench, name, ratio, table):
    """Spend the same numbers unevenly, by a table; take all measures."""
    ranks = lowrank.choose_ranks(table, budget=ratio * bench.numbers)
    entries = [table[n][r] for n, r in ranks.items()]
    made = factors(bench, "drone", ranks)
    return {
        "by": name,
        "ratio": ratio,
        "numbers": round(sum(c for c, _ in entries) / bench.numbers, 4),
        "predicted": round(sum(loss for _, loss in entries), 4),
        "ranks": list(ranks.values()),
        **measured(bench, lowrank.factorize(bench.model, made)),
    }


def lost(bench, made, stats):
    """Average the relative error of the outputs over the matrices."""
    errors = [
        measure.relative_error(bench.weights[n], code.decode(), stats[n].H)
        for n, code in made.items()
    ]
    return round(sum(errors) / len(errors), 5)


def fitted(bench, count, seed, damp):
    """Compare the error on the passages with that on texts not seen."""
    ranks = uniform(bench.shapes, min(FEW))
    made = factors(bench, "drone", ranks, seed, damp, count)
    model = lowrank.factorize(bench.model, made)
    return {
        "count": count,
        "draw": seed,
        "damp": damp,
        "passages": lost(bench, made, bench.stats(count, seed)),
        "reference": lost(bench, made, bench.stats(LEFT_OUT, 0, "val")),
        "docstrings": lost(bench, made, bench.docstrings()),
        "cosine": bench.cosine(model),
    }


def spectra(bench):
    """Say how fast the singular values fall, matrix by matrix."""
    rows = []
    for name, w in bench.weights.items():
        H = bench.stats()[name].H
        both = [lowrank.spectrum(w), lowrank.spectrum(w, H)]
        rows.append(
            {
                "name": name,
                "shape": bench.shapes[name],
                "energy 0.9": [
                    lowrank.energy_rank(s, energy=0.9) for s in both
                ],
                "noise": lowrank.noise_rank(both[0], bench.shapes[name]),
                "values": [
                    [float(f"{x:.3g}") for x in (s / s[0]).tolist()[::24]]
                    for s in both
                ],
            }
        )
    return rows


def main():
    store, bench = _pruning.Store(__file__), Bench()

    def rows(f, jobs, name):
        return [
            store.get(f"{name}/{job}", partial(f, bench, *job))
            for job in tqdm(jobs, desc=name)
        ]

    def uneven():
        for name, table in tables(bench, store).items():
            for ratio in FEW:
                yield store.get(
                    f"spent/{name}/{ratio}",
                    partial(spent, bench, name, ratio, table),
                )

    accuracy = pruned_encoder.accuracies(
        bench.reference, bench.texts.y, bench.penalty
    )
    once = [
        (rule, ratio)
        for ratio in RATIOS
        for rule in RULES
        if rule != "features" or ratio in FEW
    ]
    more = [
        (rule, min(FEW), seed)
        for rule in ("asvd", "drone", "drone by block")
        for seed in range(DRAWS)
    ]
    fits = [
        (count, seed, damp)
        for damp in DAMPS
        for count in COUNTS
        for seed in range(DRAWS if damp == 0.01 else 1)
    ]
    costs = {
        ratio: cost(
            lowrank.factorize(
                bench.model,
                factors(bench, "svd", uniform(bench.shapes, ratio)),
            )
        )
        for ratio in RATIOS
    }
    result = {
        "texts": len(bench.texts.texts),
        "labels": pruned_encoder.LABELS,
        "passages": PASSAGES,
        "length": LENGTH,
        "numbers": bench.numbers,
        "dense": {"accuracy": accuracy, **cost(bench.model)},
        "cost": costs,
        "rows": rows(one_shot, once, "one shot"),
        "spent": list(uneven()),
        "draws": rows(again, more, "draws"),
        "fitted": rows(fitted, fits, "fitted"),
        "spectra": store.get("spectra", partial(spectra, bench)),
    }
    _stamp.write(__file__, result)


if __name__ == "__main__":
    with train.threads(1):
        main()
