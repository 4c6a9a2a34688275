"""Short vectors of weights out of a codebook: product quantization.

Each row of W is cut into sub-vectors of d weights, and each of these is
replaced by the nearest of K vectors: log2(K) bits for d weights.  K numbers
are little beside the weights that share them; K vectors of d numbers often
are not, so that only the length of the file tells the size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import codes, obs

CHUNK = 1 << 18  # distances that are in memory at once


def product(
    W: Tensor,
    *,
    length: int,
    bits: int,
    each: str = "tensor",
    H: Tensor | None = None,
    damp: float = 0.01,
    rounds: int = 25,
    seed: int = 0,
) -> codes.View:
    """Replace the sub-vectors of the rows by those of a codebook.

    k-means on vectors v: assign each to the nearest centroid, then move each
    centroid to where the squared error of its members is least.  With H what
    counts is the error of the outputs, as far as it is one of sub-vectors::

        Σ_i,j (v_ij - c)^T G_j (v_ij - c),    v_ij the j-th sub-vector of
                                              row i, G_j = H[block j, block j]

    H = I gives the plain distance.  What the blocks of H leave out is that
    the errors of two sub-vectors of a row can cancel.

    Parameters
    ----------
    W
        (out, in) weights or (out, in, kh, kw) kernels, whose rows have
        in·kh·kw weights: with length kh·kw a sub-vector is one window.
    length
        weights d in a sub-vector.  A last one that is shorter is padded;
        what pads it costs bits, but moves no centroid.
    bits
        of an index, 1 to 16: the codebook has at most K = 2^bits vectors,
        fewer if W has fewer different sub-vectors.
    each
        which sub-vectors share a codebook: all of the "tensor", or those
        that stand in the same "columns" of W.  The latter are in / d
        codebooks, together 2^bits rows of W.
    H
        (in, in) second moments of the inputs, for kernels of their patches.
    damp
        what is added to the diagonal of H, as a fraction of its mean.
    rounds
        of k-means at most; it ends when no index changes.
    seed
        decides where it starts: k-means++.

    Returns
    -------
    View
        Decodes to the shape of W; centroids have its dtype.  The index is
        ``bits / length`` bits for each weight.

    Raises
    ------
    ValueError
        If an argument is out of range, or H does not fit W.

    References
    ----------
    Gong et al., Compressing Deep Convolutional Networks using Vector
    Quantization, arXiv:1412.6115, section 3 (a codebook for each sub-space).
    Stock et al., And the Bit Goes Down, arXiv:1907.05686, section 3 (one for
    all of a layer, the distance weighted by the inputs).

    Examples
    --------
    >>> W = torch.tensor([[1.0, 2.0, 5.0, 6.0], [1.0, 2.0, 5.0, 7.0]])
    >>> code = product(W, length=2, bits=1)
    >>> code
    View(Codebook(Ints(uint8[2, 2], 1), float32[2, 2]), (2, 4))
    >>> code.decode()
    tensor([[1.0000, 2.0000, 5.0000, 6.5000],
            [1.0000, 2.0000, 5.0000, 6.5000]])

    Smaller centroids are one field that is replaced:

    >>> from dataclasses import replace
    >>> book = replace(code.x, centroids=code.x.centroids.half())
    >>> code = replace(code, x=book)
    """
    _check(W, length, bits, each, rounds)
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    V = codes.groups(W.detach().flatten(1).to(dtype), length)  # (out, s, d)
    G = _blocks(W, V, H, damp)
    dice = torch.Generator().manual_seed(seed)
    if each == "tensor":
        index, C = kmeans_vectors(V, G, 2**bits, rounds, dice)
    else:
        own = [
            kmeans_vectors(v, g, 2**bits, rounds, dice)
            for v, g in zip(V.split(1, 1), G.split(1), strict=True)
        ]
        index, C = torch.cat([i for i, _ in own], 1), [c for _, c in own]
        sizes = torch.tensor([0, *map(len, C[:-1])], device=V.device)
        first = sizes.cumsum(0).int()  # centroid of each block
        C = torch.cat(C)
    index = codes.Ints(index, bits)
    index = index if each == "tensor" else codes.Sum(index, first)
    code = codes.Codebook(index, C.to(W.dtype))
    code = codes.View(code, (len(W), W[0].numel()))  # without the padding
    return code if W.ndim == 2 else codes.View(code, tuple(W.shape))


def residual(
    W: Tensor, *, terms: int, length: int, bits: int, **options
) -> codes.Code:
    """Add up several codebooks: each takes what those before it left.

    A sub-vector is the sum of one vector out of each, so that terms·K
    vectors make K^terms different sums.

    Parameters
    ----------
    W
        as in `product`.
    terms
        codebooks, 1 or more.
    length, bits, options
        of each, as in `product`: terms · bits / length bits for each weight.

    Returns
    -------
    Code
        Decodes to the shape of W, in float32 or float64.

    References
    ----------
    Chen et al., Approximate Nearest Neighbor Search by Residual Vector
    Quantization, Sensors 10, 2010.
    Gong et al., arXiv:1412.6115, section 3.
    Egiazarian et al., Extreme Compression of Large Language Models via
    Additive Quantization (AQLM), arXiv:2401.06118: the same sums, with all
    codebooks chosen together.

    Examples
    --------
    >>> W = torch.tensor([[0.0, 0.0, 9.0, 9.0, 1.0, 1.0, 8.0, 8.0]])
    >>> product(W, length=2, bits=1).decode()
    tensor([[0.5000, 0.5000, 8.5000, 8.5000, 0.5000, 0.5000, 8.5000, 8.5000]])
    >>> residual(W, terms=2, length=2, bits=1).decode()
    tensor([[0., 0., 9., 9., 1., 1., 8., 8.]])
    """
    if terms < 1:
        raise ValueError(f"terms must be at least 1, got {terms}")
    code = product(W, length=length, bits=bits, **options)
    for _ in range(terms - 1):
        rest = (W.detach() - code.decode()).to(W.dtype)
        more = product(rest, length=length, bits=bits, **options)
        code = codes.Sum(code, more)
    return code


def kmeans_vectors(
    V: Tensor, G: Tensor, count: int, rounds: int, dice: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Cluster vectors by Lloyd's algorithm, from a start by k-means++.

    Parameters
    ----------
    V
        (n, s, d) vectors.
    G
        (s, d, d) positive semidefinite: the distance of v_ij and c is
        (v_ij - c)^T G_j (v_ij - c).
    count
        centroids K at most.
    rounds
        at most.
    dice
        on the CPU.

    Returns
    -------
    index, C : (n, s) int64 and (K, d).
    """
    seen = torch.where(G.diagonal(dim1=1, dim2=2) > 0, V, 0)
    different, index = seen.flatten(0, 1).unique(dim=0, return_inverse=True)
    if len(different) <= count:
        return index.view(V.shape[:2]), different
    C = spread(V, G, count, dice)
    index, error = assign(V, G, C)
    for _ in range(rounds):
        before = fill(index, error, count)
        C = centers(V, G, before, C)
        index, error = assign(V, G, C)
        if torch.equal(index, before):
            break
    return index, C


def spread(V: Tensor, G: Tensor, count: int, dice: torch.Generator) -> Tensor:
    """Choose `count` vectors far from each other, (count, d): k-means++.

    The next one is drawn with a probability proportional to its squared
    distance to the nearest of those chosen before.

    References
    ----------
    Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding,
    SODA 2007.
    """
    flat = V.flatten(0, 1)
    draws = torch.rand(count, generator=dice, dtype=torch.float64).to(V.device)
    chosen = [int(draws[0] * len(flat))]
    nearest = torch.full(V.shape[:2], torch.inf).to(V)
    for draw in draws[1:]:
        D = (V - flat[chosen[-1]]).transpose(0, 1)  # (s, n, d)
        nearest = nearest.minimum(((D @ G) * D).sum(-1).T)
        total = nearest.double().flatten().clamp(min=0).cumsum(0)
        at = torch.searchsorted(total, draw * total[-1], right=True)
        chosen.append(min(int(at), len(flat) - 1))
    return flat[chosen]


def assign(V: Tensor, G: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest centroid and its squared distance, (n, s) each."""
    index, error = [], []
    for j in range(V.shape[1]):
        length = ((C @ G[j]) * C).sum(1)  # c G c
        for v in V[:, j].split(max(1, CHUNK // len(C))):
            vG = v @ G[j]
            # v G v - 2 v G c + c G c, the first the same for all c
            scores = torch.addmm(length, vG, C.T, alpha=-2)
            least, nearest = scores.min(1)
            index.append(nearest)
            error.append(((vG * v).sum(1) + least).clamp(min=0))
    shape = V.shape[1], V.shape[0]
    return torch.cat(index).view(shape).T, torch.cat(error).view(shape).T


def fill(index: Tensor, error: Tensor, count: int) -> Tensor:
    """Give each empty cluster one of the vectors with the largest errors."""
    flat = index.flatten().clone()
    empty = (flat.bincount(minlength=count) == 0).nonzero().squeeze(1)
    flat[error.flatten().topk(len(empty)).indices] = empty
    return flat.view(index.shape)


def centers(V: Tensor, G: Tensor, index: Tensor, C: Tensor) -> Tensor:
    """Move each centroid to the least squared error of its members.

    Its normal equations are Σ G_j c = Σ G_j v_ij over the members: their
    mean if there is one G for all.  An empty cluster keeps its centroid.
    """
    K, s, d = len(C), *G.shape[:2]
    cell = (index * s + torch.arange(s, device=V.device)).flatten()
    total = V.new_zeros(K * s, d).index_add_(0, cell, V.flatten(0, 1))
    number = cell.bincount(minlength=K * s).view(K, s).to(V)
    A = torch.einsum("ks,sde->kde", number, G)
    b = torch.einsum("ksd,sde->ke", total.view(K, s, d), G)
    # padding, or a weight that no input meets: any value will do
    A.diagonal(dim1=1, dim2=2).add_((A.diagonal(dim1=1, dim2=2) == 0).to(A))
    new, failed = torch.linalg.solve_ex(A, b)
    if failed.any():
        raise ValueError("H is singular: use a larger damp")
    return torch.where(number.sum(1, keepdim=True) > 0, new, C)


def _blocks(W: Tensor, V: Tensor, H: Tensor | None, damp: float) -> Tensor:
    """Cut the diagonal blocks (s, d, d) out of H; padding has weight 0."""
    n, (s, d) = W[0].numel(), V.shape[1:]
    if H is None:
        H = torch.eye(n, dtype=V.dtype, device=V.device)
    elif H.shape != (n, n):
        raise ValueError(
            f"H must be {(n, n)} for W {tuple(W.shape)}, got {tuple(H.shape)}"
        )
    else:
        H = obs.damped(H, damp=damp).to(V)
    pad = s * d - n
    blocks = F.pad(H, (0, pad, 0, pad)).view(s, d, s, d)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _check(W: Tensor, length: int, bits: int, each: str, rounds: int) -> None:
    if not W.is_floating_point() or not W.numel() or W.ndim < 2:
        raise ValueError(
            "W must be floating point, (out, in) or more and not empty, got "
            f"{W.dtype} of {tuple(W.shape)}"
        )
    if not W.isfinite().all():
        raise ValueError(f"W {tuple(W.shape)} must be finite")
    if not 1 <= length <= W[0].numel():
        raise ValueError(
            f"length must be 1 to {W[0].numel()} for W {tuple(W.shape)}, "
            f"got {length}"
        )
    if not 1 <= bits <= 16:
        raise ValueError(f"bits must be 1 to 16, got {bits}")
    if each not in ("tensor", "columns"):
        raise ValueError(f'each must be "tensor" or "columns", got {each!r}')
    if rounds < 0:
        raise ValueError(f"rounds must be at least 0, got {rounds}")
