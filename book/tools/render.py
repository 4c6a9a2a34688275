"""Build the site into book/_build/html from the stored outputs.

    python book/tools/render.py [--strict]

With --strict a warning is an error, and every page is built afresh.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "book"
HTML = OUT / "_build" / "html"
HINTS = ("WARNING", "ERROR", "Error", "Exception")


def build(strict=False):
    """Build the site; return the tool's exit status and its messages."""
    if strict:
        shutil.rmtree(OUT / "_build", ignore_errors=True)
    tool = Path(sys.executable).with_name("jupyter-book")
    command = [tool, "build", "."]
    command += ["--toc", "book/_toc.yml", "--path-output", "book", "--quiet"]
    command += ["-W", "--keep-going"] if strict else []
    done = subprocess.run(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    root = (HTML / "book" / "intro.html").exists()
    return (done.returncode if root else done.returncode or 1), done.stdout


def main(strict):
    start = time.perf_counter()
    print("Building the book ...", flush=True)
    status, messages = build(strict)
    lines = messages.strip().splitlines()
    remarks = [s for s in lines if any(hint in s for hint in HINTS)]
    print("\n".join(lines if status else remarks))
    pages = len(list(HTML.rglob("*.html")))
    print(f"{pages} pages in {time.perf_counter() - start:.1f} s")
    if status:
        print("The build FAILED.")
        return status
    (HTML / ".built").touch()
    if not (OUT / "_vendor" / "ready").exists():
        print("Formulas and sliders come from a CDN: reading needs a network.")
    return status


if __name__ == "__main__":
    sys.exit(main("--strict" in sys.argv[1:]))
