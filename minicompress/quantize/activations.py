"""Round what enters a layer: activations, with a fixed or a running range.

Weights are known before the model runs, its activations are not.  *Static*
ranges come from calibration data and never change; *dynamic* ones are read
off the activations themselves, again and again.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from .. import calibrate, codes
from ..calibrate import Forward, Stats, Where
from ..codes import Code
from ..through import Through
from .simulation import fake

NAME = "on_input"  # of the submodule that a layer gets


def on_inputs(
    model: nn.Module,
    f: Callable[..., Tensor],
    *,
    where: Where = lambda name, w: True,
    **tensors: Tensor | Mapping[str, Tensor],
) -> nn.Module:
    """Let layers compute with f(x) in place of their input x from now on.

    Parameters
    ----------
    model
        left as it is.
    f
        ``f(x, **tensors) -> x'`` of the same shape.
    where
        from the name and the weight of a layer to a bool; by default every
        nn.Linear and nn.Conv2d.
    tensors
        what else f needs.  An nn.Parameter is trained with the model, any
        other tensor is a buffer; a mapping from the names of weights to
        tensors gives each layer its own.

    Returns
    -------
    A copy of the model.  It can be trained, also by `train.fit_many`; `off`
    gives the ordinary model back, to be stored.

    Raises
    ------
    ValueError
        If a mapping lacks a layer, or a layer has such a function already.

    Examples
    --------
    >>> model = on_inputs(nn.Linear(2, 1, bias=False), torch.round)
    >>> x = torch.tensor([0.9, 2.2])
    >>> bool(model(x) == model.weight @ torch.tensor([1.0, 2.0]))
    True
    """

    def make(name: str) -> Through:
        return Through(f, **{k: _own(name, k, t) for k, t in tensors.items()})

    return _attached(model, where, make)


def off(model: nn.Module) -> nn.Module:
    """Take away what `on_inputs`, `static` or `dynamic` attached.

    Returns
    -------
    A copy of the model with its ordinary layers.

    Examples
    --------
    >>> list(off(dynamic(nn.Linear(2, 1))).state_dict())
    ['weight', 'bias']
    """
    model = deepcopy(model)
    for layer in list(model.modules()):
        if isinstance(getattr(layer, NAME, None), Through):
            delattr(layer, NAME)
            for key, hook in list(layer._forward_pre_hooks.items()):
                if hook is _replace:
                    del layer._forward_pre_hooks[key]
                    layer._forward_pre_hooks_with_kwargs.pop(key, None)
    return model


def static(
    model: nn.Module,
    batches: Iterable,
    *,
    rule: Callable[[Tensor], Code],
    where: Where = lambda name, w: True,
    forward: Forward | None = None,
    rows: int = 256,
) -> nn.Module:
    """Round the inputs of layers on grids fixed by calibration.

    Parameters
    ----------
    model
        left as it is.
    batches
        calibration inputs, as for `calibrate.inputs`.
    rule
        chooses the grid of a layer from a sample of its inputs with the
        smallest and the largest of all of them, for instance
        ``partial(min_max, bits=8, each="tensor")``.
    where
        from the name and the weight of a layer to a bool.
    forward
        ``forward(model, batch)``, as for `calibrate.inputs`.
    rows
        inputs of each layer in the sample.

    Returns
    -------
    A copy of the model.  What is outside of the calibrated range becomes its
    end, and gets no gradient.

    Raises
    ------
    ValueError
        If the rule does not choose one grid for the whole tensor.

    References
    ----------
    Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, arXiv:1712.05877, section 3.1.

    Examples
    --------
    >>> from minicompress import quantize
    >>> rule = partial(quantize.min_max, bits=1, each="tensor")
    >>> layer = nn.Linear(1, 1, bias=False)
    >>> model = static(layer, [torch.tensor([[0.0], [2.0]])], rule=rule)
    >>> y = model(torch.tensor([[9.0], [1.9]])) / layer.weight
    >>> y.detach()
    tensor([[2.],
            [2.]])
    """
    stats = calibrate.inputs(
        model, batches, where=where, forward=forward, rows=rows
    )

    def make(name: str) -> Through:
        scale, zero, bits = _grid(name, rule, stats[name])
        return Through(partial(fake, bits=bits), scale=scale, zero=zero)

    return _attached(model, lambda name, w: name in stats, make)


def dynamic(
    model: nn.Module,
    *,
    bits: int = 8,
    each: str = "tensor",
    symmetric: bool = False,
    where: Where = lambda name, w: True,
) -> nn.Module:
    """Round the inputs of layers on grids that are made at run time.

    Parameters
    ----------
    model
        left as it is.
    bits, each, symmetric
        as in `round_now`.
    where
        from the name and the weight of a layer to a bool.

    Returns
    -------
    A copy of the model.  Needs no calibration and never saturates; but with
    ``each="tensor"`` an input's result depends on what else is in the batch.

    Examples
    --------
    >>> model = dynamic(nn.Linear(1, 1, bias=False), bits=2)
    >>> x = torch.tensor([[0.0], [1.0], [2.9]])
    >>> bool(torch.allclose(model(1000 * x), 1000 * model(x)))
    True
    """
    f = partial(round_now, bits=bits, each=each, symmetric=symmetric)
    f(torch.zeros(1, 1))  # complains about wrong arguments now
    for name, layer in calibrate.layers(model, where=where).items():
        if each == "token" and isinstance(layer, nn.Conv2d):
            raise ValueError(f'{name}: a convolution needs each="image"')
    return on_inputs(model, f, where=where)


def round_now(
    x: Tensor, *, bits: int = 8, each: str = "tensor", symmetric: bool = False
) -> Tensor:
    """Round to the grid that spans from the smallest to the largest x.

    The grid is that of `min_max`, computed without looking at values, so
    that it can be traced and vectorized.

    Parameters
    ----------
    x
        (..., features), or (N, channels, height, width) images.
    bits
        of an integer, 1 to 16; a symmetric grid needs 2.
    each
        which entries share a grid: "tensor" all, "token" those of one vector
        of features, "image" those of one image.
    symmetric
        whether the grid has its middle at 0.

    Returns
    -------
    as x.  Its gradient is passed on unchanged.

    References
    ----------
    Yao et al., ZeroQuant, arXiv:2206.01861, section 4.1 ("token").

    Examples
    --------
    >>> round_now(torch.tensor([[0.0, 1.0, 3.2], [0.0, 1.0, 9.0]]), bits=2)
    tensor([[0., 0., 3.],
            [0., 0., 9.]])
    """
    axes = {
        "tensor": tuple(range(x.ndim)),
        "token": (-1,),
        "image": tuple(range(1, x.ndim)),
    }.get(each)
    if not axes:
        raise ValueError(
            f'each must be "tensor", "token" or "image", got {each!r} for x '
            f"{tuple(x.shape)}"
        )
    if not 1 + symmetric <= bits <= 16:
        raise ValueError(f"bits must be {1 + symmetric} to 16, got {bits}")
    v = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    low = v.amin(axes, keepdim=True).clamp(max=0)
    high = v.amax(axes, keepdim=True).clamp(min=0)
    levels = 2**bits - 1
    if symmetric:  # 2^b - 2 steps, so that 0 is in the middle
        high = torch.maximum(high, -low)
        low, levels = -high, levels - 1
    scale = (high - low) / levels
    scale = torch.where(scale > 0, scale, 1.0).to(v.dtype)
    return fake(x, scale, torch.round(-low / scale), bits=bits)


def _attached(
    model: nn.Module, where: Where, make: Callable[[str], Through]
) -> nn.Module:
    """Copy a model and give each chosen layer what `make` returns."""
    model = deepcopy(model)
    done = set()
    for name, layer in calibrate.layers(model, where=where).items():
        if layer in done:  # one layer under two names
            continue
        if hasattr(layer, NAME):
            raise ValueError(f"{name}: its input is changed already: use off")
        done.add(layer)
        layer.add_module(NAME, make(name))
        # first in line: calibration then sees what the layer computes with
        layer.register_forward_pre_hook(
            _replace, prepend=True, with_kwargs=True
        )
    return model


def _replace(layer: nn.Module, args: tuple, kwargs: dict) -> tuple:
    """Change the input; looks the function up when it is called."""
    f = getattr(layer, NAME)
    if args:
        return (f(args[0]), *args[1:]), kwargs
    return args, kwargs | {"input": f(kwargs["input"])}


def _own(name: str, key: str, t: Tensor | Mapping[str, Tensor]) -> Tensor:
    if isinstance(t, Tensor):
        return t
    if name not in t:
        raise ValueError(f"{name}: {key} holds nothing for this layer")
    return t[name]


def _grid(
    name: str, rule: Callable[[Tensor], Code], stats: Stats
) -> tuple[Tensor, Tensor, int]:
    """Choose scale, zero and bits for the inputs of one layer."""
    ends = torch.stack([stats.low.min(), stats.high.max()])
    try:
        return one_grid(rule(torch.cat([stats.sample.flatten(), ends])))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def one_grid(code: Code) -> tuple[Tensor, Tensor, int]:
    """Take scale (), zero () and bits out of the code of a whole tensor."""
    code = code.x if isinstance(code, codes.View) else code
    scale, zero = (
        torch.as_tensor(codes.value(t)) for t in (code.scale, code.zero)
    )
    if scale.numel() != 1 or zero.numel() != 1:
        raise ValueError(
            'rule must choose one grid (each="tensor"), got scales '
            f"{tuple(scale.shape)}"
        )
    return scale.reshape(()), zero.reshape(()), code.q.bits
