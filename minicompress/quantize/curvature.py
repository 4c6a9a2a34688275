"""How much a weight matters, from the curvature of the loss.

At a minimum of the loss a change δ of a weight costs 1/2 δᵀ H δ with the
Hessian H of its layer.  H is too large to write down, but its products with
vectors cost two passes backwards, and tell its trace and its largest
eigenvalue.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import storage
from ..train import cross_entropy
from .allocate import Options

Loss = Callable[[nn.Module, object], Tensor]
Where = Callable[[str, Tensor], bool]


def hessian_traces(
    model: nn.Module,
    batches: Iterable,
    loss: Loss = cross_entropy,
    *,
    where: Where = lambda name, w: w.ndim >= 2,
    probes: int = 50,
    seed: int = 0,
) -> dict[str, float]:
    """Estimate the trace of the Hessian of each weight (Hutchinson).

    For random signs v the mean of vᵀ H v is the trace; the variance of one
    probe is twice the sum of the squares off the diagonal.

    Parameters
    ----------
    model
        left as it is; runs in evaluation mode.
    batches
        what `loss` takes; batches of equal size count the same.
    loss
        ``loss(model, batch)``, a scalar.
    where
        from the name and tensor of a parameter to a bool; by default
        every matrix and kernel.
    probes
        sign vectors for each batch and weight.
    seed
        of the signs.

    Returns
    -------
    {name: trace}; tied weights under their first name.

    References
    ----------
    Hutchinson, A stochastic estimator of the trace of the influence matrix,
    Communications in Statistics 18, 1989.
    Dong et al., HAWQ-V2: Hessian Aware trace-Weighted Quantization of
    Neural Networks, arXiv:1911.03852.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> hessian_traces(model, [x], lambda m, x: m(x).square().sum())
    {'weight': 20.0}
    """
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    generator = torch.Generator().manual_seed(seed)
    products = _hessians(model, batches, loss, where)
    traces = {}
    for name, (w, times) in products.items():
        draws = (_signs(w, generator) for _ in range(probes))
        traces[name] = sum(float((v * times(v)).sum()) for v in draws) / probes
    return traces


def top_eigenvalues(
    model: nn.Module,
    batches: Iterable,
    loss: Loss = cross_entropy,
    *,
    where: Where = lambda name, w: w.ndim >= 2,
    steps: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> dict[str, float]:
    """Find the eigenvalue of largest size of the Hessian of each weight.

    Power iteration: v ← H v / ‖H v‖ turns towards its eigenvector, and
    vᵀ H v towards it.

    Parameters
    ----------
    model, batches, loss, where
        as for `hessian_traces`.
    steps
        products at most, for each weight.
    tolerance
        relative change between two steps at which the iteration ends.
    seed
        of the first v.

    Returns
    -------
    {name: eigenvalue}; negative if the loss curves most downwards.

    References
    ----------
    Dong et al., HAWQ: Hessian AWare Quantization of Neural Networks with
    Mixed-Precision, arXiv:1905.03696, algorithm 1.

    Examples
    --------
    >>> model = nn.Linear(2, 1, bias=False)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> found = top_eigenvalues(model, [x], lambda m, x: m(x).square().sum())
    >>> round(found["weight"], 2)
    18.0
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, (w, times) in _hessians(model, batches, loss, where).items():
        v = _signs(w, generator)
        value = torch.inf
        for _ in range(steps):
            v = v / v.norm().clamp(min=torch.finfo(v.dtype).tiny)
            Hv = times(v)
            before, value = value, float((v * Hv).sum())
            if abs(value - before) <= tolerance * abs(value):
                break
            v = Hv
        values[name] = value
    return values


def hawq_table(
    options: Options,
    weights: Mapping[str, Tensor],
    traces: Mapping[str, float],
) -> dict:
    """Predict what each choice costs from the curvature, in closed form.

    With n weights, the mean eigenvalue times the squared error::

        Ω = Tr(H) / n · ‖Q(W) - W‖²

    It takes the rounding error to point in no direction in particular, so
    that only the mean of the eigenvalues counts.

    Parameters
    ----------
    options
        ``{name of a weight: {choice: code}}``.
    weights
        {name: the weight before}.
    traces
        {name: trace}, from `hessian_traces`.  A negative one counts as 0:
        there the network is not at a minimum.

    Returns
    -------
    {name: {choice: (bytes, loss)}}, as from `sensitivity`; to second order
    the loss itself rises by half of Ω.

    References
    ----------
    Dong et al., HAWQ-V2: Hessian Aware trace-Weighted Quantization of
    Neural Networks, arXiv:1911.03852.

    Examples
    --------
    >>> from minicompress.quantize import min_max
    >>> W = torch.tensor([[1.0, 0.5, 0.0]])
    >>> options = {"weight": {1: min_max(W, bits=1)}}
    >>> hawq_table(options, {"weight": W}, {"weight": 12.0})
    {'weight': {1: (6, 1.0)}}
    """
    table = {}
    for name, own in options.items():
        W = weights[name].detach()
        mean = max(traces[name], 0.0) / W.numel()
        table[name] = {
            choice: (
                storage.payload(code),
                mean * float((code.decode() - W).square().sum()),
            )
            for choice, code in own.items()
        }
    return table


def _hessians(
    model: nn.Module, batches: Iterable, loss: Loss, where: Where
) -> dict:
    """Return {name: (weight, v -> H v)}, H averaged over the batches."""
    model = deepcopy(model).eval().requires_grad_()
    weights = {n: w for n, w in model.named_parameters() if where(n, w)}
    if not weights:
        raise ValueError("where selects no parameter")
    gradients = []
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        for batch in batches:
            g = torch.autograd.grad(
                loss(model, batch),
                tuple(weights.values()),
                create_graph=True,
                materialize_grads=True,
            )
            gradients.append(g)
    if not gradients:
        raise ValueError("batches: there are none")

    def product(i, w):
        def times(v):
            total = torch.zeros_like(w)
            for g in gradients:
                if g[i].requires_grad:  # else the loss is linear in w
                    (Hv,) = torch.autograd.grad(
                        (g[i] * v).sum(),
                        w,
                        retain_graph=True,
                        materialize_grads=True,
                    )
                    total = total + Hv
            return total / len(gradients)

        return w, times

    return {n: product(i, w) for i, (n, w) in enumerate(weights.items())}


def _signs(w: Tensor, generator: torch.Generator) -> Tensor:
    v = torch.randint(2, w.shape, generator=generator)
    return (2 * v - 1).to(w)
