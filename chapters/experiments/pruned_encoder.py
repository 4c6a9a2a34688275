"""Prune the published encoder without retraining; measure what is lost.

    python chapters/experiments/pruned_encoder.py

28 docstrings of each of 27 modules are embedded by the encoder as published
and by pruned ones.  Three measures: the accuracy of a linear probe on 5
labels per class, over 40 draws that are the same for every encoder; the mean
cosine to the embedding of the dense encoder; the share of texts whose nearest
neighbor stays the same.  The criteria that need inputs see passages of the
language reference and no docstring.  Ctrl-C is harmless: the same command
goes on from where it stopped.
"""

from copy import deepcopy
from functools import partial
from types import SimpleNamespace

import _pruning
import _stamp
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from minicompress import (
    calibrate,
    data,
    export,
    prune,
    storage,
    through,
    train,
    zoo,
)

PER_CLASS, LABELS, DRAWS = 28, 5, 40
TUNING = range(1000, 1010)  # draws that choose the penalty, not reported
GRADIENT_DRAW = 2000
LENGTH, FULL = 64, 256  # tokens
PENALTIES = (0.01, 0.03, 0.1, 0.3, 1, 3, 10)
PASSAGES = 64  # of LENGTH tokens each, for calibration
EMBEDDINGS = ("tokens.weight", "positions.weight", "types.weight")
GRID = sorted(_pruning.SPARSITIES)
ALL = sorted({0.4, 0.6, *GRID})
PLAN = {  # criterion: sparsities
    "global": ALL,
    "sparsegpt": ALL,
    "matrix": ALL,
    "random": GRID,
    "2:4 magnitude": [0.5],
    "2:4 sparsegpt": [0.5],
    "wanda": ALL,
    "with embeddings": [0.3, 0.4, 0.5],
    "taylor": GRID,
    "fisher": GRID,
    "gradient": GRID,
}


def sample(labels, per_class, seed=0):
    """Draw equally many texts of each class; return their numbers."""
    dice = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=dice)
    classes = labels.unique()
    return torch.cat([order[labels[order] == c][:per_class] for c in classes])


def probe(X, y, draw, penalty):
    """Fit a linear probe by ridge regression; return its test accuracy."""
    fit, test = draw
    X = X.double()
    mean = X[fit].mean(0)
    A, Y = X[fit] - mean, F.one_hot(y[fit]).double()
    eye = torch.eye(len(fit), dtype=A.dtype)
    # as many equations as labels, however many features there are
    a = torch.linalg.solve(A @ A.T + penalty * eye, Y - Y.mean(0))
    guess = ((X[test] - mean) @ (A.T @ a)).argmax(1)
    return float((guess == y[test]).double().mean())


def tuned(X, y):
    """Choose the penalty of the probe on draws that are not reported."""
    draws = [data.few(y, LABELS, seed=s) for s in TUNING]
    mean = {p: sum(probe(X, y, d, p) for d in draws) for p in PENALTIES}
    return max(mean, key=mean.get)


def accuracies(X, y, penalty):
    """Probe the features X (n, d) on every draw."""
    draws = (data.few(y, LABELS, seed=s) for s in range(DRAWS))
    return [round(probe(X, y, d, penalty), 4) for d in draws]


def nearest(E):
    """Find the nearest other text of each, by the cosine."""
    return (E @ E.T).fill_diagonal_(-2).argmax(1)


def blocks(model):
    """Collect the matrices of the blocks: not the embeddings or the pooler."""
    names = _pruning.layers(model, leave=("pooler",))
    return {n: model.get_parameter(n).detach() for n in names}


def apply(model, masks):
    """Set what is masked to zero, in a copy."""
    return through.bake(prune.masked(model, masks))


def coded_by_block(model, batches, rule):
    """Compress block by block, each on inputs from the compressed before.

    batches  token numbers, without padding
    rule     (name, W, stats) -> code, or a tensor

    Returns {name: code}.
    """
    start, made = deepcopy(model), {}
    start.blocks = start.blocks[:0]
    with train.evaluating(start):
        x = [start(ids) for ids in batches]
    for i, block in enumerate(model.blocks):
        block, new = deepcopy(block), {}
        for name, stats in calibrate.inputs(block, x).items():
            W = block.get_parameter(name).detach()
            new[name] = rule(f"blocks.{i}.{name}", W, stats)
        block = changed(block, new)
        with train.evaluating(block):
            x = [block(h) for h in x]
        made |= {f"blocks.{i}.{name}": code for name, code in new.items()}
    return made


def changed(model, made):
    """Copy a model, with the weights that the codes stand for."""
    return export.decoded(model, model.state_dict() | made)


def by_block(model, batches, compress):
    """Do the same by (W, stats) -> new W; return a copy of the model."""
    made = coded_by_block(model, batches, lambda n, W, s: compress(W, s))
    return changed(model, made)


def by_wanda(W, stats, sparsity):
    return W * prune.wanda(W, stats.norm, sparsity=sparsity)


def by_sparsegpt(W, stats, **how):
    return prune.sparsegpt(W, stats.H, **how).decode()


def passages(tokenizer):
    """Take passages of the language reference, evenly spread, in batches."""
    ids = tokenizer.encode(data.reference().train)
    starts = torch.linspace(1, len(ids) - LENGTH, PASSAGES).long().tolist()
    rows = torch.stack([ids[s : s + LENGTH - 2] for s in starts])
    rows = F.pad(rows, (1, 1))
    rows[:, 0], rows[:, -1] = ids[0], ids[-1]  # [CLS] and [SEP]
    return list(rows.split(16))


def moments(model, tokenizer, E, y, texts):
    """Differentiate the loss of a linear probe by the encoder's weights."""
    fit, _ = data.few(y, LABELS, seed=GRADIENT_DRAW)
    head = LogisticRegression(C=10, max_iter=500).fit(E[fit], y[fit])
    W = torch.tensor(head.coef_).float()
    b = torch.tensor(head.intercept_).float()

    def loss(model, batch):
        ids, label = batch
        v = F.normalize(model(ids).mean(1))  # no padding: one text each
        return F.cross_entropy(v @ W.T + b, label)

    names = blocks(model)
    batches = [
        (tokenizer.encode(texts[i], LENGTH)[None], y[i][None]) for i in fit
    ]
    return prune.gradients(model, batches, loss, where=lambda n, w: n in names)


def variant(model, name, sparsity, calibration, moments):
    """Prune the encoder; return the copy."""
    W = blocks(model)
    if name == "with embeddings":
        W |= {n: model.get_parameter(n).detach() for n in EMBEDDINGS}
    size = {n: w.abs() for n, w in W.items()}
    if name == "wanda":
        f = partial(by_wanda, sparsity=sparsity)
        return by_block(model, calibration, f)
    if name == "sparsegpt":
        f = partial(by_sparsegpt, sparsity=sparsity)
        return by_block(model, calibration, f)
    if name == "2:4 sparsegpt":
        return by_block(model, calibration, partial(by_sparsegpt, n=2, m=4))
    if name == "2:4 magnitude":
        return apply(model, {n: prune.n_m(s) for n, s in size.items()})
    if name == "random":
        seeds = enumerate(W.items())
        masks = {
            n: prune.random(w, sparsity=sparsity, seed=i) for i, (n, w) in seeds
        }
        return apply(model, masks)
    if name == "matrix":
        return apply(model, prune.keep_each(size, sparsity=sparsity))
    scores = {
        "global": lambda n, w: w.abs(),
        "with embeddings": lambda n, w: w.abs(),
        "taylor": lambda n, w: prune.taylor(w, moments()[n].mean),
        "fisher": lambda n, w: prune.fisher(w, moments()[n].square),
        "gradient": lambda n, w: prune.gradient(moments()[n].mean),
    }[name]
    scores = {n: scores(n, w) for n, w in W.items()}
    return apply(model, prune.keep_global(scores, sparsity=sparsity))


class Bench:
    """The texts, and every measure of an encoder on them."""

    def __init__(self):
        everything = data.docstrings()
        chosen = sample(everything.labels, PER_CLASS)
        self.texts = [everything.texts[i] for i in chosen]
        self.y = everything.labels[chosen]
        self.dense, self.tokenizer = zoo.encoder()
        self.rows = {t: self.tokenizer.encode(t, FULL) for t in self.texts}

    def embed(self, model, length=LENGTH):
        """Embed all texts; what each was cut into is known already."""
        last = self.tokenizer.number["[SEP]"]

        def encode(text, length):
            row = self.rows[text][:length].clone()
            row[-1] = last
            return row

        known = SimpleNamespace(encode=encode, pad=self.tokenizer.pad)
        return zoo.embed(model, known, self.texts, length=length)

    def measure(self, model, reference, penalty, length=LENGTH):
        """Compare an encoder with the embeddings of the dense one."""
        E = self.embed(model, length)
        same = (nearest(E) == nearest(reference)).double().mean()
        return {
            "accuracy": accuracies(E, self.y, penalty),
            "cosine": round(float((E * reference).sum(1).mean()), 4),
            "neighbor": round(float(same), 4),
        }


def pruned(bench, reference, penalty, job, calibration, moments):
    """Prune the encoder in one way; measure it and its file."""
    name, sparsity = job
    model = variant(bench.dense, name, sparsity, calibration, moments)
    names = [*blocks(model), *(EMBEDDINGS if "with" in name else ())]
    masks = {n: model.get_parameter(n).detach() != 0 for n in names}
    return {
        "criterion": name,
        "sparsity": sparsity,
        "removed": round(prune.sparsity(masks), 4),
        "bytes": _pruning.file_bytes(model, masks),
        **bench.measure(model, reference, penalty),
    }


def longer(bench, penalty):
    """Measure at full length what the cut to LENGTH tokens changes."""
    E = bench.embed(bench.dense, FULL)
    half = variant(bench.dense, "global", 0.5, None, None)
    return {
        "dense": accuracies(E, bench.y, penalty),
        "global 0.5": bench.measure(half, E, penalty, FULL),
    }


def words(bench):
    """Probe TF-IDF, which has read no other text than these."""
    X = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    X = torch.tensor(X.fit_transform(bench.texts).toarray())
    # rotated into the span of the texts: the same products, fewer columns
    left, size, _ = torch.linalg.svd(X, full_matrices=False)
    X = left * size
    penalty = tuned(X, bench.y)
    found = accuracies(X, bench.y, penalty)
    return {"penalty": penalty, "accuracy": found}


def main():
    store, bench = _pruning.Store(__file__), Bench()
    dense = bench.dense
    reference = bench.embed(dense)
    penalty = tuned(reference, bench.y)
    calibration = passages(bench.tokenizer)
    cache = []  # the gradients are needed by three criteria, if at all

    def gradients():
        if not cache:
            job = (dense, bench.tokenizer, reference, bench.y, bench.texts)
            cache.append(moments(*job))
        return cache[0]

    result = {
        "texts": len(bench.texts),
        "labels": LABELS,
        "draws": DRAWS,
        "length": LENGTH,
        "passages": PASSAGES,
        "penalty": penalty,
        "parameters": {
            "all": sum(p.numel() for p in dense.parameters()),
            "words": dense.tokens.weight.numel(),
            "blocks": sum(w.numel() for w in blocks(dense).values()),
        },
        "bytes": len(storage.dumps(dense)),
        "dense": store.get(
            "dense", lambda: accuracies(reference, bench.y, penalty)
        ),
        "tfidf": store.get("tfidf", lambda: words(bench)),
        "longer": store.get("longer", lambda: longer(bench, penalty)),
        "rows": [],
    }
    jobs = [(name, s) for name, many in PLAN.items() for s in many]
    for job in tqdm(jobs):
        args = (bench, reference, penalty, job, calibration, gradients)
        result["rows"].append(store.get(str(job), partial(pruned, *args)))
    _stamp.write(__file__, result)


if __name__ == "__main__":
    with train.threads(1):
        main()
