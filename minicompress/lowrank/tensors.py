"""Depthwise-separable convolution: a kernel of low rank, channel by channel.

A convolution mixes pixels and channels at once.  Splitting it into one that
looks at pixels only (depthwise) and one that looks at channels only (1 × 1)
saves parameters and arithmetic; it changes no number's bits.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from .. import obs


def separable(
    conv: nn.Conv2d,
    *,
    terms: int = 1,
    H: Tensor | None = None,
    damp: float = 0.01,
) -> nn.Sequential:
    """Replace a convolution by a depthwise and a 1 × 1 convolution.

    What an input channel c does is a matrix K_c, (out, kh·kw).  The best
    approximation of rank `terms` is the start of its SVD::

        K_c ≈ Σ_j p_cj d_cj^T,    d_cj kernels for channel c alone,
                                  p_cj weights to all the outputs

    Parameters
    ----------
    conv
        with groups=1; left as it is.
    terms
        kernels for each input channel.  From min(out, kh·kw) on the result
        is exact.  1 is the layer of MobileNet: 1/out + 1/(kh·kw) of the
        parameters (bias aside) and of the arithmetic.
    H
        (in·kh·kw, in·kh·kw) second moments of the patches that the
        convolution sees.  With it, directions that occur count more, and
        the 1 × 1 convolution is fitted to the outputs by least squares.
    damp
        what is added to the diagonal of H, as a fraction of its mean.

    Returns
    -------
    nn.Sequential of two nn.Conv2d; the second has the bias.

    Raises
    ------
    ValueError
        If the convolution has groups, or `terms` or H do not fit it.

    References
    ----------
    Howard et al., MobileNets, arXiv:1704.04861, section 3.1 (the layer).
    Eckart and Young, The approximation of one matrix by another of lower
    rank, 1936 (the conversion).

    Examples
    --------
    >>> new = separable(nn.Conv2d(16, 32, 3))
    >>> [tuple(layer.weight.shape) for layer in new]
    [(16, 1, 3, 3), (32, 16, 1, 1)]
    """
    _check(conv, terms, H)
    W = conv.weight.detach().double()
    K = W.flatten(2).transpose(0, 1)  # (in, out, kh·kw)
    if H is None:
        U, S, Vh = torch.linalg.svd(K, full_matrices=False)
        P = U[..., :terms] * S[:, None, :terms].sqrt()  # (in, out, terms)
        D = S[:, :terms, None].sqrt() * Vh[:, :terms]  # (in, terms, kh·kw)
        P = P.transpose(0, 1).flatten(1)  # (out, in·terms)
    else:
        A = obs.damped(H.double(), damp=damp)
        D = _directions(K, A, terms)
        P = _fitted(W.flatten(1), A, D)
    D = D.reshape(-1, 1, *conv.kernel_size)
    return _layers(conv, D, P[:, :, None, None])


def _directions(K: Tensor, A: Tensor, terms: int) -> Tensor:
    """Find each channel's kernels where inputs have the moments A."""
    C, _, size = K.shape
    own = A.view(C, size, C, size).diagonal(dim1=0, dim2=2)
    L = torch.linalg.cholesky(own.permute(2, 0, 1))  # (in, kh·kw, kh·kw)
    _, _, Vh = torch.linalg.svd(K @ L, full_matrices=False)
    # K L ≈ U S Vh, so the rows of Vh L^-1 are the kernels
    return torch.linalg.solve_triangular(
        L, Vh[:, :terms], upper=False, left=False
    )


def _fitted(W: Tensor, A: Tensor, D: Tensor) -> Tensor:
    """Fit the outputs to what the depthwise kernels D give: (out, rest)."""
    V = torch.block_diag(*D)  # (in·terms, in·kh·kw)
    return torch.linalg.solve(V @ A @ V.T, W @ A @ V.T, left=False)


def _layers(conv: nn.Conv2d, D: Tensor, P: Tensor) -> nn.Sequential:
    """Put the depthwise kernels D and the 1 × 1 kernels P into layers."""
    like = {"device": conv.weight.device, "dtype": conv.weight.dtype}
    depthwise = skip_init(  # draws no random numbers
        nn.Conv2d,
        conv.in_channels,
        len(D),
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.in_channels,
        bias=False,
        padding_mode=conv.padding_mode,
        **like,
    )
    bias = conv.bias is not None
    pointwise = skip_init(nn.Conv2d, len(D), len(P), 1, bias=bias, **like)
    with torch.no_grad():
        depthwise.weight.copy_(D)
        pointwise.weight.copy_(P)
        if bias:
            pointwise.bias.copy_(conv.bias)
    return nn.Sequential(depthwise, pointwise).train(conv.training)


def _check(conv: nn.Conv2d, terms: int, H: Tensor | None) -> None:
    if conv.groups != 1:
        raise ValueError(f"conv must have groups=1, got {conv.groups}")
    most = min(conv.out_channels, conv.weight[0, 0].numel())
    if not 1 <= terms <= most:
        raise ValueError(f"terms must be 1 to {most}, got {terms}")
    n = conv.weight[0].numel()
    if H is not None and H.shape != (n, n):
        raise ValueError(
            f"H must be {(n, n)} for conv.weight "
            f"{tuple(conv.weight.shape)}, got {tuple(H.shape)}"
        )
