"""Batches: what a training loop is fed with, the same each time."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Batches:
    """A known number of batches that can be gone through again.

    Parameters
    ----------
    steps : int
        How many batches there are.
    draw : callable
        `draw()` returns a new iterator over them, each time the same.
    """

    def __init__(self, steps: int, draw: Callable[[], Iterator]):
        self.steps, self.draw = steps, draw

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator:
        return self.draw()


def batches(
    *tensors: Tensor, size: int = 64, epochs: int = 1, seed: int = 0
) -> Batches:
    """Cut tensors into shuffled batches, in a new order each epoch.

    Parameters
    ----------
    *tensors : Tensor of shape (n, ...)
        Rows that belong together: inputs, labels, a teacher's logits.
    size : int
        Rows in a batch; the last one of an epoch may have fewer.
    epochs : int
        Passes over all rows.
    seed : int
        Decides the order.

    Returns
    -------
    Batches
        Tuples with one tensor (size, ...) for each of `tensors`.

    Raises
    ------
    ValueError
        If the tensors are empty or differ in length, or a number is below 1.

    Examples
    --------
    >>> X, y = torch.zeros(10, 3), torch.arange(10)
    >>> [len(labels) for _, labels in batches(X, y, size=4)]
    [4, 4, 2]
    """
    rows = [len(t) for t in tensors]
    if not rows or min(rows) < 1 or min(rows) != max(rows):
        raise ValueError(f"tensors: they have {rows} rows")
    if size < 1 or epochs < 1:
        raise ValueError(f"size {size} and epochs {epochs} must be positive")

    def draw():
        dice = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for part in torch.randperm(rows[0], generator=dice).split(size):
                yield tuple(t[part.to(t.device)] for t in tensors)

    return Batches(epochs * math.ceil(rows[0] / size), draw)


def passages(
    ids: Tensor, *, length: int, size: int = 32, steps: int, seed: int = 0
) -> Batches:
    """Draw batches of random passages from one long row of tokens.

    Parameters
    ----------
    ids : integer Tensor of shape (tokens,)
    length : int
        Tokens in a passage, usually the model's context.
    size : int
        Passages in a batch.
    steps : int
        How many batches.
    seed : int
        Decides where the passages start.

    Returns
    -------
    Batches
        Pairs of Tensors (size, length): tokens, and the token after each.

    Raises
    ------
    ValueError
        If `ids` is too short for a passage or a number is below 1.

    Examples
    --------
    >>> next(iter(passages(torch.arange(4), length=3, size=1, steps=1)))
    (tensor([[0, 1, 2]]), tensor([[1, 2, 3]]))
    """
    if ids.ndim != 1 or not 1 <= length < len(ids):
        raise ValueError(f"length: {length} of ids {tuple(ids.shape)}")
    if size < 1 or steps < 1:
        raise ValueError(f"size {size} and steps {steps} must be positive")

    def draw():
        dice = torch.Generator().manual_seed(seed)
        offsets = torch.arange(length)
        for _ in range(steps):
            start = torch.randint(len(ids) - length, (size, 1), generator=dice)
            at = (start + offsets).to(ids.device)  # (size, length)
            yield ids[at], ids[at + 1]

    return Batches(steps, draw)
