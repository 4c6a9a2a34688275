"""Clip to an interval, round to its 2^k levels, and train through both.

DoReFa-Net fixes the interval, [-1, 1] for weights and [0, 1] for
activations, and squeezes the numbers into it; PACT learns its upper end.
"""

import torch
from torch import Tensor

from .. import codes
from ..through import straight
from .grids import a_step
from .training import check_bits


def dorefa_weights(w: Tensor, *, bits: int) -> Tensor:
    """Squeeze weights into [-1, 1] by tanh and round them to 2^k levels.

    With quantize_k(r) = round((2^k - 1) r) / (2^k - 1) for r in [0, 1]::

        w' = 2 quantize_k(tanh w / (2 max ‖tanh w‖) + 1/2) - 1

    for k > 1, and sign(w) E‖w‖ for one bit.  There is no level 0, and no
    scale: what follows has to undo the new size of the weights.

    Parameters
    ----------
    w
        weights, any shape.
    bits
        k, 1 to 16.

    Returns
    -------
    as w; the gradient passes the rounding as if it were not there, and tanh
    as it is.  After the training `dorefa_code` gives the code.

    References
    ----------
    Zhou et al., DoReFa-Net, arXiv:1606.06160, section 2.3.

    Examples
    --------
    >>> dorefa_weights(torch.tensor([-2.0, -0.3, 0.1, 9.0]), bits=2)
    tensor([-1.0000, -0.3333,  0.3333,  1.0000])
    """
    check_bits(bits, 1)
    if bits == 1:
        size = w.detach().abs().mean()
        return straight(w, torch.where(w.detach() < 0, -size, size))
    r = _squeezed(w)
    q = torch.round((2**bits - 1) * r.detach())
    return straight(2 * r, q * (2 / (2**bits - 1)) - 1)


def dorefa_code(w: Tensor, *, bits: int) -> codes.Code:
    """Encode a latent weight that was trained through `dorefa_weights`.

    Parameters
    ----------
    w
        the latent weight: tanh would change a rounded one again.
    bits
        as in `dorefa_weights`.
    """
    check_bits(bits, 1)
    w = w.detach()
    if bits == 1:
        signs = codes.Ints((w >= 0).int(), 1)
        signs = codes.Codebook(signs, w.new_tensor([-1.0, 1.0]))
        return codes.Scaled(signs, w.abs().mean())
    q = codes.Ints(torch.round((2**bits - 1) * _squeezed(w)).int(), bits)
    # the middle lies between two levels, so it is no `zero` of a grid
    return codes.Sum(codes.Affine(q, 2 / (2**bits - 1)), w.new_tensor(-1.0))


def dorefa_activations(a: Tensor, *, bits: int) -> Tensor:
    """Clip activations to [0, 1] and round them to 2^k levels.

    Parameters
    ----------
    a
        any shape.
    bits
        k, 1 to 16.

    Returns
    -------
    as a; the gradient is 1 from 0 to 1 and 0 outside.

    References
    ----------
    Zhou et al., DoReFa-Net, arXiv:1606.06160, section 2.4.

    Examples
    --------
    >>> dorefa_activations(torch.tensor([-0.2, 0.3, 0.6, 4.0]), bits=2)
    tensor([0.0000, 0.3333, 0.6667, 1.0000])
    """
    check_bits(bits, 1)
    r = a.clamp(0, 1)
    return straight(r, torch.round((2**bits - 1) * r) / (2**bits - 1))


def dorefa_gradient(
    d: Tensor, *, bits: int, generator: torch.Generator | None = None
) -> Tensor:
    """Round a gradient at random, so that it stays right on average.

    With m = max ‖d‖ of a sample and noise N from -1/2 to 1/2 of a level::

        d' = 2 m (quantize_k(d / (2 m) + 1/2 + N) - 1/2)

    Parameters
    ----------
    d
        gradients (samples, ...) with respect to activations.
    bits
        k, 1 to 16.
    generator
        of the noise.

    Returns
    -------
    as d; its expectation is d.

    References
    ----------
    Zhou et al., DoReFa-Net, arXiv:1606.06160, section 2.5.

    Examples
    --------
    >>> x = torch.ones(1, 2, requires_grad=True)
    >>> y = 3 * x
    >>> _ = y.register_hook(lambda d: dorefa_gradient(d, bits=1))
    >>> (y * torch.tensor([[4.0, -4.0]])).sum().backward()
    >>> x.grad
    tensor([[ 12., -12.]])
    """
    check_bits(bits, 1)
    levels = 2**bits - 1
    m = d.abs().amax(tuple(range(1, d.ndim)) or (0,), keepdim=True)
    noise = torch.rand(
        d.shape, generator=generator, dtype=d.dtype, device=d.device
    )
    r = d / (2 * a_step(m)) + 0.5 + (noise - 0.5) / levels
    q = torch.round(levels * r).clamp(0, levels)
    return 2 * m * (q / levels - 0.5)


def pact(x: Tensor, alpha: Tensor, *, bits: int) -> Tensor:
    """Clip activations at a learned height, then round them.

    y = (‖x‖ - ‖x - α‖ + α) / 2, that is x clipped to [0, α], is rounded to
    2^k levels; dy/dα = 1 where x >= α.  A penalty on α² has to pull it down,
    for the loss alone rarely does.

    Parameters
    ----------
    x
        inputs of a layer, any shape; the clipping includes a ReLU.
    alpha
        where to clip, an nn.Parameter above 0; broadcasts against x.
    bits
        k, 1 to 16.

    Returns
    -------
    as x.

    References
    ----------
    Choi et al., PACT: Parameterized Clipping Activation for Quantized
    Neural Networks, arXiv:1805.06085, equations 1 to 3.

    Examples
    --------
    >>> x, alpha = torch.tensor([-1.0, 0.7, 2.0]), torch.tensor(1.5)
    >>> pact(x, alpha, bits=2)
    tensor([0.0000, 0.5000, 1.5000])
    """
    check_bits(bits, 1)
    y = torch.where(x >= alpha, alpha, x.clamp(min=0))
    step = alpha.detach() / (2**bits - 1)
    return straight(y, step * torch.round(y.detach() / step))


def _squeezed(w: Tensor) -> Tensor:
    t = w.tanh()
    top = t.abs().amax().clamp(min=torch.finfo(w.dtype).tiny)
    return t / (2 * top) + 0.5
