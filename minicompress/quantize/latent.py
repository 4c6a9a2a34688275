"""Train with one or two bits: latent weights behind their signs.

A sign has derivative 0 nearly everywhere, so each method says what gradient
reaches the latent weight w instead.  All but `clip_latent` are tensor
operations, for `through.attach` and for many networks at once.

The value of each is exactly α T, not w + (α T - w), which may differ in the
last bit: what was trained is what a code can store.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from .. import codes
from .signs import (
    by_mean,
    by_sign,
    by_threshold,
    checked,
    regions,
    shared,
    sign,
)


def binary_connect(w: Tensor) -> Tensor:
    """Compute with sign(w), without a scale.

    The gradient reaches w unchanged from -1 to 1, and is 0 outside: there a
    larger w is not more positive.

    Parameters
    ----------
    w
        latent weights, any shape.

    Returns
    -------
    as w, -1 and 1.  After the training `distinct` stores it in one bit each.

    Notes
    -----
    The paper keeps w in -1...1: train with ``on_step=clip_latent``.  Without
    it, as in `train.fit_many`, a weight that a step carries outside stays
    there, with the sign it has.

    References
    ----------
    Courbariaux et al., BinaryConnect, arXiv:1511.00363, algorithm 1.
    Hubara et al., Binarized Neural Networks, arXiv:1602.02830, equation 4.

    Examples
    --------
    >>> w = torch.tensor([-0.3, 0.0, 2.0], requires_grad=True)
    >>> binary_connect(w).sum().backward()
    >>> w.grad
    tensor([1., 1., 0.])
    """
    return _passed(sign(w), w, (w.abs() <= 1).to(w.dtype))


def stochastic_sign(
    w: Tensor, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw 1 with probability (w + 1) / 2, clipped to 0...1, else -1.

    Its mean is w, for w from -1 to 1.  For training; for the test
    BinaryConnect uses the latent weight or its sign.

    Parameters
    ----------
    w
        latent weights, any shape.
    generator
        torch's own if None.

    Returns
    -------
    as w, -1 and 1; the gradient is that of `binary_connect`.

    References
    ----------
    Courbariaux et al., BinaryConnect, arXiv:1511.00363, equations 2 and 3.

    Examples
    --------
    >>> stochastic_sign(torch.tensor([-1.0, 1.0]))
    tensor([-1.,  1.])
    """
    u = torch.rand(w.shape, generator=generator, device=w.device, dtype=w.dtype)
    drawn = torch.where(2 * u - 1 < w, 1.0, -1.0).to(w.dtype)
    return _passed(drawn, w, (w.abs() <= 1).to(w.dtype))


@torch.no_grad()
def clip_latent(step: int, model: nn.Module, loss: float) -> None:
    """Clip all latent weights to -1...1: an ``on_step`` for `train.fit`.

    Parameters
    ----------
    step, model, loss
        as `train.fit` calls it, with the copy that is being trained.

    References
    ----------
    Courbariaux et al., BinaryConnect, arXiv:1511.00363, section 2.4.
    """
    for parts in model.modules():
        if isinstance(parts, ParametrizationList) and parts.is_tensor:
            parts.original.clamp_(-1, 1)


def xnor_weights(w: Tensor) -> Tensor:
    """Compute with α sign(w), α the mean size of each row.

    What reaches a latent weight is the gradient times 1/n + α 1[‖w‖ ≤ 1],
    with n weights in the row.  The true derivative of α would bring in the
    gradients of all n; the paper keeps a weight's own.

    Parameters
    ----------
    w
        latent weights, (out, ...).

    Returns
    -------
    as w.  `binary` gives the code, before the baking or after it.

    References
    ----------
    Rastegari et al., XNOR-Net, arXiv:1603.05279, section 3.1.

    Examples
    --------
    >>> w = torch.tensor([[-1.0, 3.0]], requires_grad=True)
    >>> xnor_weights(w).sum().backward()
    >>> w.grad
    tensor([[2.5000, 0.5000]])
    """
    rows, n = shared(w.detach(), "row")
    B, alpha = by_sign(rows, n)
    factor = 1 / n + alpha * (rows.abs() <= 1)
    return _passed(_scaled(B, alpha, w), w, factor.reshape(w.shape).to(w.dtype))


def sign_activation(x: Tensor) -> Tensor:
    """Compute sign(x), and let the gradient pass from -1 to 1.

    The gradient is that of the nearest function that has one, x clipped to
    -1...1; without the clip the signs do not train well.

    Parameters
    ----------
    x
        inputs of a binary layer, any shape, best after a norm.

    Returns
    -------
    as x, -1 and 1, with sign(0) = 1.

    References
    ----------
    Hubara et al., Binarized Neural Networks, arXiv:1602.02830, equation 4.

    Examples
    --------
    >>> sign_activation(torch.tensor([-0.3, 0.0, 2.0]))
    tensor([-1.,  1.,  1.])
    """
    return binary_connect(x)


def twn_weights(
    w: Tensor, *, factor: float = 0.7, each: str | int = "row"
) -> Tensor:
    """Compute with the ternary weights of `twn`; all of the gradient passes.

    Parameters
    ----------
    w
        latent weights, (out, ...).
    factor, each
        as for `twn`.

    Returns
    -------
    as w.  `twn` gives the code of w, and `ternary` that of what is baked.

    References
    ----------
    Li et al., Ternary Weight Networks, arXiv:1605.04711, section 2.

    Examples
    --------
    >>> twn_weights(torch.tensor([[-1.0, 0.5, 2.0, 3.0]]))
    tensor([[0.0000, 0.0000, 2.5000, 2.5000]])
    """
    rows, n = shared(w.detach(), each)
    wq = _scaled(*by_threshold(rows, n, factor), w, each)
    return _passed(wq, w)


def ttq(
    w: Tensor, positive: Tensor, negative: Tensor, threshold: float = 0.05
) -> Tensor:
    """Compute with -negative, 0 and positive, which are trained too.

    The gradient of `positive` is the sum of those where it stands, and
    likewise for -negative.  The latent weight gets the gradient times
    `positive`, 1 or `negative`, whichever its region is.

    Parameters
    ----------
    w
        latent weights, any shape.
    positive, negative
        one number each, an nn.Parameter; α of `twn` is a good start.
    threshold
        between the regions, as a fraction of the largest size in w.

    Returns
    -------
    as w.  `ttq_code` gives the code of w, `distinct` that of what is baked.

    References
    ----------
    Zhu et al., Trained Ternary Quantization, arXiv:1612.01064, section 3.

    Examples
    --------
    >>> w = torch.tensor([-3.0, 0.1, 1.0], requires_grad=True)
    >>> half, quarter = torch.tensor(0.5), torch.tensor(0.25)
    >>> ttq(w, half, quarter).sum().backward()
    >>> w.grad
    tensor([0.2500, 1.0000, 0.5000])
    """
    over, under = regions(w.detach(), threshold)
    wq = torch.where(over, positive, torch.where(under, -negative, 0.0))
    factor = torch.where(over, positive, torch.where(under, negative, 1.0))
    return _passed(wq, w, factor.detach())


def ttq_code(
    w: Tensor, positive: Tensor, negative: Tensor, *, threshold: float = 0.05
) -> codes.Code:
    """Store what `ttq` computes: two sizes and a zero.

    Parameters
    ----------
    w
        latent weights, any shape.
    positive, negative
        one number each: w becomes -negative, 0 or positive.
    threshold
        as a fraction of the largest size in w.

    Returns
    -------
    Codebook
        Decodes to the shape of w.  2 bits a weight, or 1.6 with `trits`.

    References
    ----------
    Zhu et al., Trained Ternary Quantization, arXiv:1612.01064, section 3.

    Examples
    --------
    >>> w = torch.tensor([-3.0, 0.1, 1.0])
    >>> ttq_code(w, torch.tensor(0.5), torch.tensor(0.25)).decode()
    tensor([-0.2500,  0.0000,  0.5000])
    """
    for name, x in (("positive", positive), ("negative", negative)):
        if x.numel() != 1:
            raise ValueError(f"{name} must be one number, got {tuple(x.shape)}")
    over, under = regions(checked(w), threshold)
    p, n = positive.detach().reshape(()), negative.detach().reshape(())
    levels = torch.stack([-n, torch.zeros_like(p), p])
    return codes.Codebook(codes.Ints(1 + over.int() - under.int(), 2), levels)


def bitnet_weights(w: Tensor) -> Tensor:
    """Compute with the weights of `bitnet`; all of the gradient passes.

    BitNet also rounds what goes into the layer, by
    ``round_now(x, bits=8, each="token", symmetric=True)``, after a norm.

    Parameters
    ----------
    w
        latent weights, any shape.

    Returns
    -------
    as w.  `bitnet` gives the code of w; what is baked has the same levels
    but more zeros than its mean size tells: its code is
    ``ternary(w, each="tensor")``.

    References
    ----------
    Ma et al., The Era of 1-bit LLMs, arXiv:2402.17764, section 2.

    Examples
    --------
    >>> bitnet_weights(torch.tensor([[-1.0, 0.5, 1.5, 3.0]]))
    tensor([[-1.5000,  0.0000,  1.5000,  1.5000]])
    """
    rows, n = shared(w.detach(), "tensor")
    return _passed(_scaled(*by_mean(rows, n), w), w)


def _scaled(
    T: Tensor, alpha: Tensor, w: Tensor, each: str | int = "row"
) -> Tensor:
    """Compute α T in the shape and the type of w, as a code decodes."""
    wq = T.to(w.dtype) * alpha.to(w.dtype)
    if type(each) is int:  # the last group may be padded
        wq = wq.reshape(*w.shape[:-1], -1)[..., : w.shape[-1]]
    return wq.reshape(w.shape)


def _passed(wq: Tensor, w: Tensor, factor: Tensor | float = 1.0) -> Tensor:
    """Give the value of wq, and the gradient times a factor to w."""
    return wq + factor * (w - w.detach())
