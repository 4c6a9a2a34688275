"""The training loop: repeatable, resumable, and leaving its input alone."""

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .checkpoints import Checkpoint
from .quality import cross_entropy


def constant(done: float) -> float:
    """Keep the learning rate: a factor of 1 whatever fraction is done."""
    return 1.0


def cosine(done: float, *, warmup: float = 0.05) -> float:
    """Raise the learning rate from 0, then lower it to 0 along a cosine.

    Parameters
    ----------
    done : float
        Fraction of the training that is over, 0 to 1.
    warmup : float
        Fraction in which the rate rises, 0 to below 1.

    Returns
    -------
    float
        Factor on the learning rate, 0 to 1.

    References
    ----------
    Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5.

    Examples
    --------
    >>> [round(cosine(t, warmup=0.5), 3) for t in (0.25, 0.5, 0.75, 1)]
    [0.5, 1.0, 0.5, 0.0]
    """
    if done < warmup:
        return done / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (done - warmup) / (1 - warmup))


def fit(
    model: nn.Module,
    batches: Iterable,
    loss: Callable[[nn.Module, object], Tensor] = cross_entropy,
    *,
    lr: float = 1e-3,
    optimizer: Callable = torch.optim.Adam,
    schedule: Callable[[float], float] = cosine,
    steps: int | None = None,
    clip: float | None = None,
    seed: int = 0,
    progress: bool = False,
    on_step: Callable[[int, nn.Module, float], None] | None = None,
    checkpoint: str | os.PathLike | None = None,
) -> nn.Module:
    """Train a copy of a model and return it in evaluation mode.

    The same arguments give the same weights, bit for bit, on one machine
    with one number of threads; also when Ctrl-C stopped the training and a
    second call took it up again from the checkpoint.

    Parameters
    ----------
    model : nn.Module
        Starting point, left as it is. What has `requires_grad=False` does
        not change in the copy either.
    batches : iterable
        What `loss` takes, moved to the model's device: tensors, or tuples,
        lists and dicts of them.
    loss : callable
        `loss(model, batch)` returns a scalar Tensor.
    lr : float
        Largest learning rate.
    optimizer : callable
        `optimizer(parameters, lr=lr)`; `functools.partial` sets the rest.
    schedule : callable
        Maps the fraction of the steps that is over to a factor on `lr`.
    steps : int, optional
        Updates to make; `len(batches)` if left out.
    clip : float, optional
        Largest norm of the gradient of all weights together.
    seed : int
        Decides what the loss draws with torch, dropout for instance. The
        global random state is put back at the end.
    progress : bool
        Whether to show a bar.
    on_step : callable, optional
        `on_step(step, model, loss)` after each update; step counts from 1,
        the model is the copy in training, the loss a float.
    checkpoint : path, optional
        File to save to now and then, at Ctrl-C and at the end, and to go on
        from if it exists. `batches` must then give the same batches again.

    Returns
    -------
    nn.Module

    Raises
    ------
    ValueError
        If the number of steps is unknown, the batches end before it, no
        weight can be trained or the checkpoint is of another run.

    Examples
    --------
    >>> from minicompress.train import accuracy, batches
    >>> X, y = torch.eye(4), torch.arange(4)
    >>> model = fit(nn.Linear(4, 4), batches(X, y, epochs=50), lr=0.1)
    >>> accuracy(model, X, y)
    1.0
    """
    steps = count(batches, steps)
    model = copy.deepcopy(model).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise ValueError("model: it has no weights that require gradients")
    device = weights[0].device
    opt = optimizer(weights, lr=lr)
    for group in opt.param_groups:
        group["highest"] = group["lr"]
    plan = {"steps": steps, "lr": lr, "seed": seed}
    with seeded(seed, device), Checkpoint(checkpoint, model, opt, plan) as run:
        todo = iter(batches)
        step = run.resume(todo)
        todo = islice(todo, steps - step)
        bar = tqdm(todo, total=steps, initial=step, disable=not progress)
        for batch in bar:
            for group in opt.param_groups:
                rate = schedule((step + 0.5) / steps)
                group["lr"] = group["highest"] * rate
            value = loss(model, move(batch, device))
            opt.zero_grad()
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(weights, clip)
            opt.step()
            step += 1
            if progress:
                bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
            if on_step is not None:
                on_step(step, model, value.item())
            run.after(step)
    if step < steps:
        raise ValueError(f"batches: they ended after {step} of {steps} steps")
    return model.eval()


def count(batches: Iterable, steps: int | None) -> int:
    """Return the number of steps that was asked for, or len(batches)."""
    if steps is None and not hasattr(batches, "__len__"):
        raise ValueError("steps: needed when batches have no length")
    steps = len(batches) if steps is None else steps
    if steps < 1:
        raise ValueError(f"steps must be positive, not {steps}")
    return steps


def move(batch, device: torch.device):
    """Copy a nest of tuples, lists and dicts of tensors to a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(move(value, device) for value in batch)
    return batch


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch for a while, then put its random state back."""
    gpus = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Let torch use n threads for a while: one is best for tiny models.

    Examples
    --------
    >>> with threads(1):
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
