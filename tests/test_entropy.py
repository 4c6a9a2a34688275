"""Entropy coders against closed forms, brute force and their slow twins."""

import itertools
import math
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import entropy
from minicompress.codes import Ints

CODERS = [entropy.huffman, entropy.rans]


def source(n, k, bits, seed=0, skew=1.0):
    """Draw n of k symbols spread over the alphabet, p ~ rank^-skew."""
    rng = np.random.default_rng(seed)
    symbols = rng.permutation(1 << bits)[:k]
    p = np.arange(1, k + 1) ** -float(skew)
    drawn = symbols[rng.choice(k, n, p=p / p.sum())]
    return Ints(torch.from_numpy(drawn), bits)


def table_bytes(code):
    table = code.table
    return (
        math.ceil(table.values.numel() * 5 / 8)
        if isinstance(table, Ints)
        else table.numel()
    )


@st.composite
def integers(draw, widest=16):
    bits = draw(st.integers(1, widest))
    number = st.integers(0, (1 << bits) - 1)
    some = draw(st.lists(number, min_size=1, max_size=12))
    values = draw(st.lists(st.sampled_from(some) | number, max_size=300))
    return Ints(torch.tensor(values, dtype=torch.int64), bits)


# both coders


@pytest.mark.parametrize("coder", CODERS)
@settings(deadline=None, max_examples=120)
@given(ints=integers())
def test_round_trip(coder, ints):
    before = ints.values.clone()
    code = coder(ints)
    back = code.decode()
    assert code.shape == ints.shape and code.bits == ints.bits
    assert back.dtype == ints.values.dtype
    assert torch.equal(back, ints.values)
    assert torch.equal(ints.values, before)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("bits", range(1, 17))
def test_widths_and_shapes(coder, bits):
    for shape in ((), (0,), (3, 0), (1,), (5, 7), (2, 3, 1)):
        g = torch.Generator().manual_seed(bits)
        ints = Ints(torch.randint(0, 1 << bits, shape, generator=g), bits)
        code = coder(ints)
        assert code.shape == shape
        assert torch.equal(code.decode(), ints.values)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("k, bits", [(2, 1), (16, 4), (256, 8), (9, 16)])
def test_long_sources(coder, k, bits):
    # many blocks, many lanes, and a last step that fills only some of them
    ints = source(300_007, k, bits)
    assert torch.equal(coder(ints).decode(), ints.values)


@pytest.mark.parametrize("coder", CODERS)
def test_every_symbol_of_the_largest_alphabet(coder):
    values = torch.cat([torch.arange(1 << 16), torch.zeros(5000).long()])
    code = coder(Ints(values, 16))
    assert torch.equal(code.decode().long(), values)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("symbol", [0, 77, 255])
def test_one_symbol_says_nothing(coder, symbol):
    code = coder(Ints(torch.full((1000, 3), symbol), 8))
    assert code.stream.numel() == 0 and table_bytes(code) <= 9
    assert torch.equal(code.decode(), torch.full((1000, 3), symbol).byte())


@pytest.mark.parametrize("coder", CODERS)
def test_accepts_and_returns_any_integer_code(coder):
    ints = source(500, 5, 4)
    for other in CODERS:
        again = coder(other(ints))
        assert torch.equal(again.stream, coder(ints).stream)
        assert torch.equal(again.decode(), ints.values)


@pytest.mark.parametrize("coder", CODERS)
def test_tables_are_small(coder):
    assert table_bytes(coder(source(2000, 16, 4))) <= 16
    # twelve symbols scattered over an alphabet of 256, or of 65536
    assert table_bytes(coder(source(2000, 12, 8))) <= 12 * 5
    assert table_bytes(coder(source(2000, 12, 16))) <= 12 * 12


@pytest.mark.parametrize("coder", CODERS)
def test_no_coder_beats_the_bound(coder):
    for seed in range(20):
        ints = source(2000, 13, 4, seed, skew=seed / 5)
        code = coder(ints)
        coded = 8 * (code.stream.numel() + table_bytes(code))
        assert coded >= entropy.bound(ints)


@pytest.mark.parametrize("coder", CODERS)
def test_the_table_matters(coder):
    # knock-out: with another source's table the stream means other integers
    a, b = source(400, 6, 3, seed=1), source(400, 6, 3, seed=2)
    try:
        wrong = replace(coder(a), table=coder(b).table).decode()
    except ValueError:
        return
    assert not torch.equal(wrong, a.values)


# statistics


def test_entropy_closed_forms():
    assert entropy.entropy(torch.ones(256, dtype=torch.int64)) == 8
    assert entropy.entropy(torch.tensor([7, 0])) == 0
    assert entropy.entropy(torch.zeros(4, dtype=torch.int64)) == 0
    p = torch.tensor([0.9, 0.1], dtype=torch.float64)
    want = -(0.9 * math.log2(0.9) + 0.1 * math.log2(0.1))
    assert entropy.entropy(p) == pytest.approx(want, rel=1e-12)


def test_counts():
    ints = source(999, 5, 3)
    want = np.bincount(ints.values.numpy(), minlength=8)
    assert entropy.counts(ints).tolist() == want.tolist()


def test_bound_is_the_multinomial():
    ints = Ints(torch.tensor([0] * 6 + [1] * 3 + [3] * 2), 2)
    ways = math.factorial(11) // (720 * 6 * 2)
    assert entropy.bound(ints) == pytest.approx(math.log2(ways), rel=1e-12)
    h = entropy.entropy(entropy.counts(ints))
    assert entropy.bound(ints) <= 11 * h


# Huffman

COUNTS = st.lists(st.integers(1, 10**6), min_size=2, max_size=60)


def average(counts, lengths):
    c = torch.tensor(counts, dtype=torch.float64)
    return float((c * lengths).sum() / c.sum())


@settings(deadline=None, max_examples=200)
@given(COUNTS)
def test_kraft_entropy_and_redundancy(counts):
    c = torch.tensor(counts)
    lengths = entropy.code_lengths(c, limit=60)
    assert sum(2.0**-n for n in lengths.tolist()) == 1
    h, mean = entropy.entropy(c), average(counts, lengths)
    assert h - 1e-9 <= mean < h + 1
    # Gallager (1978): p_max + 1 - log2 e + log2 log2 e
    assert mean - h <= max(counts) / sum(counts) + 0.0861


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 50), min_size=4, max_size=4))
def test_no_code_of_four_words_is_shorter(counts):
    best = min(
        sum(c * n for c, n in zip(counts, lengths, strict=True))
        for lengths in itertools.product(range(1, 5), repeat=4)
        if sum(2.0**-n for n in lengths) <= 1
    )
    lengths = entropy.code_lengths(torch.tensor(counts))
    assert int((torch.tensor(counts) * lengths).sum()) == best


def test_dyadic_source_reaches_its_entropy():
    counts = torch.tensor([8, 4, 2, 1, 1])
    lengths = entropy.code_lengths(counts)
    assert lengths.tolist() == [1, 2, 3, 4, 4]
    assert average(counts.tolist(), lengths) == entropy.entropy(counts)
    values = torch.arange(5).repeat_interleave(counts)
    code = entropy.huffman(Ints(values, 3))
    assert code.stream.numel() == math.ceil(16 * entropy.entropy(counts) / 8)


@settings(deadline=None, max_examples=100)
@given(COUNTS)
def test_package_merge_without_pressure_is_huffman(counts):
    c = torch.tensor(counts)
    free = entropy.code_lengths(c, limit=60)
    merged = entropy.package_merge(c, limit=int(free.max()))
    assert int((c * merged).sum()) == int((c * free).sum())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 200), min_size=5, max_size=5))
def test_package_merge_is_optimal_under_its_limit(counts):
    best = min(
        sum(c * n for c, n in zip(counts, lengths, strict=True))
        for lengths in itertools.product(range(1, 4), repeat=5)
        if sum(2.0**-n for n in lengths) <= 1
    )
    lengths = entropy.package_merge(torch.tensor(counts), limit=3)
    assert int(lengths.max()) <= 3
    assert int((torch.tensor(counts) * lengths).sum()) == best


def test_fibonacci_counts_need_the_limit():
    fibonacci = [1, 1]
    while len(fibonacci) < 30:
        fibonacci.append(sum(fibonacci[-2:]))
    c = torch.tensor(fibonacci)
    assert int(entropy.code_lengths(c, limit=60).max()) == 29
    lengths = entropy.code_lengths(c)
    assert int(lengths.max()) == entropy.LIMIT
    assert sum(2.0**-n for n in lengths.tolist()) == 1
    ints = Ints(torch.arange(22).repeat_interleave(c[:22]), 5)
    assert torch.equal(entropy.huffman(ints).decode(), ints.values)


@settings(deadline=None, max_examples=60)
@given(COUNTS)
def test_canonical_words_are_a_prefix_code_in_order(counts):
    lengths = entropy.code_lengths(torch.tensor(counts))
    words = [
        f"{w:0{n}b}"
        for n, w in zip(
            lengths.tolist(), entropy.canonical(lengths).tolist(), strict=True
        )
    ]
    ordered = sorted(words)
    assert not any(b.startswith(a) for a, b in itertools.pairwise(ordered))
    # shorter first, and the smaller symbol first among equals
    by_length = sorted(range(len(words)), key=lambda s: (len(words[s]), s))
    assert [words[s] for s in by_length] == ordered


def test_canonical_bytes():
    # lengths 1 3 2 3: words 0, 110, 10, 111
    values = torch.tensor([0, 1, 2, 3, 0, 0, 2, 0])
    code = entropy.huffman(Ints(values, 2))
    assert code.lengths().tolist() == [1, 3, 2, 3]
    assert code.table.values.tolist() == [0, 2, 1, 2]
    bits = "01101011100100"
    want = int(bits.ljust(16, "0"), 2).to_bytes(2, "big")
    assert bytes(code.stream.tolist()) == want


@settings(deadline=None, max_examples=60)
@given(integers())
def test_huffman_equals_its_slow_twin(ints):
    code = entropy.huffman(ints)
    if code.stream.numel():
        assert entropy.huffman_slow(code) == code.decode().tolist()


@settings(deadline=None, max_examples=60)
@given(integers())
def test_huffman_stream_is_exactly_its_words(ints):
    lengths = entropy.huffman(ints).lengths()
    total = int((entropy.counts(ints) * lengths).sum())
    if int((lengths > 0).sum()) > 1:
        assert entropy.huffman(ints).stream.numel() == math.ceil(total / 8)


# rANS


def dense(code):
    """List the frequency of every symbol, 0 for those that do not occur."""
    symbols, freq = entropy.frequencies(code.table, code.bits)
    full = torch.zeros(1 << code.bits, dtype=torch.int64)
    full[symbols] = freq
    return full.tolist()


@settings(deadline=None, max_examples=80)
@given(integers(widest=8))
def test_rans_equals_its_slow_twin(ints):
    code = entropy.rans(ints, lanes=1)
    values, freq = ints.values.tolist(), dense(code)
    if len(set(values)) < 2:
        assert code.stream.numel() == 0
        return
    state, words = entropy.rans_slow(values, freq)
    stream = [state.to_bytes(4, "little")]
    stream += [w.to_bytes(2, "little") for w in words]
    assert bytes(code.stream.tolist()) == b"".join(stream)
    assert entropy.rans_undo(state, words, freq, len(values)) == values


@pytest.mark.parametrize("lanes", [2, 7, 64])
def test_lanes_are_independent_slow_coders(lanes):
    ints = source(1000, 9, 4)
    code = entropy.rans(ints, lanes=lanes)
    slow = [
        entropy.rans_slow(ints.values[j::lanes].tolist(), dense(code))
        for j in range(lanes)
    ]
    states = code.stream[: 4 * lanes].numpy().view("<u4")
    words = code.stream[4 * lanes :].numpy().view("<u2")
    assert states.tolist() == [x for x, _ in slow]
    assert sorted(words.tolist()) == sorted(w for _, ws in slow for w in ws)
    assert torch.equal(code.decode(), ints.values)


@pytest.mark.parametrize("skew", [0.0, 0.7, 1.5, 3.0])
@pytest.mark.parametrize("k, bits", [(2, 1), (16, 4), (200, 8)])
def test_rans_length(k, bits, skew):
    ints = source(50_000, k, bits, skew=skew)
    code = entropy.rans(ints)
    symbols, freq = entropy.frequencies(code.table, bits)
    c = entropy.counts(ints)[symbols].double()
    ideal = float((c * (freq.sum() / freq).log2()).sum())
    stream = 8 * code.stream.numel()
    assert stream <= 1.001 * ideal + 32 * code.lanes
    # rounding the frequencies to three bits after the point costs little
    h = entropy.entropy(c)
    assert ideal <= (1.002 * h + 0.001) * 50_000


@pytest.mark.parametrize("k, bits", [(16, 4), (256, 8)])
def test_a_million_symbols_within_two_percent(k, bits):
    ints = source(1 << 20, k, bits)
    code = entropy.rans(ints)
    coded = 8 * (code.stream.numel() + table_bytes(code))
    assert coded <= 1.02 * entropy.bound(ints)


def test_rans_spends_fractions_of_a_bit_where_huffman_cannot():
    ints = Ints((torch.arange(20_000) % 50 == 0).long(), 1)
    rans, huffman = entropy.rans(ints), entropy.huffman(ints)
    assert huffman.stream.numel() == 2500
    assert rans.stream.numel() * 8 < 1.1 * entropy.bound(ints) < 3200


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=80), st.integers(1, 16))
def test_every_table_gives_frequencies_that_fill_the_slots(data, bits):
    table = torch.tensor(list(data), dtype=torch.uint8)
    try:
        symbols, freq = entropy.frequencies(table, bits)
    except ValueError as error:
        assert "do not fit" in str(error)
        return
    assert symbols.tolist() == sorted(set(symbols.tolist()))
    assert all(0 <= s < 1 << bits for s in symbols.tolist())
    if len(symbols):
        assert int(freq.min()) >= 1 and int(freq.sum()) == 1 << 14


# hostile input


@pytest.mark.parametrize("coder", CODERS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_corrupt_fields_end_in_an_error_or_in_the_declared_shape(coder, data):
    good = coder(source(300, data.draw(st.integers(1, 9)), 4))
    table = good.table.values if isinstance(good.table, Ints) else good.table
    top = 31 if isinstance(good.table, Ints) else 255

    def mutate(x, top):
        x = x.tolist()
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, len(x)))
            new = data.draw(st.lists(st.integers(0, top), max_size=3))
            x[at : at + data.draw(st.integers(0, 3))] = new
        return torch.tensor(x, dtype=torch.uint8)

    stream, table = mutate(good.stream, 255), mutate(table, top)
    n = data.draw(st.sampled_from([300, 0, 1, 299, 301, 10_000, 1 << 45]))
    changed = {"stream": stream, "shape": (n,)}
    changed["table"] = Ints(table, 5) if top == 31 else table
    if coder is entropy.rans:
        changed["lanes"] = data.draw(st.sampled_from([1, 1, 2, 9, 2048]))
    began = time.perf_counter()
    try:
        back = replace(good, **changed).decode()
    except ValueError:
        pass
    else:
        assert back.shape == (n,) and back.dtype == torch.uint8
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize("coder", CODERS)
def test_what_is_wrong_is_said(coder):
    good = coder(source(300, 9, 4))
    last = good.stream[:-2]
    more = torch.cat([good.stream, good.stream])
    for changed, message in [
        ({"stream": last}, "stream"),
        ({"stream": more}, "stream"),
        ({"stream": good.stream[:0]}, "bytes"),
        ({"stream": good.stream.int()}, "stream must be bytes"),
        ({"stream": good.stream[None]}, "stream must be bytes"),
        ({"shape": (310,)}, "stream"),
        ({"shape": (290,)}, "stream"),
        ({"shape": (10**9,)}, "bytes|lanes"),
        ({"shape": (1 << 70,)}, "too large"),
        ({"shape": (-1,)}, "shape"),
        ({"shape": [300]}, "shape"),
        ({"bits": 0}, "bits must be 1 to 16"),
        ({"bits": 17}, "bits must be 1 to 16"),
        ({"bits": 3}, "do not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(good, **changed).decode()


def test_wrong_huffman_tables():
    good = entropy.huffman(source(300, 9, 4))
    for lengths, message in [
        ([1, 1, 1], "Kraft"),
        ([1, 2], "left over|leave"),
        ([], "disagree"),
        ([1], "disagree"),
    ]:
        table = Ints(torch.tensor(lengths, dtype=torch.int64) - 1, 5)
        with pytest.raises(ValueError, match=message):
            replace(good, table=table).decode()
    with pytest.raises(ValueError, match="5-bit"):
        replace(good, table=Ints(good.table.values, 6))


@pytest.mark.parametrize("lanes", [0, -1, 2049, 1.0, 10**9])
def test_absurd_lanes(lanes):
    good = entropy.rans(source(300, 9, 4))
    with pytest.raises(ValueError, match="lanes"):
        replace(good, lanes=lanes)


def test_many_values_need_many_lanes():
    # one lane over a billion values would decode for hours
    good = entropy.rans(source(300, 9, 4))
    with pytest.raises(ValueError, match="lanes must lie in"):
        replace(good, shape=(10**9,))


def test_wrong_counts():
    with pytest.raises(ValueError, match="negative"):
        entropy.code_lengths(torch.tensor([3, -1]))
    with pytest.raises(ValueError, match="limit=2"):
        entropy.code_lengths(torch.ones(5, dtype=torch.int64), limit=2)
    with pytest.raises(ValueError, match="Kraft"):
        entropy.canonical(torch.tensor([1, 1, 2]))


def test_nothing_is_hidden():
    # storage writes the fields and nothing else: rebuilding from them decodes
    for coder in CODERS:
        code = coder(source(300, 9, 4))
        kept = {f.name: getattr(code, f.name) for f in fields(code)}
        assert torch.equal(type(code)(**kept).decode(), code.decode())
