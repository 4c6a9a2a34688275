"""Which module is a docstring from?  A task for language encoders."""

import ast
import re
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Written in Python, on every platform, with many docstrings each
MODULES = (
    "ast",
    "calendar",
    "codecs",
    "collections",
    "configparser",
    "contextlib",
    "difflib",
    "doctest",
    "enum",
    "functools",
    "imaplib",
    "inspect",
    "ipaddress",
    "logging",
    "mailbox",
    "pathlib",
    "pdb",
    "random",
    "shutil",
    "smtplib",
    "statistics",
    "tarfile",
    "threading",
    "traceback",
    "typing",
    "unittest.case",
    "zipfile",
)
SHORTEST = 40  # characters


@dataclass(frozen=True, eq=False)
class Docstrings:
    """Hold docstrings and the modules that they are from.

    Parameters
    ----------
    texts : tuple of str
        One docstring each, without any of the modules' names.
    labels : Tensor of shape (n,)
        int64, index into `names`.
    names : tuple of str
        The modules.
    """

    texts: tuple[str, ...]
    labels: Tensor
    names: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Docstrings({len(self.texts)} from {len(self.names)} modules)"


def docstrings() -> Docstrings:
    """Collect the docstrings of 27 modules of the standard library.

    Of every class and function in their source, methods, submodules and
    private ones included, if the docstring has at least 40 characters.  (The
    imported modules would give a little less: some packages replace functions
    in them.)  The names of the modules are blotted out everywhere, since they
    would give the answer away; a docstring that occurs in two modules is
    dropped, and one that occurs twice in a module is kept once.  About 1,550
    docstrings, by module and then as in the source; which ones depends on the
    Python release.  `few` draws a training set with a few labels per class.

    The texts are by the Python Software Foundation (PSF License).

    Returns
    -------
    Docstrings
        ``texts``, ``labels`` and ``names``.

    Raises
    ------
    RuntimeError
        If this Python comes without the source of its library.

    Examples
    --------
    >>> docstrings().names[:4]
    ('ast', 'calendar', 'codecs', 'collections')
    """
    names = tuple(module.split(".")[0] for module in MODULES)
    blot = re.compile(rf"(?<![a-z0-9])({'|'.join(names)})(?![a-z0-9])", re.I)
    found = []
    for module in MODULES:
        texts = (blot.sub("", text) for text in _documented(module))
        tidy = (" ".join(text.split()) for text in texts)
        # a dict keeps the order and drops what it already has
        found.append(dict.fromkeys(t for t in tidy if len(t) >= SHORTEST))
    modules = Counter(text for texts in found for text in texts)
    rows = [
        (text, label)
        for label, texts in enumerate(found)
        for text in texts
        if modules[text] == 1
    ]
    texts, labels = zip(*rows, strict=True)
    return Docstrings(texts, torch.tensor(labels), names)


def _documented(module: str) -> list[str]:
    """List the docstrings in the source of a module, in their order."""
    base = Path(sysconfig.get_path("stdlib"), *module.split("."))
    files = sorted(base.rglob("*.py")) or [base.with_suffix(".py")]
    try:
        trees = [ast.parse(file.read_text("utf-8")) for file in files]
    except OSError as error:
        raise RuntimeError(
            "docstrings() reads the source of the standard library, which this"
            f" Python comes without: {error}"
        ) from error
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = (node for tree in trees for node in ast.walk(tree))
    texts = (ast.get_docstring(n) for n in nodes if isinstance(n, kinds))
    return [text for text in texts if text]
