"""Look into a file: what is in it, and does it come back whole."""

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from .. import codes, entropy, storage
from ..codes import Code


def info(path: Path) -> str:
    """Describe a file: its model, and a row for each of its tensors.

    Bytes are those in the file.  "At best" are the bytes if each list of
    integers were coded by itself, by frequency alone and without a table of
    frequencies: the bound of `entropy.bound`.  A `Contextual` can be shorter.
    """
    file, size = storage.read(path), path.stat().st_size
    name, config = file.model or ("a model that is described nowhere", {})
    sizes = ", ".join(f"{key}={value}" for key, value in config.items())
    rows = [("tensor", "shape", "code", "bytes", "bits each", "at best")]
    first, total, numbers = {}, 0, 0
    for key, x in file.state.items():
        if id(x) in first:
            rows.append((key, "", f"is {first[id(x)]}", "", "", ""))
            continue
        first[id(x)] = key
        n, held = math.prod(x.shape), storage.payload(x)
        total, numbers = total + held, numbers + n
        rows.append(
            (
                key,
                sized(x),
                described(x),
                f"{held:,}",
                f"{8 * held / n:.2f}" if n else "",
                f"{at_best(x):,.0f}",
            )
        )
    return "\n".join(
        (
            f"{path}: {size:,} bytes",
            f"{name}({sizes})" if file.model else name,
            *aligned(rows),
            f"tensors {total:,} bytes, header and checksum {size - total:,}",
            f"{numbers:,} numbers, {8 * size / max(1, numbers):.2f} bits each "
            "with all of the file",
        )
    )


def verify(path: Path) -> str:
    """Decode a file whole, and write its tensors again: the same bytes.

    Raises
    ------
    StorageError
        If the file is damaged, or the model it names cannot be built.
    ValueError
        If a decoded number is not finite, or what is written differs.
    """
    data, file = path.read_bytes(), storage.read(path)
    tensors = codes.decode(file.state)
    for name, t in tensors.items():
        if not torch.isfinite(t).all():
            raise ValueError(f"{name} holds numbers that are not finite")
    if file.model is None:
        return f"{path}: {len(tensors)} tensors decode; no model is named"
    model = storage.loads(data)
    parts = model, file.state
    how = {"meta": file.meta or None}
    again = (storage.dumps(*parts, compact=c, **how) for c in (False, True))
    if data not in again:
        raise ValueError("written again, it is another file")
    return f"{path}: {file.model[0]}, {len(data):,} bytes, comes back whole"


def sized(x: Tensor | Code) -> str:
    """Write a shape.

    Examples
    --------
    >>> sized(torch.zeros(3, 4))
    '3×4'
    """
    return "×".join(map(str, x.shape))


def described(x: Tensor | Code) -> str:
    """Name a code and, in brackets, the codes inside of it."""
    if isinstance(x, Tensor):
        return str(x.dtype).removeprefix("torch.")
    name, bits = type(x).__name__, getattr(x, "bits", None)
    if bits is not None:  # integers; what else is in it is a table
        return f"{name}({bits} bits)"
    inside = (getattr(x, f.name) for f in fields(x))
    named = [described(y) for y in inside if isinstance(y, Code)]
    return f"{name}({', '.join(named)})" if named else name


def at_best(x: Tensor | Code) -> float:
    """Give the bytes of a code if its integers were at their bound."""
    if isinstance(x, Tensor):
        return storage.payload(x)
    if hasattr(x, "bits"):
        return entropy.bound(x) / 8
    inside = (getattr(x, f.name) for f in fields(x))
    return sum(at_best(y) for y in inside if isinstance(y, Tensor | Code))


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Set words to the left and numbers, from the fourth column, right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, ("<<<>>>")[: len(row)], strict=True)
        lines.append("  ".join(f"{c:{a}{w}}" for c, w, a in cells).rstrip())
    return lines
