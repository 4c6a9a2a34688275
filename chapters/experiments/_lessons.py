"""A teacher whose dark knowledge was taken away."""

from minicompress import distill


def flattened(z, v, y, T=4.0):
    """Distil the teacher's first guess, and nothing about the others.

    The softened probability of its first guess stays; the rest is shared
    evenly by all other classes.
    """
    p, first = distill.soften(v, T).max(1, keepdim=True)
    even = ((1 - p) / (v.shape[1] - 1)).expand_as(v)
    lesson = T * even.scatter(1, first, p).log()
    return distill.hinton(z, lesson, y, temperature=T, alpha=0.9)
