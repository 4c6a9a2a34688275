"""The Python language reference, split without leaks."""

import hashlib
import re
import unicodedata
from dataclasses import dataclass

# Topics that are held out.  Chosen by hand: whole sections of every kind
# (statements, expressions, types), about 8 % of the text each.
VALIDATION = (
    "class",
    "comparisons",
    "for",
    "identifiers",
    "lambda",
    "numeric-types",
    "return",
    "try",
)
TEST = (
    "booleans",
    "calls",
    "dict",
    "import",
    "naming",
    "power",
    "raise",
    "shifting",
    "with",
)

ASCII = str.maketrans(
    {
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "--",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{LATIN SMALL LETTER SHARP S}": "ss",
        "\N{DEGREE SIGN}": "deg",
        "\t": "    ",
    }
)


@dataclass(frozen=True, eq=False)
class Reference:
    """Hold the text of the language reference in three parts.

    Parameters
    ----------
    train, val, test : str
        ASCII text; no paragraph occurs twice, not even in two parts.
    hash : str
        SHA-256 of the three parts in hexadecimal digits.  It differs between
        Python's releases: numbers are comparable where the hash is equal.
    """

    train: str
    val: str
    test: str
    hash: str

    def __repr__(self) -> str:
        return (
            f"Reference(train {len(self.train)}, val {len(self.val)}, test"
            f" {len(self.test)} characters, hash {self.hash[:8]}...)"
        )


def reference() -> Reference:
    """Read the Python language reference out of the running Python.

    CPython carries it as ``pydoc_data.topics`` for ``help("with")``: 79
    topics, 0.46 M characters in Python 3.11.  Topics repeat whole sections of
    each other, so a cut anywhere would put the same paragraphs into two
    parts.  Here whole topics are held out, and of equal paragraphs (spaces
    and line ends aside) only one stays: in the test part, else in the
    validation part, else in the training part.  That leaves about 0.30 M,
    0.03 M and 0.03 M characters.

    The text is by the Python Software Foundation (PSF License).

    Returns
    -------
    Reference
        ``train``, ``val``, ``test`` and ``hash``.

    Raises
    ------
    ImportError
        If this Python comes without ``pydoc_data``.

    Examples
    --------
    >>> text = reference()
    >>> "try" in text.val and "help" in text.train
    True
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ImportError(
            "this Python comes without pydoc_data.topics, the language"
            " reference; python.org's and conda's have it"
        ) from error
    return split(topics)


def split(topics: dict[str, str]) -> Reference:
    """Split texts by topic and drop repeated paragraphs.

    Parameters
    ----------
    topics : dict of str to str
        Text of each topic.  Those named in ``TEST`` and ``VALIDATION`` are
        held out.

    Returns
    -------
    Reference
        Topics in alphabetical order, paragraphs separated by an empty line.

    Examples
    --------
    >>> parts = split({"with": "a\\n\\nb", "zero": "b\\n\\nc"})
    >>> parts.train, parts.test
    ('c\\n', 'a\\n\\nb\\n')
    """
    train = sorted(set(topics) - {*VALIDATION, *TEST})
    seen: set[str] = set()
    parts = []
    for names in (TEST, VALIDATION, train):
        kept = []
        for name in names:
            for paragraph in re.split(
                r"\n\s*\n", ascii_only(topics.get(name, ""))
            ):
                key = " ".join(paragraph.split())
                if key and key not in seen:
                    seen.add(key)
                    kept.append(paragraph.strip("\n"))
        parts.append("\n\n".join(kept) + "\n")
    digest = hashlib.sha256("\0".join(parts[::-1]).encode()).hexdigest()
    return Reference(*parts[::-1], digest)


def ascii_only(text: str) -> str:
    """Spell text with the 96 characters of a typewriter.

    Quotes and dashes become their typewriter forms, letters lose their
    accents, everything else becomes a question mark.

    Parameters
    ----------
    text : str
        Any text.

    Returns
    -------
    str
        Only printable ASCII and line ends.

    Examples
    --------
    >>> ascii_only("naïve — “so”…")
    'naive -- "so"...'
    """
    if text.isascii() and "\t" not in text:
        return re.sub(r"[^\n -~]", "?", text)
    text = unicodedata.normalize("NFKD", text.translate(ASCII))
    text = re.sub(r"[\u0300-\u036f]", "", text)
    return re.sub(r"[^\n -~]", "?", text)
