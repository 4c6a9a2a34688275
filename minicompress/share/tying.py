"""One set of weights in many places: blocks that share, and no longer share.

A model whose blocks share their weights is as deep as before.  It stores less
and computes the same: multiplications, activations and time are those of the
model in which every block has weights of its own.  What is shared is the
parameter itself, one object under several names, so that its gradient is the
sum over its uses, an optimizer moves it once and a file holds it once.  Who
compresses such a model makes one code for all names of a tensor, as
`codes.encode` does: a state made name by name is stored name by name.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from itertools import chain

from torch import Tensor, nn
from torch.nn.utils import parametrize

Parts = str | Iterable[str] | Callable[[str, Tensor], bool]


def tie_blocks(
    model: nn.Module,
    stack: str,
    *,
    parts: Parts = "",
    source: str = "first",
    groups: Sequence[int] | None = None,
) -> nn.Module:
    """Let the blocks of a stack share weights.

    What the blocks do not share stays as it is.  Buffers are each block's
    own, as running statistics describe what arrives at one place; a buffer
    that `parts` names in full (a mask, a table of angles) is shared.

    Parameters
    ----------
    model
        left as it is.
    stack
        path of an nn.ModuleList or nn.Sequential of blocks whose parameters
        have the same names and shapes: "blocks" in the models of this
        library.
    parts
        what is shared, by paths inside a block, each with everything below
        it: "attention", ("up", "down"), "norm1.weight"; or a function from a
        name inside a block and a parameter to a bool.  "" is the whole
        block, normalizations included, as in ALBERT.
    source
        where a shared parameter starts: at that of the "first" block, or at
        the "mean" of all that share it.
    groups
        a number for each block; those with the same number share.  By
        default all do; see `cycle` and `sequence`.

    Returns
    -------
    nn.Module
        A copy of the model.  A parameter that was tied to one outside of the
        stack still is.

    Raises
    ------
    ValueError
        If the blocks differ in what they should share, or `parts` selects
        nothing.

    References
    ----------
    Lan et al., ALBERT, arXiv:1909.11942, section 3.1: all, the attention
    only, or the feed-forward layers only.

    Examples
    --------
    >>> blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> tied = tie_blocks(blocks, "", parts="weight")
    >>> tied[0].weight is tied[1].weight, tied[0].bias is tied[1].bias
    (True, False)
    """
    if source not in ("first", "mean"):
        raise ValueError(f'source must be "first" or "mean", got {source!r}')
    model = deepcopy(model)
    refuse_parametrized(model)
    blocks = _blocks(model, stack)
    numbers = [0] * len(blocks) if groups is None else list(groups)
    if len(numbers) != len(blocks):
        raise ValueError(
            f"groups: {len(numbers)} numbers for {len(blocks)} blocks"
        )
    for number in dict.fromkeys(numbers):
        pairs = zip(blocks.items(), numbers, strict=True)
        alike = dict(pair for pair, n in pairs if n == number)
        path, block = next(iter(alike.items()))
        for name in _chosen(block, path, parts):
            _tie(model, alike, name, source)
    return model


def untie(model: nn.Module) -> nn.Module:
    """Give every place parameters, buffers and layers of its own.

    The model computes what it did, and is as large as it computes.  A layer
    that a forward calls again and again under one name stays one layer.

    Parameters
    ----------
    model
        left as it is.

    Returns
    -------
    A copy in which no tensor has two names.

    Examples
    --------
    >>> blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> uses(untie(tie_blocks(blocks, "")))
    {}
    """
    model = deepcopy(model)
    refuse_parametrized(model)
    _separate(model, set())
    seen: set[int] = set()
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, t in list(held.items()):
                if t is not None and id(t) in seen:
                    setattr(module, key, _like(t.detach().clone(), t))
                seen.add(id(held[key]))
    return model


def uses(model: nn.Module) -> dict[str, list[str]]:
    """List the tensors that a model knows under several names.

    Parameters
    ----------
    model
        its parameters and buffers are looked at.

    Returns
    -------
    {first name: all names} of every shared tensor, the first included.

    Examples
    --------
    >>> blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> uses(tie_blocks(blocks, "", parts="weight"))
    {'0.weight': ['0.weight', '1.weight']}
    """
    names: dict[int, list[str]] = {}
    for name, t in _named(model):
        names.setdefault(id(t), []).append(name)
    return {found[0]: found for found in names.values() if len(found) > 1}


def sequence(N: int, M: int) -> list[int]:
    """Let neighbors share: M sets of weights, each for a run of blocks.

    Parameters
    ----------
    N
        blocks.
    M
        different ones, 1 to N.

    Returns
    -------
    (N,)
        Numbers for the `groups` of `tie_blocks`; where M does not divide N,
        the runs differ by one block at most.

    References
    ----------
    Takase and Kiyono, Lessons on Parameter Sharing across Layers in
    Transformers, arXiv:2104.06022: SEQUENCE.

    Examples
    --------
    >>> sequence(6, 3)
    [0, 0, 1, 1, 2, 2]
    """
    _check_counts(N, M)
    return [i * M // N for i in range(N)]


def cycle(N: int, M: int) -> list[int]:
    """Run through M sets of weights again and again.

    Parameters, Returns, References
        as for `sequence`; there CYCLE.

    Examples
    --------
    >>> cycle(6, 3)
    [0, 1, 2, 0, 1, 2]
    """
    _check_counts(N, M)
    return [i % M for i in range(N)]


def cycle_reversed(N: int, M: int) -> list[int]:
    """Run through M sets of weights, the last time backwards.

    The first and the last block are the same one.

    Parameters, Returns, References
        as for `sequence`; there CYCLE (REV).

    Examples
    --------
    >>> cycle_reversed(6, 3), cycle_reversed(9, 3)
    ([0, 1, 2, 2, 1, 0], [0, 1, 2, 0, 1, 2, 2, 1, 0])
    """
    _check_counts(N, M)
    last = max(M, (N - 1) // M * M)  # where the last time begins
    return [i % M if i < last else M - 1 - i % M for i in range(N)]


def merge(model: nn.Module, tensors: list[Tensor], new: Tensor) -> None:
    """Put one tensor in the place of several, wherever a model has them."""
    old = set(map(id, tensors))
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for key, t in list(held.items()):
                if id(t) in old:  # setattr: nn.LSTM keeps a list of its own
                    setattr(module, key, new)


def refuse_parametrized(model: nn.Module) -> None:
    """Raise if weights are computed: a tie would not outlive the baking."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(f"{name}: is parametrized, bake the model first")


def _check_counts(N: int, M: int) -> None:
    if not 1 <= M <= N:
        raise ValueError(f"M must be from 1 to N = {N}, got {M}")


def _named(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Name parameters, then buffers, each as often as it is used."""
    return chain(
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )


def _blocks(model: nn.Module, stack: str) -> dict[str, nn.Module]:
    """List the blocks of a stack by their paths."""
    try:
        found = model.get_submodule(stack)
    except AttributeError:
        raise ValueError(f"stack: the model has no {stack!r}") from None
    if not isinstance(found, nn.ModuleList | nn.Sequential) or not len(found):
        raise ValueError(
            f"stack: {stack!r} is a {type(found).__name__}, not an "
            "nn.ModuleList or nn.Sequential with blocks"
        )
    inside = found._modules.items()
    return {f"{stack}.{name}".lstrip("."): block for name, block in inside}


def _chosen(block: nn.Module, path: str, parts: Parts) -> list[str]:
    """List the names inside a block that `parts` selects."""
    weights = dict(block.named_parameters(remove_duplicate=False))
    buffers = dict(block.named_buffers(remove_duplicate=False))
    if callable(parts):
        names = [n for n, w in weights.items() if parts(n, w)]
    else:
        names = []
        for part in [parts] if isinstance(parts, str) else parts:
            found = [n for n in weights if _below(n, part)]
            found += [part] if part in buffers else []
            if not found:
                raise ValueError(f"parts: {path} has no tensors in {part!r}")
            names += found
    if not names:
        raise ValueError(f"parts selects nothing in {path}")
    return list(dict.fromkeys(names))


def _below(name: str, path: str) -> bool:
    return not path or name == path or name.startswith(f"{path}.")


def _tie(
    model: nn.Module, blocks: dict[str, nn.Module], name: str, source: str
) -> None:
    """Make what several blocks have under a name one tensor."""
    found = {}
    for path, block in blocks.items():
        found[path] = dict(_named(block)).get(name)
    first, *rest = found.values()
    for path, t in found.items():
        if t is None or (t.shape, t.dtype) != (first.shape, first.dtype):
            what = "missing" if t is None else f"{(*t.shape,)} {t.dtype}"
            raise ValueError(
                f"parts: {path}.{name} is {what}, not {(*first.shape,)} "
                f"{first.dtype} as in {next(iter(found))}"
            )
    new = first
    if source == "mean" and first.is_floating_point():
        total = sum(t.detach().double() for t in found.values())
        new = _like((total / len(found)).to(first.dtype), first)
    merge(model, [first, *rest], new)


def _like(values: Tensor, t: Tensor) -> Tensor:
    """Make values a parameter if t is one."""
    if isinstance(t, nn.Parameter):
        return nn.Parameter(values, t.requires_grad)
    return values


def _separate(module: nn.Module, seen: set[int]) -> None:
    """Copy layers that have been seen before, from the outside to inside."""
    seen.add(id(module))
    for name, child in module._modules.items():
        if child is not None and id(child) in seen:
            module._modules[name] = deepcopy(child)
        if child is not None:
            _separate(module._modules[name], seen)
