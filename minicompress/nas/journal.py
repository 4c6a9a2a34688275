"""The log of a search: nothing that was evaluated is evaluated again."""

import json
import os
from pathlib import Path

Loss = float | tuple[float, ...]


class Journal:
    """What has been evaluated, in memory and, if there is one, in a file.

    The first line of the file says which search it belongs to, each further
    one holds an evaluation, in the order in which they ended.  A line is
    written at once and by one call, so that a killed search can tear only
    the last one, which is dropped when the file is opened again.

    Parameters
    ----------
    path
        of the file, made if it is missing, with its folders; None: memory
        only.
    header
        dict for JSON: what has to agree for the log to be this search's.

    Attributes
    ----------
    known
        {`key`: (loss, seconds)}.
    elapsed
        seconds that the search had lasted when the last line was written,
        earlier sessions included.

    Raises
    ------
    ValueError
        If the log is another search's, or a line before the last is damaged.
    """

    def __init__(self, path: str | os.PathLike | None, header: dict):
        self.known: dict[str, tuple[Loss, float]] = {}
        self.elapsed = 0.0
        self.path = Path(os.devnull if path is None else path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # unbuffered: what was written survives the death of this process
        self.file = self.path.open("a+b", buffering=0)
        try:
            if path is not None:
                self._read(header)
        except BaseException:
            self.file.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(
        self, task: tuple, loss: Loss, seconds: float, elapsed: float
    ) -> None:
        """Keep one evaluation."""
        self.known[key(task)] = loss, seconds
        line = {"task": task, "loss": loss, "seconds": round(seconds, 6)}
        self._append({**line, "elapsed": round(elapsed, 6)})

    def _append(self, line: dict) -> None:
        self.file.write(json.dumps(line).encode() + b"\n")

    def _read(self, header: dict) -> None:
        self.file.seek(0)
        whole, newline, _ = self.file.read().rpartition(b"\n")
        self.file.truncate(len(whole) + len(newline))
        header = json.loads(json.dumps(header))  # tuples become lists
        if not newline:
            return self._append(header)
        first, *lines = whole.split(b"\n")
        self._compare(self._parse(first, 1), header)
        for number, line in enumerate(lines, 2):
            self._keep(self._parse(line, number), number)

    def _parse(self, line: bytes, number: int) -> dict:
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"log: line {number} of {self.path} is damaged")
        return found

    def _compare(self, there: dict, here: dict) -> None:
        for name in [*there, *here]:
            a, b = (d.get(name, "missing") for d in (there, here))
            if a != b:
                raise ValueError(
                    f"log: {self.path} belongs to another search: "
                    f"{name} is {a!r} there and {b!r} here"
                )

    def _keep(self, line: dict, number: int) -> None:
        try:
            loss, seconds = line["loss"], float(line["seconds"])
            several = isinstance(loss, list)
            loss = tuple(map(float, loss)) if several else float(loss)
            self.known[key(line["task"])] = loss, seconds
            self.elapsed = float(line["elapsed"])
        except (KeyError, TypeError, ValueError):
            where = f"line {number} of {self.path}"
            raise ValueError(f"log: {where} is no evaluation") from None


def key(task: tuple) -> str:
    """Name a task: an architecture, perhaps with a resource."""
    return json.dumps(task, sort_keys=True)
