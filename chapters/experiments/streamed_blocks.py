"""Compress block by block: the memory it takes, and what 7 billion would.

    python chapters/experiments/streamed_blocks.py

The published encoder and language models of random weights, 2 to 32 blocks
deep, are compressed by GPTQ, 4 bits in groups of 64, twice: with the tensors
read from the file when a block needs them, and with all of them in memory
from the start.  All else is the same, so the files must be equal, byte for
byte.  Each run is a process of its own; its peak is the resident memory above
that of a process which has imported and used everything once.  Under a hard
limit between the two peaks one of them has to fail.  A formula for the peak
is compared with what the tensors take at other sizes, then used for a model of
7 billion parameters, which is arithmetic.  Ctrl-C is harmless: the same
command goes on from where it stopped.
"""

import json
import math
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import _pruning
import _stamp
import torch
from pruned_encoder import by_block, passages
from tqdm import tqdm

from minicompress import measure, models, pipeline, quantize, train, zoo
from minicompress.zoo.checkpoint import open_safetensors
from minicompress.zoo.pretrained import installed

BITS, GROUP = 4, 64
DEPTHS = (2, 4, 8, 16, 32)
WIDTH, VOCAB, CONTEXT = 512, 8192, 64
PASSAGES, SIZE = 16, 4  # of CONTEXT tokens each, and in a batch
WIDTHS = (128, 256, 384, 512)  # for the formula
MODES = ("streamed", "whole")


def gptq(W, x):
    """Round a matrix; the grid of a group is that of the weights by then."""
    rule = partial(quantize.min_max, bits=BITS)
    grid = rule(W, each=GROUP)
    return quantize.gptq(W, x.H.float(), grid, renew=rule)


def eight(name, w):
    """Round the rows of a table to 8 bits."""
    return quantize.min_max(w, bits=8)


def sizes(layers, width):
    heads, ff = width // 64, 4 * width
    return {
        "vocab": VOCAB,
        "width": width,
        "layers": layers,
        "heads": heads,
        "ff": ff,
        "context": CONTEXT,
    }


def synthetic(path, layers, width):
    """Open a file of random weights, made tensor by tensor."""
    with torch.device("meta"):
        model = models.LM(**sizes(layers, width))
    if not path.exists():
        random_file(path, model)
    return model, open_safetensors(path)


def random_file(path, model):
    """Write a safetensors file whose values are drawn one after the other."""
    shapes = {n: w.shape for n, w in model.named_parameters()}
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * shape.numel()
        entry = {"dtype": "F32", "shape": list(shape)}
        header[name] = entry | {"data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    dice = torch.Generator().manual_seed(0)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.1
            w = scale * torch.randn(shape, generator=dice)
            w = 1 + w if "norm" in name and "weight" in name else w
            file.write(w.numpy().tobytes())


def tokens():
    """Draw passages of tokens that mean nothing."""
    dice = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (PASSAGES, CONTEXT), generator=dice)
    return list(ids.split(SIZE))


def kilobytes(key):
    """Read a line of what Linux knows about this process."""
    text = Path("/proc/self/status").read_text()
    (line,) = [s for s in text.splitlines() if s.startswith(f"{key}:")]
    return int(line.split()[1])


def work(job, files):
    """Do one job in this process; return its peak and the seconds."""
    path = Path(files, f"{job['layers']}.safetensors")
    if job["layers"]:
        (model, tensors), batches = synthetic(path, job["layers"], WIDTH), None
    else:
        model, tensors = zoo.unread(installed())
    batches = tokens() if job["layers"] else passages(zoo.encoder()[1])
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before, start = kilobytes("VmRSS"), time.process_time()
    if job["limit"]:
        limit = 1024 * kilobytes("VmData") + job["limit"]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    folder = Path(files, f"{job['layers']} {job['mode']} {bool(job['limit'])}")
    error = None
    try:
        tensors = dict(tensors) if job["mode"] == "whole" else tensors
        args = (model, tensors, batches, gptq, folder)
        pipeline.streamed(*args, tables=eight)
    except (MemoryError, RuntimeError) as e:
        what = str(e).split("\n")[0].rpartition("DefaultCPUAllocator: ")[2]
        error = f"{type(e).__name__}: {what}"
    return {
        **job,
        "peak": 1024 * (kilobytes("VmHWM") - before),
        "seconds": round(time.process_time() - start, 1),
        "error": error,
        "files": sum(p.stat().st_size for p in folder.glob("*.mc")),
    }


def warm_up():
    """Use once what is loaded when it is used first."""
    net = torch.nn.Sequential(*map(torch.nn.Linear, [8, 8], [8, 8]))
    with tempfile.TemporaryDirectory() as folder:
        pipeline.streamed(
            torch.nn.ModuleDict({"blocks": net}),
            net.state_dict(prefix="blocks."),
            [torch.randn(20, 8)],
            gptq,
            folder,
            forward=lambda model, x: model.blocks(x),
        )


def apart(job, files):
    """Do a job in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(job), str(files)],
        capture_output=True,
        text=True,
        check=True,
        # memory that is freed goes back at once, not when malloc likes to
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def equal_files(a, b):
    """Compare the files of two folders."""
    names = sorted(p.name for p in Path(a).iterdir())
    same = names == sorted(p.name for p in Path(b).iterdir())
    return same and all(
        Path(a, name).read_bytes() == Path(b, name).read_bytes()
        for name in names
    )


def equal_model(folder):
    """Compare with the whole encoder, compressed as in chapter 3."""
    model, tokenizer = zoo.encoder()
    small = pipeline.assembled(folder)
    for name, w in model.named_parameters():
        if w.ndim > 1 and not name.startswith("blocks."):
            w.data = eight(name, w.detach()).decode()
    want = by_block(
        model, passages(tokenizer), lambda W, x: gptq(W, x).decode()
    )
    return all(
        torch.equal(w, small.get_parameter(name))
        for name, w in want.named_parameters()
    )


def pairs(layers, files):
    """Compress one model in both ways; then both under one limit."""
    job = {"layers": layers, "limit": 0}
    rows = [apart(job | {"mode": mode}, files) for mode in MODES]
    a, b = (Path(files, f"{layers} {mode} False") for mode in MODES)
    found = {"rows": rows, "equal": equal_files(a, b)}
    if not layers:
        found["as in chapter 3"] = equal_model(a)
    if layers in (0, DEPTHS[-1]):
        # data alone counts for the limit, and resident memory has more
        limit = (rows[0]["peak"] + rows[1]["peak"]) // 2
        job = {"layers": layers, "limit": limit}
        found["limited"] = [
            apart(job | {"mode": mode}, files) for mode in MODES
        ]
    return found


@dataclass(frozen=True)
class Block:
    """The matrices (out, in) of one block."""

    width: int
    matrices: tuple

    @property
    def weights(self):
        return sum(out * n for out, n in self.matrices)


def ours(width):
    ff = 4 * width
    attention = ((width, width),) * 4
    return Block(width, (*attention, (ff, width), (width, ff)))


def llama(width=4096, ff=11008):
    attention = ((width, width),) * 4
    gated = ((ff, width), (ff, width), (width, ff))
    return Block(width, attention + gated)


def peak(block, count):
    """Say which bytes there are at the peak, for `count` tokens.

    That is inside of GPTQ, at the matrix with the most inputs n, which is the
    last one: its sums and their mean in float64 and float32, the factor of
    its inverse, and what making that takes, five n² in float32.
    """
    out, n = max(block.matrices, key=lambda shape: shape[1])
    return {
        "outputs of a block": 4 * count * block.width,
        "weights of a block": 4 * block.weights,
        "codes of a block": block.weights,
        "second moments": (8 + 4) * n**2,
        "their factor": 5 * 4 * n**2,
        "weights in work": 2 * 4 * out * n,
    }


def metered(width):
    """Measure the bytes of tensors at the peak, for two blocks."""
    with tempfile.TemporaryDirectory() as files:
        model, tensors = synthetic(Path(files, "x.safetensors"), 2, width)

        def run():
            pipeline.streamed(
                model, tensors, tokens(), gptq, Path(files, "small")
            )

        measured = measure.peak_memory(run)
    formula = sum(peak(ours(width), PASSAGES * CONTEXT).values())
    return {
        "width": width,
        "measured": measured,
        "formula": formula,
        "ratio": round(formula / measured, 3),
    }


def plan(machine):
    """Work out what LLaMA-2-7B would take: arithmetic, not a measurement."""
    block, blocks, vocab, group = llama(), 32, 32_000, 128
    width, count = block.width, 128 * 2048
    tables = 2 * vocab * width  # input and output are not tied
    every = blocks * (block.weights + 2 * width) + tables + width
    matrices = block.matrices
    work = {  # multiply-accumulates
        "forward, twice": 2 * blocks * count * block.weights,
        "second moments": blocks * count * sum(n * n for _, n in matrices),
        # Cholesky n³ / 6, the inverse of a triangle by halves n³ / 3
        "factors": blocks * sum(n**3 for _, n in matrices) // 2,
        "columns": blocks * sum(o * n * n for o, n in matrices) // 2,
    }
    total = sum(work.values())
    stored = BITS + (16 + BITS) / group  # a scale and a zero for each group
    return {
        "parameters": every,
        "bytes of the model": {"float32": 4 * every, "float16": 2 * every},
        "bytes of a block": {
            "float32": 4 * block.weights,
            "float16": 2 * block.weights,
        },
        "tokens": count,
        "peak": {**(parts := peak(block, count)), "sum": sum(parts.values())},
        "bits a weight": round(stored, 5),
        "bytes of the result": {
            "blocks": math.ceil(blocks * block.weights * stored / 8),
            "tables in float16": 2 * tables,
        },
        "macs": work | {"sum": total},
        "seconds": {
            "here, one core": round(total / machine.peak),
            "at 10 tera-MACs a second": round(total / 1e13),
        },
        "macs a second here": float(f"{machine.peak:.3g}"),
    }


def main():
    store = _pruning.Store(__file__)
    found = {}
    for layers in tqdm([0, *DEPTHS]):
        with tempfile.TemporaryDirectory() as files:
            pair = partial(pairs, layers, files)
            found[layers] = store.get(f"layers {layers}", pair)
    formula = [
        store.get(f"width {width}", partial(metered, width)) for width in WIDTHS
    ]
    result = {
        "bits": BITS,
        "group": GROUP,
        "encoder": found.pop(0),
        "depth": {"width": WIDTH, "vocab": VOCAB}
        | {"tokens": PASSAGES * CONTEXT, "pairs": list(found.values())},
        "formula": formula,
        "plan": store.get("plan", lambda: plan(measure.machine())),
    }
    _stamp.write(__file__, result)


if __name__ == "__main__":
    with train.threads(1):
        if len(sys.argv) > 1:
            print(json.dumps(work(json.loads(sys.argv[1]), sys.argv[2])))
        else:
            main()
