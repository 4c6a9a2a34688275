"""Outlier channels: scale them, or keep them apart.

In large Transformers a few input channels are a hundred times larger than
the others.  One grid for all of them is too coarse for the rest.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from .. import codes
from ..calibrate import Stats
from ..codes import Code
from .folding import LAYERS, readers

Rule = Callable[[Tensor], Code]


def smooth_scales(x_max: Tensor, W: Tensor, *, alpha: float = 0.5) -> Tensor:
    """Share the difficulty of a channel between input and weights.

    A layer computes the same from x / s with the weights W s.  With::

        s_j = max ‖x_j‖^alpha / max ‖W_j‖^(1 - alpha)

    and alpha = 1/2 both have the same largest value in channel j.

    Parameters
    ----------
    x_max
        (in,) largest ‖x‖ of each input channel.
    W
        (out, in) weights; of several layers, stacked, if they read the same.
    alpha
        0 to 1; how much of the input's range moves into the weights.

    Returns
    -------
    s : (in,), positive; 1 where input or weights are always 0.

    References
    ----------
    Xiao et al., SmoothQuant, arXiv:2211.10438, equation 4.

    Examples
    --------
    >>> smooth_scales(torch.tensor([16.0, 1.0]), torch.tensor([[1.0, 1.0]]))
    tensor([4., 1.])
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    if W.ndim != 2 or x_max.shape != W.shape[1:]:
        raise ValueError(
            f"x_max must be (in,) for W (out, in), got {tuple(x_max.shape)} "
            f"and W {tuple(W.shape)}"
        )
    w_max = W.detach().abs().amax(0)
    s = x_max.to(W.dtype) ** alpha / w_max ** (1 - alpha)
    return torch.where((x_max > 0) & (w_max > 0), s, torch.ones_like(s))


def smooth(
    model: nn.Module,
    stats: Mapping[str, Stats],
    *,
    pairs: Iterable[tuple[str, list[str]]],
    alpha: float = 0.5,
) -> nn.Module:
    """Move the outliers of activations into the weights that read them.

    Parameters
    ----------
    model
        left as it is.
    stats
        of its layers' inputs, from `calibrate.inputs`.
    pairs
        (name of a norm or a linear layer, names of all linear layers that
        read its output); `norm_readers` finds them.
    alpha
        as in `smooth_scales`.

    Returns
    -------
    A copy of the model with the same function, to rounding.

    References
    ----------
    Xiao et al., SmoothQuant, arXiv:2211.10438, section 4.

    Examples
    --------
    >>> from minicompress import calibrate
    >>> model, x = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)), torch.eye(3)
    >>> stats = calibrate.inputs(model, [x])
    >>> same = smooth(model, stats, pairs=[("0", ["1"])])
    >>> torch.allclose(same(x), model(x), atol=1e-6)
    True
    """
    for source, several in pairs:
        missing = [n for n in several if f"{n}.weight" not in stats]
        if missing or not several:
            raise ValueError(f"stats: nothing for {missing} behind {source}")
        x = stats[f"{several[0]}.weight"]
        W = [model.get_submodule(n).weight for n in several]
        x_max = torch.maximum(x.high.abs(), x.low.abs())
        s = smooth_scales(x_max, torch.cat(W), alpha=alpha)
        model = move_scales(model, source, several, s)
    return model


def move_scales(
    model: nn.Module, source: str, several: Iterable[str], s: Tensor
) -> nn.Module:
    """Divide what a module returns by s and multiply its readers' weights.

    Parameters
    ----------
    model
        left as it is.
    source
        name of a norm with a weight, or of a linear layer.
    several
        names of *all* modules that read its output; they are linear.  A
        residual connection that reads it too would see another value.
    s
        (in,), positive.

    Returns
    -------
    A copy of the model with the same function, to rounding.  This is what
    makes the scales of `smooth` and `awq` free at run time.

    Examples
    --------
    >>> model = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 1))
    >>> s = torch.tensor([2.0, 4.0])
    >>> move_scales(model, "0", ["1"], s)[0].weight.tolist()
    [0.5, 0.25]
    """
    model = deepcopy(model)
    changed = [model.get_submodule(n) for n in (source, *several)]
    before, *behind = changed
    if getattr(before, "weight", None) is None:
        raise ValueError(f"source: {source} has no weight that takes 1 / s")
    uses = _uses(model)
    for name, layer in zip((source, *several), changed, strict=True):
        if uses[id(layer.weight)] > 1:
            raise ValueError(f"{name}: its weight is used elsewhere (tied)")
    if not all(isinstance(m, nn.Linear) for m in behind):
        raise ValueError(f"several: {several} must all be nn.Linear")
    shape = (-1, *[1] * (before.weight.ndim - 1))
    with torch.no_grad():
        before.weight.div_(s.reshape(shape))
        if getattr(before, "bias", None) is not None:  # an RMSNorm has none
            before.bias.div_(s)
        for layer in behind:
            layer.weight.mul_(s)
    return model


def norm_readers(model: nn.Module, x: Tensor) -> list[tuple[str, list[str]]]:
    """Find the norms whose output only linear layers read.

    Parameters
    ----------
    model
        runs once.
    x
        a batch of inputs.

    Returns
    -------
    [(name of the norm, names of the layers)], without tied weights.  In a
    block that normalizes *after* the sum (BERT) the residual connection
    reads the norm as well, which does not show here: `smooth` would change
    such a model.

    Examples
    --------
    >>> model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2))
    >>> norm_readers(model, torch.eye(3))
    [('0', ['1'])]
    """
    uses = _uses(model)
    found = readers(model, x, (nn.LayerNorm, nn.RMSNorm), LAYERS)
    return [
        (norm, several)
        for norm, several in found.items()
        if all(uses[id(model.get_submodule(n).weight)] == 1 for n in several)
    ]


def awq(W: Tensor, stats: Stats, rule: Rule, *, grid: int = 20) -> Code:
    """Round salient input channels more finely, by a scale of their own.

    Which weights matter shows in their inputs: with s_x = E ‖x‖ of each
    channel, W diag(s) is rounded for s = s_x^alpha, and x / s undoes it.
    alpha is the one of a grid from 0 to 1 with the smallest loss
    tr((W - Ŵ) H (W - Ŵ)^T).

    Parameters
    ----------
    W
        (out, in) weights.
    stats
        of the layer's inputs.
    rule
        chooses the grid and rounds, for instance ``functools.partial(
        quantize.min_max, bits=4, each=128)``.
    grid
        steps of alpha; alpha = 0 is among them, so that the loss is never
        above that of the rule alone.

    Returns
    -------
    Scaled(rule(W s), 1 / s).  The file pays for s, as many bits as W's type
    has for each input; `move_scales` can put it into the layer before.

    References
    ----------
    Lin et al., AWQ, arXiv:2306.00978, equations 4 and 5.

    Examples
    --------
    >>> from minicompress import calibrate, quantize
    >>> layer = nn.Linear(4, 8)
    >>> stats = calibrate.inputs(layer, [torch.randn(64, 4)])["weight"]
    >>> awq(layer.weight, stats, lambda W: quantize.min_max(W, bits=3))
    Scaled(Affine(Ints(uint8[8, 4], 3), float32[8, 1], Ints(uint8[8, 1], 3)), \
float32[4])
    """
    W, x = W.detach(), stats.mean_abs
    if W.ndim != 2 or x.shape != W.shape[1:]:
        raise ValueError(
            f"stats has inputs {tuple(x.shape)}, W is {tuple(W.shape)}"
        )
    if grid < 1:
        raise ValueError(f"grid must be at least 1, got {grid}")
    best, least = None, torch.inf
    for i in range(grid + 1):
        s = x.clamp(min=1e-4 * float(x.max()) or 1.0) ** (i / grid)
        s = (s / (s.max() * s.min()).sqrt()).to(W.dtype)
        code = codes.Scaled(rule(W * s), 1 / s)
        E = W.double() - code.decode().double()
        loss = float(torch.einsum("oi,ij,oj", E, stats.H, E))
        if loss < least or best is None:
            best, least = code, loss
    return best


def int8_with_outliers(
    x: Tensor, W: Tensor, *, threshold: float = 6.0
) -> Tensor:
    """Multiply in int8, but the channels with outliers in floating point.

    A channel in which any x reaches the threshold is kept apart; the others
    are rounded with one scale for each row of x and each row of W.

    Parameters
    ----------
    x
        (samples, in) inputs.
    W
        (out, in) weights, rounded ahead of time, so with all channels.
    threshold
        0 keeps everything in floating point; infinity keeps nothing.

    Returns
    -------
    (samples, out): what x W^T becomes, in the type of x.

    References
    ----------
    Dettmers et al., LLM.int8(), arXiv:2208.07339, equation 8.

    Examples
    --------
    >>> x, W = torch.tensor([[127.0, 0.4]]), torch.tensor([[1.0, 1.0]])
    >>> int8_with_outliers(x, W, threshold=torch.inf)  # 0.4 is rounded to 0
    tensor([[127.]])
    >>> int8_with_outliers(x, W)
    tensor([[127.4000]])
    """
    if x.ndim != 2 or W.ndim != 2 or x.shape[1] != W.shape[1]:
        raise ValueError(
            "x must be (samples, in) for W (out, in), got "
            f"{tuple(x.shape)} and {tuple(W.shape)}"
        )
    work, dtype = torch.promote_types(x.dtype, torch.float32), x.dtype
    x, W = x.to(work), W.detach().to(work)
    apart = (x.abs() >= threshold).any(0)  # (in,)
    rest = x.masked_fill(apart, 0.0)
    scale_x, qx = _int8_rows(rest)
    scale_w, qw = _int8_rows(W)
    # float64 holds the int32 sums of the kernel exactly
    sums = qx.double() @ qw.double().T
    y = scale_x.double() * sums * scale_w.double().T
    return (y + (x[:, apart] @ W[:, apart].T).double()).to(dtype)


def _int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to -127 ... 127: its scale and the integers."""
    top = x.abs().amax(1, keepdim=True)
    scale = torch.where(top > 0, top / 127, torch.ones_like(top))
    return scale, torch.round(x / scale)


def _uses(model: nn.Module) -> dict[int, int]:
    """Count the names under which each parameter is known."""
    uses = {}
    for _, p in model.named_parameters(remove_duplicate=False):
        uses[id(p)] = uses.get(id(p), 0) + 1
    return uses
