"""Which entries of a model's tensors go or stay together.

Every entry of an axis that could shrink (a row of a weight, a column, a
number of a bias) gets a number of its own, from 1.  Two entries that must go
together are *joined*; an entry that must stay is *fixed*.  A class of joined
entries is a unit: it is removed as a whole.

A value that the model computes carries a *label*: an integer tensor that
broadcasts to its shape and says of each element which entry it belongs to, 0
for none.  An axis along which the label is the same has size 1 in it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Axis:
    """Consecutive entries, one for each index of an axis.

    `axis` is None if each element of the tensor has an entry of its own:
    which axis can shrink is not known before everything is joined.
    """

    name: str
    axis: int | None
    role: str
    entries: Tensor


class Units:
    """Entries of the axes of a model, joined and fixed step by step."""

    def __init__(self, model: nn.Module):
        self.names: dict[int, str] = {}
        for name, t in named_tensors(model):
            if t.is_floating_point():
                self.names.setdefault(id(t), name)
        self.axes: dict[tuple[int, int | None], Axis] = {}
        self.count = 1  # entry 0 is "none"
        self.joined: list[tuple[Tensor, Tensor]] = []
        self.fixed: list[tuple[Tensor, str]] = []
        self.merged: list[tuple[Tensor, str]] = []
        self.unsliceable: dict[int, str] = {}  # id of a tensor: why
        self.crossed: list[Tensor] = []  # labels that vary along two axes

    def owns(self, t: Tensor | None) -> bool:
        """Say whether this is a parameter or buffer of the model."""
        return id(t) in self.names

    def is_own(self, label: Tensor) -> bool:
        """Say whether all of it are elements of one of the model's tensors."""
        return any(
            axis.axis is None
            and axis.entries.flatten()[0] <= label.min()
            and axis.entries.flatten()[-1] >= label.max()
            for axis in self.axes.values()
        )

    def entries(
        self, t: Tensor, axis: int | None, role: str, name: str | None = None
    ) -> Tensor:
        """Return the entries of one axis of a tensor, or of all elements.

        Parameters
        ----------
        t
            a tensor that the model owns; with `name`, any object, whose
            attribute of that name is as long as `axis` says.
        axis
            None for an entry for each element.
        role
            "out", "in" or "along", as in `Slice`.
        """
        key = (id(t), axis)
        if key not in self.axes:
            if name is not None:
                shape: tuple = (axis,)
            else:
                name = self.names[id(t)]
                shape = tuple(t.shape) if axis is None else (t.shape[axis],)
            where = axis if key[0] in self.names else 0
            end = self.count + math.prod(shape)
            entries = torch.arange(self.count, end).view(shape)
            self.axes[key] = Axis(name, where, role, entries)
            self.count = end
        return self.axes[key].entries

    def join(self, a: Tensor, b: Tensor, why: str) -> None:
        """Let entries go together; what meets none (0) has to stay."""
        a, b = (x.flatten() for x in torch.broadcast_tensors(a, b))
        both = a.minimum(b) > 0
        if not both.all():
            self.fix((a + b)[~both], why)
            a, b = a[both], b[both]
        self.joined.append((a, b))

    def fix(self, label: Tensor | None, why: str) -> None:
        """Let entries stay."""
        if label is not None and (label > 0).any():
            self.fixed.append((label[label > 0], why))

    def merge(self, label: Tensor, axis: int, why: str) -> Tensor:
        """Join all entries along an axis: it keeps its length."""
        first = label.narrow(axis, 0, 1)
        if label.shape[axis] > 1:
            self.join(first, label, why)
            self.merged.append((label, why))
        return first

    def resolve(self) -> tuple[Tensor, Tensor]:
        """Find the units.

        Returns
        -------
        (entries,) the smallest entry of the unit of each, and (entries,)
        bool, True where the unit can be removed.
        """
        roots = classes(self.count, self.joined)
        own = [x.entries for x in self.axes.values() if x.axis is None]
        for label in [*self.crossed, *own]:
            # Only one axis of a tensor can shrink in any pattern; of
            # several the last is left free.
            label = shrink(roots[label])
            for k in varying(label)[:-1]:
                label = self.merge(label, k, "a view cuts its channels up")
                roots = classes(self.count, self.joined)
        for (key, _), axis in self.axes.items():
            mine = roots[axis.entries]
            if (mine == mine.flatten()[0]).all():
                self.fix(axis.entries, f"it is all that {axis.name} has")
            why = self.unsliceable.get(key)
            if axis.axis is not None and (key, None) in self.axes:
                why = f"{axis.name} is used in two ways"
                self.fix(self.axes[key, None].entries, "")
            if why:  # first in line, as the reason that one can act on
                self.fixed.insert(0, (axis.entries, why))
        free = torch.ones(self.count, dtype=torch.bool)
        free[0] = False
        for entries, _ in self.fixed:
            free[roots[entries]] = False
        return roots, free[roots]


def classes(count: int, joined: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Find the smallest number in the class of each of `count` numbers.

    Examples
    --------
    >>> classes(5, [(torch.tensor([4, 2]), torch.tensor([1, 4]))])
    tensor([0, 1, 1, 3, 1])
    """
    root = torch.arange(count)
    if not joined:
        return root
    a, b = (torch.cat(side) for side in zip(*joined, strict=True))
    while True:
        low = root[a].minimum(root[b])
        new = root.clone()
        for side in (a, b):
            new.scatter_reduce_(0, root[side], low, "amin")
        new = new[new]  # halve the way to the smallest
        if torch.equal(new, root):
            return root
        root = new


def varying(label: Tensor) -> list[int]:
    """List the axes along which a label differs."""
    return [k for k, size in enumerate(label.shape) if size > 1]


def shrink(label: Tensor) -> Tensor:
    """Cut each axis along which a label does not differ to size 1."""
    for k in varying(label):
        first = label.narrow(k, 0, 1)
        if label.stride(k) == 0 or bool((label == first).all()):
            label = first
    return label


def place(entries: Tensor, axis: int, ndim: int) -> Tensor:
    """Lay entries (n,) along one of `ndim` axes."""
    shape = [1] * ndim
    shape[axis] = -1
    return entries.view(shape)


def named_tensors(
    model: nn.Module, recurse: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """Go through parameters and buffers, shared ones once."""
    yield from model.named_parameters(recurse=recurse)
    yield from model.named_buffers(recurse=recurse)
