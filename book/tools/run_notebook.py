"""Execute notebooks and store their outputs and widget states.

Two runs give the same bytes as long as the cells do: times are left out,
metadata is reduced to what the book reads, and widgets are numbered in the
order of their creation.

    python book/tools/run_notebook.py [NAME | PATH ...]     (default: all)
"""

import base64
import hashlib
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from minicompress import widgets

CHAPTERS = Path(__file__).resolve().parents[2] / "chapters"
WIDGETS = "application/vnd.jupyter.widget-state+json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


class Client(NotebookClient):
    """A notebook client that says which cell it is at."""

    async def async_execute_cell(self, cell, cell_index, **options):
        if sys.stdout.isatty():
            print(f"\r  cell {cell_index + 1}/{len(self.nb.cells)} ", end="")
        return await super().async_execute_cell(cell, cell_index, **options)


def number_widgets(text, state, name):
    """Replace random widget ids by hashes of the order of creation."""
    for i, random_id in enumerate(state):
        stable = hashlib.md5(f"{name}:{i}".encode()).hexdigest()
        text = text.replace(random_id, stable)
    return text


def shrink_pictures(nb):
    """Store the pictures of all outputs with a palette of 64 colors."""
    for cell in nb.cells:
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png")
            if picture:
                raw = base64.b64decode("".join(picture))
                small = widgets.shrink(raw, colors=64)
                output.data["image/png"] = base64.b64encode(small).decode()


def execute(path, timeout=600):
    """Execute one notebook in place; return the number of code cells."""
    nb = nbformat.read(path, as_version=4)
    nb.metadata.pop("widgets", None)
    for i, cell in enumerate(nb.cells):
        if "id" not in cell or cell.id.startswith("None"):
            key = f"{path.name}:{i}:{cell.source}"
            cell["id"] = hashlib.md5(key.encode()).hexdigest()[:8]
        for key in ("execution", "lines_to_next_cell"):
            cell.metadata.pop(key, None)
    client = Client(
        nb,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env={**os.environ, "PYTHONHASHSEED": "0"})
    shrink_pictures(nb)
    sliders = nb.metadata.get("widgets")
    nb.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    )
    if sliders and sliders.get(WIDGETS, {}).get("state"):
        nb.metadata["widgets"] = sliders
        state = sliders[WIDGETS]["state"]
        text = number_widgets(nbformat.writes(nb), state, path.name)
        nb = nbformat.reads(text, as_version=4)  # writing sorts the new ids
    nbformat.validate(nb)
    path.write_text(nbformat.writes(nb) + "\n", encoding="utf8")
    return sum(cell.cell_type == "code" for cell in nb.cells)


def find(names):
    """Return the notebooks named on the command line, or all of them."""
    if not names:
        return sorted(CHAPTERS.glob("*.ipynb"))
    paths = []
    for name in names:
        path = Path(name)
        if not path.exists():
            path = CHAPTERS / f"{Path(name).stem}.ipynb"
        if not path.exists():
            have = ", ".join(p.stem for p in sorted(CHAPTERS.glob("*.ipynb")))
            sys.exit(f"There is no notebook {name}; chapters has: {have}")
        paths.append(path)
    return paths


def main(names):
    failed = 0
    for path in find(names):
        print(path.name, flush=True)
        start = time.perf_counter()
        try:
            cells = execute(path)
        except CellExecutionError as error:
            failed += 1
            print(f"\r  FAILED, the file is left as it was\n{error}")
            continue
        seconds = time.perf_counter() - start
        size = path.stat().st_size / 1000
        print(f"\r  {cells} code cells, {seconds:.1f} s, {size:,.0f} kB")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
