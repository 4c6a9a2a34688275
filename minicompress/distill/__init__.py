"""Distillation: a student learns from a teacher's outputs, not only labels.

A loss takes the student's tensors first, then the teacher's, which never
receive a gradient, and returns a scalar in nats or squared units.
"""

from .attention import (
    attention_scores,
    cosine,
    heads,
    minilm,
    relation_kl,
    tinybert_attention,
    tinybert_hidden,
)
from .datafree import (
    activation_loss,
    balance_loss,
    batchnorm_loss,
    disagreement_loss,
    moments_loss,
    one_hot_loss,
    total_variation,
)
from .features import (
    attention_map,
    attention_transfer,
    hint,
    record,
    regressor,
)
from .inversion import invert
from .language import forward_kl, jsd, on_policy, policy_gradient, reverse_kl
from .layers import inherit, layer_map
from .logits import dkd, hinton, kl, label_smoothing, matching, mutual, soften
from .records import teacher_logits
from .relations import angles, distances, rkd_angle, rkd_distance
from .teaching import cached, chain, ensemble, generations, taught
from .texts import beam, continuations, log_likelihood, next_tokens
from .weighting import annealed, entropy_weight, uncertainty

__all__ = [
    "activation_loss",
    "angles",
    "annealed",
    "attention_map",
    "attention_scores",
    "attention_transfer",
    "balance_loss",
    "batchnorm_loss",
    "beam",
    "cached",
    "chain",
    "continuations",
    "cosine",
    "disagreement_loss",
    "distances",
    "dkd",
    "ensemble",
    "entropy_weight",
    "forward_kl",
    "generations",
    "heads",
    "hint",
    "hinton",
    "inherit",
    "invert",
    "jsd",
    "kl",
    "label_smoothing",
    "layer_map",
    "log_likelihood",
    "matching",
    "minilm",
    "moments_loss",
    "mutual",
    "next_tokens",
    "on_policy",
    "one_hot_loss",
    "policy_gradient",
    "record",
    "regressor",
    "relation_kl",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "soften",
    "taught",
    "teacher_logits",
    "tinybert_attention",
    "tinybert_hidden",
    "total_variation",
    "uncertainty",
]
