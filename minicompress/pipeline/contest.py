"""The byte contest: the smallest file that still reads characters.

A file counts if what it holds names at least `BAR` of `IMAGES` fresh
pictures, `data.glyphs` at difficulty 0.5.  They are rendered from a seed
that is drawn when the file is scored, so no picture can be learned by heart.
Nobody has to trust an entry: it is data, opened by `storage`, and what it
may cost is checked before it runs.
"""

import copy
import math
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import data, measure, models, storage

BAR, IMAGES, DIFFICULTY, CLASSES = 0.9, 10_000, 0.5, 36
MOST_BYTES = 1 << 20  # of the file
MOST_MEMORY = 16 << 20  # bytes, of what it decodes to
MOST_MACS = 50_000_000  # for one picture
MOST_NUMBERS = 1 << 22  # in the output of one layer
NETWORKS = models.MLP, models.CNN, models.ResNet, models.LeNet5


@dataclass(frozen=True)
class Score:
    """What a file reached.

    Attributes
    ----------
    bytes : int
        Length of the file.
    accuracy : float
        Share of the pictures that it named right, 0 to 1.
    error : float
        Standard error of the accuracy: the pictures are a sample.
    images : int
        How many there were.
    seed : int
        From which they were rendered.
    """

    bytes: int
    accuracy: float
    error: float
    images: int
    seed: int

    @property
    def passed(self) -> bool:
        """Whether the accuracy reaches the bar."""
        return self.accuracy >= BAR

    def __str__(self) -> str:
        return (
            f"{self.bytes:,} bytes, {self.accuracy:.2%} ± {self.error:.2%} of "
            f"{self.images:,} pictures of seed {self.seed}: "
            f"{'passed' if self.passed else 'not passed'}, the bar is {BAR:.0%}"
        )


def score(
    path: str | os.PathLike, seed: int | None = None, *, images: int = IMAGES
) -> Score:
    """Measure an entry of the contest on fresh pictures.

    Pictures are shown one by one, so that none can lean on the others.  With
    the most multiplications that are allowed this takes a minute or two.

    Parameters
    ----------
    path : path
        Written by `storage.save`.
    seed : int, optional
        Repeats a score; by default 48 bits drawn from the system.
    images : int
        How many pictures; the contest's number by default.

    Returns
    -------
    Score

    Raises
    ------
    ValueError
        If the file breaks a rule: it is too large, damaged (a
        `StorageError`), no network for pictures, too costly to run, or what
        it says is not one finite number for each class.

    Examples
    --------
    >>> from minicompress import zoo
    >>> found = score(zoo.path("glyphs-cnn"), seed=1, images=60)
    >>> found.bytes, found.passed
    (411229, True)
    """
    path = Path(path)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(
            f"{path.stat().st_size:,} bytes are more than {MOST_BYTES:,}"
        )
    blob = path.read_bytes()
    model = storage.loads(blob, limit=MOST_MEMORY)
    check(model)
    seed = secrets.randbits(48) if seed is None else seed
    X, y = pictures(seed, images)
    right = (answers(model, X) == y).double().mean().item()
    error = math.sqrt(right * (1 - right) / images)
    return Score(len(blob), right, error, images, seed)


def pictures(seed: int, n: int = IMAGES) -> tuple[Tensor, Tensor]:
    """Render what an entry is shown.

    Parameters
    ----------
    seed : int
        Not negative; another seed gives other pictures.
    n : int
        How many, 6 or more.

    Returns
    -------
    X, y : Tensor
        (n, 1, 28, 28) float32 and (n,) labels.
    """
    task = data.glyphs(n, difficulty=DIFFICULTY, seed=seed)
    parts = zip(task.train, task.val, task.test, strict=True)
    X, y = map(torch.cat, parts)
    return X, y


def check(model: nn.Module) -> None:
    """Refuse a model that costs too much, before it has cost anything.

    Parameters
    ----------
    model : nn.Module
        Runs on the meta device only, where tensors have a shape and no
        memory.

    Raises
    ------
    ValueError
        If it is none of `NETWORKS`, does not take a picture, multiplies
        more than `MOST_MACS` times or holds more than `MOST_NUMBERS` at once.
    """
    name = type(model).__name__
    if type(model) not in NETWORKS:
        known = ", ".join(net.__name__ for net in NETWORKS)
        raise ValueError(f"{name} is no network for pictures: {known}")
    sizes = [0]
    empty, x = copy.deepcopy(model).to("meta"), torch.empty(1, 1, 28, 28)
    for module in empty.modules():
        module.register_forward_hook(
            lambda module, inputs, y: sizes.append(y.numel())
        )
    with torch.no_grad(), _errors_named():
        empty(x.to("meta"))
        macs = measure.macs(model, x)
    # numbers as well: a product with an empty matrix multiplies nothing
    for number, most, what in (
        (macs, MOST_MACS, "multiply-accumulates"),
        (max(sizes), MOST_NUMBERS, "numbers at once"),
    ):
        if number > most:
            raise ValueError(f"{number:,} {what} are more than {most:,}")


def answers(model: nn.Module, X: Tensor) -> Tensor:
    """Ask for the class of each picture, one by one.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    X : Tensor of shape (n, 1, 28, 28)

    Returns
    -------
    Tensor of shape (n,), the numbers of the largest logits

    Raises
    ------
    ValueError
        If the model fails, or its logits are not (1, 36) finite numbers.
    """
    with torch.inference_mode(), _errors_named():
        z = torch.stack([_checked(model(x)) for x in X.split(1)])
    return z.argmax(-1)


def _checked(z: Tensor) -> Tensor:
    """Return the logits (36,) of one picture."""
    if z.shape != (1, CLASSES):
        raise ValueError(f"logits {tuple(z.shape)} are not (1, {CLASSES})")
    if not z.isfinite().all():
        raise ValueError("logits that are not finite")
    return z[0]


class _errors_named:
    """Whatever goes wrong while a model runs is the fault of its file."""

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, Exception) and not isinstance(error, ValueError):
            why = str(error).partition("\n")[0] or kind.__name__
            raise ValueError(f"it does not read pictures: {why}") from error
