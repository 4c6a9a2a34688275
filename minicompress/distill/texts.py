"""Texts that a language model writes: sampled, greedy or the likeliest.

A student can be trained on them with plain cross-entropy: distillation of
whole sequences.  The models map ids (N, T) to logits (N, T, vocab), as
`models.LM` does; their window is `model.config["context"]`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..train import evaluating

IGNORED = -100  # the label that F.cross_entropy leaves out


def continuations(
    model: nn.Module,
    prompts: Tensor,
    *,
    length: int,
    temperature: float = 1.0,
    context: int | None = None,
    seed: int | None = 0,
) -> Tensor:
    """Let a model write on: sampled texts, or greedy ones.

    Parameters
    ----------
    model
        runs in evaluation mode without gradients; left as it was.
    prompts
        (N, P) ids, P at least 1; rows of one length, without padding.
    length
        tokens to write, 1 or more.
    temperature
        1 samples from the model's own distribution, 0 takes the likeliest
        token each time.
    context
        tokens that the model can see; `model.config["context"]` if left
        out.  What lies further back is cut off.
    seed
        of the dice; None draws from torch's own generator, which
        `train.fit` seeds.

    Returns
    -------
    (N, P + length) ids: the prompts, continued.

    References
    ----------
    Kim, Rush, Sequence-Level Knowledge Distillation, arXiv:1606.07947,
    section 3.2: a student is trained on what the teacher writes.

    Examples
    --------
    >>> from minicompress.models import LM
    >>> model = LM(vocab=5, width=8, layers=1, heads=2, ff=8, context=4)
    >>> prompts = torch.tensor([[1], [2]])
    >>> continuations(model, prompts, length=6).shape
    torch.Size([2, 7])
    """
    _check_prompts(prompts, length)
    if temperature < 0:
        raise ValueError(f"temperature must not be negative: {temperature}")
    context = model.config["context"] if context is None else context
    with evaluating(model) as device:
        ids, dice = prompts.to(device), None
        if seed is not None:
            dice = torch.Generator(device).manual_seed(seed)
        for _ in range(length):
            logits = model(ids[:, -context:])[:, -1]  # (N, vocab)
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                p = (logits / temperature).softmax(-1)
                new = torch.multinomial(p, 1, generator=dice)
            ids = torch.cat([ids, new], 1)
    return ids


def beam(
    model: nn.Module,
    prompts: Tensor,
    *,
    length: int,
    width: int = 5,
    context: int | None = None,
) -> Tensor:
    """Search for the continuation that a model finds likeliest.

    The `width` best beginnings are kept at each step.  One is greedy; as
    many as there are beginnings finds the best text of all.

    Parameters
    ----------
    model, prompts, length, context
        as for `continuations`.
    width
        texts kept for each prompt, 1 or more.

    Returns
    -------
    (N, P + length) ids.

    References
    ----------
    Kim, Rush, Sequence-Level Knowledge Distillation, arXiv:1606.07947,
    section 3.2: the best text stands for the teacher's whole distribution.

    Examples
    --------
    >>> from minicompress.models import LM
    >>> model = LM(vocab=5, width=8, layers=1, heads=2, ff=8, context=4)
    >>> prompts = torch.tensor([[1], [2]])
    >>> greedy = continuations(model, prompts, length=3, temperature=0)
    >>> torch.equal(beam(model, prompts, length=3, width=1), greedy)
    True
    """
    _check_prompts(prompts, length)
    if width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    context = model.config["context"] if context is None else context
    n = len(prompts)
    with evaluating(model) as device:
        ids = prompts.to(device).repeat_interleave(width, 0)  # (N width, P)
        first = torch.arange(n, device=device)[:, None] * width
        score = torch.full((n, width), -math.inf, device=device)
        score[:, 0] = 0  # all beginnings are alike: go on from one
        for _ in range(length):
            log_p = model(ids[:, -context:])[:, -1].log_softmax(-1)
            vocab = log_p.shape[-1]
            total = score[..., None] + log_p.view(n, width, vocab)
            score, best = total.flatten(1).topk(width)  # (N, width)
            rows = (first + best // vocab).flatten()
            ids = torch.cat([ids[rows], (best % vocab).view(-1, 1)], 1)
    return ids[::width]


def next_tokens(ids: Tensor, *, prompt: int = 1) -> tuple[Tensor, Tensor]:
    """Cut texts into inputs and labels that leave the prompt out.

    Parameters
    ----------
    ids
        (N, T) texts, from `continuations` or `beam`.
    prompt
        tokens at the start that were given, 1 or more: nothing is to be
        learned from them.

    Returns
    -------
    Inputs and labels (N, T - 1), for `train.batches`; the label of a token
    of the prompt is -100, which `train.cross_entropy` ignores.

    Examples
    --------
    >>> next_tokens(torch.tensor([[7, 8, 5, 6]]), prompt=2)
    (tensor([[7, 8, 5]]), tensor([[-100,    5,    6]]))
    """
    check_prompt(ids, prompt)
    labels = ids[:, 1:].clone()
    labels[:, : prompt - 1] = IGNORED
    return ids[:, :-1], labels


def log_likelihood(model: Callable, ids: Tensor, *, prompt: int = 1) -> Tensor:
    """Add up the log-probabilities of the tokens after the prompt.

    Parameters
    ----------
    model
        maps ids (N, T) to logits (N, T, vocab); gradients flow.
    ids
        (N, T) texts, T - 1 at most the model's context.
    prompt
        tokens at the start that are given, 1 or more.

    Returns
    -------
    (N,) in nats, 0 or less.

    Examples
    --------
    >>> uniform = lambda ids: torch.zeros(*ids.shape, 2)
    >>> log_likelihood(uniform, torch.tensor([[0, 1, 1, 0]]), prompt=2)
    tensor([-1.3863])
    """
    check_prompt(ids, prompt)
    log_p = model(ids[:, :-1])[:, prompt - 1 :].log_softmax(-1)
    return log_p.gather(-1, ids[:, prompt:, None]).sum((1, 2))


def check_prompt(ids: Tensor, prompt: int) -> None:
    """Make sure that ids (N, T) go on after the prompt."""
    if ids.ndim != 2 or not 1 <= prompt < ids.shape[1]:
        raise ValueError(f"prompt: {prompt} of ids {tuple(ids.shape)}")


def _check_prompts(prompts: Tensor, length: int) -> None:
    if prompts.ndim != 2 or not prompts.numel():
        raise ValueError(f"prompts: (N, P) ids, not {tuple(prompts.shape)}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
