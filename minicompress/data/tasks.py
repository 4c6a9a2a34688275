"""What every classification task of the book looks like."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """Hold the three fixed parts of a classification task.

    Fit on ``train``, choose on ``val``, and look at ``test`` once.

    Parameters
    ----------
    train, val, test : tuple of Tensor
        Features (n, ...) float32 and labels (n,) int64, numbered from 0.
    names : tuple of str
        What each label stands for.

    Examples
    --------
    >>> X, y = torch.zeros(6, 4), torch.arange(6) % 2
    >>> part = (X[:2], y[:2])
    >>> Task(part, part, part, ("cat", "dog"))
    Task(train 2, val 2, test 2 of shape (4,), 2 classes)
    """

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    names: tuple[str, ...]

    @property
    def classes(self) -> int:
        """Count the classes."""
        return len(self.names)

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{part} {len(getattr(self, part)[1])}"
            for part in ("train", "val", "test")
        )
        shape = tuple(self.train[0].shape[1:])
        return f"Task({sizes} of shape {shape}, {self.classes} classes)"


def permutation(n: int, *, seed: int | list[int]) -> np.ndarray:
    """Shuffle the numbers below `n`, alike on every machine.

    NumPy may change what ``Generator.permutation`` draws from one release to
    the next.  The raw output of a bit generator is fixed for good, and so is
    a stable sort of it.

    Parameters
    ----------
    n : int
        How many numbers.
    seed : int or list of int
        Not negative.

    Returns
    -------
    ndarray of shape (n,)
        Each of 0 ... n - 1 once.

    Examples
    --------
    >>> permutation(6, seed=0).tolist()
    [3, 2, 1, 0, 4, 5]
    """
    raw = np.random.PCG64(seed).random_raw(n)
    return np.argsort(raw, kind="stable")


def stratify(labels: np.ndarray, *, sizes: tuple[int, ...], seed: int) -> list:
    """Draw parts of exact sizes that all have the same mix of classes.

    Shuffle, line the rows up by class, and take rows at even distances: each
    class then gives its share to each part, up to one row.

    Parameters
    ----------
    labels : ndarray of shape (n,)
        Class of every row.
    sizes : tuple of int
        Rows in each part; together n.
    seed : int
        Of the shuffle.

    Returns
    -------
    list of ndarray
        For each part the sorted numbers of its rows.

    Raises
    ------
    ValueError
        If the sizes do not add up to n.

    Examples
    --------
    >>> parts = stratify(np.array([0, 1] * 4), sizes=(4, 2, 2), seed=0)
    >>> [len(part) for part in parts]
    [4, 2, 2]
    """
    if sum(sizes) != len(labels):
        raise ValueError(f"sizes {sizes} do not add up to {len(labels)} rows")
    left = permutation(len(labels), seed=seed)
    left = left[np.argsort(labels[left], kind="stable")]
    parts = []
    for size in sizes[:0:-1]:
        ticks = np.arange(len(left) + 1) * size // max(len(left), 1)
        taken = np.diff(ticks) == 1
        parts.append(np.sort(left[taken]))
        left = left[~taken]
    return [np.sort(left), *parts[::-1]]


def few(
    labels: Tensor, per_class: int, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Draw a few labeled rows of each class and keep the rest for testing.

    Parameters
    ----------
    labels : Tensor of shape (n,)
        Class of every row.
    per_class : int
        Rows to draw from each class that occurs.
    seed : int, default=0
        Another seed is another draw; use the same seeds for two methods that
        are compared, so that the differences are paired.

    Returns
    -------
    train, test : tuple of Tensor
        Row numbers, int64: (per_class * classes,) in order of class, and all
        others in their own order.

    Raises
    ------
    ValueError
        If `per_class` is below 1 or a class has fewer rows than that.

    Examples
    --------
    >>> labels = torch.tensor([0, 1, 0, 1, 1])
    >>> train, test = few(labels, 1)
    >>> labels[train].tolist(), len(test)
    ([0, 1], 3)
    """
    if labels.ndim != 1:
        raise ValueError(f"labels must be 1-d, got shape {tuple(labels.shape)}")
    classes, counts = labels.unique(return_counts=True)
    if per_class < 1 or (counts < per_class).any():
        raise ValueError(
            f"per_class={per_class} must lie between 1 and the size of the"
            f" smallest class, {int(counts.min()) if len(counts) else 0}"
        )
    order = torch.from_numpy(permutation(len(labels), seed=seed))
    shuffled = labels.cpu()[order]
    train = torch.cat([order[shuffled == c][:per_class] for c in classes.cpu()])
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[train] = False
    return train, rest.nonzero().flatten()
