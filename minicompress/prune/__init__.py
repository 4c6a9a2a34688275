"""Pruning: scores say what matters, masks what stays, repairs make up for it.

A score is larger where a weight is more important; a mask is True where it
is kept; a repair moves the weights that are left and returns a code.  What
goes as a whole (channels, hidden units, heads, blocks) is taken out of the
model, and the result is a new, smaller one.
"""

from .channel_choice import keep_units, shrink, within
from .channel_scores import (
    filter_distances,
    filter_norms,
    gates,
    geometric_median,
    norm_scales,
    normalized,
    unit_activations,
    unit_sums,
)
from .channels import mask_channels, remove_channels
from .dependencies import Group, Slice, groups
from .healing import fold_means, refit, renormalize
from .initial import grasp, snip, synflow, synflow_masks
from .layers import (
    angular_distance,
    block_influence,
    every_other,
    greedy_blocks,
    layerdrop,
    linear_decay,
    remove_blocks,
    stochastic_depth,
    unskipped,
)
from .learned import (
    HardConcrete,
    expected_l0,
    hard_concrete,
    splice,
    spliced,
    sr_ste,
)
from .masks import (
    keep,
    keep_each,
    keep_global,
    keep_rows,
    magnitude,
    n_m,
    random,
    rigl,
    sparsity,
    threshold,
)
from .reconstruction import (
    contributions,
    lasso,
    reconstruction_scores,
    thinet,
)
from .repair import least_squares, obc, sparsegpt, surgeon
from .saliency import Moments, curvature, gradients, movement
from .schedules import (
    cubic,
    geometric,
    gradual,
    iterative,
    lottery,
    magnitudes,
    masked,
    one_shot,
)
from .scores import (
    channel_entropy,
    fisher,
    gradient,
    inverse_fisher,
    obd,
    obs,
    snr,
    taylor,
    wanda,
    wanda_score,
)
from .shrinkage import group_lasso, slimming, soft_shrink
from .slicing import principal, rotated, sliced, without_scales

__all__ = [
    "Group",
    "HardConcrete",
    "Moments",
    "Slice",
    "angular_distance",
    "block_influence",
    "channel_entropy",
    "contributions",
    "cubic",
    "curvature",
    "every_other",
    "expected_l0",
    "filter_distances",
    "filter_norms",
    "fisher",
    "fold_means",
    "gates",
    "geometric",
    "geometric_median",
    "gradient",
    "gradients",
    "gradual",
    "grasp",
    "greedy_blocks",
    "group_lasso",
    "groups",
    "hard_concrete",
    "inverse_fisher",
    "iterative",
    "keep",
    "keep_each",
    "keep_global",
    "keep_rows",
    "keep_units",
    "lasso",
    "layerdrop",
    "least_squares",
    "linear_decay",
    "lottery",
    "magnitude",
    "magnitudes",
    "mask_channels",
    "masked",
    "movement",
    "n_m",
    "norm_scales",
    "normalized",
    "obc",
    "obd",
    "obs",
    "one_shot",
    "principal",
    "random",
    "reconstruction_scores",
    "refit",
    "remove_blocks",
    "remove_channels",
    "renormalize",
    "rigl",
    "rotated",
    "shrink",
    "sliced",
    "slimming",
    "snip",
    "snr",
    "soft_shrink",
    "sparsegpt",
    "sparsity",
    "splice",
    "spliced",
    "sr_ste",
    "stochastic_depth",
    "surgeon",
    "synflow",
    "synflow_masks",
    "taylor",
    "thinet",
    "threshold",
    "unit_activations",
    "unit_sums",
    "unskipped",
    "wanda",
    "wanda_score",
    "within",
    "without_scales",
]
