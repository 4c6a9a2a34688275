"""What a compressed language model forgets, at equal bits per character.

The language model of the zoo, compressed at once in several ways to the loss
of a model that was trained for a fourth of the steps, both on validation
data; a last one is trained on after the pruning.  Then the same text is
counted by how frequent the character, or the word that it is part of, is in
the training text.  Intervals are two standard errors over the windows of the
text: there is one trained model.
"""

from copy import deepcopy
from functools import partial

import _stamp
import torch
import torch.nn.functional as F
from _pruning import Store, layers

from minicompress import data, lowrank, prune, share, through, train, zoo
from minicompress.data.tokens import WORD

STEPS, FRACTION, MORE = 5000, 0.25, 100  # of the zoo; of those; after pruning
CONTEXT, SIZE, LR, TUNE = 128, 8, 3e-3, 1e-3
WORDS = (0, 10, 100)  # times in the training text, up to
CHARACTERS = (100, 1_000, 5_000)
HALVINGS = 7  # of the interval in which the knob lies


class Bench:
    """The model, its text, and the ways to make it smaller."""

    def __init__(self):
        self.net, self.task = zoo.load("reference-lm"), zoo.task("reference-lm")
        encode = data.Tokenizer().encode
        self.ids = {k: encode(getattr(self.task, k)) for k in ("train", "val")}
        self.ids["test"] = encode(self.task.test)
        self.names = layers(self.net, leave=("head",))

    def fit(self, net, steps, lr, seed):
        feed = train.passages(
            self.ids["train"], length=CONTEXT, size=SIZE, steps=steps, seed=seed
        )
        decay = partial(torch.optim.AdamW, weight_decay=0.1, betas=(0.9, 0.99))
        return train.fit(net, feed, lr=lr, clip=1.0, optimizer=decay)

    def shorter(self, path):
        """Train the same architecture, from another seed."""
        torch.manual_seed(1)
        net = type(self.net)(**self.net.config)
        if not path.exists():
            net = self.fit(net, round(FRACTION * STEPS), LR, 1)
            torch.save(net.state_dict(), path)
        net.load_state_dict(torch.load(path))
        return net.eval()

    def masks(self, kept):
        weights = dict(self.net.named_parameters())
        scores = {n: weights[n].detach().abs() for n in self.names}
        return prune.keep_each(scores, sparsity=1 - kept)

    def pruned(self, kept):
        return through.bake(prune.masked(self.net, self.masks(kept)))

    def retrained(self, kept):
        net = prune.masked(self.net, self.masks(kept))
        return through.bake(self.fit(net, MORE, TUNE, 100))

    def clustered(self, kept):
        """Share 32 · kept values in a layer, one more in the last layers."""
        net = deepcopy(self.net)
        total = round(32 * kept * len(self.names))
        with torch.no_grad():
            for i, name in enumerate(self.names):
                w = net.get_parameter(name)
                K = max(1, (total + i) // len(self.names))
                w.copy_(share.kmeans(w, bits=8, clusters=K).decode())
        return net

    def factored(self, kept):
        new = {}
        for name in self.names:
            W = self.net.get_parameter(name).detach()
            rank = max(1, int(kept * W.numel() / sum(W.shape)))
            new[name] = lowrank.svd(W, rank=rank)
        return lowrank.factorize(self.net, new)

    # ---- what is measured

    def bits(self, net, part="test"):
        """Return the bits of every character but the first."""
        ids = self.ids[part]
        n = (len(ids) - 1) // CONTEXT * CONTEXT  # whole windows
        x, y = ids[:n].view(-1, CONTEXT), ids[1 : n + 1].view(-1, CONTEXT)
        with train.evaluating(net):
            rows = zip(x.split(64), y.split(64), strict=True)
            nats = [
                F.cross_entropy(net(a).mT, b, reduction="none") for a, b in rows
            ]
        return torch.cat(nats).double() / torch.log(torch.tensor(2.0))

    def loss(self, net):
        return self.bits(net, "val").mean().item()

    def match(self, make, target):
        """Halve the interval in which the fraction to keep lies."""
        low, high = 0.05, 1.0
        for _ in range(HALVINGS):
            middle = (low * high) ** 0.5
            worse = self.loss(make(self, middle)) > target
            low, high = (middle, high) if worse else (low, middle)
        return round((low * high) ** 0.5, 4)


def frequency(bench):
    """Return how often each character, and its word, is in the training text.

    (windows, CONTEXT) each; no word: -1.
    """
    ids, text = bench.ids["test"], bench.task.test
    n = (len(ids) - 1) // CONTEXT * CONTEXT
    chars = torch.bincount(bench.ids["train"], minlength=97)[ids]
    counts, of = {}, torch.full((len(ids),), -1)
    for w in WORD.findall(bench.task.train):
        counts[w.strip()] = counts.get(w.strip(), 0) + 1
    for match in WORD.finditer(text):
        word = match[0].strip()
        if word.isalpha():  # the space before it is not part of it
            of[match.end() - len(word) : match.end()] = counts.get(word, 0)
    return [f[1 : n + 1].view(-1, CONTEXT) for f in (chars, of)]


def buckets(frequency, limits):
    """Cut into up to the first limit, up to the second, ..., above."""
    edges = torch.tensor(limits)
    index = torch.bucketize(frequency, edges)  # edges[i - 1] < f <= edges[i]
    return [(index == i) & (frequency >= 0) for i in range(len(limits) + 1)]


def split(bits, masks):
    """Return the mean of each bucket and two standard errors of it."""
    found = []
    for m in masks:
        total, count = (bits * m).sum(1), m.sum(1)
        mean = (total.sum() / count.sum()).item()
        # of a ratio of sums over windows
        noise = (total - mean * count).std() * len(m) ** 0.5 / count.sum()
        found.append([round(mean, 3), round(2 * noise.item(), 3)])
    return found


WAYS = {
    "pruned": Bench.pruned,
    "pruned, trained": Bench.retrained,
    "clustered": Bench.clustered,
    "low rank": Bench.factored,
}


def main():
    store, bench = Store(__file__), Bench()
    chars, words = frequency(bench)
    cuts = {
        "characters": buckets(chars, CHARACTERS),
        "words": buckets(words, WORDS),
        "no word": [words < 0],
    }
    shorter = bench.shorter(store.path.with_suffix(".pt"))
    target = bench.loss(shorter)
    before = bench.bits(bench.net)

    def row(way, net, kept=None):
        after = bench.bits(net)
        return {
            "way": way,
            "kept": kept,
            "bits": round(after.mean().item(), 4),
            "val": round(bench.loss(net), 4),
            "more": {k: split(after - before, m) for k, m in cuts.items()},
        }

    rows = [row("another seed, trained shorter", shorter)]
    for way, make in WAYS.items():
        kept = store.get(f"kept/{way}", partial(bench.match, make, target))
        rows.append(row(way, make(bench, kept), kept))
    _stamp.write(
        __file__,
        {
            "limits": {"characters": CHARACTERS, "words": WORDS},
            "share": {
                k: [round(100 * m.double().mean().item(), 2) for m in masks]
                for k, masks in cuts.items()
            },
            "bits": round(before.mean().item(), 4),
            "before": {k: split(before, m) for k, m in cuts.items()},
            "steps": [round(FRACTION * STEPS), STEPS, MORE],
            "rows": rows,
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
