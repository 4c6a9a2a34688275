"""An agent that learns how much of each layer to remove: AMC.

It goes through the layers in order.  At each it sees a description of the
layer and of what is spent so far, and answers with a number from 0 to 1, how
much of the layer's cost to remove.  The answer is clipped so that what is
left of the budget always suffices for the layers to come, so every
architecture it proposes is within the budget.  The reward comes at the end.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .. import nas
from ..nas.driver import Strategy
from .ddpg import Learner, cut_normal
from .walks import Costs, Walk


def amc(
    costs: Costs,
    evaluate: Callable[[dict], float],
    *,
    budget: float,
    evaluations: int,
    features: Mapping[str, Sequence[float]] | None = None,
    warm_up: float = 0.25,
    noise: float = 0.5,
    seed: int = 0,
    **how,
) -> nas.History:
    """Let an agent learn a choice for each layer within a budget.

    Deep deterministic policy gradient: a critic learns the reward of an
    action, an actor the action that the critic likes best.  All steps of an
    episode get its reward, -loss; later rewards are not discounted.

    Parameters
    ----------
    costs
        {layer: {choice: cost}}, in the order in which data pass; bytes,
        MACs, or what else adds up.
    evaluate
        ``evaluate({layer: choice}) -> loss``, for instance the error without
        fine-tuning on validation data.
    budget
        of all costs together.
    evaluations
        how many different proposals to evaluate.
    features
        {layer: numbers that describe it}, such as its sizes, beside those
        that the costs give; scaled to 0 to 1 here.
    warm_up
        fraction of the evaluations whose actions are drawn at random.
    noise
        standard deviation of the normal noise, cut off at 0 and 1, on the
        actions after that; it falls to a hundredth, and rises while they
        lead to nothing new.
    seed
        of all that is drawn.
    how
        log, progress and the like, for `nas.search`.

    Returns
    -------
    nas.History
        Its `best.arch` is {layer: choice}.

    Raises
    ------
    ValueError
        If the cheapest choices exceed the budget.

    References
    ----------
    He et al., AMC: AutoML for Model Compression and Acceleration on Mobile
    Devices, arXiv:1802.03494, section 3 and algorithm 1.
    Lillicrap et al., Continuous control with deep reinforcement learning,
    arXiv:1509.02971, algorithm 1.

    Examples
    --------
    >>> costs = {n: {s: 100 * (1 - s) for s in (0.0, 0.5, 0.9)} for n in "ab"}
    >>> def loss(choice):
    ...     return choice["a"] ** 2 + 3 * choice["b"] ** 2
    >>> amc(costs, loss, budget=150, evaluations=8).best.arch
    {'a': 0.5, 'b': 0.0}
    """
    rounds = max(1, evaluations)
    steps = agent(costs, budget, features, rounds, warm_up, noise, seed)
    return nas.search(steps, evaluate, evaluations=evaluations, **how)


def random_within(
    costs: Costs,
    evaluate: Callable[[dict], float],
    *,
    budget: float,
    evaluations: int,
    seed: int = 0,
    **how,
) -> nas.History:
    """Draw actions at random under the same clipping: the control of `amc`.

    Parameters
    ----------
    costs, evaluate, budget, evaluations, seed, how
        as for `amc`.

    Returns
    -------
    nas.History

    Examples
    --------
    >>> costs = {"a": {0.0: 10, 0.5: 5}, "b": {0.0: 10, 0.5: 5}}
    >>> found = random_within(costs, lambda c: -c["a"], budget=15,
    ...                       evaluations=3)
    >>> found.best.arch["a"], len(found.records)
    (0.5, 3)
    """
    steps = drawn(costs, budget, seed)
    return nas.search(steps, evaluate, evaluations=evaluations, **how)


def drawn(costs: Costs, budget: float, seed: int) -> Strategy:
    """Propose at random, for ever: a strategy of `nas.search`."""
    walk, dice = Walk(costs, budget), np.random.default_rng(seed)
    while True:
        yield [walk(lambda state: dice.random())[0]]


def agent(
    costs: Costs,
    budget: float,
    features: Mapping | None,
    rounds: int,
    warm_up: float,
    noise: float,
    seed: int,
) -> Strategy:
    """Propose, and learn from the losses: a strategy of `nas.search`."""
    walk, dice = Walk(costs, budget, features), np.random.default_rng(seed)
    learner = Learner(walk.width, seed)
    first, known, again = round(warm_up * rounds), set(), 0
    while True:
        done = (len(known) - first) / max(1, rounds - first)
        sigma = noise * 0.01 ** min(done, 1.0) * 1.1**again

        def act(state, sigma=sigma):
            if len(known) < first:
                return dice.random()
            return cut_normal(learner.act(state), min(sigma, 1e3), dice)

        choice, path = walk(act)
        (loss,) = yield [choice]
        if tuple(choice.values()) in known:  # costs nothing, tells nothing
            again = min(again + 1, 100)
            continue
        known.add(tuple(choice.values()))
        again = 0
        learner.remember(path, -loss)
        if len(known) > first:
            learner.learn(len(path))
