"""Quantization: fewer bits for each number."""

from .formats import (
    BFLOAT16,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    FLOAT16,
    FLOAT32,
    FloatFormat,
    every_number,
    fields,
    from_fields,
    to_fixed,
    to_float,
)
from .grids import min_max

__all__ = [
    "BFLOAT16",
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "FLOAT16",
    "FLOAT32",
    "FloatFormat",
    "every_number",
    "fields",
    "from_fields",
    "min_max",
    "to_fixed",
    "to_float",
]
