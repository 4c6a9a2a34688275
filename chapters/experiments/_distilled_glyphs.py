"""Hard against soft labels for a small CNN on glyphs, few images and many.

The teacher is the CNN of the zoo.  Every student gets the same number of
steps on the same images.
"""

from functools import partial

import _stamp
import torch
from _pruning import Store
from tqdm import tqdm

from minicompress import data, distill, models, train, zoo

SEEDS, STEPS, LR, SIZE = 5, 800, 3e-3, 64
IMAGES = (1000, 8000)
CHANNELS = (4, 8, 16)
RUNS = {
    "hard": None,
    "T=1": 1.0,
    "T=4": 4.0,
    "T=8": 8.0,
    "smoothed": "smoothed",
}


def student(seed):
    torch.manual_seed(seed)
    return models.CNN(channels=CHANNELS, classes=36)


def smoothed(model, batch):
    x, y, _ = batch
    return distill.label_smoothing(model(x), y)


def hard(model, batch):
    return train.cross_entropy(model, batch[:2])


def run(task, V, n, how, seed):
    X, y = task.train
    if n < len(X):
        chosen, _ = data.few(y, n // 36, seed=seed)
    else:
        chosen = torch.arange(len(X))
    loss = {None: hard, "smoothed": smoothed}.get(how)
    if loss is None:
        loss = distill.cached(distill.hinton, temperature=how, alpha=0.9)
    feed = train.batches(
        X[chosen],
        y[chosen],
        V[chosen],
        size=SIZE,
        epochs=-(-STEPS * SIZE // len(chosen)) + 1,
        seed=seed,
    )
    net = train.fit(student(seed), feed, loss, lr=LR, steps=STEPS, seed=seed)
    return round(100 * train.accuracy(net, *task.test), 2)


def main():
    store = Store(__file__)
    teacher, task = zoo.load("glyphs-cnn"), zoo.task("glyphs-cnn")
    V = distill.teacher_logits(teacher, task.train[0])
    jobs = [
        (n, name, seed)
        for n in IMAGES
        for name in RUNS
        for seed in range(SEEDS)
    ]
    found = {}
    for n, name, seed in tqdm(jobs):
        value = store.get(
            f"{n}/{name}/{seed}", partial(run, task, V, n, RUNS[name], seed)
        )
        found.setdefault(f"{n}/{name}", []).append(value)
    _stamp.write(
        __file__,
        {
            "teacher": 100 * zoo.quality(teacher, task),
            "parameters": sum(p.numel() for p in student(0).parameters()),
            "runs": found,
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
