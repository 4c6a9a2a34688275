"""Entropy coding: frequent integers get fewer bits.

The coders take integers of known width (`codes.Ints`) and return a code that
decodes to the same integers; everything the decoder needs lies in its fields.
Huffman and rANS look at how often each integer occurs and at nothing else,
so no file of theirs can be shorter than `bound`; `contextual` looks at where
it stands, too.

References
----------
D. A. Huffman, "A method for the construction of minimum-redundancy codes",
Proc. IRE 40(9), 1952.  J. Duda, "Asymmetric numeral systems", 2013,
arXiv:1311.2540.
"""

from .contexts import Contextual, contextual
from .lanes import Rans, rans, rans_slow, rans_undo
from .prefix import LIMIT, canonical, code_lengths, package_merge
from .statistics import bound, counts, entropy
from .tables import frequencies
from .words import Huffman, huffman, huffman_slow

__all__ = [
    "LIMIT",
    "Contextual",
    "Huffman",
    "Rans",
    "bound",
    "canonical",
    "code_lengths",
    "contextual",
    "counts",
    "entropy",
    "frequencies",
    "huffman",
    "huffman_slow",
    "package_merge",
    "rans",
    "rans_slow",
    "rans_undo",
]
