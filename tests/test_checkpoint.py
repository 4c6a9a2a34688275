"""Tensors that stay in their files until they are asked for."""

import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import measure
from minicompress.zoo.checkpoint import open_safetensors, read_safetensors

NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write(path, tensors):
    """Write a safetensors file, by the description of the format."""
    header, at, parts = {"__metadata__": {"format": "pt"}}, 0, []
    for name, t in tensors.items():
        raw = t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, at + len(raw)],
        }
        parts.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
    return path


def some():
    return {
        "table": torch.randn(50, 3),
        "half": torch.randn(4, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "double": torch.randn(2, 2, 2).double(),
        "number": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "mask": torch.eye(5).bool(),
    }


def sharded(folder, first, second, **changes):
    """Write a checkpoint in two files and their index."""
    folder.mkdir(exist_ok=True)
    write(folder / "a.safetensors", first)
    write(folder / "b.safetensors", second)
    files = dict.fromkeys(first, "a.safetensors")
    files |= dict.fromkeys(second, "b.safetensors") | changes
    files = {name: file for name, file in files.items() if file is not None}
    index = folder / "model.safetensors.index.json"
    text = json.dumps({"metadata": {}, "weight_map": files})
    index.write_text(text, "utf8")
    return index


class TestTensors:
    def test_are_those_of_the_file_in_its_order(self, tmp_path):
        tensors = some()
        found = open_safetensors(write(tmp_path / "x.safetensors", tensors))
        assert list(found) == list(tensors) and len(found) == 7
        for name, w in tensors.items():
            assert found[name].dtype == w.dtype
            assert found.shape(name) == w.shape
            assert torch.equal(found[name], w)
        assert "table" in found and "other" not in found
        with pytest.raises(KeyError, match="other"):
            found["other"]

    def test_nothing_is_kept(self, tmp_path):
        path = write(tmp_path / "x.safetensors", {"w": torch.zeros(2)})
        found = open_safetensors(path)
        found["w"][0] = 1  # in a copy: the next one is read anew
        assert found["w"].tolist() == [0, 0]
        write(path, {"w": torch.ones(2)})
        assert found["w"].tolist() == [1, 1]

    def test_memory_is_that_of_one_tensor(self, tmp_path):
        many = {f"w{i}": torch.full((1000,), float(i)) for i in range(20)}
        path = write(tmp_path / "x.safetensors", many)

        def total():
            return sum(float(w.mean()) for w in open_safetensors(path).values())

        assert total() == sum(range(20))
        # one, and the next before the name is free; sums beside them
        assert measure.peak_memory(total) <= 2 * 4000 + 100
        whole = measure.peak_memory(lambda: read_safetensors(path))
        assert whole >= 20 * 4000

    def test_any_byte_but_0_is_true(self, tmp_path):
        path = write(tmp_path / "x.safetensors", {"mask": torch.ones(3).bool()})
        path.write_bytes(path.read_bytes()[:-3] + b"\2\0\xff")
        for found in (open_safetensors(path), read_safetensors(path)):
            mask = found["mask"]
            assert mask.dtype == torch.bool
            assert mask.view(torch.uint8).tolist() == [1, 0, 1]

    def test_a_file_that_became_shorter(self, tmp_path):
        path = write(tmp_path / "x.safetensors", {"w": torch.zeros(20)})
        found = open_safetensors(path)
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"x\.safetensors: shorter than"):
            found["w"]

    def test_other_names(self, tmp_path):
        path = write(tmp_path / "x.safetensors", some())
        found = open_safetensors(path).named({"mine": "half", "same": "half"})
        assert list(found) == ["mine", "same"]
        assert torch.equal(found["mine"], found["same"])
        assert found.shape("mine") == (4, 5)
        with pytest.raises(ValueError, match=r"names: .*\['none'\]"):
            found.named({"x": "none"})


class TestRows:
    @settings(deadline=None, max_examples=30)
    @given(
        st.lists(st.lists(st.integers(0, 49), min_size=2, max_size=2)),
        st.sampled_from(["table", "brain", "half", "double"]),
    )
    def test_are_those_of_the_whole(self, tmp_path_factory, ids, name):
        tensors = some()
        path = tmp_path_factory.mktemp("rows") / "x.safetensors"
        found = open_safetensors(write(path, tensors))
        ids = torch.tensor(ids, dtype=torch.long).reshape(-1, 2)
        ids = ids % len(tensors[name])
        assert torch.equal(found.rows(name, ids), tensors[name][ids])

    def test_read_no_others(self, tmp_path):
        path = write(tmp_path / "x.safetensors", {"w": torch.zeros(10_000, 8)})
        found = open_safetensors(path)
        ids = torch.tensor([[9_999, 3], [3, 3]])
        peak = measure.peak_memory(lambda: found.rows("w", ids))
        # six rows of 32 bytes, and the handful of numbers that say which
        assert peak < 1000 < found["w"].nbytes

    @pytest.mark.parametrize("bad", [-1, 50])
    def test_there_are_no_others(self, tmp_path, bad):
        found = open_safetensors(write(tmp_path / "x.safetensors", some()))
        with pytest.raises(ValueError, match="table has 50 rows"):
            found.rows("table", torch.tensor([0, bad]))


class TestColumns:
    @settings(deadline=None, max_examples=30)
    @given(st.sampled_from([*some()]), st.integers(0, 7), st.integers(0, 7))
    def test_are_those_of_the_whole(self, tmp_path_factory, name, a, b):
        tensors = some()
        path = tmp_path_factory.mktemp("columns") / "x.safetensors"
        found = open_safetensors(write(path, tensors))
        w = tensors[name]
        if not w.ndim:
            return
        start, stop = sorted(min(i, w.shape[-1]) for i in (a, b))
        part = found.columns(name, start, stop)
        assert part.dtype == w.dtype
        assert torch.equal(part, w[..., start:stop])

    def test_read_no_others(self, tmp_path):
        path = write(tmp_path / "x.safetensors", {"w": torch.zeros(8, 10_000)})
        found = open_safetensors(path)
        peak = measure.peak_memory(lambda: found.columns("w", 5, 7))
        assert peak == 8 * 2 * 4

    @pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 4)])
    def test_there_are_no_others(self, tmp_path, start, stop):
        found = open_safetensors(write(tmp_path / "x.safetensors", some()))
        with pytest.raises(ValueError, match="table has 3 columns"):
            found.columns("table", start, stop)


class TestShards:
    def test_are_one_mapping(self, tmp_path):
        tensors = some()
        items = list(tensors.items())
        index = sharded(tmp_path / "m", dict(items[:2]), dict(items[2:]))
        for path in (index, index.parent):
            found = open_safetensors(path)
            assert list(found) == list(tensors)
            assert all(torch.equal(found[n], w) for n, w in items)
            ids = torch.tensor([49, 0])
            rows = found.rows("table", ids)
            assert torch.equal(rows, tensors["table"][ids])

    def test_a_folder_with_one_file(self, tmp_path):
        write(tmp_path / "model.safetensors", {"w": torch.ones(3)})
        assert open_safetensors(tmp_path)["w"].tolist() == [1, 1, 1]

    def test_a_folder_without(self, tmp_path):
        with pytest.raises(ValueError, match=r"path: no model\.safetensors or"):
            open_safetensors(tmp_path)
        with pytest.raises(FileNotFoundError):
            open_safetensors(tmp_path / "none.safetensors")

    @pytest.mark.parametrize(
        "changes",
        [
            {"v": "c.safetensors"},  # no such file
            {"v": None},  # not in the index
            {"v": "a.safetensors"},  # in another file
            {"u": "b.safetensors"},  # nowhere
            {"v": "../m/b.safetensors"},
            {"v": ".."},
            {"v": ""},
            {"v": 3},
        ],
        ids=range(8),
    )
    def test_an_index_that_lies(self, tmp_path, changes):
        w = torch.ones(2)
        index = sharded(tmp_path / "m", {"w": w}, {"v": w, "z": w}, **changes)
        with pytest.raises(ValueError, match=r"index\.json"):
            open_safetensors(index)

    def test_an_index_without_a_map(self, tmp_path):
        index = sharded(tmp_path / "m", {"w": torch.ones(2)}, {})
        index.write_text('{"weight_map": ["a.safetensors"]}', "utf8")
        with pytest.raises(ValueError, match="no weight_map"):
            open_safetensors(index)

    def test_a_damaged_shard(self, tmp_path):
        index = sharded(
            tmp_path / "m", {"w": torch.ones(2)}, {"v": torch.ones(2)}
        )
        path = index.with_name("b.safetensors")
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=r"^b\.safetensors"):
            open_safetensors(index)
