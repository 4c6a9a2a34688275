"""The tokenizer of BERT: words, and pieces of those it does not know."""

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

PAD, UNKNOWN, START, END = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
LONGEST = 100  # characters of a word; longer ones are unknown
INSIDE = "##"  # begins a piece that does not begin a word

# Chinese is written without spaces: each of these is a word of its own
IDEOGRAPHS = (
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2CEAF),
    (0x2F800, 0x2FA1F),
)


@dataclass(frozen=True, repr=False)
class WordPiece:
    """Cut text into the pieces that a BERT-type encoder was trained on.

    Text is cut at spaces and around punctuation marks and ideographs;
    control characters go, and so do capitals and accents.  A word is then
    spelled with as few pieces as taking the longest one each time gives; a
    piece inside a word is written with ``##`` in front.  The names of the
    special tokens in a text are plain text.

    Parameters
    ----------
    vocab : tuple of str
        Token of each number, the lines of a ``vocab.txt``.
    lower : bool, default=True
        Whether capitals and accents go; False for cased models.

    Raises
    ------
    ValueError
        If a special token is missing or a token occurs twice.

    References
    ----------
    J. Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers
    for Language Understanding", arXiv:1810.04805, section 3; Y. Wu et al.,
    "Google's Neural Machine Translation System", arXiv:1609.08144, section
    4.1.

    Examples
    --------
    >>> w = WordPiece((*SPECIAL, "cafe", "un", "##do", "##ing", "!"))
    >>> w.pieces("Undoing... Café!")
    ['un', '##do', '##ing', '[UNK]', '[UNK]', '[UNK]', 'cafe', '!']
    >>> w.encode("Café!").tolist()
    [2, 4, 8, 3]
    """

    vocab: tuple[str, ...]
    lower: bool = True

    def __post_init__(self):
        missing = [token for token in SPECIAL if token not in self.number]
        if missing:
            raise ValueError(
                f"vocab: {', '.join(missing)} not among the tokens"
            )
        if len(self.number) < len(self.vocab):
            twice = next(
                t for i, t in enumerate(self.vocab) if self.number[t] != i
            )
            raise ValueError(f"vocab: {twice!r} occurs twice")

    def __repr__(self) -> str:
        return f"WordPiece({len(self.vocab)} tokens, lower={self.lower})"

    @cached_property
    def number(self) -> dict[str, int]:
        """Look up the number of a token."""
        return {token: i for i, token in enumerate(self.vocab)}

    def words(self, text: str) -> list[str]:
        """Clean a text and cut it into words and punctuation marks.

        Parameters
        ----------
        text : str
            Any text.

        Returns
        -------
        list of str
            No spaces, nothing empty.
        """
        text = "".join(map(_clean, text))
        if self.lower:
            text = unicodedata.normalize("NFD", text)
            text = "".join(map(_plain, text))
        return "".join(map(_spaced, text)).split()

    def pieces(self, text: str) -> list[str]:
        """Cut a text into tokens, those at its two ends not included.

        Parameters
        ----------
        text : str
            Any text.

        Returns
        -------
        list of str
            Tokens of `vocab`.
        """
        return [p for word in self.words(text) for p in self._spell(word)]

    def encode(self, text: str, length: int | None = None) -> Tensor:
        """Turn a text into the numbers that an encoder takes.

        Parameters
        ----------
        text : str
            Any text.
        length : int, optional
            Keep at most so many tokens, the two at the ends included.

        Returns
        -------
        Tensor of shape (tokens,)
            int64; the first is ``[CLS]``, the last ``[SEP]``.

        Raises
        ------
        ValueError
            If `length` leaves no room for the ends.
        """
        if length is not None and length < 2:
            raise ValueError(f"length={length} must be at least 2")
        inner = self.pieces(text)[: None if length is None else length - 2]
        tokens = (START, *inner, END)
        return torch.tensor([self.number[token] for token in tokens])

    def batch(
        self, texts: Iterable[str], length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Turn texts into rows of the same number of tokens.

        Parameters
        ----------
        texts : iterable of str
            At least one.
        length : int, optional
            As for `encode`.

        Returns
        -------
        ids : Tensor of shape (n, T)
            int64, as long as the longest row; the others end in ``[PAD]``.
        mask : bool Tensor of shape (n, T)
            True for tokens, False for padding.

        Raises
        ------
        ValueError
            If `texts` is empty or one string, or `length` below 2.

        Examples
        --------
        >>> w = WordPiece((*SPECIAL, "a", "b"))
        >>> ids, mask = w.batch(["a b", "b"])
        >>> ids.tolist(), mask.sum(1).tolist()
        ([[2, 4, 5, 3], [2, 5, 3, 0]], [4, 3])
        """
        if isinstance(texts, str):
            raise ValueError(f"texts must be several, not the text {texts!r}")
        return self.pad([self.encode(text, length) for text in texts])

    def pad(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Put rows of numbers below each other; results as those of `batch`.

        Parameters
        ----------
        rows : sequence of Tensor of shape (tokens,)
            From `encode`, at least one.
        """
        if not rows:
            raise ValueError("texts: there is none")
        sizes = torch.tensor([len(row) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence(
            list(rows), batch_first=True, padding_value=self.number[PAD]
        )
        return ids, torch.arange(ids.shape[1]) < sizes[:, None]

    def decode(self, ids: Tensor) -> str:
        """Spell out numbers; spaces, capitals and accents are not restored.

        Parameters
        ----------
        ids : Tensor of shape (tokens,), or list of int
            Token numbers; ``[PAD]``, ``[CLS]`` and ``[SEP]`` are left out.

        Returns
        -------
        str
            Words and marks with one space between them.

        Raises
        ------
        ValueError
            If a number is not that of a token.
        """
        numbers, most = torch.as_tensor(ids).tolist(), len(self.vocab) - 1
        wrong = [i for i in numbers if not 0 <= i <= most]
        if wrong:
            raise ValueError(f"ids holds {wrong[0]}, not in 0..{most}")
        tokens = (self.vocab[i] for i in numbers)
        silent = (PAD, START, END)
        text = " ".join(token for token in tokens if token not in silent)
        return text.replace(" " + INSIDE, "")

    def _spell(self, word: str) -> list[str]:
        """Cut one word into the longest pieces from the left."""
        if len(word) > LONGEST:
            return [UNKNOWN]
        pieces: list[str] = []
        rest = word
        while rest:
            lead = INSIDE if pieces else ""
            tries = (lead + rest[:n] for n in range(len(rest), 0, -1))
            piece = next((t for t in tries if t in self.number), None)
            if piece is None:  # then the word as a whole is unknown
                return [UNKNOWN]
            pieces.append(piece)
            rest = rest[len(piece) - len(lead) :]
        return pieces


@lru_cache(4096)
def _clean(character: str) -> str:
    """Drop a control character, put spaces around an ideograph."""
    if character in "\t\n\r":
        return " "
    # not Cn: which code points are unassigned depends on the Python release
    control = unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs")
    if control or character == "\N{REPLACEMENT CHARACTER}":
        return ""
    code = ord(character)
    alone = any(first <= code <= last for first, last in IDEOGRAPHS)
    return f" {character} " if alone else character


@lru_cache(4096)
def _plain(character: str) -> str:
    """Drop an accent, make a letter small."""
    # letter by letter: of a whole word, lower() ends a Greek one otherwise
    kind = unicodedata.category(character)
    return "" if kind == "Mn" else character.lower()


@lru_cache(4096)
def _spaced(character: str) -> str:
    """Put spaces around a punctuation mark."""
    ascii_mark = character.isascii() and not character.isalnum()
    mark = ascii_mark or unicodedata.category(character).startswith("P")
    return f" {character} " if mark else character
