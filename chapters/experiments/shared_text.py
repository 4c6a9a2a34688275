"""Share the blocks of a language model, and factorize its table.

    python chapters/experiments/shared_text.py

Networks of 4 blocks learn the language reference character by character: as
they are, with all of a block shared, with the attention or the feed-forward
layers shared.  Beside them stand two networks that store as many numbers as
the shared one: a single block of the same width, and 4 narrow blocks.  Some
of them also train for fewer steps, and trained networks are tied afterwards.
A second part has a vocabulary of pairs and words, whose table is full or
factorized and starts with a standard deviation of 0.1, and the two largest
also with others.  The learning rate of every contestant is chosen on the
validation text by the first seed.  Seconds are those of the processor.
Ctrl-C is harmless: the same command goes on from where it stopped.
"""

import time
from functools import partial

import _stamp
import torch
from _pruning import Store
from torch import nn
from tqdm import tqdm

from minicompress import (
    codes,
    data,
    measure,
    models,
    quantize,
    share,
    storage,
    train,
    zoo,
)

SEEDS, SIZE, LENGTH = 3, 8, 64
STEPS, RATES = 2000, (3e-3, 6e-3, 1.2e-2)
FURTHER = {"narrow": (2.4e-2,)}  # where the largest was the best of three
AT = (100, 200, 300, 400, 500, 600, 800, 1000, 1250, 1500, 1750, 2000)
SEEN = 128  # windows of the validation text that are looked at on the way
WIDE = {"width": 64, "layers": 4, "heads": 4, "ff": 256}
NETWORKS = {  # sizes, and what the blocks share
    "untied": (WIDE, None),
    "all": (WIDE, ""),
    "attention": (WIDE, ("attention", "norm1")),
    "feed-forward": (WIDE, ("up", "down", "norm2")),
    "one block": ({**WIDE, "layers": 1}, None),
    "narrow": ({**WIDE, "width": 32, "ff": 144}, None),
}
BITS = (8, 4)
SHORTER, SHORT = (500,), ("untied", "all", "one block", "narrow")
MORE, MORE_RATES = 300, (1e-3, 3e-3)

MERGES, TABLE_STEPS, TABLE_RATES = 2000, 500, (4e-3, 1e-2)
TABLE = {"width": 96, "layers": 1, "heads": 4, "ff": 384, "context": LENGTH}
WIDTHS = (96, 64, 32, 16)  # 96: the full table
TABLES = [(E, 0.1) for E in WIDTHS]
TABLES += [(E, std) for std in (1.0, 0.02) for E in WIDTHS[:2]]
TABLES += [(64, "torch")]  # as nn.Embedding and nn.Linear draw themselves


def rows(W, bits):
    return quantize.min_max(W, bits=bits, each="row")


class Bench:
    """The text, the networks that were trained on it, and where they lie."""

    def __init__(self, store):
        self.store, self.task = store, data.reference()
        tokenizer = data.Tokenizer()
        self.vocab = tokenizer.size
        self.ids = tokenizer.encode(self.task.train)
        self.seen = tokenizer.encode(self.task.val)[: SEEN * LENGTH + 1]
        self.folder = store.path.with_suffix("")
        self.folder.mkdir(exist_ok=True)

    def network(self, name, seed):
        sizes, parts = NETWORKS[name]
        torch.manual_seed(seed)
        model = models.LM(vocab=self.vocab, context=LENGTH, **sizes)
        if parts is None:
            return model
        return share.tie_blocks(model, "blocks", parts=parts)

    def fit(self, model, ids, steps, lr, seed, on_step=None):
        feed = train.passages(
            ids, length=LENGTH, size=SIZE, steps=steps, seed=seed
        )
        return train.fit(
            model, feed, lr=lr, clip=1.0, seed=seed, on_step=on_step
        )

    def both(self, model):
        return {
            "val": round(zoo.quality(model, self.task, "val"), 4),
            "bits": round(zoo.quality(model, self.task), 4),
        }

    def path(self, *names):
        return self.folder / ("-".join(map(str, names)) + ".mc")


def trained(bench, name, seed, lr):
    """Train a network; look at the validation text on the way."""
    way, paused = [], 0.0

    def look(step, model, loss):
        nonlocal paused
        if step in AT:
            start = time.process_time()
            way.append(round(train.bits_per_char(model, bench.seen), 4))
            paused += time.process_time() - start

    start = time.process_time()
    model = bench.network(name, seed)
    model = bench.fit(model, bench.ids, STEPS, lr, seed, look)
    seconds = time.process_time() - start - paused
    storage.save(bench.path(name, seed, lr), model)
    rounded = {str(bits): rounded_bits(bench, model, bits) for bits in BITS}
    return {
        **bench.both(model),
        "way": way,
        "rounded": rounded,
        "seconds": round(seconds, 1),
    }


def rounded_bits(bench, model, bits):
    """Round the matrices row by row; measure what the file gives back."""
    state = codes.encode(model, partial(rows, bits=bits))
    small = storage.loads(storage.dumps(model, state))
    return round(zoo.quality(small, bench.task), 4)


def shorter(bench, name, seed, lr, steps):
    """Train for fewer steps, down to a learning rate of zero again."""
    model = bench.network(name, seed)
    return bench.both(bench.fit(model, bench.ids, steps, lr, seed))


def chosen(bench, name, rates, run):
    """Let the first seed choose the rate, then run the other seeds."""
    get = bench.store.get
    tried = {
        lr: get(f"{name}/0/{lr}", partial(run, seed=0, lr=lr)) for lr in rates
    }
    lr = min(tried, key=lambda lr: tried[lr]["val"])
    others = [
        get(f"{name}/{seed}/{lr}", partial(run, seed=seed, lr=lr))
        for seed in range(1, SEEDS)
    ]
    return {
        "rate": lr,
        "tried": {str(lr): row["val"] for lr, row in tried.items()},
        "runs": [tried[lr], *others],
    }


def sizes(model, ids):
    """Count numbers, bytes and multiplications of a network."""
    found = {"float": len(storage.dumps(model))}
    for bits in BITS:
        state = codes.encode(model, partial(rows, bits=bits))
        found[str(bits)] = len(storage.dumps(model, state))
    return {
        "numbers": measure.params(model),
        "bytes": found,
        "macs": measure.macs(model, ids[None, :LENGTH]),
    }


def blocks(bench):
    """Train all networks of characters."""
    found = {}
    for name in tqdm(NETWORKS, desc="blocks"):
        rates = (*RATES, *FURTHER.get(name, ()))
        row = chosen(bench, name, rates, partial(trained, bench, name))
        cost = sizes(bench.network(name, 0), bench.ids)
        found[name] = {**cost, **row}
    return found


def shorter_ones(bench, found):
    """Train some of them for fewer steps, at the rates they chose."""
    return {
        name: {
            str(steps): [
                bench.store.get(
                    f"shorter/{name}/{steps}/{seed}",
                    partial(
                        shorter, bench, name, seed, found[name]["rate"], steps
                    ),
                )["bits"]
                for seed in range(SEEDS)
            ]
            for steps in SHORTER
        }
        for name in tqdm(SHORT, desc="fewer steps")
    }


def start(bench, found, name, seed):
    """Load a trained network and tie it, or do not."""
    kind, _, source = name.partition(", ")
    path = bench.path(kind, seed, found[kind]["rate"])
    model = storage.load(path)
    if not source:
        return model
    return share.tie_blocks(model, "blocks", source=source)


def tied_later(bench, found):
    """Tie trained networks; let them and others train on."""

    def more(name, seed, lr):
        model = start(bench, found, name, seed)
        return bench.both(bench.fit(model, bench.ids, MORE, lr, 100 + seed))

    rows = {}
    for name in tqdm(
        ("untied", "untied, first", "untied, mean", "all"), desc="tied later"
    ):
        at_once = [
            bench.store.get(
                f"at once/{name}/{seed}",
                lambda n=name, s=seed: bench.both(start(bench, found, n, s)),
            )["bits"]
            for seed in range(SEEDS)
        ]
        row = chosen(bench, f"more/{name}", MORE_RATES, partial(more, name))
        rows[name] = {"at once": at_once, **row}
    return rows


class Words:
    """The text in tokens of one character or more."""

    def __init__(self, bench):
        self.bench, task = bench, bench.task
        tokenizer = data.tokenizer(task.train, merges=MERGES)
        self.vocab, self.ids = tokenizer.size, tokenizer.encode(task.train)
        self.counts = self.ids.bincount(minlength=self.vocab)
        self.parts = {}
        for split in ("val", "test"):
            ids = tokenizer.encode(getattr(task, split))
            chars = len(tokenizer.decode(ids[1:]))  # that are predicted
            self.parts[split] = ids, chars

    def network(self, E, std, seed):
        """Build a model whose output layer is its table, full or thin."""
        torch.manual_seed(seed)
        model = models.LM(vocab=self.vocab, **TABLE)
        H = TABLE["width"]
        if E == H:
            nn.init.normal_(model.tokens.weight, std=std)
            return model
        down = nn.Linear(H, E, bias=False)
        if std == "torch":
            layers = nn.Embedding(self.vocab, E), nn.Linear(E, H, bias=False)
            model.tokens = nn.Sequential(*layers)
        else:
            model.tokens = share.factorized_embedding(self.vocab, E, H, std=std)
            down.weight.data.copy_(model.tokens[1].weight.T)
        up = nn.Linear(E, self.vocab, bias=False)
        model.head = nn.Sequential(down, up)
        return share.tie_embeddings(model, "tokens.0", "head.1")

    def both(self, model):
        found = {}
        for name, split in (("val", "val"), ("bits", "test")):
            ids, chars = self.parts[split]
            bits = train.bits_per_char(model, ids, chars=chars)
            found[name] = round(bits, 4)
        return found

    def run(self, E, std, seed, lr):
        begin = time.process_time()
        model = self.network(E, std, seed)
        model = self.bench.fit(model, self.ids, TABLE_STEPS, lr, seed)
        seconds = round(time.process_time() - begin, 1)
        storage.save(self.bench.path("table", E, std, seed, lr), model)
        return {**self.both(model), "seconds": seconds}

    def later(self, E, weighted, seed, found):
        """Factorize the table of a trained network."""
        lr = found["rate"]
        full, std = TABLE["width"], found["std"]
        model = storage.load(self.bench.path("table", full, std, seed, lr))
        counts = self.counts if weighted else None
        return self.both(
            share.factorize_vocabulary(
                model, "tokens", "head", width=E, counts=counts
            )
        )


def tables(bench):
    """Train all tables; factorize the best full one afterwards."""
    words, found = Words(bench), []
    for E, std in tqdm(TABLES, desc="tables"):
        model = words.network(E, std, 0)
        run = partial(words.run, E, std)
        row = chosen(bench, f"table/{E}/{std}", TABLE_RATES, run)
        cost = sizes(model, words.ids)
        found.append({"width": E, "std": std, **cost, **row})
    full = [row for row in found if row["width"] == TABLE["width"]]
    best = min(full, key=lambda row: row["tried"][str(row["rate"])])
    later = [
        {
            "width": E,
            "counts": weighted,
            "bits": [
                bench.store.get(
                    f"later/{E}/{weighted}/{seed}",
                    partial(words.later, E, weighted, seed, best),
                )["bits"]
                for seed in range(SEEDS)
            ],
        }
        for E in WIDTHS[1:]
        for weighted in (False, True)
    ]
    return {
        "vocabulary": words.vocab,
        "tokens": len(words.ids),
        "steps": TABLE_STEPS,
        "runs": found,
        "factorized later": {"std": best["std"], "runs": later},
    }


def main():
    bench = Bench(Store(__file__))
    found = blocks(bench)
    results = {
        "sizes": WIDE,
        "steps": {"all": STEPS, "more": MORE},
        "at": AT,
        "text": bench.task.hash,
        "blocks": found,
        "tables": tables(bench),
        "tied later": tied_later(bench, found),
        "fewer steps": shorter_ones(bench, found),
    }
    _stamp.write(__file__, results)


if __name__ == "__main__":
    with train.threads(1):
        main()
