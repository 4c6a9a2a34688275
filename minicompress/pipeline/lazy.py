"""Modules whose tensors are read when they are needed, and no sooner.

The module itself needs no memory, if it is on the meta device; the tensors
come from a mapping, that of a file for instance.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, object], object]


def filled(
    module: nn.Module, tensors: Mapping[str, Tensor], inside: str = ""
) -> nn.Module:
    """Copy a module and give it the tensors of its names.

    Parameters
    ----------
    module : nn.Module
        May be on the meta device; the types of its tensors are kept.
    tensors : mapping of str to Tensor
        Under the names of ``module.state_dict()``, `inside` before them.
    inside : str
        Name of the module in a larger one, with a point at the end.

    Returns
    -------
    nn.Module
        Its parameters need no gradients.

    Raises
    ------
    ValueError
        If a parameter is missing, or a buffer that has no values in the
        module, or a shape is another.

    Examples
    --------
    >>> layer = nn.Linear(2, 1, bias=False, device="meta")
    >>> filled(layer, {"up.weight": torch.ones(1, 2)}, "up.").weight.tolist()
    [[1.0, 1.0]]
    """
    module, done = deepcopy(module), {}
    for path, part in module.named_modules():
        _fill(part, tensors, inside + _dot(path), done)
    return module


def calls(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    batches: Iterable,
    blocks: str,
    forward: Forward | None = None,
) -> list[tuple[Tensor, tuple, dict]]:
    """Find what the first block of a model is called with.

    Parameters
    ----------
    model : nn.Module
        May be on the meta device.
    tensors : mapping of str to Tensor
        Under the names of ``model.state_dict()``.  What the model calls
        before its first block is read, of nn.Embedding some rows only.
    batches, blocks, forward
        As for `streamed`.

    Returns
    -------
    list of (x, args, kwargs)
        For each batch.

    Raises
    ------
    ValueError
        If the model ends without calling the first block.

    Examples
    --------
    >>> model = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(2, 2))})
    >>> calls(model, {}, [torch.ones(2)], "blocks", lambda m, x: m.blocks(x))
    [(tensor([1., 1.]), (), {})]
    """
    stack = model.get_submodule(blocks)
    called = isinstance(stack, nn.Sequential)
    entry = nn.Sequential(_Entry()) if called else nn.ModuleList([_Entry()])
    instead = {id(stack): entry}  # of the copy, which has nothing else
    for path, part in model.named_modules():
        if isinstance(part, nn.Embedding):
            instead[id(part)] = _Rows(part, tensors, f"{path}.weight")
    model, done = deepcopy(model, instead).eval(), {}
    for path, part in model.named_modules():
        # when it is called: most that lies outside comes after the blocks
        late = partial(_late, tensors, _dot(path), done)
        part.register_forward_pre_hook(late)
    found = []
    for batch in batches:
        try:
            with torch.no_grad():
                if forward is not None:
                    forward(model, batch)
                else:
                    model(batch if isinstance(batch, Tensor) else batch[0])
        except _Reached as reached:
            found.append(reached.call)
        else:
            raise ValueError(f"blocks: {blocks}.0 is not called by the model")
    return found


class _Reached(Exception):
    """The first block was called; carries what with."""

    def __init__(self, call: tuple):
        super().__init__()
        self.call = call


class _Entry(nn.Module):
    """Stands where the first block was, and goes no further."""

    def forward(self, x, *args, **kwargs):
        raise _Reached((x, args, kwargs))


class _Rows(nn.Module):
    """A table of embeddings that stays in the file."""

    def __init__(self, table: nn.Embedding, tensors: Mapping, name: str):
        super().__init__()
        self.num_embeddings = table.num_embeddings
        self.embedding_dim = table.embedding_dim
        self.read = partial(read, tensors, name, table.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.read(ids)


def _dot(path: str) -> str:
    return f"{path}." if path else ""


def _late(tensors: Mapping, inside: str, done: dict, module, args) -> None:
    _fill(module, tensors, inside, done)


def _fill(
    module: nn.Module, tensors: Mapping[str, Tensor], inside: str, done: dict
) -> None:
    """Fill the own slots of a module, once; what is tied stays so."""
    for slots in (module._parameters, module._buffers):
        for name, old in slots.items():
            if old is None:
                continue
            if id(old) not in done:
                new = read(tensors, inside + name, old)
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=False)
                # both stay, lest another tensor gets the id
                done[id(old)], done[id(new)] = (old, new), (new, new)
            slots[name] = done[id(old)][1]


def read(
    tensors: Mapping[str, Tensor],
    name: str,
    like: Tensor,
    ids: Tensor | None = None,
) -> Tensor:
    """Read a tensor that takes the place of another.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        One with a method `rows`, as `zoo.checkpoint.Tensors`, is asked for
        rows and the shape alone, the others for all.
    name : str
    like : Tensor
        Says which shape and type it must have; itself what is returned if it
        has values, is no parameter and there is no such name.
    ids : integer Tensor, optional
        Which rows; all of it if left out.

    Raises
    ------
    ValueError
        If it is missing, or of another shape.
    """
    if name in tensors:
        lazy = ids is not None and hasattr(tensors, "rows")
        new = None if lazy else tensors[name]
        shape = tensors.shape(name) if lazy else new.shape
    elif like.is_meta or isinstance(like, nn.Parameter):
        raise ValueError(f"{name}: not in tensors, and has no values in model")
    else:
        lazy, new, shape = False, like, like.shape
    if tuple(shape) != tuple(like.shape):
        raise ValueError(
            f"{name} has shape {tuple(shape)}, not {tuple(like.shape)}"
        )
    if ids is not None:
        new = tensors.rows(name, ids) if lazy else new[ids]
    return new.to(like.dtype)
