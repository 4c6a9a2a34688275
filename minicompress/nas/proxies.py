"""Judge a network without training it: scores at its initial weights.

Each function looks at one batch, once, and promises that a network with a
larger score will be better after training.  All of them grow with the size
of a network, and so does what it can learn: whether a proxy knows more than
`measure.params` shows only among networks of equal cost.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from ..train import cross_entropy

Loss = Callable[[nn.Module, object], Tensor]
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


def grad_norm(
    model: nn.Module, batch: object, *, loss: Loss = cross_entropy
) -> float:
    """Sum the Euclidean norms of the gradients of all parameters.

    Parameters
    ----------
    model
        left as it is, in the mode in which it is: a new one is in training
        mode, so that BatchNorm uses the statistics of the batch.
    batch
        what `loss` takes.
    loss
        ``loss(model, batch)`` returns a scalar.

    Returns
    -------
    float
        Σ ‖∂L/∂θ‖₂ over the tensors θ that are trained.

    References
    ----------
    Abdelfattah et al., Zero-Cost Proxies for Lightweight NAS,
    arXiv:2101.08134, section 3.

    Examples
    --------
    >>> model = nn.Linear(2, 1)
    >>> batch = torch.tensor([[3.0, 4.0]])
    >>> grad_norm(model, batch, loss=lambda m, x: m(x).sum())  # 5 + 1
    6.0
    """
    _, grads = _gradients(model, batch, loss)
    return sum(g.double().norm().item() for g in grads)


def snip(
    model: nn.Module, batch: object, *, loss: Loss = cross_entropy
) -> float:
    """Sum how much the loss hangs on each weight: connection sensitivity.

    Parameters
    ----------
    model, batch, loss
        as in `grad_norm`.

    Returns
    -------
    float
        ``Σ |θ ∂L/∂θ|`` over all numbers θ that are trained.

    References
    ----------
    Lee et al., SNIP, arXiv:1810.02340, section 4, for weights.
    Abdelfattah et al., arXiv:2101.08134, section 3, for networks.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> model.weight.data = torch.tensor([[2.0, -1.0]])
    >>> batch = torch.tensor([[3.0, 4.0]])
    >>> snip(model, batch, loss=lambda m, x: m(x).sum())  # 2 · 3 + 1 · 4
    10.0
    """
    weights, grads = _gradients(model, batch, loss)
    return _flow(weights, grads)


def synflow(model: nn.Module, x: Tensor) -> float:
    """Sum the synaptic flow through a network; no data, no labels.

    With all weights replaced by their magnitudes and an input of ones, the
    sum of the outputs R is a sum over all paths from inputs to outputs, each
    with the product of its weights.  θ ∂R/∂θ is the part of R that flows
    through θ, and without biases these add up to R in every layer.

    Normalizations, which would undo the sizes of the weights, are passed
    through as if they were not there.

    Parameters
    ----------
    model
        left as it is; used in evaluation mode and float64.
    x
        (N, ...) an input of the model, for the shape of one sample.

    Returns
    -------
    float
        log Σ θ ∂R/∂θ over all parameters, as the sum grows exponentially
        with depth; -inf if nothing flows.

    References
    ----------
    Tanaka et al., Pruning neural networks without any data by iteratively
    conserving synaptic flow, arXiv:2006.05467, for weights.
    Abdelfattah et al., arXiv:2101.08134, section 3, for networks.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1))
    >>> for p, w in zip(model.parameters(), ([1, -2], [3, 1], 0)):
    ...     p.data = torch.tensor(w, dtype=torch.float32).view(p.shape)
    >>> flow = synflow(model, torch.zeros(1, 1))
    >>> round(math.exp(flow), 6)  # R = 1 · 3 + 2 · 1 in each of two layers
    10.0
    """
    if not x.is_floating_point() or x.ndim < 1 or not len(x):
        raise ValueError(
            "x must be floating point, (N, ...), got "
            f"{x.dtype} of {tuple(x.shape)}"
        )
    net = deepcopy(model).double().eval()
    for module in net.modules():
        if isinstance(module, NORMS):
            module.forward = _same
    weights = [p.requires_grad_() for p in net.parameters()]
    if not weights:
        raise ValueError("model: it has no parameters through which to flow")
    with torch.no_grad():
        for w in weights:
            w.abs_()
    R = net(torch.ones_like(x[:1], dtype=torch.float64)).sum()
    grads = torch.autograd.grad(R, weights, materialize_grads=True)
    flow = _flow(weights, grads)
    return math.log(flow) if flow else -math.inf


def naswot(model: nn.Module, x: Tensor) -> float:
    """Score how differently a batch switches the ReLUs on and off.

    Each input makes a binary code c of the N_A units: which are positive.
    Two inputs with the same code lie in one linear piece of the network, and
    training will find it hard to tell them apart.  From the Hamming
    distances d_H of the codes::

        K_ij = N_A - d_H(c_i, c_j),    score = log |det K|

    Parameters
    ----------
    model
        left as it is, in the mode in which it is.  Both nn.ReLU and the
        functions relu are seen; other activations are not.
    x
        (N, ...) different inputs.

    Returns
    -------
    float
        At most N log N_A; -inf if K is singular, as with two equal codes,
        or with more inputs than units.

    Raises
    ------
    ValueError
        If no ReLU was met, or one whose input has not N rows.

    References
    ----------
    Mellor et al., Neural Architecture Search without Training,
    arXiv:2006.04647, section 3.

    Examples
    --------
    >>> x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    >>> math.exp(naswot(nn.ReLU(), x))  # K = [[2, 0], [0, 2]]
    4.0
    >>> naswot(nn.ReLU(), x[[0, 0]])
    -inf
    """
    with torch.no_grad(), _Switches() as switches:
        deepcopy(model)(x)
    if not switches.found:
        raise ValueError(f"model: a {type(model).__name__} without ReLUs")
    rows = {len(c) for c in switches.found}
    if rows != {len(x)}:
        raise ValueError(f"x: {len(x)} inputs, but ReLUs with {rows} rows")
    c = torch.cat([c.flatten(1) for c in switches.found], 1).double()
    K = c @ c.T + (1 - c) @ (1 - c).T  # (N, N)
    if torch.linalg.matrix_rank(K, hermitian=True) < len(K):
        return -math.inf
    return torch.linalg.slogdet(K).logabsdet.item()


def _same(x: Tensor) -> Tensor:
    return x


class _Switches(TorchFunctionMode):
    """Writes down what is positive wherever a ReLU is called."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f in RELUS:
            value = args[0] if args else kwargs["input"]
            self.found.append(value > 0)
        return f(*args, **kwargs)


def _gradients(
    model: nn.Module, batch: object, loss: Loss
) -> tuple[list[Tensor], Sequence[Tensor]]:
    """Return the trained parameters of a copy and the loss's gradients."""
    net = deepcopy(model)
    weights = [p for p in net.parameters() if p.requires_grad]
    if not weights:
        raise ValueError("model: it has no weights that require gradients")
    value = loss(net, batch)
    grads = torch.autograd.grad(value, weights, materialize_grads=True)
    return weights, grads


def _flow(weights: list[Tensor], grads: Sequence[Tensor]) -> float:
    """Sum |θ ∂/∂θ| over all numbers."""
    pairs = zip(weights, grads, strict=True)
    return sum((w * g).double().abs().sum().item() for w, g in pairs)
