"""The space of small language models, and how one of them is built."""

import torch
from torch import nn

from .. import models
from .spaces import Arch, Space

SHARING = ("none", "pairs", "all")


def transformer_space(
    *,
    width: tuple[int, ...] = (32, 48, 64, 96),
    layers: tuple[int, ...] = (1, 2, 3, 4, 6),
    heads: tuple[int, ...] = (2, 4, 8),
    ff_ratio: tuple[int, ...] = (1, 2, 4),
    sharing: tuple[str, ...] = SHARING,
    embedding: tuple[int, ...] = (0, 16, 32),
) -> Space:
    """List decoder language models of the form of `models.LM`.

    Every network is described in one way only: a single layer has nothing
    to share, two layers share as a pair or all in the same way ("all"
    belongs to the space), and a factorized table is narrower than the model.

    Parameters
    ----------
    width
        features of a token.
    layers
        blocks that compute, whether they share weights or not.
    heads
        attention heads; those that do not divide the width are left out.
    ff_ratio
        hidden units of a block divided by its width.
    sharing
        "none"; "pairs" of blocks that follow one another have the same
        weights; "all" blocks have.
    embedding
        0 for a full table, else the width of a factorized one.

    Returns
    -------
    Space

    References
    ----------
    Wang et al., HAT, arXiv:2005.14187, and Chen et al., AutoFormer,
    arXiv:2107.00651 (width, depth, heads, feed-forward ratio).
    Lan et al., ALBERT, arXiv:1909.11942 (sharing, factorized table).

    Examples
    --------
    >>> len(list(transformer_space()))
    1188
    >>> small = transformer_space(width=(32,), layers=(1, 2), heads=(2, 5))
    >>> {(a["layers"], a["sharing"]) for a in small} == {
    ...     (1, "none"), (2, "none"), (2, "all")
    ... }
    True
    """
    choices = {
        "width": width,
        "layers": layers,
        "heads": heads,
        "ff_ratio": ff_ratio,
        "sharing": sharing,
        "embedding": embedding,
    }
    return Space(choices, valid=_once)


def _once(arch: Arch) -> bool:
    """Tell whether this is a network, and the one description of it."""
    if arch["sharing"] == "pairs":
        several = arch["layers"] > 2
    else:
        several = arch["sharing"] == "none" or arch["layers"] > 1
    divides = arch["width"] % arch["heads"] == 0
    return several and divides and arch["embedding"] < arch["width"]


def transformer(arch: Arch, *, vocab: int, context: int) -> models.LM:
    """Build an untrained member of `transformer_space`.

    Parameters
    ----------
    arch
        "width", "layers", "heads", "ff_ratio", "sharing", "embedding".
    vocab
        tokens.
    context
        longest sequence.

    Returns
    -------
    models.LM
        Maps ids (N, T) to logits (N, T, vocab).  The output layer is the
        table, also where that is factorized.  Blocks that share have the
        same parameters.

    Raises
    ------
    ValueError
        If the heads do not divide the width, or the sharing is unknown.

    Examples
    --------
    >>> arch = {"width": 32, "layers": 4, "heads": 4, "ff_ratio": 2}
    >>> arch |= {"sharing": "pairs", "embedding": 16}
    >>> model = transformer(arch, vocab=512, context=64)
    >>> len(model.blocks), len({block.up.weight for block in model.blocks})
    (4, 2)
    >>> sum(p.numel() for p in model.parameters())
    28416
    """
    if arch["sharing"] not in SHARING:
        raise ValueError(f"sharing: {arch['sharing']!r} is none of {SHARING}")
    width, layers, E = arch["width"], arch["layers"], arch["embedding"]
    model = models.LM(
        vocab=vocab,
        width=width,
        layers=layers,
        heads=arch["heads"],
        ff=width * arch["ff_ratio"],
        context=context,
    )
    size = {"none": 1, "pairs": 2, "all": layers}[arch["sharing"]]
    for i, block in enumerate(model.blocks):
        _tie(block, model.blocks[i // size * size])
    if E:
        model.tokens, model.head = _factorized(vocab, E, width)
    return model


def _tie(block: nn.Module, source: nn.Module) -> None:
    """Give a block the parameters of another."""
    for mine, other in zip(block.modules(), source.modules(), strict=True):
        for name, p in other.named_parameters(recurse=False):
            setattr(mine, name, p)


def _factorized(
    vocab: int, E: int, width: int
) -> tuple[nn.Sequential, nn.Sequential]:
    """Make a narrow table with a projection, and the output layer for it.

    The table is N(0, 1/width) and the projection N(0, 1/E), so that their
    product is as large as the full table of `models.LM` and the logits are
    of size 1.  From H features back to E leads a projection of its own,
    which starts as the transposed one.
    """
    tokens = nn.Sequential(
        nn.Embedding(vocab, E), nn.Linear(E, width, bias=False)
    )
    head = nn.Sequential(
        nn.Linear(width, E, bias=False), nn.Linear(E, vocab, bias=False)
    )
    with torch.no_grad():
        nn.init.normal_(tokens[0].weight, std=width**-0.5)
        nn.init.normal_(tokens[1].weight, std=E**-0.5)
        head[0].weight.copy_(tokens[1].weight.T)
    head[1].weight = tokens[0].weight
    return tokens, head
