"""Claims fail when they are false, and only booleans count as true."""

import json

import numpy as np
import pytest
import torch

from minicompress import claims
from minicompress.claims import ClaimError, check, claim, right


@pytest.fixture
def shown(monkeypatch):
    outputs = []
    monkeypatch.setattr(
        claims, "display", lambda data, raw: outputs.append((data, raw))
    )
    return outputs


def test_a_true_claim_shows_one_line_and_its_data(shown):
    claim(
        "pruning saves 9×",
        True,
        measured=np.float32(8.5),
        paper="9×",
        source="han2016deep",
        verdict="reproduced",
    )
    [(bundle, raw)] = shown
    assert raw
    assert bundle["text/plain"] == "✓ pruning saves 9×"
    assert json.loads(json.dumps(bundle[claims.MIME])) == {
        "claim": "pruning saves 9×",
        "holds": True,
        "verdict": "reproduced",
        "measured": 8.5,
        "paper": "9×",
        "source": "han2016deep",
    }
    assert "pruning saves 9×" in bundle["text/html"]
    assert "(reproduced)" in bundle["text/html"]


def test_what_is_compared_does_not_depend_on_what_was_measured(shown):
    for measured in (1.25, "7 ms", None, torch.tensor(3)):
        claim("it is fast", True, measured=measured)
    compared = {
        tuple(v for k, v in bundle.items() if k != claims.MIME)
        for bundle, _ in shown
    }
    assert len(compared) == 1
    values = [bundle[claims.MIME]["measured"] for bundle, _ in shown]
    assert values == [1.25, "7 ms", None, 3]


def test_html_is_escaped_and_backticks_are_code(shown):
    claim("`a < b` & c", True)
    html = shown[0][0]["text/html"]
    assert "<code>a &lt; b</code> &amp; c" in html
    assert html.startswith('<p class="mc-claim">')
    assert 'role="img" aria-label="Checked:"' in html


def test_a_false_claim_raises_with_the_value_and_shows_nothing(shown):
    with pytest.raises(ClaimError, match=r"it is small.*measured 12, paper 3"):
        claim("it is small", False, measured=12, paper=3, source="a1")
    assert issubclass(ClaimError, AssertionError)
    assert shown == []


TRUE = [True, np.bool_(True), torch.tensor(True), np.array(3) > 2]


@pytest.mark.parametrize("holds", TRUE)
def test_boolean_scalars_hold(holds, shown):
    claim("yes", holds)
    assert shown[0][0][claims.MIME]["holds"] is True
    with pytest.raises(ClaimError):
        claim("no", ~holds if holds is not True else False)


VAGUE = [1, "no", "", None, [True], np.array([True]), torch.ones(2) > 0, 1.0]


@pytest.mark.parametrize("holds", VAGUE)
def test_nothing_else_passes_as_true(holds, shown):
    with pytest.raises(ValueError, match="holds must be one boolean"):
        claim("no", holds)
    assert shown == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"verdict": "confirmed"}, "verdict must be one of"),
        ({"paper": 40}, "source must name"),
        ({"paper": 40, "source": ""}, "source must name"),
        ({"verdict": "reproduced"}, "source must name"),
        ({"paper": 4, "source": "a", "verdict": "measured"}, "says nothing"),
        ({"measured": float("nan")}, "measured must be"),
        ({"measured": [1, 2]}, "measured must be"),
        ({"paper": np.zeros(2), "source": "a"}, "paper must be"),
    ],
)
def test_bad_arguments_are_named(arguments, message, shown):
    with pytest.raises(ValueError, match=message):
        claim("so", True, **arguments)
    assert shown == []


@pytest.mark.parametrize("statement", ["", "  ", None, 3])
def test_a_claim_needs_a_sentence(statement):
    with pytest.raises(ValueError, match="statement must be"):
        claim(statement, True)


def test_default_verdicts_never_claim_too_much(shown):
    claim("ours", True)
    claim("theirs", True, paper=1, source="a")
    verdicts = [bundle[claims.MIME]["verdict"] for bundle, _ in shown]
    assert verdicts == ["measured", "relation only"]


@pytest.mark.parametrize(
    ("answer", "expected", "tol", "good"),
    [
        (8, 8, 0, True),
        (8.0, 8, 0, True),
        (7, 8, 0, False),
        (0.3333, 1 / 3, 1e-3, True),
        (0.3333, 1 / 3, 0, False),
        (float("nan"), 1.0, 10, False),
        (torch.tensor(8), 8, 0, True),
        (torch.tensor([1, 2]), [1, 2], 0, True),
        ([1, 2, 3], [1, 2], 0, False),
        (8, [8, 8], 0, False),
        ([[1], [1, 2]], [1, 2], 0, False),
        (2**53 + 1, 2**53, 0, True),  # numbers are compared as float64
        (True, 1, 0, False),
        ("8", 8, 0, False),
        ("int8", "int8", 0, True),
        ("int4", "int8", 0, False),
        ([True, False], torch.tensor([True, False]), 0, True),
        (None, 8, 0, False),
        (..., 8, 1e9, False),
        (6, lambda a: a % 2 == 0, 0, True),
        (lambda x: 2 * x, lambda f: f(2) == 4, 0, True),
        (lambda x: x, lambda f: f(2) == 4, 0, False),
    ],
)
def test_right(answer, expected, tol, good):
    assert right(answer, expected, tol=tol) is good


def test_right_refuses_a_negative_tolerance():
    with pytest.raises(ValueError, match="tol must be at least 0"):
        right(1, 1, tol=-1)


def test_check_speaks_and_never_raises_for_the_reader(capsys):
    check(..., 8, hint="count the biases")
    check(7, 8, hint="count the biases")
    check(7, 8)
    check(8, 8)
    check(lambda x: 1 / 0, lambda f: f(1) == 1)
    assert capsys.readouterr().out.splitlines() == [
        "Fill in your answer, then run this cell again.",
        "✗ Not yet: count the biases",
        "✗ Not yet.",
        "✓ Right.",
        "✗ Your answer raised ZeroDivisionError: division by zero",
    ]
    with pytest.raises(ValueError, match="tol"):
        check(1, 1, tol=float("nan"))
