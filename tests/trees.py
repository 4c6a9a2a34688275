"""Random code trees of every kind, for laws and for fuzzing."""

import math

import torch
from hypothesis import strategies as st

from minicompress import codes, entropy


def tensor(shape, seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(dtype)


def integers(shape, bits, seed):
    g = torch.Generator().manual_seed(seed)
    # squared: an uneven distribution, as entropy coders like it
    u = torch.rand(shape, generator=g) ** 2
    return codes.Ints((u * (1 << bits)).long(), bits)


@st.composite
def ints(draw, shape):
    seed = draw(st.integers(0, 999))
    x = integers(shape, draw(st.integers(1, 16)), seed)
    coders = [None, entropy.huffman, entropy.rans, entropy.contextual]
    coder = draw(st.sampled_from(coders))
    return coder(x) if coder else x


FORMS = "bits", "gaps", "ints", "contexts", "coded gaps"


@st.composite
def masks(draw, shape, kept=None):
    """A mask that keeps some weights, in one of its forms."""
    numel = math.prod(shape)
    seed = draw(st.integers(0, 999))
    g = torch.Generator().manual_seed(seed)
    if kept is None:
        kept = draw(st.integers(0, numel))
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[torch.randperm(numel, generator=g)[:kept]] = True
    form = draw(st.sampled_from([*FORMS]))
    if form == "bits":
        return mask.reshape(shape)
    if form == "ints":
        return codes.Ints(mask.to(torch.uint8), 1)
    if form == "contexts":
        whole = codes.Ints(mask.to(torch.uint8).reshape(shape), 1)
        return entropy.contextual(whole)
    found = codes.gaps(mask, bits=draw(st.integers(1, 8)))
    if form == "coded gaps":
        found = codes.Gaps(entropy.huffman(found.steps), numel)
    return found


@st.composite
def trees(draw, shape, depth=2):
    """A code of the given shape whose parts are codes in turn."""
    seed = draw(st.integers(0, 999))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    leaf = tensor(shape, seed, dtype)
    if depth == 0:
        return draw(st.sampled_from([leaf, leaf.bfloat16(), leaf.double()]))
    part = trees(shape=shape, depth=depth - 1)
    kinds = ["tensor", "affine", "codebook", "scaled", "sparse", "sum"]
    kinds += ["hashed", "view", "rotated", "factors", "padded", "grouped"]
    kind = draw(st.sampled_from(kinds))
    row = (shape[0], *(1 for _ in shape[1:])) if shape else ()
    if kind == "affine":
        scale = draw(trees(shape=row, depth=depth - 1))
        return codes.Affine(draw(ints(shape)), scale, draw(st.integers(0, 9)))
    if kind == "codebook":
        index = draw(ints(shape))
        k = 1 << index.bits
        return codes.Codebook(index, draw(trees(shape=(k,), depth=0)))
    if kind == "scaled":
        by = draw(st.sampled_from([0.5, tensor(row, seed)]))
        return codes.Scaled(draw(part), by)
    if kind == "sparse":
        mask = draw(masks(shape))
        kept = int(mask.decode().sum() if codes_(mask) else mask.sum())
        values = draw(trees(shape=(kept,), depth=depth - 1))
        return codes.Sparse(mask, values, shape)
    if kind == "sum":
        return codes.Sum(draw(part), draw(part))
    if kind == "hashed":
        values = draw(trees(shape=(7,), depth=depth - 1))
        return codes.Hashed(seed, values, shape)
    if kind == "view":
        flat = draw(trees(shape=(math.prod(shape),), depth=depth - 1))
        return codes.View(flat, shape)
    if kind == "padded" and shape and math.prod(shape):
        wide = (*shape[:-1], shape[-1] + 3)
        return codes.View(draw(trees(shape=wide, depth=depth - 1)), shape)
    if kind == "grouped" and shape and math.prod(shape):
        grouped = codes.groups(leaf, 4)
        q = draw(ints(tuple(grouped.shape)))
        scale = grouped.abs().amax(-1, keepdim=True).half()
        return codes.View(codes.Affine(q, scale, 3), shape)
    if kind == "rotated" and shape and shape[-1] in (1, 2, 4, 8):
        signs = integers((shape[-1],), 1, seed)
        return codes.Rotated(draw(part), signs)
    if kind == "factors" and len(shape) == 2:
        u = draw(trees(shape=(shape[0], 2), depth=depth - 1))
        v = draw(trees(shape=(2, shape[1]), depth=depth - 1))
        return codes.Factors(u, v)
    if kind == "factors" and len(shape) == 4:
        core = tensor((2, 3, *shape[2:]), seed)
        u, v = tensor((shape[0], 2), seed), tensor((3, shape[1]), seed)
        return codes.Factors(u, v, core)
    return leaf


def codes_(x):
    return isinstance(x, codes.Code)


def same(a, b) -> bool:
    """Tell whether two trees are equal field by field, bit for bit."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.nan_to_num(), b.nan_to_num())
        )
    if isinstance(a, codes.Code):
        return type(a) is type(b) and all(
            same(getattr(a, name), getattr(b, name))
            for name in a.__dataclass_fields__
        )
    return type(a) is type(b) and a == b
