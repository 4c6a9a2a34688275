"""Pruning before training: SNIP, GraSP and SynFlow.

All three look at an untrained model and compare its weights globally.  Like
`gradients` they work on a copy in evaluation mode.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..train import cross_entropy
from .masks import keep_global
from .saliency import (
    Loss,
    Where,
    chosen,
    grad,
    hessian_times,
    matrices,
    trial,
    twice,
)

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)


def snip(
    model: nn.Module,
    batch: object,
    loss: Loss = cross_entropy,
    *,
    where: Where = matrices,
) -> dict[str, Tensor]:
    """Score weights before training by `|g w|`: SNIP.

    Put a gate c = 1 on each weight: g w is the gradient of the gate.

    Parameters
    ----------
    model
        not trained yet; left as it is.
    batch
        one batch, large enough that its mean gradient is no accident.
    loss
        ``loss(model, batch)``, a scalar.
    where
        from the name and tensor of a parameter to a bool.

    Returns
    -------
    {name: score}; all scores together sum to 1, so compare them globally.

    References
    ----------
    Lee et al., SNIP: Single-shot Network Pruning based on Connection
    Sensitivity, arXiv:1810.02340, equation 6.
    """
    model = trial(model)
    weights = chosen(model, where)
    g = grad(loss(model, batch), weights)
    scores = [(g * w).detach().abs() for g, w in _pairs(g, weights)]
    total = sum(s.sum() for s in scores)
    total = torch.where(total > 0, total, 1.0)
    return {k: s / total for k, s in zip(weights, scores, strict=True)}


def grasp(
    model: nn.Module,
    batch: object,
    loss: Loss = cross_entropy,
    *,
    where: Where = matrices,
) -> dict[str, Tensor]:
    """Score weights before training by w (H g): GraSP.

    Without the weight the squared norm of the gradient, which is how fast
    training lowers the loss at first, changes by -2 w (H g): a large score
    means that training would slow down.

    Parameters
    ----------
    model
        not trained yet; left as it is.
    batch
        one batch.
    loss
        ``loss(model, batch)``, a scalar.
    where
        from the name and tensor of a parameter to a bool.

    Returns
    -------
    {name: score, of either sign}; the paper's has the opposite sign, and
    the paper removes its largest.

    References
    ----------
    Wang, Zhang, Grosse, Picking Winning Tickets Before Training by
    Preserving Gradient Flow, arXiv:2002.07376, equation 8.
    """
    model = trial(model)
    weights = chosen(model, where)
    g = twice(model, batch, loss, weights)
    Hg = hessian_times(g, weights, [x.detach() for x in g])
    pairs = zip(weights, _pairs(Hg, weights), strict=True)
    return {name: (h * w).detach() for name, (h, w) in pairs}


def synflow(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    where: Where = matrices,
) -> dict[str, Tensor]:
    """Score weights by the flow of ones that passes through them: SynFlow.

    R is the sum of the outputs for an input of ones when every weight is
    `|w|`; the score is `|w| dR/d|w|`.  No data and no labels are needed.

    Parameters
    ----------
    model
        left as it is.  The copy has no norms and no biases and computes
        in float64: R is a product over layers, too large for float32.
    example
        input of the model, or a tuple of its inputs.  Only the shape
        of one sample matters; inputs of integers (tokens) are used as given.
    where
        from the name and tensor of a parameter to a bool.

    Returns
    -------
    {name: score, float64}.  With ReLU and pooling in between, every layer's
    scores sum to R, and each hidden unit receives as much as it sends.
    The softmax of attention breaks both: without norms it saturates, and
    queries and keys score nothing.  Leave them out with `where`.

    References
    ----------
    Tanaka et al., Pruning neural networks without any data by iteratively
    conserving synaptic flow, arXiv:2006.05467, equation 5.

    Examples
    --------
    >>> model = nn.Linear(2, 1)
    >>> with torch.no_grad():
    ...     _ = model.weight.copy_(torch.tensor([[-3.0, 1.0]]))
    >>> synflow(model, torch.zeros(1, 2))
    {'weight': tensor([[3., 1.]], dtype=torch.float64)}
    """
    net, ones = _positive(model, example)
    return _flow(net, ones, chosen(net, where))


def synflow_masks(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    *,
    sparsity: float,
    rounds: int = 100,
    where: Where = matrices,
) -> dict[str, Tensor]:
    """Prune by SynFlow in many small steps, each with fresh scores.

    After round k the density is (1 - sparsity)^(k / rounds).  In one step a
    layer with many weights, whose share of R is thin, would lose them all.

    Parameters
    ----------
    model, example, where
        as for `synflow`.
    sparsity
        fraction of all the chosen weights together that goes.
    rounds
        number of steps.

    Returns
    -------
    {name: bool mask}, True = keep.

    References
    ----------
    Tanaka et al., arXiv:2006.05467, algorithm 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be from 0 to 1, got {sparsity}")
    net, ones = _positive(model, example)
    weights = chosen(net, where)
    masks = {k: torch.ones_like(w, dtype=bool) for k, w in weights.items()}
    for k in range(1, rounds + 1):
        scores = _flow(net, ones, weights)
        # below every weight that is left, so that none comes back
        scores = {n: s.masked_fill(~masks[n], -1) for n, s in scores.items()}
        gone = sparsity if k == rounds else 1 - (1 - sparsity) ** (k / rounds)
        masks = keep_global(scores, sparsity=gone)
        for name, w in weights.items():
            w.data.mul_(masks[name])
    return masks


def _pairs(g: Iterable[Tensor], weights: dict) -> Iterator:
    return zip(g, weights.values(), strict=True)


def _positive(model: nn.Module, example) -> tuple[nn.Module, list[Tensor]]:
    """Copy a model with `|w|`, without biases and norms; make its ones."""
    net = trial(model).double()
    for module in list(net.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, NORMS):
                setattr(module, key, nn.Identity())
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p.abs() if p.ndim >= 2 else torch.zeros_like(p))
    args = (example,) if isinstance(example, Tensor) else example
    return net, [
        torch.ones_like(x[:1], dtype=torch.float64)
        if x.is_floating_point()
        else x[:1]
        for x in args
    ]


def _flow(net: nn.Module, ones: list, weights: dict) -> dict[str, Tensor]:
    with sdpa_kernel(SDPBackend.MATH):  # the fused one overflows
        R = net(*ones).sum()
    pairs = zip(weights, _pairs(grad(R, weights), weights), strict=True)
    return {name: (g * w).detach() for name, (g, w) in pairs}
