"""Uniform steps and a coder: how coarse may each weight of an encoder be?

An embedding v has length 1; if it moves by e, the cosine falls by |e|²/2.  To
first order a change D of a matrix moves z·v, for any direction z, by tr(Gᵀ D)
where G = Σ g_t x_tᵀ is the gradient: a sum over the tokens t of a text, with
inputs x_t and gradients g_t of the outputs.  If the mean of G⊗G is taken for a
product of a factor of the outputs and one of the inputs, and of the former
only the diagonal s is kept, then

    E|e|² = tr(S D H Dᵀ),    H ∝ E[Gᵀ G],    s ∝ diag E[G Gᵀ].

GPTQ makes of this a sum of squares, one for each weight.  The file is the
smallest where all of these are equal.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minicompress import codes, entropy, obs, quantize

BITS = 16  # of integers before they are coded
MIDDLE = 1 << (BITS - 1)
DAMP = 0.01
FLOOR = 0.1  # of the mean: what a row counts at least


class Weight(NamedTuple):
    """How much the embedding feels errors of a matrix: H (in, in), s (out,)."""

    H: torch.Tensor
    s: torch.Tensor


def gradients(model, batches, seed=0):
    """Look at gradients of z·v, z drawn at random for each text.

    batches  token numbers (N, T), without padding

    Returns {name: Weight} of the linear layers, and M (width, width): errors
    e_t of the sums that enter the first norm cost the mean of e_tᵀ M e_t,
    times the tokens of a text.
    """
    dice = torch.Generator().manual_seed(seed)
    H, s, M, n, handles = {}, {}, 0, 0, []

    def watch(name, layer):
        def forward(layer, args, y):
            x = args[0].detach()  # (N, T, in)

            def backward(g):  # (N, T, out)
                right, left = g @ g.mT @ x, x @ x.mT @ g
                more = x.flatten(0, 1).T @ right.flatten(0, 1)
                H[name] = H.get(name, 0) + more.double()
                s[name] = s.get(name, 0) + (g * left).sum((0, 1)).double()

            y.register_hook(backward)

        handles.append(layer.register_forward_hook(forward))

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            watch(f"{name}.weight", layer)
    sums = []
    handles.append(
        model.norm.register_forward_pre_hook(lambda m, args: sums.append(*args))
    )
    try:
        for ids in batches:
            v = F.normalize(model(ids).mean(1))
            z = torch.randn(v.shape, generator=dice)
            (g,) = torch.autograd.grad((v * z).sum(), sums.pop())
            M = M + torch.einsum("nti,ntj->ij", g, g).double()
            n += len(ids)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for k, h in H.items():
        part = s[k] / h.trace()  # the sum of s is the trace of H
        found[k] = Weight(h / n, part.clamp(min=FLOOR * part.mean()))
    return found, M / n


def felt(D, weight):
    """Predict E|e|² for a change D (out, in) of a matrix."""
    return float(((D.double() @ weight.H) * D).sum(1) @ weight.s)


def on_powers(x, per=4):
    """Round positive numbers to powers of 2^(1/per), and store those."""
    k = torch.round(per * x.double().log2()).int()
    low, high = int(k.min()), int(k.max())
    book = 2 ** (torch.arange(low, high + 1) / per)
    index = codes.Ints(k - low, max(1, (high - low).bit_length()))
    return codes.Codebook(shorter(index), book.half())


def shorter(ints):
    """Code integers by how often each occurs, if that is shorter."""
    coded = entropy.rans(ints)
    size = coded.stream.numel() + coded.table.numel()
    return coded if 8 * size < ints.values.numel() * ints.bits else ints


def even(weight, c):
    """Choose steps (out, in) with which the errors of each weight cost c²/12.

    When GPTQ rounds column j with an error q, what is lost in the end is
    (q d_j)²: d_j² is what the inputs behind j do not tell of input j.
    """
    d = 1 / obs.factor(weight.H, damp=DAMP).diagonal()
    row, column = c / weight.s.sqrt(), 1 / d
    middle = column.log().mean() - row.log().mean()
    shift = (middle / 2).exp()  # both sides in the range of half precision
    return codes.Scaled(
        on_powers(column[None] / shift), on_powers(row[:, None] * shift)
    )


def by_gptq(W, H, step):
    """Round column by column on a grid that has no ends; code the integers."""
    none = codes.Ints(torch.zeros(W.shape, dtype=torch.int32), BITS)
    grid = codes.Affine(none, codes.value(step), MIDDLE)
    q = quantize.gptq(W, H.float(), grid, damp=DAMP).q.values
    if int(q.min()) == 0 or int(q.max()) == 2 * MIDDLE - 1:
        raise ValueError(f"step: too fine for integers of {BITS} bits")
    return listed(q - MIDDLE, step)


def by_nearest(W, step):
    """Round to nearest on a grid that has no ends; code the integers."""
    return listed(torch.round(W / codes.value(step)).int(), step)


def listed(q, step):
    """Write integers times their steps."""
    low, high = int(q.min()), int(q.max())
    bits = max(1, (high - low).bit_length())
    return codes.Affine(shorter(codes.Ints(q - low, bits)), step, -low)


def turned(E, M, p, c, parts=16):
    """Round a table (rows, width) along directions, some finer than others.

    Errors e of row r cost p_r eᵀ M e.  With M = A Aᵀ, and rows divided by
    their step c / sqrt(p_r), all entries of Aᵀ e count the same; along the
    principal directions the entries of a row are not correlated.  A few
    directions take most of the bits, many none.  The way back is fitted to
    the integers by least squares, and rounded for the same error.
    """
    size = on_powers(c / p.float().sqrt()[:, None], per=2)
    mean = ((E * p[:, None]).sum(0, keepdim=True) / p.sum()).half()
    rows = (E - mean.float()) / size.decode().float()
    small = DAMP * M.diagonal().mean() * torch.eye(len(M))
    X = rows @ torch.linalg.cholesky(M + small).float()
    Z = torch.round(X @ torch.linalg.eigh(X.T @ X).eigenvectors.flip(1))
    Z = Z[:, : int(Z.any(0).nonzero().max()) + 1]
    square = Z.T @ Z + 1e-3 * torch.eye(Z.shape[1])
    back = torch.linalg.solve(square, Z.T @ rows)
    cut, code = math.ceil(Z.shape[1] / parts), None
    for z, v in zip(Z.split(cut, 1), back.split(cut), strict=True):
        # each error of v occurs as often as there is something in z
        weight = Weight(M, c**2 * z.double().square().sum(0).clamp(min=1))
        v = by_gptq(v, M, even(weight, c))
        one = codes.Factors(listed(z.int(), 1.0), v)
        code = one if code is None else codes.Sum(code, one)
    return codes.Sum(codes.Scaled(code, size), mean)


def alike(words):
    """Let every token be as likely, but for those that no text has.

    WordPiece makes no "[unused...]" of any text; [CLS] and [SEP] are in each.
    """
    real = torch.tensor([not w.startswith("[unused") for w in words])
    return _framed(real / real.double().sum(), words)


def zipf(words):
    """Guess how likely each token is, without having seen a text.

    WordPiece lists its tokens by their frequency in the text that it was made
    from: half of the probability follows Zipf's law, half is spread evenly.
    """
    p = alike(words)
    law = (p > 1e-9) / ((p > 1e-9).cumsum(0).double() + 30)
    return _framed((p / p.sum() + law / law.sum()) / 2, words)


def _framed(p, words):
    p = p.clamp(min=1e-12)
    for name in ("[CLS]", "[SEP]"):
        p[words.index(name)] = p.max()
    return p


def places(n, length=64):
    """Guess what each position counts, for texts of many lengths."""
    return length / torch.arange(n).double().clamp(min=length) ** 2
