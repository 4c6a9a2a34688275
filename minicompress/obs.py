"""Optimal Brain Surgeon, one column at a time: one loop for two papers.

A layer y = W x loses tr((W - Q) H (W - Q)^T) when its weights W become Q,
with H = E[x x^T].  `sweep` fixes the columns from left to right and lets
the columns that are still free make up for what was lost.  GPTQ and
SparseGPT are this loop; they differ only in how a column is chosen.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Rule = Callable[[int, Tensor], Tensor]
Choose = Callable[[Tensor, Tensor, Tensor], Rule]


def damped(H: Tensor, *, damp: float = 0.01) -> Tensor:
    """Add a fraction of the mean diagonal, so that H can be inverted.

    Parameters
    ----------
    H
        (in, in) second moments of the inputs, symmetric.
    damp
        what is added to the diagonal, as a fraction of its mean.

    Returns
    -------
    (in, in); an input that is always zero keeps a small positive entry.
    """
    if H.ndim != 2 or H.shape[0] != H.shape[1]:
        raise ValueError(f"H must be square, got shape {tuple(H.shape)}")
    if damp < 0:
        raise ValueError(f"damp must be at least 0, got {damp}")
    mean = H.diagonal().mean()
    A = H.clone()
    A.diagonal().add_(damp * torch.where(mean > 0, mean, 1.0))
    return A


def factor(H: Tensor, *, damp: float = 0.01) -> Tensor:
    """Factor the inverse of the damped H as U^T U with U upper triangular.

    Row j of U holds the update of OBS for column j when the columns before
    it are already fixed: [H_{j:,j:}^-1]_jk = U_jj U_jk.

    Parameters
    ----------
    H
        (in, in) second moments of the inputs, symmetric.
    damp
        what is added to the diagonal, as a fraction of its mean.

    Returns
    -------
    U : (in, in), upper triangular, in the dtype of H.

    Raises
    ------
    ValueError
        If H is singular even after damping.

    References
    ----------
    Frantar et al., GPTQ, arXiv:2210.17323, section 3.3 (step 3).

    Examples
    --------
    >>> H = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    >>> U = factor(H, damp=0)
    >>> torch.allclose(U.T @ U, H.inverse())
    True
    """
    A = damped(H, damp=damp)
    # The Cholesky factor of the flipped matrix, flipped back, is upper:
    # A = R R^T.  Then A^-1 = R^-T R^-1, so U = R^-1 and A is never inverted.
    L, failed = torch.linalg.cholesky_ex(A.flip(0, 1))
    if failed and not H.isfinite().all():
        raise ValueError("H must be finite, it holds inf or nan")
    if failed and H.dtype != torch.float64:
        return factor(H.double(), damp=damp).to(H.dtype)
    if failed:
        raise ValueError(f"H is singular with damp={damp}: use a larger damp")
    return _upper_inverse(L.flip(0, 1))


def _upper_inverse(R: Tensor) -> Tensor:
    """Invert an upper triangular matrix by halves (a third of the work)."""
    n = len(R)
    if n <= 256:
        eye = torch.eye(n, dtype=R.dtype, device=R.device)
        return torch.linalg.solve_triangular(R, eye, upper=True)
    h = n // 2
    U = torch.zeros_like(R)
    U[:h, :h] = A = _upper_inverse(R[:h, :h])
    U[h:, h:] = D = _upper_inverse(R[h:, h:])
    U[:h, h:] = -(A @ R[:h, h:]) @ D
    return U


def sweep(
    W: Tensor,
    H: Tensor,
    choose: Choose,
    *,
    damp: float = 0.01,
    block: int = 128,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fix the columns of W one by one; the free ones make up for the loss.

    Parameters
    ----------
    W
        (out, in) weights.  The work is done in float64 if W is float64,
        else in float32.
    H
        (in, in) second moments of the inputs.
    choose
        called as ``choose(block, d, columns)`` when a block of columns
        starts: its current weights (out, b), the diagonal entries d (b,) of
        U, and the numbers of its columns in W (b,).  It returns a rule
        ``rule(i, w) -> q`` that gives column i of the block, now w (out,),
        its final value.  ``block`` is a live view: inside the rule it holds
        the weights as they are by then (2:4 masks look there).
    damp
        fraction of the mean diagonal of H that is added to it.
    block
        columns that are updated together; changes the result only if
        `choose` looks at the block.
    order
        (in,) permutation, the order in which columns are fixed.

    Returns
    -------
    Q : (out, in) chosen values, in the dtype of W.
    loss : (out,) the row's share of tr((W - Q) H (W - Q)^T), H damped.

    References
    ----------
    Frantar et al., GPTQ, arXiv:2210.17323, algorithm 1.
    Frantar and Alistarh, SparseGPT, arXiv:2301.00774, algorithm 1.

    Examples
    --------
    >>> def rounding(block, d, columns):
    ...     return lambda i, w: w.round()
    >>> W = torch.tensor([[0.4, 0.4]])
    >>> H = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    >>> sweep(W, H, rounding)[0]  # plain rounding would give 0, 0
    tensor([[0., 1.]])
    """
    if W.ndim != 2 or H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(
            f"H must be (in, in) for W (out, in), got H {tuple(H.shape)} "
            f"and W {tuple(W.shape)}"
        )
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    n = W.shape[1]
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    H = H.to(dtype)
    if order is None:
        order = torch.arange(n, device=W.device)
    else:
        order = _permutation(order, n, W.device)
        H = H[order][:, order]
    U = factor(H, damp=damp)
    # Transposed: a column of W is a row here, contiguous in memory.
    V = W.T.to(dtype)[order]  # (in, out), a copy
    loss = V.new_zeros(V.shape[1])
    for a in range(0, n, block):
        b = min(a + block, n)
        U1 = U[a:b, a:b].contiguous()
        E = _sweep_block(V[a:b], U1, order[a:b], choose)
        loss += E.square().sum(0)
        # Lazy: the columns behind the block see its updates all at once.
        V[b:].addmm_(U[a:b, b:].T, E, alpha=-1)
    Q = torch.empty_like(V)
    Q[order] = V
    return Q.T.contiguous().to(W.dtype), loss


def _sweep_block(
    V: Tensor, U: Tensor, columns: Tensor, choose: Choose
) -> Tensor:
    """Fix the rows of V (b, out) in place; return their errors (b, out)."""
    d = U.diagonal()
    rule = choose(V.T, d, columns)
    E = torch.empty_like(V)
    for i, u in enumerate(d.tolist()):
        q = rule(i, V[i])
        E[i] = (V[i] - q) / u
        V[i] = q
        V[i + 1 :].addr_(U[i, i + 1 :], E[i], alpha=-1)
    return E


def _permutation(order: Tensor, n: int, device: torch.device) -> Tensor:
    order = order.to(device)
    if not torch.equal(order.sort().values, torch.arange(n, device=device)):
        raise ValueError(f"order must be a permutation of 0..{n - 1}")
    return order


def activation_order(H: Tensor) -> Tensor:
    """Order the columns by the energy of their input, largest first.

    Columns that matter most are fixed while most others are still free.

    Parameters
    ----------
    H
        (in, in) second moments of the inputs.

    Returns
    -------
    (in,) permutation for `sweep`.
    """
    return H.diagonal().argsort(descending=True, stable=True)


def layer_loss(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    """Compute the layer loss tr((W - Q) H (W - Q)^T), row by row.

    Parameters
    ----------
    W, Q
        (out, in) weights before and after.
    H
        (in, in) second moments of the inputs.

    Returns
    -------
    (out,) mean squared change of each output.
    """
    D = W - Q
    return ((D @ H) * D).sum(1)


def surgeon(W: Tensor, Hinv: Tensor, q: int) -> Tensor:
    """Remove column q of W and move every other column to its best place.

    Parameters
    ----------
    W
        (out, in) weights.
    Hinv
        (in, in) inverse of H.
    q
        the column to remove.

    Returns
    -------
    (out, in) weights with column q exactly zero.

    References
    ----------
    Hassibi and Stork, Optimal Brain Surgeon, NIPS 1992, equation 5.
    """
    moved = W - torch.outer(W[:, q] / Hinv[q, q], Hinv[q])
    moved[:, q] = 0
    return moved


def downdate(Hinv: Tensor, q: int) -> Tensor:
    """Turn the inverse of H into the inverse without row and column q.

    Parameters
    ----------
    Hinv
        (in, in) inverse of H.
    q
        the column that is fixed from now on.

    Returns
    -------
    (in, in); row and column q are zero, the rest inverts the rest of H.
    """
    rest = Hinv - torch.outer(Hinv[:, q], Hinv[q]) / Hinv[q, q]
    rest[q] = 0
    rest[:, q] = 0
    return rest
