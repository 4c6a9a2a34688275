"""k-means of single numbers against scikit-learn.

Both start as they do by default: scikit-learn from one k-means++ start
(n_init=1), with its own tolerance.  Errors are compared with the best there
is: for 16 clusters it is computed from all weights, for 256 from 2^16 bins
of them, where what is lost by cutting only between bins is under 1e-4.
"""

import warnings
from functools import partial

import numpy as np
import torch

from minicompress import share

from .harness import Missing, Row, peer, skipped, time_row

N = 1_000_000


def rows():
    g = torch.Generator().manual_seed(0)
    w = torch.randn(N, generator=g) * 0.02
    for bits, most in ((4, 1.0005), (8, 1.001)):
        ours = partial(share.kmeans, w, bits=bits)
        what = f"k-means, {2**bits} clusters of 1M normal weights"
        try:
            theirs = by_sklearn(w, 2**bits)
        except Missing as missing:
            yield skipped(what, "<= 0.25x scikit-learn", missing)
        else:
            runs = {"runs": 5, "warm_up": 1} if bits == 4 else {"runs": 3}
            yield time_row(what, ours, theirs, "scikit-learn", 0.25, **runs)
        a, b = error(w, ours()), error(w, best(w, bits))
        yield Row(
            f"{what}: squared error",
            f"{a:.6g}",
            f"{b:.6g}",
            a / b,
            f"<= {most:g}x the least there is",
            a <= most * b,
        )


def by_sklearn(w: torch.Tensor, K: int):
    KMeans = peer("sklearn.cluster").KMeans
    limits = peer("threadpoolctl").threadpool_limits
    X = w.numpy()[:, None]

    def fit():
        with limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return KMeans(K, n_init=1, random_state=0).fit(X)

    return fit


def best(w: torch.Tensor, bits: int):
    if bits == 4:
        return share.optimal(w, bits=bits)
    x = w.double().sort().values
    # equal shares of density^(1/3): a normal distribution √3 times as wide
    share_ = torch.linspace(0, 1, 2**16 + 1).double()[1:-1]
    edges = torch.special.ndtri(share_) * 3**0.5 * x.std()
    at = torch.bucketize(x, edges)
    mass = torch.bincount(at).double()
    mean = torch.bincount(at, x) / mass.clamp(min=1)
    c = share.optimal(mean, bits=bits, weight=mass).centroids
    middle = (c[1:] + c[:-1]) / 2
    return c[torch.bucketize(w.double(), middle)]


def error(w: torch.Tensor, code) -> float:
    got = code if isinstance(code, torch.Tensor) else code.decode()
    return float(np.square((got.double() - w.double()).numpy()).sum())
