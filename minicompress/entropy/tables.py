"""The small tables that travel with a stream, and what coders share."""

import math

import numpy as np
import torch
from torch import Tensor

from .. import bits as packing


def frequencies(table: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Read a frequency table: which symbols occur, and their slots.

    Byte 0 stands for one slot; byte ``1 + 8e + m`` for about
    ``1 + (1 + m/8) * 2^e`` slots, a floating-point number with three bits
    after the point, scaled so that all slots together are exactly 2^14 (2^16
    above 2^13 symbols); byte ``240 + k`` for 2^k symbols that do not occur.

    Parameters
    ----------
    table : uint8 Tensor (T,)
    bits : int
        Width of the integers.

    Returns
    -------
    (int64 Tensor (K,), int64 Tensor (K,))
        The symbols, ascending, and their positive frequencies.

    Raises
    ------
    ValueError
        If the table goes beyond symbol 2^bits - 1.
    """
    symbols, level = read_gaps(table, 240, bits)
    k = symbols.size
    if k == 0:
        none = torch.zeros(0, dtype=torch.int64)
        return none, none
    spare = (1 << (14 if k <= 1 << 13 else 16)) - k
    e, m = np.divmod(np.maximum(level - 1, 0), 8)
    weight = np.where(level, 8 + m << e, 0)
    weight = weight if weight.any() else np.ones(k, np.int64)
    share, left = np.divmod(weight * spare, weight.sum())
    # the slots that rounding down left over go to the largest remainders
    more = np.argsort(-left, kind="stable")[: spare - int(share.sum())]
    share[more] += 1
    return torch.from_numpy(symbols), torch.from_numpy(share + 1)


def frequency_table(symbols: Tensor, counts: Tensor) -> Tensor:
    """Write the table from which `frequencies` gets close to `counts`."""
    total = 1 << (14 if symbols.numel() <= 1 << 13 else 16)
    slots = counts.numpy() / max(int(counts.sum()), 1) * total - 1
    m, e = np.frexp(np.maximum(slots, 0))  # slots = m * 2^e, m in [1/2, 1)
    level = 1 + 8 * (e - 1) + np.rint(16 * m - 8).astype(np.int64)
    level = np.where(slots < 0.5, 0, np.maximum(level, 1))
    return write_gaps(symbols.numpy(), level, 240)


def write_gaps(symbols, values, first) -> Tensor:
    """List `values`; before each, the gap to its symbol as powers of two."""
    gaps = np.diff(symbols, prepend=-1) - 1
    powers = np.arange(16)
    tokens = np.empty((symbols.size, 17), np.int64)
    tokens[:, :16] = np.where(gaps[:, None] >> powers & 1, first + powers, -1)
    tokens[:, 16] = values
    return torch.from_numpy(tokens[tokens >= 0].astype(np.uint8))


def read_gaps(table: Tensor, first: int, bits: int):
    """Undo `write_gaps` -> symbols (K,), values (K,)."""
    tokens = table.cpu().numpy().astype(np.int64).reshape(-1)
    is_gap = tokens >= first
    steps = np.where(is_gap, 1 << np.maximum(tokens - first, 0), 1)
    ends = np.cumsum(steps)
    if ends.size and ends[-1] > 1 << bits:
        raise ValueError(f"table: {ends[-1]} symbols do not fit bits={bits}")
    return ends[~is_gap] - 1, tokens[~is_gap]


def check_fields(code) -> None:
    name, shape = type(code).__name__, code.shape
    if type(code.bits) is not int or not 1 <= code.bits <= 16:
        raise ValueError(f"{name}: bits must be 1 to 16, got {code.bits!r}")
    if not isinstance(shape, tuple) or not all(
        type(n) is int and n >= 0 for n in shape
    ):
        raise ValueError(f"{name}: shape must be a tuple, got {shape!r}")
    if max(math.prod(shape), *shape, 0) >= 1 << 40:
        raise ValueError(f"{name}: shape {shape} is too large to be true")
    if not is_bytes(code.stream):
        raise ValueError(f"{name}: stream must be bytes, got {code.stream!r}")


def is_bytes(x) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.uint8 and x.dim() == 1


def constant(code, symbols: Tensor) -> Tensor:
    """Decode a source of at most one symbol, whose stream is empty."""
    if code.stream.numel() or (math.prod(code.shape) and not symbols.numel()):
        raise ValueError(f"{type(code).__name__}: table and stream disagree")
    fill = int(symbols[0]) if symbols.numel() else 0
    kind, device = packing.dtype(code.bits), code.stream.device
    return torch.full(code.shape, fill, dtype=kind, device=device)


def output(code, values) -> Tensor:
    return torch.from_numpy(values).to(code.stream.device).reshape(code.shape)
