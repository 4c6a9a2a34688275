"""Product quantization of three networks of the zoo, without training after it.

At 1, 2 and 3 bits for each weight and sub-vectors of 1 to 8 weights: errors
of the weights and of the layers' outputs, quality, and the whole file with
its codebooks.  The three seeds start k-means and draw what calibrates H.
In the language model the tables of tokens and positions have 8 bits.
"""

from dataclasses import replace
from functools import partial

import _stamp
import torch
from _pruning import Store, layers
from tqdm import tqdm

from minicompress import (
    calibrate,
    codes,
    data,
    obs,
    quantize,
    share,
    storage,
    train,
    zoo,
)

SEEDS = 3
RATES = (1, 2, 3)  # bits for each weight
LENGTHS = (1, 2, 4, 8)
MOST = 12  # bits of an index; with more, k-means takes minutes
NETS = ("glyphs-mlp", "glyphs-cnn", "reference-lm")


def plain(W, H, rate, length, seed):
    return share.product(W, length=length, bits=rate * length, seed=seed)


def weighted(W, H, rate, length, seed):
    return share.product(W, length=length, bits=rate * length, seed=seed, H=H)


def columns(W, H, rate, length, seed):
    return share.product(
        W, length=length, bits=rate * length, seed=seed, each="columns"
    )


def residual(W, H, rate, length, seed):
    """As many codebooks as bits for each weight."""
    return share.residual(
        W, terms=rate, length=length, bits=length, seed=seed, H=H
    )


def half(W, H, rate, length, seed):
    """Centroids of 16 bits."""

    def smaller(code):
        if isinstance(code, codes.View):
            return replace(code, x=smaller(code.x))
        return replace(code, centroids=code.centroids.half())

    return smaller(weighted(W, H, rate, length, seed))


def scalar(W, H, rate, length, seed):
    """An even grid for each row, for comparison."""
    if rate == 1:
        return quantize.binary(W)
    code = quantize.mse(W.flatten(1), bits=rate)
    return code if W.ndim == 2 else codes.View(code, tuple(W.shape))


METHODS = {
    "plain": plain,
    "weighted": weighted,
    "columns": columns,
    "residual, weighted": residual,
    "half, weighted": half,
}


def jobs(name):
    """List (method, bits for each weight, length)."""
    for rate in RATES:
        yield "even grid, row", rate, 1
        for length in LENGTHS:
            if rate * length <= MOST:
                yield "plain", rate, length
                yield "weighted", rate, length
            if rate > 1 and length > 1:  # else the same as "weighted"
                yield "residual, weighted", rate, length
    for rate, length in ((1, 4), (1, 8), (2, 2), (2, 4)):
        yield "half, weighted", rate, length
        if name != "reference-lm":
            yield "columns", rate, length
    # as many centroids as sub-vectors: nothing is saved
    yield "plain", 2, 8
    if name == "glyphs-cnn":  # a vector is a window of 3 × 3
        yield "plain", 1, 9
        yield "weighted", 1, 9


def seeds(name, method, rate, length):
    """Say how many seeds a job is repeated with."""
    if method == "even grid, row" or rate * length > 9:
        return 1  # nothing is drawn, or it takes minutes
    return SEEDS if name != "reference-lm" or rate == 2 else 1


class Subject:
    """A network, its task, and the moments that each seed draws."""

    def __init__(self, name):
        self.task, self.net = zoo.task(name), zoo.load(name)
        self.text = isinstance(self.task, data.Reference)
        leave = ("head", "tokens", "positions") if self.text else ()
        self.names = layers(self.net, leave)
        self.weights = {
            n: self.net.get_parameter(n).detach() for n in self.names
        }
        self.fixed = self.tables() if self.text else {}
        self.H = [self.moments(seed) for seed in range(SEEDS)]

    def tables(self):
        tokens = quantize.min_max(self.net.tokens.weight, bits=8)
        positions = quantize.min_max(self.net.positions.weight, bits=8)
        return {
            "tokens.weight": tokens,
            "head.weight": tokens,
            "positions.weight": positions,
        }

    def moments(self, seed):
        if self.text:
            ids = data.Tokenizer().encode(self.task.train)
            seen = train.passages(ids, length=128, size=8, steps=4, seed=seed)
        else:
            X, _ = self.task.train
            dice = torch.Generator().manual_seed(seed)
            seen = [X[torch.randperm(len(X), generator=dice)[:512]]]
        stats = calibrate.inputs(
            self.net, seen, where=lambda n, w: n in self.names
        )
        return {n: s.H for n, s in stats.items()}

    def finished(self, made):
        state = codes.encode(self.net, codes.value, lambda n, w: False)
        file = storage.dumps(self.net, state | self.fixed | made)
        model = storage.loads(file)
        scale = 1 if self.text else 100
        quality = round(scale * zoo.quality(model, self.task), 4)
        return {"test": quality, "bytes": len(file)}

    def errors(self, made, H):
        """Relative squared errors, the means over layers."""
        weight, output = [], []
        for n, W in self.weights.items():
            W, Q = W.flatten(1).double(), made[n].decode().flatten(1).double()
            weight.append(((W - Q).square().sum() / W.square().sum()).item())
            lost = obs.layer_loss(W, Q, H[n]).sum()
            whole = obs.layer_loss(W, torch.zeros_like(W), H[n]).sum()
            output.append((lost / whole).item())
        return {
            "weight error": round(sum(weight) / len(weight), 5),
            "output error": round(sum(output) / len(output), 5),
        }

    def measure(self, method, rate, length, seed):
        H = self.H[seed]
        code = METHODS.get(method, scalar)
        made = {
            n: code(W, H[n], rate, length, seed)
            for n, W in self.weights.items()
        }
        books = sum(
            storage.payload(x.centroids)
            for c in made.values()
            for x in books_of(c)
        )
        return self.finished(made) | self.errors(made, H) | {"codebooks": books}

    def by_layer(self, rate, length):
        """Bytes of each weight as it is, of its index and its codebook."""
        rows = []
        for n, W in self.weights.items():
            code = plain(W, None, rate, length, 0)
            (book,) = books_of(code)
            rows.append(
                {
                    "name": n,
                    "dense": storage.payload(W),
                    "index": storage.payload(book.index),
                    "codebook": storage.payload(book.centroids),
                }
            )
        return rows


def books_of(code):
    if isinstance(code, codes.Codebook):
        return [code]
    if isinstance(code, codes.View):
        return books_of(code.x)
    if isinstance(code, codes.Sum):
        return books_of(code.a) + books_of(code.b)
    return []


def main():
    store, found = Store(__file__), {}
    for name in NETS:
        subject, rows = Subject(name), []
        for method, rate, length in tqdm(list(jobs(name)), desc=name):
            ends = [
                store.get(
                    f"{name}/{method}/{rate}/{length}/{seed}",
                    partial(subject.measure, method, rate, length, seed),
                )
                for seed in range(seeds(name, method, rate, length))
            ]
            row = {"method": method, "rate": rate, "length": length}
            same = {"bytes", "codebooks"}
            row |= {
                k: ends[0][k] if k in same else [e[k] for e in ends]
                for k in ends[0]
            }
            rows.append(row)
        found[name] = {
            "weights": sum(W.numel() for W in subject.weights.values()),
            "dense": subject.finished({}),
            "rows": rows,
            "layers": store.get(
                f"{name}/layers", partial(subject.by_layer, 2, 4)
            ),
        }
    _stamp.write(__file__, found)


if __name__ == "__main__":
    with train.threads(1):
        main()
