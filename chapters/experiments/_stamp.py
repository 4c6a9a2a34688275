"""Say which code a stored result was computed with.

A script of this folder ends with ``write(__file__, {...})``; its results
are stale once the script, or a module of the library or of this folder that
it uses, has changed in more than comments, docstrings and blank lines.
"""

import ast
import hashlib
import io
import json
import platform
import re
import time
import tokenize
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "chapters" / "results"
LIBRARY = "minicompress"
START = time.perf_counter()


def bare(source):
    """Return source code without comments, docstrings and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            for row in range(body[0].lineno - 1, body[0].end_lineno):
                lines[row] = ""
    return "\n".join(s.rstrip() for s in lines if s.strip())


def dependencies(script):
    """Return the script and the modules it uses, sorted.

    Of a package only those count that define a name which is used: a
    function that is added to the library changes no earlier result.
    """
    found, todo = set(), [Path(script).resolve()]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += _uses(path)
    return sorted(found)


def code_hash(script):
    """Return a hash of all code that the script depends on."""
    digest = hashlib.sha256()
    for path in dependencies(script):
        name = path.relative_to(ROOT).as_posix()
        text = bare(path.read_text(encoding="utf8"))
        digest.update(f"{name}\n{text}\n".encode())
    return digest.hexdigest()[:16]


def stale(script):
    """Tell whether the script's results are missing or out of date."""
    path = RESULTS / f"{Path(script).stem}.json"
    if not path.exists():
        return True
    stamp = json.loads(path.read_text(encoding="utf8")).get("stamp", {})
    return stamp.get("code") != code_hash(script)


def write(script, results):
    """Store results (a dict) beside what is needed to repeat them."""
    stamp = {
        "code": code_hash(script),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy")},
        "seconds": round(time.perf_counter() - START),
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{Path(script).stem}.json"
    text = compact(json.dumps({"stamp": stamp, **results}, indent=1))
    path.write_text(text + "\n", encoding="utf8")


def compact(text, width=80):
    """Put lists of numbers, and lists of those, into one line if they fit."""

    def joined(match):
        line = re.sub(r"\s+", " ", match[0])
        line = line.replace("[ ", "[").replace(" ]", "]")
        return line if len(line) <= width else match[0]

    numbers = r"\[[^][{}\"]*\]"
    for lists in (numbers, rf"\[(?:{numbers}|[^][{{}}\"])*\]"):
        text = re.sub(lists, joined, text)
    return text


def _is_text(node):
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _uses(path):
    """Return the files that define what a file imports."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    packages, files = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                files |= _whole(_locate(alias.name))
        elif isinstance(node, ast.ImportFrom):
            base = _locate(node.module or "", path, node.level)
            for alias in node.names:
                inner = _inside(base, alias.name)
                if inner and inner.name == "__init__.py":
                    packages[alias.asname or alias.name] = inner
                else:
                    files |= {inner} if inner else _home(base, alias.name)
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    dotted = {
        id(node.value): node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
    }
    for name in names:
        if name.id in packages:
            package, attribute = packages[name.id], dotted.get(id(name))
            # handed on as a whole, getattr(package, name): all of it counts
            files |= _home(package, attribute) if attribute else _whole(package)
    return files


def _locate(dotted, path=None, level=0):
    """Return the file of a module, ours or beside the script, or None."""
    parts = dotted.split(".") if dotted else []
    if level:
        start = path.parents[level - 1]
    elif parts and parts[0] == LIBRARY:
        start = ROOT
    else:  # beside the script; what is not there is not ours
        start = Path(__file__).parent
    found = _file(start.joinpath(*parts))
    return None if found == Path(__file__) else found


def _file(stem):
    for path in (stem / "__init__.py", stem.with_suffix(".py")):
        if path.exists():
            return path
    return None


def _inside(package, name):
    """Return the file of a submodule, or None."""
    if package is None or package.name != "__init__.py":
        return None
    return _file(package.parent / name)


def _home(module, name):
    """Return the files that define a name of a module: none, or one."""
    if module is None:
        return set()
    if module.name != "__init__.py":
        return {module}
    tree = ast.parse(module.read_text(encoding="utf8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    base = _locate(node.module or "", module, node.level)
                    inner = _inside(base, alias.name)
                    return {inner} if inner else _home(base, alias.name)
    inner = _inside(module, name)
    return {inner or module}


def _whole(module):
    """Return the files of a module, or of everything in a package."""
    if module is None:
        return set()
    package = module.name == "__init__.py"
    return set(module.parent.rglob("*.py")) if package else {module}
