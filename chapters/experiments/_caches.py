"""Caches of keys and values whose grids lie along any axis."""

from dataclasses import dataclass

import torch

from minicompress import calibrate, quantize

AXES = {  # which numbers share a grid: of keys, of values
    "KIVI": ("channel", "token"),
    "tokens": ("token", "token"),
    "channels": ("channel", "channel"),
    "reversed": ("token", "channel"),
}


@dataclass(frozen=True, eq=False, repr=False)
class Variant(quantize.Cache):
    """A cache with a choice: `quantize.Cache` has the axes of KIVI."""

    axes: tuple = AXES["KIVI"]

    def append(self, K, V):
        """Add K and V (..., tokens, d); round whole groups of the oldest."""
        if self.recent is not None:
            K = torch.cat([self.recent[0], K], -2)
            V = torch.cat([self.recent[1], V], -2)
        old, g = [self.keys, self.values], self.group
        while K.shape[-2] >= self.window + g:
            for i, X in enumerate((K, V)):
                old[i] += (along(X[..., :g, :], self.axes[i], self.bits),)
            K, V = K[..., g:, :], V[..., g:, :]
        start = (self.bits, self.group, self.window)
        return Variant(*start, *old, (K, V), self.axes)


def along(X, axis, bits):
    """Round a group (..., tokens, d): one grid for a channel, or a token."""
    if axis == "channel":
        return quantize.quantize_keys(X, bits=bits, group=X.shape[-2])
    return quantize.quantize_values(X, bits=bits)


def full_bytes(model, start, tokens):
    """Count the bytes of the caches of all layers, float16 where not rounded.

    start   an empty cache
    tokens  of one text
    """
    heads = model.config["heads"]
    shape = (1, heads, tokens, model.config["width"] // heads)
    K, V = (torch.randn(shape).half() for _ in range(2))
    return len(model.blocks) * start.append(K, V).payload()


def spread(model, batches):
    """Compare the widest channel of keys, and of values, with the median.

    Returns {"keys" or "values": [ratio for each block]}.
    """
    stats = calibrate.inputs(model, batches)
    rows = {"keys": [], "values": []}
    for i, block in enumerate(model.blocks):
        for key, name in (("keys", "k"), ("values", "v")):
            layer = getattr(block.attention, name)
            x = stats[f"blocks.{i}.attention.{name}.weight"].sample
            Y = layer(x.to(layer.weight)).detach()
            wide = Y.amax(0) - Y.amin(0)
            rows[key].append(round(float(wide.max() / wide.median()), 2))
    return rows
