"""Where a command finds its tensors, and where it puts its file."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from .. import codes, export, storage, zoo
from ..codes import State
from ..zoo.checkpoint import open_safetensors, read_safetensors
from ..zoo.families import family


def opened(source: str) -> tuple[Path, nn.Module]:
    """Find the file of a source, and the model or the tensors in it."""
    if source in zoo.names():
        return zoo.path(source), zoo.load(source)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"neither a file nor in the zoo, which has {', '.join(zoo.names())}"
        )
    if path.is_dir():
        return path, published(path)
    if path.suffix == ".safetensors":
        return path, as_module(read_safetensors(path))
    file = storage.read(path)
    if file.model is None:
        return path, as_module(codes.decode(file.state))
    return path, storage.load(path)


def published(folder: Path) -> nn.Module:
    """Load the model of a folder as its publisher left it.

    Parameters
    ----------
    folder
        with a ``config.json`` of the BERT or GPT-2 family, see
        `zoo.encoder` and `zoo.decoder`.

    Raises
    ------
    ValueError
        If there is none, or it describes another family.
    """
    if not (folder / "config.json").is_file():
        raise ValueError("a folder without config.json is no published model")
    return family(folder).load(folder)[0]


def length(path: Path) -> int:
    """Count the bytes of a file, or of a folder's files of tensors."""
    if not path.is_dir():
        return path.stat().st_size
    files = {place.path for place in open_safetensors(path).places.values()}
    return sum(file.stat().st_size for file in files)


def as_module(tensors: State) -> nn.Module:
    """Make a module of named tensors: a checkpoint without its model.

    Parameters
    ----------
    tensors
        {name: Tensor}, as of `state_dict`; one under two names stays one.

    Returns
    -------
    nn.Module
        Cannot run, but has this `state_dict`.

    Examples
    --------
    >>> import torch
    >>> sorted(as_module({"a.weight": torch.ones(2)}).state_dict())
    ['a.weight']
    """
    made = {id(t): nn.Parameter(t, False) for t in tensors.values()}
    root = nn.Module()
    for name, t in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:  # a checkpoint may use names that setattr refuses
            module = module._modules.setdefault(part, nn.Module())
        module._parameters[last] = made[id(t)]
    return root


def exported(path: Path, *, output: Path, force: bool = False) -> str:
    """Write the decoded tensors of a file for other programs.

    Parameters
    ----------
    path
        a .mc file.
    output
        ends in .safetensors, or in .pt for `torch.load`.
    force
        whether to overwrite a file.
    """
    writers: dict[str, Callable] = {
        ".safetensors": export.to_safetensors,
        ".pt": export.to_state_dict,
    }
    if output.suffix not in writers:
        raise ValueError(f"{output} should end in {' or '.join(writers)}")
    free(output, force)
    _, model = opened(str(path))
    with placed(output, force) as part:
        size = writers[output.suffix](part, model)
    return f"{output}: {size:,} bytes"


def free(path: Path, force: bool) -> None:
    """Say early what would keep a file from being written."""
    if path.exists() and not force:
        raise ValueError(f"{path} exists; --force overwrites it")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder")


@contextmanager
def placed(path: Path, force: bool) -> Iterator[Path]:
    """Lend a name to write to; what is there becomes the file at the end.

    Whatever goes wrong before that, Ctrl-C too, nothing is left behind.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield part
        free(path, force)  # it may have come since the work began
        part.replace(path)
    finally:
        for left in (part, part.with_name(f"{part.name}.part")):
            left.unlink(missing_ok=True)
