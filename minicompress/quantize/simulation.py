"""Rounding that training can pass through: fake quantization."""

import torch
from torch import Tensor


def fake(
    x: Tensor, scale: Tensor | float, zero: Tensor | int, *, bits: int
) -> Tensor:
    """Round to a grid, and let the gradient of what is not clipped through.

    The value is that of an integer of the grid; the number stays floating
    point, hence the name::

        q = clip(round(x / scale) + zero, 0, 2^b - 1)
        y = scale (q - zero),    dy/dx = 1 where q was not clipped, else 0

    Parameters
    ----------
    x
        any shape, floating point.
    scale, zero
        step of the grid, and the whole number that stands for 0; broadcast
        against x.  They get no gradient.
    bits
        of an integer, 1 to 16.

    Returns
    -------
    of the shape and the type of x.

    Raises
    ------
    ValueError
        If `bits` is out of range or x is not floating point.

    References
    ----------
    Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, arXiv:1712.05877, equation 12.
    Bengio et al., Estimating or Propagating Gradients Through Stochastic
    Neurons, arXiv:1308.3432, section 4.

    Examples
    --------
    >>> x = torch.tensor([-0.3, 0.3, 2.0], requires_grad=True)
    >>> y = fake(x, 0.25, 0, bits=2)  # the grid is 0, 0.25, 0.5, 0.75
    >>> y.sum().backward()
    >>> y.detach(), x.grad
    (tensor([0.0000, 0.2500, 0.7500]), tensor([0., 1., 0.]))
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, got {bits}")
    if not x.is_floating_point():
        raise ValueError(
            f"x {tuple(x.shape)} must be floating point, got {x.dtype}"
        )
    work = torch.promote_types(x.dtype, torch.float32)
    q = torch.round(x.detach().to(work) / scale) + zero
    kept = q.clamp(0, 2**bits - 1)
    y = (scale * (kept - zero)).to(x.dtype)
    passed = torch.where(q == kept, x, x.detach())
    return y.detach() + (passed - passed.detach())  # exactly y
