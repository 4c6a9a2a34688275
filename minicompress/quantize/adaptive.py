"""Up or down? Rounding that is learned, all weights of a layer at once."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import codes, obs
from .rounding import check, columns, nearest, real

ZETA, GAMMA = 1.1, -0.1  # h reaches 0 and 1 where V is finite


def adaround(
    W: Tensor,
    H: Tensor,
    grid: codes.Code,
    *,
    steps: int = 1000,
    lr: float = 0.05,
    weight: float = 0.3,
    generator: torch.Generator | None = None,
) -> codes.Code:
    """Learn for each weight whether it is rounded up or down.

    h = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1) says how far up each
    weight goes.  Gradients lower the loss of the layer, and a term that
    becomes sharper from step to step drives every h to 0 or 1::

        loss + weight * sum(1 - ‖2 h - 1‖^beta),      beta from 20 to 2

    Parameters
    ----------
    W
        (out, in) weights.
    H
        (in, in) second moments of the inputs.
    grid
        a code as from `min_max(W)`.
    steps
        of Adam; the first fifth without the second term.
    lr
        step of Adam.
    weight
        of the second term, for a loss in units of scale^2 and of the mean
        diagonal of H.
    generator
        of a little noise on V at the start, without which equal weights
        would stay equal; by default always the same noise.

    Returns
    -------
    Code
        As from `nearest`.  A row for which nothing better was found is
        rounded to nearest.

    References
    ----------
    Nagel et al., Up or Down? Adaptive Rounding for Post-Training
    Quantization, arXiv:2004.10568, equations 21 to 24.

    Examples
    --------
    >>> from minicompress.quantize import min_max, nearest
    >>> grid = min_max(torch.tensor([[0.0, 3.0]]), bits=2)
    >>> W, H = torch.tensor([[0.4, 0.4]]), torch.tensor([[1, 0.9], [0.9, 1]])
    >>> nearest(W, grid).decode()
    tensor([[0., 0.]])
    >>> int(adaround(W, H, grid).decode().sum())  # one of them goes up
    1
    """
    check(W, H, grid)
    if steps < 1 or not lr > 0:
        raise ValueError(f"steps and lr must be positive, got {steps=}, {lr=}")
    scale, zero, top = columns(W, grid)
    V = real(W)
    A = H.to(V) / H.diagonal().mean().clamp(min=torch.finfo(V.dtype).tiny)
    down = torch.floor(V / scale)
    # a row is a problem of its own, whatever the unit of its loss
    unit = scale.mean(1, keepdim=True)

    def soft(h):
        return scale * ((down + h + zero).clamp(0, top) - zero)

    def loss(h, beta):
        D = (V - soft(h)) / unit
        layer = ((D @ A) * D).sum()
        if beta is None:
            return layer
        return layer + weight * (1 - (2 * h - 1).abs().pow(beta)).sum()

    h = _learn(V / scale - down, loss, steps, lr, generator)
    plain = nearest(W, grid).decode().to(V)
    found = soft((h >= 0.5).to(V))
    better = obs.layer_loss(V, found, A) < obs.layer_loss(V, plain, A)
    return nearest(torch.where(better[:, None], found, plain), grid)


def _learn(
    start: Tensor,
    loss: Callable[[Tensor, float | None], Tensor],
    steps: int,
    lr: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Lower a loss of h, from a start between 0 and 1."""
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    noise = torch.randn(
        start.shape,
        generator=generator,
        dtype=start.dtype,
        device=generator.device,  # a seed gives the same wherever W is
    ).to(start.device)
    V = torch.logit((start - GAMMA) / (ZETA - GAMMA)) + 0.01 * noise

    def h_of(V):
        return (torch.sigmoid(V) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    with torch.enable_grad():
        V.requires_grad_()
        adam = torch.optim.Adam([V], lr=lr)
        for step in range(steps):
            left = (steps - step) / (0.8 * steps)  # 1 when beta starts
            beta = None if left > 1 else 2 + 18 * left
            (V.grad,) = torch.autograd.grad(loss(h_of(V), beta), V)
            adam.step()
    return h_of(V.detach())
