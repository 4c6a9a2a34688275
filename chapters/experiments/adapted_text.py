"""Low-rank changes beside the quantized weights of a language model.

    python chapters/experiments/adapted_text.py

The zoo's network in 2 to 5 bits, first as it is, then with the low-rank part
of its error given back, then with adapters trained on the text it was trained
on: is an adapter worth its bytes, or is one more bit better?  At last the
network learns another kind of text, docstrings, by adapters of several ranks
and by full fine-tuning.  Sizes are whole files; the adapters in them have 8
bits, or 16 where it says so, and what is measured is what the file decodes
to.  A seed draws the passages that data-aware methods see and those of the
training; learning rates are chosen on validation text by seed 0.
"""

import tempfile
from functools import cache, partial
from pathlib import Path

import _stamp
import torch
from _pruning import Store, layers
from tqdm import tqdm

from minicompress import (
    calibrate,
    codes,
    data,
    lowrank,
    quantize,
    storage,
    through,
    train,
    zoo,
)
from minicompress.data.text import ascii_only

SEEDS, SIZE, LENGTH = 3, 8, 128
BITS, CORRECTED_BITS, TRAINED_BITS, GROUP = (2, 3, 4, 5), (2, 3, 4), (2, 3), 64
RANKS, RANK, ROUNDS = (4, 8, 16), 8, 5
SEEN = 4  # batches
STEPS, RATES, FULL_RATES = 100, (1e-3, 3e-3), (3e-5, 3e-4)
NEW_STEPS, NEW_RANKS, NEW_RANK = 100, (1, 4, 16), 4
NEW_RATES, NEW_FULL_RATES = (3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2)


def nearest(W, bits, H):
    return quantize.mse(W, bits=bits)


def group(W, bits, H):
    return quantize.mse(W, bits=bits, each=GROUP)


def gptq(W, bits, H):
    return quantize.gptq(W, H.float(), quantize.mse(W, bits=bits))


RULES = {"nearest": nearest, "nearest, group": group, "GPTQ": gptq}


def small(factors, bits):
    """Store factors in 8 or 16 bits; columns of u have one length."""
    n = factors.u.norm(dim=0).clamp(min=1e-12)
    u, v = factors.u / n, factors.v * n[:, None]
    if bits == 16:
        return codes.Factors(u.half(), v.half())
    rule = partial(quantize.min_max, bits=8, symmetric=True)
    return codes.Factors(rule(u, each="tensor"), rule(v))


class Bench:
    """The network and its texts."""

    def __init__(self):
        self.model, self.task = (
            zoo.load("reference-lm"),
            zoo.task("reference-lm"),
        )
        self.names = layers(self.model, leave=("head.",))
        self.weights = dict(self.model.named_parameters())
        encode = data.Tokenizer().encode
        self.old = {
            part: encode(getattr(self.task, part))
            for part in ("train", "val", "test")
        }
        texts = [ascii_only(text) for text in data.docstrings().texts]
        dice = torch.Generator().manual_seed(0)
        order = torch.randperm(len(texts), generator=dice).tolist()
        a, b = 8 * len(texts) // 10, 9 * len(texts) // 10
        parts = {"train": order[:a], "val": order[a:b], "test": order[b:]}
        self.new = {
            part: encode("\n".join(texts[i] for i in numbers))
            for part, numbers in parts.items()
        }

    @cache  # noqa: B019
    def moments(self, seed):
        seen = train.passages(
            self.old["train"], length=LENGTH, size=SIZE, steps=SEEN, seed=seed
        )
        stats = calibrate.inputs(
            self.model, seen, where=lambda n, w: n in self.names
        )
        return {name: s.H for name, s in stats.items()}

    def base(self, make):
        """Return the state with a code from make(name, W) for each weight."""
        tokens = quantize.min_max(self.model.tokens.weight, bits=8)
        positions = quantize.min_max(self.model.positions.weight, bits=8)
        return (
            codes.encode(self.model, codes.value, lambda n, w: False)
            | {
                "tokens.weight": tokens,
                "head.weight": tokens,
                "positions.weight": positions,
            }
            | {n: make(n, self.weights[n].detach()) for n in self.names}
        )

    def quantized(self, rule, bits, seed):
        H = self.moments(seed)
        return self.base(lambda n, W: RULES[rule](W, bits, H[n]))

    def corrected(self, rule, bits, seed, rank, rounds=1, aware=False):
        """Quantize, and give the low-rank part of the error back."""
        H = self.moments(seed)
        return self.base(
            lambda n, W: lowrank.corrected(
                W,
                partial(RULES[rule], bits=bits, H=H[n]),
                rank=rank,
                rounds=rounds,
                H=H[n] if aware else None,
            )
        )

    def with_small(self, state, bits):
        """Put the factors of a state into few bits."""
        return {
            n: codes.Sum(x.a, small(x.b, bits)) if n in self.names else x
            for n, x in state.items()
        }

    def measured(self, state, split="test"):
        """Write a file; return its bits per character and its bytes."""
        file = storage.dumps(self.model, state)
        bits = train.bits_per_char(storage.loads(file), self.old[split])
        return {"bits": round(bits, 4), "bytes": len(file)}

    def fit(self, model, text, steps, lr, seed):
        feed = train.passages(
            text["train"],
            length=LENGTH,
            size=SIZE,
            steps=steps,
            seed=100 + seed,
        )
        return train.fit(model, feed, lr=lr, clip=1.0, seed=seed)

    def start(self, way, bits, seed):
        """Return a base in few bits and the adapter to start from, if any."""
        if way == "GPTQ, from zero":
            return self.quantized("GPTQ", bits, seed), None
        rule, rounds = ("GPTQ", 1) if "GPTQ" in way else ("nearest", ROUNDS)
        state = self.corrected(rule, bits, seed, RANK, rounds, rule == "GPTQ")
        base = {n: x.a if n in self.names else x for n, x in state.items()}
        return base, {n: state[n].b for n in self.names}

    def adapted(self, base, adapter, rank, text, steps, lr, seed):
        """Train an adapter on a base."""
        model = storage.loads(storage.dumps(self.model, base))
        if adapter is None:
            model = lowrank.lora(model, self.names, rank=rank, seed=seed)
        else:
            model = lowrank.with_adapter(model, adapter)
        return self.fit(model, text, steps, lr, seed)

    def trained(self, way, bits, lr, seed, split="test"):
        base, adapter = self.start(way, bits, seed)
        model = self.adapted(base, adapter, RANK, self.old, STEPS, lr, seed)
        state = lowrank.encode_adapted(model, base)
        return self.measured(self.with_small(state, 8), split)

    def longer(self, lr, seed, split="test"):
        """Fine-tune all float weights on the old text."""
        model = self.fit(self.model, self.old, STEPS, lr, seed)
        return round(train.bits_per_char(model, self.old[split]), 4)

    def moved(self, rank, bits, lr, seed, split="test"):
        """Learn the new text; return its bits, those of the old, bytes."""
        if rank is None:
            model = self.fit(self.model, self.new, NEW_STEPS, lr, seed)
            size = len(storage.dumps(model.half()))
            model = model.float()
        else:
            base = codes.encode(self.model, codes.value, lambda n, w: False)
            if bits is not None:
                base = self.quantized("GPTQ", bits, seed)
            model = self.adapted(
                base, None, rank, self.new, NEW_STEPS, lr, seed
            )
            change = {
                n: small(x, 16) for n, x in lowrank.adapter(model).items()
            }
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "adapter.mc"
                size = lowrank.save_adapter(path, change)
            model = storage.loads(storage.dumps(self.model, base))
            model = through.bake(lowrank.with_adapter(model, change))
        return {
            "bits": round(train.bits_per_char(model, self.new[split]), 4),
            "old": round(train.bits_per_char(model, self.old["test"]), 4),
            "bytes": size,
        }


def choose(store, key, rates, cost):
    """Choose a learning rate on validation text."""
    found = {lr: store.get(f"{key}/{lr}", partial(cost, lr)) for lr in rates}
    return min(found, key=found.get)


def once(bench, store):
    """Quantize and correct, without training."""
    plans = []  # rule, bits, rank, data-aware, rounds, bits of the adapter
    for bits in BITS:
        plans += [(rule, bits, 0, False, 0, 0) for rule in RULES]
        if bits not in CORRECTED_BITS:
            continue
        for rank in RANKS:
            plans.append(("nearest", bits, rank, False, 1, 8))
            plans.append(("nearest", bits, rank, True, 1, 8))
            plans.append(("GPTQ", bits, rank, True, 1, 8))
        plans.append(("nearest", bits, RANK, False, 1, 16))
        plans.append(("nearest", bits, RANK, False, ROUNDS, 8))

    def measured(plan, seed):
        rule, bits, rank, aware, rounds, kept = plan
        if not rank:
            return bench.measured(bench.quantized(rule, bits, seed))
        state = bench.corrected(rule, bits, seed, rank, rounds, aware)
        return bench.measured(bench.with_small(state, kept))

    rows = []
    keys = ("rule", "weight bits", "rank", "aware", "rounds", "adapter bits")
    for plan in tqdm(plans, desc="once"):
        seeds = SEEDS if plan[0] == "GPTQ" or plan[3] else 1
        found = [
            store.get(f"once/{plan}/{s}", partial(measured, plan, s))
            for s in range(seeds)
        ]
        rows.append(
            dict(zip(keys, plan, strict=True))
            | {"bytes": found[0]["bytes"], "bits": [f["bits"] for f in found]}
        )
    return rows


def after(bench, store):
    """Train adapters on the old text; and all weights, for comparison."""
    rows, rates = [], {}
    for way in tqdm(
        ("GPTQ, from zero", "GPTQ, from its correction", "LoftQ"),
        desc="trained",
    ):
        rates[way] = choose(
            store,
            f"lr/{way}",
            RATES,
            lambda lr, way=way: bench.trained(way, 3, lr, 0, "val")["bits"],
        )
        for bits in TRAINED_BITS:
            found = [
                store.get(
                    f"trained/{way}/{bits}/{s}",
                    partial(bench.trained, way, bits, rates[way], s),
                )
                for s in range(SEEDS)
            ]
            rows.append(
                {
                    "way": way,
                    "weight bits": bits,
                    "rank": RANK,
                    "bytes": found[0]["bytes"],
                    "bits": [f["bits"] for f in found],
                }
            )
    rates["full"] = choose(
        store, "lr/full", FULL_RATES, lambda lr: bench.longer(lr, 0, "val")
    )
    full = [
        store.get(f"full/{s}", partial(bench.longer, rates["full"], s))
        for s in range(SEEDS)
    ]
    return {"rates": rates, "rows": rows, "full, in float32": full}


def another(bench, store):
    """Learn the other text."""
    plans = [(r, None) for r in (None, *NEW_RANKS)] + [(NEW_RANK, 4)]
    rows = []
    for rank, bits in tqdm(plans, desc="another text"):
        key = f"{rank}/{bits}"

        def moved(lr, seed, split="test", plan=(rank, bits)):
            return bench.moved(*plan, lr, seed, split)

        lr = choose(
            store,
            f"new/lr/{key}",
            NEW_RATES if rank else NEW_FULL_RATES,
            lambda lr, moved=moved: moved(lr, 0, "val")["bits"],
        )
        found = [
            store.get(f"new/{key}/{lr}/{s}", partial(moved, lr, s))
            for s in range(SEEDS)
        ]
        rows.append(
            {"rank": rank, "base bits": bits, "bytes": found[0]["bytes"]}
            | {"lr": lr}
            | {k: [f[k] for f in found] for k in ("bits", "old")}
        )
    before = train.bits_per_char(bench.model, bench.new["test"])
    sizes = {part: len(ids) for part, ids in bench.new.items()}
    return {
        "characters": sizes,
        "before": round(before, 4),
        "rows": rows,
    }


def main():
    store, bench = Store(__file__), Bench()
    float32 = codes.encode(bench.model, codes.value, lambda n, w: False)
    _stamp.write(
        __file__,
        {
            "text": bench.task.hash,
            "steps": {"old": STEPS, "new": NEW_STEPS},
            "rank": RANK,
            "group": GROUP,
            "float32": bench.measured(float32),
            "once": once(bench, store),
            "trained": after(bench, store),
            "another text": another(bench, store),
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
