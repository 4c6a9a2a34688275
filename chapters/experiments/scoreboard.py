"""Every technique of the book on the same four models.

    python chapters/experiments/scoreboard.py            what is missing
    python chapters/experiments/scoreboard.py --times    the times, anew

The four are three networks of the zoo and the published encoder.  `MADE` are
recipes without training, `TRAINED` those with: every one of them gets the
same steps for a model, those from the start more, and the learning rate of a
few that is best on the validation split with the first seed; from the start,
and for the encoder, one rate is tried.  What a recipe does not code is
float32, but the tables of tokens and positions have 8 bits in every row except
the first two.  Bytes are those of the whole file, and quality is that of what
is read from the file, on the test split.  Seeds draw what is seen and trained
on; recipes that draw nothing have one.  Times are ratios to the original, of
one call with one sample, in turns within one run; a network of the original's
shapes computes what the original computes and is not timed.  Ctrl-C is
harmless: the same command goes on from where it stopped.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from statistics import mean, median, stdev

import _recipes as r
import _stamp
import torch
from _board import SUBJECTS, every, in_order, seeing
from _large import in_int8
from _pruning import Store
from _recipes import DIGITS, ENCODER, GLYPHS, TEXT, then
from tqdm import tqdm

from minicompress import (
    codes,
    measure,
    nas,
    pipeline,
    quantize,
    share,
    train,
)

ROUNDS, REPEATS = 5, 15
ALL = (DIGITS, GLYPHS, TEXT, ENCODER)
LABELED, TRANSFORMERS, SMALL = ALL[:3], ALL[2:], ALL[:2]
NO_BLOCKS = "it has no blocks of one shape"
NO_TABLE = "it has no table of tokens"
KERNELS = "it has no kernels to factor"
MATRICES = "its kernels are factored as kernels"
NO_LABELS = "its training uses the original's embeddings, not labels"
BRIEFLY = "left out to save time: the rows beside it tell as much"
STUDENT = "chapter 2 trains one, for far more steps than there is time here"
TOO_LONG = "the training would take too long for this board"


@dataclass(frozen=True)
class Recipe:
    """What makes one row of the board."""

    family: str
    chapter: int
    go: Callable
    data: str = "none"  # or inputs, or labels
    on: tuple = ALL
    why: str = ""  # why not on the others
    run: Callable | None = None  # how what was read is run
    scratch: bool = False  # whether it is trained from the start


def row(rule, **options):
    """Let a rule of the library code every matrix as it is."""
    return every(partial(rule, **options))


O, P, Q, S, L, C = (
    "original",
    "prune",
    "quantize",
    "share",
    "lowrank",
    "combine",
)
LOOK, LABELS = {"data": "inputs"}, {"data": "labels"}
DEEP = {"on": TRANSFORMERS, "why": NO_BLOCKS}
CONV = {"on": (GLYPHS,), "why": KERNELS}
FLAT = {"on": (DIGITS, *TRANSFORMERS), "why": MATRICES}
BRIEF = {"on": LABELED, "why": BRIEFLY}
FEW = {"data": "labels", "on": SMALL, "why": BRIEFLY}
TUNED = {"data": "labels", "on": LABELED, "why": TOO_LONG}
START = {"data": "labels", "scratch": True}

MADE = {
    "original, float32": Recipe(O, 1, r.plain),
    "half precision": Recipe(Q, 5, r.halves),
    "tables in 8 bits": Recipe(Q, 5, r.plain, on=TRANSFORMERS, why=NO_TABLE),
    "half of the units": Recipe(P, 3, partial(r.halved, fitted=False)),
    "half of the units, refit": Recipe(P, 3, r.halved, **LOOK),
    "a third of the blocks less": Recipe(P, 3, r.shortened, **DEEP, **LOOK),
    "magnitude, 50 %": Recipe(P, 4, partial(r.magnitude, sparsity=0.5)),
    "magnitude, 80 %": Recipe(P, 4, partial(r.magnitude, sparsity=0.8)),
    "magnitude, 90 %": Recipe(
        P, 4, partial(r.magnitude, sparsity=0.9), **BRIEF
    ),
    "Wanda, 50 %": Recipe(P, 4, seeing(r.sparse(r.wanda(0.5))), **LOOK),
    "SparseGPT, 50 %": Recipe(
        P, 4, in_order(r.sparse(r.sparsegpt(0.5))), **LOOK
    ),
    "SparseGPT, 80 %": Recipe(
        P, 4, in_order(r.sparse(r.sparsegpt(0.8))), **BRIEF, **LOOK
    ),
    "2:4, magnitude": Recipe(P, 4, every(r.sparse(r.two_of_four))),
    "2:4, SparseGPT": Recipe(P, 4, in_order(r.sparse(r.two_by_obs)), **LOOK),
    "8 bits": Recipe(Q, 6, row(quantize.min_max, bits=8)),
    "8 bits, inputs too": Recipe(
        Q,
        5,
        row(quantize.min_max, bits=8, symmetric=True),
        on=TRANSFORMERS,
        why="its layers are too small for an int8 kernel",
        run=in_int8,
    ),
    "4 bits": Recipe(Q, 6, row(quantize.mse, bits=4)),
    "4 bits, groups": Recipe(Q, 6, row(quantize.mse, bits=4, each=r.GROUP)),
    "4 bits, groups, tables": Recipe(
        Q, 6, r.tables_too, on=TRANSFORMERS, why=NO_TABLE
    ),
    "AWQ, 4 bits, groups": Recipe(Q, 6, in_order(r.awq), **BRIEF, **LOOK),
    "GPTQ, 4 bits": Recipe(Q, 6, in_order(r.gptq(4)), **LOOK),
    "GPTQ, 3 bits": Recipe(Q, 6, in_order(r.gptq(3)), **LOOK),
    "NF4": Recipe(Q, 7, row(quantize.nf4)),
    "MXFP4": Recipe(Q, 5, row(quantize.mxfp4)),
    "ternary": Recipe(Q, 7, row(r.ternary)),
    "binary": Recipe(Q, 7, row(quantize.binary)),
    "k-means, 4 bits": Recipe(S, 8, row(share.kmeans, bits=4)),
    "k-means, 4 bits, coded": Recipe(
        S, 8, every(lambda W: pipeline.smallest(share.kmeans(W, bits=4)))
    ),
    "k-means, 3 bits": Recipe(S, 8, row(share.kmeans, bits=3), **BRIEF),
    "k-means, 2 bits": Recipe(S, 8, row(share.kmeans, bits=2)),
    "product, 2 bits": Recipe(S, 8, row(r.product), **BRIEF),
    "blocks tied": Recipe(S, 8, r.tied, **DEEP),
    "SVD, half": Recipe(L, 9, r.thinned(aware=False), **FLAT),
    "data-aware SVD, half": Recipe(L, 9, r.thinned(aware=True), **FLAT, **LOOK),
    "spatial, 40 %": Recipe(L, 9, r.factored("spatial"), **CONV, **LOOK),
    "Tucker-2, 40 %": Recipe(L, 9, r.factored("Tucker-2"), **CONV, **LOOK),
    "separable, 40 %": Recipe(
        L, 9, r.factored("separable, data-aware"), **CONV, **LOOK
    ),
    "GPTQ, 3 bits, coded": Recipe(
        C,
        11,
        in_order(lambda W, x: pipeline.smallest(r.gptq(3)(W, x))),
        **BRIEF,
        **LOOK,
    ),
    "SparseGPT 50 %, 4 bits, coded": Recipe(
        C,
        11,
        in_order(lambda W, x: r.packed(r.sparsegpt(0.5)(W, x).decode(), 4)),
        **LOOK,
    ),
}

TRAINED = {
    "original, trained on": Recipe(O, 1, then(r.plain), **TUNED),
    "small network": Recipe(
        O, 2, partial(r.student, teach=False), on=SMALL, why=STUDENT, **START
    ),
    "small network, taught": Recipe(
        "distill",
        2,
        partial(r.student, teach=True),
        on=SMALL,
        why=STUDENT,
        **START,
    ),
    "half of the units, trained": Recipe(P, 3, then(r.halved), **TUNED),
    "half of the units, taught": Recipe(
        P, 3, r.half_taught, on=LABELED, why=NO_LABELS, **LABELS
    ),
    "a third of the blocks less, trained": Recipe(
        P, 3, then(r.shortened), **DEEP, **LABELS
    ),
    "magnitude, 50 %, trained": Recipe(
        P, 4, partial(r.pruned, sparsity=0.5), **FEW
    ),
    "magnitude, 80 %, trained": Recipe(
        P, 4, partial(r.pruned, sparsity=0.8), **LABELS
    ),
    "magnitude, 90 %, trained": Recipe(
        P, 4, partial(r.pruned, sparsity=0.9), **TUNED
    ),
    "LSQ, 4 bits": Recipe(Q, 6, r.rounding("LSQ, row", 4), **FEW),
    "LSQ, 2 bits": Recipe(Q, 6, r.rounding("LSQ, row", 2), **TUNED),
    "ternary, trained": Recipe(Q, 7, r.rounding("TWN", 1.58), **TUNED),
    "binary, trained": Recipe(Q, 7, r.rounding("XNOR, weights", 1), **TUNED),
    "k-means, 2 bits, trained": Recipe(
        S, 8, partial(r.centroids, bits=2), **TUNED
    ),
    "HashedNet, 1/8": Recipe(
        S, 8, r.hashed, on=(DIGITS,), why=TOO_LONG, **START
    ),
    "blocks tied, trained": Recipe(
        S, 8, then(r.tied), on=(TEXT,), why=NO_BLOCKS, **LABELS
    ),
    "data-aware SVD, half, trained": Recipe(
        L, 9, then(r.thinned(aware=True)), **FLAT, **LABELS
    ),
    "spatial, 40 %, trained": Recipe(
        L, 9, then(r.factored("spatial")), **CONV, **LABELS
    ),
    "searched, coded": Recipe(
        "nas",
        10,
        r.searched,
        on=(DIGITS,),
        why="the book searches files for digits only",
        **START,
    ),
    "half of the units, 4 bits, coded": Recipe(
        C, 11, then(r.halved, r.in_four_bits), **TUNED
    ),
    "a third of the blocks less, 4 bits, coded": Recipe(
        C, 11, then(r.shortened, r.in_four_bits), **DEEP, **LABELS
    ),
    "80 % pruned, 4 bits, coded": Recipe(
        C, 11, partial(r.deep, sparsity=0.8, bits=4), **TUNED
    ),
    "90 % pruned, 3 bits, coded": Recipe(
        C, 11, partial(r.deep, sparsity=0.9, bits=3), **TUNED
    ),
}
RECIPES = MADE | TRAINED
AS_IT_IS = ("original, float32", "half precision")  # the tables too


def place(folder, name):
    """Say where a network waits for the times to be taken."""
    return folder / f"{name.replace('/', ' of ')}.pt"


def shapes(model):
    found = model.named_parameters(remove_duplicate=False)
    return {n: p.shape for n, p in found}


def made(s, name, seed, lr=None):
    """Follow a recipe; return the file and what is read from it."""
    recipe = RECIPES[name]
    model, state = recipe.go(s, seed) if lr is None else recipe.go(s, seed, lr)
    if name not in AS_IT_IS:
        coded = {n: x for n, x in state.items() if isinstance(x, codes.Code)}
        state = state | s.fixed(model) | coded
    return s.file(model, state)


def drawn(s, name):
    """Say with how many seeds a recipe is repeated."""
    return s.seeds if name in TRAINED or RECIPES[name].data != "none" else 1


@lru_cache(maxsize=3)  # the rate that is chosen has been tried before
def kept(s, name, seed, lr):
    return made(s, name, seed, lr)


def follow(s, name, seed, lr, split="test"):
    """Make a file, read it, and measure what is read."""
    data, read = kept(s, name, seed, lr)
    run = RECIPES[name].run
    ready = run(read) if run else read
    found = {"bytes": len(data), **s.quality(ready, split)}
    return found, read


def chosen(s, name):
    """Return the learning rate that is best on validation data."""
    if name in MADE:
        return None
    if RECIPES[name].scratch:
        return s.scratch[1]

    def worth(lr):
        return s.better * follow(s, name, 0, lr, "val")[0]["quality"]

    return max(s.rates, key=worth)


def result(s, name, folder):
    """Measure one recipe on one model."""
    recipe, lr = RECIPES[name], chosen(s, name)
    pairs = [follow(s, name, seed, lr) for seed in range(drawn(s, name))]
    read = pairs[0][1]
    same = shapes(read) == shapes(s.model) and recipe.run is None
    if not same:
        torch.save(read, place(folder, name))
    found = [f for f, _ in pairs]
    quality = [f["quality"] for f in found]
    steps = s.scratch[0] if recipe.scratch else s.steps
    row = {
        "name": name,
        "family": recipe.family,
        "chapter": recipe.chapter,
        "bytes": round(mean(f["bytes"] for f in found)),
        "macs": s.macs(read),
        "same": same,
        "quality": round(mean(quality), 4 if s.name == TEXT else 2),
        "sd": round(stdev(quality), 4) if len(quality) > 1 else None,
        "seeds": len(quality),
        "trained": steps if lr else 0,
        "rate": lr,
        "data": s.data if lr else recipe.data,
    }
    for key in ("cosine", "error"):  # of the encoder
        if key in found[0]:
            row[key] = round(mean(f[key] for f in found), 4)
    return row


def times(s, rows, folder):
    """Time the networks that compute something else than the original."""
    nets = {"original, float32": s.model}
    for row in rows:
        name = row["name"]
        net = torch.load(place(folder, name), weights_only=False)
        run = RECIPES[name].run
        nets[name] = run(net) if run else net
    calls = {n: partial(net, s.example) for n, net in nets.items()}
    found = {n: [] for n in nets}
    for _ in range(ROUNDS):
        took = measure.compare(calls, repeats=REPEATS)
        for n, t in took.items():
            found[n].append(t.low / took["original, float32"].low)
    return {n: round(median(ratios), 3) for n, ratios in found.items()}


def fronts(rows, better):
    """Mark the rows that no other one beats in both: bytes, MACs, time."""

    def mark(key, cost):
        points = [(cost(x), -better * x["quality"]) for x in rows]
        on = set(nas.front(points))
        for i, x in enumerate(rows):
            x[key] = i in on

    mark("front", lambda x: x["bytes"])
    mark("lean", lambda x: x["macs"])
    mark("fast", lambda x: x["latency"] or 1.0)


def finished(s, store, took):
    """Collect the rows of a model, in the order of the recipes."""
    keys = [f"{s.name}/{x}" for x in RECIPES if s.name in RECIPES[x].on]
    rows = [dict(store.values[key]) for key in keys if key in store.values]
    for x in rows:
        # no latency: the shapes of the original, and so its time
        x["latency"] = None if x.pop("same") else took[x["name"]]
        if not x["trained"]:
            del x["rate"]
    fronts(rows, s.better)
    return rows


def absent(rows):
    """Say why a recipe has no row."""
    found = {x["name"] for x in rows}
    return {x: how.why for x, how in RECIPES.items() if x not in found}


def main():
    store = Store(__file__)
    subjects = {name: make(name) for name, make in SUBJECTS.items()}
    found = {"models": {}, "board": {}, "absent": {}}
    found["times"] = {"rounds": ROUNDS, "repeats": REPEATS}
    if "--times" in sys.argv:
        for name in SUBJECTS:
            store.values.pop(f"{name}, times", None)
    for name, s in subjects.items():
        key = f"{name}, times"
        folder = store.path.with_suffix("") / name
        folder.mkdir(parents=True, exist_ok=True)
        for x in tqdm(RECIPES, desc=name):
            if name in RECIPES[x].on:
                store.get(f"{name}/{x}", partial(result, s, x, folder))
        rows = [store.values.get(f"{name}/{x}") for x in RECIPES]
        timed = [x for x in rows if x and not x["same"]]
        if {x["name"] for x in timed} - {*store.values.get(key, ())}:
            store.values.pop(key, None)
        took = store.get(key, partial(times, s, timed, folder))
        found["models"][name] = {
            "metric": s.metric,
            "better": s.better,
            "worst": s.worst,
            "steps": s.steps,
            "rates": s.rates,
            "from the start": s.scratch,
        }
        found["board"][name] = finished(s, store, took)
        found["absent"][name] = absent(found["board"][name])
        _stamp.write(__file__, found)


if __name__ == "__main__":
    with train.threads(1):
        main()
