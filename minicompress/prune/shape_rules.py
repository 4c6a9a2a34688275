"""What operations without weights do to the units of their arguments.

A rule takes the tracer, the operation, its arguments by name and its result,
and returns the label of the result (or one for each, in a list).
"""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .units import shrink, varying


def unknown(t, func, a, out):
    """Let everything stay as it is that reaches the operation."""
    for x in tensors(a):
        t.keep_whole(x)


def pointwise(t, func, a, out):
    """Join what meets: element by element, with broadcasting."""
    if not isinstance(out, Tensor):
        return unknown(t, func, a, out)
    first, *others = tensors(a)
    label, shape = t.label(first), first.shape
    for x in others:
        label = t.meet(label, shape, t.label(x), x.shape)
        shape = torch.broadcast_shapes(shape, x.shape)
    return label


def constant(t, func, a, out):
    """Make a value of a size that is written down."""
    return None


def identity(t, func, a, out):
    """Pass the label on."""
    x = tensors(a)[0]
    return t.label(x)


def shape(t, func, a, out):
    """Do with the label what is done with the value."""
    x = tensors(a)[0]
    if id(x) not in t.labels and t.units.owns(x) and is_transposed(x, out):
        t.flipped[id(out)] = x
        return None
    if t.label(x) is None:
        return None
    return _crossed(t, _run(func, a, {id(x): t.full(x)}))


def joining(t, func, a, out):
    """Concatenate or stack labels like their values."""
    values, new = a["tensors"], is_named(func, "stack")
    dim = a.get("dim", 0) % out.ndim
    labels = [t.label(x) for x in values]
    known = [varying(label) for label in labels if label is not None]
    if not known:
        return None
    if not new and (any(dim in axes for axes in known) or not any(known)):
        return _crossed(t, torch.cat([t.full(x) for x in values], dim))
    # Side by side along an axis without units: they agree about the others.
    label, shape = None, ()
    for x, own in zip(values, labels, strict=True):
        size = [1 if k == dim and not new else n for k, n in enumerate(x.shape)]
        label = t.meet(label, shape, own, tuple(size))
        shape = torch.broadcast_shapes(shape, size)
    return label.unsqueeze(dim) if new and label is not None else label


def picking(t, func, a, out):
    """Pick by number along an axis: it has to keep its length."""
    x = tensors(a)[0]
    label = t.label(x)
    if label is None:
        return None
    if (
        isinstance(out, Tensor)
        and out.shape == x.shape
        and is_named(func, "slice")
    ):
        return label
    dim = a.get("dim", 0)
    if any(y.dtype == torch.bool for y in tensors(a)[1:]):
        return unknown(t, func, a, out)
    if is_named(func, "index _unsafe_index"):
        axes = [k for k, i in enumerate(a["indices"]) if i is not None]
    else:
        axes = dim if isinstance(dim, list | tuple) else [dim]
        axes = [k % x.ndim for k in a.get("dims", axes)] or range(x.ndim)
    for k in axes:
        label = t.merge(label, k)
    found = _run(func, a, {id(x): label.expand(x.shape)})
    return list(found) if isinstance(found, tuple | list) else found


def chunk(t, func, a, out):
    """Cut an axis in equal parts: the same units stay in all of them."""
    x, parts = a["self"], a.get("chunks", 2)
    dim = a.get("dim", -1 if "chunks" not in a else 0) % x.ndim
    label = t.label(x)
    if label is None:
        return None
    if label.shape[dim] > 1:
        if label.shape[dim] % parts:
            return t.merge(label, dim)
        label = t.merge(label.unflatten(dim, (parts, -1)), dim).squeeze(dim)
    return label


def shuffle(t, func, a, out):
    """Interleave the channels of groups: the same ones stay in each."""
    label, n = t.label(a["self"]), a["groups"]
    if label is None or label.shape[1] == 1:
        return label
    label = t.merge(label.unflatten(1, (n, -1)), 1).squeeze(1)
    return label.repeat_interleave(n, 1)


def pixels(t, func, a, out):
    """Turn channels into places, or back: a unit stays a channel."""
    x, down = a["self"], is_named(func, "pixel_unshuffle")
    label = t.label(x)
    if label is None or x.ndim != 4 or any(k > 1 for k in varying(label)):
        return unknown(t, func, a, out)
    n = a["downscale_factor" if down else "upscale_factor"] ** 2
    if down:
        return label.repeat_interleave(n if label.shape[1] > 1 else 1, 1)
    if label.shape[1] == 1:
        return label
    return t.merge(label.unflatten(1, (-1, n)), 2).squeeze(2)


def pad(t, func, a, out):
    """Add zeros: along the units they belong to none."""
    x = a["self"]
    label = t.label(x)
    if label is None:
        return None
    sizes = a["pad"]
    for i in range(len(sizes) // 2):
        k, (before, after) = x.ndim - 1 - i, sizes[2 * i : 2 * i + 2]
        if label.shape[k] > 1:
            if min(before, after) < 0:
                label = t.merge(label, k)
                continue
            ends = [0] * (2 * i) + [before, after]
            label = nn.functional.pad(label, ends)
    return label


def spatial(t, func, a, out):
    """Pool or resize the last axes, each channel by itself."""
    x = tensors(a)[0]
    label = t.label(x)
    if label is None:
        return None
    for k in range(int(func._schema.name.split("d")[-2][-1])):
        label = t.merge(label, x.ndim - 1 - k)
    return label


def along(t, func, a, out):
    """Combine what lies along an axis (softmax, sums that run)."""
    x = tensors(a)[0]
    label = t.label(x)
    return None if label is None else t.merge(label, a.get("dim", -1))


def reduction(t, func, a, out):
    """Reduce axes; a mean or maximum would count the zeros of a unit."""
    x = tensors(a)[0]
    label = t.label(x)
    if label is None:
        return None
    dim = a.get("dim")
    dims = range(x.ndim) if dim is None or dim == [] else dim
    dims = [k % x.ndim for k in ([dims] if isinstance(dims, int) else dims)]
    for k in dims:
        label = t.merge(label, k)
    return label if a.get("keepdim") else label.squeeze(tuple(dims))


def _crossed(t, label: Tensor) -> Tensor:
    """Remember a label that varies along several axes, for the end."""
    label = shrink(label)
    if len(varying(label)) > 1:
        t.units.crossed.append(label)
    return label


def _run(func, a: dict, labels: dict):
    """Call an operation on labels in place of values."""
    given = {}
    for name, x in a.items():
        if isinstance(x, list | tuple) and any(
            isinstance(y, Tensor) for y in x
        ):
            x = [y if y is None else y.cpu() for y in x]
        elif isinstance(x, Tensor):
            x = labels[id(x)] if id(x) in labels else x.cpu()
        given[name] = x
    if is_named(func, "view _unsafe_view"):
        return given["self"].reshape(given["size"])
    return func(**given)


def is_transposed(x: Tensor, y: Tensor) -> bool:
    """Say whether y is the transpose of the matrix x."""
    turned = y.shape == x.shape[::-1] and y.stride() == x.stride()[::-1]
    return x.ndim == 2 and turned and y.stride() != x.stride()


def tensors(a: dict) -> list[Tensor]:
    """List the tensors among arguments, those in lists too."""
    return [x for x in tree_leaves(list(a.values())) if isinstance(x, Tensor)]


def is_named(func, names: str) -> bool:
    """Say whether an operation has one of these names."""
    return func._schema.name.removeprefix("aten::") in names.split()
