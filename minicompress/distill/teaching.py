"""Who teaches whom: from a loss on logits to a training with `train.fit`."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..train import evaluating
from .logits import hinton

Loss = Callable[..., Tensor]
Teach = Callable[[nn.Module | None, nn.Module], nn.Module]


def taught(
    teacher: nn.Module, loss: Loss = hinton, **options
) -> Callable[[nn.Module, object], Tensor]:
    """Make a loss for `train.fit` in which a teacher sees each batch.

    The teacher runs in evaluation mode without gradients and is left in the
    mode in which it was; the student runs as it is.  Both see the same
    inputs: if they are changed at random, then once for both.

    Parameters
    ----------
    teacher
        from inputs to logits; may stand on another device.
    loss
        ``loss(z, v, y, **options)``, z being the student's logits.
    options
        temperature and the like, for the loss.

    Returns
    -------
    ``f(student, batch)``; a batch is (inputs, labels).  If it is (inputs,)
    or the bare inputs, the loss gets None for y.

    Examples
    --------
    >>> from minicompress.train import accuracy, batches, fit
    >>> X = torch.eye(4)
    >>> teacher = nn.Linear(4, 4)
    >>> feed = batches(X, epochs=100)  # no labels
    >>> loss = taught(teacher, temperature=2.0, alpha=1)
    >>> student = fit(nn.Linear(4, 4), feed, loss, lr=0.1)
    >>> accuracy(student, X, teacher(X).argmax(1))
    1.0
    """

    def teach(student: nn.Module, batch: object) -> Tensor:
        x, y = _unpack(batch)
        with evaluating(teacher) as device:
            v = teacher(x.to(device))
        return loss(student(x), v, y, **options)

    return teach


def cached(
    loss: Loss = hinton, **options
) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    """Make a loss for `train.fit` from logits that were written down.

    Saves the teacher's run in every epoch but the first; see
    `teacher_logits`.  The logits belong to the very inputs they were
    computed from, so this does not go with inputs that change at random.

    Parameters
    ----------
    loss
        ``loss(z, v, y, **options)``, z being the student's logits.
    options
        temperature and the like, for the loss.

    Returns
    -------
    ``f(student, batch)``; a batch is (inputs, labels, teacher's logits), or
    (inputs, logits) for a loss without labels.

    Examples
    --------
    >>> from minicompress.train import batches
    >>> X, y, v = torch.eye(2), torch.arange(2), torch.eye(2)
    >>> batch = next(iter(batches(X, y, v)))
    >>> round(cached(alpha=1)(nn.Identity(), batch).item(), 4)
    0.0
    """

    def teach(student: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        *given, v = batch
        x, y = _unpack(given)
        return loss(student(x), v, y, **options)

    return teach


def chain(
    teacher: nn.Module | None, students: Iterable[nn.Module], teach: Teach
) -> list[nn.Module]:
    """Let each student learn from the one before it.

    With students that shrink from step to step, all but the last are
    teacher assistants: each gap in capacity is smaller than the whole.

    Parameters
    ----------
    teacher
        of the first student; None if it learns from the labels alone.
    students
        untrained, in order.
    teach
        ``teach(teacher, student)`` returns the student trained, for
        instance by ``train.fit(student, batches, taught(teacher))``.

    Returns
    -------
    The trained students, in order.

    References
    ----------
    Mirzadeh et al., Improved Knowledge Distillation via Teacher Assistant,
    arXiv:1902.03393.

    Examples
    --------
    >>> chain("professor", ["a", "b"], lambda t, s: f"{s} of {t}")
    ['a of professor', 'b of a of professor']
    """
    trained = []
    for student in students:
        teacher = teach(teacher, student)
        trained.append(teacher)
    return trained


def generations(
    build: Callable[[int], nn.Module], teach: Teach, n: int
) -> list[nn.Module]:
    """Train a model again and again, each time taught by the last result.

    Every generation starts afresh: one that began at its teacher's weights
    would find the gradient of the teacher's term to be zero.

    Parameters
    ----------
    build
        ``build(g)`` returns a new untrained model, g = 0, 1, ..., n - 1.
    teach
        as for `chain`; the first model is given None as its teacher.
    n
        how many.

    Returns
    -------
    The trained models; the paper also uses the `ensemble` of them.

    References
    ----------
    Furlanello et al., Born-Again Neural Networks, arXiv:1805.04770.

    Examples
    --------
    >>> generations(lambda g: g, lambda t, s: f"{s} of {t}", 2)
    ['0 of None', '1 of 0 of None']
    """
    return chain(None, map(build, range(n)), teach)


def ensemble(
    models: Sequence[nn.Module], *, temperature: float = 1.0
) -> nn.Module:
    """Join models into one whose probabilities are the mean of theirs.

    Parameters
    ----------
    models
        from inputs to logits (..., classes); they are shared, not copied.
    temperature
        at which the probabilities are averaged.  For a teacher: the one of
        the loss, which then sees the mean of the soft targets exactly.

    Returns
    -------
    A model that returns T log mean softmax(v / T), which are logits.

    Examples
    --------
    >>> both = ensemble([nn.Identity(), nn.Softsign()])
    >>> both(torch.tensor([[0.0, 1.0]])).softmax(-1)
    tensor([[0.3232, 0.6768]])
    """
    return _Ensemble(models, temperature)


class _Ensemble(nn.Module):
    """T log mean softmax(v / T) over several models."""

    def __init__(self, models: Sequence[nn.Module], temperature: float):
        super().__init__()
        if not models:
            raise ValueError("models: an ensemble needs one or more")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive: {temperature}")
        self.models, self.temperature = nn.ModuleList(models), temperature

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (..., classes) of the mean."""
        T = self.temperature
        each = [(model(x) / T).log_softmax(-1) for model in self.models]
        total = torch.stack(each).logsumexp(0)  # (..., classes)
        return T * (total - math.log(len(each)))


def _unpack(batch: object) -> tuple[Tensor, Tensor | None]:
    """Split a batch into inputs and labels, which may be missing."""
    parts = [batch] if isinstance(batch, Tensor) else [*batch]
    if len(parts) not in (1, 2):
        raise ValueError(
            f"batch: inputs and perhaps labels, beside the logits if they "
            f"are cached, got {len(parts)} parts"
        )
    return parts[0], parts[1] if len(parts) == 2 else None
