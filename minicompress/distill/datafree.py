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
from tqdm.auto import tqdm

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
    with _watched(teacher) as (model, losses):
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


def invert(
    teacher: nn.Module,
    shape: tuple[int, ...],
    classes: int,
    *,
    steps: int = 200,
    lr: float = 0.1,
    bn: float = 1.0,
    tv: float = 0.1,
    l2: float = 0.01,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Make inputs of given classes by gradient descent on the inputs.

    Starts from noise and minimizes CE(y, v) + bn `batchnorm_loss` +
    tv `total_variation` + l2 mean(x^2).  The penalties are means, so that
    their weights do not depend on the size of the images; they are not on
    the scale of the paper's.

    Parameters
    ----------
    teacher
        from inputs to logits (n, classes); runs in evaluation mode, left as
        it is.
    shape
        of the inputs, (n, channels, height, width); with tv=0 any (n, ...).
    classes
        how many; each occurs n / classes times, rounded up or down.
    steps, lr
        of Adam.
    bn, tv, l2
        weights of the penalties.
    bounds
        smallest and largest value of an input, kept after every step.
    seed
        decides the noise.
    progress
        whether to show a bar.

    Returns
    -------
    Inputs of the given shape and int64 labels (n,), on the teacher's
    device and in its dtype.

    Raises
    ------
    ValueError
        If bn is not 0 and the teacher has no BatchNorm with statistics, or
        its logits have another shape.

    References
    ----------
    Yin et al., Dreaming to Distill: Data-free Knowledge Transfer via
    DeepInversion, arXiv:1912.08795.

    Examples
    --------
    >>> inputs, labels = invert(nn.Identity(), (4, 2), 2, bn=0, tv=0)
    >>> inputs.argmax(1), labels
    (tensor([0, 1, 0, 1]), tensor([0, 1, 0, 1]))
    """
    if len(shape) < 2 or min(*shape, classes, steps) < 1:
        raise ValueError(f"{shape=}, {classes=} and {steps=} must be positive")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (low, high), got {bounds}")
    like = next(teacher.parameters(), torch.empty(0))
    dice = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=dice).to(like).requires_grad_()
    y = torch.arange(shape[0], device=x.device) % classes
    optimizer = torch.optim.Adam([x], lr=lr)
    watch = _watched(teacher, active=bn != 0)
    with watch as (model, near), torch.enable_grad():
        bar = tqdm(range(steps), disable=not progress)
        for _ in bar:
            v = model(x)
            if v.shape != (shape[0], classes):
                raise ValueError(
                    f"classes: {classes}, but teacher's logits for {shape} "
                    f"are {tuple(v.shape)}"
                )
            loss = F.cross_entropy(v, y) + l2 * x.square().mean()
            loss = loss + bn * sum(near)
            near.clear()
            if tv:  # only images have it
                loss = loss + tv * total_variation(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if bounds is not None:
                with torch.no_grad():
                    x.clamp_(*bounds)
            if progress:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return x.detach(), y


@contextlib.contextmanager
def _watched(
    teacher: nn.Module, active: bool = True
) -> Iterator[tuple[nn.Module, list[Tensor]]]:
    """Yield a frozen copy, and a list that gets a loss from each layer."""
    model = copy.deepcopy(teacher).eval().requires_grad_(False)
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
