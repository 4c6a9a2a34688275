"""Fetch what the pages need in a browser into book/_vendor, through npm.

Without npm, or without a network, nothing is fetched and the pages load
formulas and sliders from a CDN instead.
"""

import shutil
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).resolve().parent
MODULES = TOOLS / "node_modules"
VENDOR = TOOLS.parent / "_vendor"
MANAGER = "@jupyter-widgets/html-manager/dist"
FONTS = "@fontsource-variable/{}/files"

# (folder in node_modules, pattern, folder in book/_vendor)
WANTED = [
    ("requirejs", "require.js", "requirejs"),
    (MANAGER, "embed-amd.js", f"npm/{MANAGER}"),
    (MANAGER, "*.woff2", f"npm/{MANAGER}"),
    # html-manager's style sheet looks for them one folder up
    (MANAGER, "*.woff2", "npm/@jupyter-widgets"),
    ("mathjax/es5", "tex-chtml.js", "mathjax"),
    (
        "mathjax/es5/output/chtml/fonts/woff-v2",
        "*.woff",
        "mathjax/output/chtml/fonts/woff-v2",
    ),
    (
        FONTS.format("source-serif-4"),
        "source-serif-4-latin-wght-*.woff2",
        "fonts",
    ),
    (
        FONTS.format("source-serif-4"),
        "source-serif-4-greek-wght-normal.woff2",
        "fonts",
    ),
    (FONTS.format("inter"), "inter-latin-wght-normal.woff2", "fonts"),
]


def install():
    """Install the locked packages; return what went wrong, or None."""
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not installed"
    print("Fetching formulas, sliders and fonts through npm ...", flush=True)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    command += ["--loglevel=error", "--fetch-retries=1"]
    done = subprocess.run(command, cwd=TOOLS, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).strip().splitlines()
    return "npm failed: " + (lines[0] if lines else "no message")


def copy():
    """Copy the few files the pages load; complain if one is missing."""
    shutil.rmtree(VENDOR, ignore_errors=True)
    for folder, pattern, target in WANTED:
        files = sorted((MODULES / folder).glob(pattern))
        if not files:
            sys.exit(f"vendor: nothing matches {pattern} in {folder}")
        (VENDOR / target).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, VENDOR / target)
    (VENDOR / "ready").touch()


if __name__ == "__main__":
    problem = install()
    if problem:
        print(
            f"{problem}: the pages will load formulas and sliders from a "
            "CDN, so they need a network when they are read."
        )
    else:
        copy()
