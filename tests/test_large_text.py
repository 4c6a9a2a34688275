"""Large-model methods on the language model: what the experiment computes."""

import json
import math
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shapes import randomized
from torch import nn

from minicompress import (
    calibrate,
    lowrank,
    models,
    prune,
    quantize,
    storage,
    train,
)

FOLDER = Path(__file__).resolve().parents[1] / "chapters"
RESULTS = FOLDER / "results" / "large_text.json"
sys.path.insert(0, str(FOLDER / "experiments"))
try:
    import _caches
    import _few_bits as few
    import _streams
    import large_text
finally:
    sys.path.pop(0)

WIDTH, HEADS, FF, CONTEXT = 16, 2, 32, 24
NETS = ("as trained", "loud", "principal")


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """The small model of these tests has fewer channels than the book's."""
    monkeypatch.setattr(_streams, "LOUD", (5, 7))


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lm():
    torch.manual_seed(0)
    sizes = {"width": WIDTH, "layers": 2, "heads": HEADS, "ff": FF}
    return randomized(models.LM(vocab=20, **sizes, context=CONTEXT))


def ids(rows=4, tokens=CONTEXT, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 20, (rows, tokens), generator=g)


def network(name):
    model = lm()
    if name == "loud":
        return _streams.loud(model, ids())
    if name == "principal":
        return _streams.principal(model, [ids()])
    return model


def distance(a, b):
    x, y = a(ids(seed=1)), b(ids(seed=1))
    return float(((x - y).abs().max() / y.abs().max()).detach())


def stats(W, X):
    """Record what a layer with the weights W sees."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight.data = W
    return calibrate.inputs(layer, [X])["weight"]


def correlated(n=64, samples=512):
    return drawn(samples, n, seed=1) @ drawn(n, n, seed=2) / n**0.5


def layer_loss(W, code, s):
    E = W.double() - code.decode().double()
    return float(((E @ s.H) * E).sum())


class TestSameFunction:
    @pytest.mark.parametrize("net", NETS)
    @pytest.mark.parametrize("way", _streams.WAYS)
    def test_prepared(self, net, way):
        model = network(net)
        new = _streams.prepared(model, way, [(ids(),)], seed=3, alpha=0.6)
        assert distance(new, lm()) < 1e-5
        if way not in ("plain", "folded"):
            before, after = (
                dict(m.named_parameters())["blocks.0.up.weight"]
                for m in (model, new)
            )
            assert not torch.allclose(before, after, rtol=0.1)

    def test_loud_keys(self):
        model = _streams.loud_keys(lm(), channel=3)
        assert distance(model, lm()) < 1e-5
        k = [m.blocks[0].attention.k for m in (model, lm())]
        by = (k[0].weight / k[1].weight).mean(1)
        d = WIDTH // HEADS
        wanted = torch.ones(WIDTH).double()
        wanted[[3, 3 + d]] = _streams.TIMES
        assert torch.allclose(by, wanted)
        assert torch.allclose(k[0].bias / k[1].bias, wanted)

    def test_a_rotation_needs_norms_without_scales(self):
        with pytest.raises(ValueError, match="RMSNorm"):
            _streams.rotated(lm(), 0)
        plain = prune.without_scales(lm())
        assert distance(_streams.rotated(plain, 0), plain) < 1e-5
        for block in plain.blocks:
            block.norm1.weight.data = 1 + drawn(WIDTH).double() / 4
        assert distance(_streams.rotated(plain, 0), plain) > 1e-2

    def test_a_turn_at_run_time_needs_turned_weights(self):
        model = lm()
        new = _streams.online(model, seed=3)
        assert distance(new, model) < 1e-5
        new.blocks[1].down[1].weight.data = model.blocks[1].down.weight.data
        assert distance(new, model) > 1e-2

    def test_models_are_left_alone(self):
        model = lm()
        before = {n: t.clone() for n, t in model.state_dict().items()}
        for name in ("smooth", "rotated, all"):
            _streams.prepared(model, name, [(ids(),)])
        _streams.loud(model, ids())
        _streams.loud_keys(model)
        assert all(
            torch.equal(before[n], t) for n, t in model.state_dict().items()
        )


class TestOutliers:
    def test_against_hooks(self):
        model, seen = network("loud"), []
        layer = model.blocks[1].up
        layer.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
        found = _streams.outliers(model, [ids()])["blocks.1.up"]
        top = seen[0].detach().flatten(0, 1).abs().amax(0).numpy()
        assert found["largest"] == round(float(top.max()), 2)
        # torch takes the lower of the two in the middle
        middle = np.sort(top)[(WIDTH - 1) // 2]
        assert found["ratio"] == round(float(top.max() / middle), 2)
        assert found["from 6"] == (top >= 6).sum()

    def test_loud_channels_are_as_much_larger(self):
        quiet, found = (
            _streams.outliers(m, [ids()]) for m in (lm(), network("loud"))
        )
        assert found["blocks.0.up"]["ratio"] > 10
        assert quiet["blocks.0.up"]["ratio"] < 5
        assert found["blocks.0.down"] == quiet["blocks.0.down"]

    def test_names_are_those_of_layers_that_are_not_turned(self):
        new = _streams.online(lm(), 0)
        assert list(_streams.outliers(new, [ids()])) == list(
            _streams.outliers(lm(), [ids()])
        )


class TestRules:
    @pytest.mark.parametrize("n", [16, 48])  # one block, three blocks
    def test_turned_moments_are_those_of_turned_inputs(self, n):
        X = correlated(n).double()
        signs = quantize.random_signs(n, seed=2)
        Y = quantize.turn(X, signs)
        found = few.turned_moments(X.T @ X, signs)
        assert torch.allclose(found, Y.T @ Y)

    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_gptq_in_a_rotated_basis(self, bits):
        W, X = drawn(32, 64), correlated()
        s = stats(W, X)
        code = few.rotated_gptq(W, s, bits, seed=4)
        signs = quantize.random_signs(64, seed=4)
        V = quantize.turn(W, signs)
        seen = stats(V, quantize.turn(X, signs))
        own = quantize.gptq(V, seen.H.float(), quantize.mse(V, bits=bits))
        # a tie may fall to the other side
        turned = quantize.turn(code.decode(), signs)
        same = (turned - own.decode()).abs() < 1e-4
        assert same.double().mean() > 0.99
        plain = few.rotated_nearest(W, s, bits, seed=4)
        assert layer_loss(W, code, s) < layer_loss(W, plain, s)

    def test_a_rotation_on_moments_of_the_old_inputs_is_worse(self):
        W, X = drawn(32, 64), correlated()
        s = stats(W, X)
        right = few.rotated_gptq(W, s, 3, seed=4)
        wrong = quantize.rotate(
            W, lambda V: few.with_moments(V, s.H, 3), seed=4
        )
        assert 1.2 * layer_loss(W, right, s) < layer_loss(W, wrong, s)

    @pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"n": 2, "m": 4}])
    def test_joint_with_independent_inputs_is_one_after_the_other(self, how):
        W = drawn(16, 32)
        s = SimpleNamespace(H=torch.eye(32).double())
        a, b = few.joint(W, s, 3, **how), few.in_turn(W, s, 3, **how)
        assert torch.equal(a.decode(), b.decode())

    @pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"n": 2, "m": 4}])
    @pytest.mark.parametrize("bits", [2, 3, 4])
    def test_joint_makes_up_for_the_rounding(self, bits, how):
        W = drawn(32, 64)
        s = stats(W, correlated())
        a, b = few.joint(W, s, bits, **how), few.in_turn(W, s, bits, **how)
        assert layer_loss(W, a, s) < layer_loss(W, b, s)
        q = a.decode() / a.by
        top = 2 ** (bits - 1) - 1
        assert torch.allclose(q, q.round(), atol=1e-4)
        assert q.round().abs().max() == top
        mask = a.x.mask
        assert mask.sum() == mask.numel() // 2
        assert (a.decode()[~mask] == 0).all()
        if "n" in how:
            assert (mask.view(-1, 4).sum(1) == 2).all()

    def test_many_bits_are_sparsegpt(self):
        W = drawn(32, 64)
        s = stats(W, correlated())
        exact = prune.sparsegpt(W, s.H.float(), sparsity=0.5)
        for rule in (few.joint, few.in_turn):
            found = rule(W, s, 12, sparsity=0.5)
            assert torch.allclose(found.decode(), exact.decode(), atol=4e-3)

    def test_thin_is_drone_with_rounded_factors(self):
        W = drawn(32, 64)
        s = stats(W, correlated())
        rank = int(0.7 * 32 * 64 / 96)
        exact = lowrank.drone(W, s.H, rank=rank)
        losses = [
            layer_loss(W, few.thin(W, s, b, 0.7), s) for b in (3, 4, 6, 8)
        ]
        best = layer_loss(W, exact, s)
        assert losses == sorted(losses, reverse=True)
        assert best < losses[-1] < 1.01 * best
        assert losses[1] < 1.5 * best
        assert few.thin(W, s, 4, 0.7).u.shape == (32, rank)

    @pytest.mark.parametrize("bits", [2, 3])
    def test_corrected_is_between_its_base_and_full_rank(self, bits):
        W = drawn(32, 64)
        s = stats(W, correlated())
        base = few.gptq(W, s, bits)
        losses = [
            layer_loss(W, few.corrected(W, s, bits, r), s) for r in (2, 8, 16)
        ]
        assert layer_loss(W, base, s) > losses[0] > losses[1] > losses[2]

    def test_groups_have_grids_of_their_own(self):
        W = drawn(8, 64)
        W[:, 32:] /= 100
        s = stats(W, correlated())
        row, group = few.gptq(W, s, 3), few.gptq(W, s, 3, each=32)
        assert 2 * layer_loss(W, group, s) < layer_loss(W, row, s)

    def test_weights_are_left_alone(self):
        W = drawn(32, 64)
        s, before = stats(W, correlated()), W.clone()
        for rule in (few.joint, few.in_turn):
            rule(W, s, 3, sparsity=0.5)
        few.thin(W, s, 3, 0.7)
        few.corrected(W, s, 3, 4)
        few.rotated_gptq(W, s, 3, 0)
        assert torch.equal(W, before)


class TestEffectiveBits:
    """Closed forms for a matrix (32, 64), scales in float32."""

    def found(self, rule):
        W = drawn(32, 64)
        made = {"W": rule(W, stats(W, correlated()))}
        return large_text.effective(made, W.numel())

    def test_rounding(self):
        nearest = partial(few.nearest, bits=3)
        assert self.found(nearest) == round(3 + (32 + 3) / 64, 4)
        assert self.found(partial(nearest, each=16)) == round(3 + 35 / 16, 4)
        assert self.found(partial(few.gptq, bits=3, each=16)) == self.found(
            partial(nearest, each=16)
        )

    def test_a_rotation_costs_a_bit_for_an_input(self):
        found = self.found(partial(few.rotated_gptq, bits=3, seed=0))
        assert found == round(3 + 35 / 64 + 64 / 2048, 4)

    @pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"n": 2, "m": 4}])
    def test_pruned(self, how):
        found = self.found(partial(few.joint, bits=4, **how))
        assert found == 1 + 4 / 2 + 32 / 64

    def test_factors(self):
        rank = int(0.7 * 32 * 64 / 96)
        numbers = rank * 96
        grids = 36 * (rank + 32)
        found = self.found(partial(few.thin, bits=4, ratio=0.7))
        # integers fill whole bytes
        assert found == pytest.approx((4 * numbers + grids) / 2048, abs=0.01)

    def test_what_is_removed_counts_in_the_number_of_weights(self):
        code = quantize.mse(drawn(32, 64), bits=4)
        whole = large_text.effective({"a": code, "b": code}, 2 * 2048)
        half = large_text.effective({"a": code}, 2 * 2048)
        assert half == pytest.approx(whole / 2, abs=1e-4)
        assert storage.payload(code) == 2048 / 2 + 32 * 4 + 32 / 2


class TestCompressed:
    def test_with_and_without_data(self):
        model = lm()
        before = deepcopy(model.state_dict())
        rule = partial(few.nearest, bits=4)
        a, made = large_text.compressed(model, rule)
        b, same = large_text.compressed(model, rule, [(ids(),)])
        assert list(made) == list(same) and len(made) == 12
        assert all(n.startswith("blocks") for n in made)
        for name, t in a.state_dict().items():
            assert torch.equal(t, b.state_dict()[name])
            wanted = made[name].decode() if name in made else before[name]
            assert torch.equal(t, wanted)
        assert all(
            torch.equal(before[n], t) for n, t in model.state_dict().items()
        )

    def test_plans_know_what_they_need(self):
        W = drawn(32, 64)
        for rule, needs in large_text.alone().values():
            rule = partial(rule, seed=1) if "seed" in needs else rule
            s = stats(W, correlated()) if "data" in needs else None
            assert rule(W, s).shape == (32, 64)
        for rule in large_text.together().values():
            assert rule(W, stats(W, correlated())).shape == (32, 64)


class TestMeasures:
    @pytest.fixture
    def bench(self, monkeypatch):
        monkeypatch.setattr(large_text, "LENGTH", CONTEXT)
        text = ids(1, 5 * CONTEXT + 8)[0]
        model = lm()
        dense = large_text.logits(model, text)
        return SimpleNamespace(model=model, test=text, dense=dense)

    def test_the_bits_are_those_of_the_library(self, bench):
        found = large_text.loss(bench.dense, bench.test)
        assert len(found) == len(bench.test) - 1
        wanted = train.bits_per_char(bench.model, bench.test)
        assert float(found.mean()) == pytest.approx(wanted, rel=1e-6)

    def test_compared_by_loops(self, bench):
        other, _ = large_text.compressed(
            bench.model, partial(few.nearest, bits=2)
        )
        found = large_text.Bench.compared(bench, other)
        z = large_text.logits(other, bench.test).double().numpy()
        v = bench.dense.double().numpy()
        kl = []
        for a, b in zip(z, v, strict=True):
            q, p = (
                np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (a, b)
            )
            kl.append((p * np.log2(p / q)).sum())
        assert found["kl"] == pytest.approx(np.mean(kl), abs=1e-4)
        same = (z.argmax(1) == v.argmax(1)).mean()
        assert found["agreement"] == pytest.approx(same, abs=1e-4)
        assert 0 < same < 1

    def test_a_network_agrees_with_itself(self, bench):
        found = large_text.Bench.compared(bench, bench.model)
        assert found["agreement"] == 1 and found["kl"] == 0

    def test_cached_is_exact_in_a_long_window(self, bench):
        text = bench.test[: 4 * CONTEXT + 1]
        start = _caches.Variant(1, 8, CONTEXT)
        found = large_text.cached(bench.model, start, text)
        exact = large_text.loss(large_text.logits(bench.model, text), text)
        late = exact.view(4, CONTEXT)[:, CONTEXT // 2 :]
        assert found["quality"] == pytest.approx(float(exact.mean()), abs=1e-3)
        assert found["second half"] == pytest.approx(
            float(late.mean()), abs=1e-3
        )
        rough = _caches.Variant(1, 8, 0)
        assert large_text.cached(bench.model, rough, text) != found

    @pytest.mark.parametrize("by", large_text.RANGES)
    def test_16_bits_are_enough_for_everything(self, bench, by):
        model = large_text.on_inputs(
            bench.model, 16, by, [(bench.test[None, :CONTEXT],)]
        )
        text = bench.test[None, :CONTEXT]
        assert torch.allclose(model(text), bench.model(text), atol=1e-2)
        assert not torch.equal(model(text), bench.model(text))


class TestCaches:
    def filled(self, axes, **how):
        K, V = drawn(2, HEADS, 40, 8), drawn(2, HEADS, 40, 8, seed=1)
        K[..., 3] *= 50
        cache = _caches.Variant(2, 8, 4, axes=axes)
        for t in range(40):
            cache = cache.append(K[..., t : t + 1, :], V[..., t : t + 1, :])
        return cache, K, V

    def test_kivi_is_the_cache_of_the_library(self):
        found, K, V = self.filled(_caches.AXES["KIVI"])
        own = quantize.Cache(2, 8, 4).append(K, V)
        for a, b in zip(found.decode(), own.decode(), strict=True):
            assert torch.equal(a, b)
        assert found.payload() == own.payload() and len(found) == 40

    @pytest.mark.parametrize("axes", _caches.AXES.values())
    def test_axes_by_loops(self, axes):
        found, K, V = self.filled(axes)
        assert type(found) is _caches.Variant and found.axes == axes
        for X, Y, axis in zip((K, V), found.decode(), axes, strict=True):
            assert torch.equal(X[..., 32:, :], Y[..., 32:, :])  # the window
            for start in range(0, 32, 8):
                x, y = (t[0, 0, start : start + 8] for t in (X, Y))
                if axis == "channel":
                    x, y = x.T, y.T
                for line, got in zip(x, y, strict=True):
                    low, high = line.min(), line.max()
                    step = (high - low) / 3
                    slack = 2e-3 * float(line.abs().max())
                    assert (line - got).abs().max() <= step / 2 + slack
                    assert len(got.unique()) <= 4

    def test_loud_keys_need_grids_for_channels(self):
        errors = {}
        for name, axes in _caches.AXES.items():
            found, K, _ = self.filled(axes)
            E = (found.decode()[0] - K)[..., :32, :]
            errors[name] = float(E[..., [0, 1, 2, 4, 5, 6, 7]].norm())
        assert errors["KIVI"] == errors["channels"] < errors["tokens"] / 5
        assert errors["tokens"] == errors["reversed"]

    @pytest.mark.parametrize("axes", _caches.AXES.values())
    @pytest.mark.parametrize("window", [0, 16])
    def test_bytes(self, axes, window):
        model = lm()  # 2 layers, 2 heads of 8
        start = _caches.Variant(2, 8, window, axes=axes)
        found = _caches.full_bytes(model, start, 32)
        # 8 numbers share two float16, whichever way
        old = 2 * 2 * WIDTH * (32 - window) * (2 + 32 / 8) / 8
        assert found == old + 2 * 2 * WIDTH * window * 2

    def test_spread(self):
        model = lm()
        before = _caches.spread(model, [ids()])
        after = _caches.spread(_streams.loud_keys(model), [ids()])
        assert before["values"] == after["values"]
        x = calibrate.inputs(model, [ids()])["blocks.1.attention.k.weight"]
        K = model.blocks[1].attention.k(x.sample.double())
        wide = np.ptp(K.detach().numpy(), axis=0)
        middle = np.sort(wide)[(WIDTH - 1) // 2]
        assert before["keys"][1] == pytest.approx(
            wide.max() / middle, abs=0.006
        )
        assert after["keys"][1] > 10 * before["keys"][1]


@pytest.fixture(scope="module")
def found():
    return json.loads(RESULTS.read_text(encoding="utf8"))


@pytest.fixture(scope="module")
def rows(found):
    return {(r["method"], r["bits"], r["group"]): r for r in found["rows"]}


class TestResults:
    """The stored numbers agree with themselves and with other experiments."""

    def other(self, name):
        path = FOLDER / "results" / f"{name}.json"
        return json.loads(path.read_text(encoding="utf8"))

    def test_the_network_is_that_of_the_other_experiments(self, found, rows):
        old = self.other("quantized_text")
        assert found["weights"] == old["weights"]
        dense = old["dense"]["quality"][0]
        assert found["dense"]["quality"] == pytest.approx(dense, abs=1e-4)
        for r in old["rows"]:
            key = {"MSE, row": "rounding", "GPTQ, row": "GPTQ"}
            if r["method"] in key and r["bits"] in (2, 3, 4):
                mine = rows[key[r["method"]], r["bits"], None]["quality"]
                # there the tables are rounded too
                mean = np.mean(r["quality"])
                assert np.mean(mine) == pytest.approx(mean, rel=0.03)

    def test_three_networks_are_one_function(self, found):
        exact = found["activations"]["exact"].values()
        assert max(exact) - min(exact) < 1e-3

    def test_many_bits_change_nothing(self, found):
        for r in found["activations"]["rows"]:
            if r["bits"] == [16, 8] and r["net"] == "as trained":
                assert max(r["quality"]) < found["dense"]["quality"] + 0.02
        last = [
            r
            for r in found["cache"]["rows"]
            if r["bits"] == 8 and r["net"] == "as trained"
        ]
        exact = found["cache"]["exact"]["quality"]
        assert all(abs(r["quality"] - exact) < 0.003 for r in last)

    def test_effective_bits_of_uniform_grids(self, rows):
        for b in large_text.BITS:
            # 128 inputs in fifteen of eighteen matrices, 512 in the others
            share = 3 * 512 * 128 / 589824
            scales = (32 + b) * ((1 - share) / 128 + share / 512)
            wanted = b + scales
            assert rows["GPTQ", b, None]["effective"] == pytest.approx(
                wanted, abs=1e-4
            )
            assert rows["GPTQ", b, 64]["effective"] == round(
                b + (32 + b) / 64, 4
            )

    def test_is_small(self):
        assert RESULTS.stat().st_size < 60_000

    def test_every_number_is_finite(self, found):
        def walk(x):
            if isinstance(x, dict):
                x = list(x.values())
            if isinstance(x, list):
                return all(walk(y) for y in x)
            return not isinstance(x, float) or math.isfinite(x)

        assert walk(found)
