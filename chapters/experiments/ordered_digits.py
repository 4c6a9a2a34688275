"""The order of operations on digits: what each part of a pipeline is worth.

Ten MLPs are compressed in the order prune, share, code, with distillation,
and in orders and ways that differ from it in one point.  Every contestant
makes the same number of steps, on the same batches, and chooses its learning
rate on validation data of two of the networks.
"""

from functools import partial

import _stamp
import torch
from _pruning import Store
from tqdm import tqdm

from minicompress import (
    codes,
    data,
    distill,
    entropy,
    lowrank,
    models,
    pipeline,
    prune,
    share,
    storage,
    through,
    train,
)

SEEDS, CHOOSING, SIZE = 10, 2, 64
FIRST, SECOND = 20, 10  # epochs: while weights go; while centroids move
POINTS = {"95 %, 2 bits": (0.95, 2, 4), "90 %, 3 bits": (0.9, 3, 6)}
RATES = (1e-2, 3e-2)
T, ALPHA = 4.0, 0.9
CONTEXT = (entropy.contextual,)
DUMPS = partial(storage.dumps, compact=True)


class Lab:
    """A network, its data and its teacher: itself, before anything is done.

    And how far to go: sparsity, bits of a shared value, rank of factors.
    """

    def __init__(self, net, task, seed, point):
        self.net, self.seed = net, seed
        self.sparsity, self.bits, self.rank = point
        X, y = task.train
        self.rows = (X, y, distill.teacher_logits(net, X))

    def fit(self, epochs, lr, taught=True):
        """Make the fine-tuning of a stage."""
        feed = train.batches(
            *self.rows, size=SIZE, epochs=epochs, seed=self.seed
        )
        loss = distill.cached(distill.hinton, temperature=T, alpha=ALPHA)
        return pipeline.finetuning(feed, loss=loss if taught else labels, lr=lr)

    def steps(self, epochs):
        return epochs * -(-len(self.rows[0]) // SIZE)


def labels(model, batch):
    return train.cross_entropy(model, batch[:2])


def pruned(lab, net, lr, epochs=FIRST, sparsity=None, slowly=True, **how):
    steps = lab.steps(epochs) if slowly else None
    fit, sparsity = lab.fit(epochs, lr, **how), sparsity or lab.sparsity
    return pipeline.pruned(net, fit, sparsity=sparsity, steps=steps)[0]


def clustered(lab, net, lr, epochs=SECOND, **how):
    fit = lab.fit(epochs, lr, **how) if epochs else None
    return pipeline.clustered(net, fit, bits=lab.bits)


def in_order(lab, lr, slowly=True, **how):
    net = pruned(lab, lab.net, lr, slowly=slowly, **how)
    return clustered(lab, net, lr, **how)


def other_order(lab, lr):
    """Share first; then whole weights go, and centroids move.

    There are 16 values at first: of weights with the same value none is
    smaller than the others, and with 4 values hardly any are different.
    """
    state = codes.encode(lab.net, partial(share.kmeans, bits=4))
    names = [n for n, c in state.items() if isinstance(c, codes.Code)]
    net = share.cluster(lab.net, {n: state[n] for n in names})
    net = lab.fit(SECOND, lr)(net)
    state = share.encode_clustered(net, {n: state[n] for n in names})
    book = {n: state[n] for n in names}
    all_ = {n: torch.ones(c.shape, dtype=torch.bool) for n, c in book.items()}
    end = round(0.6 * lab.steps(FIRST))
    grow = prune.gradual(start=1, end=end, every=10, final=lab.sparsity)
    net = prune.masked(share.cluster(through.bake(net), book), all_)
    net = lab.fit(FIRST, lr)(net, grow)
    made = {
        name: kept(book[name], own["mask"], own["centroids"].detach())
        for name, own in through.tensors(net).items()
    }
    net = through.bake(net)
    return net, pipeline.put(pipeline.plain(net), made)


def kept(code, mask, centroids):
    """Write the weights that are left, with the values that are in use."""
    used, index = code.index.values[mask].unique(return_inverse=True)
    index = codes.Ints(index, code.index.bits)
    book = codes.Codebook(index, centroids[used.long()].clone())
    return codes.Sparse(mask.clone(), book, code.shape)


def at_once(lab, lr):
    """Prune and share before the first step; train the centroids only."""
    still = pipeline.pruned(lab.net, untrained, sparsity=lab.sparsity)[0]
    return clustered(lab, still, lr, epochs=FIRST + SECOND)


def untrained(net, on_step=None):
    return net


def never_moved(lab, lr):
    """Spend all steps on pruning, and leave the centroids where they are."""
    return clustered(lab, pruned(lab, lab.net, lr, FIRST + SECOND), lr, 0)


def rounded(lab, lr, more=0):
    net = pruned(lab, lab.net, lr)
    return pipeline.rounded(net, lab.fit(SECOND, lr), bits=lab.bits + more)


def factored(lab, net):
    """Factor the two large layers by SVD."""
    own = dict(net.named_parameters())
    names = [n for n, w in own.items() if w.ndim == 2 and len(w) > 10]
    made = {n: lowrank.svd(own[n].detach(), rank=lab.rank) for n in names}
    return lowrank.factorize(net, made)


def rank_first(lab, lr):
    """Factor, then prune the factors to as many weights, and share."""
    net = factored(lab, lab.net)
    count = sum(w.numel() for w in net.parameters() if w.ndim == 2)
    whole = sum(w.numel() for w in lab.net.parameters() if w.ndim == 2)
    sparsity = 1 - whole * (1 - lab.sparsity) / count
    return clustered(lab, pruned(lab, net, lr, sparsity=sparsity), lr)


def rank_last(lab, lr):
    """Prune, then factor what is left: the factors have no zeros."""
    return clustered(lab, factored(lab, pruned(lab, lab.net, lr)), lr)


def rank_alone(lab, lr):
    """Factor, train, and share, without pruning."""
    net = lab.fit(FIRST, lr)(factored(lab, lab.net))
    return clustered(lab, net, lr)


def dense(lab, lr):
    net = lab.fit(FIRST + SECOND, lr)(lab.net)
    return net, pipeline.plain(net)


CONTESTANTS = {
    "prune, share, code": in_order,
    "share, then prune": other_order,
    "both at once, then train": at_once,
    "centroids not trained": never_moved,
    "without distillation": partial(in_order, taught=False),
    "pruned in one step": partial(in_order, slowly=False),
    "rounded": rounded,
    "rounded, a bit more": partial(rounded, more=1),
    "low rank first": rank_first,
    "low rank last": rank_last,
    "low rank, no pruning": rank_alone,
    "dense, trained on": dense,
}


def measured(lab, task, contestant, lr):
    """Compress a network, write the file, and measure what is in it."""
    net, state = contestant(lab, lr)
    state = pipeline.coded(
        pipeline.halved(state) if contestant is not dense else state,
        coders=CONTEXT,
        dumps=DUMPS,
    )
    file = DUMPS(net, state)
    net = storage.loads(file)
    kept = sum(int(w.count_nonzero()) for w in net.parameters() if w.ndim == 2)
    return {
        "test": round(100 * train.accuracy(net, *task.test), 2),
        "val": round(100 * train.accuracy(net, *task.val), 3),
        "bytes": len(file),
        "kept": kept,
    }


def bytes_by_stage(lab, lr):
    """List the file after each stage, and with each way to code it."""
    net = lab.net
    found = {"original": len(storage.dumps(net))}
    net = pruned(lab, net, lr)
    sparse = pipeline.sparse_state(net)
    plain = pipeline.coded(sparse, coders=())
    found["pruned"] = len(storage.dumps(net, plain))
    net, state = clustered(lab, net, lr)
    plain = pipeline.coded(state, coders=())
    found["shared"] = len(storage.dumps(net, plain))
    state = pipeline.halved(state)
    for name, coders in (
        ("half precision", ()),
        ("Huffman", (entropy.huffman,)),
        ("context", CONTEXT),
    ):
        best = pipeline.coded(state, coders=coders)
        found[name] = len(storage.dumps(net, best))
    best = pipeline.coded(state, coders=CONTEXT, dumps=DUMPS)
    found["compact header"] = len(DUMPS(net, best))
    masks = [c.mask for c in state.values() if isinstance(c, codes.Sparse)]
    found["kept"] = sum(int(mask.sum()) for mask in masks)
    bits = sum(min(gap_bits(mask, k) for k in range(1, 9)) for mask in masks)
    found["index bits"] = round(bits / found["kept"], 3)
    return found


def gap_bits(mask, width):
    return width * len(codes.gaps(mask, bits=width).steps.values)


def summary(rows, main):
    """Set each network beside itself, compressed in the usual order."""
    off = [a["test"] - b["test"] for a, b in zip(rows, main, strict=True)]
    off = torch.tensor(off, dtype=torch.float64)
    return {
        "test": [r["test"] for r in rows],
        "val": round(sum(r["val"] for r in rows) / len(rows), 3),
        "bytes": [r["bytes"] for r in rows],
        "kept": round(sum(r["kept"] for r in rows) / len(rows)),
        "against": [round(float(off.mean()), 2), round(float(off.std()), 2)],
    }


def stored(store, point, key, compute):
    return store.get(f"{point}/{key}", compute)


def compared(labs, task, get):
    """Let every contestant choose its rate, and compress all networks."""
    runs = {}
    bar = tqdm(CONTESTANTS.items())
    for name, contestant in bar:
        bar.set_description(name)

        def run(seed, lr, name=name, contestant=contestant):
            job = partial(measured, labs[seed], task, contestant, lr)
            return get(f"{name}/{seed}/{lr}", job)

        def val(lr, run=run):
            return sum(run(s, lr)["val"] for s in range(CHOOSING))

        lr = max(RATES, key=val)
        runs[name] = lr, [run(s, lr) for s in range(SEEDS)]
    lr, usual = runs["prune, share, code"]
    stages = [
        get(f"stages/{s}", partial(bytes_by_stage, lab, lr))
        for s, lab in enumerate(labs)
    ]
    return {
        "sparsity": labs[0].sparsity,
        "bits": labs[0].bits,
        "rank": labs[0].rank,
        "contestants": {
            name: {"lr": rate} | summary(rows, usual)
            for name, (rate, rows) in runs.items()
        },
        "stages": {key: [row[key] for row in stages] for key in stages[0]},
    }


def main():
    task, store = data.digits(), Store(__file__)
    starts = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        starts.append(models.MLP())
    feeds = [
        train.batches(*task.train, size=32, epochs=60, seed=s)
        for s in range(SEEDS)
    ]
    nets = train.fit_many(starts, feeds, lr=3e-3)
    original = [train.accuracy(net, *task.test) for net in nets]
    found = {
        "epochs": [FIRST, SECOND],
        "weights": sum(w.numel() for w in nets[0].parameters() if w.ndim == 2),
        "original": [round(100 * a, 2) for a in original],
    }
    for name, point in POINTS.items():
        labs = [Lab(net, task, 100 + s, point) for s, net in enumerate(nets)]
        found["steps"] = labs[0].steps(FIRST + SECOND)
        found[name] = compared(labs, task, partial(stored, store, name))
        _stamp.write(__file__, found)  # the next point takes as long again


if __name__ == "__main__":
    with train.threads(1):
        main()
