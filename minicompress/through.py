"""Train through a change of the weights: masks, quantizers, centroids.

`attach` makes a weight be computed, w' = f(w, tensors), whenever the model
uses it; gradients flow through f.  `bake` writes the computed weights back
into an ordinary model.  It is a state for training only: bake, then store.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy

from torch import Tensor, nn
from torch.nn.utils import parametrize

Names = str | Iterable[str] | Callable[[str, Tensor], bool]


def straight(w: Tensor, wq: Tensor) -> Tensor:
    """Give the value of `wq` but the gradient of `w` (straight-through).

    Parameters
    ----------
    w, wq
        tensors of the same shape; wq is w after a step function.

    Returns
    -------
    wq, bit for bit, through which a gradient reaches w unchanged.

    References
    ----------
    Bengio et al., Estimating or Propagating Gradients Through Stochastic
    Neurons, arXiv:1308.3432, section 4.

    Examples
    --------
    >>> import torch
    >>> w = torch.tensor([0.4, 1.6], requires_grad=True)
    >>> (straight(w, w.round()) * torch.tensor([3.0, 5.0])).sum().backward()
    >>> w.grad
    tensor([3., 5.])
    """
    return wq.detach() + (w - w.detach())  # exactly wq: the rest is 0


class Through(nn.Module):
    """A function of a weight and of tensors of its own.

    Parameters
    ----------
    f
        ``f(w, **tensors) -> w'`` of the same shape.
    tensors
        copied; an nn.Parameter is trained with the model (centroids,
        scales, low-rank factors), any other tensor is a buffer (masks).
    """

    def __init__(self, f: Callable[..., Tensor], **tensors: Tensor):
        super().__init__()
        self.f = f
        for key, t in tensors.items():
            if not isinstance(t, Tensor):
                raise ValueError(f"{key} must be a tensor, got {type(t)}")
            if hasattr(self, key):
                raise ValueError(f"{key}: this name is taken in nn.Module")
            copy = t.detach().clone()
            if isinstance(t, nn.Parameter):
                copy = nn.Parameter(copy, t.requires_grad)
                self.register_parameter(key, copy)
            else:
                self.register_buffer(key, copy)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors as they are now (trained ones have moved)."""
        return {**self._parameters, **self._buffers}

    def forward(self, w: Tensor) -> Tensor:
        """Compute the weight that the model uses."""
        return self.f(w, **self.tensors)


def attach(
    model: nn.Module,
    names: Names,
    f: Callable[..., Tensor],
    **tensors: Tensor | Mapping[str, Tensor],
) -> nn.Module:
    """Compute weights of a model through f from now on.

    Parameters
    ----------
    model
        left as it is.  A weight that occurs under several names (tied
        layers) is computed the same way under all of them.
    names
        of the parameters; a name, several, or a function from a name
        and a parameter to a bool.
    f
        ``f(w, **tensors) -> w'``, of the shape and dtype of w.
    tensors
        what else f needs.  A mapping from names to tensors gives each
        weight its own; a plain tensor is copied for each weight.

    Returns
    -------
    A copy of the model.

    Raises
    ------
    ValueError
        If a name is unknown, or f fails on its weight; names the weight.

    Examples
    --------
    >>> import torch
    >>> model = nn.Linear(2, 1)
    >>> mask = torch.tensor([[True, False]])
    >>> masked = attach(model, "weight", lambda w, m: w * m, m=mask)
    >>> bool(masked.weight[0, 1] == 0)
    True
    """
    weights = _weights(model)
    plan = {}
    for name in _chosen(weights, names):
        if name not in plan:
            w = weights[name][2]
            tied = [n for n, (_, _, other) in weights.items() if other is w]
            own = {k: _own(k, t, tied) for k, t in tensors.items()}
            plan |= dict.fromkeys(tied, Through(f, **own))
    model = _copy(model)
    done = set()
    for name, (module, key, _) in _weights(model).items():
        if name in plan and (module, key) not in done:
            _register(name, module, key, plan[name])
            done.add((module, key))
    return model


def tensors(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Collect the tensors of everything attached, as they are now.

    Parameters
    ----------
    model
        the result of `attach`, perhaps trained since.

    Returns
    -------
    {name of the weight: {name of the tensor: Tensor}}.
    """
    found = {}
    for name, (module, key, _) in _weights(model).items():
        if parametrize.is_parametrized(module, key):
            for part in module.parametrizations[key]:
                if isinstance(part, Through):
                    found.setdefault(name, {}).update(part.tensors)
    return found


def bake(model: nn.Module) -> nn.Module:
    """Turn computed weights into ordinary ones.

    Parameters
    ----------
    model
        left as it is.

    Returns
    -------
    A copy without parametrizations, with the keys that the state_dict had
    before `attach`.  Weights that were tied and computed alike stay tied.

    Examples
    --------
    >>> import torch
    >>> model = attach(nn.Linear(2, 1), "weight", torch.round)
    >>> list(bake(model).state_dict())
    ['weight', 'bias']
    """
    model = _copy(model)
    baked = {}  # a new parameter each: torch would overwrite tied partners
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        order = module.__dict__.pop("_order_before", ())
        for key, parts in list(module.parametrizations.items()):
            same = tuple(map(id, [*parts.parameters(recurse=False), *parts]))
            if same not in baked:
                trained = any(p.requires_grad for p in parts.parameters())
                value = getattr(module, key).detach().clone()
                baked[same] = nn.Parameter(value, trained)
            parametrize.remove_parametrizations(
                module, key, leave_parametrized=not parts.is_tensor
            )
            setattr(module, key, baked[same])
        for key in order:
            module._parameters[key] = module._parameters.pop(key)
    return model


def _weights(
    model: nn.Module,
) -> dict[str, tuple[nn.Module, str, Tensor | None]]:
    """List parameters as (module, attribute, tensor) by their plain names."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if "parametrizations" in path.split("."):
            continue
        own = {k: p for k, p in module._parameters.items() if p is not None}
        if parametrize.is_parametrized(module):
            for key, parts in module.parametrizations.items():
                own[key] = parts.original if parts.is_tensor else None
        for key, p in own.items():
            found[f"{path}.{key}".lstrip(".")] = (module, key, p)
    return found


def _chosen(weights: dict, names: Names) -> list[str]:
    if callable(names):
        names = [n for n, (_, _, w) in weights.items() if names(n, w)]
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in weights:
            raise ValueError(f"names: the model has no parameter {name!r}")
        if isinstance(weights[name][0], nn.RNNBase):
            raise ValueError(f"{name}: nn.RNNBase does not look at it again")
    if not names:
        raise ValueError("names selects no parameter")
    return names


def _own(key: str, t: Tensor | Mapping[str, Tensor], tied: list) -> Tensor:
    """Pick what belongs to a weight that is known under the names `tied`."""
    if not isinstance(t, Mapping):
        return t
    for name in tied:
        if name in t:
            return t[name]
    raise ValueError(f"{tied[0]}: {key} holds nothing for this weight")


def _copy(model: nn.Module) -> nn.Module:
    """Copy a model so that copy and original share no class.

    torch keeps the computed attribute in a class made for the module, and
    deepcopy would share that class: a change to one would break the other.
    """
    model = deepcopy(model)
    for module in model.modules():
        if parametrize.is_parametrized(module):
            cls = type(module)
            own = type(cls.__name__, cls.__bases__, dict(vars(cls)))
            module.__class__ = own
    return model


def _register(name: str, module: nn.Module, key: str, through: Through) -> None:
    # Registering moves a parameter to the end; `bake` undoes that.
    module.__dict__.setdefault("_order_before", tuple(module._parameters))
    try:
        parametrize.register_parametrization(module, key, through)
    except Exception as error:
        raise ValueError(f"{name}: {error}") from error
