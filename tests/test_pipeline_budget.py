"""Budgets against brute force over whole files."""

from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from minicompress import (
    codes,
    entropy,
    lowrank,
    models,
    pipeline,
    prune,
    quantize,
    share,
    storage,
    train,
)
from minicompress.pipeline import Choice

CODERS = (entropy.huffman,)
COMPACT = partial(storage.dumps, compact=True)


@pytest.fixture(autouse=True)
def one_thread():
    with train.threads(1):
        yield


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 4)
        ).eval()


def error(model):
    """A loss that is a sum over the layers: the additive case, exactly."""

    def metric(small):
        pairs = zip(model.parameters(), small.parameters(), strict=True)
        return sum(
            (a - b).square().sum().item() for a, b in pairs if a.ndim > 1
        )

    return metric


MENU = pipeline.menu(sparsities=(0, 0.5), bits=(1, 3, 8))


class TestChoice:
    def w(self, *shape):
        g = torch.Generator().manual_seed(0)
        return torch.randn(*(shape or (16, 12)), generator=g)

    def test_sparsity_and_bits(self):
        w = self.w()
        code = Choice(sparsity=0.75, bits=2)(w)
        mask = prune.magnitude(w, sparsity=0.75)
        want = torch.zeros_like(w)
        want[mask] = share.kmeans(w[mask], bits=2).decode()
        assert torch.equal(code.decode(), want)

    @pytest.mark.parametrize("bits", [16, 32])
    def test_floats(self, bits):
        w = self.w()
        want = w.half() if bits == 16 else w
        assert torch.equal(Choice(bits=bits)(w).decode(), want)
        sparse = Choice(0.5, bits)(w).decode()
        mask = prune.magnitude(w, sparsity=0.5)
        assert torch.equal(sparse[mask], want[mask])
        assert not sparse[~mask].any()

    def test_rank(self):
        w = self.w()
        want = lowrank.svd(w, rank=3).decode()
        assert torch.equal(Choice(rank=3)(w).decode(), want)
        code = Choice(bits=4, rank=3)(w)
        assert torch.linalg.matrix_rank(code.decode()) == 3
        assert len(code.x.u.centroids) == 16
        full = Choice(rank=99)(w).decode()  # no more than there is
        torch.testing.assert_close(full, w)

    def test_kernels(self):
        w = self.w(4, 3, 3, 3)
        for choice in (Choice(0.5, 4), Choice(0, 16, 2)):
            assert choice(w).decode().shape == w.shape

    def test_nothing_left(self):
        assert not Choice(1.0, 2)(self.w()).decode().any()

    def test_bits_that_there_are_not(self):
        with pytest.raises(ValueError, match="bits must be 1 to 8, 16 or 32"):
            Choice(bits=12)(self.w())


class TestOptions:
    def test_every_choice_for_every_weight(self):
        model = net()
        made = pipeline.options(model, MENU, coders=CODERS)
        assert [*made] == [n for n in model.state_dict() if "weight" in n]
        for name, own in made.items():
            w = model.state_dict()[name]
            assert [*own] == [*MENU]
            for choice, code in own.items():
                assert torch.equal(code.decode(), choice(w).decode())

    def test_takes_functions_of_ones_own_for_some(self):
        made = pipeline.options(
            net(),
            {"int4": partial(quantize.min_max, bits=4)},
            where=lambda name, w: name == "2.weight",
        )
        assert [*made] == ["2.weight"]
        assert [*made["2.weight"]] == ["int4"]

    def test_tied_weights_are_one(self):
        model = models.LM(vocab=9, width=8, heads=2, layers=1, ff=8, context=4)
        made = pipeline.options(model, MENU, coders=CODERS)
        assert len(made) == len(
            {*map(id, model.parameters())}
            & {id(w) for w in model.parameters() if w.ndim > 1}
        )

    def test_nothing_chosen(self):
        with pytest.raises(ValueError, match="selects no parameter"):
            pipeline.options(net(), MENU, where=lambda name, w: False)
        with pytest.raises(ValueError, match="has no choice"):
            pipeline.options(net(), {})


class TestLosses:
    def test_is_the_loss_of_one_weight_and_the_bytes_of_its_code(self):
        model = net()
        made = pipeline.options(model, MENU, coders=CODERS)
        table = pipeline.losses(model, made, error(model))
        for name, own in made.items():
            w = model.state_dict()[name]
            for choice, code in own.items():
                size, loss = table[name][choice]
                assert size == storage.payload(code)
                want = (w - code.decode()).square().sum().item()
                assert loss == pytest.approx(want, rel=1e-4, abs=1e-6)


class TestToBudget:
    def solved(self, dumps=storage.dumps):
        model = net()
        made = pipeline.options(model, MENU, coders=CODERS, dumps=dumps)
        table = pipeline.losses(model, made, error(model))
        plan = partial(pipeline.to_budget, model, made, table, dumps=dumps)
        return model, made, table, plan

    def files(self, model, made, table, dumps):
        """All files there are: their bytes and losses."""
        rest = pipeline.halved(pipeline.plain(model))
        found = []
        for combination in product(*(own for own in made.values())):
            choice = dict(zip(made, combination, strict=True))
            state = pipeline.put(
                rest, {n: made[n][c] for n, c in choice.items()}
            )
            loss = sum(table[n][c][1] for n, c in choice.items())
            found.append((len(dumps(model, state)), loss))
        return found

    @pytest.mark.parametrize("dumps", [storage.dumps, COMPACT])
    def test_against_brute_force_over_whole_files(self, dumps):
        model, made, table, plan = self.solved(dumps)
        files = self.files(model, made, table, dumps)
        least, most = min(files)[0], max(files)[0]
        for budget in range(least + 8, most + 50, 23):
            found = plan(budget=budget)
            file = dumps(model, found.state)
            assert found.bytes == len(file) <= budget
            best = min(loss for size, loss in files if size <= budget)
            # entries of the header differ by a few bytes from choice to
            # choice: the best within a budget that much smaller is reached
            near = [loss for size, loss in files if size <= budget - 30]
            assert best <= found.loss + 1e-6
            assert found.loss <= min(near, default=torch.inf) + 1e-6

    def test_the_file_is_the_plan(self):
        model, made, _, plan = self.solved()
        found = plan(budget=900)
        again = storage.loads(storage.dumps(model, found.state), like=model)
        for name, choice in found.choice.items():
            w = again.state_dict()[name]
            assert torch.equal(w, made[name][choice].decode())
        bias = model[0].bias.half().float()
        assert torch.equal(again[0].bias, bias)
        assert repr(found).startswith(f"{found.bytes:,} bytes")

    def test_too_small_a_budget_says_how_small_it_gets(self):
        model, made, table, plan = self.solved()
        least = min(self.files(model, made, table, storage.dumps))[0]
        with pytest.raises(ValueError, match=f"10 bytes.*takes {least}"):
            plan(budget=10)
        assert plan(budget=least).bytes == least

    def test_with_room_for_all_the_best_of_each(self):
        *_, table, plan = self.solved()
        found = plan(budget=10**9)
        best = sum(min(x[1] for x in own.values()) for own in table.values())
        assert found.loss == pytest.approx(best)

    def test_knapsack_is_no_worse_than_other_ways(self):
        *_, plan = self.solved()
        for budget in (650, 800, 1000):
            found = plan(budget=budget)
            for solve in (quantize.greedy, quantize.lagrangian):
                other = plan(budget=budget, solve=solve)
                assert other.bytes <= budget
                assert found.loss <= other.loss + 1e-9

    def test_the_rest_can_be_given(self):
        model, *_, plan = self.solved()
        rest = pipeline.plain(model)
        found = plan(budget=10**9, rest=rest)
        assert torch.equal(found.state["0.bias"], model[0].bias)
        assert found.state["0.bias"].dtype == torch.float32

    def test_a_language_model_with_tied_weights(self):
        torch.manual_seed(0)
        model = models.LM(
            vocab=20, width=16, heads=2, layers=2, ff=32, context=8
        ).eval()
        few = pipeline.menu(sparsities=(0, 0.5), bits=(1, 3))
        made = pipeline.options(model, few, coders=CODERS)
        table = pipeline.losses(model, made, error(model))
        found = pipeline.to_budget(model, made, table, budget=5000)
        again = storage.loads(storage.dumps(model, found.state))
        want = codes.decode(found.state)
        assert found.bytes <= 5000
        for name, w in again.state_dict().items():
            assert torch.equal(w, want[name].to(w.dtype)), name

    def test_leaves_the_model(self):
        model, *_, plan = self.solved()
        before = {n: w.clone() for n, w in model.state_dict().items()}
        plan(budget=900)
        for name, w in model.state_dict().items():
            assert torch.equal(w, before[name])


class TestToQuality:
    def solved(self):
        model = net()
        made = pipeline.options(model, MENU, coders=CODERS)
        metric = error(model)
        table = pipeline.losses(model, made, metric)
        search = partial(
            pipeline.to_quality,
            model,
            made,
            table,
            quality=lambda m: -metric(m),
        )
        return model, made, table, metric, search

    def test_is_the_smallest_budget_that_is_good_enough(self):
        model, made, table, metric, search = self.solved()
        worst = sum(max(x[1] for x in own.values()) for own in table.values())
        rest = pipeline.halved(pipeline.plain(model))
        for part in (0.1, 0.3, 0.6):
            found = search(floor=-part * worst, steps=30)
            small = pipeline.realized(model, found.state)
            assert metric(small) <= part * worst
            # no budget that is smaller would have done
            for budget in range(found.bytes - 1, found.bytes - 40, -1):
                try:
                    other = pipeline.to_budget(
                        model, made, table, budget=budget, rest=rest
                    )
                except ValueError:
                    break
                other = pipeline.realized(model, other.state)
                assert metric(other) > part * worst

    def test_asks_no_more_often_than_told(self):
        model, made, table, metric, _ = self.solved()
        asked = []
        pipeline.to_quality(
            model,
            made,
            table,
            quality=lambda m: asked.append(m) or -metric(m),
            floor=-10.0,
            steps=4,
        )
        assert 1 < len(asked) <= 5

    def test_a_floor_that_is_too_high(self):
        *_, search = self.solved()
        with pytest.raises(ValueError, match="floor: 1, but the largest"):
            search(floor=1)

    def test_ctrl_c_keeps_the_best_so_far(self):
        model, made, table, metric, _ = self.solved()
        asked = []

        def quality(small):
            asked.append(small)
            if len(asked) == 3:
                raise KeyboardInterrupt
            return -metric(small)

        found = pipeline.to_quality(
            model, made, table, quality=quality, floor=-1e9
        )
        assert len(asked) == 3
        full = pipeline.to_budget(model, made, table, budget=10**9)
        assert found.bytes < full.bytes


class TestMenu:
    def test_lists_all_combinations(self):
        found = pipeline.menu((0, 0.5), (2, 4), (1, 2))
        want = {Choice(s, b) for s in (0, 0.5) for b in (2, 4)}
        want |= {Choice(0.0, b, r) for b in (2, 4) for r in (1, 2)}
        assert {*found} == want
        assert all(found[c] is c for c in found)
