"""When to prune: at once, step by step, or again from the start.

The loops work on any model.  What they need is given as functions:
``train(model) -> model``, a ``score(model) -> {name: scores}`` and a rule
``select(scores, sparsity=...) -> {name: mask}``.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .. import through
from .masks import keep_global

Masks = dict[str, Tensor]
Score = Callable[[nn.Module], dict[str, Tensor]]
Select = Callable[..., Masks]
Train = Callable[[nn.Module], nn.Module]


def magnitudes(
    model: nn.Module,
    *,
    where: Callable[[str, Tensor], bool] = lambda name, w: w.ndim >= 2,
) -> dict[str, Tensor]:
    """Score the weights of a model by their magnitude.

    Parameters
    ----------
    model
        tied weights are scored once, under their first name.
    where
        from a name and a parameter to a bool; by default every
        parameter with two dimensions or more.

    Returns
    -------
    dict
        The scores `|w|` by name.
    """
    scores = {
        name: w.detach().abs()
        for name, w in model.named_parameters()
        if where(name, w)
    }
    if not scores:
        raise ValueError("where selects no parameter")
    return scores


def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Make the masked weights zero and keep them so during training.

    The mask is part of the forward pass: no momentum, weight decay or
    restart of an optimizer can bring a weight back.

    Parameters
    ----------
    model
        left as it is.
    masks
        {name of a parameter: bool mask of its shape}.

    Returns
    -------
    A copy that computes with mask * w.  `through.bake` turns it into an
    ordinary model.

    Raises
    ------
    ValueError
        If a name is unknown, or a mask is not bool or of another shape.

    Examples
    --------
    >>> mask = torch.tensor([[True, False]])
    >>> bool(masked(nn.Linear(2, 1), {"weight": mask}).weight[0, 1] == 0)
    True
    """
    shapes = {
        name: w.shape
        for name, w in model.named_parameters(remove_duplicate=False)
    }
    for name, mask in masks.items():
        if name in shapes and mask.shape != shapes[name]:
            raise ValueError(
                f"{name}: mask has shape {tuple(mask.shape)}, the weight "
                f"{tuple(shapes[name])}"
            )
        if mask.dtype != torch.bool:
            raise ValueError(f"{name}: mask must be bool, got {mask.dtype}")
    return through.attach(model, list(masks), _times, mask=masks)


def _times(w: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, w, 0)  # w * mask would leave -0 behind


def cubic(
    t: float, *, start: float, end: float, initial: float = 0.0, final: float
) -> float:
    """Compute the sparsity at time t: fast at first, slow at the end.

    Parameters
    ----------
    t
        time, for instance the step of the training.
    start, end
        times between which the sparsity grows.
    initial, final
        sparsity until `start` and from `end` on.

    Returns
    -------
    final + (initial - final) (1 - (t - start) / (end - start))^3 in between.

    References
    ----------
    Zhu and Gupta, To prune, or not to prune, arXiv:1710.01878, equation 1.

    Examples
    --------
    >>> cubic(50, start=0, end=100, final=0.9)  # half the time
    0.7875
    """
    if not start < end:
        raise ValueError(f"end must come after start={start}, got {end}")
    left = 1 - min(max((t - start) / (end - start), 0.0), 1.0)
    return final + (initial - final) * left**3


def geometric(rounds: int, *, per_round: float) -> list[float]:
    """List the densities when every round removes the same share.

    Parameters
    ----------
    rounds
        how many.
    per_round
        fraction of the weights left that a round removes.

    Returns
    -------
    (1 - per_round)^k for k = 1 ... rounds.

    References
    ----------
    Frankle and Carbin, The Lottery Ticket Hypothesis, arXiv:1803.03635,
    section 1.

    Examples
    --------
    >>> geometric(2, per_round=0.5)
    [0.5, 0.25]
    """
    _check_rounds(rounds)
    if not 0 <= per_round <= 1:
        raise ValueError(f"per_round must be in 0 to 1, got {per_round}")
    return [(1 - per_round) ** k for k in range(1, rounds + 1)]


def one_shot(
    model: nn.Module,
    score: Score = magnitudes,
    *,
    sparsity: float,
    select: Select = keep_global,
) -> tuple[nn.Module, Masks]:
    """Prune to the full sparsity at once, without training.

    Parameters
    ----------
    model
        left as it is.
    score
        ``score(model) -> {name: scores}`` says which weights compete.
    sparsity
        fraction of the scored weights to remove.
    select
        `keep_global`, `keep_each` or the like.

    Returns
    -------
    An ordinary model with zeros, and the masks {name: bool Tensor}.

    Examples
    --------
    >>> model, masks = one_shot(nn.Linear(4, 4), sparsity=0.75)
    >>> int((model.weight != 0).sum())
    4
    """
    masks = select(score(model), sparsity=sparsity)
    return through.bake(masked(model, masks)), masks


def iterative(
    model: nn.Module,
    train: Train,
    score: Score = magnitudes,
    *,
    sparsity: float,
    rounds: int,
    select: Select = keep_global,
) -> tuple[nn.Module, Masks]:
    """Prune a little, train with the mask held, and repeat.

    Every round removes the same share of the weights that are left.

    Parameters
    ----------
    model
        trained; left as it is.
    train
        ``train(model) -> model``, fine-tuning.  One that replays the
        original learning rates makes this learning-rate rewinding.
    score
        ``score(model) -> {name: scores}``, of the model by then.
    sparsity
        fraction of the scored weights removed in the end.
    rounds
        how often to prune.
    select
        `keep_global`, `keep_each` or the like.

    Returns
    -------
    An ordinary model with zeros, and the masks {name: bool Tensor}.

    References
    ----------
    Han et al., arXiv:1506.02626, section 3.
    Renda et al., Comparing Rewinding and Fine-tuning in Neural Network
    Pruning, arXiv:2003.02389, section 2.
    """
    masks = {}
    for s in _sparsities(sparsity, rounds):
        masks = select(_scores(score, model, masks), sparsity=s)
        model = through.bake(train(masked(model, masks)))
    return model, masks


def lottery(
    model: nn.Module,
    train: Train,
    score: Score = magnitudes,
    *,
    sparsity: float,
    rounds: int,
    rewind: Mapping[str, Tensor] | None = None,
    select: Select = keep_global,
) -> tuple[nn.Module, Masks]:
    """Find a winning ticket: train, prune, reset what is left, repeat.

    Parameters
    ----------
    model
        at its initialization; left as it is.
    train
        ``train(model) -> model``, the full training.
    score
        ``score(model) -> {name: scores}``, of the trained model.
    sparsity
        fraction of the scored weights removed in the end.
    rounds
        how often to train and prune.
    rewind
        state_dict to reset to, for instance from early in training;
        by default that of `model`.
    select
        `keep_global`, `keep_each` or the like.

    Returns
    -------
    The ticket, not trained: an ordinary model whose weights are those of
    `rewind` where the mask keeps them; and the masks {name: bool Tensor}.
    Train ``masked(ticket, masks)``, and as controls the same masks on other
    initial weights and `random` masks of the same sparsities.

    References
    ----------
    Frankle and Carbin, arXiv:1803.03635, section 1.
    Frankle et al., Linear Mode Connectivity and the Lottery Ticket
    Hypothesis, arXiv:1912.05671, algorithm 2 (rewinding).
    """
    reset = through.bake(model)
    if rewind is not None:
        reset.load_state_dict(rewind)
    ticket, masks = model, {}
    for s in _sparsities(sparsity, rounds):
        start = masked(ticket, masks) if masks else ticket
        trained = through.bake(train(start))
        masks = select(_scores(score, trained, masks), sparsity=s)
        ticket = through.bake(masked(reset, masks))
    return ticket, masks


def gradual(
    score: Score = magnitudes,
    *,
    start: int,
    end: int,
    initial: float = 0.0,
    final: float,
    every: int = 1,
    select: Select = keep_global,
) -> Callable[[int, nn.Module, float], None]:
    """Raise the sparsity along a cubic curve during one training run.

    Parameters
    ----------
    score
        ``score(model) -> {name: scores}``; sees an ordinary model.
    start, end
        steps between which the sparsity grows.
    initial, final
        sparsity at `start` and from `end` on.
    every
        steps between two changes of the masks.
    select
        `keep_global`, `keep_each` or the like.

    Returns
    -------
    ``on_step(step, model, loss)`` for `train.fit`, which has to train a
    `masked` model, at first with masks that keep everything.  It changes
    the masks of the model in training; what is pruned stays pruned.

    References
    ----------
    Zhu and Gupta, arXiv:1710.01878, section 3.
    """
    cubic(start, start=start, end=end, final=final)
    if every < 1:
        raise ValueError(f"every must be at least 1, got {every}")

    def on_step(step: int, model: nn.Module, loss: float) -> None:
        due = start <= step < end and (step - start) % every == 0
        if not due and step != end:
            return
        own = through.tensors(model)
        old = {name: t["mask"] for name, t in own.items() if "mask" in t}
        s = cubic(step, start=start, end=end, initial=initial, final=final)
        scores = _scores(score, through.bake(model), old)
        if scores.keys() - old.keys():
            raise ValueError(
                f"model: no mask on {sorted(scores.keys() - old.keys())}, "
                "train a `masked` model"
            )
        for name, mask in select(scores, sparsity=s).items():
            old[name].copy_(mask)

    return on_step


def _scores(score: Score, model: nn.Module, masks: Masks) -> Masks:
    """Score a model; what is pruned already goes first."""
    scores = score(model)
    for name in scores.keys() & masks.keys():
        kept = scores[name].masked_fill(~masks[name], -torch.inf)
        scores = {**scores, name: kept}
    return scores


def _sparsities(sparsity: float, rounds: int) -> list[float]:
    _check_rounds(rounds)
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be between 0 and 1, got {sparsity}")
    per_round = 1 - (1 - sparsity) ** (1 / rounds)
    densities = geometric(rounds, per_round=per_round)
    # the last one as it was asked for, without a rounding error
    return [*(1 - d for d in densities[:-1]), sparsity]


def _check_rounds(rounds: int) -> None:
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
