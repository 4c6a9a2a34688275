"""One file for any compressed model: small, deterministic, safe to open.

Layout, little-endian::

    b"MINC"  version u8  header length u32  header  blobs  CRC-32 u32

The header is JSON: the model's name and configuration, the layers that differ
from it, and the tree of every tensor.  Blobs follow in the order of the tree.
Nothing in a file is executed, and every declared size is checked before
memory is taken for it.
"""

from .format import StorageError
from .reading import File, load, loads, read
from .sizes import footprint, payload
from .writing import dumps, save

__all__ = [
    "File",
    "StorageError",
    "dumps",
    "footprint",
    "load",
    "loads",
    "payload",
    "read",
    "save",
]
