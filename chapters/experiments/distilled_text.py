"""The language model of the zoo, distilled into one of a thirteenth.

The same small model is trained on the text alone and with the teacher's
distributions, for as many steps; on the text alone for as long as the run
with a teacher took; by another divergence; on text that the teacher wrote;
and, after all this, for some more steps on its own writing.
"""

import math
import time
from functools import partial

import _stamp
import torch
from _pruning import Store
from tqdm import tqdm

from minicompress import data, distill, models, train, zoo

SEEDS, STEPS, SIZE, LENGTH = 3, 1500, 8, 128
RATES = (4e-3, 1.2e-2, 2.4e-2)
SMALL = {"width": 40, "layers": 2, "heads": 4, "ff": 160}
WRITTEN = 1024  # passages that the teacher writes
MORE, MORE_LR, PROMPT = 150, 1e-3, 32
JUDGED = 64  # continuations that the teacher judges, 96 characters each


def reverse(z, v, y):
    """As at T = 1 below, but with the other divergence."""
    hard = distill.hinton(z, v, y, alpha=0.0)
    return 0.1 * hard + 0.9 * distill.reverse_kl(z, v)


RUNS = {
    "alone": None,
    "T=1": partial(distill.hinton, temperature=1.0, alpha=0.9),
    "T=2": partial(distill.hinton, temperature=2.0, alpha=0.9),
    "reverse": reverse,
}


def student(config, seed):
    torch.manual_seed(seed)
    return models.LM(**{**config, **SMALL})


def taught(teacher, loss):
    if loss is None:
        return train.cross_entropy
    return distill.taught(teacher, loss)


def evaluate(net, teacher, task):
    """Bits per character: of the test text, and of what the net writes."""
    ids = data.Tokenizer().encode(task.val)
    starts = torch.arange(JUDGED) * (len(ids) // JUDGED)
    prompts = ids[starts[:, None] + torch.arange(PROMPT)]
    texts = distill.continuations(net, prompts, length=LENGTH - PROMPT, seed=0)
    with torch.no_grad():
        own, judged = (
            -distill.log_likelihood(m, texts, prompt=PROMPT).mean().item()
            / ((LENGTH - PROMPT) * math.log(2))
            for m in (net, teacher)
        )
    bits = zoo.quality(net, task)
    rows = {"bits": bits, "own": own, "judged": judged}
    return {name: round(value, 4) for name, value in rows.items()}


def fit(start, feed, loss, seed, lr):
    """Train; return the network and the seconds that it took."""
    begin = time.perf_counter()
    net = train.fit(start, feed, loss, lr=lr, clip=1.0, seed=seed)
    return net, time.perf_counter() - begin


def run(teacher, task, ids, lr, name, seed, steps=STEPS):
    feed = train.passages(ids, length=LENGTH, size=SIZE, steps=steps, seed=seed)
    loss = taught(teacher, RUNS[name])
    net, seconds = fit(student(teacher.config, seed), feed, loss, seed, lr)
    return {**evaluate(net, teacher, task), "seconds": round(seconds, 2)}


def validated(teacher, task, ids, lr):
    """Bits per character of the validation text, trained on text alone."""
    feed = train.passages(ids, length=LENGTH, size=SIZE, steps=STEPS, seed=100)
    start = student(teacher.config, 100)
    net, _ = fit(start, feed, train.cross_entropy, 100, lr)
    return round(zoo.quality(net, task, "val"), 4)


def by_teacher(teacher, task, texts, lr, seed):
    """Learn from what the teacher wrote, and from nothing else."""
    epochs = -(-STEPS * SIZE // len(texts))
    x, y = distill.next_tokens(texts)
    feed = train.batches(x, y, size=SIZE, epochs=epochs, seed=seed)
    net, seconds = fit(
        student(teacher.config, seed), feed, train.cross_entropy, seed, lr
    )
    return {**evaluate(net, teacher, task), "seconds": round(seconds, 2)}


def afterwards(teacher, task, ids, lr, seed):
    """Go on from the student at T = 1: on the text, on its own writing."""
    feed = train.passages(ids, length=LENGTH, size=SIZE, steps=STEPS, seed=seed)
    loss = taught(teacher, RUNS["T=1"])
    net, _ = fit(student(teacher.config, seed), feed, loss, seed, lr)
    more = train.passages(
        ids, length=LENGTH, size=SIZE, steps=MORE, seed=100 + seed
    )
    losses = {
        "then text, forward": distill.on_policy(
            teacher, prompt=1, divergence=distill.forward_kl, fraction=0.0
        ),
        "then text, reverse": distill.on_policy(
            teacher, prompt=1, fraction=0.0
        ),
        "then its own, reverse": distill.on_policy(teacher, prompt=PROMPT),
    }
    found = {}
    for name, loss in losses.items():
        end, seconds = fit(net, more, loss, seed, MORE_LR)
        row = evaluate(end, teacher, task)
        found[name] = {**row, "seconds": round(seconds, 2)}
    return found


def writing(teacher, ids, path):
    """Let the teacher write, each passage after one token of the text."""
    if not path.exists():
        dice = torch.Generator().manual_seed(0)
        at = torch.randint(len(ids), (WRITTEN, 1), generator=dice)
        parts = [
            distill.continuations(teacher, part, length=LENGTH, seed=i)
            for i, part in enumerate(tqdm(ids[at].split(64)))
        ]
        torch.save(torch.cat(parts), path)
    return torch.load(path)


def main():
    store = Store(__file__)
    teacher, task = zoo.load("reference-lm"), zoo.task("reference-lm")
    ids = data.Tokenizer().encode(task.train)
    found = {}

    def keep(name, seed, compute, *args):
        row = store.get(
            f"{name}/{seed}", partial(compute, teacher, task, *args)
        )
        found.setdefault(name, []).append(row)

    tried = {
        lr: store.get(f"lr/{lr}", partial(validated, teacher, task, ids, lr))
        for lr in tqdm(RATES, desc="learning rate")
    }
    lr = min(tried, key=tried.get)
    for name in RUNS:
        for seed in tqdm(range(SEEDS), desc=name):
            keep(name, seed, run, ids, lr, name, seed)
    seconds = {
        name: sum(row["seconds"] for row in found[name])
        for name in ("alone", "T=1")
    }
    longer = round(STEPS * seconds["T=1"] / seconds["alone"])
    for seed in tqdm(range(SEEDS), desc="longer"):
        keep("alone, equal time", seed, run, ids, lr, "alone", seed, longer)
    texts = writing(teacher, ids, store.path.with_suffix(".pt"))
    for seed in tqdm(range(SEEDS), desc="by the teacher"):
        keep("teacher's text", seed, by_teacher, texts, lr, seed)
    for seed in tqdm(range(SEEDS), desc="afterwards"):
        rows = store.get(
            f"afterwards/{seed}",
            partial(afterwards, teacher, task, ids, lr, seed),
        )
        for name, row in rows.items():
            found.setdefault(name, []).append(row)
    _stamp.write(
        __file__,
        {
            "teacher": evaluate(teacher, teacher, task),
            "parameters": sum(
                p.numel() for p in student(teacher.config, 0).parameters()
            ),
            "rates": tried,
            "characters": {"text": len(ids), "written": texts.numel()},
            "steps": {"all": STEPS, "equal time": longer, "then": MORE},
            "runs": found,
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
