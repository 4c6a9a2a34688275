"""Remove blocks of the published encoder: every subset against every rule.

    python chapters/experiments/shortened_encoder.py

All 64 subsets of its 6 blocks are measured, so that what a rule chooses can
be compared with the best there is.  Rules choose on passages of the language
reference, by the cosine to the embedding of the whole encoder; docstrings
report: a seventh of them the cosine for every subset, all of them the linear
probe of pruned_encoder.py for the subsets without up to 3 blocks that some
rule has chosen.  The blocks normalize the sum (post-norm), so that removing
one is something else than removing its branches: "silent" does the latter.
The same, in bits per character, for the 8 subsets of the language model of
the zoo, whose blocks add to an untouched stream.  Ctrl-C is harmless: the
same command goes on from where it stopped.
"""

import itertools
from copy import deepcopy
from functools import partial

import _pruning
import _stamp
import pruned_encoder
import torch
import torch.nn.functional as F
from tqdm import tqdm

from minicompress import data, prune, train, zoo
from minicompress.prune import layers as depth

EACH = 7  # the cosine of all subsets: 4 of the 28 docstrings of a class
PROBED = 3  # as many blocks may go before a probe
WINDOWS, LENGTH = 64, 128  # of the validation text, for the language model


def mask(count, gone):
    keep = torch.ones(count, dtype=torch.bool)
    keep[list(gone)] = False
    return keep


def subsets(count):
    """List what can be removed, from nothing to everything."""
    numbers = range(count)
    sizes = range(count + 1)
    return [s for n in sizes for s in itertools.combinations(numbers, n)]


def choices(model, batches, cost):
    """Let the rules say which blocks go, for each number that go."""
    count, one = len(model.blocks), batches[0][:1]
    influence = depth.block_influence(model, "blocks", batches)
    order = depth.greedy_blocks(model, "blocks", cost, one, remove=count - 1)
    found = {}
    for n in range(1, count):
        angle = depth.angular_distance(model, "blocks", batches, span=n)
        first = int(angle.argmin())
        keep = prune.keep(influence, sparsity=n / count)
        found[n] = {
            "influence": (~keep).nonzero()[:, 0].tolist(),
            "angle": list(range(first, first + n)),
            "greedy": sorted(order[:n]),
        }
        even = depth.every_other(count, rate=min(n / count, 0.5))
        if (~even).sum() == n:
            found[n]["every other"] = (~even).nonzero()[:, 0].tolist()
    return {
        "influence": [round(x, 4) for x in influence.tolist()],
        "order": order,
        "chosen": found,
    }


def silent(model, i):
    """Let both branches of a block add nothing; its norms stay."""
    model = deepcopy(model)
    block = model.blocks[i]
    for layer in (block.attention.out, block.down):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


class Encoder:
    """The published encoder, the passages that choose, what reports."""

    def __init__(self):
        self.bench = pruned_encoder.Bench()
        self.model, self.tokenizer = self.bench.dense, self.bench.tokenizer
        self.passages = pruned_encoder.passages(self.tokenizer)
        self.few = self.bench.texts[::EACH]  # they lie class by class
        self.own = self.vectors(self.model)
        self.few_own = self.few_vectors(self.model)
        self.reference = self.bench.embed(self.model)
        self.penalty = pruned_encoder.tuned(self.reference, self.bench.y)

    def vectors(self, model):
        """Embed the passages: all are of one length, without padding."""
        with train.evaluating(model):
            parts = [model(ids).mean(1) for ids in self.passages]
        return F.normalize(torch.cat(parts))

    def few_vectors(self, model):
        length = pruned_encoder.LENGTH
        return zoo.embed(model, self.tokenizer, self.few, length=length)

    def cost(self, model):
        return 1 - float((self.vectors(model) * self.own).sum(1).mean())

    def without(self, gone):
        keep = mask(len(self.model.blocks), gone)
        args = (self.model, "blocks", keep, self.passages[0][:1])
        return depth.remove_blocks(*args)

    def cosines(self, model):
        reported = (self.few_vectors(model) * self.few_own).sum(1).mean()
        return {
            "chosen by": round(1 - self.cost(model), 4),
            "cosine": round(float(reported), 4),
        }

    def probe(self, model):
        return self.bench.measure(model, self.reference, self.penalty)


class Language:
    """The language model of the zoo."""

    def __init__(self):
        self.model = zoo.load("reference-lm")
        self.task = zoo.task("reference-lm")
        ids = data.Tokenizer().encode(self.task.val)[: WINDOWS * LENGTH]
        self.windows = ids.view(WINDOWS, LENGTH).split(16)

    def cost(self, model):
        return zoo.quality(model, self.task, "val")

    def measure(self, gone):
        keep = mask(len(self.model.blocks), gone)
        one = self.windows[0][:1]
        model = depth.remove_blocks(self.model, "blocks", keep, one)
        return {
            "chosen by": round(self.cost(model), 4),
            "bits": round(zoo.quality(model, self.task), 4),
        }


def picked(rows, rules):
    """List the subsets that some rule or the exhaustive search chose."""
    found = {tuple(g) for row in rules["chosen"].values() for g in row.values()}
    best = {}
    for row in rows:
        n, value = len(row["gone"]), row["chosen by"]
        if value > best.get(n, (-2, ()))[0]:
            best[n] = value, tuple(row["gone"])
    found |= {gone for _, gone in best.values()}
    return sorted(gone for gone in found if len(gone) <= PROBED)


def encoder_rows(store):
    """Measure the subsets of the encoder, and what the rules choose."""
    encoder = Encoder()
    count = len(encoder.model.blocks)
    rows = []
    for gone in tqdm(subsets(count), desc="encoder"):
        row = store.get(
            f"encoder/{gone}",
            lambda g=gone: encoder.cosines(encoder.without(g)),
        )
        rows.append({"gone": list(gone), **row})
    rules = store.get(
        "encoder/rules",
        partial(choices, encoder.model, encoder.passages, encoder.cost),
    )
    quiet = [
        store.get(
            f"encoder/silent/{i}",
            lambda b=i: encoder.cosines(silent(encoder.model, b)),
        )
        for i in tqdm(range(count), desc="silent")
    ]
    probes = []
    for gone in tqdm(picked(rows, rules), desc="probe"):
        row = store.get(
            f"encoder/probe/{gone}",
            lambda g=gone: encoder.probe(encoder.without(g)),
        )
        probes.append({"gone": list(gone), **row})
    return {
        "blocks": count,
        "texts": {"cosine": len(encoder.few), "probe": len(encoder.bench.y)},
        "labels": pruned_encoder.LABELS,
        "draws": pruned_encoder.DRAWS,
        "length": pruned_encoder.LENGTH,
        "penalty": encoder.penalty,
        "subsets": rows,
        "rules": rules,
        "silent": quiet,
        "probes": probes,
    }


def language_rows(store):
    """Measure the subsets of the language model."""
    language = Language()
    rows = []
    for gone in tqdm(subsets(len(language.model.blocks)), desc="language"):
        row = store.get(f"language/{gone}", partial(language.measure, gone))
        rows.append({"gone": list(gone), **row})
    args = (language.model, language.windows, language.cost)
    return {
        "blocks": len(language.model.blocks),
        "subsets": rows,
        "rules": store.get("language/rules", partial(choices, *args)),
    }


def main():
    store = _pruning.Store(__file__)
    language = language_rows(store)
    result = {"encoder": encoder_rows(store), "language": language}
    _stamp.write(__file__, result)


if __name__ == "__main__":
    with train.threads(1):
        main()
