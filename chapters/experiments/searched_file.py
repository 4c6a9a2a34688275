"""Search for the smallest file that reads digits.

    python chapters/experiments/searched_file.py

The entry of chapter 10 in the book's ledger: NSGA-II with two losses, the
bytes of a real file and the error on the validation digits.  Beside the
layers and the width, the space has the bits of a weight.  Random search gets
the same number of evaluations.  Ctrl-C is harmless: the same command goes on
from where it stopped.
"""

import _stamp
import torch

from minicompress import codes, data, entropy, nas, quantize, storage, train

EVALUATIONS, POPULATION, SEED = 120, 20, 0
STEPS, SIZE, LR = 640, 32, 3e-2
SPACE = nas.digits_space((2, 3, 4, 6, 8))
SPACE = nas.Space({**SPACE.choices, "bits": (4, 5, 6)}, SPACE.valid)
REFERENCE = (27_000, 0.5)  # bytes and error of what is of no use


def trained(arch):
    """Train a network on all training digits and fold its BatchNorm."""
    X, y = data.digits().train
    torch.manual_seed(SEED)
    net = nas.digits_network(arch)
    epochs = -(-STEPS * SIZE // len(X))
    feed = train.batches(X, y, size=SIZE, epochs=epochs, seed=SEED)
    net = train.fit(net, feed, lr=LR, steps=STEPS, seed=SEED)
    return quantize.fold_norms(net, X[:1])


def packed(net, bits):
    """Return the file: one grid for each tensor, coded; biases are halves."""
    most = 2 ** (bits - 1) - 1

    def small(w):
        if w.ndim < 2:
            return w.half()
        step = w.abs().max() / most
        q = (w / step).round().long() + most
        return codes.Affine(entropy.huffman(codes.Ints(q, bits)), step, most)

    state = codes.encode(net, small, where=lambda name, w: True)
    return storage.dumps(net, state)


def losses(arch):
    """Return the bytes of the file, and the error of what it gives back."""
    net = trained(arch)
    blob = packed(net, arch["bits"])
    read = storage.loads(blob, like=net)
    return len(blob), 1 - train.accuracy(read, *data.digits().val)


def test_error(arch):
    """Return the error on the test digits of what the file gives back."""
    net = trained(arch)
    read = storage.loads(packed(net, arch["bits"]), like=net)
    return round(1 - train.accuracy(read, *data.digits().test), 4)


def summary(history):
    """Return all that was evaluated, in order, and how large its front is."""
    points = [record.loss for record in history.records]
    return {
        "hypervolume": round(nas.hypervolume(points, REFERENCE), 1),
        "runs": [
            [SPACE.encode(r.arch), int(r.loss[0]), round(r.loss[1], 5)]
            for r in history.records
        ],
        "front": [
            {
                "arch": record.arch,
                "bytes": int(record.loss[0]),
                "val": round(record.loss[1], 5),
                "test": test_error(record.arch),
            }
            for record in sorted(history.front(), key=lambda r: r.loss)
        ],
    }


def main():
    logs = _stamp.ROOT / "build" / "experiments"
    stem = f"searched_file-{_stamp.code_hash(__file__)}"
    how = {"evaluations": EVALUATIONS, "seed": SEED, "progress": True}
    found = nas.nsga2(
        SPACE,
        losses,
        population=POPULATION,
        log=logs / f"{stem}-nsga2.jsonl",
        **how,
    )
    drawn = nas.random_search(
        SPACE, losses, log=logs / f"{stem}-random.jsonl", **how
    )
    results = {
        "choices": SPACE.choices,
        "members": sum(1 for arch in SPACE),
        "reference": REFERENCE,
        "nsga2": summary(found),
        "random": summary(drawn),
    }
    _stamp.write(__file__, results)


if __name__ == "__main__":
    with train.threads(1):
        main()
