"""What the encoder's experiment does is what its table says."""

import json
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minicompress import calibrate, codes, data, models, prune, quantize

pytest.importorskip("sklearn")
FOLDER = Path(__file__).resolve().parents[1] / "chapters"
sys.path.insert(0, str(FOLDER / "experiments"))
try:
    import _entering
    import _large
    import _large_rules as rules
    import large_encoder
    import pruned_encoder
finally:
    sys.path.pop(0)


@pytest.fixture(scope="module")
def result():
    path = FOLDER / "results" / "large_encoder.json"
    return json.loads(path.read_text("utf8"))


@pytest.fixture(scope="module")
def find(result):
    def find(method, **keys):
        rows = [
            r
            for r in result["rows"]
            if r["method"] == method
            and all(r.get(k) == v for k, v in keys.items())
        ]
        assert len(rows) == 1, (method, keys)
        return rows[0]

    return find


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    model = models.Encoder(
        vocab=50, width=32, layers=3, heads=4, ff=64, positions=16, pooler=True
    )
    with torch.no_grad():
        for name, p in model.blocks.named_parameters():
            if "norm" not in name:
                p.normal_(std=0.3)
    return model.eval()


@pytest.fixture
def ids():
    g = torch.Generator().manual_seed(1)
    return list(torch.randint(50, (12, 16), generator=g).split(4))


@pytest.fixture
def layer():
    """A matrix (24, 32) and inputs, correlated and with a large channel."""
    g = torch.Generator().manual_seed(2)
    W = torch.randn(24, 32, generator=g)
    X = torch.randn(400, 8, generator=g) @ torch.randn(8, 32, generator=g)
    X += 0.3 * torch.randn(400, 32, generator=g)
    X[:, 5] *= 30
    holder = torch.nn.Linear(32, 24, bias=False)
    stats = calibrate.inputs(holder, [X], rows=400)["weight"]
    return SimpleNamespace(W=W, X=X, stats=stats, H=stats.H)


def loss(layer, code):
    """Square the change of the outputs, sample by sample."""
    E = (layer.W - codes.value(code)).double()
    return float((layer.X.double() @ E.T).square().sum(1).mean())


class TestText:
    def test_no_paragraph_is_in_two_parts(self, result):
        parts = [set(_large.paragraphs(s)) for s in ("train", "val", "test")]
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert all(len(p) >= 40 for part in parts for p in part)
        assert len(parts[2]) == result["text"]["paragraphs"]

    def test_paragraphs_are_the_text(self):
        text = " ".join(data.reference().test.split())
        assert all(p in text for p in _large.paragraphs("test"))

    def test_the_original_agrees_with_itself(self, encoder):
        words = [chr(97 + i) for i in range(20)]
        tokenizer = data.WordPiece((*SPECIAL, *words))
        texts = ["a b c", "d e", "f f f g", "h i j k l"]
        found = _large.Texts(encoder, tokenizer, texts)
        same = found.compare(encoder)
        assert same["cosine"] == pytest.approx(1, abs=1e-6)
        assert same["neighbor"] == 1

        # a model that confuses two texts with all others
        class Constant(torch.nn.Module):
            def forward(self, ids, mask):
                return torch.ones(*ids.shape, 32)

        flat = found.compare(Constant())
        one = torch.nn.functional.normalize(torch.ones(32), dim=0)
        cosine = (found.own @ one).mean()
        assert flat["cosine"] == pytest.approx(float(cosine), abs=1e-6)

    def test_random_tokens(self):
        batches = large_encoder.random_tokens(20, 0, 5000)
        x = torch.cat(batches)
        assert x.shape == (20, large_encoder.LENGTH)
        assert (x[:, 0] == 101).all() and (x[:, -1] == 102).all()
        assert x[:, 1:-1].min() >= 999 and x.max() < 5000
        again = torch.cat(large_encoder.random_tokens(20, 0, 5000))
        assert torch.equal(x, again)
        other = torch.cat(large_encoder.random_tokens(20, 1, 5000))
        assert not torch.equal(x, other)


SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


class TestByBlock:
    def test_is_what_passes_of_the_whole_model_make(self, encoder, ids):
        def rule(W, stats):
            return rules.gptq(W, stats.H, bits=3)

        made = pruned_encoder.coded_by_block(
            encoder, ids, lambda n, W, s: rule(W, s)
        )
        assert set(made) == set(pruned_encoder.blocks(encoder))
        expected = deepcopy(encoder)
        for i in range(len(expected.blocks)):  # the whole model, each time
            stats = calibrate.inputs(
                expected, ids, where=lambda n, w, i=i: f"blocks.{i}." in n
            )
            for name, s in stats.items():
                w = expected.get_parameter(name)
                w.data = rule(w.detach(), s).decode()
        for name, code in made.items():
            w = expected.get_parameter(name)
            assert torch.allclose(code.decode(), w, atol=1e-5), name

    def test_sees_what_the_compressed_blocks_make(self, encoder, ids):
        seen = {}

        def look(name, W, stats):
            seen[name] = stats.H
            return torch.zeros_like(W)

        before = {n: p.clone() for n, p in encoder.named_parameters()}
        made = pruned_encoder.coded_by_block(encoder, ids, look)
        names = set(pruned_encoder.blocks(encoder))
        own = calibrate.inputs(encoder, ids, where=lambda n, w: n in names)
        first, second = (f"blocks.{i}.attention.q.weight" for i in (0, 1))
        assert torch.allclose(seen[first], own[first].H, rtol=1e-4)
        assert not torch.allclose(seen[second], own[second].H, rtol=0.1)
        zero = pruned_encoder.changed(encoder, made)
        after = calibrate.inputs(zero, ids, where=lambda n, w: n in names)
        assert torch.allclose(seen[second], after[second].H, rtol=1e-4)
        for n, p in encoder.named_parameters():
            assert torch.equal(p, before[n]), n

    @pytest.mark.parametrize("bits", [2, 4])
    def test_bits_count_scales_and_zeros(self, bits):
        W = torch.randn(16, 128)
        row = {"a": rules.rounding(W, bits), "b": rules.rounding(W, bits)}
        assert _large.bits(row) == bits + (32 + bits) / 128
        group = {"a": rules.rounding(W, bits, 64)}
        assert _large.bits(group) == bits + (32 + bits) / 64
        assert _large.bits(group, 2 * W.numel()) == _large.bits(group) / 2


class TestRules:
    def test_turned_uses_the_moments_of_turned_inputs(self, layer, monkeypatch):
        seen = {}

        def gptq(W, H, bits, group=None):
            seen["H"] = H
            return quantize.mse(W, bits=bits)

        monkeypatch.setattr(rules, "gptq", gptq)
        rules.turned(layer.W, layer.H, 3)
        signs = quantize.random_signs(32)
        X = quantize.turn(layer.X.double(), signs)
        assert torch.allclose(seen["H"], X.T @ X / len(X), rtol=1e-4, atol=1e-3)

    def test_turned_is_better_than_rounding_after_the_turn(self, layer):
        plain = quantize.rotate(layer.W, partial(quantize.mse, bits=3))
        code = rules.turned(layer.W, layer.H, 3)
        assert loss(layer, code) < 0.7 * loss(layer, plain)

    def test_double_nf4_is_nf4_with_few_bits_for_scales(self):
        W = torch.randn(64, 512)
        code, plain = rules.double_nf4(W), quantize.nf4(W, each=64)
        table = 8 * 16 * 4 / W.numel()  # the levels, once
        extra = 8 / 64 + 32 / (64 * 256)
        assert _large.bits({"": plain}) == pytest.approx(4.5 + table)
        found = _large.bits({"": code})
        assert found == pytest.approx(4 + extra + table, abs=0.002)
        far = (code.decode() - plain.decode()).abs().max()
        assert far < 0.01 * W.abs().max()

    @pytest.mark.parametrize(
        "how", [{"sparsity": 0.5}, {"n": 2, "m": 4}], ids=["half", "2:4"]
    )
    def test_packed_is_on_a_grid_and_pays_for_it(self, layer, how):
        code = rules.packed(layer.W, layer.H, 4, **how)
        Q = code.decode()
        assert (Q == 0).double().mean() >= 0.5
        if "n" in how:
            assert ((Q.view(24, 8, 4) != 0).sum(2) <= 2).all()
        for row in Q.double():
            step = row.abs().max() / torch.arange(1.0, 8)[:, None]  # one fits
            off = row / step - (row / step).round()
            assert off.abs().amax(1).min() < 1e-4
        # a bit for the place, 4 for half of the weights, a scale for a row
        assert _large.bits({"": code}) == 1 + 4 / 2 + 32 / 32

    def test_packed_makes_up_for_both(self, layer):
        code = rules.packed(layer.W, layer.H, 3, sparsity=0.5)
        left = prune.sparsegpt(layer.W, layer.H.float(), sparsity=0.5).decode()
        after = quantize.mse(left, bits=3, symmetric=True)
        assert loss(layer, code) < 0.8 * loss(layer, after)

    def test_a_correction_lowers_the_loss_and_costs_its_factors(self, layer):
        plain = rules.gptq(layer.W, layer.H, 2)
        code = rules.patched(layer.W, layer.H, 2, rank=4)
        assert loss(layer, code) < 0.7 * loss(layer, plain)
        more = _large.bits({"": code}) - _large.bits({"": plain})
        assert more == 16 * 4 * (24 + 32) / (24 * 32)

    def test_factors_have_a_share_of_the_numbers(self, layer):
        for rule in (rules.svd, partial(rules.drone, H=layer.H)):
            code = rule(layer.W, ratio=0.5)
            assert 0.4 < (code.u.numel() + code.v.numel()) / 768 <= 0.5
        best = rules.drone(layer.W, layer.H, ratio=0.5)
        assert loss(layer, best) < loss(layer, rules.svd(layer.W, ratio=0.5))

    def test_every_row_can_be_made(self, encoder):
        def passages(count, draw):
            g = torch.Generator().manual_seed(draw)
            return [torch.randint(50, (4, 16), generator=g)]

        weights = pruned_encoder.blocks(encoder)
        bench = SimpleNamespace(
            model=encoder, weights=weights, passages=passages
        )
        seen = set()
        for family, ways in rules.FAMILIES.items():
            for method, keys, make, _ in ways():
                usual = {"sparsity": 0.5, "bits": 4} | keys
                if usual["sparsity"] != 0.5 or usual["bits"] not in (3, 4):
                    continue
                made = make(bench, 0)
                assert set(made) == set(weights), method
                for name, code in made.items():
                    assert codes.shape(code) == weights[name].shape
                seen.add((family, method))
        assert len(seen) == 9 + 4 + 2 + 2


def outputs(model, ids):
    with torch.no_grad():
        return torch.cat([model(x) for x in ids])


class TestEntering:
    @pytest.mark.parametrize("move", ["plain", "smooth", "turn"])
    def test_moving_keeps_the_product(self, layer, move):
        f, own, V = _entering.moved(layer.W, layer.stats, move, 0.5)
        moved = f(layer.X, **own) @ V.T
        assert torch.allclose(moved, layer.X @ layer.W.T, atol=1e-3)
        if move != "plain":
            ratio = _entering.spread(f(layer.X, **own))
            assert ratio < 0.5 * _entering.spread(layer.X)

    def test_only_what_is_explicit_keeps_a_post_norm_model(self, encoder, ids):
        """The residual connection reads the norm, too."""
        names = {"blocks.1.up.weight"}
        stats = calibrate.inputs(encoder, ids, where=lambda n, w: n in names)
        before = outputs(encoder, ids)
        how = {"weights": None, "inputs": None, "each": "token"}
        explicit = _entering.rounded(encoder, stats, move="smooth", **how)
        assert torch.allclose(outputs(explicit, ids), before, atol=1e-4)
        _, own, _ = _entering.moved(
            encoder.blocks[1].up.weight, stats["blocks.1.up.weight"], "smooth"
        )
        args = ("blocks.1.norm1", ["blocks.1.up"], own["s"])
        folded = quantize.move_scales(encoder, *args)
        assert (outputs(folded, ids) - before).abs().max() > 0.1

    def test_folding_keeps_a_pre_norm_model(self, ids):
        torch.manual_seed(0)
        model = models.LM(vocab=50, width=32, layers=2, ff=64, context=16)
        before = outputs(model.eval(), ids)
        stats = calibrate.inputs(model, ids)
        _, own, _ = _entering.moved(
            model.blocks[1].up.weight, stats["blocks.1.up.weight"], "smooth"
        )
        args = ("blocks.1.norm2", ["blocks.1.up"], own["s"])
        folded = quantize.move_scales(model, *args)
        assert torch.allclose(outputs(folded, ids), before, atol=1e-5)

    @pytest.mark.parametrize("move", ["plain", "smooth", "turn"])
    def test_rounds_both_by_hand(self, layer, move):
        model = torch.nn.Linear(32, 24, bias=False)
        model.weight.data.copy_(layer.W)
        how = {"weights": 8, "inputs": 4, "each": "token", "move": move}
        new = _entering.rounded(model, {"weight": layer.stats}, **how)
        f, own, V = _entering.moved(layer.W, layer.stats, move)
        x = f(layer.X[:9], **own)
        low = x.amin(1, keepdim=True).clamp(max=0)
        step = (x.amax(1, keepdim=True).clamp(min=0) - low) / 15
        zero = (-low / step).round()
        q = ((x / step).round() + zero).clamp(0, 15)
        y = (step * (q - zero)) @ quantize.mse(V, bits=8).decode().T
        with torch.no_grad():
            found = new(layer.X[:9])
        assert torch.allclose(found, y, rtol=1e-4, atol=1e-2)
        assert torch.equal(model.weight, layer.W)

    def test_a_fixed_grid_spans_what_was_seen(self, layer):
        for s in (1.0, torch.linspace(0.5, 2, 32)):
            own = _entering.grid(layer.stats, 8, s)
            x = layer.X / s
            zero, scale = float(own["zero"]), own["scale"]
            low, high = -zero * scale, (255 - zero) * scale
            assert float(low) == pytest.approx(float(x.min()), rel=0.01)
            assert float(high) == pytest.approx(float(x.max()), rel=0.01)

    def test_static_rounds_with_the_calibrated_range(self, layer):
        model = torch.nn.Linear(32, 24, bias=False)
        how = {"weights": None, "inputs": 2, "each": "static"}
        new = _entering.rounded(model, {"weight": layer.stats}, **how)
        own = _entering.grid(layer.stats, 2)
        far = torch.full((1, 32), 1e6)  # outside: the end of the grid
        end = (3 - own["zero"]) * own["scale"]
        with torch.no_grad():
            expected = model.weight.sum(1) * end
            assert torch.allclose(new(far)[0], expected, rtol=1e-4)

    def test_static_ranges_do_not_hold_after_a_turn(self, layer):
        model = torch.nn.Linear(32, 24)
        with pytest.raises(ValueError, match="each"):
            _entering.rounded(
                model,
                {"weight": layer.stats},
                weights=8,
                inputs=8,
                each="static",
                move="turn",
            )

    def test_outliers_are_found(self, layer):
        found = _entering.outliers(layer.W, layer.stats)
        most = layer.X.abs().amax(0)
        assert found["channel"] == 5
        assert found["over 6"] == int((most >= 6).sum())
        ratio = float(most.max() / most.median())
        assert found["ratio"] == pytest.approx(ratio, abs=0.01)
        assert found["turn"] < found["smooth"] < 0.5 * found["ratio"]


class TestJobs:
    def test_draws_are_joined(self):
        rows = [{"effective": 3.00004, "cosine": 0.5, "lost": 1}, {"cosine": 1}]
        rows[1]["effective"] = 3.00004
        assert large_encoder.joined(rows) == {
            "effective": 3.0,
            "cosine": [0.5, 1],
            "lost": [1],
        }

    def test_bits_are_chosen_and_spent(self, encoder, ids):
        weights = pruned_encoder.blocks(encoder)
        names = set(weights)
        stats = calibrate.inputs(encoder, ids, where=lambda n, w: n in names)

        def compare(model):
            far = (outputs(model, ids) - outputs(encoder, ids)).norm()
            return {"cosine": 1 - float(far)}

        bench = SimpleNamespace(
            model=encoder,
            weights=weights,
            stats=lambda: stats,
            few=SimpleNamespace(compare=compare),
            passages=lambda count, draw: ids,
            measure=lambda model: compare(model),
        )
        found = large_encoder.chosen(bench)["chosen"]
        assert [(c["by"], c["budget"]) for c in found] == [
            ("outputs", 3),
            ("outputs", 4),
            ("cosine", 3),
            ("cosine", 4),
        ]
        for choice in found:
            assert set(choice["bits"]) == names
            uniform = {n: choice["budget"] for n in names}
            uneven = large_encoder.mixed(bench, choice["bits"], 0)
            even = large_encoder.mixed(bench, uniform, 0)
            assert uneven["effective"] <= even["effective"]
        assert len({*found[0]["bits"].values()}) > 1


class TestResult:
    """What the stored numbers say, with margins, in every draw."""

    def test_draws(self, result):
        assert result["text"]["draws"] == large_encoder.DRAWS == 3
        for row in result["rows"]:
            assert len(row["cosine"]) == len(row["neighbor"])
            assert all(0 < c <= 1 for c in row["cosine"])
            assert max(row["cosine"]) - min(row["cosine"]) < 0.02, row

    @pytest.mark.parametrize("group", [None, 64])
    @pytest.mark.parametrize("bits, margin", [(4, 0.01), (3, 0.05), (2, 0.15)])
    def test_gptq_beats_rounding(self, find, bits, group, margin):
        keys = {"bits": bits, "group": group}
        rounded = find("rounding", **keys)
        gptq = find("GPTQ", **keys)
        assert rounded["effective"] == gptq["effective"]
        assert min(gptq["cosine"]) > rounded["cosine"][0] + margin

    @pytest.mark.parametrize("bits", [4, 3, 2])
    def test_a_turn_helps_gptq_without_groups(self, find, bits):
        turned = find("rotation + GPTQ", bits=bits)
        grouped = find("GPTQ", bits=bits, group=64)
        assert turned["effective"] < grouped["effective"] - 0.4
        assert min(turned["cosine"]) > max(grouped["cosine"]) - 0.002

    @pytest.mark.parametrize(
        "keys",
        [
            {"sparsity": 0.5, "pattern": None},
            {"sparsity": 0.6, "pattern": None},
            {"sparsity": 0.5, "pattern": "2:4"},
        ],
        ids=["50 %", "60 %", "2:4"],
    )
    def test_what_sees_inputs_prunes_better(self, find, keys):
        size, wanda, repaired = (
            find(m, **keys)["cosine"]
            for m in ("magnitude", "Wanda", "SparseGPT")
        )
        assert min(wanda) > size[0] + 0.1
        assert min(repaired) > max(wanda) + 0.03

    @pytest.mark.parametrize("ratio", [0.9, 0.7, 0.5])
    def test_low_rank_needs_the_inputs(self, find, ratio):
        aware = find("DRONE", ratio=ratio)["cosine"]
        assert min(aware) > find("SVD", ratio=ratio)["cosine"][0] + 0.2

    def test_at_three_bits_levels_beat_zeros(self, find):
        gptq = find("GPTQ", bits=3, group=None)
        joint = find("SparseGPT + bits", bits=4, sparsity=0.5, pattern=None)
        assert joint["effective"] <= gptq["effective"]
        assert min(gptq["cosine"]) > max(joint["cosine"]) + 0.01

    def test_a_turn_suffices_for_eight_bits_for_all(self, result):
        rows = {
            (r["weights"], r["inputs"], r["each"], r["move"]): r["cosine"][0]
            for r in result["activations"]
            if r["alpha"] in (None, 0.5)
        }
        for each in ("tensor", "token"):
            turned = rows[8, 8, each, "turn"]
            assert turned > rows[8, 8, each, "plain"]
            assert turned > 0.999
        plain, turned = (rows[4, 4, "token", m] for m in ("plain", "turn"))
        assert turned > plain + 0.03

    def test_more_text_helps_and_its_own_flatters(self, result):
        rows = {
            (r["method"], r["text"], r["count"]): r
            for r in result["calibration"]
        }
        for method in ("GPTQ", "SparseGPT"):
            found = [
                min(rows[method, "reference", n]["cosine"])
                for n in large_encoder.COUNTS
            ]
            assert found == sorted(found)
            few = rows[method, "reference", 1]
            pairs = zip(few["own"], few["others"], strict=True)
            assert all(own > other + 0.1 for own, other in pairs)

    def test_too_little_or_wrong_text_is_worse_than_none(self, result, find):
        rounded = find("rounding", bits=3, group=None)["cosine"][0]
        for row in result["calibration"]:
            few = row["count"] < 16 or row["text"] == "random"
            if row["method"] == "GPTQ" and few:
                assert max(row["cosine"]) < rounded - 0.03
                assert min(row["own"]) > rounded + 0.05

    def test_bits_follow_what_is_measured(self, result, find):
        """Equal errors of the outputs are not equally important."""
        for row in result["mixed"]["rows"]:
            even = find("GPTQ", bits=row["budget"], group=None)
            assert row["effective"] <= even["effective"]
            if row["by"] == "cosine":
                assert min(row["cosine"]) > max(even["cosine"])
            else:
                assert max(row["cosine"]) < min(even["cosine"])

    def test_smoothing_assumes_flat_weights(self, result):
        """One unit of `down` is the outlier of inputs and weights alike."""
        found = {r["name"]: r for r in result["outliers"]}
        for i in range(6):
            up, down = (found[f"blocks.{i}.{n}.weight"] for n in ("up", "down"))
            assert up["channel"] == 99 and up["smooth"] < 0.5 * up["ratio"]
            assert max(up["turn"], down["turn"]) < 2.1
            if i < 4:
                assert down["smooth"] > 1.5 * down["ratio"]
                assert down["weights"] > 5 * down["weights, turned"]
        rows = {
            (r["move"], r["alpha"]): r["cosine"]
            for r in result["activations"]
            if (r["weights"], r["inputs"], r["each"]) == (8, 8, "static")
        }
        plain = rows["plain", None]
        assert max(rows["smooth", 0.5]) < min(plain) - 0.004
        assert min(rows["smooth", 0.75]) > max(plain) + 0.004
