"""Re-run the experiments whose results are stale.

python book/tools/experiments.py [NAME ...]     (named ones always run)
"""

import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "chapters" / "experiments"
sys.path.insert(0, str(FOLDER))

import _stamp  # noqa: E402


def main(names):
    everything = sorted(FOLDER.glob("[!_]*.py"))
    scripts = [s for s in everything if "_stamp" in s.read_text("utf8")]
    unknown = set(names) - {s.stem for s in scripts}
    if unknown:
        sys.exit(f"No such experiment: {', '.join(sorted(unknown))}")
    wanted = [s for s in scripts if s.stem in names or not names]
    run = [s for s in wanted if names or _stamp.stale(s)]
    print(f"{len(run)} of {len(wanted)} experiments to run", flush=True)
    failed = 0
    for i, script in enumerate(run):
        print(f"[{i + 1}/{len(run)}] {script.stem}", flush=True)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, script], cwd=FOLDER)
        failed += done.returncode != 0
        word = "FAILED after" if done.returncode else "done in"
        print(f"  {word} {time.perf_counter() - start:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
