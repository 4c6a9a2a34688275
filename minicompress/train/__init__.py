"""Training and testing: the one loop behind every number in the book."""

from .loop import constant, cosine, fit, threads
from .many import fit_many
from .memory import recompute, saved_bytes
from .quality import (
    accuracy,
    bits_per_char,
    cross_entropy,
    evaluating,
)
from .sampling import Batches, batches, passages

__all__ = [
    "Batches",
    "accuracy",
    "batches",
    "bits_per_char",
    "constant",
    "cosine",
    "cross_entropy",
    "evaluating",
    "fit",
    "fit_many",
    "passages",
    "recompute",
    "saved_bytes",
    "threads",
]
