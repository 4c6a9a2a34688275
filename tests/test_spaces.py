"""Spaces of architectures, and the small networks for digits."""

import itertools
import json
import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from minicompress import nas
from minicompress.nas import chains, spaces

SPACE = nas.Space(
    {"width": (8, 16, 32), "op": ("conv", "pool"), "skip": (0, 1)}
)
ODD = SPACE.where(lambda a: a["op"] == "conv" or not a["skip"])
DIGITS = nas.digits_space()

some_spaces = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.lists(st.integers(0, 9), unique=True, min_size=1, max_size=4),
    min_size=1,
    max_size=4,
).map(nas.Space)
seeds = st.integers(0, 99).map(random.Random)


def distance(a, b):
    return sum(a[name] != b[name] for name in a)


class TestSpace:
    @given(some_spaces)
    def test_enumerates_the_product(self, space):
        members = [tuple(arch.values()) for arch in space]
        assert members == list(itertools.product(*space.choices.values()))
        assert len(members) == space.size

    @given(some_spaces, seeds)
    def test_decodes_what_it_encodes(self, space, rng):
        arch = space.sample(rng)
        assert space.decode(space.encode(arch)) == arch
        assert json.loads(json.dumps(arch)) == arch

    def test_encodes_in_the_order_of_enumeration(self):
        codes = [SPACE.encode(arch) for arch in SPACE]
        assert codes == sorted(codes)
        assert len({*codes}) == SPACE.size

    def test_where_keeps_what_was_excluded_before(self):
        want = [a for a in SPACE if a["op"] == "conv" or not a["skip"]]
        assert list(ODD) == want
        narrow = ODD.where(lambda a: a["width"] == 8)
        assert list(narrow) == [a for a in want if a["width"] == 8]
        assert len(list(SPACE)) == 12  # itself unchanged

    def test_samples_every_valid_one_equally_often(self):
        rng = random.Random(0)
        drawn = Counter(ODD.encode(ODD.sample(rng)) for _ in range(4500))
        assert {*drawn} == {ODD.encode(arch) for arch in ODD}
        assert chisquare(list(drawn.values())).pvalue > 0.01

    def test_equal_seeds_draw_equal_ones(self):
        a, b = random.Random(3), random.Random(3)
        assert [SPACE.sample(a) for _ in range(9)] == [
            SPACE.sample(b) for _ in range(9)
        ]

    @given(seeds)
    def test_a_mutant_is_valid_and_one_change_away(self, rng):
        arch = ODD.sample(rng)
        before = dict(arch)
        child = ODD.mutate(arch, rng)
        assert ODD.accepts(child) and distance(arch, child) == 1
        assert arch == before and list(child) == list(arch)

    def test_mutates_each_choice_equally_often(self):
        rng, arch = random.Random(0), next(iter(SPACE))
        children = [SPACE.mutate(arch, rng) for _ in range(30000)]
        changed = Counter(
            name for c in children for name in arch if c[name] != arch[name]
        )
        assert chisquare([*changed.values()]).pvalue > 0.01
        widths = Counter(c["width"] for c in children if c["width"] > 8)
        assert chisquare([*widths.values()]).pvalue > 0.01

    def test_mutation_reaches_every_member(self):
        rng, seen = random.Random(0), set()
        arch = ODD.sample(rng)
        for _ in range(400):
            arch = ODD.mutate(arch, rng)
            seen.add(ODD.encode(arch))
        assert len(seen) == len(list(ODD))

    @given(seeds)
    def test_a_child_has_nothing_that_no_parent_has(self, rng):
        a, b = ODD.sample(rng), ODD.sample(rng)
        child = ODD.cross(a, b, rng)
        assert ODD.accepts(child)
        assert all(child[name] in (a[name], b[name]) for name in child)
        assert ODD.cross(a, a, rng) == a

    def test_crosses_uniformly(self):
        rng = random.Random(0)
        a, b = SPACE.decode((0, 0, 0)), SPACE.decode((2, 1, 1))
        counts = Counter(
            SPACE.encode(SPACE.cross(a, b, rng)) for _ in range(4000)
        )
        assert len(counts) == 8
        assert chisquare([*counts.values()]).pvalue > 0.01

    def test_crosses_to_a_copy_where_no_child_is_valid(self):
        only = [{"x": 0, "y": 1}, {"x": 1, "y": 0}]
        space = nas.Space({"x": (0, 1), "y": (0, 1)}, valid=lambda a: a in only)
        rng = random.Random(0)
        children = [space.cross(*only, rng) for _ in range(20)]
        assert all(child in only for child in children)
        none = nas.Space(space.choices, valid=lambda a: False)
        child = none.cross(*only, rng)
        assert child == only[0] and child is not only[0]

    def test_cannot_be_changed_through_what_it_was_made_of(self):
        choices = {"a": [1, 2]}
        space = nas.Space(choices)
        choices["a"].append(3)
        choices["b"] = [1]
        assert space.choices == {"a": (1, 2)}

    @pytest.mark.parametrize(
        ("choices", "message"),
        [
            ({}, "at least one name"),
            ({"a": ()}, r"choices\['a'\]: \(\) are not distinct"),
            ({"a": (1, 2, 1)}, "not distinct"),
            ({"a": (1, 1.0)}, "not distinct"),
            ({"a": ((1, 2), (3, 4))}, r"choices\['a'\]: JSON keeps no"),
        ],
    )
    def test_refuses_choices(self, choices, message):
        with pytest.raises(ValueError, match=message):
            nas.Space(choices)

    @pytest.mark.parametrize(
        ("arch", "message"),
        [
            ({"width": 8, "op": "conv"}, "arch: .*'op'"),
            ({"width": 9, "op": "conv", "skip": 0}, "'width' cannot be 9"),
        ],
    )
    def test_refuses_to_encode(self, arch, message):
        with pytest.raises(ValueError, match=message):
            SPACE.encode(arch)

    @pytest.mark.parametrize("positions", [(0, 0), (0, 0, 2), (-1, 0, 0)])
    def test_refuses_to_decode(self, positions):
        with pytest.raises(ValueError, match=r"positions: .*\[3, 2, 2\]"):
            SPACE.decode(positions)

    def test_says_when_nothing_is_valid(self, monkeypatch):
        monkeypatch.setattr(spaces, "TRIES", 50)
        none = SPACE.where(lambda a: False)
        with pytest.raises(ValueError, match="refused 50 random"):
            none.sample(random.Random(0))
        with pytest.raises(ValueError, match="one change from"):
            none.mutate(next(iter(SPACE)), random.Random(0))


class TestDigits:
    def test_counts(self):
        assert DIGITS.size == 2 * 5**4
        # of 25 pairs, 4 have a skip only in the first place
        assert len(list(DIGITS)) == 2 * 21**2
        assert len(list(nas.digits_space((2, 4, 6)))) == 3 * 21**2

    def test_lists_each_order_of_operations_once(self):
        def computed(arch):
            ops = [[arch[f"layer{i}"] for i in p] for p in ((1, 2), (3, 4))]
            return arch["width"], *(
                tuple(op for op in pair if op != "skip") for pair in ops
            )

        names = [computed(arch) for arch in DIGITS]
        assert len({*names}) == len(names)
        everything = nas.Space(DIGITS.choices)
        assert {computed(arch) for arch in everything} == {*names}

    @pytest.mark.parametrize("seed", range(5))
    def test_a_network_has_the_layers_of_its_architecture(self, seed):
        arch = DIGITS.sample(random.Random(seed))
        net = nas.digits_network(arch).eval()
        c = arch["width"]
        kernels = {"conv1": 1, "conv3": 3, "conv5": 5}
        params = 9 * c + 2 * c + c * 2 * c + 4 * c + (2 * c + 1) * 10
        for i, n in zip((1, 2, 3, 4), (c, c, 2 * c, 2 * c), strict=True):
            if k := kernels.get(arch[f"layer{i}"]):
                params += n * n * k * k + 2 * n
        assert sum(p.numel() for p in net.parameters()) == params
        assert net(torch.rand(3, 64)).shape == (3, 10)

    @pytest.mark.parametrize("op", chains.OPS)
    def test_operations_keep_the_shape(self, op):
        x = torch.rand(2, 6, 4, 4)
        assert chains.operation(op, 6).eval()(x).shape == x.shape

    def test_refuses_another_operation(self):
        arch = {**next(iter(DIGITS)), "layer3": "conv7"}
        with pytest.raises(ValueError, match="'conv7' is none of"):
            nas.digits_network(arch)

    def test_other_classes(self):
        net = nas.digits_network(next(iter(DIGITS)), classes=3).eval()
        assert net(torch.rand(1, 64)).shape == (1, 3)
