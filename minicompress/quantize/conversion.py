"""From a trained network to one that computes with integers only."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..codes import Code
from ..models import CNN, MLP
from ..models.vision import as_images
from ..train import evaluating
from .activations import one_grid
from .folding import fold_norms
from .grids import min_max
from .integers import (
    Flatten,
    IntegerNet,
    MaxPool,
    Product,
    SumPositions,
    fixed_point,
)

MIN_MAX = partial(min_max, bits=8, each="tensor")


def integer_model(
    model: nn.Module,
    x: Tensor,
    *,
    rule: Callable[[Tensor], Code] = MIN_MAX,
) -> IntegerNet:
    """Turn a trained network into one that computes with integers only.

    Weights become int8, symmetric with a scale for each row; inputs and
    activations uint8; sums and biases int32.  BatchNorm is folded, ReLU is a
    limit of the range, max pooling compares integers, the mean over
    positions goes into the factor of the next layer.

    Parameters
    ----------
    model
        `MLP`, `CNN` or an nn.Sequential of Linear, Conv2d, BatchNorm, ReLU,
        MaxPool2d, AdaptiveAvgPool2d(1) and Flatten.
    x
        (N, ...) calibration inputs.
    rule
        chooses the grid of an activation from its values, 8 bits.

    Returns
    -------
    IntegerNet

    Raises
    ------
    ValueError
        If the model has another layer, or a convolution with groups or
        dilation, or a sum could leave int32.

    References
    ----------
    Jacob et al., Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference, arXiv:1712.05877, section 2.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> x = torch.rand(64, 4)
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> net = integer_model(model, x)
    >>> net
    IntegerNet(Product((8, 4), relu), Product((2, 8)))
    >>> net.forward(net.encode(x)).dtype
    torch.uint8
    >>> bool((net(x) - model(x)).abs().max() < 0.05)
    True
    """
    images = isinstance(model, CNN)
    x = as_images(x) if images else x
    folded = fold_norms(_sequence(model), x)
    layers = [m for m in folded if not isinstance(m, nn.Identity)]
    start = scale, zero = _grid(rule(x))
    steps, places = [], 1  # an entry stands for the sum of so many
    with evaluating(folded):
        for layer, after in pairwise([*layers, None]):
            relu = isinstance(after, nn.ReLU)
            places *= _positions(layer, x)
            x = layer(x)
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                grid = _grid(rule(x.clamp(min=0) if relu else x))
                steps.append(_product(layer, scale, zero, places, grid, relu))
                (scale, zero), places = grid, 1
            elif not isinstance(layer, nn.ReLU):
                steps.append(_plain(layer))
            elif not steps or not isinstance(steps[-1], Product):
                raise ValueError("model: a ReLU must follow a layer directly")
    if not steps or places > 1:
        raise ValueError("model must end with a layer that has weights")
    return IntegerNet(tuple(steps), *start, scale, zero, images)


def _product(
    layer: nn.Linear | nn.Conv2d,
    scale: float,
    zero: int,
    places: int,
    grid: tuple[float, int],
    relu: bool,
) -> Product:
    """Round a layer between an input and an output grid."""
    scale_in, zero_in = scale / places, zero * places
    scale_out, zero_out = grid
    W = layer.weight.detach().double()
    b = W.new_zeros(len(W))
    if layer.bias is not None:
        b = layer.bias.detach().double()
    top = W.flatten(1).abs().amax(1)
    # rows that are nearly 0 still need a bias in int32 and a factor
    floor = b.abs().clamp(min=scale_out) / (scale_in * 2**30)
    scale_w = torch.maximum(top / 127, floor)  # (out,)
    rows = (-1, *[1] * (W.ndim - 1))
    q = torch.round(W / scale_w.reshape(rows)).long()
    bias = torch.round(b / (scale_in * scale_w)).long()
    most = max(zero_in, 255 * places - zero_in)  # of |q - zero_in|
    if (q.abs().flatten(1).sum(1) * most + bias.abs()).max() >= 2**31:
        raise ValueError(f"model: a sum of {layer} could leave int32")
    return Product(
        q.to(torch.int8),
        bias.int(),
        zero_in,
        zero_out,
        *fixed_point(scale_in * scale_w / scale_out),
        zero_out if relu else 0,
        *_window(layer),
    )


def _window(layer: nn.Linear | nn.Conv2d) -> tuple[tuple[int, int], ...]:
    """Take stride and padding of a convolution."""
    if isinstance(layer, nn.Linear):
        return ()
    if layer.groups > 1 or max(layer.dilation) > 1:
        raise ValueError(f"model: no groups or dilation in {layer}")
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        raise ValueError(f"model: {layer} must pad a number of zeros")
    return layer.stride, layer.padding


def _plain(layer: nn.Module) -> MaxPool | SumPositions | Flatten:
    """Translate a layer without weights."""
    if isinstance(layer, nn.Flatten) and layer.start_dim == 1:
        return Flatten()
    if isinstance(layer, nn.AdaptiveAvgPool2d):
        return SumPositions()
    if isinstance(layer, nn.MaxPool2d):
        odd = layer.padding or layer.ceil_mode or layer.dilation != 1
        if not odd and layer.stride == layer.kernel_size:
            return MaxPool(layer.kernel_size)
    raise ValueError(f"model: no integer version of {layer}")


def _positions(layer: nn.Module, x: Tensor) -> int:
    """Count the entries that a layer averages."""
    if not isinstance(layer, nn.AdaptiveAvgPool2d):
        return 1
    if layer.output_size not in (1, (1, 1)):
        raise ValueError(f"model: only the mean of all positions, not {layer}")
    return x.shape[-2] * x.shape[-1]


def _sequence(model: nn.Module) -> nn.Sequential:
    """Write a model as a chain of layers."""
    if isinstance(model, nn.Sequential):
        return model
    chain = [nn.Flatten()] if isinstance(model, MLP) else []
    if isinstance(model, MLP):
        for layer in model.layers[:-1]:
            chain += [layer, nn.ReLU()]
        return nn.Sequential(*chain, model.layers[-1])
    if isinstance(model, CNN):
        for conv, norm in zip(model.convs, model.norms, strict=True):
            chain += [conv, norm, nn.ReLU(), nn.MaxPool2d(2)]
        chain[-1] = nn.AdaptiveAvgPool2d(1)  # in place of the last pooling
        return nn.Sequential(*chain, nn.Flatten(), model.head)
    raise ValueError(
        f"model must be MLP, CNN or nn.Sequential, got {type(model).__name__}"
    )


def _grid(code: Code) -> tuple[float, int]:
    scale, zero, bits = one_grid(code)
    if bits != 8:
        raise ValueError(f"rule must choose 8 bits, got {bits}")
    return float(scale), int(zero)
