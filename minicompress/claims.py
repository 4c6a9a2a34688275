"""Sentences that are checked when the book is built, and answers to check.

A claim is a sentence with a tick: the cell fails if it stops being true.
"""

import html
import math
import re

import numpy as np
from IPython.display import display

MIME = "application/vnd.minicompress.claim+json"

VERDICTS = ("measured", "reproduced", "relation only", "does not hold here")


class ClaimError(AssertionError):
    """A sentence of the book is not true on this machine."""


def claim(
    statement: str,
    holds: bool,
    *,
    measured: float | str | None = None,
    paper: float | str | None = None,
    source: str | None = None,
    verdict: str | None = None,
) -> None:
    """Display a sentence with a tick, or raise if it does not hold.

    The sentence is the same on every run, so notebooks can be compared.
    What was measured may differ from run to run: it travels in the output
    under the MIME type `MIME`, from which the page of claims is collected.

    Parameters
    ----------
    statement : str
        The sentence, in plain words; `backticks` mark code.
    holds : bool
        Whether it is true: one boolean, never an array or a string.
    measured, paper : float or str, optional
        Our value and the paper's, with unit if given as text.
    source : str, optional
        Key of the paper in the bibliography; needed with `paper` and with
        every verdict except "measured".
    verdict : str, optional
        One of `VERDICTS`.  Default: "measured" without a `paper` value,
        "relation only" with one; "reproduced" has to be said.

    Raises
    ------
    ClaimError
        If `holds` is false.
    ValueError
        If an argument is not of the kind described.

    Examples
    --------
    >>> claim("two and two make five", 2 + 2 == 5, measured=4)
    Traceback (most recent call last):
        ...
    minicompress.claims.ClaimError: "two and two make five" (measured 4)
    """
    if not isinstance(statement, str) or not statement.strip():
        raise ValueError(f"statement must be a sentence, got {statement!r}")
    truth = _boolean(holds)
    measured = _value("measured", measured)
    paper = _value("paper", paper)
    if verdict is None:
        verdict = "measured" if paper is None else "relation only"
    _check_verdict(verdict, paper, source)
    if not truth:
        said = "" if paper is None else f", paper {paper}"
        raise ClaimError(f'"{statement}" (measured {measured}{said})')
    data = {
        "claim": statement,
        "holds": truth,
        "verdict": verdict,
        "measured": measured,
        "paper": paper,
        "source": source,
    }
    bundle = {
        "text/plain": f"✓ {statement}",
        "text/html": _html(statement, verdict),
        MIME: data,
    }
    display(bundle, raw=True)


def right(answer, expected, *, tol: float = 0.0) -> bool:
    """Tell whether an exercise's answer is right.

    Parameters
    ----------
    answer : object
        A number, text, boolean, sequence, array or tensor; any object if
        `expected` is a function.
    expected : object or callable
        The right answer, or a function that takes the answer and returns
        whether it is right.
    tol : float
        Largest absolute difference allowed between numbers.

    Returns
    -------
    bool
        Also False if the answer has another type or shape.

    Examples
    --------
    >>> right(0.3334, 1 / 3, tol=1e-3), right("8", 8)
    (True, False)
    """
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}")
    if answer is ...:
        return False
    if callable(expected):
        return _boolean(expected(answer))
    try:
        a, b = np.asarray(answer), np.asarray(expected)
    except ValueError:  # ragged
        return False
    numbers = "iuf"
    if a.shape != b.shape:
        return False
    if a.dtype.kind in numbers and b.dtype.kind in numbers:
        gap = np.abs(a.astype(float) - b.astype(float))
        return bool((gap <= tol).all())
    if a.dtype.kind != b.dtype.kind:
        return False
    return bool((a == b).all())


def check(answer, expected, *, tol: float = 0.0, hint: str = "") -> None:
    """Print whether an exercise's answer is right, with a hint if not.

    An answer that is still `...` is asked for, and a wrong one raises
    nothing, so that the notebook runs to its end without the reader.

    Parameters
    ----------
    answer, expected, tol
        As in `right`.
    hint : str
        Shown with a wrong answer.

    Examples
    --------
    >>> check(..., 8)
    Fill in your answer, then run this cell again.
    >>> check(7, 8, hint="one byte has more bits")
    ✗ Not yet: one byte has more bits
    >>> check(8, 8)
    ✓ Right.
    """
    if answer is ...:
        print("Fill in your answer, then run this cell again.")
        return
    try:
        ok = right(answer, expected, tol=tol)
    except Exception as error:  # the reader's own function may raise anything
        if not callable(expected):
            raise
        print(f"✗ Your answer raised {type(error).__name__}: {error}")
        return
    if ok:
        print("✓ Right.")
    else:
        print(f"✗ Not yet: {hint}" if hint else "✗ Not yet.")


def _boolean(x) -> bool:
    # numpy and torch scalars are booleans too; `bool(x)` would also accept
    # "no" and a one-element array
    if getattr(x, "ndim", None) == 0 and hasattr(x, "item"):
        x = x.item()
    if not isinstance(x, bool):
        raise ValueError(
            f"holds must be one boolean, got {type(x).__name__}: {x!r}"
        )
    return x


def _value(name: str, x):
    if getattr(x, "ndim", None) == 0 and hasattr(x, "item"):
        x = x.item()
    plain = x is None or isinstance(x, str | int | float)
    if not plain or (isinstance(x, float) and not math.isfinite(x)):
        raise ValueError(f"{name} must be a finite number or text, got {x!r}")
    return x


def _check_verdict(verdict: str, paper, source) -> None:
    if verdict not in VERDICTS:
        raise ValueError(f"verdict must be one of {VERDICTS}, got {verdict!r}")
    if verdict == "measured" and paper is not None:
        raise ValueError(
            'verdict "measured" says nothing about the paper value '
            f"{paper!r}: choose one of {VERDICTS[1:]}"
        )
    needs = paper is not None or verdict != "measured"
    if needs and not (isinstance(source, str) and source):
        raise ValueError(
            f"source must name a bibliography entry when paper={paper!r} "
            f"and verdict={verdict!r}, got {source!r}"
        )


def _html(statement: str, verdict: str) -> str:
    text = re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(statement))
    note = (
        ""
        if verdict == "measured"
        else f' <span class="mc-verdict">({verdict})</span>'
    )
    return (
        '<p class="mc-claim"><span class="mc-tick" role="img" '
        f'aria-label="Checked:">✓</span> {text}{note}</p>'
    )
