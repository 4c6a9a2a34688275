"""Packing of small integers into bytes: b bits each, nothing between them.

Shifting single values into single bytes would be slow, so the work is laid
out in *lanes* and *planes*.  The first ``8 * m`` values (``m = n // 8``) are
cut into eight contiguous lanes of ``m`` values.  Value ``i`` of all eight
lanes together makes one word of ``8 * b`` bits, which is exactly ``b``
bytes; lane ``j`` owns bits ``j*b`` to ``(j+1)*b - 1`` of the word.  Byte
``k`` of all words is stored as one contiguous plane of ``m`` bytes.  Every
step is then a shift of a whole vector.  The up to seven values left over
make one shorter word, stored after the planes, lowest byte first.
"""

import math

import torch
from torch import Tensor


def size(n: int, bits: int) -> int:
    """Count the bytes that `n` integers of `bits` bits occupy: ⌈n·b/8⌉.

    Examples
    --------
    >>> size(10, bits=3)
    4
    """
    return (n * bits + 7) // 8


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack unsigned integers into ``bits`` bits each.

    Parameters
    ----------
    values : integer Tensor of any shape, n elements in row-major order
        Every value must lie in [0, 2^bits).
    bits : int
        Bits per value, 1 to 16.

    Returns
    -------
    uint8 Tensor (⌈n·bits/8⌉,)
        See the module's text for the order of the bits.

    Raises
    ------
    ValueError
        If a value does not fit, or `bits` or the type of `values` is wrong.

    Examples
    --------
    >>> pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0, 5]), bits=3)
    tensor([209,  88,  31,   5], dtype=torch.uint8)
    """
    flat = _checked(values, bits)
    n = flat.numel()
    m = n // 8
    packed = torch.empty(size(n, bits), dtype=torch.uint8, device=flat.device)
    lanes = flat[: 8 * m].view(8, m)
    planes = packed[: bits * m].view(bits, m)
    _pack_lanes(lanes, bits, out=planes)
    word = 0
    for j, value in enumerate(flat[8 * m :].tolist()):
        word |= value << (j * bits)
    tail = word.to_bytes(size(n - 8 * m, bits), "little")
    packed[bits * m :] = torch.tensor(list(tail), dtype=torch.uint8)
    return packed


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Undo `pack`.

    Parameters
    ----------
    packed : uint8 Tensor (⌈n·bits/8⌉,)
    bits : int
        Bits per value, 1 to 16.
    n : int
        Number of values.

    Returns
    -------
    Tensor (n,)
        uint8 for ``bits <= 8``, int32 above.

    Raises
    ------
    ValueError
        If the length of `packed` is not exactly ⌈n·bits/8⌉.

    Examples
    --------
    >>> unpack(torch.tensor([209, 88, 31, 5], dtype=torch.uint8), 3, n=9)
    tensor([1, 2, 3, 4, 5, 6, 7, 0, 5], dtype=torch.uint8)
    """
    _check_bits(bits)
    if n < 0 or packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(
            f"packed must be a uint8 vector and n >= 0, got {packed.dtype} "
            f"{tuple(packed.shape)} and n={n}"
        )
    if packed.numel() != size(n, bits):
        raise ValueError(
            f"packed has {packed.numel()} bytes, but n={n} values of "
            f"bits={bits} take {size(n, bits)}"
        )
    m = n // 8
    values = torch.empty(n, dtype=dtype(bits), device=packed.device)
    planes = packed[: bits * m].view(bits, m)
    lanes = values[: 8 * m].view(8, m)
    _unpack_planes(planes, bits, out=lanes)
    word = int.from_bytes(bytes(packed[bits * m :].tolist()), "little")
    mask = (1 << bits) - 1
    for j in range(n - 8 * m):
        values[8 * m + j] = (word >> (j * bits)) & mask
    return values


def dtype(bits: int) -> torch.dtype:
    """Return the type that holds unpacked values: uint8 up to 8 bits."""
    return torch.uint8 if bits <= 8 else torch.int32


def _pack_lanes(lanes: Tensor, bits: int, *, out: Tensor) -> None:
    """Write the byte planes (bits, m) of eight lanes (8, m) into `out`."""
    # the same pattern returns `g` times within a word: one operation for all
    g = math.gcd(bits, 8)
    lanes, out = lanes.unflatten(0, (g, -1)), out.unflatten(0, (g, -1))
    for k in range(bits // g):
        # the lanes that own some of the bits 8k ... 8k+7 of the pattern
        first, last = 8 * k // bits, (8 * k + 7) // bits
        shift = 8 * k - first * bits
        torch.bitwise_right_shift(lanes[:, first], shift, out=out[:, k])
        for j in range(first + 1, last + 1):
            # a left shift and an "or" in one pass: the bits are disjoint,
            # and what leaves the byte at the top wraps away
            out[:, k].add_(lanes[:, j], alpha=1 << (j * bits - 8 * k))


def _unpack_planes(planes: Tensor, bits: int, *, out: Tensor) -> None:
    """Write the eight lanes (8, m) of byte planes (bits, m) into `out`."""
    g = math.gcd(bits, 8)
    planes, out = planes.unflatten(0, (g, -1)), out.unflatten(0, (g, -1))
    for j in range(8 // g):
        first, last = j * bits // 8, (j * bits + bits - 1) // 8
        shift = j * bits - 8 * first
        torch.bitwise_right_shift(planes[:, first], shift, out=out[:, j])
        for k in range(first + 1, last + 1):
            out[:, j].add_(planes[:, k], alpha=1 << (8 * k - j * bits))
        out[:, j].bitwise_and_((1 << bits) - 1)


def _checked(values: Tensor, bits: int) -> Tensor:
    """Return `values` flat and in the type of `dtype`, or raise."""
    _check_bits(bits)
    kind = values.dtype
    if kind.is_floating_point or kind.is_complex:
        raise ValueError(f"values must be integers, got {kind}")
    flat = values.reshape(-1)
    if kind == torch.bool:
        return flat.to(dtype(bits))
    if flat.numel() and not (kind == torch.uint8 and bits >= 8):
        low, high = (int(v) for v in flat.aminmax())
        if low < 0 or high >> bits:
            raise ValueError(
                f"values must lie in [0, 2^{bits}), got {low} to {high}"
            )
    return flat.to(dtype(bits))


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, got {bits}")
