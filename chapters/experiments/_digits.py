"""What the experiments on digits share: the teacher, the students."""

import torch
import torch.nn.functional as F

from minicompress import data, distill, models, train

SEEDS, STEPS, LR, HIDDEN = 20, 1500, 3e-3, 16


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


def teacher(path):
    """Train the teacher on digits that are shaken anew in every epoch.

    It is kept in a file, so that a second script need not train it again.
    """
    torch.manual_seed(0)
    net = Reader((32, 64, 128))
    if not path.exists():
        dice = torch.Generator().manual_seed(0)
        feed = train.batches(*data.digits().train, size=32, epochs=60, seed=0)

        def loss(model, batch):
            x, labels = batch
            return F.cross_entropy(model(shaken(x, dice)), labels)

        torch.save(train.fit(net, feed, loss, lr=LR).state_dict(), path)
    net.load_state_dict(torch.load(path))
    return net.eval()


def lessons(path):
    """Return the teacher, the training digits, labels, and its logits."""
    master, (X, y) = teacher(path), data.digits().train
    return master, X, y, distill.teacher_logits(master, X)


def students(hidden=HIDDEN, first=0):
    made = []
    for seed in range(SEEDS):
        torch.manual_seed(first + seed)
        made.append(models.MLP(widths=(64, hidden, 10)))
    return made


def chosen(y, n):
    """Draw n labeled digits, as many of each class, for every seed."""
    if n == len(y):
        return [torch.arange(n)] * SEEDS
    return [data.few(y, n // 10, seed=s)[0] for s in range(SEEDS)]


def fit(parts, loss, starts=None, *, steps=STEPS, **options):
    """Train a student on each part, a tuple of tensors."""
    feeds = []
    for seed, part in enumerate(parts):
        size = min(32, len(part[0]))
        epochs = -(-steps * size // len(part[0])) + 1
        feeds.append(train.batches(*part, size=size, epochs=epochs, seed=seed))
    starts = students() if starts is None else starts
    return train.fit_many(starts, feeds, loss, lr=LR, steps=steps, **options)


def soft(T, alpha=0.9):
    return distill.cached(distill.hinton, temperature=T, alpha=alpha)


def score(nets):
    test = data.digits().test
    return [round(100 * train.accuracy(net, *test), 2) for net in nets]
