"""How the recipes of the scoreboard call the library.

What needs no training is ``(subject, seed) -> (model, {name: code})``; what
does, ``(subject, seed, learning rate) -> (model, {name: code})``.
"""

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial

import _stamp
import factored_glyphs
import torch
from _board import every, shaped
from _pruning import layers, smallest
from _rounding import WHILE, attached

from minicompress import (
    codes,
    distill,
    lowrank,
    models,
    nas,
    pipeline,
    prune,
    quantize,
    share,
    storage,
    through,
)

GROUP, LEAST = 32, 32  # of a scale; matrices that are factored
DIGITS, GLYPHS, TEXT, ENCODER = (
    "digits-mlp",
    "glyphs-cnn",
    "reference-lm",
    "encoder",
)


def plain(s, seed):
    return s.model, {}


def halves(s, seed):
    state = codes.encode(s.model, lambda w: w.half(), lambda n, w: True)
    return s.model, state


def packed(w, bits):
    """Store what is not 0: positions and shared values, coded."""
    sparse = codes.sparse(w, w != 0)
    if len(sparse.values):
        book = share.kmeans(sparse.values, bits=bits)
        sparse = replace(sparse, values=book)
    return pipeline.smallest(sparse)


def kept(s, model):
    """Store what is not 0 as it is."""
    found = {n: model.get_parameter(n).detach() for n in s.names}
    return {n: smallest(w, w != 0) for n, w in found.items()}


def thinned_out(s, fit, sparsity):
    """Prune by magnitude, all matrices together, and train the rest."""

    def size(model):
        return {n: model.get_parameter(n).detach().abs() for n in s.names}

    how = {"sparsity": sparsity, "score": size}
    return pipeline.pruned(s.model, fit, **how)[0]


def magnitude(s, seed, sparsity):
    model = thinned_out(s, lambda model, on_step: model, sparsity)
    return model, kept(s, model)


def sparse(rule):
    """Leave out of the file what a rule has made zero."""

    def make(W, *x):
        W = codes.value(rule(W, *x))
        return smallest(W, W != 0)

    return make


def two_of_four(W):
    return W * prune.n_m(W.abs()) if W.shape[1] % 4 == 0 else W


def two_by_obs(W, x):
    if W.shape[1] % 4:
        return W
    return prune.sparsegpt(W, x.H.float(), n=2, m=4)


def wanda(sparsity):
    return lambda W, x: W * prune.wanda(W, x.norm, sparsity=sparsity)


def sparsegpt(sparsity):
    return lambda W, x: prune.sparsegpt(W, x.H.float(), sparsity=sparsity)


def awq(W, x):
    grid = partial(quantize.min_max, bits=4, each=GROUP)
    return quantize.awq(W, x, grid)


def gptq(bits):
    return lambda W, x: quantize.gptq(
        W, x.H.float(), quantize.mse(W, bits=bits)
    )


def halved(s, seed, fitted=True):
    """Remove half of the units of every layer; others stand in for them."""
    groups = prune.groups(s.model, s.example)
    groups = [g for g in groups if g.name != "tokens"]
    seen, model = s.batches(seed), s.model
    if fitted:
        scores = prune.reconstruction_scores(model, groups, seen)
    else:
        scores = prune.filter_norms(model, groups)
    keep = prune.keep_units(
        groups, scores, sparsity=0.5, select=prune.keep_each
    )
    if fitted:
        model = prune.refit(model, groups, keep, seen)
    model = prune.remove_channels(model, keep, s.example)
    if fitted and s.name == GLYPHS:
        model = prune.renormalize(model, seen)
    return model, {}


def shortened(s, seed):
    """Remove a third of the blocks: neighbors that turn the stream least."""
    count = len(s.model.blocks)
    args = (s.model, "blocks", s.batches(seed))
    angle = prune.angular_distance(*args, span=count // 3)
    first = int(angle.argmin())
    keep = torch.ones(count, dtype=torch.bool)
    keep[first : first + count // 3] = False
    args = (s.model, "blocks", keep, s.example)
    return prune.remove_blocks(*args), {}


def thinned(aware):
    """Factor the matrices to half of their numbers."""

    def make(s, seed):
        made = {}
        for n, W in s.weights.items():
            rank = int(lowrank.break_even(*W.shape) / 2)
            if min(W.shape) >= LEAST and aware:
                made[n] = lowrank.drone(W, s.stats(seed)[n].H, rank=rank)
            elif min(W.shape) >= LEAST:
                made[n] = lowrank.svd(W, rank=rank)
        return lowrank.factorize(s.model, made), {}

    return make


def factored(method, budget=0.4):
    """Factor the kernels to a share of their MACs; count the norms anew."""
    rule, aware = factored_glyphs.METHODS[method]

    def make(s, seed):
        model = deepcopy(s.model)
        for name in factored_glyphs.LAYERS:
            conv = s.model.get_submodule(name)
            H = {"H": s.stats(seed)[f"{name}.weight"].H} if aware else {}
            model.set_submodule(name, rule(conv, budget, seed, **H))
        return prune.renormalize(model, s.batches(seed)), {}

    return make


def tables_too(s, seed):
    """Round the table of tokens like everything else."""
    rule = partial(quantize.mse, bits=4, each=GROUP)
    model, made = every(rule)(s, seed)
    tokens = rule(model.tokens.weight.detach())
    names = [n for n in s.tables if n != "positions.weight"]  # one, or tied
    return model, made | dict.fromkeys(names, tokens)


def product(W):
    """Two bits for a weight; a small matrix has no room for a large book."""
    length = 4 if W.numel() > 2**15 else 2
    return share.product(W, length=length, bits=2 * length)


def then(make, end=lambda s, model: (model, {})):
    """Train on what a recipe has made, and store it."""
    return lambda s, seed, lr: end(s, onward(s, make, seed, lr))


@cache
def onward(s, make, seed, lr, loss=None):
    """Train on; several recipes begin with the same training."""
    how = {"loss": loss} if loss else {}
    return s.fit(make(s, seed)[0], lr, seed, **how)


def in_four_bits(s, model):
    """Round the matrices of what is left, and code the integers."""

    def rule(W):
        return pipeline.smallest(quantize.mse(W, bits=4))

    names = layers(model, s.leave)
    found = {n: model.get_parameter(n).detach() for n in names}
    return model, {n: shaped(rule, w) for n, w in found.items()}


def pruned(s, seed, lr, sparsity):
    def fit(model, on_step):
        return s.fit(model, lr, seed)

    model = thinned_out(s, fit, sparsity)
    return model, kept(s, model)


def deep(s, seed, lr, sparsity, bits):
    """Prune, train, share values, train those, code: half the steps each."""

    def fit(model, on_step=None, seed=seed):
        return s.fit(model, lr, seed, steps=s.steps // 2)

    model = thinned_out(s, fit, sparsity)
    few, again = dict.fromkeys(s.names, bits), partial(fit, seed=50 + seed)
    model, state = pipeline.clustered(model, again, bits=few)
    return model, pipeline.coded({n: state[n] for n in s.names})


def five(code):
    """Store five ternary digits in a byte, if that is shorter."""
    return min(code, quantize.trits(code), key=storage.payload)


def ternary(W):
    return five(quantize.ternary(W))


def threshold_ternary(w):
    return five(quantize.twn(w))


def rounding(method, bits):
    """Train with the rounding in place."""
    how = WHILE[method]
    code = partial(how.code, bits=bits) if how.named else how.code
    if method == "TWN":
        code = threshold_ternary

    def go(s, seed, lr):
        tuned = s.fit(attached(s.model, s.names, method, bits), lr, seed)
        return through.bake(tuned), quantize.encode_trained(tuned, code)

    return go


def centroids(s, seed, lr, bits):
    """Share values, and train them."""
    made = every(lambda w: share.kmeans(w, bits=bits))(s, seed)[1]
    tuned = s.fit(share.cluster(s.model, made), lr, seed)
    return through.bake(tuned), share.encode_clustered(tuned, made)


def tied(s, seed):
    return share.tie_blocks(s.model, "blocks", source="mean"), {}


def taught(s):
    T = 1.0 if s.name == TEXT else 4.0
    loss = partial(distill.hinton, temperature=T, alpha=0.9)
    return distill.taught(s.model, loss)


def half_taught(s, seed, lr):
    return onward(s, halved, seed, lr, taught(s)), {}


def student(s, seed, lr, teach):
    """Train a small network from the start."""
    torch.manual_seed(seed)
    net = {
        DIGITS: lambda: models.MLP((64, 16, 10)),
        GLYPHS: lambda: models.CNN(channels=(4, 8, 16, 32), classes=36),
    }[s.name]()
    how = {"loss": taught(s)} if teach else {}
    return s.fit(net, lr, seed, steps=s.scratch[0], **how), {}


def hashed(s, seed, lr):
    torch.manual_seed(seed)
    start = share.hashed_layers(models.MLP(), ratio=1 / 8, seed=seed)
    tuned = s.fit(start, lr, seed, steps=s.scratch[0])
    return through.bake(tuned), share.encode_hashed(tuned)


def searched(s, seed, lr):
    """Take the smallest file of chapter 10's search as good as the original.

    On validation data; it is trained anew, and stored as it was there.
    """
    path = _stamp.RESULTS / "searched_file.json"
    front = json.loads(path.read_text("utf8"))["nsga2"]["front"]
    most = 1 - s.quality(s.model, "val")["quality"] / 100
    good = [r for r in front if r["val"] <= most]
    arch = min(good, key=lambda r: r["bytes"])["arch"]
    torch.manual_seed(seed)
    net = s.fit(nas.digits_network(arch), lr, seed, steps=s.scratch[0])
    net = quantize.fold_norms(net, s.example)
    rule = partial(quantize.min_max, bits=arch["bits"], each="tensor")
    found = {n: p.detach() for n, p in net.named_parameters()}
    return net, {
        n: shaped(lambda W: pipeline.smallest(rule(W)), w)
        if w.ndim > 1
        else w.half()
        for n, w in found.items()
    }
