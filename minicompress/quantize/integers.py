"""Inference without a single floating-point number.

A product of two grids is again a grid: the sums are integers, and all that
is left is one factor between the grid of a layer's sums and that of its
output.  That factor becomes an integer and a shift.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.vision import as_images


def zero_point_product(
    qx: Tensor, zx: int, qw: Tensor, zw: Tensor | int
) -> Tensor:
    """Multiply integers whose zeros are not at 0, with one plain product.

    The sum over (q_x - z_x) (q_w - z_w) has four parts, and only the first
    depends on both::

        sum q_x q_w - z_w sum q_x - z_x sum q_w + n z_x z_w

    Parameters
    ----------
    qx
        (samples, n) integers.
    zx
        their zero.
    qw
        (out, n) integers.
    zw
        their zeros, one for all or (out,).  With 0 the second part, which
        must be summed for every sample, is gone: why weights are symmetric.

    Returns
    -------
    (samples, out), int32.

    References
    ----------
    Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, arXiv:1712.05877, equation 7.

    Examples
    --------
    >>> zero_point_product(torch.tensor([[5, 7]]), 5, torch.tensor([[9, 4]]), 3)
    tensor([[2]], dtype=torch.int32)
    """
    qx, qw = qx.int(), qw.int()
    zw = torch.as_tensor(zw, dtype=torch.int32)
    n = qx.shape[-1]
    product = qx @ qw.T
    rows = qx.sum(-1, keepdim=True, dtype=torch.int32)  # (samples, 1)
    columns = qw.sum(-1, dtype=torch.int32)  # (out,)
    return product - zw * rows - zx * columns + n * zx * zw


def safe_terms(a: int = 127, b: int = 127) -> int:
    """Count how many products of integers up to a and b fit into int32.

    Examples
    --------
    >>> safe_terms(), safe_terms(255, 127)
    (133144, 66311)
    """
    return (2**31 - 1) // (a * b)


def fixed_point(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Write positive factors as an integer times a power of two.

    Parameters
    ----------
    factor
        any shape, M = M_0 2^-shift.

    Returns
    -------
    M_0 : int32, from 2^30 to 2^31 - 1.
    shift : int32, 1 to 62.

    Raises
    ------
    ValueError
        If a factor is not from 2^-31 to 2^29.

    References
    ----------
    Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, arXiv:1712.05877, equation 6.

    Examples
    --------
    >>> fixed_point(torch.tensor(0.75))
    (tensor(1610612736, dtype=torch.int32), tensor(31, dtype=torch.int32))
    """
    m, e = factor.double().frexp()  # m from 1/2 to 1
    M0 = torch.round(m * 2.0**31).long()
    full = M0 == 2**31
    M0, shift = torch.where(full, 2**30, M0), 31 - e - full.int()
    if not ((factor > 0) & (shift >= 1) & (shift <= 62)).all():
        raise ValueError(
            "factor must be from 2^-31 to 2^29, got "
            f"{float(factor.min()):.3g} to {float(factor.max()):.3g}"
        )
    return M0.int(), shift.int()


def rescale(acc: Tensor, M0: Tensor, shift: Tensor) -> Tensor:
    """Multiply integers by M_0 2^-shift and round, in integers only.

    Parameters
    ----------
    acc
        int32 sums, any shape.
    M0, shift
        from `fixed_point`; broadcast against acc.

    Returns
    -------
    int64; what lies halfway is rounded up.

    Examples
    --------
    >>> rescale(torch.tensor([10, 11, -10]), *fixed_point(torch.tensor(0.25)))
    tensor([ 3,  3, -2])
    """
    half = torch.ones_like(shift, dtype=torch.int64) << (shift - 1)
    return (acc.long() * M0 + half) >> shift


@dataclass(frozen=True, eq=False, repr=False)
class Product:
    """A linear layer or a convolution on integers, with ReLU if it has one.

    Parameters
    ----------
    weight
        int8, (out, in) or (out, in, height, width), symmetric per row.
    bias
        (out,) int32, in units of scale_x scale_w.
    zero_in, zero_out
        the integers that stand for 0 before and after.
    M0, shift
        (out,) int32, the factor from the grid of the sums to the output's.
    least
        smallest output: `zero_out` with a ReLU, else 0.
    stride, padding
        of a convolution.

    References
    ----------
    Jacob et al., arXiv:1712.05877, section 2.4 (a fused layer).
    """

    weight: Tensor
    bias: Tensor
    zero_in: int
    zero_out: int
    M0: Tensor
    shift: Tensor
    least: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def __repr__(self) -> str:
        relu = ", relu" if self.least == self.zero_out else ""
        return f"Product({tuple(self.weight.shape)}{relu})"

    def sums(self, q: Tensor) -> Tensor:
        """Accumulate (q - zero_in) times weights plus bias, in int32."""
        x, W = q.int() - self.zero_in, self.weight.int()
        if W.ndim == 2:
            return x @ W.T + self.bias
        # what pads is 0 by now, that is, zero_in on the input's grid
        acc = F.conv2d(x, W, None, self.stride, self.padding)
        return acc + self.bias[:, None, None]

    def __call__(self, q: Tensor) -> Tensor:
        """Map uint8 to uint8, (N, in) or (N, channels, height, width)."""
        shape = (-1, *[1] * (self.weight.ndim - 2))
        M0, shift = self.M0.reshape(shape), self.shift.reshape(shape)
        y = self.zero_out + rescale(self.sums(q), M0, shift)
        return y.clamp(self.least, 255).to(torch.uint8)

    def simulate(self, x: Tensor) -> Tensor:
        """Do the same in float64, on values that are on the grid."""
        W = self.weight.double()
        x = x - self.zero_in
        if W.ndim == 2:
            acc = x @ W.T + self.bias
        else:
            acc = F.conv2d(x, W, self.bias.double(), self.stride, self.padding)
        M = torch.ldexp(self.M0.double(), -self.shift)
        M = M.reshape(-1, *[1] * (W.ndim - 2))
        y = self.zero_out + torch.floor(acc * M + 0.5)
        return y.clamp(self.least, 255)


@dataclass(frozen=True, eq=False)
class MaxPool:
    """The largest of size x size integers: order is the same on a grid."""

    size: int

    def __call__(self, q: Tensor) -> Tensor:
        """Map (N, channels, height, width), in the type of q."""
        return F.max_pool2d(q.int(), self.size).to(q.dtype)

    def simulate(self, x: Tensor) -> Tensor:
        """Do the same in float64."""
        return F.max_pool2d(x, self.size)


@dataclass(frozen=True, eq=False)
class SumPositions:
    """The sum over all positions; dividing is left to the next factor."""

    def __call__(self, q: Tensor) -> Tensor:
        """Map (N, channels, height, width) to (N, channels, 1, 1), int32."""
        return q.sum((2, 3), keepdim=True, dtype=torch.int32)

    def simulate(self, x: Tensor) -> Tensor:
        """Do the same in float64."""
        return x.sum((2, 3), keepdim=True)


@dataclass(frozen=True, eq=False)
class Flatten:
    """One row of features for each sample."""

    def __call__(self, q: Tensor) -> Tensor:
        """Map (N, ...) to (N, features)."""
        return q.flatten(1)

    simulate = __call__


@dataclass(frozen=True, eq=False, repr=False)
class IntegerNet:
    """A network of integers, and the two grids at its ends.

    Parameters
    ----------
    steps
        applied one after the other.
    scale_in, zero_in
        grid of the uint8 input.
    scale_out, zero_out
        grid of the uint8 output.
    images
        whether inputs become (N, channels, height, width) first.
    """

    steps: tuple
    scale_in: float
    zero_in: int
    scale_out: float
    zero_out: int
    images: bool = False

    def __repr__(self) -> str:
        return f"IntegerNet({', '.join(map(str, self.steps))})"

    def encode(self, x: Tensor) -> Tensor:
        """Round an input to uint8, the only step that sees real numbers."""
        x = as_images(x) if self.images else x
        q = torch.round(x.double() / self.scale_in) + self.zero_in
        return q.clamp(0, 255).to(torch.uint8)

    def forward(self, q: Tensor) -> Tensor:
        """Map uint8 inputs to uint8 outputs with integers only."""
        for step in self.steps:
            q = step(q)
        return q

    def simulate(self, q: Tensor) -> Tensor:
        """Do the same in float64: equal to the last integer.

        Exactly so while sums are below 2^22, times 31 bits of the factor.
        """
        x = q.double()
        for step in self.steps:
            x = step.simulate(x)
        return x.to(torch.uint8)

    def __call__(self, x: Tensor) -> Tensor:
        """Map real inputs to real outputs, integers in between."""
        return self.scale_out * (
            self.forward(self.encode(x)).float() - self.zero_out
        )
