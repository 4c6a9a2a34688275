"""Channels chosen by what the next layer loses without them.

The outputs of a reader are a sum of contributions, one from each channel.
How these overlap is one small matrix, and two papers differ only in how they
choose from it.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from .. import calibrate
from .dependencies import Group
from .healing import readers, units_of_columns


def contributions(W: Tensor, H: Tensor, unit: Tensor) -> Tensor:
    """Multiply what each channel adds to the outputs of a layer, pairwise.

    With y = sum of y_c over channels c, the entries are G_cd = E[y_c . y_d].
    Removing a set of channels costs the sum of G over the pairs in it.

    Parameters
    ----------
    W
        (out, in) weights of the layer that reads the channels.
    H
        (in, in) second moments E[x x^T] of its inputs.
    unit
        (in,) channel of each column, from 0; -1 for none.

    Returns
    -------
    (channels, channels), symmetric; the sum of all is E[y . y].

    Examples
    --------
    >>> W, H = torch.tensor([[1.0, 2.0]]), torch.eye(2)
    >>> contributions(W, H, torch.tensor([0, 1]))
    tensor([[1., 0.],
            [0., 4.]])
    """
    if H.shape != (W.shape[1], W.shape[1]) or unit.shape != W.shape[1:]:
        raise ValueError(
            f"H must be (in, in) and unit (in,) for W {tuple(W.shape)}, got "
            f"{tuple(H.shape)} and {tuple(unit.shape)}"
        )
    pairs = (W.T @ W).to(H) * H  # (in, in)
    mine = (unit >= 0).to(H.device)
    unit = unit.to(H.device)[mine]
    n = int(unit.max()) + 1
    rows = H.new_zeros(n, len(H)).index_add(0, unit, pairs[mine])
    return H.new_zeros(n, n).index_add(1, unit, rows[:, mine])


def thinet(G: Tensor) -> Tensor:
    """Remove channels one by one, each time the one that is missed least.

    Parameters
    ----------
    G
        (channels, channels) from `contributions`.

    Returns
    -------
    (channels,) scores: the squared error of the outputs, relative to their
    energy, when the channel goes.  They grow along the order of removal.

    References
    ----------
    Luo et al., ThiNet, arXiv:1707.06342, algorithm 1.

    Examples
    --------
    Two channels that cancel each other go first, though each is large.

    >>> thinet(torch.tensor([[4.0, -4.0, 0], [-4.0, 4.0, 0], [0, 0, 5.0]]))
    tensor([0.8000, 0.8000, 1.0000])
    """
    energy = G.sum()
    # What the error would be with one more gone: error + 2 (G gone)_c + G_cc
    error, cross = G.new_zeros(()), G.new_zeros(len(G))
    scores = torch.full_like(cross, torch.inf)
    for _ in range(len(G)):
        next_error = error + 2 * cross + G.diagonal()
        next_error[scores.isfinite()] = torch.inf
        c = int(next_error.argmin())
        scores[c] = next_error[c].maximum(error)
        error, cross = next_error[c], cross + G[c]
    return scores.where(scores.isfinite(), 0) / energy


def lasso(G: Tensor, *, levels: int = 100, steps: int = 200) -> Tensor:
    """Weigh the contributions, and let a penalty drive weights to zero.

    The weights b minimize E‖y - sum of b_c y_c‖^2 / 2 + lambda ‖b‖_1; the
    larger lambda, the fewer stay.  From the largest lambda to the smallest,
    each solution is found by proximal gradient steps from the one before.

    Parameters
    ----------
    G
        (channels, channels) from `contributions`.
    levels
        values of lambda, over four decades.
    steps
        for each of them.

    Returns
    -------
    (channels,) scores: the largest lambda at which the channel is used,
    relative to the energy of the outputs.

    References
    ----------
    He et al., Channel Pruning for Accelerating Very Deep Neural Networks,
    arXiv:1707.06168, equation 1.

    Examples
    --------
    >>> lasso(torch.diag(torch.tensor([1.0, 4.0]))).argmax()
    tensor(1)
    """
    target = G.sum(1)  # E[y . y_c]
    steepest = torch.linalg.matrix_norm(G, 2).clamp(min=1e-30)
    b, scores = torch.zeros_like(target), torch.zeros_like(target)
    top = target.abs().max()
    for penalty in top * torch.logspace(0, -4, levels, device=G.device):
        for _ in range(steps):
            b = b + (target - G @ b) / steepest
            b = b.sign() * (b.abs() - penalty / steepest).clamp(min=0)
        scores = scores.where((scores > 0) | (b == 0), penalty)
    return scores / G.sum()


def reconstruction_scores(
    model: nn.Module,
    groups: Iterable[Group],
    batches: Iterable,
    *,
    rule: Callable[[Tensor], Tensor] = thinet,
) -> dict[str, Tensor]:
    """Score units by what the layers that read them lose without them.

    Parameters
    ----------
    model
        left as it is.
    groups
        of this model, from `groups`.
    batches
        a tensor each, or a tuple whose first entry is the input.
    rule
        `thinet` or `lasso`.  The errors of several readers of one group
        are added, each relative to the energy of its outputs.

    Returns
    -------
    dict
        For each group by name, the scores (size,).  `refit` belongs to this
        choice.

    Raises
    ------
    ValueError
        If a reader is no nn.Linear and no nn.Conv2d (names it), or a group
        has none.
    """
    groups = list(groups)
    table = readers(groups)
    stats = calibrate.inputs(model, batches, where=lambda n, w: n in table)
    total: dict[str, Tensor] = {}
    for name, parts in table.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        W, H = layer.weight.detach().flatten(1).double(), stats[name].H
        for group, part in parts:
            unit = units_of_columns(part, layer, name)
            G = contributions(W, H, unit) / (W @ H * W).sum()
            total[group.name] = total.get(group.name, 0) + G
    lost = [group for group in groups if group.name not in total]
    if lost:
        raise ValueError(f"groups: no layer reads {lost}")
    return {group.name: rule(total[group.name]) for group in groups}
