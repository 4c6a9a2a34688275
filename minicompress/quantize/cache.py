"""The memory of a language model while it writes: keys and values.

To write a token, attention needs the keys and the values of all tokens
before it, and keeps them.  For long texts this cache is larger than the
weights; it can be rounded as well.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import codes
from ..codes import Code
from ..models import LM
from ..models.language import places
from ..storage import payload


def quantize_keys(K: Tensor, *, bits: int, group: int = 32) -> Code:
    """Round keys channel by channel, a group of tokens at a time.

    In some channels the keys of *all* tokens are large.  A grid of its own
    for each channel keeps them away from the others.

    Parameters
    ----------
    K
        (..., tokens, d), a multiple of `group` tokens.
    bits
        of an integer, 1 to 8.
    group
        tokens that share a grid, in each channel.

    Returns
    -------
    Code of the shape of K: q scale + low, with scale and low as float16, so
    that a number takes bits + 32 / group.

    Raises
    ------
    ValueError
        If `group` does not divide the tokens, or K is not finite.

    References
    ----------
    Liu et al., KIVI, arXiv:2402.02750, section 3.

    Examples
    --------
    >>> K = torch.tensor([[96.0, 0.25], [104.0, 0.5]])
    >>> quantize_keys(K, bits=1, group=2).decode()
    tensor([[ 96.0000,   0.2500],
            [104.0000,   0.5000]])
    """
    if K.ndim < 2 or group < 1 or K.shape[-2] % group:
        raise ValueError(
            f"group must divide the tokens of K {tuple(K.shape)}, got {group}"
        )
    blocks = K.unflatten(-2, (-1, group))  # (..., tokens / group, group, d)
    return codes.View(_rounded("K", blocks, -2, bits), tuple(K.shape))


def quantize_values(V: Tensor, *, bits: int, group: int | None = None) -> Code:
    """Round values token by token.

    What attention returns is a sum of values that a few tokens dominate: the
    error of a token must not depend on the others.

    Parameters
    ----------
    V
        (..., tokens, d).
    bits
        of an integer, 1 to 8.
    group
        neighboring channels of a token that share a grid; all d if left out.

    Returns
    -------
    Code of the shape of V, as for `quantize_keys`.

    References
    ----------
    Liu et al., KIVI, arXiv:2402.02750, section 3.

    Examples
    --------
    >>> V = torch.tensor([[0.0, 1.0, 3.0], [100.0, 200.0, 400.0]])
    >>> quantize_values(V, bits=2).decode()
    tensor([[  0.,   1.,   3.],
            [100., 200., 400.]])
    """
    group = V.shape[-1] if group is None else group
    if group < 1 or V.shape[-1] % group:
        raise ValueError(
            f"group must divide the last axis of V {tuple(V.shape)}, got "
            f"{group}"
        )
    blocks = V.unflatten(-1, (-1, group))  # (..., tokens, d / group, group)
    return codes.View(_rounded("V", blocks, -1, bits), tuple(V.shape))


def _rounded(name: str, X: Tensor, axis: int, bits: int) -> Code:
    """Round to 2^b points from the smallest to the largest along an axis."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1 to 8, got {bits}")
    X, levels = X.detach().float(), 2**bits - 1
    low, high = X.amin(axis, keepdim=True), X.amax(axis, keepdim=True)
    low, scale = low.half(), ((high - low) / levels).half()
    if not (low.isfinite().all() and scale.isfinite().all()):
        raise ValueError(f"{name} {tuple(X.shape)} must be finite in float16")
    step = torch.where(scale > 0, scale, 1.0).float()
    # the integers are chosen for the scale that is stored
    q = torch.round((X - low.float()) / step).clamp(0, levels)
    return codes.Sum(codes.Scaled(codes.Ints(q.int(), bits), scale), low)


@dataclass(frozen=True, eq=False, repr=False)
class Cache:
    """Keys and values of one layer: the old ones rounded, the last ones not.

    Tokens leave the floating-point window in whole groups, oldest first, and
    are rounded once; a rounded group is never touched again.

    Parameters
    ----------
    bits
        of a rounded number.
    group
        tokens that are rounded together.
    window
        as many tokens at least stay in floating point, once there are so
        many; with a window as long as the text nothing is rounded.
    keys, values
        codes of the groups so far, each of (..., group, d).
    recent
        keys and values (..., tokens, d) in the window; None at the start.

    References
    ----------
    Liu et al., KIVI, arXiv:2402.02750, algorithm 1.

    Examples
    --------
    >>> cache = Cache(bits=2, group=4, window=2)
    >>> for token in torch.randn(9, 1, 8):
    ...     cache = cache.append(token, token)
    >>> cache
    Cache(9 tokens, 4 of them in 2 bits)
    >>> cache.recent[0].shape
    torch.Size([5, 8])
    """

    bits: int
    group: int = 32
    window: int = 32
    keys: tuple[Code, ...] = ()
    values: tuple[Code, ...] = ()
    recent: tuple[Tensor, Tensor] | None = None

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {self.bits}")
        if self.group < 1 or self.window < 0:
            raise ValueError(
                "group must be at least 1 and window at least 0, got "
                f"{self.group} and {self.window}"
            )

    def __repr__(self) -> str:
        old = len(self.keys) * self.group
        return f"Cache({len(self)} tokens, {old} of them in {self.bits} bits)"

    def __len__(self) -> int:
        tail = 0 if self.recent is None else self.recent[0].shape[-2]
        return len(self.keys) * self.group + tail

    def append(self, K: Tensor, V: Tensor) -> "Cache":
        """Return a cache that also holds K and V (..., tokens, d)."""
        if self.recent is not None:
            K = torch.cat([self.recent[0], K], -2)
            V = torch.cat([self.recent[1], V], -2)
        keys, values, g = self.keys, self.values, self.group
        while K.shape[-2] >= self.window + g:
            keys += (quantize_keys(K[..., :g, :], bits=self.bits, group=g),)
            values += (quantize_values(V[..., :g, :], bits=self.bits),)
            K, V = K[..., g:, :], V[..., g:, :]
        return replace(self, keys=keys, values=values, recent=(K, V))

    def decode(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values (..., tokens, d)."""
        if self.recent is None:
            raise ValueError("cache is empty: append keys and values first")
        parts = ((self.keys, self.recent[0]), (self.values, self.recent[1]))
        K, V = (
            torch.cat([*(c.decode().to(x.dtype) for c in old), x], -2)
            for old, x in parts
        )
        return K, V

    def payload(self) -> int:
        """Count the bytes of everything that is kept."""
        return sum(map(payload, self.keys + self.values + (self.recent or ())))


class CachedLM(nn.Module):
    """A language model that reads one token at a time, through a cache.

    It computes what the model computes, up to the rounding of the cache, so
    that `train.bits_per_char` can measure what that costs.

    Parameters
    ----------
    model
        an `LM`; shared, not copied.
    cache
        an empty `Cache`, the start for every layer.

    Examples
    --------
    >>> model = LM(vocab=9, width=8, layers=1, heads=2, ff=8, context=6)
    >>> ids = torch.tensor([[1, 2, 3, 4, 5]])
    >>> exact = CachedLM(model, Cache(bits=2, group=2, window=6))
    >>> torch.allclose(exact(ids), model(ids), atol=1e-5)
    True
    """

    def __init__(self, model: LM, cache: Cache):
        super().__init__()
        if len(cache):
            raise ValueError(f"cache must be empty, it holds {len(cache)}")
        self.model, self.cache, self.config = model, cache, model.config

    def forward(self, ids: Tensor) -> Tensor:
        """Return the next-token logits (N, T, vocab) of ids (N, T)."""
        model = self.model
        x = model.tokens(ids) + places(model.positions, ids)  # (N, T, width)
        caches = [self.cache] * len(model.blocks)
        steps = []
        for token in x.split(1, 1):  # (N, 1, width)
            for i, block in enumerate(model.blocks):
                y, caches[i] = attend(
                    block.attention, block.norm1(token), caches[i]
                )
                token = token + y
                token = token + block.mlp(block.norm2(token))
            steps.append(token)
        return model.head(model.norm(torch.cat(steps, 1)))


def attend(
    attention: nn.Module, x: Tensor, cache: Cache
) -> tuple[Tensor, Cache]:
    """Let one new token look at itself and at what the cache holds.

    Parameters
    ----------
    attention
        `models.language.Attention`.
    x
        (N, 1, width), the token.
    cache
        keys and values (N, heads, tokens, d) of those before it.

    Returns
    -------
    y : (N, 1, width), and the cache with the new token.

    Examples
    --------
    >>> from minicompress.models.language import Attention
    >>> y, cache = attend(Attention(8, 2), torch.zeros(1, 1, 8), Cache(bits=4))
    >>> y.shape, len(cache)
    (torch.Size([1, 1, 8]), 1)
    """
    q, k, v = (
        attention.split(f(x)) for f in (attention.q, attention.k, attention.v)
    )
    cache = cache.append(k, v)
    K, V = cache.decode()  # (N, heads, tokens, d)
    a = torch.softmax(q @ K.mT / attention.head_dim**0.5, -1)
    return attention.out((a @ V).transpose(1, 2).flatten(2)), cache
