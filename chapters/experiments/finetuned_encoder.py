"""Prune the published encoder, then fine-tune it: what can be learned again?

    python chapters/experiments/finetuned_encoder.py

The order of Gordon et al. 2020 on a small task: the matrices of the blocks
lose their smallest weights, all together, and stay without them while the
encoder and a linear layer on top learn the modules of docstrings from 5
labels per class.  Every sparsity gets the same steps; the learning rate is
chosen for the dense encoder, on a draw that is not reported and 200 texts of
its own.  400 texts, the same for all, are for testing only.  Beside it stands
the probe of the frozen encoder, before any fine-tuning.  Ctrl-C is harmless:
the same command goes on from where it stopped.
"""

from functools import partial

import _pruning
import _stamp
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from minicompress import data, prune, through, train, zoo

SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9)
LABELS, TEST, CHOICE = 5, 400, 200
DRAWS = (0, 1, 2)
TUNING = 1000  # the draw that chooses the learning rate
RATES = (1e-4, 3e-4, 1e-3)
LENGTH, SIZE, EPOCHS = 32, 27, 8
SCALE = 100
PENALTY = 1.0  # as pruned_encoder.py has chosen


class Classifier(nn.Module):
    """An encoder with a linear layer on the mean over its tokens."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config["width"], classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def embed(self, ids):
        mask = ids != 0  # 0 is [PAD]
        longest = int(mask.sum(1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
        x = self.encoder(ids, mask).masked_fill(~mask[:, :, None], 0).sum(1)
        return F.normalize(x)

    def forward(self, ids):
        # Adam moves every weight by about the learning rate: the head, which
        # starts from zero, has to move further than the encoder
        return self.head(SCALE * self.embed(ids))


class Texts:
    """All texts as one matrix of tokens, and what each is for."""

    def __init__(self, tokenizer):
        task = data.docstrings()
        self.y = task.labels
        self.ids, _ = tokenizer.batch(task.texts, LENGTH)
        dice = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self.y), generator=dice)
        size = (self.ids != 0).sum(1)
        self.test, order = order[:TEST], order[TEST:]
        self.test = self.test[size[self.test].argsort()]  # less padding
        self.val, self.rest = order[:CHOICE], order[CHOICE:]

    def draw(self, seed):
        """Draw a few labeled texts of each class, none for testing."""
        fit, _ = data.few(self.y[self.rest], LABELS, seed=seed)
        return self.rest[fit]

    def measure(self, model, rows):
        """Return accuracy and cross-entropy (nats) on some of the texts."""
        with train.evaluating(model):
            logits = torch.cat([model(self.ids[r]) for r in rows.split(16)])
        right = (logits.argmax(1) == self.y[rows]).double().mean()
        loss = F.cross_entropy(logits, self.y[rows])
        return round(float(right), 4), round(float(loss), 4)

    def embed(self, model, rows):
        with train.evaluating(model):
            parts = [model.embed(self.ids[r]) for r in rows.split(16)]
        return torch.cat(parts).double()


def frozen(model, texts, fit, rows):
    """Probe the encoder as it is: ridge regression on the same labels."""
    A, B = texts.embed(model, fit), texts.embed(model, rows)
    mean, Y = A.mean(0), F.one_hot(texts.y[fit]).double()
    A, B = A - mean, B - mean
    eye = torch.eye(len(A), dtype=A.dtype)
    a = torch.linalg.solve(A @ A.T + PENALTY * eye, Y - Y.mean(0))
    guess = (B @ (A.T @ a)).argmax(1)
    return round(float((guess == texts.y[rows]).double().mean()), 4)


def masks(model, sparsity):
    """Keep the largest weights of all blocks together."""
    names = _pruning.layers(model.encoder, leave=("pooler",))
    size = {f"encoder.{n}": model.encoder.get_parameter(n).abs() for n in names}
    return prune.keep_global(size, sparsity=sparsity)


def run(encoder, texts, sparsity, seed, lr, steps=None):
    """Prune, fine-tune with the mask held, and measure."""
    model = Classifier(encoder, int(texts.y.max()) + 1)
    model = prune.masked(model, masks(model, sparsity))
    fit = texts.draw(seed)
    batches = train.batches(
        texts.ids[fit], texts.y[fit], size=SIZE, epochs=EPOCHS, seed=seed
    )
    tuned = train.fit(model, batches, lr=lr, clip=1.0, seed=seed, steps=steps)
    tuned = through.bake(tuned)
    rows = texts.val if seed == TUNING else texts.test
    accuracy, loss = texts.measure(tuned, fit)
    return {
        "sparsity": sparsity,
        "draw": seed,
        "lr": lr,
        "train": accuracy,
        "loss": loss,
        "test": texts.measure(tuned, rows)[0],
        "frozen": frozen(through.bake(model), texts, fit, rows),
    }


def main():
    store = _pruning.Store(__file__)
    encoder, tokenizer = zoo.encoder()
    texts = Texts(tokenizer)
    jobs = [(0.0, TUNING, lr) for lr in RATES]
    found = [
        store.get(str(job), partial(run, encoder, texts, *job))
        for job in tqdm(jobs, desc="learning rates")
    ]
    lr = max(found, key=lambda row: row["test"])["lr"]
    jobs = [(s, seed, lr) for seed in DRAWS for s in SPARSITIES]
    rows = [
        store.get(str(job), partial(run, encoder, texts, *job))
        for job in tqdm(jobs, desc="fine-tuning")
    ]
    result = {
        "labels": LABELS,
        "length": LENGTH,
        "size": SIZE,
        "epochs": EPOCHS,
        "test texts": TEST,
        "lr": lr,
        "rates": found,
        "rows": rows,
    }
    _stamp.write(__file__, result)


if __name__ == "__main__":
    with train.threads(1):
        main()
