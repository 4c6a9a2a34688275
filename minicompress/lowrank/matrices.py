"""Two thin factors for one matrix: the best ones, for five ideas of best.

y = W x becomes y = u (v x) with u (out, r) and v (r, in): r (out + in)
numbers in place of out · in.  Four of the methods lower ||(W - u v) S||; they
differ in S, which says how much each direction of the inputs counts::

    svd      S = I                      every input alike
    asvd     S = diag(E|x_j|^alpha)     inputs that are large
    fwsvd    S = diag(I_j^1/2)          inputs whose weights the loss feels
    drone    S S^T = H = E[x x^T]       what occurs: the outputs' own error

With U the first r left singular vectors of W S, all of them are

    u v = [W S]_r S^-1 = U U^T W

for [W S]_r = U U^T W S.  So S is never inverted and may be singular: where no
input ever was, u v still does what U lets it do of W.
"""

import torch
from torch import Tensor

from .. import codes, obs


def svd(W: Tensor, *, rank: int) -> codes.Factors:
    """Find the nearest matrix of a rank: the start of the SVD.

    The squared error is the sum of the squared singular values left out.
    Float32 and bfloat16 are computed by eigenvectors of the smaller of
    W W^T and W^T W, where singular values below 3e-4 of the largest drown
    in float32's rounding.  Where what is left out is so small that this
    could cost more than 1e-4 of the error, and for float64, the SVD itself
    is computed, in float64.

    Parameters
    ----------
    W
        (out, in) weights.
    rank
        1 to min(out, in).

    Returns
    -------
    Factors
        u = U sqrt(Σ) (out, rank) and v = sqrt(Σ) V^T (rank, in), in the dtype
        of W.  Fewer numbers than W has only below `break_even`.

    References
    ----------
    Eckart and Young, The approximation of one matrix by another of lower
    rank, Psychometrika 1, 1936.

    Examples
    --------
    >>> W = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    >>> svd(W, rank=1).decode()
    tensor([[3., 0.],
            [0., 0.]])
    """
    _check(W, rank)
    if W.shape[0] > W.shape[1]:  # W^T is the one with the smaller Gram matrix
        code = svd(W.T, rank=rank)
        return codes.Factors(code.v.T.contiguous(), code.u.T.contiguous())
    M = _working(W)
    return _projected(M, _leading(M, rank), W)


def asvd(
    W: Tensor, size: Tensor, *, rank: int, alpha: float = 0.5
) -> codes.Factors:
    """Find factors that keep the weights of large inputs.

    Parameters
    ----------
    W
        (out, in) weights.
    size
        (in,) mean magnitude of each input (`calibrate` has ``mean_abs``).
    rank
        1 to min(out, in).
    alpha
        power of the size; 0 gives `svd`.

    Returns
    -------
    Factors (out, rank) and (rank, in), in the dtype of W.

    References
    ----------
    Yuan et al., ASVD: Activation-aware Singular Value Decomposition for
    Compressing Large Language Models, arXiv:2312.05821.

    Examples
    --------
    >>> W = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    >>> code = asvd(W, torch.tensor([1.0, 9.0]), rank=1)
    >>> torch.allclose(code.decode(), torch.diag(torch.tensor([0.0, 2.0])))
    True
    """
    _check(W, rank)
    _check_weights(size, "size", W.shape[1:])
    M = _working(W)
    S = size.to(M.dtype) ** alpha
    return _projected(M, _leading(M * S, rank), W)


def fwsvd(W: Tensor, fisher: Tensor, *, rank: int) -> codes.Factors:
    """Find factors that keep what the loss is sensitive to.

    An input j counts by what its weights count together, I_j = Σ_i F_ij:
    weights that count one by one would leave no closed solution.

    Parameters
    ----------
    W
        (out, in) weights.
    fisher
        (out, in) mean square E[g²] of the gradient over single samples.
    rank
        1 to min(out, in).

    Returns
    -------
    Factors
        (out, rank) and (rank, in), in the dtype of W; they minimize Σ_j I_j
        ||w_j - ŵ_j||² over the columns w_j of W.

    References
    ----------
    Hsu et al., Language model compression with weighted low-rank
    factorization, arXiv:2207.00112.  There a row of W belongs to an input.

    Examples
    --------
    >>> W = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    >>> code = fwsvd(W, torch.tensor([[1.0, 0.0], [0.0, 9.0]]), rank=1)
    >>> torch.allclose(code.decode(), torch.diag(torch.tensor([0.0, 2.0])))
    True
    """
    _check(W, rank)
    _check_weights(fisher, "fisher", W.shape)
    M = _working(W)
    S = fisher.double().sum(0).sqrt().to(M.dtype)
    return _projected(M, _leading(M * S, rank), W)


def drone(
    W: Tensor, H: Tensor, *, rank: int, damp: float = 0.01
) -> codes.Factors:
    """Find the factors whose outputs are nearest to those of the layer.

    They minimize E||W x - u v x||² = ||(W - u v) S||² with S S^T = H, and
    the loss is the sum of the squared singular values of W S left out.  What
    they keep are the principal components of the outputs.  DRONE writes this
    with the SVD of the inputs X, SVD-LLM with the Cholesky factor S of
    X X^T; where the solution is unique it is the same.

    Parameters
    ----------
    W
        (out, in) weights.
    H
        (in, in) second moments E[x x^T] of the inputs.
    rank
        1 to min(out, in).
    damp
        what is added to the diagonal of H, as a fraction of its mean: how
        much directions count that the inputs do not show.  0 is possible,
        with an H that is singular too.

    Returns
    -------
    Factors (out, rank) and (rank, in), in the dtype of W.

    References
    ----------
    Chen et al., DRONE: Data-aware Low-rank Compression for Large NLP
    Models, NeurIPS 2021, theorem 1.
    Wang et al., SVD-LLM: Truncation-aware Singular Value Decomposition for
    Large Language Model Compression, arXiv:2403.07378.

    Examples
    --------
    >>> W = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    >>> H = torch.tensor([[1.0, 0.0], [0.0, 9.0]])
    >>> code = drone(W, H, rank=1)
    >>> torch.allclose(code.decode(), torch.diag(torch.tensor([0.0, 2.0])))
    True
    """
    _check(W, rank)
    M = _working(W)
    S = root(_moments(H, W), damp=damp).to(M.dtype)
    return _projected(M, _leading(M @ S, rank), W)


def features(W: Tensor, H: Tensor, *, rank: int) -> codes.Factors:
    """Keep the principal components of the inputs: W x ≈ (W P) (P^T x).

    They are the best for the inputs, min E||x - P P^T x||², whatever W does
    with them, so that the outputs are never nearer than those of `drone`.

    Parameters
    ----------
    W
        (out, in) weights.
    H
        (in, in) second moments E[x x^T] of the inputs.
    rank
        1 to min(out, in).

    Returns
    -------
    Factors (out, rank) and (rank, in), in the dtype of W.

    Examples
    --------
    >>> W = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    >>> H = torch.tensor([[1.0, 0.0], [0.0, 9.0]])
    >>> features(W, H, rank=1).decode()  # x_2 is larger, but is not used
    tensor([[0., 0.],
            [0., 0.]])
    """
    _check(W, rank)
    P = torch.linalg.eigh(_moments(H, W)).eigenvectors  # smallest first
    P = P[:, -rank:].flip(1)
    return _balanced(W.detach().double() @ P, P.T, W)


def root(H: Tensor, *, damp: float = 0.0) -> Tensor:
    """Find a matrix S with S S^T = H, damped: Cholesky's, if there is one.

    Parameters
    ----------
    H
        (in, in) second moments, symmetric; may be singular.
    damp
        what is added to the diagonal of H, as a fraction of its mean.

    Returns
    -------
    (in, in) float64.

    Examples
    --------
    >>> S = root(torch.ones(3, 3))  # of rank 1
    >>> torch.allclose(S @ S.T, torch.ones(3, 3, dtype=torch.float64))
    True
    """
    A = obs.damped(H.double(), damp=damp)
    S, failed = torch.linalg.cholesky_ex(A)
    if failed and not A.isfinite().all():
        raise ValueError("H must be finite, it holds inf or nan")
    if failed:
        e, Q = torch.linalg.eigh(A)
        S = Q * e.clamp(min=0).sqrt()
    return S


def _leading(M: Tensor, rank: int) -> Tensor:
    """Find the first left singular vectors (out, rank) of M (out, in)."""
    if M.dtype == torch.float64:
        return torch.linalg.svd(M, full_matrices=False).U[:, :rank]
    tall = M.shape[0] > M.shape[1]
    e, Q = torch.linalg.eigh(_gram(M.T if tall else M))  # rising
    # Of M M^T, computed in float32, an eigenvalue is wrong by about
    # eps · the largest, and the error by no more than that for each of the
    # vectors; 10 is for what rounding adds up to.
    wrong = 10 * torch.finfo(M.dtype).eps * rank * e[-1]
    if not e[:-rank].sum() > 1e4 * wrong:
        return _leading(M.double(), rank).to(M.dtype)
    Q = Q[:, -rank:].flip(1)
    return torch.linalg.qr(M @ Q).Q if tall else Q


def _gram(M: Tensor) -> Tensor:
    """Compute M M^T in quarters, as two of them are the same."""
    a, b = M.tensor_split(2)
    ab = a @ b.T
    rows = [torch.cat([a @ a.T, ab], 1), torch.cat([ab.T, b @ b.T], 1)]
    return torch.cat(rows)


def _projected(M: Tensor, U: Tensor, W: Tensor) -> codes.Factors:
    """Project M onto the columns of U."""
    return _balanced(U, U.T @ M, W)


def _balanced(u: Tensor, v: Tensor, W: Tensor) -> codes.Factors:
    """Give column i of u and row i of v the same length, and W's dtype."""
    a, b = u.norm(dim=0), v.norm(dim=1)
    k = torch.where((a > 0) & (b > 0), (b / a).sqrt(), 1.0)
    return codes.Factors(
        (u * k).to(W.dtype).contiguous(),
        (v / k[:, None]).to(W.dtype).contiguous(),
    )


def _working(W: Tensor) -> Tensor:
    """Give the type in which the work is done: float64 if W is, or float32."""
    W = W.detach()
    return W if W.dtype == torch.float64 else W.float()


def _moments(H: Tensor, W: Tensor) -> Tensor:
    n = W.shape[1]
    if H.shape != (n, n):
        raise ValueError(
            f"H must be {(n, n)} for W {tuple(W.shape)}, got {tuple(H.shape)}"
        )
    return H.double()


def _check(W: Tensor, rank: int) -> None:
    if W.ndim != 2 or not W.is_floating_point():
        raise ValueError(
            "W must be a floating-point matrix (out, in), got "
            f"{W.dtype} of {tuple(W.shape)}"
        )
    if not 1 <= rank <= min(W.shape):
        raise ValueError(
            f"rank must be 1 to {min(W.shape)} for W {tuple(W.shape)}, "
            f"got {rank}"
        )
    if not W.sum().isfinite():  # as it is not with inf or nan anywhere
        raise ValueError(f"W {tuple(W.shape)} must be finite")


def _check_weights(x: Tensor, name: str, shape: tuple[int, ...]) -> None:
    if x.shape != shape:
        raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(x.shape)}")
    if not ((x >= 0) & x.isfinite()).all():
        raise ValueError(f"{name} must be finite and not negative")
