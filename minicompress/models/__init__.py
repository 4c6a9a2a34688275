"""The small networks that the book compresses.

Every model keeps the arguments of its constructor in `config`, so that a
file can say how to build it again, and can be built on the meta device.
"""

import inspect

from torch import nn

from .gpt2 import GPT2
from .language import LM, Encoder
from .vision import CNN, MLP, LeNet5, ResNet, lenet_300_100

__all__ = [
    "CNN",
    "GPT2",
    "LM",
    "MLP",
    "MODELS",
    "Encoder",
    "LeNet5",
    "ResNet",
    "build",
    "lenet_300_100",
]

MODELS = {c.__name__: c for c in (MLP, LeNet5, CNN, ResNet, LM, GPT2, Encoder)}


def build(name: str, config: dict) -> nn.Module:
    """Build an untrained model from its class name and configuration.

    Parameters
    ----------
    name : str
        A key of `MODELS`.
    config : dict
        Keyword arguments of that class, as in `model.config`.

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If the name is unknown or an argument is missing, unknown, of the
        wrong kind or out of range.

    Examples
    --------
    >>> build("MLP", {"widths": [4, 3, 2]}).config
    {'widths': [4, 3, 2]}
    """
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"name: no model {name!r}, only {sorted(MODELS)}")
    if not isinstance(config, dict):
        raise ValueError(f"config must be a dict, not {config!r}")
    try:
        inspect.signature(MODELS[name]).bind(**config)
    except TypeError as error:
        raise ValueError(f"config of {name}: {error}") from None
    return MODELS[name](**config)
