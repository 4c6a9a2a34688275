"""Remove whole blocks: the same network, less deep.

A *stack* is the path of an nn.ModuleList or nn.Sequential whose blocks read
and write one stream, each x -> x + g(x): "blocks" in the models of this
library, "model.layers" in many others.  A block that is removed is replaced
by x -> x.  This is cheap where g changes little (`block_influence` and
`angular_distance` measure it, `greedy_blocks` tries it out), and where the
network was trained to do without (`stochastic_depth`, `layerdrop`).  Ordinary
dropout is no such training: it removes units, and never a whole block.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..train import evaluating

Forward = Callable[[nn.Module, object], object]


def linear_decay(count: int, *, last: float = 0.5) -> Tensor:
    """Let the probability that a block is kept fall along the stack.

    Early blocks make what all later ones use, and are kept more often.  With
    `last` = 1/2 the expected depth is (3 count - 1) / 4.

    Parameters
    ----------
    count
        blocks L.
    last
        probability p_L of the last one.

    Returns
    -------
    Tensor
        (count,) float64: p_l = 1 - l/L (1 - p_L) for l = 1 ... L.

    References
    ----------
    Huang et al., Deep Networks with Stochastic Depth, arXiv:1603.09382,
    equation 4.

    Examples
    --------
    >>> linear_decay(4)
    tensor([0.8750, 0.7500, 0.6250, 0.5000], dtype=torch.float64)
    """
    _count(count)
    if not 0 < last <= 1:
        raise ValueError(f"last must be above 0 and at most 1, got {last}")
    depth = torch.arange(1, count + 1, dtype=torch.float64)
    return 1 - depth / count * (1 - last)


def stochastic_depth(
    model: nn.Module,
    stack: str,
    *,
    last: float = 0.5,
    always: Sequence[int] = (),
) -> nn.Module:
    """Skip blocks at random in training, late ones more often.

    A block that is not skipped computes x + (f(x) - x) / p, with p its
    probability from `linear_decay`, so that its mean is f(x), what it
    computes in evaluation.  The paper instead computes x + g(x) in training
    and x + p g(x) in tests: the same up to the scale of g, and this way the
    trained model is an ordinary one.

    Parameters
    ----------
    model
        left as it is.
    stack
        path of blocks f(x) = x + g(x) that map a tensor to a tensor.  After
        an activation of the sum, as in a ResNet, f(x) - x stands for g(x).
    last
        probability that the last block is kept.
    always
        numbers of blocks that are never skipped: those that change the
        shape.

    Returns
    -------
    nn.Module
        A copy for training, with one draw of torch's generator for each
        block and batch; something outside the stack has to learn too, for
        the batches that skip all blocks.  `unskipped` turns it into an
        ordinary model.

    References
    ----------
    Huang et al., Deep Networks with Stochastic Depth, arXiv:1603.09382,
    equations 2, 4 and 5.

    Examples
    --------
    >>> blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> stochastic_depth(blocks, "")[1]
    Skip(
      keep=0.5, rescale=True
      (block): Linear(in_features=2, out_features=2, bias=True)
    )
    """
    keep = linear_decay(len(_blocks(model, stack)), last=last)
    return _skipping(model, stack, keep, always, rescale=True)


def layerdrop(
    model: nn.Module, stack: str, *, rate: float, always: Sequence[int] = ()
) -> nn.Module:
    """Skip every block with the same probability in training.

    Nothing is rescaled: what is left is itself a network of the kind that
    is wanted later.  To keep r of N blocks later the paper recommends a rate
    of 1 - r/N.

    Parameters
    ----------
    rate
        probability that a block is skipped, 0 to below 1.
    model, stack, always
        as for `stochastic_depth`.

    Returns
    -------
    A copy for training, as from `stochastic_depth`.

    References
    ----------
    Fan, Grave, Joulin, Reducing Transformer Depth on Demand with Structured
    Dropout, arXiv:1909.11556, section 3.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be from 0 to below 1, got {rate}")
    count = len(_blocks(model, stack))
    keep = torch.full((count,), 1 - rate, dtype=torch.float64)
    return _skipping(model, stack, keep, always, rescale=False)


class Skip(nn.Module):
    """A block that runs with probability `keep` in training, else x -> x.

    It is called with whatever this module is called with, the stream first.
    `rescale` divides what it adds to the stream by `keep`.
    """

    def __init__(
        self, block: nn.Module, keep: float, *, rescale: bool, name: str = ""
    ):
        super().__init__()
        self.block, self.name = block, name
        self.keep, self.rescale = keep, rescale

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """Return the block's output, or x as it is."""
        if not self.training or self.keep == 1:
            return self.block(x, *args, **kwargs)
        if torch.rand(()).item() >= self.keep:
            return x
        y = self.block(x, *args, **kwargs)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            what = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"{self.name} turns {tuple(x.shape)} into {what}, so that it "
                "cannot be skipped: name its number in always"
            )
        return x + (y - x) / self.keep if self.rescale else y

    def extra_repr(self) -> str:
        """Show the numbers."""
        return f"keep={self.keep:g}, rescale={self.rescale}"


def unskipped(model: nn.Module) -> nn.Module:
    """Take the random skips of `stochastic_depth` or `layerdrop` away.

    Parameters
    ----------
    model
        left as it is.

    Returns
    -------
    A copy with ordinary blocks under their old names, in which none is ever
    skipped: what the given model computes in evaluation.
    """
    model = deepcopy(model)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            module._modules[name] = _inside(child)
    return _inside(model)


def every_other(count: int, *, rate: float) -> Tensor:
    """Keep a mask of blocks at equal distances, whatever they compute.

    Block number d = 1, 2, ... goes if floor(1 / rate) divides d.  The number
    of blocks that go is therefore not always rate * count: a rate of 0.4
    removes as many as one of 0.5.

    Parameters
    ----------
    count
        blocks.
    rate
        fraction that goes, at most 1/2: above it the rule removes all.

    Returns
    -------
    (count,) bool, True = keep; the first block always is.

    References
    ----------
    Fan, Grave, Joulin, arXiv:1909.11556, section 3.2; counted from 1 as in
    the authors' code, where 0, 2, 4, ... stay.

    Examples
    --------
    >>> every_other(6, rate=1 / 3)
    tensor([ True,  True, False,  True,  True, False])
    """
    _count(count)
    if not 0 <= rate <= 0.5:
        raise ValueError(f"rate must be between 0 and 1/2, got {rate}")
    most = 1 / (count + 1)  # a step beyond the last block: none goes
    step = math.floor(1 / max(rate, most) + 1e-9)  # 1 / (1 / n) may be below n
    return torch.arange(1, count + 1) % step != 0


def block_influence(
    model: nn.Module,
    stack: str,
    batches: Iterable,
    *,
    forward: Forward | None = None,
    axis: int = -1,
) -> Tensor:
    """Score blocks by how much they turn the stream, 1 - E[cos(x, f(x))].

    The stream x + g(x) counts, not the branch g(x): a small g leaves the
    stream as it is whatever its direction.

    Parameters
    ----------
    model
        runs in evaluation mode without gradients; left as it was.
    stack
        path of the blocks, which the model calls one after the other.
    batches
        a tensor each, or a tuple whose first entry is the input.  Padding
        counts as any other position: give texts without.
    forward
        ``forward(model, batch)``, for models that need more than one input.
    axis
        that of the features: -1 for tokens (N, T, width), 1 for images
        (N, channels, H, W), where each position has a vector of channels.

    Returns
    -------
    (blocks,) float64, 0 to 2, the mean over all vectors; inf for a block
    that changes the shape.

    References
    ----------
    Men et al., ShortGPT: Layers in Large Language Models are More Redundant
    Than You Expect, arXiv:2403.03853 (there "block influence", BI).

    Examples
    --------
    >>> turn = nn.Linear(2, 2, bias=False)
    >>> turn.weight.data = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> blocks = nn.Sequential(nn.Identity(), turn)
    >>> block_influence(blocks, "", [torch.ones(1, 2)])
    tensor([0., 1.], dtype=torch.float64)
    """

    def influence(cos: Tensor) -> Tensor:
        return 1 - cos

    return _distances(model, stack, batches, forward, axis, 1, influence)


def angular_distance(
    model: nn.Module,
    stack: str,
    batches: Iterable,
    *,
    span: int,
    forward: Forward | None = None,
    axis: int = -1,
) -> Tensor:
    """Measure the angle by which several blocks in a row turn the stream.

    The span with the smallest angle is the one to remove.

    Parameters
    ----------
    span
        blocks in a row, 1 or more.
    model, stack, batches, forward, axis
        as for `block_influence`.

    Returns
    -------
    (blocks - span + 1,) float64, E[arccos(cos)] / pi, 0 to 1, between the
    stream before block l and after block l + span - 1, for l = 0, 1, ...
    All positions count (the paper takes the last token of each text); inf
    where the shape changes.

    References
    ----------
    Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers,
    arXiv:2403.17887.

    Examples
    --------
    >>> turn = nn.Linear(2, 2, bias=False)
    >>> turn.weight.data = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> blocks = nn.Sequential(nn.Identity(), turn, turn)
    >>> angular_distance(blocks, "", [torch.ones(1, 2)], span=2)
    tensor([0.5000, 1.0000], dtype=torch.float64)
    """

    def angle(cos: Tensor) -> Tensor:
        return cos.arccos() / math.pi

    return _distances(model, stack, batches, forward, axis, span, angle)


def remove_blocks(
    model: nn.Module, stack: str, keep: Tensor, *inputs
) -> nn.Module:
    """Return a less deep model without some of its blocks.

    A block of the form norm(x + g(x)), as in BERT, is not x -> x when g is 0:
    its removal takes a normalization away as well.

    Parameters
    ----------
    model
        left as it is.
    stack
        path of the blocks.
    keep
        (blocks,) bool, True = keep.
    inputs
        what the model is called with, to check that it still runs and
        returns the same shapes.

    Returns
    -------
    A new model whose stack holds the blocks that are kept, counted anew.
    What blocks know of their own number (the place in a cache) stays.

    Raises
    ------
    ValueError
        If the mask has another shape, or the model does not run any more
        (names the blocks, and those of them that change the shape).

    References
    ----------
    Men et al., ShortGPT, arXiv:2403.03853.

    Examples
    --------
    >>> blocks = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    >>> keep = torch.tensor([True, True, False])
    >>> remove_blocks(blocks, "", keep, torch.ones(1, 2))
    Sequential(
      (0): Linear(in_features=2, out_features=2, bias=True)
      (1): Tanh()
    )
    """
    if not inputs:
        raise ValueError("inputs: give what the model is called with")
    count = len(_blocks(model, stack))
    if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
        raise ValueError(f"keep must be a bool tensor, not {keep!r}")
    if keep.shape != (count,):
        raise ValueError(
            f"keep must have shape ({count},), one entry for each block of "
            f"{stack!r}, got {tuple(keep.shape)}"
        )
    small = deepcopy(model)
    blocks = _blocks(small, stack)
    pairs = zip(blocks._modules.items(), keep.tolist(), strict=True)
    left = [pair for pair, stays in pairs if stays]
    blocks._modules = {
        str(i) if name.isdecimal() else name: block
        for i, (name, block) in enumerate(left)
    }
    _check(model, small, stack, keep, inputs)
    return small


def greedy_blocks(
    model: nn.Module,
    stack: str,
    cost: Callable[[nn.Module], float],
    *inputs,
    remove: int,
) -> list[int]:
    """Remove one block after the other, each time the one missed least.

    All blocks that are left are tried, so that k removals out of n take
    about k n evaluations, and nothing is assumed about what a block does.

    Parameters
    ----------
    model
        left as it is.
    stack
        path of the blocks.
    cost
        ``cost(model) -> float``, smaller is better: the loss or the
        perplexity on a validation text.  nan counts as inf.
    inputs
        as for `remove_blocks`; a block without which the model does not run
        is not removed.
    remove
        how many blocks go.

    Returns
    -------
    The numbers of the blocks in the order in which they go.

    Raises
    ------
    ValueError
        If fewer than `remove` blocks can go.

    Examples
    --------
    >>> blocks = nn.Sequential(nn.ReLU(), nn.Identity(), nn.Tanh())
    >>> x = torch.ones(1)
    >>> greedy_blocks(blocks, "", lambda m: 1 - m(x).item(), x, remove=2)
    [2, 0]
    """
    count = len(_blocks(model, stack))
    if not 0 <= remove <= count:
        raise ValueError(f"remove must be from 0 to {count}, got {remove}")
    order: list[int] = []
    while len(order) < remove:
        costs = {}
        for i in sorted(set(range(count)) - set(order)):
            keep = torch.ones(count, dtype=torch.bool)
            keep[[*order, i]] = False
            with suppress(_Misfit):
                small = remove_blocks(model, stack, keep, *inputs)
                c = float(cost(small))
                costs[i] = math.inf if math.isnan(c) else c
        if not costs:
            raise ValueError(
                f"remove: {stack!r} runs without {len(order)} of its blocks, "
                f"but not without {remove}"
            )
        order.append(min(costs, key=costs.get))
    return order


class _Misfit(ValueError):
    """A model does not run without some blocks."""


def _count(count: int) -> None:
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")


def _blocks(model: nn.Module, stack: str) -> nn.ModuleList | nn.Sequential:
    try:
        found = model.get_submodule(stack)
    except AttributeError:
        raise ValueError(f"stack: the model has no {stack!r}") from None
    if not isinstance(found, nn.ModuleList | nn.Sequential):
        raise ValueError(
            f"stack: {stack!r} is a {type(found).__name__}, not an "
            "nn.ModuleList or nn.Sequential"
        )
    if not len(found):
        raise ValueError(f"stack: {stack!r} has no blocks")
    return found


def _path(stack: str, name: str) -> str:
    return f"{stack}.{name}".lstrip(".")


def _skipping(
    model: nn.Module, stack: str, keep: Tensor, always, *, rescale: bool
) -> nn.Module:
    """Wrap the blocks of a copy."""
    model = deepcopy(model)
    blocks = _blocks(model, stack)
    for i in always:
        if not 0 <= i < len(blocks):
            raise ValueError(
                f"always: {stack!r} has blocks 0 to {len(blocks) - 1}, no {i}"
            )
        keep[i] = 1
    pairs = zip(blocks._modules.items(), keep.tolist(), strict=True)
    blocks._modules = {
        name: Skip(block, p, rescale=rescale, name=_path(stack, name))
        for (name, block), p in pairs
    }
    return model


def _inside(module: nn.Module) -> nn.Module:
    while isinstance(module, Skip):
        module = module.block
    return module


def _streams(
    model: nn.Module, stack: str, run: Callable[[], object]
) -> list[tuple[Tensor, Tensor]]:
    """Run a model once; return what entered and what left each block."""
    blocks = list(_blocks(model, stack))
    order, inside, seen = [], [], []

    def enter(block, args, kwargs):
        inside.append(_stream([*args, *kwargs.values()]))

    def leave(block, args, output):
        order.append(block)
        seen.append((inside.pop(), _stream(output)))

    handles = []
    for block in set(blocks):  # one that stands in two places is hooked once
        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(block.register_forward_hook(leave))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    if order != blocks:
        raise ValueError(
            f"stack: the model does not call the {len(blocks)} blocks of "
            f"{stack!r} once each, in their order"
        )
    return seen


def _stream(x) -> Tensor:
    """Copy the first of several tensors: the next block may overwrite it."""
    return (x if isinstance(x, Tensor) else x[0]).detach().clone()


def _distances(
    model: nn.Module,
    stack: str,
    batches: Iterable,
    forward: Forward | None,
    axis: int,
    span: int,
    distance: Callable[[Tensor], Tensor],
) -> Tensor:
    """Average a function of the cosine over spans of blocks."""
    count = len(_blocks(model, stack))
    if not 1 <= span <= count:
        raise ValueError(f"span must be from 1 to {count}, got {span}")
    total = torch.zeros(count - span + 1, dtype=torch.float64)
    number = torch.zeros_like(total)
    if forward is None:

        def forward(model, batch):
            return model(batch if isinstance(batch, Tensor) else batch[0])

    with evaluating(model):
        for batch in batches:
            seen = _streams(model, stack, lambda b=batch: forward(model, b))
            for i in range(len(total)):
                x, y = seen[i][0], seen[i + span - 1][1]
                if x.shape != y.shape:
                    total[i] = math.inf
                else:
                    total[i] += distance(_cosine(x, y, axis)).sum().item()
                number[i] += x.numel() // x.shape[axis]
    if not number.all():
        raise ValueError("batches: there are none, or they are empty")
    return total / number


def _cosine(x: Tensor, y: Tensor, axis: int) -> Tensor:
    """Compute cosines; 1 for equal vectors, without a rounding error."""
    x, y = x.double(), y.double()
    cos = F.cosine_similarity(x, y, dim=axis, eps=1e-150).clamp(-1, 1)
    return cos.masked_fill((x == y).all(axis), 1.0)


def _check(
    model: nn.Module, small: nn.Module, stack: str, keep: Tensor, inputs
) -> None:
    """Raise if a model without some blocks does not run as before."""
    right = _shapes(model, inputs)
    try:
        got = _shapes(small, inputs)
    except Exception as error:
        why = str(error)
    else:
        if got == right:
            return
        why = f"its output has shape {got[0]}, not {right[0]}"
    names = _blocks(model, stack)._modules
    gone = [_path(stack, n) for n, k in zip(names, keep, strict=True) if not k]
    changes = ""
    with suppress(ValueError), evaluating(model):
        seen = _streams(model, stack, lambda: model(*inputs))
        pairs = [s for s, k in zip(seen, keep, strict=True) if not k]
        for name, (x, y) in zip(gone, pairs, strict=True):
            if x.shape != y.shape:
                changes += f"; {name} turns {(*x.shape,)} into {(*y.shape,)}"
    raise _Misfit(
        f"keep: the model does not run without {', '.join(gone)}: "
        f"{why}{changes}"
    )


def _shapes(model: nn.Module, inputs) -> list:
    """Run a model; return the shapes of all tensors it returns."""
    with evaluating(model):
        leaves = tree_leaves(model(*inputs))
    return [tuple(x.shape) for x in leaves if isinstance(x, Tensor)]
