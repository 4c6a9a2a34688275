"""Entries of the byte contest: characters in a few hundred bytes.

    python chapters/experiments/contest_glyphs.py

Six files that reach the bar, each by another chapter's means, from the CNN
of the zoo in 8 bits to a small network that is trained with a price on every
bit.  Trainings draw new pictures as they go.  What is stored is chosen on
validation pictures; the scores are of other seeds, which are used nowhere
else.  Ctrl-C is harmless: the same command goes on from where it stopped.
"""

import copy
import math
from functools import partial
from itertools import pairwise

import _stamp
import torch
from _pruning import SCRATCH, Store
from torch import nn
from tqdm import tqdm

from minicompress import (
    codes,
    entropy,
    measure,
    models,
    pipeline,
    quantize,
    storage,
    through,
    train,
    zoo,
)
from minicompress.pipeline import contest

FOLDER = _stamp.RESULTS / "contest"
SEEDS = (  # drawn by secrets.randbits(48) once the rules were fixed
    34613799272022,
    17542387330448,
    2669364945397,
    109908434608838,
    231399153212411,
)
VALIDATION = 900_000
CHANNELS = 6, 12, 16, 24
SIZE, PARTS = 64, 100  # of a batch; batches that are rendered together
FLOAT, DEEP, TEACHER, MLP = 3000, 600, 120, 3000  # steps
SPARSE = 0.5, 0.75, 0.85  # of the CNN of the zoo, by layer
PRICES = 1e-4, 2e-4, 3e-4, 4e-4, 5.5e-4, 7.5e-4, 9e-4  # nats for a bit
PRICED = 1200, 1200, 1200, 1200, 1200, 1200, 3000  # steps at each price
SAFE = 0.905  # of validation pictures: half a point above the bar
DUMPS = partial(storage.dumps, compact=True)


def fresh(steps, first):
    """Make batches of pictures that are never seen twice."""

    def draw():
        for seed in range(first, first + math.ceil(steps / PARTS)):
            X, y = contest.pictures(seed, SIZE * PARTS)
            order = torch.randperm(len(y), generator=generator(seed))
            for some in order.split(SIZE):
                yield X[some], y[some]

    return train.Batches(steps, draw)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def validation(model):
    return train.accuracy(model, *contest.pictures(VALIDATION))


def kept(name, net, first, **how):
    """Train a network, or take up the weights that a training left."""
    path = SCRATCH / f"contest-{_stamp.code_hash(__file__)}-{name}.pt"
    if not path.exists():
        feed = fresh(how["steps"], first)
        found = train.fit(net, feed, progress=True, **how)
        torch.save(found.state_dict(), path)
    net = copy.deepcopy(net)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def small():
    """Build a network of depthwise and pointwise layers.

    The last window is not averaged but weighted, place by place: a 6 and a 9
    have the same strokes elsewhere.
    """
    torch.manual_seed(0)
    net = models.CNN(channels=CHANNELS, classes=36)
    for i, (a, b) in enumerate(pairwise(CHANNELS), 1):
        padding = 0 if i == len(CHANNELS) - 1 else 1
        net.convs[i] = nn.Sequential(
            nn.Conv2d(a, a, 3, padding=padding, groups=a, bias=False),
            nn.Conv2d(a, b, 1, bias=False),
        )
    net.head = nn.Linear(CHANNELS[-1], 36, bias=False)
    return net


def folded(net):
    return quantize.fold_norms(net, contest.pictures(0, 36)[0])


def rounded(w, step):
    """Round to whole steps; what passes back is the straight-through one."""
    x = w / step.abs()
    return through.straight(x, x.round()) * step.abs()


def integers(net):
    """Return what each weight is in steps, with a gradient."""
    found = {}
    for name, own in through.tensors(net).items():
        path, _, key = name.rpartition(".")
        w = getattr(net.get_submodule(path), key)
        found[name] = w / own["step"].abs()
    return found


def priced(price):
    """Make a loss in which an integer q costs log2(1 + |q|) times a price."""

    def loss(net, batch):
        bits = sum(q.abs().log1p().sum() for q in integers(net).values())
        return train.cross_entropy(net, batch) + price * bits / math.log(2)

    return loss


def start(net):
    """Attach a step to every weight and bias, a fraction of its own size."""
    own = {n: p.detach() for n, p in folded(net).named_parameters()}
    steps = {
        n: nn.Parameter(p.abs().mean() * (0.4 if p.ndim > 1 else 0.5))
        for n, p in own.items()
    }
    return through.attach(folded(net), list(own), rounded, step=steps)


def signed(q, scale):
    """Code integers by context, from the smallest one on."""
    least = int(q.min())
    width = max(1, int(q.max() - least).bit_length())
    ints = entropy.contextual(codes.Ints(q - least, width))
    return codes.Affine(ints, float(f"{scale:.3g}"), -least)


def whole(net):
    """Return the model and its state, with weights that are integers.

    A ReLU passes a positive factor on, and the largest logit stays the
    largest: so no weight needs its step, if the biases behind it are counted
    in the product of the steps up to there.
    """
    steps, unit, state = through.tensors(net), 1.0, {}
    model = through.bake(net)
    for name, w in model.named_parameters():
        step = steps[name]["step"].abs().item()
        q = (w.detach() / step).round().int()
        if name.endswith("weight"):
            unit /= step
            state[name] = signed(q, 1)
        else:
            state[name] = signed(q, step * unit)
    return model, state


def cheapest(store):
    """Raise the price of a bit again and again, and keep what is safe."""
    net, path, best = start(separable()), [], None
    for k, (price, steps) in enumerate(zip(PRICES, PRICED, strict=True)):
        how = {"steps": steps, "lr": 2e-3, "loss": priced(price)}
        net = kept(f"priced-{k}", net, 200_000 + 10_000 * k, **how)
        model, state = whole(net)
        size = len(storage.dumps(model, state, compact=True))
        right = store.get(f"price {price}", partial(validation, model))
        path.append({"price": price, "bytes": size, "val": round(right, 4)})
        if right >= SAFE:
            best = model, state
    return *best, {"path": path}


def separable():
    return kept("separable", small(), 100_000, steps=FLOAT, lr=1e-2)


def half(store):
    net = folded(separable())
    return net, pipeline.halved(pipeline.plain(net)), {}


def eight_bits(store):
    net = folded(zoo.load("glyphs-cnn"))
    return net, pipeline.written(net, "int8"), {}


def deep(net, first, steps, lr, teacher=None, coders=pipeline.SLOW, **how):
    """Prune, share and code, with fresh pictures for each step."""
    feed = fresh(steps, first)
    fit = pipeline.finetuning(feed, teacher=teacher, lr=lr, progress=True)
    *_, last = pipeline.deep_compression(
        net, fit, steps=steps, coders=coders, dumps=DUMPS, **how
    )
    return last.model, last.state, {}


def deep_zoo(store):
    net = folded(zoo.load("glyphs-cnn"))
    sparsity = {f"convs.{i}.weight": s for i, s in enumerate(SPARSE, 1)}
    how = {"sparsity": sparsity, "bits": 3, "teacher": net}
    return deep(net, 300_000, TEACHER, 5e-4, coders=pipeline.FAST, **how)


def deep_mlp(store):
    torch.manual_seed(0)
    net = models.MLP(widths=(784, 100, 36))
    net = kept("mlp", net, 400_000, steps=MLP, lr=2e-3)
    how = {"sparsity": 0.8, "bits": 3, "coders": pipeline.FAST}
    return deep(net, 500_000, MLP // 2, 1e-3, **how)


def deep_separable(store):
    how = {"sparsity": 0.3, "bits": 4, "bias_bits": 4}
    return deep(folded(separable()), 600_000, DEEP, 2e-3, **how)


ENTRIES = {
    "zoo-int8": (eight_bits, "CNN of the zoo, 8 bits a weight"),
    "zoo-deep": (deep_zoo, "CNN of the zoo: prune, share, code; distilled"),
    "mlp-deep": (deep_mlp, "perceptron: prune, share, code"),
    "separable-half": (half, "small separable CNN, 16 bits a number"),
    "separable-deep": (deep_separable, "the same: prune, share, code"),
    "separable-priced": (cheapest, "the same, trained with a price on bits"),
}


def entered(store, name):
    """Make an entry, write its file, and score what the file gives back."""
    make, how = ENTRIES[name]
    model, state, more = make(store)
    path = FOLDER / f"{name}.mc"
    FOLDER.mkdir(exist_ok=True)
    size = storage.save(path, model, state, compact=True)
    read = storage.load(path)
    contest.check(read)
    right = [train.accuracy(read, *contest.pictures(s)) for s in SEEDS]
    return {
        "name": name,
        "how": how,
        "bytes": size,
        "accuracy": round(sum(right) / len(right), 5),
        "scores": [round(r, 4) for r in right],
        "val": round(validation(read), 4),
        "weights": measure.params(read),
        "nonzero": measure.nonzero(read),
        "macs": measure.macs(read, torch.zeros(1, 1, 28, 28)),
        **more,
    }


def main():
    store = Store(__file__)
    rows = [
        store.get(name, partial(entered, store, name))
        for name in tqdm(ENTRIES, desc="entries")
    ]
    _stamp.write(
        __file__,
        {
            "bar": contest.BAR,
            "images": contest.IMAGES,
            "seeds": SEEDS,
            "entries": sorted(rows, key=lambda row: row["bytes"]),
        },
    )


if __name__ == "__main__":
    with train.threads(1):
        main()
