"""Layers that are mixtures of operations, until one of them is chosen."""

from collections.abc import Collection, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from .chains import OPS, digits_network, operation

NONE = ("none",)


class Mixed(nn.Module):
    """A mixed operation: Σ_o softmax(α)_o · o(x).

    Parameters
    ----------
    ops
        {name: operation}, whose outputs have one shape.  An operation
        "none", which gives zeros, may take part in the search but is never
        chosen in the end.

    Attributes
    ----------
    alpha
        (ops,) parameter, 0 at first: all operations weigh the same.

    References
    ----------
    Liu et al., DARTS, arXiv:1806.09055, equation 2.

    Examples
    --------
    >>> mixed = Mixed({"skip": nn.Identity(), "relu": nn.ReLU()})
    >>> mixed(torch.tensor([8.0, -8.0])).tolist()
    [8.0, -4.0]
    """

    def __init__(self, ops: Mapping[str, nn.Module]):
        super().__init__()
        if not ops:
            raise ValueError("ops: a mixture needs at least one operation")
        try:
            self.ops = nn.ModuleDict(ops)
        except KeyError as error:
            raise ValueError(f"ops: a bad name, {error}") from error
        self.alpha = nn.Parameter(torch.zeros(len(ops)))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [op(x) for op in self.ops.values()]
        shapes = [tuple(y.shape) for y in outputs]
        if len({*shapes}) > 1:
            shapes = dict(zip(self.ops, shapes, strict=True))
            raise ValueError(f"ops: the outputs have the shapes {shapes}")
        weights = self.alpha.softmax(0)
        return sum(w * y for w, y in zip(weights, outputs, strict=True))

    def strongest(self, *, ignore: Collection[str] = NONE) -> str:
        """Name the operation with the largest α, the first of equal ones."""
        pairs = zip(self.alpha.tolist(), self.ops, strict=True)
        found = {op: a for a, op in pairs if op not in ignore}
        if not found:
            raise ValueError(f"ignore: {ignore} leaves none of {[*self.ops]}")
        return max(found, key=found.get)


def strengths(model: nn.Module) -> dict[str, dict[str, float]]:
    """Read off softmax(α).

    Returns
    -------
    {path of the mixture: {operation: weight}}.

    Examples
    --------
    >>> strengths(Mixed({"skip": nn.Identity(), "relu": nn.ReLU()}))
    {'': {'skip': 0.5, 'relu': 0.5}}
    """
    return {
        path: dict(zip(m.ops, m.alpha.softmax(0).tolist(), strict=True))
        for path, m in mixtures(model).items()
    }


def strongest(
    model: nn.Module, *, ignore: Collection[str] = NONE
) -> dict[str, str]:
    """Name the operation with the largest α of every mixture.

    Parameters
    ----------
    ignore
        operations that are not chosen.

    Returns
    -------
    {path of the mixture: operation}.

    Examples
    --------
    >>> mixed = Mixed({"skip": nn.Identity(), "relu": nn.ReLU()})
    >>> mixed.alpha.data = torch.tensor([-1.0, 1.0])
    >>> strongest(nn.Sequential(nn.Linear(2, 2), mixed))
    {'1': 'relu'}
    """
    found = mixtures(model)
    return {path: m.strongest(ignore=ignore) for path, m in found.items()}


def discretize(
    model: nn.Module, *, ignore: Collection[str] = NONE
) -> nn.Module:
    """Put the strongest operation of every mixture in its place.

    In the paper's cells each node keeps, moreover, only two of its inputs;
    here the wiring is what the model says.

    Parameters
    ----------
    model
        left as it is.
    ignore
        operations that are not chosen.

    Returns
    -------
    nn.Module
        A copy without `Mixed`.  Its weights come from the mixture, where
        they did not work alone: train it again from the beginning.

    References
    ----------
    Liu et al., DARTS, arXiv:1806.09055, section 2.4.

    Examples
    --------
    >>> mixed = Mixed({"none": nn.Threshold(9, 0), "relu": nn.ReLU()})
    >>> discretize(nn.Sequential(nn.Linear(2, 2), mixed))[1]
    ReLU()
    """
    mixtures(model)
    return _settled(deepcopy(model), ignore)


def digits_mixture(
    width: int, *, ops: Collection[str] = OPS, classes: int = 10
) -> nn.Sequential:
    """Build all networks of `digits_space` of one width as one mixture.

    Examples
    --------
    >>> strongest(digits_mixture(4))
    {'layer1': 'skip', 'layer2': 'skip', 'layer3': 'skip', 'layer4': 'skip'}
    """
    layers = [f"layer{i}" for i in range(1, 5)]
    net = digits_network(
        {"width": width, **dict.fromkeys(layers, "skip")}, classes=classes
    )
    for i, layer in enumerate(layers):
        c = width if i < 2 else 2 * width
        setattr(net, layer, Mixed({op: operation(op, c) for op in ops}))
    return net


def mixtures(model: nn.Module) -> dict[str, Mixed]:
    """Find the mixtures of a model by their paths; there must be some."""
    modules = model.named_modules()
    found = {path: m for path, m in modules if isinstance(m, Mixed)}
    if not found:
        raise ValueError("model: there is no Mixed operation in it")
    return found


def _settled(module: nn.Module, ignore: Collection[str]) -> nn.Module:
    while isinstance(module, Mixed):
        module = module.ops[module.strongest(ignore=ignore)]
    for name, child in module._modules.items():
        if child is not None:
            module._modules[name] = _settled(child, ignore)
    return module
