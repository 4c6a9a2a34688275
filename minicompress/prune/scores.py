"""How much each weight matters: formulas on plain tensors.

Removing a weight is the step -w, so the loss L changes by

    -g w + 1/2 h w^2 + ...      (g: gradient, h: diagonal of the Hessian)

and nearly every score is a reading of these two terms.  A larger score
means more important; `masks` turns scores into masks, and `saliency` runs a
model to collect g and h.
"""

import torch
from torch import Tensor

from .masks import keep_rows


def taylor(w: Tensor, g: Tensor) -> Tensor:
    """Score weights by `|g w|`, the first-order change of the loss.

    Parameters
    ----------
    w
        weights, any shape.
    g
        as w, gradient of the mean loss.  At a minimum it is zero, and all
        that is left of this score is noise: use it before or while training.

    Returns
    -------
    as w.

    References
    ----------
    Molchanov et al., Importance Estimation for Neural Network Pruning,
    arXiv:1906.10771, equation 8 (there squared).

    Examples
    --------
    >>> taylor(torch.tensor([2.0, 3.0]), torch.tensor([-1.0, 0.0]))
    tensor([2., 0.])
    """
    _same("g", g, w)
    return (g * w).abs()


def gradient(g: Tensor) -> Tensor:
    """Score weights by `|g|` alone: a counter-example, do not prune with it.

    Removing a weight is a step of length `|w|`, however small the gradient.
    Where training has ended every gradient is zero up to noise, so the rule
    "a small gradient means a useless weight" would remove anything.

    Parameters
    ----------
    g
        gradient, any shape.

    Returns
    -------
    as g.
    """
    return g.abs()


def fisher(w: Tensor, g2: Tensor) -> Tensor:
    """Score weights by 1/2 E[g^2] w^2, the Fisher information for h.

    Parameters
    ----------
    w
        weights, any shape.
    g2
        as w, mean over samples of the squared gradient of *one* sample,
        from `gradients`.  The square of the mean gradient is no substitute:
        it vanishes at a minimum.

    Returns
    -------
    as w; nats, if the loss is a cross-entropy in nats.

    References
    ----------
    Theis et al., Faster gaze prediction with dense networks and Fisher
    pruning, arXiv:1801.05787, section 3.1.

    Examples
    --------
    >>> fisher(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 0.0]))
    tensor([2., 0.])
    """
    _same("g2", g2, w)
    return 0.5 * g2 * w.square()


def obd(w: Tensor, h: Tensor) -> Tensor:
    """Score weights by 1/2 h w^2: Optimal Brain Damage.

    Exact for a quadratic loss at its minimum, one weight at a time.  For a
    set of weights it is exact only if the Hessian is diagonal.

    Parameters
    ----------
    w
        weights, any shape.
    h
        broadcasts to w, diagonal of the Hessian.  `curvature` estimates it,
        with negative entries where the loss curves downwards; these would
        go first.  The paper's Gauss-Newton diagonal has none: it is the
        mean square from `gradients` with labels drawn from the model.
        For the squared error of the outputs of one layer it is twice the
        diagonal of H = E[x x^T], the same for every row.

    Returns
    -------
    as w.

    References
    ----------
    LeCun, Denker, Solla, Optimal Brain Damage, NIPS 1989, equation 5.

    Examples
    --------
    >>> obd(torch.tensor([[2.0, 3.0]]), torch.tensor([1.0, 0.5]))
    tensor([[2.0000, 2.2500]])
    """
    return 0.5 * h.expand_as(w) * w.square()


def obs(W: Tensor, Hinv: Tensor) -> Tensor:
    """Score weights by w^2 / (2 [H^-1]_qq): Optimal Brain Surgeon.

    What a removal costs when all other weights of its row then move to
    their best place; never more than the score of `obd`.  The scores hold
    for the next removal only: afterwards W and H^-1 have changed.

    Parameters
    ----------
    W
        (out, in) weights; the rows share one Hessian.
    Hinv
        (in, in) inverse of the Hessian.  With the inverse of E[x x^T],
        which is half the Hessian of the layer's squared error, the score is
        half the rise of that error.

    Returns
    -------
    (out, in).

    References
    ----------
    Hassibi and Stork, Optimal Brain Surgeon, NIPS 1992, equation 5.

    Examples
    --------
    >>> Hinv = torch.tensor([[2.0, 1.0], [1.0, 0.5]])
    >>> obs(torch.tensor([[2.0, 1.0]]), Hinv)
    tensor([[1., 1.]])
    """
    if W.ndim != 2 or Hinv.shape != (W.shape[1], W.shape[1]):
        raise ValueError(
            f"Hinv must be (in, in) for W (out, in), got Hinv "
            f"{tuple(Hinv.shape)} and W {tuple(W.shape)}"
        )
    return W.square() / (2 * Hinv.diagonal())


def inverse_fisher(g: Tensor, *, damp: float) -> Tensor:
    """Invert damp I + E[g g^T], the Fisher information in place of H.

    One sample after the other (Sherman and Morrison), no matrix is ever
    inverted:

        F^-1 <- F^-1 - F^-1 g g^T F^-1 / (N + g^T F^-1 g)

    Parameters
    ----------
    g
        (N, n) gradients of single samples for n weights that are scored
        together: a row, a small layer or a block of one.
    damp
        what is added to the diagonal, in the unit of g^2.

    Returns
    -------
    (n, n) in the dtype of g, for `obs`.  Computed in float64; the time
    grows as N n^2.

    References
    ----------
    Singh and Alistarh, WoodFisher: Efficient Second-Order Approximation for
    Neural Network Compression, arXiv:2004.14340.

    Examples
    --------
    >>> g = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    >>> Finv = inverse_fisher(g, damp=1.0)
    >>> torch.allclose(Finv.inverse(), torch.eye(2) + g.T @ g / 2)
    True
    """
    if g.ndim != 2 or not len(g):
        raise ValueError(f"g must be (samples, n), got {tuple(g.shape)}")
    if not damp > 0:
        raise ValueError(f"damp must be positive, got {damp}")
    Finv = torch.eye(g.shape[1], dtype=torch.float64, device=g.device) / damp
    for x in g.double():
        v = Finv @ x
        Finv -= torch.outer(v, v) / (len(g) + x @ v)
    return Finv.to(g.dtype)


def wanda_score(W: Tensor, norm: Tensor) -> Tensor:
    """Score weights by `|w| ‖x_j‖`, weight times size of its input.

    The square is exactly what the squared error of the layer's outputs
    rises by when this one weight is set to zero.

    Parameters
    ----------
    W
        (out, in) weights, or (out, channels, h, w) of a convolution.
    norm
        (in,) length of each input over all samples,
        ``calibrate.inputs(model, batches)[name].norm``.

    Returns
    -------
    as W.

    References
    ----------
    Sun et al., A Simple and Effective Pruning Approach for Large Language
    Models, arXiv:2306.11695, equation 1.
    """
    if W.ndim < 2 or norm.numel() != W[:1].numel():
        raise ValueError(
            f"norm must have one entry for each input of W "
            f"{tuple(W.shape)}, got {tuple(norm.shape)}"
        )
    dtype = torch.promote_types(W.dtype, torch.float32)  # fp16 overflows
    return W.abs() * norm.reshape(W.shape[1:]).to(W.device, dtype)


def wanda(W: Tensor, norm: Tensor, *, sparsity: float) -> Tensor:
    """Keep the weights with the largest `|w| ‖x_j‖` of each output.

    Scores are compared within a row only, and what is kept stays as it is.

    Parameters
    ----------
    W
        (out, in) weights, or (out, channels, h, w) of a convolution.
    norm
        (in,) length of each input over all samples.
    sparsity
        fraction of each row that goes.

    Returns
    -------
    bool, as W; True = keep.

    References
    ----------
    Sun et al., A Simple and Effective Pruning Approach for Large Language
    Models, arXiv:2306.11695, algorithm 1.

    Examples
    --------
    >>> W = torch.tensor([[1.0, 2.0], [5.0, 4.0]])
    >>> wanda(W, torch.tensor([3.0, 1.0]), sparsity=0.5)
    tensor([[ True, False],
            [ True, False]])
    """
    return keep_rows(wanda_score(W, norm), sparsity=sparsity)


def snr(mu: Tensor, sigma: Tensor) -> Tensor:
    """Score weights by mu^2 / sigma^2, how sharply their posterior knows them.

    The reading under which "high entropy means prune" is right: a weight
    with posterior N(mu, sigma^2) that is broad for its size holds little
    information.

    Parameters
    ----------
    mu, sigma
        mean and standard deviation of each weight's posterior.

    Returns
    -------
    as mu.

    References
    ----------
    Blundell et al., Weight Uncertainty in Neural Networks,
    arXiv:1505.05424, section 5.1.
    """
    _same("sigma", sigma, mu)
    return (mu / sigma).square()


def channel_entropy(acts: Tensor, *, bins: int = 32) -> Tensor:
    """Score channels by the entropy of their mean activation over inputs.

    A channel that says the same for every input tells the next layer
    nothing: low entropy means prune.  One range serves all channels of the
    layer; a range for each would make the tiny noise of a channel that is
    almost constant look as informative as any.

    Parameters
    ----------
    acts
        (n, channels, ...) activations of one layer on n inputs; all that
        follows the channels (height and width) is averaged.
    bins
        equal bins from the smallest to the largest average in the layer.
        With B of them in use the entropy comes out about (B - 1) / 2n nats
        too small (Miller and Madow): take many more inputs than bins.

    Returns
    -------
    (channels,) float64 nats, 0 to log(bins).

    References
    ----------
    Luo and Wu, An Entropy-based Pruning Method for CNN Compression,
    arXiv:1706.05791, section 3.2.

    Examples
    --------
    >>> acts = torch.tensor([[0.0, 7.0], [8.0, 7.0]])
    >>> channel_entropy(acts).exp()
    tensor([2., 1.], dtype=torch.float64)
    """
    if acts.ndim < 2 or acts.numel() == 0:
        raise ValueError(f"acts must be (n, channels, ...), {acts.shape=}")
    if bins < 2:
        raise ValueError(f"bins must be at least 2, got {bins}")
    f = acts.double().flatten(2).mean(2) if acts.ndim > 2 else acts.double()
    low, high = f.aminmax()
    if not (low.isfinite() and high.isfinite()):
        raise ValueError("acts must be finite, it holds inf or nan")
    width = torch.where(high > low, high - low, 1.0) / bins
    index = ((f - low) / width).long().clamp(max=bins - 1)  # (n, channels)
    counts = f.new_zeros(bins, f.shape[1])
    counts.scatter_add_(0, index, torch.ones_like(f))
    return torch.special.entr(counts / len(f)).sum(0)


def _same(name: str, t: Tensor, w: Tensor) -> None:
    if t.shape != w.shape:
        raise ValueError(
            f"{name} must have shape {tuple(w.shape)}, got {tuple(t.shape)}"
        )
