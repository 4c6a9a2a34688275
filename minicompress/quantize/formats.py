"""What a number looks like in a few bits: floating point and fixed point.

A floating-point number is a sign, an exponent and a mantissa: a constant
*relative* step, over a range that the exponent sets.  A fixed-point number
is an integer and an agreed unit: a constant *absolute* step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format with one sign bit.

    Parameters
    ----------
    exponent, mantissa
        bits of each.
    special
        what the largest exponent is for: "ieee" keeps it for infinity and
        nan; "fn" (finite and nan) gives up one code for nan and has no
        infinity, as FP8 E4M3; "none" uses every code for a number, as the
        four- and six-bit formats.

    References
    ----------
    IEEE 754-2019, section 3.
    Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433.
    Rouhani et al., Microscaling Data Formats, arXiv:2310.10537.

    Examples
    --------
    >>> FloatFormat(4, 3, special="fn").largest
    448.0
    """

    exponent: int
    mantissa: int
    special: str = "ieee"

    def __post_init__(self):
        if not (1 <= self.exponent <= 8 and 0 <= self.mantissa <= 23):
            raise ValueError(
                "exponent must be 1 to 8 and mantissa 0 to 23, got "
                f"{self.exponent} and {self.mantissa}"
            )
        if self.special not in ("ieee", "fn", "none"):
            raise ValueError(
                f'special must be "ieee", "fn" or "none", got {self.special!r}'
            )

    @property
    def bits(self) -> int:
        """Bits of a number, with its sign."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is subtracted from a stored exponent."""
        return 2 ** (self.exponent - 1) - 1

    @property
    def largest(self) -> float:
        """The largest finite number."""
        top = 2**self.exponent - 1 - (self.special == "ieee") - self.bias
        # the mantissa of ones is nan where there is no other code for it
        steps = 2 ** (self.mantissa + 1) - 1 - (self.special == "fn")
        return steps * 2.0 ** (top - self.mantissa)

    @property
    def smallest(self) -> float:
        """The smallest number above 0, which is subnormal."""
        return 2.0 ** (1 - self.bias - self.mantissa)


FLOAT32 = FloatFormat(8, 23)
FLOAT16 = FloatFormat(5, 10)
BFLOAT16 = FloatFormat(8, 7)
E4M3 = FloatFormat(4, 3, special="fn")
E5M2 = FloatFormat(5, 2)
E3M2 = FloatFormat(3, 2, special="none")
E2M3 = FloatFormat(2, 3, special="none")
E2M1 = FloatFormat(2, 1, special="none")


def to_float(x: Tensor, fmt: FloatFormat, *, saturate: bool = True) -> Tensor:
    """Round to the nearest number of a format, ties to the even mantissa.

    Parameters
    ----------
    x
        any shape, floating point.
    fmt
        the format.
    saturate
        whether what is too large becomes the largest number; otherwise it
        becomes infinity or nan, whichever the format has.

    Returns
    -------
    as x, in its own type: the numbers are those of the format, the storage
    is not.

    Raises
    ------
    ValueError
        If the format has neither infinity nor nan and must saturate.

    Examples
    --------
    >>> to_float(torch.tensor([0.3, 5.1, -100.0]), E2M1)
    tensor([ 0.5000,  6.0000, -6.0000])
    """
    if fmt.special == "none" and not saturate:
        raise ValueError(f"saturate: {fmt} has no code for what is too large")
    y = x.detach().double()
    _, e = y.frexp()  # y = m 2^e with m from 1/2 to 1
    step = torch.ldexp(
        torch.ones_like(y), (e - 1).clamp(min=1 - fmt.bias) - fmt.mantissa
    )
    y = torch.round(y / step) * step  # ties to even
    over = y.abs() > fmt.largest
    if saturate:
        y = torch.where(over, y.sign() * fmt.largest, y)
    else:
        beyond = torch.inf if fmt.special == "ieee" else torch.nan
        y = torch.where(over, y.sign() * beyond, y)
    return y.to(x.dtype)


def fields(x: Tensor, fmt: FloatFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Take numbers of a format apart: sign, stored exponent, mantissa.

    Parameters
    ----------
    x
        any shape, finite numbers of the format (as from `to_float`).
    fmt
        the format.

    Returns
    -------
    Three int64 tensors shaped as x; `from_fields` puts them together.

    Raises
    ------
    ValueError
        If some x is no number of the format.

    Examples
    --------
    >>> [t.item() for t in fields(torch.tensor(-0.15625), FLOAT32)]
    [1, 124, 2097152]
    """
    y = x.detach().double()
    if not torch.equal(to_float(y, fmt), y):
        raise ValueError(f"x holds what is no number of {fmt}")
    _, e = y.frexp()
    normal = (e - 1 >= 1 - fmt.bias) & (y != 0)
    stored = torch.where(normal, e - 1 + fmt.bias, 0).long()
    unit = (e - 1).clamp(min=1 - fmt.bias) - fmt.mantissa
    steps = torch.ldexp(y.abs(), -unit).long()  # with the leading 1
    mantissa = steps - normal.long() * 2**fmt.mantissa
    return y.signbit().long(), stored, mantissa


def from_fields(
    sign: Tensor, exponent: Tensor, mantissa: Tensor, fmt: FloatFormat
) -> Tensor:
    """Put sign, stored exponent and mantissa together.

    A stored exponent of 0 means a subnormal number, without the leading 1::

        (-1)^s 2^(1 - bias) 0.m        exponent 0
        (-1)^s 2^(e - bias) 1.m        otherwise

    Parameters
    ----------
    sign, exponent, mantissa
        integer tensors of one shape.
    fmt
        the format.

    Returns
    -------
    float64 tensor; infinity and nan where the format has them.

    References
    ----------
    IEEE 754-2019, section 3.4.

    Examples
    --------
    >>> from_fields(*map(torch.tensor, (0, 15, 6)), E4M3)
    tensor(448., dtype=torch.float64)
    """
    top, ones = 2**fmt.exponent - 1, 2**fmt.mantissa - 1
    lead = (exponent > 0).long() * 2**fmt.mantissa
    unit = exponent.clamp(min=1) - fmt.bias - fmt.mantissa
    y = torch.ldexp((lead + mantissa).double(), unit)
    if fmt.special == "ieee":
        y = torch.where(exponent == top, torch.inf, y)
        y = torch.where((exponent == top) & (mantissa > 0), torch.nan, y)
    elif fmt.special == "fn":
        y = torch.where((exponent == top) & (mantissa == ones), torch.nan, y)
    return torch.where(sign > 0, -y, y)


def every_number(fmt: FloatFormat) -> Tensor:
    """List all finite numbers of a format, in order; 0 once.

    Examples
    --------
    >>> every_number(E2M1)[-8:]
    tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 3.0000, 4.0000, 6.0000],
           dtype=torch.float64)
    """
    if fmt.bits > 16:
        raise ValueError(f"fmt: {fmt} has 2^{fmt.bits} codes, at most 2^16")
    codes = torch.arange(2 ** (fmt.bits - 1))
    y = from_fields(
        torch.zeros_like(codes),
        codes >> fmt.mantissa,
        codes % 2**fmt.mantissa,
        fmt,
    )
    y = y[y.isfinite()].sort().values
    return torch.cat([-y.flip(0)[:-1], y])


def to_fixed(x: Tensor, *, integer: int, fraction: int) -> Tensor:
    """Round to fixed point Qm.n: multiples of 2^-n, with a sign.

    Parameters
    ----------
    x
        any shape, floating point.
    integer, fraction
        bits m before and n after the point; with the sign 1 + m + n in all.

    Returns
    -------
    as x; from -2^m to 2^m - 2^-n, what is outside becomes the nearest end.

    Examples
    --------
    >>> to_fixed(torch.tensor([0.3, -9.0, 3.99]), integer=2, fraction=2)
    tensor([ 0.2500, -4.0000,  3.7500])
    """
    if min(integer, fraction) < 0 or integer + fraction > 52:
        raise ValueError(
            "integer and fraction must be at least 0 and at most 52 together, "
            f"got {integer} and {fraction}"
        )
    q = torch.round(x.detach().double() * 2.0**fraction)
    limit = 2 ** (integer + fraction)
    return (q.clamp(-limit, limit - 1) / 2.0**fraction).to(x.dtype)
