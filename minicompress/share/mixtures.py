"""Soft sharing: draw weights together while the network is trained.

Weights are taken for samples of a mixture of K normal distributions, and
-log of its density is added to the loss.  The mixture is trained with the
network; its means become the shared values.  A component at 0 that is held
likely pulls most weights to 0, and so prunes.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from .. import codes


def log_terms(
    w: Tensor, means: Tensor, log_variances: Tensor, logits: Tensor
) -> Tensor:
    """Compute log π_k N(w_i; μ_k, σ_k²), with π = softmax(logits).

    Parameters
    ----------
    w
        weights, any shape.
    means, log_variances, logits
        (K,): μ_k, log σ_k² and what makes π_k.

    Returns
    -------
    (*w.shape, K), in nats.
    """
    if not means.shape == log_variances.shape == logits.shape:
        raise ValueError(
            f"means {tuple(means.shape)}, log_variances "
            f"{tuple(log_variances.shape)} and logits {tuple(logits.shape)} "
            "must have one shape"
        )
    off = (w[..., None] - means).square() / log_variances.exp()
    log_n = -0.5 * (off + log_variances + math.log(2 * math.pi))
    return log_softmax(logits, 0) + log_n


def mixture_penalty(
    w: Tensor, means: Tensor, log_variances: Tensor, logits: Tensor
) -> Tensor:
    """Compute -Σ_i log Σ_k π_k N(w_i; μ_k, σ_k²).

    Nothing bounds it from below: with its mean on one weight, a component
    that narrows gains without end.  `precision_penalty` stops that.

    Parameters
    ----------
    w
        weights, any shape.
    means, log_variances, logits
        (K,): μ_k, log σ_k² and what makes π_k = softmax(logits)_k.

    Returns
    -------
    ()
        Nats for all of w; as a part of a loss that is a mean over N samples it
        belongs there with the factor 1 / N.  Takes memory for K numbers per
        weight.

    References
    ----------
    Nowlan and Hinton, Simplifying Neural Networks by Soft Weight-Sharing,
    Neural Computation 4(4), 1992.
    Ullrich et al., Soft Weight-Sharing for Neural Network Compression,
    arXiv:1702.04008.

    Examples
    --------
    >>> w = torch.tensor([0.0, 1.0])
    >>> one, none = torch.tensor([0.0]), torch.tensor([0.0])
    >>> mixture_penalty(w, one, none, none)  # log 2π + 1/2
    tensor(2.3379)
    """
    terms = log_terms(w, means, log_variances, logits)
    return -torch.logsumexp(terms, -1).sum()


def responsibilities(
    w: Tensor, means: Tensor, log_variances: Tensor, logits: Tensor
) -> Tensor:
    """Compute how likely each component made each weight.

    Parameters
    ----------
    w, means, log_variances, logits
        as in `mixture_penalty`.

    Returns
    -------
    (*w.shape, K); sums to 1 over the last axis.

    Examples
    --------
    >>> w, means = torch.tensor([0.0, 0.9]), torch.tensor([0.0, 1.0])
    >>> same = torch.zeros(2)
    >>> responsibilities(w, means, same - 2, same)
    tensor([[0.9757, 0.0243],
            [0.0495, 0.9505]])
    """
    return log_terms(w, means, log_variances, logits).softmax(-1)


def precision_penalty(
    log_variances: Tensor, *, shape: float, rate: float
) -> Tensor:
    """Compute -log of a gamma density of each 1 / σ_k², less a constant.

    It keeps components from narrowing without end: its least value is at
    σ² = rate / (shape - 1).

    Parameters
    ----------
    log_variances
        (K,).
    shape, rate
        of the gamma distribution; the larger the shape the stricter.

    Returns
    -------
    (), nats.

    References
    ----------
    Ullrich et al., arXiv:1702.04008: the hyper-prior on the precisions.

    Examples
    --------
    >>> v = torch.tensor([0.5], requires_grad=True)
    >>> precision_penalty(v.log(), shape=3.0, rate=1.0).backward()
    >>> v.grad
    tensor([0.])
    """
    precisions = (-log_variances).exp()
    return ((shape - 1) * log_variances + rate * precisions).sum()


def with_zero(
    means: Tensor, logits: Tensor, *, zeros: float = 0.99
) -> tuple[Tensor, Tensor]:
    """Put a component in front whose mean is 0 and whose π is held.

    Parameters
    ----------
    means, logits
        (K - 1,), of the other components; these divide up 1 - zeros.
    zeros
        π_0, 0 to 1.

    Returns
    -------
    Means and logits (K,).

    References
    ----------
    Ullrich et al., arXiv:1702.04008: how the mixture prunes.

    Examples
    --------
    >>> means, logits = with_zero(torch.tensor([-1.0, 1.0]), torch.zeros(2))
    >>> means, logits.softmax(0)
    (tensor([ 0., -1.,  1.]), tensor([0.9900, 0.0050, 0.0050]))
    """
    if not 0 < zeros < 1:
        raise ValueError(f"zeros must be between 0 and 1, got {zeros}")
    odds = logits.new_tensor([math.log(zeros / (1 - zeros))])
    return (
        torch.cat([means.new_zeros(1), means]),
        torch.cat([odds, log_softmax(logits, 0)]),
    )


class Mixture(nn.Module):
    """The mixture as a module, to be trained beside the network.

    Parameters
    ----------
    w
        all the weights that will be drawn together.
    clusters
        K; component 0 stays at 0, the others start evenly spaced from the
        smallest to the largest weight, as wide as half their distance.
    zeros
        π_0, held.

    Examples
    --------
    >>> model = nn.Linear(8, 4)
    >>> mixture = Mixture(model.weight, clusters=5)
    >>> penalty = mixture(model.weight)
    >>> code = collapse(model.weight, *mixture.components())
    >>> code.shape
    (4, 8)
    """

    def __init__(self, w: Tensor, *, clusters: int, zeros: float = 0.99):
        super().__init__()
        if clusters < 3:
            raise ValueError(f"clusters must be at least 3, got {clusters}")
        low, high = (float(x) for x in w.detach().aminmax())
        if low == high:
            raise ValueError(f"w {tuple(w.shape)} holds only {low}")
        half = (high - low) / (clusters - 2) / 2
        means = torch.linspace(low, high, clusters - 1).to(w)
        narrow = w.new_full((clusters,), 2 * math.log(half))
        self.means = nn.Parameter(means)
        self.log_variances = nn.Parameter(narrow)
        self.logits = nn.Parameter(torch.zeros_like(means))
        self.zeros = zeros

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return means, log variances and logits (K,) of all components."""
        means, logits = with_zero(self.means, self.logits, zeros=self.zeros)
        return means, self.log_variances, logits

    def forward(self, *weights: Tensor) -> Tensor:
        """Return the `mixture_penalty` of some weights."""
        w = torch.cat([w.flatten() for w in weights])
        return mixture_penalty(w, *self.components())


def collapse(
    w: Tensor, means: Tensor, log_variances: Tensor, logits: Tensor
) -> codes.Codebook:
    """Give every weight the mean of its most responsible component.

    Parameters
    ----------
    w, means, log_variances, logits
        as in `mixture_penalty`; at most 256 components.

    Returns
    -------
    Codebook
        Decodes to the shape of w; means that no weight takes are left out.

    Examples
    --------
    >>> w, means = torch.tensor([-0.1, 0.2, 0.9]), torch.tensor([0.0, 1.0])
    >>> collapse(w, means, torch.zeros(2) - 4, torch.zeros(2)).decode()
    tensor([0., 0., 1.])
    """
    if not 1 <= len(means) <= 256:
        raise ValueError(f"means must be 1 to 256, got {len(means)}")
    with torch.no_grad():
        best = log_terms(w, means, log_variances, logits).argmax(-1)
        used, index = best.unique(return_inverse=True)
        bits = max(1, (len(used) - 1).bit_length())
        return codes.Codebook(codes.Ints(index, bits), means[used].to(w.dtype))
