"""Many small networks trained at once: ten seeds for the price of one."""

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .loop import count, fit
from .quality import cross_entropy
from .sampling import Batches


class Stack(nn.Module):
    """Networks of one shape whose weights are slices of larger tensors."""

    def __init__(self, models: Sequence[nn.Module]):
        super().__init__()
        weights, buffers = stack_module_state(list(models))
        self.names = [list(weights), list(buffers)]
        own = dict(models[0].named_parameters())
        self.weights = nn.ParameterList(  # (models, ...)
            nn.Parameter(w.detach(), own[name].requires_grad)
            for name, w in weights.items()
        )
        self.running = nn.ParameterList(
            nn.Parameter(b, requires_grad=False) for b in buffers.values()
        )
        # inside a list, so that it is not counted as a part of the stack
        self.template = [copy.deepcopy(models[0]).train()]

    def state(self) -> list[dict[str, Tensor]]:
        """Return the stacked weights and the stacked buffers by name."""
        values = (self.weights, self.running)
        pairs = zip(self.names, values, strict=True)
        return [dict(zip(n, v, strict=True)) for n, v in pairs]

    def losses(self, loss: Callable, batch: tuple[Tensor, ...]) -> Tensor:
        """Return each network's loss (models,) on its slice of the batch."""

        def one(weights, buffers, batch):
            def model(*inputs):
                state = {**weights, **buffers}
                return functional_call(self.template[0], state, inputs)

            return loss(model, batch)

        each = vmap(one, randomness="different")
        with sdpa_kernel(SDPBackend.MATH):  # the only one that vmap can batch
            return each(*self.state(), batch)

    def put(self, models: Sequence[nn.Module]) -> list[nn.Module]:
        """Return copies of the models with the weights of their slices."""
        copies = [copy.deepcopy(model).eval() for model in models]
        weights, buffers = self.state()
        with torch.no_grad():
            for i, model in enumerate(copies):
                for name, p in model.named_parameters():
                    p.copy_(weights[name][i])
                for name, b in model.named_buffers():
                    b.copy_(buffers[name][i])
        return copies


def fit_many(
    models: Sequence[nn.Module],
    batches: Sequence[Iterable],
    loss: Callable[[Callable, tuple[Tensor, ...]], Tensor] = cross_entropy,
    *,
    steps: int | None = None,
    **options,
) -> list[nn.Module]:
    """Train copies of several models of one shape together.

    Each small matrix product becomes one slice of a batched product. The
    result is that of `fit` on each pair of model and batches, up to rounding,
    because the networks share nothing but the clock.

    Parameters
    ----------
    models : sequence of nn.Module
        Alike but for their weights. What has `requires_grad=False` in the
        first does not change.
    batches : sequence of iterables
        One for each model; batches are tuples of tensors, the i-th ones of
        all models of the same shapes.
    loss : callable
        `loss(model, batch)`, which may call the model but nothing else of it.
    steps : int, optional
        Updates to make; the shortest of `batches` if left out.
    **options
        lr, optimizer, schedule, seed, progress and checkpoint as in `fit`.
        The optimizer must treat each weight by itself, as SGD and Adam do.

    Returns
    -------
    list of nn.Module

    Raises
    ------
    ValueError
        If there is not one iterable per model, or an option would mix them.

    Examples
    --------
    >>> from minicompress.train import accuracy, batches
    >>> X, y = torch.eye(4), torch.arange(4)
    >>> start = [nn.Linear(4, 4) for seed in range(3)]
    >>> feeds = [batches(X, y, epochs=50, seed=seed) for seed in range(3)]
    >>> [accuracy(m, X, y) for m in fit_many(start, feeds, lr=0.1)]
    [1.0, 1.0, 1.0]
    """
    if not models or len(models) != len(batches):
        raise ValueError(f"batches: {len(batches)} for {len(models)} models")
    if not options.keys().isdisjoint({"clip", "on_step"}):
        raise ValueError(f"options: no clip or on_step here, {list(options)}")

    def together():
        for parts in zip(*batches, strict=False):
            yield tuple(
                torch.stack(field) for field in zip(*parts, strict=True)
            )

    def total(stack, batch):  # a sum: each network gets its own gradient
        return stack.losses(loss, batch).sum()

    steps = min(count(feed, steps) for feed in batches)
    stack = fit(Stack(models), Batches(steps, together), total, **options)
    return stack.put(models)
