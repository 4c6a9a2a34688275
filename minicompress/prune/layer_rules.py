"""What layers do to the units of their arguments: rules as in `shape_rules`.

A layer contracts the units of its input with the columns of a weight and
makes units of its rows; a norm has one number for each unit.
"""

import torch
from torch import Tensor, nn

from .shape_rules import is_named, tensors, unknown
from .units import place, varying

NORMS = (nn.LayerNorm.forward, nn.RMSNorm.forward)


def linear(t, func, a, out):
    """Contract the last axis with the columns of a weight; make rows."""
    return _layer(t, a["input"], -1, a["weight"], 1, 0, a.get("bias"))


def convolution(t, func, a, out):
    """Contract the channels with a kernel, group by group."""
    x, w, flip = a["input"], a["weight"], a["transposed"]
    groups, bias = a["groups"], a["bias"]
    label = t.label(x)
    if label is not None and any(k > 1 for k in varying(label)):
        return unknown(t, func, a, out)
    if groups == 1:
        return _layer(t, x, 1, w, int(not flip), int(flip), bias)
    units, label = t.features(x, 1)
    if units is None or not t.units.owns(w):
        return _whole(t, units, label, w, bias)
    # A group of the convolution goes as a whole.
    rows = t.units.entries(w, 0, "along").view(groups, -1)
    first = t.merge(rows, 1)
    t.join(units.view(groups, -1), first)
    n = out.shape[1]
    rows = first.expand(-1, n // groups).reshape(n) if flip else rows.flatten()
    _along(t, rows, bias)
    return place(rows, 1, out.ndim)


def embedding(t, func, a, out):
    """Look rows up; the features are the columns."""
    w = a["weight"]
    t.keep_whole(a["indices"])
    if not t.units.owns(w):
        t.keep_whole(w)
        return None
    return place(t.units.entries(w, 1, "out"), -1, out.ndim)


def _layer(t, x, axis, w, ins, outs, bias):
    """Multiply the features of x by a matrix: the axes of w say how."""
    units, label = t.features(x, axis)
    if units is None or not t.units.owns(w):
        return _whole(t, units, label, w, bias)
    t.join(units, t.units.entries(w, ins, "in"))
    rows = t.units.entries(w, outs, "out")
    _along(t, rows, bias)
    return place(rows, axis, x.ndim)


def _whole(t, units, label, w, bias):
    """Leave a layer as it is: it works within units, or is computed."""
    for x in (w, bias):
        t.keep_whole(x)
    if units is not None:
        t.fix(units)
    elif w is not None and not t.units.owns(w):
        t.fix(label)
        return None
    return label


def _along(t, units: Tensor, *tensors) -> None:
    """Let one number per unit (biases, norms) go with its unit."""
    own = [t.units.entries(x, 0, "along") for x in tensors if t.units.owns(x)]
    if own:
        t.join(units, torch.stack(own))
    for x in tensors:
        if x is not None and not t.units.owns(x):
            t.keep_whole(x)
            t.fix(units)


def batch_norm(t, func, a, out):
    """Treat each channel by itself."""
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = [a.get(name) for name in names]
    units, _ = t.features(a["input"], 1)
    if units is None:
        return unknown(t, func, a, out)
    _along(t, units, *tensors)
    return t.label(a["input"])


def layer_norm(t, func, a, out):
    """Take the mean over the units: the layer has to know how many."""
    x, module = a["input"], t.path.module
    units, label = t.features(x, -1)
    tensors = (a.get("weight"), a.get("bias"))
    if len(a["normalized_shape"]) > 1:
        return unknown(t, func, a, out)
    if units is None:  # each unit is normalized by itself
        return _whole(t, units, label, *tensors)
    if getattr(type(module), "forward", None) not in NORMS:
        t.fix(units)  # called as a function, or in a way of its own
    _along(t, units, *tensors)
    name = f"{t.path.name}.normalized_shape".lstrip(".")
    own = t.units.entries(module, len(units), "along", name)
    t.join(units, own)
    return t.label(x)


def group_norm(t, func, a, out):
    """Keep or remove the channels of a group of the norm together."""
    x, module, groups = a["input"], t.path.module, a["num_groups"]
    units, _ = t.features(x, 1)
    if units is None:
        return unknown(t, func, a, out)
    if not isinstance(module, nn.GroupNorm):
        t.fix(units)
    t.merge(units.view(groups, -1), 1)
    _along(t, units, a.get("weight"), a.get("bias"))
    name = f"{t.path.name}.num_channels".lstrip(".")
    t.join(units, t.units.entries(module, len(units), "along", name))
    return t.label(x)


def matmul(t, func, a, out):
    """Multiply matrices; of several, each (a head) is one unit."""
    x, y = tensors(a)[-2:]
    if y.ndim == 2 and (t.units.owns(y) or id(y) in t.flipped):
        w = t.flipped.get(id(y), y)
        ins = int(w is not y)
        bias = a.get("self") if is_named(func, "addmm") else None
        return _layer(t, x, -1, w, ins, 1 - ins, bias)
    if min(x.ndim, y.ndim) < 2 or is_named(func, "addmm"):
        return unknown(t, func, a, out)
    own = t.units.owns(t.flipped.get(id(x), x))
    if own and x.ndim == 2:  # mixes places, not channels
        t.keep_whole(x)
        x = torch.empty(x.shape, device="meta")
    return _heads(t, [x, y])


def attention(t, func, a, out):
    """Attend within each head: a head is one unit."""
    q, k, v = a["query"], a["key"], a["value"]
    inside = [q, k, v]
    if a.get("attn_mask") is not None:
        inside.append(a["attn_mask"])
    repeat = q.shape[-3] // k.shape[-3] if a.get("enable_gqa") else 1
    return _heads(t, inside, {id(k): repeat, id(v): repeat})


def _heads(t, values: list[Tensor], repeats: dict | None = None):
    label, shape = None, ()
    labeled = sum(t.label(x) is not None for x in values)
    for i, x in enumerate(values):
        own, size = t.label(x), [*x.shape[:-2], 1, 1]
        # A constant matrix mixes only the axis that meets it.
        mixed = (-1 - i,) if labeled == 1 and len(values) == 2 else (-2, -1)
        for axis in mixed:
            own = None if own is None else t.merge(own, axis % x.ndim)
        n = (repeats or {}).get(id(x), 1)
        if n > 1:
            size[-3] *= n
            if own is not None and own.shape[-3] > 1:
                own = own.repeat_interleave(n, -3)
        label = t.meet(label, shape, own, tuple(size))
        shape = torch.broadcast_shapes(shape, size)
    return label
