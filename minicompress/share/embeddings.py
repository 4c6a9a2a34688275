"""Tables of embeddings: one for two uses, or two thin ones for one.

`tie_embeddings` lets the output layer use the table of the input.  A table of
V rows and H columns may also be the product of a narrow table (V, E) and a
projection (E, H): `factorize_embedding` finds the best product for a table
that is trained, `factorized_embedding` starts a new one.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from .tying import merge, refuse_parametrized, uses


def tie_embeddings(model: nn.Module, table: str, head: str) -> nn.Module:
    """Let the output layer of a model use the table of its input.

    In training the gradient of the table is the sum of both uses.  The table
    has to suit both from the start: rows of length 1, N(0, 1/H), make logits
    of size 1 from normalized features, where the N(0, 1) of nn.Embedding
    makes them sqrt(H) times as large.

    Parameters
    ----------
    model
        left as it is.
    table
        path of the nn.Embedding (V, H), whose numbers stay.
    head
        path of the nn.Linear with a weight (V, H).  Its bias stays its own.

    Returns
    -------
    A copy of the model with one parameter for both.

    Raises
    ------
    ValueError
        If one of the two is missing, has no such weight or another shape.

    References
    ----------
    Press and Wolf, Using the Output Embedding to Improve Language Models,
    arXiv:1608.05859.
    Inan et al., Tying Word Vectors and Word Classifiers, arXiv:1611.01462.

    Examples
    --------
    >>> from minicompress import models
    >>> sizes = {"width": 8, "layers": 1, "heads": 2, "ff": 8, "context": 4}
    >>> model = models.LM(vocab=40, **sizes, tied=False)
    >>> tied = tie_embeddings(model, "tokens", "head")
    >>> tied.head.weight is tied.tokens.weight
    True
    """
    refuse_parametrized(model)
    model = deepcopy(model)
    W = _layer(model, "table", table, nn.Embedding).weight
    old = _layer(model, "head", head, nn.Linear).weight
    if (W.shape, W.dtype) != (old.shape, old.dtype):
        raise ValueError(
            f"head: {head} has a weight {(*old.shape,)} {old.dtype}, the "
            f"table {table} {(*W.shape,)} {W.dtype}"
        )
    merge(model, [old], W)
    return model


def factorize_embedding(
    embedding: nn.Embedding, *, width: int, counts: Tensor | None = None
) -> nn.Sequential:
    """Replace a table by a narrow one and a projection, W ~ A B.

    Parameters
    ----------
    embedding
        with a weight W (V, H); left as it is.
    width
        E, columns of A and rows of B; see `break_even_width`.
    counts
        (V,) how often each token occurs, 0 or more.  They weight the squared
        errors of the rows, so that frequent tokens lose less.  Without them
        all rows count the same: the truncated SVD of W.

    Returns
    -------
    nn.Sequential
        nn.Embedding(V, E) and nn.Linear(E, H) without a bias, of the dtype of
        W.  The row e of B has the length of the root of the singular value
        s_e (of W, or of W with its rows weighted), at least 0.001 of the
        longest; without counts the column e of A has it too.

    Raises
    ------
    ValueError
        If `width` or `counts` do not fit the table.

    References
    ----------
    Lan et al., ALBERT, arXiv:1909.11942, section 3.1 (the layers).
    Hsu et al., Language Model Compression with Weighted Low-Rank
    Factorization, arXiv:2207.00112 (weights for rows).

    Examples
    --------
    >>> factorize_embedding(nn.Embedding(1000, 64), width=16)
    Sequential(
      (0): Embedding(1000, 16)
      (1): Linear(in_features=16, out_features=64, bias=False)
    )
    """
    W = embedding.weight.detach().double()
    _check(embedding, width, counts)
    D = W
    if counts is not None:  # rows times the roots of their shares, mean 1
        share = counts.to(W) / counts.to(W).mean()
        D = share.sqrt()[:, None] * W
    _, S, Vh = torch.linalg.svd(D, full_matrices=False)
    S, Vh = S[:width], Vh[:width]
    # A B = W Vh^T Vh: the rows of W, also of tokens that never occur,
    # projected to the best directions, whatever root splits it in two
    root = S.clamp(min=1e-6 * float(S[0]) or 1.0).sqrt()
    A, B = W @ Vh.T / root, root[:, None] * Vh  # (V, E), (E, H)
    return _layers(A.to(embedding.weight), B.to(embedding.weight), embedding)


def factorize_vocabulary(
    model: nn.Module,
    table: str,
    head: str | None = None,
    *,
    width: int,
    counts: Tensor | None = None,
) -> nn.Module:
    """Factorize the table of a model, and the output layer that is tied to it.

    Parameters
    ----------
    model
        left as it is.
    table
        path of the nn.Embedding (V, H).
    head
        path of the nn.Linear (H, V) that has the same weight, if one has.
    width, counts
        as for `factorize_embedding`.

    Returns
    -------
    nn.Module
        A copy with the two layers of `factorize_embedding` at `table`.  At
        `head` stand two as well: from H to E, which starts as the
        transposed projection and is not tied to it, and from E to V, which
        has the weight of the narrow table.

    Raises
    ------
    ValueError
        If the table is tied to something that `head` does not name, or not
        tied to what it names.

    References
    ----------
    Lan et al., ALBERT, arXiv:1909.11942, section 3.1.

    Examples
    --------
    >>> from minicompress import measure, models
    >>> sizes = {"width": 64, "layers": 1, "heads": 2, "ff": 8, "context": 4}
    >>> model = models.LM(vocab=1000, **sizes)
    >>> small = factorize_vocabulary(model, "tokens", "head", width=16)
    >>> measure.params(model) - measure.params(small)
    45952
    """
    refuse_parametrized(model)
    model = deepcopy(model)
    old = _layer(model, "table", table, nn.Embedding)
    name = f"{table}.weight"
    wanted = [name] if head is None else [name, f"{head}.weight"]
    shared = [names for names in uses(model).values() if name in names]
    found = shared[0] if shared else [name]
    if set(found) != set(wanted):
        raise ValueError(
            f"head: one tensor must be the weight of {wanted}, and one is "
            f"that of {found}"
        )
    new = factorize_embedding(old, width=width, counts=counts)
    if head is not None:
        output = _layer(model, "head", head, nn.Linear)
        _put(model, head, _thin_head(output, new))
    _put(model, table, new)
    return model


def factorized_embedding(
    V: int, width: int, features: int, *, std: float = 0.02
) -> nn.Sequential:
    """Start a narrow table and a projection in the place of a full table.

    The table is N(0, std^2), the projection N(0, 1/E): an entry of their
    product is a sum of E terms and has the variance std^2 of a full table
    that is N(0, std^2).  Where both are drawn like a full table the product
    is smaller: from two N(0, 0.02^2) and E = 128 it is N(0, 0.0045^2).  A
    comparison of tables that start with different variances is one of
    variances as well.

    Parameters
    ----------
    V
        tokens.
    width
        E, columns of the table.
    features
        H, what the two return.
    std
        standard deviation of the product.  0.02 is that of BERT and ALBERT.

    Returns
    -------
    nn.Sequential
        Of nn.Embedding(V, E) and nn.Linear(E, H) without a bias, drawn with
        torch's generator.

    References
    ----------
    Lan et al., ALBERT, arXiv:1909.11942, section 3.1.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> new = factorized_embedding(1000, 16, 64, std=0.5)
    >>> round(new(torch.arange(1000)).std().item(), 1)
    0.5
    """
    for name, n in {"V": V, "width": width, "features": features}.items():
        if n < 1:
            raise ValueError(f"{name} must be at least 1, got {n}")
    if not std > 0:
        raise ValueError(f"std must be above 0, got {std}")
    A = torch.randn(V, width) * std
    B = torch.randn(width, features) / width**0.5
    return _layers(A, B)


def break_even_width(V: int, H: int) -> float:
    """Compute the width E below which a factorized table is smaller.

    V E + E H < V H if and only if E < V H / (V + H).

    Parameters
    ----------
    V
        rows.
    H
        columns.

    Returns
    -------
    float

    Examples
    --------
    >>> round(break_even_width(30_000, 768), 1)
    748.8
    """
    if V < 1 or H < 1:
        raise ValueError(f"V and H must be at least 1, got {V} and {H}")
    return V * H / (V + H)


def _layers(
    A: Tensor, B: Tensor, old: nn.Embedding | None = None
) -> nn.Sequential:
    """Put a table A (V, E) and a projection B (E, H) into layers."""
    like = {"device": A.device, "dtype": A.dtype}
    place = None if old is None else old.padding_idx
    table = skip_init(nn.Embedding, *A.shape, padding_idx=place, **like)
    projection = skip_init(nn.Linear, *B.shape, bias=False, **like)
    with torch.no_grad():
        table.weight.copy_(A)
        projection.weight.copy_(B.T)
    new = nn.Sequential(table, projection)
    if old is None:
        return new
    return new.requires_grad_(old.weight.requires_grad).train(old.training)


def _thin_head(old: nn.Linear, new: nn.Sequential) -> nn.Sequential:
    """Compute x (A B)^T = (x B^T) A^T, with the table A itself."""
    table, projection = new
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    E, V = table.embedding_dim, table.num_embeddings
    down = skip_init(nn.Linear, old.in_features, E, bias=False, **like)
    with torch.no_grad():
        down.weight.copy_(projection.weight.T)
    up = nn.Linear(E, V, bias=False, device="meta")
    up.weight, up.bias = table.weight, old.bias
    return nn.Sequential(down, up).train(old.training)


def _layer(model: nn.Module, argument: str, path: str, kind: type):
    """Find a layer of some type, or name the argument that is wrong."""
    try:
        found = model.get_submodule(path)
    except AttributeError:
        raise ValueError(f"{argument}: the model has no {path!r}") from None
    if not isinstance(found, kind):
        raise ValueError(
            f"{argument}: {path!r} is a {type(found).__name__}, not an "
            f"nn.{kind.__name__}"
        )
    return found


def _put(model: nn.Module, path: str, layer: nn.Module) -> None:
    owner, _, key = path.rpartition(".")
    model.get_submodule(owner)._modules[key] = layer


def _check(embedding: nn.Embedding, width: int, counts: Tensor | None) -> None:
    V, H = embedding.weight.shape
    if embedding.max_norm is not None:
        raise ValueError("embedding: max_norm changes rows when it is called")
    if not 1 <= width <= min(V, H):
        raise ValueError(
            f"width must be 1 to {min(V, H)} for a table {(V, H)}, got {width}"
        )
    if counts is None:
        return
    if counts.shape != (V,):
        raise ValueError(
            f"counts must have shape ({V},), got {(*counts.shape,)}"
        )
    if not (counts >= 0).all() or not counts.sum() > 0:
        raise ValueError("counts must be 0 or more, and not all 0")
