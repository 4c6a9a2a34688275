"""What the command line does: list, check, compress, export, score.

A function per command, from paths to the text that is printed; `__main__`
reads the words of the command line and turns errors into exit statuses.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor, nn

from . import (
    codes,
    data,
    entropy,
    export,
    pipeline,
    quantize,
    storage,
    train,
    zoo,
)
from .codes import Code, State
from .pipeline.choices import Metric
from .pipeline.coding import Coder
from .zoo.checkpoint import read_safetensors

STEPS, SIZE = 600, 64  # of the trainings of the recipe deep; samples
SPARSITY, BITS = 0.75, 4
SAMPLE = 1000  # inputs from which a budget learns what a recipe costs


def info(path: Path) -> str:
    """Describe a file: its model, and a row for each of its tensors.

    Bytes are those in the file.  "At best" are the bytes if each list of
    integers were coded by itself, by frequency alone and without a table of
    frequencies: the bound of `entropy.bound`.  A `Contextual` can be shorter.
    """
    file, size = storage.read(path), path.stat().st_size
    name, config = file.model or ("a model that is described nowhere", {})
    sizes = ", ".join(f"{key}={value}" for key, value in config.items())
    rows = [("tensor", "shape", "code", "bytes", "bits each", "at best")]
    first, total, numbers = {}, 0, 0
    for key, x in file.state.items():
        if id(x) in first:
            rows.append((key, "", f"is {first[id(x)]}", "", "", ""))
            continue
        first[id(x)] = key
        n, held = math.prod(x.shape), storage.payload(x)
        total, numbers = total + held, numbers + n
        rows.append(
            (
                key,
                sized(x),
                described(x),
                f"{held:,}",
                f"{8 * held / n:.2f}" if n else "",
                f"{at_best(x):,.0f}",
            )
        )
    return "\n".join(
        (
            f"{path}: {size:,} bytes",
            f"{name}({sizes})" if file.model else name,
            *aligned(rows),
            f"tensors {total:,} bytes, header and checksum {size - total:,}",
            f"{numbers:,} numbers, {8 * size / max(1, numbers):.2f} bits each "
            "with all of the file",
        )
    )


def verify(path: Path) -> str:
    """Decode a file whole, and write its tensors again: the same bytes.

    Raises
    ------
    StorageError
        If the file is damaged, or the model it names cannot be built.
    ValueError
        If a decoded number is not finite, or what is written differs.
    """
    data, file = path.read_bytes(), storage.read(path)
    tensors = codes.decode(file.state)
    for name, t in tensors.items():
        if not torch.isfinite(t).all():
            raise ValueError(f"{name} holds numbers that are not finite")
    if file.model is None:
        return f"{path}: {len(tensors)} tensors decode; no model is named"
    model = storage.loads(data)
    parts = model, file.state
    how = {"meta": file.meta or None}
    again = (storage.dumps(*parts, compact=c, **how) for c in (False, True))
    if data not in again:
        raise ValueError("written again, it is another file")
    return f"{path}: {file.model[0]}, {len(data):,} bytes, comes back whole"


def compress(
    source: str,
    *,
    recipe: str | None = None,
    budget: int | None = None,
    slow: bool = False,
    output: Path | None = None,
    force: bool = False,
) -> str:
    """Write a network or a checkpoint as a smaller file, and check the file.

    Parameters
    ----------
    source
        a name of the zoo, a .mc file, or a .safetensors checkpoint.
    recipe, budget
        one of `pipeline.RECIPES` or "deep", or bytes that the file may have.
    slow
        whether to try context models too: fewer bytes, and some seconds for
        a thousand weights.
    output
        the file; by default SOURCE-RECIPE.mc in the current folder.
    force
        whether to overwrite a file.

    Returns
    -------
    str
        What became of each tensor, of the file and of the quality.

    Raises
    ------
    OSError, ValueError
        If there is no such source or it is damaged, a file is in the way, or
        the recipe cannot be followed.
    """
    done = recipe or f"{budget}"
    output = output or Path(f"{Path(source).stem}-{done}.mc")
    free(output, force)
    path, model = opened(source)
    model, state = made(source, model, recipe, budget, slow)
    with placed(output, force) as part:
        storage.save(part, model, state)
        verify(part)
    before, after = path.stat().st_size, output.stat().st_size
    return "\n".join(
        (
            *aligned(changes(model, state)),
            f"{path.name}: {before:,} bytes",
            f"{output}: {after:,} bytes, {before / after:.1f} times smaller",
            *qualities(source, (path, output)),
        )
    )


def opened(source: str) -> tuple[Path, nn.Module]:
    """Find the file of a source, and the model or the tensors in it."""
    if source in zoo.names():
        return zoo.path(source), zoo.load(source)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"neither a file nor in the zoo, which has {', '.join(zoo.names())}"
        )
    if path.suffix == ".safetensors":
        return path, as_module(read_safetensors(path))
    file = storage.read(path)
    if file.model is None:
        return path, as_module(codes.decode(file.state))
    return path, storage.load(path)


def as_module(tensors: State) -> nn.Module:
    """Make a module of named tensors: a checkpoint without its model.

    Parameters
    ----------
    tensors
        {name: Tensor}, as of `state_dict`; one under two names stays one.

    Returns
    -------
    nn.Module
        Cannot run, but has this `state_dict`.

    Examples
    --------
    >>> sorted(as_module({"a.weight": torch.ones(2)}).state_dict())
    ['a.weight']
    """
    made = {id(t): nn.Parameter(t, False) for t in tensors.values()}
    root = nn.Module()
    for name, t in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:  # a checkpoint may use names that setattr refuses
            module = module._modules.setdefault(part, nn.Module())
        module._parameters[last] = made[id(t)]
    return root


def made(
    source: str,
    model: nn.Module,
    recipe: str | None,
    budget: int | None,
    slow: bool,
) -> tuple[nn.Module, State]:
    """Compress a model as asked."""
    known = source in zoo.names()
    coders = pipeline.SLOW if slow else pipeline.FAST
    if recipe == "deep":
        if not known:
            raise ValueError("the recipe deep trains: on the zoo's data only")
        return deep(model, zoo.task(source), coders)
    how = {"coders": coders, "progress": True}
    if budget is None:
        return model, pipeline.written(model, recipe, **how)
    metric = loss_on(zoo.task(source)) if known else None
    plan = pipeline.mixed(model, budget=budget, metric=metric, **how)
    return model, plan.state


def deep(
    model: nn.Module,
    task: data.Task | data.Reference,
    coders: Sequence[Coder],
) -> tuple[nn.Module, State]:
    """Prune and cluster a network, with its own outputs as teacher."""
    if isinstance(task, data.Reference):
        ids = data.Tokenizer().encode(task.train)
        context = model.config["context"]
        feed = train.passages(ids, length=context, size=16, steps=STEPS)
    else:
        X, y = task.train
        epochs = math.ceil(STEPS * SIZE / len(X))
        feed = train.batches(X, y, size=SIZE, epochs=epochs)
        model = quantize.fold_norms(model, X[:2])
    fit = pipeline.finetuning(feed, teacher=model, progress=True)
    how = {"sparsity": SPARSITY, "bits": BITS, "coders": coders}
    *_, last = pipeline.deep_compression(model, fit, steps=len(feed), **how)
    return last.model, last.state


def loss_on(task: data.Task | data.Reference) -> Metric:
    """Make a function that measures the loss on a few training samples."""
    if isinstance(task, data.Reference):
        ids = data.Tokenizer().encode(task.train[: 8 * SAMPLE])
        return lambda model: train.bits_per_char(model, ids)
    some = tuple(t[:SAMPLE] for t in task.train)

    def loss(model: nn.Module) -> float:
        with train.evaluating(model):
            return train.cross_entropy(model, some).item()

    return loss


def free(path: Path, force: bool) -> None:
    """Say early what would keep a file from being written."""
    if path.exists() and not force:
        raise ValueError(f"{path} exists; --force overwrites it")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such folder")


@contextmanager
def placed(path: Path, force: bool) -> Iterator[Path]:
    """Lend a name to write to; what is there becomes the file at the end.

    Whatever goes wrong before that, Ctrl-C too, nothing is left behind.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield part
        free(path, force)  # it may have come since the work began
        part.replace(path)
    finally:
        for left in (part, part.with_name(f"{part.name}.part")):
            left.unlink(missing_ok=True)


def changes(model: nn.Module, state: State) -> list[tuple[str, ...]]:
    """List what each tensor took and takes; tied ones once."""
    before = model.state_dict()
    rows, seen = [("tensor", "shape", "code", "before", "after")], set()
    for key, x in state.items():
        if id(x) not in seen:
            seen.add(id(x))
            was = f"{before[key].nbytes:,}" if key in before else "–"
            now = f"{storage.payload(x):,}"
            rows.append((key, sized(x), described(x), was, now))
    return rows


def qualities(source: str, paths: Sequence[Path]) -> list[str]:
    """Measure a network of the zoo, and what became of it."""
    if source not in zoo.names():
        return []
    metric = zoo.card(source)["metric"]
    try:
        task = zoo.task(source)
    except ImportError as error:
        return [f"{metric} is not measured: {error}"]
    old, new = (zoo.quality(storage.load(path), task) for path in paths)
    form = ".2%" if metric == "accuracy" else ".3f"
    return [f"{metric} on the test split {old:{form}}, now {new:{form}}"]


def exported(path: Path, *, output: Path, force: bool = False) -> str:
    """Write the decoded tensors of a file for other programs.

    Parameters
    ----------
    path
        a .mc file.
    output
        ends in .safetensors, or in .pt for `torch.load`.
    force
        whether to overwrite a file.
    """
    writers: dict[str, Callable] = {
        ".safetensors": export.to_safetensors,
        ".pt": export.to_state_dict,
    }
    if output.suffix not in writers:
        raise ValueError(f"{output} should end in {' or '.join(writers)}")
    free(output, force)
    _, model = opened(str(path))
    with placed(output, force) as part:
        size = writers[output.suffix](part, model)
    return f"{output}: {size:,} bytes"


def recipes() -> str:
    """List what `compress` can do, and to what."""
    rows = [("recipe", "what it does", "arXiv")]
    rows += [(n, r.what, r.paper) for n, r in pipeline.RECIPES.items()]
    rows.append(("deep", "prune, cluster, code; trains", "1510.00149"))
    names = ", ".join(zoo.names())
    return "\n".join((*aligned(rows), f"networks of the zoo: {names}"))


def sized(x: Tensor | Code) -> str:
    """Write a shape.

    Examples
    --------
    >>> sized(torch.zeros(3, 4))
    '3×4'
    """
    return "×".join(map(str, x.shape))


def described(x: Tensor | Code) -> str:
    """Name a code and, in brackets, the codes inside of it."""
    if isinstance(x, Tensor):
        return str(x.dtype).removeprefix("torch.")
    name, bits = type(x).__name__, getattr(x, "bits", None)
    if bits is not None:  # integers; what else is in it is a table
        return f"{name}({bits} bits)"
    inside = (getattr(x, f.name) for f in fields(x))
    named = [described(y) for y in inside if isinstance(y, Code)]
    return f"{name}({', '.join(named)})" if named else name


def at_best(x: Tensor | Code) -> float:
    """Give the bytes of a code if its integers were at their bound."""
    if isinstance(x, Tensor):
        return storage.payload(x)
    if hasattr(x, "bits"):
        return entropy.bound(x) / 8
    inside = (getattr(x, f.name) for f in fields(x))
    return sum(at_best(y) for y in inside if isinstance(y, Tensor | Code))


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Set words to the left and numbers, from the fourth column, right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, ("<<<>>>")[: len(row)], strict=True)
        lines.append("  ".join(f"{c:{a}{w}}" for c, w, a in cells).rstrip())
    return lines
