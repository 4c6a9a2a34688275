"""Search for a language model within a latency limit, and check the search.

    python chapters/experiments/searched_text.py

The limit is the time that a usual shape needs for one passage, by a table of
measured parts.  Evolution and random search train every candidate for a few
steps; a supernet is trained once for as many steps, and its members that are
within the limit are compared with the weights that they inherit.  What was
found, four shapes made by hand that fill the limit, and random networks
within it are then trained from scratch, the learning rate of each chosen on
the validation text by its first seed.  As a control the usual shape also
trains for as long as the search took, and the contestants are compared again
after longer training.  Ctrl-C is harmless: the same command
goes on from where it stopped.
"""

import random
from functools import cache

import _stamp
import torch
from _pruning import Store
from _transformers import (
    CONTEXT,
    IDS,
    MERGES,
    SPACE,
    network,
    seconds,
    time_table,
)
from tqdm import tqdm

from minicompress import data, measure, nas, storage, train

SEEDS, SIZE = 3, 8
SHORT, RATE = 250, 6e-3  # the training of a candidate
EVALUATIONS, POPULATION, SAMPLE = 48, 10, 4
PATHS = 2  # of the supernet; its steps cost what all candidates cost
STEPS, RATES = 800, (3e-3, 6e-3, 1.2e-2)
RANDOM, PROBES, REPEATS = 10, 20, 200
LONGER = (2400, 4800, STEPS + EVALUATIONS * SHORT)  # steps of the control
LATER = 4800  # steps of all contestants, at the rates they chose
USUAL = {
    "width": 64,
    "layers": 3,
    "heads": 4,
    "ff_ratio": 4,
    "sharing": "none",
    "embedding": 0,
}
HAND = {  # as many layers as the limit allows
    "usual": {},
    "narrow and deep": {"width": 32},
    "wide and shallow": {"width": 96, "ff_ratio": 2},
    "shared": {"sharing": "all", "embedding": 32},
}
LARGEST = {"width": 96, "layers": 4, "heads": 2, "ff_ratio": 4}


@cache
def text():
    """Return the training ids; for the other parts ids and characters."""
    task = data.reference()
    tokenizer = data.tokenizer(task.train, merges=MERGES)
    found = {"hash": task.hash, "train": tokenizer.encode(task.train)}
    for part in ("val", "test"):
        ids = tokenizer.encode(getattr(task, part))
        found[part] = ids, len(tokenizer.decode(ids[1:]))
    return found


def feed(steps, seed):
    return train.passages(
        text()["train"], length=CONTEXT, size=SIZE, steps=steps, seed=seed
    )


def bits(model, part="val"):
    ids, chars = text()[part]
    found = train.bits_per_char(model, ids, context=CONTEXT, chars=chars)
    return round(found, 4)


def trained(arch, steps, lr, seed):
    """Train a network; the seed decides its start and its passages."""
    torch.manual_seed(seed)
    model = network(arch)
    return train.fit(model, feed(steps, seed), lr=lr, clip=1.0, seed=seed)


def name(arch):
    return "-".join(map(str, SPACE.encode(arch)))


class Bench:
    """The candidates, and everything that has been computed for them."""

    def __init__(self):
        self.store = Store(__file__)
        self.folder = self.store.path.with_suffix("")
        self.folder.mkdir(exist_ok=True)
        times = self.store.get("table", lambda: time_table(REPEATS).times)
        self.table = nas.LatencyTable(times, ("Block",))
        self.times = self.store.get("times", self.all_times)
        self.limit = self.seconds(USUAL)
        self.space = SPACE.where(self.within)
        self.part = self.space.where(
            lambda a: a["sharing"] == "none" and not a["embedding"]
        )

    def all_times(self):
        """Look every network up; to share or not takes the same time."""
        apart = SPACE.where(lambda arch: arch["sharing"] == "none")
        return {name(a): seconds(self.table, a) for a in apart}

    def seconds(self, arch):
        return self.times[name({**arch, "sharing": "none"})]

    def within(self, arch):
        return self.seconds(arch) <= self.limit

    def get(self, compute, arch, *how):
        """Compute something for a network, or look it up."""
        key = "/".join(map(str, [compute.__name__, name(arch), *how]))
        return self.store.get(key, lambda: compute(arch, *how))

    def short(self, arch):
        return self.get(short, arch, SHORT, RATE)

    def log(self, kind):
        return {"log": self.folder / f"{kind}.jsonl", "progress": True}


def short(arch, steps, lr):
    """Train a candidate for a few steps."""
    return bits(trained(arch, steps, lr, 0))


def final(arch, steps, lr, seed):
    """Train a network for the comparison."""
    model = trained(arch, steps, lr, seed)
    return {"val": bits(model), "test": bits(model, "test")}


def searches(bench):
    """Search with short trainings; each is stored once for both."""
    evolved = nas.evolve(
        bench.space,
        bench.short,
        evaluations=EVALUATIONS,
        population=POPULATION,
        sample=SAMPLE,
        **bench.log("evolution"),
    )
    drawn = nas.random_search(
        bench.space,
        bench.short,
        evaluations=EVALUATIONS,
        seed=1,
        **bench.log("random"),
    )
    return {"evolution": evolved, "random": drawn}


def plain(arch):
    """Build a network without numbers."""
    with torch.device("meta"):
        return network(arch)


def supernet(bench):
    """Train one network for all members of a part of the space."""
    path = bench.folder / "supernet.mc"
    if not path.exists():
        torch.manual_seed(0)
        large = nas.fit_supernet(
            network({**USUAL, **LARGEST}),
            plain,
            bench.part,
            feed(EVALUATIONS * SHORT // PATHS, 0),
            paths=PATHS,
            lr=RATE,
            clip=1.0,
            progress=True,
        )
        storage.save(path, large)
    return storage.load(path)


def as_inherited(bench, large, rows):
    """Judge contestants by the weights that they inherit."""
    nets = {
        kind: nas.subnet(large, plain(row["arch"]))
        for kind, row in rows.items()
        if bench.part.accepts(row["arch"])
    }
    return {
        kind: {"val": bits(net), "test": bits(net, "test")}
        for kind, net in nets.items()
    }


def filled(bench, changes):
    """Return a shape with as many layers as the limit allows."""
    archs = [{**USUAL, **changes, "layers": n} for n in SPACE.choices["layers"]]
    return [a for a in archs if SPACE.accepts(a) and bench.within(a)][-1]


def contest(bench, arch, seeds):
    """Train a network from scratch, its rate chosen by the first seed."""
    tried = {lr: bench.get(final, arch, STEPS, lr, 0) for lr in RATES}
    lr = min(tried, key=lambda lr: tried[lr]["val"])
    runs = [tried[lr]]
    runs += [bench.get(final, arch, STEPS, lr, s) for s in range(1, seeds)]
    torch.manual_seed(0)
    model = network(arch)
    return {
        "arch": arch,
        "us": round(1e6 * bench.seconds(arch), 1),
        "params": measure.params(model),
        "macs": measure.macs(model, IDS),
        "bytes": len(storage.dumps(model)),
        "short": bench.short(arch),
        "rate": lr,
        "tried": {str(r): row["val"] for r, row in tried.items()},
        "val": [run["val"] for run in runs],
        "test": [run["test"] for run in runs],
    }


def evaluated(bench, history):
    """Return what a search saw: positions, bits, time and parameters."""
    rows = []
    for record in history.records:
        arch = record.arch
        size = measure.params(network(arch))
        time = round(1e6 * bench.seconds(arch), 1)
        rows.append([*SPACE.encode(arch), record.loss, time, size])
    return rows


def agreement(bench, inherited):
    """Say how well the estimates agree with better ones."""
    probes = random.Random(2).sample(list(bench.part), PROBES)
    guess = {name(r.arch): r.loss for r in inherited.records}
    rows = [
        [*SPACE.encode(a), guess[name(a)], bench.short(a)]
        for a in tqdm(probes, desc="probes")
    ]
    a, b = zip(*(row[-2:] for row in rows), strict=True)
    return {"rows": rows, "kendall": round(nas.kendall(a, b), 3)}


def orders(rows):
    """Say how well early losses and sizes tell the final order."""
    last = [row["val"][0] for row in rows]
    signs = {"short": 1, "params": -1, "macs": -1, "us": -1}  # larger, better
    return {
        key: round(nas.kendall([sign * row[key] for row in rows], last), 3)
        for key, sign in signs.items()
    }


def measured(rows):
    """Time the contestants, in turns."""
    nets = {kind: network(row["arch"]).eval() for kind, row in rows.items()}
    calls = {kind: lambda net=net: net(IDS) for kind, net in nets.items()}
    times = measure.compare(calls, repeats=REPEATS)
    return {kind: round(1e6 * t.low, 1) for kind, t in times.items()}


def longer(bench, row):
    """Train the usual shape longer, at last for as long as a search took."""
    arch, lr = row["arch"], row["rate"]
    return {str(n): bench.get(final, arch, n, lr, 0) for n in LONGER}


def main():
    bench = Bench()
    histories = searches(bench)
    large = supernet(bench)
    inherited = nas.exhaustive(
        bench.part,
        lambda arch: bits(nas.subnet(large, plain(arch))),
        **bench.log("supernet"),
    )
    archs = {kind: h.best.arch for kind, h in histories.items()}
    archs["supernet"] = inherited.best.arch
    archs |= {kind: filled(bench, changes) for kind, changes in HAND.items()}
    rows = {
        kind: contest(bench, arch, SEEDS)
        for kind, arch in tqdm(archs.items(), desc="contest")
    }
    drawn = random.Random(3).sample(list(bench.space), RANDOM)
    others = [
        contest(bench, arch, 1) for arch in tqdm(drawn, desc="random ones")
    ]
    probes = agreement(bench, inherited)
    best = min(others, key=lambda row: row["val"][0])
    rows["best of the random ones"] = contest(bench, best["arch"], SEEDS)
    every = {name(row["arch"]): row for row in [*rows.values(), *others]}
    results = {
        "text": text()["hash"],
        "choices": SPACE.choices,
        "limit us": round(1e6 * bench.limit, 1),
        "members": {
            "all": len(list(SPACE)),
            "within": len(list(bench.space)),
            "supernet": len(list(bench.part)),
        },
        "steps": {"short": SHORT, "final": STEPS},
        "searches": {n: evaluated(bench, h) for n, h in histories.items()},
        "inherited": [
            [*SPACE.encode(r.arch), r.loss] for r in inherited.records
        ],
        "contest": rows,
        "contest, inherited": as_inherited(bench, large, rows),
        "random": others,
        "order of the final losses": orders(every.values()),
        "inherited and short": probes,
        "measured us": measured(rows),
        "longer": longer(bench, rows["usual"]),
        "later": {
            kind: bench.get(final, row["arch"], LATER, row["rate"], 0)
            for kind, row in tqdm(rows.items(), desc="later")
        },
    }
    _stamp.write(__file__, results)


if __name__ == "__main__":
    with train.threads(1):
        main()
