"""Which layer of the teacher belongs to which layer of the student."""

import copy
from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn


def layer_map(student: int, teacher: int) -> list[int]:
    """Choose a layer of the teacher for each layer of the student.

    Parameters
    ----------
    student, teacher
        numbers of layers.

    Returns
    -------
    Indices from 0, evenly spread; the last goes with the last.

    References
    ----------
    Jiao et al., TinyBERT, arXiv:1909.10351, section 4.1 (the uniform map).

    Examples
    --------
    >>> layer_map(4, 12)
    [2, 5, 8, 11]
    """
    if not 1 <= student <= teacher:
        raise ValueError(f"student: {student} layers for {teacher}")
    return [m * teacher // student - 1 for m in range(1, student + 1)]


def inherit(
    student: nn.Module,
    teacher: nn.Module,
    *,
    stack: str = "blocks",
    layers: Sequence[int] | None = None,
) -> nn.Module:
    """Start a student with the weights of some of its teacher's layers.

    Parameters
    ----------
    student
        of the teacher's width; left as it is.
    teacher
        with as many layers or more.
    stack
        name of the nn.ModuleList that holds the layers of either.
    layers
        for each layer of the student the index of the teacher's; every
        other one, `layer_map`, if the student has half as many.

    Returns
    -------
    A copy of the student.  Weights and buffers outside the stack, such as
    embeddings and head, are the teacher's too if it has some of that name
    and shape; if not, they stay as they were.

    Raises
    ------
    ValueError
        If there is no such stack, an index is missing or out of range, or
        a layer has other weights than the teacher's.

    References
    ----------
    Sanh et al., DistilBERT, arXiv:1910.01108, section 3.

    Examples
    --------
    >>> from minicompress.models import LM
    >>> teacher = LM(vocab=5, width=8, layers=4, heads=2, ff=8, context=4)
    >>> student = LM(vocab=5, width=8, layers=2, heads=2, ff=8, context=4)
    >>> ours = inherit(student, teacher).blocks[0].up.weight
    >>> torch.equal(ours, teacher.blocks[1].up.weight)
    True
    """
    student = copy.deepcopy(student)
    mine = _stack("student", student, stack)
    theirs = _stack("teacher", teacher, stack)
    if layers is None:
        layers = layer_map(len(mine), len(theirs))
    known = range(len(theirs))
    if len(layers) != len(mine) or any(j not in known for j in layers):
        raise ValueError(
            f"layers: {len(mine)} indices below {len(theirs)}, not {layers}"
        )
    for i, j in enumerate(layers):
        try:
            mine[i].load_state_dict(theirs[j].state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"student: {stack}.{i} does not fit {stack}.{j} of the "
                f"teacher: {error}"
            ) from error
    given = teacher.state_dict()
    with torch.no_grad():
        for name, x in chain(
            student.named_parameters(), student.named_buffers()
        ):
            if name.startswith(f"{stack}.") or name not in given:
                continue
            if given[name].shape == x.shape:
                x.copy_(given[name])
    return student


def _stack(who: str, model: nn.Module, name: str) -> nn.ModuleList:
    found = dict(model.named_modules()).get(name)
    if not isinstance(found, nn.ModuleList):
        raise ValueError(f"stack: {who} has no nn.ModuleList {name!r}")
    return found
