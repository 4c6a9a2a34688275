"""The agent: budgets it cannot break, targets by hand, and its control."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import nas, pipeline, train
from minicompress.pipeline.automl import agent
from minicompress.pipeline.ddpg import Learner, cut_normal
from minicompress.pipeline.walks import Walk


@pytest.fixture(autouse=True)
def one_thread():
    with train.threads(1):
        yield


SPARSITIES = (0.0, 0.25, 0.5, 0.75, 0.9)
SIZES = {"a": 100, "b": 400, "c": 1000, "d": 50}
COSTS = {n: {s: k * (1 - s) for s in SPARSITIES} for n, k in SIZES.items()}
HARM = {"a": 3.0, "b": 1.0, "c": 0.2, "d": 5.0}


def loss(choice):
    return sum(HARM[n] * s**2 for n, s in choice.items())


def cost(choice, costs=COSTS):
    return sum(costs[n][c] for n, c in choice.items())


tables = st.lists(
    st.lists(st.integers(0, 1000), min_size=1, max_size=5),
    min_size=1,
    max_size=5,
).map(
    lambda rows: {
        f"layer {i}": dict(enumerate(row)) for i, row in enumerate(rows)
    }
)


class TestWalk:
    @settings(max_examples=200, deadline=None)
    @given(tables, st.floats(0, 1), st.lists(st.floats(0, 1), min_size=5))
    def test_no_agent_breaks_the_budget(self, costs, part, actions):
        least = sum(min(own.values()) for own in costs.values())
        most = sum(max(own.values()) for own in costs.values())
        budget = least + part * (most - least)
        given_ = iter(itertools.cycle(actions))
        choice, path = Walk(costs, budget)(lambda state: next(given_))
        assert choice.keys() == costs.keys()
        assert cost(choice, costs) <= budget + 1e-6 * max(1, budget)
        for state, action in path:
            assert 0 <= action <= 1
            assert state.min() >= 0 and state.max() <= 1

    @settings(max_examples=50, deadline=None)
    @given(tables, st.floats(0, 1))
    def test_reaches_every_choice_that_fits(self, costs, part):
        least = sum(min(own.values()) for own in costs.values())
        most = sum(max(own.values()) for own in costs.values())
        walk = Walk(costs, least + part * (most - least))
        for combination in itertools.product(*map(dict.items, costs.values())):
            if sum(c for _, c in combination) > walk.budget:
                continue
            # ask for exactly the cost of each
            pairs = zip(combination, walk.most, strict=True)
            actions = iter([1 - c / top if top else 0 for (_, c), top in pairs])
            choice, _ = walk(lambda state, actions=actions: next(actions))
            assert cost(choice, costs) == sum(c for _, c in combination)

    def test_takes_the_nearest_action(self):
        walk = Walk(COSTS, 10**6)
        choice, path = walk(lambda state: 0.6)
        assert {*choice.values()} == {0.5}
        assert [a for _, a in path] == [0.5] * 4

    def test_keeps_enough_for_the_layers_to_come(self):
        least = sum(min(own.values()) for own in COSTS.values())
        choice, _ = Walk(COSTS, least)(lambda state: 0.0)
        assert {*choice.values()} == {0.9}
        choice, _ = Walk(COSTS, least + 90)(lambda state: 0.0)
        assert choice == {"a": 0.0, "b": 0.9, "c": 0.9, "d": 0.9}

    def test_states_tell_what_is_spent(self):
        walk = Walk(COSTS, 10**6, {n: (k,) for n, k in SIZES.items()})
        _, path = walk(lambda state: 0.5)
        states = np.array([s for s, _ in path])
        assert states.shape == (4, walk.width) == (4, 7)
        assert states[:, 0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
        removed, rest, last = states[:, -3:].T
        whole = sum(SIZES.values())
        by_hand = np.cumsum([0, 50, 200, 500]) / whole
        assert removed == pytest.approx(by_hand)
        assert rest == pytest.approx(np.array([1450, 1050, 50, 0]) / whole)
        assert last.tolist() == pytest.approx([0, 0.5, 0.5, 0.5])

    def test_an_impossible_budget(self):
        with pytest.raises(ValueError, match=r"budget: 10, but .* take 155"):
            Walk(COSTS, 10)


class TestLearner:
    def fed(self, seed=0, reward=None, n=40):
        """Remember walks, with a reward of their own or of another kind."""
        learner, walk = Learner(6, seed), Walk(COSTS, 800)
        dice = np.random.default_rng(0)
        for _ in range(n):
            choice, path = walk(lambda state: dice.random())
            learner.remember(path, -loss(choice) if reward is None else reward)
        return learner

    def test_every_step_has_the_reward_of_the_episode(self):
        learner = self.fed(n=1)
        assert [end for *_, end in learner.seen] == [0, 0, 0, 1]
        assert len({r for _, _, r, _, _ in learner.seen}) == 1
        for now, then in itertools.pairwise(learner.seen):
            assert np.array_equal(now[3], then[0])

    def test_forgets_the_oldest(self):
        learner = self.fed(n=600)
        assert len(learner.seen) == learner.SIZE == 2000

    def test_a_loss_that_diverged_is_not_remembered(self):
        learner = Learner(6, 0)
        learner.remember(Walk(COSTS, 800)(lambda s: 0.5)[1], -np.inf)
        assert learner.seen == []

    def test_the_critic_learns_the_reward_of_the_last_action(self):
        # at the last layer nothing comes after: Q is the reward
        learner = Learner(2, 0)
        dice = np.random.default_rng(1)
        state = np.zeros(2, np.float32)
        for a in dice.random(500):
            learner.remember([(state, a)], a)
        learner.learn(400)
        grid = torch.linspace(0, 1, 11)[:, None]
        q = learner.critic(torch.cat([torch.zeros(11, 2), grid], 1))[:, 0]
        want = (grid[:, 0] - learner.mean) / learner.size
        assert (q - want).abs().max() < 0.15
        assert learner.act(state) > 0.9  # and the actor takes the best

    def test_an_actor_whose_reward_is_ignored_stays_elsewhere(self):
        state = np.zeros(2, np.float32)
        acts = []
        for sign in (1, -1, 0):
            learner, dice = Learner(2, 0), np.random.default_rng(1)
            for a in dice.random(200):
                learner.remember([(state, a)], sign * a)
            learner.learn(150)
            acts.append(learner.act(state))
        more, less, none = acts
        assert more > 0.9 and less < 0.1
        assert none not in (more, less)

    def test_slow_copies_follow(self):
        learner = self.fed()
        first = [p.clone() for p in learner.slow_critic.parameters()]
        learner.learn(1)
        slow = [*learner.slow_critic.parameters()]
        fast = [*learner.critic.parameters()]
        for a, b, c in zip(first, slow, fast, strict=True):
            torch.testing.assert_close(b, 0.99 * a + 0.01 * c)

    def test_leaves_the_global_random_state(self):
        torch.manual_seed(5)
        want = torch.rand(3)
        torch.manual_seed(5)
        self.fed().learn(3)
        assert torch.equal(torch.rand(3), want)


class TestCutNormal:
    @pytest.mark.parametrize(("mean", "sigma"), [(0.5, 0.2), (0.0, 1.0)])
    def test_is_scipys(self, mean, sigma):
        from scipy import stats

        dice = np.random.default_rng(0)
        x = [cut_normal(mean, sigma, dice) for _ in range(2000)]
        a, b = -mean / sigma, (1 - mean) / sigma
        law = stats.truncnorm(a, b, mean, sigma)
        assert stats.kstest(x, law.cdf).pvalue > 0.01

    def test_a_mean_outside(self):
        for mean in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match="mean must be from 0 to 1"):
                cut_normal(mean, 1.0, np.random.default_rng(0))


class TestSearches:
    def both(self, **how):
        how = {"budget": 800, "evaluations": 60} | how
        return [
            search(COSTS, loss, **how)
            for search in (pipeline.amc, pipeline.random_within)
        ]

    def test_all_proposals_are_within_the_budget_and_different(self):
        for found in self.both():
            assert len(found.records) == 60
            seen = {tuple(r.arch.values()) for r in found.records}
            assert len(seen) == 60
            assert all(cost(r.arch) <= 800 for r in found.records)
            assert all(r.loss == loss(r.arch) for r in found.records)

    def test_same_seed_same_search(self):
        few = {"evaluations": 30}
        one, two = self.both(seed=3, **few), self.both(seed=3, **few)
        assert [h.records for h in one] == [h.records for h in two]
        assert one[0].records != self.both(seed=4, **few)[0].records

    def test_a_reward_that_is_ignored_leads_elsewhere(self):
        how = {"budget": 800, "evaluations": 30}
        real = pipeline.amc(COSTS, loss, **how)
        blind = pipeline.amc(COSTS, lambda choice: 0.0, **how)
        first = round(0.25 * 30)
        archs = [[r.arch for r in h.records] for h in (real, blind)]
        assert archs[0][:first] == archs[1][:first]
        assert archs[0][first:] != archs[1][first:]

    def test_learns(self):
        # the proposals after the warm-up are better than those at random
        for seed in range(2):
            found = self.both(seed=seed)
            late = [np.mean([r.loss for r in h.records[40:]]) for h in found]
            assert late[0] < late[1]

    def test_finds_the_best_of_all_if_it_sees_all(self):
        costs = {n: COSTS[n] for n in "ab"}
        within = [
            {"a": s, "b": t}
            for s, t in itertools.product(SPARSITIES, repeat=2)
            if cost({"a": s, "b": t}) <= 300
        ]
        harm = min(loss(c) for c in within)
        for search in (pipeline.amc, pipeline.random_within):
            found = search(costs, loss, budget=300, evaluations=len(within))
            assert found.best.loss == harm

    def test_a_loss_that_diverges_does_not_end_it(self):
        def bad(choice):
            return np.nan if choice["a"] > 0.5 else loss(choice)

        found = pipeline.amc(COSTS, bad, budget=800, evaluations=40)
        assert len(found.records) == 40
        assert np.isfinite(found.best.loss)

    def test_it_is_a_strategy_with_a_log(self, tmp_path):
        log = tmp_path / "log.jsonl"
        how = {"budget": 800, "evaluations": 20, "log": log}
        first = pipeline.amc(COSTS, loss, **how)

        def never(choice):
            raise AssertionError("the log knows")

        assert pipeline.amc(COSTS, never, **how).records == first.records
        steps = agent(COSTS, 800, None, 20, 0.25, 0.5, 0)
        found = nas.search(steps, loss, evaluations=20)
        assert found.records == first.records
