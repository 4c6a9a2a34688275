"""Which integer, on a grid that is already chosen?

The nearest integer is the best for one weight alone.  A layer y = W x loses
tr((W - Q) H (W - Q)^T), with H = E[x x^T], and its weights can make up for
one another: `obq` and `gptq` round one at a time and move those that are
still free.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .. import codes, obs

Rule = Callable[[Tensor], codes.Code]


def nearest(x: Tensor, grid: codes.Code) -> codes.Code:
    """Round to the nearest point of a grid, ties to the even integer.

    What lies outside of the grid becomes its nearest end.

    Parameters
    ----------
    x
        any shape that fits the scales of the grid as its weights did: new
        weights of the layer, or a batch (..., in) on the grid of a tensor.
    grid
        a code as from `min_max`.

    Returns
    -------
    Code
        The same grid with other integers; decodes to the shape of x.

    Raises
    ------
    ValueError
        If `grid` is no uniform grid, or x does not fit it or holds nan.

    Examples
    --------
    >>> from minicompress.quantize import min_max
    >>> grid = min_max(torch.tensor([[0.0, 3.0]]), bits=2)
    >>> nearest(torch.tensor([[1.5, 2.6], [0.5, 9.0]]), grid).decode()
    tensor([[2., 3.],
            [0., 3.]])
    """
    return _rounded(x, grid, torch.round)


def stochastic(
    x: Tensor, grid: codes.Code, *, generator: torch.Generator | None = None
) -> codes.Code:
    """Round up or down by chance, so that on average nothing changes.

    Between two points the chance of the upper one is how near it is:
    E[decode] = x inside the grid.  The error of one number is larger than
    with `nearest`, the error of a long sum is smaller.

    Parameters
    ----------
    x, grid
        as in `nearest`.
    generator
        of the random numbers.

    Returns
    -------
    Code
        As from `nearest`.

    References
    ----------
    Gupta et al., Deep Learning with Limited Numerical Precision,
    arXiv:1502.02551, section 3.

    Examples
    --------
    >>> from minicompress.quantize import min_max
    >>> grid = min_max(torch.tensor([0.0, 3.0]), bits=2, each="tensor")
    >>> x = torch.full((10_000,), 0.3)
    >>> g = torch.Generator().manual_seed(0)
    >>> round(stochastic(x, grid, generator=g).decode().mean().item(), 2)
    0.3
    """

    def by_chance(steps):
        u = torch.rand(
            steps.shape,
            generator=generator,
            dtype=steps.dtype,
            device=steps.device,
        )
        return torch.floor(steps + u)

    return _rounded(x, grid, by_chance)


def obq(
    W: Tensor, H: Tensor, grid: codes.Code, *, damp: float = 0.01
) -> codes.Code:
    """Round the weight that costs least, move the others of its row, repeat.

    With w the row as it is by then and F the inverse of H without what is
    already rounded, the next weight is the one with the smallest price
    (w_q - Q(w_q))^2 / F_qq.  A weight that was moved beyond the ends of the
    grid comes first: it can only drift further, and at once there are most
    others to make up for it.  For small layers: the time grows as out * in^3.

    Parameters
    ----------
    W
        (out, in) weights.
    H
        (in, in) second moments of the inputs.
    grid
        a code as from `min_max(W)`.
    damp
        what is added to the diagonal of H, as a fraction of its mean.

    Returns
    -------
    Code
        As from `nearest`.  Computed in float64.

    References
    ----------
    Frantar and Alistarh, Optimal Brain Compression, arXiv:2208.11580,
    section 5 and algorithm 3.

    Examples
    --------
    >>> from minicompress.quantize import min_max
    >>> grid = min_max(torch.tensor([[0.0, 3.0]]), bits=2)
    >>> W, H = torch.tensor([[0.4, 0.3]]), torch.tensor([[1, 0.9], [0.9, 1]])
    >>> obq(W, H, grid).decode()
    tensor([[1., 0.]])
    """
    check(W, H, grid)
    W = W.detach().double()
    scale, zero, top = columns(W, grid)
    Hinv = torch.linalg.inv(obs.damped(H.double(), damp=damp))
    rows = zip(W, scale, zero, strict=True)
    return nearest(
        torch.stack([_trace(w, Hinv, s, z, top) for w, s, z in rows]), grid
    )


def _trace(
    w: Tensor, Hinv: Tensor, scale: Tensor, zero: Tensor, top: int
) -> Tensor:
    """Round all weights of a row (in,), the cheapest first."""
    w, done = w[None], torch.zeros_like(w, dtype=torch.bool)
    for _ in range(len(done)):
        point = _at(w, scale, zero, top)
        error = (w - point)[0]
        price = error.square() / Hinv.diagonal()
        outside = error.abs() / scale - 0.5  # in steps
        price = torch.where(outside > 1e-9, -outside, price)
        q = int(price.masked_fill(done, torch.inf).argmin())
        target = torch.zeros_like(w)
        target[0, q] = point[0, q]
        # the surgeon brings a weight to 0: here, its distance to the target
        w = obs.surgeon(w - target, Hinv, q) + target
        Hinv = obs.downdate(Hinv, q)
        done[q] = True
    return w[0]


def gptq(
    W: Tensor,
    H: Tensor,
    grid: codes.Code,
    *,
    renew: Rule | None = None,
    order: Tensor | None = None,
    damp: float = 0.01,
    block: int = 128,
) -> codes.Code:
    """Round column by column; the columns behind make up for the error.

    Parameters
    ----------
    W
        (out, in) weights; flatten a kernel with ``K.flatten(1)``.
    H
        (in, in) second moments of the inputs.
    grid
        a code as from `min_max(W)`.
    renew
        a rule such as ``partial(min_max, bits=4)``, with the bits of the
        grid.  When the sweep reaches a group of columns, their grid is
        chosen anew from the weights as they are by then.
    order
        (in,) permutation in which columns are rounded, for instance
        ``obs.activation_order(H)``.  The grids stay those of `grid`.
    damp
        what is added to the diagonal of H, as a fraction of its mean.
    block
        columns that are updated together; does not change the result.

    Returns
    -------
    Code
        As from `nearest`.

    Raises
    ------
    ValueError
        If shapes do not match, H is singular, `renew` gives another kind of
        grid, or `renew` and `order` are both given.

    References
    ----------
    Frantar et al., GPTQ, arXiv:2210.17323, algorithm 1.

    Examples
    --------
    >>> from minicompress.quantize import min_max
    >>> grid = min_max(torch.tensor([[0.0, 3.0]]), bits=2)
    >>> W, H = torch.tensor([[0.4, 0.4]]), torch.tensor([[1, 0.9], [0.9, 1]])
    >>> gptq(W, H, grid).decode()  # rounding to nearest gives 0, 0
    tensor([[0., 1.]])
    """
    check(W, H, grid)
    if renew is not None and order is not None:
        raise ValueError("give renew or order, not both")
    size = _size(W, grid)
    if renew is not None:
        block = max(block // size, 1) * size  # no group lies in two blocks
    # a column's grid is a row here, contiguous in memory
    scale, zero, top = columns(W, grid)
    scale, zero = scale[:, ::size].T.clone(), zero[:, ::size].T.clone()
    steps, zeros = scale.unbind(), zero.unbind()  # views: renewed with them

    def choose(free, d, columns):
        groups = (columns // size).tolist()

        def rule(i, w):
            j = groups[i]
            if renew is not None and i % size == 0:
                group = free[:, i : i + size].to(W.dtype)
                scale[j], zero[j] = _renewed(group, grid, renew)
            return _at(w, steps[j], zeros[j], top)

        return rule

    Q, _ = obs.sweep(real(W), H, choose, damp=damp, block=block, order=order)
    if renew is not None:
        grid = _with_grid(grid, scale.T.to(W.dtype), zero.T)
    return nearest(Q, grid)


def _renewed(W: Tensor, grid: codes.Code, renew: Rule) -> tuple[Tensor, Tensor]:
    """Choose the grid of a group of columns (out, g): scale, zero (out,)."""
    code = renew(W)
    old, new = _affine(grid), _affine(code)
    same = new.q.bits == old.q.bits and isinstance(
        new.zero, codes.Code
    ) == isinstance(old.zero, codes.Code)
    scale, zero, _ = columns(W, code)
    if not same or not (scale == scale[:, :1]).all():
        raise ValueError(
            f"renew must give a grid for each row like {old}, got {new}"
        )
    return scale[:, 0], zero[:, 0]


def _with_grid(grid: codes.Code, scale: Tensor, zero: Tensor) -> codes.Code:
    """Replace the scales (out, groups) of a code, and its zeros if it has."""
    old = _affine(grid)
    shape = codes.shape(old.scale)
    new = replace(old, scale=scale.reshape(shape))
    if isinstance(old.zero, codes.Code):
        zeros = codes.Ints(zero.reshape(shape).int(), old.zero.bits)
        new = replace(new, zero=zeros)
    return replace(grid, x=new) if isinstance(grid, codes.View) else new


def _rounded(
    x: Tensor, grid: codes.Code, whole: Callable[[Tensor], Tensor]
) -> codes.Code:
    """Replace the integers of a grid by whole(x / scale) + zero."""
    old = _affine(grid)
    shape = tuple(x.shape)
    if isinstance(grid, codes.View):
        x = codes.groups(x, codes.shape(old.q)[-1])
    x = real(x)
    scale, zero, top = _numbers(old, x)
    try:
        q = whole(x / scale).add_(zero).clamp_(0, top)
    except RuntimeError:
        raise ValueError(
            f"x {shape} does not fit the scales {tuple(scale.shape)} of grid"
        ) from None
    if q.sum().isnan():
        raise ValueError(f"x {shape} holds nan")
    kind = torch.uint8 if old.q.bits <= 8 else torch.int32
    new = replace(old, q=codes.Ints(q.to(kind), old.q.bits))
    return codes.View(new, shape) if isinstance(grid, codes.View) else new


def _at(w: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Give the nearest point of a grid."""
    q = (w / scale).round_().add_(zero).clamp_(0, top)
    return q.sub_(zero).mul_(scale)


def real(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.dtype == torch.float64 else x.float()


def _affine(grid: codes.Code) -> codes.Affine:
    """Find the integers and their grid inside a code."""
    inner = grid.x if isinstance(grid, codes.View) else grid
    if not isinstance(inner, codes.Affine) or not isinstance(
        inner.q, codes.Ints
    ):
        raise ValueError(f"grid must be a uniform grid of integers, got {grid}")
    return inner


def _numbers(code: codes.Affine, like: Tensor) -> tuple[Tensor, Tensor, int]:
    """Give scale, zero and the largest code of a grid."""
    top = 2**code.q.bits - 1
    if isinstance(code.zero, int) and code.zero > 0:
        top = min(top, 2 * code.zero)  # as many points above as below
    scale, zero = (
        torch.as_tensor(codes.value(x)).to(like)
        for x in (code.scale, code.zero)
    )
    return scale, zero, top


def columns(W: Tensor, grid: codes.Code) -> tuple[Tensor, Tensor, int]:
    """Give every weight (out, in) its scale and zero; the largest code."""
    V = real(W)
    code = _affine(grid)
    scale, zero, top = _numbers(code, V)

    def spread(x):
        if isinstance(grid, codes.View):
            x = x.expand(codes.shape(code.q))  # (out, groups, g), padded
            return x.reshape(len(W), -1)[:, : W.shape[1]]
        return x.expand(W.shape)

    return spread(scale), spread(zero), top


def _size(W: Tensor, grid: codes.Code) -> int:
    """Count the neighbors in a row that share a scale."""
    code = _affine(grid)
    if isinstance(grid, codes.View):
        return codes.shape(code.q)[-1]
    shared = codes.shape(code.scale)
    return 1 if shared and shared[-1] > 1 else W.shape[1]


def check(W: Tensor, H: Tensor, grid: codes.Code) -> None:
    if W.ndim != 2 or H.shape != (W.shape[1], W.shape[1]):
        raise ValueError(
            f"H must be (in, in) for W (out, in), got H {tuple(H.shape)} "
            f"and W {tuple(W.shape)}"
        )
    _affine(grid)
    if tuple(grid.shape) != tuple(W.shape):
        raise ValueError(
            f"grid must have the shape of W {tuple(W.shape)}, got {grid.shape}"
        )
