"""Schedules: the curves, the loops, and masks that hold while training."""

from copy import deepcopy
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

from minicompress import through, train
from minicompress.prune import masks, schedules

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    "adam": partial(torch.optim.Adam, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, weight_decay=0.1),
}


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def task(n=240):
    """Three classes of points that a linear map cannot tell apart."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(n, 6, generator=g)
    return X, (X[:, :2].norm(dim=1) * 1.3).long().clamp(max=2)


X, Y = task()


def fit(model, epochs=3, **kwargs):
    batches = train.batches(X, Y, size=40, epochs=epochs)
    return train.fit(model, batches, lr=0.02, **kwargs)


def is_plain(model):
    return not any(parametrize.is_parametrized(m) for m in model.modules())


def zeros(model, found):
    """Say whether the weights are zero where masked, and only there."""
    return all(
        torch.equal(model.get_parameter(name) != 0, mask)
        for name, mask in found.items()
    )


class TestCurves:
    def test_half_way(self):
        at = partial(schedules.cubic, start=0, end=100, final=0.9)
        assert at(50) == pytest.approx(0.7875)
        assert at(0) == at(-5) == 0
        assert at(100) == at(1e9) == 0.9

    @given(
        st.floats(0, 1),
        st.floats(0, 1),
        st.floats(-50, 150),
        st.floats(-50, 150),
    )
    @settings(deadline=None)
    def test_cubic_is_monotone_and_within_its_ends(self, s, more, t, u):
        final = s + (1 - s) * more
        at = partial(schedules.cubic, start=10, end=90, initial=s, final=final)
        first, second = at(min(t, u)), at(max(t, u))
        assert s - 1e-12 <= first <= second + 1e-12 <= final + 2e-12
        assert at(5) == pytest.approx(s)
        assert at(95) == final

    def test_cubic_slows_down(self):
        at = partial(schedules.cubic, start=0, end=10, final=0.9)
        steps = [at(t + 1) - at(t) for t in range(10)]
        assert steps == sorted(steps, reverse=True)

    def test_geometric(self):
        densities = schedules.geometric(10, per_round=0.2)
        assert len(densities) == 10
        assert densities[0] == 0.8
        assert densities[-1] == pytest.approx(0.1074, abs=5e-5)
        ratios = [b / a for a, b in pairwise(densities)]
        assert ratios == pytest.approx([0.8] * 9)


class TestMasked:
    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_masks_hold_while_training(self, make):
        model = mlp()
        found = masks.keep_global(schedules.magnitudes(model), sparsity=0.7)
        new = schedules.masked(model, found)
        baked = through.bake(fit(new, optimizer=make))
        assert zeros(baked, found)
        for name, w in model.named_parameters():
            mask = found.get(name, torch.ones_like(w).bool())
            assert not torch.equal(baked.get_parameter(name)[mask], w[mask])

    @pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
    def test_without_the_mask_the_weights_come_back(self, make):
        pruned, found = schedules.one_shot(mlp(), sparsity=0.7)
        assert zeros(pruned, found)
        assert not zeros(fit(pruned, optimizer=make), found)

    def test_gradients_are_those_of_the_masked_weight(self):
        model = mlp()
        mask = masks.random(model[0].weight, sparsity=0.5)
        new = schedules.masked(model, {"0.weight": mask})
        F.cross_entropy(new(X), Y).backward()
        W = (model[0].weight * mask).detach().requires_grad_(True)
        h = F.relu(F.linear(X, W, model[0].bias))
        F.cross_entropy(model[2](h), Y).backward()
        got = new[0].parametrizations.weight.original.grad
        torch.testing.assert_close(got, W.grad * mask)

    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float64]
    )
    def test_types_and_tied_weights(self, dtype):
        model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)).to(dtype)
        model[1].weight = model[0].weight
        pruned, found = schedules.one_shot(model, sparsity=0.5)
        assert list(found) == ["0.weight"]  # counted once
        assert pruned[0].weight is pruned[1].weight
        assert pruned[0].weight.dtype == dtype
        want = model[0].weight * found["0.weight"]
        assert torch.equal(pruned[1].weight, want)

    def test_zeros_have_no_sign(self):
        layer = nn.Linear(2, 2)
        nn.init.constant_(layer.weight, -1.0)
        mask = torch.zeros(2, 2, dtype=torch.bool)
        w = through.bake(schedules.masked(layer, {"weight": mask})).weight
        assert not torch.signbit(w).any()

    def test_errors_name_the_weight(self):
        mask = torch.ones(16, 6, dtype=torch.bool)
        with pytest.raises(ValueError, match=r"2\.weight: mask has shape"):
            schedules.masked(mlp(), {"2.weight": mask})
        with pytest.raises(ValueError, match=r"0\.weight: mask must be bool"):
            schedules.masked(mlp(), {"0.weight": mask.float()})
        with pytest.raises(ValueError, match=r"0\.wieght"):
            schedules.masked(mlp(), {"0.wieght": mask})


class TestOneShot:
    def test_prunes_a_copy(self):
        model = mlp()
        before = deepcopy(model.state_dict())
        pruned, found = schedules.one_shot(model, sparsity=0.8)
        assert list(found) == ["0.weight", "2.weight"]
        assert masks.sparsity(found) == pytest.approx(1 - 29 / 144)
        assert zeros(pruned, found)
        assert is_plain(pruned)
        for name, w in model.state_dict().items():
            assert torch.equal(w, before[name])
            kept = before[name] * found.get(name, 1)
            assert torch.equal(pruned.state_dict()[name], kept)

    def test_score_select_and_where(self):
        model = mlp()
        first = partial(
            schedules.magnitudes, where=lambda name, w: name == "0.weight"
        )
        _, found = schedules.one_shot(
            model, first, sparsity=0.5, select=masks.keep_each
        )
        (mask,) = found.values()
        want = masks.magnitude(model[0].weight, sparsity=0.5)
        assert torch.equal(mask, want)
        _, opposite = schedules.one_shot(
            model, lambda m: {"0.weight": -m[0].weight.abs()}, sparsity=0.5
        )
        assert torch.equal(opposite["0.weight"], ~mask)

    def test_where_must_select(self):
        with pytest.raises(ValueError, match="where selects no parameter"):
            schedules.magnitudes(mlp(), where=lambda name, w: False)


class Rounds:
    """A train function that notes the masks it was given."""

    def __init__(self, change=fit):
        self.change, self.seen, self.models = change, [], []

    def __call__(self, model):
        own = through.tensors(model)
        self.seen.append({n: t["mask"].clone() for n, t in own.items()})
        self.models.append(through.bake(model))
        return self.change(model)


class TestIterative:
    @pytest.mark.parametrize("select", [masks.keep_global, masks.keep_each])
    def test_rounds(self, select):
        model = mlp()
        before = deepcopy(model.state_dict())
        rounds = Rounds()
        got, found = schedules.iterative(
            model, rounds, sparsity=0.8, rounds=4, select=select
        )
        assert is_plain(got)
        assert zeros(got, found)
        assert len(rounds.seen) == 4
        for a, b in pairwise(rounds.seen):
            for name in found:
                assert not (b[name] & ~a[name]).any()  # nested
        for k, seen in enumerate(rounds.seen, 1):
            if select is masks.keep_global:
                removed = sum(int((~m).sum()) for m in seen.values())
                assert removed == round(144 * (1 - 0.2 ** (k / 4)))
        assert all(torch.equal(rounds.seen[-1][n], found[n]) for n in found)
        assert all(
            torch.equal(w, before[n]) for n, w in model.state_dict().items()
        )

    def test_training_between_the_rounds_changes_the_choice(self):
        model = fit(mlp())
        _, once = schedules.one_shot(model, sparsity=0.8)
        _, idle = schedules.iterative(
            model, lambda m: m, sparsity=0.8, rounds=4
        )
        _, found = schedules.iterative(model, fit, sparsity=0.8, rounds=4)
        assert all(torch.equal(idle[n], once[n]) for n in once)
        assert not all(torch.equal(found[n], once[n]) for n in once)

    def test_what_is_pruned_stays_pruned_whatever_the_score(self):
        dice = torch.Generator().manual_seed(0)

        def lot(model):
            w = model[0].weight
            return {"0.weight": -torch.rand(w.shape, generator=dice)}

        rounds = Rounds(lambda m: m)
        schedules.iterative(mlp(), rounds, lot, sparsity=0.9, rounds=5)
        kept = torch.stack([s["0.weight"] for s in rounds.seen])
        assert torch.equal(kept.cummin(0).values, kept)
        assert kept.flatten(1).sum(1).tolist() == [
            96 - round(96 * (1 - 0.1 ** (k / 5))) for k in range(1, 6)
        ]

    def test_everything_can_go(self):
        got, found = schedules.iterative(
            mlp(), lambda m: m, sparsity=1, rounds=2
        )
        assert masks.sparsity(found) == 1
        assert not got[0].weight.any()


class TestLottery:
    def test_the_ticket_is_the_initialization_masked(self):
        model = mlp()
        rounds = []

        def note(m):
            rounds.append(through.tensors(m))
            return fit(m)

        ticket, found = schedules.lottery(model, note, sparsity=0.8, rounds=3)
        assert is_plain(ticket)
        start = model.state_dict()
        for name, w in ticket.state_dict().items():
            mask = found.get(name, torch.ones_like(w).bool())
            assert torch.equal(w[mask], start[name][mask])  # bit for bit
            assert not w[~mask].any()
        assert rounds[0] == {}  # the first training is of the whole network
        for a, b in zip(rounds[1:], [*rounds[2:], None], strict=True):
            for name in found:
                after = found[name] if b is None else b[name]["mask"]
                assert not (after & ~a[name]["mask"]).any()
        assert masks.sparsity(found) == pytest.approx(1 - 29 / 144)

    def test_every_round_starts_from_the_reset_weights(self):
        model, early = mlp(), mlp(seed=1)
        starts = []

        def note(m):
            starts.append(through.bake(m))
            return fit(m)

        ticket, found = schedules.lottery(
            model, note, sparsity=0.6, rounds=3, rewind=early.state_dict()
        )
        assert torch.equal(starts[0][0].weight, model[0].weight)
        for start in [*starts[1:], ticket]:
            w, b = start[0].weight, start[0].bias
            assert torch.equal(b, early[0].bias)
            assert torch.equal(w, torch.where(w != 0, early[0].weight, 0))
        assert zeros(ticket, found)

    def test_one_round_prunes_the_trained_weights(self):
        model = mlp()
        _, found = schedules.lottery(model, fit, sparsity=0.5, rounds=1)
        _, want = schedules.one_shot(fit(model), sparsity=0.5)
        _, untrained = schedules.one_shot(model, sparsity=0.5)
        assert all(torch.equal(found[n], want[n]) for n in want)
        assert not all(torch.equal(found[n], untrained[n]) for n in want)


class TestGradual:
    def run(self, *, every=1, on_step=None, **kwargs):
        model = mlp()
        dense = masks.keep_global(schedules.magnitudes(model), sparsity=0)
        new = schedules.masked(model, dense)
        step = schedules.gradual(every=every, **kwargs)
        history = []

        def both(t, m, loss):
            step(t, m, loss)
            own = through.tensors(m)
            history.append({n: x["mask"].clone() for n, x in own.items()})

        got = fit(new, epochs=10, on_step=both)  # 60 steps
        assert all(m.all() for m in dense.values())
        untouched = through.tensors(new)
        assert all(x["mask"].all() for x in untouched.values())
        return got, history

    @pytest.mark.parametrize("every", [1, 7])
    def test_follows_the_curve(self, every):
        got, history = self.run(start=5, end=40, final=0.9, every=every)
        for t, found in enumerate(history, 1):
            last = 40 if t >= 40 else t - (t - 5) % every
            s = schedules.cubic(last, start=5, end=40, final=0.9)
            removed = sum(int((~m).sum()) for m in found.values())
            assert removed == (round(s * 144) if t >= 5 else 0)
        for a, b in pairwise(history):
            assert all(not (b[n] & ~a[n]).any() for n in a)
        baked = through.bake(got)
        assert zeros(baked, history[-1])
        assert train.accuracy(baked, X, Y) == train.accuracy(got, X, Y)

    def test_score_may_use_gradients(self):
        def saliency(model):
            grads = torch.autograd.grad(
                F.cross_entropy(model(X), Y), [model[0].weight]
            )
            return {"0.weight": (grads[0] * model[0].weight).abs()}

        _, history = self.run(
            score=saliency, start=5, end=40, final=0.5, every=5
        )
        assert masks.sparsity(history[-1]["0.weight"]) == 0.5
        assert history[-1]["2.weight"].all()

    def test_errors(self):
        with pytest.raises(ValueError, match="end must come after"):
            schedules.gradual(start=5, end=5, final=0.9)
        with pytest.raises(ValueError, match="every"):
            schedules.gradual(start=5, end=9, final=0.9, every=0)
        step = schedules.gradual(start=1, end=5, final=0.9)
        with pytest.raises(ValueError, match=r"no mask on \['0\.weight'"):
            fit(mlp(), on_step=step)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="rounds"):
        schedules.geometric(0, per_round=0.2)
    with pytest.raises(ValueError, match="per_round"):
        schedules.geometric(3, per_round=20)
    for loop in (schedules.iterative, schedules.lottery):
        with pytest.raises(ValueError, match="rounds"):
            loop(mlp(), fit, sparsity=0.5, rounds=0)
        with pytest.raises(ValueError, match="sparsity"):
            loop(mlp(), fit, sparsity=50, rounds=2)
    with pytest.raises(ValueError, match="sparsity"):
        schedules.one_shot(mlp(), sparsity=1.2)
