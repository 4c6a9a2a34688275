"""The files that other libraries leave: safetensors and JSON."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LARGEST = 100_000_000  # bytes of a header, as in the format's own readers
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, trusting nothing it declares.

    Eight bytes hold the length of a JSON header that gives type, shape and
    place of each tensor; the tensors follow without gaps.

    Parameters
    ----------
    path : path

    Returns
    -------
    dict of str to Tensor
        In the order of the file.

    Raises
    ------
    ValueError
        If the file is truncated, damaged or not of this format.
    """
    return dict(Tensors(_places(Path(path))))


def open_safetensors(path: str | os.PathLike) -> "Tensors":
    """Open safetensors files whose tensors are read when asked for.

    Parameters
    ----------
    path : path
        A .safetensors file, the .index.json of a checkpoint in several
        files, or a folder with a ``model.safetensors`` or a
        ``model.safetensors.index.json``.

    Returns
    -------
    Tensors
        A mapping {name: Tensor}, in the order of the files.

    Raises
    ------
    ValueError
        If a file is missing, damaged or not of this format, or does not hold
        the tensors that the index says.
    """
    path = Path(path)
    if path.is_dir():
        names = ("model.safetensors", "model.safetensors.index.json")
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise ValueError(f"path: no {' or '.join(names)} in {path}")
        path = found[0]
    return Tensors(_shards(path) if path.suffix == ".json" else _places(path))


@dataclass(frozen=True)
class Place:
    """Where a tensor is: the file, and the number of its first byte there."""

    path: Path
    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Tensors(Mapping):
    """Tensors in files, each read when it is asked for and not kept.

    Parameters
    ----------
    places : dict of str to Place
        As of `open_safetensors`; kept under this name.
    """

    def __init__(self, places: Mapping[str, Place]):
        self.places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        raw = _bytes(place, [place.at], math.prod(place.shape))
        return raw.reshape(place.shape)

    def __contains__(self, name) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Give the shape of a tensor without reading it."""
        return self.places[name].shape

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Read some rows of a tensor, each once, and no others.

        Parameters
        ----------
        name : str
        ids : integer Tensor of any shape
            Numbers of rows, counted from 0.

        Returns
        -------
        Tensor of shape (*ids.shape, *shape of a row)
            The same as ``self[name][ids]``.

        Raises
        ------
        ValueError
            If there is no row of such a number.
        """
        place = self.places[name]
        count, *row = place.shape
        some, back = ids.cpu().unique(return_inverse=True)
        if len(some) and not 0 <= some[0] <= some[-1] < count:
            raise ValueError(
                f"ids: {some[0]} to {some[-1]}, but {name} has {count} rows"
            )
        n = math.prod(row)
        starts = (place.at + some * n * place.dtype.itemsize).tolist()
        return _bytes(place, starts, n).reshape(-1, *row)[back]

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Read a part of the last axis of a tensor, and no more.

        Parameters
        ----------
        name : str
            Of a tensor with at least one axis.
        start, stop : int
            Numbers of the first column and of the one after the last.

        Returns
        -------
        Tensor of shape (*other axes, stop - start)
            The same as ``self[name][..., start:stop]``.

        Raises
        ------
        ValueError
            If there are no such columns.
        """
        place = self.places[name]
        *lines, n = place.shape
        if not 0 <= start <= stop <= n:
            raise ValueError(
                f"start={start}, stop={stop}: {name} has {n} columns"
            )
        size, count = place.dtype.itemsize, math.prod(lines)
        first = place.at + start * size
        starts = [first + i * n * size for i in range(count)]
        return _bytes(place, starts, stop - start).reshape(*lines, stop - start)

    def named(self, names: Mapping[str, str]) -> "Tensors":
        """Select tensors and give them other names.

        Parameters
        ----------
        names : dict
            {name from now on: name in the file}.

        Raises
        ------
        ValueError
            If there is no such tensor.
        """
        absent = [old for old in names.values() if old not in self.places]
        if absent:
            raise ValueError(f"names: there are no tensors {absent[:3]}")
        return Tensors({new: self.places[old] for new, old in names.items()})


def _bytes(place: Place, starts: list[int], count: int) -> Tensor:
    """Read runs of so many numbers from a file, (starts, count)."""
    out = torch.empty(len(starts), count, dtype=place.dtype)
    if not out.numel():
        return out
    runs = out.view(torch.uint8).numpy()
    with open(place.path, "rb") as file:
        for start, run in zip(starts, runs, strict=True):
            file.seek(start)
            if file.readinto(run) != run.nbytes:
                raise ValueError(f"{place.path.name}: shorter than it was")
    if place.dtype == torch.bool:  # whatever the byte, True is 1
        return out.view(torch.uint8) != 0
    return out


def _shards(index: Path) -> dict[str, Place]:
    """Find the tensors of a checkpoint in several files."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(
        isinstance(f, str) and f == Path(f).name for f in files.values()
    ):
        raise ValueError(f"{index.name}: no weight_map of files beside it")
    places = {}
    for file in dict.fromkeys(files.values()):
        path = index.parent / file
        if not path.is_file():
            raise ValueError(f"{index.name}: {file} is not beside it")
        found = _places(path)
        other = found.keys() ^ {n for n, f in files.items() if f == file}
        if other:
            raise ValueError(
                f"{index.name}: it and {file} differ in {sorted(other)[:3]}"
            )
        places |= found
    return places


def _places(path: Path) -> dict[str, Place]:
    """Find the tensors of a file; its header must account for every byte."""
    name, length = path.name, path.stat().st_size - 8
    if length < 0:
        raise ValueError(f"{name}: too short for a safetensors file")
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(LARGEST, length):
            raise ValueError(
                f"{name}: the header claims {size:,} bytes, but {length:,} "
                "are there: truncated, or not a safetensors file"
            )
        header = _parsed(file.read(size), f"{name}, header")
    header.pop("__metadata__", None)
    places = {key: _place(key, entry) for key, entry in header.items()}
    found, at, length = {}, 0, length - size
    for key, (dtype, shape, begin, end) in sorted(
        places.items(), key=lambda item: item[1][2:]
    ):
        need = math.prod(shape) * dtype.itemsize
        if begin != at or end - begin != need or end > length:
            raise ValueError(
                f"{name}: {key} of shape {shape} takes {need} bytes, but is "
                f"said to be at {begin} to {end}, after {at} of {length}"
            )
        found[key], at = Place(path, 8 + size + begin, dtype, shape), end
    if at != length:
        raise ValueError(f"{name}: {length - at} bytes belong to no tensor")
    return found


def _place(key: str, entry) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    """Check one entry of a safetensors header."""
    match entry:
        case {
            "dtype": str(dtype),
            "shape": [*shape],
            "data_offsets": [int(begin), int(end)],
        } if _is_shape(shape):
            if dtype not in DTYPES:
                raise ValueError(f"{key}: type {dtype!r}, not in {[*DTYPES]}")
            return DTYPES[dtype], tuple(shape), begin, end
    raise ValueError(f"{key}: {entry!r:.80} does not describe a tensor")


def _is_shape(shape: list) -> bool:
    """Tell whether torch could have a tensor of this shape."""
    if len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        return False
    # even where a size is 0, the others count for the strides
    return math.prod(max(n, 1) for n in shape) < 1 << 60


def read_json(path: str | os.PathLike) -> dict:
    """Read a file that holds one JSON object.

    Parameters
    ----------
    path : path

    Raises
    ------
    ValueError
        If it holds something else.
    """
    return _parsed(Path(path).read_bytes(), Path(path).name)


def _parsed(text: bytes, where: str) -> dict:
    """Parse a JSON object, or say where there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {value!r:.40} is not a JSON object")
    return value
