"""Representations of compressed tensors, as small trees of frozen dataclasses.

A code has fields that are tensors, numbers or other codes, and one method,
``decode()``.  Composition replaces one field: Deep Compression is a `Sparse`
whose values are a `Codebook` whose index is entropy coded.  A compressed model
is a *state*, ``{name: Tensor | Code}``; `storage` turns it into a file.
"""

from .numbers import Affine, Codebook, Ints, Rotated, Scaled, hadamard
from .positions import Gaps, Sparse, gaps, sparse
from .structure import Factors, Hashed, Sum, View, buckets, groups
from .tree import Code, State, decode, encode, shape, value

__all__ = [
    "Affine",
    "Code",
    "Codebook",
    "Factors",
    "Gaps",
    "Hashed",
    "Ints",
    "Rotated",
    "Scaled",
    "Sparse",
    "State",
    "Sum",
    "View",
    "buckets",
    "decode",
    "encode",
    "gaps",
    "groups",
    "hadamard",
    "shape",
    "sparse",
    "value",
]
