"""Masks: optimal, exact to the last tie, equal to torch's own pruning."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as torch_prune

from minicompress import measure
from minicompress.prune import masks

HALF = [torch.float16, torch.bfloat16]
FLOATS = [*HALF, torch.float32, torch.float64]
SPARSITIES = [0.0, 0.1, 0.3, 0.5, 0.77, 0.9, 1.0]


def normal(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=dtype)


def by_sorting(scores, sparsity):
    """Sort all (score, -index) pairs; what `keep` must equal."""
    flat = scores.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[: len(flat) - round(sparsity * len(flat))]] = True
    return mask.view(scores.shape)


# few values, so that ties are the rule
tied = st.lists(st.sampled_from([-math.inf, -1, 0, 1, 2, math.inf]), max_size=9)
fractions = st.floats(0, 1)


class TestKeep:
    @pytest.mark.parametrize("n", range(1, 10))
    def test_no_mask_loses_less(self, n):
        w = normal(n, seed=n, dtype=torch.float64)
        for removed in range(n + 1):
            mask = masks.magnitude(w, sparsity=removed / n)
            assert int(mask.sum()) == n - removed
            losses = [
                float((w[list(gone)] ** 2).sum())
                for gone in combinations(range(n), removed)
            ]
            lost = float((w[~mask] ** 2).sum())
            assert lost == pytest.approx(min(losses), abs=1e-15)

    @given(tied, fractions)
    @settings(max_examples=300, deadline=None)
    def test_equals_sorting_with_ties(self, values, sparsity):
        s = torch.tensor(values, dtype=torch.float32)
        want = by_sorting(s, sparsity)
        assert torch.equal(masks.keep(s, sparsity=sparsity), want)

    @given(
        st.integers(1, 200),
        fractions,
        st.sampled_from([*FLOATS, torch.int32, torch.int64]),
        st.integers(0, 99),
    )
    @settings(max_examples=200, deadline=None)
    def test_exact_count_in_every_type(self, n, sparsity, dtype, seed):
        s = (3 * normal(n, seed=seed)).to(dtype)
        mask = masks.keep(s, sparsity=sparsity)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, by_sorting(s, sparsity))
        assert int((~mask).sum()) == round(sparsity * n)
        mask = masks.magnitude(s, sparsity=sparsity)
        assert torch.equal(mask, by_sorting(s.abs(), sparsity))

    @pytest.mark.parametrize("value", [0.0, -0.0, 1.5])
    @pytest.mark.parametrize("sparsity", SPARSITIES)
    def test_of_equal_scores_the_first_stay(self, value, sparsity):
        s = torch.full((30, 40), value)
        n = 1200 - round(1200 * sparsity)
        mask = masks.keep(s, sparsity=sparsity).flatten()
        assert mask[:n].all()
        assert not mask[n:].any()

    @given(fractions, fractions, st.booleans())
    @settings(deadline=None)
    def test_masks_are_nested(self, a, b, ties):
        w = normal(20, 11)
        w = w.round() if ties else w
        small, large = sorted((a, b))
        loose = masks.magnitude(w, sparsity=small)
        tight = masks.magnitude(w, sparsity=large)
        assert not (tight & ~loose).any()

    @given(fractions, st.integers(-20, 20))
    @settings(deadline=None)
    def test_scale_does_not_matter(self, sparsity, exponent):
        w = normal(17, 9)
        a = masks.magnitude(w, sparsity=sparsity)
        b = masks.magnitude(-(2.0**exponent) * w, sparsity=sparsity)
        assert torch.equal(a, b)

    @pytest.mark.parametrize("sparsity", SPARSITIES)
    def test_equals_torch(self, sparsity):
        layer = nn.Linear(30, 50)
        mask = masks.magnitude(layer.weight, sparsity=sparsity)
        torch_prune.l1_unstructured(layer, "weight", sparsity)
        assert torch.equal(mask, layer.weight_mask.bool())

    def test_everything_removed_leaves_the_bias(self):
        layer = nn.Linear(4, 3)
        with torch.no_grad():
            layer.weight *= masks.magnitude(layer.weight, sparsity=1)
        assert torch.equal(layer(normal(1, 4))[0], layer.bias)

    @pytest.mark.parametrize("sparsity", [0.3, 0.4, 0.5, 0.8, 0.9])
    def test_energy_lost_on_gaussian_weights(self, sparsity):
        w = normal(1_000_000, dtype=torch.float64)
        mask = masks.magnitude(w, sparsity=sparsity)
        t = math.sqrt(2) * float(torch.erfinv(torch.tensor(sparsity).double()))
        density = math.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
        want = sparsity - 2 * t * density
        known = {0.3: 0.0146, 0.4: 0.0353, 0.5: 0.0713, 0.8: 0.3502}
        assert want == pytest.approx({**known, 0.9: 0.5607}[sparsity], abs=5e-5)
        got = float((w[~mask] ** 2).sum() / (w**2).sum())
        # standard error of a trimmed mean divided by a mean
        spread = (w**2).clamp(max=t**2) - want * w**2
        assert abs(got - want) < 4 * float(spread.std()) / 1000

    def test_layout_does_not_matter(self):
        s = normal(6, 5, 4, 3)
        want = masks.keep(s, sparsity=0.4)
        for other in (
            s.contiguous(memory_format=torch.channels_last),
            s.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        ):
            assert torch.equal(masks.keep(other, sparsity=0.4), want)
            assert torch.equal(
                masks.magnitude(other, sparsity=0.4),
                masks.magnitude(s, sparsity=0.4),
            )

    def test_without_numpy(self, monkeypatch):
        """The way that tensors on an accelerator take."""
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)
        s = normal(8, 12).round()
        for sparsity in SPARSITIES:
            mask = masks.keep(s, sparsity=sparsity)
            assert torch.equal(mask, by_sorting(s, sparsity))
            rows = masks.keep_rows(s, sparsity=sparsity)
            for row, m in zip(s, rows, strict=True):
                assert torch.equal(m, by_sorting(row, sparsity))

    def test_one_copy_of_the_weights_in_memory(self):
        W = normal(500, 400)
        peak = measure.peak_memory(lambda: masks.magnitude(W, sparsity=0.9))
        assert peak < 1.3 * W.nbytes


class TestGlobal:
    @given(st.lists(tied, max_size=4), fractions)
    @settings(max_examples=200, deadline=None)
    def test_equals_one_long_tensor(self, lists, sparsity):
        scores = {str(i): torch.tensor(v).float() for i, v in enumerate(lists)}
        got = masks.keep_global(scores, sparsity=sparsity)
        assert list(got) == list(scores)
        if lists:
            joined = torch.cat([*scores.values()])
            want = by_sorting(joined, sparsity)
            assert torch.equal(torch.cat([*got.values()]), want)

    @pytest.mark.parametrize("sparsity", SPARSITIES)
    def test_equals_torch(self, sparsity):
        model = nn.Sequential(nn.Linear(9, 20), nn.Conv2d(3, 5, 3))
        scores = {n: w.abs() for n, w in model.named_parameters() if w.ndim > 1}
        got = masks.keep_global(scores, sparsity=sparsity)
        torch_prune.global_unstructured(
            [(m, "weight") for m in model],
            torch_prune.L1Unstructured,
            amount=sparsity,
        )
        for i, layer in enumerate(model):
            assert torch.equal(got[f"{i}.weight"], layer.weight_mask.bool())

    def test_types_are_compared_as_numbers(self):
        # 0.1 is 0.0999756 in float16, and must be told apart from 0.1
        small = torch.tensor([0.1, 0.1]).half()
        large = torch.tensor([0.1, 0.1])
        got = masks.keep_global({"a": small, "b": large}, sparsity=0.5)
        assert not got["a"].any()
        assert got["b"].all()
        both = {"a": normal(50).bfloat16(), "b": normal(50, seed=1).half()}
        got = masks.keep_global(both, sparsity=0.3)
        want = by_sorting(torch.cat([x.float() for x in both.values()]), 0.3)
        assert torch.equal(torch.cat([*got.values()]), want)

    def test_small_layers_can_be_emptied_only_globally(self):
        scores = {"a": normal(100).abs() / 1000, "b": normal(100).abs()}
        together = masks.keep_global(scores, sparsity=0.5)
        assert masks.sparsity(together["a"]) > 0.9
        each = masks.keep_each(scores, sparsity=0.5)
        assert [masks.sparsity(m) for m in each.values()] == [0.5, 0.5]
        assert masks.sparsity(together) == masks.sparsity(each) == 0.5


class TestRows:
    @given(
        st.integers(0, 6),
        st.integers(0, 12),
        fractions,
        st.booleans(),
        st.sampled_from(FLOATS),
    )
    @settings(max_examples=200, deadline=None)
    def test_every_row_by_itself(self, out, n, sparsity, ties, dtype):
        s = normal(out, n)
        s = (s.round() if ties else s).to(dtype)
        got = masks.keep_rows(s, sparsity=sparsity)
        assert got.shape == s.shape
        for row, mask in zip(s, got, strict=True):
            assert torch.equal(mask, by_sorting(row, sparsity))

    def test_a_row_of_a_kernel_is_a_filter(self):
        s = normal(4, 3, 2, 2)
        got = masks.keep_rows(s, sparsity=0.5)
        assert torch.equal(
            got.flatten(1), masks.keep_rows(s.flatten(1), sparsity=0.5)
        )
        assert (got.flatten(1).sum(1) == 6).all()

    def test_as_a_rule_for_every_tensor(self):
        s = normal(4, 6)
        got = masks.keep_each({"a": s}, sparsity=0.5, rule=masks.keep_rows)
        assert torch.equal(got["a"], masks.keep_rows(s, sparsity=0.5))
        assert not torch.equal(got["a"], masks.keep(s, sparsity=0.5))


class TestGroups:
    def test_no_choice_of_two_in_four_loses_less(self):
        w = normal(50, 8, dtype=torch.float64)
        mask = masks.n_m(w.abs())
        for row, m in zip(w.view(-1, 4), mask.view(-1, 4), strict=True):
            assert int(m.sum()) == 2
            kept = [
                float(row[list(c)].norm())
                for c in combinations((*range(4),), 2)
            ]
            assert float(row[m].norm()) == pytest.approx(max(kept), abs=1e-15)

    @given(
        st.integers(1, 9),
        st.data(),
        st.booleans(),
        st.sampled_from(FLOATS),
    )
    @settings(max_examples=200, deadline=None)
    def test_equals_the_largest_of_each_group(self, m, data, ties, dtype):
        n = data.draw(st.integers(0, m))
        s = normal(3, 4 * m, seed=m)
        s = (s.round() if ties else s).to(dtype)
        got = masks.n_m(s, n=n, m=m)
        for group, mask in zip(s.view(-1, m), got.view(-1, m), strict=True):
            assert torch.equal(mask, by_sorting(group, 1 - n / m))

    def test_longer_than_a_chunk_and_wider_than_a_byte(self, monkeypatch):
        s = normal(600)
        want = by_sorting(s[:300], 1 / 3), by_sorting(s[300:], 1 / 3)
        assert torch.equal(masks.n_m(s, n=200, m=300), torch.cat(want))
        whole = masks.n_m(s)
        monkeypatch.setattr(masks, "CHUNK", 28)
        assert torch.equal(masks.n_m(s), whole)
        monkeypatch.setattr(masks, "CHUNK", 1)
        assert torch.equal(masks.n_m(s), whole)

    def test_groups_of_a_kernel_run_along_its_flat_inputs(self):
        s = normal(4, 2, 3, 2)
        want = masks.n_m(s.flatten(1)).view(s.shape)
        assert torch.equal(masks.n_m(s), want)
        strided = s.contiguous(memory_format=torch.channels_last)
        assert torch.equal(masks.n_m(strided), want)

    @pytest.mark.parametrize(
        ("n", "m", "known"),
        [(4, 8, 0.10331), (2, 4, 0.13245), (1, 2, (1 - 2 / math.pi) / 2)],
    )
    def test_energy_lost_on_gaussian_weights(self, n, m, known):
        # w goes if at most m - n - 1 of its m - 1 neighbors are smaller
        x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
        F = torch.erf(x.abs() / math.sqrt(2))
        gone = sum(
            math.comb(m - 1, k) * F**k * (1 - F) ** (m - 1 - k)
            for k in range(m - n)
        )
        normal_density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        want = float(torch.trapezoid(x**2 * normal_density * gone, x))
        assert want == pytest.approx(known, abs=5e-6)
        w = normal(840_000 // m, m, dtype=torch.float64)
        lost = (w * ~masks.n_m(w.abs(), n=n, m=m)).square().sum(1)
        total = w.square().sum(1)
        error = (lost - want * total).std() / m / math.sqrt(len(w))
        assert abs(float(lost.sum() / total.sum()) - want) < 4 * float(error)

    def test_freer_choice_loses_less(self):
        w = normal(1000, 80)
        found = [
            masks.magnitude(w, sparsity=0.5),
            *(masks.n_m(w.abs(), n=n, m=2 * n) for n in (4, 2, 1)),
        ]
        lost = [float((w * ~mask).square().sum()) for mask in found]
        assert lost == sorted(lost)
        assert [masks.sparsity(mask) for mask in found] == [0.5] * 4


class TestOthers:
    def test_threshold_depends_on_the_scale(self):
        w = normal(1000)
        tau = float(w.std())
        mask = masks.threshold(w.abs(), tau)
        assert torch.equal(mask, w.abs() >= tau)
        assert masks.threshold(torch.tensor([tau]), tau).all()
        assert masks.sparsity(masks.threshold(w.abs() / 10, tau)) > 0.99

    @given(st.integers(0, 300), fractions, st.integers(0, 5))
    @settings(deadline=None)
    def test_random_counts(self, n, sparsity, seed):
        w = torch.zeros(n)
        mask = masks.random(w, sparsity=sparsity, seed=seed)
        assert int((~mask).sum()) == round(sparsity * n)
        again = masks.random(w, sparsity=sparsity, seed=seed)
        assert torch.equal(mask, again)

    def test_random_is_even_and_leaves_the_global_state(self):
        w = torch.zeros(100)
        state = torch.get_rng_state()
        draws = [masks.random(w, sparsity=0.3, seed=i) for i in range(400)]
        assert torch.equal(torch.get_rng_state(), state)
        kept = torch.stack(draws).float().mean(0)  # 0.7, error 0.023
        assert (kept - 0.7).abs().max() < 5 * 0.023

    def test_sparsity(self):
        mask = torch.tensor([True, False])
        assert masks.sparsity(mask) == 0.5
        assert masks.sparsity({"a": mask, "b": torch.ones(6).bool()}) == 0.125
        with pytest.raises(ValueError, match="mask is empty"):
            masks.sparsity({})


class TestRigL:
    @given(
        st.integers(0, 40),
        fractions,
        fractions,
        st.booleans(),
        st.integers(0, 9),
    )
    @settings(max_examples=200, deadline=None)
    def test_drops_small_weights_and_grows_large_gradients(
        self, n, sparsity, fraction, ties, seed
    ):
        W, grad = normal(n, seed=seed), normal(n, seed=seed + 10)
        if ties:
            W, grad = W.round(), grad.round()
        mask = masks.random(W, sparsity=sparsity, seed=seed)
        new = masks.rigl(W, grad, mask, fraction=fraction)
        assert int(new.sum()) == int(mask.sum())  # memory stays the same
        moved = round(fraction * int(mask.sum()))
        kept = mask.nonzero()[:, 0].tolist()
        kept.sort(key=lambda i: (-abs(float(W[i])), i))
        stays = set(kept[: len(kept) - moved])
        rest = [i for i in range(n) if i not in stays]
        rest.sort(key=lambda i: (-abs(float(grad[i])), i))
        want = stays | set(rest[:moved])
        assert set(new.nonzero()[:, 0].tolist()) == want

    def test_function_changes_by_what_is_dropped_only(self):
        W, grad = normal(6, 8), normal(6, 8, seed=1)
        mask = masks.random(W, sparsity=0.5)
        new = masks.rigl(W, grad, mask, fraction=0.3)
        after = torch.where(mask & new, W, 0)  # grown weights start at 0
        dropped = mask & ~new
        assert dropped.any()
        assert torch.equal(W * mask - after, W * dropped)


RULES = {
    "keep": lambda s: masks.keep(s, sparsity=0.5),
    "magnitude": lambda s: masks.magnitude(s, sparsity=0.5),
    "keep_each": lambda s: masks.keep_each({"a": s}, sparsity=0.5)["a"],
    "keep_global": lambda s: masks.keep_global({"a": s}, sparsity=0.5)["a"],
    "keep_rows": lambda s: masks.keep_rows(s, sparsity=0.5),
    "n_m": masks.n_m,
    "threshold": lambda s: masks.threshold(s, 0.1),
    "rigl": lambda s: masks.rigl(
        s, s, masks.random(s, sparsity=0.5), fraction=0.2
    ),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
class TestEveryRule:
    @pytest.mark.parametrize("dtype", FLOATS)
    def test_inputs_stay_as_they_are(self, rule, dtype):
        s = nn.Parameter(normal(6, 8).to(dtype))
        before = s.detach().clone()
        mask = rule(s)
        assert torch.equal(s, before)
        assert mask.dtype == torch.bool
        assert mask.shape == s.shape
        assert mask.data_ptr() != s.data_ptr()

    def test_nan_is_refused(self, rule):
        s = normal(6, 8)
        s[3, 2] = torch.nan
        with pytest.raises(ValueError, match=r"(6, 8).* holds nan"):
            rule(s)


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, 30, math.nan])
def test_sparsity_is_a_fraction(sparsity):
    W = normal(2, 4)
    for call in (masks.keep, masks.magnitude, masks.keep_rows, masks.random):
        with pytest.raises(ValueError, match=f"sparsity.*{sparsity}"):
            call(W, sparsity=sparsity)
    for call in (masks.keep_global, masks.keep_each):
        with pytest.raises(ValueError, match=f"sparsity.*{sparsity}"):
            call({"a": W}, sparsity=sparsity)
    mask = torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"fraction.*{sparsity}"):
        masks.rigl(W, W, mask, fraction=sparsity)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"scores.*rows of 6.*m=4"):
        masks.n_m(torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"n must be at most m.*5:4"):
        masks.n_m(torch.zeros(4, 8), n=5)
    with pytest.raises(ValueError, match=r"scores must have rows.*\(3,\)"):
        masks.keep_rows(torch.zeros(3), sparsity=0.5)
    with pytest.raises(ValueError, match=r"scores\['b'\]"):
        masks.keep_global({"b": torch.tensor([torch.nan])}, sparsity=0.5)
    with pytest.raises(ValueError, match="mask must be bool"):
        masks.rigl(torch.zeros(4), torch.zeros(4), torch.zeros(4), fraction=0.5)
