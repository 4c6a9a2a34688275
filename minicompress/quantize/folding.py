"""Merge normalization into the layers before it."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from ..train import evaluating

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
LAYERS = (nn.Linear, nn.Conv2d)


def folded(
    W: Tensor, bias: Tensor | None, norm: nn.Module
) -> tuple[Tensor, Tensor]:
    """Merge a BatchNorm into the layer before it.

    At inference it is an affine map of each channel, and so is a row of the
    layer::

        W' = gamma / sqrt(var + eps) W
        b' = gamma / sqrt(var + eps) (b - mean) + beta

    Parameters
    ----------
    W
        (out, ...) weights of the layer.
    bias
        (out,), or None for zeros.
    norm
        BatchNorm over `out` channels, with running statistics.

    Returns
    -------
    W', b' : in the type of W, computed in float64.

    Raises
    ------
    ValueError
        If the norm has no running statistics or another number of channels.

    References
    ----------
    Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, arXiv:1712.05877, equation 14.

    Examples
    --------
    >>> norm = nn.BatchNorm1d(1).eval()
    >>> _ = norm.running_mean.fill_(1.0), norm.running_var.fill_(4.0)
    >>> W, bias = folded(torch.tensor([[6.0]]), None, norm)
    >>> W.round(decimals=3), bias.round(decimals=3)
    (tensor([[3.]]), tensor([-0.5000]))
    """
    if norm.running_var is None:
        raise ValueError("norm has no running statistics, it needs the batch")
    if norm.num_features != len(W):
        raise ValueError(
            f"norm has {norm.num_features} channels, W {tuple(W.shape)}"
        )
    by = (norm.running_var.double() + norm.eps).rsqrt()
    b = -norm.running_mean.double()
    if bias is not None:
        b = b + bias.detach().double()
    if norm.affine:
        by = by * norm.weight.detach().double()
    b = b * by
    if norm.affine:
        b = b + norm.bias.detach().double()
    W2 = W.detach().double() * by.reshape(-1, *[1] * (W.ndim - 1))
    return W2.to(W.dtype), b.to(W.dtype)


def fold_norms(model: nn.Module, x: Tensor) -> nn.Module:
    """Merge every BatchNorm into the layer whose output it reads.

    Which layer that is shows when the model runs: the norm gets the very
    tensor that the layer returned.

    Parameters
    ----------
    model
        left as it is.
    x
        a batch of inputs, to find the pairs and to check the result.

    Returns
    -------
    A copy in evaluation mode; a merged norm became nn.Identity, its layer
    has a bias.  Norms behind anything else stay.

    Raises
    ------
    ValueError
        If the output changed: something else reads a layer's output too.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    >>> fold_norms(model, torch.randn(2, 1, 8, 8))[1]
    Identity()
    """
    new = deepcopy(model).eval()
    names = dict(new.named_modules())
    for before, (reader, *others) in readers(new, x, LAYERS, NORMS).items():
        layer, norm = names[before], names[reader]
        if others or norm.running_var is None:
            continue
        if isinstance(layer, nn.Linear) != isinstance(norm, nn.BatchNorm1d):
            continue
        W, b = folded(layer.weight, layer.bias, norm)
        replace_weights(layer, W, b)
        parent, _, key = reader.rpartition(".")
        setattr(new.get_submodule(parent), key, nn.Identity())
    _same(model, new, x)
    return new


def readers(
    model: nn.Module, x: Tensor, of: tuple[type, ...], by: tuple[type, ...]
) -> dict[str, list[str]]:
    """Find which modules get the very tensor that another one returned.

    Parameters
    ----------
    model
        runs once in evaluation mode.
    x
        a batch of inputs.
    of, by
        types of the modules that return it and of those that read it.

    Returns
    -------
    {name: names of the readers}, in the order of the calls.  A module that
    runs twice is left out, whichever side it is on.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    >>> readers(model, torch.ones(1, 2), (nn.ReLU,), (nn.Linear,))
    {'1': ['2']}
    """
    made, found, calls = [], {}, {}

    def note(name, args, y):
        calls[name] = calls.get(name, 0) + 1
        if isinstance(names[name], by):
            source = [n for n, t in made if args and t is args[0]]
            for n in source[-1:]:
                found.setdefault(n, []).append(name)
        if isinstance(names[name], of) and isinstance(y, Tensor):
            made.append((name, y))  # kept alive, so that `is` means the same

    names = {n: m for n, m in model.named_modules() if isinstance(m, of + by)}
    handles = [
        m.register_forward_hook(lambda m, args, y, n=n: note(n, args, y))
        for n, m in names.items()
    ]
    try:
        with evaluating(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {
        n: several
        for n, several in found.items()
        if all(calls[m] == 1 for m in [n, *several])
    }


def replace_weights(layer: nn.Module, W: Tensor, bias: Tensor | None) -> None:
    """Give a layer of a copy new weights, and a bias that it may not have."""
    old = layer.weight
    layer.weight = nn.Parameter(W.detach().to(old), old.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(old), old.requires_grad)


def _same(model: nn.Module, new: nn.Module, x: Tensor) -> None:
    """Raise if two models differ by more than rounding on a batch."""
    with evaluating(model), evaluating(new):
        y, y2 = model(x), new(x)
    limit = min(0.1, 1000 * torch.finfo(y.dtype).eps)
    change = (y.double() - y2.double()).abs().max()
    if not change <= limit * y.double().abs().max():
        raise ValueError(
            "model: its output changed by "
            f"{float(change):.2g}, so something besides the "
            "layers that were found reads what was rescaled"
        )
