"""Two Transformers: a decoder language model and a BERT-type encoder.

Query, key, value and output are separate linear layers, so that a head is a
slice of rows; the number of heads is read from what the layers return, so
that a model with fewer heads or hidden units runs without a new class.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import configured


class Attention(nn.Module):
    """Multi-head attention over one sequence.

    Parameters
    ----------
    width : int
        Features of a token.
    heads : int
        Must divide the width.

    References
    ----------
    Vaswani et al. 2017, arXiv:1706.03762, equation 1.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: {heads} do not divide width {width}")
        self.head_dim = width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """Mix tokens (N, T, width); mask (N, T) is True where one may look."""
        q, k, v = (self.split(f(x)) for f in (self.q, self.k, self.v))
        if mask is not None:
            mask = mask[:, None, None, :]  # (N, 1, 1, T): keys, not queries
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))  # (N, T, width)

    def split(self, x: Tensor) -> Tensor:
        """Cut the features (N, T, heads·d) into heads (N, heads, T, d)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    """The layers of one Transformer block; subclasses say how they connect."""

    def __init__(self, width: int, heads: int, ff: int, eps: float = 1e-5):
        super().__init__()
        self.attention = Attention(width, heads)
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, ff)
        self.down = nn.Linear(ff, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)

    def mlp(self, x: Tensor) -> Tensor:
        """Transform each token by itself, (N, T, width) to the same."""
        return self.down(F.gelu(self.up(x)))


class PreNorm(Block):
    """A causal block that normalizes what enters each branch (GPT-2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (N, T, width) to (N, T, width)."""
        x = x + self.attention(self.norm1(x), causal=True)
        return x + self.mlp(self.norm2(x))


class PostNorm(Block):
    """A bidirectional block that normalizes each sum (BERT)."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map tokens (N, T, width) to (N, T, width)."""
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.mlp(x))


class LM(nn.Module):
    """A decoder language model: each token is predicted from those before.

    With the sizes of GPT-2 it has GPT-2's 124,439,808 parameters.

    Parameters
    ----------
    vocab : int
        Different tokens.
    width : int
        Features of a token.
    layers, heads, ff : int
        Blocks, attention heads per block, hidden units of a block's MLP.
    context : int
        Tokens the model can see: the length of the position table.
    tied : bool
        Whether the output layer is the token table.

    Examples
    --------
    >>> model = LM(vocab=96, width=32, layers=2, heads=4, ff=64, context=16)
    >>> model(torch.zeros(3, 16, dtype=torch.long)).shape
    torch.Size([3, 16, 96])

    References
    ----------
    Radford et al. 2019, "Language models are unsupervised multitask
    learners"; tied tables: Press and Wolf 2017, arXiv:1608.05859.
    """

    block: type[Block] = PreNorm
    start: float | None = None  # scale of new weights; None is 1 / sqrt(width)

    @configured
    def __init__(
        self,
        vocab: int,
        width: int = 96,
        layers: int = 4,
        heads: int = 4,
        ff: int = 384,
        context: int = 128,
        tied: bool = True,
    ):
        self.tokens = table(vocab, width)
        self.positions = table(context, width)
        self.blocks = nn.ModuleList(
            self.block(width, heads, ff) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        initialize(self, scale=self.start or width**-0.5)
        # 2·layers branches add up in the residual stream: keep its variance
        for block in self.blocks:
            for layer in (block.attention.out, block.down):
                layer.weight.data /= (2 * layers) ** 0.5
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return the next-token logits (N, T, vocab) of ids (N, T)."""
        x = self.tokens(ids) + places(self.positions, ids)  # (N, T, width)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # (N, T, vocab)


class Encoder(nn.Module):
    """A BERT-type encoder: a vector for each token, both sides in view.

    The defaults are BERT-base (109,482,240 parameters with the pooler).

    Parameters
    ----------
    vocab : int
        Different tokens.
    width : int
        Features of a token.
    layers, heads, ff : int
        Blocks, attention heads per block, hidden units of a block's MLP.
    positions : int
        The longest sequence.
    types : int
        Kinds of segments a token can belong to.
    pooler : bool
        Whether there is a layer for `pool`.

    References
    ----------
    Devlin et al. 2019, arXiv:1810.04805.
    """

    @configured
    def __init__(
        self,
        vocab: int = 30522,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        ff: int = 3072,
        positions: int = 512,
        types: int = 2,
        pooler: bool = False,
    ):
        self.tokens = table(vocab, width)
        self.positions = table(positions, width)
        self.types = table(types, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(
            PostNorm(width, heads, ff, eps=1e-12) for _ in range(layers)
        )
        self.pooler = nn.Linear(width, width) if pooler else None
        initialize(self)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        types: Tensor | None = None,
    ) -> Tensor:
        """Return the features of each token.

        Parameters
        ----------
        ids : Tensor of shape (N, T)
        mask : bool Tensor of shape (N, T), optional
            True for tokens, False for padding: at least one True per row.
            The features at the padding mean nothing.
        types : integer Tensor of shape (N, T), optional
            Segment of each token; all zero if left out.

        Returns
        -------
        Tensor of shape (N, T, width)
        """
        types = torch.zeros_like(ids) if types is None else types
        x = self.tokens(ids) + places(self.positions, ids) + self.types(types)
        x = self.norm(x)  # (N, T, width)
        for block in self.blocks:
            x = block(x, mask)
        return x

    def pool(self, x: Tensor) -> Tensor:
        """Turn the first token's features (N, T, width) into (N, width)."""
        if self.pooler is None:
            raise ValueError("pooler: this encoder was built without one")
        return torch.tanh(self.pooler(x[:, 0]))


def table(rows: int, width: int) -> nn.Embedding:
    """Make an embedding and leave its numbers to `initialize`.

    `nn.Embedding(rows, width)` draws them at once; on the meta device that
    is in vain and takes seconds.
    """
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)


def places(positions: nn.Embedding, ids: Tensor) -> Tensor:
    """Look up the vectors (T, width) of the positions 0 to T-1 of ids."""
    length = ids.shape[-1]
    if length > positions.num_embeddings:
        raise ValueError(
            f"ids: {length} tokens, but the model has positions for "
            f"{positions.num_embeddings}"
        )
    return positions(torch.arange(length, device=ids.device))


def initialize(model: nn.Module, scale: float = 0.02) -> None:
    """Draw all weights from N(0, scale²) and set all biases to zero."""
    if next(model.parameters()).is_meta:
        return
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=scale)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
