"""Follow the channels of a model through one run of it.

The model runs once on real inputs, in inference mode, where a whole layer
arrives here as one operation.  Each operation has a rule (`operations`) that
labels its result and joins or fixes the units of its arguments.  What no
rule knows is computed all the same, and its arguments have to stay.
"""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..train import evaluating
from .operations import find_rule
from .shape_rules import unknown
from .units import Units, place, shrink, varying


class Path:
    """Knows which module of a model is running."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.stack: list[tuple[str, nn.Module]] = []

    def __enter__(self):
        self.handles = []
        for name, module in self.model.named_modules():

            def enter(module, args, name=name):
                self.stack.append((name, module))

            def leave(module, args, out):
                self.stack.pop()

            self.handles.append(module.register_forward_pre_hook(enter))
            self.handles.append(module.register_forward_hook(leave))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    @property
    def module(self) -> nn.Module:
        """The innermost module that runs (or has failed)."""
        return self.stack[-1][1] if self.stack else self.model

    @property
    def name(self) -> str:
        """Its path in the model."""
        return self.stack[-1][0] if self.stack else ""

    def __str__(self) -> str:
        kind = type(self.module).__name__
        return f"{kind} {self.name!r}" if self.name else kind


class Tracer(TorchDispatchMode):
    """Labels every value while a model runs."""

    def __init__(self, units: Units, path: Path):
        super().__init__()
        self.units, self.path = units, path
        self.labels: dict[int, Tensor] = {}
        self.flipped: dict[int, Tensor] = {}  # transposed matrices
        self.alive: list = []  # an id is only good while its object lives

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = find_rule(func)
        if rule is None:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
            rule = unknown
        out = func(*args, **kwargs)
        self.op = func._schema.name.replace("::", ".")
        names = [a.name for a in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        self.alive.append((args, kwargs, out))
        found = rule(self, func, given, out)
        outs = out if isinstance(out, tuple | list) else [out]
        if not isinstance(found, list):
            found = [found] * len(outs)
        for x, label in zip(outs, found, strict=True):
            if isinstance(x, Tensor):
                self._set(x, label)
        return out

    @property
    def why(self) -> str:
        """What a reason for a unit to stay says."""
        return f"{self.op} in {self.path}"

    def _set(self, x: Tensor, label: Tensor | None) -> None:
        self.labels.pop(id(x), None)
        if label is None:
            return
        label = shrink(label)
        if label.ndim <= x.ndim:
            ones = (1,) * (x.ndim - label.ndim)
            label = label.view(ones + tuple(label.shape))
        if label.ndim > x.ndim or any(
            label.shape[k] != x.shape[k] for k in varying(label)
        ):
            return self.fix(label)  # an unusual form of the operation
        self.labels[id(x)] = label

    def label(self, x: Tensor) -> Tensor | None:
        """Return the label of a value; a tensor of the model is new here."""
        if id(x) in self.flipped:
            return self.units.entries(self.flipped[id(x)], None, "along").T
        if id(x) in self.labels or not self.units.owns(x):
            return self.labels.get(id(x))
        axes = [k for k, size in enumerate(x.shape) if size > 1]
        if len(axes) > 1:
            return self.units.entries(x, None, "along")
        if not axes:
            return None
        entries = self.units.entries(x, axes[0], "along")
        return place(entries, axes[0], x.ndim)

    def full(self, x: Tensor) -> Tensor:
        """Return the label of a value in its full shape."""
        label = self.label(x)
        label = torch.zeros((), dtype=torch.long) if label is None else label
        return label.expand(x.shape)

    def join(self, a: Tensor, b: Tensor) -> None:
        """Let entries go together."""
        self.units.join(a, b, self.why)

    def fix(self, label: Tensor | None) -> None:
        """Let entries stay."""
        self.units.fix(label, self.why)

    def merge(self, label: Tensor, axis: int) -> Tensor:
        """Join all entries along an axis."""
        return self.units.merge(label, axis, self.why)

    def keep_whole(self, x: Tensor | None) -> None:
        """Let a value or a tensor of the model keep its shape."""
        if x is None:
            return
        x = self.flipped.get(id(x), x)
        if self.units.owns(x):
            self.units.unsliceable.setdefault(id(x), self.why)
        else:
            self.fix(self.labels.get(id(x)))

    def features(
        self, x: Tensor, axis: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the entries (n,) along an axis, or the label without it.

        The latter if x differs along other axes too: then the n along this
        one are a matter of each unit, and the axis keeps its length.
        """
        axis %= x.ndim
        label = self.label(x)
        if label is None:
            return torch.zeros(x.shape[axis], dtype=torch.long), None
        if self.units.is_own(label):
            for k in varying(label):
                label = label if k == axis else self.merge(label, k)
        if set(varying(label)) <= {axis}:
            return label.flatten().expand(x.shape[axis]), None
        return None, self.merge(label, axis)

    def meet(self, a, a_shape, b, b_shape) -> Tensor | None:
        """Combine labels of values of given shapes as broadcasting does."""
        n = max(len(a_shape), len(b_shape))
        a_shape, a = _lift(a, a_shape, n)
        b_shape, b = _lift(b, b_shape, n)
        if a is None and set(a_shape) <= {1}:
            return b
        if b is None and set(b_shape) <= {1}:
            return a
        a_over = _repeats(a, b_shape)
        b_over = _repeats(b, a_shape)
        # What is repeated for every unit of the other cannot shrink.
        if a_over:
            self.fix(b)
        if b_over:
            self.fix(a)
        if a_over or b_over:
            return None if a_over and b_over else a if a_over else b
        if a is None and b is None:
            return None
        none = torch.zeros((1,) * n, dtype=torch.long)
        a, b = (none if x is None else x for x in (a, b))
        self.join(a, b)
        return torch.where(a > 0, a, b)


def _lift(label: Tensor | None, shape: tuple, n: int) -> tuple:
    ones = (1,) * (n - len(shape))
    if label is not None:
        label = label.view((1,) * (n - label.ndim) + tuple(label.shape))
    return ones + tuple(shape), label


def _repeats(label: Tensor | None, other: tuple) -> bool:
    """Say whether the other is repeated along the units of this label."""
    return label is not None and any(other[k] == 1 for k in varying(label))


def trace(model: nn.Module, inputs: tuple) -> Units:
    """Run a model and find what goes together.

    Raises
    ------
    ValueError
        If the model cannot run on these inputs; names the module.
    """
    units = Units(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            for p in module.parameters():
                units.unsliceable[id(p)] = (
                    f"MultiheadAttention {name!r} has fixed sizes: use "
                    "linear layers and F.scaled_dot_product_attention"
                )
    fast = torch.backends.mha.get_fastpath_enabled()
    with evaluating(model), Path(model) as path:
        tracer = Tracer(units, path)
        # A fused encoder layer would hide what happens inside.
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.inference_mode(), tracer:
                out = model(*inputs)
        except RuntimeError as error:
            raise ValueError(f"inputs: {path} fails: {error}") from error
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    for x in tree_leaves(out):
        if isinstance(x, Tensor):
            label = tracer.label(x)
            units.fix(label, "it is an output of the model")
    return units
