"""Search networks for digits by gradient, and see what gradients favor.

    python chapters/experiments/darts_digits.py

DARTS on the space of `searched_digits` at width 8, first and second order,
of several lengths; the 300 training digits are halved for w and α, a choice
is judged by the table.  The rate of α is chosen by the table's validation
errors.  Then a chain of eight layers, in which skip connections win more
layers the longer the search takes: what is chosen at several times is trained
from the beginning.
"""

import json
import random
from copy import deepcopy

import _stamp
import torch
from _pruning import Store
from searched_digits import LR, SIZE, errors, parts
from torch import nn
from torch.func import functional_call
from tqdm import tqdm

from minicompress import measure, nas, train
from minicompress.nas.chains import convolution, operation

WIDTH, SEEDS, DRAWS = 8, 5, 4000
RATE = 0.1  # of w
RATES, TUNED = (3e-3, 1e-2, 3e-2), (2, 360)  # of α; seeds, steps
LENGTHS = {1: (180, 720, 1440), 2: (180, 360)}
PASSES = {1: 2, 2: 5}  # through the mixture, forward and back, in a step
LAYERS, CHANNELS, OPS = 8, 16, ("skip", "pool", "conv3")
MARKS, CHAIN_ALPHA = (90, 180, 360, 720, 1440), 1e-2
VARIANTS = {
    "as in the paper": (3, {}),
    "BatchNorm with scales": (2, {"affine": True}),
    "the same data": (2, {"same": True}),
}  # with numbers of seeds


def halves(seed):
    """Split the training digits for w and for α."""
    X, y = parts()[0]
    order = torch.randperm(
        len(X), generator=torch.Generator().manual_seed(seed)
    )
    return [(X[i], y[i]) for i in order.chunk(2)]


def search(
    net, seed, steps, alpha_lr, *, order=1, affine=False, same=False, note=None
):
    """Train a mixture; the norms have no scales of their own, as in DARTS."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(affine)
    a, b = halves(seed)
    b = a if same else b
    feeds = [
        train.batches(
            *part, size=SIZE, epochs=-(-steps * SIZE // len(part[0])), seed=s
        )
        for part, s in ((a, seed), (b, seed + 1000))
    ]
    return nas.darts(
        net,
        *feeds,
        lr=RATE,
        alpha_lr=alpha_lr,
        order=order,
        steps=steps,
        seed=seed,
        on_step=note,
    )


def rounded(strengths):
    return [[round(x, 3) for x in ops.values()] for ops in strengths.values()]


def found(seed, steps, alpha_lr, order):
    """Search on the space of the table; return the network and its α."""
    torch.manual_seed(seed)
    net = nas.digits_mixture(WIDTH)
    net = search(net, seed, steps, alpha_lr, order=order)
    return {
        "arch": list(nas.strongest(net).values()),
        "strengths": rounded(nas.strengths(net)),
        "mixture": errors(net, *parts()[1])[0],
    }


class Table:
    """What the networks of one width were worth after 180 steps."""

    def __init__(self):
        path = _stamp.RESULTS / "searched_digits.json"
        table = json.loads(path.read_text("utf8"))
        self.code, self.sizes = table["stamp"]["code"], table["sizes"]
        pairs = zip(nas.digits_space(), table["rows"], strict=True)
        self.rows = {
            tuple(arch.values())[1:]: row
            for arch, row in pairs
            if arch["width"] == WIDTH
        }

    def row(self, ops):
        """Find a network, its skips in the second place of two layers."""
        pairs = [ops[:2], ops[2:]]
        pairs = [p[::-1] if p[0] == "skip" else p for p in pairs]
        return self.rows[tuple(pairs[0] + pairs[1])]

    def percent(self, row, split):
        column = {"val": 0, "test": 2}[split]
        wrong = [seed[column] for seed in row["180"]]
        return 100 * sum(wrong) / len(wrong) / self.sizes[split]

    def best(self):
        return min(self.percent(row, "test") for row in self.rows.values())

    def regret(self, ops):
        return self.percent(self.row(ops), "test") - self.best()

    def rank(self, ops):
        """Return the fraction of networks that are better."""
        own = self.regret(ops)
        better = [self.percent(r, "test") for r in self.rows.values()]
        return sum(x - self.best() < own for x in better) / len(better)

    def blind(self, n):
        """Expect the regret of the best of n random ones on validation.

        Each of them is trained once, with the same seed.
        """
        rng, rows, total = random.Random(n), list(self.rows.values()), 0
        for _ in range(DRAWS):
            some, seed = rng.choices(rows, k=n), rng.randrange(3)
            best = min(some, key=lambda row, s=seed: row["180"][s][0])
            total += self.percent(best, "test") - self.best()
        return total / DRAWS


def chain(make):
    """Build a chain of layers for 4×4 positions."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        convolution(1, CHANNELS, 3),
        nn.MaxPool2d(2),
        *(make(i) for i in range(LAYERS)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS, 10),
    )


def mixed(i):
    return nas.Mixed({op: operation(op, CHANNELS) for op in OPS})


def from_scratch(ops, seed):
    """Train what was chosen as the table trains: 180 steps on 300 digits."""
    fit, val, test = parts()
    torch.manual_seed(seed)
    net = chain(lambda i: operation(ops[i], CHANNELS))
    epochs = -(-180 * SIZE // len(fit[0]))
    feed = train.batches(*fit, size=SIZE, epochs=epochs, seed=seed)
    net = train.fit(net, feed, lr=LR, steps=180, seed=seed)
    return [errors(net, *val)[0], errors(net, *test)[0]]


def curvature(net, data):
    """Return the largest eigenvalue of the Hessian of L_val in α."""
    net = deepcopy(net).train()
    alpha = {n: p for n, p in net.named_parameters() if n.endswith("alpha")}
    names, values = list(alpha), tuple(p.detach() for p in alpha.values())

    def loss(*values):
        state = dict(zip(names, values, strict=True))
        return train.cross_entropy(
            lambda x: functional_call(net, state, (x,)), data
        )

    H = torch.autograd.functional.hessian(loss, values)
    H = torch.cat([torch.cat(row, 1) for row in H])
    return torch.linalg.eigvalsh(H)[-1].item()


def collapse(seed, variant):
    """Search on the long chain, and note what would be chosen when."""
    torch.manual_seed(seed)
    held_out = halves(seed)[1]
    rows = []

    def note(step, net, loss):
        if step in MARKS:
            strengths = nas.strengths(net)
            ops = list(nas.strongest(net).values())
            rows.append(
                {
                    "step": step,
                    "ops": ops,
                    "strengths": rounded(strengths),
                    "loss": round(loss, 4),
                    "mixture": errors(net, *parts()[1])[0],
                    "eigenvalue": round(curvature(net, held_out), 4),
                    "trained": from_scratch(ops, seed),
                }
            )

    search(
        chain(mixed),
        seed,
        MARKS[-1],
        CHAIN_ALPHA,
        note=note,
        **VARIANTS[variant][1],
    )
    return rows


def known(convolutions, seed):
    """Train chains of known depth: convolutions first, then skips."""
    rest = ["skip"] * (LAYERS - convolutions)
    return from_scratch(["conv3"] * convolutions + rest, seed)


def mean(numbers):
    return sum(numbers) / len(numbers)


def main():
    store = Store(__file__)
    seeds, steps = TUNED
    runs = [(1, steps, rate, s) for rate in RATES for s in range(seeds)]
    searched = {}

    def run(order, steps, rate, seed):
        key = f"{order}/{steps}/{rate}/{seed}"
        searched[order, steps, rate, seed] = store.get(
            key, lambda: found(seed, steps, rate, order)
        )
        return searched[order, steps, rate, seed]["arch"]

    for order, steps, rate, seed in tqdm(runs, desc="rates of α"):
        run(order, steps, rate, seed)
    depth = {
        n: [
            store.get(f"depth/{n}/{s}", lambda n=n, s=s: known(n, s))
            for s in range(2)
        ]
        for n in range(0, LAYERS + 1, 2)
    }
    chains = {
        name: [
            store.get(f"{name}/{s}", lambda s=s, name=name: collapse(s, name))
            for s in tqdm(range(seeds), desc=name)
        ]
        for name, (seeds, _) in VARIANTS.items()
    }
    table = Table()
    tuning = {
        rate: mean(
            [
                table.percent(table.row(run(1, TUNED[1], rate, s)), "val")
                for s in range(TUNED[0])
            ]
        )
        for rate in RATES
    }
    rate = min(tuning, key=tuning.get)
    rows = []
    mixture = nas.digits_mixture(WIDTH)
    macs = measure.macs(mixture, torch.zeros(1, 64))
    one = mean([row["macs"] for row in table.rows.values()])
    for order, lengths in LENGTHS.items():
        for steps in lengths:
            seeds = tqdm(range(SEEDS), desc=f"order {order}, {steps} steps")
            archs = [run(order, steps, rate, s) for s in seeds]
            passes = PASSES[order] * steps / 180
            rows.append(
                {
                    "order": order,
                    "steps": steps,
                    "archs": archs,
                    "regret": [round(table.regret(a), 2) for a in archs],
                    "better": [round(table.rank(a), 3) for a in archs],
                    "without weights": [
                        sum(op in ("skip", "pool") for op in a) for a in archs
                    ],
                    "random, equal passes": [
                        round(passes),
                        round(table.blind(round(passes)), 2),
                    ],
                    "random, equal MACs": [
                        round(passes * macs / one),
                        round(table.blind(round(passes * macs / one)), 2),
                    ],
                    "strengths": [
                        searched[order, steps, rate, s]["strengths"]
                        for s in range(SEEDS)
                    ],
                    "mixture": [
                        searched[order, steps, rate, s]["mixture"]
                        for s in range(SEEDS)
                    ],
                }
            )
    largest = max(table.rows, key=lambda ops: table.rows[ops]["params"])
    _stamp.write(
        __file__,
        {
            "table": table.code,
            "sizes": table.sizes,
            "best": round(table.best(), 2),
            "random": round(table.blind(1), 2),
            "largest": [list(largest), round(table.regret(list(largest)), 2)],
            "macs": [macs, round(one)],
            "rates": {r: round(x, 2) for r, x in tuning.items()},
            "rate": rate,
            "rows": rows,
            "chain": {
                "layers": LAYERS,
                "ops": OPS,
                "rate": CHAIN_ALPHA,
                "depth": depth,
                "variants": chains,
            },
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
