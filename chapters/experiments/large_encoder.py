"""Compress the published encoder without training, by every method.

    python chapters/experiments/large_encoder.py

Paragraphs of topics of the language reference that nothing else saw are
embedded; the cosine to the embedding of the original and the share with the
same nearest neighbor are reported, for some rows also the linear probe on
every second docstring of pruned_encoder.py.  Passages of the training topics
calibrate: three draws, one block after the other, each on inputs from the
compressed ones before it.  Only the matrices of the blocks are changed; the
bits per weight count all that is stored for them.  Further parts: inputs
rounded too; outliers; bits by sensitivity; more, less and other calibration
text.  Ctrl-C is harmless: the same command goes on from where it stopped.
"""

from functools import partial
from statistics import mean, stdev

import _entering
import _pruning
import _stamp
import factored_encoder
import pruned_encoder
import torch
import torch.nn.functional as F
from _large import LENGTH, Texts, bits, paragraphs
from _large_rules import BITS, FAMILIES, PASSAGES, gptq, sparsegpt
from pruned_encoder import changed
from pruned_encoder import coded_by_block as by_block
from tqdm import tqdm

from minicompress import calibrate, measure, prune, quantize, storage, train

DRAWS = 3
BUDGETS = (3, 4)  # bits on average
COUNTS = (1, 4, 16, 64, 256)  # passages
ALPHAS = (0.25, 0.5, 0.75)
EACH, FEW = 2, 6  # every other docstring; every sixth paragraph
CLS, SEP, FIRST = 101, 102, 999  # numbers of tokens; the first in use
SHOWN = ("q.weight", "out.weight", "up.weight", "down.weight")  # q, k, v: same
INPUTS = (  # bits of weights and inputs, and what shares a grid
    (None, 8, "static"),
    (None, 8, "tensor"),
    (None, 8, "token"),
    (None, 4, "token"),
    (8, 8, "static"),
    (8, 8, "tensor"),
    (8, 8, "token"),
    (4, 8, "token"),
    (4, 4, "token"),
)

PROBED = ((8, 8, "static"), (4, 4, "token"))


class Bench(factored_encoder.Bench):
    """The encoder, texts that report, texts that choose and calibrate."""

    def __init__(self):
        super().__init__()
        docs = self.texts
        docs.texts, docs.y = docs.texts[::EACH], docs.y[::EACH]
        self.reference = self.reference[::EACH]
        self.dense = pruned_encoder.accuracies(
            self.reference, docs.y, self.penalty
        )
        args = (self.model, docs.tokenizer)
        self.test = Texts(*args, paragraphs("test"))
        self.val = Texts(*args, paragraphs("val"))
        self.few = Texts(*args, paragraphs("val")[::FEW])

    def measure(self, model, probe=False):
        """Compare the embeddings of paragraphs; probe those of docstrings.

        The probe loses so many points, with a standard error over its draws.
        """
        row = self.test.compare(model)
        if probe:
            t = self.texts
            E = t.embed(model)
            found = pruned_encoder.accuracies(E, t.y, self.penalty)
            pairs = zip(self.dense, found, strict=True)
            lost = [100 * (a - b) for a, b in pairs]
            error = stdev(lost) / len(lost) ** 0.5
            row |= {"lost": mean(lost), "error": error}
        return row

    def without(self, gone):
        keep = torch.ones(len(self.model.blocks), dtype=torch.bool)
        keep[list(gone)] = False
        one = self.passages(1, 0)[0]
        return prune.remove_blocks(self.model, "blocks", keep, one)


def joined(found):
    """Join what several draws gave: numbers become lists."""
    keys = dict.fromkeys(k for row in found for k in row)
    row = {k: [round(r[k], 4) for r in found if k in r] for k in keys}
    if "effective" in row:
        row["effective"] = row["effective"][0]
    return row


def probed(family, method, keys):
    """Tell for which rows the probe is worth its time."""
    if family == "zeros":
        return keys["sparsity"] in (0.5, 0.6) and "global" not in method
    if family == "bits":
        return method in ("rounding", "GPTQ") and keys["bits"] < 8
    return family == "pairs"


def one(bench, make, probe, draw):
    """Make the codes of one row, and measure the model with them."""
    made = make(bench, draw)
    model = changed(bench.model, made)
    row = {"effective": bits(made)}
    return row | bench.measure(model, probe and draw == 0)


def shortened(bench, gone, draw=None):
    """Remove blocks; round what is left to 4 bits if there is a draw."""
    model = bench.without(gone)
    kept = 1 - len(gone) / len(bench.model.blocks)
    row = {"effective": 32 * kept}
    if draw is not None:
        batches = bench.passages(PASSAGES, draw)
        made = by_block(model, batches, lambda n, W, s: gptq(W, s.H, 4))
        model = changed(model, made)
        row = {"effective": bits(made, bench.numbers)}
    return row | bench.measure(model, draw == 0)


def gone(bench):
    """Let three rules say which blocks go."""

    def cost(model):
        return 1 - bench.val.compare(model)["cosine"]

    args = (bench.model, "blocks")
    batches = bench.passages(PASSAGES, 0)
    order = prune.greedy_blocks(*args, cost, batches[0], remove=3)
    least = prune.block_influence(*args, batches).argsort().tolist()
    even = prune.every_other(len(bench.model.blocks), rate=0.5)
    ways = [
        [rule, sorted(some[:n])]
        for rule, some in (("greedy", order), ("influence", least))
        for n in (1, 2, 3)
    ]
    return [*ways, ["every other", (~even).nonzero()[:, 0].tolist()]]


def chosen(bench):
    """Choose the bits of every matrix, by two measures of its loss."""
    stats = bench.stats()
    options = {
        n: {b: gptq(W, stats[n].H, b) for b in BITS}
        for n, W in bench.weights.items()
    }

    def error(n, code):
        args = (bench.weights[n], code.decode(), stats[n].H)
        return measure.relative_error(*args) ** 2

    def far(model):
        return 1 - bench.few.compare(model)["cosine"]

    outputs = {
        n: {b: (storage.payload(c), error(n, c)) for b, c in own.items()}
        for n, own in options.items()
    }
    tables = {
        "outputs": outputs,
        "cosine": quantize.sensitivity(bench.model, options, far),
    }
    found = []
    for by, table in tables.items():
        for budget in BUDGETS:
            room = sum(own[budget][0] for own in table.values())
            choice = quantize.knapsack(table, budget=room)
            found.append({"by": by, "budget": budget, "bits": choice})
    alone = {
        n: [loss for _, loss in own.values()]
        for n, own in tables["cosine"].items()
    }
    return {"chosen": found, "alone": alone}


def mixed(bench, choice, draw):
    """Round every matrix to bits of its own, by GPTQ."""
    batches = bench.passages(PASSAGES, draw)
    made = by_block(
        bench.model, batches, lambda n, W, s: gptq(W, s.H, choice[n])
    )
    model = changed(bench.model, made)
    return {"effective": bits(made)} | bench.measure(model)


def rounded(bench, job, move, alpha, draw, on="test"):
    """Round weights and what they meet."""
    weights, inputs, each = job
    model = _entering.rounded(
        bench.model,
        bench.stats(PASSAGES, draw),
        weights=weights,
        inputs=inputs,
        each=each,
        move=move,
        alpha=alpha,
    )
    if on == "val":
        return bench.val.compare(model)["cosine"]
    return bench.measure(model, job in PROBED and not draw)


def random_tokens(count, draw, vocab):
    """Draw tokens that make no text, in passages."""
    dice = torch.Generator().manual_seed(draw)
    ids = torch.randint(FIRST, vocab, (count, LENGTH), generator=dice)
    ids[:, 0], ids[:, -1] = CLS, SEP
    return list(ids.split(factored_encoder.SIZE))


def near(bench, model, batches):
    """Compare the embeddings of passages."""
    batches = batches[: PASSAGES // factored_encoder.SIZE]

    def embed(model):
        with train.evaluating(model):
            return F.normalize(torch.cat([model(x).mean(1) for x in batches]))

    return float((embed(model) * embed(bench.model)).sum(1).mean())


def fitted(bench, method, text, count, draw):
    """Calibrate on more, less or other text.

    Measured also on the passages that calibrated, and on such of the test
    topics.
    """
    if text == "random":
        vocab = bench.model.tokens.num_embeddings
        batches = random_tokens(count, draw, vocab)
    else:
        batches = bench.passages(count, draw)
    rule = {
        "GPTQ": lambda n, W, s: gptq(W, s.H, 3),
        "SparseGPT": lambda n, W, s: sparsegpt(W, s.H, sparsity=0.5),
    }[method]
    model = changed(bench.model, by_block(bench.model, batches, rule))
    return bench.test.compare(model) | {
        "own": near(bench, model, batches),
        "others": near(bench, model, bench.passages(PASSAGES, 0, "test")),
    }


def outliers(bench):
    """Say how far channels of the inputs stand apart, matrix by matrix."""
    names = [n for n in bench.weights if n.endswith(SHOWN)]
    stats = calibrate.inputs(
        bench.model,
        bench.passages(PASSAGES, 0),
        where=lambda n, w: n in names,
        rows=PASSAGES * LENGTH,  # all
    )
    return [
        {"name": n, **_entering.outliers(bench.weights[n], s)}
        for n, s in stats.items()
    ]


class Jobs:
    """The rows of all parts, from what is stored or computed now."""

    def __init__(self, bench, store, draws):
        self.bench, self.store, self.draws = bench, store, draws

    def get(self, key, f, *args):
        return self.store.get(key, partial(f, self.bench, *args))

    def several(self, key, f, *args, again=True):
        """Join the draws of a row: one only, or as many as there are."""
        draws = range(self.draws if again else 1)
        return joined([self.get(f"{key}/{d}", f, *args, d) for d in draws])

    def rows(self):
        for family, ways in FAMILIES.items():
            for method, keys, make, again in tqdm(list(ways()), desc=family):
                names = {"family": family, "method": method, **keys}
                key = "/".join(map(str, names.values()))
                args = (make, probed(family, method, keys))
                yield names | self.several(key, one, *args, again=again)

    def blocks(self):
        ways = self.get("gone", gone)
        for rule, out in tqdm(ways, desc="blocks"):
            found = self.get(f"without/{out}", shortened, out)
            names = {"family": "blocks", "method": rule, "gone": out}
            yield names | joined([found])
        best = ways[0][1]
        names = {"family": "pairs", "method": "a block less", "bits": 4}
        found = self.several("a block less", shortened, best)
        yield names | {"gone": best} | found

    def mixed(self):
        found = self.get("chosen", chosen)
        rows = []
        for choice in tqdm(found["chosen"], desc="mixed"):
            key = f"mixed/{choice['by']}/{choice['budget']}"
            row = self.several(key, mixed, choice["bits"])
            rows.append(choice | {"bits": list(choice["bits"].values())} | row)
        alone = {
            n: [round(x, 6) for x in own] for n, own in found["alone"].items()
        }
        return {"bits": BITS, "alone": alone, "rows": rows}

    def activations(self):
        for job in tqdm(INPUTS, desc="inputs"):
            for move, alpha in self.moves(job):
                key = "/".join(map(str, (*job, move, alpha)))
                again = move == "smooth" or job[2] == "static"
                names = dict(
                    zip(("weights", "inputs", "each"), job, strict=True)
                )
                args = (job, move, alpha)
                found = self.several(key, rounded, *args, again=again)
                yield names | {"move": move, "alpha": alpha} | found

    def moves(self, job):
        """List how outliers are moved: with the α of validation text too."""
        yield "plain", None
        if not job[0]:
            return
        tried = {
            a: self.get(f"{job}/val/{a}", rounded, job, "smooth", a, 0, "val")
            for a in ALPHAS
        }
        for alpha in sorted({0.5, max(tried, key=tried.get)}):
            yield "smooth", alpha
        if job[2] != "static":
            yield "turn", None

    def calibration(self):
        jobs = [("reference", n) for n in COUNTS] + [("random", PASSAGES)]
        for text, count in tqdm(jobs, desc="calibration"):
            for method in ("GPTQ", "SparseGPT"):
                key = f"calibration/{method}/{text}/{count}"
                row = self.several(key, fitted, method, text, count)
                yield {"method": method, "text": text, "count": count, **row}


def main():
    store, bench = _pruning.Store(__file__), Bench()
    for draws in range(1, DRAWS + 1):  # the first draw of everything first
        jobs = Jobs(bench, store, draws)
        result = {
            "text": {
                "paragraphs": len(bench.test.texts),
                "validation": len(bench.val.texts),
                "docstrings": len(bench.texts.texts),
                "labels": pruned_encoder.LABELS,
                "length": LENGTH,
                "passages": PASSAGES,
                "draws": draws,
            },
            "dense": {
                "numbers": bench.numbers,
                "accuracy": round(100 * mean(bench.dense), 2),
            },
            "rows": [*jobs.rows(), *jobs.blocks()],
            "activations": list(jobs.activations()),
            "outliers": jobs.get("outliers", outliers),
            "mixed": jobs.mixed(),
            "calibration": list(jobs.calibration()),
        }
        _stamp.write(__file__, result)


if __name__ == "__main__":
    with train.threads(1):
        main()
