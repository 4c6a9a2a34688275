"""Pruning: scores say what matters, masks what stays, repairs make up for it.

A score is larger where a weight is more important; a mask is True where it
is kept; a repair moves the weights that are left and returns a code.
"""

from .channels import mask_channels, remove_channels
from .dependencies import Group, Slice, groups
from .initial import grasp, snip, synflow, synflow_masks
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

__all__ = [
    "Group",
    "HardConcrete",
    "Moments",
    "Slice",
    "channel_entropy",
    "cubic",
    "curvature",
    "expected_l0",
    "fisher",
    "geometric",
    "gradient",
    "gradients",
    "gradual",
    "grasp",
    "groups",
    "hard_concrete",
    "inverse_fisher",
    "iterative",
    "keep",
    "keep_each",
    "keep_global",
    "keep_rows",
    "least_squares",
    "lottery",
    "magnitude",
    "magnitudes",
    "mask_channels",
    "masked",
    "movement",
    "n_m",
    "obc",
    "obd",
    "obs",
    "one_shot",
    "random",
    "remove_channels",
    "rigl",
    "snip",
    "snr",
    "sparsegpt",
    "sparsity",
    "splice",
    "spliced",
    "sr_ste",
    "surgeon",
    "synflow",
    "synflow_masks",
    "taylor",
    "threshold",
    "wanda",
    "wanda_score",
]
