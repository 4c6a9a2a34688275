"""SmoothQuant, AWQ, LLM.int8() and rotations against their definitions."""

import math
from copy import deepcopy
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import calibrate, codes, models, quantize, storage

RULE = partial(quantize.min_max, bits=3)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def drawn(seed, *size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def small_lm(**more):
    torch.manual_seed(0)
    return models.LM(
        vocab=11, width=16, layers=2, heads=2, ff=32, context=8, **more
    )


IDS = torch.randint(0, 11, (4, 8), generator=torch.Generator().manual_seed(0))


class TestSmooth:
    @given(seed=st.integers(0, 999))
    @settings(max_examples=30, deadline=None)
    def test_half_makes_both_ranges_equal(self, seed):
        X = drawn(seed, 20, 6) * torch.logspace(-2, 2, 6)
        W, x_max = drawn(seed + 1, 5, 6), X.abs().amax(0)
        s = quantize.smooth_scales(x_max, W)
        want = (x_max * W.abs().amax(0)).sqrt()
        assert torch.allclose((X / s).abs().amax(0), want, rtol=1e-5)
        assert torch.allclose((W * s).abs().amax(0), want, rtol=1e-5)

    def test_one_moves_all_into_the_weights(self):
        X, W = drawn(0, 20, 6) * 50, drawn(1, 5, 6)
        s = quantize.smooth_scales(X.abs().amax(0), W, alpha=1.0)
        assert torch.allclose((X / s).abs().amax(0), torch.ones(6))
        s = quantize.smooth_scales(X.abs().amax(0), W, alpha=0.0)
        assert torch.allclose((W * s).abs().amax(0), torch.ones(6))

    def test_silent_channels_stay(self):
        W = torch.tensor([[0.0, 1.0, 2.0]])
        s = quantize.smooth_scales(torch.tensor([3.0, 0.0, 8.0]), W)
        assert s.tolist() == [1, 1, 2]

    def test_a_language_model_stays_the_same(self):
        model = small_lm()
        before = deepcopy(model.state_dict())
        pairs = quantize.norm_readers(model, IDS)
        attention = [f"blocks.0.attention.{n}" for n in "qkv"]
        assert pairs[0] == ("blocks.0.norm1", attention)
        assert pairs[1] == ("blocks.0.norm2", ["blocks.0.up"])
        assert len(pairs) == 4  # the head is tied, so norm is not among them
        stats = calibrate.inputs(model, [IDS])
        new = quantize.smooth(model, stats, pairs=pairs)
        assert relative(new(IDS), model(IDS)) < 1e-6
        after = calibrate.inputs(new, [IDS])["blocks.0.up.weight"]
        W = new.blocks[0].up.weight
        high = torch.maximum(after.high.abs(), after.low.abs())
        assert torch.allclose(high, W.abs().amax(0), rtol=1e-4)
        for name, t in model.state_dict().items():
            assert torch.equal(t, before[name])

    def test_an_untied_head_is_a_reader(self):
        pairs = quantize.norm_readers(small_lm(tied=False), IDS)
        assert pairs[-1] == ("norm", ["head"])

    def test_it_saves_an_activation_with_an_outlier(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8))
        model[0].weight.data[3] = 100.0
        model[1].weight.data[:, 3] /= 100.0
        x = drawn(0, 64, 16)
        stats = calibrate.inputs(model, [x])
        smoothed = quantize.smooth(model, stats, pairs=[("0", ["1"])])

        def error(m):
            return relative(quantize.dynamic(m, bits=6)(x), model(x))

        assert error(smoothed) < 0.3 * error(model)

    def test_behind_a_linear_layer(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
        x = drawn(0, 8, 4)
        s = torch.rand(6, generator=torch.Generator().manual_seed(0)) + 0.5
        new = quantize.move_scales(model, "0", ["1"], s)
        assert relative(new(x), model(x)) < 1e-6
        assert torch.equal(new[1].weight, model[1].weight * s)

    def test_behind_an_rms_norm(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 2))
        x = drawn(0, 8, 4)
        stats = calibrate.inputs(model, [x])
        new = quantize.smooth(model, stats, pairs=[("0", ["1"])])
        assert relative(new(x), model(x)) < 1e-6
        assert not torch.equal(new[0].weight, model[0].weight)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"alpha must be .* got 2"):
            quantize.smooth_scales(torch.ones(2), torch.ones(1, 2), alpha=2)
        with pytest.raises(ValueError, match=r"got \(3,\) and W \(1, 2\)"):
            quantize.smooth_scales(torch.ones(3), torch.ones(1, 2))
        model = small_lm()
        with pytest.raises(ValueError, match=r"nothing for \['head'\]"):
            quantize.smooth(model, {}, pairs=[("norm", ["head"])])
        s = torch.ones(16)
        with pytest.raises(ValueError, match="head: its weight is used"):
            quantize.move_scales(model, "norm", ["head"], s)
        plain = nn.Sequential(nn.LayerNorm(2, elementwise_affine=False))
        with pytest.raises(ValueError, match="source: 0 has no weight"):
            quantize.move_scales(plain, "0", [], torch.ones(2))
        net = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1))
        with pytest.raises(ValueError, match=r"must all be nn\.Linear"):
            quantize.move_scales(net, "0", ["1"], torch.ones(2))


def loss(W, code, H):
    E = (W - code.decode()).double()
    return float((E @ H * E).sum())


class TestAwq:
    def layer(self, seed=0):
        W = drawn(seed, 24, 16)
        X = drawn(seed + 1, 200, 16) * torch.logspace(-1, 1, 16)
        layer = nn.Linear(16, 24)
        layer.weight.data = W
        return W, calibrate.inputs(layer, [X])["weight"]

    @given(seed=st.integers(0, 99))
    @settings(max_examples=10, deadline=None)
    def test_never_above_the_rule_alone(self, seed):
        W, stats = self.layer(seed)
        code = quantize.awq(W, stats, RULE)
        assert loss(W, code, stats.H) <= loss(W, RULE(W), stats.H)

    def test_outlier_inputs_make_it_much_better(self):
        W, stats = self.layer()
        code = quantize.awq(W, stats, RULE)
        assert loss(W, code, stats.H) < 0.7 * loss(W, RULE(W), stats.H)

    def test_equal_inputs_give_the_rule(self):
        W, stats = self.layer()
        ones = torch.ones(16, dtype=torch.float64)
        stats = calibrate.Stats(**(vars(stats) | {"mean_abs": ones}))
        code = quantize.awq(W, stats, RULE)
        assert torch.equal(code.decode(), RULE(W).decode())
        assert (code.by == 1).all()

    def test_by_hand(self):
        W, stats = self.layer()
        found = quantize.awq(W, stats, RULE, grid=4)
        losses, scales = [], []
        for alpha in (0, 0.25, 0.5, 0.75, 1):
            s = stats.mean_abs**alpha
            s = (s / math.sqrt(float(s.max() * s.min()))).float()
            E = W - RULE(W * s).decode() / s
            losses.append(float((E.double() @ stats.H * E).sum()))
            scales.append(s)
        best = scales[min(range(5), key=losses.__getitem__)]
        assert torch.allclose(1 / found.by, best, rtol=1e-6)
        assert math.isclose(loss(W, found, stats.H), min(losses), rel_tol=1e-4)

    def test_the_file_pays_for_the_scales(self):
        W, stats = self.layer()
        code = quantize.awq(W, stats, RULE)
        plain = storage.payload(RULE(W))
        assert storage.payload(code) == plain + 16 * 4

    def test_the_scales_can_go_into_the_layer_before(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24))
        model[0].weight.data = torch.logspace(-1, 1, 16)
        x = drawn(0, 200, 16)
        stats = calibrate.inputs(model, [x])["1.weight"]
        code = quantize.awq(model[1].weight, stats, RULE)
        moved = quantize.move_scales(model, "0", ["1"], 1 / code.by)
        moved[1].weight.data = code.x.decode()
        plain = deepcopy(model)
        plain[1].weight.data = code.decode()
        assert relative(moved(x), plain(x)) < 1e-6

    def test_dead_inputs(self):
        W, stats = self.layer()
        silent = stats.mean_abs.clone()
        silent[3] = 0
        stats = calibrate.Stats(**(vars(stats) | {"mean_abs": silent}))
        assert quantize.awq(W, stats, RULE).decode().isfinite().all()

    def test_errors(self):
        W, stats = self.layer()
        with pytest.raises(ValueError, match=r"inputs \(16,\), W is \(24, 4\)"):
            quantize.awq(W[:, :4], stats, RULE)
        with pytest.raises(ValueError, match="grid must be at least 1"):
            quantize.awq(W, stats, RULE, grid=0)


class TestRotation:
    def test_against_the_matrix(self):
        from scipy.linalg import hadamard

        H = torch.tensor(hadamard(16) / 4.0)
        signs = quantize.random_signs(16, seed=3).double()
        x = drawn(0, 5, 16).double()
        want = x @ torch.diag(signs) @ H
        assert torch.allclose(quantize.turn(x, signs), want)
        assert torch.allclose(H @ H.T, torch.eye(16, dtype=torch.float64))

    def test_signs_go_where_the_numbers_are(self):
        x = torch.empty(3, 16, device="meta")
        turned = quantize.turn(x, quantize.random_signs(16))
        assert turned.is_meta and turned.shape == x.shape

    @pytest.mark.parametrize("n", [64, 96, 20])
    def test_the_product_stays(self, n):
        signs = quantize.random_signs(n)
        x, W = drawn(0, 7, n).double(), drawn(1, 5, n).double()
        turned = quantize.turn(x, signs) @ quantize.turn(W, signs).T
        assert torch.allclose(turned, x @ W.T)

    def test_one_outlier_is_spread(self):
        signs = quantize.random_signs(64)
        e = torch.zeros(64)
        e[5] = 100.0
        assert torch.allclose(
            quantize.turn(e, signs).abs(), torch.full((64,), 100 / 8)
        )
        x = drawn(0, 64)
        x[5] = 100.0
        assert quantize.incoherence(x) > 7.5
        assert quantize.incoherence(quantize.turn(x, signs)) < 1.5

    def test_incoherence_is_the_definition(self):
        W = drawn(0, 6, 9)
        want = W.abs().max() * math.sqrt(54) / W.norm()
        assert math.isclose(quantize.incoherence(W), want, rel_tol=1e-6)
        assert quantize.incoherence(-torch.ones(3, 3)) == 1

    @pytest.mark.parametrize("n", [64, 96])
    @pytest.mark.parametrize("each", ["row", "tensor", 16])
    def test_a_code_decodes_to_ordinary_weights(self, n, each):
        W, x = drawn(0, 12, n), drawn(1, 5, n)
        rule = partial(quantize.min_max, bits=4, each=each)
        code = quantize.rotate(W, rule, seed=1)
        signs = quantize.random_signs(n, seed=1)
        inside = rule(quantize.turn(W, signs)).decode()
        assert torch.allclose(
            x @ code.decode().T,
            quantize.turn(x, signs) @ inside.T,
            atol=1e-4,
        )
        # signs cost one bit each
        plain = storage.payload(rule(W))
        assert storage.payload(code) == plain + len(signs) // 8

    @pytest.mark.parametrize("n", [64, 96])
    def test_the_file_gives_it_back(self, n, tmp_path):
        layer = nn.Linear(n, 8, bias=False)
        code = quantize.rotate(layer.weight, RULE)
        storage.save(tmp_path / "r.mc", layer, {"weight": code})
        back = storage.read(tmp_path / "r.mc").state["weight"]
        assert torch.equal(back.decode(), code.decode())

    def test_it_helps_weights_with_an_outlier(self):
        W = drawn(0, 16, 64)
        W[:, 7] *= 30
        rule = partial(quantize.min_max, bits=4)
        plain = relative(rule(W).decode(), W)
        turned = relative(quantize.rotate(W, rule).decode(), W)
        assert turned < 0.5 * plain

    def test_seeds(self):
        a, b = (quantize.random_signs(64, seed=s) for s in (0, 1))
        assert not torch.equal(a, b)
        assert torch.equal(a, quantize.random_signs(64, seed=0))

    def test_errors(self):
        with pytest.raises(ValueError, match="no power of two above 1"):
            quantize.rotate(torch.ones(2, 7), RULE)
        with pytest.raises(
            ValueError, match=r"must be \(out, in\), got \(4,\)"
        ):
            quantize.rotate(torch.ones(4), RULE)
        with pytest.raises(ValueError, match=r"signs \(4,\) do not divide"):
            quantize.turn(torch.ones(2, 6), torch.ones(4))


class TestInt8WithOutliers:
    def test_zero_is_exact(self):
        x, W = drawn(0, 5, 8), drawn(1, 3, 8)
        y = quantize.int8_with_outliers(x, W, threshold=0)
        assert torch.allclose(y, x @ W.T, atol=1e-6)

    def test_infinity_is_vector_wise(self):
        x, W = drawn(0, 5, 8) * 9, drawn(1, 3, 8)
        ends = torch.fake_quantize_per_channel_affine

        def rounded(t):
            scale = t.abs().amax(1) / 127
            return ends(t, scale, torch.zeros(len(t)).int(), 0, -127, 127)

        y = quantize.int8_with_outliers(x, W, threshold=torch.inf)
        assert torch.allclose(y, rounded(x) @ rounded(W).T, atol=1e-4)

    def test_outliers_no_longer_hurt(self):
        x, W = drawn(0, 50, 64), drawn(1, 32, 64)
        x[:, 9] *= 60
        want = x @ W.T
        with_ = quantize.int8_with_outliers(x, W)
        without = quantize.int8_with_outliers(x, W, threshold=torch.inf)
        assert relative(with_, want) < 0.2 * relative(without, want)

    def test_only_the_channels_at_the_threshold_are_apart(self):
        x = torch.tensor([[6.0, 5.99, 0.013]])
        y = quantize.int8_with_outliers(x, torch.eye(3))
        assert y[0, 0] == 6
        scale = 5.99 / 127
        assert math.isclose(y[0, 2], round(0.013 / scale) * scale, abs_tol=1e-6)

    def test_bfloat16_and_zeros(self):
        x, W = drawn(0, 5, 8).bfloat16(), drawn(1, 3, 8).bfloat16()
        y = quantize.int8_with_outliers(x, W)
        assert y.dtype == torch.bfloat16
        assert relative(y.float(), x.float() @ W.float().T) < 0.02
        assert (quantize.int8_with_outliers(0 * x, W) == 0).all()

    def test_errors(self):
        with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2, 4\)"):
            quantize.int8_with_outliers(torch.ones(2, 3), torch.ones(2, 4))


def test_inputs_stay():
    W, x = drawn(0, 8, 16), drawn(1, 5, 16)
    before = W.clone(), x.clone()
    quantize.rotate(W, RULE)
    quantize.int8_with_outliers(x, W)
    quantize.smooth_scales(x.abs().amax(0), W)
    assert torch.equal(W, before[0])
    assert torch.equal(x, before[1])


def test_rotated_weights_are_a_known_code():
    code = quantize.rotate(drawn(0, 4, 8), RULE)
    assert isinstance(code, codes.Rotated)
    assert code.signs.bits == 1
