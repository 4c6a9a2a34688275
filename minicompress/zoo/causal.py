"""A user's own language model of the GPT-2 family."""

import os
from pathlib import Path

import torch

from .. import data, models
from . import published
from .checkpoint import Tensors, open_safetensors, read_json

SIZES = {  # argument of models.GPT2: key of config.json
    "vocab": "vocab_size",
    "width": "n_embd",
    "layers": "n_layer",
    "heads": "n_head",
    "context": "n_positions",
}
FIXED = {  # what models.GPT2 computes, and no other
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
OUTSIDE = {  # layer of models.GPT2: its published name
    "tokens": "wte",
    "positions": "wpe",
    "norm": "ln_f",
    "head": "lm_head",
}
INSIDE = {  # layer of a block: its published name
    "norm1": "ln_1",
    "attention.q": "attn.c_attn",
    "attention.k": "attn.c_attn",
    "attention.v": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norm2": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
THIRDS = ("attention.q", "attention.k", "attention.v")
MASKS = (".attn.bias", ".attn.masked_bias")  # buffers of old files, no weights
ROWS = 4096  # of a table at a time


def decoder(folder: str | os.PathLike) -> tuple[models.GPT2, data.BPE]:
    """Load a language model of the GPT-2 family and its tokenizer.

    `train.bits_per_char` of its token numbers is in bits per token; with
    ``chars=len(text.encode())`` in bits per byte of the text.

    Parameters
    ----------
    folder : path
        With ``model.safetensors`` (or several files and their
        ``model.safetensors.index.json``), ``config.json``, and ``vocab.json``
        and ``merges.txt`` or ``tokenizer.json``.

    Returns
    -------
    model : models.GPT2
        float32, in evaluation mode.
    tokenizer : data.BPE

    Raises
    ------
    ValueError
        If a file is missing or damaged, if it holds other tensors than a
        GPT-2 has, or if the model is one that `models.GPT2` is not.

    References
    ----------
    Radford et al. 2019, "Language models are unsupervised multitask
    learners".
    """
    place = published.place(folder, ("config.json",))
    model = published.loaded(*unread(place))
    if model.config["tied"]:
        model.head.weight = model.tokens.weight
    tokenizer = _tokenizer(place)
    if len(tokenizer.vocab) > model.config["vocab"]:
        raise ValueError(
            f"tokenizer: {len(tokenizer.vocab)} tokens, but config.json says "
            f"{model.config['vocab']}"
        )
    return model, tokenizer


def unread(folder: str | os.PathLike) -> tuple[models.GPT2, published.Unread]:
    """Open a language model of the GPT-2 family; see `zoo.unread`."""
    place = published.place(folder, ("config.json",))
    config = read_json(place / "config.json")
    if config.get("activation_function") == "gelu_pytorch_tanh":
        config["activation_function"] = "gelu_new"  # the same function
    sizes = published.arguments(config, SIZES, FIXED, "models.GPT2")
    width, ff = sizes["width"], config.get("n_inner")
    sizes["ff"] = 4 * width if ff is None and isinstance(width, int) else ff
    sizes["tied"] = config.get("tie_word_embeddings", True)
    files = open_safetensors(place)
    names = _names(files)
    again = names.pop("lm_head.weight", None) if sizes["tied"] else None
    with torch.device("meta"):  # shapes only: nothing is drawn
        model = models.GPT2(**sizes)
    have = {name: files.shape(held) for name, held in names.items()}
    published.check(have, _shapes(**model.config))
    if again is not None and not _same(files, again, names["wte.weight"]):
        raise ValueError(
            "model.safetensors: lm_head.weight is not wte.weight, but "
            "config.json says tie_word_embeddings"
        )
    origins = {n: _origin(n, names) for n in model.state_dict()}
    return model, published.Unread(files, origins)


def _names(files: Tensors) -> dict[str, str]:
    """Find the model's tensors: {name without a prefix: name in the file}.

    With the prefix "transformer." a model has the head of a task beside it,
    of which that of a language model counts.
    """
    lead = "transformer."
    if not any(name.startswith(lead) for name in files):
        lead = ""
    return {
        name.removeprefix(lead): name
        for name in files
        if (name.startswith(lead) or name == "lm_head.weight")
        and not name.endswith(MASKS)
    }


def _same(files: Tensors, one: str, other: str) -> bool:
    """Compare two tables, some rows at a time."""
    if files.shape(one) != files.shape(other):
        return False
    some = torch.arange(files.shape(one)[0]).split(ROWS)
    return all(
        torch.equal(files.rows(one, i).float(), files.rows(other, i).float())
        for i in some
    )


def _shapes(
    *, vocab, width, layers, heads, ff, context, tied
) -> dict[str, tuple[int, ...]]:
    """Give the published names and shapes; a matrix is (in, out) there."""
    block = {
        "ln_1": (width,),
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "ln_2": (width,),
        "mlp.c_fc": (width, ff),
        "mlp.c_proj": (ff, width),
    }
    shapes = {"wte.weight": (vocab, width), "wpe.weight": (context, width)}
    layer = {f"h.{i}.{n}": s for i in range(layers) for n, s in block.items()}
    for name, shape in (layer | {"ln_f": (width,)}).items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[-1:]
    return shapes if tied else shapes | {"lm_head.weight": (vocab, width)}


def _origin(name: str, names: dict[str, str]) -> published.Origin:
    """Find one tensor of models.GPT2 among the published ones."""
    layer, _, kind = name.rpartition(".")
    if layer in OUTSIDE:
        # without an output layer of its own, it is the table
        tied = layer == "head" and "lm_head.weight" not in names
        layer = "tokens" if tied else layer
        return published.Origin(names[f"{OUTSIDE[layer]}.{kind}"])
    _, block, part = layer.split(".", 2)
    held = names[f"h.{block}.{INSIDE[part]}.{kind}"]
    if part in THIRDS:  # query, key and value are one layer there
        return published.Origin(held, True, THIRDS.index(part), len(THIRDS))
    return published.Origin(held, turned=True)


def _tokenizer(place: Path) -> data.BPE:
    """Read vocab.json and merges.txt, or the tokenizer.json with both."""
    if (place / "tokenizer_config.json").is_file():
        options = read_json(place / "tokenizer_config.json")
        if options.get("add_prefix_space", False):
            raise ValueError(
                "tokenizer_config.json: add_prefix_space is true, but "
                "data.BPE adds nothing"
            )
    if not (place / "vocab.json").is_file():
        published.place(place, ("tokenizer.json",))
        return _bpe("tokenizer.json", *_whole(place / "tokenizer.json"))
    published.place(place, ("merges.txt",))
    number = read_json(place / "vocab.json")
    lines = (place / "merges.txt").read_text(encoding="utf8").split("\n")
    start = lines[0].startswith("#version")
    return _bpe("vocab.json", number, [line for line in lines[start:] if line])


def _whole(path: Path) -> tuple[dict, list]:
    """Find tokens and merges in a tokenizer.json of a byte-level BPE."""
    match read_json(path):
        case {
            "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
            "model": {
                "type": "BPE",
                "vocab": {**number},
                "merges": [*merges],
            },
        }:
            return number, merges
    raise ValueError(f"{path.name}: not the tokenizer of a GPT-2")


def _bpe(name: str, number: dict, merges: list) -> data.BPE:
    """Put tokens in the order of their numbers, and merges into pairs."""
    numbers = list(number.values())
    if not all(type(i) is int for i in numbers) or (
        sorted(numbers) != list(range(len(numbers)))
    ):
        raise ValueError(f"{name}: the tokens are not numbered 0, 1, 2, ...")
    pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
    for pair in pairs:
        match pair:
            case [str(), str()]:
                continue
        raise ValueError(f"merges: {pair!r:.40} is not a pair of tokens")
    vocab = tuple(sorted(number, key=number.__getitem__))
    return data.BPE(vocab, tuple(map(tuple, pairs)))
