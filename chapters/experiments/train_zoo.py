"""Train the networks of the zoo and write them into the package.

    python chapters/experiments/train_zoo.py              those that lack
    python chapters/experiments/train_zoo.py digits-mlp   this one, anew

Ctrl-C is harmless: the same command goes on from where it stopped.  A few
settings were tried and compared on the validation splits.  The language model
keeps AdamW because it is usual: Muon (Jordan 2024) did slightly better.
"""

import argparse
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from minicompress import data, models, storage, train, zoo

SCRATCH = Path(__file__).parents[2] / "build" / "zoo"
SEED = 0
DIGITS = ("digits", {})
GLYPHS = ("glyphs", {"n": 12_000, "difficulty": 1.0, "seed": 0})
REFERENCE = ("reference", {})


@dataclass(frozen=True)
class Entry:
    """What to train, on what, and how."""

    task: tuple[str, dict]
    build: type[nn.Module]
    config: dict
    lr: float
    size: int  # rows in a batch
    epochs: int = 0
    steps: int = 0  # instead of epochs, for text
    adamw: dict = field(default_factory=lambda: {"weight_decay": 0.05})


ENTRIES = {
    "digits-mlp": Entry(DIGITS, models.MLP, {}, 3e-3, 32, 60),
    "digits-cnn": Entry(
        DIGITS, models.CNN, {"channels": (16, 32, 64)}, 3e-3, 32, 30
    ),
    "glyphs-mlp": Entry(
        GLYPHS, models.MLP, {"widths": (784, 300, 100, 36)}, 1e-3, 64, 20
    ),
    "glyphs-cnn": Entry(
        GLYPHS,
        models.CNN,
        {"channels": (16, 32, 64, 128), "classes": 36},
        3e-3,
        64,
        15,
    ),
    "reference-lm": Entry(
        REFERENCE,
        models.LM,
        {
            "vocab": data.Tokenizer().size,
            "width": 128,
            "layers": 3,
            "heads": 4,
            "ff": 512,
            "context": 128,
        },
        3e-3,
        8,
        steps=5000,
        adamw={"weight_decay": 0.1, "betas": (0.9, 0.99)},
    ),
}


def feed(entry: Entry, task) -> train.Batches:
    """Cut the training split of a task into batches."""
    if entry.steps:
        return train.passages(
            data.Tokenizer().encode(task.train),
            length=entry.config["context"],
            size=entry.size,
            steps=entry.steps,
            seed=SEED,
        )
    return train.batches(
        *task.train, size=entry.size, epochs=entry.epochs, seed=SEED
    )


def make(name: str) -> tuple[nn.Module, dict]:
    """Train one network; return it with its card."""
    entry = ENTRIES[name]
    maker, arguments = entry.task
    task = getattr(data, maker)(**arguments)
    torch.manual_seed(SEED)
    batches = feed(entry, task)
    model = train.fit(
        entry.build(**entry.config),
        batches,
        lr=entry.lr,
        optimizer=partial(torch.optim.AdamW, **entry.adamw),
        clip=1.0,
        seed=SEED,
        progress=True,
        checkpoint=SCRATCH / f"{name}.pt",
    )
    card = {
        "task": [maker, arguments],
        "split": "test",
        "value": zoo.quality(model, task),
        "val": zoo.quality(model, task, "val"),
        "seed": SEED,
        "steps": len(batches),
        "torch": torch.__version__,
    }
    if isinstance(task, data.Reference):
        card |= {"metric": "bits per character", "n": len(task.test) - 1}
        card["text"] = task.hash
    else:
        card |= {"metric": "accuracy", "n": len(task.test[1])}
    return model, card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=str([*ENTRIES])
    )
    names = parser.parse_args().names
    for name in names:
        if name not in ENTRIES:
            parser.error(f"no {name!r}, only {[*ENTRIES]}")
    SCRATCH.mkdir(parents=True, exist_ok=True)
    with train.threads(1):
        for name in names or [n for n in ENTRIES if n not in zoo.names()]:
            print(name)
            model, card = make(name)
            size = storage.save(zoo.FOLDER / f"{name}.mc", model, meta=card)
            (SCRATCH / f"{name}.pt").unlink()
            print(f"  {card['metric']} {card['value']:.4f}, {size:,} bytes")


if __name__ == "__main__":
    main()
