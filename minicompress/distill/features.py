"""Distilling what lies inside a network: features and where it looks.

The student's tensor comes first, the teacher's second; the teacher's never
receives a gradient.  Where widths differ, a regressor maps the student's to
the teacher's: it is trained with the student and thrown away afterwards.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .language import same


@contextmanager
def record(
    model: nn.Module, names: Iterable[str]
) -> Iterator[dict[str, Tensor]]:
    """Keep what named modules return, as long as the context is open.

    Parameters
    ----------
    model
        any nn.Module; its hooks are gone afterwards.
    names
        of its submodules, as in ``model.named_modules()``.

    Yields
    ------
    {name: output of the latest call}, filled when the model runs.  A layer
    that works in place, such as nn.ReLU(inplace=True), changes the output
    of the one before it.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with record(model, ["0", "1"]) as seen:
    ...     y = model(torch.ones(1, 2))
    >>> torch.equal(seen["0"].relu(), seen["1"])
    True
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = list(names)
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"names: the model has no modules {unknown}")
    seen = {}

    def keep(name: str) -> Callable:
        return lambda module, inputs, output: seen.update({name: output})

    hooks = [modules[n].register_forward_hook(keep(n)) for n in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def regressor(student: int, teacher: int, *, dims: int = 0) -> nn.Module:
    """Make a linear map from the student's width to the teacher's.

    Parameters
    ----------
    student, teacher
        features, or channels, of either.
    dims
        0 maps the last axis of (..., width); 2 maps the channels of images
        (N, width, H, W) with a 1 x 1 convolution.

    Returns
    -------
    nn.Linear or nn.Conv2d.

    Examples
    --------
    >>> regressor(16, 32)(torch.zeros(5, 16)).shape
    torch.Size([5, 32])
    >>> regressor(16, 32, dims=2)(torch.zeros(5, 16, 7, 7)).shape
    torch.Size([5, 32, 7, 7])
    """
    if dims not in (0, 2):
        raise ValueError(f"dims must be 0 or 2, got {dims}")
    if dims == 0:
        return nn.Linear(student, teacher)
    return nn.Conv2d(student, teacher, 1)


def hint(s: Tensor, t: Tensor, regressor: Callable | None = None) -> Tensor:
    """Compute half the squared distance of regressed features to the hint.

    Parameters
    ----------
    s
        (N, ...) features of a middle layer of the student.
    t
        (N, ...) of the teacher; both before, or both after the ReLU.
    regressor
        maps s to the shape of t.  Its weights must be trained too: give
        `train.fit` both, as in the example.

    Returns
    -------
    Scalar: 1/2 ||regressor(s) - t||^2, averaged over the N samples.

    References
    ----------
    Romero et al., FitNets, arXiv:1412.6550, equation 3.

    Examples
    --------
    >>> from minicompress.train import batches, evaluating, fit
    >>> teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> student = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> def loss(model, batch):
    ...     student, r = model
    ...     with evaluating(teacher), record(teacher, ["1"]) as t:
    ...         teacher(batch[0])
    ...     with record(student, ["1"]) as s:
    ...         student(batch[0])
    ...     return hint(s["1"], t["1"], r)
    >>> both = nn.ModuleList([student, regressor(3, 8)])
    >>> student, _ = fit(both, batches(torch.rand(9, 4)), loss)
    """
    s = s if regressor is None else regressor(s)
    same("t", t, s)
    return 0.5 * (s - t.detach()).square().sum() / len(s)


def attention_map(
    A: Tensor, *, p: float = 2, size: tuple[int, int] | None = None
) -> Tensor:
    """Add up the powers of all channels at each place of an image.

    Parameters
    ----------
    A
        (N, channels, H, W) activations.
    p
        power of `|A|`, 1 or more; a larger one looks at the largest only.
    size
        of the map, by averaging; (H, W) if left out.

    Returns
    -------
    (N, H W) maps of length 1; zero where all of A is zero.

    References
    ----------
    Zagoruyko, Komodakis, Paying More Attention to Attention,
    arXiv:1612.03928, section 3.1.

    Examples
    --------
    >>> attention_map(torch.tensor([[[[1.0, 0.0]], [[1.0, 2.0]]]]))
    tensor([[0.4472, 0.8944]])
    """
    if A.ndim != 4 or p < 1:
        raise ValueError(
            f"A: (N, channels, H, W), p >= 1, not {tuple(A.shape)}, {p}"
        )
    maps = A.abs().pow(p).sum(1, keepdim=True)  # (N, 1, H, W)
    if size is not None and size != A.shape[2:]:
        maps = F.adaptive_avg_pool2d(maps, size)
    return F.normalize(maps.flatten(1), dim=1)


def attention_transfer(As: Tensor, At: Tensor, *, p: float = 2) -> Tensor:
    """Compute the distance between the student's and the teacher's maps.

    The paper adds this up over several pairs of layers and multiplies it
    by beta / 2.

    Parameters
    ----------
    As
        (N, channels, H, W) the student's activations.
    At
        (N, any, any, any) the teacher's; its map is resized if need be.
    p
        as for `attention_map`.

    Returns
    -------
    Scalar, 0 to sqrt(2): the distance, averaged over the N images.

    References
    ----------
    Zagoruyko, Komodakis, Paying More Attention to Attention,
    arXiv:1612.03928, equation 2.

    Examples
    --------
    >>> A = torch.rand(2, 3, 4, 4)
    >>> attention_transfer(A, 7 * A.flip(1)).item() < 1e-6
    True
    """
    if len(At) != len(As):
        raise ValueError(f"At: {len(At)} images, As has {len(As)}")
    s = attention_map(As, p=p)
    t = attention_map(At.detach(), p=p, size=As.shape[2:])
    return torch.linalg.vector_norm(s - t, dim=1).mean()
