"""The language model of the zoo, distilled into one of a seventeenth.

The same small model is trained on the text alone and with the teacher's
distributions, for as many steps; and on the text alone for as long as the
teacher's share of the work took.
"""

import time
from functools import partial

import _stamp
import torch
from _pruning import Store
from tqdm import tqdm

from minicompress import data, distill, models, train, zoo

SEEDS, STEPS, LR = 3, 1500, 4e-3
SMALL = {"width": 40, "layers": 2, "heads": 4, "ff": 160}


def student(config, seed):
    torch.manual_seed(seed)
    return models.LM(**{**config, **SMALL})


def run(teacher, task, how, seed, steps=STEPS):
    """Return bits per character and seconds."""
    ids = data.Tokenizer().encode(task.train)
    feed = train.passages(ids, length=128, size=8, steps=steps, seed=seed)
    loss = train.cross_entropy
    if how is not None:
        temperature, alpha = how
        loss = distill.taught(
            teacher, distill.hinton, temperature=temperature, alpha=alpha
        )
    start = time.perf_counter()
    net = train.fit(
        student(teacher.config, seed), feed, loss, lr=LR, clip=1.0, seed=seed
    )
    seconds = time.perf_counter() - start
    return {"bits": round(zoo.quality(net, task), 4), "seconds": seconds}


def main():
    store = Store(__file__)
    teacher, task = zoo.load("reference-lm"), zoo.task("reference-lm")
    runs = {
        "alone": None,
        "T=1, half": (1.0, 0.5),
        "T=1": (1.0, 0.9),
        "T=2": (2.0, 0.9),
    }
    found = {}
    jobs = [(name, seed) for seed in range(SEEDS) for name in runs]
    for name, seed in tqdm(jobs):
        args = (teacher, task, runs[name], seed)
        row = store.get(f"{name}/{seed}", partial(run, *args))
        found.setdefault(name, []).append(row)
    ratio = sum(r["seconds"] for r in found["T=1"]) / sum(
        r["seconds"] for r in found["alone"]
    )
    longer = round(STEPS * ratio)
    for seed in tqdm(range(SEEDS)):
        args = (teacher, task, None, seed, longer)
        row = store.get(f"longer/{seed}", partial(run, *args))
        found.setdefault("alone, equal time", []).append(row)
    _stamp.write(
        __file__,
        {
            "teacher": zoo.quality(teacher, task),
            "parameters": sum(
                p.numel() for p in student(teacher.config, 0).parameters()
            ),
            "steps": {"all": STEPS, "equal time": longer},
            "runs": found,
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
