"""Turning text into numbers and back."""

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
UNKNOWN = "\N{REPLACEMENT CHARACTER}"
WORD = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\s]+|\s+")


@dataclass(frozen=True)
class Tokenizer:
    """Turn text into numbers and back.

    Number 0 stands for every character outside ``ALPHABET``, 1 to 96 for
    line end and printable ASCII, and 97 + i for the pair ``merges[i]``, which
    may itself consist of merged pairs.  The numbers of the characters never
    change, whatever Python or text.

    Parameters
    ----------
    merges : tuple of pairs of int
        Byte-pair merges in the order in which they were learned.

    References
    ----------
    R. Sennrich, B. Haddow, A. Birch, "Neural Machine Translation of Rare
    Words with Subword Units", arXiv:1508.07909, Algorithm 1.

    Examples
    --------
    >>> t = Tokenizer()
    >>> t.encode("if x:\\n").tolist(), t.size
    ([75, 72, 2, 90, 28, 1], 97)
    >>> t.decode(t.encode("if x:\\n"))
    'if x:\\n'
    """

    merges: tuple[tuple[int, int], ...] = ()

    @property
    def size(self) -> int:
        """Count the tokens, the unknown one included."""
        return 1 + len(ALPHABET) + len(self.merges)

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """Spell out every token."""
        spelled = [UNKNOWN, *ALPHABET]
        for a, b in self.merges:
            spelled.append(spelled[a] + spelled[b])
        return tuple(spelled)

    def encode(self, text: str) -> Tensor:
        """Turn text into token numbers.

        Parameters
        ----------
        text : str
            Any text; merges stay within its words.

        Returns
        -------
        Tensor of shape (tokens,)
            int64.
        """
        rank = {pair: i for i, pair in enumerate(self.merges)}
        known: dict[str, list[int]] = {}
        ids: list[int] = []
        for word in WORD.findall(text):
            if word not in known:
                known[word] = _merge_all(_characters(word), rank)
            ids += known[word]
        return torch.tensor(ids, dtype=torch.int64)

    def decode(self, ids: Tensor) -> str:
        """Turn token numbers into text.

        Parameters
        ----------
        ids : Tensor of shape (tokens,), or list of int
            Token numbers.

        Returns
        -------
        str
            The text that was encoded; unknown characters come back as
            U+FFFD.

        Raises
        ------
        ValueError
            If a number is not that of a token.
        """
        numbers = torch.as_tensor(ids).tolist()
        wrong = [i for i in numbers if not 0 <= i < self.size]
        if wrong:
            raise ValueError(f"ids holds {wrong[0]}, not in 0..{self.size - 1}")
        return "".join(self.tokens[i] for i in numbers)


def tokenizer(text: str, *, merges: int = 0) -> Tokenizer:
    """Learn byte-pair merges from the words of a text.

    Merge the most frequent pair of neighbors into a new token, again and
    again; among equally frequent pairs the one with the larger numbers.  Only
    the words that hold the pair are looked at: a few hundred merges of the
    language reference take about a second.

    Parameters
    ----------
    text : str
        Learn from the training part only.
    merges : int, default=0
        How many; fewer if no pair occurs twice.  With 0, characters.

    Returns
    -------
    Tokenizer
        With ``97 + merges`` tokens.

    Raises
    ------
    ValueError
        If `merges` is negative.

    Examples
    --------
    >>> t = tokenizer("low lower lowest", merges=2)
    >>> t.tokens[97:], len(t.encode("low"))
    (('ow', 'low'), 1)
    """
    if merges < 0:
        raise ValueError(f"merges={merges} must not be negative")
    counted = Counter(WORD.findall(text))
    words = [_characters(word) for word in counted]
    times = list(counted.values())
    pairs: Counter = Counter()
    where = defaultdict(set)  # words that hold a pair, or once did
    for i, word in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += times[i]
            where[pair].add(i)
    learned: list[tuple[int, int]] = []
    while pairs and len(learned) < merges:
        count, best = max(zip(pairs.values(), pairs, strict=True))
        if count < 2:
            break
        for i in where.pop(best):
            new = _merge(words[i], best, 97 + len(learned))
            for pair in pairwise(words[i]):
                pairs[pair] -= times[i]
            for pair in pairwise(new):
                pairs[pair] += times[i]
                where[pair].add(i)
            words[i] = new
        del pairs[best]
        learned.append(best)
    return Tokenizer(tuple(learned))


def _characters(word: str) -> list[int]:
    """Number the characters, 0 for those outside the alphabet."""
    return [1 + ALPHABET.find(character) for character in word]


def _merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace a pair by a new number, from left to right."""
    merged, i = [], 0
    while i < len(ids):
        hit = (ids[i], ids[i + 1]) == pair if i + 1 < len(ids) else False
        merged.append(new if hit else ids[i])
        i += 2 if hit else 1
    return merged


def _merge_all(ids: list[int], rank: dict) -> list[int]:
    """Apply merges in the order in which they were learned."""
    while True:
        pairs = set(pairwise(ids)) & rank.keys()
        if not pairs:
            return ids
        first = min(pairs, key=rank.__getitem__)
        ids = _merge(ids, first, 1 + len(ALPHABET) + rank[first])
