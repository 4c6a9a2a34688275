"""What the experiments on clustered weights share: codes, files, searches."""

from dataclasses import replace

import torch
from _pruning import smallest

from minicompress import codes, entropy, share, storage, through, zoo

STARTS = ("linear", "density", "random", "histogram")
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


def weights(net, names):
    found = dict(net.named_parameters())
    return {n: found[n].detach() for n in names}


def each_layer(net, names, **options):
    """Give every layer a codebook of its own."""
    found = weights(net, names).items()
    return {n: share.kmeans(w, **options) for n, w in found}


def one_book(net, names, bits):
    """Give all layers the same codebook."""
    found = weights(net, names)
    flat = torch.cat([w.flatten() for w in found.values()])
    book = share.kmeans(flat, bits=bits)
    parts = book.index.values.split([w.numel() for w in found.values()])
    return {
        n: codes.Codebook(codes.Ints(part.view(w.shape), bits), book.centroids)
        for (n, w), part in zip(found.items(), parts, strict=True)
    }


def coded(net, names, rule):
    return {n: rule(w) for n, w in weights(net, names).items()}


def kept_values(w):
    return smallest(w, w != 0)


def packed(w, *, bits=None, **options):
    """Store what is not 0: positions, shared values, Huffman codes.

    Without bits its values are few already.
    """
    s = codes.sparse(w, w != 0)
    if not len(s.values):  # a layer of zeros
        return s
    few = max(1, (len(s.values.unique()) - 1).bit_length())
    book = share.kmeans(s.values, bits=bits or few, **options)
    return replace(kept_values(w), values=shortened(book))


def shortened(book):
    return replace(book, index=entropy.huffman(book.index))


def zero_share(mades):
    """Return the fraction of weights that are exactly 0."""
    parts = [c.decode().flatten() for made in mades for c in made.values()]
    return round(float((torch.cat(parts) == 0).float().mean()), 4)


def loaded(net, made):
    """Write a network with some codes to a file: what it reads, its bytes."""
    state = codes.encode(net, codes.value, lambda n, w: False) | made
    file = storage.dumps(net, state)
    like = None if type(net).__module__.startswith("minicompress") else net
    return storage.loads(file, like=like), len(file)


def lost(net, made):
    """Return the squared error as a fraction of the squared weights."""
    found = weights(net, made)
    off = sum((made[n].decode() - w).square().sum() for n, w in found.items())
    return float(off / sum(w.square().sum() for w in found.values()))


def mean(values):
    return sum(values) / len(values)


def row(nets, mades, task, against=None):
    """Measure networks with codes: files, and what they get right."""
    files = [loaded(n, made) for n, made in zip(nets, mades, strict=True)]
    per_cent = {
        split: [100 * zoo.quality(net, task, split) for net, _ in files]
        for split in ("test", "val")
    }
    found = {
        "test": [round(q, 2) for q in per_cent["test"]],
        "val": round(mean(per_cent["val"]), 3),
        "bytes": round(mean([size for _, size in files])),
    }
    if against:
        pairs = zip(against, mades, strict=True)
        found["error"] = float(f"{mean([lost(n, m) for n, m in pairs]):.4g}")
    return found


def trained(nets, mades, task, tune, lr):
    """Train the centroids, and measure what is in the files after that."""
    begin = [share.cluster(n, m) for n, m in zip(nets, mades, strict=True)]
    end = tune(begin, lr)
    states = [
        share.encode_clustered(n, m) for n, m in zip(end, mades, strict=True)
    ]
    return row([through.bake(n) for n in end], states, task)


def search(measure, start):
    """Find the rate that is best on validation data, climbing from one."""
    tried = {}

    def val(i):
        if i not in tried:
            tried[i] = measure(RATES[i])
        return tried[i]["val"]

    at = RATES.index(start)
    while True:
        near = [i for i in (at, at - 1, at + 1) if 0 <= i < len(RATES)]
        best = max(near, key=val)
        if best == at:
            return {"lr": RATES[at]} | tried[at]
        at = best
