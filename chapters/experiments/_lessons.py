"""Losses that several experiments on distillation share.

`hard` and `smoothed` take a batch (inputs, labels, ...) and leave the rest of
it alone; the other two are losses on logits, for `distill.cached`.
"""

import torch.nn.functional as F

from minicompress import distill, train


def hard(model, batch):
    return train.cross_entropy(model, batch[:2])


def smoothed(model, batch):
    return distill.label_smoothing(model(batch[0]), batch[1])


def dkd(z, v, y):
    return F.cross_entropy(z, y) + distill.dkd(z, v, y)


def flattened(z, v, y, T=4.0):
    """Distil the teacher's first guess, and nothing about the others.

    The softened probability of its first guess stays; the rest is shared
    evenly by all other classes.
    """
    p, first = distill.soften(v, T).max(1, keepdim=True)
    even = ((1 - p) / (v.shape[1] - 1)).expand_as(v)
    lesson = T * even.scatter(1, first, p).log()
    return distill.hinton(z, lesson, y, temperature=T, alpha=0.9)
