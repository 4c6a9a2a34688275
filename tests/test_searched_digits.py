"""The table that judges the searches says what training says."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from minicompress import measure, nas, train

FOLDER = Path(__file__).resolve().parents[1] / "chapters"
TABLE = json.loads((FOLDER / "results" / "searched_digits.json").read_text())
ROWS = TABLE["rows"]
ARCHS = list(nas.digits_space())


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(FOLDER / "experiments"))
    try:
        import searched_digits
    finally:
        sys.path.pop(0)
    return searched_digits


@pytest.fixture(scope="module")
def sample(script):
    """Train a random sample again: (steps, stored, new) validation errors."""
    rng = random.Random(20)
    found = []
    with train.threads(1):
        for steps, n in ((45, 12), (180, 6)):
            for i in rng.sample(range(len(ARCHS)), n):
                seed = rng.randrange(TABLE["seeds"])
                net = script.trained(ARCHS[i], steps, seed)
                new = script.errors(net, *script.parts()[1])[0]
                found.append((steps, ROWS[i][str(steps)][seed][0], new))
    return found


class TestTable:
    def test_has_every_network_once(self):
        assert len(ROWS) == len(ARCHS) == 882

    def test_is_of_this_space(self):
        assert {k: tuple(v) for k, v in TABLE["choices"].items()} == (
            nas.digits_space().choices
        )

    @pytest.mark.parametrize("steps", (45, 90, 180))
    def test_has_every_seed(self, steps):
        for row in ROWS:
            runs = row[str(steps)]
            assert len(runs) == TABLE["seeds"]
            for val, _, test, _ in runs:
                assert 0 <= val <= TABLE["sizes"]["val"]
                assert 0 <= test <= TABLE["sizes"]["test"]

    def test_costs_are_those_of_the_networks(self):
        for i in random.Random(0).sample(range(len(ARCHS)), 30):
            net = nas.digits_network(ARCHS[i])
            assert ROWS[i]["params"] == measure.params(net)
            assert ROWS[i]["macs"] == measure.macs(net, torch.zeros(1, 64))

    def test_parts_share_no_image(self, script):
        fit, val, test = script.parts()
        rows = torch.cat([fit[0], val[0], test[0]])
        assert len(fit[0]) == 300
        assert (len(val[0]), len(test[0])) == tuple(TABLE["sizes"].values())
        assert len(rows) == 1797


class TestSample:
    def test_is_ordered_like_the_table(self, sample):
        for steps in (45, 180):
            pairs = [(a, b) for s, a, b in sample if s == steps]
            assert nas.spearman(*zip(*pairs, strict=True)) > 0.8

    def test_differs_from_the_table_less_than_seeds_do(self, sample):
        for steps in (45, 180):
            seeds = [[run[0] for run in row[str(steps)]] for row in ROWS]
            apart = sum(abs(a - b) for a, b, *_ in seeds) / len(seeds)
            new = [abs(a - b) for s, a, b in sample if s == steps]
            assert sum(new) / len(new) < apart
