"""Write the published encoder to the smallest file that is good enough.

    python chapters/experiments/encoder_file.py [--write FOLDER] [--times]

Good enough is a mean cosine of at least 0.99, or 0.95, with the embeddings of
the original on validation text (paragraphs of the language reference).  A
ladder: coding and GPTQ, each alone and both; from there on each rung has one
idea more than the one before.  One number says how coarse a rung is.  What is
reported is read from the file, on other paragraphs, docstrings, and random
words, since a table of tokens has to do for any text.  Nothing is trained;
what sees data sees the paragraphs that are left.  The pooler, which `embed`
does not use, is dropped.  --write keeps the two last files, --times measures
nothing but the times anew (alone!).  The same command goes on after Ctrl-C.
"""

import argparse
import hashlib
import json
from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path
from statistics import mean, stdev

import _large
import _pruning
import _stamp
import _steps
import pruned_encoder
import torch
from torch import nn
from tqdm import tqdm

from minicompress import (
    calibrate,
    codes,
    data,
    measure,
    models,
    pipeline,
    quantize,
    storage,
    train,
    zoo,
)

TARGETS = (0.99, 0.95)
GROUP = 64
WIDTHS = [  # bits of tables and matrices without a coder, smallest file first
    (tables, matrices)
    for tables in range(3, 9)
    for matrices in range(tables - 1, tables + 2)
]
EACH = 4  # of the docstrings every fourth one
TABLES = ("tokens.weight", "positions.weight")
REPEATS = 15


def without_pooler(model):
    """Copy an encoder without the layer that embeddings do not use."""
    small = models.Encoder(**model.config | {"pooler": False})
    state = model.state_dict()
    small.load_state_dict({n: state[n] for n in small.state_dict()})
    return small.eval()


def batches(tokenizer, texts, size=32):
    """Cut texts into tokens; those of one length go together."""
    rows = [tokenizer.encode(t, _large.LENGTH) for t in texts]
    lengths = sorted({len(row) for row in rows})
    same = [torch.stack([r for r in rows if len(r) == n]) for n in lengths]
    return [part for group in same for part in group.split(size)]


def random_words(words, count, seed=0):
    """Make texts of 30 words each, drawn evenly from a vocabulary."""
    whole = [w for w in words if w.isalpha() and len(w) > 2]
    dice = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(whole), (count, 30), generator=dice).tolist()
    return [" ".join(whole[i] for i in row) for row in drawn]


def coarsest(loss, allowed, guess, tries=7, near=0.03):
    """Find how coarse steps may be: a number x with loss(x) just allowed.

    The loss grows like a power of x, at first like its square.
    """
    x, seen = float(f"{guess:.3g}"), {}
    for _ in range(tries):
        seen[x] = loss(x)
        if (1 - near) * allowed <= seen[x] <= allowed:
            return x
        power = 2.0
        if len(seen) > 1:
            (a, fa), (b, fb) = list(seen.items())[-2:]
            power = torch.tensor(fb / fa).log() / torch.tensor(b / a).log()
            power = min(max(float(power), 1.0), 4.0)
        x *= ((1 - near / 2) * allowed / seen[x]) ** (1 / power)
        x = float(f"{x:.3g}")
        if x in seen:
            break
    good = [x for x, y in seen.items() if y <= allowed]
    if not good:
        raise ValueError(f"no step is good enough, tried {seen}")
    return max(good)


class Bench:
    """The encoder, the texts, and what calibration makes of them."""

    def __init__(self):
        self.whole, self.tokenizer = zoo.encoder()
        self.model = without_pooler(self.whole)
        self.words = list(self.tokenizer.vocab)
        texts = {
            "val": _large.paragraphs("val"),
            "test": _large.paragraphs("test"),
            "other": data.docstrings().texts[::EACH],
            "random": random_words(self.words, 128),
        }
        self.texts = {
            k: _large.Texts(self.model, self.tokenizer, t)
            for k, t in texts.items()
        }
        self.names = calibrate.layers(self.model)
        self.known = {}  # losses

    def loss(self, state):
        """Give 1 - cosine on the validation text."""
        model = pipeline.realized(self.model, state)
        return 1 - self.texts["val"].compare(model)["cosine"]

    @cached_property
    def batches(self):
        return batches(self.tokenizer, _large.paragraphs("train"))

    @cached_property
    def inputs(self):
        """Second moments of the inputs, {name: H}."""
        stats = calibrate.inputs(self.model, self.batches)
        return {n: s.H for n, s in stats.items()}

    @cached_property
    def gradients(self):
        return _steps.gradients(self.model, self.batches)

    def weight(self, name):
        return self.model.get_parameter(name).detach()

    def state(self, made):
        """Put codes in their places; what has none is written in 16 bits."""
        return pipeline.halved(pipeline.plain(self.model)) | made


def in_8_bits(bench, made=()):
    """Give 8 bits to what has no code yet."""
    names = [n for n, _ in bench.model.named_parameters() if n not in made]
    how = {n: "row" if bench.weight(n).ndim > 1 else "tensor" for n in names}
    return {
        n: quantize.min_max(bench.weight(n), bits=8, each=how[n]) for n in names
    } | dict(made)


def int8(bench):
    """Take 8 bits for each matrix and table, with a scale for each row."""
    names = (*bench.names, *TABLES)
    rule = partial(quantize.min_max, bits=8)
    return {n: rule(bench.weight(n)) for n in names}


def rounded(bench, bits):
    """Round all of it, in groups; bits of the tables, and of the matrices."""
    bits = dict.fromkeys(TABLES, bits[0]) | dict.fromkeys(bench.names, bits[1])
    return pipeline.halved(
        {
            n: quantize.mse(bench.weight(n), bits=b, each=GROUP)
            for n, b in bits.items()
        }
    )


def gptq(bench, bits):
    """Round the matrices by GPTQ instead."""
    made = rounded(bench, bits)
    renew = partial(quantize.mse, bits=bits[1])
    for n in bench.names:
        W, grid = bench.weight(n), made[n]
        made[n] = quantize.gptq(W, bench.inputs[n].float(), grid, renew=renew)
    return pipeline.halved(made)


def tables(bench, c):
    """Round the tables by one step each, that of the tokens even with c."""
    _, M = bench.gradients
    words, at = (bench.weight(n) for n in TABLES)
    size = c / M.diagonal().mean().sqrt()
    step = float(size * len(words) ** 0.5)
    fine = float(size * _steps.places(len(at))[0] ** -0.5)
    return {
        TABLES[0]: _steps.by_nearest(words, step),
        TABLES[1]: _steps.by_nearest(at, fine),
    }


def uniform(bench, part, look=False):
    """Round by one step for a matrix, a part of its standard deviation."""
    made = {}
    for n in (*bench.names, *TABLES):
        W = bench.weight(n)
        step = float(part * W.std())
        if look and n in bench.names:
            made[n] = _steps.by_gptq(W, bench.inputs[n], step)
        else:
            made[n] = _steps.by_nearest(W, step)
    return made


def evenly(bench, c):
    """Choose the steps so that each weight costs the embedding the same."""
    weights, _ = bench.gradients
    made = tables(bench, c)
    for n in bench.names:
        H = weights[n].H
        step = _steps.even(weights[n], c)
        made[n] = _steps.by_gptq(bench.weight(n), H, step)
    return made


def turned(bench, c, likely=_steps.alike):
    """Round the tokens along directions, the positions by GPTQ."""
    _, M = bench.gradients
    words, at = (bench.weight(n) for n in TABLES)
    there = _steps.Weight(M, _steps.places(len(at)))
    return evenly(bench, c) | {
        TABLES[0]: _steps.turned(words, M, likely(bench.words), c),
        TABLES[1]: _steps.by_gptq(at, M, _steps.even(there, c)),
    }


def last(bench, c, likely=_steps.zipf):
    """Give 8 bits to all the rest too: biases, norms, types."""
    return in_8_bits(bench, turned(bench, c, likely))


RUNGS = {  # name: how, and where the search for a step begins
    "rounding": (rounded, None),
    "coded": (uniform, 0.2),
    "GPTQ": (gptq, None),
    "GPTQ, coded": (partial(uniform, look=True), 0.3),
    "even steps": (evenly, 1e-4),
    "turned table": (turned, 1e-4),
    "likely tokens": (partial(turned, likely=_steps.zipf), 1e-4),
    "all the rest": (last, 1e-4),
}


def chosen(bench, name, target):
    """Choose bits or a step on the validation text."""
    make, guess = RUNGS[name]

    def loss(x):
        if (name, x) not in bench.known:
            state = bench.state(make(bench, x))
            bench.known[name, x] = bench.loss(state)
        return bench.known[name, x]

    if guess:
        guess *= ((1 - target) / 0.01) ** 0.5
        return coarsest(loss, 1 - target, guess)
    return next(b for b in WIDTHS if loss(b) <= 1 - target)


def parts(state):
    """Count the bytes of what a file is made of, without its header."""
    sizes = {"tokens": 0, "positions": 0, "matrices": 0, "rest": 0}
    for name, x in state.items():
        kind = name.split(".")[0]
        if kind not in sizes:
            thin = name.startswith("types") or len(codes.shape(x)) < 2
            kind = "rest" if thin else "matrices"
        sizes[kind] += storage.payload(x)
    return sizes


def row(bench, name, model, state=None, compact=False, **more):
    """Write a file, read it, and measure what was read."""
    file = storage.dumps(model, state, compact=compact)
    model = storage.loads(file)
    found = {k: t.compare(model) for k, t in bench.texts.items()}
    return {
        "name": name,
        **more,
        "bytes": len(file),
        **{k: round(x["cosine"], 4) for k, x in found.items()},
        "neighbor": {k: round(x["neighbor"], 3) for k, x in found.items()},
        "parts": parts(state or pipeline.plain(model)),
        "sha256": hashlib.sha256(file).hexdigest(),
    }


def rung(bench, name, target):
    x = chosen(bench, name, target)
    state = bench.state(RUNGS[name][0](bench, x))
    compact = name == list(RUNGS)[-1]  # the header too
    more = {"target": target, "knob": x}
    return row(bench, name, bench.model, state, compact, **more)


def written(bench, found):
    """Return one of the smallest files; make it if it is not kept."""
    place = _pruning.SCRATCH / f"encoder-{found['sha256'][:16]}.mc"
    if not place.exists():
        state = bench.state(last(bench, found["knob"]))
        place.write_bytes(storage.dumps(bench.model, state, compact=True))
    return place.read_bytes()


def plain_rows(bench):
    """List what needs no choice, {name: job}."""
    model = bench.model
    files = {
        "float32": (bench.whole, None),
        "no pooler": (model, None),
        "float16": (model, bench.state({})),
        "int8": (model, bench.state(int8(bench))),
    }
    return {n: partial(row, bench, n, *job) for n, job in files.items()}


def seen_only(words, texts, tokenizer):
    """Let only the tokens of some texts count: a table for no other text."""
    p = _steps.zipf(words)
    seen = torch.zeros(len(p), dtype=torch.bool)
    for text in texts:
        seen[tokenizer.encode(text)] = True
    return torch.where(seen, p, 1e-12)


def warning(bench, c, target):
    """Keep only the tokens of the texts that calibrate and choose."""

    def likely(words):
        texts = _large.paragraphs("train") + bench.texts["val"].texts
        return seen_only(words, texts, bench.tokenizer)

    state = bench.state(last(bench, c, likely))
    more = {"target": target, "knob": c}
    name = "tokens of our text only"
    return row(bench, name, bench.model, state, True, **more)


def first_blocks(model, count):
    """Take away all blocks but the first ones: what time they take."""
    model = deepcopy(model)
    model.blocks = model.blocks[:count]
    return model


def products(model, rows):
    """Return a function that computes the products of all blocks alone."""
    kinds = (nn.Linear, quantize.Int8Linear)
    layers = [m for m in model.blocks.modules() if isinstance(m, kinds)]
    dice = torch.Generator().manual_seed(0)
    wide = {n: torch.randn(rows, n, generator=dice) for n in (384, 1536)}
    down = {m for b in model.blocks for m in [b.down]}

    def run():
        for layer in layers:
            layer(wide[1536 if layer in down else 384])

    return run


def times(bench, files):
    """Time one batch of 64 tokens a text, in turns, one thread."""
    model, fast = bench.model, _large.in_int8(bench.model)
    read = storage.loads(files[str(TARGETS[0])])
    variants = {
        "float32": model,
        "read from the file": read,
        "int8": fast,
        "4 of 6 blocks": first_blocks(model, 4),
        "bfloat16": deepcopy(model).bfloat16(),
    }
    found = {"kernel": next(iter(quantize.kernels())), "repeats": REPEATS}
    for count in (1, 32):
        ids = torch.randint(1996, 29000, (count, _large.LENGTH))
        jobs = {n: partial(m, ids) for n, m in variants.items()}
        jobs |= {
            "products": products(model, ids.numel()),
            "products, int8": products(fast, ids.numel()),
        }
        found[f"{count} texts"] = timed(jobs)
    files = files | {"float32": storage.dumps(model)}
    reading = {
        n: measure.latency(storage.loads, f, repeats=5)
        for n, f in files.items()
    }
    found["reading, s"] = {n: round(t.median, 2) for n, t in reading.items()}
    for name in ("int8", "bfloat16"):
        close = bench.texts["test"].compare(InFloat32(variants[name]))
        found[f"{name}, test"] = round(close["cosine"], 4)
    return found


class InFloat32(nn.Module):
    """Give the features of a model in float32, whatever it computes in."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        return self.model(*args).float()


def timed(jobs):
    """Measure jobs in turns: seconds, and ratios to the first."""
    found = measure.compare(jobs, repeats=REPEATS)
    first = next(iter(found.values())).median
    part = found["products"].median / first
    factor = found["products"].median / found["products, int8"].median
    return {
        "ms": {n: round(1e3 * t.median, 2) for n, t in found.items()},
        "ratio": {n: round(t.median / first, 3) for n, t in found.items()},
        "share of products": round(part, 3),
        "int8, by Amdahl": round(1 / measure.amdahl(min(part, 1), factor), 3),
    }


def probes(files):
    """Measure the accuracy of a linear probe with 5 labels, in per cent.

    Everything as in pruned_encoder.py; what is lost is paired by draw.
    """
    bench = pruned_encoder.Bench()
    E = bench.embed(bench.dense)
    penalty = pruned_encoder.tuned(E, bench.y)
    own = pruned_encoder.accuracies(E, bench.y, penalty)
    found = {"float32": {"right": round(100 * mean(own), 2)}}
    for target, file in files.items():
        E = bench.embed(storage.loads(file))
        new = pruned_encoder.accuracies(E, bench.y, penalty)
        lost = [100 * (a - b) for a, b in zip(own, new, strict=True)]
        found[target] = {
            "right": round(100 * mean(new), 2),
            "lost": round(mean(lost), 2),
            "error": round(stdev(lost) / len(lost) ** 0.5, 2),
        }
    return found


def about(bench, best):
    """Say what the texts are, and what was predicted for the blocks."""
    weights, _ = bench.gradients
    made = evenly(bench, best["knob"])
    D = {n: made[n].decode() - bench.weight(n) for n in bench.names}
    state = bench.state({n: made[n] for n in bench.names})
    felt = sum(_steps.felt(D[n], weights[n]) for n in bench.names)
    return {
        "texts": {k: len(t.texts) for k, t in bench.texts.items()},
        "calibration": {
            "texts": sum(len(b) for b in bench.batches),
            "tokens": sum(b.numel() for b in bench.batches),
        },
        "blocks alone": {
            "predicted": round(felt / 2, 5),
            "val": round(bench.loss(state), 5),
        },
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", type=Path)
    parser.add_argument("--times", action="store_true")
    options = parser.parse_args()
    store, bench = _pruning.Store(__file__), Bench()
    if options.times:
        where = _stamp.RESULTS / f"{Path(__file__).stem}.json"
        result = json.loads(where.read_text("utf8"))
        smallest = result["smallest"]
        files = {t: written(bench, r) for t, r in smallest.items()}
        _stamp.write(__file__, result | {"times": times(bench, files)})
        return
    rows = [store.get(n, job) for n, job in plain_rows(bench).items()]
    for name in tqdm(RUNGS):
        for t in TARGETS:
            job = partial(rung, bench, name, t)
            rows.append(store.get(f"{name}/{t}", job))
    smallest = {str(r["target"]): r for r in rows[-len(TARGETS) :]}
    best = smallest[str(TARGETS[0])]
    job = partial(warning, bench, best["knob"], TARGETS[0])
    rows.append(store.get("warning", job))
    facts = store.get("facts", partial(about, bench, best))
    files = {t: written(bench, r) for t, r in smallest.items()}
    result = {
        **facts,
        "float32": rows[0],
        "ladder": rows[1:],
        "smallest": smallest,
        "parts": best["parts"],
        "probe": store.get("probe", partial(probes, files)),
        "times": store.get("times", partial(times, bench, files)),
    }
    _stamp.write(__file__, result)
    if options.write:
        for t, file in files.items():
            (options.write / f"encoder-{t}.mc").write_bytes(file)


if __name__ == "__main__":
    with train.threads(1):
        main()
