"""Which channels stay: exact numbers, budgets, and nothing emptied."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPES, example, randomized
from torch import nn

from minicompress import measure, models, prune


def net(width=6):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, width),
        nn.ReLU(),
        nn.Linear(width, 2 * width),
        nn.ReLU(),
        nn.Linear(2 * width, 2),
    )
    return model, torch.randn(2, 3)


def cnn():
    torch.manual_seed(0)
    return randomized(models.CNN(channels=(8, 12, 16))), torch.randn(
        2, 1, 16, 16, dtype=torch.float64
    )


def drawn(groups, seed):
    g = torch.Generator().manual_seed(seed)
    return {x.name: torch.rand(x.size, generator=g) for x in groups}


def kept(masks):
    return sum(int(mask.sum()) for mask in masks.values())


class TestKeep:
    @given(sparsity=st.floats(0, 0.8), seed=st.integers(0, 99))
    @settings(max_examples=25, deadline=None)
    def test_exactly_so_many_go(self, sparsity, seed):
        model, x = net()
        groups = prune.groups(model, x)
        masks = prune.keep_units(groups, drawn(groups, seed), sparsity=sparsity)
        assert kept(masks) == 18 - round(18 * sparsity)

    def test_the_largest_stay(self):
        model, x = net()
        groups = prune.groups(model, x)
        scores = drawn(groups, 0)
        masks = prune.keep_units(groups, scores, sparsity=0.5)
        every = torch.cat([*scores.values()])
        mask = torch.cat([*masks.values()])
        assert every[mask].min() > every[~mask].max()

    def test_each_or_all(self):
        model, x = net()
        groups = prune.groups(model, x)
        scores = {"0": torch.rand(6), "2": torch.rand(12) + 10}
        every = prune.keep_units(groups, scores, sparsity=0.25)
        assert [int(m.sum()) for m in every.values()] == [2, 12]
        each = prune.keep_units(
            groups, scores, sparsity=0.25, select=prune.keep_each
        )
        assert [int(m.sum()) for m in each.values()] == [4, 9]

    @pytest.mark.parametrize("name", SHAPES)
    @pytest.mark.parametrize("select", [prune.keep_each, prune.keep_global])
    def test_nothing_is_emptied(self, name, select):
        model, x = example(name)
        groups = prune.groups(model, x)
        for seed in range(3):
            masks = prune.keep_units(
                groups, drawn(groups, seed), sparsity=1, select=select
            )
            small = prune.remove_channels(model, masks, x)
            assert measure.params(small) < measure.params(model)

    @pytest.mark.parametrize("least", [1, 2, 5])
    def test_least(self, least):
        model, x = net()
        groups = prune.groups(model, x)
        scores = {"0": torch.arange(6.0), "2": torch.arange(12.0) + 100}
        masks = prune.keep_units(groups, scores, sparsity=1, least=least)
        for name, mask in masks.items():
            assert (
                mask.tolist() == [False] * (len(mask) - least) + [True] * least
            ), name
        assert not prune.keep_global(scores, sparsity=1)["0"].any()

    def test_groups_without_scores_stay_whole(self):
        model, x = net()
        groups = prune.groups(model, x)
        masks = prune.keep_units(groups, {"2": torch.rand(12)}, sparsity=0.5)
        assert list(masks) == ["2"]

    def test_errors(self):
        model, x = net()
        groups = prune.groups(model, x)
        with pytest.raises(ValueError, match=r"no group '1', only \['0', '2'"):
            prune.keep_units(groups, {"1": torch.rand(6)}, sparsity=0.5)
        with pytest.raises(
            ValueError, match=r"scores\['0'\] must have shape \(6,\), got"
        ):
            prune.keep_units(groups, {"0": torch.rand(7)}, sparsity=0.5)
        with pytest.raises(ValueError, match="sparsity must be between"):
            prune.keep_units(groups, {"0": torch.rand(6)}, sparsity=1.5)


class TestWithin:
    @given(
        share=st.floats(0.05, 1),
        seed=st.integers(0, 99),
        select=st.sampled_from([prune.keep_each, prune.keep_global]),
    )
    @settings(max_examples=12, deadline=None)
    def test_as_large_as_the_budget_allows(self, share, seed, select):
        model, x = net()
        groups = prune.groups(model, x)
        scores = drawn(groups, seed)
        budget = share * measure.params(model)
        try:
            found = prune.within(
                model,
                scores,
                x,
                cost=measure.params,
                budget=budget,
                select=select,
            )
        except ValueError:
            found = None
        fitting = []
        for gone in range(19):  # brute force
            masks = prune.keep_units(
                groups, scores, sparsity=gone / 18, select=select
            )
            small = prune.remove_channels(model, masks, x)
            if measure.params(small) <= budget:
                fitting.append(masks)
        if found is None:
            assert not fitting
        else:
            for name, mask in fitting[0].items():
                assert torch.equal(found[name], mask)

    def test_macs_follow_the_closed_form(self):
        model, x = cnn()
        groups = prune.groups(model, x)
        dense = measure.macs(model, x)
        scores = prune.filter_norms(model, groups)
        masks = prune.within(
            model,
            scores,
            x,
            cost=lambda m: measure.macs(m, x),
            budget=dense / 4,
            select=prune.keep_each,
        )
        a, b, c = (int(m.sum()) for m in masks.values())
        small = prune.remove_channels(model, masks, x)
        want = 9 * (256 * a + 64 * a * b + 16 * b * c) + 10 * c
        assert measure.macs(small, x) == want <= dense / 4

    def test_nothing_goes_if_the_budget_is_met(self):
        model, x = net()
        scores = drawn(prune.groups(model, x), 0)
        masks = prune.within(
            model,
            scores,
            x,
            cost=measure.params,
            budget=measure.params(model),
        )
        assert all(mask.all() for mask in masks.values())

    def test_latency_is_a_cost_like_any_other(self):
        model, x = net(width=256)
        scores = prune.filter_norms(model, prune.groups(model, x))
        seen = []

        def cost(m):
            seen.append(measure.latency(m, x, repeats=3).median)
            return seen[-1]

        budget = 10 * measure.latency(model, x, repeats=3).median
        prune.within(model, scores, x, cost=cost, budget=budget)
        assert len(seen) > 2

    def test_a_budget_that_cannot_be_met(self):
        model, x = net()
        scores = drawn(prune.groups(model, x), 0)
        with pytest.raises(
            ValueError,
            match=r"budget: 3 cannot be met, the smallest .* costs 10",
        ):
            prune.within(model, scores, x, cost=measure.params, budget=3)


class TestShrink:
    def test_rounds_reach_the_budget_and_score_what_is_left(self):
        model, x = net(width=12)
        sizes, trained = [], []

        def score(m, groups):
            sizes.append([g.size for g in groups])
            return prune.filter_norms(m, groups)

        def train(m):
            trained.append(measure.params(m))
            return m

        start = measure.params(model)
        small = prune.shrink(
            model,
            score,
            x,
            cost=measure.params,
            budget=0.2 * start,
            train=train,
            rounds=3,
        )
        assert sizes[0] == [12, 24]
        assert sizes[0] > sizes[1] > sizes[2]
        assert trained[-1] == measure.params(small)
        for i, n in enumerate(trained, 1):
            assert n <= start * 0.2 ** (i / 3)
        assert trained[-1] > 0.1 * start

    def test_one_round_is_one_choice(self):
        model, x = net()
        small = prune.shrink(
            model, prune.filter_norms, x, cost=measure.params, budget=40
        )
        scores = prune.filter_norms(model, prune.groups(model, x))
        masks = prune.within(model, scores, x, cost=measure.params, budget=40)
        want = prune.remove_channels(model, masks, x)
        assert torch.equal(small(x), want(x))

    def test_training_between_rounds_changes_the_choice(self):
        model, x = net(width=12)

        def twist(m):
            for p in m.parameters():
                p.data = p.data.flip(0) * torch.linspace(1, 3, len(p)).view(
                    -1, *[1] * (p.ndim - 1)
                )
            return m

        found = [
            prune.shrink(
                model,
                prune.filter_norms,
                x,
                cost=measure.params,
                budget=100,
                train=train,
                rounds=2,
            )[0].weight
            for train in (twist, lambda m: m)
        ]
        assert found[0].shape != found[1].shape or not torch.equal(*found)

    def test_the_model_is_left_alone(self):
        model, x = net()
        before = {n: t.clone() for n, t in model.state_dict().items()}
        prune.shrink(
            model,
            prune.filter_norms,
            x,
            cost=measure.params,
            budget=40,
            train=lambda m: m.requires_grad_(False),
        )
        assert all(
            torch.equal(model.state_dict()[n], t) for n, t in before.items()
        )
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("budget", [0, -1, 1e9])
    def test_budget_out_of_range(self, budget):
        model, x = net()
        with pytest.raises(ValueError, match="budget must be above 0 and at"):
            prune.shrink(
                model,
                prune.filter_norms,
                x,
                cost=measure.params,
                budget=budget,
            )

    def test_rounds(self):
        model, x = net()
        with pytest.raises(ValueError, match="rounds must be at least 1"):
            prune.shrink(
                model,
                prune.filter_norms,
                x,
                cost=measure.params,
                budget=40,
                rounds=0,
            )
