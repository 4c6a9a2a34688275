"""Rounding against torchao, neural-compressor, hqq and bitsandbytes.

What is timed is quantization and, but for GPTQ and the search for the best
grid, the way back to float32.  All grids are asymmetric, and errors are
compared, so that nobody is fast by being coarse.  hqq rounds its zeros to
whole numbers only before its search and stores them as floating point; ours
are whole, as 4-bit integers.
"""

import copy
from functools import partial

import torch
from torch import nn

from minicompress import obs, quantize, storage

from .harness import Missing, Row, peer, skipped, time_row

N = 4096
GROUP = 128


def rows():
    g = torch.Generator().manual_seed(0)
    W = torch.randn(N, N, generator=g) * 0.02
    for bits, each in ((8, "row"), (4, GROUP)):
        yield from grid_rows(W, bits, each)
    yield from search_rows(W[:2048, :2048].contiguous())
    yield from nf4_rows(W)
    for n in (1024, N):
        yield from gptq_rows(n)
    yield file_row(W[:1024, :1024].contiguous())


def error(W: torch.Tensor, Q: torch.Tensor) -> float:
    return float((W - Q).square().mean())


def grid_rows(W: torch.Tensor, bits: int, each: str | int):
    name = f"int{bits}" if each == "row" else f"int{bits} in groups of {each}"
    what = f"{name}, {N} x {N}, quantize and dequantize"

    def ours():
        return quantize.min_max(W, bits=bits, each=each).decode()

    makers = {"torchao": (by_torchao, 0.6), "neural-compressor": (by_inc, 1)}
    for who, (make, most) in makers.items():
        try:
            theirs = make(W, bits, each)
        except Missing as missing:
            yield skipped(what, f"<= {most:g}x {who}", missing)
            continue
        assert error(W, ours()) <= 1.01 * error(W, theirs())
        yield time_row(what, ours, theirs, who, most)


def by_torchao(W: torch.Tensor, bits: int, each: str | int):
    ao = peer("torchao.quantization.quant_primitives")
    block = (1, N if each == "row" else each)
    ends = {"quant_min": 0, "quant_max": 2**bits - 1}

    def round_trip():
        scale, zero = ao.choose_qparams_affine(
            W, ao.MappingType.ASYMMETRIC, block, torch.uint8, **ends
        )
        q = ao.quantize_affine(W, block, scale, zero, torch.uint8, **ends)
        return ao.dequantize_affine(q, block, scale, zero, torch.uint8, **ends)

    return round_trip


def by_inc(W: torch.Tensor, bits: int, each: str | int):
    inc = peer("neural_compressor.torch.algorithms.weight_only.utility")
    size = -1 if each == "row" else each
    # it works in place; here as for the others the weights are kept
    return lambda: inc.quant_tensor(W.clone(), bits=bits, group_size=size)


def search_rows(W: torch.Tensor):
    what = f"int4 in groups of {GROUP} with the least error, 2048 x 2048"
    try:
        hqq = peer("hqq.core.quantize").Quantizer
    except Missing as missing:
        yield skipped(what, "<= 0.1x hqq", missing)
        yield skipped(f"{what}: squared error", "<= 0.96x hqq", missing)
        return
    ours = partial(quantize.mse, W, bits=4, each=GROUP)
    theirs = partial(
        hqq.quantize,
        W,
        nbits=4,
        group_size=GROUP,
        axis=1,
        round_zero=True,  # its default for 4 bits
        compute_dtype=torch.float32,
        device="cpu",
        bitpack=False,
    )
    yield time_row(what, ours, theirs, "hqq", 0.1, runs=3)
    a, b = error(W, ours().decode()), error(W, hqq.dequantize(*theirs()))
    yield Row(
        f"{what}: squared error",
        f"{a:.3g}",
        f"{b:.3g}",
        a / b,
        "<= 0.96x hqq",
        a <= 0.96 * b,
    )


def nf4_rows(W: torch.Tensor):
    what = f"NF4 in groups of 64, {N} x {N}, quantize and dequantize"
    try:
        bnb = peer("bitsandbytes.functional")
    except Missing as missing:
        yield skipped(what, "<= 0.8x bitsandbytes", missing)
        return

    def ours():
        return quantize.nf4(W).decode()

    def theirs():
        found = bnb.quantize_4bit(W, quant_type="nf4", blocksize=64)
        return bnb.dequantize_4bit(*found)

    assert error(W, ours()) <= 1.0001 * error(W, theirs())
    yield time_row(what, ours, theirs, "bitsandbytes", 0.8)


def layer(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make weights and second moments of inputs with a falling spectrum."""
    g = torch.Generator().manual_seed(1)
    W = torch.randn(n, n, generator=g) * 0.02
    rank = n // 8
    Z = torch.randn(2048, rank, generator=g)
    mix = torch.randn(rank, n, generator=g) / rank**0.5
    size = torch.rand(n, generator=g) * 2 + 0.1  # inputs of unequal size
    X = (Z @ mix + 0.3 * torch.randn(2048, n, generator=g)) * size
    return W, X.T @ X / len(X)


def gptq_rows(n: int):
    W, H = layer(n)
    rule = partial(quantize.min_max, bits=4, each=GROUP)

    def loss(Q):
        return float(obs.layer_loss(W, Q, H).sum())

    def ours():
        return quantize.gptq(W, H, rule(W), renew=rule)

    what = f"GPTQ, int4 in groups of {GROUP}, {n} x {n}"
    try:
        theirs = by_inc_gptq(W, H)
    except Missing as missing:
        yield skipped(what, "<= 0.6x neural-compressor", missing)
        yield skipped(f"{what}: loss", "<= 1.01x neural-compressor", missing)
    else:
        # the last turn's results are compared, so that nobody runs twice
        last = {}
        runs = 5 if n <= 1024 else 1
        yield time_row(
            what,
            lambda: last.update(ours=ours().decode()),
            lambda: last.update(theirs=theirs()),
            "neural-compressor",
            0.6,
            runs=runs,
            warm_up=runs > 1,
        )
        a, b = loss(last["ours"]), loss(last["theirs"])
        yield Row(
            f"{what}: loss",
            f"{a:.3g}",
            f"{b:.3g}",
            a / b,
            "<= 1.01x neural-compressor",
            a <= 1.01 * b,
        )
    order = obs.activation_order(H)
    a = loss(quantize.gptq(W, H, rule(W), order=order).decode())
    b = loss(rule(W).decode())
    yield Row(
        f"{what}, by activations: loss",
        f"{a:.3g}",
        f"{b:.3g}",
        a / b,
        "<= 0.6x rounding to nearest",
        a <= 0.6 * b,
    )


def by_inc_gptq(W: torch.Tensor, H: torch.Tensor):
    inc = peer("neural_compressor.torch.algorithms.weight_only.gptq")
    n = len(W)
    linear = nn.Linear(n, n, bias=False, device="meta")
    start = inc.GPTQ(linear, W)
    start.quantizer.configure(
        {
            "bits": 4,
            "sym": False,
            "dtype": "int",
            "group_size": GROUP,
            "mse": False,
            "perchannel": True,
            "use_double_quant": False,
            "double_quant_sym": False,
        }
    )

    def run():
        start.H = H.clone()  # worked on in place
        job = copy.copy(start)
        return job.fasterquant(W.clone(), groupsize=GROUP)[-1]

    return run


def file_row(W: torch.Tensor) -> Row:
    model = nn.Linear(1024, 1024, bias=False)
    code = quantize.mse(W, bits=4, each=GROUP)
    ours = len(storage.dumps(model, {"weight": code}))
    plain = W.numel() * 4
    return Row(
        f"file of a 4-bit layer in groups of {GROUP}, 1024 x 1024",
        f"{ours:,} bytes",
        f"{plain:,} bytes",
        ours / plain,
        "<= 0.135x fp32",
        ours <= 0.135 * plain,
    )
