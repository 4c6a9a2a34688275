"""Put factors into a model: one linear layer becomes two thin ones."""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy

from torch import Tensor, nn
from torch.nn.utils import skip_init

from .. import calibrate, codes

Make = Callable[[str, Tensor, calibrate.Stats], codes.Factors]


def factorize(
    model: nn.Module, new: Mapping[str, codes.Factors | nn.Module]
) -> nn.Module:
    """Replace linear layers by two thin ones each.

    Parameters
    ----------
    model
        any; left as it is.
    new
        {name of a layer, or of its weight: factors of the weight}; or, for
        a layer of another kind, the module that takes its place.

    Returns
    -------
    A copy
        In which nn.Linear(in, out) is an nn.Sequential of nn.Linear(in, r)
        without a bias and nn.Linear(r, out) with that of the layer.  A layer
        that occurs twice, or a weight that several linear layers share, is
        replaced everywhere and stays shared.

    Raises
    ------
    ValueError
        If there is no such layer, it is no plain nn.Linear, the factors do
        not have the shape of its weight, or the weight is used in another
        place too, where it would remain.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
    >>> code = codes.Factors(torch.ones(6, 2), torch.ones(2, 8))
    >>> factorize(model, {"0": code})[0]
    Sequential(
      (0): Linear(in_features=8, out_features=2, bias=False)
      (1): Linear(in_features=2, out_features=6, bias=True)
    )
    """
    model = deepcopy(model)
    found = {name: _layer(model, name) for name in new}
    swap: dict[nn.Module, nn.Module] = {}
    for name, layer in found.items():
        if isinstance(new[name], nn.Module):
            swap[layer] = new[name]
        else:
            swap |= _pairs(model, name, layer, new[name])
    if model in swap:
        return swap[model]
    for module in list(model.modules()):
        for key, child in module._modules.items():
            module._modules[key] = swap.get(child, child)
    return model


def factorize_in_order(
    model: nn.Module,
    batches: Iterable,
    make: Make,
    *,
    where: calibrate.Where,
    forward: calibrate.Forward | None = None,
) -> nn.Module:
    """Factor layer after layer, each on inputs from the factored before.

    Parameters
    ----------
    model, batches, forward
        as for `calibrate.sequential`.
    make
        from a name, a weight (out, in) and the `calibrate.Stats` of its
        inputs to factors.
    where
        from the name and the weight of a layer to a bool: which ones.

    Returns
    -------
    A copy, as from `factorize`.

    References
    ----------
    Wang et al., SVD-LLM, arXiv:2403.07378.

    Examples
    --------
    >>> import torch
    >>> from minicompress.lowrank import drone
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> new = factorize_in_order(
    ...     model,
    ...     [torch.randn(16, 8)],
    ...     lambda name, W, stats: drone(W, stats.H, rank=2),
    ...     where=lambda name, W: True,
    ... )
    >>> [len(m) for m in new if isinstance(m, nn.Sequential)]
    [2, 2]
    """
    made = {}

    def compress(name, layer, stats):
        made[name] = make(name, layer.weight.detach(), stats)
        return made[name]

    calibrate.sequential(model, batches, compress, where=where, forward=forward)
    return factorize(model, made)


def _layer(model: nn.Module, name: str) -> nn.Module:
    path = f".{name}".removesuffix(".weight").lstrip(".")
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{name}: the model has no such layer") from None


def _pairs(
    model: nn.Module, name: str, layer: nn.Module, code: codes.Factors
) -> dict[nn.Module, nn.Sequential]:
    """Make two layers for a layer and for all that share its weight."""
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"{name}: is {type(layer).__name__}, not nn.Linear; give a "
            "module that takes its place"
        )
    if code.shape != layer.weight.shape:
        raise ValueError(
            f"{name}: the factors make {code.shape}, the weight is "
            f"{tuple(layer.weight.shape)}"
        )
    users = [
        m
        for m in model.modules()
        if any(p is layer.weight for p in m._parameters.values())
    ]
    others = [type(m).__name__ for m in users if type(m) is not nn.Linear]
    if others:
        raise ValueError(
            f"{name}: the weight is shared with {', '.join(others)}, where "
            "it would remain; untie them first"
        )
    w = layer.weight
    u, v = (
        nn.Parameter(codes.value(x).to(w, copy=True), w.requires_grad)
        for x in (code.u, code.v)
    )
    return {m: _pair(m, u, v) for m in users}


def _pair(layer: nn.Linear, u: nn.Parameter, v: nn.Parameter) -> nn.Sequential:
    like = {"device": u.device, "dtype": u.dtype}
    first = skip_init(nn.Linear, *v.shape[::-1], bias=False, **like)
    second = skip_init(
        nn.Linear, *u.shape[::-1], bias=layer.bias is not None, **like
    )
    first.weight, second.weight, second.bias = v, u, layer.bias
    return nn.Sequential(first, second).train(layer.training)
