"""How close a compressed weight, layer or model is to the original."""

import math

from torch import Tensor


def sqnr(w: Tensor, w_hat: Tensor) -> float:
    """Compute the signal-to-quantization-noise ratio.

    Parameters
    ----------
    w, w_hat : tensors of one shape, before and after.

    Returns
    -------
    10 log10(E[w^2] / E[(w - w_hat)^2]) in dB; infinite if nothing changed.

    Examples
    --------
    >>> import torch
    >>> w = torch.tensor([3.0, -4.0])
    >>> sqnr(w, 1.5 * w)  # 20 log10(2)
    6.020599913279624
    """
    _same_shape(w=w, w_hat=w_hat)
    signal, noise = _energy(w), _energy(w - w_hat)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def agreement(logits: Tensor, other: Tensor) -> float:
    """Compute how often two models predict the same class.

    Parameters
    ----------
    logits, other : (..., classes) outputs of the two models.

    Returns
    -------
    Fraction of samples with the same largest logit, right or wrong.

    References
    ----------
    Stanton et al., Does Knowledge Distillation Really Work?,
    arXiv:2106.05945, section 2 (fidelity).

    Examples
    --------
    >>> import torch
    >>> agreement(torch.eye(4), torch.eye(4)[[0, 1, 2, 0]])
    0.75
    """
    _same_shape(logits=logits, other=other)
    same = logits.argmax(-1) == other.argmax(-1)
    return same.double().mean().item()


def relative_error(W: Tensor, W_hat: Tensor, H: Tensor) -> float:
    """Compute the error of a layer's output, relative to the output.

    Parameters
    ----------
    W, W_hat : (out, in) weights before and after.
    H : (in, in) second moments X^T X / samples of the inputs.

    Returns
    -------
    ||X (W_hat - W)^T|| / ||X W^T|| in the Frobenius norm.

    Examples
    --------
    >>> import torch
    >>> W = torch.tensor([[1.0, 1.0]])
    >>> H = torch.tensor([[8.0, 0.0], [0.0, 1.0]])
    >>> relative_error(W, torch.tensor([[1.0, 0.0]]), H)  # sqrt(1 / 9)
    0.3333333333333333
    """
    _same_shape(W=W, W_hat=W_hat)
    if H.shape != (W.shape[-1], W.shape[-1]):
        raise ValueError(
            f"H must be (in, in) for W {tuple(W.shape)}, got {tuple(H.shape)}"
        )
    W, W_hat, H = W.double(), W_hat.double(), H.double()

    def output(A: Tensor) -> float:
        return ((A @ H) * A).sum().clamp(min=0).sqrt().item()

    size = output(W)
    if size == 0:
        raise ValueError("the output of W is zero on these inputs")
    return output(W_hat - W) / size


def _energy(x: Tensor) -> float:
    return x.detach().double().square().sum().item()


def _same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"shapes differ: {shapes}")
