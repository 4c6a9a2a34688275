"""Show the library's own source in a notebook, without the docstring.

A chapter never repeats an algorithm that the library exports: it shows the
very lines that run.
"""

import ast
import inspect
import re

from IPython.display import Markdown


def show(function, *more) -> Markdown:
    """Display the source of functions or classes, docstrings left out.

    Parameters
    ----------
    function : function or class
        What to show; it must be written in Python.
    *more : function or class
        Further objects, shown below the first.

    Returns
    -------
    Markdown
        For each object a small line with its full name, then a fenced
        block with its source: comments kept, indentation removed,
        otherwise exactly as it stands in the file.

    Raises
    ------
    ValueError
        If an object is neither a function nor a class, or has no Python
        source.

    Examples
    --------
    >>> print(show(show).data.splitlines()[0])
    <small>`minicompress.show.show`</small>
    """
    return Markdown("\n\n".join(_block(x) for x in (function, *more)))


def source(function) -> str:
    """Return the source of a function or class without docstrings.

    Parameters
    ----------
    function : function or class
        What to read; a class loses its methods' docstrings too.

    Returns
    -------
    str
        Dedented source that ends with one newline and still compiles.

    Raises
    ------
    ValueError
        As in `show`.
    """
    if not (inspect.isroutine(function) or inspect.isclass(function)):
        raise ValueError(
            f"function must be a function or a class, got {function!r}"
        )
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError) as error:
        raise ValueError(f"no Python source for {function!r}") from error
    return _dedent(_cut_docstrings(text)).strip("\n") + "\n"


def _block(function) -> str:
    code = source(function)
    bare = inspect.unwrap(function)
    name = f"{bare.__module__}.{bare.__qualname__}"
    # a fence must be longer than any run of backticks that it encloses
    runs = [len(run) for run in re.findall("`+", code)]
    fence = "`" * max([2, *runs], default=2) + "`"
    return f"<small>`{name}`</small>\n\n{fence}python\n{code}{fence}"


def _parse(text: str) -> tuple[ast.Module, int]:
    # a method is indented: an `if` above it makes its source parse as it is
    above = int(text[:1].isspace())
    return ast.parse("if True:\n" * above + text), above


def _cut_docstrings(text: str) -> str:
    tree, above = _parse(text)
    lines = text.splitlines(keepends=True)
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    nodes = [n for n in ast.walk(tree) if isinstance(n, kinds)]
    for node in sorted(nodes, key=lambda n: -n.lineno):
        if ast.get_docstring(node, clean=False) is None:
            continue
        doc = node.body[0]
        first, last = doc.lineno - 1 - above, doc.end_lineno - above
        # column offsets count UTF-8 bytes
        head = lines[first].encode()[: doc.col_offset].decode()
        tail = lines[last - 1].encode()[doc.end_col_offset :].decode()
        if len(node.body) == 1 or head.strip() or tail.strip():
            lines[first:last] = [f"{head}...{tail}"]
            continue
        while not lines[last].strip():
            last += 1
        del lines[first:last]
    return "".join(lines)


def _dedent(text: str) -> str:
    # textwrap.dedent would change, and be stopped by, strings of many lines
    tree, above = _parse(text)
    strings = [
        n for n in ast.walk(tree) if isinstance(n, ast.Constant | ast.JoinedStr)
    ]
    inside = {
        line - above
        for n in strings
        for line in range(n.lineno + 1, n.end_lineno + 1)
    }
    margin = text[: len(text) - len(text.lstrip())]
    lines = text.splitlines(keepends=True)
    return "".join(
        line if i in inside else line.removeprefix(margin)
        for i, line in enumerate(lines, 1)
    )
