"""What a network is trained for, and how well it does."""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy in nats of a batch (inputs, labels).

    Parameters
    ----------
    model : nn.Module
        Maps inputs to logits (N, classes), or (N, T, vocab) for next tokens.
    batch : tuple of Tensor
        Inputs, and labels of shape (N,) or (N, T).

    Returns
    -------
    Tensor
        A scalar.
    """
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Switch a model to evaluation without gradients, then back.

    Yields the device of its weights. Every submodule returns to the mode in
    which it was.
    """
    modes = [(module, module.training) for module in model.modules()]
    first = next(model.parameters(), torch.empty(0))
    try:
        with torch.no_grad():
            model.eval()
            yield first.device
    finally:
        for module, mode in modes:
            module.training = mode


def accuracy(
    model: nn.Module, X: Tensor, y: Tensor, *, size: int = 1024
) -> float:
    """Measure the fraction of inputs whose largest logit is the right one.

    Parameters
    ----------
    model : nn.Module
        Maps (N, ...) to logits (N, classes).
    X : Tensor of shape (n, ...)
    y : integer Tensor of shape (n,)
    size : int
        Rows that go through the model together.

    Returns
    -------
    float
        0 to 1.

    Raises
    ------
    ValueError
        If X and y are empty or differ in length.
    """
    if len(X) != len(y) or len(y) == 0:
        raise ValueError(f"X has {len(X)} rows, y has {len(y)}")
    right = 0
    with evaluating(model) as device:
        for x, label in zip(X.split(size), y.split(size), strict=True):
            guess = model(x.to(device)).argmax(-1)  # (size,)
            right += (guess == label.to(device)).sum().item()
    return right / len(y)


def bits_per_char(
    model: nn.Module,
    ids: Tensor,
    *,
    context: int | None = None,
    chars: int | None = None,
    size: int = 64,
) -> float:
    """Measure how many bits a language model needs for a text.

    The text is cut into windows that do not overlap. Each token but the very
    first is predicted once, from those before it in its window.

    Parameters
    ----------
    model : nn.Module
        Maps ids (N, T) to logits (N, T, vocab).
    ids : integer Tensor of shape (n,)
    context : int, optional
        Tokens in a window; `model.config["context"]` if left out.
    chars : int, optional
        Characters that the predicted tokens stand for; left out, a token is
        a character.
    size : int
        Windows that go through the model together.

    Returns
    -------
    float
        -Σ log₂ p(token) / chars.

    Raises
    ------
    ValueError
        If there are fewer than two tokens.
    """
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"ids: two tokens or more, not {tuple(ids.shape)}")
    context = model.config["context"] if context is None else context
    n = len(ids) - 1
    whole = n // context * context

    def rows(part: Tensor) -> list[Tensor]:
        windows = part[:whole].view(whole // context, context).split(size)
        return [x for x in (*windows, part[None, whole:]) if x.numel()]

    nats = 0.0
    with evaluating(model) as device:
        for x, y in zip(rows(ids[:-1]), rows(ids[1:]), strict=True):
            logits = model(x.to(device)).flatten(0, 1)  # (N·T, vocab)
            target = y.to(device).flatten()
            loss = F.cross_entropy(logits, target, reduction="none")
            nats += loss.double().sum().item()
    return nats / math.log(2) / (n if chars is None else chars)
