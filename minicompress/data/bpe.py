"""The tokenizer of GPT-2: pairs of bytes, so that no text is unknown."""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .tokens import _merge

PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
# what is left of an English contraction, a word, a number, other marks,
# each with the space before it; and spaces, where the last one of several
# belongs to what follows
WORD = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\s]+"
    r"|\s+(?!\S)|\s+",
    re.ASCII,
)
KIND = {"L": "x", "N": "0"}  # of a character beyond ASCII, as WORD sees it


@dataclass(frozen=True, repr=False)
class BPE:
    """Cut text into the tokens of a GPT-2-type language model.

    Text is cut into words, with the space before them, and a word into the
    bytes of UTF-8.  Then the two neighbors that come first in `merges`
    become one token, again and again.  Every byte is a token, so every text
    can be encoded, and comes back exactly.  The names of special tokens in a
    text are plain text; `number` has theirs.

    Parameters
    ----------
    vocab : tuple of str
        Token of each number, as in a ``vocab.json``: each byte is one
        visible character, see `visible`.
    merges : tuple of pairs of str
        The lines of a ``merges.txt``.

    Raises
    ------
    ValueError
        If a byte or the result of a merge is not in `vocab`, a token or a
        merge occurs twice, or a token has a character that is no byte.

    References
    ----------
    Sennrich, Haddow, Birch 2016, arXiv:1508.07909, algorithm 1; on bytes:
    Radford et al. 2019, "Language models are unsupervised multitask
    learners", section 2.2.

    Examples
    --------
    >>> b = BPE((*visible(), "lo", "low"), (("l", "o"), ("lo", "w")))
    >>> b.pieces("low lows\\n")
    ['low', 'Ġ', 'low', 's', 'Ċ']
    >>> b.encode("low!").tolist()
    [257, 33]
    >>> b.decode(b.encode("naïve 中文"))
    'naïve 中文'
    """

    vocab: tuple[str, ...]
    merges: tuple[tuple[str, str], ...]

    def __post_init__(self):
        made = [*visible(), *map("".join, self.merges)]
        missing = [token for token in made if token not in self.number]
        if missing:
            raise ValueError(f"vocab: no {missing[0]!r} among the tokens")
        for name, held, number in (
            ("vocab", self.vocab, self.number),
            ("merges", self.merges, self.rank),
        ):
            if len(number) < len(held):
                twice = next(x for i, x in enumerate(held) if number[x] != i)
                raise ValueError(f"{name}: {twice!r} occurs twice")
        odd = [t for t in self.vocab if not self.byte.keys() >= set(t)]
        if odd:
            raise ValueError(f"vocab: {odd[0]!r} is not spelled in bytes")

    def __repr__(self) -> str:
        return f"BPE({len(self.vocab)} tokens, {len(self.merges)} merges)"

    @cached_property
    def number(self) -> dict[str, int]:
        """Look up the number of a token."""
        return {token: i for i, token in enumerate(self.vocab)}

    @cached_property
    def rank(self) -> dict[tuple[str, str], int]:
        """Look up when a pair is merged."""
        return {pair: i for i, pair in enumerate(self.merges)}

    @cached_property
    def byte(self) -> dict[str, int]:
        """Look up the byte that a visible character stands for."""
        return {c: i for i, c in enumerate(visible())}

    def pieces(self, text: str) -> list[str]:
        """Cut a text into tokens.

        Parameters
        ----------
        text : str
            Any text.

        Returns
        -------
        list of str
            Tokens of `vocab`.

        Raises
        ------
        ValueError
            If there is half of a surrogate pair: UTF-8 has no bytes for it.
        """
        found: list[str] = []
        known: dict[str, list[str]] = {}
        for word in words(text):
            if word not in known:
                known[word] = self._spell(word)
            found += known[word]
        return found

    def encode(self, text: str) -> Tensor:
        """Turn a text into token numbers.

        Parameters
        ----------
        text : str
            Any text, see `pieces`.

        Returns
        -------
        Tensor of shape (tokens,)
            int64; nothing is added at the ends.
        """
        numbers = [self.number[token] for token in self.pieces(text)]
        return torch.tensor(numbers, dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        """Turn token numbers into text.

        Parameters
        ----------
        ids : Tensor of shape (tokens,), or list of int
            Token numbers.

        Returns
        -------
        str
            The text that was encoded; bytes that are no UTF-8, as where a
            character is cut in two, become U+FFFD.

        Raises
        ------
        ValueError
            If a number is not that of a token.
        """
        numbers, most = torch.as_tensor(ids).tolist(), len(self.vocab) - 1
        wrong = [i for i in numbers if not 0 <= i <= most]
        if wrong:
            raise ValueError(f"ids holds {wrong[0]}, not in 0..{most}")
        spelled = "".join(self.vocab[i] for i in numbers)
        return bytes(self.byte[c] for c in spelled).decode("utf8", "replace")

    def _spell(self, word: str) -> list[str]:
        """Merge the bytes of one word, first the pair that comes first."""
        parts = [visible()[b] for b in word.encode("utf8")]
        while pairs := set(pairwise(parts)) & self.rank.keys():
            first = min(pairs, key=self.rank.__getitem__)
            parts = _merge(parts, first, "".join(first))
        return parts


@cache
def visible() -> tuple[str, ...]:
    """Give each of the 256 bytes a visible character of its own.

    Files of tokens are text, with spaces and line ends between the tokens.
    The 188 bytes that are visible in Latin-1 stand for themselves, the other
    68 for the characters from number 256 on: a space is written Ġ.

    Returns
    -------
    tuple of str
        The characters of byte 0, 1, ..., 255.

    Examples
    --------
    >>> "".join(visible()[b] for b in "a café\\n".encode())
    'aĠcafÃ©Ċ'
    """
    hidden = [b for b in range(256) if b not in PRINTED]
    return tuple(
        chr(256 + hidden.index(b) if b in hidden else b) for b in range(256)
    )


def words(text: str) -> list[str]:
    """Cut a text as GPT-2 does; no merge goes beyond a word.

    Letters and numbers are told apart by their Unicode category (L and N),
    which the patterns of `re` cannot name: the pattern looks at a text of
    the same length in which one ASCII character stands for all of a kind.
    Characters that are newer than Python's Unicode tables are taken for
    marks.

    Parameters
    ----------
    text : str
        Any text.

    Returns
    -------
    list of str
        Together they are the text.

    Examples
    --------
    >>> words("I'll pay  50€ for x²!")
    ['I', "'ll", ' pay', ' ', ' 50', '€', ' for', ' x', '²', '!']
    """
    seen = text if text.isascii() else "".join(map(_kind, text))
    return [text[m.start() : m.end()] for m in WORD.finditer(seen)]


@lru_cache(4096)
def _kind(character: str) -> str:
    """Let an ASCII character stand for any other of its kind."""
    if character.isascii():
        return character
    if character.isspace():
        return "\t"
    return KIND.get(unicodedata.category(character)[0], "!")
