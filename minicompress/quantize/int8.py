"""Products of int8 matrices that really run in int8.

PyTorch has such kernels, but which ones work depends on its version and on
the processor, and most are not documented.  So each is tried before it is
used, against sums that are computed exactly.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .grids import min_max

Multiply = Callable[[Tensor], Tensor]


def reference(q: Tensor) -> Multiply:
    """Prepare the exact product with int8 weights q (out, in), without int8.

    float64 adds up to 2^39 products of int8 exactly.

    Examples
    --------
    >>> q = torch.tensor([[100, 100]], dtype=torch.int8)
    >>> reference(q)(torch.tensor([[100, 100]], dtype=torch.int8))
    tensor([[20000.]])
    """
    W = q.double()
    return lambda x: (x.double() @ W.T).float()


def int_mm(q: Tensor) -> Multiply:
    """Prepare `torch._int_mm`: int8 times int8 to int32."""
    if q.shape[1] == 1:  # there it returns zeros (torch 2.13)
        return reference(q)
    return lambda x: torch._int_mm(x, q.T).float()


def onednn(q: Tensor) -> Multiply:
    """Prepare oneDNN's linear layer, in the layout that its kernel likes.

    Its inputs are unsigned: 128 more, and 128 is told to be their zero.
    """
    ops = torch.ops.onednn
    packed = ops.qlinear_prepack(q, None)
    ones = torch.ones(len(q))
    zeros = torch.zeros(len(q), dtype=torch.int32)

    def multiply(x: Tensor) -> Tensor:
        u = x.view(torch.uint8) ^ 128  # x + 128
        return ops.qlinear_pointwise(
            u, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip

    return multiply


@functools.cache
def kernels() -> dict[str, Callable[[Tensor], Multiply]]:
    """Try the int8 kernels on this machine, the fastest first.

    Returns
    -------
    {name: prepare}.  ``prepare(q)`` takes weights, int8 (out, in), and gives
    a function from int8 (samples, in) to (samples, out): the exact int32
    sums, turned into float32.  "reference" is always among them.

    Examples
    --------
    >>> "reference" in kernels()
    True
    """
    g = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (32, 2048), generator=g).to(torch.int8)
    x = torch.randint(-127, 128, (17, 2048), generator=g).to(torch.int8)
    q[0], x[0] = 127, 127  # a sum above 2^24
    good = {}
    for prepare in (onednn, int_mm, reference):
        try:
            right = all(
                torch.equal(prepare(q)(x[:n]), reference(q)(x[:n]))
                for n in (1, 17)
            )
        except (AttributeError, NotImplementedError, RuntimeError):
            continue
        if right:
            good[prepare.__name__] = prepare
    return good


class Int8Linear(nn.Module):
    """A linear layer that multiplies in int8, its inputs rounded as they come.

    Weights have a scale for each row, inputs one for each vector.  This is
    for running, not for storing: the kernel keeps the weights in a layout of
    its own.

    Parameters
    ----------
    layer
        an nn.Linear in float32; left as it is.
    kernel
        a key of `kernels()`; the fastest if left out.

    Raises
    ------
    ValueError
        If this machine has no such kernel.

    References
    ----------
    Dettmers et al., LLM.int8(), arXiv:2208.07339, equation 7 (vector-wise).

    Examples
    --------
    >>> layer = nn.Linear(64, 32)
    >>> x = torch.randn(2, 64)
    >>> bool((Int8Linear(layer)(x) - layer(x)).abs().max() < 0.1)
    True
    """

    def __init__(self, layer: nn.Linear, kernel: str | None = None):
        super().__init__()
        found = kernels()
        kernel = next(iter(found)) if kernel is None else kernel
        if kernel not in found:
            raise ValueError(f"kernel: no {kernel!r} here, only {list(found)}")
        code = min_max(layer.weight, bits=8, symmetric=True)
        q = (code.q.values.short() - code.zero).to(torch.int8)
        self.multiply = found[kernel](q)
        self.scale = code.scale[:, 0]
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        rows = x.flatten(0, -2) if x.ndim > 1 else x[None]
        step = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        q = torch.round(rows / step).to(torch.int8)
        y = self.multiply(q) * (step * self.scale)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], -1)
