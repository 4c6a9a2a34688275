"""Round what enters the matrices of a model, after its outliers are moved.

Nothing is folded into another layer: x is divided, or turned, where it
enters, so that any model can be treated, also one whose residual connections
read the norms.
"""

from functools import partial

import torch
from pruned_encoder import changed

from minicompress import codes, quantize


def plain(x):
    return x


def divided(x, s):
    return x / s


def largest(stats):
    """Give the largest magnitude of each channel."""
    return torch.maximum(stats.high.abs(), stats.low.abs())


def moved(W, stats, move, alpha=0.5):
    """Give f, what else it needs, and the weights that f(x) is read by."""
    if move == "smooth":
        s = quantize.smooth_scales(largest(stats), W, alpha=alpha)
        return divided, {"s": s}, W * s
    if move == "turn":
        signs = quantize.random_signs(W.shape[1])
        return quantize.turn, {"signs": signs}, quantize.turn(W, signs)
    return plain, {}, W


def entering(x, *, move, bits, each, scale=None, zero=None, **own):
    """Move x and round it, on a grid that is given or is made of x."""
    x = move(x, **own)
    if scale is not None:
        return quantize.fake(x, scale, zero, bits=bits)
    return quantize.round_now(x, bits=bits, each=each)


def grid(stats, bits, s=1.0):
    """Span the grid of a whole tensor from the smallest to the largest."""
    ends = torch.stack([(stats.low / s).min(), (stats.high / s).max()])
    code = quantize.min_max(ends, bits=bits, each="tensor")
    scale, zero = codes.value(code.scale), codes.value(code.zero)
    return {"scale": scale.reshape(()), "zero": zero.reshape(())}


def rounded(model, stats, *, weights, inputs, each, move="plain", alpha=0.5):
    """Round the weights and the inputs of the layers in `stats`.

    weights  bits per row, or None: as they are
    inputs   bits, or None
    each     "static": one grid for a layer, by `stats`; "tensor" or "token":
             made of what comes in
    move     "plain", "smooth" (SmoothQuant, with alpha) or "turn" (Hadamard)
    """
    if each == "static" and move == "turn":
        raise ValueError("each: stats do not tell the range of turned inputs")
    made, tensors = {}, {}
    for name, own in stats.items():
        W = model.get_parameter(name).detach()
        f, needs, V = moved(W, own, move, alpha)
        made[name] = quantize.mse(V, bits=weights) if weights else V
        if each == "static":
            needs = needs | grid(own, inputs, needs.get("s", 1.0))
        for key, t in needs.items():
            tensors.setdefault(key, {})[name] = t
    model = changed(model, made)
    if inputs is None and move == "plain":
        return model
    how = {"move": f, "bits": inputs, "each": each}
    f = partial(entering, **how) if inputs else f
    return quantize.on_inputs(
        model, f, where=lambda n, w: n in stats, **tensors
    )


def spread(x, axis=0):
    """Divide the largest channel by the median one."""
    most = x.abs().amax(axis)
    return float(most.max() / most.median())


def outliers(W, stats):
    """Say how far the channels of a layer's inputs stand apart.

    stats  whose sample holds all inputs
    """
    x, most = stats.sample, largest(stats)
    after = {}
    for move in ("smooth", "turn"):
        f, own, _ = moved(W, stats, move)
        after[move] = round(spread(f(x, **own)), 2)
    signs = quantize.random_signs(W.shape[1])
    turned = quantize.turn(W, signs)
    return {
        "largest": round(float(most.max()), 3),
        "median": round(float(most.median()), 3),
        "ratio": round(spread(x), 2),
        "channel": int(most.argmax()),
        "over 6": int((most >= 6).sum()),
        "channels": len(most),
        **after,
        "weights": round(quantize.incoherence(W), 2),
        "weights, turned": round(quantize.incoherence(turned), 2),
    }
