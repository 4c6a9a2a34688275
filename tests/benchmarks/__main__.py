"""Run the benchmarks: ``python -m tests.benchmarks [NAME ...]``."""

import importlib
import sys
from pathlib import Path

from .harness import Row

WORD = {True: "yes", False: "MISSED", None: "SKIPPED"}


def cells(row: Row) -> tuple[str, str, str, str]:
    if row.met is None:
        return row.what, row.peer, row.goal, WORD[None]
    against = f" against {row.peer}" if row.peer else ""
    factor = f"{row.ratio:.3g}x " if row.ratio is not None else ""
    measured = f"{factor}({row.ours}{against})" if factor else row.ours
    return row.what, measured, row.goal, WORD[row.met]


def main(names: list[str]) -> int:
    folder = Path(__file__).parent
    known = sorted(f.stem[6:] for f in folder.glob("bench_*.py"))
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are {known}")
        return 2
    rows = []
    print("what | measured | goal | met")
    for name in names or known:
        module = importlib.import_module(f"{__package__}.bench_{name}")
        for row in module.rows():
            rows.append(row)
            print(" | ".join(cells(row)), flush=True)
    missed = [row.what for row in rows if row.met is False]
    left_out = [row.what for row in rows if row.met is None]
    met = len(rows) - len(missed) - len(left_out)
    print(f"\n{met} goals met, {len(missed)} missed, {len(left_out)} skipped")
    for title, some in (("MISSED", missed), ("SKIPPED", left_out)):
        for what in some:
            print(f"{title}: {what}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
