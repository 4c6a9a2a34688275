"""What every code is, and the state of a compressed model."""

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor, nn

State = dict[str, "Tensor | Code"]


class Code:
    """Something smaller than a tensor that decodes to one."""

    shape: tuple[int, ...]  # of what `decode` returns, known without decoding

    def decode(self) -> Tensor:
        """Return the tensor that this code stands for."""
        raise NotImplementedError

    def __repr__(self) -> str:
        inner = ", ".join(brief(getattr(self, f.name)) for f in fields(self))
        return f"{type(self).__name__}({inner})"


def encode(
    model: nn.Module,
    f: Callable[[Tensor], Code],
    where: Callable[[str, Tensor], bool] = lambda name, w: w.ndim >= 2,
) -> State:
    """Encode the weights of a model that `where` selects.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    f : callable
        From a weight to a code, for instance a quantizer.
    where : callable, optional
        From a name and a tensor to a bool; by default every parameter with
        two dimensions or more.  Everything else is kept as a tensor.

    Returns
    -------
    dict
        {name: Tensor or Code}.  Tied tensors are encoded once: one object
        under several names.
    """
    parameters = {id(p) for p in model.parameters()}
    done, state = {}, {}
    # keep_vars: the tensors themselves, so that ties can be seen
    for name, t in model.state_dict(keep_vars=True).items():
        if id(t) not in done:
            w = t.detach().clone()
            chosen = id(t) in parameters and where(name, w)
            done[id(t)] = f(w) if chosen else w
        state[name] = done[id(t)]
    return state


def decode(state: State) -> dict[str, Tensor]:
    """Turn a state into a state_dict of plain tensors; ties stay ties."""
    done: dict[int, Tensor] = {}
    for x in state.values():
        if id(x) not in done:
            done[id(x)] = value(x)
    return {name: done[id(x)] for name, x in state.items()}


def value(x):
    """Decode `x` if it is a code; tensors and numbers pass through."""
    return x.decode() if isinstance(x, Code) else x


def shape(x) -> tuple[int, ...]:
    """Give the shape of a tensor, a code or a number (which has none: ())."""
    return tuple(x.shape) if isinstance(x, (Tensor, Code)) else ()


def brief(x) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype)[6:]}{list(x.shape)}"
    return repr(x)


def real(x):
    """Decode to a type in which arithmetic is exact enough: fp32 or fp64."""
    x = value(x)
    if isinstance(x, Tensor) and x.dtype != torch.float64:
        return x.float()
    return x


def need(ok, message: str) -> None:
    if not ok:
        raise ValueError(message)


def need_shape(owner: str, shape) -> None:
    ok = isinstance(shape, tuple) and all(
        type(n) is int and n >= 0 for n in shape
    )
    need(ok, f"{owner}: shape must be a tuple of sizes, got {shape!r}")


def need_array(owner: str, **arguments) -> None:
    for name, x in arguments.items():
        if not isinstance(x, (Tensor, Code)):
            raise ValueError(
                f"{owner}: {name} must be a tensor or a code, got {x!r}"
            )


def broadcast(owner: str, *xs) -> tuple[int, ...]:
    try:
        return tuple(torch.broadcast_shapes(*map(shape, xs)))
    except RuntimeError:
        shapes = ", ".join(str(shape(x)) for x in xs)
        raise ValueError(f"{owner}: shapes {shapes} do not match") from None
