"""Bits per character against bits, on the language model of the zoo.

The weights of its blocks are rounded after the training.  The tables of
tokens and positions, a twentieth of all weights, have 8 bits in every row:
few bits there would hide what the methods do.  The three seeds draw the
passages that the methods see.
"""

import _stamp
from _rounding import table

from minicompress import data, quantize, train, zoo

SEEDS = 3
BITS = (2, 3, 4, 5, 6, 8)
AFTER = {
    "min-max, tensor": BITS,
    "min-max, row": BITS,
    "min-max, group": BITS,
    "MSE, row": BITS,
    "MSE, group": BITS,
    "GPTQ, row": (2, 3, 4, 8),
    "GPTQ, group": (2, 3, 4),
    "AWQ, group": (2, 3, 4),
    "binary, row": (1,),
    "ternary, row": (1.58,),
}


def tables(net):
    """Round the tables; the tokens are the output layer as well."""
    tokens = quantize.min_max(net.tokens.weight, bits=8)
    positions = quantize.min_max(net.positions.weight, bits=8)
    return {
        "tokens.weight": tokens,
        "head.weight": tokens,
        "positions.weight": positions,
    }


def main():
    task, net = zoo.task("reference-lm"), zoo.load("reference-lm")
    ids = data.Tokenizer().encode(task.train)
    seen = [
        list(train.passages(ids, length=128, size=8, steps=4, seed=seed))
        for seed in range(SEEDS)
    ]
    found = table(
        __file__,
        [net] * SEEDS,
        task,
        calibration=seen,
        leave=("head.weight",),
        fixed=tables,
        after=AFTER,
    )
    _stamp.write(__file__, found)


if __name__ == "__main__":
    with train.threads(1):
        main()
