"""Remove blocks of a language model that was trained to do without, or not.

    python chapters/experiments/shortened_text.py

A network of 8 blocks is trained on the language reference in four ways:
as it is, with LayerDrop, with stochastic depth and, for comparison, with
ordinary dropout.  1 to 5 blocks are then removed by five rules, which see the
validation text only, and at random.  Networks that had 6 or 4 blocks from the
start are trained as long.  At last the shortened networks, the whole ones and
the shallow ones all train for some more steps.  The learning rate is chosen on
the validation text by the first seed of the networks that are trained as they
are; the other ways of training 8 blocks take the rate of those.  Ctrl-C is
harmless: the same command goes on from where it stopped.
"""

from functools import partial

import _stamp
import torch
from _pruning import Store
from torch import nn
from tqdm import tqdm

from minicompress import data, models, prune, storage, train, zoo
from minicompress.prune import layers as depth

SEEDS, STEPS, SIZE, LENGTH = 3, 2000, 8, 64
BLOCKS, WIDTH, HEADS = 8, 48, 4
SHALLOW = (6, 4)
RATES = (2.5e-3, 5e-3, 1e-2)
DROP = 0.2
REMOVED = (1, 2, 3, 4, 5)
RANDOM = 2  # draws
SEEN = 128  # windows of the validation text that the rules see
MORE, MORE_RATES, HEALED = 150, (1e-3, 3e-3), (2, 4)


def dropout(model):
    """Put ordinary dropout at the end of every branch."""
    for block in model.blocks:
        block.attention.out = nn.Sequential(
            block.attention.out, nn.Dropout(DROP)
        )
        block.down = nn.Sequential(block.down, nn.Dropout(DROP))
    return model


def without_dropout(model):
    """Take it away: in evaluation it does nothing."""
    for block in model.blocks:
        block.attention.out, block.down = block.attention.out[0], block.down[0]
    return model


WAYS = {  # how a network is prepared for training, and put back
    "plain": (lambda model: model, lambda model: model),
    "layerdrop": (
        partial(depth.layerdrop, stack="blocks", rate=DROP),
        depth.unskipped,
    ),
    "stochastic depth": (
        partial(depth.stochastic_depth, stack="blocks"),
        depth.unskipped,
    ),
    "dropout": (dropout, without_dropout),
}


class Bench:
    """The text, the networks that were trained on it, and where they lie."""

    def __init__(self, store):
        self.store, self.task = store, data.reference()
        tokenizer = data.Tokenizer()
        self.vocab = tokenizer.size
        self.ids = tokenizer.encode(self.task.train)
        val = tokenizer.encode(self.task.val)[: SEEN * LENGTH + 1]
        self.val, self.seen = val, val[:-1].view(SEEN, LENGTH)
        self.folder = store.path.with_suffix("")
        self.folder.mkdir(exist_ok=True)

    def fit(self, model, steps, lr, seed):
        feed = train.passages(
            self.ids, length=LENGTH, size=SIZE, steps=steps, seed=seed
        )
        return train.fit(model, feed, lr=lr, clip=1.0, seed=seed)

    def trained(self, name, seed, lr):
        """Train a network, or load it."""
        path = self.folder / f"{name}-{seed}-{lr}.mc"
        if not path.exists():
            blocks = name if name in SHALLOW else BLOCKS
            prepare, put_back = WAYS["plain" if name in SHALLOW else name]
            torch.manual_seed(seed)
            model = models.LM(
                vocab=self.vocab,
                width=WIDTH,
                layers=blocks,
                heads=HEADS,
                ff=4 * WIDTH,
                context=LENGTH,
            )
            model = self.fit(prepare(model), STEPS, lr, seed)
            storage.save(path, put_back(model))
        return storage.load(path)

    def rate(self, name):
        """Choose the learning rate by the first seed."""

        def bits(lr):
            return zoo.quality(self.trained(name, 0, lr), self.task, "val")

        found = {
            lr: self.store.get(f"rate/{name}/{lr}", partial(bits, lr))
            for lr in RATES
        }
        return min(found, key=found.get)

    def test(self, model):
        return round(zoo.quality(model, self.task), 4)

    def cost(self, model):
        return train.bits_per_char(model, self.val)

    def without(self, model, keep):
        return depth.remove_blocks(model, "blocks", keep, self.seen[:1])


def mask(gone):
    """Keep all blocks but some."""
    keep = torch.ones(BLOCKS, dtype=torch.bool)
    keep[list(gone)] = False
    return keep


def every_other(n):
    """Keep what the rule keeps, if it removes n blocks at some rate."""
    keep = depth.every_other(BLOCKS, rate=n / BLOCKS) if n <= 4 else mask(())
    return [keep] if (~keep).sum() == n else []


def choices(bench, model, seed):
    """Let every rule say which blocks stay, for each number that go."""
    batches = bench.seen.split(16)
    influence = depth.block_influence(model, "blocks", batches)
    order = depth.greedy_blocks(
        model, "blocks", bench.cost, bench.seen[:1], remove=max(REMOVED)
    )
    dice = torch.Generator().manual_seed(seed)
    found = {}
    for n in REMOVED:
        angle = depth.angular_distance(model, "blocks", batches, span=n)
        first = int(angle.argmin())
        draws = [torch.randperm(BLOCKS, generator=dice) for _ in range(RANDOM)]
        found[n] = {
            "every other": every_other(n),
            "influence": [prune.keep(influence, sparsity=n / BLOCKS)],
            "angle": [mask(range(first, first + n))],
            "greedy": [mask(order[:n])],
            "random": [mask(p[:n].tolist()) for p in draws],
        }
    return influence, order, found


def removed(bench, name, seed, lr):
    """Remove blocks of a network in all ways; measure what is left."""
    model = bench.trained(name, seed, lr)
    influence, order, found = choices(bench, model, seed)
    alone = [bench.cost(bench.without(model, mask([i]))) for i in range(BLOCKS)]
    rows, known = [], {}  # rules agree now and then
    for n, rules in found.items():
        for rule, masks in rules.items():
            for keep in masks:
                gone = (~keep).nonzero()[:, 0].tolist()
                if str(gone) not in known:
                    small = bench.without(model, keep)
                    known[str(gone)] = bench.test(small)
                row = {"rule": rule, "removed": n, "gone": gone}
                rows.append({**row, "bits": known[str(gone)]})
    return {
        "bits": bench.test(model),
        "influence": [round(x, 4) for x in influence.tolist()],
        "alone": [round(x, 4) for x in alone],
        "order": order,
        "rows": rows,
    }


def healed(bench, model, seed, lr):
    """Train for some more steps."""
    model = bench.fit(model, MORE, lr, 100 + seed)
    val = zoo.quality(model, bench.task, "val")
    return {"val": round(val, 4), "bits": bench.test(model)}


def starts(bench, rates, orders, seed):
    """Collect the networks that train on: whole, shortened and shallow."""
    for name in ("plain", "layerdrop"):
        model = bench.trained(name, seed, rates[name])
        yield f"{name}, 0", model
        for n in HEALED:
            keep = mask(orders[name, seed][:n])
            yield f"{name}, {n}", bench.without(model, keep)
    for blocks in SHALLOW:
        yield f"{blocks} blocks", bench.trained(blocks, seed, rates[blocks])


def heal(bench, rates, orders):
    """Let all of them train on, at the rate that the first seed chose."""
    chosen, found = {}, {}
    for seed in tqdm(range(SEEDS), desc="more steps"):
        for name, model in starts(bench, rates, orders, seed):
            tried = {
                lr: bench.store.get(
                    f"healed/{name}/{seed}/{lr}",
                    partial(healed, bench, model, seed, lr),
                )
                for lr in ([chosen[name]] if seed else MORE_RATES)
            }
            if not seed:
                chosen[name] = min(tried, key=lambda lr: tried[lr]["val"])
            found.setdefault(name, []).append(tried[chosen[name]]["bits"])
    return {n: {"rate": chosen[n], "bits": bits} for n, bits in found.items()}


def main():
    store = Store(__file__)
    bench = Bench(store)
    rates, found, orders = {}, {}, {}
    for name in WAYS:
        rates[name] = bench.rate("plain")
        for seed in tqdm(range(SEEDS), desc=name):
            row = store.get(
                f"removed/{name}/{seed}",
                partial(removed, bench, name, seed, rates[name]),
            )
            found.setdefault(name, []).append(row)
            orders[name, seed] = row["order"]
    for blocks in SHALLOW:
        rates[blocks] = bench.rate(blocks)
        found[f"{blocks} blocks"] = [
            store.get(
                f"shallow/{blocks}/{seed}",
                lambda b=blocks, s=seed: {
                    "bits": bench.test(bench.trained(b, s, rates[b]))
                },
            )
            for seed in tqdm(range(SEEDS), desc=f"{blocks} blocks")
        ]
    _stamp.write(
        __file__,
        {
            "blocks": BLOCKS,
            "width": WIDTH,
            "drop": DROP,
            "steps": {"all": STEPS, "more": MORE},
            "text": bench.task.hash,
            "rates": {str(name): lr for name, lr in rates.items()},
            "runs": found,
            "more": heal(bench, rates, orders),
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
