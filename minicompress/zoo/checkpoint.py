"""The files that other libraries leave: safetensors and JSON."""

import json
import math
import os
from pathlib import Path

import numpy as np
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
    name = Path(path).name
    if Path(path).stat().st_size < 8:
        raise ValueError(f"{name}: too short for a safetensors file")
    raw = np.memmap(path, np.uint8, "r")
    size = int.from_bytes(raw[:8].tobytes(), "little")
    if size > min(LARGEST, len(raw) - 8):
        raise ValueError(
            f"{name}: the header claims {size:,} bytes, but {len(raw) - 8:,} "
            "are there: truncated, or not a safetensors file"
        )
    header = _parsed(raw[8 : 8 + size].tobytes(), f"{name}, header")
    header.pop("__metadata__", None)
    body, found, at = raw[8 + size :], {}, 0
    places = {key: _place(key, entry) for key, entry in header.items()}
    for key, (dtype, shape, begin, end) in sorted(
        places.items(), key=lambda item: item[1][2:]
    ):
        need = math.prod(shape) * dtype.itemsize
        if begin != at or end - begin != need or end > len(body):
            raise ValueError(
                f"{name}: {key} of shape {shape} takes {need} bytes, but is "
                f"said to be at {begin} to {end}, after {at} of {len(body)}"
            )
        found[key], at = torch.empty(shape, dtype=dtype), end
        if need:
            part = torch.from_numpy(body[begin:end].copy())
            found[key] = part.view(dtype).reshape(shape)
    if at != len(body):
        raise ValueError(f"{name}: {len(body) - at} bytes belong to no tensor")
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
