"""Compress a model that is larger than the memory, block by block.

Of a deep model only one block is in memory at a time: its weights are read
from the file, its inputs are those that the compressed blocks before it have
made, and what comes out is a file of its own.  So the memory does not grow
with the number of blocks, and a run that was stopped goes on at the block at
which it stopped.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm.auto import tqdm

from .. import calibrate, codes, storage, train
from ..codes import Code
from .folders import Outside, Table, card, own, write_outside
from .lazy import calls, filled
from .states import put

Rule = Callable[[Tensor, calibrate.Stats], "Tensor | Code"]


def streamed(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    batches: Iterable,
    rule: Rule,
    folder: str | os.PathLike,
    *,
    blocks: str = "blocks",
    where: calibrate.Where = lambda name, w: True,
    tables: Table = lambda name, w: w,
    rows: int = 4096,
    forward: calibrate.Forward | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Path:
    """Compress a model block by block, with one block in memory at a time.

    All matrices of a block see the inputs that the compressed tables and
    blocks before it make: each block runs once as it was, to record what its
    layers see, and once compressed, to make the inputs of the next.  In
    memory are the outputs of one block for all batches, one block, the
    statistics of its layers and what the rule needs; of a table some rows.

    A call that was stopped goes on where it stopped: files that are there
    are not made again.  So another rule needs another folder.

    Parameters
    ----------
    model : nn.Module
        Only its shapes are needed, and its forward: build it under
        ``torch.device("meta")``.  It calls one block after the other, each
        on the output of the one before and otherwise on the same arguments
        as the first.  Left as it is.
    tensors : mapping of str to Tensor
        The weights, under the names of ``model.state_dict()``; those of
        `zoo.checkpoint.open_safetensors` are read when they are needed.
    batches : iterable
        A tensor each, or a tuple whose first entry is the input.
    rule : callable
        From a weight W and the `Stats` of its inputs to a code, or to a
        tensor of the same shape.
    folder : path
        Where the files go, one for each block and for each part of a table.
    blocks : str
        Name of the nn.ModuleList or nn.Sequential of blocks.
    where : callable
        From the full name and the weight of a layer of a block to a bool: by
        default all matrices and kernels of the blocks are compressed.
    tables : callable
        From the name and some rows of a matrix outside of the blocks to what
        is stored of them; by default as they are.
    rows : int
        So many rows of such a matrix at a time.
    forward : callable, optional
        ``forward(model, batch)``, for models that need more than one input.
    device : device
        Where a block is compressed; between blocks all is on the CPU.
    progress : bool
        Whether to show a bar.

    Returns
    -------
    Path
        The folder, for `assembled`.

    Raises
    ------
    ValueError
        If the folder holds parts of another model or of other rows, a tensor
        is missing or of another shape, two blocks share one, or the first is
        never called.

    References
    ----------
    Frantar et al., GPTQ, arXiv:2210.17323, section 4 (setup: one Transformer
    block in memory at a time).

    Examples
    --------
    >>> import tempfile
    >>> from minicompress import models, pipeline, quantize
    >>> whole = models.LM(vocab=9, width=8, layers=3, heads=2, ff=8, context=4)
    >>> with torch.device("meta"):
    ...     shapes = models.build("LM", whole.config)
    >>> ids = torch.arange(8).reshape(2, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = streamed(shapes, whole.state_dict(), [ids],
    ...                  lambda W, x: quantize.min_max(W, bits=4), folder)
    ...     small = pipeline.assembled(folder)
    >>> small.blocks[2].up.weight.unique().numel() <= 8 * 16  # per row
    True
    """
    folder, stack = Path(folder), model.get_submodule(blocks)
    card(folder, model, blocks, rows)
    write_outside(model, tensors, folder, blocks, tables, rows)
    inputs = calls(model, Outside(folder), batches, blocks, forward)
    for i, block in enumerate(tqdm(stack, disable=not progress)):
        path, inside = folder / f"{blocks}.{i}.mc", f"{blocks}.{i}."
        if not path.exists():
            full = filled(block, tensors, inside).to(device)
            state = _compressed(full, inputs, rule, partial(_in, where, inside))
            storage.save(path, full, state, meta={"inside": inside})
            del full, state
        if i + 1 < len(stack):
            _advance(storage.load(path, like=block).to(device), inputs)
    return folder


def _compressed(
    block: nn.Module, inputs: list, rule: Rule, where: calibrate.Where
) -> codes.State:
    """Compress the matrices of a block, all on the inputs they have now."""
    state, made = own(block), {}
    if any(where(n, w) for n, w in state.items()):
        stats = calibrate.inputs(block, inputs, where=where, forward=_call)
        for name in list(stats):
            W = block.get_parameter(name).detach()
            made[name] = rule(W, stats.pop(name))  # freed when it is used
    return put(state, made)


def _advance(block: nn.Module, inputs: list) -> None:
    """Replace the inputs of a block by its outputs, one after the other."""
    with train.evaluating(block):
        for i, (_, args, kwargs) in enumerate(inputs):
            inputs[i] = _call(block, inputs[i]).cpu(), args, kwargs


def _call(block: nn.Module, call: tuple) -> Tensor:
    """Call a block; of several outputs the first goes on."""
    device = next(block.parameters()).device
    x, args, kwargs = tree_map_only(Tensor, lambda t: t.to(device), call)
    y = block(x, *args, **kwargs)
    return y[0] if isinstance(y, tuple) else y


def _in(where: calibrate.Where, inside: str, name: str, w: Tensor) -> bool:
    return where(inside + name, w)
