"""What few bits lose, given back in part by a few exact directions.

The error of a quantized weight is nearly noise, and noise has no low rank.
What a few directions can give back is the more, the more the *inputs* lie in
few directions: with their moments H it is the error of the outputs that is
fitted.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import codes, obs
from .matrices import drone, svd


def corrected(
    W: Tensor,
    quantize: Callable[[Tensor], codes.Code],
    *,
    rank: int,
    rounds: int = 1,
    H: Tensor | None = None,
    damp: float = 0.01,
) -> codes.Sum:
    """Add to a quantized weight the best low-rank part of its error.

    Parameters
    ----------
    W
        (out, in) weights; flatten a kernel with ``K.flatten(1)``.
    quantize
        any function from a matrix to a code of its shape.
    rank
        r of the correction, which takes r · (out + in) more numbers.
    rounds
        1 quantizes W and then fits the rest (LQER).  Each further round
        quantizes W - u v and fits u v anew (LoftQ).  The best of all is
        returned: rounding does not know what the fit can do, so that a
        round may be worse than the one before.
    H
        (in, in) second moments of the inputs.  With it the outputs are
        corrected, E‖(W - Q - u v) x‖², and not the weights.
    damp
        what is added to the diagonal of H, as a fraction of its mean.

    Returns
    -------
    Sum
        Of the code Q and `Factors` u (out, r) and v (r, in), in the type of W.
        Its ``b`` is where `with_adapter` may start on the base Q.

    Raises
    ------
    ValueError
        If shapes, `rank` or `rounds` do not fit.

    References
    ----------
    Zhang et al., LQER: Low-Rank Quantization Error Reconstruction for LLMs,
    arXiv:2402.02446 (one SVD; L2QER has a diagonal in place of H).
    Li et al., LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language
    Models, arXiv:2310.08659, algorithm 1 (alternating).

    Examples
    --------
    >>> W = torch.tensor([[1.4, 0.0], [0.0, 2.2]])
    >>> corrected(W, torch.round, rank=1).decode()
    tensor([[1.4000, 0.0000],
            [0.0000, 2.0000]])
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    W = W.detach()
    A = None if H is None else obs.damped(H.double(), damp=damp)
    start, best, least = W, None, torch.inf
    for _ in range(rounds):
        Q = quantize(start)
        if codes.shape(Q) != W.shape:
            raise ValueError(
                f"quantize returned shape {codes.shape(Q)} for W "
                f"{tuple(W.shape)}"
            )
        rest = W - codes.value(Q)
        if H is None:
            fit = svd(rest, rank=rank)
        else:
            fit = drone(rest, H, rank=rank, damp=damp)
        code = codes.Sum(Q, codes.Factors(fit.u.to(W.dtype), fit.v.to(W.dtype)))
        D = W.double() - code.decode()
        loss = (D.square() if A is None else (D @ A) * D).sum()
        if best is None or loss < least:
            best, least = code, loss
        start = (W - code.b.decode()).to(W.dtype)
    return best
