"""A convolution in two steps: its kernel read as one matrix, cut in two.

A kernel (out, in, kh, kw) has four axes, a matrix has two.  `channels` puts
all but the first on one side: a few filters, whose outputs are then mixed.
`spatial` puts one side of the window with the inputs and the other with the
outputs: a column of pixels, then a row.  Both are the best of their shape,
since the truncated SVD of the matrix is.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from .matrices import drone, svd


def channels(
    conv: nn.Conv2d,
    *,
    rank: int,
    H: Tensor | None = None,
    damp: float = 0.01,
) -> nn.Sequential:
    """Replace a convolution by fewer filters and a 1 × 1 convolution.

    The kernel as a matrix W (out, in·kh·kw) is cut to its best of rank r::

        W ≈ U V,    V: r filters of the old size,    U: their mixtures

    Parameters
    ----------
    conv
        with groups=1; left as it is.
    rank
        r, the number of filters.  Saves weights below
        out · n / (out + n), n = in·kh·kw.  From min(out, n) on the result
        is exact.
    H
        (n, n) second moments E[x x^T] of the patches that the convolution
        sees, as in `calibrate.Stats`.  With it the outputs are kept close,
        E‖(W - U V) x‖², and not the weights: the responses have low rank
        where those weights need not.  With the covariance of the patches
        in place of H constant errors are free, as in the paper; the bias
        must then be corrected.
    damp
        what is added to the diagonal of H, as a fraction of its mean.

    Returns
    -------
    nn.Sequential
        Of two nn.Conv2d with r · (n + out) weights; stride, padding and
        dilation are in the first, the bias is in the second.

    Raises
    ------
    ValueError
        If the convolution has groups, or `rank` or H do not fit it.

    References
    ----------
    Denton et al., Exploiting Linear Structure Within Convolutional
    Networks for Efficient Evaluation, arXiv:1404.0736.
    Zhang et al., Accelerating Very Deep Convolutional Networks for
    Classification and Detection, arXiv:1505.06798 (responses).

    Examples
    --------
    >>> new = channels(nn.Conv2d(16, 32, 3), rank=8)
    >>> [tuple(layer.weight.shape) for layer in new]
    [(8, 16, 3, 3), (32, 8, 1, 1)]
    """
    K = kernel_of(conv)
    W = K.flatten(1)
    if H is None:
        factors = svd(W, rank=rank)
    else:
        factors = drone(W, H, rank=rank, damp=damp)
    V = factors.v.unflatten(1, K.shape[1:])
    U = factors.u[:, :, None, None]
    return pipeline(
        conv,
        layer(conv, V, along="hw"),
        layer(conv, U, bias=True),
    )


def spatial(conv: nn.Conv2d, *, rank: int) -> nn.Sequential:
    """Replace a convolution by a vertical and a horizontal one.

    The kernel as a matrix (in·kh, kw·out) is cut to its best of rank r::

        K[o, i, y, x] ≈ Σ_j h_j[x, o] v_j[i, y]

    Parameters
    ----------
    conv
        with groups=1; left as it is.
    rank
        r, the number of channels between the two.  Saves weights below
        in·kh · kw·out / (in·kh + kw·out); from min(in·kh, kw·out) on the
        result is exact.

    Returns
    -------
    nn.Sequential
        Of two nn.Conv2d, kh × 1 and 1 × kw, with r · (in·kh + kw·out) weights;
        each has its side of stride, padding and dilation, the second has the
        bias.

    Raises
    ------
    ValueError
        If the convolution has groups, or `rank` does not fit it.

    References
    ----------
    Jaderberg et al., Speeding up Convolutional Neural Networks with Low
    Rank Expansions, arXiv:1405.3866, scheme 2.

    Examples
    --------
    >>> new = spatial(nn.Conv2d(16, 32, 3, stride=2), rank=8)
    >>> [tuple(layer.weight.shape) for layer in new]
    [(8, 16, 3, 1), (32, 8, 1, 3)]
    >>> [layer.stride for layer in new]
    [(2, 1), (1, 2)]
    """
    K = kernel_of(conv)
    out, n, kh, kw = K.shape
    M = K.permute(1, 2, 3, 0).reshape(n * kh, kw * out)
    factors = svd(M, rank=rank)
    U = factors.u.T.reshape(rank, n, kh, 1)
    V = factors.v.reshape(rank, 1, kw, out).permute(3, 0, 1, 2)
    return pipeline(
        conv,
        layer(conv, U, along="h"),
        layer(conv, V, along="w", bias=True),
    )


def dense_kernel(layers: nn.Sequential) -> Tensor:
    """Multiply a pipeline of convolutions out to the kernel it stands for.

    Parameters
    ----------
    layers
        as from `channels`, `spatial`, `tucker2`, `cp` or `separable`, in
        which no two layers look along the same side.

    Returns
    -------
    (out, in, kh, kw)
        The weight of the one convolution that computes the same, with the
        stride, padding and dilation of the layers together.

    Raises
    ------
    ValueError
        If two layers look along the same side: the window of both together
        is larger than that of either.

    Examples
    --------
    >>> conv = nn.Conv2d(2, 4, 3)
    >>> K = dense_kernel(spatial(conv, rank=6))  # 6: all of it
    >>> torch.allclose(K, conv.weight, atol=1e-6)
    True
    """
    first, *rest = layers
    K = _without_groups(first)
    for conv in rest:
        sizes = zip(conv.kernel_size, K.shape[2:], strict=True)
        if any(min(pair) > 1 for pair in sizes):
            raise ValueError(
                f"layers: {conv.kernel_size} after {tuple(K.shape[2:])} "
                "looks along the same side again"
            )
        K = torch.einsum("omab,micd->oiacbd", _without_groups(conv), K)
        K = K.flatten(4).flatten(2, 3)  # one of a, c is 1; one of b, d too
    return K


def _without_groups(conv: nn.Conv2d) -> Tensor:
    """Write a kernel with groups as (out, in, kh, kw), zero between them."""
    W = conv.weight.detach().unflatten(0, (conv.groups, -1))
    eye = torch.eye(conv.groups, dtype=W.dtype, device=W.device)
    K = torch.einsum("goihw,gk->gokihw", W, eye)
    return K.flatten(2, 3).flatten(0, 1)


def layer(
    conv: nn.Conv2d,
    K: Tensor,
    *,
    along: str = "",
    groups: int = 1,
    bias: bool = False,
) -> nn.Conv2d:
    """Make a convolution with the kernel K for a step of a pipeline.

    Along the sides in `along` ("h", "w", "hw") it moves as `conv` does;
    padding, whatever its mode, may stand before or after a step that does
    not look along its side.  `bias` gives it the bias of `conv`, if any.
    """

    def own(values, other):
        if isinstance(values, str):  # "same" or "valid"
            return values if along else other
        sides = zip("hw", values, strict=True)
        return tuple(v if side in along else other for side, v in sides)

    bias = bias and conv.bias is not None
    new = skip_init(  # draws no random numbers
        nn.Conv2d,
        K.shape[1] * groups,
        K.shape[0],
        tuple(K.shape[2:]),
        stride=own(conv.stride, 1),
        padding=own(conv.padding, 0),
        dilation=own(conv.dilation, 1),
        groups=groups,
        bias=bias,
        padding_mode=conv.padding_mode if along else "zeros",
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    with torch.no_grad():
        new.weight.copy_(K)
        if bias:
            new.bias.copy_(conv.bias)
    return new


def pipeline(conv: nn.Conv2d, *layers: nn.Conv2d) -> nn.Sequential:
    """Put layers in a row, in the mode of the convolution they replace."""
    return nn.Sequential(*layers).train(conv.training)


def kernel_of(conv: nn.Conv2d) -> Tensor:
    """Return the kernel (out, in, kh, kw) in float64, or refuse groups."""
    if not isinstance(conv, nn.Conv2d):
        raise ValueError(f"conv must be an nn.Conv2d, got {conv!r:.60}")
    if conv.groups != 1:
        raise ValueError(f"conv must have groups=1, got {conv.groups}")
    return conv.weight.detach().double()
