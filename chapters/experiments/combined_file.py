"""Look for the smallest file that reads digits, with everything together.

The entry of chapter 11 in the book's ledger: networks with one hidden layer
learn shaken digits from the CNN of the zoo; then weights are pruned, the rest
settles on shared values, and the file is coded with contexts and a deflated
header.  Every candidate gets the same number of steps.  The smallest file
that loses at most one point on the validation digits is chosen; what each
ingredient gave is measured by leaving it out.
"""

from functools import cache, partial

import _stamp
import torch
from _digits import shaken
from _pruning import Store
from tqdm import tqdm

from minicompress import data, distill, models, pipeline, storage, train, zoo

HIDDEN, KEPT = (24, 32, 48), (240, 280, 320, 360)
WAYS, BITS = ("clustered", "settled"), 2
COPIES, STEPS, SIZE, LR = 20, 2500, 64, 1e-2  # steps of each of three parts
SEEDS, FALL = range(3), 0.01
INGREDIENTS = "all", "no shaken digits", "no teacher"
DUMPS = partial(storage.dumps, compact=True)


@cache
def lessons(ingredients):
    """Return inputs, labels and the teacher's logits."""
    X, y = data.digits().train
    if ingredients != "no shaken digits":
        dice = torch.Generator().manual_seed(0)
        X = torch.cat([X, *(shaken(X, dice) for _ in range(COPIES))])
        y = y.repeat(COPIES + 1)
    return X, y, distill.teacher_logits(zoo.load("digits-cnn"), X)


def finetuning(ingredients, seed):
    X, y, z = lessons(ingredients)
    epochs = -(-STEPS * SIZE // len(X)) + 1
    feed = train.batches(X, y, z, size=SIZE, epochs=epochs, seed=seed)
    alpha = 0.0 if ingredients == "no teacher" else 0.9
    loss = distill.cached(distill.hinton, temperature=3.0, alpha=alpha)
    return pipeline.finetuning(feed, loss=loss, lr=LR, steps=STEPS)


@cache
def dense(hidden, ingredients, seed):
    torch.manual_seed(seed)
    net = models.MLP(widths=(64, hidden, 10))
    return finetuning(ingredients, seed)(net)


@cache
def thin(hidden, kept, ingredients, seed):
    net = dense(hidden, ingredients, seed)
    weights = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    net, _ = pipeline.pruned(
        net,
        finetuning(ingredients, seed),
        sparsity=1 - kept / weights,
        steps=STEPS,
    )
    return pipeline.connected(net, data.digits().train[0][:1])


def shared(hidden, kept, way, ingredients="all", seed=0):
    net = thin(hidden, kept, ingredients, seed)
    fit, few = finetuning(ingredients, seed), {"bits": BITS, "bias_bits": BITS}
    if way == "settled":
        net, fit = pipeline.settled(net, fit, **few), None
    net, state = pipeline.clustered(net, fit, **few)
    return net, pipeline.halved(state)


def row(net, state, *, coders=pipeline.SLOW, dumps=DUMPS):
    """Write the file; return its bytes and how well it reads."""
    state = pipeline.coded(state, coders=coders, dumps=dumps)
    blob = dumps(net, state)
    read, task = storage.loads(blob), data.digits()
    right = [train.accuracy(read, *part) for part in (task.val, task.test)]
    return {
        "bytes": len(blob),
        "val": round(right[0], 4),
        "test": round(right[1], 4),
    }


def main():
    store = Store(__file__)
    model, val = zoo.load("digits-mlp"), data.digits().val
    floor = train.accuracy(model, *val) - FALL
    choices = [(h, k, w) for h in HIDDEN for k in KEPT for w in WAYS]
    rows = [
        dict(zip(("hidden", "kept", "way"), choice, strict=True))
        | store.get(str(choice), lambda c=choice: row(*shared(*c)))
        for choice in tqdm(choices)
    ]
    best = min((r for r in rows if r["val"] >= floor), key=lambda r: r["bytes"])
    chosen = best["hidden"], best["kept"], best["way"]
    other = (*chosen[:2], *(w for w in WAYS if w != chosen[2]))
    without = {
        name: [
            store.get(
                f"{name} {seed}",
                lambda n=name, s=seed: row(*shared(*chosen, n, s)),
            )
            for seed in SEEDS
        ]
        for name in tqdm(INGREDIENTS)
    }
    without[f"{other[2]} instead"] = [
        store.get(f"other {s}", lambda s=s: row(*shared(*other, seed=s)))
        for s in SEEDS
    ]
    for name, how in (
        ("no contexts", {"coders": pipeline.FAST}),
        ("no coder", {"coders": ()}),
        ("a plain header", {"dumps": storage.dumps}),
    ):
        made = store.get(name, lambda how=how: [row(*shared(*chosen), **how)])
        without[name] = made
    results = {
        "floor": round(floor, 4),
        "steps": STEPS,
        "copies": COPIES,
        "rows": rows,
        "chosen": best,
        "without": without,
    }
    _stamp.write(__file__, results)


if __name__ == "__main__":
    with train.threads(1):
        main()
