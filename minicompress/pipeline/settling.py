"""Shared values that weights may still choose: rounding within training.

`clustered` fixes which weights share a value before it trains the values.
With two or three bits that choice is most of the damage, and it was made
without the loss.  Here every weight is rounded to its nearest centroid in
each step, as in quantization-aware training, and may move to another.
"""

import torch
from torch import Tensor, nn

from .. import share, through
from ..through import straight
from .stages import Bits, Fit, wanted_bits


def settled(
    model: nn.Module, fit: Fit, *, bits: Bits, bias_bits: int | None = None
) -> nn.Module:
    """Train weights that are rounded to shared values, and those values.

    Parameters
    ----------
    model
        left as it is; its zeros stay zeros.
    fit
        ``fit(model) -> model``.
    bits, bias_bits
        as for `clustered`, which makes a state of the result: it finds the
        2^bits values again that the weights have.

    Returns
    -------
    nn.Module
        An ordinary one; of each weight 2^bits values at most, and 0 where
        it was 0.

    References
    ----------
    Zhu et al., Trained Ternary Quantization, arXiv:1612.01064: latent
    weights and values that both learn, there with one value for each sign.

    Examples
    --------
    >>> same = lambda model: model  # no training: k-means
    >>> settled(nn.Linear(8, 4), same, bits=1).weight.unique().numel()
    2
    """
    own = dict(model.named_parameters())
    wanted = wanted_bits(model, bits, bias_bits)
    kept = {n: own[n].detach() for n in wanted if own[n].any()}
    books = {
        n: share.kmeans(w[w != 0], bits=wanted[n]).centroids
        for n, w in kept.items()
    }
    tuned = through.attach(
        model,
        list(kept),
        nearest,
        centroids={n: nn.Parameter(c) for n, c in books.items()},
        mask={n: w != 0 for n, w in kept.items()},
    )
    return through.bake(fit(tuned))


def nearest(w: Tensor, centroids: Tensor, mask: Tensor) -> Tensor:
    """Round weights to the nearest centroid, so that both can be trained.

    Parameters
    ----------
    w
        latent weights, any shape.
    centroids
        (K,), in any order.
    mask
        as w, True = keep.

    Returns
    -------
    as w, and 0 where masked
        The gradient of a centroid is the sum over its weights; that of a
        weight passes the rounding as if it were not there.

    Examples
    --------
    >>> w = torch.tensor([0.9, 0.2, -3.0, 0.8], requires_grad=True)
    >>> c = torch.tensor([0.0, 1.0], requires_grad=True)
    >>> y = nearest(w, c, torch.tensor([True, True, True, False]))
    >>> y.tolist()
    [1.0, 0.0, 0.0, 0.0]
    >>> (y * torch.tensor([5.0, 3.0, 2.0, 1.0])).sum().backward()
    >>> w.grad.tolist(), c.grad.tolist()
    ([5.0, 3.0, 2.0, 0.0], [5.0, 5.0])
    """
    c = centroids.sort().values
    middle = (c[1:] + c[:-1]) / 2
    near = c[torch.bucketize(w.detach(), middle.detach())]
    return torch.where(mask, straight(w, near) + near - near.detach(), 0.0)
