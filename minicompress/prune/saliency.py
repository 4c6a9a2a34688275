"""Scores that need a run of the model: gradients, curvature, movement.

The collectors work on a copy of the model in evaluation mode, with the
parameters that `where` selects (by default every matrix and kernel), and
return one entry for each name.  Tied weights appear under the first name.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..train import cross_entropy
from .masks import keep

Loss = Callable[[nn.Module, object], Tensor]
Where = Callable[[str, Tensor], bool]


def matrices(name: str, w: Tensor) -> bool:
    """Select weights and kernels, but no biases and no norms."""
    return w.ndim >= 2


class Moments(NamedTuple):
    """Averages of one weight's gradient g over samples, shaped as it is."""

    mean: Tensor  # E[g], for `taylor`
    square: Tensor  # E[g^2], for `fisher`


def gradients(
    model: nn.Module,
    batches: Iterable,
    loss: Loss = cross_entropy,
    *,
    where: Where = matrices,
) -> dict[str, Moments]:
    """Average the gradients of single samples, and their squares.

    The samples run one at a time: slower than a batch, but right for any
    model, and it needs the memory of one gradient only.

    Parameters
    ----------
    model
        left as it is.
    batches
        what `loss` takes: tensors, or tuples, lists and dicts of
        them; the first axis counts the samples.
    loss
        ``loss(model, batch)``, a scalar; the mean over its samples.
    where
        from the name and tensor of a parameter to a bool.

    Returns
    -------
    {name: Moments}.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> batch = torch.tensor([[1.0], [-3.0]])
    >>> gradients(model, [batch], lambda model, x: model(x).sum())
    {'weight': Moments(mean=tensor([[-1.]]), square=tensor([[5.]]))}
    """
    model = trial(model)
    weights = chosen(model, where)
    sums = [torch.zeros_like(w) for w in weights.values()]
    squares = [torch.zeros_like(w) for w in weights.values()]
    n = 0
    for batch in batches:
        for sample in _samples(batch):
            g = grad(loss(model, sample), weights)
            for a, b, x in zip(sums, squares, g, strict=True):
                a += x
                b += x.square()
            n += 1
    if not n:
        raise ValueError("batches: there are no samples")
    pairs = zip(weights, sums, squares, strict=True)
    return {name: Moments(a / n, b / n) for name, a, b in pairs}


def curvature(
    model: nn.Module,
    batches: Iterable,
    loss: Loss = cross_entropy,
    *,
    draws: int = 8,
    seed: int = 0,
    where: Where = matrices,
) -> dict[str, Tensor]:
    """Estimate the diagonal of the Hessian, which `obd` asks for.

    With random signs v the mean of v * (H v) is the diagonal: all other
    entries of H meet a random sign and cancel.  Negative values occur.

    Parameters
    ----------
    model
        left as it is.
    batches
        what `loss` takes; batches of equal size count the same.
    loss
        ``loss(model, batch)``, a scalar.
    draws
        sign vectors for each batch; the error falls as 1/sqrt(draws).
    seed
        of the signs.
    where
        from the name and tensor of a parameter to a bool.

    Returns
    -------
    {name: diagonal, shaped as the weight}.

    References
    ----------
    Bekas, Kokiopoulou, Saad, An estimator for the diagonal of a matrix,
    Applied Numerical Mathematics 57, 2007.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> curvature(model, [x], lambda m, x: m(x).square().sum())
    {'weight': tensor([[ 2., 18.]])}
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    model = trial(model)
    weights = chosen(model, where)
    sums = [torch.zeros_like(w) for w in weights.values()]
    generator = torch.Generator().manual_seed(seed)
    n = 0
    for batch in batches:
        g = twice(model, batch, loss, weights)
        for _ in range(draws):
            v = [_signs(w, generator) for w in weights.values()]
            Hv = hessian_times(g, weights, v)
            for a, x, y in zip(sums, v, Hv, strict=True):
                a += x * y
            n += 1
    if not n:
        raise ValueError("batches: there are none")
    return {k: s / n for k, s in zip(weights, sums, strict=True)}


def movement(w: Tensor, scores: Tensor, sparsity: Tensor | float) -> Tensor:
    """Mask a weight by scores that are trained along with it.

    The scores learn through the mask as if it were they themselves
    (straight-through): their gradient is w dL/dw', also where the mask is
    zero, so that a weight can come back.  Gradient descent then adds up
    -w dL/dw': a weight that moves away from zero gains importance, one that
    moves towards zero loses it, however large it is.

    Parameters
    ----------
    w
        weights, any shape.
    scores
        as w, an nn.Parameter that starts at zero.
    sparsity
        fraction that is masked; a float64 tensor if it follows a
        schedule.

    Returns
    -------
    as w; exactly zero where masked.

    References
    ----------
    Sanh, Wolf, Rush, Movement Pruning, arXiv:2005.07683, equations 3 and 4.

    Examples
    --------
    >>> from minicompress import through
    >>> model = nn.Linear(2, 1)
    >>> masked = through.attach(
    ...     model, "weight", movement,
    ...     scores=nn.Parameter(torch.tensor([[0.0, 1.0]])),
    ...     sparsity=torch.tensor(0.5, dtype=torch.float64),
    ... )
    >>> bool(masked.weight[0, 0] == 0)
    True
    >>> part = through.tensors(masked)["weight"]  # live: a schedule can
    >>> _ = part["sparsity"].fill_(0.0)  # change it, training moves scores
    >>> torch.equal(masked.weight, model.weight)
    True
    """
    if scores.shape != w.shape:
        raise ValueError(
            f"scores must have shape {tuple(w.shape)}, "
            f"got {tuple(scores.shape)}"
        )
    mask = keep(scores.detach(), sparsity=float(sparsity)).to(w.dtype)
    # s - s is exactly zero, so the gate is exactly 0 or 1
    return w * (mask + (scores - scores.detach()))


def trial(model: nn.Module) -> nn.Module:
    """Copy a model for trying things: evaluation mode, all trainable."""
    return deepcopy(model).eval().requires_grad_()


def chosen(model: nn.Module, where: Where) -> dict[str, nn.Parameter]:
    """Collect the parameters that `where` selects, tied ones once."""
    found = {n: p for n, p in model.named_parameters() if where(n, p)}
    if not found:
        raise ValueError("where selects no parameter")
    return found


def grad(loss: Tensor, weights: dict, **kwargs) -> tuple[Tensor, ...]:
    """Return the gradients of the chosen weights; zero if one is not used."""
    return torch.autograd.grad(
        loss, tuple(weights.values()), materialize_grads=True, **kwargs
    )


def twice(model: nn.Module, batch, loss: Loss, weights: dict) -> tuple:
    """Return gradients that can themselves be differentiated."""
    # fused attention has no second derivative
    with sdpa_kernel(SDPBackend.MATH):
        return grad(loss(model, batch), weights, create_graph=True)


def hessian_times(
    g: tuple, weights: dict, v: list[Tensor]
) -> tuple[Tensor, ...]:
    """Multiply the Hessian by v: the gradient of g v."""
    dot = sum((a * b).sum() for a, b in zip(g, v, strict=True))
    if not dot.requires_grad:  # a linear loss
        return tuple(map(torch.zeros_like, v))
    return grad(dot, weights, retain_graph=True)


def _signs(w: Tensor, generator: torch.Generator) -> Tensor:
    v = torch.randint(2, w.shape, generator=generator, dtype=w.dtype)
    return (2 * v - 1).to(w.device)


def _samples(batch) -> Iterator:
    """Cut a nest of tensors into its samples, each a batch of one."""
    if isinstance(batch, Tensor):
        yield from batch.split(1)
    elif isinstance(batch, dict):
        for parts in zip(*map(_samples, batch.values()), strict=True):
            yield dict(zip(batch, parts, strict=True))
    else:
        for parts in zip(*map(_samples, batch), strict=True):
            yield type(batch)(parts)
