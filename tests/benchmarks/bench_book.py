"""How long the book takes: the site, and every notebook of it.

These are absolute goals for a machine with two slow cores.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .harness import Row, skipped

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "book" / "tools"


def rows():
    if not Path(sys.executable).with_name("jupyter-book").exists():
        yield skipped("site, from nothing", "<= 60 s", "no jupyter-book")
        return
    yield site_row()
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        yield notebook_row(path)


def site_row():
    """Build the whole site, warnings as errors."""
    seconds = run(TOOLS / "render.py", "--strict")
    return row("site, from nothing", seconds, 60)


def notebook_row(path):
    """Execute a copy of one notebook."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copy(path, folder)
        seconds = run(TOOLS / "run_notebook.py", copy)
    return row(f"notebook {path.stem}", seconds, 90)


def run(script, *arguments):
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, script, *arguments],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - start


def row(what, seconds, limit):
    return Row(
        what,
        f"{seconds:.1f} s",
        "",
        seconds / limit,
        f"<= {limit} s",
        seconds <= limit,
    )
