"""Readable reference implementations of neural-network compression.

Every technique of the book is a small function on plain tensors.  Import
the module that holds the idea you need::

    from minicompress import codes, entropy, measure, storage
"""

__version__ = "0.1.0"
