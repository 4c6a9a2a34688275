"""Remove directions instead of coordinates: the residual stream, rotated.

No feature of a Transformer's stream can be spared, because the information
is spread over all of them.  But if no layer looks at single features, they
may be mixed: with a rotation after every layer that writes, and its inverse
before every layer that reads, the function stays.  In the basis of the
principal components most of the energy lies in a few features, and the
others can go.
"""

from collections.abc import Iterable
from copy import deepcopy

import torch
from torch import Tensor, nn

from .. import calibrate
from ..models import LM
from .channels import remove_channels


def without_scales(model: LM) -> LM:
    """Turn the LayerNorms into RMSNorms without scales: the same function.

    Scale and shift move into the layers that read a norm.  What is left of a
    LayerNorm takes the mean off and divides by the length; if every layer
    that writes to the stream takes the mean off, too, the norm need not::

        LN(x) = RMSNorm(x C),    C = I - 1 1^T / d.

    Parameters
    ----------
    model
        a pre-norm language model of this library, with `nn.LayerNorm`;
        left as it is.

    Returns
    -------
    A new model with `nn.RMSNorm`.  Its output layer is its own: the final
    scale went into it, and not into the table of tokens.

    References
    ----------
    Ashkboos et al., SliceGPT, arXiv:2401.15024, section 3.
    """
    _check(model, nn.LayerNorm)
    model = deepcopy(model)
    model.head = _linear(model.head)
    for path, layers in _readers(model).items():
        norm = model.get_submodule(path)
        for layer in layers:
            W = layer.weight.data.double()
            b = layer.bias.data.double() if layer.bias is not None else 0
            new = W * norm.weight.data.double(), b + W @ norm.bias.data.double()
            layer.weight.data = new[0].to(layer.weight)
            layer.bias = nn.Parameter(new[1].to(layer.weight))
        parent, _, name = path.rpartition(".")
        rms = nn.RMSNorm(len(norm.weight), eps=norm.eps).to(norm.weight)
        setattr(model.get_submodule(parent), name, rms.train(norm.training))
    _change(model, lambda rows: rows - rows.mean(-1, keepdim=True), None)
    return model


def rotated(model: LM, Q: Tensor) -> LM:
    """Rotate the stream of a model whose norms have no scale.

    Parameters
    ----------
    model
        from `without_scales`; left as it is.
    Q
        (width, width) orthogonal; its columns are the new features.

    Returns
    -------
    A new model with the same function, since RMSNorm(x Q) = RMSNorm(x) Q.
    """
    _check(model, nn.RMSNorm)
    n = model.tokens.embedding_dim
    if Q.shape != (n, n):
        raise ValueError(f"Q must be ({n}, {n}), got {tuple(Q.shape)}")
    model, Q = deepcopy(model), Q.double()
    _change(model, lambda rows: rows @ Q, lambda rows: rows @ Q)
    return model


def principal(model: LM, batches: Iterable) -> tuple[Tensor, Tensor]:
    """Find the principal components of what the norms pass on.

    Parameters
    ----------
    model
        from `without_scales`; left as it is.
    batches
        ids (N, T) each, or a tuple whose first entry is that.

    Returns
    -------
    tuple of Tensor
        Share of the energy (width,), largest first, and Q (width, width)
        with the directions as columns, float64.
    """
    _check(model, nn.RMSNorm)
    batches = list(batches)
    if not batches:
        raise ValueError("batches: there are none")
    first = {id(layers[0].weight) for layers in _readers(model).values()}
    stats = calibrate.inputs(model, batches, where=lambda n, w: id(w) in first)
    gram = sum(s.gram.cpu() for s in stats.values())
    energy, Q = torch.linalg.eigh(gram)
    return energy.flip(0) / energy.sum(), Q.flip(1)


def sliced(model: LM, batches: Iterable, *, width: int) -> LM:
    """Keep the first principal components of a language model's stream.

    One rotation serves all layers, so nothing is added to the model.  (The
    paper rotates for each layer anew, which needs a matrix product in every
    shortcut.)

    Parameters
    ----------
    model
        as for `without_scales`.
    batches
        a few passages of text, as for `principal`.
    width
        features that stay.

    Returns
    -------
    A new, narrower model of ordinary layers.

    References
    ----------
    Ashkboos et al., SliceGPT, arXiv:2401.15024, section 3.
    """
    batches = list(batches)
    plain = without_scales(model)
    _, Q = principal(plain, batches)
    turned = rotated(plain, Q.to(plain.head.weight.device))
    n = Q.shape[0]
    if not 1 <= width <= n:
        raise ValueError(f"width must be 1 to {n}, got {width}")
    ids = batches[0] if isinstance(batches[0], Tensor) else batches[0][0]
    ids = ids[:1].to(plain.head.weight.device)
    keep = {"tokens": torch.arange(n) < width}
    small = remove_channels(turned, keep, ids)
    # The mean of squares is over fewer features: the same length as before.
    for path in _readers(small):
        small.get_submodule(path).weight.data *= (n / width) ** 0.5
    return small


def _check(model: nn.Module, norm: type) -> None:
    if not isinstance(model, LM) or type(model.norm) is not norm:
        found = type(getattr(model, "norm", model)).__name__
        raise ValueError(
            f"model must be an LM with nn.{norm.__name__}, got "
            f"{type(model).__name__} with {found}"
        )


def _readers(model: LM) -> dict[str, list[nn.Linear]]:
    """List the layers behind each norm, {path of the norm: layers}."""
    found = {}
    for i, block in enumerate(model.blocks):
        a = block.attention
        found[f"blocks.{i}.norm1"] = [a.q, a.k, a.v]
        found[f"blocks.{i}.norm2"] = [block.up]
    return found | {"norm": [model.head]}


def _change(model: LM, write, read) -> None:
    """Change the vectors that layers write to the stream and read from it."""
    writers = [m for b in model.blocks for m in (b.attention.out, b.down)]
    targets = [(model.tokens.weight, write), (model.positions.weight, write)]
    targets += [(m.bias, write) for m in writers]
    targets += [(m.weight.T, write) for m in writers]  # a view
    if read is not None:
        layers = [m for group in _readers(model).values() for m in group]
        targets += [(m.weight, read) for m in layers]
    with torch.no_grad():
        for t, change in targets:
            t.copy_(change(t.double()))


def _linear(head: nn.Linear) -> nn.Linear:
    """Copy an output layer, so that it is no longer the table of tokens."""
    new = nn.Linear(head.in_features, head.out_features, bias=False)
    new.weight = nn.Parameter(head.weight.detach().clone())
    return new
