"""From a model and its state to bytes."""

import json
import os
import struct
import zlib
from collections import Counter
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from minicompress import bits, codes, models
from minicompress.codes import Code, State

from . import layers
from .format import COMPACT, MAGIC, PLAIN, TAGS, WORDS, check_names


def save(
    path: str | os.PathLike,
    model: nn.Module,
    state: State | None = None,
    *,
    meta: dict | None = None,
    compact: bool = False,
) -> int:
    """Write a model to a file and return the length of the file in bytes.

    Parameters
    ----------
    path : path
        Replaced as a whole once everything has been written.
    model : nn.Module
        Any module; one from `minicompress.models` needs no `like` to load,
        also after its layers were pruned or factorized.
    state : dict, optional
        {name: Tensor or Code} with the names of ``model.state_dict()``; by
        default the model's own tensors.
    meta : dict, optional
        Facts to keep with the model, as JSON.
    compact : bool
        Deflate the header: some hundred bytes less, which shows in a file
        of a few thousand; a text editor can no longer read it.  Another
        build of zlib may deflate to other bytes; all read all.

    Raises
    ------
    ValueError
        If `state` does not have the names and shapes of `model`.

    Examples
    --------
    >>> import tempfile
    >>> from minicompress import models, storage
    >>> model = models.MLP(widths=[64, 10])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = storage.save(f"{folder}/model.mc", model)
    ...     again = storage.load(f"{folder}/model.mc")
    >>> size - 650 * 4  # header and checksum
    120
    """
    data = dumps(model, state, meta=meta, compact=compact)
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)
    return len(data)


def dumps(
    model: nn.Module,
    state: State | None = None,
    *,
    meta: dict | None = None,
    compact: bool = False,
) -> bytes:
    """Return the bytes that `save` writes; the parameters are the same."""
    if state is None:
        state = codes.encode(model, codes.value, lambda name, w: False)
    check_names(state, model.state_dict(keep_vars=True), ValueError)
    name = type(model).__name__
    header: dict = {"model": None}
    if models.MODELS.get(name) is type(model):
        header["model"] = [name, model.config]
        with torch.device("meta"):
            plain = models.build(name, model.config)
        changed = layers.differences(model, plain)
        if changed:
            header["layers"] = changed
    blobs: list[bytes] = []
    header["state"] = _write_state(state, blobs)
    header |= _types(model)
    if meta:
        header["meta"] = meta
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    if compact:
        stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zdict=WORDS)
        text = stream.compress(text) + stream.flush()
    version = COMPACT if compact else PLAIN
    start = MAGIC + struct.pack("<BI", version, len(text))
    body = b"".join([start, text, *blobs])
    return body + struct.pack("<I", zlib.crc32(body))


def _types(model: nn.Module) -> dict:
    """Name the floating-point type of the model, and what differs from it."""
    types = {
        name: TAGS[t.dtype]
        for name, t in model.state_dict().items()
        if t.is_floating_point()
    }
    common = Counter(["f4", *types.values()]).most_common(1)[0][0]
    odd = {name: tag for name, tag in types.items() if tag != common}
    header: dict = {} if common == "f4" else {"type": common}
    return header | ({"types": odd} if odd else {})


def _write_state(state: State, blobs: list[bytes]) -> dict:
    first: dict[int, str] = {}  # tied tensors are written once
    tree = {}
    for name, x in state.items():
        if id(x) in first:
            tree[name] = {"as": first[id(x)]}
        else:
            first[id(x)] = name
            tree[name] = _write(x, blobs)
    return tree


def _write(x, blobs: list[bytes]):
    if isinstance(x, codes.Ints):
        blobs.append(_bytes(bits.pack(x.values.reshape(-1).cpu(), x.bits)))
        return ["Ints", list(x.shape), x.bits]
    if isinstance(x, Code):
        parts = [_write(getattr(x, f.name), blobs) for f in fields(x)]
        return [type(x).__name__, *parts]
    if isinstance(x, Tensor):
        if x.dtype not in TAGS:
            raise ValueError(f"tensors of type {x.dtype} cannot be stored")
        flat = x.detach().cpu().reshape(-1)
        packed = bits.pack(flat.byte(), 1) if x.dtype == torch.bool else flat
        blobs.append(_bytes(packed))
        return {TAGS[x.dtype]: list(x.shape)}
    return list(x) if isinstance(x, tuple) else x


def _bytes(flat: Tensor) -> bytes:
    if not flat.numel():
        return b""
    return flat.contiguous().view(torch.uint8).numpy().tobytes()
