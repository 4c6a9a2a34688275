"""From bytes to a model, trusting nothing that the bytes say."""

import copy
import json
import math
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minicompress import bits, codes, models
from minicompress.codes import Code, State

from . import layers
from .format import (
    CODES,
    COMPACT,
    DTYPES,
    MAGIC,
    PLAIN,
    WORDS,
    StorageError,
    check_names,
)
from .sizes import footprint

LONGEST = 1 << 24  # bytes of a header once it is inflated


@dataclass(frozen=True, eq=False)
class File:
    """What a file holds, codes not yet decoded.

    Attributes
    ----------
    model : tuple or None
        Name and configuration for `models.build`; None for a model that is
        not from `minicompress.models`.
    layers : dict
        {path: [type, arguments]} of layers that differ from that model.
    state : dict
        {name: Tensor or Code}.
    meta : dict
        Whatever was passed to `save`.
    """

    model: tuple[str, dict] | None
    layers: dict
    state: State
    meta: dict


def load(
    path: str | os.PathLike,
    *,
    like: nn.Module | None = None,
    limit: int = 4 << 30,
) -> nn.Module:
    """Rebuild a model from a file, ready to predict (in eval mode).

    Parameters
    ----------
    path : path
        Written by `save`.
    like : nn.Module, optional
        A module of the right structure, for models that are not from
        `minicompress.models`; it is copied, not changed.
    limit : int
        Refuse a file that declares more bytes of decoded tensors than this.

    Raises
    ------
    StorageError
        If the file is truncated, corrupted, foreign, hostile or too large.
    """
    return loads(Path(path).read_bytes(), like=like, limit=limit)


def loads(
    data: bytes, *, like: nn.Module | None = None, limit: int = 4 << 30
) -> nn.Module:
    """Rebuild a model from bytes; parameters and errors are those of `load`."""
    header, blobs = _open(data)
    with _errors_named():
        model = copy.deepcopy(like) if like is not None else _build(header)
        have = model.state_dict(keep_vars=True)
        plan = _read_state(header, None, limit)
        check_names(plan, have, StorageError)
        state = _read_state(header, blobs, limit)
        common, odd = header.get("type", "f4"), header.get("types", {})
        types = {name: DTYPES[odd.get(name, common)] for name in state}
        _fill(model, state, types)
    return model.eval()


def read(path: str | os.PathLike, *, limit: int = 4 << 30) -> File:
    """Read what a file holds without building the model.

    Parameters and errors are those of `load`.
    """
    header, blobs = _open(Path(path).read_bytes())
    with _errors_named():
        _read_state(header, None, limit)
        state = _read_state(header, blobs, limit)
        name = header["model"]
        return File(
            None if name is None else (str(name[0]), dict(name[1])),
            dict(header.get("layers", {})),
            state,
            dict(header.get("meta", {})),
        )


class _errors_named:
    """Whatever goes wrong on the way from a file to a model is its fault."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception) and not isinstance(error, StorageError):
            why = str(error) or kind.__name__
            raise StorageError(f"this file is not valid: {why}") from error


def _open(data: bytes) -> tuple[dict, memoryview]:
    if data[:4] != MAGIC:
        raise StorageError("not a minicompress file: it does not start so")
    if len(data) < 13:
        raise StorageError(f"truncated: only {len(data)} bytes")
    version, size = struct.unpack("<BI", data[4:9])
    if version not in (PLAIN, COMPACT):
        raise StorageError(
            f"written in format {version}; this reads {PLAIN} and {COMPACT}"
        )
    if zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise StorageError("truncated or corrupted: the checksum is wrong")
    if 9 + size + 4 > len(data):
        raise StorageError(f"the header claims {size} bytes, more than there")
    with _errors_named():
        text = data[9 : 9 + size]
        text = _inflated(text) if version == COMPACT else text
        header = json.loads(text, parse_constant=_no_constant)
        header["state"].items(), header["model"]
    return header, memoryview(data)[9 + size : -4]


def _inflated(text: bytes) -> bytes:
    """Undo the deflation of a header, up to a length that is believable."""
    stream = zlib.decompressobj(-15, zdict=WORDS)
    whole = stream.decompress(text, LONGEST)
    if not stream.eof or stream.unused_data:
        raise StorageError(
            f"the header is cut off, or longer than {LONGEST:,} bytes"
        )
    return whole


def _no_constant(text: str):
    raise StorageError(f"{text} is not a number that a header may hold")


def _build(header: dict) -> nn.Module:
    if header["model"] is None:
        raise StorageError(
            "saved from a model that is not in minicompress.models: "
            "pass a module of the same structure as like="
        )
    with torch.device("meta"):  # shapes only: nothing is allocated
        model = models.build(*header["model"])
        return layers.replaced(model, header.get("layers", {}))


def _read_state(header: dict, blobs: memoryview | None, limit: int) -> State:
    """Read the tree, on the meta device first: shapes without memory."""
    cursor = _Shapes() if blobs is None else _Blobs(blobs)
    state: State = {}
    for name, node in header["state"].items():
        tied = isinstance(node, dict) and "as" in node
        state[name] = state[node["as"]] if tied else _read(node, cursor)
    if blobs is None:
        need = sum(map(footprint, {id(x): x for x in state.values()}.values()))
        if need > limit:
            raise StorageError(
                f"declares {need:,} bytes of tensors, more than the limit of "
                f"{limit:,}; pass a higher limit= if you trust it"
            )
    else:
        cursor.close()
    return state


def _read(node, cursor):
    if isinstance(node, dict):
        ((tag, shape),) = node.items()
        return cursor.tensor(DTYPES[tag], _shape(shape))
    if isinstance(node, list) and node and isinstance(node[0], str):
        if node[0] == "Ints":
            _, shape, width = node
            return codes.Ints(cursor.ints(_shape(shape), width), width)
        return CODES[node[0]](*(_read(part, cursor) for part in node[1:]))
    return _shape(node) if isinstance(node, list) else node


def _shape(sizes) -> tuple[int, ...]:
    if not all(type(n) is int and n >= 0 for n in sizes):
        raise StorageError(f"{sizes!r} is not a shape")
    return tuple(sizes)


class _Shapes:
    """Stands in for the blobs while only shapes are wanted."""

    def tensor(self, dtype, shape):
        return torch.empty(shape, dtype=dtype, device="meta")

    def ints(self, shape, width):
        return self.tensor(torch.uint8 if width <= 8 else torch.int32, shape)


class _Blobs:
    """Takes tensors off the blobs, in order."""

    def __init__(self, blobs: memoryview):
        self.blobs, self.at = blobs, 0

    def take(self, size: int) -> Tensor:
        if self.at + size > len(self.blobs):
            raise StorageError("truncated: a tensor runs past the end")
        part = np.frombuffer(self.blobs, np.uint8, size, self.at).copy()
        self.at += size
        return torch.from_numpy(part)

    def tensor(self, dtype, shape):
        if dtype == torch.bool:
            return self.ints(shape, 1).bool()
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        return self.take(size).view(dtype).reshape(shape)

    def ints(self, shape, width):
        n = math.prod(shape)
        packed = self.take((n * width + 7) // 8)
        return bits.unpack(packed, width, n).reshape(shape)

    def close(self):
        if self.at != len(self.blobs):
            raise StorageError(
                f"{len(self.blobs) - self.at} bytes that no tensor claims"
            )


def _fill(model: nn.Module, state: State, types: dict) -> None:
    have = model.state_dict(keep_vars=True)
    done: dict[int, Tensor] = {}
    for name, x in state.items():
        old = have[name]
        if id(x) in done:
            continue
        w = codes.value(x)
        if w.is_floating_point() or isinstance(x, Code):
            w = w.to(types[name])  # half on disk does not mean half in use
        device = "cpu" if old.is_meta else old.device
        w = w.to(device).contiguous()
        if isinstance(old, nn.Parameter):
            w = nn.Parameter(w, requires_grad=old.requires_grad)
        done[id(x)] = w
    # assign: one tensor under two names stays one tensor
    model.load_state_dict(
        {n: done[id(x)] for n, x in state.items()}, assign=True
    )
