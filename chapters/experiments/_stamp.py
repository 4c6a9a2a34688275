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
    """Return the script and the library's modules it uses, sorted."""
    found, todo = set(), [Path(script).resolve()]
    while todo:
        path = todo.pop()
        if path in found:
            continue
        found.add(path)
        for name in _imports(path):
            if name.split(".")[0] == LIBRARY:
                todo += _files(name)
            elif name.startswith("_") and name != "_stamp":
                todo += [
                    s for s in [path.with_name(name + ".py")] if s.exists()
                ]
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
    text = json.dumps({"stamp": stamp, **results}, indent=1)
    path.write_text(text + "\n", encoding="utf8")


def _is_text(node):
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _imports(path):
    """Yield the dotted names that a file may import."""
    package = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = [*package[: -node.level], *base]
            yield ".".join(base)
            yield from (".".join([*base, a.name]) for a in node.names)


def _files(name):
    """Return the files of a module and of the packages around it."""
    parts, files = name.split("."), []
    for n in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:n])
        files += [path / "__init__.py", path.with_suffix(".py")]
    return [path for path in files if path.exists()]
