"""Packing: round trips, exact sizes, and the order of the bits on paper."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import bits

WIDTHS = range(1, 17)


def numbers(n, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << width, (n,), generator=g)


def by_hand(values: list[int], width: int) -> bytes:
    """Pack with Python's big integers, straight from the module's text."""
    m = len(values) // 8
    words = [
        sum(values[j * m + i] << (j * width) for j in range(8))
        for i in range(m)
    ]
    planes = [(w >> 8 * k) & 255 for k in range(width) for w in words]
    tail = sum(v << (j * width) for j, v in enumerate(values[8 * m :]))
    size = ((len(values) - 8 * m) * width + 7) // 8
    return bytes(planes) + tail.to_bytes(size, "little")


@pytest.mark.parametrize("width", WIDTHS)
def test_round_trip_and_size(width):
    for n in [*range(18), 1000, 1007]:
        values = numbers(n, width, seed=n)
        packed = bits.pack(values, width)
        assert packed.dtype == torch.uint8
        assert packed.shape == (-(-n * width // 8),)
        back = bits.unpack(packed, width, n)
        assert back.dtype == (torch.uint8 if width <= 8 else torch.int32)
        assert torch.equal(back.long(), values)


@settings(deadline=None, max_examples=150)
@given(st.data(), st.integers(1, 16))
def test_layout_is_the_documented_one(data, width):
    number = st.integers(0, (1 << width) - 1)
    values = data.draw(st.lists(number, max_size=70))
    packed = bits.pack(torch.tensor(values, dtype=torch.int64), width)
    assert bytes(packed.tolist()) == by_hand(values, width)
    assert bits.unpack(packed, width, len(values)).tolist() == values


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 16), st.integers(0, 100), st.integers(0, 99))
def test_every_byte_string_is_a_packing(width, n, seed):
    # whole words leave no bit unused, so unpacking can be undone, too
    g = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (n * width,), generator=g, dtype=torch.uint8)
    assert torch.equal(bits.pack(bits.unpack(raw, width, 8 * n), width), raw)


def test_canonical_bytes():
    # two words of 3-bit values: lanes (0 1) (2 3) (4 5) (6 7) twice over
    values = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 5])
    packed = bits.pack(values, 3)
    # the words 0o64206420 and 0o75317531, byte by byte, then the last 5
    assert packed.tolist() == [0x10, 0x59, 0x0D, 0x9F, 0xD1, 0xF5, 0x05]


def test_one_bit_agrees_with_numpy():
    # one word: bit j of byte 0 is value j, as numpy's little bit order
    values = numbers(8, 1)
    want = np.packbits(values.numpy().astype(np.uint8), bitorder="little")
    assert bits.pack(values, 1).tolist() == want.tolist()


def test_eight_bits_are_the_bytes_themselves():
    values = numbers(1003, 8)
    assert torch.equal(bits.pack(values, 8).long(), values)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.int8])
@pytest.mark.parametrize("strided", [False, True])
def test_types_and_strides(kind, strided):
    values = numbers(99, 1).to(kind)
    source = values.repeat_interleave(2)[::2] if strided else values
    before = source.clone()
    packed = bits.pack(source, 1)
    assert torch.equal(packed, bits.pack(values.long(), 1))
    assert torch.equal(source, before)


def test_shape_is_flattened_in_row_major_order():
    values = numbers(24, 5)
    assert torch.equal(bits.pack(values.view(2, 3, 4), 5), bits.pack(values, 5))


@pytest.mark.parametrize("width", WIDTHS)
def test_values_that_do_not_fit(width):
    for bad in (-1, 1 << width):
        for n, at in ((1, 0), (30, 17)):  # in the tail, in the lanes
            values = torch.zeros(n, dtype=torch.int64)
            values[at] = bad
            with pytest.raises(ValueError, match=f"{bad}"):
                bits.pack(values, width)


def test_wrong_arguments():
    values = torch.zeros(3, dtype=torch.uint8)
    for width in (0, 17, -1):
        with pytest.raises(ValueError, match="bits must be 1 to 16"):
            bits.pack(values, width)
        with pytest.raises(ValueError, match="bits must be 1 to 16"):
            bits.unpack(values, width, 1)
    with pytest.raises(ValueError, match="must be integers"):
        bits.pack(torch.zeros(3), 4)
    for n in (-1, 4, 7, 1 << 60):
        with pytest.raises(ValueError, match="n"):
            bits.unpack(values, 4, n)
    with pytest.raises(ValueError, match="uint8"):
        bits.unpack(values.int(), 8, 3)
