"""What can be done to each weight, in how many bytes, at what loss.

Every choice for a weight is a code, with a length in a file and a loss that
it causes when nothing else is changed.  A choice may be of any family:
`Choice` combines sparsity, shared values and low rank.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import codes, lowrank, prune, quantize, share, storage
from ..codes import Code
from .coding import FAST, Coder, Dumps, smallest

Maker = Callable[[Tensor], Code]
Options = Mapping[str, Mapping[object, Code]]
Table = Mapping[str, Mapping[object, tuple[int, float]]]
Metric = Callable[[nn.Module], float]


class Choice(NamedTuple):
    """What is done to one weight.

    Parameters
    ----------
    sparsity
        fraction removed by magnitude.
    bits
        of a shared value's index, 1 to 8; or 16 or 32 for floats.
    rank
        of two factors that take the place of the matrix first.
    """

    sparsity: float = 0.0
    bits: int = 32
    rank: int | None = None

    def __call__(self, W: Tensor) -> Code:
        """Compress a weight (out, in, ...)."""
        if self.rank is None:
            return _few_bits(W, self.sparsity, self.bits)
        rank = min(self.rank, *W.flatten(1).shape)
        pair = lowrank.svd(W.flatten(1), rank=rank)
        u, v = (
            _few_bits(x, self.sparsity, self.bits) for x in (pair.u, pair.v)
        )
        return codes.View(codes.Factors(u, v), tuple(W.shape))


def menu(
    sparsities: Sequence[float] = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95),
    bits: Sequence[int] = (2, 3, 4, 5, 6, 8),
    ranks: Sequence[int] = (),
) -> dict[Choice, Choice]:
    """List the choices of `Choice`: all combinations, and two factors each.

    Parameters
    ----------
    sparsities, bits, ranks
        what is combined; factors are not pruned.

    Examples
    --------
    >>> len(menu(sparsities=(0, 0.9), bits=(2, 4), ranks=(8,)))
    6
    """
    whole = [Choice(s, b) for s, b in product(sparsities, bits)]
    thin = [Choice(0.0, b, r) for b, r in product(bits, ranks)]
    return {c: c for c in (*whole, *thin)}


def options(
    model: nn.Module,
    makers: Mapping[object, Maker],
    *,
    where: Callable[[str, Tensor], bool] = lambda name, w: w.ndim >= 2,
    coders: Sequence[Coder] = FAST,
    dumps: Dumps = storage.dumps,
    progress: bool = False,
) -> dict[str, dict]:
    """Make every choice for every weight, written in the fewest bytes.

    Parameters
    ----------
    model
        left as it is; tied weights are one, under their first name.
    makers
        {choice: function from a weight to its code}; `menu`, or your own.
    where
        from a name and a weight to a bool: which ones.
    coders, dumps
        as for `smallest`.
    progress
        show a bar.

    Returns
    -------
    {name: {choice: code}}
        For `losses` and `to_budget`.  Data-aware codes, which need to know
        what a layer sees, you make yourself and add.

    Examples
    --------
    >>> made = options(nn.Linear(8, 4), menu(sparsities=(0,), bits=(1, 2)))
    >>> [choice.bits for choice in made["weight"]]
    [1, 2]
    """
    chosen = {n: w.detach() for n, w in model.named_parameters() if where(n, w)}
    if not chosen or not makers:
        raise ValueError("where selects no parameter, or makers has no choice")
    made = {name: {} for name in chosen}
    pairs = [*product(chosen, makers)]
    for name, choice in tqdm(pairs, desc="codes", disable=not progress):
        code = makers[choice](chosen[name])
        made[name][choice] = smallest(code, coders=coders, dumps=dumps)
    return made


def losses(
    model: nn.Module, made: Options, metric: Metric, *, progress: bool = False
) -> dict[str, dict]:
    """Measure what each choice costs when only its own weight is changed.

    Parameters
    ----------
    model
        left as it is.
    made
        of `options`.
    metric
        from a model to a number without randomness, smaller = better: the
        loss on training or calibration data.
    progress
        show a bar.

    Returns
    -------
    {name: {choice: (bytes, loss)}}
        As of `quantize.sensitivity`.

    Examples
    --------
    >>> model = nn.Linear(8, 4)
    >>> made = options(model, menu(sparsities=(0,), bits=(1, 8)))
    >>> def error(m):
    ...     return (m.weight - model.weight).abs().sum().item()
    >>> coarse, fine = losses(model, made, error)["weight"].values()
    >>> coarse[1] > fine[1] == 0  # 32 weights are 32 values
    True
    """
    table = {}
    for name, own in tqdm(made.items(), desc="losses", disable=not progress):
        table |= quantize.sensitivity(model, {name: own}, metric)
    return table


def _few_bits(W: Tensor, sparsity: float, bits: int) -> Code:
    """Prune a weight, and write what is left with few bits."""
    if sparsity:
        code = codes.sparse(W, prune.magnitude(W, sparsity=sparsity))
        if not len(code.values):
            return code
        return replace(code, values=_few_bits(code.values, 0.0, bits))
    if bits <= 8:
        return share.kmeans(W, bits=bits)
    if bits not in (16, 32):
        raise ValueError(f"bits must be 1 to 8, 16 or 32, got {bits}")
    return codes.View(W.half() if bits == 16 else W, tuple(W.shape))
