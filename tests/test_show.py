"""`show` prints exactly the code that runs."""

import ast
import functools
import inspect
import re
import textwrap

import pytest

from minicompress import claims, plot, show, widgets


def fence(markdown):
    return re.search(r"```+python\n(.*?)```", markdown.data, re.S)[1]


def is_ellipsis(node):
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and node.value.value is ...
    )


def without_docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (
            ast.get_docstring(node) is not None
        ):
            node.body[0] = ast.Expr(ast.Constant(...))
        # `...` stands where a body would be empty; it does nothing elsewhere
        body = getattr(node, "body", None)
        if isinstance(body, list) and len(body) > 1:
            node.body = [n for n in body if not is_ellipsis(n)]
    return ast.dump(tree)


def commented(x):
    """Double.

    ```
    not the end of the block
    ```
    """

    # why: a comment stays where it was
    y = 2 * x  # shape of x

    return y


class Nested:
    """A class."""

    size: int = 3

    def method(self):
        """Return a string that is not a docstring."""
        text = """first
second"""
        return text

    @property
    def only(self):
        """Only a docstring."""


def inline(): "é"; return "``"  # fmt: skip  # noqa: E702


EVERY = [
    function
    for module in (claims, plot, show, widgets)
    for function in vars(module).values()
    if getattr(function, "__module__", None) == module.__name__
    and (inspect.isclass(function) or inspect.isfunction(function))
]


@pytest.mark.parametrize("function", [*EVERY, commented, Nested, inline])
def test_source_is_the_file_minus_docstrings(function):
    text = show.source(function)
    original = textwrap.dedent(inspect.getsource(function))
    compile(text, "shown", "exec")
    assert without_docstrings(ast.parse(text)) == without_docstrings(
        ast.parse(original)
    )
    # nothing is added but the ellipsis where a body would be empty
    lines = {line.strip() for line in original.splitlines()}
    added = {line.strip() for line in text.splitlines()} - lines
    assert all("..." in line for line in added)


def test_comments_and_layout_stay():
    assert show.source(commented) == (
        "def commented(x):\n"
        "    # why: a comment stays where it was\n"
        "    y = 2 * x  # shape of x\n"
        "\n"
        "    return y\n"
    )


def test_shown_code_runs():
    scope = {}
    exec(show.source(commented), scope)
    assert scope["commented"](4) == commented(4) == 8


def test_methods_lose_their_indentation():
    assert show.source(Nested.method).startswith("def method(self):\n    text")


def test_a_body_of_nothing_but_a_docstring_becomes_an_ellipsis():
    assert "    def only(self):\n        ...\n" in show.source(Nested)


def test_show_names_the_function_and_takes_several():
    text = show.show(claims.claim, show.show).data
    assert "<small>`minicompress.claims.claim`</small>" in text
    assert "<small>`minicompress.show.show`</small>" in text
    assert text.count("```python\n") == 2
    assert fence(show.show(claims.claim)) == show.source(claims.claim)


def test_the_fence_outlasts_backticks_in_the_code():
    assert "\n```python\n" in show.show(inline).data
    assert "````python\n" in show.show(fence).data


def test_wrapped_functions_show_what_they_wrap():
    wrapped = functools.lru_cache(commented)
    assert show.source(wrapped) == show.source(commented)
    assert "test_show.commented" in show.show(wrapped).data


@pytest.mark.parametrize("wrong", [len, 3, "show", claims, int])
def test_what_has_no_source_is_refused(wrong):
    with pytest.raises(ValueError, match=r"function must be|no Python source"):
        show.show(wrong)
