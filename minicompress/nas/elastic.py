"""What a supernet needs before smaller networks can be cut out of it."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ROWWISE = (
    nn.Linear,
    *CONVOLUTIONS,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.LayerNorm,
    nn.PReLU,
)


def sorted_channels(
    model: nn.Module,
    writers: Sequence[str],
    readers: Sequence[str],
    *,
    units: int | None = None,
    score: Tensor | None = None,
) -> nn.Module:
    """Put the most important channels first; the function stays the same.

    A narrow network takes the leading channels of a wide one: they should
    be the best.

    Parameters
    ----------
    model
        left as it is.
    writers
        names of all modules that have one row for each channel: the layer
        that computes them, its BatchNorm, a depthwise convolution.
    readers
        names of all layers that have one column for each channel.
    units
        how many channels are sorted, the rows of the first writer if left
        out.  Where there are more rows than that, each channel is a number
        of rows in succession: with the heads as units, the queries, keys
        and values of a Transformer as writers and its output layer as the
        reader, heads are sorted.  A linear layer behind a convolution and
        nn.Flatten has several columns for each channel in the same way.
    score
        (units,), larger is more important; if left out, the L1 norm of what
        the readers multiply a channel by.  (A normalization in between makes
        the size of the writers' rows meaningless.)

    Returns
    -------
    nn.Module
        A copy.  Channels of equal score keep their order.

    Raises
    ------
    ValueError
        If a module is of a kind for which this does not hold, its size is
        no multiple of `units`, or `score` has another shape.

    References
    ----------
    Cai et al., Once-for-All, arXiv:1908.09791, section 3.3.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> new, x = sorted_channels(model, ["0"], ["2"]), torch.ones(1, 3)
    >>> torch.allclose(new(x), model(x), atol=1e-6)
    True
    >>> norms = new[2].weight.abs().sum(0)
    >>> bool((norms.diff() <= 0).all())
    True
    """
    model = deepcopy(model)
    rows = [(n, _kind(model, n, ROWWISE)) for n in writers]
    columns = [
        (n, _kind(model, n, (nn.Linear, *CONVOLUTIONS))) for n in readers
    ]
    if not rows or not columns:
        raise ValueError(f"writers {writers} and readers {readers}: name some")
    units = len(rows[0][1].weight) if units is None else units
    moved = [(n, t, 0) for n, m in rows for t in _tensors(m)]
    moved += [(n, m.weight, 1) for n, m in columns]
    for name, t, axis in moved:
        if t.ndim <= axis or t.shape[axis] % units:
            raise ValueError(f"{name}: {tuple(t.shape)} has no {units} units")
    if score is None:
        weights = [m.weight.detach() for _, m in columns]
        score = sum(
            w.abs().transpose(0, 1).reshape(units, -1).sum(1) for w in weights
        )
    if score.shape != (units,):
        raise ValueError(f"score: {tuple(score.shape)}, not ({units},)")
    order = score.argsort(descending=True, stable=True)
    with torch.no_grad():
        for _, t, axis in moved:
            each = t.shape[axis] // units
            inside = torch.arange(each, device=t.device)
            index = order.to(t.device)[:, None] * each + inside
            t.copy_(t.index_select(axis, index.flatten()))
    return model


def elastic_kernels(model: nn.Module, sizes: Sequence[int] = (3,)) -> nn.Module:
    """Give each kernel a matrix for every smaller size.

    The middle of a good 5×5 kernel need not be a good 3×3 kernel.  A matrix
    (9, 9) that all channels of a layer share, and that starts at the
    identity, lets the two differ.  From 7 to 3 both matrices act: the middle
    25 numbers are multiplied by the one of 5, then the middle 9 of these by
    the one of 3.

    Parameters
    ----------
    model
        a supernet, left as it is.
    sizes
        odd side lengths.

    Returns
    -------
    nn.Module
        A copy for `fit_supernet`, in which a convolution named "conv" has
        parameters "conv.to3" as well, which `inherit` uses.  `subnet`
        multiplies them in: what it returns has none.

    Raises
    ------
    ValueError
        If no nn.Conv1d, 2d or 3d has larger kernels, with equal and odd
        sides.

    References
    ----------
    Cai et al., Once-for-All, arXiv:1908.09791, section 3.3.

    Examples
    --------
    >>> model = elastic_kernels(nn.Sequential(nn.Conv2d(1, 1, 5)))
    >>> [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    [('0.weight', (1, 1, 5, 5)), ('0.bias', (1,)), ('0.to3', (9, 9))]
    """
    model, found = deepcopy(model), 0
    for conv in model.modules():
        if not isinstance(conv, CONVOLUTIONS) or len({*conv.kernel_size}) > 1:
            continue
        side, w = conv.kernel_size[0], conv.weight
        for k in sizes:
            if k < side and k % 2 and side % 2:
                matrix = torch.eye(k ** (w.ndim - 2), dtype=w.dtype)
                matrix = nn.Parameter(matrix.to(w.device))
                conv.register_parameter(f"to{k}", matrix)
                found += 1
    if not found:
        raise ValueError(f"sizes: no kernel can be cut to one of {sizes}")
    return model


def _kind(model: nn.Module, name: str, kinds: tuple) -> nn.Module:
    """Find a module; raise if its channels cannot be moved one by one."""
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{name!r}: the model has no such module") from error
    groups = getattr(module, "groups", 1)
    depthwise = groups == getattr(module, "out_channels", 1)
    if not isinstance(module, kinds) or (
        groups > 1 and not (depthwise and kinds is ROWWISE)
    ):
        raise ValueError(f"{name}: {module} cannot be sorted by channels")
    return module


def _tensors(module: nn.Module) -> list[Tensor]:
    """Collect what has one entry, or row, for each channel."""
    found = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return [t for t in found if t.ndim]
