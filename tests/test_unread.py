"""A published folder whose tensors stay in its files until asked for."""

import math
from copy import deepcopy

import pytest
import test_decoder as gpt2
import test_encoder as bert
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import write as write_safetensors

from minicompress import calibrate, measure, models, pipeline, quantize, zoo
from minicompress.zoo import checkpoint

UNTIED = gpt2.CONFIG | {"tie_word_embeddings": False}
SOURCES = ("bert", "gpt2", "untied", "half", "prefix", "shards")


def write(source, path):
    """Write a folder in one of the ways in which publishers do."""
    tensors = gpt2.checkpoint()
    if source == "bert":
        noise = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
        pooler = bert.pooler() | {"pooler.dense.weight": noise}
        return bert.folder(path, bert.checkpoint() | pooler)
    if source == "untied":
        return gpt2.folder(path, tensors | gpt2.head(), UNTIED)
    if source == "half":
        tensors = {n: w.bfloat16() for n, w in tensors.items()}
    if source == "prefix":
        tensors["lm_head.weight"] = tensors["wte.weight"]
        tensors |= gpt2.masks()
        tensors = {
            n if "head" in n else f"transformer.{n}": w
            for n, w in tensors.items()
        }
    place = gpt2.folder(path, tensors)
    if source == "shards":
        gpt2.in_two(place, tensors)
    return place


def loaded(source, place):
    read = zoo.encoder if source == "bert" else zoo.decoder
    return read(place)[0]


def batches(model):
    g = torch.Generator().manual_seed(1)
    vocab = model.config["vocab"]
    return list(torch.randint(vocab, (3, 2, 8), generator=g))


def gptq(W, x):
    return quantize.gptq(W, x.H.float(), quantize.mse(W, bits=3))


def rough(name, w):
    return quantize.min_max(w, bits=3)


def whole(model):
    """Compress the loaded model in memory, block after block."""
    ids, model = batches(model), deepcopy(model)
    with torch.no_grad():
        for name, w in model.named_parameters():
            if w.ndim > 1 and not name.startswith("blocks."):
                w.copy_(rough(name, w.detach()).decode())
        for i in range(len(model.blocks)):
            stats = calibrate.inputs(
                model,
                ids,
                where=lambda n, w, p=f"blocks.{i}.": n.startswith(p),
            )
            made = {n: gptq(model.get_parameter(n), stats[n]) for n in stats}
            for name, code in made.items():
                model.get_parameter(name).copy_(code.decode())
    return model


@pytest.fixture
def reads(monkeypatch):
    """Note the bytes of each piece that is read from a file."""
    found, real = [], checkpoint._bytes

    def counted(place, starts, count):
        found.append(len(starts) * count * place.dtype.itemsize)
        return real(place, starts, count)

    monkeypatch.setattr(checkpoint, "_bytes", counted)
    return found


@pytest.mark.parametrize("source", SOURCES)
class TestEverySource:
    def test_tensors_are_those_of_the_loaded_model(self, tmp_path, source):
        place = write(source, tmp_path / "x")
        model, tensors = zoo.unread(place)
        want = loaded(source, place)
        assert type(model) is type(want) and model.config == want.config
        assert {w.device.type for w in model.parameters()} == {"meta"}
        state = want.state_dict()
        assert list(tensors) == list(state) and len(tensors) == len(state)
        for name, w in state.items():
            assert torch.equal(tensors[name], w), name
            assert tensors[name].dtype == w.dtype == torch.float32
            assert tensors[name].stride() == w.stride()
            assert tensors.shape(name) == tuple(w.shape)
            ids = torch.tensor([[len(w) - 1, 0], [0, 1]])
            assert torch.equal(tensors.rows(name, ids), w[ids]), name
            assert name in tensors
        assert "wte.weight" not in tensors and "up" not in tensors
        with pytest.raises(KeyError, match="other"):
            tensors["other"]

    def test_streamed_gives_what_memory_gives(self, tmp_path, source):
        place = write(source, tmp_path / "x")
        model, tensors = zoo.unread(place)
        folder = pipeline.streamed(
            model,
            tensors,
            batches(model),
            gptq,
            tmp_path / "small",
            tables=rough,
            rows=7,
        )
        small, want = pipeline.assembled(folder), whole(loaded(source, place))
        assert type(small) is type(want)
        old, new = loaded(source, place).state_dict(), small.state_dict()
        for name, w in want.state_dict().items():
            assert torch.equal(new[name], w), name
            assert torch.equal(old[name], w) == (w.ndim < 2), name
        if source != "bert":
            tied = small.head.weight is small.tokens.weight
            assert tied == (source != "untied")
            assert (model.head.weight is model.tokens.weight) == tied


class TestReading:
    @pytest.mark.parametrize("source", ["bert", "gpt2", "untied", "shards"])
    def test_only_what_is_asked_for(self, tmp_path, source, reads):
        _, tensors = zoo.unread(write(source, tmp_path / "x"))
        for name in tensors:
            tensors.shape(name)
        assert reads == []
        for name in tensors:  # a third of c_attn is not all of it
            tensors[name]
            assert reads.pop() == 4 * math.prod(tensors.shape(name)), name
            _, *row = tensors.shape(name)
            tensors.rows(name, torch.tensor([1, 0, 1]))
            assert reads.pop() == 4 * 2 * math.prod(row), name
            tensors.rows(name, torch.zeros(0, 2, dtype=torch.long))
            assert not sum(reads)
            reads.clear()

    def test_a_table_written_twice_is_compared_by_rows(
        self, tmp_path, reads, monkeypatch
    ):
        monkeypatch.setattr(zoo.causal, "ROWS", 100)
        zoo.unread(write("prefix", tmp_path / "x"))
        rows = [100, 100, 61]
        assert reads == [4 * gpt2.WIDTH * n for n in rows for _ in range(2)]
        reads.clear()
        tensors = gpt2.checkpoint()
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1
        place = gpt2.folder(tmp_path / "y", tensors)
        with pytest.raises(ValueError, match=r"lm_head\.weight is not wte"):
            zoo.unread(place)

    def test_memory_does_not_grow_with_depth(self, tmp_path):
        def peak(layers, lazy):
            config = bert.CONFIG | {"num_hidden_layers": layers}
            place = tmp_path / f"{layers}{lazy}"
            bert.folder(place, bert.checkpoint(config), config)
            model, tensors = zoo.unread(place)

            def run():
                held = tensors if lazy else dict(tensors)
                args = (model, held, batches(model), lambda W, x: W)
                pipeline.streamed(*args, place / "small")

            return measure.peak_memory(run)

        assert peak(2, True) == peak(12, True)
        # 4 (4·8² + 2·8·12) bytes of matrices in each of ten more blocks
        assert peak(12, False) - peak(2, False) > 10 * 4 * 448

    @settings(deadline=None, max_examples=40)
    @given(
        st.lists(st.lists(st.integers(0, 11), min_size=2, max_size=2)),
        st.sampled_from(
            ["tokens.weight", "blocks.1.attention.k.weight", "norm.bias"]
            + [f"blocks.0.attention.{n}.bias" for n in "qkv"]
            + ["blocks.1.down.weight", "blocks.0.norm1.weight"]
        ),
    )
    def test_rows_are_those_of_the_whole(self, tmp_path_factory, ids, name):
        place = write("gpt2", tmp_path_factory.mktemp("rows") / "x")
        _, tensors = zoo.unread(place)
        ids = torch.tensor(ids, dtype=torch.long).reshape(-1, 2)
        found = tensors.rows(name, ids)
        assert torch.equal(found, tensors[name][ids])
        assert found.is_contiguous() and found.dtype == torch.float32

    @pytest.mark.parametrize("bad", [-1, 12])
    @pytest.mark.parametrize("part", ["q.weight", "k.bias", "v.weight"])
    def test_there_are_no_other_rows(self, tmp_path, bad, part):
        _, tensors = zoo.unread(write("gpt2", tmp_path / "x"))
        name = f"blocks.0.attention.{part}"
        with pytest.raises(ValueError, match=rf"{name} has 12 rows"):
            tensors.rows(name, torch.tensor([0, bad]))


class TestRefused:
    @pytest.mark.parametrize("name", ["llama", None, ["bert"], 3])
    def test_other_families(self, tmp_path, name):
        config = gpt2.CONFIG | {"model_type": name}
        place = gpt2.folder(tmp_path / "x", config=config)
        with pytest.raises(ValueError, match=r"model_type is .*'bert', 'gpt2'"):
            zoo.unread(place)

    def test_what_decoder_and_encoder_refuse(self, tmp_path):
        config = gpt2.CONFIG | {"scale_attn_weights": False}
        with pytest.raises(ValueError, match="scale_attn_weights"):
            zoo.unread(gpt2.folder(tmp_path / "a", config=config))
        tensors = gpt2.checkpoint()
        name = "h.0.attn.c_attn.weight"
        tensors[name] = tensors[name].T.contiguous()
        with pytest.raises(ValueError, match=rf"{name} has shape \(36, 12\)"):
            zoo.unread(gpt2.folder(tmp_path / "b", tensors))
        tensors = bert.checkpoint()
        del tensors["embeddings.LayerNorm.bias"]
        with pytest.raises(ValueError, match=r"1 tensors missing.*Norm\.bias"):
            zoo.unread(bert.folder(tmp_path / "c", tensors))
        with pytest.raises(ValueError, match=r"folder: no config\.json in"):
            zoo.unread(tmp_path)

    def test_a_tokenizer_is_not_needed(self, tmp_path):
        for source, name in (("bert", "vocab.txt"), ("gpt2", "merges.txt")):
            place = write(source, tmp_path / source)
            (place / name).unlink()
            model, _ = zoo.unread(str(place))
            assert type(model) in (models.Encoder, models.GPT2)
            with pytest.raises(ValueError, match=f"no {name}"):
                loaded(source, place)


def test_masks_of_old_files_may_be_of_bits(tmp_path):
    masks = {n: w.bool() for n, w in gpt2.masks().items()}
    place = gpt2.folder(tmp_path / "x")
    want, _ = zoo.decoder(place)
    write_safetensors(place / "model.safetensors", gpt2.checkpoint() | masks)
    found, _ = zoo.decoder(place)
    for name, w in want.state_dict().items():
        assert torch.equal(found.state_dict()[name], w), name
