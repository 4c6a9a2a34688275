"""What makes up for removed channels, without training.

When a channel goes, the layers that read it miss what it said.  Its mean can
be kept in their biases, the channels that stay can take over what they know
of it, and the norms behind can count anew.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from .. import calibrate, obs
from .dependencies import Group, Slice


def fold_means(
    model: nn.Module,
    groups: Iterable[Group],
    keep: Mapping[str, Tensor],
    batches: Iterable,
) -> nn.Module:
    """Add what removed units say on average to the biases of their readers.

    A unit that always says the same can then go without a trace.  (Not
    quite, if a convolution pads with zeros: at the border it reads zeros in
    place of the constant, and the bias holds the mean over all positions.)

    Parameters
    ----------
    model
        left as it is.
    groups
        of this model, from `groups`.
    keep
        {name of a group: bool (size,)}, for `remove_channels`, which comes
        next.
    batches
        a tensor each, or a tuple whose first entry is the input.

    Returns
    -------
    A new model of the same shape in which the readers do without what is
    not kept.  Readers without a bias get one.

    Raises
    ------
    ValueError
        If a reader is no nn.Linear and no nn.Conv2d (names it).

    Examples
    --------
    >>> from minicompress.prune import groups, remove_channels
    >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> _ = net[0].weight.data[1].zero_()  # this unit always says its bias
    >>> x, keep = torch.ones(1, 1), {"0": torch.tensor([True, False])}
    >>> folded = fold_means(net, groups(net, x), keep, [x])
    >>> torch.allclose(remove_channels(folded, keep, x)(x), net(x))
    True
    """
    return _healed(model, groups, keep, batches, lambda W, C, keep: W * keep)


def refit(
    model: nn.Module,
    groups: Iterable[Group],
    keep: Mapping[str, Tensor],
    batches: Iterable,
    *,
    damp: float = 0.01,
) -> nn.Module:
    """Let the units that stay stand in for those that go: least squares.

    Each reader gets the weights W' on the kept inputs k, and the bias, with
    which its outputs come closest to what they were::

        W' = W C_:k (C_kk)^-1,    C the covariance of its inputs.

    Parameters
    ----------
    model, groups, keep
        as for `fold_means`.
    batches
        as for `fold_means`; run once for each reader, which sees what the
        readers before it have become.
    damp
        what is added to the diagonal of C_kk, as a fraction of its mean.

    Returns
    -------
    A new model of the same shape, for `remove_channels`.

    References
    ----------
    He et al., Channel Pruning for Accelerating Very Deep Neural Networks,
    arXiv:1707.06168, section 3.1.
    Luo et al., ThiNet, arXiv:1707.06342, section 3.2.
    """

    def solve(W: Tensor, C: Tensor, keep: Tensor) -> Tensor:
        A = obs.damped(C[keep][:, keep], damp=damp)
        new = torch.zeros_like(W)
        new[:, keep] = torch.linalg.solve(A, C[keep] @ W.T).T
        return new

    return _healed(model, groups, keep, batches, solve)


def renormalize(model: nn.Module, batches: Iterable) -> nn.Module:
    """Measure the statistics of all batch norms anew.

    They describe the network before pruning.  No weight is trained; that
    this alone repairs much of the damage is easily missed.

    Parameters
    ----------
    model
        left as it is.
    batches
        a tensor each, or a tuple whose first entry is the input; each batch
        of the same size counts the same.

    Returns
    -------
    A new model in evaluation mode.

    Raises
    ------
    ValueError
        If there is no batch norm with running statistics.
    """
    model = deepcopy(model).eval()
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        and m.track_running_stats
    ]
    if not norms:
        raise ValueError("model: it has no batch norm with statistics")
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # average all batches
        norm.train()
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in batches:
            model((batch if isinstance(batch, Tensor) else batch[0]).to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def readers(
    groups: Iterable[Group], keep: Mapping[str, Tensor] | None = None
) -> dict[str, list[tuple[Group, Slice]]]:
    """List who reads units, {name of a weight: [(group, slice), ...]}.

    With `keep`, only of the groups that it names.
    """
    found: dict[str, list[tuple[Group, Slice]]] = {}
    for group in groups:
        for part in group.slices:
            if part.role == "in" and (keep is None or group.name in keep):
                found.setdefault(part.name, []).append((group, part))
    return found


def units_of_columns(part: Slice, layer: nn.Module, name: str) -> Tensor:
    """Name the unit of each column of a weight, flattened; -1 for none."""
    ordinary = isinstance(layer, nn.Linear | nn.Conv2d) and part.axis == 1
    if not ordinary or getattr(layer, "groups", 1) > 1:
        raise ValueError(
            f"groups: {name} reads units, but {type(layer).__name__} is no "
            "nn.Linear or nn.Conv2d without groups"
        )
    return part.unit.repeat_interleave(layer.weight[0, 0].numel())


def _healed(model, groups, keep, batches, solve) -> nn.Module:
    """Give each reader new weights (out, in), and the bias that fits them."""
    model, batches = deepcopy(model), list(batches)
    for name, parts in readers(groups, keep).items():
        layer = model.get_submodule(name.rpartition(".")[0])
        W = layer.weight.detach().flatten(1).double()
        stays = torch.ones(W.shape[1], dtype=torch.bool)
        for group, part in parts:
            unit = units_of_columns(part, layer, name)
            stays &= (unit < 0) | keep[group.name].cpu()[unit.clamp(min=0)]
        if stays.all():
            continue
        stats = calibrate.inputs(
            model, batches, where=lambda n, w, name=name: n == name
        )[name]
        stays = stays.to(W.device)
        C = stats.H - torch.outer(stats.mean, stats.mean)
        new = solve(W, C, stays)
        shift = ((W - new) @ stats.mean).to(layer.weight)
        with torch.no_grad():
            layer.weight.copy_(new.view_as(layer.weight))
            if layer.bias is None:
                layer.bias = nn.Parameter(shift)
            else:
                layer.bias += shift
    return model
