"""rANS against the entropy and against the Rust coder `constriction`."""

import numpy as np
import torch

from minicompress import entropy
from minicompress.codes import Ints

from .harness import Missing, Row, peer, skipped, speed_row


def gaussian(n: int, bits: int) -> Ints:
    """Draw quantized weights: a bell over the whole alphabet."""
    k = 1 << bits
    p = np.exp(-0.5 * ((np.arange(k) - k / 2) / (k / 8)) ** 2)
    drawn = np.random.default_rng(0).choice(k, n, p=p / p.sum())
    return Ints(torch.from_numpy(drawn), bits)


def rows():
    for n in (1 << 20, 1 << 22):
        for bits in (4, 8):
            ints = gaussian(n, bits)
            yield size_row(ints)
            yield from speed_rows(ints)


def size_row(ints: Ints) -> Row:
    """Compare the bytes of all fields with the order-0 entropy."""
    code = entropy.rans(ints)
    assert torch.equal(code.decode(), ints.values)
    size = code.stream.numel() + code.table.numel()
    n = ints.values.numel()
    least = n * entropy.entropy(entropy.counts(ints)) / 8
    return Row(
        f"rANS size, {n:,} of {1 << ints.bits} symbols",
        f"{size:,} B",
        f"{least:,.0f} B",
        size / least,
        "<= 1.02x order-0 entropy",
        size <= 1.02 * least,
    )


def speed_rows(ints: Ints):
    n = ints.values.numel()
    what = f"rANS {{}}, {n:,} of {1 << ints.bits} symbols"
    try:
        constriction = peer("constriction")
    except Missing as error:
        yield skipped(what.format("encode"), ">= 0.2x constriction", error)
        yield skipped(what.format("decode"), ">= 0.7x constriction", error)
        return
    coder = constriction.stream.stack.AnsCoder
    values = ints.values.numpy().astype(np.int32)
    p = entropy.counts(ints).numpy() / n
    model = constriction.stream.model.Categorical(p, perfect=False)

    def encode():
        ans = coder()
        ans.encode_reverse(values, model)
        return ans.get_compressed()

    theirs, ours = encode(), entropy.rans(ints)
    assert (coder(theirs).decode(model, n) == values).all()
    for verb, f, g, least in (
        ("encode", lambda: entropy.rans(ints), encode, 0.2),
        ("decode", ours.decode, lambda: coder(theirs).decode(model, n), 0.7),
    ):
        yield speed_row(
            what.format(verb),
            f,
            g,
            n=n,
            unit="symbols",
            least=least,
            name="constriction",
        )
