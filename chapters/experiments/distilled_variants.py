"""The relatives of distillation on digits, with 50 labels and with 1,000.

Same students, steps, digits and seeds as in `distilled_digits`.  The weights
between the terms are the papers' own or the plainest ones; none was tuned.
Each relative has the control beside it that its gain must be held against:
an ensemble of generations an ensemble of strangers, a teacher that knows all
labels a teacher with no more labels than its student, patience with a
teacher patience without.
"""

from functools import cache, partial

import _stamp
import torch
import torch.nn.functional as F
from _digits import (
    SEEDS,
    STEPS,
    chosen,
    fit,
    lessons,
    score,
    shaken,
    soft,
    students,
)
from _lessons import dkd, flattened, hard
from _pruning import Store
from torch import nn
from tqdm import tqdm

from minicompress import distill, models, train

LABELS = (50, 1000)
TINY = 4  # hidden units of a student far below its teacher
PATIENT = 4  # times as many steps


def outputs(nets, parts):
    """Let each network answer on its own part: lessons for the next ones."""
    return [
        (x, y, distill.teacher_logits(net, x))
        for net, (x, y, *_) in zip(nets, parts, strict=True)
    ]


@distill.cached
def trusting(z, v, y):
    """Believe the teacher as far as it is sure."""
    alpha = 1 - distill.entropy_weight(v)
    return distill.hinton(z, v, y, temperature=4.0, alpha=alpha)


class Weighed(nn.Module):
    """A student with a learned weight for each of two losses."""

    def __init__(self, net):
        super().__init__()
        self.net, self.log_var = net, nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.net(x), self.log_var


def weighed(model, batch):
    x, y, v = batch
    z, log_var = model(x)
    losses = [F.cross_entropy(z, y), 16 * distill.kl(z, v, 4.0)]
    return distill.uncertainty(losses, log_var)


class Pair(nn.Module):
    """Two students side by side."""

    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = a, b

    def forward(self, x):
        return self.a(x), self.b(x)


def together(pair, batch):
    return sum(distill.mutual(pair(batch[0]), batch[1]))


def mutual(parts):
    pairs = map(Pair, students(), students(first=1000))
    return [pair.a for pair in fit(parts, together, list(pairs))]


def annealed(parts, tau=10):
    """Half of the steps for growing targets, half for the labels."""
    nets, steps = students(), STEPS // 2 // tau
    for t in range(tau, 0, -1):
        loss = distill.cached(distill.annealed, t=t, tau_max=tau)
        constant = {"schedule": train.constant}
        nets = fit(parts, loss, nets, steps=steps, **constant)
    return fit(parts, hard, nets, steps=STEPS - STEPS // 2)


def generations(parts, n=3):
    """Train generation after generation; return all of them."""
    nets = [fit(parts, hard, students(first=1000))]
    for g in range(1, n):
        lessons = outputs(nets[-1], parts)
        starts = students(first=1000 * (g + 1))
        nets.append(fit(lessons, soft(1.0, alpha=0.5), starts))
    return nets


def strangers(parts, n=3):
    return [fit(parts, hard, students(first=1000 * (g + 1))) for g in range(n)]


def joined(nets):
    return [distill.ensemble(some) for some in zip(*nets, strict=True)]


def assisted(parts, hidden):
    """Teach an assistant of 64 and 32 units, who then teaches the student."""
    torch.manual_seed(7)
    middle = [models.MLP() for _ in range(SEEDS)]
    assistants = fit(parts, soft(4.0), middle)
    return fit(outputs(assistants, parts), soft(4.0), students(hidden))


def equals(parts):
    """Learn from a larger network that has seen the same digits only."""
    torch.manual_seed(8)
    large = [models.MLP(widths=(64, 256, 256, 10)) for _ in range(SEEDS)]
    return fit(outputs(fit(parts, hard, large), parts), soft(4.0))


def patient(parts, T, master=None):
    """Train for longer; with a teacher also on digits that are shaken.

    Teacher and student then see the same shaken digits.
    """
    dice, steps = torch.Generator().manual_seed(1), PATIENT * STEPS
    if master is None and T is None:
        return fit(parts, hard, steps=steps)
    if master is None:
        return fit(parts, soft(T), steps=steps)
    moved = []
    for x, y, *_ in parts:
        copies = [shaken(x, dice) for _ in range(max(1, 10000 // len(x)))]
        big = torch.cat([x, *copies])
        moved.append((big, y.repeat(len(copies) + 1)))
    if T is None:
        return fit(moved, hard, steps=steps)
    lessons = outputs([master] * SEEDS, moved)
    return fit(lessons, soft(T), steps=steps)


def main():
    store = Store(__file__)
    master, X, y, V = lessons(store.path.with_suffix(".pt"))
    found = {}
    for n in LABELS:
        parts = [(X[i], y[i], V[i]) for i in chosen(y, n)]
        ages = cache(partial(generations, parts))  # trained once, used twice
        jobs = {
            "hard": partial(fit, parts, hard),
            "T=4": partial(fit, parts, soft(4.0)),
            "flattened": partial(fit, parts, distill.cached(flattened)),
            "DKD": partial(fit, parts, distill.cached(dkd)),
            "trust by entropy": partial(fit, parts, trusting),
            "weights learned": lambda parts=parts: [
                model.net
                for model in fit(parts, weighed, [*map(Weighed, students())])
            ],
            "annealed": partial(annealed, parts),
            "mutual": partial(mutual, parts),
            "born again": lambda ages=ages: ages()[-1],
            "generations joined": lambda ages=ages: joined(ages()),
            "strangers joined": lambda parts=parts: joined(strangers(parts)),
            "assistant": partial(assisted, parts, 16),
            "tiny, hard": partial(fit, parts, hard, students(TINY)),
            "tiny, T=4": partial(fit, parts, soft(4.0), students(TINY)),
            "tiny, assistant": partial(assisted, parts, TINY),
            "equal teacher": partial(equals, parts),
            "patient, hard": partial(patient, parts, None),
            "patient, T=4": partial(patient, parts, 4.0),
            "patient, shaken, hard": partial(patient, parts, None, master),
            "patient, shaken, T=4": partial(patient, parts, 4.0, master),
        }
        for name, job in tqdm(jobs.items(), desc=f"{n} labels"):
            found[f"{n}/{name}"] = store.get(
                f"{n}/{name}", lambda job=job: score(job())
            )
    _stamp.write(__file__, {"teacher": score([master])[0], "runs": found})


if __name__ == "__main__":
    with train.threads(1):
        main()
