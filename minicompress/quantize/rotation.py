"""Rotate the inputs of a layer, so that no channel stands out.

An orthogonal matrix Q changes nothing, x W^T = (x Q) (W Q)^T, but spreads a
large entry over all channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import codes
from ..codes import Code, hadamard


def turn(x: Tensor, signs: Tensor) -> Tensor:
    """Rotate the last axis: random signs, then a Hadamard matrix.

    A single large entry is spread over all of its block, so that the largest
    is closer to the average.  x W^T = turn(x) turn(W)^T.

    Parameters
    ----------
    x
        (..., n), inputs or weights.
    signs
        (d,) of +1 and -1, d a power of two that divides n: each block of d
        neighbors is rotated.

    Returns
    -------
    as x.

    References
    ----------
    Chee et al., QuIP, arXiv:2307.13304, section 4; Ashkboos et al., QuaRot,
    arXiv:2404.00456, section 3.

    Examples
    --------
    >>> turn(torch.tensor([[8.0, 0.0, 0.0, 0.0]]), torch.ones(4))
    tensor([[4., 4., 4., 4.]])
    """
    d = len(signs)
    if x.shape[-1] % d:
        raise ValueError(f"signs ({d},) do not divide x {tuple(x.shape)}")
    blocks = x.unflatten(-1, (-1, d)) * signs.to(x)
    return hadamard(blocks).flatten(-2)


def random_signs(n: int, *, seed: int = 0) -> Tensor:
    """Draw the signs for n inputs: as many as the largest block has.

    Parameters
    ----------
    n
        inputs; the block is the largest power of two that divides it.
    seed
        decides the signs.

    Returns
    -------
    (d,) of +1 and -1.

    Examples
    --------
    >>> random_signs(96).shape
    torch.Size([32])
    """
    d = n & -n
    if n < 1 or d == 1:
        raise ValueError(f"n: no power of two above 1 divides {n}")
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (d,), generator=g) * 2.0 - 1.0


def rotate(W: Tensor, rule: Callable[[Tensor], Code], *, seed: int = 0) -> Code:
    """Round weights after a rotation of their inputs.

    Parameters
    ----------
    W
        (out, in) weights.  If `in` is no power of two, blocks of the largest
        one that divides it are rotated.
    rule
        chooses the grid and rounds; it sees ``turn(W, random_signs(in))``.
    seed
        decides the signs, which the file keeps, one bit each.

    Returns
    -------
    Code of shape (out, in).  It decodes to weights for ordinary inputs; a
    layer that keeps the integers must `turn` its inputs instead.

    Raises
    ------
    ValueError
        If `in` is odd.

    References
    ----------
    Ashkboos et al., QuaRot, arXiv:2404.00456.

    Examples
    --------
    >>> from minicompress import quantize
    >>> W = torch.tensor([[8.0, 0.0, 0.0, 0.0]])
    >>> rotate(W, lambda W: quantize.min_max(W, bits=2)).decode()[0, 0]
    tensor(8.)
    """
    if W.ndim != 2:
        raise ValueError(f"W must be (out, in), got {tuple(W.shape)}")
    signs = random_signs(W.shape[1], seed=seed).to(W.device)
    code = rule(turn(W.detach(), signs))
    bits = codes.Ints((signs > 0).int(), 1)
    if len(signs) == W.shape[1]:
        return codes.Rotated(code, bits)
    blocks = codes.View(code, (W.numel() // len(signs), len(signs)))
    return codes.View(codes.Rotated(blocks, bits), tuple(W.shape))


def incoherence(W: Tensor) -> float:
    """Measure how far the largest entry is above the average.

    Parameters
    ----------
    W
        any shape.

    Returns
    -------
    mu = max ‖W‖ / rms(W): 1 if all are as large, sqrt(numel) if all but
    one are 0.

    References
    ----------
    Chee et al., QuIP, arXiv:2307.13304, definition 1.

    Examples
    --------
    >>> incoherence(torch.tensor([[8.0, 0.0, 0.0, 0.0]]))
    2.0
    """
    W = W.detach().double()
    return float(W.abs().max() / W.square().mean().sqrt())
