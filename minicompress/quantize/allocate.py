"""Which layer gets how many bits: choices with a price and a loss.

A problem is a table ``{layer: {choice: (bytes, loss)}}``, and a solution
names one choice for each layer.  All methods here take the loss of a network
to be the sum of what its layers lose alone; `predicted` and `damage` tell
how far that holds.
"""

from collections.abc import Callable, Hashable, Mapping
from copy import deepcopy

import numpy as np
import torch
from torch import nn

from .. import codes, storage

Table = Mapping[str, Mapping[Hashable, tuple[int, float]]]
Options = Mapping[str, Mapping[Hashable, codes.Code]]
Metric = Callable[[nn.Module], float]


def sensitivity(model: nn.Module, options: Options, metric: Metric) -> dict:
    """Measure what each choice costs when only its own layer is changed.

    Parameters
    ----------
    model
        left as it is.
    options
        ``{name of a weight: {choice: code}}``; a choice is usually a
        number of bits.
    metric
        from a model to a number, lower is better, without randomness; a
        loss tells more than an error rate.

    Returns
    -------
    {name: {choice: (bytes, loss)}}
        Bytes of the code in a file, and how much the metric rises; noise
        may make it negative.

    References
    ----------
    Wu et al., Integer Quantization for Deep Learning Inference: Principles
    and Empirical Evaluation, arXiv:2004.09602, section 5.1.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> code = codes.Affine(codes.Ints(torch.tensor([[1]]), 1), 0.0)
    >>> error = lambda m: (m.weight - model.weight).abs().item()
    >>> table = sensitivity(model, {"weight": {1: code}}, error)
    >>> table["weight"][1] == (1, model.weight.abs().item())
    True
    """
    before = metric(model)
    return {
        name: {
            choice: (
                storage.payload(code),
                metric(_with(model, {name: code})) - before,
            )
            for choice, code in own.items()
        }
        for name, own in options.items()
    }


def damage(
    model: nn.Module, made: Mapping[str, codes.Code], metric: Metric
) -> float:
    """Measure how much the metric rises when weights become their codes.

    Parameters
    ----------
    model
        left as it is.
    made
        {name of a weight: code}; all of them at once.
    metric
        as for `sensitivity`.
    """
    return metric(_with(model, made)) - metric(model)


def predicted(table: Table, choice: Mapping) -> tuple[int, float]:
    """Add up the bytes and the losses of one choice for each layer.

    Parameters
    ----------
    table
        {layer: {choice: (bytes, loss)}}.
    choice
        {layer: choice}.

    Examples
    --------
    >>> table = {"a": {2: (10, 0.3)}, "b": {4: (40, 0.1)}}
    >>> predicted(table, {"a": 2, "b": 4})
    (50, 0.4)
    """
    entries = [table[name][c] for name, c in choice.items()]
    return sum(b for b, _ in entries), sum(loss for _, loss in entries)


def greedy(table: Table, *, budget: int) -> dict:
    """Buy, again and again, what lowers the loss most per byte.

    Starts from the cheapest choice of every layer, and passes over what no
    longer fits.

    Parameters
    ----------
    table
        {layer: {choice: (bytes, loss)}}.
    budget
        bytes, all layers together.

    Returns
    -------
    {layer: choice}
        Never a larger loss than `lagrangian`, never a smaller one than
        `knapsack`.

    Raises
    ------
    ValueError
        If the table is faulty or its cheapest choices exceed the budget.

    References
    ----------
    Shoham and Gersho, Efficient bit allocation for an arbitrary set of
    quantizers, IEEE Trans. ASSP 36, 1988.

    Examples
    --------
    >>> table = {"a": {2: (10, 0.3), 4: (20, 0.1)}, "b": {2: (40, 0.4)}}
    >>> greedy(table, budget=60)
    {'a': 4, 'b': 2}
    """
    choice = _cheapest(table, budget)
    left = budget - predicted(table, choice)[0]
    while True:
        best = None
        for name, own in table.items():
            cost, loss = own[choice[name]]
            for c, (more, less) in own.items():
                gain, price = loss - less, more - cost
                if gain > 0 and 0 <= price <= left:
                    rate = gain / price if price else np.inf
                    if best is None or rate > best[0]:
                        best = rate, name, c, price
        if best is None:
            return choice
        _, name, choice[name], price = best
        left -= price


def lagrangian(table: Table, *, budget: int) -> dict:
    """Put one price on a byte, the lowest at which the choices fit.

    At a price λ every layer decides alone: it takes the choice with the
    smallest loss + λ bytes.  Choices that lie above the lower convex hull of
    a layer's points are never taken, so part of the budget may be left.

    Parameters
    ----------
    table
        {layer: {choice: (bytes, loss)}}.
    budget
        bytes, all layers together.

    Returns
    -------
    {layer: choice}
        The best one for the bytes that it takes.

    Raises
    ------
    ValueError
        If the table is faulty or its cheapest choices exceed the budget.

    References
    ----------
    Shoham and Gersho, Efficient bit allocation for an arbitrary set of
    quantizers, IEEE Trans. ASSP 36, 1988.

    Examples
    --------
    >>> table = {"a": {2: (10, 0.3), 4: (20, 0.1)}, "b": {2: (40, 0.4)}}
    >>> lagrangian(table, budget=60)
    {'a': 4, 'b': 2}
    """
    _cheapest(table, budget)

    def at(price):
        def cost(entry):
            _, (size, loss) = entry
            return loss + price * size, size

        return {n: min(own.items(), key=cost)[0] for n, own in table.items()}

    def fits(price):
        return predicted(table, at(price))[0] <= budget

    low, high = 0.0, 1.0
    if fits(low):
        return at(low)
    while not fits(high):
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if fits(middle) else (middle, high)
    return at(high)


def knapsack(table: Table, *, budget: int) -> dict:
    """Find the best choice for every layer within the budget, exactly.

    Dynamic programming over the layers.  Of all choices for the layers so
    far only those are kept which no other beats in both bytes and loss, and
    they are at most budget + 1.

    Parameters
    ----------
    table
        {layer: {choice: (bytes, loss)}}.
    budget
        bytes, all layers together.

    Returns
    -------
    {layer: choice}
        With the smallest sum of losses; of equal ones the smallest file.

    Raises
    ------
    ValueError
        If the table is faulty or its cheapest choices exceed the budget.

    References
    ----------
    Yao et al., HAWQ-V3: Dyadic Neural Network Quantization,
    arXiv:2011.10680, which hands the same problem to an integer program.

    Examples
    --------
    >>> table = {
    ...     "a": {2: (10, 0.3), 4: (20, 0.1)},
    ...     "b": {2: (10, 0.5), 4: (20, 0.2)},
    ... }
    >>> knapsack(table, budget=30)
    {'a': 2, 'b': 4}
    """
    cheapest = _cheapest(table, budget)
    room = budget - predicted(table, cheapest)[0]  # above the cheapest
    size, loss, trace = np.zeros(1, np.int64), np.zeros(1), []
    for name, own in table.items():
        cost, harm = map(np.array, zip(*own.values(), strict=True))
        sizes = (size[:, None] + cost - cost.min()).ravel()
        losses = (loss[:, None] + harm).ravel()
        order = np.lexsort((losses, sizes))
        sizes, losses = sizes[order], losses[order]
        best = np.minimum.accumulate(np.append(np.inf, losses))[:-1]
        keep = (losses < best) & (sizes <= room)
        size, loss = sizes[keep], losses[keep]
        trace.append((name, list(own), order[keep]))
    choice, state = {}, -1  # the largest file left has the smallest loss
    for name, own, order in reversed(trace):
        state, which = divmod(int(order[state]), len(own))
        choice[name] = own[which]
    return {name: choice[name] for name in table}


def _cheapest(table: Table, budget: int) -> dict:
    """Check a table; return the choice with the fewest bytes everywhere."""
    for name, own in table.items():
        if not own:
            raise ValueError(f"table: {name} has no choice")
        for c, (size, loss) in own.items():
            if not (size >= 0 and np.isfinite(loss)):
                raise ValueError(
                    f"table: {name}, {c} needs bytes from 0 and a finite "
                    f"loss, got {size} and {loss}"
                )
    choice = {n: min(own, key=own.get) for n, own in table.items()}
    least = predicted(table, choice)[0]
    if least > budget:
        raise ValueError(
            f"budget: {budget} bytes, but the cheapest choices take {least}"
        )
    return choice


def _with(model: nn.Module, made: Mapping[str, codes.Code]) -> nn.Module:
    """Return a copy of the model with some weights as their codes say."""
    model = deepcopy(model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, code in made.items():
            if name not in weights:
                raise ValueError(f"{name}: the model has no such parameter")
            weights[name].copy_(code.decode())
    return model
