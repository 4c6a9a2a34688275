"""Write a network or a checkpoint as a smaller file."""

import math
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from .. import data, pipeline, quantize, storage, train, zoo
from ..codes import State
from ..pipeline.choices import Metric
from ..pipeline.coding import Coder
from .inspection import aligned, described, sized, verify
from .sources import free, length, opened, placed

STEPS, SIZE = 600, 64  # of the trainings of the recipe deep; samples
SPARSITY, BITS = 0.75, 4
SAMPLE = 1000  # inputs from which a budget learns what a recipe costs


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
        a name of the zoo, a .mc file, a .safetensors checkpoint, or the
        folder of a published model of the BERT or GPT-2 family.
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
    output = output or Path(f"{Path(source).absolute().stem}-{done}.mc")
    free(output, force)
    path, model = opened(source)
    model, state = made(source, model, recipe, budget, slow)
    with placed(output, force) as part:
        storage.save(part, model, state)
        verify(part)
    before, after = length(path), length(output)
    return "\n".join(
        (
            *aligned(changes(model, state)),
            f"{path.name}: {before:,} bytes",
            f"{output}: {after:,} bytes, {before / after:.1f} times smaller",
            *qualities(source, (path, output)),
        )
    )


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
        how = {"length": model.config["context"], "size": 16}
        # a step with so many tokens takes as long as some with pictures
        feed = train.passages(ids, steps=max(1, STEPS // 4), **how)
    else:
        X, y = task.train
        epochs = math.ceil(STEPS * SIZE / len(X))
        feed = train.batches(X, y, size=SIZE, epochs=epochs)
        model = quantize.fold_norms(model, X[:2])
    fit = pipeline.finetuning(feed, teacher=model, progress=True)
    how = {"sparsity": SPARSITY, "bits": BITS, "coders": coders}
    with train.threads(1):  # small networks
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
    with train.threads(1):
        old, new = (zoo.quality(storage.load(path), task) for path in paths)
    form = ".2%" if metric == "accuracy" else ".3f"
    return [f"{metric} on the test split {old:{form}}, now {new:{form}}"]


def recipes() -> str:
    """List what `compress` can do, and to what."""
    rows = [("recipe", "what it does", "arXiv")]
    rows += [(n, r.what, r.paper) for n, r in pipeline.RECIPES.items()]
    rows.append(("deep", "prune, cluster, code; trains", "1510.00149"))
    names = ", ".join(zoo.names())
    return "\n".join((*aligned(rows), f"networks of the zoo: {names}"))
