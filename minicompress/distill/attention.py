"""Distilling Transformers: scores, hidden states, relations of tokens.

Queries, keys and values are what three linear layers of a block return, so
that `record` gets them from a model as it is.  A mask (N, T) is True for
tokens and False for padding, which never counts.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .language import forward_kl, same

QKV = tuple[Tensor, Tensor, Tensor]


def heads(x: Tensor, n: int) -> Tensor:
    """Cut the features (N, T, n d) into n heads (N, n, T, d).

    Examples
    --------
    >>> heads(torch.zeros(2, 7, 12), 3).shape
    torch.Size([2, 3, 7, 4])
    """
    if x.ndim != 3 or n < 1 or x.shape[-1] % n:
        raise ValueError(f"x: {tuple(x.shape)} cannot be cut into {n} heads")
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def attention_scores(
    q: Tensor,
    k: Tensor,
    n: int,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Compute what the softmax of attention gets: q k^T / sqrt(d).

    Parameters
    ----------
    q, k
        (N, T, n d) what the query and the key layer return: `record` the
        modules "blocks.5.attention.q" and "blocks.5.attention.k".
    n
        heads.
    mask
        (N, T) bool, True for tokens; the score of padding is the lowest
        number there is.
    causal
        whether a token sees none after it, as in `models.LM`.

    Returns
    -------
    (N, n, T, T): queries, then keys.

    References
    ----------
    Vaswani et al., Attention Is All You Need, arXiv:1706.03762, equation 1.

    Examples
    --------
    >>> q = torch.ones(1, 2, 4)
    >>> attention_scores(q, q, 1, causal=True).softmax(-1)
    tensor([[[[1.0000, 0.0000],
              [0.5000, 0.5000]]]])
    """
    q, k = heads(q, n), heads(k, n)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    seen = seen.tril() if causal else seen
    if mask is not None:
        seen = seen & _token_mask(mask, q.transpose(1, 2))[:, None, None]
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min)


def tinybert_attention(
    s: Tensor, t: Tensor, *, mask: Tensor | None = None
) -> Tensor:
    """Compute the mean squared difference of scores before the softmax.

    Parameters
    ----------
    s, t
        (N, heads, T, T) from `attention_scores` without a mask, of student
        and teacher, with the same number of heads.
    mask
        (N, T) bool, True for tokens: a pair counts if both are.

    Returns
    -------
    Scalar.

    References
    ----------
    Jiao et al., TinyBERT, arXiv:1909.10351, section 3.1.

    Examples
    --------
    >>> s = torch.zeros(1, 2, 3, 3)
    >>> tinybert_attention(s, s + 2).item()
    4.0
    """
    same("t", t, s)
    error = (s - t.detach()).square().mean(1)  # (N, T, T)
    if mask is not None:
        mask = _token_mask(mask, error)
        error = error[mask[:, :, None] & mask[:, None]]
    return error.mean()


def tinybert_hidden(
    s: Tensor,
    t: Tensor,
    regressor: Callable | None = None,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the mean squared difference of regressed hidden states.

    The same loss compares the embeddings.

    Parameters
    ----------
    s
        (N, T, width) of the student.
    t
        (N, T, any width) of the teacher.
    regressor
        maps s to the width of t; trained with the student, see `hint`.
    mask
        (N, T) bool, True for tokens.

    Returns
    -------
    Scalar.

    References
    ----------
    Jiao et al., TinyBERT, arXiv:1909.10351, section 3.1.

    Examples
    --------
    >>> s = torch.zeros(1, 3, 4)
    >>> tinybert_hidden(s, s + 2).item()
    4.0
    """
    s = s if regressor is None else regressor(s)
    same("t", t, s)
    error = (s - t.detach()).square()
    return (error if mask is None else error[_token_mask(mask, s)]).mean()


def cosine(s: Tensor, t: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute 1 - cos between hidden states: their direction, not length.

    Half the squared distance of the states, each scaled to length 1, which
    is the form that PKD (arXiv:1908.09355) uses.

    Parameters
    ----------
    s, t
        (N, T, width) or (N, width) of student and teacher.
    mask
        all axes of s but the last, bool, True for tokens.

    Returns
    -------
    Scalar, 0 to 2, averaged over tokens.

    References
    ----------
    Sanh et al., DistilBERT, arXiv:1910.01108, section 2.

    Examples
    --------
    >>> cosine(torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 0.0]])).item()
    1.0
    """
    same("t", t, s)
    loss = 1 - F.cosine_similarity(s, t.detach(), dim=-1)
    return (loss if mask is None else loss[_token_mask(mask, s)]).mean()


def relation_kl(
    s: tuple[Tensor, Tensor],
    t: tuple[Tensor, Tensor],
    n: int,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Compare how tokens relate: KL between softmaxes of scaled products.

    Parameters
    ----------
    s
        two tensors (N, T, width) of the student: queries and keys, or twice
        the same.
    t
        two of the teacher; its width may differ, not its N and T.
    n
        heads into which all of them are cut.
    mask
        (N, T) bool, True for tokens: padding neither looks nor is seen.
    causal
        as for `attention_scores`.

    Returns
    -------
    Scalar: KL(teacher || student) in nats, averaged over heads and tokens.

    References
    ----------
    Wang et al., MiniLMv2, arXiv:2012.15828, which adds this up for queries,
    keys and values, each related to itself, cut into `n` relation heads.

    Examples
    --------
    >>> q, k = torch.rand(2, 2, 5, 8)
    >>> relation_kl((q, k), (q, k), 4).item()
    0.0
    """
    z = attention_scores(*s, n, mask=mask, causal=causal)
    v = attention_scores(*t, n, mask=mask, causal=causal)
    if mask is not None:
        mask = mask[:, None].expand(z.shape[:-1])  # (N, heads, T): queries
    return forward_kl(z, v, mask=mask)


def minilm(
    s: QKV, t: QKV, n: int, *, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Compare attention and the relations of values in the last layer.

    Parameters
    ----------
    s
        queries, keys and values (N, T, width) of the student's last layer.
    t
        those of the teacher; any width, the same number of heads.
    n
        heads of both.
    mask, causal
        as for `relation_kl`.

    Returns
    -------
    Scalar in nats: the sum of both divergences.

    References
    ----------
    Wang et al., MiniLM, arXiv:2002.10957, section 3.

    Examples
    --------
    >>> qkv = tuple(torch.rand(3, 2, 5, 8))
    >>> minilm(qkv, qkv, 4).item()
    0.0
    """
    options = {"mask": mask, "causal": causal}
    attention = relation_kl(s[:2], t[:2], n, **options)
    values = relation_kl((s[2], s[2]), (t[2], t[2]), n, **options)
    return attention + values


def _token_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Check a mask of the tokens x (N, T, ...)."""
    shape = tuple(x.shape[: max(1, min(2, x.ndim - 1))])
    if mask.dtype != torch.bool or tuple(mask.shape) != shape:
        raise ValueError(
            f"mask must be bool of shape {shape}, got {mask.dtype} of "
            f"{tuple(mask.shape)}"
        )
    if not mask.any():
        raise ValueError("mask: there is no token that counts")
    return mask.to(x.device)
