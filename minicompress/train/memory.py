"""Gradient checkpointing: a training that keeps less and computes more."""

import copy
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def recompute(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Let some submodules forget their activations and compute them again.

    A chain of n equal layers keeps n activations for its backward pass.  In
    k such segments it keeps the k inputs, and the n / k activations of the
    one segment that is being recomputed: least at k = sqrt(n).  The price
    is a second forward pass of these modules; the gradients are the same,
    bit for bit.

    The second run sees the random numbers and the buffers of the first one:
    dropout drops the same, and BatchNorm's averages move once.  Whatever
    else a forward changes, or a hook inside does, happens twice.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    names : iterable of str
        Submodules, as in ``model.named_modules()``.

    Returns
    -------
    nn.Module
        A copy with the same state_dict, for `fit` or any other training but
        `fit_many`.  Without gradients nothing runs twice.

    Raises
    ------
    ValueError
        If the model has no module of such a name.

    References
    ----------
    Chen et al., Training Deep Nets with Sublinear Memory Cost,
    arXiv:1604.06174.

    Examples
    --------
    >>> half = nn.Sequential(*[nn.Tanh() for layer in range(8)])
    >>> model, x = nn.Sequential(half, half), torch.ones(100)
    >>> x.requires_grad_().nbytes
    400
    >>> saved_bytes(lambda: model(x))  # 16 outputs
    6400
    >>> saved_bytes(lambda: recompute(model, ["0", "1"])(x))  # 2 inputs
    800
    """
    model, names = copy.deepcopy(model), list(names)
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"names: the model has no modules {unknown}")
    for module in map(modules.get, names):
        if not isinstance(module.forward, _Twice):
            module.forward = _Twice(module)
    return model


def saved_bytes(f: Callable[[], object]) -> int:
    """Measure what autograd keeps from a forward pass for the backward pass.

    Each storage counts once, parameters not at all.  This is the state in
    between: not counted is what only the backward pass needs, such as the
    gradients, and the activations of a module that it is just recomputing.
    For the peak of both passes see `measure.peak_memory`.

    Parameters
    ----------
    f : callable
        Takes nothing and returns what its graph hangs on, a loss for
        instance.

    Returns
    -------
    int
        Bytes; inputs and buffers count if they are kept.

    Raises
    ------
    ValueError
        If f returns None: its graph is gone.

    Examples
    --------
    >>> model, x = nn.Linear(10, 5), torch.zeros(8, 10)
    >>> saved_bytes(lambda: model(x))  # x itself, 8 * 10 * 4
    320
    >>> saved_bytes(lambda: model(x).exp())  # and the result, 8 * 5 * 4
    480
    """
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(t: Tensor) -> "Tensor | _Kept":
        owner = t if t._base is None else t._base  # a weight's transpose
        if isinstance(owner, nn.Parameter):
            return t
        kept.add(box := _Kept(t.detach()))  # else t holds its graph
        return box

    def unpack(x: "Tensor | _Kept") -> Tensor:
        return x if isinstance(x, Tensor) else x.tensor

    with saved_tensors_hooks(pack, unpack):
        graph = f()
    if graph is None:
        raise ValueError("f: it returns None, so that its graph is gone")
    storages = [box.tensor.untyped_storage() for box in kept]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


class _Kept:
    """A saved tensor, to be watched by a weak reference."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class _Twice:
    """The forward of a module that runs again in the backward pass."""

    def __init__(self, module: nn.Module):
        self.module, self.run = module, module.forward

    def __call__(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return self.run(*args, **kwargs)
        n, names = len(args), list(kwargs)

        def run(*values):
            named = zip(names, values[n:], strict=True)
            return self.run(*values[:n], **dict(named))

        # as positions all of them are saved: checkpoint has names of its own
        return checkpoint(
            run,
            *args,
            *kwargs.values(),
            use_reentrant=False,
            context_fn=partial(_contexts, self.module),
        )


def _contexts(module: nn.Module) -> tuple[nullcontext, "_Earlier"]:
    """Return what surrounds the first run, and the second."""
    return nullcontext(), _Earlier(module)


class _Earlier:
    """Lends a module copies of the buffers that it had at some time."""

    def __init__(self, module: nn.Module):
        self.slots = [
            (owner._buffers, name, buffer.clone())
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]

    def __enter__(self) -> None:
        self.now = [slots[name] for slots, name, _ in self.slots]
        for slots, name, buffer in self.slots:
            slots[name] = buffer.clone()  # for one more backward pass

    def __exit__(self, *_) -> None:
        for (slots, name, _), buffer in zip(self.slots, self.now, strict=True):
            slots[name] = buffer
