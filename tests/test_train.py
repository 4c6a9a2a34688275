"""The training loop: what it promises, and quality against slow counting."""

import copy
import itertools
import math
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import models, train


@pytest.fixture(autouse=True)
def one_thread():
    with train.threads(1):
        yield


def blobs(n=120, seed=0):
    """Draw points around three corners: a task that is learned at once."""
    dice = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    corners = torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0]])
    return corners[y] + 0.3 * torch.randn(n, 3, generator=dice), y


def network(seed=0):
    torch.manual_seed(seed)
    return models.MLP(widths=(3, 8, 3))


def noisy(seed=0):
    """Build a network whose training draws numbers and keeps averages."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)
    )


def equal(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- batches


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(1, 40),
    size=st.integers(1, 50),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_every_epoch_has_each_row_once(n, size, epochs, seed):
    X, y = torch.arange(n) * 10, torch.arange(n)
    feed = train.batches(X, y, size=size, epochs=epochs, seed=seed)
    seen = list(feed)
    assert len(seen) == len(feed) == epochs * math.ceil(n / size)
    assert all(torch.equal(a, 10 * b) for a, b in seen)
    rows = torch.cat([b for _, b in seen]).view(epochs, n)
    assert torch.equal(rows.sort(dim=1).values, y.expand(epochs, n))
    again = torch.cat([b for _, b in feed])
    assert torch.equal(again, rows.flatten())


def test_order_changes_with_epoch_and_seed():
    X = torch.arange(50)
    a, b = (x for (x,) in train.batches(X, size=50, epochs=2, seed=0))
    ((c,),) = train.batches(X, size=50, epochs=1, seed=1)
    assert not torch.equal(a, b) and not torch.equal(a, c)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 60), seed=st.integers(0, 99), data=st.data())
def test_passages_are_pieces_of_the_text(n, seed, data):
    length = data.draw(st.integers(1, n - 1))
    feed = train.passages(
        torch.arange(n), length=length, size=3, steps=4, seed=seed
    )
    pairs = list(feed)
    assert len(pairs) == len(feed) == 4
    for x, y in pairs:
        assert x.shape == y.shape == (3, length)
        assert torch.equal(x, x[:, :1] + torch.arange(length))
        assert torch.equal(y, x + 1)
        assert y.max() < n


def test_passages_reach_both_ends():
    feed = train.passages(torch.arange(6), length=3, size=50, steps=2, seed=0)
    x, y = next(iter(feed))
    assert x.min() == 0 and y.max() == 5


def test_wrong_batches_are_named():
    with pytest.raises(ValueError, match="tensors"):
        train.batches(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="tensors"):
        train.batches(torch.zeros(0))
    with pytest.raises(ValueError, match="size"):
        train.batches(torch.zeros(3), size=0)
    with pytest.raises(ValueError, match="length"):
        train.passages(torch.arange(3), length=3, steps=1)


# ---- the schedule


def test_cosine_rises_to_one_and_falls_to_zero():
    t = np.linspace(0, 1, 101)
    rate = np.array([train.cosine(x, warmup=0.2) for x in t])
    np.testing.assert_allclose(rate[:21], t[:21] / 0.2, atol=1e-12)
    falling = (1 + np.cos(np.pi * (t[20:] - 0.2) / 0.8)) / 2
    np.testing.assert_allclose(rate[20:], falling, atol=1e-12)
    assert train.cosine(0.0, warmup=0.0) == 1


def test_learning_rate_follows_the_schedule():
    # with the loss Σw each step of plain gradient descent takes lr away
    X = torch.zeros(4, 1)
    model = nn.Linear(1, 1, bias=False)
    seen = [model.weight.item()]
    train.fit(
        model,
        train.batches(X, size=1),
        lambda model, batch: model.weight.sum(),
        lr=0.5,
        optimizer=torch.optim.SGD,
        schedule=lambda done: 1 - done,
        on_step=lambda step, model, loss: seen.append(model.weight.item()),
    )
    want = [0.5 * (1 - done) for done in (0.125, 0.375, 0.625, 0.875)]
    np.testing.assert_allclose(-np.diff(seen), want, rtol=1e-5)


# ---- fit


def test_fit_equals_a_loop_written_out():
    X, y = blobs()
    feed = train.batches(X, y, size=50, epochs=3)
    model = network()
    got = train.fit(model, feed, lr=0.1, optimizer=torch.optim.SGD)
    for step, (x, label) in enumerate(feed):
        loss = F.cross_entropy(model(x), label)
        rate = 0.1 * train.cosine((step + 0.5) / 9)
        for p, g in zip(
            model.parameters(),
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        ):
            p.data -= rate * g
    for p, q in zip(model.parameters(), got.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_fit_learns_and_leaves_its_input_alone():
    X, y = blobs()
    model = network().eval()
    before = copy.deepcopy(model)
    losses = []
    trained = train.fit(
        model,
        train.batches(X, y, size=40, epochs=30),
        lr=0.03,
        on_step=lambda step, model, loss: losses.append(loss),
    )
    assert losses[-1] < 0.2 * losses[0] and len(losses) == 90
    assert train.accuracy(trained, *blobs(seed=1)) > 0.97
    assert equal(model, before) and not model.training
    assert all(p.grad is None for p in model.parameters())
    assert not trained.training


def test_fit_is_deterministic_and_leaves_the_random_state_alone():
    X, y = blobs()
    feed = train.batches(X, y, epochs=3)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = train.fit(noisy(), feed, seed=1)
    torch.manual_seed(7)
    model = noisy()
    state = torch.get_rng_state()
    torch.manual_seed(8)
    second = train.fit(model, feed, seed=1)
    assert equal(first, second)
    assert not equal(first, train.fit(noisy(), feed, seed=2))
    torch.set_rng_state(state)
    train.fit(model, feed)
    assert torch.equal(torch.get_rng_state(), state)


def test_frozen_weights_stay_and_ties_hold():
    X, y = blobs()
    model = network()
    model.layers[0].requires_grad_(False)
    trained = train.fit(model, train.batches(X, y), lr=0.1)
    assert equal(trained.layers[0], model.layers[0])
    assert not equal(trained.layers[1], model.layers[1])
    lm = models.LM(vocab=9, width=8, layers=1, heads=2, ff=8, context=4)
    text = torch.arange(50) % 9
    feed = train.passages(text, length=4, steps=100)
    lm = train.fit(lm, feed, lr=0.03)
    assert lm.head.weight is lm.tokens.weight
    assert train.bits_per_char(lm, text) < 0.5


def test_any_nest_of_tensors_is_a_batch():
    X, y = blobs()

    def loss(model, batch):
        return F.cross_entropy(model(batch["x"][0]), batch["y"][0])

    nest = [{"x": [X], "y": (y,), "name": "all"}] * 20
    trained = train.fit(network(), nest, loss, lr=0.05)
    assert train.accuracy(trained, X, y) > 0.9


def test_clipping_bounds_the_step():
    X, y = blobs()
    model = network()
    one = partial(train.fit, model, [(X, y)], schedule=train.constant)
    free = one(lr=1.0, optimizer=torch.optim.SGD)
    tight = one(lr=1.0, optimizer=torch.optim.SGD, clip=0.01)

    def change(trained):
        pairs = zip(model.parameters(), trained.parameters(), strict=True)
        return sum((p - q).square().sum() for p, q in pairs).sqrt().item()

    assert change(free) > 0.1
    assert change(tight) == pytest.approx(0.01, rel=1e-3)


def test_what_cannot_be_trained_is_named():
    X, y = blobs()
    with pytest.raises(ValueError, match="steps"):
        train.fit(network(), iter([(X, y)]))
    with pytest.raises(ValueError, match=r"batches: .* after 1 of 2"):
        train.fit(network(), iter([(X, y)]), steps=2)
    with pytest.raises(ValueError, match="steps"):
        train.fit(network(), [])
    with pytest.raises(ValueError, match="model"):
        train.fit(network().requires_grad_(False), [(X, y)])


# ---- interruption


class Killed(Exception):
    pass


def interrupt(at):
    """Press Ctrl-C in the middle of a step: while the loss is computed."""
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return train.cross_entropy(model, batch)

    return loss


@pytest.mark.parametrize("at", [1, 4, 9])
def test_interrupted_training_ends_with_the_same_bits(tmp_path, at):
    X, y = blobs()
    feed = train.batches(X, y, size=40, epochs=3)
    path = tmp_path / "run"
    whole = train.fit(noisy(), feed)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train.fit(noisy(), feed, interrupt(at), checkpoint=path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(path, weights_only=True)["step"] == at
    steps = []
    rest = train.fit(
        noisy(),
        feed,
        checkpoint=path,
        on_step=lambda step, model, loss: steps.append(step),
    )
    assert steps == list(range(at + 1, 10))
    assert equal(rest, whole)
    assert equal(train.fit(noisy(), feed, checkpoint=path), whole)
    assert os.listdir(tmp_path) == ["run"]


def test_batches_that_draw_are_taken_up_again(tmp_path):
    X, y = blobs()

    def jittered():
        for x, label in train.batches(X, y, size=40, epochs=3):
            yield x + torch.randn_like(x), label

    fit = partial(train.fit, noisy(), steps=9)
    whole = fit(jittered())
    with pytest.raises(KeyboardInterrupt):
        fit(jittered(), interrupt(5), checkpoint=tmp_path / "run")
    assert equal(fit(jittered(), checkpoint=tmp_path / "run"), whole)


def test_killed_training_goes_on_from_the_last_save(tmp_path, monkeypatch):
    monkeypatch.setattr("minicompress.train.checkpoints.EVERY", -1)
    X, y = blobs()
    feed = train.batches(X, y, size=40, epochs=3)

    def kill(step, model, loss):
        if step == 5:
            raise Killed

    fit = partial(train.fit, noisy(), feed, checkpoint=tmp_path / "run")
    with pytest.raises(Killed):
        fit(on_step=kill)
    steps = []
    rest = fit(on_step=lambda step, model, loss: steps.append(step))
    assert steps == [5, 6, 7, 8, 9]
    assert equal(rest, train.fit(noisy(), feed))


def test_second_interrupt_does_not_wait(tmp_path):
    def loss(model, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        train.fit(network(), [blobs()], loss, checkpoint=tmp_path / "run")


def test_checkpoint_of_another_run_is_refused(tmp_path):
    X, y = blobs()
    path = tmp_path / "run"
    fit = partial(train.fit, checkpoint=path)
    fit(network(), [(X, y)])
    with pytest.raises(ValueError, match="checkpoint"):
        fit(network(), [(X, y)], lr=0.5)
    with pytest.raises(ValueError, match="checkpoint"):
        fit(noisy(), [(X, y)])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="checkpoint"):
        fit(network(), [(X, y)])
    torch.save({"plan": print}, path)  # would have to be executed
    with pytest.raises(ValueError, match="checkpoint"):
        fit(network(), [(X, y)])


# ---- many at once


def close(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(
        a.state_dict().items(), b.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "make",
    [
        network,
        lambda seed: models.CNN(channels=(3, 4), classes=3),
        lambda seed: models.LM(vocab=9, width=8, layers=1, heads=2, ff=8),
    ],
    ids=["MLP", "CNN", "LM"],
)
def test_many_equals_one_by_one(make):
    starts = [make(seed) for seed in range(3)]
    torch.manual_seed(0)
    if isinstance(starts[0], models.LM):
        text = torch.randint(9, (40,))
        feeds = [
            train.passages(text, length=6, size=4, steps=6, seed=seed)
            for seed in range(3)
        ]
    else:
        X, y = blobs()
        X = X if isinstance(starts[0], models.MLP) else torch.rand(120, 1, 4, 4)
        feeds = [
            train.batches(X, y, size=50, epochs=2, seed=seed)
            for seed in range(3)
        ]
    before = copy.deepcopy(starts)
    options = {"lr": 0.01, "optimizer": torch.optim.SGD}
    together = train.fit_many(starts, feeds, **options)
    for start, model, feed, old in zip(
        starts, together, feeds, before, strict=True
    ):
        close(model, train.fit(start, feed, **options))
        assert equal(start, old)
        assert type(model) is type(start) and not model.training
        assert not equal(model, start)


def test_many_take_a_loss_that_looks_at_a_teacher():
    X, y = blobs()
    teacher = torch.randn(120, 3)

    def loss(model, batch):
        x, _, target = batch
        return F.mse_loss(model(x), target)

    starts = [network(seed) for seed in range(2)]
    feeds = [train.batches(X, y, teacher, seed=seed) for seed in range(2)]
    for start, feed, model in zip(
        starts, feeds, train.fit_many(starts, feeds, loss), strict=True
    ):
        close(model, train.fit(start, feed, loss))


def test_frozen_weights_of_many_stay():
    X, y = blobs()
    starts = [network(seed) for seed in range(3)]
    for start in starts:
        next(start.parameters()).requires_grad_(False)
    feeds = [train.batches(X, y, seed=seed) for seed in range(3)]
    many = train.fit_many(starts, feeds, lr=0.01)
    for start, model in zip(starts, many, strict=True):
        frozen, *rest = zip(start.parameters(), model.parameters(), strict=True)
        assert torch.equal(*frozen)
        assert not any(torch.equal(*pair) for pair in rest)


def test_many_networks_do_not_see_each_other():
    X, y = blobs()
    feeds = [train.batches(X, y, seed=seed) for seed in range(3)]
    starts = [network(seed) for seed in range(3)]
    alone = train.fit_many(starts[:1], feeds[:1], lr=0.01)[0]
    among = train.fit_many(starts, feeds, lr=0.01)[0]
    close(alone, among)


def test_what_would_mix_the_networks_is_refused():
    X, y = blobs()
    with pytest.raises(ValueError, match="batches"):
        train.fit_many([network()], [])
    with pytest.raises(ValueError, match="options"):
        train.fit_many([network()], [[(X, y)]], clip=1.0)


# ---- quality


class Table(nn.Module):
    """A bigram model: the logits of the next token from a fixed table."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, ids):
        return self.table[ids]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 60), context=st.integers(1, 20), size=st.integers(1, 4))
def test_bits_are_those_of_counting(n, context, size):
    dice = torch.Generator().manual_seed(n)
    ids = torch.randint(5, (n,), generator=dice)
    table = torch.randn(5, 5, generator=dice)
    got = train.bits_per_char(Table(table), ids, context=context, size=size)
    log2 = table.double().log_softmax(1) / math.log(2)
    want = -sum(log2[a, b] for a, b in itertools.pairwise(ids))
    assert got == pytest.approx(want.item() / (n - 1), rel=1e-5)
    twice = train.bits_per_char(
        Table(table), ids, context=context, chars=2 * (n - 1)
    )
    assert twice == pytest.approx(got / 2, rel=1e-5)


def test_uniform_guess_costs_the_logarithm():
    model = Table(torch.zeros(8, 8))
    got = train.bits_per_char(model, torch.arange(8), context=4)
    assert got == pytest.approx(3, rel=1e-6)


def test_windows_do_not_see_each_other():
    torch.manual_seed(0)
    model = models.LM(vocab=9, width=8, layers=1, heads=2, ff=8, context=4)
    nn.init.normal_(model.tokens.weight)
    ids = torch.randint(9, (13,))
    parts = [train.bits_per_char(model, ids[i : i + 5]) for i in (0, 4, 8)]
    got = train.bits_per_char(model, ids)
    assert got == pytest.approx(np.mean(parts), rel=1e-5)
    assert abs(train.bits_per_char(model, ids, context=3) - got) > 1e-4


def test_accuracy_is_the_share_of_right_answers():
    X = F.one_hot(torch.tensor([0, 1, 2, 2, 0]), 3).float()
    y = torch.tensor([0, 1, 2, 0, 1])
    model = nn.Identity()
    for size in (1, 2, 5, 100):
        assert train.accuracy(model, X, y, size=size) == 3 / 5
    with pytest.raises(ValueError, match="X has 5"):
        train.accuracy(model, X, y[:4])


def test_measuring_restores_every_mode():
    model = noisy().train()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    before = copy.deepcopy(model)
    first = train.accuracy(model, *blobs())
    assert [m.training for m in model.modules()] == modes
    assert equal(model, before)
    assert train.accuracy(model.eval(), *blobs()) == first
    with pytest.raises(Killed), train.evaluating(before):
        raise Killed
    assert [m.training for m in before.modules()] == modes


def test_cross_entropy_takes_rows_and_sequences():
    torch.manual_seed(0)
    z, y = torch.randn(4, 6, 5), torch.randint(5, (4, 6))
    log = z.log_softmax(-1).gather(-1, y[..., None])
    got = train.cross_entropy(nn.Identity(), (z, y))
    torch.testing.assert_close(got, -log.mean())
    got = train.cross_entropy(nn.Identity(), (z[0], y[0]))
    torch.testing.assert_close(got, -log[0].mean())


def test_threads_are_restored():
    before = torch.get_num_threads()
    with pytest.raises(Killed), train.threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise Killed
    assert torch.get_num_threads() == before
