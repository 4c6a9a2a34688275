"""What every model here shares: a checked, JSON-able record of its shape."""

import functools
import inspect
from collections.abc import Callable

from torch import nn

LARGEST = 2**24  # widths and table sizes
MOST = 128  # layers, blocks, entries of a list


def configured(init: Callable) -> Callable:
    """Check a constructor's arguments and keep them in `self.config`.

    Parameters
    ----------
    init : callable
        An `__init__` whose arguments are annotated `int`, `bool` or
        `tuple[int, ...]`.

    Returns
    -------
    callable
        The same constructor; `type(m)(**m.config)` builds an untrained twin.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        config = dict(list(bound.arguments.items())[1:])  # without self
        for name, value in config.items():
            config[name] = check(name, value, signature.parameters[name])
        nn.Module.__init__(self)
        self.config = config
        init(self, **config)

    return wrapped


def check(name: str, value, parameter: inspect.Parameter):
    """Return one constructor argument, or say what is wrong with it.

    The limits are generous for a model and small for a file that lies: a
    model on the meta device is always built within a second.

    Parameters
    ----------
    name : str
    value : int, bool or sequence of int
    parameter : inspect.Parameter
        Its annotation says which of the three is wanted.

    Returns
    -------
    int, bool or list of int

    Raises
    ------
    ValueError
        If the kind is wrong or a number is out of range.
    """
    if parameter.annotation is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {value!r}")
        return value
    if parameter.annotation is int:
        most = MOST if name in ("layers", "blocks") else LARGEST
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name} must be 1 to {most}, not {value!r}")
        return value
    if not isinstance(value, list | tuple) or not 1 <= len(value) <= MOST:
        raise ValueError(f"{name} must hold 1 to {MOST} integers")
    for item in value:
        if type(item) is not int or not 1 <= item <= LARGEST:
            raise ValueError(f"{name} holds {item!r}, not 1 to {LARGEST}")
    return list(value)
