"""Named recipes: what can be done to any weight, without data or training.

A recipe is a function from one weight to a code.  It looks at nothing but
the weight, so it works on any checkpoint.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import codes, lowrank, quantize, storage
from ..codes import Code, State
from .budget import Plan, to_budget
from .choices import Choice, Metric, losses, options
from .coding import FAST, Coder, file_bytes, smallest

ENERGY, GROUP = 0.95, 64


@dataclass(frozen=True)
class Recipe:
    """A way to write weights.

    Attributes
    ----------
    rule : callable
        From a weight (out, in) in float32 or float64 to a code of it.
    what : str
        What it does, in a line.
    paper : str
        Where it is from, an arXiv number.
    """

    rule: Callable[[Tensor], Code]
    what: str
    paper: str


INT8 = partial(quantize.min_max, bits=8, symmetric=True)


def nf4(W: Tensor) -> Code:
    """Round groups to quantiles of the normal distribution.

    The scales are quantized again, as in QLoRA.
    """
    code = quantize.nf4(W, each=GROUP)
    by = quantize.small_scales(code.x.by)
    return replace(code, x=replace(code.x, by=by))


def svd(W: Tensor) -> Code:
    """Keep most of the energy of a matrix in two factors of 8 bits."""
    rank = lowrank.energy_rank(lowrank.spectrum(W), energy=ENERGY)
    factors = lowrank.svd(W, rank=max(1, rank))  # of zeros it would be 0
    return replace(factors, u=INT8(factors.u), v=INT8(factors.v))


#: The recipes by name.
RECIPES = {
    "int8": Recipe(INT8, "8 bits, a scale for each row", "1712.05877"),
    "int4": Recipe(
        partial(quantize.mse, bits=4, each=GROUP),
        f"4 bits, a grid for each group of {GROUP}",
        "1909.05840",
    ),
    "nf4": Recipe(
        nf4, f"4 bits, quantiles of a normal, groups of {GROUP}", "2305.14314"
    ),
    "kmeans4": Recipe(Choice(bits=4), "16 shared values", "1510.00149"),
    "sparse": Recipe(
        Choice(sparsity=0.5, bits=4),
        "half of them, 16 shared values",
        "1510.00149",
    ),
    "svd": Recipe(
        svd,
        f"two factors of 8 bits, {ENERGY:.0%} of the energy",
        "1404.0736",
    ),
}


def by_recipe(W: Tensor, name: str) -> Code:
    """Write one weight by a recipe.

    Parameters
    ----------
    W
        (out, ...) weights.
    name
        one of `RECIPES`.

    Returns
    -------
    Code
        Decodes to W's shape, in float32 or, if W is, float64.

    Raises
    ------
    ValueError
        If there is no such recipe, or W is not finite.

    Examples
    --------
    >>> import torch
    >>> by_recipe(torch.zeros(6, 2, 3, 3), "int8")
    View(Affine(Ints(uint8[6, 18], 8), float32[6, 1], 127), (6, 2, 3, 3))
    """
    if name not in RECIPES:
        raise ValueError(f"name: no recipe {name!r}, only {[*RECIPES]}")
    rows = W.detach().flatten(1)
    rows = rows if rows.dtype.itemsize > 2 else rows.float()
    code = RECIPES[name].rule(rows)
    return code if W.ndim == 2 else codes.View(code, tuple(W.shape))


def written(
    model: nn.Module,
    name: str,
    *,
    coders: Sequence[Coder] = FAST,
    progress: bool = False,
) -> State:
    """Write the weights of a model by a recipe, each in the fewest bytes.

    Parameters
    ----------
    model
        left as it is.
    name
        one of `RECIPES`.
    coders
        of the integers, as for `smallest`.
    progress
        whether to show a bar.

    Returns
    -------
    {name: Tensor or Code}
        For `storage`.  What has fewer than two dimensions, and what would
        not be shorter, stays as it is; what is tied stays tied.

    Raises
    ------
    ValueError
        If there is no such recipe, or a weight is not finite; names it.

    Examples
    --------
    >>> from minicompress import storage
    >>> model = nn.Linear(300, 100)
    >>> state = written(model, "nf4")
    >>> len(storage.dumps(model)) > 6 * len(storage.dumps(model, state))
    True
    """
    if name not in RECIPES:
        raise ValueError(f"name: no recipe {name!r}, only {[*RECIPES]}")
    trained = {id(p) for p in model.parameters()}
    kept = model.state_dict(keep_vars=True)
    state, done = codes.encode(model, codes.value), {}
    for key, w in tqdm(state.items(), desc=name, disable=not progress):
        chosen = id(kept[key]) in trained and is_weight(key, w)
        if id(w) not in done and chosen:
            done[id(w)] = shorter(key, w, name, coders)
    return {key: done.get(id(w), w) for key, w in state.items()}


def shorter(
    key: str, W: Tensor, name: str, coders: Sequence[Coder]
) -> Tensor | Code:
    """Write one weight by a recipe, or leave it if that is no shorter."""
    try:
        code = smallest(by_recipe(W, name), coders=coders)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    return min((code, W), key=file_bytes)


def mixed(
    model: nn.Module,
    *,
    budget: int,
    metric: Metric | None = None,
    coders: Sequence[Coder] = FAST,
    progress: bool = False,
) -> Plan:
    """Choose a recipe for each weight so that the file fits into a budget.

    Parameters
    ----------
    model
        left as it is.
    budget
        bytes of the file, header and all.
    metric
        from a model to a number, smaller = better; tells what a recipe costs
        a weight.  Without one it is the relative error ‖W - W'‖² / ‖W‖²,
        for which no data is needed.
    coders
        of the integers, as for `smallest`.
    progress
        whether to show a bar.

    Returns
    -------
    Plan
        `choice` names a recipe, or "as it is", for each weight.

    Raises
    ------
    ValueError
        If no file is that small, or nothing in the model can be compressed.

    References
    ----------
    Yao et al., HAWQ-V3, arXiv:2011.10680: a choice for each layer under a
    budget.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 2))
    >>> mixed(model, budget=12_000).bytes <= 12_000
    True
    """
    makers = {name: partial(by_recipe, name=name) for name in RECIPES}
    makers["as it is"] = lambda W: codes.View(W, tuple(W.shape))
    made = options(
        model, makers, where=is_weight, coders=coders, progress=progress
    )
    if metric is None:
        table = errors(model, made)
    else:
        table = losses(model, made, metric, progress=progress)
    return to_budget(model, made, table, budget=budget)


def errors(model: nn.Module, made: Mapping) -> dict[str, dict]:
    """Tell what each choice costs without any data.

    Parameters
    ----------
    model
        left as it is.
    made
        {name of a weight: {choice: code}}, as of `options`.

    Returns
    -------
    {name: {choice: (bytes, relative squared error)}}
        For `to_budget`.

    Examples
    --------
    >>> import torch
    >>> model = nn.Linear(1, 2)
    >>> model.weight.data = torch.tensor([[3.0], [4.0]])
    >>> errors(model, {"weight": {"half": torch.tensor([[3.0], [0.0]])}})
    {'weight': {'half': (8, 0.64)}}
    """
    own, table = dict(model.named_parameters()), {}
    for name, codes_of in made.items():
        W = own[name].detach().double()
        size = max(W.square().sum().item(), 1e-300)
        table[name] = {
            choice: (
                storage.payload(code),
                (W - codes.value(code)).square().sum().item() / size,
            )
            for choice, code in codes_of.items()
        }
    return table


def is_weight(name: str, w: Tensor) -> bool:
    """Tell whether a parameter is a matrix or a kernel of real numbers."""
    return w.ndim >= 2 and w.is_floating_point() and w.numel() > 0
