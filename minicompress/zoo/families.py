"""The families of published models that the library reads."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from . import causal, pretrained, published
from .checkpoint import read_json


class Family(NamedTuple):
    """What reads the folders of a family: all of a model, or its shapes."""

    load: Callable
    unread: Callable


FAMILIES = {  # model_type of config.json
    "bert": Family(pretrained.encoder, pretrained.unread),
    "gpt2": Family(causal.decoder, causal.unread),
}


def family(folder: str | os.PathLike) -> Family:
    """Find out what reads the folder of a published model.

    Parameters
    ----------
    folder
        with a ``config.json``.

    Raises
    ------
    ValueError
        If there is none, or it describes another family.
    """
    place = published.place(folder, ("config.json",))
    name = read_json(place / "config.json").get("model_type")
    if name not in [*FAMILIES]:  # a list: it may be anything
        raise ValueError(f"model_type is {name!r}, not in {[*FAMILIES]}")
    return FAMILIES[name]


def unread(
    folder: str | os.PathLike,
) -> tuple[nn.Module, published.Unread]:
    """Open a published model whose tensors stay in its files.

    What `encoder` and `decoder` would load, for `pipeline.streamed`, which
    compresses a model that is larger than the memory.

    Parameters
    ----------
    folder : path
        With ``config.json`` and ``model.safetensors`` (or several files and
        their ``model.safetensors.index.json``); `encoder` and `decoder` also
        need the files of a tokenizer.

    Returns
    -------
    model : models.Encoder or models.GPT2
        On the meta device: shapes only.
    tensors : mapping of str to Tensor
        Under the names of ``model.state_dict()``, in float32.  A tensor, or
        some rows by ``tensors.rows(name, ids)``, are read when they are asked
        for; ``tensors.shape(name)`` reads nothing.

    Raises
    ------
    ValueError
        If a file is missing or damaged, or it is not a model of the BERT or
        GPT-2 family that `encoder` or `decoder` would load.

    Examples
    --------
    Round the matrices of your own model to 4 bits, one block in memory at a
    time:

    >>> from minicompress import pipeline, quantize
    >>> def rule(W, inputs):
    ...     return quantize.min_max(W, bits=4, each=64)
    >>> def compressed(folder, batches, to):
    ...     model, tensors = unread(folder)
    ...     pipeline.streamed(model, tensors, batches, rule, to)
    ...     return pipeline.assembled(to)
    """
    return family(folder).unread(Path(folder))
