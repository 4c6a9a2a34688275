"""Which rule is for which operation of torch."""

from functools import cache

import torch

from . import layer_rules as layers
from . import shape_rules as shapes

_SPATIAL = """max_pool avg_pool adaptive_avg_pool adaptive_max_pool
    reflection_pad replication_pad upsample_nearest _upsample_nearest_exact"""
_NAMES = {
    layers.linear: "linear",
    layers.convolution: "convolution",
    layers.embedding: "embedding",
    layers.batch_norm: "batch_norm instance_norm",
    layers.layer_norm: "layer_norm rms_norm",
    layers.group_norm: "group_norm",
    layers.matmul: "matmul bmm mm addmm",
    layers.attention: "scaled_dot_product_attention",
    # and all that torch itself tags as pointwise
    shapes.pointwise: """hardswish hardsigmoid relu6 celu selu elu softplus
        where log_sigmoid_forward _prelu_kernel masked_fill fill zero""",
    shapes.unknown: "lstm gru rnn_tanh rnn_relu",  # they know their sizes
    shapes.identity: """clone contiguous detach alias lift_fresh _to_copy
        to zeros_like ones_like full_like empty_like rand_like randn_like""",
    shapes.constant: "new_zeros new_ones new_full new_empty",
    shapes.shape: """view _unsafe_view permute transpose t unsqueeze squeeze
        expand repeat repeat_interleave""",
    shapes.joining: "cat stack",
    shapes.picking: """slice select index _unsafe_index index_select split
        split_with_sizes unbind flip roll""",
    shapes.chunk: "chunk glu",
    shapes.shuffle: "channel_shuffle",
    shapes.pixels: "pixel_shuffle pixel_unshuffle",
    shapes.pad: "constant_pad_nd",
    shapes.spatial: " ".join(
        [f"{name}{k}d" for name in _SPATIAL.split() for k in (1, 2, 3)]
        + ["upsample_linear1d", "upsample_bilinear2d"]
        + ["upsample_bicubic2d", "upsample_trilinear3d"]
    ),
    shapes.along: "_softmax _log_softmax cumsum cumprod sort",
    shapes.reduction: """mean sum amax amin max min prod var std var_mean
        std_mean logsumexp linalg_vector_norm argmax argmin any all""",
}
RULES = {name: rule for rule, s in _NAMES.items() for name in s.split()}


@cache
def find_rule(func):
    """Return the rule of an operation; None if it has to be taken apart."""
    space, _, name = func._schema.name.partition("::")
    if space != "aten" or func._schema.overload_name == "other":
        return None  # the maximum of two is "other" than that of one
    if func._schema.overload_name == "dtype" and name == "view":
        return shapes.unknown  # other numbers in the same bytes
    if name.endswith("_"):  # in place
        name = name.rstrip("_")
        rule = RULES.get(name, shapes.pointwise)
        if rule not in (shapes.pointwise, shapes.identity):
            return shapes.unknown
    if name in RULES:
        return RULES[name]
    return shapes.pointwise if torch.Tag.pointwise in func.tags else None
