"""Low rank: two thin factors for one matrix."""

from .adapters import adapter, encode_adapted, lora, save_adapter, with_adapter
from .corrections import corrected
from .kernels import channels, dense_kernel, spatial
from .layers import factorize, factorize_in_order
from .matrices import asvd, drone, features, fwsvd, root, svd
from .multiway import cp, cp_factors, tucker2, tucker2_code
from .ranks import (
    break_even,
    choose_ranks,
    energy_rank,
    noise_rank,
    rank_table,
    spectrum,
)
from .tensors import separable

__all__ = [
    "adapter",
    "asvd",
    "break_even",
    "channels",
    "choose_ranks",
    "corrected",
    "cp",
    "cp_factors",
    "dense_kernel",
    "drone",
    "encode_adapted",
    "energy_rank",
    "factorize",
    "factorize_in_order",
    "features",
    "fwsvd",
    "lora",
    "noise_rank",
    "rank_table",
    "root",
    "save_adapter",
    "separable",
    "spatial",
    "spectrum",
    "svd",
    "tucker2",
    "tucker2_code",
    "with_adapter",
]
