"""Remove weights and let the survivors make up for it, layer by layer.

Every function here lowers tr((W - Q) H (W - Q)^T), the mean squared change
of a layer's outputs, with H = E[x x^T] damped as in `obs`.  `least_squares`
is the optimum for a mask that is given; `surgeon` and `obc` look for the
mask one weight at a time; `sparsegpt` does both in a single pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import codes, obs
from .masks import keep, n_m

CHUNK = 1 << 24  # entries of the systems that are solved together


def least_squares(
    W: Tensor, mask: Tensor, H: Tensor, *, damp: float = 0.01
) -> codes.Sparse:
    """Give the kept weights the values that are best for the given mask.

    Row by row the kept weights q solve H_kk q = (H w)_k.  The layer's loss
    is never above that of masking alone, whatever the damping.

    Parameters
    ----------
    W
        (out, in) weights.
    mask
        (out, in) bool, True = keep.
    H
        (in, in) second moments of the inputs.
    damp
        what is added to the diagonal of H, as a fraction of its mean.

    Returns
    -------
    Sparse of shape (out, in), in the dtype of W.  Computed in float64; the
    time grows as out * in^3.

    Raises
    ------
    ValueError
        If the shapes do not match or H is singular for a row's mask.

    References
    ----------
    Hassibi and Stork, Optimal Brain Surgeon, NIPS 1992: removing the
    weights one by one, in any order, ends here.

    Examples
    --------
    >>> H = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> mask = torch.tensor([[True, False]])
    >>> least_squares(torch.ones(1, 2), mask, H, damp=0).decode()
    tensor([[1.5000, 0.0000]])
    """
    _check(W, H)
    if mask.dtype != torch.bool or mask.shape != W.shape:
        raise ValueError(
            f"mask must be bool of shape {tuple(W.shape)}, got {mask.dtype} "
            f"of {tuple(mask.shape)}"
        )
    A = obs.damped(H.double(), damp=damp)
    target = W.double() @ A  # (out, in)
    rows = max(1, CHUNK // max(1, A.numel()))
    parts = [
        _solve(A, m, t)
        for m, t in zip(mask.split(rows), target.split(rows), strict=True)
    ]
    return codes.sparse(torch.cat(parts).to(W.dtype), mask)


def _solve(A: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """Solve A_kk q_k = target_k for every row; 0 where masked (r, in)."""
    # One shape for all rows: what is masked becomes rows of the identity.
    k = mask.to(A.dtype)
    systems = A * k[:, :, None] * k[:, None, :] + torch.diag_embed(1 - k)
    L, failed = torch.linalg.cholesky_ex(systems)
    if failed.any():
        raise ValueError("H is singular for this mask: use a larger damp")
    return torch.cholesky_solve((target * k)[:, :, None], L)[:, :, 0]


def surgeon(
    W: Tensor, H: Tensor, *, sparsity: float, damp: float = 0.01
) -> codes.Sparse:
    """Remove the cheapest weight of a row, move the others, repeat.

    Every row loses the same number of weights.  For small layers: the time
    grows as sparsity * out * in^3.

    Parameters
    ----------
    W
        (out, in) weights.
    H
        (in, in) second moments of the inputs.
    sparsity
        fraction of each row that goes.
    damp
        what is added to the diagonal of H, as a fraction of its mean.

    Returns
    -------
    Sparse of shape (out, in), in the dtype of W.

    References
    ----------
    Hassibi and Stork, Optimal Brain Surgeon, NIPS 1992.
    Frantar and Alistarh, Optimal Brain Compression, arXiv:2208.11580,
    algorithm 1.

    Examples
    --------
    >>> W, H = torch.tensor([[1.0, 1.0, 2.0]]), torch.ones(3, 3)
    >>> surgeon(W, H, sparsity=0.6).decode().round()
    tensor([[0., 0., 4.]])
    """
    _check(W, H)
    _check_sparsity(sparsity)
    Hinv = torch.linalg.inv(obs.damped(H.double(), damp=damp))
    steps = round(sparsity * W.shape[1])
    order = torch.stack([_trace(w, Hinv, steps)[0] for w in W.double()])
    mask = torch.ones_like(W, dtype=torch.bool).scatter(1, order, False)
    return least_squares(W, mask, H, damp=damp)


def obc(
    W: Tensor, H: Tensor, *, sparsity: float, damp: float = 0.01
) -> codes.Sparse:
    """Remove weights as `surgeon` does, with one budget for all rows.

    Each row is taken apart to its last weight once, which gives a price for
    each of its weights; the cheapest of all rows are then removed.

    Parameters
    ----------
    W
        (out, in) weights.
    H
        (in, in) second moments of the inputs.
    sparsity
        fraction of the layer that goes.
    damp
        what is added to the diagonal of H, as a fraction of its mean.

    Returns
    -------
    Sparse of shape (out, in), in the dtype of W.

    References
    ----------
    Frantar and Alistarh, Optimal Brain Compression, arXiv:2208.11580,
    section 4 and algorithm 2.
    """
    _check(W, H)
    Hinv = torch.linalg.inv(obs.damped(H.double(), damp=damp))
    traces = [_trace(w, Hinv, W.shape[1]) for w in W.double()]
    order, price = map(torch.stack, zip(*traces, strict=True))
    # A row's weights go in its own order: a cheap one behind a dear one has
    # to wait for it.  Flipped, because of equals `keep` keeps the first.
    price = price.cummax(1).values.flip(1)
    kept = keep(price, sparsity=sparsity).flip(1)
    mask = torch.empty_like(kept).scatter(1, order, kept)
    return least_squares(W, mask, H, damp=damp)


def _trace(w: Tensor, Hinv: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Remove `steps` weights of a row (in,): which, and at what price."""
    w = w[None]
    gone = torch.zeros_like(w[0], dtype=torch.bool)
    order, price = [], []
    for _ in range(steps):
        cost = w[0].square() / Hinv.diagonal()
        price_q, q = cost.masked_fill(gone, torch.inf).min(0)
        w, Hinv = obs.surgeon(w, Hinv, int(q)), obs.downdate(Hinv, int(q))
        gone[q] = True
        order.append(q)
        price.append(price_q)
    empty = w.new_empty(0)
    if not steps:
        return empty.long(), empty
    return torch.stack(order), torch.stack(price)


def sparsegpt(
    W: Tensor,
    H: Tensor,
    *,
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
    damp: float = 0.01,
    block: int = 128,
    grid: Callable[[Tensor], Tensor] = lambda w: w,
) -> codes.Sparse:
    """Prune the columns from left to right; those behind make up for it.

    In each block of columns the weights with the smallest w^2 / d^2 go, the
    price of a removal when only the columns behind can still move.

    Parameters
    ----------
    W
        (out, in) weights; flatten a kernel with ``K.flatten(1)``.
    H
        (in, in) second moments of the inputs.
    sparsity
        fraction that goes of each block, all rows together.
    n, m
        in place of `sparsity`, keep n of each m neighbors in a row.
    damp
        what is added to the diagonal of H, as a fraction of its mean.
    block
        columns whose mask is chosen at once.  With n and m the mask is
        chosen for m columns at a time, and the block changes nothing.
    grid
        ``grid(w) -> w'`` rounds a column (out,) to values that can be
        stored.  Columns behind make up for the rounding too: pruning and
        quantization in one pass.

    Returns
    -------
    Sparse of shape (out, in), in the dtype of W.

    References
    ----------
    Frantar and Alistarh, SparseGPT, arXiv:2301.00774, algorithm 1.

    Examples
    --------
    >>> W = torch.tensor([[1.0, 3.0]])
    >>> H = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> sparsegpt(W, H, sparsity=0.5, damp=0).decode()
    tensor([[0.0000, 3.5000]])
    """
    if (sparsity is None) == (n is None) or (n is None) != (m is None):
        raise ValueError(
            f"give either sparsity or n and m, got {sparsity=}, {n=}, {m=}"
        )
    mask = torch.ones_like(W, dtype=torch.bool)
    if sparsity is not None:
        _check_sparsity(sparsity)
        choose = _by_block(mask, grid, sparsity)
    else:
        if not 1 <= n <= m or W.shape[-1] % m:
            raise ValueError(
                f"n of m must divide the rows of W {tuple(W.shape)} evenly, "
                f"got {n=}, {m=}"
            )
        choose = _by_group(mask, grid, n, m)
        block = max(block // m, 1) * m  # no group lies in two blocks
    Q, _ = obs.sweep(W, H, choose, damp=damp, block=block)
    return codes.sparse(Q, mask)


def _by_block(mask: Tensor, grid: Callable, sparsity: float) -> obs.Choose:
    """Fill the mask block by block; exactly round(s * numel) go in all."""

    def choose(block, d, columns):
        a, b = int(columns[0]), int(columns[-1]) + 1
        rows = len(mask)
        gone = round(sparsity * rows * b) - round(sparsity * rows * a)
        score = (block / d).square()
        mask[:, a:b] = keep(score, sparsity=gone / score.numel())
        return lambda i, w: grid(w) * mask[:, a + i]

    return choose


def _by_group(mask: Tensor, grid: Callable, n: int, m: int) -> obs.Choose:
    """Fill the mask m columns at a time, from the weights as they are then."""

    def choose(block, d, columns):
        a = int(columns[0])

        def rule(i, w):
            if i % m == 0:
                score = (block[:, i : i + m] / d[i : i + m]).square()
                mask[:, a + i : a + i + m] = n_m(score, n=n, m=m)
            return grid(w) * mask[:, a + i]

        return rule

    return choose


def _check(W: Tensor, H: Tensor) -> None:
    if W.ndim != 2 or H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(
            f"H must be (in, in) for W (out, in), got H {tuple(H.shape)} "
            f"and W {tuple(W.shape)}"
        )


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be from 0 to 1, got {sparsity}")
