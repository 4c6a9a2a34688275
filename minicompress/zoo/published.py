"""What the folders of published checkpoints have in common."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoint import Tensors


@dataclass(frozen=True)
class Origin:
    """Where a tensor of a model is among the published ones.

    Parameters
    ----------
    name
        of the published tensor.
    turned
        whether matrices are (in, out) there.
    part, parts
        which of how many equal parts of its last axis.
    """

    name: str
    turned: bool = False
    part: int = 0
    parts: int = 1


class Unread(Mapping):
    """The tensors of a model, read from files with names of their own.

    Each is read when it is asked for, becomes float32, and is not kept.

    Parameters
    ----------
    files : Tensors
        As of `open_safetensors`.
    origins : dict of str to Origin
        For each name of the model.
    """

    def __init__(self, files: Tensors, origins: Mapping[str, Origin]):
        self.files, self.origins = files, dict(origins)

    def __getitem__(self, name: str) -> Tensor:
        it = self.origins[name]
        if it.parts == 1:
            w = self.files[it.name].float()
        else:
            w = self.files.columns(it.name, *self._span(it)).float()
        if it.turned:  # (out, in) from now on
            w = w.t().clone(memory_format=torch.contiguous_format)
        return w

    def __contains__(self, name) -> bool:
        return name in self.origins

    def __iter__(self) -> Iterator[str]:
        return iter(self.origins)

    def __len__(self) -> int:
        return len(self.origins)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a tensor without reading it."""
        it = self.origins[name]
        start, stop = self._span(it)
        shape = (*self.files.shape(it.name)[:-1], stop - start)
        return shape[::-1] if it.turned else shape

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Read some rows of a tensor, as `Tensors.rows` does.

        Where the file has columns instead, those between the first and the
        last that are asked for are read too.
        """
        it = self.origins[name]
        if not it.turned:
            return self.files.rows(it.name, ids).float()
        ids, (start, stop) = ids.cpu(), self._span(it)
        if not ids.numel():
            return torch.empty(*ids.shape, *self.shape(name)[1:])
        low, high = int(ids.min()), int(ids.max())
        if not 0 <= low <= high < stop - start:
            raise ValueError(
                f"ids: {low} to {high}, but {name} has {stop - start} rows"
            )
        w = self.files.columns(it.name, start + low, start + high + 1)
        return w.float().t()[ids - low].contiguous()

    def _span(self, it: Origin) -> tuple[int, int]:
        """Find the columns of a part."""
        n = self.files.shape(it.name)[-1] // it.parts
        return it.part * n, (it.part + 1) * n


def loaded(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give a model from the meta device its tensors.

    Parameters
    ----------
    model
        filled in place; of tied tensors only the first name.
    tensors
        {name of the model: tensor}, which become its parameters.

    Returns
    -------
    the model, in evaluation mode.
    """
    state = {name: tensors[name] for name, _ in model.named_parameters()}
    model.load_state_dict(state, strict=False, assign=True)
    return model.eval()


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
    found: Mapping[str, Sequence[int]], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Say which tensors of a file are missing, unexpected or misshapen.

    Parameters
    ----------
    found
        {published name: shape}, what is there.
    shapes
        {published name: shape}, all that should be there.

    Raises
    ------
    ValueError
        If a tensor is not as it should be.
    """
    missing = [name for name in shapes if name not in found]
    extra = [name for name in found if name not in shapes]
    if missing or extra:
        raise ValueError(
            f"model.safetensors: {len(missing)} tensors missing: "
            f"{missing[:3]}, {len(extra)} unexpected: {extra[:3]}"
        )
    for name, shape in shapes.items():
        if tuple(found[name]) != tuple(shape):
            raise ValueError(
                f"model.safetensors: {name} has shape "
                f"{tuple(found[name])}, not {tuple(shape)} as "
                "config.json says"
            )
