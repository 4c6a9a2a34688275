"""Architecture search: look for a network instead of shrinking one."""

from .chains import digits_network, digits_space
from .spaces import Space

__all__ = [
    "Space",
    "digits_network",
    "digits_space",
]
