"""Which channels stay: by number, or by what the smaller network costs.

A mask per group is what `remove_channels` takes.  The rules that choose the
largest scores are those of `masks`; here they are made safe for networks
(nothing is emptied) and led by a budget.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from .channels import remove_channels
from .dependencies import Group, groups
from .masks import keep_global

Masks = dict[str, Tensor]
Score = Callable[[nn.Module, list[Group]], Mapping[str, Tensor]]
Select = Callable[..., Masks]
Cost = Callable[[nn.Module], float]


def keep_units(
    groups: Iterable[Group],
    scores: Mapping[str, Tensor],
    *,
    sparsity: float,
    select: Select = keep_global,
    least: int = 1,
) -> Masks:
    """Keep the units with the largest scores, and some of every layer.

    Parameters
    ----------
    groups
        of a model; those without scores stay whole.
    scores
        {name of a group: (size,)}, larger = more important.
    sparsity
        fraction of the scored units that goes; fewer go where nothing
        else would be left of a layer.
    select
        `keep_global` if units of all groups compete (are the scores
        comparable? see `normalized`), `keep_each` for the same share of
        each.
    least
        units of each layer that stay, whatever their scores: a layer
        without any would cut the network in two.

    Returns
    -------
    dict
        For each group by name, bool (size,), True = keep; this is what
        `remove_channels` takes.

    Raises
    ------
    ValueError
        If a name or a shape is wrong.

    Examples
    --------
    >>> from minicompress.prune import filter_norms, groups
    >>> net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> found = groups(net, torch.zeros(1, 1))
    >>> keep_units(found, {"0": torch.tensor([3, 1, 2])}, sparsity=1 / 3)
    {'0': tensor([ True, False,  True])}
    """
    known = {group.name: group for group in groups}
    ranks = {}
    for name, s in scores.items():
        if name not in known:
            raise ValueError(f"scores: no group {name!r}, only {list(known)}")
        if s.shape != (known[name].size,):
            raise ValueError(
                f"scores[{name!r}] must have shape ({known[name].size},), "
                f"got {tuple(s.shape)}"
            )
        ranks[name] = _first(s, known[name], least)
    masks = select(ranks, sparsity=sparsity)
    return {n: mask | ranks[n].isposinf() for n, mask in masks.items()}


def within(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    *inputs,
    cost: Cost,
    budget: float,
    select: Select = keep_global,
    least: int = 1,
) -> Masks:
    """Remove as few units as a budget allows.

    A bisection over how many units go: each candidate is made, and its
    cost is what it costs, be it counted or measured.

    Parameters
    ----------
    model
        left as it is.
    scores
        {name of a group: (size,)}.
    inputs
        what the model is called with, as for `groups`.
    cost
        ``cost(model) -> float``, for instance
        ``lambda net: measure.macs(net, x)``, or a latency in seconds.
    budget
        what it may be, in the same unit.
    select, least
        as for `keep_units`.

    Returns
    -------
    dict
        For each group by name, bool (size,), True = keep.

    Raises
    ------
    ValueError
        If even the smallest network costs more.

    Examples
    --------
    >>> from minicompress import measure
    >>> net = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))
    >>> scores, x = {"0": torch.arange(6.0)}, torch.zeros(1, 2)
    >>> within(net, scores, x, cost=measure.params, budget=10)
    {'0': tensor([False, False, False, False,  True,  True])}
    """
    found = groups(model, *inputs)
    total = sum(s.numel() for s in scores.values())

    def masks(gone: int) -> Masks:
        return keep_units(
            found, scores, sparsity=gone / total, select=select, least=least
        )

    def fits(keep: Masks) -> bool:
        return cost(remove_channels(model, keep, *inputs)) <= budget

    few, many = -1, total
    best = masks(many)
    if not fits(best):
        raise ValueError(
            f"budget: {budget} cannot be met, the smallest network costs "
            f"{cost(remove_channels(model, best, *inputs))}"
        )
    while many - few > 1:  # `many` fits, `few` does not
        middle = (few + many) // 2
        keep = masks(middle)
        if fits(keep):
            many, best = middle, keep
        else:
            few = middle
    return best


def shrink(
    model: nn.Module,
    score: Score,
    *inputs,
    cost: Cost,
    budget: float,
    train: Callable[[nn.Module], nn.Module] = lambda model: model,
    rounds: int = 1,
    select: Select = keep_global,
    least: int = 1,
) -> nn.Module:
    """Remove units and fine-tune, once or in rounds, down to a budget.

    Every round lowers the cost by the same factor, scores what is left
    anew, and trains.

    Parameters
    ----------
    model
        left as it is.
    score
        ``score(model, groups) -> {name of a group: (size,)}``, of the
        model by then, for instance `filter_norms`.
    inputs
        what the model is called with, as for `groups`.
    cost, budget
        as for `within`.
    train
        ``train(model) -> model``, fine-tuning; with a loss of `distill`
        the large model teaches the small one.
    rounds
        how often to prune and train.
    select, least
        as for `keep_units`.

    Returns
    -------
    A new, smaller model, whose cost is at most the budget.

    Examples
    --------
    >>> from minicompress import measure
    >>> from minicompress.prune import filter_norms
    >>> net = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 1))
    >>> x = torch.zeros(1, 2)
    >>> shrink(net, filter_norms, x, cost=measure.params, budget=10)[0]
    Linear(in_features=2, out_features=2, bias=True)
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    start = cost(model)
    if not 0 < budget <= start:
        raise ValueError(
            f"budget must be above 0 and at most the cost of the model, "
            f"{start}, got {budget}"
        )
    for i in range(1, rounds + 1):
        step = start * (budget / start) ** (i / rounds)
        scores = score(model, groups(model, *inputs))
        keep = within(
            model,
            scores,
            *inputs,
            cost=cost,
            budget=budget if i == rounds else step,
            select=select,
            least=least,
        )
        model = train(remove_channels(model, keep, *inputs))
    return model


def _first(s: Tensor, group: Group, least: int) -> Tensor:
    """Rank the best units of each layer before all others."""
    ranked = s.detach().to(torch.promote_types(s.dtype, torch.float32))
    ranked = ranked.clone()
    for part in group.slices:
        units = part.unit[part.unit >= 0].unique().to(s.device)
        best = s[units].argsort(descending=True, stable=True)[:least]
        if (part.unit >= 0).all():  # nothing of other groups stays here
            ranked[units[best]] = torch.inf
    return ranked
