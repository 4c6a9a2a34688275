"""Weights that a hash picks out of a short list: HashedNets.

With K numbers w, hashes h to {0 ... K-1} and ξ to {-1, 1} of a position::

    W_ij = ξ(i,j) w_h(i,j)

Which weights share a number is chance, so that nothing but the K numbers and
the seed of the hash is stored.  The signs let what weights of one bucket add
to a sum cancel on average.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import codes, through

CHUNK = 1 << 16  # weights that are hashed at once


def hashed(W: Tensor, *, size: int, seed: int = 0) -> codes.Hashed:
    """Give a weight the shared values that come nearest to it.

    The least squares are the mean of ξ(i,j) W_ij over each bucket, and 0 for
    a bucket in which nothing falls.  The weights of a bucket have nothing in
    common, so of a trained W this keeps little: about size / numel of its
    squared length.  It is a start for a training.

    Parameters
    ----------
    W
        weights, any shape.
    size
        values K.
    seed
        of the hash, 0 to 2^32 - 1.

    Returns
    -------
    Hashed
        Decodes to the shape of W; the values have its dtype.

    Raises
    ------
    ValueError
        If W holds no floating-point numbers, or K < 1.

    References
    ----------
    Chen et al., Compressing Neural Networks with the Hashing Trick,
    arXiv:1504.04788, section 4.

    Examples
    --------
    >>> code = hashed(torch.tensor([[4.0, 1.0, 1.0]]), size=1)
    >>> code
    Hashed(0, float32[1], (1, 3))
    >>> code.decode()  # (4 - 1 + 1) / 3, with the signs
    tensor([[ 1.3333, -1.3333,  1.3333]])
    """
    if not W.is_floating_point() or not W.numel():
        raise ValueError(
            "W must be floating point and not empty, got "
            f"{W.dtype} of {tuple(W.shape)}"
        )
    _check_size(size)
    w = W.detach().flatten()
    total = w.new_zeros(size, dtype=torch.float64)
    number = torch.zeros_like(total)
    places = torch.arange(len(w), device=w.device)
    for some, part in zip(places.split(CHUNK), w.split(CHUNK), strict=True):
        index, sign = codes.buckets(seed, some, size)
        total.index_add_(0, index, part.double() * sign)
        number.index_add_(0, index, torch.ones_like(total[:1]).expand_as(part))
    values = (total / number.clamp(min=1)).to(W.dtype)
    return codes.Hashed(seed, values, tuple(W.shape))


def hashed_weights(w: Tensor, values: Tensor, seed: Tensor | int) -> Tensor:
    """Compute the weights of a HashedNet, for `through.attach`.

    The hash is computed anew each time, as the indices would take more
    memory than the weights.  The gradient of a value is the sum of the
    signed gradients of its weights::

        dL/dw_k = Σ_{h(i,j) = k} ξ(i,j) dL/dW_ij

    Parameters
    ----------
    w
        gives the shape; its numbers are not used.
    values
        (K,), an nn.Parameter that is trained.
    seed
        of the hash, a whole number; for `through.attach` as a tensor.

    Returns
    -------
    Tensor
        In the shape of w and the dtype of the values.

    References
    ----------
    Chen et al., arXiv:1504.04788, section 4.

    Examples
    --------
    >>> values = torch.ones(2, requires_grad=True)
    >>> hashed_weights(torch.empty(2, 3), values, 1).sum().backward()
    >>> values.grad  # 6 signs in 2 buckets
    tensor([2., 0.])

    A trained layer goes on as a HashedNet from the nearest values:

    >>> layer = nn.Linear(8, 4)
    >>> start = nn.Parameter(hashed(layer.weight, size=8, seed=1).values)
    >>> net = through.attach(
    ...     layer, "weight", hashed_weights, values=start, seed=torch.tensor(1)
    ... )
    """
    places = torch.arange(w.numel(), device=w.device)
    index, sign = codes.buckets(seed, places, len(values))
    picked = values.index_select(0, index) * sign.to(values)
    return picked.reshape(w.shape)


def hashed_layers(
    model: nn.Module,
    *,
    ratio: float,
    seed: int = 0,
    where: Callable[[str, Tensor], bool] = lambda name, w: w.ndim >= 2,
) -> nn.Module:
    """Turn a model into a HashedNet of the same shapes, to be trained.

    Each weight gets a hash of its own: with one hash for all, weights in the
    same place of two layers would be tied.  The values start as a random
    choice of the layer's own weights, and so with the variance with which
    the layer was initialized; means over buckets would be smaller, by a
    factor of sqrt(ratio).

    Parameters
    ----------
    model
        gives shapes and initial weights; left as it is.
    ratio
        values for each weight, above 0 and at most 1; 1/8 stores an eighth
        of the numbers.  Every weight keeps at least one.
    seed
        decides hashes and initial values.
    where
        from a name and a parameter to a bool; by default all with two
        dimensions or more.

    Returns
    -------
    nn.Module
        A copy in which `hashed_weights` is attached.  What requires
        gradients is what is stored.  After training, `through.bake` gives
        an ordinary model and `encode_hashed` its code.

    Raises
    ------
    ValueError
        If the ratio is out of range or `where` selects nothing.

    References
    ----------
    Chen et al., arXiv:1504.04788, section 4.

    Examples
    --------
    >>> net = hashed_layers(nn.Linear(32, 8), ratio=1 / 16)
    >>> sum(p.numel() for p in net.parameters() if p.requires_grad)
    24
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be above 0 and at most 1, got {ratio}")
    dice = torch.Generator().manual_seed(seed)
    values, seeds = {}, {}
    for name, w in model.named_parameters():
        if where(name, w):
            size = max(1, round(ratio * w.numel()))
            seeds[name] = torch.randint(1 << 32, (), generator=dice)
            some = torch.randperm(w.numel(), generator=dice)[:size]
            own = w.detach().flatten()[some.to(w.device)]
            values[name] = nn.Parameter(own)
    net = through.attach(
        model, values, hashed_weights, values=values, seed=seeds
    )
    for name in values:
        _parts(net, name).original.requires_grad_(False)  # only a shape
    return net


def encode_hashed(model: nn.Module) -> codes.State:
    """Encode a trained HashedNet.

    Parameters
    ----------
    model
        from `hashed_layers`, or with `hashed_weights` attached by hand;
        left as it is.

    Returns
    -------
    {name: Tensor or Code}
        Decodes to the weights of ``through.bake(model)``, bit for bit.

    Raises
    ------
    ValueError
        If nothing in the model is hashed.

    Examples
    --------
    >>> net = hashed_layers(nn.Linear(32, 8), ratio=1 / 16, seed=3)
    >>> encode_hashed(net)["weight"].values.shape
    torch.Size([16])
    """
    state = codes.encode(through.bake(model), codes.value, lambda n, w: False)
    made = {}
    for name in through.tensors(model):
        last = _parts(model, name)[-1]
        if getattr(last, "f", None) is hashed_weights:
            t = last.tensors
            values, shape = t["values"].detach().clone(), state[name].shape
            code = codes.Hashed(int(t["seed"]), values, tuple(shape))
            made[id(state[name])] = code
    if not made:
        raise ValueError("model: none of its weights is hashed")
    return {name: made.get(id(x), x) for name, x in state.items()}


def hash_features(x: Tensor, *, out: int, size: int, seed: int = 0) -> Tensor:
    """Hash the inputs in place of the weights: W x = φ(x) w.

    Output i adds up the inputs whose weights share a number before it
    multiplies by it::

        [φ_i(x)]_k = Σ_{h(i,j) = k} ξ(i,j) x_j

    With out=1 this is feature hashing: whatever the length of x, it gets
    length K, and inner products keep their value on average over hashes.

    Parameters
    ----------
    x
        (..., in) inputs.
    out
        rows of W.
    size
        values K.
    seed
        of the hash, 0 to 2^32 - 1.

    Returns
    -------
    (..., out, K)
        Times the values of a `Hashed` of shape (out, in), what the decoded
        matrix gives for x.

    References
    ----------
    Weinberger et al., Feature Hashing for Large Scale Multitask Learning,
    arXiv:0902.2206, section 2.
    Chen et al., arXiv:1504.04788, section 4.

    Examples
    --------
    >>> code = hashed(torch.randn(4, 6), size=3, seed=1)
    >>> x = torch.randn(6)
    >>> phi = hash_features(x, out=4, size=3, seed=1)
    >>> torch.allclose(phi @ code.values, code.decode() @ x, atol=1e-6)
    True
    """
    _check_size(size)
    if out < 1:
        raise ValueError(f"out must be at least 1, got {out}")
    places = torch.arange(out * x.shape[-1], device=x.device)
    index, sign = codes.buckets(seed, places.view(out, -1), size)
    signed = x[..., None, :] * sign.to(x)  # (..., out, in)
    phi = x.new_zeros(*signed.shape[:-1], size)
    return phi.scatter_add(-1, index.expand(signed.shape), signed)


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")


def _parts(model: nn.Module, name: str) -> nn.Module:
    """Return what is attached to a weight."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path).parametrizations[key]
