"""Reinforcement: a policy that learns which choices pay."""

import math
import random

from .driver import Strategy, search
from .history import History
from .spaces import Arch, Space
from .strategies import Evaluate, positive


def reinforce(
    space: Space,
    evaluate: Evaluate,
    *,
    evaluations: int | None,
    lr: float = 1.0,
    decay: float = 0.95,
    seed: int = 0,
    batch: int = 1,
    **how,
) -> History:
    """Learn a policy that draws good architectures.

    The controller is one softmax for each name, in place of the papers'
    recurrent network; the reward is minus the loss.

    Parameters
    ----------
    space
        what can be drawn; what is not valid is drawn again.
    evaluate
        ``evaluate(arch)`` -> loss.
    evaluations
        at most so many.
    lr
        step of the logits for a unit of loss: it has to fit the loss, which
        is not standardized.
    decay
        of the baseline, a moving average of the rewards.
    seed
        of everything that is drawn.
    batch
        architectures for each step.
    how
        seconds, executor, log, progress: as in `search`.

    Returns
    -------
    History

    Raises
    ------
    ValueError, RuntimeError
        As `search`; also if lr or batch is not positive.

    References
    ----------
    Williams, Simple Statistical Gradient-Following Algorithms for
    Connectionist Reinforcement Learning, Machine Learning 8, 1992.  Zoph, Le,
    Neural Architecture Search with Reinforcement Learning, arXiv:1611.01578,
    section 3.2.

    Examples
    --------
    >>> space = Space({"a": range(5), "b": range(5)})
    >>> def loss(arch):
    ...     return (arch["a"] - 3) ** 2 + (arch["b"] - 1) ** 2
    >>> reinforce(space, loss, evaluations=20, lr=0.1).best.arch
    {'a': 3, 'b': 1}
    """
    steps = policy(space, lr, decay, seed, batch)
    how |= {"evaluations": evaluations, "several": False}
    return search(steps, evaluate, **how)


def policy(
    space: Space, lr: float, decay: float, seed: int, batch: int
) -> Strategy:
    """Climb the expected reward: ∇E[R] = E[(R − b) ∇log π]."""
    positive(lr=lr, batch=batch)
    rng = random.Random(seed)
    logits = {name: [0.0] * len(v) for name, v in space.choices.items()}
    b, worst = None, -math.inf
    while True:
        archs = [acted(space, logits, rng) for _ in range(batch)]
        losses = yield archs
        # a training that diverged counts as the worst one that did not
        worst = max([worst, *filter(math.isfinite, losses)])
        if worst == -math.inf:
            continue
        rewards = [-min(loss, worst) for loss in losses]
        mean = sum(rewards) / batch
        b = mean if b is None else b
        logits = climbed(space, logits, archs, [lr * (R - b) for R in rewards])
        b = decay * b + (1 - decay) * mean


def acted(
    space: Space, logits: dict[str, list[float]], rng: random.Random
) -> Arch:
    """Draw from the policy; if 1,000 draws are not valid, from the space."""
    p = {name: softmax(z) for name, z in logits.items()}
    for _ in range(1000):
        arch = {
            name: rng.choices(values, p[name])[0]
            for name, values in space.choices.items()
        }
        if space.accepts(arch):
            return arch
    return space.sample(rng)


def climbed(
    space: Space,
    logits: dict[str, list[float]],
    archs: list[Arch],
    steps: list[float],
) -> dict[str, list[float]]:
    """Add the mean of step · ∇log π(arch) to the logits."""
    new = {name: list(z) for name, z in logits.items()}
    for arch, step in zip(archs, steps, strict=True):
        for name, i in zip(logits, space.encode(arch), strict=True):
            for j, g in enumerate(score(logits[name], i)):
                new[name][j] += step * g / len(archs)
    return new


def softmax(z: list[float]) -> list[float]:
    """Return exp(z) / Σ exp(z)."""
    most = max(z)
    e = [math.exp(x - most) for x in z]
    total = sum(e)
    return [x / total for x in e]


def score(z: list[float], i: int) -> list[float]:
    """Return ∇log π(i), which is the one-hot i minus the softmax."""
    return [(j == i) - p for j, p in enumerate(softmax(z))]
