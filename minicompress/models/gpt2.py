"""GPT-2: the language model of this library, with another activation."""

import torch.nn.functional as F
from torch import Tensor

from .config import configured
from .language import LM, PreNorm


class TanhGELU(PreNorm):
    """A causal block whose activation is the one of GPT-2.

    Its function is near x Φ(x), but with a tanh instead of Φ; the two differ
    by less than 5e-4.

    References
    ----------
    Hendrycks and Gimpel 2016, "Gaussian error linear units",
    arXiv:1606.08415, section 2.
    """

    def mlp(self, x: Tensor) -> Tensor:
        """Transform each token by itself, (N, T, width) to the same."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class GPT2(LM):
    """A decoder language model that computes what GPT-2 computes.

    The defaults are the small GPT-2 (124,439,808 parameters); whatever takes
    an `LM` takes it.

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
    >>> import torch
    >>> with torch.device("meta"):  # shapes only
    ...     model = GPT2()
    >>> sum(w.numel() for w in model.parameters())
    124439808

    References
    ----------
    Radford et al. 2019, "Language models are unsupervised multitask
    learners", section 2.3.
    """

    block, start = TanhGELU, 0.02

    @configured
    def __init__(
        self,
        vocab: int = 50257,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        ff: int = 3072,
        context: int = 1024,
        tied: bool = True,
    ):
        super().__init__(vocab, width, layers, heads, ff, context, tied)
