"""The stages of a compression: prune, share or round, with training.

A stage takes a model and the user's own fine-tuning, ``fit(model,
on_step=None) -> model``, and returns an ordinary model.  What is zero stays
zero in all stages after it, so that they can follow one another in any order.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from .. import codes, prune, quantize, share, through
from ..codes import Code, State
from .states import plain, put

Fit = Callable[..., nn.Module]  # fit(model, on_step=None) -> model
Score = Callable[[nn.Module], dict[str, Tensor]]
Bits = int | Mapping[str, int]


def pruned(
    model: nn.Module,
    fit: Fit,
    *,
    sparsity: float | Mapping[str, float],
    steps: int | None = None,
    until: float = 0.6,
    every: int = 10,
    score: Score = prune.magnitudes,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Remove weights, at once or little by little, and train the rest.

    Parameters
    ----------
    model
        left as it is.
    fit
        ``fit(model, on_step=None) -> model``.  With `steps` it has to call
        ``on_step(step, model, loss)`` after each step, from 1 on.
    sparsity
        fraction of all scored weights together, or {name: fraction} of
        single ones.
    steps
        that `fit` makes; then the sparsity grows along a cubic curve, every
        `every` steps during the first part `until` of them.  None: all of it
        goes before the first step.
    score
        ``score(model) -> {name: scores}``; the magnitudes by default.

    Returns
    -------
    (nn.Module, dict)
        An ordinary model with zeros, and its masks by name, True = kept.

    Raises
    ------
    ValueError
        If a name has no scores, or `fit` ends before all of it is removed.

    References
    ----------
    Han et al., arXiv:1506.02626 (prune, train again).
    Zhu and Gupta, arXiv:1710.01878 (gradually).

    Examples
    --------
    >>> same = lambda model, on_step=None: model  # no training
    >>> small, masks = pruned(nn.Linear(8, 4), same, sparsity=0.75)
    >>> int((small.weight != 0).sum())
    8
    """
    final, select = sparsity, prune.keep_global
    if isinstance(sparsity, Mapping):
        final, select = max(sparsity.values()), partial(_each, of=sparsity)
        score = partial(_named, score=score, names=list(sparsity))
    if steps is None:
        masks = select(score(model), sparsity=final)
        tuned = fit(prune.masked(model, masks), on_step=None)
    else:
        masks = {n: torch.isfinite(s) for n, s in score(model).items()}
        end, seen = max(2, round(until * steps)), 0
        cut = prune.gradual(
            score, start=1, end=end, every=every, final=final, select=select
        )

        def on_step(step: int, model: nn.Module, loss: float) -> None:
            nonlocal seen
            cut(step, model, loss)
            seen = step

        tuned = fit(prune.masked(model, masks), on_step=on_step)
        if seen < end:
            raise ValueError(
                f"fit called on_step up to step {seen}, but the last weights "
                f"go at step {end}"
            )
    found = through.tensors(tuned).items()
    return through.bake(tuned), {n: t["mask"].clone() for n, t in found}


def clustered(
    model: nn.Module,
    fit: Fit | None = None,
    *,
    bits: Bits,
    bias_bits: int | None = None,
    start: str = "histogram",
) -> tuple[nn.Module, State]:
    """Let the weights that are not zero share few values, and train those.

    Parameters
    ----------
    model
        left as it is; its zeros stay zeros.
    fit
        ``fit(model) -> model``; None leaves the centroids where they are.
    bits
        of an index, 1 to 8: of all weights with two dimensions or more, or
        {name: bits} of single parameters; others stay as they are.
    bias_bits
        of the index of a parameter with one dimension and more numbers than
        centroids; its zeros count for nothing and join the nearest.  None
        leaves them as they are.
    start
        as for `share.kmeans`.

    Returns
    -------
    (nn.Module, dict)
        An ordinary model, and its state {name: Tensor or Code}, which
        decodes to the same weights.

    References
    ----------
    Han, Mao, Dally, arXiv:1510.00149, section 3.

    Examples
    --------
    >>> small, state = clustered(nn.Linear(8, 4), bits=2)
    >>> state["weight"]
    Codebook(Ints(uint8[4, 8], 2), float32[4])
    """
    wanted = wanted_bits(model, bits, bias_bits)
    own = dict(model.named_parameters())
    made = {
        name: _shared(own[name].detach(), bits=b, start=start)
        for name, b in wanted.items()
    }
    books = {n: c for n, c in made.items() if not _is_empty(c)}
    tuned = share.cluster(_held(model, books), books)
    tuned = tuned if fit is None else fit(tuned)
    state = share.encode_clustered(tuned, books)
    empty = {n: c for n, c in made.items() if n not in books}
    return through.bake(tuned), put(state, empty)


def rounded(
    model: nn.Module, fit: Fit | None = None, *, bits: Bits
) -> tuple[nn.Module, State]:
    """Round the weights that are not zero to a grid whose step is learned.

    In place of `clustered`: where integers are needed, or the centroids
    would cost more than the grid.

    Parameters
    ----------
    model
        left as it is; its zeros stay zeros.
    fit
        ``fit(model) -> model``; None rounds without training.
    bits
        of an integer, 2 to 16: of all weights with two dimensions or more,
        or {name: bits} of single parameters.

    Returns
    -------
    (nn.Module, dict)
        An ordinary model, and its state {name: Tensor or Code}, which
        decodes to the same weights.

    References
    ----------
    Esser et al., Learned Step Size Quantization, arXiv:1902.08153.

    Examples
    --------
    >>> small, state = rounded(nn.Linear(64, 32), bits=4)
    >>> small.weight.unique().numel() <= 16
    True
    """
    wanted = wanted_bits(model, bits, None)
    own = {n: w.detach() for n, w in model.named_parameters()}
    tuned = _held(model, ())
    for b in sorted({*wanted.values()}):  # one function for each width
        names = [n for n in wanted if wanted[n] == b]
        scales = {n: nn.Parameter(_step(own[n], b)) for n in names}
        f = partial(quantize.lsq, bits=b)
        tuned = through.attach(tuned, names, f, scale=scales)
    tuned = tuned if fit is None else fit(tuned)
    found = through.tensors(tuned)
    model = through.bake(tuned)
    made = {}
    for n, w in model.named_parameters():
        if n in wanted:
            s = found[n]["scale"]
            made[n] = _grid(quantize.lsq_code(w, s, bits=wanted[n]))
    return model, put(plain(model), made)


def _held(model: nn.Module, but: Collection[str]) -> nn.Module:
    """Keep the zeros of weights during training, but of some."""
    masks = {
        n: w != 0
        for n, w in model.named_parameters()
        if w.ndim >= 2 and n not in but and not w.all()
    }
    return prune.masked(model, masks) if masks else model


def _named(model: nn.Module, *, score: Score, names: list) -> dict:
    scores = score(model)
    for name in names:
        if name not in scores:
            raise ValueError(f"sparsity: {name!r} has no scores")
    return {name: scores[name] for name in names}


def _each(
    scores: Mapping[str, Tensor], *, sparsity: float, of: Mapping[str, float]
) -> dict[str, Tensor]:
    """Keep the largest of each; all grow to their own sparsity together."""
    share_of = sparsity / max(*of.values(), 1e-12)
    return {
        n: prune.keep(s, sparsity=of[n] * share_of) for n, s in scores.items()
    }


def wanted_bits(model: nn.Module, bits: Bits, bias_bits: int | None) -> dict:
    """Say how many bits which parameters get."""
    own = dict(model.named_parameters())
    if isinstance(bits, Mapping):
        for name in bits:
            if name not in own:
                raise ValueError(f"bits: the model has no parameter {name!r}")
        wanted = dict(bits)
    else:
        wanted = {n: bits for n, w in own.items() if w.ndim >= 2}
    if bias_bits is not None:
        many = {n for n, w in own.items() if w.ndim == 1}
        many = {n for n in many if own[n].count_nonzero() > 2**bias_bits}
        wanted = dict.fromkeys(sorted(many), bias_bits) | wanted
    return wanted


def _shared(w: Tensor, *, bits: int, start: str) -> Code:
    """Cluster what is not zero."""
    if w.all():
        return share.kmeans(w, bits=bits, start=start)
    if w.ndim == 1 and w.any():  # biases of idle units: any number will do
        few = {"weight": w != 0, "start": start}
        return share.kmeans(w, bits=bits, **few)
    code = codes.sparse(w, w != 0)
    if not len(code.values):
        return code
    return replace(
        code, values=share.kmeans(code.values, bits=bits, start=start)
    )


def _is_empty(code: Code) -> bool:
    return isinstance(code, codes.Sparse) and not codes.shape(code.values)[0]


def _step(w: Tensor, bits: int) -> Tensor:
    kept = w[w != 0]
    return quantize.lsq_scale(kept if len(kept) else w, bits=bits)


def _grid(code: codes.Affine) -> Code:
    """Write only the integers that stand for another number than zero."""
    q = code.q.values
    mask = q != code.zero
    if mask.all():
        return code
    kept = replace(code, q=codes.Ints(q[mask], code.q.bits))
    return codes.Sparse(mask, kept, code.shape)
