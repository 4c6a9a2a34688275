"""Every way to round the weights of a model, called the same way.

`AFTER` rounds a trained model; `WHILE` trains it with the rounding in place.
A new method is one line.  `table` makes all rows for one kind of model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from _pruning import Store
from tqdm import tqdm

from minicompress import calibrate, codes, quantize, storage, through, zoo

RATES = tuple(float(f"{x}e-{n}") for n in range(6, 0, -1) for x in (1, 3))
GROUP = 32


def whole(low, high=8):
    return tuple(range(low, high + 1))


@dataclass(frozen=True)
class After:
    """Rounding that needs no training: (W, bits, stats) -> Code."""

    bits: tuple
    code: Callable
    data: bool = False  # whether it looks at the statistics of the inputs


def plain(rule, **options):
    return lambda W, bits, stats: rule(W, bits=bits, **options)


def gptq(W, bits, stats):
    return quantize.gptq(W, stats.H.float(), quantize.mse(W, bits=bits))


def gptq_group(W, bits, stats):
    grid = quantize.mse(W, bits=bits, each=GROUP)
    renew = partial(quantize.mse, bits=bits)
    return quantize.gptq(W, stats.H.float(), grid, renew=renew)


def awq(W, bits, stats):
    rule = partial(quantize.min_max, bits=bits, each=GROUP)
    return quantize.awq(W, stats, rule)


def adaround(W, bits, stats):
    grid = quantize.mse(W, bits=bits)
    return quantize.adaround(W, stats.H, grid, steps=500)


AFTER = {
    "min-max, tensor": After(whole(1), plain(quantize.min_max, each="tensor")),
    "min-max, row": After(whole(1), plain(quantize.min_max)),
    "min-max, group": After(whole(1), plain(quantize.min_max, each=GROUP)),
    "MSE, row": After(whole(1), plain(quantize.mse)),
    "MSE, group": After(whole(1), plain(quantize.mse, each=GROUP)),
    "GPTQ, row": After(whole(1), gptq, data=True),
    "GPTQ, group": After(whole(1), gptq_group, data=True),
    "AWQ, group": After(whole(1), awq, data=True),
    "AdaRound, row": After(whole(1, 5), adaround, data=True),
    "binary, row": After((1,), lambda W, bits, stats: quantize.binary(W)),
    "ternary, row": After((1.58,), lambda W, bits, stats: quantize.ternary(W)),
}


@dataclass(frozen=True)
class While:
    """Rounding to train through: f and code, and what else is trained."""

    bits: tuple
    f: Callable
    code: Callable
    tensors: Callable = lambda w, bits: {}
    named: bool = True  # whether f and code ask for the bits


def steps(w, bits, **options):
    return {"scale": quantize.lsq_scale(w, bits=bits, **options)}


def sizes(w, bits):
    alpha = quantize.twn(w, each="tensor").decode().abs().max()
    return {"positive": alpha, "negative": alpha}


def signs(w):
    return quantize.distinct(quantize.binary_connect(w))


WHILE = {
    "STE, tensor": While(
        whole(2),
        partial(quantize.ste, each="tensor"),
        partial(quantize.ste_code, each="tensor"),
    ),
    "STE, row": While(whole(2), quantize.ste, quantize.ste_code),
    "LSQ, tensor": While(whole(2), quantize.lsq, quantize.lsq_code, steps),
    "LSQ, row": While(
        whole(2), quantize.lsq, quantize.lsq_code, partial(steps, each="row")
    ),
    "DoReFa": While(whole(1), quantize.dorefa_weights, quantize.dorefa_code),
    "BinaryConnect": While((1,), quantize.binary_connect, signs, named=False),
    "XNOR, weights": While(
        (1,), quantize.xnor_weights, quantize.binary, named=False
    ),
    "TWN": While((1.58,), quantize.twn_weights, quantize.twn, named=False),
    "TTQ": While((1.58,), quantize.ttq, quantize.ttq_code, sizes, named=False),
    "BitNet b1.58": While(
        (1.58,), quantize.bitnet_weights, quantize.bitnet, named=False
    ),
}


def rounded(model, names, method, bits, batches, fixed):
    """Round after the training; return {name: code}.

    The methods that look at data see the inputs of each layer as the layers
    before, already rounded, make them.
    """
    how = AFTER[method]

    def code(W, stats=None):
        made = how.code(W.flatten(1), bits, stats)
        return made if W.ndim == 2 else codes.View(made, tuple(W.shape))

    weights = dict(model.named_parameters(remove_duplicate=False))
    if not how.data:
        return {n: code(weights[n].detach()) for n in names} | fixed
    made = dict(fixed)

    def compress(name, layer, stats):
        made[name] = code(layer.weight.detach(), stats)
        return made[name]

    model = loaded(model, fixed)[0]
    calibrate.sequential(
        model, batches, compress, where=lambda n, w: n in names
    )
    return made


def loaded(model, made, **meta):
    """Write a model with some codes to a file: what it reads, its bytes."""
    state = codes.encode(model, codes.value, lambda n, w: False) | made
    file = storage.dumps(model, state, meta=meta)
    return storage.loads(file), len(file)


def attached(model, names, method, bits):
    """Return a copy of the model whose weights are rounded as it trains."""
    how = WHILE[method]
    f = partial(how.f, bits=bits) if how.named else how.f
    weights = dict(model.named_parameters())
    tensors = {}
    for name in names:
        for k, t in how.tensors(weights[name].detach(), bits).items():
            tensors.setdefault(k, {})[name] = torch.nn.Parameter(t)
    return through.attach(model, names, f, **tensors)


def lsq_inputs(x, scale, *, bits):
    one = x[0].numel()  # features of a sample
    return quantize.lsq(x, scale, bits=bits, signed=False, count=one)


# f, its tensor, and where that starts for a sample of inputs
INPUTS = {
    "LSQ": (
        lsq_inputs,
        "scale",
        lambda x, bits: quantize.lsq_scale(x, bits=bits, signed=False),
    ),
    "PACT": (quantize.pact, "alpha", lambda x, bits: x.max()),
}


def on_activations(tuned, model, names, inputs, batches):
    """Round the inputs of the layers too; none of them is negative here."""

    def where(name, w):
        return name in names

    kind, bits = inputs if isinstance(inputs, tuple) else ("LSQ", inputs)
    f, key, start = INPUTS[kind]
    stats = calibrate.inputs(model, batches, where=where)
    own = {
        n: torch.nn.Parameter(start(s.sample, bits)) for n, s in stats.items()
    }
    f = partial(f, bits=bits)
    return quantize.on_inputs(tuned, f, where=where, **{key: own})


def finished(tuned, method, bits):
    """Turn a trained copy into a model to measure, and count its bytes."""
    how = WHILE[method]
    code = partial(how.code, bits=bits) if how.named else how.code
    parts = {
        n: t.item() for n, t in tuned.named_parameters() if ".on_input." in n
    }
    if not parts:
        made = quantize.encode_trained(tuned, code)
        return loaded(through.bake(tuned), made)
    made = quantize.encode_trained(quantize.off(tuned), code)
    _, size = loaded(quantize.off(through.bake(tuned)), made, steps=parts)
    return through.bake(tuned), size


def quality(model, task, split="test"):
    """Per cent right, or bits per character."""
    value = zoo.quality(model, task, split)
    return value if hasattr(task, "hash") else 100 * value


def table(
    script,
    nets,
    task,
    *,
    calibration,
    leave=(),
    fixed=lambda net: {},
    after=None,
    tune=None,
    start=1e-2,
    trained=None,
):
    """Measure every method.

    nets         one for each seed
    calibration  batches for each seed: what the methods look at
    leave        names of layers that are not rounded here
    fixed        net -> {name: code} of weights that are rounded beforehand
    after        {method: bits} in place of all
    tune         (nets, lr) -> nets, the training with the rounding in place
    start        learning rate from which the search goes
    trained      {method: (bits, bits of the activations)}, likewise; the
                 latter may be ("PACT", bits), LSQ is used otherwise
    """
    store = Store(script)
    names = [n for n in calibrate.layers(nets[0]) if n not in leave]
    best = min if hasattr(task, "hash") else max

    same = all(n is nets[0] for n in nets)

    def row(pairs):
        once = {id(n): n for n, _ in pairs}
        found = {
            split: {i: quality(n, task, split) for i, n in once.items()}
            for split in ("test", "val")
        }
        return {
            "quality": [found["test"][id(n)] for n, _ in pairs],
            "val": [found["val"][id(n)] for n, _ in pairs],
            "bytes": [size for _, size in pairs],
        }

    def once(method, bits):
        pairs = list(zip(nets, calibration, strict=True))
        if same and not AFTER[method].data:  # then all seeds are alike
            pairs = pairs[:1]
        made = [
            loaded(n, rounded(n, names, method, bits, b, fixed(n)))
            for n, b in pairs
        ]
        return row(made * (len(nets) // len(pairs)))

    def search(begin, end, lr=None):
        """Train with rates around the first one until the best is inside."""
        tried = {}

        def mean(i):
            if i not in tried:
                tried[i] = row([end(n) for n in tune(begin, RATES[i])])
            return sum(tried[i]["val"])

        at = RATES.index(lr or start)
        while not lr:
            near = best((at - 1, at, at + 1), key=mean)
            if near == at:
                break
            at = near
        mean(at)
        return {"lr": RATES[at]} | tried[at]

    def along(method, bits, inputs, lr=None):
        begin = [attached(n, names, method, bits) for n in nets]
        if inputs:
            begin = [
                on_activations(t, n, names, inputs, b)
                for t, n, b in zip(begin, nets, calibration, strict=True)
            ]
        return search(begin, lambda n: finished(n, method, bits), lr)

    jobs = {}
    for method, how in AFTER.items():
        for bits in how.bits if after is None else after.get(method, ()):
            jobs["after", method, bits, None] = partial(once, method, bits)
    for method, pairs in (trained or {}).items():
        for bits, inputs in pairs:
            jobs["while", method, bits, inputs] = partial(
                along, method, bits, inputs
            )
    rows, rates = [], {}
    for (when, method, bits, inputs), job in tqdm(jobs.items()):
        key = f"{when}/{method}/{bits}/{inputs}"
        keys = {"when": when, "method": method, "bits": bits}
        if inputs:
            by, width = inputs if isinstance(inputs, tuple) else ("LSQ", inputs)
            keys |= {"activations": width, "inputs by": by}
        kind = method, type(inputs)
        if when == "while" and bits > 4 and kind in rates:
            job = partial(job, lr=rates[kind])  # the one of 4 bits will do
        rows.append(keys | store.get(key, job))
        rates[kind] = rows[-1].get("lr")
    found = {
        "weights": sum(
            dict(nets[0].named_parameters())[n].numel() for n in names
        ),
        "dense": row(
            [loaded(nets[0], {})] * len(nets)
            if same
            else [loaded(n, {}) for n in nets]
        ),
    }
    if tune:
        found["dense, trained on"] = store.get(
            "dense", lambda: search(nets, lambda n: loaded(n, {}))
        )
    return found | {"rows": rows}
