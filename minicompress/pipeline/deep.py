"""Deep Compression: prune, share, code, and a table of what each stage did."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .. import distill, measure, storage, train
from ..codes import State
from .coding import FAST, Coder, Dumps, coded
from .stages import Bits, Fit, clustered, pruned
from .states import halved, plain, realized, sparse_state
from .units import connected

Loss = Callable[[nn.Module, object], Tensor]


@dataclass(frozen=True, eq=False)
class Stage:
    """How far a compression has come.

    Parameters
    ----------
    name
        of what was done last.
    model
        an ordinary model.
    state
        its tensors as they are stored, for `storage`.
    """

    name: str
    model: nn.Module
    state: State

    def __repr__(self) -> str:
        size = len(storage.dumps(self.model, self.state))
        return f"Stage({self.name}: {size:,} bytes)"


def finetuning(
    feed: Iterable,
    *,
    teacher: nn.Module | None = None,
    temperature: float = 4.0,
    alpha: float = 0.9,
    loss: Loss = train.cross_entropy,
    **options,
) -> Fit:
    """Make the fine-tuning that the stages call.

    Parameters
    ----------
    feed
        batches (inputs, labels), as of `train.batches`; gone through again
        in each stage.
    teacher
        the original: loss = (1 - alpha) CE(y, z) + alpha T² KL(p_T || q_T)
    temperature, alpha
        T and alpha in that.
    loss
        ``loss(model, batch)``, where there is no teacher: of labels, of
        logits that were written down (`distill.cached`), or your own.
    options
        lr, steps, seed and the like, for `train.fit`.

    Returns
    -------
    ``fit(model, on_step=None)``.

    References
    ----------
    Hinton et al., arXiv:1503.02531, for the loss.

    Examples
    --------
    >>> import torch
    >>> X = torch.eye(4)
    >>> fit = finetuning(train.batches(X, X.argmax(1), epochs=50), lr=0.1)
    >>> train.accuracy(fit(nn.Linear(4, 4)), X, X.argmax(1))
    1.0
    """
    if teacher is not None:
        loss = distill.taught(teacher, temperature=temperature, alpha=alpha)

    def fit(model: nn.Module, on_step: Callable | None = None) -> nn.Module:
        return train.fit(model, feed, loss, on_step=on_step, **options)

    return fit


def deep_compression(
    model: nn.Module,
    fit: Fit,
    *,
    sparsity: float | Mapping[str, float],
    bits: Bits,
    bias_bits: int | None = None,
    steps: int | None = None,
    centroids: Fit | None = None,
    example: Tensor | None = None,
    coders: Sequence[Coder] = FAST,
    dumps: Dumps = storage.dumps,
) -> Iterator[Stage]:
    """Prune, share what is left, and code it, with training in between.

    Parameters
    ----------
    model
        trained; left as it is.  Fold its norms first.
    fit
        fine-tuning, ``fit(model, on_step=None) -> model``: your own, or of
        `finetuning`.
    sparsity, steps
        as for `pruned`.
    bits, bias_bits
        as for `clustered`.
    centroids
        the fine-tuning of the centroids, by default `fit` again.
    example
        an input of the model; with it, weights go that are `connected` to
        no input or no output, before the centroids are trained.
    coders, dumps
        as for `smallest`.

    Yields
    ------
    Stage
        "original", "pruned", "clustered", "coded"; the last is the result.

    References
    ----------
    Han, Mao, Dally, Deep Compression: Compressing Deep Neural Networks with
    Pruning, Trained Quantization and Huffman Coding, arXiv:1510.00149.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    >>> X = torch.randn(64, 64)
    >>> feed = train.batches(X, X[:, :4].argmax(1), epochs=5)
    >>> fit = finetuning(feed, teacher=model)
    >>> *_, last = deep_compression(model, fit, sparsity=0.9, bits=4)
    >>> last.model[0].weight.unique().numel() <= 17
    True
    """
    yield Stage("original", model, plain(model))
    model, _ = pruned(model, fit, sparsity=sparsity, steps=steps)
    model = model if example is None else connected(model, example)
    state = sparse_state(model)
    yield Stage("pruned", model, coded(state, coders=(), dumps=dumps))
    model, state = clustered(
        model, centroids or fit, bits=bits, bias_bits=bias_bits
    )
    yield Stage("clustered", model, coded(state, coders=(), dumps=dumps))
    state = coded(halved(state), coders=coders, dumps=dumps)
    yield Stage("coded", realized(model, state), state)


def stage_table(
    stages: Iterable[Stage],
    metric: Callable[[nn.Module], float],
    *,
    quality: str = "accuracy",
) -> measure.Table:
    """Write each stage to a file, load the file, and measure what is in it.

    Parameters
    ----------
    stages
        of `deep_compression`; the first is the original.  They are made one
        after the other, as they are measured.
    metric
        from a model to a number.
    quality
        the name of that number.

    Returns
    -------
    Table, a row for each stage.
    """
    reports, like = [], None
    for stage in stages:
        like = like or stage.model
        cost = {"name": stage.name, "like": like, "metric": metric}
        reports.append(measure.report(stage.model, stage.state, **cost))
    return measure.table(reports, quality=quality)
