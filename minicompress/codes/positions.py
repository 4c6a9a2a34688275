"""Codes of sparse tensors: which weights there are, and where."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .numbers import Ints
from .tree import Code, brief, need, need_array, need_shape, shape, value


@dataclass(frozen=True, eq=False, repr=False)
class Sparse(Code):
    """`values` where `mask` is True, in row-major order, and 0 elsewhere.

    Parameters
    ----------
    mask : Tensor or Code
        Booleans (or 0/1 integers), as many as the result has weights.
    values : Tensor or Code
        (kept,), one for each True.
    shape : tuple of int
        Shape of the result.
    """

    mask: Tensor | Code
    values: Tensor | Code
    shape: tuple[int, ...]

    def __post_init__(self):
        need_array("Sparse", mask=self.mask, values=self.values)
        need_shape("Sparse", self.shape)
        need(
            math.prod(shape(self.mask)) == math.prod(self.shape),
            f"Sparse: mask {shape(self.mask)} does not cover {self.shape}",
        )
        need(
            len(shape(self.values)) == 1
            and shape(self.values)[0] <= math.prod(self.shape),
            f"Sparse: values {shape(self.values)} must be one-dimensional "
            f"and fit into {self.shape}",
        )

    def decode(self):
        mask, values = value(self.mask).bool().reshape(-1), value(self.values)
        kept = int(mask.sum())
        need(
            kept == len(values),
            f"Sparse: mask keeps {kept} weights, values holds {len(values)}",
        )
        out = values.new_zeros(mask.numel())
        out[mask] = values
        return out.reshape(self.shape)


@dataclass(frozen=True, eq=False, repr=False)
class Gaps(Code):
    """A flat mask as run lengths, the relative index of Deep Compression.

    A step ``s < 2**bits - 1`` stands for s zeros and then a kept weight; the
    largest step stands for ``2**bits - 1`` zeros and no weight.

    Parameters
    ----------
    steps : Code
        (steps,) integers of ``steps.bits`` bits.
    numel : int
        Length of the mask; zeros after the last weight are implied.

    References
    ----------
    Han, Mao, Dally, "Deep Compression", arXiv:1510.00149, section 2.  There
    the filler carries a stored zero; here it carries nothing.
    """

    steps: Code
    numel: int

    def __post_init__(self):
        need(
            isinstance(self.steps, Code) and hasattr(self.steps, "bits"),
            f"Gaps: steps must be an integer code, got {brief(self.steps)}",
        )
        need_shape("Gaps", (self.numel,))
        need(
            len(self.steps.shape) == 1 and self.steps.shape[0] <= self.numel,
            f"Gaps: {self.steps.shape} steps do not fit in {self.numel} places",
        )

    @property
    def shape(self):
        return (self.numel,)

    def decode(self):
        steps = self.steps.decode().long()
        top = (1 << self.steps.bits) - 1
        ends = (steps + (steps < top)).cumsum(0)  # places used so far
        need(
            not len(ends) or int(ends[-1]) <= self.numel,
            f"Gaps: the steps run past the end of {self.numel} places",
        )
        mask = torch.zeros(self.numel, dtype=torch.bool)
        mask[ends[steps < top] - 1] = True
        return mask


def sparse(w: Tensor, mask: Tensor) -> Sparse:
    """Keep the weights of `w` where `mask` is True.

    Parameters
    ----------
    w : Tensor
        Any shape.
    mask : Tensor
        Booleans of the same shape, True = keep.

    Examples
    --------
    >>> w = torch.tensor([[0.5, 2.0], [-3.0, 0.1]])
    >>> s = sparse(w, w.abs() > 1)
    >>> s
    Sparse(bool[2, 2], float32[2], (2, 2))
    >>> s.decode().tolist()
    [[0.0, 2.0], [-3.0, 0.0]]
    """
    if mask.dtype != torch.bool or mask.shape != w.shape:
        raise ValueError(
            f"mask must be bool of shape {tuple(w.shape)}, got {brief(mask)}"
        )
    return Sparse(mask, w[mask], tuple(w.shape))


def gaps(mask: Tensor, *, bits: int) -> Gaps:
    """Write a mask as the gaps between its kept weights.

    Parameters
    ----------
    mask : Tensor
        Booleans, any shape; read in row-major order.
    bits : int
        Bits of one step, 1 to 16; longer gaps take several steps.

    References
    ----------
    Han, Mao, Dally, "Deep Compression", arXiv:1510.00149, figure 2.

    Examples
    --------
    >>> gaps(torch.tensor([0, 0, 1, 0, 0, 0, 0, 1]).bool(), bits=2).steps.values
    tensor([2, 3, 1], dtype=torch.uint8)
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, got {brief(mask)}")
    places = mask.reshape(-1).nonzero().squeeze(1).cpu()
    before = torch.cat([torch.tensor([-1]), places[:-1]])
    zeros = places - before - 1 if len(places) else places
    top = (1 << bits) - 1
    skips = zeros // top
    steps = torch.full((int(skips.sum()) + len(zeros),), top)
    steps[(skips + 1).cumsum(0) - 1] = zeros % top
    return Gaps(Ints(steps, bits), mask.numel())
