"""Distillation without data: inputs that are made up from the teacher.

A network with BatchNorm remembers the mean and the variance of what each of
these layers saw in training.  Inputs whose features have those moments, and
which the teacher is sure about, can stand in for data that is gone.  Unlike
the losses on a student, these send the gradient *through* the teacher, into
its inputs.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .language import jsd

BATCHNORM = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d


def moments_loss(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Measure how far the features of a batch are from stored moments.

    ||mean(x) - mean||_2 + ||var(x) - var||_2 over the channels.

    Parameters
    ----------
    x
        what enters a BatchNorm layer, (n, channels, ...), two values or
        more in each channel.
    mean, var
        (channels,) its running_mean and running_var.  Torch keeps the
        variance with n - 1 in the denominator; so the same is done here.

    Returns
    -------
    Scalar, 0 where the moments agree.

    References
    ----------
    Yin et al., Dreaming to Distill: Data-free Knowledge Transfer via
    DeepInversion, arXiv:1912.08795.

    Examples
    --------
    >>> x = torch.tensor([[1.0], [3.0]])
    >>> moments_loss(x, torch.tensor([2.0]), torch.tensor([1.5]))
    tensor(0.5000)
    """
    if x.ndim < 2 or x.numel() < 2 * x.shape[1]:
        raise ValueError(
            f"x must be (n, channels, ...) with two values a channel, "
            f"got {tuple(x.shape)}"
        )
    if mean.shape != x.shape[1:2] or var.shape != mean.shape:
        raise ValueError(
            f"mean and var must be ({x.shape[1]},), "
            f"got {tuple(mean.shape)} and {tuple(var.shape)}"
        )
    flat = x.transpose(0, 1).flatten(1)  # (channels, values)
    return (flat.mean(1) - mean).norm() + (flat.var(1) - var).norm()


def batchnorm_loss(teacher: nn.Module, x: Tensor) -> Tensor:
    """Add up `moments_loss` over all BatchNorm layers of a teacher.

    The teacher runs in evaluation mode: in training mode the layers would
    normalize by the batch, and change the very moments it is compared with.

    Parameters
    ----------
    teacher
        with BatchNorm layers that keep running statistics.  A copy of it is
        used.
    x
        inputs (n, ...); they receive the gradient.

    Returns
    -------
    Scalar.

    Examples
    --------
    >>> teacher = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 3))
    >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> batchnorm_loss(teacher, x)  # means 0 and 0, variances 2 and 0
    tensor(1.4142)
    """
    with watched(teacher) as (model, losses):
        model(x)
        return sum(losses)


def total_variation(x: Tensor) -> Tensor:
    """Compute the mean difference of neighboring pixels, down plus across.

    Parameters
    ----------
    x
        images (n, channels, height, width).

    Returns
    -------
    Scalar, in the unit of x; 0 for images of one color.

    Examples
    --------
    >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
    tensor(1.)
    """
    if x.ndim != 4 or min(x.shape[2:]) < 2:
        raise ValueError(
            f"x must be (n, channels, height, width), 2 x 2 or larger, "
            f"got {tuple(x.shape)}"
        )
    return x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()


def one_hot_loss(v: Tensor) -> Tensor:
    """Ask for inputs of which the teacher is sure, whatever their class.

    Parameters
    ----------
    v
        teacher's logits (n, classes); the gradient goes into them.

    Returns
    -------
    Scalar, cross-entropy with the teacher's own first choice, in nats.

    References
    ----------
    Chen et al., DAFL: Data-Free Learning of Student Networks,
    arXiv:1904.01186.

    Examples
    --------
    >>> round(one_hot_loss(torch.tensor([[0.0, 0.0]])).item(), 4)
    0.6931
    """
    return F.cross_entropy(v, v.detach().argmax(-1))


def activation_loss(f: Tensor) -> Tensor:
    """Ask for inputs that excite the teacher's features, -||f||_1.

    Parameters
    ----------
    f
        features before the teacher's last layer, (n, ...).

    Returns
    -------
    Scalar, 0 or less: sum over the features, mean over the samples.

    References
    ----------
    Chen et al., DAFL: Data-Free Learning of Student Networks,
    arXiv:1904.01186.

    Examples
    --------
    >>> activation_loss(torch.tensor([[1.0, -2.0], [0.0, 5.0]]))
    tensor(-4.)
    """
    return -f.flatten(1).abs().sum(1).mean()


def balance_loss(v: Tensor) -> Tensor:
    """Ask for a batch in which all classes occur, -H(mean prediction).

    Parameters
    ----------
    v
        teacher's logits (n, classes); the gradient goes into them.

    Returns
    -------
    Scalar, nats: -log(classes) in balance, 0 if only one class occurs.

    References
    ----------
    Chen et al., DAFL: Data-Free Learning of Student Networks,
    arXiv:1904.01186.

    Examples
    --------
    >>> sure = torch.tensor([[99.0, -99.0], [-99.0, 99.0]])
    >>> round(balance_loss(sure).item(), 4)
    -0.6931
    """
    mean = v.softmax(-1).mean(0)  # (classes,)
    return -torch.special.entr(mean).sum()


def disagreement_loss(z: Tensor, v: Tensor) -> Tensor:
    """Ask for inputs on which teacher and student differ, 1 - JS(p, q).

    What the student knows already teaches it nothing.

    Parameters
    ----------
    z, v
        logits of student and teacher (n, classes); the gradient goes into
        both.

    Returns
    -------
    Scalar, 1 in agreement, 1 - ln 2 if they have no class in common.

    References
    ----------
    Yin et al., Dreaming to Distill: Data-free Knowledge Transfer via
    DeepInversion, arXiv:1912.08795 (Adaptive DeepInversion).

    Examples
    --------
    >>> z = torch.tensor([[99.0, 0.0]])
    >>> disagreement_loss(z, z), disagreement_loss(z, -z)
    (tensor(1.), tensor(0.3069))
    """
    # jsd moves its first argument only: the sum is JS twice, its gradient once
    both = jsd(z, v) + jsd(v, z)
    return 1 - (both - both.detach() / 2)


def frozen(model: nn.Module) -> nn.Module:
    """Copy a model that is to be run as it is, for its inputs' gradient."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@contextlib.contextmanager
def watched(
    teacher: nn.Module, active: bool = True
) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Yield a frozen copy, and a list that gets a loss from each layer."""
    model = frozen(teacher)
    losses: list[Tensor] = []

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        mean, var = layer.running_mean, layer.running_var
        losses.append(moments_loss(inputs[0], mean, var))

    layers = [m for m in model.modules() if isinstance(m, BATCHNORM)]
    layers = [m for m in layers if active and m.running_mean is not None]
    if active and not layers:
        raise ValueError(
            "teacher: it has no BatchNorm layer with running statistics; "
            "use bn=0"
        )
    for layer in layers:
        layer.register_forward_pre_hook(hook)
    yield model, losses
