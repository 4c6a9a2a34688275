"""Hard against soft labels on digits, with few labels and with many.

The students are MLPs with 16 hidden units, the teacher is a CNN trained on
all labels and on shifted, turned and scaled copies of the digits.  Every
student gets the same number of steps on the same labeled digits, whatever
its loss; what differs is paired, seed by seed.  Beside it: labels of which
40 % are wrong, unlabeled digits with the teacher's outputs only, and a
teacher that has seen no more labels than its student.
"""

from functools import partial

import _stamp
import torch
import torch.nn.functional as F
from _pruning import Store
from tqdm import tqdm

from minicompress import data, distill, models, train

SEEDS, STEPS, LR = 20, 1500, 3e-3
LABELS = (20, 50, 100, 200, 500, 1000)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
HIDDEN = 16


def shaken(X, generator):
    """Shift, turn and scale each digit (n, 64) at random."""
    n = len(X)
    turn, size, dx, dy = torch.randn(4, n, generator=generator)
    a, s = 0.15 * turn, 1 + 0.1 * size
    theta = torch.stack(
        [
            torch.stack([s * a.cos(), -s * a.sin(), 0.1 * dx], 1),
            torch.stack([s * a.sin(), s * a.cos(), 0.1 * dy], 1),
        ],
        1,
    )
    grid = F.affine_grid(theta, (n, 1, 8, 8), align_corners=False)
    images = X.view(n, 1, 8, 8)
    return F.grid_sample(images, grid, align_corners=False).view(n, 64)


class Reader(torch.nn.Module):
    """A CNN that takes digits as rows of 64 pixels."""

    def __init__(self, channels):
        super().__init__()
        self.cnn = models.CNN(channels=channels)

    def forward(self, x):
        return self.cnn(x.view(-1, 1, 8, 8))


def teacher(X, y, *, epochs, seed=0):
    """Train the teacher on digits that are shaken anew in every epoch."""
    torch.manual_seed(seed)
    dice = torch.Generator().manual_seed(seed)
    feed = train.batches(X, y, size=32, epochs=epochs, seed=seed)

    def loss(model, batch):
        x, labels = batch
        return F.cross_entropy(model(shaken(x, dice)), labels)

    return train.fit(Reader((32, 64, 128)), feed, loss, lr=LR, seed=seed)


def students(first=0):
    made = []
    for seed in range(SEEDS):
        torch.manual_seed(first + seed)
        made.append(models.MLP(widths=(64, HIDDEN, 10)))
    return made


def fit(parts, loss):
    """Train a student on each part, a tuple of tensors."""
    feeds = []
    for seed, part in enumerate(parts):
        size = min(32, len(part[0]))
        epochs = -(-STEPS * size // len(part[0])) + 1
        feeds.append(train.batches(*part, size=size, epochs=epochs, seed=seed))
    return train.fit_many(students(), feeds, loss, lr=LR, steps=STEPS)


def main():
    store, task = Store(__file__), data.digits()
    (X, y), test = task.train, task.test
    path = store.path.with_suffix(".pt")
    if not path.exists():
        torch.save(teacher(X, y, epochs=60).state_dict(), path)
    master = Reader((32, 64, 128))
    master.load_state_dict(torch.load(path))
    V = distill.teacher_logits(master, X)

    def score(nets):
        return [round(100 * train.accuracy(n, *test), 2) for n in nets]

    def chosen(n):
        """Draw n labeled digits, as many of each class, for every seed."""
        if n == len(X):
            return [torch.arange(n)] * SEEDS
        return [data.few(y, n // 10, seed=s)[0] for s in range(SEEDS)]

    def soft(T, alpha=0.9):
        return distill.cached(distill.hinton, temperature=T, alpha=alpha)

    def wrong(labels, share, seed):
        dice = torch.Generator().manual_seed(seed)
        other = torch.randint(1, 10, labels.shape, generator=dice)
        hit = torch.rand(labels.shape, generator=dice) < share
        return torch.where(hit, (labels + other) % 10, labels)

    jobs = {}
    for n in LABELS:
        picks = chosen(n)
        hard = [(X[i], y[i]) for i in picks]
        pairs = [(X[i], y[i], V[i]) for i in picks]
        noisy = [(x, wrong(t, 0.4, s)) for s, (x, t) in enumerate(hard)]
        noisy_pairs = [
            (x, t, V[i]) for (x, t), i in zip(noisy, picks, strict=True)
        ]
        jobs[f"{n}/hard"] = partial(fit, hard, train.cross_entropy)
        smooth = lambda m, b: distill.label_smoothing(m(b[0]), b[1])  # noqa: E731
        jobs[f"{n}/smoothed"] = partial(fit, hard, smooth)
        jobs[f"{n}/matching"] = partial(
            fit, pairs, distill.cached(distill.matching)
        )
        for T in TEMPERATURES:
            jobs[f"{n}/T={T:g}"] = partial(fit, pairs, soft(T))
        jobs[f"{n}/noisy, hard"] = partial(fit, noisy, train.cross_entropy)
        jobs[f"{n}/noisy, T=4"] = partial(fit, noisy_pairs, soft(4.0))
    everything = [(X, V)] * SEEDS
    jobs["0/unlabeled, T=4"] = partial(fit, everything, soft(4.0, alpha=1.0))
    found = {
        name: store.get(name, lambda job=job: score(job()))
        for name, job in tqdm(jobs.items())
    }
    _stamp.write(
        __file__,
        {"teacher": 100 * train.accuracy(master, *test), "runs": found},
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
