"""Run every test of the project, part by part, and time the parts.

python book/tools/check.py [units] [notebooks] [book]     (default: all)
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import contents
import render

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("units", "notebooks", "book")
WORKERS = str(min(4, os.cpu_count() or 1))
KINDS = ("passed", "failed", "skipped")
rows = []  # (name, counts, seconds)


def headline(text):
    print(f"\n{f' {text} ':=^79}", flush=True)


def pytest(name, *arguments, limit=1500, **environment):
    """Run pytest in a process of its own and record its counts."""
    headline(name)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *arguments]
        command += [f"--junitxml={report}"]
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            print(f"stopped: more than {limit} s", flush=True)
            status = 1
        counts = read_counts(report)
    if status and not counts["failed"]:
        counts["failed"] = 1  # it did not get as far as a test
    rows.append((name, counts, time.perf_counter() - start))


def read_counts(report):
    """Return how many tests of a JUnit report ended in which way."""
    counts = dict.fromkeys(KINDS, 0)
    if not report.exists():
        return counts
    for case in xml.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts["failed"] += 1
        elif "skipped" in kinds:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return counts


def units():
    pytest(
        "units, laws, doctests",
        "tests",
        "minicompress",
        "--ignore=tests/test_book.py",
        f"-n{WORKERS}",
        "--dist=loadfile",
        "--durations=8",
        OMP_NUM_THREADS="1",
    )


def notebooks():
    for path in contents.chapters():
        pytest(
            f"notebook {path.stem}",
            "--nbval",
            str(path.relative_to(ROOT)),
            "--nbval-current-env",
            "--nbval-cell-timeout=300",
            "--nbval-sanitize-with=tests/sanitize.cfg",
            "-ptests.conftest",
            limit=900,
            PYTHONHASHSEED="0",
        )
    for path in contents.unfinished():
        print(f"{path.stem} is not in the table of contents: not run")


def book():
    headline("the book, warnings are errors")
    start = time.perf_counter()
    status = render.main(strict=True)
    counts = {**dict.fromkeys(KINDS, 0), "failed" if status else "passed": 1}
    rows.append(("book build", counts, time.perf_counter() - start))
    if not status:
        pytest("pages and browser", "tests/test_book.py", "-rs")


def table(seconds):
    """Print the parts and their times; return the number of failures."""
    headline("parts")
    total = dict.fromkeys(KINDS, 0)
    for name, counts, time_taken in rows:
        said = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
        print(f"{name:32} {said:32} {time_taken:9.1f} s")
        for kind in KINDS:
            total[kind] += counts[kind]
    said = ", ".join(f"{n} {kind}" for kind, n in total.items() if n)
    minutes, rest = divmod(round(seconds), 60)
    headline(f"{said} in {seconds:.2f}s ({minutes}:{rest:02} min)")
    return total["failed"]


def main(parts):
    unknown = set(parts) - set(PARTS)
    if unknown:
        sys.exit(f"No such part: {', '.join(unknown)}; parts: {PARTS}")
    start = time.perf_counter()
    for part in parts or PARTS:
        globals()[part]()
    return 1 if table(time.perf_counter() - start) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
