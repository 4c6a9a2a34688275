"""Remove channels and heads: the same kinds of layers, with fewer numbers.

`remove_channels` makes a smaller network, `mask_channels` one of the old
shape in which the same channels are silent.  Both compute the same function,
and each removal is checked to do so before it is returned.
"""

from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..train import evaluating
from .dependencies import Group, collect, reason
from .tracing import Path, trace
from .units import named_tensors

Plan = dict[tuple[str, int], Tensor]
COUNTS = ("normalized_shape", "num_channels")


def remove_channels(
    model: nn.Module, keep: Mapping[str, Tensor], *inputs
) -> nn.Module:
    """Return a smaller model without some channels, units or heads.

    Parameters
    ----------
    model
        left as it is.  An optimizer or an average of weights that belongs
        to it does not fit the new one.
    keep
        {name of a group: bool (size,), True = keep}; groups that are not
        named stay whole.  See `groups` for names and sizes.
    inputs
        what the model is called with, as for `groups`.  Both models run on
        them to check that nothing else has changed: give real inputs.

    Returns
    -------
    A new model of ordinary layers with smaller weights, whose function is
    that of `mask_channels`.

    Raises
    ------
    ValueError
        If a name is not that of a group (says why), a mask has the wrong
        shape or keeps nothing, or the model's forward counts on the old
        sizes (names the module).

    References
    ----------
    Li et al., Pruning filters for efficient ConvNets, arXiv:1608.08710.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> keep = torch.arange(8) < 3
    >>> remove_channels(net, {"0": keep}, torch.ones(1, 4))
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    plan = _plan(model, keep, inputs)
    small = _small(model, plan)
    _check(small, _masked(model, plan, small), inputs)
    return small


def mask_channels(
    model: nn.Module, keep: Mapping[str, Tensor], *inputs
) -> nn.Module:
    """Return a model of the same shape in which some channels are silent.

    Every entry of a removed unit is 0: the row that makes it, its bias, its
    scale, shift and statistics in norms, and the columns that read it (a
    sigmoid turns 0 into a half).  A norm that averages over units does so
    over those that are kept.

    Parameters
    ----------
    model, keep, inputs
        as for `remove_channels`.

    Returns
    -------
    A new model, the reference for what removal must not change.  It is as
    large and as slow as before.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> keep = {"0": torch.tensor([True, False])}
    >>> silent = mask_channels(net, keep, torch.ones(1, 1))
    >>> silent[0].bias != 0
    tensor([ True, False])
    """
    plan = _plan(model, keep, inputs)
    return _masked(model, plan, _small(model, plan))


def _plan(model: nn.Module, keep: Mapping[str, Tensor], inputs) -> Plan:
    """Say which entries of which axes stay."""
    units = trace(model, inputs)
    found = collect(units)
    known = {group.name: group for group in found}
    plan: Plan = {}
    for name, mask in keep.items():
        if name not in known:
            why = reason(units, found, name)
            raise ValueError(
                f"keep: {name!r} is no group that can shrink: {why}; "
                f"groups are {list(known)}"
            )
        # What is of no unit (-1) stays: it takes the last entry.
        mask = nn.functional.pad(_checked(known[name], mask), (0, 1), value=1)
        for part in known[name].slices:
            key = part.name, part.axis
            plan[key] = plan.get(key, True) & mask[part.unit]
    for (name, axis), stays in plan.items():
        if not stays.any():
            raise ValueError(f"keep: nothing is left of {name}, axis {axis}")
    return {k: stays for k, stays in plan.items() if not stays.all()}


def _checked(group: Group, mask: Tensor) -> Tensor:
    where = f"keep[{group.name!r}]"
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise ValueError(f"{where} must be a bool tensor, not {mask!r}")
    if mask.shape != (group.size,):
        raise ValueError(
            f"{where} must have shape ({group.size},), not {tuple(mask.shape)}"
        )
    if not mask.any():
        raise ValueError(f"{where} keeps nothing: one unit must stay")
    return mask.cpu()


def _small(model: nn.Module, plan: Plan) -> nn.Module:
    """Copy a model with only the entries that stay."""

    def select(t: Tensor, axis: int, stays: Tensor) -> Tensor:
        return t.index_select(axis, stays.nonzero()[:, 0].to(t.device))

    small = _changed(model, plan, select)
    for (name, _), stays in plan.items():
        path, _, count = name.rpartition(".")
        if count in COUNTS:
            _recount(small.get_submodule(path), count, int(stays.sum()))
    for old, new in zip(model.modules(), small.modules(), strict=True):
        if _shapes(old) != _shapes(new):
            _resize(new)
    return small


def _masked(model: nn.Module, plan: Plan, small: nn.Module) -> nn.Module:
    """Copy a model with 0 for what does not stay."""

    def silence(t: Tensor, axis: int, stays: Tensor) -> Tensor:
        gone = (~stays).nonzero()[:, 0].to(t.device)
        return t.index_fill(axis, gone, 0)

    model = _changed(model, plan, silence)
    for (name, _), stays in plan.items():
        path, _, count = name.rpartition(".")
        if count == "normalized_shape":
            device = next(model.parameters(), stays).device
            norm = deepcopy(small.get_submodule(path))
            new = Kept(norm, stays.to(device))
            if not path:
                return new
            _replace(model, model.get_submodule(path), new)
    return model


def _changed(model: nn.Module, plan: Plan, change) -> nn.Module:
    """Copy a model and change the tensors that the plan names."""
    old = dict(named_tensors(model))
    new: dict[str, Tensor] = {}
    for (name, axis), stays in plan.items():
        if name in old:
            t = new.get(name, old[name].detach())
            new[name] = change(t, axis, stays)
    copies = {}  # by the id of the old one: tied tensors stay tied
    for name, x in new.items():
        t, x = old[name], x.contiguous()
        is_parameter = isinstance(t, nn.Parameter)
        copies[id(t)] = nn.Parameter(x, t.requires_grad) if is_parameter else x
    return deepcopy(model, copies)


def _recount(module: nn.Module, count: str, n: int) -> None:
    """Tell a norm how many units it has."""
    if count == "normalized_shape":
        module.normalized_shape = (n,)
    else:
        module.num_groups = module.num_groups * n // module.num_channels
        module.num_channels = n


def _shapes(module: nn.Module) -> list:
    return [t.shape for _, t in named_tensors(module, recurse=False)]


def _resize(m: nn.Module) -> None:
    """Let the attributes of a layer say what its tensors are."""
    if isinstance(m, nn.Linear):
        m.out_features, m.in_features = m.weight.shape
    elif isinstance(m, nn.modules.conv._ConvNd):
        first, second = m.weight.shape[:2]
        if m.groups > 1:  # whole groups are removed
            before = m.in_channels if m.transposed else m.out_channels
            m.groups = m.groups * first // before
        sizes = first, second * m.groups
        if m.transposed:
            m.in_channels, m.out_channels = sizes
        else:
            m.out_channels, m.in_channels = sizes
    elif isinstance(m, nn.modules.batchnorm._NormBase):
        t = m.running_mean if m.weight is None else m.weight
        m.num_features = m.num_features if t is None else len(t)
    elif isinstance(m, nn.Embedding):
        m.embedding_dim = m.weight.shape[1]
    elif isinstance(m, nn.PReLU):
        m.num_parameters = len(m.weight)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old and module is not new:
                module._modules[name] = new


class Kept(nn.Module):
    """A norm over the units that are kept; the others are 0.

    Parameters
    ----------
    norm
        nn.LayerNorm or nn.RMSNorm of the units that are kept.
    keep
        bool (units,), True = kept.
    """

    def __init__(self, norm: nn.Module, keep: Tensor):
        super().__init__()
        self.norm = norm
        self.register_buffer("keep", keep)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., units) to the same."""
        y = torch.zeros_like(x)
        y[..., self.keep] = self.norm(x[..., self.keep])
        return y


def _check(small: nn.Module, masked: nn.Module, inputs) -> None:
    """Compare the two models: what a fixed size in a forward changed."""
    with evaluating(masked), torch.inference_mode():
        right = tree_leaves(masked(*inputs))
    with evaluating(small), torch.inference_mode(), Path(small) as path:
        try:
            got = tree_leaves(small(*inputs))
        except Exception as error:
            raise ValueError(
                f"the forward of {path} does not run with fewer channels "
                f"(does it contain a fixed size?): {error}"
            ) from error
    for x, y in zip(got, right, strict=True):
        if isinstance(x, Tensor) and not _close(x, y):
            raise ValueError(
                f"the forward of {type(small).__name__} computes something "
                "else with fewer channels: does it contain a fixed size?"
            )


def _close(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or not x.numel() or not x.is_floating_point():
        return x.shape == y.shape
    finite = y[y.isfinite()].abs()
    size = finite.max().item() if len(finite) else 0.0
    atol = torch.finfo(x.dtype).eps ** 0.5 * size
    return torch.allclose(x, y, rtol=0, atol=atol, equal_nan=True)
