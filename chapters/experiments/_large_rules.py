"""Every way to compress the matrices of the published encoder's blocks.

A family lists (method, keys of its row, make, again), where make(bench, draw)
returns {name: code} and again tells whether further draws of passages are
worth their time.
"""

from dataclasses import replace
from functools import partial

from pruned_encoder import coded_by_block as by_block

from minicompress import codes, lowrank, prune, quantize

PASSAGES, GROUP = 64, 64
BITS = (8, 4, 3, 2)
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
REPEATED = (0.5, 0.6)  # with further draws
RATIOS = (0.9, 0.7, 0.5)  # of the numbers, factored


def rounding(W, bits, group=None):
    return quantize.mse(W, bits=bits, each=group or "row")


def gptq(W, H, bits, group=None):
    renew = partial(quantize.mse, bits=bits) if group else None
    return quantize.gptq(W, H.float(), rounding(W, bits, group), renew=renew)


def turned(W, H, bits):
    """Turn the inputs, and so their moments on both sides; then GPTQ."""
    signs = quantize.random_signs(W.shape[1])
    H = quantize.turn(quantize.turn(H, signs).T, signs)
    return quantize.rotate(W, partial(gptq, H=H, bits=bits))


def double_nf4(W):
    """Round to NF4, and its scales to 8 bits."""
    code = quantize.nf4(W, each=GROUP)
    small = replace(code.x, by=quantize.small_scales(code.x.by))
    return replace(code, x=small)


def awq(W, stats, bits):
    rule = partial(rounding, bits=bits, group=GROUP)
    return quantize.awq(W, stats, rule, grid=10)


def magnitude(W, **how):
    return codes.sparse(W, prune.magnitude(W, **how))


def wanda(W, stats, **how):
    return codes.sparse(W, prune.wanda(W, stats.norm, **how))


def sparsegpt(W, H, **how):
    return prune.sparsegpt(W, H.float(), **how)


def packed(W, H, bits, **how):
    """Prune and round in one pass; the grid is that of what will be left."""
    left = sparsegpt(W, H, **how).decode()
    scale = quantize.mse(left, bits=bits, symmetric=True).scale  # (out, 1)
    top = 2 ** (bits - 1) - 1

    def grid(w):
        return (w / scale[:, 0]).round().clamp(-top, top) * scale[:, 0]

    code = sparsegpt(W, H, grid=grid, **how)
    q = (code.decode() / scale).round()[code.mask].int() + top
    steps = codes.Affine(codes.Ints(q, bits), 1.0, top)
    return codes.Scaled(replace(code, values=steps), scale)


def patched(W, H, bits, rank):
    """Add a low-rank correction, in half precision, to what GPTQ makes."""
    code = lowrank.corrected(W, partial(gptq, H=H, bits=bits), rank=rank, H=H)
    half = codes.Factors(code.b.u.half(), code.b.v.half())
    return replace(code, b=half)


def svd(W, ratio):
    return lowrank.svd(W, rank=int(ratio * lowrank.break_even(*W.shape)))


def drone(W, H, ratio):
    return lowrank.drone(W, H, rank=int(ratio * lowrank.break_even(*W.shape)))


def blind(rule, /, **how):
    """Compress by a rule that sees only the weights."""

    def make(bench, draw):
        return {n: rule(W, **how) for n, W in bench.weights.items()}

    return make


def seeing(rule, /, **how):
    """Compress block by block by a rule that sees statistics of inputs."""

    def make(bench, draw):
        batches = bench.passages(PASSAGES, draw)
        return by_block(
            bench.model, batches, lambda name, W, stats: rule(W, stats, **how)
        )

    return make


def moments(rule, /, **how):
    """Compress block by block by a rule that sees their moments H."""
    return seeing(lambda W, stats: rule(W, stats.H, **how))


def everywhere(sparsity):
    """Prune by magnitude, with one threshold for all matrices."""

    def make(bench, draw):
        size = {n: W.abs() for n, W in bench.weights.items()}
        masks = prune.keep_global(size, sparsity=sparsity)
        return {n: codes.sparse(W, masks[n]) for n, W in bench.weights.items()}

    return make


def of_bits():
    for b in BITS:
        for group in (None, GROUP):
            how = {"bits": b, "group": group}
            yield "rounding", how, blind(rounding, **how), False
            yield "GPTQ", how, moments(gptq, **how), b < 8
    for b in BITS[1:]:
        how = {"bits": b}
        yield "AWQ", how | {"group": GROUP}, seeing(awq, **how), True
        rule = partial(rounding, **how)
        yield "rotation", how, blind(quantize.rotate, rule=rule), False
        yield "rotation + GPTQ", how, moments(turned, **how), True
    for name, group, rule in (
        ("NF4", GROUP, partial(quantize.nf4, each=GROUP)),
        ("NF4, double", GROUP, double_nf4),
        ("MXFP4", 32, quantize.mxfp4),
        ("NVFP4", 16, quantize.nvfp4),
    ):
        yield name, {"bits": 4, "group": group}, blind(rule), False


def of_zeros():
    for s in SPARSITIES:
        how, again = {"sparsity": s}, s in REPEATED
        yield "magnitude", how, blind(magnitude, **how), False
        yield "magnitude, global", how, everywhere(s), False
        yield "Wanda", how, seeing(wanda, **how), again
        yield "SparseGPT", how, moments(sparsegpt, **how), again
    how = {"sparsity": 0.5, "pattern": "2:4"}

    def largest(W):
        return codes.sparse(W, prune.n_m(W.abs()))

    def heaviest(W, stats):
        score = prune.wanda_score(W, stats.norm)
        return codes.sparse(W, prune.n_m(score))

    yield "magnitude", how, blind(largest), False
    yield "Wanda", how, seeing(heaviest), True
    yield "SparseGPT", how, moments(sparsegpt, n=2, m=4), True


def of_ranks():
    for r in RATIOS:
        yield "SVD", {"ratio": r}, blind(svd, ratio=r), False
        yield "DRONE", {"ratio": r}, moments(drone, ratio=r), True


def of_pairs():
    for b, s in ((4, 0.5), (6, 0.5), (4, 0.25)):
        how = {"bits": b, "sparsity": s}
        yield "SparseGPT + bits", how, moments(packed, **how), True
    how = {"bits": 4, "sparsity": 0.5, "pattern": "2:4"}
    yield "SparseGPT + bits", how, moments(packed, bits=4, n=2, m=4), True
    for r in (8, 16):
        how = {"bits": 3, "rank": r}
        yield "GPTQ + low rank", how, moments(patched, **how), True


FAMILIES = {
    "bits": of_bits,
    "zeros": of_zeros,
    "ranks": of_ranks,
    "pairs": of_pairs,
}
