"""Rules that round weights after the training, alone and two together.

A rule is ``(W, stats, ...) -> Code`` with `stats` of the inputs of W (out, in)
from `calibrate.inputs`; what needs no data does not look at them.  How many
bits a code has is `storage.payload`, with scales, signs and positions.
"""

from functools import partial

from adapted_text import small

from minicompress import codes, lowrank, prune, quantize


def nearest(W, stats, bits, each="row"):
    """Round to the nearest on the grids with the smallest squared error."""
    return quantize.mse(W, bits=bits, each=each)


def min_max(W, stats, bits, each="row"):
    return quantize.min_max(W, bits=bits, each=each)


def gptq(W, stats, bits, each="row"):
    return with_moments(W, stats.H, bits, each)


def with_moments(W, H, bits, each="row"):
    """Round on the grids of rows, or of groups that are chosen on the way."""
    grid = quantize.mse(W, bits=bits, each=each)
    renew = None if each == "row" else partial(quantize.mse, bits=bits)
    return quantize.gptq(W, H.float(), grid, renew=renew)


def awq(W, stats, bits, each):
    rule = partial(quantize.min_max, bits=bits, each=each)
    return quantize.awq(W, stats, rule)


def rotated_nearest(W, stats, bits, seed):
    return quantize.rotate(W, partial(quantize.mse, bits=bits), seed=seed)


def rotated_gptq(W, stats, bits, seed):
    """Rotate the inputs, and round on what the turned weights see."""
    signs = quantize.random_signs(W.shape[1], seed=seed)
    H = turned_moments(stats.H, signs)
    return quantize.rotate(W, lambda V: with_moments(V, H, bits), seed=seed)


def turned_moments(H, signs):
    """Turn E[x x^T] into that of the turned inputs, on both sides."""
    return quantize.turn(quantize.turn(H, signs).mT, signs).mT


def joint(W, stats, bits, **how):
    """Prune as SparseGPT does and round, in one sweep.

    The grids are those of what would be left without any rounding.
    """
    H = stats.H.float()
    left = prune.sparsegpt(W, H, **how).decode()
    scale = quantize.mse(left, bits=bits, symmetric=True).scale  # (out, 1)

    def column(w):
        return scale[:, 0] * steps(w, scale[:, 0], bits)

    return on_grid(prune.sparsegpt(W, H, grid=column, **how), scale, bits)


def in_turn(W, stats, bits, **how):
    """Prune as SparseGPT does, then round what is left to the nearest."""
    left = prune.sparsegpt(W, stats.H.float(), **how)
    scale = quantize.mse(left.decode(), bits=bits, symmetric=True).scale
    return on_grid(left, scale, bits)


def steps(w, scale, bits):
    """Give the nearest whole number of steps on a symmetric grid."""
    top = 2 ** (bits - 1) - 1
    return (w / scale).round().clamp(-top, top)


def on_grid(sparse, scale, bits):
    """Store what is kept as integers; a bit for each place; row scales."""
    top = 2 ** (bits - 1) - 1
    q = steps(sparse.decode(), scale, bits)[sparse.mask] + top
    values = codes.Affine(codes.Ints(q.int(), bits), 1.0, top)
    kept = codes.Sparse(sparse.mask, values, tuple(sparse.shape))
    return codes.Scaled(kept, scale)


def thin(W, stats, bits, ratio):
    """Factor to a share of the numbers, and round both factors.

    The rows of the second factor have one grid for all directions, large and
    small.  As AWQ does, try how much of a direction's size it should hold,
    and keep what changes the outputs least.
    """
    rank = max(1, int(ratio * lowrank.break_even(*W.shape)))
    f, H = lowrank.drone(W, stats.H, rank=rank), stats.H
    one = f.u.norm(dim=0).clamp(min=1e-12)
    u, v = f.u / one, f.v * one[:, None]
    size = ((v.double() @ H) * v).sum(1).sqrt().to(W.dtype)
    tried = [
        both_rounded(u * size**p, v / size[:, None] ** p, H, bits)
        for p in (0, 0.25, 0.5)
    ]

    def loss(code):
        E = W.double() - code.decode().double()
        return float(((E @ H) * E).sum())

    return min(tried, key=loss)


def both_rounded(u, v, H, bits):
    """Round the factors of u v, u on what the rounded v gives it."""
    v = with_moments(v, H, bits)
    V = v.decode().double()
    return codes.Factors(with_moments(u, V @ H @ V.T, bits), v)


def corrected(W, stats, bits, rank):
    """Round as GPTQ does; give a few directions of the error back in 8 bits."""
    rule = partial(with_moments, H=stats.H, bits=bits)
    code = lowrank.corrected(W, rule, rank=rank, H=stats.H)
    return codes.Sum(code.a, small(code.b, 8))
