"""What methods for large models do to the book's own language model.

    python chapters/experiments/large_text.py

Only what other experiments have not measured: formats of four bits, rotations
and groups of 64; activations in few bits, on three networks with the same
function, two of which have outliers; the cache of keys and values; two methods
together at equal bits; and what else changes where bits per character do not.
The matrices of the blocks are compressed, the tables stay in floating point.
Rules that see data compress matrix after matrix, each on inputs that those
before it make; a draw is another set of passages of the training text, or
other signs of a rotation.  The validation text chooses, the test text
reports.  Ctrl-C is harmless: the same command goes on from where it stopped.
"""

from copy import deepcopy
from functools import partial
from math import log

import _few_bits as few
import _stamp
import _streams
import torch
import torch.nn.functional as F
from _caches import AXES, Variant, full_bytes, spread
from _pruning import Store
from _streams import body
from tqdm import tqdm

from minicompress import (
    calibrate,
    codes,
    data,
    distill,
    measure,
    prune,
    quantize,
    storage,
    train,
    zoo,
)

NAME, DRAWS, LENGTH, SIZE, SEEN = "reference-lm", 3, 128, 8, 4
BITS = (4, 3, 2)
NETS = ("as trained", "loud", "principal")
ALPHAS = (0.25, 0.5, 0.75)
RANGES = ("static", "tensor", "token")
ROUNDED = [  # rule for weights, bits of weights and activations, range
    *(("nearest", (8, 8), by) for by in RANGES),
    *(("nearest", (4, 4), by) for by in RANGES),
    ("gptq", (4, 4), "token"),
    ("nearest", (16, 8), "static"),
    *(("nearest", b, "token") for b in ((4, 8), (4, 16), (16, 4))),
]
GROUP, CACHE_BITS = 32, (8, 4, 3, 2, 1)
CACHED = 128  # windows of the test text that are read through a cache


class Bench:
    """The network, its texts, and how a network is measured on them."""

    def __init__(self):
        self.model, task = zoo.load(NAME), zoo.task(NAME)
        self.text = task.hash
        encode = data.Tokenizer().encode
        self.train, self.val, self.test = map(
            encode, (task.train, task.val, task.test)
        )
        layers = calibrate.layers(self.model, where=body)
        self.numel = sum(m.weight.numel() for m in layers.values())
        self.dense = logits(self.model, self.test)

    def passages(self, draw):
        """Draw passages of the training text, in batches."""
        how = {"length": LENGTH, "size": SIZE, "steps": SEEN}
        return list(train.passages(self.train, **how, seed=draw))

    def bits(self, model, split="test"):
        return round(train.bits_per_char(model, getattr(self, split)), 4)

    def compared(self, model):
        """Measure what a network predicts, and how far it is from before."""
        found = logits(model, self.test)
        same = measure.agreement(found, self.dense)
        kl = distill.kl(found.double(), self.dense.double(), 1.0)
        return {
            "quality": round(float(loss(found, self.test).mean()), 4),
            "agreement": round(same, 4),
            "kl": round(float(kl) / log(2), 4),
        }

    def network(self, name):
        """Return one of three networks with the same function."""
        if name == "loud":
            return _streams.loud(self.model, self.test[None, :LENGTH])
        if name == "principal":
            return _streams.principal(self.model, self.passages(0))
        return self.model


def logits(model, ids):
    """Predict every token but the first from those before in its window."""
    n = len(ids) - 1
    whole = n // LENGTH * LENGTH
    windows = [*ids[:whole].view(-1, LENGTH).split(64), ids[None, whole:n]]
    with train.evaluating(model):
        return torch.cat([model(x).flatten(0, 1) for x in windows if x.numel()])


def loss(predicted, ids):
    """Give the bits of every token but the first."""
    nats = F.cross_entropy(predicted, ids[1:], reduction="none")
    return nats.double() / log(2)


def compressed(model, rule, batches=None):
    """Compress the blocks, rule(W, stats) -> Code; return a copy, the codes.

    Without batches there are no statistics, but None.
    """
    made = {}

    def compress(name, layer, stats):
        made[name] = rule(layer.weight.detach(), stats)
        return made[name]

    if batches is not None:
        new = calibrate.sequential(model, batches, compress, where=body)
        return new, made
    model = deepcopy(model)
    with torch.no_grad():
        for name, layer in calibrate.layers(model, where=body).items():
            layer.weight.copy_(codes.value(compress(name, layer, None)))
    return model, made


def effective(made, numel):
    """Count the bits of all codes, for each weight that there once was."""
    return round(8 * sum(map(storage.payload, made.values())) / numel, 4)


def alone():
    """List ways to round: (method, bits, group): rule, what it needs."""
    plans = {
        ("NF4", 4, 64): (lambda W, x: quantize.nf4(W, each=64), ""),
        ("MXFP4", 4, 32): (lambda W, x: quantize.mxfp4(W), ""),
        ("NVFP4", 4, 16): (lambda W, x: quantize.nvfp4(W), ""),
    }
    for b in BITS:
        for method, bits, group, rule, needs in (
            ("rounding", b, None, few.nearest, ""),
            ("rounding", b, 64, few.nearest, ""),
            ("rounding, min-max", b, 64, few.min_max, ""),
            ("GPTQ", b, None, few.gptq, "data"),
            ("GPTQ", b, 64, few.gptq, "data"),
            ("AWQ", b, 64, few.awq, "data"),
            ("rotation, rounding", b, None, few.rotated_nearest, "seed"),
            ("rotation, GPTQ", b, None, few.rotated_gptq, "data, seed"),
        ):
            how = {"bits": b} | ({"each": group} if group else {})
            plans[method, bits, group] = partial(rule, **how), needs
    return plans


def together():
    """List two methods together, and what each does alone."""
    return {
        ("SparseGPT 50 %", None): lambda W, x: prune.sparsegpt(
            W, x.H.float(), sparsity=0.5
        ),
        ("SparseGPT 2:4", None): lambda W, x: prune.sparsegpt(
            W, x.H.float(), n=2, m=4
        ),
        **{
            (f"SparseGPT {s} %, joint", b): partial(
                few.joint, bits=b, sparsity=s / 100
            )
            for s, b in ((50, 4), (33, 3), (50, 3), (50, 6), (25, 4))
        },
        ("SparseGPT 50 %, then rounding", 4): partial(
            few.in_turn, bits=4, sparsity=0.5
        ),
        ("SparseGPT 2:4, joint", 4): partial(few.joint, bits=4, n=2, m=4),
        **{
            (f"rank {r}, GPTQ", 4): partial(few.thin, bits=4, ratio=r)
            for r in (0.7, 0.9)
        },
        **{
            ("GPTQ, rank 8 in 8 bits", b): partial(
                few.corrected, bits=b, rank=8
            )
            for b in (3, 2)
        },
    }


def without_block(bench, i):
    keep = torch.arange(len(bench.model.blocks)) != i
    ids = bench.test[None, :LENGTH]
    return prune.remove_blocks(bench.model, "blocks", keep, ids)


def once(bench, net, rule, needs, draw):
    """Compress in one way with one draw; measure the copy."""
    rule = partial(rule, seed=draw) if "seed" in needs else rule
    seen = bench.passages(draw) if "data" in needs else None
    model, made = compressed(net, rule, seen)
    return {"effective": effective(made, bench.numel), **bench.compared(model)}


def weights(bench, store):
    """Measure the rules for weights, and two methods together."""
    plans = {k: (bench.model, *plan) for k, plan in alone().items()}
    for (name, bits), rule in together().items():
        plans[name, bits, None] = bench.model, rule, "data"
    blocks = range(len(bench.model.blocks))
    cost = [bench.bits(without_block(bench, i), "val") for i in blocks]
    short = without_block(bench, cost.index(min(cost)))
    plans["a block less", None, None] = short, lambda W, x: W, ""
    for b in (4, 3):
        rule = partial(few.gptq, bits=b)
        plans["a block less, GPTQ", b, None] = short, rule, "data"
    rows = []
    for key, (net, rule, needs) in tqdm(plans.items(), desc="weights"):
        found = [
            store.get(
                f"weights/{key}/{draw}",
                partial(once, bench, net, rule, needs, draw),
            )
            for draw in range(DRAWS if needs else 1)
        ]
        row = dict(zip(("method", "bits", "group"), key, strict=True))
        row["effective"] = found[0]["effective"]
        several = ("quality", "agreement", "kl")
        rows.append(row | {k: [f[k] for f in found] for k in several})
    return {"blocks, val": cost, "rows": rows}


def on_inputs(model, bits, by, batches):
    """Round what enters the layers of the blocks."""
    if by == "static":
        rule = partial(quantize.min_max, bits=bits, each="tensor")
        return quantize.static(model, batches, rule=rule, where=body)
    return quantize.dynamic(model, bits=bits, each=by, where=body)


def in_few_bits(bench, net, way, job, draw, alpha, split="val"):
    """Prepare a network; round its weights and activations; measure it."""
    name, bits, by = job
    seen = bench.passages(draw)
    model = _streams.prepared(net, way, seen, seed=draw, alpha=alpha)
    rule = partial(getattr(few, name), bits=bits[0])
    model, _ = compressed(model, rule, seen if name == "gptq" else None)
    return bench.bits(on_inputs(model, bits[1], by, seen), split)


def tried(bench, name, net, store):
    """Choose SmoothQuant's alpha by the validation text, at 4 bits."""
    run = partial(in_few_bits, bench, net, "smooth", ROUNDED[5], 0)
    return {a: store.get(f"alpha/{name}/{a}", partial(run, a)) for a in ALPHAS}


def measured(bench, name, net, alpha, store):
    """Round weights and activations of one network in every way."""
    rows = []
    # alone, folding matters only where the scales of norms are large
    ways = [w for w in _streams.WAYS if w != "folded" or name == "loud"]
    jobs = [(way, job) for job in ROUNDED for way in ways]
    for way, job in tqdm(jobs, desc=name):
        sees = way not in ("plain", "folded")
        sees = sees or "gptq" in job or "static" in job
        run = partial(in_few_bits, bench, net, way, job, split="test")
        found = [
            store.get(
                f"activations/{name}/{way}/{job}/{draw}",
                partial(run, draw, alpha),
            )
            for draw in range(DRAWS if sees else 1)
        ]
        row = dict(zip(("weights", "bits", "range"), job, strict=True))
        rows.append({"net": name, "way": way, **row, "quality": found})
    return rows


def activations(bench, store):
    """Measure how many bits the activations of three networks need."""
    found = {"exact": {}, "alpha": {}, "rows": []}
    for name in NETS:
        net = bench.network(name)
        found["exact"][name] = bench.bits(net)
        costs = tried(bench, name, net, store)
        found["alpha"][name] = costs
        best = min(costs, key=costs.get)
        found["rows"] += measured(bench, name, net, best, store)
    return found


def outliers(bench):
    """Look at the networks, and at what a rotation makes of each."""
    seen, found = bench.passages(0), {}
    for name in NETS:
        net = bench.network(name)
        turned = _streams.prepared(net, "rotated, all", seen)
        for key, model in ((name, net), (f"{name}, rotated", turned)):
            rows = _streams.outliers(model, seen)
            skip = ("attention.k", "attention.v")  # they read what q reads
            rows = {n: r for n, r in rows.items() if not n.endswith(skip)}
            columns = {
                k: [r[k] for r in rows.values()]
                for k in ("largest", "ratio", "from 6")
            }
            found[key] = {"layers": list(rows), **columns}
    return found


def cached(model, start, ids):
    """Read a text through a cache: its bits, those of second halves too."""
    reader = quantize.CachedLM(model, start)
    bits = loss(logits(reader, ids), ids).view(-1, LENGTH)
    return {
        "quality": round(float(bits.mean()), 4),
        "second half": round(float(bits[:, LENGTH // 2 :].mean()), 4),
    }


def caches(bench, store):
    """Measure the bits of the cache, and what should share a grid."""
    ids = bench.test[: CACHED * LENGTH + 1]
    nets = {
        "as trained": bench.model,
        "loud keys": _streams.loud_keys(bench.model),
    }
    plans = [("as trained", axes, 0) for axes in AXES]
    plans += [("as trained", "KIVI", 32)]
    plans += [("loud keys", axes, 0) for axes in AXES]
    rows = []
    for name, axes, window in tqdm(plans, desc="cache"):
        for bits in CACHE_BITS:
            start = Variant(bits, GROUP, window, axes=AXES[axes])
            row = {"net": name, "axes": axes, "bits": bits, "window": window}
            row["bytes"] = full_bytes(bench.model, start, LENGTH)
            key = f"cache/{name}/{axes}/{window}/{bits}"
            run = partial(cached, nets[name], start, ids)
            rows.append(row | store.get(key, run))
    none = Variant(8, GROUP, LENGTH)  # nothing leaves such a window
    seen = bench.passages(0)
    return {
        "windows": CACHED,
        "group": GROUP,
        "exact": cached(bench.model, none, ids),
        "bytes": full_bytes(bench.model, none, LENGTH),
        "spread": {n: spread(net, seen) for n, net in nets.items()},
        "rows": rows,
    }


def main():
    store, bench = Store(__file__), Bench()
    right = bench.dense.argmax(-1) == bench.test[1:]
    _stamp.write(
        __file__,
        {
            "text": bench.text,
            "draws": DRAWS,
            "seen": SIZE * SEEN,
            "weights": bench.numel,
            "dense": {
                "quality": bench.bits(bench.model),
                "accuracy": round(float(right.double().mean()), 4),
            },
            **weights(bench, store),
            "outliers": store.get("outliers", partial(outliers, bench)),
            "cache": caches(bench, store),
            "activations": activations(bench, store),
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
