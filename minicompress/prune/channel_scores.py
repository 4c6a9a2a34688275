"""How much each channel, unit or head matters.

A unit of a group is many weights: the rows that make it, what goes along
with them, and the columns that read it.  Whatever scores a single weight
scores a unit when it is added up over some of these, and which ones decides
what is measured.  A larger score means more important.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ..train import cross_entropy, evaluating
from .dependencies import Group, Slice
from .saliency import Loss, _samples, grad, trial
from .units import named_tensors

Scores = dict[str, Tensor]
NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def unit_sums(
    group: Group, values: Mapping[str, Tensor], *, role: str = "out"
) -> Tensor:
    """Add up one number per weight to one number per unit.

    Parameters
    ----------
    group
        from `groups`.
    values
        {name: one value for each entry of that tensor}; names that are
        missing count as 0.
    role
        which part of the group counts: "out" the rows that make a unit,
        "in" the columns that read it, "along" its biases and norms.

    Returns
    -------
    (size,) of the group.

    Examples
    --------
    >>> from minicompress.prune import groups
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> [group] = groups(net, torch.zeros(1, 4))
    >>> ones = {n: torch.ones_like(p) for n, p in net.named_parameters()}
    >>> unit_sums(group, ones)  # four weights make a unit
    tensor([4., 4., 4.])
    >>> unit_sums(group, ones, role="in")  # two read it
    tensor([2., 2., 2.])
    """
    total = torch.zeros(group.size)
    for part in _parts(group, role):
        if part.name in values:
            t = values[part.name].movedim(part.axis, 0)
            each = t.reshape(len(t), -1).sum(1)
            total = total.to(each) + _by_unit(part, each, group.size)
    return total


def filter_norms(
    model: nn.Module, groups: Iterable[Group], *, p: int = 1
) -> Scores:
    """Score units by the size of the weights that make them.

    Parameters
    ----------
    model
        left as it is.
    groups
        of this model, from `groups`.
    p
        1 for the sum of magnitudes, 2 for the length.

    Returns
    -------
    dict
        For each group by name, the scores (size,).

    References
    ----------
    Li et al., Pruning filters for efficient ConvNets, arXiv:1608.08710,
    section 3.1.

    Examples
    --------
    >>> from minicompress.prune import groups
    >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0, -4.0], [0.0, 1.0]]))
    >>> filter_norms(net, groups(net, torch.zeros(1, 2)), p=2)
    {'0': tensor([5., 1.])}
    """
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    powers = {n: w.detach().abs() ** p for n, w in _tensors(model).items()}
    return {g.name: unit_sums(g, powers) ** (1 / p) for g in groups}


def geometric_median(W: Tensor) -> Tensor:
    """Score filters by the sum of their distances to all others.

    A small filter can be indispensable and a large one a copy.  The filter
    in the middle of all, near their geometric median, is the one that the
    others can stand in for, so it goes first.

    Parameters
    ----------
    W
        (filters, ...), each filter one row.

    Returns
    -------
    (filters,).

    References
    ----------
    He et al., Filter Pruning via Geometric Median, arXiv:1811.00250,
    section 3.2.

    Examples
    --------
    >>> geometric_median(torch.tensor([[-3.0], [0.0], [3.0]]))
    tensor([9., 6., 9.])
    """
    rows = W.detach().reshape(len(W), -1)
    return torch.cdist(rows, rows).sum(1)


def filter_distances(model: nn.Module, groups: Iterable[Group]) -> Scores:
    """Score units by `geometric_median` among those of their group.

    If several layers make the same units, their distances are added up.

    Parameters
    ----------
    model, groups
        as for `filter_norms`.

    Returns
    -------
    dict
        For each group by name, the scores (size,).
    """
    tensors = _tensors(model)
    scores = {}
    for group in groups:
        total = torch.zeros(group.size)
        for part in _parts(group, "out"):
            units, rows = _rows(part, tensors[part.name])
            each = geometric_median(rows)
            total = total.to(each).index_add(0, units.to(each.device), each)
        scores[group.name] = total
    return scores


def norm_scales(model: nn.Module, groups: Iterable[Group]) -> Scores:
    """Score units by the scale `|gamma|` of the norm behind them.

    A normalization undoes the size of the filter before it; what is left
    of a channel is decided by its scale.  Train with `slimming` first, or
    the scales say little.

    Parameters
    ----------
    model, groups
        as for `filter_norms`.

    Returns
    -------
    dict
        For each group by name, the scores (size,).

    Raises
    ------
    ValueError
        If a group passes no norm with a scale.

    References
    ----------
    Liu et al., Learning Efficient Convolutional Networks through Network
    Slimming, arXiv:1708.06519, section 3.
    """
    scales = {
        f"{name}.weight".lstrip("."): module.weight.detach().abs()
        for name, module in model.named_modules()
        if isinstance(module, NORMS) and module.weight is not None
    }
    scores = {}
    for group in groups:
        if not any(part.name in scales for part in group.slices):
            raise ValueError(f"groups: {group} passes no norm with a scale")
        scores[group.name] = unit_sums(group, scales, role="along")
    return scores


def gates(
    model: nn.Module,
    groups: Iterable[Group],
    batches: Iterable,
    loss: Loss = cross_entropy,
) -> Scores:
    """Differentiate the loss by a gate on each unit, sample by sample.

    Think of a gate m = 1 that multiplies a unit wherever it is read.  Each
    column w that reads it then is m w, and the chain rule says::

        dL/dm = sum of w dL/dw over these columns,

    whatever lies between.  For a channel this is the sum of activation
    times gradient over all positions, for a head its output times the
    gradient of it.  (The same sum over the rows that *make* a channel is no
    substitute: a batch norm behind them undoes any scale, so that in
    training it is zero.)

    Parameters
    ----------
    model
        left as it is; runs in evaluation mode, one sample at a time.
    groups
        of this model, from `groups`.
    batches, loss
        as for `gradients`.

    Returns
    -------
    dict
        For each group by name, the slopes g (samples, size).  For one score
        per unit take

        * ``g.abs().mean(0)`` (Molchanov et al. 2017; for heads Michel et
          al.),
        * ``g.mean(0) ** 2`` (Molchanov et al. 2019),
        * ``(g ** 2).mean(0) / 2`` (Fisher).

    References
    ----------
    Molchanov et al., Pruning Convolutional Neural Networks for Resource
    Efficient Inference, arXiv:1611.06440, section 2.2.
    Molchanov et al., Importance Estimation for Neural Network Pruning,
    arXiv:1906.10771, section 3.1.
    Michel et al., Are Sixteen Heads Really Better than One?,
    arXiv:1905.10650, section 4.1.
    Theis et al., arXiv:1801.05787, section 3.1.

    Examples
    --------
    >>> from minicompress.prune import groups
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1))
    >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [2.0]]))
    >>> _ = net[1].weight.data.copy_(torch.tensor([[5.0, 7.0]]))
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> gates(net, groups(net, x), [x], lambda model, x: model(x).sum())
    {'0': tensor([[ 5., 14.],
            [15., 42.]])}
    """
    model, groups = trial(model), list(groups)
    tensors = dict(model.named_parameters())
    names = [p.name for g in groups for p in _parts(g, "in")]
    weights = {n: tensors[n] for n in dict.fromkeys(names)}
    found: dict[str, list[Tensor]] = {group.name: [] for group in groups}
    for batch in batches:
        for sample in _samples(batch):
            g = grad(loss(model, sample), weights)
            pairs = zip(weights.items(), g, strict=True)
            products = {n: w.detach() * x for (n, w), x in pairs}
            for group in groups:
                each = unit_sums(group, products, role="in")
                found[group.name].append(each)
    if groups and not found[groups[0].name]:
        raise ValueError("batches: there are no samples")
    return {name: torch.stack(rows) for name, rows in found.items()}


def unit_activations(
    model: nn.Module,
    groups: Iterable[Group],
    batches: Iterable,
    *,
    of: Callable[[Tensor], Tensor] = lambda x: x,
) -> Scores:
    """Record what the first layer that reads a unit gets from it.

    Parameters
    ----------
    model
        left as it is; runs in evaluation mode.
    groups
        of this model, from `groups`.
    batches
        a tensor each, or a tuple whose first entry is the input.
    of
        applied to the activations before they are averaged;
        ``lambda x: (x > 0).float()`` counts how often a unit is not zero
        (one minus the APoZ of Hu et al., arXiv:1607.03250).

    Returns
    -------
    dict
        For each group by name (samples, size), the mean over the entries of
        a unit: for a convolution over all positions of an input, for a head
        over its features.  A linear layer counts each vector as a sample.
        `channel_entropy` takes it as it is.

    Raises
    ------
    ValueError
        If no layer that reads the units of a group is called as a module.
    """
    groups = list(groups)
    readers = {g.name: next(_parts(g, "in"), None) for g in groups}
    seen: dict[str, list[Tensor]] = {g.name: [] for g in groups}
    handles = []
    for group in groups:
        part = readers[group.name]
        if part is None:
            raise ValueError(f"groups: no layer reads {group}")
        layer = model.get_submodule(part.name.rpartition(".")[0])

        def record(layer, args, part=part, name=group.name, n=group.size):
            x = columns(layer, of(args[0]))  # (samples, columns, positions)
            each = x.mean(2).T  # (columns, samples)
            size = torch.bincount(part.unit[part.unit >= 0])
            total = _by_unit(part, each, n)
            seen[name].append((total / size[:, None].to(total)).T)

        handles.append(layer.register_forward_pre_hook(record))
    try:
        with evaluating(model) as device:
            for batch in batches:
                x = batch if isinstance(batch, Tensor) else batch[0]
                model(x.to(device))
    finally:
        for handle in handles:
            handle.remove()
    for group in groups:
        if not seen[group.name]:
            raise ValueError(f"groups: the reader of {group} was not called")
    return {name: torch.cat(rows) for name, rows in seen.items()}


def normalized(
    scores: Mapping[str, Tensor],
    *,
    by: Callable[[Tensor], Tensor] = torch.mean,
) -> Scores:
    """Bring the scores of all groups to one scale, so that they compare.

    Sums over more weights, or nearer to the loss, are larger for no good
    reason.

    Parameters
    ----------
    scores
        {name of the group: (size,)}, none negative.
    by
        what each group is divided by.  The papers take the length,
        `torch.linalg.vector_norm`: of n equal channels each then scores
        1 / sqrt(n), and wide layers lose more than their share.

    Returns
    -------
    as scores; groups of zeros stay as they are.

    References
    ----------
    Molchanov et al., arXiv:1611.06440, equation 10.

    Examples
    --------
    >>> normalized({"a": torch.tensor([3.0, 1.0])})
    {'a': tensor([1.5000, 0.5000])}
    """
    tiny = torch.finfo(torch.float32).tiny
    return {n: s / by(s).clamp(min=tiny) for n, s in scores.items()}


def columns(layer: nn.Module, x: Tensor) -> Tensor:
    """Bring the inputs of a layer to (samples, columns, positions)."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return x.flatten(2)
    return x.reshape(-1, x.shape[-1], 1)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in named_tensors(model)}


def _parts(group: Group, role: str) -> Iterable[Slice]:
    if role not in ("out", "in", "along"):
        raise ValueError(f'role must be "out", "in" or "along", got {role!r}')
    return (part for part in group.slices if part.role == role)


def _by_unit(part: Slice, each: Tensor, size: int) -> Tensor:
    """Add up values (length, ...) of the entries of each unit."""
    mine = part.unit >= 0
    total = each.new_zeros(size, *each.shape[1:])
    unit = part.unit[mine].to(each.device)
    return total.index_add(0, unit, each[mine.to(each.device)])


def _rows(part: Slice, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the units that a tensor makes, and one row (k,) for each."""
    t = t.movedim(part.axis, 0).flatten(1)
    order = part.unit.argsort(stable=True)
    order = order[part.unit[order] >= 0]
    units = part.unit[order].unique()
    return units, t[order.to(t.device)].reshape(len(units), -1)
