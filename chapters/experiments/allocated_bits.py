"""The best bits for each layer under a budget in bytes, against one width.

On the CNN for glyphs and the language model.  What a layer costs at each
width is measured, or predicted from its curvature, on validation data and on
training data; the budgets are those of every uniform width and steps between
them.  The test set only reports.
"""

from itertools import pairwise

import _stamp
import torch
from _pruning import Store
from _rounding import loaded
from tqdm import tqdm

from minicompress import calibrate, codes, data, quantize, train, zoo

WIDTHS = (2, 3, 4, 5, 6, 8)
BETWEEN = (0.25, 0.5, 0.75)
CHARACTERS, PROBES = 12_800, 50
LEAVE = {"reference-lm": ("head.weight",)}  # the table of tokens as well
METHODS = {
    "knapsack": quantize.knapsack,
    "Lagrangian": quantize.lagrangian,
    "greedy": quantize.greedy,
}


def rule(W, bits):
    code = quantize.mse(W.flatten(1), bits=bits)
    return code if W.ndim == 2 else codes.View(code, tuple(W.shape))


def glyphs():
    task = zoo.task("glyphs-cnn")
    X, y = task.train
    some = torch.randperm(len(X), generator=torch.manual_seed(0))[:256]

    def metric(net):
        return train.cross_entropy(net, task.val).item()

    return task, metric, [(X[some], y[some])]


def language():
    task = zoo.task("reference-lm")
    tokens = data.Tokenizer()
    ids = tokens.encode(task.train)
    batches = train.passages(ids, length=128, size=8, steps=1, seed=0)
    part = tokens.encode(task.val[:CHARACTERS])

    def metric(net):
        return train.bits_per_char(net, part)

    return task, metric, list(batches)


def quality(net, task, split="test"):
    value = zoo.quality(net, task, split)
    return value if hasattr(task, "hash") else 100 * value


def study(name, setting, store):
    net = zoo.load(name).eval()
    task, metric, batches = setting()
    names = [n for n in calibrate.layers(net) if n not in LEAVE.get(name, ())]
    named = dict(net.named_parameters(remove_duplicate=False))
    weights = {n: named[n].detach() for n in names}
    options = {n: {b: rule(w, b) for b in WIDTHS} for n, w in weights.items()}

    def measured():
        with torch.no_grad():
            table = quantize.sensitivity(net, options, metric)
        return {n: {str(b): v for b, v in t.items()} for n, t in table.items()}

    def traces():
        return quantize.hessian_traces(
            net, batches, where=lambda n, w: n in names, probes=PROBES
        )

    kept = store.get(f"{name}/measured", measured)
    table = {
        n: {int(b): tuple(v) for b, v in own.items()} for n, own in kept.items()
    }
    curvature = store.get(f"{name}/traces", traces)
    tables = {
        "measured": table,
        "curvature": quantize.hawq_table(options, weights, curvature),
    }
    prices = [
        quantize.predicted(table, dict.fromkeys(names, b))[0] for b in WIDTHS
    ]
    budgets = list(prices)
    for low, high in pairwise(prices[:-1]):
        budgets += [round(low + t * (high - low)) for t in BETWEEN]

    def row(choice, budget):
        made = {n: options[n][b] for n, b in choice.items()}
        new, size = loaded(net, made)
        with torch.no_grad():
            rise = metric(new) - metric(net)
        return {
            "budget": budget,
            "bits": list(choice.values()),
            "predicted": quantize.predicted(table, choice)[1],
            "rise": rise,
            "bytes": size,
            "quality": quality(new, task),
        }

    rows = []
    for b, price in zip(WIDTHS, prices, strict=True):
        key = f"{name}/uniform/{b}"
        found = store.get(
            key, lambda b=b, p=price: row(dict.fromkeys(names, b), p)
        )
        rows.append({"by": "one width", **found})
    jobs = [
        (kind, how, budget)
        for budget in sorted(budgets)
        for kind, how in (
            ("measured", "knapsack"),
            ("measured", "Lagrangian"),
            ("measured", "greedy"),
            ("curvature", "knapsack"),
        )
    ]
    for kind, how, budget in tqdm(jobs, desc=name):
        choice = METHODS[how](tables[kind], budget=budget)
        key = f"{name}/{list(choice.values())}"
        found = store.get(key, lambda c=choice: row(c, None))
        rows.append({"by": f"{kind}, {how}", **found, "budget": budget})
    return {
        "layers": {n: w.numel() for n, w in weights.items()},
        "measured": kept,
        "traces": curvature,
        "dense": quality(net, task),
        "rows": rows,
    }


def main():
    store = Store(__file__)
    found = {
        name: study(name, setting, store)
        for name, setting in (
            ("glyphs-cnn", glyphs),
            ("reference-lm", language),
        )
    }
    _stamp.write(__file__, found)


if __name__ == "__main__":
    with train.threads(1):
        main()
