"""Descriptions of ordinary torch layers, for files that rebuild them.

A pruned or factorized model differs from the one that its configuration
builds in a few layers.  Each of them is described by its type and the
arguments of its constructor, from a fixed list of types.
"""

import copy
import inspect
from collections import OrderedDict

from torch import nn

CONV = (
    "in_channels out_channels kernel_size stride padding dilation groups bias"
)
BATCH_NORM = "num_features eps momentum affine track_running_stats"
ARGUMENTS = {
    nn.Linear: "in_features out_features bias",
    nn.Conv1d: CONV,
    nn.Conv2d: CONV,
    nn.BatchNorm1d: BATCH_NORM,
    nn.BatchNorm2d: BATCH_NORM,
    nn.LayerNorm: "normalized_shape eps elementwise_affine bias",
    nn.GroupNorm: "num_groups num_channels eps affine",
    nn.RMSNorm: "normalized_shape eps elementwise_affine",
    nn.Embedding: "num_embeddings embedding_dim padding_idx",
    nn.Dropout: "p",
    nn.Flatten: "start_dim end_dim",
    nn.GELU: "approximate",
    nn.ReLU: "",
    nn.Identity: "",
}
STACKS = (nn.ModuleList, nn.Sequential)
TYPES = {t.__name__: t for t in ARGUMENTS}


def describe(layer: nn.Module) -> list | None:
    """Give ``[type, arguments]`` of a layer, defaults left out.

    Returns None for a layer that is not on the list, or a `Sequential` with
    such a layer inside.

    Examples
    --------
    >>> describe(nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3)))
    ... # doctest: +NORMALIZE_WHITESPACE
    ['Sequential',
     {'0': ['Linear', {'in_features': 4, 'out_features': 2, 'bias': False}],
      '1': ['Linear', {'in_features': 2, 'out_features': 3}]}]
    """
    if type(layer) is nn.Sequential:
        inside = {n: describe(m) for n, m in layer._modules.items()}
        return None if None in inside.values() else ["Sequential", inside]
    if type(layer) not in ARGUMENTS:
        return None
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        return None
    defaults = inspect.signature(type(layer)).parameters
    arguments = {}
    for name in ARGUMENTS[type(layer)].split():
        value = getattr(layer, name)
        if name == "bias":
            value = value is not None
        if isinstance(value, tuple):
            value = value[0] if len(set(value)) == 1 else list(value)
        if value != defaults[name].default:
            arguments[name] = value
    return [type(layer).__name__, arguments]


def make(description: list) -> nn.Module:
    """Build the layer that `describe` described.

    Raises
    ------
    ValueError
        If the type is not on the list.
    """
    name, arguments = description
    if name == "Sequential":
        inside = ((n, make(d)) for n, d in arguments.items())
        return nn.Sequential(OrderedDict(inside))
    if name not in TYPES:
        raise ValueError(f"a file may not name a layer of type {name!r}")
    return TYPES[name](**arguments)


def differences(model: nn.Module, plain: nn.Module, path: str = "") -> dict:
    """List the layers of `model` that differ from those of `plain`.

    Returns
    -------
    dict
        {path: [type, arguments]}.

    Raises
    ------
    ValueError
        If a part differs that is not an ordinary torch layer.
    """
    mine = describe(model)
    if mine is not None and path:
        return {} if mine == describe(plain) else {path: mine}
    inside, theirs = model._modules, plain._modules
    found: dict = {}
    if type(model) is type(plain) and type(plain) in STACKS:
        numbers = _numbers(list(inside.values()), list(theirs.values()))
        if path and numbers is not None and len(numbers) < len(theirs):
            found[path] = ["Kept", {"numbers": numbers}]
            theirs = _kept(plain, numbers)._modules
    if type(model) is not type(plain) or list(inside) != list(theirs):
        raise ValueError(
            f"{path or 'model'}: {type(model).__name__} differs from what "
            "its configuration builds, and is no ordinary torch layer"
        )
    for name, child in inside.items():
        where = f"{path}.{name}" if path else name
        found |= differences(child, theirs[name], where)
    return found


def replaced(model: nn.Module, changes: dict) -> nn.Module:
    """Return a copy of `model` with the layers at some paths made anew."""
    model = copy.deepcopy(model)
    for path, description in changes.items():
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        if name not in owner._modules:
            raise ValueError(f"{path}: the model has no such layer")
        if description[0] == "Kept":
            old, numbers = owner._modules[name], description[1]["numbers"]
            owner._modules[name] = _kept(old, numbers)
        else:
            owner._modules[name] = make(description)
    return model


def _numbers(mine: list, theirs: list) -> list[int] | None:
    """Find the blocks that are left of a stack, or None if they are new."""
    for exact in (True, False):
        numbers, rest = [], iter(range(len(theirs)))
        for block in mine:
            fits = (i for i in rest if _fits(block, theirs[i], exact))
            numbers.append(next(fits, None))
        if None not in numbers:
            return numbers
    return None


def _fits(block: nn.Module, other: nn.Module, exact: bool) -> bool:
    try:
        return not (differences(block, other, "block") and exact)
    except ValueError:
        return False


def _kept(stack: nn.Module, numbers: list) -> nn.Module:
    """Return a stack of some of the blocks of another."""
    count = len(stack) if type(stack) in STACKS else 0
    steps = all(type(i) is int and 0 <= i < count for i in numbers)
    if not count or not steps or sorted(set(numbers)) != numbers:
        raise ValueError(f"blocks {numbers!r} of {type(stack).__name__}")
    blocks = list(stack)
    left = [blocks[i] for i in numbers]
    if type(stack) is nn.Sequential:
        return nn.Sequential(*left)
    return nn.ModuleList(left)
