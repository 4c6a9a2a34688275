"""Change the weights, keep the function: what makes a network easy to round.

A ReLU network has many sets of weights that compute the same.  Those whose
channels have similar ranges lose less when they are rounded; and what is
lost on average, the bias can give back.
"""

from collections.abc import Iterable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from .. import calibrate
from ..calibrate import Stats
from .folding import LAYERS, replace_weights


def equalized(
    W1: Tensor, bias: Tensor | None, W2: Tensor, *, groups: int = 1
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Give each channel between two layers the same range on both sides.

    ReLU lets a positive factor pass, relu(s x) = s relu(x), so that row i of
    the first layer may be divided by s_i and what reads it multiplied::

        s_i = sqrt(r1_i r2_i) / r2_i

    with r1_i = max ‖W1[i]‖ and r2_i = max ‖W2[:, i]‖; afterwards both are
    sqrt(r1_i r2_i).

    Parameters
    ----------
    W1, bias
        (c, ...) weights and (c,) bias, or None, of the first layer.
    W2
        (out, c) or (out, c / groups, height, width); or (out, c * places)
        behind a flattened image.
    groups
        of the second layer, if it is a convolution.

    Returns
    -------
    W1, bias, W2 with the same function.  Channels that are 0 on one side
    stay.

    References
    ----------
    Nagel et al., Data-Free Quantization Through Weight Equalization and
    Bias Correction, arXiv:1906.04721, equations 7 to 11.

    Examples
    --------
    >>> W1, W2 = torch.tensor([[8.0], [1.0]]), torch.tensor([[2.0, 1.0]])
    >>> equalized(W1, None, W2)
    (tensor([[4.],
            [1.]]), None, tensor([[4., 1.]]))
    """
    c = len(W1)
    if W2.shape[1] * groups % c or len(W2) % groups or c % groups:
        raise ValueError(
            f"W2 {tuple(W2.shape)} with groups={groups} cannot read the "
            f"{c} channels of W1 {tuple(W1.shape)}"
        )
    # (groups, out / groups, c / groups, places)
    V = W2.reshape(groups, len(W2) // groups, c // groups, -1)
    r1 = W1.flatten(1).abs().amax(1)
    r2 = V.abs().amax((1, 3)).flatten()
    s = torch.where((r1 > 0) & (r2 > 0), (r1 / r2).sqrt(), 1.0).to(W1.dtype)
    V = V * s.reshape(groups, 1, -1, 1)
    W1 = W1 / s.reshape(-1, *[1] * (W1.ndim - 1))
    return W1, None if bias is None else bias / s, V.reshape(W2.shape)


def equalize(
    model: nn.Module,
    pairs: Iterable[tuple[str, str]],
    *,
    tolerance: float = 1e-3,
    rounds: int = 100,
) -> nn.Module:
    """Equalize pairs of layers in turn until no range moves any more.

    Parameters
    ----------
    model
        left as it is; its BatchNorms are folded (see `fold_norms`).
    pairs
        names of two nn.Linear or nn.Conv2d.  Between them may be nothing
        but ReLU, pooling and flattening, and no other layer may read the
        first one's output: then the function stays.  ReLU6 and GELU would
        change it, their bends are at fixed values.
    tolerance
        largest relative change of a weight in the last round.
    rounds
        most rounds; pairs that share a layer disturb each other.

    Returns
    -------
    A copy of the model.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.randn(3, 4)
    >>> same = equalize(model, [("0", "2")])
    >>> torch.allclose(same(x), model(x), atol=1e-6)
    True
    """
    pairs, model = list(pairs), deepcopy(model)
    found = {n: model.get_submodule(n) for pair in pairs for n in pair}
    for name, layer in found.items():
        if not isinstance(layer, LAYERS):
            raise ValueError(f"pairs: {name} is no nn.Linear or nn.Conv2d")
    W = {n: m.weight.detach().double() for n, m in found.items()}
    b = {
        n: None if m.bias is None else m.bias.detach().double()
        for n, m in found.items()
    }
    for _ in range(rounds):
        change = 0.0
        for one, two in pairs:
            before = W[two]
            W[one], b[one], W[two] = equalized(
                W[one], b[one], before, groups=getattr(found[two], "groups", 1)
            )
            moved = (W[two] - before).abs() / before.abs().clamp(min=1e-30)
            change = max(change, float(moved.max()))
        if change <= tolerance:
            break
    for name, layer in found.items():
        replace_weights(layer, W[name], b[name])
    return model


def correct_bias(
    W: Tensor, Wq: Tensor, mean: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Take the mean of the output's error out of the bias.

    Rounding the weights moves the average output by (Ŵ - W) E[x]; the bias
    takes that back: b' = b + (W - Ŵ) E[x].

    Parameters
    ----------
    W, Wq
        (out, ...) weights before and after.
    mean
        (in,) average input, or (groups, in) for a convolution with groups,
        as in `calibrate.Stats`.
    bias
        (out,), or None for zeros.

    Returns
    -------
    (out,) new bias, in the type of W.

    References
    ----------
    Nagel et al., Data-Free Quantization Through Weight Equalization and
    Bias Correction, arXiv:1906.04721, section 4.2 (here with a measured
    mean instead of one computed from BatchNorm).

    Examples
    --------
    >>> W, Wq = torch.tensor([[0.4, 0.4]]), torch.tensor([[0.0, 0.0]])
    >>> correct_bias(W, Wq, torch.tensor([1.0, 0.5]))
    tensor([0.6000])
    """
    m = mean if mean.ndim == 2 else mean[None]  # (groups, in)
    if W.shape != Wq.shape or len(W) * m.shape[1] != W.numel():
        raise ValueError(
            f"W {tuple(W.shape)}, Wq {tuple(Wq.shape)} and mean "
            f"{tuple(mean.shape)} do not fit"
        )
    E = (W.detach().double() - Wq.detach().double()).flatten(1)
    E = E.reshape(len(m), -1, m.shape[1])  # (groups, out / groups, in)
    shift = (E @ m.double()[:, :, None]).flatten()
    b = 0.0 if bias is None else bias.detach().double()
    return (b + shift).to(W.dtype)


def correct_biases(
    model: nn.Module, quantized: nn.Module, stats: Mapping[str, Stats]
) -> nn.Module:
    """Correct the bias of every layer whose weights were rounded.

    Parameters
    ----------
    model, quantized
        before and after, of the same layers; left as they are.
    stats
        of the inputs of `model`, from `calibrate.inputs`.

    Returns
    -------
    A copy of `quantized`.  Over the calibration data, the mean of what each
    layer makes of the inputs that it had in `model` is that of `model`.

    Examples
    --------
    >>> model = nn.Linear(2, 1)
    >>> stats = calibrate.inputs(model, [torch.ones(1, 2)])
    >>> zero = deepcopy(model)
    >>> _ = zero.weight.data.zero_()
    >>> fixed = correct_biases(model, zero, stats)
    >>> torch.allclose(fixed(torch.ones(2)), model(torch.ones(2)))
    True
    """
    new = deepcopy(quantized)
    layers, before = calibrate.layers(new), calibrate.layers(model)
    for name, s in stats.items():
        W, layer = before[name].weight, layers[name]
        b = correct_bias(W, layer.weight, s.mean, layer.bias)
        if layer.bias is not None or not torch.equal(W, layer.weight):
            layer.bias = nn.Parameter(b, layer.weight.requires_grad)
    return new
