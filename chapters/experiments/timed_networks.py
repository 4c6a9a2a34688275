"""Compare the sums of measured parts with the times of whole networks.

    python chapters/experiments/timed_networks.py

Run it alone: other work on the machine disturbs it.  A table of parts is
measured for the digits chains, with single layers or whole operations as
parts and with 1 or 32 images, and for the language models of chapter 10 with
one passage.  Random networks are measured whole, twice, so that one knows
how well a measurement agrees with itself.  One thread, in turns, and of all
repeats the lower quartile.
"""

import random
from dataclasses import asdict

import _stamp
import torch
from _transformers import IDS, SPACE, network, time_table
from torch import nn
from tqdm import tqdm

from minicompress import measure, nas, train

CHAINS, TRANSFORMERS, REPEATS, SEED = 60, 40, 200, 0
FITTED = 10  # networks that a line is fitted to; it is judged by the others
PARTS = {"layers": (), "operations": (nn.Sequential,)}


def sample(space, n):
    """Draw n different networks."""
    return random.Random(SEED).sample(list(space), n)


def whole(nets, x):
    """Return the seconds of each network."""
    calls = {i: lambda net=net: net(x) for i, net in enumerate(nets)}
    return [t.low for t in measure.compare(calls, repeats=REPEATS).values()]


def line_error(sums, times):
    """Fit times = a + b sums to a few networks, return the error of others."""
    A = torch.tensor([[1.0, s] for s in sums], dtype=torch.float64)
    y = torch.tensor(times, dtype=torch.float64)
    fit = torch.linalg.lstsq(A[:FITTED], y[:FITTED, None]).solution
    a, b = fit.flatten().tolist()
    guess = (A[FITTED:] @ fit).flatten().tolist()
    return {
        "a us": round(1e6 * a, 1),
        "b": round(b, 3),
        "error": mape(guess, times[FITTED:]),
    }


def mape(guess, truth):
    """Return the mean absolute error in percent of the truth."""
    pairs = zip(guess, truth, strict=True)
    return round(100 * sum(abs(g - t) / t for g, t in pairs) / len(truth), 2)


def order(a, b):
    return {
        "kendall": round(nas.kendall(a, b), 3),
        "spearman": round(nas.spearman(a, b), 3),
    }


def sizes(nets, x):
    """Count MACs and parameters."""
    return {
        "macs": [measure.macs(net, x) for net in nets],
        "params": [measure.params(net) for net in nets],
    }


def judged(counts, sums, times, again):
    """Say how well sums, MACs and parameters tell the time."""
    columns = zip(sums, times, again, strict=True)
    return {
        "sum": {**order(sums, times), "error": mape(sums, times)},
        "line": line_error(sums, times),
        **{name: order(count, times) for name, count in counts.items()},
        "again": {**order(again, times), "error": mape(again, times)},
        "columns": "microseconds: sum, measured, again",
        "rows": [[round(1e6 * t, 1) for t in row] for row in columns],
    }


def kept(table):
    """Make a table short enough for a file: four digits are plenty."""
    times = {key: float(f"{t:.4g}") for key, t in table.times.items()}
    return {**asdict(table), "times": times}


def chains():
    space = nas.digits_space()
    every = [nas.digits_network(arch).eval() for arch in space]
    archs = sample(space, CHAINS)
    nets = [nas.digits_network(arch).eval() for arch in archs]
    counts, found = sizes(nets, torch.zeros(1, 64)), {}
    for size, kind in tqdm(
        [(size, kind) for size in (1, 32) for kind in PARTS], desc="chains"
    ):
        x = torch.zeros(size, 64)
        times = whole(nets, x)
        table = nas.latency_table(
            ((net, x) for net in every), parts=PARTS[kind], repeats=REPEATS
        )
        again = whole(nets, x)
        sums = [table.seconds(net, x) for net in nets]
        row = judged(counts, sums, times, again)
        if kind == "operations":
            row["table"] = kept(table)
        found[f"{kind}, {size}"] = row
    codes = [space.encode(arch) for arch in archs]
    return {"archs": codes, "sizes": counts, **found}


def transformers():
    archs = sample(SPACE, TRANSFORMERS)
    nets = [network(arch).eval() for arch in tqdm(archs, desc="transformers")]
    times = whole(nets, IDS)
    table = time_table(REPEATS)
    again = whole(nets, IDS)
    sums = [table.seconds(net, IDS) for net in nets]
    counts = sizes(nets, IDS)
    return {
        "archs": [SPACE.encode(arch) for arch in archs],
        "sizes": counts,
        **judged(counts, sums, times, again),
        "table": kept(table),
    }


def main():
    torch.manual_seed(SEED)
    results = {
        "repeats": REPEATS,
        "fitted": FITTED,
        "chains": chains(),
        "transformers": transformers(),
    }
    _stamp.write(__file__, results)


if __name__ == "__main__":
    with train.threads(1):
        main()
