"""A user's GPT-2 folder: read correctly, computed correctly, or refused."""

import json
import math

import numpy as np
import pytest
import torch
from test_encoder import checkpoint as bert
from test_encoder import folder as bert_folder
from test_encoder import pack

from minicompress import data, models, train, zoo
from minicompress.data.bpe import visible

MERGES = (("t", "h"), ("Ġ", "th"), ("Ġth", "e"), ("i", "n"))
VOCAB = (*visible(), *map("".join, MERGES), "<|endoftext|>")
CONFIG = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_embd": 12,
    "n_head": 3,
    "n_inner": None,
    "n_layer": 2,
    "n_positions": 16,
    "vocab_size": len(VOCAB),
    "tie_word_embeddings": True,
}
WIDTH, FF = 12, 48


def checkpoint(ff=FF, seed=0):
    """Draw the tensors of a GPT-2, under the names of its publisher."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"wte.weight": (len(VOCAB), WIDTH), "wpe.weight": (16, WIDTH)}
    for i in range(2):
        for name, shape in {
            "ln_1": (WIDTH,),
            "attn.c_attn": (WIDTH, 3 * WIDTH),
            "attn.c_proj": (WIDTH, WIDTH),
            "ln_2": (WIDTH,),
            "mlp.c_fc": (WIDTH, ff),
            "mlp.c_proj": (ff, WIDTH),
        }.items():
            shapes[f"h.{i}.{name}.weight"] = shape
            shapes[f"h.{i}.{name}.bias"] = shape[-1:]
    shapes |= {"ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}
    return {n: torch.randn(s, generator=draw) / 2 for n, s in shapes.items()}


def head(seed=1):
    draw = torch.Generator().manual_seed(seed)
    return {"lm_head.weight": torch.randn(len(VOCAB), WIDTH, generator=draw)}


def masks():
    """Return the buffers that old files hold."""
    whole = torch.ones(1, 1, 16, 16).tril()
    made = {f"h.{i}.attn.bias": whole for i in range(2)}
    return made | {"h.0.attn.masked_bias": torch.tensor(-1e4)}


def as_text(vocab=VOCAB, merges=MERGES):
    """Return the files of a tokenizer."""
    lines = ["#version: 0.2", *map(" ".join, merges), ""]
    return {
        "vocab.json": json.dumps({t: i for i, t in enumerate(vocab)}),
        "merges.txt": "\n".join(lines),
    }


def as_json(merges=MERGES, **changes):
    """Return the same as one file."""
    whole = {
        "version": "1.0",
        "added_tokens": [{"id": 260, "content": "<|endoftext|>"}],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
        },
        "model": {
            "type": "BPE",
            "vocab": {t: i for i, t in enumerate(VOCAB)},
            "merges": merges,
        },
    }
    return {"tokenizer.json": json.dumps(whole | changes)}


def folder(path, tensors=None, config=CONFIG, **files):
    """Write a checkpoint as publishers do."""
    path.mkdir(exist_ok=True)
    tensors = checkpoint() if tensors is None else tensors
    (path / "model.safetensors").write_bytes(pack(tensors))
    (path / "config.json").write_text(json.dumps(config))
    for name, text in (files or as_text()).items():
        (path / name).write_text(text, encoding="utf8")
    return path


def in_two(place, tensors):
    """Write the tensors of a folder as two files and an index."""
    (place / "model.safetensors").unlink()
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for i, (name, w) in enumerate(tensors.items()):
        shards["ab"[i % 2] + ".safetensors"][name] = w
    index = {n: file for file, held in shards.items() for n in held}
    for file, held in shards.items():
        (place / file).write_bytes(pack(held))
    (place / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


def norm(x, g, b):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * g + b


def gelu(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def independent(tensors, ids, heads=3):
    """Compute a GPT-2 from its equations, matrices (in, out) as published."""
    w = {n: t.double().numpy() for n, t in tensors.items()}

    def conv1d(name, x):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def ln(name, x):
        return norm(x, w[f"{name}.weight"], w[f"{name}.bias"])

    count = len(ids)
    x = w["wte.weight"][ids] + w["wpe.weight"][:count]  # (T, width)
    later = np.triu(np.ones((count, count), bool), 1)
    for i in range(2):
        qkv = conv1d(f"h.{i}.attn.c_attn", ln(f"h.{i}.ln_1", x))
        q, k, v = qkv.reshape(count, 3, heads, -1).transpose(1, 2, 0, 3)
        a = np.einsum("htd,hsd->hts", q, k) / math.sqrt(WIDTH / heads)
        a = np.exp(np.where(later, -np.inf, a))
        a = a / a.sum(-1, keepdims=True)
        y = np.einsum("hts,hsd->thd", a, v).reshape(count, WIDTH)
        x = x + conv1d(f"h.{i}.attn.c_proj", y)
        y = gelu(conv1d(f"h.{i}.mlp.c_fc", ln(f"h.{i}.ln_2", x)))
        x = x + conv1d(f"h.{i}.mlp.c_proj", y)
    out = w.get("lm_head.weight", w["wte.weight"])
    return ln("ln_f", x) @ out.T


def agrees(model, tensors):
    ids = torch.randint(0, 261, (3, 16), generator=torch.Generator())
    with torch.no_grad():
        got = model(ids).double().numpy()
    want = np.stack([independent(tensors, row) for row in ids.numpy()])
    return np.abs(got - want).max() < 1e-5 * np.abs(want).max()


@pytest.fixture
def small(tmp_path):
    return zoo.decoder(folder(tmp_path / "small"))


class TestLoads:
    def test_computes_what_the_equations_say(self, small):
        model, tokenizer = small
        assert agrees(model, checkpoint())
        assert tokenizer == data.BPE(VOCAB, MERGES)
        assert type(model) is models.GPT2 and not model.training
        assert model.config == {
            "vocab": 261,
            "width": 12,
            "layers": 2,
            "heads": 3,
            "ff": 48,
            "context": 16,
            "tied": True,
        }
        assert model.head.weight is model.tokens.weight

    def test_the_check_would_see_a_mistake(self, small):
        model, _ = small
        a = model.blocks[1].attention
        for one, other in ((a.q, a.k), (a.k, a.v)):
            one.weight, other.weight = other.weight, one.weight
            assert not agrees(model, checkpoint())
            one.weight, other.weight = other.weight, one.weight
        for layer in (a.out, a.q):
            layer.weight.data = layer.weight.data.T.contiguous()
            assert not agrees(model, checkpoint())
            layer.weight.data = layer.weight.data.T.contiguous()
        assert agrees(model, checkpoint())

    @pytest.mark.parametrize("change", ["prefix", "masks", "head", "other"])
    def test_other_spellings_load_the_same(self, tmp_path, small, change):
        tensors = checkpoint()
        if change == "masks":
            tensors |= masks()
        if change == "head":  # some write the table twice
            tensors["lm_head.weight"] = tensors["wte.weight"].clone()
        if change in ("prefix", "other"):
            tensors |= masks()
            tensors = {f"transformer.{n}": w for n, w in tensors.items()}
        if change == "other":  # beside the head of another task
            tensors["score.weight"] = torch.zeros(2, WIDTH)
        model, _ = zoo.decoder(folder(tmp_path / "other", tensors))
        state = model.state_dict()
        for name, w in small[0].state_dict().items():
            assert torch.equal(state[name], w), name
        assert model.head.weight is model.tokens.weight

    @pytest.mark.parametrize("lead", ["", "transformer."])
    def test_an_output_layer_of_its_own(self, tmp_path, lead):
        config = CONFIG | {"tie_word_embeddings": False}
        own = checkpoint() | head()
        tensors = {f"{lead}{n}": w for n, w in checkpoint().items()} | head()
        model, _ = zoo.decoder(folder(tmp_path / "x", tensors, config))
        assert agrees(model, own) and not agrees(model, checkpoint())
        assert not model.config["tied"]
        with pytest.raises(ValueError, match=r"1 tensors missing.*lm_head"):
            zoo.decoder(folder(tmp_path / "x", checkpoint(), config))

    def test_hidden_units_of_another_number(self, tmp_path):
        tensors = checkpoint(ff=20)
        config = CONFIG | {"n_inner": 20}
        model, _ = zoo.decoder(folder(tmp_path / "x", tensors, config))
        assert agrees(model, tensors) and model.config["ff"] == 20

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_becomes_float32(self, tmp_path, dtype):
        tensors = {n: w.to(dtype) for n, w in checkpoint().items()}
        model, _ = zoo.decoder(folder(tmp_path / "half", tensors))
        assert agrees(model, tensors) and not agrees(model, checkpoint())
        assert {w.dtype for w in model.parameters()} == {torch.float32}

    def test_two_names_of_one_activation(self, tmp_path, small):
        config = CONFIG | {"activation_function": "gelu_pytorch_tanh"}
        model, _ = zoo.decoder(folder(tmp_path / "x", config=config))
        assert agrees(model, checkpoint())

    def test_what_config_leaves_out_is_as_gpt_2_has_it(self, tmp_path):
        short = {k: v for k, v in CONFIG.items() if k in SIZES}
        model, _ = zoo.decoder(folder(tmp_path / "x", config=short))
        assert agrees(model, checkpoint())

    def test_several_files(self, tmp_path, small):
        place, tensors = folder(tmp_path / "x"), checkpoint()
        in_two(place, tensors)
        model, _ = zoo.decoder(place)
        state = model.state_dict()
        for name, w in small[0].state_dict().items():
            assert torch.equal(state[name], w), name
        (place / "b.safetensors").unlink()
        with pytest.raises(ValueError, match=r"b\.safetensors"):
            zoo.decoder(place)

    def test_an_encoder_in_several_files(self, tmp_path):
        place = bert_folder(tmp_path / "bert")
        whole, _ = zoo.encoder(place)
        in_two(place, bert())
        parts, _ = zoo.encoder(place)
        for name, w in whole.state_dict().items():
            assert torch.equal(parts.state_dict()[name], w), name

    def test_can_be_trained_and_owns_its_weights(self, tmp_path, small):
        model, tokenizer = small
        (tmp_path / "small" / "model.safetensors").unlink()
        parts = [w.data_ptr() for w in model.parameters()]
        stored = {w.untyped_storage().data_ptr() for w in model.parameters()}
        assert len(set(parts)) == len(stored) == len(parts)
        assert all(w.is_contiguous() for w in model.parameters())
        ids = tokenizer.encode("the thing in the inn")[None]
        loss = train.cross_entropy(model, (ids[:, :-1], ids[:, 1:]))
        loss.backward()
        assert all(w.grad is not None for w in model.parameters())

    def test_bits_per_byte(self, small):
        model, tokenizer = small
        text = "the thing in thé inn " * 8
        ids = tokenizer.encode(text)
        bits = train.bits_per_char(model, ids, context=16)
        by_byte = train.bits_per_char(
            model, ids, context=16, chars=len(text.encode())
        )
        share = (len(ids) - 1) / len(text.encode())
        assert by_byte == pytest.approx(bits * share) and share < 0.8


SIZES = ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size")


class TestTokenizer:
    @pytest.mark.parametrize("pairs", ["lists", "lines"])
    def test_one_file_with_everything(self, tmp_path, pairs):
        merges = MERGES if pairs == "lists" else [*map(" ".join, MERGES)]
        _, found = zoo.decoder(folder(tmp_path / "x", **as_json(merges)))
        assert found == data.BPE(VOCAB, MERGES)

    def test_order_of_the_file_does_not_matter(self, tmp_path):
        files = as_text()
        number = {t: i for i, t in reversed([*enumerate(VOCAB)])}
        files["vocab.json"] = json.dumps(number)
        # escaped or not, with or without a first line, with line ends of DOS
        files["vocab.json"] = json.dumps(number, ensure_ascii=False)
        files["merges.txt"] = "\r\n".join(map(" ".join, MERGES))
        _, found = zoo.decoder(folder(tmp_path / "x", **files))
        assert found == data.BPE(VOCAB, MERGES)

    def test_a_merge_may_look_like_a_comment(self, tmp_path):
        merges = (("#", "#"), ("##", "##"))
        vocab = (*visible(), "##", "####")
        files = as_text(vocab, merges)
        _, found = zoo.decoder(folder(tmp_path / "x", **files))
        assert found.merges == merges

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({"merges.txt": ""}, "no tokenizer.json"),
            ({"vocab.json": "{}"}, "no merges.txt"),
            (as_text() | {"vocab.json": "[1]"}, "vocab.json: .* not a JSON"),
            (as_text() | {"vocab.json": "{}"}, "vocab: no 'Ā'"),
            (as_text() | {"vocab.json": '{"a": 1}'}, "not numbered 0, 1, 2"),
            (as_text() | {"vocab.json": '{"a": true}'}, "not numbered"),
            (as_text() | {"vocab.json": '{"a": "0"}'}, "not numbered"),
            (as_text() | {"merges.txt": "t h e"}, "merges: .* not a pair"),
            (as_text() | {"merges.txt": "q z"}, "vocab: no 'qz'"),
            (as_text((*VOCAB, "b c")), "'b c' is not spelled in bytes"),
            (as_text((*VOCAB, "xyz")), "262 tokens, but config.json says 261"),
            (as_json(normalizer={"type": "NFC"}), "not the tokenizer"),
            (as_json(pre_tokenizer={"type": "Whitespace"}), "not the tok"),
            (as_json(model={"type": "WordPiece"}), "not the tokenizer"),
            (as_json([["t", 3]]), "merges: .* not a pair"),
            (
                as_text()
                | {"tokenizer_config.json": '{"add_prefix_space": true}'},
                "add_prefix_space",
            ),
        ],
    )
    def test_what_is_refused(self, tmp_path, files, message):
        with pytest.raises(ValueError, match=message):
            zoo.decoder(folder(tmp_path / "x", **files))


class TestRefused:
    def test_missing_unexpected_and_misshapen_tensors(self, tmp_path):
        name = "h.1.mlp.c_fc.bias"
        tensors = checkpoint()
        del tensors[name]
        with pytest.raises(ValueError, match=f"1 tensors missing.*{name}"):
            zoo.decoder(folder(tmp_path / "x", tensors))
        tensors = checkpoint() | {"h.2.ln_1.bias": torch.zeros(WIDTH)}
        with pytest.raises(ValueError, match=r"1 unexpected.*h\.2\.ln_1"):
            zoo.decoder(folder(tmp_path / "x", tensors))
        for name in ("h.0.attn.c_attn.weight", "h.0.mlp.c_proj.weight"):
            # as nn.Linear has it, (out, in): not transposed again
            tensors = checkpoint()
            tensors[name] = tensors[name].T.contiguous()
            with pytest.raises(ValueError, match=rf"{name} has shape \("):
                zoo.decoder(folder(tmp_path / "x", tensors))
        with pytest.raises(ValueError, match="28 tensors missing"):
            zoo.decoder(folder(tmp_path / "x", {"a": torch.zeros(1)}))

    def test_two_tables_that_should_be_one(self, tmp_path):
        tensors = checkpoint() | head()
        with pytest.raises(ValueError, match=r"lm_head\.weight is not wte"):
            zoo.decoder(folder(tmp_path / "x", tensors))

    @pytest.mark.parametrize(
        ("key", "value", "named"),
        [
            ("model_type", "gpt_neo", "model_type"),
            ("activation_function", "gelu", "activation_function"),
            ("activation_function", "relu", "activation_function"),
            ("layer_norm_epsilon", 1e-6, "layer_norm_epsilon"),
            ("scale_attn_weights", False, "scale_attn_weights"),
            ("scale_attn_by_inverse_layer_idx", True, "inverse_layer_idx"),
            ("add_cross_attention", True, "add_cross_attention"),
            ("tie_word_embeddings", "no", "tied"),
            ("n_layer", 3, "missing"),
            ("n_layer", 10**9, "layers"),
            ("n_head", 5, "heads"),
            ("n_embd", "12", "width"),
            ("n_embd", None, "width"),
            ("n_inner", 50, "has shape"),
            ("n_inner", -1, "ff"),
            ("n_positions", 17, "wpe.weight"),
            ("vocab_size", 9, "wte.weight"),
        ],
    )
    def test_other_models(self, tmp_path, key, value, named):
        config = CONFIG | {key: value}
        with pytest.raises(ValueError, match=named):
            zoo.decoder(folder(tmp_path / "x", config=config))

    def test_incomplete_folders(self, tmp_path):
        for name in ("model.safetensors", "config.json", "merges.txt"):
            place = folder(tmp_path / "x")
            (place / name).unlink()
            with pytest.raises(ValueError, match=f"no {name}"):
                zoo.decoder(place)
        with pytest.raises(ValueError, match=r"folder: no config\.json"):
            zoo.decoder(tmp_path / "nowhere")
        for key in SIZES:
            config = {k: v for k, v in CONFIG.items() if k != key}
            with pytest.raises(ValueError, match=f"no {key}"):
                zoo.decoder(folder(tmp_path / "x", config=config))

    def test_a_damaged_file(self, tmp_path):
        place = folder(tmp_path / "x")
        path = place / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match=r"model\.safetensors"):
            zoo.decoder(place)
        (place / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config\.json: not JSON"):
            zoo.decoder(place)


def test_equals_the_reference_implementation(tmp_path):
    transformers = pytest.importorskip("transformers")
    place = folder(tmp_path / "x")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(place).eval()
    model, _ = zoo.decoder(place)
    ids = torch.randint(0, 261, (3, 16), generator=torch.Generator())
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5
        )
