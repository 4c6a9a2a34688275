"""Fine-tune with less memory: forget activations and compute them again.

    python chapters/experiments/recomputed_encoder.py

One training step of the published encoder with a linear layer on top, and of
the book's language model: what autograd keeps between the two passes, the
largest amount of memory that the step's tensors take at one moment, the
resident memory of a process that does it, and the CPU time, all ways in turns.
Ways: nothing forgotten, every second block, every block, and segments of
several blocks; all weights trained, or low-rank changes alone.  The gradients
must be the same, bit for bit.  Chains of equal layers show the law of the
square root.  Beside it stands what else a training keeps, by count.
"""

import json
import os
import subprocess
import sys
import time
from functools import cache, partial
from pathlib import Path

import _pruning
import _stamp
import torch
from finetuned_encoder import Classifier
from pruned_encoder import passages
from streamed_blocks import kilobytes
from torch import nn
from tqdm import tqdm

from minicompress import data, lowrank, measure, train, zoo

CHAINS = (16, 36, 64, 100)
TOKENS, WIDTH = 4096, 16  # of a chain: activations, not weights, take memory
CLASSES, RANK, REPEATS = 27, 8, 7
WAYS = ("nothing", "every second block", "every block")
SEGMENTS = (2, 3, 6)  # blocks in one
BATCHES = (1, 4, 16, 64)
TRAINED = ("all", "low rank")
LM_BATCH, LM_LENGTH = 8, 128


class Segment(nn.Module):
    """Some blocks as one."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, *args):
        for block in self.blocks:
            x = block(x, *args)
        return x


@cache
def encoder():
    """Return the model, the path of its blocks, and one batch."""
    model, tokenizer = zoo.encoder()
    model.pooler = None  # nothing of the loss hangs on it
    ids = passages(tokenizer)[0]  # 16 of 64 tokens
    y = torch.arange(len(ids)) % CLASSES
    return Classifier(model, CLASSES), "encoder.blocks", (ids, y)


@cache
def language():
    ids = data.Tokenizer().encode(zoo.task("reference-lm").train)
    batch = next(
        iter(train.passages(ids, length=LM_LENGTH, size=LM_BATCH, steps=1))
    )
    return zoo.load("reference-lm"), "blocks", batch


MODELS = {"encoder": encoder, "language model": language}


def ways(name):
    """List the ways that the blocks of a model allow."""
    model, path, _ = MODELS[name]()
    count = len(model.get_submodule(path))
    return [*WAYS, *(f"segments of {k}" for k in SEGMENTS if count % k == 0)]


def prepared(name, trained, way):
    """Build a model for one way of training it."""
    model, path, _ = MODELS[name]()
    blocks = model.get_submodule(path)
    if trained == "low rank":
        names = [
            f"{path}.{n}" for n, w in blocks.named_parameters() if w.ndim > 1
        ]
        model = lowrank.lora(model, names, rank=RANK)
    # recompute copies the model: this one is left as it is
    model = train.recompute(model, [])
    blocks = list(model.get_submodule(path))
    if way.startswith("segments"):
        k = int(way.split()[-1])
        groups = (blocks[i : i + k] for i in range(0, len(blocks), k))
        blocks = [Segment(group) for group in groups]
        model.set_submodule(path, nn.ModuleList(blocks))
    step = {"nothing": len(blocks), "every second block": 2}.get(way, 1)
    names = [f"{path}.{i}" for i in range(0, len(blocks), step)]
    return train.recompute(model, [] if way == "nothing" else names).train()


def step(model, batch):
    """Go forward and backward; leave the gradients in the model."""
    model.zero_grad()
    train.cross_entropy(model, batch).backward()


def gradients(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


def kept(model):
    """Count the bytes that do not depend on the batch, for Adam."""
    every = sum(p.nbytes for p in model.parameters())
    free = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {"weights": every, "gradients": free, "moments": 2 * free}


def memory(name, trained, way):
    """Measure what one way keeps, and whether its gradients are the same."""
    model, batch = prepared(name, trained, way), MODELS[name]()[2]
    plain = prepared(name, trained, "nothing")
    step(plain, batch)
    saved = train.saved_bytes(lambda: train.cross_entropy(model, batch))
    peak = measure.peak_memory(step, model, batch)
    same = zip(gradients(model), gradients(plain), strict=True)
    return {
        "saved": saved,
        "peak": peak,
        "process": apart([name, trained, way]),
        "equal": all(torch.equal(a, b) for a, b in same),
        **kept(model),
    }


def apart(job):
    """Measure the peak of one step in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(job)],
        capture_output=True,
        text=True,
        check=True,
        # memory that is freed goes back at once, not when malloc likes to
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def work(name, trained, way):
    """Return how much the resident memory of this process rises in a step."""
    model, batch = prepared(name, trained, way), MODELS[name]()[2]
    small = [x[:1, :8] if x.ndim > 1 else x[:1] for x in batch]
    step(model, small)  # what is loaded when it is used first
    model.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = kilobytes("VmRSS")
    step(model, batch)
    return 1024 * (kilobytes("VmHWM") - before)


def times(name, trained):
    """Measure the CPU seconds of a step, all ways in turns."""
    nets = {way: prepared(name, trained, way) for way in ways(name)}
    batch = MODELS[name]()[2]
    found = {way: [] for way in nets}
    for i in range(-1, REPEATS):
        for way, model in nets.items():
            start = time.process_time()
            step(model, batch)
            if i >= 0:
                found[way].append(time.process_time() - start)
    seconds = {way: float(torch.tensor(t).median()) for way, t in found.items()}
    return {
        way: {
            "milliseconds": round(1e3 * t, 1),
            "ratio": round(t / seconds["nothing"], 3),
        }
        for way, t in seconds.items()
    }


def forward_share(name):
    """Measure which part of a step is its forward pass."""
    model, batch = prepared(name, "all", "nothing"), MODELS[name]()[2]
    parts = []
    for _ in range(REPEATS):
        start = time.process_time()
        loss = train.cross_entropy(model, batch)
        middle = time.process_time()
        loss.backward()
        end = time.process_time()
        parts.append((middle - start) / (end - start))
    return round(float(torch.tensor(parts).median()), 3)


def by_batch(way):
    """Measure what the encoder keeps for batches of several sizes."""
    model, (ids, _) = prepared("encoder", "all", way), encoder()[2]
    found = {}
    for size in BATCHES:
        some = ids.repeat(-(-size // len(ids)), 1)[:size]
        y = torch.arange(size) % CLASSES
        loss = partial(train.cross_entropy, model, (some, y))
        found[size] = train.saved_bytes(loss)
    return found


def chain(n):
    """Measure the peak of a chain of n layers in k segments, in outputs."""
    x = torch.ones(TOKENS, WIDTH, requires_grad=True)
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(n)
    ]

    def run(model):
        # of the input only: what the weights' gradients take is left out
        torch.autograd.grad(model(x).sum(), x)

    found = {}
    for k in (k for k in range(1, n + 1) if n % k == 0):
        size = n // k
        parts = [nn.Sequential(*layers[i * size :][:size]) for i in range(k)]
        model = nn.Sequential(*parts)
        model = train.recompute(model, map(str, range(k)))
        model.requires_grad_(False)
        found[k] = round(measure.peak_memory(run, model) / x.nbytes, 2)
    plain = nn.Sequential(*layers).requires_grad_(False)
    whole = measure.peak_memory(run, plain) / x.nbytes
    return {"segments": found, "whole": round(whole, 2)}


def main():
    store = _pruning.Store(__file__)
    jobs = [(n, t, w) for n in MODELS for t in TRAINED for w in ways(n)]
    found = {name: {t: {} for t in TRAINED} for name in MODELS}
    for name, trained, way in tqdm(jobs):
        job = partial(memory, name, trained, way)
        row = store.get(f"{name}, {trained}, {way}", job)
        found[name][trained][way] = row
    for name in MODELS:
        for trained in TRAINED:
            took = store.get(
                f"{name}, {trained}", partial(times, name, trained)
            )
            for way, row in took.items():
                found[name][trained][way] |= row
    result = {
        "tokens": {
            "encoder": [16, 64],
            "language model": [LM_BATCH, LM_LENGTH],
        },
        "rank": RANK,
        "models": found,
        "forward": {
            name: store.get(f"forward, {name}", partial(forward_share, name))
            for name in MODELS
        },
        "by batch": {
            way: store.get(f"by batch, {way}", partial(by_batch, way))
            for way in ("nothing", "every block")
        },
        "chains": {
            n: store.get(f"chain {n}", partial(chain, n)) for n in CHAINS
        },
    }
    _stamp.write(__file__, result)


if __name__ == "__main__":
    with train.threads(1):
        if len(sys.argv) > 1:
            print(json.dumps(work(*json.loads(sys.argv[1]))))
        else:
            main()
