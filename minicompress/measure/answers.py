"""Which answers a compressed model changes, and how sure it is of them."""

import math

import torch
from torch import Tensor


def per_class(logits: Tensor, y: Tensor) -> Tensor:
    """Compute the accuracy of each class.

    Parameters
    ----------
    logits : (..., classes) outputs of a model.
    y : (...) integer labels.

    Returns
    -------
    Fraction of each class's samples that are right, (classes,) float64; nan
    for a class without samples.

    Examples
    --------
    >>> logits = torch.eye(3)[[0, 1, 0]]
    >>> per_class(logits, torch.tensor([0, 0, 0])).tolist()
    [0.6666666666666666, nan, nan]
    """
    z, y = _labeled(logits=logits, y=y)
    right = (z.argmax(1) == y).double()
    classes = z.shape[1]
    count = torch.bincount(y, minlength=classes)
    return torch.bincount(y, right, minlength=classes) / count


def negative_flips(before: Tensor, after: Tensor, y: Tensor) -> float:
    """Compute how often a right answer became a wrong one.

    Two models of equal accuracy have as many positive flips. Samples whose
    wrong answer became another wrong one count in neither, but they lower
    the `agreement`.

    Parameters
    ----------
    before, after : (..., classes) outputs of the two models.
    y : (...) integer labels.

    Returns
    -------
    Fraction of all samples that are right before and wrong after.

    References
    ----------
    Yan et al., Positive-Congruent Training, arXiv:2011.09161 (the negative
    flip rate).

    Examples
    --------
    >>> before, after = torch.eye(4), torch.eye(4)[[0, 1, 2, 0]]
    >>> negative_flips(before, after, torch.arange(4))
    0.25
    """
    before, _ = _labeled(before=before, y=y)
    after, y = _labeled(after=after, y=y)
    lost = (before.argmax(1) == y) & (after.argmax(1) != y)
    return lost.double().mean().item()


def exemplars(before: Tensor, after: Tensor) -> Tensor:
    """Find the samples on which two populations of models disagree.

    One retrained model differs from the next without any compression. The
    answer that is most frequent among several models hides that, so what is
    left is due to the compression; more so the larger the populations.

    Parameters
    ----------
    before, after : (models, samples, classes) outputs of two populations.
        They may differ in the number of models.

    Returns
    -------
    Mask (samples,), True where the most frequent answers differ; of answers
    that are equally frequent, the smallest class counts.

    References
    ----------
    Hooker et al., What Do Compressed Deep Neural Networks Forget?,
    arXiv:1911.05248 (pruning identified exemplars).

    Examples
    --------
    >>> before = torch.eye(3)[torch.tensor([[0, 1], [0, 1], [0, 2]])]
    >>> after = torch.eye(3)[torch.tensor([[0, 2], [1, 2], [0, 1]])]
    >>> exemplars(before, after).tolist()
    [False, True]
    """
    for name, z in (("before", before), ("after", after)):
        if z.ndim != 3 or not z.numel():
            raise ValueError(
                f"{name} must be (models, samples, classes), not empty, got"
                f" {tuple(z.shape)}"
            )
    if before.shape[1:] != after.shape[1:]:
        raise ValueError(
            f"before {tuple(before.shape)} and after {tuple(after.shape)}"
            " must be of the same samples and classes"
        )

    def modal(z: Tensor) -> Tensor:
        classes = torch.arange(z.shape[-1], device=z.device)
        votes = (z.argmax(-1, keepdim=True) == classes).sum(0)
        return votes.argmax(-1)  # (samples,)

    return modal(before) != modal(after)


def reliability(
    logits: Tensor, y: Tensor, *, bins: int = 15
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the curve of accuracy against confidence.

    The confidence is the largest probability. Bin m of 1 ... bins takes what
    lies in (m - 1, m] / bins.

    Parameters
    ----------
    logits : (..., classes) outputs of a model.
    y : (...) integer labels.
    bins : how many, of equal width.

    Returns
    -------
    Mean confidence, accuracy and number of samples, (bins,) each; the first
    two are nan in an empty bin.

    References
    ----------
    Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599,
    section 2 (reliability diagrams).

    Examples
    --------
    >>> logits = torch.tensor([[0.7, 0.3], [0.9, 0.1], [0.1, 0.9]]).log()
    >>> confidence, accuracy, count = reliability(
    ...     logits, torch.tensor([0, 0, 0]), bins=4
    ... )
    >>> count.tolist(), accuracy[2:].tolist()
    ([0, 0, 1, 2], [1.0, 0.5])
    """
    if bins < 1:
        raise ValueError(f"bins={bins} must be 1 or more")
    z, y = _labeled(logits=logits, y=y)
    confidence, guess = z.softmax(1).max(1)
    right = (guess == y).double()
    inner = torch.arange(1, bins, device=z.device).double() / bins
    index = torch.bucketize(confidence, inner)  # inner[i - 1] < c <= inner[i]
    count = torch.bincount(index, minlength=bins)
    total, hits = (
        torch.bincount(index, x, minlength=bins) for x in (confidence, right)
    )
    return total / count, hits / count, count


def calibration_error(logits: Tensor, y: Tensor, *, bins: int = 15) -> float:
    """Compute the expected calibration error.

    Its bins are those of `reliability`. With few samples a bin it is above
    zero even for a perfect model, so compare models on the same samples.

    Parameters
    ----------
    logits : (..., classes) outputs of a model.
    y : (...) integer labels.
    bins : how many, of equal width.

    Returns
    -------
    Σ count / n · |accuracy - confidence| over the bins, 0 to 1.

    References
    ----------
    Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599,
    equation 3.

    Examples
    --------
    >>> logits = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
    >>> round(calibration_error(logits, torch.tensor([0, 1])), 6)
    0.4
    """
    confidence, accuracy, count = reliability(logits, y, bins=bins)
    gap = (accuracy - confidence).abs() * count
    return (gap.nansum() / count.sum()).item()


def temperature(logits: Tensor, y: Tensor) -> float:
    """Find the temperature that makes a model's probabilities honest.

    softmax(logits / T) has the least cross-entropy on these samples, which
    should be validation data. No answer changes, since T > 0.

    Parameters
    ----------
    logits : (..., classes) outputs of a model.
    y : (...) integer labels.

    Returns
    -------
    T; above 1 if the model was too sure of itself, infinite if even its
    best probabilities are uniform ones.

    Raises
    ------
    ValueError
        If every label has the largest logit: the smaller T, the better.

    References
    ----------
    Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599,
    section 4.2.

    Examples
    --------
    Sure to 90 %, right in two cases of three: 9^(1 / T) should be 2.

    >>> logits = torch.tensor([[0.9, 0.1]] * 3).log()
    >>> T = temperature(logits, torch.tensor([0, 0, 1]))
    >>> round(T, 6), round(math.log(9) / math.log(2), 6)
    (3.169925, 3.169925)
    """
    z, y = _labeled(logits=logits, y=y)
    z = z - z.gather(1, y[:, None])  # loss = mean log Σ exp(b z), b = 1 / T
    if z.max() <= 0:
        raise ValueError(f"logits: all {len(y)} samples are right, no best T")
    if z.mean() >= 0:  # the slope at b = 0
        return math.inf
    low, high, b = 0.0, math.inf, 1.0
    for _ in range(200):  # Newton's method on a convex loss, in a bracket
        p = (b * z).softmax(1)
        mean = (p * z).sum(1, keepdim=True)
        slope, curve = mean.mean(), (p * (z - mean).square()).sum(1).mean()
        low, high = (low, b) if slope > 0 else (b, high)
        new = (b - slope / curve).item()
        if not low <= new <= min(high, 4 * b):
            new = 2 * b if high == math.inf else (low + high) / 2
        if abs(new - b) <= 1e-9 * b:
            break
        b = new
    return 1 / new


def _labeled(y: Tensor, **named: Tensor) -> tuple[Tensor, Tensor]:
    """Check and flatten to (samples, classes) float64 and (samples,)."""
    ((name, z),) = named.items()
    if not z.ndim or z.shape[:-1] != y.shape or not z.numel():
        raise ValueError(
            f"{name} must be (..., classes) for y (...), not empty, got"
            f" {tuple(z.shape)} and {tuple(y.shape)}"
        )
    z, y = z.detach().double().flatten(0, -2), y.flatten()
    if not z.isfinite().all():
        raise ValueError(f"{name} must be finite")
    if y.is_floating_point() or y.min() < 0 or y.max() >= z.shape[1]:
        raise ValueError(
            f"y must be whole numbers below {z.shape[1]} classes, got"
            f" {y.min().item()} ... {y.max().item()} ({y.dtype})"
        )
    return z, y.long()
