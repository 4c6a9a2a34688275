"""What the layers of a model see: statistics of their inputs.

Data-aware methods need to know which inputs a weight meets.  `inputs` runs
the model once and records every layer; `sequential` compresses one layer
after the other, so that each sees what the compressed ones before it make.
"""

import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .train import evaluating

Forward = Callable[[nn.Module, object], object]
Where = Callable[[str, Tensor], bool]


@dataclass(frozen=True, eq=False, repr=False)
class Stats:
    """Statistics of the inputs x (in,) of one layer over `count` samples.

    A linear layer counts each vector it multiplies as a sample, a
    convolution each patch under its kernel.  For a convolution with groups
    every tensor has a leading dimension of that size.

    Parameters
    ----------
    gram
        (in, in) sum of x x^T, float64.
    mean, mean_abs
        (in,) averages of x and `|x|`, float64.
    low, high
        (in,) smallest and largest x.
    sample
        (rows, in) some of the inputs, drawn evenly from all.
    count
        number of samples.
    """

    gram: Tensor
    mean: Tensor
    mean_abs: Tensor
    low: Tensor
    high: Tensor
    sample: Tensor
    count: int

    @property
    def H(self) -> Tensor:
        """Second moments E[x x^T] (in, in)."""
        return self.gram / self.count

    @property
    def norm(self) -> Tensor:
        """Length of each input channel over all samples (in,)."""
        return self.gram.diagonal(dim1=-2, dim2=-1).sqrt()

    def __repr__(self) -> str:
        return f"Stats({self.count} samples of {self.gram.shape[-1]} inputs)"


def inputs(
    model: nn.Module,
    batches: Iterable,
    *,
    where: Where = lambda name, w: True,
    forward: Forward | None = None,
    rows: int = 256,
) -> dict[str, Stats]:
    """Record the inputs of the linear layers and convolutions of a model.

    Parameters
    ----------
    model
        runs in evaluation mode without gradients; left as it was.
    batches
        a tensor each, or a tuple whose first entry is the input.
    where
        from the name and the weight of a layer to a bool; by default
        every nn.Linear and nn.Conv2d.
    forward
        ``forward(model, batch)``, for models that need more than one
        input.
    rows
        size of the sample of inputs that is kept for each layer.

    Returns
    -------
    {name of the weight: Stats}; of a weight that several layers share, the
    inputs of all of them.

    Warns
    -----
    UserWarning
        Names the layers that were never called (nn.MultiheadAttention, for
        one, uses the weight of its own layer without calling it).

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> stats = inputs(model, [torch.tensor([[1.0, 2.0], [3.0, 4.0]])])
    >>> stats["0.weight"]
    Stats(2 samples of 2 inputs)
    >>> stats["0.weight"].H
    tensor([[ 5.,  7.],
            [ 7., 10.]], dtype=torch.float64)
    """
    chosen = layers(model, where=where)
    records = {_own(m): _Record(rows) for m in chosen.values()}
    users = [m for m in layers(model).values() if _own(m) in records]
    _run(model, batches, forward, {m: records[_own(m)] for m in users})
    silent = [n for n, m in chosen.items() if not records[_own(m)].count]
    if silent:
        warnings.warn(
            f"never called, so without statistics: {', '.join(silent)}",
            stacklevel=2,
        )
    stats = {k: r.stats() for k, r in records.items() if r.count}
    return {n: stats[_own(m)] for n, m in chosen.items() if _own(m) in stats}


def sequential(
    model: nn.Module,
    batches: Iterable,
    compress: Callable[[str, nn.Module, Stats], object],
    *,
    where: Where = lambda name, w: True,
    forward: Forward | None = None,
    rows: int = 256,
) -> nn.Module:
    """Compress one layer after the other, each on its inputs by then.

    The statistics of a layer come from a model whose earlier layers are
    already compressed, and only one layer's statistics exist at a time.
    The price is one pass over the batches for each layer.  A weight that
    several layers share is compressed once, on the inputs of all of them.

    Parameters
    ----------
    model
        left as it is.
    batches
        as for `inputs`; iterated once per layer.
    compress
        called with the name of a weight, its layer and the `Stats`;
        returns the new weight, as a tensor or as a code that decodes to it.
    where, forward, rows
        as for `inputs`.

    Returns
    -------
    A copy of the model with the new weights.

    References
    ----------
    Frantar et al., GPTQ, arXiv:2210.17323, section 4 (setup).

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    >>> seen = []
    >>> def zero(name, layer, stats):
    ...     seen.append(stats.norm.norm() > 0)
    ...     return torch.zeros_like(layer.weight)
    >>> _ = sequential(model, [torch.ones(1, 2)], zero)
    >>> [bool(x) for x in seen]  # the second layer sees zeros
    [True, False]
    """
    model = deepcopy(model)
    batches = list(batches)
    for name, layer in _called(model, batches, forward, where):
        if parametrize.is_parametrized(layer):
            raise ValueError(f"{name}: is parametrized, bake the model first")
        record = _Record(rows)
        users = [m for m in layers(model).values() if _own(m) == _own(layer)]
        _run(model, batches, forward, dict.fromkeys(users, record))
        new = compress(name, layer, record.stats())
        new = new if isinstance(new, Tensor) else new.decode()
        if new.shape != layer.weight.shape:
            raise ValueError(
                f"{name}: compress returned shape {tuple(new.shape)}, the "
                f"weight has {tuple(layer.weight.shape)}"
            )
        with torch.no_grad():
            layer.weight.copy_(new)
    return model


def layers(
    model: nn.Module, *, where: Where = lambda name, w: True
) -> dict[str, nn.Module]:
    """List the linear layers and convolutions by the names of their weights.

    Parameters
    ----------
    model
        a layer that occurs twice is listed under both names.
    where
        from a name and a weight to a bool.

    Returns
    -------
    {name of the weight: module}.
    """
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            name = f"{path}.weight".lstrip(".")
            if where(name, module.weight):
                found[name] = module
    if not found:
        raise ValueError("where selects no nn.Linear or nn.Conv2d")
    return found


def samples(layer: nn.Module, x: Tensor) -> Tensor:
    """Arrange the input of a layer as the matrix that its weight meets.

    Parameters
    ----------
    layer
        nn.Linear or nn.Conv2d.
    x
        (..., in) for a linear layer, (N, channels, H, W) for a convolution.

    Returns
    -------
    (samples, in), or (groups, samples, in) for a convolution with groups;
    ``layer.weight.flatten(1)`` is what it is multiplied by.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    x = x if x.ndim == 4 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    x = F.unfold(x, layer.kernel_size, layer.dilation, stride=layer.stride)
    g = layer.groups
    x = x.unflatten(1, (g, -1)).permute(1, 0, 3, 2)  # (g, N, places, in)
    x = x.flatten(1, 2)  # (g, samples, in)
    return x if g > 1 else x[0]


class _Record:
    """Sums that grow with every call of a layer."""

    def __init__(self, rows: int):
        self.rows, self.count = rows, 0
        # of its own, so that the sample does not depend on other draws
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input"]
        x = samples(layer, x.detach())
        x = x if x.dtype == torch.float64 else x.float()
        if x.shape[-2]:
            self._add(x)

    def _add(self, x: Tensor) -> None:
        # Products in float32, sums over batches in float64.
        sums = [(x.mT @ x).double(), x.double().sum(-2)]
        sums.append(x.abs().sum(-2, dtype=torch.float64))
        low, high = x.aminmax(dim=-2)
        new = x.shape[-2]
        keys = torch.rand(new, generator=self.generator).to(x.device)
        if self.count:
            sums = [a + b for a, b in zip(self.sums, sums, strict=True)]
            low, high = low.minimum(self.low), high.maximum(self.high)
            x = torch.cat([self.sample, x], -2)
            keys = torch.cat([self.keys, keys])
        # Each input draws a key; the smallest keys are an even sample.
        self.keys, kept = keys.topk(min(self.rows, len(keys)), largest=False)
        self.count += new
        self.sums, self.low, self.high = sums, low, high
        self.sample = x.index_select(-2, kept)

    def stats(self) -> Stats:
        gram, total, total_abs = self.sums
        return Stats(
            gram=gram,
            mean=total / self.count,
            mean_abs=total_abs / self.count,
            low=self.low,
            high=self.high,
            sample=self.sample,
            count=self.count,
        )


def _run(
    model: nn.Module,
    batches: Iterable,
    forward: Forward | None,
    hooks: dict[nn.Module, Callable],
) -> None:
    """Run the model on all batches with hooks on the inputs of layers."""
    handles = [
        m.register_forward_pre_hook(hook, with_kwargs=True)
        for m, hook in hooks.items()
    ]
    try:
        with evaluating(model):
            for batch in batches:
                if forward is not None:
                    forward(model, batch)
                else:
                    model(batch if isinstance(batch, Tensor) else batch[0])
    finally:
        for handle in handles:
            handle.remove()


def _called(
    model: nn.Module, batches: list, forward: Forward | None, where: Where
) -> list[tuple[str, nn.Module]]:
    """List the chosen layers, once each, in the order of their first call."""
    order = []  # of weights: layers that share one count as one

    def note(layer, args, kwargs):
        if _own(layer) not in order:
            order.append(_own(layer))

    chosen = layers(model, where=where)
    _run(model, batches[:1], forward, dict.fromkeys(chosen.values(), note))
    first = {_own(m): (n, m) for n, m in reversed(chosen.items())}
    silent = [n for w, (n, _) in first.items() if w not in order]
    if silent:
        warnings.warn(f"never called: {', '.join(silent)}", stacklevel=3)
    return [first[w] for w in order]


def _own(layer: nn.Module) -> int:
    """Identify the weight of a layer, which other layers may share."""
    return id(layer._parameters.get("weight", layer))
