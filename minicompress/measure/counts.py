"""How many numbers a model has and how many it multiplies."""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ..train import evaluating

aten = torch.ops.aten


def params(model: nn.Module) -> int:
    """Count the parameters of a model; shared ones count once.

    Parameters
    ----------
    model : buffers (running statistics) are not parameters.

    Returns
    -------
    Number of different trainable or frozen scalars.

    Examples
    --------
    >>> params(nn.Linear(784, 300))
    235500
    """
    return sum(p.numel() for p in _distinct(model))


def nonzero(model: nn.Module) -> int:
    """Count the parameters that are not zero; shared ones count once.

    Parameters
    ----------
    model : any module, masks written into its weights.

    Returns
    -------
    Number of parameters different from 0.
    """
    return sum(int(p.count_nonzero()) for p in _distinct(model))


def _distinct(model: nn.Module) -> list[Tensor]:
    """List parameters without those that are the same memory."""
    seen = {}
    for p in model.parameters():
        place = (p.device, p.untyped_storage()._cdata, p.storage_offset())
        seen.setdefault((*place, p.shape, p.stride()), p)
    return list(seen.values())


def macs(model: nn.Module, *inputs) -> int:
    """Count the multiply-accumulates of a model for one sample.

    Matrix products, convolutions and attention count; additions, norms and
    activations do not.  A weight that is zero counts like any other: no
    dense kernel skips it.  Nothing is computed, so large models are cheap.

    Parameters
    ----------
    model : in whatever mode; counted in evaluation mode.
    inputs : what the model is called with.  The first is a tensor whose
        first dimension is the batch, by which the count is divided.

    Returns
    -------
    Multiply-accumulates (1 MAC = 2 FLOPs).

    Raises
    ------
    ValueError
        If the model cannot run without values (its forward looks at them),
        or the count is not a multiple of the batch.

    Examples
    --------
    >>> macs(nn.Linear(784, 300), torch.zeros(1, 784))
    235200
    """
    return sum(macs_by_layer(model, *inputs).values())


def macs_by_layer(model: nn.Module, *inputs) -> dict[str, int]:
    """Count the multiply-accumulates of each layer for one sample.

    Parameters
    ----------
    model, inputs : as for `macs`.

    Returns
    -------
    {path: macs} of every module that multiplies something itself, outside
    of its submodules (attention counts where it is called; "" is the model
    itself).  The sum is `macs`.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> macs_by_layer(net, torch.zeros(5, 8))
    {'0': 32, '2': 8}
    """
    if not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].ndim:
        raise ValueError("inputs: the first must be a tensor with a batch")
    batch = inputs[0].shape[0]
    if batch < 1:
        raise ValueError("inputs: the batch is empty")
    counter = FlopCounterMode(display=False, custom_mapping=_VECTOR_PRODUCTS)
    wrapped = _Root(model)
    inputs = tree_map_only(Tensor, _meta, inputs)
    # each module once: torch would swap one with two names twice, for good
    tensors = {
        f"{path}.{name}": _meta(t)
        for path, module in wrapped.named_modules()
        for own in (module.named_parameters, module.named_buffers)
        for name, t in own(recurse=False)
    }
    try:
        with evaluating(model), torch.device("meta"), counter:
            functional_call(wrapped, tensors, inputs, tie_weights=False)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be counted without values: {error}"
        ) from error
    total = {
        name: sum(ops.values())
        for name, ops in counter.get_flop_counts().items()
        if name.startswith("_Root.model")
    }
    return _own(total, 2 * batch)


class _Root(nn.Module):
    """Gives every module of a model a path, the model itself included."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs):
        return self.model(*inputs)


def _meta(t: Tensor) -> Tensor:
    return t.detach().to("meta")


def _own(total: dict[str, int], unit: int) -> dict[str, int]:
    """Subtract from each module what its submodules count; drop zeros."""
    own = dict(total)
    for name, flops in total.items():
        parents = (p for p in total if name.startswith(f"{p}."))
        parent = max(parents, key=len, default=None)
        if parent is not None:
            own[parent] -= flops
    counts = {}
    for name, flops in own.items():
        if flops % unit:
            raise ValueError(
                f"inputs: {flops // 2} MACs are no multiple of the batch, "
                f"{unit // 2}"
            )
        if flops:
            counts[name.removeprefix("_Root.model").lstrip(".")] = flops // unit
    return counts


def _product(a: tuple, b: tuple, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(a)


def _add_product(y: tuple, a: tuple, *args, out_shape=None, **kwargs) -> int:
    return 2 * math.prod(a)


# torch's counter knows the products of matrices only.
_VECTOR_PRODUCTS = {
    aten.mv: _product,
    aten.dot: _product,
    aten.addmv: _add_product,
}
