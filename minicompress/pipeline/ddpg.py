"""Deep deterministic policy gradient, for a number from 0 to 1.

References
----------
Lillicrap et al., Continuous control with deep reinforcement learning,
arXiv:1509.02971, algorithm 1.
"""

from copy import deepcopy

import numpy as np
import torch
from torch import Tensor, nn


class Learner:
    """Actor and critic, their slow copies, and what they have seen."""

    SIZE, HIDDEN, SLOW, BATCH = 2000, 64, 0.01, 64

    def __init__(self, width: int, seed: int):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = nn.Sequential(
                _layers(width, self.HIDDEN), nn.Sigmoid()
            )
            self.critic = _layers(width + 1, self.HIDDEN)
        self.slow_actor, self.slow_critic = map(
            deepcopy, (self.actor, self.critic)
        )
        self.opt_actor = torch.optim.Adam(self.actor.parameters(), lr=1e-3)
        self.opt_critic = torch.optim.Adam(self.critic.parameters(), lr=1e-2)
        self.dice = np.random.default_rng(seed)
        self.seen, self.mean, self.size = [], None, 1e-12

    def act(self, state: np.ndarray) -> float:
        """Give the action of the actor, without noise."""
        with torch.no_grad():
            return float(self.actor(torch.from_numpy(state)))

    def remember(self, path: list, reward: float) -> None:
        """Keep every step of an episode with its reward."""
        if not np.isfinite(reward):  # a loss that diverged teaches nothing
            return
        after = [state for state, _ in path[1:]] + [path[-1][0]]
        for t, ((state, action), then) in enumerate(
            zip(path, after, strict=True)
        ):
            end = float(t == len(path) - 1)
            self.seen.append((state, action, reward, then, end))
        self.seen = self.seen[-self.SIZE :]
        old = reward if self.mean is None else self.mean
        self.mean = 0.95 * old + 0.05 * reward  # the baseline of the rewards
        self.size = max(self.size, abs(reward - self.mean))

    def learn(self, steps: int) -> None:
        """Improve critic and actor, on what is drawn from memory."""
        for _ in range(steps if self.seen else 0):
            rows = self.dice.integers(len(self.seen), size=self.BATCH)
            s, a, r, then, end = (
                torch.tensor(np.array(x), dtype=torch.float32)
                for x in zip(*(self.seen[i] for i in rows), strict=True)
            )
            r = (r - self.mean) / self.size
            with torch.no_grad():
                future = self.slow_actor(then)
                Q = self.slow_critic(torch.cat([then, future], 1))[:, 0]
                y = r + (1 - end) * Q
            error = self.critic(torch.cat([s, a[:, None]], 1))[:, 0] - y
            _step(self.opt_critic, error.square().mean())
            value = self.critic(torch.cat([s, self.actor(s)], 1))
            _step(self.opt_actor, -value.mean())
            _follow(self.slow_actor, self.actor, self.SLOW)
            _follow(self.slow_critic, self.critic, self.SLOW)


def cut_normal(mean: float, sigma: float, dice: np.random.Generator) -> float:
    """Draw from a normal distribution, again until it is from 0 to 1.

    Parameters
    ----------
    mean
        0 to 1.
    sigma
        standard deviation, before what is outside is cut off.
    dice
        what draws.

    Examples
    --------
    >>> 0 <= cut_normal(0.9, 5.0, np.random.default_rng(0)) <= 1
    True
    """
    if not 0 <= mean <= 1:
        raise ValueError(f"mean must be from 0 to 1, got {mean}")
    while not 0 <= (x := mean + sigma * dice.standard_normal()) <= 1:
        pass
    return x


def _layers(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 1),
    )


def _step(opt: torch.optim.Optimizer, loss: Tensor) -> None:
    opt.zero_grad()
    loss.backward()
    opt.step()


def _follow(slow: nn.Module, fast: nn.Module, rate: float) -> None:
    """Move the slow copy a little towards the fast one."""
    with torch.no_grad():
        for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
            a.lerp_(b, rate)
