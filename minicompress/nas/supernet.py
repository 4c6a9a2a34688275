"""One large network that contains all others: train once, cut many out."""

import random
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .. import train
from .slices import inherit
from .spaces import Arch, Space

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def fit_supernet(
    large: nn.Module,
    build: Callable[[Arch], nn.Module],
    space: Space,
    batches: Iterable,
    loss: Callable[[nn.Module, object], Tensor] = train.cross_entropy,
    *,
    paths: int = 1,
    extremes: Sequence[Arch] = (),
    distill: bool = False,
    seed: int = 0,
    **options,
) -> nn.Module:
    """Train a large model so that all networks inside of it work.

    Every step draws `paths` members of the space, each as likely as any
    other, and adds up their gradients.  One path and nothing else is
    single-path one-shot training.  With the largest and the smallest member
    as `extremes`, which take part in every step, it is the sandwich rule:
    what lies between two networks that work tends to work too.

    Progressive shrinking is a chain of calls, each with the result of the
    one before as `large`, in which ``space.where(...)`` lets in ever smaller
    networks.

    Parameters
    ----------
    large
        contains the parameters of all members, see `inherit`; left as it
        is.  Its own forward is never run.
    build
        makes the untrained network of an architecture.  It is called once
        for each that is drawn, and only structure counts: under
        ``torch.device("meta")`` it takes neither time nor memory.
    space
        what is drawn from.
    batches
        as for `train.fit`.
    loss
        ``loss(network, batch)``; the network is called like the module but
        has no other attributes.
    paths
        random members in a step.
    extremes
        members in every step, the largest first.
    distill
        in-place distillation: the first of `extremes` learns from the
        loss, all others learn only its outputs, by the cross-entropy with
        its softmax as the labels.
    seed
        decides the paths, and what the loss draws.
    options
        `lr`, `steps`, `clip`, `progress`, `checkpoint` and what else
        `train.fit` knows.  A step costs paths + len(extremes) times what
        it costs to train one network.

    Returns
    -------
    nn.Module
        A trained copy of `large`, in evaluation mode.  `subnet` takes a
        network out; if it has BatchNorm, it needs `recalibrate` before it
        can be judged.

    Raises
    ------
    ValueError
        If there is nothing to train in a step, no teacher for the others,
        or an architecture or its network does not fit.

    Notes
    -----
    What is not on a path has gradient 0, and an optimizer with momentum
    moves it all the same.

    References
    ----------
    Guo et al., Single Path One-Shot Neural Architecture Search with Uniform
    Sampling, arXiv:1904.00420; Yu and Huang, Universally Slimmable Networks
    and Improved Training Techniques, arXiv:1903.05134;
    Cai et al., Once-for-All, arXiv:1908.09791.

    Examples
    --------
    >>> from minicompress.nas import subnet
    >>> from minicompress.train import accuracy, batches
    >>> space, X, y = Space({"hidden": (4, 8)}), torch.eye(4), torch.arange(4)
    >>> def build(arch):
    ...     h = arch["hidden"]
    ...     return nn.Sequential(nn.Linear(4, h), nn.ReLU(), nn.Linear(h, 4))
    >>> large, feed = build({"hidden": 8}), batches(X, y, epochs=200)
    >>> large = fit_supernet(large, build, space, feed, paths=2, lr=0.05)
    >>> [accuracy(subnet(large, build(a)), X, y) for a in space]
    [1.0, 1.0]
    """
    if paths + len(extremes) < 1:
        raise ValueError("paths: 0, and no extremes: there is no network")
    if distill and not extremes:
        raise ValueError("distill: the first of extremes is the teacher")
    built = {}

    def network(model: nn.Module, arch: Arch) -> Callable:
        key = space.encode(arch)
        if key not in built:
            with torch.random.fork_rng(devices=[]):  # paths know nothing of it
                built[key] = build(arch)
        small = built[key].train(model.training)
        weights = inherit(model, small)
        return lambda *args, **named: functional_call(
            small, weights, args, named
        )

    def step(model: nn.Module, batch: object) -> Tensor:
        rng = random.Random(int(torch.randint(2**62, ())))
        archs = [*extremes, *(space.sample(rng) for _ in range(paths))]
        networks = [network(model, arch) for arch in archs]
        if distill:
            return _distilled(networks, loss, batch)
        return sum(loss(net, batch) for net in networks)

    return train.fit(large, batches, step, seed=seed, **options)


def recalibrate(
    model: nn.Module,
    batches: Iterable,
    *,
    forward: Callable[[nn.Module, object], object] | None = None,
) -> nn.Module:
    """Measure anew the means and variances that BatchNorm divides by.

    The running averages of a supernet are a mixture over all of its
    networks and right for none.  A network of its own needs its own: the
    average over the batches, which takes forward passes only.

    Parameters
    ----------
    model
        left as it is.
    batches
        of training inputs: a tensor each, or a tuple whose first entry is
        the input.  Each batch counts the same.
    forward
        ``forward(model, batch)``, for models that need more than one input.

    Returns
    -------
    nn.Module
        A copy in the same mode.  Only BatchNorm's averages differ; without
        BatchNorm nothing does.

    Raises
    ------
    ValueError
        If there are no batches.

    References
    ----------
    Guo et al., Single Path One-Shot Neural Architecture Search with Uniform
    Sampling, arXiv:1904.00420.

    Examples
    --------
    >>> x = torch.tensor([[1.0], [3.0], [8.0]])
    >>> norm = recalibrate(nn.BatchNorm1d(1), [x])
    >>> norm.running_mean, norm.running_var
    (tensor([4.]), tensor([13.]))
    """
    if forward is None:

        def forward(model, batch):
            return model(batch if isinstance(batch, Tensor) else batch[0])

    model, count = deepcopy(model), 0
    norms = [m for m in model.modules() if isinstance(m, NORMS)]
    before = [norm.momentum for norm in norms]
    with train.evaluating(model):  # dropout and the like rest
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average of all batches
            norm.train()
        for batch in batches:
            forward(model, batch)
            count += 1
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    if not count:
        raise ValueError("batches: there are none")
    return model


def _distilled(
    networks: Sequence[Callable], loss: Callable, batch: object
) -> Tensor:
    """Let the first network learn from the loss, the others from it."""
    first, *others = networks
    seen = []

    def teacher(*args, **named):
        v = first(*args, **named)
        seen.append((args, named, v.detach()))
        return v

    value = loss(teacher, batch)
    for args, named, v in seen:  # once, for most losses
        p = v.flatten(0, -2).softmax(-1)
        for net in others:
            z = net(*args, **named).flatten(0, -2)
            value = value + F.cross_entropy(z, p)
    return value
