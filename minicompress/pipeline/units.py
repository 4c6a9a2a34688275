"""Units that pruning has cut off: what leads to them can go as well."""

from copy import deepcopy

import torch
from torch import Tensor, nn

from .. import prune


def connected(model: nn.Module, example: Tensor) -> nn.Module:
    """Remove the weights on no path from an input to an output.

    Pruning leaves units that nothing reads, or that read nothing.  What
    leads to the first kind has no effect.  The second kind sends a constant,
    which is lost here: train on.  A bias goes with the last weight of its
    unit, unless an output reads it.

    Parameters
    ----------
    model
        left as it is; of linear layers and convolutions, with norms and
        activations between them that pass a positive number on.
    example
        input of the model; its shape matters.

    Returns
    -------
    A copy with more zeros.

    References
    ----------
    Han et al., Learning both Weights and Connections for Efficient Neural
    Networks, arXiv:1506.02626, section 3.5 (dead neurons).

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> with torch.no_grad():
    ...     _ = model[1].weight[0, 1] = 0  # nothing reads the second unit
    >>> small = connected(model, torch.ones(1, 2))
    >>> small[0].weight[1].tolist(), small[0].bias[1].item()
    ([0.0, 0.0], 0.0)
    """
    flow = prune.synflow(model, example)
    model = deepcopy(model)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, score in flow.items():
            own[name][score == 0] = 0
    biases = {n: b for n, b in own.items() if b.ndim == 1 and b.requires_grad}
    y = model(example)
    dice = torch.Generator().manual_seed(0)
    mix = torch.rand(y.shape, generator=dice).to(y)  # so that nothing cancels
    grads = torch.autograd.grad((y * mix).sum(), [*biases.values()])
    with torch.no_grad():
        for (name, b), g in zip(biases.items(), grads, strict=True):
            weight = flow.get(f"{name.rpartition('.')[0]}.weight".lstrip("."))
            if weight is not None:
                idle = (weight.flatten(1) == 0).all(1) & (g == 0)
                b[idle] = 0
    return model
