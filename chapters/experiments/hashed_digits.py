"""HashedNets beside other networks that store as many numbers.

Everything is trained from scratch for equally many steps, each contestant
with the learning rate that is best on validation data.  Ten seeds draw the
weights, the hashes, the edges and the order of the digits; on glyphs, three.
"""

from functools import partial
from itertools import pairwise

import _stamp
import torch
from _pruning import Store, smallest
from torch import nn
from tqdm import tqdm

from minicompress import codes, data, models, share, storage, through, train

WIDTHS, SMALL = (64, 64, 32, 10), (16, 8)
EPOCHS, SIZE, SEEDS = 30, 32, 10
RATIOS = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
WIDER = (1, 2, 4, 8)  # times the hidden units of a network with SMALL
GLYPHS = (784, 300, 100, 36)
GLYPH_RATIOS = (1 / 8, 1 / 32)
MORE = 8  # epochs on glyphs
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def dense(widths, seed):
    torch.manual_seed(seed)
    return models.MLP(widths=widths)


def numbers(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def budget(widths, ratio):
    """Count the numbers that a HashedNet stores, biases among them."""
    return numbers(share.hashed_layers(dense(widths, 0), ratio=ratio))


def hashed(widths, ratio, seed):
    return share.hashed_layers(dense(widths, seed), ratio=ratio, seed=seed)


def largest(most, make):
    """Return the largest of a family of sizes that stays within a budget.

    `make` maps a factor from 0 to 1 to the sizes and what they store.
    """
    pairs = [make(i / 2000) for i in range(1, 2001)]
    fitting = [sizes for sizes, count in pairs if count <= most]
    return fitting[-1] if fitting else None


def narrow(widths, ratio, seed, of=None):
    """Fewer hidden units, all by one factor, on the budget of `of`."""

    def make(factor):
        hidden = [max(1, round(factor * w)) for w in widths[1:-1]]
        thin = (widths[0], *hidden, widths[-1])
        return thin, sum(a * b + b for a, b in pairwise(thin))

    return dense(largest(budget(of or widths, ratio), make), seed)


def one_hidden(widths, ratio, seed):
    """One hidden layer in place of two."""
    return narrow((widths[0], widths[1], widths[-1]), ratio, seed, widths)


def low_rank(widths, ratio, seed, output=True):
    """Two thin layers for each, ranks by one factor; None if that is too much.

    The factors start as layers of their own shapes do.
    """
    pairs = list(pairwise(widths))
    last = len(pairs) - 1

    def make(factor):
        ranks = [max(1, round(factor * min(pair))) for pair in pairs]
        count = sum(
            r * (a + b) + b if output or i < last else a * b + b
            for i, (r, (a, b)) in enumerate(zip(ranks, pairs, strict=True))
        )
        return ranks, count

    ranks = largest(budget(widths, ratio), make)
    if ranks is None:
        return None
    model = dense(widths, seed)
    for i, (r, (a, b)) in enumerate(zip(ranks, pairs, strict=True)):
        if output or i < last:
            model.layers[i] = nn.Sequential(
                nn.Linear(a, r, bias=False), nn.Linear(r, b)
            )
    return model


def edges(widths, ratio, seed):
    """Random connections only; their weights start larger for it."""
    model, dice = dense(widths, seed), torch.Generator().manual_seed(seed)
    masks = {}
    for name, w in model.named_parameters():
        if w.ndim == 2:
            mask = torch.zeros(w.numel(), dtype=torch.bool)
            kept = round(ratio * w.numel())
            mask[torch.randperm(w.numel(), generator=dice)[:kept]] = True
            masks[name] = mask.view(w.shape)
            with torch.no_grad():
                w.div_((kept / w.numel()) ** 0.5)
    return through.attach(model, masks, masked, m=masks)


def masked(w, m):
    return w * m


def unsigned(w, values, seed):
    """The knock-out: the same hash without its signs."""
    index, _ = codes.buckets(seed, torch.arange(w.numel()), len(values))
    return values.index_select(0, index).view(w.shape)


def without_signs(widths, ratio, seed):
    net = hashed(widths, ratio, seed)
    for layer in net.layers:
        layer.parametrizations["weight"][0].f = unsigned
    return net


def from_means(widths, ratio, seed):
    """The knock-out: start at the means of random weights over buckets."""
    net, plain = hashed(widths, ratio, seed), dense(widths, seed)
    for layer, old in zip(net.layers, plain.layers, strict=True):
        part = layer.parametrizations["weight"][0]
        code = share.hashed(
            old.weight, size=len(part.values), seed=int(part.seed)
        )
        with torch.no_grad():
            part.values.copy_(code.values)
    return net


def wider(factor, seed):
    """Store as many numbers as a small network, and use them more often."""
    most = numbers(dense((WIDTHS[0], *SMALL, WIDTHS[-1]), 0))
    widths = (WIDTHS[0], *(factor * w for w in SMALL), WIDTHS[-1])
    plain = dense(widths, 0)
    weights = sum(p.numel() for p in plain.parameters() if p.ndim == 2)
    values = most - (numbers(plain) - weights)
    return hashed(widths, values / weights, seed)


def finished(net):
    """Turn a trained network into what is measured: numbers and bytes too."""
    plain, state, count = through.bake(net), None, numbers(net)
    found = through.tensors(net)
    if any("m" in own for own in found.values()):
        state = codes.encode(plain, codes.value, lambda n, w: False)
        for name, own in found.items():
            count += int(own["m"].sum()) - own["m"].numel()
            state[name] = smallest(state[name], own["m"])
    elif found:  # without signs there is no code for it
        state = share.encode_hashed(net) if _signed(net) else None
    return plain, count, len(storage.dumps(plain, state))


def _signed(net):
    part = net.layers[0].parametrizations["weight"][0]
    return part.f is share.hashed_weights


def together(task, start, lr, seeds):
    """Train networks of all seeds at once."""
    feeds = [
        train.batches(*task.train, size=SIZE, epochs=EPOCHS, seed=seed)
        for seed in range(seeds)
    ]
    nets = [start(seed) for seed in range(seeds)]
    return measured(train.fit_many(nets, feeds, lr=lr), task)


def one_by_one(task, start, lr, seeds):
    """Train large networks."""
    nets = []
    for seed in range(seeds):
        feed = train.batches(*task.train, size=64, epochs=MORE, seed=seed)
        nets.append(train.fit(start(seed), feed, lr=lr))
    return measured(nets, task)


def measured(nets, task):
    ends = [finished(net) for net in nets]
    rows = {
        split: [
            round(100 * train.accuracy(m, *getattr(task, split)), 2)
            for m, _, _ in ends
        ]
        for split in ("test", "val")
    }
    sizes = [n for _, _, n in ends]
    return rows | {
        "numbers": ends[0][1],
        "bytes": round(sum(sizes) / len(sizes)),
    }


def search(store, key, run, start, seeds, few=None):
    """Train with rates around 1e-2 until the best one is inside.

    The search may look at a few of the seeds only.
    """

    def trained(i, seeds):
        name = f"{key}/{RATES[i]}/{seeds}"
        return store.get(name, partial(run, start, RATES[i], seeds))

    at = 3
    while True:
        near = [i for i in (at - 1, at, at + 1) if 0 <= i < len(RATES)]
        best = max(near, key=lambda i: sum(trained(i, few or seeds)["val"]))
        if best == at:
            return {"lr": RATES[at]} | trained(at, seeds)
        at = best


CONTESTANTS = {
    "hashed": hashed,
    "narrow": narrow,
    "one hidden layer": one_hidden,
    "low rank": low_rank,
    "low rank, output whole": partial(low_rank, output=False),
    "random edges": edges,
}


def contest(store, key, run, widths, ratios, **seeds):
    rows = []
    for ratio in ratios:
        for name, make in tqdm(CONTESTANTS.items(), desc=f"{key} {ratio}"):
            start = partial(make, widths, ratio)
            what = {"method": name, "ratio": ratio}
            if start(0) is not None:
                key_ = f"{key}/{name}/{ratio}"
                found = search(store, key_, run, start, **seeds)
                rows.append(what | found)
    return rows


def after_training(task, lr):
    """Hash trained networks, without training after it."""
    feeds = [
        train.batches(*task.train, size=SIZE, epochs=EPOCHS, seed=seed)
        for seed in range(SEEDS)
    ]
    nets = [dense(WIDTHS, seed) for seed in range(SEEDS)]
    nets = train.fit_many(nets, feeds, lr=lr)
    found = {}
    for ratio in RATIOS:
        found[ratio] = []
        for seed, net in enumerate(nets):
            other = hashed(WIDTHS, ratio, seed)  # its sizes and seeds
            plain = through.bake(net)
            for name, own in through.tensors(other).items():
                w = plain.get_parameter(name)
                code = share.hashed(
                    w, size=len(own["values"]), seed=int(own["seed"])
                )
                w.data = code.decode()
            found[ratio].append(
                round(100 * train.accuracy(plain, *task.test), 2)
            )
    return [{"ratio": r, "test": x} for r, x in found.items()]


def main():
    store, task = Store(__file__), data.digits()
    run, ten = partial(together, task), {"seeds": SEEDS}
    whole = search(store, "dense", run, partial(dense, WIDTHS), **ten)
    found = {
        "widths": list(WIDTHS),
        "epochs": EPOCHS,
        "dense": whole,
        "equal numbers": contest(store, "digits", run, WIDTHS, RATIOS, **ten),
        "after training": store.get(
            "after", lambda: after_training(task, whole["lr"])
        ),
        "wider": [],
        "knocked out": [],
    }
    starts = {"dense": partial(dense, (WIDTHS[0], *SMALL, WIDTHS[-1]))}
    starts |= {f: partial(wider, f) for f in WIDER}
    for factor, start in tqdm(starts.items(), desc="wider"):
        row = search(store, f"wider/{factor}", run, start, **ten)
        found["wider"].append({"factor": factor} | row)
    for name, make in (
        ("without signs", without_signs),
        ("start from means", from_means),
    ):
        start = partial(make, WIDTHS, 1 / 8)
        row = search(store, f"knocked out/{name}", run, start, **ten)
        if make is without_signs:
            del row["bytes"]
        found["knocked out"].append({"method": name, "ratio": 1 / 8} | row)
    run, three = partial(one_by_one, data.glyphs(difficulty=1.0)), {"seeds": 3}
    three["few"] = 1
    whole = search(store, "glyphs", run, partial(dense, GLYPHS), **three)
    found["glyphs"] = {
        "widths": list(GLYPHS),
        "epochs": MORE,
        "dense": whole,
        "equal numbers": contest(
            store, "glyphs", run, GLYPHS, GLYPH_RATIOS, **three
        ),
    }
    _stamp.write(__file__, found)


if __name__ == "__main__":
    with train.threads(1):
        main()
