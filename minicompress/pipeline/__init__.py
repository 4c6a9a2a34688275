"""Everything together: from a model and a number of bytes to a file."""

from .automl import amc, random_within
from .budget import Plan, to_budget, to_quality
from .choices import Choice, losses, menu, options
from .coding import FAST, SLOW, coded, file_bytes, merged, smallest
from .contest import Score, score
from .deep import Stage, deep_compression, finetuning, stage_table
from .folders import assembled, parts
from .layers import LayerCost, layer_costs, layer_table
from .recipes import RECIPES, Recipe, by_recipe, errors, mixed, written
from .settling import settled
from .stages import clustered, pruned, rounded
from .states import halved, plain, put, realized, sparse_state
from .streaming import streamed
from .units import connected

__all__ = [
    "FAST",
    "RECIPES",
    "SLOW",
    "Choice",
    "LayerCost",
    "Plan",
    "Recipe",
    "Score",
    "Stage",
    "amc",
    "assembled",
    "by_recipe",
    "clustered",
    "coded",
    "connected",
    "deep_compression",
    "errors",
    "file_bytes",
    "finetuning",
    "halved",
    "layer_costs",
    "layer_table",
    "losses",
    "menu",
    "merged",
    "mixed",
    "options",
    "parts",
    "plain",
    "pruned",
    "put",
    "random_within",
    "realized",
    "rounded",
    "score",
    "settled",
    "smallest",
    "sparse_state",
    "stage_table",
    "streamed",
    "to_budget",
    "to_quality",
    "written",
]
