"""The small files of chapter 11: their bytes, their shapes, their errors."""

import json
import os
from pathlib import Path

import pytest
import torch

from minicompress import data, measure, models, storage, zoo

RESULTS = Path(__file__).parents[1] / "chapters/results/compressed_mnist.json"
RUNS = json.loads(RESULTS.read_text("utf8"))["runs"]
NETWORKS = {
    "mnist-lenet-300-100": ("lenet-300-100", models.lenet_300_100),
    "mnist-lenet-5": ("lenet-5", models.LeNet5),
    "mnist-lenet-5-smaller": ("lenet-5, smaller", models.LeNet5),
}
LEAST = {  # compression ratio, and most test error in percent
    "mnist-lenet-300-100": (250, 1.6),
    "mnist-lenet-5": (300, 0.8),
    "mnist-lenet-5-smaller": (800, 1.0),
}


@pytest.fixture(scope="module")
def mnist():
    if "MINICOMPRESS_DATA" not in os.environ:
        pytest.skip("needs MINICOMPRESS_DATA with a folder mnist")
    return data.mnist()


@pytest.mark.parametrize("name", zoo.compressed())
def test_card_and_file_agree_with_the_results(name):
    card = zoo.card(name)
    run = NETWORKS[name][0] if name in NETWORKS else "any"
    row = RUNS[run][card["seed"]]
    assert card["bytes"] == row["bytes"] == zoo.path(name).stat().st_size
    assert card["value"] == round(1 - row["test"] / 100, 4)
    assert row["val"] == min(r["val"] for r in RUNS[run])  # chosen by these


@pytest.mark.parametrize("name", NETWORKS)
def test_original_shapes_in_few_bytes(name):
    full, small = NETWORKS[name][1](), zoo.load(name)
    assert type(small) is type(full)
    shapes = [(n, w.shape) for n, w in full.state_dict().items()]
    assert shapes == [(n, w.shape) for n, w in small.state_dict().items()]
    ratio, most = LEAST[name]
    assert 4 * measure.params(full) >= ratio * zoo.card(name)["bytes"]
    assert zoo.card(name)["value"] >= 1 - most / 100 - 1e-9
    assert small(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


@pytest.mark.parametrize("name", zoo.compressed())
def test_a_flipped_bit_is_noticed(name):
    blob = bytearray(zoo.path(name).read_bytes())
    for at in range(0, len(blob), 97):
        bad = bytearray(blob)
        bad[at] ^= 4
        with pytest.raises(storage.StorageError):
            storage.loads(bytes(bad))


@pytest.mark.parametrize("name", zoo.compressed())
def test_errors_on_mnist(name, mnist):
    # a few borderline images may fall elsewhere on another machine
    for split in ("val", "test"):
        key = {"val": "val", "test": "value"}[split]
        found = zoo.quality(zoo.load(name), mnist, split)
        assert abs(found - zoo.card(name)[key]) < 5e-4
