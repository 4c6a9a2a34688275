"""A kernel as a tensor of four ways, factored along each: Tucker and CP.

Tucker-2 keeps the window whole and gives the inputs and the outputs a basis
each; CP writes the kernel as a sum of products of four vectors.  Neither is
one SVD: both start somewhere and improve one factor after the other.
"""

import torch
from torch import Tensor, nn

from .. import codes
from .kernels import kernel_of, layer, pipeline


def tucker2(
    conv: nn.Conv2d, *, ranks: tuple[int, int], rounds: int = 10
) -> nn.Sequential:
    """Replace a convolution by a small one between two of size 1 × 1.

    Parameters
    ----------
    conv
        with groups=1; left as it is.
    ranks
        (r_out, r_in), the channels of the small one.  With all of them the
        result is exact.
    rounds
        as in `tucker2_code`.

    Returns
    -------
    nn.Sequential
        Of three nn.Conv2d: 1 × 1 from in to r_in, the window from r_in to
        r_out, 1 × 1 from r_out to out, with r_in · in + r_out · r_in · kh · kw
        + out · r_out weights.  Stride, padding and dilation are in the second,
        the bias is in the last.

    Raises
    ------
    ValueError
        If the convolution has groups, or `ranks` or `rounds` do not fit.

    References
    ----------
    Kim et al., Compression of Deep Convolutional Neural Networks for Fast
    and Low Power Mobile Applications, arXiv:1511.06530.

    Examples
    --------
    >>> new = tucker2(nn.Conv2d(16, 32, 3, padding=1), ranks=(8, 4))
    >>> [tuple(layer.weight.shape) for layer in new]
    [(4, 16, 1, 1), (8, 4, 3, 3), (32, 8, 1, 1)]
    """
    code = tucker2_code(kernel_of(conv), ranks=ranks, rounds=rounds)
    return pipeline(
        conv,
        layer(conv, code.v[:, :, None, None]),
        layer(conv, code.core, along="hw"),
        layer(conv, code.u[:, :, None, None], bias=True),
    )


def tucker2_code(
    K: Tensor, *, ranks: tuple[int, int], rounds: int = 10
) -> codes.Factors:
    """Factor a kernel along its outputs and its inputs, not its window.

    With orthonormal columns in A and B and G = K ×₁ A^T ×₂ B^T the core::

        K[o, i, :, :] ≈ Σ_ab A[o, a] B[i, b] G[a, b, :, :]

    A and B start as the leading left singular vectors of K, unfolded along
    each way (HOSVD): the error² is at most the sum of what each cuts off,
    and at least the larger one.  Each round then replaces A by the best one
    for B, and B by the best one for A (HOOI); no round is worse than the
    one before.

    Parameters
    ----------
    K
        (out, in, kh, kw).
    ranks
        (r_out, r_in), at most (out, in).
    rounds
        of improvement; 0 is HOSVD.

    Returns
    -------
    Factors
        With u = A (out, r_out), v = B^T (r_in, in) and the core (r_out, r_in,
        kh, kw); decodes to a kernel in place of the old one.

    Raises
    ------
    ValueError
        If `ranks` do not fit K, or `rounds` is negative.

    References
    ----------
    De Lathauwer et al., A Multilinear Singular Value Decomposition, SIAM J.
    Matrix Anal. Appl. 21(4), 2000 (HOSVD).
    De Lathauwer et al., On the Best Rank-1 and Rank-(R1, R2, ..., RN)
    Approximation of Higher-Order Tensors, the same number (HOOI).
    Kim et al., arXiv:1511.06530 (Tucker-2 of kernels).

    Examples
    --------
    >>> tucker2_code(torch.randn(32, 16, 3, 3), ranks=(8, 4))
    Factors(float32[32, 8], float32[4, 16], float32[8, 4, 3, 3])
    """
    if K.ndim != 4:
        raise ValueError(f"K must be (out, in, kh, kw), got {tuple(K.shape)}")
    if rounds < 0:
        raise ValueError(f"rounds must be at least 0, got {rounds}")
    r_out, r_in = ranks
    if not (1 <= r_out <= len(K) and 1 <= r_in <= K.shape[1]):
        raise ValueError(
            f"ranks must be 1 to {tuple(K.shape[:2])}, got {tuple(ranks)}"
        )
    W = K.detach().double()
    A, B = _leading(W, r_out), _leading(W.transpose(0, 1), r_in)
    for _ in range(rounds):
        A = _leading(torch.einsum("oihw,ib->obhw", W, B), r_out)
        B = _leading(torch.einsum("oihw,oa->iahw", W, A), r_in)
    G = torch.einsum("oihw,oa,ib->abhw", W, A, B)
    u, v, core = (x.contiguous().to(K.dtype) for x in (A, B.T, G))
    return codes.Factors(u, v, core)


def _leading(X: Tensor, rank: int) -> Tensor:
    """Find the leading left singular vectors of X, all but one way flat."""
    M = X.flatten(1)
    _, vectors = torch.linalg.eigh(M @ M.T)  # eigenvalues rise
    return vectors[:, -rank:].flip(1)


def cp(
    conv: nn.Conv2d,
    *,
    rank: int,
    rounds: int = 100,
    seed: int = 0,
    ridge: float = 1e-4,
) -> nn.Sequential:
    """Replace a convolution by four thin ones: along each way in turn.

    The kernel becomes a sum of r products of four vectors (CP)::

        K[o, i, y, x] ≈ Σ_j a_j[o] b_j[i] c_j[y] d_j[x]

    Parameters
    ----------
    conv
        with groups=1; left as it is.
    rank
        r, the number of products.
    rounds, seed, ridge
        as in `cp_factors`.

    Returns
    -------
    nn.Sequential
        Of four nn.Conv2d: 1 × 1 from in to r channels, kh × 1 and 1 × kw
        within each channel, 1 × 1 to out, with r · (in + kh + kw + out)
        weights.  The two in the middle have their sides of stride, padding and
        dilation, the last has the bias.

    Raises
    ------
    ValueError
        If the convolution has groups, or a number is too small.

    References
    ----------
    Lebedev et al., Speeding-up Convolutional Neural Networks Using
    Fine-tuned CP-Decomposition, arXiv:1412.6553.

    Examples
    --------
    >>> new = cp(nn.Conv2d(16, 32, 3), rank=8, rounds=1)
    >>> [tuple(layer.weight.shape) for layer in new]
    [(8, 16, 1, 1), (8, 1, 3, 1), (8, 1, 1, 3), (32, 8, 1, 1)]
    """
    a, b, c, d = cp_factors(
        kernel_of(conv), rank=rank, rounds=rounds, seed=seed, ridge=ridge
    )
    return pipeline(
        conv,
        layer(conv, b.T[:, :, None, None]),
        layer(conv, c.T[:, None, :, None], along="h", groups=rank),
        layer(conv, d.T[:, None, None, :], along="w", groups=rank),
        layer(conv, a[:, :, None, None], bias=True),
    )


def cp_factors(
    K: Tensor,
    *,
    rank: int,
    rounds: int = 100,
    seed: int = 0,
    ridge: float = 1e-4,
) -> list[Tensor]:
    """Approximate a tensor by a sum of products of vectors, one per way.

    Alternating least squares: with all factors but one held, the best one
    is a linear fit.  What falls with every step is::

        ‖K - Σ_j a_j ∘ b_j ∘ c_j ∘ ...‖² + μ Σ_j (‖a_j‖² + ‖b_j‖² + ...)

    Without the second term a best approximation may not even exist
    (degeneracy): two products grow without bound, in opposite directions,
    and what is left between them fits ever better.  Factors like that are
    useless in float32 and under any training.  The term bounds them.

    Parameters
    ----------
    K
        of any number of ways, a kernel (out, in, kh, kw) say.
    rank
        number of products.  Unlike for a matrix, the rank that makes it
        exact is unknown, and the best one of a lower rank is no part of it.
    rounds
        over all factors.  The result is a local optimum and depends on the
        start.
    seed
        of the random start.
    ridge
        μ for K scaled to norm 1, above 0.  Where it is too large for the
        rank and the size of K, 0.01 for many kernels, factors vanish.

    Returns
    -------
    A factor (n, rank)
        For each way of size n, in the type of K.  The vectors of a product
        share its size evenly.

    Raises
    ------
    ValueError
        If `rank`, `rounds` or `ridge` is too small.

    References
    ----------
    Kolda and Bader, Tensor Decompositions and Applications, SIAM Review
    51(3), 2009, section 3.4 (ALS) and 3.3 (degeneracy).

    Examples
    --------
    >>> K = torch.einsum("i,j,k->ijk", *torch.ones(3, 4))
    >>> a, b, c = cp_factors(K, rank=1, ridge=1e-9)
    >>> torch.allclose(torch.einsum("ir,jr,kr->ijk", a, b, c), K)
    True
    """
    if rank < 1 or rounds < 1 or not ridge > 0:
        raise ValueError(
            f"rank={rank} and rounds={rounds} must be at least 1, "
            f"ridge={ridge} above 0"
        )
    W = K.detach().double()
    size = W.norm().clamp(min=torch.finfo(W.dtype).tiny)
    W = W / size
    dice = torch.Generator().manual_seed(seed)
    start = {"generator": dice, "dtype": W.dtype}
    F = [torch.randn(n, rank, **start).to(W.device) for n in W.shape]
    F = _balanced(F, 1 / rank)
    more = ridge * torch.eye(rank, dtype=W.dtype, device=W.device)
    for _ in range(rounds):
        for way in range(W.ndim):
            others = [f for i, f in enumerate(F) if i != way]
            fit = W.movedim(way, 0).flatten(1) @ _khatri_rao(others)
            gram = torch.stack([f.T @ f for f in others]).prod(0)
            F[way] = torch.linalg.solve(gram + more, fit, left=False)
        F = _balanced(F)
    share = size ** (1 / W.ndim)
    return [(share * f).to(K.dtype) for f in F]


def _khatri_rao(factors: list[Tensor]) -> Tensor:
    """Multiply columns by columns: (n, r) and (m, r) give (n·m, r)."""
    first, *rest = factors
    for f in rest:
        first = (first[:, None] * f).flatten(0, 1)
    return first


def _balanced(factors: list[Tensor], size: float | None = None) -> list[Tensor]:
    """Give the vectors of a product one length: the second term's least."""
    lengths = torch.stack([f.norm(dim=0) for f in factors])
    sizes = lengths.prod(0) if size is None else size
    share = sizes ** (1 / len(factors))
    return [
        f * (share / n.clamp(min=torch.finfo(n.dtype).tiny))
        for f, n in zip(factors, lengths, strict=True)
    ]
