"""Small trained networks: where every chapter starts from.

Each is one `.mc` file beside this one, written by
`chapters/experiments/train_zoo.py` together with its card: what it was
trained on and how good it is.  The exceptions are `encoder`, a pretrained
network of 91 MB, read from the files of its publisher, and `decoder`, which
reads such files of a language model that you have.  `unread` opens either
without reading its tensors.

Beside these are networks that chapter 11 made small, `compressed`: their
cards are in a file of their own, because every byte of theirs counts.
"""

import json
from pathlib import Path

from torch import nn

from .. import data, storage, train
from .causal import decoder
from .families import unread
from .pretrained import embed, encoder

__all__ = [
    "FOLDER",
    "card",
    "compressed",
    "decoder",
    "embed",
    "encoder",
    "load",
    "names",
    "path",
    "quality",
    "task",
    "unread",
]

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """List the trained networks.

    Examples
    --------
    >>> "digits-mlp" in names()
    True
    """
    return sorted(path.stem for path in FOLDER.glob("*.mc"))


def compressed() -> list[str]:
    """List the networks that were made small; their data are not here.

    Examples
    --------
    >>> [name for name in compressed() if "300" in name]
    ['mnist-lenet-300-100']
    """
    return sorted(path.stem for path in (FOLDER / "compressed").glob("*.mc"))


def path(name: str) -> Path:
    """Return the file of a trained network.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    if name in compressed():
        return FOLDER / "compressed" / f"{name}.mc"
    if name not in names():
        known = names() + compressed()
        raise ValueError(f"name: no {name!r} in the zoo, only {known}")
    return FOLDER / f"{name}.mc"


def load(name: str) -> nn.Module:
    """Load a trained network, in evaluation mode.

    Parameters
    ----------
    name : str
        One of `names()` or of `compressed()`.

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If there is none of that name.

    Examples
    --------
    >>> load("digits-mlp").config
    {'widths': [64, 64, 32, 10]}
    """
    return storage.load(path(name))


def card(name: str) -> dict:
    """Tell what a trained network was trained on and how good it is.

    Parameters
    ----------
    name : str
        One of `names()` or of `compressed()`.

    Returns
    -------
    dict
        `task`, a function of `minicompress.data` and its arguments; `metric`,
        "accuracy" or "bits per character"; its `value` on the `n` samples of
        the test split and `val`, that on the validation split; `seed`,
        `steps` and `torch`, which made it; `text`, the hash of the text of a
        language model; `bytes`, the length of the file.

    Raises
    ------
    ValueError
        If there is none of that name.

    Examples
    --------
    >>> card("digits-mlp")["metric"]
    'accuracy'
    """
    file = path(name)
    cards = file.with_name("cards.json")
    meta = storage.read(file).meta
    if cards.exists():
        meta = json.loads(cards.read_text("utf8"))[name]
    return meta | {"bytes": file.stat().st_size}


def task(name: str) -> data.Task | data.Reference:
    """Make the data that a trained network was trained on."""
    maker, arguments = card(name)["task"]
    return getattr(data, maker)(**arguments)


def quality(
    model: nn.Module, task: data.Task | data.Reference, split: str = "test"
) -> float:
    """Measure a network as the cards do.

    Parameters
    ----------
    model : nn.Module
        One of the zoo or what became of it.
    task : Task or Reference
        Its data, see `task`.
    split : {"test", "val", "train"}
        Choose with "val", report with "test".

    Returns
    -------
    float
        Accuracy, 0 to 1, larger is better; for the text of a `Reference`
        bits per character, smaller is better.
    """
    part = getattr(task, split)
    if isinstance(task, data.Reference):
        return train.bits_per_char(model, data.Tokenizer().encode(part))
    return train.accuracy(model, *part)
