"""What the experiments about memory compute, against counts."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from minicompress import measure, models, train
from minicompress.zoo.checkpoint import read_safetensors

FOLDER = Path(__file__).resolve().parents[1] / "chapters" / "experiments"


@pytest.fixture(autouse=True)
def one_thread():
    with train.threads(1):
        yield


def script(name):
    pytest.importorskip("sklearn")
    sys.path.insert(0, str(FOLDER))
    try:
        return __import__(name)
    finally:
        sys.path.pop(0)


class TestStreamedBlocks:
    @pytest.fixture
    def s(self):
        return script("streamed_blocks")

    def test_formula_of_the_peak(self, s):
        row = s.metered(128)
        assert 0.95 < row["ratio"] < 1.05
        assert row["ratio"] == round(row["formula"] / row["measured"], 3)

    def test_blocks_have_the_weights_of_the_models(self, s):
        for width in (64, 128):
            with torch.device("meta"):
                block = models.LM(**s.sizes(1, width)).blocks[0]
            count = sum(w.numel() for w in block.parameters() if w.ndim > 1)
            assert s.ours(width).weights == count

    def test_the_plan_is_for_the_published_model(self, s):
        machine = measure.Machine(peak=1e10, bandwidth=1e10, threads=1)
        plan = s.plan(machine)
        assert plan["parameters"] == 6_738_415_616
        parts = dict(plan["peak"])
        assert parts.pop("sum") == sum(parts.values())
        # the Cholesky factor, by a sum over its columns
        n = 64
        steps = sum((n - j) * (n - j + 1) // 2 for j in range(1, n + 1))
        assert steps == pytest.approx(n**3 / 6, rel=0.05)
        macs = plan["macs"]
        assert macs["forward, twice"] == 2 * 32 * 2**18 * 202_375_168
        assert max(macs, key=macs.get) == "sum"
        assert plan["seconds"]["here, one core"] == round(macs["sum"] / 1e10)

    def test_random_file(self, s, tmp_path):
        path = tmp_path / "x.safetensors"
        shapes, lazy = s.synthetic(path, 2, 64)
        tensors = read_safetensors(path)
        want = dict(shapes.named_parameters())
        assert {n: w.shape for n, w in tensors.items()} == {
            n: w.shape for n, w in want.items()
        }
        assert all(torch.equal(lazy[n], w) for n, w in tensors.items())
        up = tensors["blocks.1.up.weight"]
        assert float(up.std()) == pytest.approx(64**-0.5, rel=0.05)
        before = path.read_bytes()
        path.unlink()
        s.synthetic(path, 2, 64)
        assert path.read_bytes() == before

    def test_equal_files(self, s, tmp_path):
        a, b = tmp_path / "a", tmp_path / "b"
        for folder in (a, b):
            folder.mkdir()
            (folder / "x").write_text("1")
        assert s.equal_files(a, b)
        (b / "x").write_text("2")
        assert not s.equal_files(a, b)
        (b / "x").write_text("1")
        (b / "y").write_text("1")
        assert not s.equal_files(a, b)


class TestRecomputedEncoder:
    @pytest.fixture
    def r(self):
        return script("recomputed_encoder")

    @pytest.fixture
    def small(self, r, monkeypatch):
        """Let the experiment see a small model instead of the published."""
        torch.manual_seed(0)
        model = models.LM(
            vocab=20, width=16, layers=4, heads=2, ff=32, context=8
        )
        ids = torch.arange(24).reshape(3, 8) % 20
        found = model, "blocks", (ids, ids.roll(-1, 1))
        monkeypatch.setattr(r, "MODELS", {"small": lambda: found})
        return found

    def test_every_way_has_the_same_gradients(self, r, small):
        model, _, batch = small
        found = r.ways("small")
        assert found == [*r.WAYS, "segments of 2"]
        train.cross_entropy(model, batch).backward()
        want = [w.grad for w in model.parameters()]
        saved = {}
        for way in found:
            net = r.prepared("small", "all", way)
            r.step(net, batch)
            got = r.gradients(net)
            assert len(got) == len(want)
            assert all(map(torch.equal, got, want)), way
            loss = partial(train.cross_entropy, net, batch)
            saved[way] = train.saved_bytes(loss)
        assert saved["nothing"] > saved["every second block"]
        assert saved["every second block"] > saved["every block"]
        stream = 3 * 8 * 16 * 4  # one between two blocks
        less = saved["every block"] - saved["segments of 2"]
        assert less == 2 * stream

    def test_low_rank_trains_only_that(self, r, small):
        net = r.prepared("small", "low rank", "every block")
        count = 4 * r.RANK * (4 * (16 + 16) + 2 * (16 + 32))
        assert r.kept(net)["gradients"] == 4 * count
        assert r.kept(net)["moments"] == 8 * count
        full = r.kept(r.prepared("small", "all", "nothing"))
        assert full["gradients"] == full["weights"]
        assert r.kept(net)["weights"] == full["weights"] + 4 * count

    def test_chain_is_the_law_of_the_square_root(self, r):
        found = r.chain(16)
        want = {k: k + 16 // k for k in (1, 2, 4, 8, 16)}
        assert found["segments"] == want
        assert found["whole"] == 17

    def test_a_segment_is_its_blocks(self, r):
        blocks = [nn.Linear(3, 3), nn.Linear(3, 3)]
        x = torch.randn(2, 3)
        segment = r.Segment(blocks)
        assert torch.equal(segment(x), blocks[1](blocks[0](x)))

        class Times(nn.Module):
            def forward(self, x, by):
                return x * by

        both = r.Segment([Times(), Times()])
        assert torch.equal(both(x, 2), 4 * x)
