"""Inputs by gradient descent: what a teacher thinks that data look like."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .datafree import disagreement_loss, frozen, total_variation, watched


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
    student: nn.Module | None = None,
    compete: float = 1.0,
    bounds: tuple[float, float] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Make inputs of given classes by gradient descent on the inputs.

    Starts from noise and minimizes CE(y, v) + bn `batchnorm_loss` +
    tv `total_variation` + l2 mean(x^2), and if there is a student, + compete
    `disagreement_loss`.  The penalties are means, so that their weights do
    not depend on the size of the images; they are not on the scale of the
    paper's.

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
    student
        half trained, to look for what it does not know yet; it is frozen,
        as the teacher is.  The paper's adaptive variant.
    compete
        weight of its disagreement with the teacher.
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
    rival = None if student is None else frozen(student).to(like)
    watch = watched(teacher, active=bn != 0)
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
            if rival is not None:
                loss = loss + compete * disagreement_loss(rival(x), v)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if bounds is not None:
                with torch.no_grad():
                    x.clamp_(*bounds)
            if progress:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return x.detach(), y
