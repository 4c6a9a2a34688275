"""States of a model: tensors as they are, sparse ones, halved ones."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from .. import codes
from ..codes import Code, State


def plain(model: nn.Module) -> State:
    """List the tensors of a model as they are, tied ones once.

    Examples
    --------
    >>> plain(nn.Linear(2, 1, bias=False))["weight"].shape
    torch.Size([1, 2])
    """
    return codes.encode(model, codes.value, lambda name, w: False)


def sparse_state(model: nn.Module) -> State:
    """Write only what is not zero of the weights that have zeros.

    Parameters
    ----------
    model
        its parameters with a zero become a `Sparse` each.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.tensor([[0.0, 3.0]]))
    >>> sparse_state(model)
    {'weight': Sparse(bool[1, 2], float32[1], (1, 2))}
    """
    return codes.encode(
        model, lambda w: codes.sparse(w, w != 0), lambda n, w: not w.all()
    )


def realized(model: nn.Module, state: State) -> nn.Module:
    """Copy a model, with the weights that its state decodes to.

    Parameters
    ----------
    model
        left as it is.
    state
        {name: Tensor or Code} with the model's names.

    Examples
    --------
    >>> small = realized(nn.Linear(2, 1), {"weight": torch.ones(1, 2),
    ...                                    "bias": torch.zeros(1).half()})
    >>> small.weight.tolist(), small.bias.dtype
    ([[1.0, 1.0]], torch.float32)
    """
    model = deepcopy(model)
    model.load_state_dict(codes.decode(state))
    return model


def halved(
    state: State, where: Callable[[str], bool] = lambda name: True
) -> State:
    """Round the numbers of a state to half precision: 16 bits each.

    Parameters
    ----------
    state
        {name: Tensor or Code}.  Float32 and float64 tensors become float16,
        those inside of codes too (centroids, scales, factors); all else
        stays.
    where
        from a name to a bool: which ones.

    Raises
    ------
    ValueError
        If a number is too large for float16 (65,504); names it.

    Examples
    --------
    >>> halved({"bias": torch.tensor([0.1, 2.0])})
    {'bias': tensor([0.1000, 2.0000], dtype=torch.float16)}
    """
    done = {}
    for name, x in state.items():
        if id(x) not in done:
            done[id(x)] = _half(name, x) if where(name) else x
    return {name: done[id(x)] for name, x in state.items()}


def put(state: State, made: Mapping[str, Code]) -> State:
    """Replace parts of a state by codes, under all the names they have.

    Parameters
    ----------
    state
        {name: Tensor or Code}.
    made
        {name: code}; of tied tensors one name is enough.

    Examples
    --------
    >>> w = torch.zeros(2)
    >>> bit = codes.Ints(w.byte(), 1)
    >>> put({"a": w, "b": w, "c": torch.ones(1)}, {"a": bit})
    {'a': Ints(uint8[2], 1), 'b': Ints(uint8[2], 1), 'c': tensor([1.])}
    """
    new = {id(state[n]): code for n, code in made.items()}
    return {name: new.get(id(x), x) for name, x in state.items()}


def _half(name: str, x):
    if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64):
        half = x.half()
        if not torch.equal(half.isfinite(), x.isfinite()):
            raise ValueError(f"{name}: {x.abs().max():g} is above 65504")
        return half
    if isinstance(x, Code):
        parts = {f.name: _half(name, getattr(x, f.name)) for f in fields(x)}
        return replace(x, **parts)
    return x
