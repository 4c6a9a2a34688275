"""From layer to layer, with a choice at each, within a budget."""

from collections.abc import Callable, Hashable, Mapping

import numpy as np

Costs = Mapping[str, Mapping[Hashable, float]]
Policy = Callable[[np.ndarray], float]


class Walk:
    """The way through the layers, within the budget.

    Parameters
    ----------
    costs
        {layer: {choice: cost}}.
    budget
        of all costs together.
    features
        {layer: numbers}, as many of each.
    """

    def __init__(self, costs, budget: float, features=None):
        self.costs = {n: dict(own) for n, own in costs.items()}
        self.least = [min(own.values()) for own in self.costs.values()]
        self.most = [max(own.values()) for own in self.costs.values()]
        self.budget = budget
        if not self.least or sum(self.least) > budget:
            raise ValueError(
                f"budget: {budget}, but the cheapest choices take "
                f"{sum(self.least):g}"
            )
        self.fixed = self._fixed(features or {n: () for n in self.costs})
        self.width = self.fixed.shape[1] + 3

    def __call__(self, act: Policy) -> tuple[dict, list]:
        """Ask for an action at each layer.

        Returns
        -------
        {layer: choice}, and the path [(state, action as it was clipped)].
        """
        choice, path, spent, removed, last = {}, [], 0.0, 0.0, 0.0
        whole = sum(self.most) or 1.0
        for t, (name, own) in enumerate(self.costs.items()):
            rest = sum(self.most[t + 1 :])
            state = np.array(
                [*self.fixed[t], removed / whole, rest / whole, last],
                np.float32,
            )
            left = self.budget - spent - sum(self.least[t + 1 :])
            choice[name] = self.clipped(name, act(state), left)
            cost = own[choice[name]]
            spent, removed = spent + cost, removed + self.most[t] - cost
            last = 1 - cost / self.most[t] if self.most[t] else 0.0
            path.append((state, last))
        return choice, path

    def clipped(self, name: str, action: float, left: float) -> Hashable:
        """Take the choice that removes most nearly that much and fits."""
        own, slack = self.costs[name], 1e-9 * max(1.0, abs(self.budget))
        fits = {c: x for c, x in own.items() if x <= left + slack}
        fits = fits or {min(own, key=own.get): 0.0}  # a rounding error
        wanted = (1 - action) * max(own.values())
        return min(fits, key=lambda c: abs(own[c] - wanted))

    def _fixed(self, features: Mapping) -> np.ndarray:
        """Describe the layers by numbers from 0 to 1."""
        n = len(self.costs)
        rows = [
            [t, self.most[t], self.least[t], *features[name]]
            for t, name in enumerate(self.costs)
        ]
        table = np.array(rows, float).reshape(n, -1)
        low, high = table.min(0), table.max(0)
        return (table - low) / np.where(high > low, high - low, 1)
