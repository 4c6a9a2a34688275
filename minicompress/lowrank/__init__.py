"""Low rank: two thin factors for one matrix."""

from .tensors import separable

__all__ = ["separable"]
