"""The four models of the scoreboard: data, costs and quality of each.

A subject knows what its model was trained on, which weights are compressed,
what the methods that look at data may see, and how it is trained on.  What
a recipe makes of it is written to a file; the file is read, and what was read
is measured.
"""

from copy import deepcopy
from functools import cache, cached_property, partial
from itertools import islice
from statistics import mean, stdev

import pruned_encoder
import torch
import torch.nn.functional as F
from _pruning import layers

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

SEEN = 256  # images that calibrate
EACH = 2  # of the docstrings of pruned_encoder.py every other one
HEALING = 8  # passages in a batch when the encoder is trained


class Subject:
    """What all four have in common."""

    leave = ()  # layers that no recipe compresses
    tables = ()  # names of tables that take 8 bits in every row
    better = 1  # -1 if less is better
    worst = 0  # quality at the end of the axis when the board is drawn
    scratch = (0, None)
    data = "labels"  # what the training asks for

    def __init__(self, name, model, task):
        self.name, self.model, self.task = name, model, task
        self.names = layers(model, self.leave)
        # whole blocks at a time, or one layer after the other
        key = (lambda n: n.split(".")[1]) if self.leave else (lambda n: n)
        self.turns = [
            [n for n in self.names if key(n) == k]
            for k in dict.fromkeys(map(key, self.names))
        ]

    @property
    def weights(self):
        return {n: self.model.get_parameter(n).detach() for n in self.names}

    @cache  # noqa: B019
    def batches(self, seed):
        return self.draw(seed)

    @cache  # noqa: B019
    def stats(self, seed):
        return self.look(self.model, self.batches(seed), self.names)

    def look(self, model, batches, names):
        return calibrate.inputs(model, batches, where=lambda n, w: n in names)

    def fixed(self, model):
        """Round the tables; tied ones once."""
        found, made = dict(model.named_parameters(remove_duplicate=False)), {}
        known = {}
        for name in self.tables:
            w = found[name]
            if id(w) not in known:
                known[id(w)] = quantize.min_max(w.detach(), bits=8)
            made[name] = known[id(w)]
        return made

    def file(self, model, made):
        """Return the bytes that are written, and what they are read as."""
        state = pipeline.plain(model) | made
        data = storage.dumps(model, state)
        ours = models.MODELS.get(type(model).__name__) is type(model)
        return data, storage.loads(data, like=None if ours else model)

    def macs(self, model):
        return measure.macs(model, self.example)


class Images(Subject):
    """Digits and glyphs: per cent of the images that are read correctly."""

    metric = "% right"

    def __init__(self, name, *, size, steps, seeds, rates, scratch, worst):
        super().__init__(name, zoo.load(name), zoo.task(name))
        self.size, self.steps, self.seeds = size, steps, seeds
        self.rates, self.scratch, self.worst = rates, scratch, worst
        self.example = self.task.train[0][:1]

    def draw(self, seed):
        X, y = self.task.train
        dice = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(X), generator=dice)[:SEEN]
        return [(X[i], y[i]) for i in some.split(64)]

    def feed(self, seed, steps, *more):
        parts = (*self.task.train, *more)
        epochs = -(-steps * self.size // len(parts[0])) + 1
        feed = train.batches(*parts, size=self.size, epochs=epochs, seed=seed)
        return list(islice(feed, steps))

    def fit(self, model, lr, seed, loss=train.cross_entropy, steps=None):
        feed = self.feed(100 + seed, steps or self.steps)
        return train.fit(model, feed, loss, lr=lr, seed=seed)

    def quality(self, model, split="test"):
        return {"quality": 100 * zoo.quality(model, self.task, split)}


class Text(Subject):
    """The language model: bits for each character, fewer are better."""

    metric, better = "bits per character", -1
    leave = ("head",)
    tables = ("tokens.weight", "head.weight", "positions.weight")

    def __init__(self, name, *, size, steps, seeds, rates, scratch, worst):
        super().__init__(name, zoo.load(name), zoo.task(name))
        self.size, self.steps, self.seeds = size, steps, seeds
        self.rates, self.scratch, self.worst = rates, scratch, worst
        self.ids = data.Tokenizer().encode(self.task.train)
        self.example = self.ids[None, :128]

    def feed(self, seed, steps):
        return train.passages(
            self.ids, length=128, size=self.size, steps=steps, seed=seed
        )

    def draw(self, seed):
        return list(self.feed(seed, 4))

    def fit(self, model, lr, seed, loss=train.cross_entropy, steps=None):
        feed = self.feed(100 + seed, steps or self.steps)
        return train.fit(model, feed, loss, lr=lr, clip=1.0, seed=seed)

    def quality(self, model, split="test"):
        return {"quality": zoo.quality(model, self.task, split)}


class Sentences(Subject):
    """The encoder: a linear probe on half of pruned_encoder.py's docstrings.

    It is trained to give the embeddings of the published one, on passages of
    the language reference; others of them are the validation split.
    """

    metric, data, worst = "% right, probe", "inputs", 45
    leave = ("pooler",)
    tables = ("tokens.weight", "positions.weight")

    def __init__(self, name, *, steps, rates):
        self.bench = pruned_encoder.Bench()
        self.bench.texts = self.bench.texts[::EACH]  # they lie class by class
        self.bench.y = self.bench.y[::EACH]
        super().__init__(name, self.bench.dense, None)
        self.steps, self.seeds, self.rates = steps, 1, rates
        self.tokenizer = self.bench.tokenizer
        self.example = torch.zeros(1, pruned_encoder.LENGTH, dtype=torch.long)

    @cached_property
    def reference(self):
        return self.bench.embed(self.model)

    @cached_property
    def penalty(self):
        return pruned_encoder.tuned(self.reference, self.bench.y)

    def draw(self, seed):
        return pruned_encoder.passages(self.tokenizer)[::2]

    def passages(self, split, count, seed):
        """Draw passages as long as those that are embedded."""
        ids = self.tokenizer.encode(getattr(data.reference(), split))
        length = pruned_encoder.LENGTH
        dice = torch.Generator().manual_seed(seed)
        at = torch.randint(1, len(ids) - length, (count, 1), generator=dice)
        rows = ids[at + torch.arange(length)]
        rows[:, 0], rows[:, -1] = ids[0], ids[-1]  # [CLS] and [SEP]
        return list(rows.split(HEALING))

    def fit(self, model, lr, seed, loss=None, steps=None):
        feed = self.passages("train", HEALING * self.steps, seed)

        def far(model, ids):
            with torch.no_grad():
                own = vectors(self.model, ids)
            return 1 - (vectors(model, ids) * own).sum(1).mean()

        return train.fit(model, feed, far, lr=lr, clip=1.0, seed=seed)

    def quality(self, model, split="test"):
        if split == "val":  # nearness to the embeddings of the original
            with train.evaluating(model):
                near = [
                    (vectors(model, ids) * vectors(self.model, ids)).sum(1)
                    for ids in self.passages("val", 64, 0)
                ]
            return {"quality": 100 * float(torch.cat(near).mean())}
        found = self.bench.measure(model, self.reference, self.penalty)
        lost = [
            100 * (a - b)
            for a, b in zip(found["accuracy"], self.dense, strict=True)
        ]
        return {
            "quality": 100 * mean(found["accuracy"]),
            "cosine": found["cosine"],
            "error": stdev(lost) / len(lost) ** 0.5,
        }

    @cached_property
    def dense(self):
        y = self.bench.y
        return pruned_encoder.accuracies(self.reference, y, self.penalty)


def vectors(model, ids):
    """Embed passages of one length, so without padding."""
    return F.normalize(model(ids).mean(1))


SUBJECTS = {  # scratch: steps and rate of the training from the start
    "digits-mlp": partial(
        Images,
        size=32,
        steps=400,
        seeds=5,
        rates=(1e-2, 3e-2),
        scratch=(1200, 1e-2),
        worst=90,
    ),
    "glyphs-cnn": partial(
        Images,
        size=64,
        steps=80,
        seeds=3,
        rates=(1e-3, 3e-3),
        scratch=(600, 1e-2),
        worst=70,
    ),
    "reference-lm": partial(
        Text,
        size=8,
        steps=60,
        seeds=1,
        rates=(2e-3,),
        scratch=(0, None),
        worst=3,
    ),
    "encoder": partial(Sentences, steps=24, rates=(1e-4,)),
}


def every(rule):
    """Let a rule code every matrix, {name: code}; it sees no data."""

    def make(s, seed):
        return s.model, {n: shaped(rule, w) for n, w in s.weights.items()}

    return make


def seeing(rule):
    """Let a rule code every matrix by what the original model feeds it."""

    def make(s, seed):
        stats = s.stats(seed).items()
        weights = s.weights
        return s.model, {n: shaped(rule, weights[n], x) for n, x in stats}

    return make


def in_order(rule):
    """Let a rule see the inputs that the layers before, changed, make."""

    def make(s, seed):
        model, made = deepcopy(s.model), {}
        for names in s.turns:
            stats = s.look(model, s.batches(seed), names)
            for n, x in stats.items():
                w = model.get_parameter(n)
                made[n] = shaped(rule, w.detach(), x)
                w.data.copy_(made[n].decode())
        return s.model, made

    return make


def shaped(rule, w, *stats):
    """Apply a rule for matrices to a kernel too."""
    code = rule(w.flatten(1), *stats)
    return code if w.ndim == 2 else codes.View(code, tuple(w.shape))
