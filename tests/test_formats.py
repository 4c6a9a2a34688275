"""Floating and fixed point against torch's own types and by enumeration."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minicompress import quantize as q

TORCH = {
    "float16": (q.FLOAT16, torch.float16),
    "bfloat16": (q.BFLOAT16, torch.bfloat16),
    "E4M3": (q.E4M3, torch.float8_e4m3fn),
    "E5M2": (q.E5M2, torch.float8_e5m2),
}
SMALL = (q.E4M3, q.E5M2, q.E3M2, q.E2M3, q.E2M1)


def inputs(seed=0, n=20_000):
    """Numbers of all sizes, and ties."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g)
    sizes = torch.randint(-40, 40, (n,), generator=g)
    return torch.cat([x, torch.ldexp(x, sizes), torch.tensor([0.0, -0.0])])


@pytest.mark.parametrize("name", TORCH)
def test_rounds_as_torch_does(name):
    fmt, dtype = TORCH[name]
    x = inputs()
    want = x.to(dtype).float()
    # torch's releases differ in what becomes of a number that is too large
    ends = bool(torch.tensor(1e30).to(dtype).float().isfinite())
    found = q.to_float(x, fmt, saturate=ends)
    same = (found == want) | (found.isnan() & want.isnan())
    assert same.all()


@pytest.mark.parametrize("name", TORCH)
def test_ties_go_to_the_even_mantissa(name):
    fmt, dtype = TORCH[name]
    y = q.every_number(fmt) if fmt.bits <= 16 else None
    y = y[(y.abs() < 1e4)]
    middle = ((y[1:] + y[:-1]) / 2).float()
    assert torch.equal(q.to_float(middle, fmt), middle.to(dtype).float())


@pytest.mark.parametrize("name", TORCH)
def test_every_code_is_torch_s(name):
    fmt, dtype = TORCH[name]
    kind = torch.uint8 if fmt.bits == 8 else torch.int16
    codes = torch.arange(2**fmt.bits)
    theirs = codes.to(kind).view(dtype).double()
    sign = codes >> (fmt.bits - 1)
    rest = codes % 2 ** (fmt.bits - 1)
    ours = q.from_fields(
        sign, rest >> fmt.mantissa, rest % 2**fmt.mantissa, fmt
    )
    assert torch.equal(ours.isnan(), theirs.isnan())
    keep = ~theirs.isnan()
    assert torch.equal(ours[keep], theirs[keep])
    assert torch.equal(ours[keep].signbit(), theirs[keep].signbit())


def test_known_limits():
    assert q.FLOAT16.largest == 65504
    assert q.FLOAT16.smallest == 2.0**-24
    assert q.BFLOAT16.largest == torch.finfo(torch.bfloat16).max
    assert q.FLOAT32.largest == torch.finfo(torch.float32).max
    assert (q.E4M3.largest, q.E4M3.smallest) == (448, 2.0**-9)
    assert (q.E5M2.largest, q.E5M2.smallest) == (57344, 2.0**-16)
    assert (q.E3M2.largest, q.E2M3.largest, q.E2M1.largest) == (28, 7.5, 6)
    assert [f.bits for f in SMALL] == [8, 8, 6, 6, 4]


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_all_numbers_are_sorted_and_symmetric(fmt):
    y = q.every_number(fmt)
    assert (y[1:] > y[:-1]).all()
    assert torch.equal(y, -y.flip(0))
    nans = {"ieee": 2 * 2**fmt.mantissa, "fn": 2, "none": 0}[fmt.special]
    assert len(y) == 2**fmt.bits - nans - 1  # 0 once
    assert y[-1] == fmt.largest
    assert y[y > 0][0] == fmt.smallest


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_nearest_number_by_brute_force(fmt):
    y = q.every_number(fmt)
    x = torch.rand(2000, generator=torch.Generator().manual_seed(0)) - 0.5
    x = (x * 2.5 * fmt.largest).double()
    found = q.to_float(x, fmt)
    best = (x[:, None] - y).abs().min(1).values
    assert torch.equal((x - found).abs(), best)


@pytest.mark.parametrize("fmt", [*SMALL, q.FLOAT16, q.BFLOAT16], ids=str)
def test_relative_error_of_normal_numbers(fmt):
    x = inputs().double()
    normal = (x.abs() >= 2.0 ** (1 - fmt.bias)) & (x.abs() <= fmt.largest)
    x = x[normal]
    error = (q.to_float(x, fmt) - x).abs() / x.abs()
    assert error.max() <= 2.0 ** -(fmt.mantissa + 1)


@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_fields_are_the_bits_of_a_float(x):
    s, e, m = q.fields(torch.tensor(x), q.FLOAT32)
    [bits] = struct.unpack("<I", struct.pack("<f", x))
    assert (s << 31 | e << 23 | m).item() == bits
    back = q.from_fields(s, e, m, q.FLOAT32)
    assert back == x


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_fields_round_trip(fmt):
    y = q.every_number(fmt)
    assert torch.equal(q.from_fields(*q.fields(y, fmt), fmt), y)


class TestFixed:
    @given(x=st.floats(-100, 100), m=st.integers(0, 8), n=st.integers(0, 20))
    def test_nearest_or_the_end(self, x, m, n):
        t = torch.tensor(x, dtype=torch.float64)
        y = q.to_fixed(t, integer=m, fraction=n).item()
        low, high = -(2.0**m), 2.0**m - 2.0**-n
        assert low <= y <= high
        assert (y * 2**n).is_integer()
        if low <= x <= high:
            assert abs(x - y) <= 2.0 ** -(n + 1)
        else:
            assert y == (low if x < low else high)

    def test_an_absolute_step_where_a_float_has_a_relative_one(self):
        x = torch.tensor([0.01, 100.01])
        fixed = (q.to_fixed(x, integer=7, fraction=8) - x).abs()
        floating = (q.to_float(x, q.BFLOAT16) - x).abs()
        assert fixed.max() <= 2.0**-9
        assert floating[1] > 1e2 * floating[0]

    def test_errors(self):
        with pytest.raises(ValueError, match="integer and fraction must be"):
            q.to_fixed(torch.zeros(1), integer=-1, fraction=4)


class TestErrors:
    def test_formats(self):
        with pytest.raises(ValueError, match="exponent must be 1 to 8"):
            q.FloatFormat(9, 3)
        with pytest.raises(ValueError, match=r'special must be "ieee", "fn"'):
            q.FloatFormat(4, 3, special="nan")

    def test_no_code_for_what_is_too_large(self):
        with pytest.raises(ValueError, match="has no code for what is too"):
            q.to_float(torch.ones(1), q.E2M1, saturate=False)

    def test_no_number_of_the_format(self):
        with pytest.raises(ValueError, match="no number of"):
            q.fields(torch.tensor(0.3), q.E4M3)

    def test_too_many_numbers(self):
        with pytest.raises(ValueError, match=r"2\^32 codes, at most 2\^16"):
            q.every_number(q.FLOAT32)

    def test_saturates(self):
        x = torch.tensor([1e9, -1e9, torch.inf])
        y = q.to_float(x, q.E4M3)
        assert y.tolist() == [448, -448, 448]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_type_and_input_stay(self, dtype):
        x = torch.randn(5, dtype=dtype)
        before = x.clone()
        assert q.to_float(x, q.E2M1).dtype == dtype
        assert torch.equal(x, before)
