"""A model as a folder of files: each block one, each table several."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import codes, models, storage
from ..codes import Code
from .lazy import filled, read

Table = Callable[[str, Tensor], "Tensor | Code"]
CARD = "model.json"


def assembled(
    folder: str | os.PathLike, model: nn.Module | None = None
) -> nn.Module:
    """Put together the model that `streamed` compressed.

    Parameters
    ----------
    folder : path
        What `streamed` returned.
    model : nn.Module, optional
        The same as for `streamed`; models from `minicompress.models` need
        none.

    Returns
    -------
    nn.Module
        In evaluation mode, its weights decoded: this one takes the memory
        of the whole model.

    Raises
    ------
    ValueError
        If a part is missing, or the model is needed and not given.
    """
    card = json.loads((Path(folder) / CARD).read_text("utf8"))
    if model is None and card["model"] is None:
        raise ValueError("model: needed, it is not from minicompress.models")
    if model is None:
        with torch.device("meta"):
            model = models.build(*card["model"])
    found: dict[str, dict[int, Tensor]] = {}
    for name, start, code in parts(folder):
        found.setdefault(name, {})[start] = codes.value(code)
    whole = {}
    for name, some in found.items():
        rows = [some[start] for start in sorted(some)]
        whole[name] = torch.cat(rows) if len(rows) > 1 else rows[0]
    return filled(model, whole).eval()


def parts(
    folder: str | os.PathLike,
) -> Iterator[tuple[str, int, "Tensor | Code"]]:
    """Read what `streamed` wrote, file by file, not decoded.

    Parameters
    ----------
    folder : path
        What `streamed` returned.

    Yields
    ------
    name, start, code : str, int, Tensor or Code
        A tensor of the model, or of a table its rows from number `start`.
    """
    for path in sorted(Path(folder).glob("*.mc")):
        file = storage.read(path)
        for name, code in file.state.items():
            if "inside" in file.meta:
                yield file.meta["inside"] + name, 0, code
            else:
                yield file.meta["name"], file.meta["start"], code


def card(folder: Path, model: nn.Module, blocks: str, rows: int) -> None:
    """Write whose parts are in the folder, or see that they are the same."""
    owner: dict[int, str] = {}
    for name, t in own(model).items():
        number = name.removeprefix(f"{blocks}.").split(".")[0]
        part = number if name.startswith(f"{blocks}.") else "outside"
        if owner.setdefault(id(t), part) != part:
            raise ValueError(f"blocks: {name} is shared with another block")
    kind, known = type(model).__name__, None
    if models.MODELS.get(kind) is type(model):
        known = [kind, model.config]
    shapes = {n: list(t.shape) for n, t in model.state_dict().items()}
    card = {"model": known, "blocks": blocks, "rows": rows, "shapes": shapes}
    text = json.dumps(card)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / CARD
    if not path.exists():
        path.write_text(text, "utf8")
    if path.read_text("utf8") != text:
        raise ValueError(f"folder: {folder} holds parts of another model")


def write_outside(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    folder: Path,
    blocks: str,
    tables: Table,
    rows: int,
) -> None:
    """Write what lies outside of the blocks, matrices by some rows."""
    done = set()
    for name, like in own(model).items():
        if name.startswith(f"{blocks}.") or id(like) in done:
            continue
        done.add(id(like))
        for start in range(0, len(like), rows) if like.ndim > 1 else [0]:
            path = folder / f"{name}.{start}.mc"
            if path.exists():
                continue
            if like.ndim > 1:
                ids = torch.arange(start, min(start + rows, len(like)))
                w = read(tensors, name, like, ids)
                part = tables(name, w)
            else:
                part = w = read(tensors, name, like)
            only = nn.Module()
            only.w = nn.Parameter(w, requires_grad=False)
            meta = {"name": name, "start": start}
            storage.save(path, only, {"w": part}, meta=meta)


class Outside:
    """What `write_outside` wrote, each part decoded when it is needed."""

    def __init__(self, folder: Path):
        card = json.loads((folder / CARD).read_text("utf8"))
        self.folder, self.step = folder, card["rows"]
        self.shapes = card["shapes"]

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        starts = range(0, shape[0], self.step) if len(shape) > 1 else [0]
        some = [self._part(name, start) for start in starts]
        return torch.cat(some) if len(some) > 1 else some[0]

    def _part(self, name: str, start: int) -> Tensor:
        file = storage.read(self.folder / f"{name}.{start}.mc")
        return codes.value(file.state["w"])

    def shape(self, name: str) -> list[int]:
        return self.shapes[name]

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """Collect some rows, from one part after the other."""
        out, first = None, ids // self.step * self.step
        for start in first.unique().tolist():
            part, here = self._part(name, start), first == start
            if out is None:
                out = part.new_empty(*ids.shape, *part.shape[1:])
            out[here] = part[ids[here] - start]
        return out


def own(module: nn.Module) -> dict[str, Tensor]:
    return module.state_dict(keep_vars=True)  # the tensors themselves: ties
