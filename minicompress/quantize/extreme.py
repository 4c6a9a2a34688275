"""One or two bits a weight: a sign, perhaps a zero, and a scale.

All codes here stand for α T: T holds -1 and 1, or -1, 0 and 1, and a row, a
group or all of W shares one positive α.  They differ in how T and α are
chosen.
"""

from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from .. import codes
from .signs import (
    by_mean,
    by_sign,
    by_threshold,
    checked,
    kept,
    shared,
)


def binary(W: Tensor, *, each: str | int = "row") -> codes.Code:
    """Keep the signs and one size: the optimum of ‖W - α B‖².

    B = sign(W) with sign(0) = 1, and α is the mean size of the weights.
    What is lost is ‖W‖² - n α², 36 % of the energy of normal weights.

    Parameters
    ----------
    W
        weights, (out, ...) or any shape.
    each
        which weights share an α: "tensor" all of them, "row" those of an
        output, a number g as many neighbors along the last axis.

    Returns
    -------
    Code
        Decodes to the shape of W.  1 bit a weight; each α as W's type.

    Raises
    ------
    ValueError
        If W is empty or not finite, or `each` is unknown.

    References
    ----------
    Rastegari et al., XNOR-Net, arXiv:1603.05279, section 3.1.

    Examples
    --------
    >>> binary(torch.tensor([[-1.0, 0.0, 2.0, 3.0]])).decode()
    tensor([[-1.5000,  1.5000,  1.5000,  1.5000]])
    """
    return _coded(W, 1, *by_sign(*shared(checked(W), each)))


def sketch(W: Tensor, *, terms: int) -> codes.Code:
    """Add binary codes, each of what the ones before it have left.

    R_0 = W, then B_j = sign(R_(j-1)), α_j the mean size of R_(j-1) and
    R_j = R_(j-1) - α_j B_j, row by row.

    Parameters
    ----------
    W
        weights, (out, ...) or any shape.
    terms
        binary codes, so many bits a weight.

    Returns
    -------
    Code
        A `Sum` of `terms` binary codes.

    References
    ----------
    Guo et al., Network Sketching: Exploiting Binary Structure in Deep CNNs,
    arXiv:1706.02021, algorithm 1.

    Examples
    --------
    >>> sketch(torch.tensor([[-1.0, -3.0, 1.0, 3.0]]), terms=2).decode()
    tensor([[-1., -3.,  1.,  3.]])
    """
    R, n = shared(_sketched(W, terms), "row")
    parts = []
    for _ in range(terms):
        B, alpha = by_sign(R, n)
        R = R - alpha * B
        parts.append(_coded(W, 1, B, alpha))
    return reduce(codes.Sum, parts)


def refined_sketch(W: Tensor, *, terms: int) -> codes.Code:
    """Add binary codes, and fit all their scales again after each.

    With the signs so far as the columns of B, a row's scales are the least
    squares (B^T B)^-1 B^T w; what they leave gives the next signs.

    Parameters
    ----------
    W
        weights, (out, ...) or any shape.
    terms
        binary codes, so many bits a weight.

    Returns
    -------
    Code
        A `Sum` of `terms` binary codes; for two terms never worse than
        `sketch`, which has the same signs then.

    References
    ----------
    Guo et al., Network Sketching: Exploiting Binary Structure in Deep CNNs,
    arXiv:1706.02021, algorithm 2.

    Examples
    --------
    >>> W = torch.tensor([[1.0, 2.0, 3.0, 10.0]])
    >>> sketch(W, terms=2).decode()
    tensor([[1., 1., 1., 7.]])
    >>> refined_sketch(W, terms=2).decode()
    tensor([[ 2.,  2.,  2., 10.]])
    """
    rows, n = shared(_sketched(W, terms), "row")
    R, B = rows, rows.new_empty(len(rows), n, 0)
    for _ in range(terms):
        B = torch.cat([B, by_sign(R, n)[0][:, :, None]], 2)  # (rows, n, j)
        # a pseudo-inverse: signs may repeat once nothing is left
        inverse = torch.linalg.pinv(B.mT @ B, hermitian=True)
        alpha = inverse @ (B.mT @ rows[:, :, None])  # (rows, j, 1)
        R = rows - (B @ alpha)[:, :, 0]
    parts = zip(B.unbind(2), alpha.unbind(1), strict=True)
    return reduce(codes.Sum, [_coded(W, 1, b, a) for b, a in parts])


def ternary(W: Tensor, *, each: str | int = "row") -> codes.Code:
    """Find the optimum of ‖W - α T‖² with T in -1, 0, 1, by one sort.

    If k weights are kept, they are the k largest, α is their mean size and
    what is gained is (their sum)² / k: try every k.

    Parameters
    ----------
    W, each
        as for `binary`.

    Returns
    -------
    Code
        Decodes to the shape of W.  2 bits a weight, or 1.6 with `trits`.

    References
    ----------
    Li et al., Ternary Weight Networks, arXiv:1605.04711, section 2, which
    states this optimum and approximates it by the rule of `twn`.

    Examples
    --------
    >>> ternary(torch.tensor([[-1.0, 0.5, 2.0, 3.0]])).decode()
    tensor([[0.0000, 0.0000, 2.5000, 2.5000]])
    """
    rows, _ = shared(checked(W), each)
    size = rows.abs()
    s = size.sort(1, descending=True).values
    total = s.cumsum(1)
    k = torch.arange(1, s.shape[1] + 1, dtype=s.dtype, device=s.device)
    best = (total.square() / k).argmax(1, keepdim=True)  # k - 1
    return _coded(W, 2, *kept(rows, size >= s.gather(1, best)))


def twn(
    W: Tensor, *, each: str | int = "row", factor: float = 0.7
) -> codes.Code:
    """Set to zero what is smaller than 0.7 times the mean size.

    The threshold is the optimum's for weights that are nearly normal (0.767
    times the mean size) or uniform (2/3); without a sort.

    Parameters
    ----------
    W, each
        as for `binary`.
    factor
        threshold in units of the mean size of the weights.

    Returns
    -------
    Code
        Decodes to the shape of W.  2 bits a weight, or 1.6 with `trits`.

    Raises
    ------
    ValueError
        As for `binary`, or if the factor is negative.

    References
    ----------
    Li et al., Ternary Weight Networks, arXiv:1605.04711, section 2.

    Examples
    --------
    >>> twn(torch.tensor([[-1.0, 0.5, 2.0, 3.0]])).decode()
    tensor([[0.0000, 0.0000, 2.5000, 2.5000]])
    """
    if not factor >= 0:
        raise ValueError(f"factor must be at least 0, got {factor}")
    return _coded(W, 2, *by_threshold(*shared(checked(W), each), factor))


def bitnet(W: Tensor) -> codes.Code:
    """Divide by the mean size γ of all weights and round to -1, 0 or 1.

    A rule for training.  As a rounding it is poor: γ is the step of the
    grid, but the weights that are kept are larger.  Nor does it reproduce
    its own result, as γ shrinks with every zero: use `ternary` for that.

    Parameters
    ----------
    W
        weights, any shape.

    Returns
    -------
    Code
        Decodes to the shape of W.  2 bits a weight, or 1.6 with `trits`.

    References
    ----------
    Ma et al., The Era of 1-bit LLMs, arXiv:2402.17764, equations 1 to 3.

    Examples
    --------
    >>> bitnet(torch.tensor([[-1.0, 0.5, 1.5, 3.0]])).decode()
    tensor([[-1.5000,  0.0000,  1.5000,  1.5000]])
    """
    return _coded(W, 2, *by_mean(*shared(checked(W), "tensor")))


def distinct(W: Tensor) -> codes.Codebook:
    """List the values that occur: nothing is lost, whatever trained them.

    Parameters
    ----------
    W
        weights with few different values, any shape.

    Returns
    -------
    Codebook
        Decodes to W.  1 bit a weight for two values, 2 for three or four.

    Raises
    ------
    ValueError
        If W is empty or not finite, or has more than 2^16 values.

    Examples
    --------
    >>> code = distinct(torch.tensor([[0.5, -0.2], [0.0, 0.5]]))
    >>> code.index, code.centroids
    (Ints(uint8[2, 2], 2), tensor([-0.2000,  0.0000,  0.5000]))
    """
    checked(W)
    values, index = W.detach().unique(return_inverse=True)
    if len(values) > 1 << 16:
        raise ValueError(
            f"W {tuple(W.shape)} has {len(values)} values, more than 2^16"
        )
    bits = max(1, (len(values) - 1).bit_length())
    return codes.Codebook(codes.Ints(index, bits), values)


def trits(code: codes.Code) -> codes.Code:
    """Store five ternary digits in a byte: 3^5 = 243 of 256.

    The byte is the index of a codebook of five-vectors, the 243 ways to
    choose.  That table takes 304 bytes in the file, so this pays from about
    6,100 weights on.

    Parameters
    ----------
    code
        of `ternary`, `twn`, `bitnet` or `ttq`.

    Returns
    -------
    Code
        Decodes to the same; 8/5 bits a weight in place of 2.

    Raises
    ------
    ValueError
        If there is no codebook of three values in the code.

    Examples
    --------
    >>> code = ternary(torch.tensor([[-2.0, 0.0, 2.0, 2.0, 0.0, -2.0]]))
    >>> trits(code).decode()
    tensor([[-2.,  0.,  2.,  2.,  0., -2.]])
    """
    if isinstance(code, (codes.View, codes.Scaled)):
        return replace(code, x=trits(code.x))
    three = isinstance(code, codes.Codebook) and len(code.centroids) == 3
    if not (three and isinstance(code.index, codes.Ints)):
        raise ValueError(f"code must be ternary, got {code!r}")
    digits = code.index.values.flatten()
    powers = 3 ** torch.arange(5, device=digits.device)
    octets = (codes.groups(digits.long(), 5) * powers).sum(1)
    ways = torch.arange(3**5, device=digits.device)[:, None] // powers % 3
    table = replace(code, index=codes.Ints(ways, 2))  # (243, 5)
    line = codes.Codebook(codes.Ints(octets, 8), table)
    line = codes.View(line, (len(digits),))  # without the last few digits
    return codes.View(line, code.shape)


def _coded(W: Tensor, bits: int, T: Tensor, alpha: Tensor) -> codes.Code:
    """Store α T in the shape of W; T has its smallest value at -1."""
    levels = torch.tensor([-1, 1] if bits == 1 else [-1, 0, 1])
    q = (T + 1) / (2 if bits == 1 else 1)  # index of the level
    levels = levels.to(torch.int8).to(W.device)
    code = codes.Codebook(codes.Ints(q.int(), bits), levels)
    code = codes.Scaled(code, alpha.to(W.dtype))
    shape = tuple(W.shape)
    return code if code.shape == shape else codes.View(code, shape)


def _sketched(W: Tensor, terms: int) -> Tensor:
    if terms < 1:
        raise ValueError(f"terms must be at least 1, got {terms}")
    return checked(W)
