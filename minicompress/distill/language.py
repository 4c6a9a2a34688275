"""Distilling language models: which divergence, and on whose texts.

The losses compare next-token logits (..., vocab) of the student with those
of the teacher, in nats, averaged over the tokens that the mask lets count.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..train import evaluating
from .texts import check_prompt, continuations


def forward_kl(
    z: Tensor, v: Tensor, *, mask: Tensor | None = None, temperature: float = 1
) -> Tensor:
    """Average KL(p || q) over tokens: cover all that the teacher says.

    Parameters
    ----------
    z
        (..., vocab) the student's logits, which make q.
    v
        as z, the teacher's, which make p; no gradient reaches them.
    mask
        (...) bool, True where a token counts, False at padding.
    temperature
        divides both logits; the sum is not multiplied by its square.

    Returns
    -------
    Scalar, 0 or more, in nats for each token.

    References
    ----------
    Kim, Rush, Sequence-Level Knowledge Distillation, arXiv:1606.07947,
    section 3.1 (word level).

    Examples
    --------
    >>> v = torch.tensor([[0.75, 0.25]]).log()
    >>> round(forward_kl(torch.zeros(1, 2), v).item(), 4)
    0.1308
    """
    log_q, log_p = _log_probabilities(z, v, mask, temperature)
    return _kl(log_p, log_q)


def reverse_kl(
    z: Tensor, v: Tensor, *, mask: Tensor | None = None, temperature: float = 1
) -> Tensor:
    """Average KL(q || p) over tokens: say nothing that the teacher would not.

    On a fixed text this is a sum over the vocabulary and nothing more.  The
    method of the paper needs texts that the student wrote: see `on_policy`.

    Parameters
    ----------
    z, v, mask, temperature
        as for `forward_kl`.

    Returns
    -------
    Scalar, 0 or more, in nats for each token.

    References
    ----------
    Gu et al., MiniLLM, arXiv:2306.08543, section 2.

    Examples
    --------
    >>> v = torch.tensor([[0.75, 0.25]]).log()
    >>> round(reverse_kl(torch.zeros(1, 2), v).item(), 4)
    0.1438
    """
    log_q, log_p = _log_probabilities(z, v, mask, temperature)
    return _kl(log_q, log_p)


def jsd(
    z: Tensor,
    v: Tensor,
    *,
    beta: float = 0.5,
    mask: Tensor | None = None,
    temperature: float = 1,
) -> Tensor:
    """Average beta KL(p || m) + (1 - beta) KL(q || m) over tokens.

    m = beta p + (1 - beta) q lies between teacher and student.  Divided by
    beta this tends to `forward_kl` as beta falls to 0; divided by 1 - beta,
    to `reverse_kl` as beta rises to 1.

    Parameters
    ----------
    z, v, mask, temperature
        as for `forward_kl`.
    beta
        weight of the teacher, between 0 and 1, both excluded.

    Returns
    -------
    Scalar in nats, at most ln 2 for beta = 0.5, where it is symmetric.

    References
    ----------
    Agarwal et al., On-Policy Distillation of Language Models,
    arXiv:2306.13649, section 2.

    Examples
    --------
    >>> z = torch.tensor([[99.0, 0.0]])  # nothing in common with its mirror
    >>> round(jsd(z, -z).item(), 4)
    0.6931
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must be between 0 and 1, got {beta}")
    log_q, log_p = _log_probabilities(z, v, mask, temperature)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def on_policy(
    teacher: nn.Module,
    *,
    prompt: int,
    divergence: Callable[..., Tensor] = reverse_kl,
    fraction: float = 1.0,
    **options,
) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
    """Make a loss for `train.fit` on texts that the student wrote itself.

    A student trained on given texts meets its own mistakes only once it is
    used.  Here it writes, and the teacher says what it would have written
    at each place.  The sampling itself has no gradient.

    Parameters
    ----------
    teacher
        runs in evaluation mode without gradients, on the same device.
    prompt
        tokens of a text that are given to the student, 1 or more.
    divergence
        `forward_kl`, `reverse_kl` or `jsd`.
    fraction
        probability, 0 to 1, that the student writes on after the prompt;
        otherwise the text stays as it is.  Drawn anew for each batch from
        torch's generator, which `train.fit` seeds and its checkpoint keeps.
    **options
        for `divergence`.

    Returns
    -------
    ``loss(model, batch)``; the batch is a tuple whose first entry holds ids
    (N, T), as from `train.passages`.

    References
    ----------
    Agarwal et al., On-Policy Distillation of Language Models,
    arXiv:2306.13649, algorithm 1.

    Examples
    --------
    >>> from minicompress.models import LM
    >>> teacher = LM(vocab=5, width=8, layers=1, heads=2, ff=8, context=4)
    >>> loss = on_policy(teacher, prompt=1)
    >>> loss(teacher, (torch.tensor([[1, 2, 3]]),)).item()
    0.0
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be 0 to 1, got {fraction}")

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        ids = batch[0]
        check_prompt(ids, prompt)
        if torch.rand(()) < fraction:
            length = ids.shape[1] - prompt
            ids = ids[:, :prompt]
            ids = continuations(model, ids, length=length, seed=None)
        with evaluating(teacher):
            v = teacher(ids)
        z = model(ids)
        # the last token of the prompt predicts the first one after it
        return divergence(z[:, prompt - 1 :], v[:, prompt - 1 :], **options)

    return loss


def policy_gradient(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Estimate the gradient of KL(q || p) from the student's own samples.

    grad KL = E[grad log q(y) (log q(y) - log p(y) - b)], y from q.  Without
    a baseline b the estimate is noisy: as E[grad log q] = 0, any b that does
    not depend on y is right.  For each sample it is the mean of the others.

    Parameters
    ----------
    log_q
        (n,) log-probabilities of n samples under the student, which drew
        them at temperature 1; from `log_likelihood`, with gradients.
    log_p
        (n,) the same samples' under the teacher.

    Returns
    -------
    Scalar whose gradient is the estimate.  Its value means nothing: the
    mean of log_q - log_p is the estimate of KL itself.

    References
    ----------
    Gu et al., MiniLLM, arXiv:2306.08543, section 2.2 (without the single
    steps, the mixed sampling and the length normalization added there);
    baseline: Kool, van Hoof, Welling, Buy 4 REINFORCE Samples, Get a
    Baseline for Free!, 2019.

    Examples
    --------
    >>> log_q = torch.tensor([-1.0, -2.0], requires_grad=True)
    >>> policy_gradient(log_q, torch.tensor([-3.0, -2.0])).backward()
    >>> log_q.grad  # the first sample is less likely for the teacher
    tensor([ 1., -1.])
    """
    if log_q.ndim != 1 or len(log_q) < 2:
        raise ValueError(f"log_q: (n,), n > 1, not {tuple(log_q.shape)}")
    same("log_p", log_p, log_q)
    cost = (log_q - log_p).detach()
    n = len(cost)
    others = (cost.sum() - cost) / (n - 1)
    return (log_q * (cost - others)).mean()


def same(name: str, x: Tensor, like: Tensor) -> None:
    """Make sure that x has the shape of another tensor."""
    if x.shape != like.shape:
        raise ValueError(
            f"{name} must have shape {tuple(like.shape)}, got {tuple(x.shape)}"
        )


def _log_probabilities(
    z: Tensor, v: Tensor, mask: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log q and log p (tokens, vocab) of the tokens that count."""
    same("v", v, z)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != z.shape[:-1]:
            raise ValueError(
                f"mask must be bool of shape {tuple(z.shape[:-1])}, got "
                f"{mask.dtype} of {tuple(mask.shape)}"
            )
        # chosen, not multiplied by 0: padding may hold inf or nan
        z, v = z[mask], v[mask]
    if not z.numel():
        raise ValueError("z: there is no token that counts")
    log_q = (z / temperature).log_softmax(-1)
    log_p = (v.detach().to(z) / temperature).log_softmax(-1)
    # a token that a model forbids: 0 times a number is 0, 0 inf is not
    least = torch.finfo(z.dtype).min
    return log_q.clamp_min(least), log_p.clamp_min(least)


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """Return KL(a || b), averaged over all but the last axis."""
    return (log_a.exp() * (log_a - log_b)).sum(-1).mean()
