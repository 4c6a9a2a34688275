"""Byte pairs: a naive tokenizer, then equal to the reference tokenizer."""

import random
import unicodedata
from collections import Counter
from functools import reduce
from itertools import chain, pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minicompress import data
from minicompress.data.bpe import visible, words

TEXT = [
    "The quick brown fox doesn't jump: it over-thinks (a lot)!?",
    "naïve café, Ångström, ÇA VA, Việt Nam, İstanbul, Straße, ﬁne",
    "½ № x²₃ Ⅷ ①② 50€ ١٢٣ १२ 一二三 〇 3rd 1e-12 ７",
    "ΟΔΟΣ Σίσυφος, Привет Ёлка, שָׁלוֹם עולם, مَرْحَبًا हिन्दी",
    "我喜歡自然語言處理。 東京タワー、カタカナ 한국어 混在mixed漢字",
    "emoji \U0001f600 \U0001f44d\U0001f3fd \U0001f469\u200d\U0001f467 ok",
    "line\nbreak\r\n\ttab\u00a0nbsp\u2003em\u2028sep\x00\x07\ufffd\xadsoft",
    "separators \x1c\x1d\x1e\x1f\x85 \u1680 are not all spaces",
    " lead   trail   ",
    "\n\n  def f(x_1):\n        return 'don't' we'll I'M they'RE 'x 've",
    "it’s “quoted” ‘so’ — dash – … a__b _c __",
    " ' 's ''s 'll'd",
    "",
    "   \n ",
]
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"
SPACES += "".join(map(chr, range(0x2000, 0x200B)))  # White_Space of Unicode


def kind(character):
    if character in SPACES:
        return "space"
    first = unicodedata.category(character)[0]
    return {"L": "letter", "N": "number"}.get(first, "mark")


def run(text, i, what):
    """Return where a run of one kind that starts at i ends."""
    while i < len(text) and kind(text[i]) == what:
        i += 1
    return i


def scanned(text):
    """Cut a text as the pattern of GPT-2 says, character by character."""
    parts, i = [], 0
    while i < len(text):
        short = [s for s in ("s", "t", "re", "ve", "m", "ll", "d")]
        short = [s for s in short if text.startswith("'" + s, i)]
        j = i + (text[i] == " ")  # a space belongs to what follows
        if short:
            end = i + 1 + len(short[0])
        elif j < len(text) and kind(text[j]) != "space":
            end = run(text, j, kind(text[j]))
        else:
            end = run(text, i, "space")
            if end < len(text) and end - i > 1:
                end -= 1  # the last space of several is left to the next
        parts.append(text[i:end])
        i = end
    return parts


def learned(text, count):
    """Learn merges, the most frequent pair first."""
    counted = Counter(scanned(text))
    cut = {word: spelled(word) for word in counted}
    merges = []
    for _ in range(count):
        pairs = Counter()
        for word, times in counted.items():
            for pair in pairwise(cut[word]):
                pairs[pair] += times
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        cut = {word: passed(parts, merges[-1]) for word, parts in cut.items()}
    return tuple(merges)


def spelled(word):
    return [visible()[b] for b in word.encode()]


def passed(parts, pair):
    """Join a pair wherever it stands, from left to right."""
    done = []
    for part in parts:
        if done and (done[-1], part) == pair and not joined(done):
            done[-1:] = [Joined(done[-1] + part)]
        else:
            done.append(part)
    return [str(part) for part in done]


class Joined(str):
    """A part that was made in this pass, and cannot be joined again."""


def joined(done):
    return isinstance(done[-1], Joined)


def made(merges, *more):
    tokens = dict.fromkeys([*visible(), *map("".join, merges), *more])
    return data.BPE(tuple(tokens), tuple(merges))


@pytest.fixture(scope="module")
def trained():
    text = data.reference().train[:20_000] + " ".join(TEXT)
    return made(learned(text, 200), "<|endoftext|>")


# bytes


def test_visible_is_one_character_for_each_byte():
    table = visible()
    assert len(set(table)) == len(table) == 256
    for byte, character in enumerate(table):
        plain = unicodedata.category(chr(byte))[0] not in "ZC"
        assert (character == chr(byte)) == plain
        assert character.isprintable() and not character.isspace()
    assert sum(table[b] == chr(b) for b in range(256)) == 188
    hidden = [c for b, c in enumerate(table) if c != chr(b)]
    assert hidden == [chr(256 + i) for i in range(68)]
    # spellings that stand in the published vocabulary
    assert "".join(map("".join, map(spelled, " \n\t’"))) == "ĠĊĉâĢĻ"


# words


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Hello world", ["Hello", " world"]),
        ("it's we'll", ["it", "'s", " we", "'ll"]),
        ("I'M", ["I", "'", "M"]),  # capitals are no contraction
        (" 's", [" '", "s"]),
        ("a  b", ["a", " ", " b"]),
        ("a\n\nb", ["a", "\n", "\n", "b"]),
        ("a \n", ["a", " \n"]),
        ("x = 10**2", ["x", " =", " 10", "**", "2"]),
        ("b4 2x", ["b", "4", " 2", "x"]),
        ("a_b", ["a", "_", "b"]),
        ("x²½Ⅷ", ["x", "²½Ⅷ"]),
        ("一二三", ["一二三"]),  # numerals, but letters to Unicode
        ("\u00a0a", ["\u00a0", "a"]),
        ("a\x1cb", ["a", "\x1c", "b"]),
        ("na\u0308h", ["na", "\u0308", "h"]),  # an accent alone is a mark
    ],
)
def test_words_by_hand(text, parts):
    assert words(text) == parts == scanned(text)


@given(st.text())
@example("\x85 \x1c' 're")
@settings(max_examples=300, deadline=None)
def test_words_are_those_of_a_scan(text):
    assert words(text) == scanned(text)
    assert "".join(words(text)) == text


@pytest.mark.parametrize("alphabet", ["a1 '\n!é²s", " \t\u2003x", "'stredvml "])
def test_words_are_those_of_a_scan_on_few_characters(alphabet):
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices(alphabet, k=draw.randrange(12)))
        assert words(text) == scanned(text), text


# merges


def test_pieces_by_hand():
    b = made((("l", "o"), ("lo", "w"), ("Ġ", "low"), ("w", "e")))
    assert b.pieces("low lowe") == ["low", "Ġlow", "e"]
    assert b.pieces("lowlo") == ["low", "lo"]
    assert b.pieces("owe") == ["o", "we"]
    assert b.pieces("") == [] and b.encode("").shape == (0,)
    assert b.encode("").dtype == b.encode("a").dtype == torch.int64
    assert [b.vocab[i] for i in b.encode("low we")] == ["low", "Ġ", "we"]


def test_the_first_merge_comes_first_not_the_longest_or_leftmost():
    pairs = ("a", "b"), ("b", "c"), ("bc", "d")
    assert made(pairs).pieces("abcd") == ["ab", "c", "d"]
    assert made(pairs[::-1]).pieces("abcd") == ["a", "bcd"]


def test_a_run_of_one_character_is_joined_from_the_left():
    b = made((("a", "a"),))
    assert b.pieces("aaaaa") == ["aa", "aa", "a"]
    b = made((("a", "a"), ("aa", "aa")))
    assert b.pieces("a" * 7) == ["aaaa", "aa", "a"]


def test_without_merges_a_token_is_a_byte():
    b = made(())
    for text in TEXT:
        assert b.encode(text).tolist() == list(text.encode())


def test_learned_merges_may_be_passed_over_one_after_the_other(trained):
    # the encoder of Sennrich et al.: every merge once, in its order
    for text in TEXT:
        for word in scanned(text):
            want = reduce(passed, trained.merges, spelled(word))
            assert trained.pieces(word) == want


PAIRS = st.lists(st.sampled_from("abc"), min_size=2, max_size=2)


@given(
    st.lists(PAIRS | st.tuples(st.sampled_from(["ab", "bc", "aa"]), PAIRS)),
    st.text("abc", max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_any_merges_first_pair_first(drawn, word):
    merges = tuple(
        dict.fromkeys(
            (p[0], p[1] if isinstance(p[1], str) else "".join(p[1]))
            for p in drawn
        )
    )
    ready = {*"abc", *map("".join, merges)}
    parts = list(word)
    while True:  # look at every neighbor and take the smallest rank
        ranks = [
            merges.index(pair) if pair in merges else len(merges)
            for pair in pairwise(parts)
        ]
        if not ranks or min(ranks) == len(merges):
            break
        parts = passed(parts, merges[min(ranks)])
    found = made(merges).pieces(word)
    assert found == parts and set(found) <= ready


# round trips


@given(st.text())
@example("\N{REPLACEMENT CHARACTER}\U0010ffff\x00")
@settings(max_examples=200, deadline=None)
def test_every_text_comes_back(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text == trained.decode(ids.tolist())
    pieces = trained.pieces(text)
    assert "".join(pieces) == "".join(spelled(text))
    parts = (trained.pieces(word) for word in words(text))
    assert [*chain(*parts)] == pieces  # no token goes beyond a word


def test_merges_make_texts_shorter(trained):
    text = data.reference().test
    assert len(trained.encode(text)) < 0.6 * len(text.encode())


def test_special_tokens_are_text_and_have_a_number(trained):
    end = trained.number["<|endoftext|>"]
    assert end == len(trained.vocab) - 1
    assert end not in trained.encode("a<|endoftext|>")
    ids = [*trained.encode("a").tolist(), end]
    assert trained.decode(ids) == "a<|endoftext|>"


def test_bytes_that_are_no_text_are_replaced(trained):
    euro = made(()).encode("1€2")
    assert made(()).decode(euro[:2]) == "1\N{REPLACEMENT CHARACTER}"
    assert made(()).decode(euro[3:]) == "\N{REPLACEMENT CHARACTER}2"


# the reference implementation


def test_equals_the_reference(trained):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer(
        tokenizers.models.BPE(trained.number, list(trained.merges))
    )
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.pre_tokenizer = level
    draw, texts = random.Random(0), list(TEXT)
    ranges = [(32, 127), (0x80, 0x250), (0x2000, 0x2070), (0x3000, 0x3100)]
    for _ in range(200):  # letters, spaces and marks of old parts of Unicode
        codes = (draw.randrange(*draw.choice(ranges)) for _ in range(40))
        texts.append("".join(map(chr, codes)))
    texts.append(data.reference().test[:5000])
    for text in texts:
        assert trained.encode(text).tolist() == theirs.encode(text).ids


# what is refused


@pytest.mark.parametrize(
    ("vocab", "merges", "message"),
    [
        (visible()[1:], (), "vocab: no 'Ā' among the tokens"),
        (visible(), (("a", "b"),), "vocab: no 'ab' among the tokens"),
        ((*visible(), "ab", "ab"), (), "vocab: 'ab' occurs twice"),
        ((*visible(), "aa"), (("a", "a"),) * 2, r"merges: \('a', 'a'\) occurs"),
        ((*visible(), "a b"), (), "vocab: 'a b' is not spelled in bytes"),
        ((*visible(), "中"), (), "vocab: '中' is not spelled in bytes"),
    ],
)
def test_what_is_no_tokenizer_is_refused(vocab, merges, message):
    with pytest.raises(ValueError, match=message):
        data.BPE(vocab, merges)


def test_errors_of_texts_and_numbers(trained):
    with pytest.raises(ValueError, match="surrogates"):
        trained.encode("half \ud83d of one")
    most = len(trained.vocab) - 1
    for wrong in (-1, most + 1):
        with pytest.raises(ValueError, match=rf"{wrong}, not in 0\.\.{most}"):
            trained.decode([0, wrong])


def test_repr_is_short(trained):
    assert repr(trained) == "BPE(457 tokens, 200 merges)"
