"""Data: exact sizes, nothing shared between parts, the same every time."""

import gzip
import hashlib
import http.server
import os
import struct
import sys
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import data
from minicompress.data import docs, fonts, idx, images, sources, tasks, text
from minicompress.data.tokens import ALPHABET

PARTS = ("train", "val", "test")


def fingerprint(values) -> str:
    """Hash whole numbers, alike on machines of either byte order."""
    small = np.asarray(values).astype("<i4")
    return hashlib.sha256(small.tobytes()).hexdigest()[:12]


def rows(X: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in X.flatten(1)}


def same(a: data.Task, b: data.Task) -> bool:
    return all(
        torch.equal(x, z)
        for part in PARTS
        for x, z in zip(getattr(a, part), getattr(b, part), strict=True)
    )


@pytest.fixture(scope="module")
def digits():
    return data.digits()


@pytest.fixture(scope="module")
def glyphs():
    return data.glyphs(1200, difficulty=0.5)


@pytest.fixture(scope="module")
def reference():
    return data.reference()


@pytest.fixture(scope="module")
def docstrings():
    return data.docstrings()


# tasks


def test_task_is_frozen_and_says_what_it_holds(digits):
    with pytest.raises(AttributeError):
        digits.train = digits.test
    assert digits.classes == len(digits.names) == 10
    assert "train 1000, val 297, test 500" in repr(digits)


@given(n=st.integers(0, 300), seed=st.integers(0, 2**40))
@settings(deadline=None, max_examples=50)
def test_permutation_holds_each_number_once(n, seed):
    drawn = tasks.permutation(n, seed=seed)
    assert sorted(drawn.tolist()) == list(range(n))


def test_permutation_never_changes():
    assert fingerprint(tasks.permutation(1000, seed=7)) == "4b4d1e7721ba"


@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(deadline=None)
def test_stratify_gives_exact_and_balanced_parts(labels, cuts):
    n = len(labels)
    low, high = sorted(round(cut * n) for cut in cuts)
    sizes = (low, high - low, n - high)
    labels = np.array(labels)
    parts = tasks.stratify(labels, sizes=sizes, seed=1)
    assert tuple(map(len, parts)) == sizes
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    for kind in set(labels.tolist()):
        here = (labels == kind).sum()
        # the last part is drawn first: at even distances, so within a row
        share = (labels[parts[2]] == kind).sum()
        assert abs(share - here * sizes[2] / n) < 1


def test_stratify_rejects_sizes_that_do_not_add_up():
    with pytest.raises(ValueError, match=r"\(2, 2\).*5 rows"):
        tasks.stratify(np.zeros(5), sizes=(2, 2), seed=0)


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=50),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_few_draws_exactly_per_class_and_keeps_the_rest(labels, seed):
    labels = torch.tensor(labels)
    least = int(labels.unique(return_counts=True)[1].min())
    train, test = data.few(labels, least, seed=seed)
    assert (labels[train].unique(return_counts=True)[1] == least).all()
    assert sorted(torch.cat([train, test]).tolist()) == list(range(len(labels)))


def test_few_depends_on_the_seed_only():
    labels = torch.arange(100) % 5
    first, again = (data.few(labels, 4, seed=3)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, data.few(labels, 4, seed=4)[0])


@pytest.mark.parametrize("per_class", [0, -1, 3])
def test_few_rejects_more_than_there_is(per_class):
    with pytest.raises(ValueError, match=f"per_class={per_class}"):
        data.few(torch.tensor([0, 0, 1, 1, 1]), per_class)


def test_few_rejects_labels_of_another_shape():
    with pytest.raises(ValueError, match=r"labels.*\(2, 2\)"):
        data.few(torch.zeros(2, 2), 1)


# digits


def test_digits_sizes_types_and_scale(digits):
    for part, n in zip(PARTS, (1000, 297, 500), strict=True):
        X, y = getattr(digits, part)
        assert X.shape == (n, 64) and X.dtype == torch.float32
        assert y.shape == (n,) and y.dtype == torch.int64
        assert X.min() == 0 and X.max() == 1
        assert torch.equal(X * 16, (X * 16).round())


def test_digits_parts_cover_all_rows_once(digits):
    from sklearn.datasets import load_digits

    parts = [rows(getattr(digits, part)[0]) for part in PARTS]
    everything = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    assert sum(map(len, parts)) == 1797
    assert set.union(*parts) == rows(everything)


def test_digits_rows_keep_their_labels(digits):
    from sklearn.datasets import load_digits

    X, y = load_digits(return_X_y=True)
    label = dict(zip(map(tuple, X.tolist()), y.tolist(), strict=True))
    for part in PARTS:
        X, y = getattr(digits, part)
        assert [label[tuple(row)] for row in (X * 16).tolist()] == y.tolist()


def test_digits_are_balanced_and_never_change(digits):
    total = sum(getattr(digits, p)[1].bincount() for p in PARTS)
    for part in PARTS:
        y = getattr(digits, part)[1]
        share = total * len(y) / 1797
        assert (y.bincount() - share).abs().max() < 2
    labels = torch.cat([getattr(digits, part)[1] for part in PARTS])
    assert fingerprint(labels) == "99cd94c1b05d"


def test_digits_are_not_shared_between_calls(digits):
    other = data.digits()
    assert same(digits, other)
    other.train[0].zero_()
    assert digits.train[0].any() and data.digits().train[0].any()


@pytest.mark.parametrize(
    ("module", "call", "package"),
    [
        ("sklearn.datasets", data.digits, "scikit-learn"),
        ("matplotlib", fonts.pictures.__wrapped__, "matplotlib"),
        ("pydoc_data.topics", data.reference, "pydoc_data"),
    ],
)
def test_missing_packages_are_named(monkeypatch, module, call, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=package):
        call()


# glyphs


def test_glyphs_sizes_types_and_scale(glyphs):
    for part, n in zip(PARTS, (800, 200, 200), strict=True):
        X, y = getattr(glyphs, part)
        assert X.shape == (n, 1, 28, 28) and X.dtype == torch.float32
        assert y.shape == (n,) and y.dtype == torch.int64
        assert X.min() == 0 and X.max() == 1
        counts = y.bincount(minlength=36)
        assert counts.max() - counts.min() <= 1
    assert "".join(glyphs.names) == "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def test_glyphs_parts_are_disjoint_and_never_change(glyphs):
    parts = [rows(getattr(glyphs, part)[0]) for part in PARTS]
    assert len(set.union(*parts)) == 1200
    labels = torch.cat([getattr(glyphs, part)[1] for part in PARTS])
    assert fingerprint(labels) == "3af6dc4be93b"
    # pictures to the precision that the docstring states
    X = glyphs.train[0]
    assert X[:64].mean().item() == pytest.approx(0.184154, abs=1e-5)
    row = [0.799963, 0.163444, 0, 0.409651, 0.632542, 0.50151, 0.613999]
    assert X[5, 0, 14, 8:15].tolist() == pytest.approx(row, abs=1e-5)


def test_glyphs_depend_on_their_arguments_only(glyphs):
    assert same(glyphs, data.glyphs(1200, difficulty=0.5))
    other = data.glyphs(1200, difficulty=0.5, seed=1)
    assert not same(glyphs, other)
    assert not rows(other.train[0]) & rows(glyphs.train[0])


def test_clean_glyphs_are_the_drawn_characters():
    X, y = data.glyphs(600, difficulty=0).train
    theta = torch.eye(2, 3)[None]
    grid = torch.nn.functional.affine_grid(
        theta, [1, 1, 28, 28], align_corners=False
    )
    drawn = torch.from_numpy(fonts.pictures().copy()).flatten(0, 1)[:, None]
    clean = torch.nn.functional.grid_sample(
        drawn, grid.expand(len(drawn), -1, -1, -1), align_corners=False
    )
    distance = torch.cdist(X.flatten(1), clean.flatten(1))
    nearest = distance.argmin(dim=1)
    assert distance.min(dim=1).values.max() < 1e-2
    assert (nearest % 36 == y).all()


def test_difficulty_is_what_makes_glyphs_hard():
    """Nearest class mean: worse with every step of difficulty."""
    accuracy = []
    for difficulty in (0, 0.5, 1):
        task = data.glyphs(3000, difficulty=difficulty)
        X, y = task.train[0].flatten(1), task.train[1]
        means = torch.stack([X[y == c].mean(dim=0) for c in range(36)])
        guess = torch.cdist(task.test[0].flatten(1), means).argmin(dim=1)
        accuracy.append((guess == task.test[1]).float().mean().item())
    easy, middle, hard = accuracy
    assert easy > 0.8 and easy - 0.1 > middle and middle - 0.15 > hard > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 5}, "n=5"),
        ({"difficulty": -0.1}, "difficulty=-0.1"),
        ({"difficulty": float("nan")}, "difficulty=nan"),
        ({"difficulty": float("inf")}, "difficulty=inf"),
    ],
)
def test_glyphs_reject(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.glyphs(**arguments)


def test_every_character_of_every_font_is_drawn_and_distinct():
    drawn = fonts.pictures()
    assert drawn.shape == (22, 36, 40, 40) and drawn.min() == 0
    ink = drawn.reshape(22, 36, -1).sum(axis=2)
    assert ink.min() > 30  # even the I of the thinnest font
    for font in drawn:
        assert len({picture.tobytes() for picture in font}) == 36
    # centered, the longer side 28 pixels
    box = drawn.max(axis=(0, 1)) > 0
    assert box[6:34, 6:34].any() and not box[:5].any() and not box[35:].any()


def test_drawings_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        fonts.pictures()[0] = 0


def test_coverage_equals_another_rasterizer():
    """Pillow fills the same polygon, drawn 16 times as large."""
    image = pytest.importorskip("PIL.Image")
    draw = pytest.importorskip("PIL.ImageDraw")
    angle = np.arange(11) * 4 * np.pi / 11  # a star, edges of every slope
    points = 20 + 15 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    order = np.argsort(np.arctan2(*(points - 20).T))
    points = points[order] * (0.6 + 0.4 * (np.arange(11) % 2))[:, None]
    edges = np.hstack([points, np.roll(points, -1, axis=0)])
    ours = fonts.coverage(edges, np.zeros(11, int), 1)[0]
    canvas = image.new("1", (640, 640))
    polygon = [tuple(p) for p in (points * 16 - 0.5).tolist()]
    draw.Draw(canvas).polygon(polygon, fill=1)
    theirs = np.asarray(canvas, float).reshape(40, 16, 40, 16).mean((1, 3))
    assert np.abs(ours - theirs).max() < 0.15
    assert abs(ours.sum() - theirs.sum()) < 0.02 * theirs.sum()


def test_a_hole_stays_empty():
    def square(a, b, turn):
        corners = [(a, a), (a, b), (b, b), (b, a)][::turn]
        after = corners[1:] + corners[:1]
        return [[*p, *q] for p, q in zip(corners, after, strict=True)]

    edges = np.array(square(10, 30, 1) + square(15, 25, -1), float)
    filled = fonts.coverage(edges, np.zeros(8, int), 1)[0]
    expected = np.zeros((40, 40), np.float32)
    expected[10:30, 10:30] = 1
    expected[15:25, 15:25] = 0
    np.testing.assert_allclose(filled, expected, atol=1e-6)


def test_flatten_follows_a_quadratic_curve():
    vertices = np.array([[0, 0], [1, 2], [2, 0], [0, 0]], float)
    segments = fonts.flatten(vertices, np.array([1, 3, 3, 79]))
    points = segments[: fonts.STEPS, 2:]
    x, y = points.T
    np.testing.assert_allclose(y, 2 * x - x**2)  # the parabola's equation
    assert segments[-1].tolist() == [2, 0, 0, 0]  # closed


@pytest.mark.parametrize(("amount", "side"), [(1, 12), (0, 10), (-1, 8)])
def test_strokes_grow_and_shrink_by_a_pixel_a_side(monkeypatch, amount, side):
    drawn = np.zeros((1, 1, 40, 40), np.float32)
    drawn[0, 0, 15:25, 15:25] = 1
    monkeypatch.setattr(images, "pictures", lambda: drawn)
    zero = torch.zeros(1, dtype=torch.long)
    strokes = images._strokes()
    changed = images._restroke(
        strokes, zero, zero, torch.tensor([1.0 * amount])
    )
    assert changed.shape == (1, 1, 40, 40) and changed.sum() == side**2
    half = images._restroke(strokes, zero, zero, torch.tensor([0.5 * amount]))
    assert half.sum() == (side**2 + 100) / 2
    assert drawn.sum() == 100


# the language reference


def paragraphs(part: str) -> list[str]:
    pieces = part.split("\n\n")
    return [" ".join(piece.split()) for piece in pieces if piece.strip()]


def test_no_paragraph_of_the_reference_occurs_twice(reference):
    together = [
        p for part in PARTS for p in paragraphs(getattr(reference, part))
    ]
    assert len(together) == len(set(together)) > 1000


def test_a_naive_cut_would_leak():
    """The reason for the split by topic: equal paragraphs in many topics."""
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[name] for name in sorted(topics))
    cut = int(0.9 * len(whole))
    train, test = (set(paragraphs(s)) for s in (whole[:cut], whole[cut:]))
    assert len(train & test) > 20


def test_held_out_phrases_are_rare_in_training(reference):
    """Eight words in a row: what remains is grammar tables and idioms."""

    def grams(part):
        words = part.split()
        return [tuple(words[i : i + 8]) for i in range(len(words) - 7)]

    known = set(grams(reference.train))
    for part in (reference.val, reference.test):
        held = grams(part)
        assert sum(gram in known for gram in held) < 0.03 * len(held)


def test_reference_sizes_and_characters(reference):
    whole = len(reference.train + reference.val + reference.test)
    assert whole > 300_000
    assert 0.05 < len(reference.val) / whole < 0.15
    assert 0.05 < len(reference.test) / whole < 0.15
    for part in PARTS:
        assert set(getattr(reference, part)) <= set(ALPHABET)
    again = data.reference()
    assert again.train == reference.train and again.hash == reference.hash
    assert len(reference.hash) == 64 and reference.hash[:8] in repr(reference)


def test_held_out_topics_exist_and_differ():
    from pydoc_data.topics import topics

    assert set(text.VALIDATION) | set(text.TEST) <= set(topics)
    assert not set(text.VALIDATION) & set(text.TEST)


def test_split_prefers_the_held_out_parts_and_ignores_layout():
    parts = text.split(
        {
            "zebra": "both  parts\n\nalone",
            "with": "   both\n   parts\n\nsaid twice\n \nsaid twice",
            "try": "said twice\n\nval",
        }
    )
    assert parts.test == "   both\n   parts\n\nsaid twice\n"
    assert (parts.val, parts.train) == ("val\n", "alone\n")
    assert parts.hash != text.split({"zebra": "alone"}).hash


@given(st.text(max_size=50))
@settings(deadline=None, max_examples=60)
def test_ascii_only_is_ascii_and_idempotent(string):
    plain = text.ascii_only(string)
    assert set(plain) <= set(ALPHABET)
    assert text.ascii_only(plain) == plain


# tokens


@pytest.fixture(scope="module")
def merged(reference):
    return data.tokenizer(reference.train[:60_000], merges=150)


@given(string=st.text(ALPHABET, max_size=80))
@settings(deadline=None)
def test_decode_undoes_encode(merged, string):
    for tokens in (data.Tokenizer(), merged):
        ids = tokens.encode(string)
        assert ids.dtype == torch.int64 and ids.ndim == 1
        assert tokens.decode(ids) == string


@given(string=st.text(max_size=40))
@settings(deadline=None)
def test_unknown_characters_become_one_token(merged, string):
    expected = "".join(c if c in ALPHABET else "\ufffd" for c in string)
    assert merged.decode(merged.encode(string)) == expected
    assert len(data.Tokenizer().encode(string)) == len(string)


def test_character_numbers_never_change():
    tokens = data.Tokenizer()
    assert tokens.size == 97 and len(tokens.tokens) == 97
    ids = tokens.encode("\n" + "".join(map(chr, range(32, 127))) + "é")
    assert ids.tolist() == [*range(1, 97), 0]


def naive_merges(string: str, count: int) -> list[tuple[int, int]]:
    """Recount all pairs of all words before every merge."""
    words = [[ALPHABET.index(c) + 1 for c in w] for w in string.split()]
    learned = []
    for new in range(97, 97 + count):
        pairs = {}
        for word in words:
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        learned.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [new]
                i += 1
    return learned


@given(
    st.lists(st.text("abc", min_size=1, max_size=9), max_size=12),
    st.integers(0, 12),
)
@settings(deadline=None)
def test_merges_equal_a_naive_count(words, count):
    # one word a line: line ends are words of their own and merge to nothing
    learned = data.tokenizer("\n".join(words), merges=count).merges
    assert list(learned) == naive_merges("\n".join(words), count)


def test_merges_shorten_text_and_keep_to_words(reference, merged):
    assert merged.size == 97 + 150
    short = merged.encode(reference.test)
    assert len(short) < 0.6 * len(reference.test)
    assert not any(" " in t.strip(" ") for t in merged.tokens[97:])
    again = data.tokenizer(reference.train[:60_000], merges=150)
    assert again == merged and hash(again) == hash(merged)


def test_tokenizer_rejects():
    with pytest.raises(ValueError, match="merges=-1"):
        data.tokenizer("abc", merges=-1)
    for wrong in (-1, 97):
        with pytest.raises(ValueError, match=f"ids holds {wrong}"):
            data.Tokenizer().decode(torch.tensor([1, wrong]))


# docstrings


def test_docstrings_cover_27_modules(docstrings):
    assert len(docstrings.names) == len(set(docstrings.names)) == 27
    assert len(docstrings.texts) == len(docstrings.labels) > 1200
    assert docstrings.labels.dtype == torch.int64
    assert docstrings.labels.bincount(minlength=27).min() >= 20
    assert (docstrings.labels.diff() >= 0).all()


def test_docstrings_are_distinct_and_do_not_name_their_module(docstrings):
    assert len(set(docstrings.texts)) == len(docstrings.texts)
    for string in docstrings.texts:
        words = set(
            "".join(c if c.isalnum() else " " for c in string.lower()).split()
        )
        assert not words & set(docstrings.names)
        assert string == " ".join(string.split())


def test_docstrings_come_from_their_modules(docstrings):
    known = dict(zip(docstrings.texts, docstrings.labels.tolist(), strict=True))
    summary = "Deep copy operation on arbitrary"
    assert not any(summary in string for string in known)
    label = next(v for k, v in known.items() if "Shuffle list x in place" in k)
    assert docstrings.names[label] == "random"


def test_docstrings_are_the_same_again(monkeypatch, docstrings):
    """Even where a package replaced functions of the standard library."""
    monkeypatch.setattr("random.shuffle", print)
    again = data.docstrings()
    assert again.texts == docstrings.texts
    assert torch.equal(again.labels, docstrings.labels)
    train, test = data.few(again.labels, 5, seed=0)
    assert len(train) == 135 and len(test) == len(again.texts) - 135


def test_docstrings_need_the_source(monkeypatch):
    monkeypatch.setattr(docs.sysconfig, "get_path", lambda name: "nowhere")
    with pytest.raises(RuntimeError, match=r"source of .*nowhere.*ast\.py"):
        data.docstrings()


# idx files


def idx_bytes(values: np.ndarray) -> bytes:
    code = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}
    kind = values.dtype.str[1:]
    head = struct.pack(">BBBB", 0, 0, code[kind], values.ndim)
    dims = struct.pack(f">{values.ndim}I", *values.shape)
    return head + dims + values.astype(f">{kind}").tobytes()


def small_files(n: int = 30, n_test: int = 10) -> dict[str, bytes]:
    random = np.random.default_rng(0)
    return {
        stem: idx_bytes(
            random.integers(0, 256, (size, 28, 28)).astype("u1")
            if "images" in stem
            else (np.arange(size) % 10).astype("u1")
        )
        for stem, size in zip(idx.FILES, (n, n, n_test, n_test), strict=True)
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["u1", "i1", "i2", "i4", "f4", "f8"])
def test_idx_files_of_every_type(tmp_path, kind, packed):
    values = np.arange(24).reshape(2, 3, 4).astype(kind)
    path = tmp_path / "any name"
    raw = idx_bytes(values)
    path.write_bytes(gzip.compress(raw) if packed else raw)
    found = idx.read(path)
    assert found.numpy().dtype == values.dtype
    np.testing.assert_array_equal(found.numpy(), values)


GOOD = idx_bytes(np.arange(12, dtype="u1").reshape(3, 4))
PACKED = gzip.compress(GOOD, mtime=0)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "no idx file"),
        (GOOD[:3], "no idx file"),
        (b"\x01" + GOOD[1:], "no idx file"),
        (GOOD[:2] + b"\x07" + GOOD[3:], "no idx file"),
        (GOOD[:3] + b"\x00" + GOOD[4:], "no idx file"),
        (GOOD[:7], "ends within the header"),
        (GOOD[:3] + b"\x09" + GOOD[4:], "no idx file"),
        (GOOD[:-1], r"\(3, 4\) needs 12 bytes of values, found 11"),
        (GOOD + b"\x00", "found more"),
        (GOOD[:4] + b"\xff" * 8 + GOOD[12:], "found 12"),
        (PACKED[:-9], "damaged gzip"),
        (PACKED[:10] + b"\xff" * 20, "damaged gzip"),
        (gzip.compress(GOOD[:-1], mtime=0), "found 11"),
    ],
)
def test_damaged_idx_files(tmp_path, raw, message):
    path = tmp_path / "broken"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as caught:
        idx.read(path)
    assert str(path) in str(caught.value)


@given(cut=st.integers(0, len(GOOD) - 1), packed=st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_truncated_idx_file_is_never_read(tmp_path_factory, cut, packed):
    path = tmp_path_factory.getbasetemp() / "cut"
    whole = PACKED if packed else GOOD
    path.write_bytes(whole[: cut * len(whole) // len(GOOD)])
    with pytest.raises(ValueError, match="cut"):
        idx.read(path)


@pytest.mark.parametrize(
    ("folder", "spelling"),
    [
        ("mnist", "{}.gz"),
        ("mnist", "{}"),
        ("MNIST/raw", "{}"),
        (".", "{}.gz"),
        ("mnist", "dotted"),
    ],
)
def test_mnist_is_found_where_people_keep_it(tmp_path, folder, spelling):
    place = tmp_path / folder
    place.mkdir(parents=True, exist_ok=True)
    files = small_files()
    for stem, raw in files.items():
        name = spelling.format(stem)
        if spelling == "dotted":
            name = stem.replace("-idx", ".idx")
        path = place / name
        # another level than the original's: other bytes, same content
        path.write_bytes(gzip.compress(raw, 1) if name[-3:] == ".gz" else raw)
    task = data.mnist(tmp_path, validation=6)
    assert [len(getattr(task, part)[1]) for part in PARTS] == [24, 6, 10]
    X = torch.cat([task.train[0], task.val[0]])
    raw = np.frombuffer(files[idx.FILES[0]], "u1", offset=16)
    expected = raw.reshape(30, 1, 28, 28).astype("f4") / np.float32(255)
    assert X.dtype == torch.float32 and task.test[1].dtype == torch.int64
    np.testing.assert_array_equal(X.numpy(), expected)
    assert task.val[1].tolist() == [4, 5, 6, 7, 8, 9]


def write_small(folder: Path, files: dict[str, bytes] | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, raw in (files or small_files()).items():
        (folder / stem).write_bytes(raw)


def test_the_environment_variable_names_a_folder_of_folders(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("MINICOMPRESS_DATA", str(tmp_path))
    write_small(tmp_path)  # not taken: could be either data set
    with pytest.raises(FileNotFoundError, match="Fashion-MNIST needs"):
        data.fashion_mnist()
    write_small(tmp_path / "fashion-mnist")
    task = data.fashion_mnist(validation=5)
    assert task.names[0] == "T-shirt/top" and task.classes == 10


def test_without_a_folder_the_cache_is_used(tmp_path, monkeypatch):
    monkeypatch.delenv("MINICOMPRESS_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_small(tmp_path / "minicompress" / "mnist")
    assert len(data.mnist(validation=5).train[1]) == 25


def test_missing_files_are_named(tmp_path):
    files = small_files()
    del files["t10k-labels-idx1-ubyte"]
    write_small(tmp_path / "mnist", files)
    with pytest.raises(FileNotFoundError) as caught:
        data.mnist(tmp_path)
    message = str(caught.value)
    assert "MNIST needs t10k-labels-idx1-ubyte.gz in" in message
    assert str(tmp_path / "mnist") in message
    assert "train-images" not in message
    assert "MINICOMPRESS_DATA" in message and "download=True" in message


@pytest.mark.parametrize("validation", [0, -1, 30])
def test_mnist_rejects_a_validation_part_that_takes_all(tmp_path, validation):
    write_small(tmp_path / "mnist")
    with pytest.raises(ValueError, match=f"validation={validation}"):
        data.mnist(tmp_path, validation=validation)


@pytest.mark.parametrize(
    ("stem", "values"),
    [
        ("train-labels-idx1-ubyte", np.zeros(29, "u1")),
        ("train-labels-idx1-ubyte", np.full(30, 10, "u1")),
        ("train-images-idx3-ubyte", np.zeros((30, 28, 27), "u1")),
        ("train-images-idx3-ubyte", np.zeros((30, 28, 28), "f4")),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, stem, values):
    write_small(tmp_path / "mnist", {**small_files(), stem: idx_bytes(values)})
    with pytest.raises(ValueError, match="the train files"):
        data.mnist(tmp_path, validation=5)


# downloads


class Server(http.server.BaseHTTPRequestHandler):
    """Serve the dict of bytes that hangs on the server, with its faults."""

    def do_GET(self):
        folder, name = self.path.strip("/").split("/")
        self.server.asked.append(self.path)
        raw = self.server.files.get(name)
        if raw is None or folder == "gone":
            self.send_error(404)
            return
        body = {
            "good": raw,
            "short": raw[: len(raw) // 2],  # and says so
            "stops": raw[: len(raw) // 2],  # announces more than it sends
            "wrong": raw[:-1] + bytes([raw[-1] ^ 1]),
        }[folder]
        self.send_response(200)
        announced = raw if folder == "stops" else body
        self.send_header("Content-Length", str(len(announced)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    packed = {f"{k}.gz": gzip.compress(v) for k, v in small_files().items()}
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.files, running.asked = packed, []
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def source(server, *folders: str) -> sources.Source:
    """Describe the small files as they lie on the given folders."""
    port = server.server_address[1]
    return sources.Source(
        name="Small",
        folders=("small",),
        mirrors=tuple(f"http://127.0.0.1:{port}/{f}/" for f in folders),
        files={
            name.removesuffix(".gz"): hashlib.md5(raw).hexdigest()
            for name, raw in server.files.items()
        },
        names=tuple("0123456789"),
    )


def test_download_fetches_once_and_shows_progress(tmp_path, server, capfd):
    known = source(server, "good")
    task = idx.load(known, tmp_path, download=True, validation=5)
    assert len(task.train[1]) == 25 and len(server.asked) == 4
    files = {p.name: p.read_bytes() for p in (tmp_path / "small").iterdir()}
    assert files == server.files
    assert "train-images-idx3-ubyte.gz: 100%" in capfd.readouterr().err
    again = idx.load(known, tmp_path, download=True, validation=5)
    assert same(task, again) and len(server.asked) == 4


def test_download_fetches_only_what_is_missing(tmp_path, server):
    write_small(tmp_path / "small")
    (tmp_path / "small" / "t10k-labels-idx1-ubyte").unlink()
    idx.load(source(server, "good"), tmp_path, download=True, validation=5)
    assert server.asked == ["/good/t10k-labels-idx1-ubyte.gz"]


@pytest.mark.parametrize("fault", ["gone", "short", "stops", "wrong"])
def test_the_next_mirror_is_tried(tmp_path, server, fault):
    known = source(server, fault, "good")
    task = idx.load(known, tmp_path, download=True, validation=5)
    assert len(task.test[1]) == 10 and len(server.asked) == 8
    assert len(list((tmp_path / "small").iterdir())) == 4


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("gone", "404"),
        ("short", "md5 is"),
        ("stops", "md5 is"),
        ("wrong", "md5 is"),
    ],
)
def test_a_failed_download_leaves_nothing_behind(
    tmp_path, server, fault, message
):
    known = source(server, fault)
    with pytest.raises(ConnectionError, match=message) as caught:
        idx.load(known, tmp_path, download=True, validation=5)
    told = str(caught.value)
    assert "train-images-idx3-ubyte.gz" in told and known.mirrors[0] in told
    assert "t10k-labels-idx1-ubyte.gz into" in told  # what to do by hand
    assert str(tmp_path / "small") in told
    assert list((tmp_path / "small").iterdir()) == []


def test_no_network_is_explained(tmp_path, server):
    known = source(server, "good")
    server.shutdown()
    server.server_close()  # nobody listens any more
    with pytest.raises(ConnectionError, match="Without a network, put"):
        idx.load(known, tmp_path, download=True, validation=5)


def test_interruption_leaves_nothing_behind(tmp_path, server, monkeypatch):
    class Interrupting(sources.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(sources, "tqdm", Interrupting)
    known = source(server, "good")
    with pytest.raises(KeyboardInterrupt):
        idx.load(known, tmp_path, download=True, validation=5)
    assert list((tmp_path / "small").iterdir()) == []


def test_published_checksums_are_complete():
    for known in (idx.MNIST, idx.FASHION):
        assert tuple(known.files) == idx.FILES
        assert len({*known.files.values()}) == 4
        assert all(
            len(bytes.fromhex(md5)) == 16 for md5 in known.files.values()
        )
        assert len(known.mirrors) >= 2 and len(known.names) == 10


def test_real_mnist():
    root = Path(os.environ.get("MINICOMPRESS_DATA", ""), "mnist")
    if "MINICOMPRESS_DATA" not in os.environ or not root.is_dir():
        pytest.skip("needs MINICOMPRESS_DATA with a folder mnist")
    task = data.mnist()
    assert [len(getattr(task, p)[1]) for p in PARTS] == [55_000, 5_000, 10_000]
    assert task.train[0].shape[1:] == (1, 28, 28)
    assert task.train[1][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert task.test[1][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    mean = torch.cat([task.train[0], task.val[0]]).mean().item()
    assert mean == pytest.approx(0.1307, abs=5e-5)  # the well-known constant
    # the labels' file is the published one, byte for byte
    path = sources.find(root, "t10k-labels-idx1-ubyte")
    labels = (gzip.open if path.suffix == ".gz" else open)(path, "rb").read()
    expected = bytes(task.test[1].to(torch.uint8).tolist())
    assert labels == idx_bytes(np.frombuffer(expected, "u1"))
