"""Weight sharing: fewer different numbers than weights."""

from .centroids import cluster, encode_clustered
from .clusters import kmeans, optimal
from .embeddings import (
    break_even_width,
    factorize_embedding,
    factorize_vocabulary,
    factorized_embedding,
    tie_embeddings,
)
from .hashing import (
    encode_hashed,
    hash_features,
    hashed,
    hashed_layers,
    hashed_weights,
)
from .mixtures import (
    Mixture,
    collapse,
    mixture_penalty,
    precision_penalty,
    responsibilities,
    with_zero,
)
from .products import product, residual
from .tying import cycle, cycle_reversed, sequence, tie_blocks, untie, uses

__all__ = [
    "Mixture",
    "break_even_width",
    "cluster",
    "collapse",
    "cycle",
    "cycle_reversed",
    "encode_clustered",
    "encode_hashed",
    "factorize_embedding",
    "factorize_vocabulary",
    "factorized_embedding",
    "hash_features",
    "hashed",
    "hashed_layers",
    "hashed_weights",
    "kmeans",
    "mixture_penalty",
    "optimal",
    "precision_penalty",
    "product",
    "residual",
    "responsibilities",
    "sequence",
    "tie_blocks",
    "tie_embeddings",
    "untie",
    "uses",
    "with_zero",
]
