"""The book's tasks: small, fixed, and on every machine without a download.

Classification tasks are a ``Task`` with the parts ``train``, ``val`` and
``test``; texts are strings, and a ``Tokenizer`` makes numbers of them.
"""

from .bpe import BPE
from .docs import Docstrings, docstrings
from .idx import fashion_mnist, mnist
from .images import digits, glyphs
from .tasks import Task, few
from .text import Reference, reference
from .tokens import Tokenizer, tokenizer
from .wordpiece import WordPiece

__all__ = [
    "BPE",
    "Docstrings",
    "Reference",
    "Task",
    "Tokenizer",
    "WordPiece",
    "digits",
    "docstrings",
    "fashion_mnist",
    "few",
    "glyphs",
    "mnist",
    "reference",
    "tokenizer",
]
