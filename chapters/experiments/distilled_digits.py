"""Hard against soft labels on digits, with few labels and with many.

The students are MLPs with 16 hidden units, the teacher is a CNN trained on
all labels and on shifted, turned and scaled copies of the digits.  Every
student gets the same number of steps on the same labeled digits, whatever
its loss; what differs is paired, seed by seed.  Beside it: labels of which
40 % are wrong, and unlabeled digits with the teacher's outputs only.
"""

from functools import partial

import _stamp
import torch
from _digits import SEEDS, chosen, fit, lessons, score, soft
from _lessons import hard, smoothed
from _pruning import Store
from tqdm import tqdm

from minicompress import distill, train

LABELS = (20, 50, 100, 200, 500, 1000)
TEMPERATURES = (1.0, 2.0, 4.0, 8.0)


def wrong(labels, share, seed):
    """Replace a share of the labels by other ones."""
    dice = torch.Generator().manual_seed(seed)
    other = torch.randint(1, 10, labels.shape, generator=dice)
    hit = torch.rand(labels.shape, generator=dice) < share
    return torch.where(hit, (labels + other) % 10, labels)


def main():
    store = Store(__file__)
    master, X, y, V = lessons(store.path.with_suffix(".pt"))
    jobs = {}
    for n in LABELS:
        picks = chosen(y, n)
        parts = [(X[i], y[i]) for i in picks]
        pairs = [(X[i], y[i], V[i]) for i in picks]
        noisy = [(x, wrong(t, 0.4, s)) for s, (x, t) in enumerate(parts)]
        noisy_pairs = [
            (x, t, V[i]) for (x, t), i in zip(noisy, picks, strict=True)
        ]
        jobs[f"{n}/hard"] = partial(fit, parts, hard)
        jobs[f"{n}/smoothed"] = partial(fit, parts, smoothed)
        jobs[f"{n}/matching"] = partial(
            fit, pairs, distill.cached(distill.matching)
        )
        for T in TEMPERATURES:
            jobs[f"{n}/T={T:g}"] = partial(fit, pairs, soft(T))
        jobs[f"{n}/noisy, hard"] = partial(fit, noisy, hard)
        jobs[f"{n}/noisy, T=4"] = partial(fit, noisy_pairs, soft(4.0))
    everything = [(X, V)] * SEEDS
    jobs["0/unlabeled, T=4"] = partial(fit, everything, soft(4.0, alpha=1.0))
    found = {
        name: store.get(name, lambda job=job: score(job()))
        for name, job in tqdm(jobs.items())
    }
    _stamp.write(
        __file__,
        {"teacher": score([master])[0], "runs": found},
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
