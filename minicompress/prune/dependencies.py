"""Groups of channels: what has to be removed together.

Removing a filter of a convolution removes its bias, its entries in the norm
behind it, the columns of every layer that reads it, and, where a residual
sum adds it to others, those filters as well.  `groups` finds all this by
following one run of the model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .tracing import trace
from .units import Axis, Units, classes, shrink, varying


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of one tensor that belongs to a group.

    Parameters
    ----------
    name
        name of a parameter or buffer; of tied ones, the first.  The count
        of a norm that averages over units (`norm.normalized_shape`,
        `norm.num_channels`) is listed like a tensor with one axis.
    axis
        along which it shrinks.
    unit
        (length of the axis,) number of the unit of each entry, -1 for
        entries of other groups and those that stay.
    role
        "out" for what makes a unit (rows of a weight, features of an
        embedding), "in" for the columns that read it, "along" for what goes
        with it (biases, norms, running statistics, a model's own tensors).
    """

    name: str
    axis: int
    unit: Tensor
    role: str

    def __repr__(self) -> str:
        return f"Slice({self.name!r}, axis={self.axis}, {self.role!r})"


@dataclass(frozen=True, eq=False)
class Group:
    """Units of which each can be removed, with everything that goes along.

    Parameters
    ----------
    name
        path of the first layer that makes the units.
    size
        number of units: channels, hidden units, or heads.
    slices
        the parts of tensors that belong to them, each a `Slice`.
    """

    name: str
    size: int
    slices: tuple

    def __repr__(self) -> str:
        parts = len(self.slices)
        return f"Group({self.name!r}, {self.size} units, {parts} slices)"


def groups(model: nn.Module, *inputs) -> list[Group]:
    """Find the groups of channels of a model that can be removed.

    The model runs once on the inputs.  Its inputs and outputs keep their
    shape.  So does what passes an operation that is not known, or that
    needs all channels (a softmax over them, a slice by number); then fewer
    groups are found, never wrong ones.  Layers that these inputs do not
    reach are left as they are.

    Parameters
    ----------
    model
        any module of linear layers, convolutions, norms, embeddings and
        attention by `F.scaled_dot_product_attention` or products.
    inputs
        what the model is called with; a batch of one is enough.

    Returns
    -------
    list of Group, in the order in which the model makes them.

    Raises
    ------
    ValueError
        If the model does not run on these inputs.

    References
    ----------
    Fang et al., DepGraph, arXiv:2301.12900, section 3.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [group] = groups(net, torch.zeros(1, 4))
    >>> group
    Group('0', 8 units, 3 slices)
    >>> group.slices  # doctest: +NORMALIZE_WHITESPACE
    (Slice('0.weight', axis=0, 'out'), Slice('0.bias', axis=0, 'along'),
     Slice('2.weight', axis=1, 'in'))
    """
    return collect(trace(model, inputs))


def collect(units: Units) -> list[Group]:
    """List the groups of a traced model."""
    roots, free = units.resolve()
    axes = list(units.axes.values())
    # One group: all units that are made in one axis, and theirs.
    made = [axis for axis in axes if axis.role == "out"]
    rows = [axis.entries[free[axis.entries]] for axis in made]
    ties = [(roots[e[:1]].expand_as(e), roots[e]) for e in rows if len(e)]
    group_of = classes(units.count, ties)[roots]
    number = torch.full_like(roots, -1)  # of a unit in its group
    names: dict[int, str] = {}
    for axis, e in zip(made, rows, strict=True):
        for g in group_of[e].unique().tolist():
            if g not in names:
                names[g] = axis.name.rpartition(".")[0] or axis.name
                members = roots[(group_of == g) & free].unique()
                number[members] = torch.arange(len(members))
    number = number[roots]
    group_of = group_of.where(number >= 0, -1)
    slices: dict[int, list[Slice]] = {g: [] for g in names}
    for axis in axes:
        unit, g = number[axis.entries], group_of[axis.entries]
        for key in set(g.flatten().tolist()) - {-1}:
            slices[key].append(_slice(axis, unit.where(g == key, -1)))
    sizes = {g: int(number[group_of == g].max()) + 1 for g in names}
    return [
        Group(name, sizes[g], tuple(slices[g]))
        for g, name in names.items()
        if sizes[g] > 1
    ]


def _slice(axis: Axis, unit: Tensor) -> Slice:
    along = axis.axis
    if along is None:  # one entry per element: find the axis that varies
        size = unit.shape
        unit = shrink(unit)
        along = (varying(unit) or [len(size) - 1])[0]
        unit = unit.flatten().expand(size[along])
    return Slice(axis.name, along, unit, axis.role)


def reason(units: Units, found: list[Group], name: str) -> str:
    """Say why there is no group of the name of this layer."""
    for group in found:
        for part in group.slices:
            if part.role == "out" and part.name.rpartition(".")[0] == name:
                return f"its channels are in group {group.name!r}"
    made = [
        axis.entries
        for axis in units.axes.values()
        if axis.role == "out" and axis.name.rpartition(".")[0] == name
    ]
    if not made:
        return "no layer of this name makes channels in this run"
    roots = classes(units.count, units.joined)
    mine = roots[torch.cat(made)].unique()
    whole = units.merged if len(mine) == 1 else []
    for entries, why in whole:
        if torch.isin(roots[entries], mine).any():
            return f"its channels can only go all together: {why}"
    for entries, why in units.fixed:
        if why and torch.isin(roots[entries], mine).any():
            return why
    return "it has only one channel"
