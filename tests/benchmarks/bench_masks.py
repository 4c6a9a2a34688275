"""Masks against torch.nn.utils.prune, and 2:4 against a naive top two.

Memory is that of the tensors which operations return.  What an operation
needs inside is not seen; torch's selection has such buffers, ours works in
place, so the true ratio is smaller than the one shown.
"""

from functools import partial

import torch
from torch import nn
from torch.nn.utils import prune as theirs

from minicompress import measure
from minicompress.prune import masks

from .harness import Row, time_row

SPARSITY = 0.9


def rows():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(4096, 4096, generator=g)
    yield from magnitude_rows(W)
    yield global_row(W.view(4, 2048, 2048))
    yield from group_rows(W.abs())


def magnitude_rows(W: torch.Tensor):
    """Compare masks alone: torch's wrapper also multiplies by the mask."""
    ones = torch.ones_like(W)
    ours = partial(masks.magnitude, W, sparsity=SPARSITY)
    peer = partial(theirs.L1Unstructured(SPARSITY).compute_mask, W, ones)
    assert int((~ours()).sum()) == round(SPARSITY * W.numel())
    # of equal weights torch may keep others
    assert (ours() != peer().bool()).sum() <= 2 * W.numel() * 1e-6
    what = "magnitude mask of 4096 x 4096 at 90 %"
    yield time_row(what, ours, peer, "torch's L1Unstructured", 0.2)
    a, b = measure.peak_memory(ours), measure.peak_memory(peer)
    yield Row(
        f"{what}, peak memory",
        f"{a / 1e6:,.0f} MB",
        f"{b / 1e6:,.0f} MB",
        a / b,
        "<= 0.4x torch's L1Unstructured",
        a <= 0.4 * b,
    )


def global_row(weights: torch.Tensor) -> Row:
    names = [str(i) for i in range(len(weights))]

    def ours():
        scores = {n: w.abs() for n, w in zip(names, weights, strict=True)}
        return masks.keep_global(scores, sparsity=SPARSITY)

    def peer():
        pairs = []  # new modules: torch would combine old and new masks
        for w in weights:
            module = nn.Module()
            module.weight = nn.Parameter(w)
            pairs.append((module, "weight"))
        theirs.global_unstructured(
            pairs, theirs.L1Unstructured, amount=SPARSITY
        )

    assert masks.sparsity(ours()) == round(SPARSITY * weights.numel()) / (
        weights.numel()
    )
    return time_row(
        "global magnitude masks of 4 x 2048 x 2048 at 90 %",
        ours,
        peer,
        "torch's global_unstructured",
        0.1,
    )


def group_rows(scores: torch.Tensor):
    groups = scores.view(-1, 4)

    def scatter(index):
        mask = torch.zeros_like(groups, dtype=torch.bool)
        return mask.scatter_(1, index, True).view(scores.shape)

    naive = {
        "topk": lambda: scatter(groups.topk(2, dim=1).indices),
        "argsort": lambda: scatter(groups.argsort(1, descending=True)[:, :2]),
    }
    for name, f in naive.items():
        assert (masks.n_m(scores) != f()).sum() <= 2 * scores.numel() * 1e-6
        yield time_row(
            "2:4 mask of 4096 x 4096",
            partial(masks.n_m, scores),
            f,
            f"{name} and scatter",
            0.5,
            runs=15,
        )
