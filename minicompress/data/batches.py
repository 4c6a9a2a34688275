"""Windows of tokens: what a language model trains and is tested on."""

import numpy as np
import torch
from torch import Tensor


def windows(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cut tokens into windows that follow one another, for evaluation.

    Parameters
    ----------
    ids : Tensor of shape (tokens,)
        Token numbers.
    length : int
        Tokens in a window.

    Returns
    -------
    inputs, targets : tuple of Tensor of shape (n, length)
        ``targets[i, t]`` is the token after ``inputs[i, t]``; n is
        ``(tokens - 1) // length``, and what is left over is dropped.

    Raises
    ------
    ValueError
        If there are too few tokens for one window.

    Examples
    --------
    >>> x, y = windows(torch.arange(8), 3)
    >>> x.tolist(), y.tolist()
    ([[0, 1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 6]])
    """
    _check(ids, length)
    n = (len(ids) - 1) // length
    shape = (n, length)
    x, y = ids[: n * length], ids[1 : n * length + 1]
    return x.reshape(shape).clone(), y.reshape(shape).clone()


def sample(
    ids: Tensor, length: int, count: int, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw windows at random places, for training.

    Parameters
    ----------
    ids : Tensor of shape (tokens,)
        Token numbers.
    length, count : int
        Tokens in a window, and how many windows.
    seed : int
        Take the number of the training step: each step has its own windows.

    Returns
    -------
    inputs, targets : tuple of Tensor of shape (count, length)
        ``targets[i, t]`` is the token after ``inputs[i, t]``.

    Raises
    ------
    ValueError
        If there are too few tokens for one window.

    Examples
    --------
    >>> x, y = sample(torch.arange(100), 4, 2, seed=0)
    >>> x.shape, (y - x).unique().tolist()
    (torch.Size([2, 4]), [1])
    """
    _check(ids, length)
    random = np.random.default_rng(seed)
    start = torch.from_numpy(random.integers(len(ids) - length, size=count))
    at = start[:, None] + torch.arange(length + 1)  # (count, length + 1)
    both = ids[at.to(ids.device)]
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _check(ids: Tensor, length: int) -> None:
    if ids.ndim != 1 or not 1 <= length < len(ids):
        raise ValueError(
            f"length={length} does not fit ids of shape {tuple(ids.shape)}:"
            " one window needs length + 1 tokens"
        )
