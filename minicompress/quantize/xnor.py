"""Products of signs by counting bits: what XNOR-Net is fast by.

With +1 and -1 as the bits 1 and 0, two signs multiply to -1 exactly where
their bits differ.  So 64 multiplications and additions become one XOR and one
count of ones.  Packed signs are laid out word by word, (words, n): the first
64 inputs of all n vectors, then the next 64.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

CACHE = 1 << 15  # words of 8 bytes that are combined at once


def pack_signs(x: Tensor) -> Tensor:
    """Pack the signs of vectors, 64 to a word.

    Parameters
    ----------
    x
        (n, k) numbers; 0 counts as +1.

    Returns
    -------
    int64 tensor (ceil(k / 64), n) on the CPU.  What the last word does not
    need is 0 in every vector, so that it never differs.

    Raises
    ------
    ValueError
        If x is not a matrix with at least one column.

    Examples
    --------
    >>> pack_signs(torch.tensor([[-1.0, 3.0, 0.0], [2.0, -1.0, -1.0]]))
    tensor([[6, 1]])
    """
    if x.ndim != 2 or not x.shape[1]:
        raise ValueError(f"x must be (n, k), k at least 1, got {_sizes(x)}")
    positive = (x.detach() >= 0).cpu().numpy()
    octets = np.packbits(positive, axis=1, bitorder="little")
    octets = np.pad(octets, ((0, 0), (0, -octets.shape[1] % 8)))
    words = octets.view(np.int64)  # (n, words)
    return torch.from_numpy(np.ascontiguousarray(words.T))


def xnor_matmul(a: Tensor, b: Tensor, *, k: int) -> Tensor:
    """Multiply matrices of signs: sign(A) sign(B)^T, exactly.

    Of k pairs of signs, d differ: their product is (k - d) - d::

        a · b = k - 2 popcount(a xor b)

    Parameters
    ----------
    a, b
        (words, m) and (words, n) int64, from `pack_signs`.
    k
        signs in each vector.

    Returns
    -------
    int32 tensor (m, n).

    Raises
    ------
    ValueError
        If a and b do not match each other or k.

    References
    ----------
    Rastegari et al., XNOR-Net, arXiv:1603.05279, section 3.2.
    Courbariaux et al., Binarized Neural Networks, arXiv:1602.02830.

    Examples
    --------
    >>> A = torch.tensor([[-1.0, 3.0, 0.5], [2.0, -1.0, -1.0]])
    >>> xnor_matmul(pack_signs(A), pack_signs(A), k=3)
    tensor([[ 3, -3],
            [-3,  3]], dtype=torch.int32)
    """
    _check(a, b, k)
    # as unsigned: numpy counts the ones of the absolute value
    a, b = (words.numpy().view(np.uint64) for words in (a, b))
    m, n = a.shape[1], b.shape[1]
    differ = np.zeros((m, n), np.int32)
    rows = max(1, CACHE // max(n, 1))
    for i in range(0, m, rows):
        part = differ[i : i + rows]  # a view, it stays in the cache
        for a_w, b_w in zip(a[:, i : i + rows, None], b, strict=True):
            part += np.bitwise_count(a_w ^ b_w)
    return torch.from_numpy(k - 2 * differ)


def xnor_conv2d(
    x: Tensor, W: Tensor, *, stride: int = 1, padding: int = 0
) -> Tensor:
    """Convolve sign(x) with sign(W) by counting bits.

    A sign cannot be 0, so there is no zero padding in one bit.  The border is
    padded with +1 and what it adds, which does not depend on x, is
    subtracted: the result is that of zero padding.

    Each pixel is packed once, along its channels: a word holds 64 of them,
    and fewer channels leave it partly empty.

    Parameters
    ----------
    x
        (N, C, height, width).
    W
        (out, C, kh, kw) kernels.
    stride, padding
        as in torch, the same for both axes.

    Returns
    -------
    int32 tensor (N, out, height', width').  XNOR-Net multiplies it by
    `xnor_scale` and by the mean size of a kernel's weights, α.

    Raises
    ------
    ValueError
        If the shapes do not match.

    References
    ----------
    Rastegari et al., XNOR-Net, arXiv:1603.05279, equation 11.

    Examples
    --------
    >>> x = torch.ones(1, 2, 3, 3)
    >>> xnor_conv2d(x, torch.ones(1, 2, 3, 3), padding=1)[0, 0]
    tensor([[ 8, 12,  8],
            [12, 18, 12],
            [ 8, 12,  8]], dtype=torch.int32)
    """
    if x.ndim != 4 or W.ndim != 4 or x.shape[1] != W.shape[1]:
        raise ValueError(
            f"x must be (N, C, height, width) and W (out, C, kh, kw), got "
            f"{_sizes(x)} and {_sizes(W)}"
        )
    out, C, kh, kw = W.shape
    border = (padding,) * 4
    pixels = F.pad(x.detach(), border, value=1.0).permute(0, 2, 3, 1)
    a = pack_signs(pixels.reshape(-1, C)).view(-1, *pixels.shape[:3])
    a = a.unfold(2, kh, stride).unfold(3, kw, stride)
    a = a.permute(0, 4, 5, 1, 2, 3)  # (words, kh, kw, N, height', width')
    b = pack_signs(W.permute(2, 3, 0, 1).reshape(-1, C))
    b = b.view(-1, kh, kw, out)
    # kernels first: numpy is at its best with long rows
    dots = xnor_matmul(
        b.flatten(0, 2), a.flatten(3).flatten(0, 2), k=C * kh * kw
    )
    y = dots.view(out, *a.shape[3:]).transpose(0, 1)
    signs = torch.where(W.detach() >= 0, 1.0, -1.0).sum(1, keepdim=True)
    outside = F.pad(signs.new_zeros(1, 1, *x.shape[2:]), border, value=1.0)
    return y - F.conv2d(outside, signs, stride=stride).int().cpu()


def xnor_scale(
    x: Tensor, *, size: int, stride: int = 1, padding: int = 0
) -> Tensor:
    """Compute the scale of each window of a sign convolution's input.

    K = A ∗ k: the mean size A of x over the channels, averaged over the
    window.

    Parameters
    ----------
    x
        (N, C, height, width).
    size
        of the window, height and width.
    stride, padding
        of the convolution; the border counts as 0.

    Returns
    -------
    (N, 1, height', width'), which broadcasts against `xnor_conv2d`.

    References
    ----------
    Rastegari et al., XNOR-Net, arXiv:1603.05279, section 3.2.

    Examples
    --------
    >>> x = torch.tensor([[[[1.0, -3.0]], [[0.0, 4.0]]]])
    >>> xnor_scale(x, size=1)
    tensor([[[[0.5000, 3.5000]]]])
    """
    A = x.abs().mean(1, keepdim=True)
    return F.avg_pool2d(A, size, stride, padding)


def _sizes(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _check(a: Tensor, b: Tensor, k: int) -> None:
    for name, x in (("a", a), ("b", b)):
        if x.dtype != torch.int64 or x.ndim != 2:
            raise ValueError(
                f"{name} must be (words, n) of int64, got {x.dtype} of "
                f"{_sizes(x)}"
            )
    if len(a) != len(b) or not 1 <= k <= 64 * len(a):
        raise ValueError(
            f"a {_sizes(a)} and b {_sizes(b)} must have as many words, "
            f"enough for {k=}"
        )
