"""Every criterion of unstructured pruning, called the same way.

`Sight` holds what a criterion may look at: the trained model and what a few
batches of training data say about it.  `pruned` returns a new model and the
masks.  `table` makes all rows for one kind of model.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from _pruning import Store, file_bytes
from tqdm import tqdm

from minicompress import calibrate, prune, through, train, zoo

SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
TRAINED = (0.5, 0.8, 0.9, 0.98)  # where training follows the pruning
SCORES = (
    "magnitude, global",
    "|g| alone",
    "Taylor |g w|",
    "Fisher",
    "OBD, Hessian",
    "OBD, Gauss-Newton",
    "Wanda",
)
REPAIRS = ("SparseGPT", "OBC")
ONE_SHOT = ("random", "magnitude, each layer", *SCORES, *REPAIRS)
GROUPS = ("2:4 magnitude", "2:4 SparseGPT")  # half of the weights
FROM_START = ("random", "SNIP", "GraSP", "SynFlow")


@dataclass
class Sight:
    """A model, the names of the weights to prune, and statistics of both."""

    model: torch.nn.Module
    names: list
    batches: list
    stats: dict
    moments: dict
    newton: dict
    curvature: dict

    @property
    def weights(self):
        found = dict(self.model.named_parameters())
        return {n: found[n].detach() for n in self.names}


def look(model, names, batches, *, draws=8):
    """Run the model on a few batches (inputs, labels) of training data."""

    def where(name, w):
        return name in names

    return Sight(
        model,
        names,
        batches,
        calibrate.inputs(model, batches, where=where),
        prune.gradients(model, batches, where=where),
        prune.gradients(model, own_labels(model, batches), where=where),
        prune.curvature(model, batches, draws=draws, where=where),
    )


def own_labels(model, batches, seed=0):
    """Draw the labels from the model: E[g^2] is then Gauss-Newton's h."""
    dice = torch.Generator().manual_seed(seed)
    drawn = []
    with torch.no_grad():
        for x, _ in batches:
            p = model(x).softmax(-1)
            y = p.flatten(0, -2).multinomial(1, generator=dice)
            drawn.append((x, y.view(p.shape[:-1])))
    return drawn


def scores(sight, criterion):
    """Score every weight, {name: tensor}, larger = more important."""
    score = {
        "magnitude, global": lambda n, w: w.abs(),
        "|g| alone": lambda n, w: prune.gradient(sight.moments[n].mean),
        "Taylor |g w|": lambda n, w: prune.taylor(w, sight.moments[n].mean),
        "Fisher": lambda n, w: prune.fisher(w, sight.moments[n].square),
        "OBD, Hessian": lambda n, w: prune.obd(w, sight.curvature[n]),
        "OBD, Gauss-Newton": lambda n, w: prune.obd(w, sight.newton[n].square),
        "Wanda": lambda n, w: prune.wanda_score(w, sight.stats[n].norm),
    }[criterion]
    return {n: score(n, w) for n, w in sight.weights.items()}


def masks_for(sight, criterion, sparsity, seed=0):
    """Choose what stays, {name: mask}, without changing any weight."""
    if criterion == "random":
        return {
            n: prune.random(w, sparsity=sparsity, seed=1000 * seed + i)
            for i, (n, w) in enumerate(sight.weights.items())
        }
    if criterion == "magnitude, each layer":
        magnitudes = {n: w.abs() for n, w in sight.weights.items()}
        return prune.keep_each(magnitudes, sparsity=sparsity)
    if criterion == "2:4 magnitude":
        return {
            n: prune.n_m(w.abs())
            for n, w in sight.weights.items()
            if w[0].numel() % 4 == 0
        }
    found = scores(sight, criterion)
    if criterion == "Wanda":
        return prune.keep_each(found, sparsity=sparsity, rule=prune.keep_rows)
    return prune.keep_global(found, sparsity=sparsity)


def repaired(sight, criterion, sparsity):
    """Prune layer by layer and move what stays; each sees those before it."""
    repair = {
        "SparseGPT": lambda W, H: prune.sparsegpt(W, H, sparsity=sparsity),
        "2:4 SparseGPT": lambda W, H: prune.sparsegpt(W, H, n=2, m=4),
        "OBC": lambda W, H: prune.obc(W, H, sparsity=sparsity),
    }[criterion]
    masks = {}

    def compress(name, layer, stats):
        W = layer.weight.detach()
        if criterion.startswith("2:4") and W[0].numel() % 4:
            return W
        code = repair(W.flatten(1), stats.H.float())
        masks[name] = code.mask.view(W.shape)
        return code.decode().view(W.shape)

    model = calibrate.sequential(
        sight.model,
        sight.batches,
        compress,
        where=lambda name, w: name in sight.names,
    )
    return model, masks


def pruned(sight, criterion, sparsity, seed=0):
    """Prune once, by any criterion: an ordinary model, and the masks."""
    if criterion in REPAIRS or criterion == "2:4 SparseGPT":
        return repaired(sight, criterion, sparsity)
    masks = masks_for(sight, criterion, sparsity, seed)
    return prune.one_shot(
        sight.model, lambda m: masks, sparsity=0, select=lambda m, sparsity: m
    )


def masks_from_start(model, criterion, sparsity, batch, names, seed=0):
    """Choose what stays before any training."""

    def where(name, w):
        return name in names

    if criterion == "random":
        sight = Sight(model, names, [], {}, {}, {}, {})
        return masks_for(sight, "random", sparsity, seed)
    if criterion == "SynFlow":
        return prune.synflow_masks(
            model, batch[0], sparsity=sparsity, where=where
        )
    score = {"SNIP": prune.snip, "GraSP": prune.grasp}[criterion]
    found = score(model, batch, where=where)
    return prune.keep_global(found, sparsity=sparsity)


def gradually(model, batches, names, sparsity, *, lr):
    """Fine-tune while the sparsity grows along the cubic curve."""
    weights = dict(model.named_parameters())
    masked = prune.masked(
        model, {n: torch.ones_like(weights[n], dtype=bool) for n in names}
    )
    on_step = prune.gradual(
        lambda m: prune.magnitudes(m, where=lambda n, w: n in names),
        start=1,
        end=int(0.7 * len(batches)),
        every=5,
        final=sparsity,
    )
    return train.fit(masked, batches, lr=lr, on_step=on_step)


def move(model, batches, names, sparsity, *, lr):
    """Fine-tune weights together with the scores of movement pruning."""
    weights = dict(model.named_parameters())
    tuned = through.attach(
        model,
        names,
        prune.movement,
        scores={
            n: torch.nn.Parameter(torch.zeros_like(weights[n])) for n in names
        },
        sparsity={n: torch.zeros((), dtype=torch.float64) for n in names},
    )
    end = int(0.7 * len(batches))

    def on_step(step, model, loss):
        s = prune.cubic(step, start=1, end=end, final=sparsity)
        for own in through.tensors(model).values():
            own["sparsity"].fill_(s)

    return train.fit(tuned, batches, lr=lr, on_step=on_step)


def quality(model, task, split="test"):
    """Per cent right, or bits per character."""
    value = zoo.quality(model, task, split)
    return value if hasattr(task, "hash") else 100 * value


def table(
    script, sights, task, *, tune, feeds, lrs, starts=(), begin=None, leave=()
):
    """Measure every criterion.

    sights     one for each seed
    tune       (masked models, lr) -> models, training after the pruning
    feeds      () -> the batches of that training, one for each seed
    lrs        learning rates of that training to choose from
    starts     the models before training, one for each seed
    begin      masked models -> models, training from the start
    leave      criteria that are left out
    """
    store, names = Store(script), sights[0].names

    def row(nets, masks):
        pairs = list(zip(nets, masks, strict=True))
        return {
            "quality": [quality(n, task) for n in nets],
            "bytes": [file_bytes(n, m) for n, m in pairs],
        }

    def held(nets, masks):
        pairs = zip(nets, masks, strict=True)
        return [prune.masked(n, m) for n, m in pairs]

    @lru_cache(maxsize=1)  # `after` comes right after `once`
    def once(c, s):
        made = [pruned(v, c, s, seed) for seed, v in enumerate(sights)]
        return [m for m, _ in made], [k for _, k in made]

    def after(c, s, lr):
        made, masks = once(c, s)
        made = tune(held(made, masks), lr)
        return [through.bake(n) for n in made], masks

    def choose():  # on validation data
        found = {}
        for lr in lrs:
            made, _ = after("magnitude, global", 0.9, lr)
            found[lr] = sum(quality(n, task, "val") for n in made)
        return (min if hasattr(task, "hash") else max)(found, key=found.get)

    def growing(method, s, lr):
        pairs = zip(sights, feeds(), strict=True)
        made = [method(v.model, b, names, s, lr=lr) for v, b in pairs]
        made = [through.bake(n) for n in made]
        weights = [dict(n.named_parameters()) for n in made]
        return made, [{n: w[n] != 0 for n in names} for w in weights]

    def first(c, s):
        masks = [
            masks_from_start(n, c, s, v.batches[0], names, seed)
            for seed, (n, v) in enumerate(zip(starts, sights, strict=True))
        ]
        return [through.bake(n) for n in begin(held(starts, masks))], masks

    lr = store.get("lr", choose)
    jobs = {}
    for s in SPARSITIES:
        for c in ONE_SHOT + (GROUPS if s == 0.5 else ()):
            if c in leave:
                continue
            jobs["once", c, s] = lambda c=c, s=s: once(c, s)
            if s in TRAINED:
                jobs["after", c, s] = lambda c=c, s=s: after(c, s, lr)
    for s in TRAINED:
        for c, method in (("gradual", gradually), ("movement", move)):
            jobs["while", c, s] = lambda m=method, s=s: growing(m, s, lr)
        for c in FROM_START if starts else ():
            jobs["start", c, s] = lambda c=c, s=s: first(c, s)
    rows = [
        {"when": when, "criterion": c, "sparsity": s}
        | store.get(f"{when}/{c}/{s}", lambda job=job: row(*job()))
        for (when, c, s), job in tqdm(jobs.items())
    ]
    nets = [v.model for v in sights]
    full = [
        {n: torch.ones_like(w, dtype=bool) for n, w in v.weights.items()}
        for v in sights
    ]
    return {
        "lr": lr,
        "weights": sum(w.numel() for w in sights[0].weights.values()),
        "dense": row(nets, full),
        "dense, trained on": [quality(n, task) for n in tune(nets, lr)],
        "rows": rows,
    }
