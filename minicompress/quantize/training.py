"""Train with few bits: the weight in use is rounded, the one kept is not.

The latent weight w is what the optimizer moves; the model computes with
w' = Q(w).  Rounding has derivative 0 nearly everywhere, so each method says
what gradient passes instead, and which parts of Q are learned.  All are
functions ``f(w, **tensors) -> w'`` for `through.attach`, and have a code
that decodes to exactly the weights that the model was trained with.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import codes, through
from ..through import straight
from .grids import a_step, in_lines


def ste(w: Tensor, *, bits: int, each: str | int = "row") -> Tensor:
    """Round to a symmetric grid that follows the largest weight.

    The grid is that of `min_max`, chosen anew from the latent weight at
    every step.  Nothing is ever clipped, so all of the gradient passes.

    Parameters
    ----------
    w
        weights, (out, ...).
    bits
        of an integer, 2 to 16.
    each
        which weights share a step, as in `min_max`.

    Returns
    -------
    as w.  After the training `ste_code` gives the code.

    References
    ----------
    Krishnamoorthi, Quantizing deep convolutional networks for efficient
    inference: A whitepaper, arXiv:1806.08342, section 2.4.

    Examples
    --------
    >>> w = torch.tensor([[0.9, -3.0, 0.2]], requires_grad=True)
    >>> ste(w, bits=3)
    tensor([[ 1., -3.,  0.]], grad_fn=<AddBackward0>)
    """
    q, scale = _rounded(w.detach(), bits, each)
    wq = scale * q
    if type(each) is int:  # groups, the last one perhaps padded
        wq = wq.flatten(-2)[..., : w.shape[-1]]
    return straight(w, wq)


def ste_code(w: Tensor, *, bits: int, each: str | int = "row") -> codes.Code:
    """Encode a latent weight that was trained through `ste`.

    Parameters
    ----------
    w
        the latent weight: a rounded one need not have the same step.
    bits, each
        as in `ste`.
    """
    q, scale = _rounded(w.detach(), bits, each)
    top = 2 ** (bits - 1) - 1
    code = codes.Affine(codes.Ints(q.int() + top, bits), scale, top)
    return codes.View(code, tuple(w.shape)) if type(each) is int else code


def lsq(
    v: Tensor,
    scale: Tensor,
    *,
    bits: int,
    signed: bool = True,
    count: int | None = None,
) -> Tensor:
    """Round with a step that is learned from the task's own loss.

    With s = scale, Q_N = 2^(b-1) and Q_P = 2^(b-1) - 1, unsigned 0 and
    2^b - 1::

        vbar = round(clip(v / s, -Q_N, Q_P)),    vhat = s vbar

        dvhat/ds = -v/s + round(v/s)  inside,  -Q_N below,  Q_P above

    A weight pulls at the step by how far it is from its grid point, an
    outlier by how far the grid would have to reach.  The sum over N weights
    is scaled by g = 1/sqrt(N Q_P), so that steps and weights learn alike.

    Parameters
    ----------
    v
        weights or inputs of a layer.
    scale
        the step, an nn.Parameter that starts at `lsq_scale`; broadcasts
        against v.  Its size counts, not its sign, so that no update can
        turn the grid around.
    bits
        of an integer; 2 to 16, unsigned also 1.
    signed
        whether the grid has negative points; for what comes from a ReLU
        it need not.
    count
        N; by default how many of v share a step, for activations the number
        of them in one sample.

    Returns
    -------
    as v.  After the training `lsq_code` gives the code.

    References
    ----------
    Esser et al., Learned Step Size Quantization, arXiv:1902.08153,
    equations 1 to 3 and section 2.2.

    Examples
    --------
    >>> v = torch.tensor([0.33, -2.4, 5.0])
    >>> s = torch.tensor(0.5, requires_grad=True)
    >>> vhat = lsq(v, s, bits=3, count=1)
    >>> vhat.detach()
    tensor([ 0.5000, -2.0000,  1.5000])
    >>> vhat.sum().backward()  # (0.34 - 4 + 3) / sqrt(3)
    >>> s.grad
    tensor(-0.3811)
    """
    low, high = _limits(bits, signed)
    if count is None:
        count = max(1, v.numel() // scale.numel())
    s = scale.abs().clamp(min=torch.finfo(scale.dtype).tiny)
    # the value of s, the gradient times g
    s = s.detach() + (s - s.detach()) / math.sqrt(count * high)
    inside = (v / s).clamp(low, high)
    return s * straight(inside, inside.detach().round())


def lsq_scale(
    v: Tensor, *, bits: int, each: str = "tensor", signed: bool = True
) -> Tensor:
    """Choose the step that `lsq` starts from: 2 E‖v‖ / sqrt(Q_P).

    Parameters
    ----------
    v
        weights, or the first batch of inputs.
    bits, signed
        as in `lsq`.
    each
        "tensor" as in the paper, or "row".

    Returns
    -------
    () or (out, 1, ...); wrap it in nn.Parameter.  1 where all v are 0.

    References
    ----------
    Esser et al., Learned Step Size Quantization, arXiv:1902.08153,
    section 2.1.

    Examples
    --------
    >>> lsq_scale(torch.tensor([1.0, -3.0]), bits=3)
    tensor(2.3094)
    """
    _, high = _limits(bits, signed)
    if each not in ("tensor", "row"):
        raise ValueError(f'each must be "tensor" or "row", got {each!r}')
    lines, _, shared = in_lines(v.detach(), each)
    mean = lines.abs().mean(1).reshape(shared if each == "row" else ())
    return a_step(2 * mean / math.sqrt(high))


def lsq_code(
    v: Tensor, scale: Tensor, *, bits: int, signed: bool = True
) -> codes.Affine:
    """Encode a weight that was trained through `lsq`.

    Parameters
    ----------
    v, scale, bits, signed
        as in `lsq`; v may be the latent weight or the rounded one.
    """
    low, high = _limits(bits, signed)
    scale = scale.detach().abs().clamp(min=torch.finfo(scale.dtype).tiny)
    q = (v.detach() / scale).clamp(low, high).round() - low
    return codes.Affine(codes.Ints(q.int(), bits), scale, -low)


def encode_trained(
    model: nn.Module, code: Callable[..., codes.Code]
) -> codes.State:
    """Encode what was trained through a function of the latent weights.

    Parameters
    ----------
    model
        from `through.attach` and training; left as it is.
    code
        ``code(w, **tensors) -> Code`` for the function that was attached
        last, with the tensors as they were trained; for instance
        ``partial(lsq_code, bits=4)``.

    Returns
    -------
    {name: Tensor or Code}
        Decodes to the weights of ``through.bake(model)``, bit for bit.

    Raises
    ------
    ValueError
        If nothing is attached.

    Examples
    --------
    >>> from functools import partial
    >>> model = nn.Linear(2, 1, bias=False)
    >>> tuned = through.attach(model, "weight", partial(ste, bits=4))
    >>> encode_trained(tuned, partial(ste_code, bits=4))
    {'weight': Affine(Ints(uint8[1, 2], 4), float32[1, 1], 7)}
    """
    state = codes.encode(through.bake(model), codes.value, lambda n, w: False)
    names = through.tensors(model)
    if not names:
        raise ValueError("model: nothing is attached to any of its weights")
    made = {}
    for name in names:
        path, _, key = name.rpartition(".")
        steps = model.get_submodule(path).parametrizations[key]
        *before, last = steps
        w = steps.original.detach()
        for part in before:  # a mask, say
            w = part(w)
        made[id(state[name])] = code(w, **last.tensors)
    return {name: made.get(id(x), x) for name, x in state.items()}


@dataclass(frozen=True)
class LossScale:
    """The factor that keeps small gradients above the float16 underflow.

    Multiply the loss by `value`, divide the gradients by it, leave out the
    step if one is not finite, and go on with ``after(finite)``.

    Parameters
    ----------
    value
        the factor, a power of two.
    good
        finite steps since it last changed.
    every
        as many of them double the factor; the first overflow halves it.

    References
    ----------
    Micikevicius et al., Mixed Precision Training, arXiv:1710.03740,
    section 3.2.

    Examples
    --------
    >>> scale = LossScale(8.0, every=2)
    >>> for finite in (True, True, False):
    ...     scale = scale.after(finite)
    ...     print(scale.value)
    8.0
    16.0
    8.0
    """

    value: float = 2.0**16
    good: int = 0
    every: int = 2000

    def after(self, finite: bool) -> "LossScale":
        """Return the scale for the next step."""
        if not finite:
            return LossScale(self.value / 2, 0, self.every)
        if self.good + 1 == self.every:
            return LossScale(self.value * 2, 0, self.every)
        return LossScale(self.value, self.good + 1, self.every)


def _rounded(w: Tensor, bits: int, each: str | int) -> tuple[Tensor, Tensor]:
    """Return whole numbers around 0 and the steps, groups laid out."""
    check_bits(bits, 2)
    lines, shape, shared = in_lines(w, each)
    largest = lines.abs().amax(1, keepdim=True)
    scale = a_step(largest / (2 ** (bits - 1) - 1))
    return torch.round(lines / scale).reshape(shape), scale.reshape(shared)


def _limits(bits: int, signed: bool) -> tuple[int, int]:
    check_bits(bits, 1 + signed)
    if signed:
        return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def check_bits(bits: int, least: int) -> None:
    if not least <= bits <= 16:
        raise ValueError(f"bits must be {least} to 16, got {bits}")
