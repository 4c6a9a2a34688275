"""Bit packing against torchao and against numpy's packbits.

Widths are 1 to 7: eight bits are bytes already.  The route through packbits
has no detour at one bit, where it is a single native call that runs three to
four times faster than ours; numpy is therefore compared from two bits on.
"""

import numpy as np
import torch

from minicompress import bits

from .harness import Missing, peer, skipped, speed_row

N = 1 << 24  # values


def by_packbits(values: np.ndarray, width: int) -> np.ndarray:
    """Pack with numpy alone: to one byte per bit, and back to bytes."""
    line = np.unpackbits(
        values[:, None], axis=1, count=width, bitorder="little"
    )
    return np.packbits(line, bitorder="little")


def by_unpackbits(packed: np.ndarray, width: int) -> np.ndarray:
    line = np.unpackbits(packed, bitorder="little")
    return np.packbits(line.reshape(-1, width), axis=1, bitorder="little")[:, 0]


def rows():
    g = torch.Generator().manual_seed(0)
    for width in range(1, 8):
        x = torch.randint(0, 1 << width, (N,), generator=g).to(torch.uint8)
        packed = bits.pack(x, width)
        assert packed.numel() == N * width // 8
        assert torch.equal(bits.unpack(packed, width, N), x)
        yield from torchao_rows(x, packed, width)
        if width > 1:
            yield from numpy_rows(x[: N // 8], width)


def torchao_rows(x: torch.Tensor, packed: torch.Tensor, width: int):
    what = f"{{}} {N:,} values of {width} bits"
    goal = {"unit": "values", "least": 1.5, "name": "torchao"}
    try:
        ao = peer("torchao.prototype.dtypes.uintx.bitpacking")
    except Missing as error:
        for verb in ("pack", "unpack"):
            yield skipped(what.format(verb), ">= 1.5x torchao", error)
        return
    # its variant for the CPU, which is its faster one here
    theirs = ao.pack_cpu(x, width)
    assert torch.equal(ao.unpack_cpu(theirs, width), x)
    yield speed_row(
        what.format("pack"),
        lambda: bits.pack(x, width),
        lambda: ao.pack_cpu(x, width),
        n=N,
        **goal,
    )
    yield speed_row(
        what.format("unpack"),
        lambda: bits.unpack(packed, width, N),
        lambda: ao.unpack_cpu(theirs, width),
        n=N,
        **goal,
    )


def numpy_rows(x: torch.Tensor, width: int):
    n, array, packed = x.numel(), x.numpy(), bits.pack(x, width)
    theirs = by_packbits(array, width)
    assert (by_unpackbits(theirs, width) == array).all()
    what = f"{{}} {n:,} values of {width} bits"
    goal = {"unit": "values", "least": 10, "name": "numpy packbits"}
    yield speed_row(
        what.format("pack"),
        lambda: bits.pack(x, width),
        lambda: by_packbits(array, width),
        n=n,
        **goal,
    )
    yield speed_row(
        what.format("unpack"),
        lambda: bits.unpack(packed, width, n),
        lambda: by_unpackbits(theirs, width),
        n=n,
        **goal,
    )
