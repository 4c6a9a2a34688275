"""A small network as a function of a large one's weights.

Both are ordinary modules, and names decide what is shared: a parameter of
the small model is the leading part of the large model's parameter of that
name, so that a smaller choice is nested in a larger one (weight
entanglement), and a block that the small model does not have is a name that
does not occur.  Operations that shall not share get different names,
"layer1.conv3" and "layer1.conv5": the choice blocks of single-path one-shot
search.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

CONVOLUTIONS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def inherit(large: nn.Module, small: nn.Module) -> dict[str, Tensor]:
    """Cut the weights of a small model out of a large one.

    Each axis is cut to its first entries: the first channels, hidden units,
    features and, as blocks are numbered, the first blocks.  Only the spatial
    axes of kernels are cut to their middle.  Where `elastic_kernels` has
    put matrices beside a kernel, the middle is multiplied by them.

    The first rows of a Transformer's queries, keys and values are its first
    heads if both models have heads of one size, width / heads in
    `models.LM`; if not, the heads of the small model mix those of the large.

    Parameters
    ----------
    large
        any module.
    small
        a module with the same names, or some of them, and sizes that are no
        larger.  Only its names and shapes count: it may lie on the meta
        device.

    Returns
    -------
    {name: Tensor}
        For ``torch.func.functional_call(small, weights, x)``.  Views of the
        large model's memory, for a product with a matrix excepted: gradients
        flow into the part that was cut out, and BatchNorm in training mode
        writes into the averages of the large model.

    Raises
    ------
    ValueError
        If the large model lacks a name, a shape is no part of its shape, or
        the small model ties what the large one does not.

    References
    ----------
    Chen et al., AutoFormer, arXiv:2107.00651 (weight entanglement); Cai et
    al., Once-for-All, arXiv:1908.09791, section 3.3.

    Examples
    --------
    >>> from torch.func import functional_call
    >>> large, small = nn.Linear(3, 2), nn.Linear(2, 1)
    >>> weights = inherit(large, small)
    >>> bool((weights["weight"] == large.weight[:1, :2]).all())
    True
    >>> functional_call(small, weights, torch.ones(1, 2)).shape
    torch.Size([1, 1])
    """
    given = {
        **dict(large.named_parameters(remove_duplicate=False)),
        **dict(large.named_buffers(remove_duplicate=False)),
    }
    wanted = [*small.named_parameters(), *small.named_buffers()]
    _check_ties(given, small)
    return {name: _part(name, t, given, small) for name, t in wanted}


def subnet(large: nn.Module, small: nn.Module) -> nn.Module:
    """Copy a small model with weights that are cut out of a large one.

    Parameters
    ----------
    large, small
        as for `inherit`; left as they are.

    Returns
    -------
    nn.Module
        A copy of `small`, with memory of its own and in the mode of
        `large`: ready to be measured, stored or trained on.  What was
        tied is tied.

    Examples
    --------
    >>> large = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with torch.device("meta"):  # no memory, no random numbers
    ...     small = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> bool((subnet(large, small)[0].weight == large[0].weight[:4]).all())
    True
    """
    weights = inherit(large, small)
    own = {}  # deepcopy takes these for copies that it has made already
    for name, p in small.named_parameters():
        w = weights[name].detach().clone()
        own[id(p)] = nn.Parameter(w, p.requires_grad)
    for name, b in small.named_buffers():
        own[id(b)] = weights[name].detach().clone()
    return deepcopy(small, own).train(large.training)


def _part(
    name: str, t: Tensor, given: Mapping[str, Tensor], small: nn.Module
) -> Tensor:
    """Cut out one parameter or buffer; `t` has its shape."""
    if name not in given:
        raise ValueError(f"{name}: {_shape(t)}, but the large model has none")
    w = given[name] if isinstance(t, nn.Parameter) else given[name].detach()
    path = name.rpartition(".")[0]
    spatial = isinstance(small.get_submodule(path), CONVOLUTIONS)
    ends = 2 if spatial else t.ndim  # axes that are cut at their end
    fits = w.ndim == t.ndim and all(
        n <= m and (axis < ends or (m - n) % 2 == 0)
        for axis, (m, n) in enumerate(zip(w.shape, t.shape, strict=True))
    )
    if not fits:
        raise ValueError(
            f"{name}: {_shape(t)} is no part of the large model's {_shape(w)}"
        )
    w = w[tuple(slice(n) for n in t.shape[:ends])] if t.ndim else w
    return _kernel(w, t.shape[2:], path, given) if t.ndim > ends else w


def _kernel(
    w: Tensor, size: torch.Size, path: str, given: Mapping[str, Tensor]
) -> Tensor:
    """Cut a kernel (out, in, ...) to its middle, ring by ring."""
    for k in range(w.shape[-1] - 2, size[-1] - 1, -2):
        matrix = given.get(f"{path}.to{k}".lstrip("."))
        if matrix is not None:
            sides = [k] * len(size)
            w = (_middle(w, sides).flatten(2) @ matrix).unflatten(2, sides)
    return _middle(w, size)


def _middle(w: Tensor, size: Sequence[int]) -> Tensor:
    for axis, n in enumerate(size, start=2):
        w = w.narrow(axis, (w.shape[axis] - n) // 2, n)
    return w


def _check_ties(given: Mapping[str, Tensor], small: nn.Module) -> None:
    first = {}
    for name, p in small.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(p), name)
        if given.get(name) is not given.get(other):
            raise ValueError(f"{name}: tied to {other}, but only in `small`")


def _shape(t: Tensor) -> tuple[int, ...]:
    return tuple(t.shape)
