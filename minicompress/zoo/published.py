"""What the folders of published checkpoints have in common."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor


def place(folder: str | os.PathLike, files: Sequence[str]) -> Path:
    """Return a folder as a path, if it has these files."""
    for name in files:
        if not Path(folder, name).is_file():
            raise ValueError(f"folder: no {name} in {os.fspath(folder)!r}")
    return Path(folder)


def arguments(
    config: dict, sizes: Mapping[str, str], fixed: Mapping, model: str
) -> dict:
    """Take the arguments of a model out of a config.json.

    Parameters
    ----------
    config
        what the file holds.
    sizes
        {argument: key of the file}.
    fixed
        {key: value}, what the model computes, and no other; a key that is
        absent stands for this value.
    model
        its name, for errors.

    Raises
    ------
    ValueError
        If the file describes another model, or lacks a size.
    """
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"config.json: {key} is {config[key]!r}, but {model} has "
                f"{value!r}"
            )
    absent = [key for key in sizes.values() if key not in config]
    if absent:
        raise ValueError(f"config.json: no {', '.join(absent)}")
    return {name: config[key] for name, key in sizes.items()}


def check(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Say which tensors of a file are missing, unexpected or misshapen.

    Parameters
    ----------
    tensors
        {published name: tensor}.
    shapes
        {published name: shape}, all that should be there.

    Raises
    ------
    ValueError
        If a tensor is not as it should be.
    """
    missing = [name for name in shapes if name not in tensors]
    extra = [name for name in tensors if name not in shapes]
    if missing or extra:
        raise ValueError(
            f"model.safetensors: {len(missing)} tensors missing: "
            f"{missing[:3]}, {len(extra)} unexpected: {extra[:3]}"
        )
    for name, shape in shapes.items():
        if tensors[name].shape != tuple(shape):
            raise ValueError(
                f"model.safetensors: {name} has shape "
                f"{tuple(tensors[name].shape)}, not {tuple(shape)} as "
                "config.json says"
            )
