"""What the table of contents lists, and what it does not."""

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
TOC = ROOT / "book" / "_toc.yml"


def pages():
    """Return the document names of the table of contents, in order."""
    toc = yaml.safe_load(TOC.read_text(encoding="utf8"))
    names = [toc["root"]]

    def walk(entries):
        for entry in entries:
            names.append(entry["file"])
            walk(entry.get("sections", []))

    for part in toc["parts"]:
        walk(part["chapters"])
    return names


def chapters():
    """Return the notebooks that the book contains."""
    paths = [ROOT / f"{name}.ipynb" for name in pages()]
    return [path for path in paths if path.exists()]


def unfinished():
    """Return the notebooks that are not in the book yet."""
    everything = set((ROOT / "chapters").glob("*.ipynb"))
    return sorted(everything - set(chapters()))
