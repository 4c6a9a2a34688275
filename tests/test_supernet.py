"""Networks cut out of larger ones, against slices made by hand."""

import itertools
import random
import re
import signal
from collections import OrderedDict
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from minicompress import data, measure, models, nas, storage, train
from minicompress.nas.chains import convolution, operation

torch.set_num_threads(1)

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (24,), generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(
    0, 20, (2, 8), generator=torch.Generator().manual_seed(0)
)
HIDDEN = nas.Space({"hidden": (2, 3, 5, 8)})


class MLP(nn.Module):
    """A module of some user's."""

    def __init__(self, hidden=8, inputs=6, classes=3):
        super().__init__()
        self.up = nn.Linear(inputs, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.out = nn.Linear(hidden, classes, bias=False)

    def forward(self, x):
        return self.out(self.norm(self.up(x)).relu())


class Plain(MLP):
    """The same without BatchNorm."""

    def __init__(self, hidden=8):
        super().__init__(hidden)
        self.norm = nn.Identity()


def mlp(arch):
    return MLP(arch["hidden"])


def plain(arch):
    return Plain(arch["hidden"])


def seeded(build, *args, seed=0, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(*args, **kwargs)


def lm(width=16, layers=3, heads=4, ff=24, tied=True, seed=0):
    model = seeded(
        models.LM,
        vocab=20,
        width=width,
        layers=layers,
        heads=heads,
        ff=ff,
        context=8,
        tied=tied,
        seed=seed,
    )
    for p in model.parameters():  # biases too
        torch.nn.init.normal_(
            p, std=0.3, generator=torch.Generator().manual_seed(seed)
        )
    return model.eval()


def chain(width, *ops):
    layers = {f"layer{i + 1}": op for i, op in enumerate(ops)}
    return {"width": width, **layers}


def frozen(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def by_hand(large, small):
    """Load a small model with NumPy slices of the large state_dict."""
    small, state = deepcopy(small), {}
    for name, t in small.state_dict().items():
        w = large.state_dict()[name].numpy()
        cut = [slice(n) for n in t.shape]
        if t.ndim == 4:
            for axis in (2, 3):
                start = (w.shape[axis] - t.shape[axis]) // 2
                cut[axis] = slice(start, start + t.shape[axis])
        state[name] = torch.from_numpy(np.array(w[tuple(cut)]))
    small.load_state_dict(state)
    return small.train(large.training)


class TestInherit:
    def test_is_a_view_of_the_leading_corner(self):
        large, small = nn.Linear(5, 7), nn.Linear(2, 3)
        weights = nas.inherit(large, small)
        assert torch.equal(weights["weight"], large.weight[:3, :2])
        assert torch.equal(weights["bias"], large.bias[:3])
        assert weights["weight"].data_ptr() == large.weight.data_ptr()
        with torch.no_grad():
            large.weight[2, 1] = 7.0
        assert weights["weight"][2, 1] == 7.0

    @pytest.mark.parametrize("size, cut", [(1, [2]), (3, [1, 2, 3])])
    @pytest.mark.parametrize(
        "kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d]
    )
    def test_kernels_keep_their_middle(self, kind, size, cut):
        large, small = kind(3, 4, 5), kind(3, 4, size)
        want = large.weight
        for axis in range(2, want.ndim):
            want = want.index_select(axis, torch.tensor(cut))
        assert torch.equal(nas.inherit(large, small)["weight"], want)

    def test_only_kernels_have_a_middle(self):
        """A table of positions (1, T, features) is cut at its ends."""

        class Places(nn.Module):
            def __init__(self, n, features):
                super().__init__()
                self.table = nn.Parameter(torch.randn(1, n, features))

        large = Places(6, 9)
        weights = nas.inherit(large, Places(4, 5))
        assert torch.equal(weights["table"], large.table[:, :4, :5])

    def test_depthwise_kernels(self):
        large = nn.Conv2d(6, 6, 5, groups=6)
        weights = nas.inherit(large, nn.Conv2d(2, 2, 3, groups=2))
        assert torch.equal(weights["weight"], large.weight[:2, :, 1:4, 1:4])

    def test_nested_networks_share_their_memory(self):
        archs = [chain(c, *["conv5"] * 4) for c in (8, 4)]
        archs.append(chain(4, "conv3", "pool", "conv1", "skip"))
        large = nas.digits_network(archs[0])
        rows = [nas.inherit(large, nas.digits_network(a)) for a in archs]
        middle, small = rows[1:]
        for name, w in small.items():
            assert w.untyped_storage().data_ptr() == (
                middle[name].untyped_storage().data_ptr()
            )
        kernel = "layer1.conv.weight"  # element (0, 0, 1, 1) of 5 x 5
        assert small[kernel].data_ptr() == (
            middle[kernel][0, 0, 1, 1].data_ptr()
        )
        assert not any(name.startswith("layer2") for name in small)

    def test_the_largest_is_the_supernet(self):
        large = seeded(nas.digits_network, chain(8, *["conv5"] * 4)).eval()
        largest = nas.digits_network(chain(8, *["conv5"] * 4)).eval()
        weights = nas.inherit(large, largest)
        for name, p in large.named_parameters():
            assert weights[name].data_ptr() == p.data_ptr()
            assert weights[name].shape == p.shape
        x = torch.randn(3, 64)
        assert torch.equal(functional_call(largest, weights, x), large(x))

    @pytest.mark.parametrize(
        "arch",
        [
            chain(4, "conv3", "conv5", "conv1", "skip"),
            chain(8, "pool", "conv3", "skip", "skip"),
        ],
    )
    def test_is_what_numpy_cuts_out(self, arch):
        large = seeded(nas.digits_network, chain(8, *["conv5"] * 4))
        large(torch.randn(20, 64))  # averages that differ from 0 and 1
        small, x = nas.digits_network(arch).eval(), torch.randn(3, 64)
        got = functional_call(small, nas.inherit(large.eval(), small), x)
        assert torch.equal(got, by_hand(large, small)(x))
        assert not torch.equal(got, small(x))

    def test_gradients_reach_only_what_is_on_the_path(self):
        large = seeded(nas.digits_network, chain(8, *["conv5"] * 4))
        small = nas.digits_network(chain(4, "conv3", "pool", "conv1", "skip"))
        alone, x = by_hand(large, small), torch.randn(9, 64)
        alone(x).square().sum().backward()
        weights = nas.inherit(large, small)
        functional_call(small.train(), weights, x).square().sum().backward()
        mine = dict(alone.named_parameters())
        for name, p in large.named_parameters():
            if name not in mine:
                assert p.grad is None
                continue
            g, want = p.grad.clone(), mine[name].grad
            k = want.shape[-1] if want.ndim == 4 else 0
            lo = (p.shape[-1] - k) // 2 if k else 0
            spatial = (slice(lo, lo + k),) * 2 if k else ()
            cut = (*(slice(n) for n in want.shape[:2]), *spatial)
            torch.testing.assert_close(g[cut], want)
            assert want.any()
            g[cut] = 0
            assert not g.any()

    def test_running_averages_are_those_of_the_supernet(self):
        large, small = MLP(8), MLP(3).train()
        before = large.norm.running_mean.clone()
        functional_call(small, nas.inherit(large, small), X)
        want = 0.1 * F.linear(X, large.up.weight, large.up.bias).mean(0)
        torch.testing.assert_close(large.norm.running_mean[:3], want[:3])
        assert torch.equal(large.norm.running_mean[3:], before[3:])
        assert large.norm.num_batches_tracked == 1
        assert not large.norm.running_mean.requires_grad
        assert small.norm.num_batches_tracked == 0

    def test_buffers_are_not_trained(self):
        model = nn.Module()
        model.register_buffer("shift", torch.ones(3, requires_grad=True))
        shift = nas.inherit(model, model)["shift"]
        assert not shift.requires_grad
        assert shift.data_ptr() == model.shift.data_ptr()

    @pytest.mark.parametrize(
        "large, small, message",
        [
            (
                nn.Linear(3, 2, bias=False),
                nn.Linear(3, 2),
                "bias: (2,), but the large model has none",
            ),
            (
                nn.Linear(3, 2),
                nn.Linear(4, 2),
                "weight: (2, 4) is no part of the large model's (2, 3)",
            ),
            (
                nn.Conv1d(2, 2, 5),
                nn.Conv1d(2, 2, 2),
                "weight: (2, 2, 2) is no part of the large model's (2, 2, 5)",
            ),
            (
                nn.Conv1d(2, 2, 3),
                nn.Conv2d(2, 2, 3),
                "weight: (2, 2, 3, 3) is no part of",
            ),
            (
                nn.Sequential(nn.BatchNorm1d(3, affine=False)),
                nn.Sequential(nn.BatchNorm1d(4, affine=False)),
                "0.running_mean: (4,) is no part",
            ),
            (lm(tied=False), lm(), "head.weight: tied to tokens.weight"),
        ],
    )
    def test_names_what_does_not_fit(self, large, small, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            nas.inherit(large, small)


class TestTransformers:
    def test_smaller_in_every_way(self):
        large, small = lm(), lm(width=8, layers=2, heads=2, ff=10, seed=1)
        got = nas.subnet(large, small)(TOKENS)
        assert torch.equal(got, by_hand(large, small)(TOKENS))

    def test_the_first_blocks_stay(self):
        large = lm()
        want = deepcopy(large)
        del want.blocks[1:]
        small = nas.subnet(large, lm(layers=1, seed=1))
        assert torch.equal(small(TOKENS), want(TOKENS))

    def test_heads_of_one_size_are_the_first_heads(self):
        large, small = lm(), lm(width=8, heads=2, seed=1)
        big, few = (m.blocks[0].attention for m in (large, small))
        few = nas.subnet(big, few)
        x = torch.zeros(1, 4, 16)
        x[..., :8] = torch.randn(1, 4, 8)
        for f in ("q", "k", "v"):
            whole = big.split(getattr(big, f)(x))
            part = few.split(getattr(few, f)(x[..., :8]))
            torch.testing.assert_close(part, whole[:, :2])

    def test_what_is_tied_stays_tied(self):
        small = nas.subnet(lm(), lm(width=8, heads=2, seed=1))
        assert small.head.weight is small.tokens.weight
        free = nas.subnet(lm(), lm(width=8, heads=2, tied=False))
        assert free.head.weight is not free.tokens.weight
        assert torch.equal(free.head.weight, free.tokens.weight)

    def test_training_reaches_every_member(self):
        space = nas.Space({"layers": (1, 2), "width": (8, 16), "ff": (8, 24)})

        def build(arch):
            with torch.device("meta"):
                heads = arch["width"] // 4
                return models.LM(20, heads=heads, context=8, **arch)

        large = seeded(models.LM, 20, 16, 2, 4, 24, 8)
        ids = torch.arange(200) % 20
        feed = train.passages(ids, length=8, size=8, steps=100)
        low, *_, high = space
        trained = nas.fit_supernet(
            large,
            build,
            space,
            feed,
            lr=2e-2,
            paths=1,
            extremes=(high, low),
            distill=True,
        )
        for arch in space:
            before, after = (
                train.bits_per_char(nas.subnet(m, build(arch)), ids)
                for m in (large, trained)
            )
            assert before > 4 and after < 1  # log2(20) = 4.3


class TestSubnet:
    def test_is_the_slice_but_with_memory_of_its_own(self):
        large, small = seeded(MLP), seeded(MLP, 3, seed=1)
        large(X)
        before = frozen(large.eval()), frozen(small)
        alone = nas.subnet(large, small)
        weights = nas.inherit(large, small)
        x = torch.randn(4, 6)
        want = functional_call(small.eval(), weights, x)
        assert torch.equal(alone(x), want)
        for t in alone.state_dict().values():
            t.zero_()
        assert same(before[0], frozen(large)) and same(before[1], frozen(small))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_has_the_type_of_the_large_model(self, dtype):
        alone = nas.subnet(MLP().to(dtype), MLP(2))
        assert alone.up.weight.dtype == alone.norm.running_var.dtype == dtype
        assert alone.norm.num_batches_tracked.dtype == torch.int64

    def test_from_a_model_without_memory(self):
        with torch.device("meta"):
            small = lm_on_meta = models.LM(20, 8, 1, 2, 8, 8)
        alone = nas.subnet(lm(), small)
        assert lm_on_meta.tokens.weight.is_meta
        assert not any(p.is_meta for p in alone.parameters())
        assert all(p.requires_grad for p in alone.parameters())
        assert alone.head.weight is alone.tokens.weight

    def test_keeps_the_mode_and_can_be_stored(self):
        large = seeded(nas.digits_network, chain(8, *["conv5"] * 4))
        arch, x = chain(4, "conv3", "pool", "conv5", "skip"), torch.randn(2, 64)
        small = nas.digits_network(arch)
        assert nas.subnet(large.train(), small.eval()).training
        alone = nas.subnet(large.eval(), small.train())
        assert not alone.training and not alone.layer1.norm.training
        again = storage.loads(storage.dumps(alone), like=small)
        assert torch.equal(again(x), alone(x))
        assert measure.params(alone) == measure.params(small)


class Recorder(nas.Space):
    """Remembers what was drawn."""

    def __init__(self, *args):
        super().__init__(*args)
        object.__setattr__(self, "drawn", [])

    def sample(self, rng):
        self.drawn.append(super().sample(rng))
        return self.drawn[-1]


def step(large, build, space, **options):
    """Make one step of plain gradient descent."""
    return nas.fit_supernet(
        large,
        build,
        space,
        [(X, Y)],
        lr=0.1,
        optimizer=torch.optim.SGD,
        schedule=train.constant,
        steps=1,
        **options,
    )


def logits(w, hidden):
    """Compute a narrow `Plain` from the weights of a wide one."""
    h = F.linear(X, w["up.weight"][:hidden], w["up.bias"][:hidden]).relu()
    return F.linear(h, w["out.weight"][:, :hidden])


def descended(large, value):
    """Return the weights after a step down a function of the weights."""
    w = dict(large.named_parameters())
    g = torch.autograd.grad(value(w), list(w.values()))
    pairs = zip(w.items(), g, strict=True)
    return {name: (p - 0.1 * g).detach() for (name, p), g in pairs}


def close(model, want):
    torch.testing.assert_close(frozen(model), want)


class TestFit:
    def test_a_step_with_one_path(self):
        large, space = seeded(Plain), nas.Space({"hidden": (3,)})
        before = frozen(large)
        new = step(large, plain, space)
        want = descended(large, lambda w: F.cross_entropy(logits(w, 3), Y))
        close(new, want)
        assert not new.training and same(before, frozen(large))
        for name in ("up.weight", "up.bias"):  # off the path
            assert torch.equal(want[name][3:], before[name][3:])
        assert not torch.equal(want["up.weight"][:3], before["up.weight"][:3])

    def test_a_step_adds_up_extremes_and_paths(self):
        large, space = seeded(Plain), Recorder({"hidden": (3, 4, 5, 6, 7)})
        ends = ({"hidden": 7}, {"hidden": 3})
        new = step(large, plain, space, paths=2, extremes=ends)
        assert len(space.drawn) == 2

        def value(w, archs=(*ends, *space.drawn)):
            ys = [logits(w, a["hidden"]) for a in archs]
            return sum(F.cross_entropy(y, Y) for y in ys)

        close(new, descended(large, value))
        with pytest.raises(AssertionError):  # knock-out: one is missing
            close(new, descended(large, partial(value, archs=ends)))

    def test_a_step_with_distillation(self):
        large, space = seeded(Plain), Recorder(HIDDEN.choices)
        ends = ({"hidden": 8}, {"hidden": 2})
        new = step(large, plain, space, extremes=ends, distill=True)
        (drawn,) = space.drawn

        def value(w, detach=True):
            v = logits(w, 8)
            p = (v.detach() if detach else v).log_softmax(1)
            rest = [
                F.kl_div(
                    logits(w, n).log_softmax(1),
                    p,
                    reduction="batchmean",
                    log_target=True,
                )
                for n in (2, drawn["hidden"])
            ]
            return F.cross_entropy(v, Y) + sum(rest)

        close(new, descended(large, value))
        with pytest.raises(AssertionError):  # the teacher is not pulled
            close(new, descended(large, partial(value, detach=False)))

    def test_who_learns_from_a_teacher_sees_no_labels(self):
        """Only the largest network's own gradient depends on them."""
        large, ends = seeded(Plain), ({"hidden": 8}, {"hidden": 2})

        def moves(labels, distill):
            new = nas.fit_supernet(
                large,
                plain,
                HIDDEN,
                [(X, labels)],
                lr=0.1,
                optimizer=torch.optim.SGD,
                schedule=train.constant,
                paths=0,
                extremes=ends,
                distill=distill,
            )
            alone = descended(
                large, lambda w: F.cross_entropy(logits(w, 8), labels)
            )
            return new.out.weight.detach() - alone["out.weight"]

        other = (Y + 1) % 3
        torch.testing.assert_close(moves(Y, True), moves(other, True))
        gap = (moves(Y, False) - moves(other, False)).abs().max()
        assert gap > 1e-3  # knock-out

    def test_a_teacher_alone_learns_as_usual(self):
        large, ends = seeded(Plain), ({"hidden": 8},)
        new = [
            step(large, plain, HIDDEN, paths=0, extremes=ends, distill=d)
            for d in (False, True)
        ]
        assert same(*map(frozen, new))
        alone = train.fit(
            large,
            [(X, Y)],
            lr=0.1,
            optimizer=torch.optim.SGD,
            schedule=train.constant,
        )
        assert same(frozen(new[0]), frozen(alone))

    def test_every_path_is_as_likely_as_any_other(self):
        choices = {"a": (1, 2, 3), "b": (1, 2), "c": (1, 2)}
        space = Recorder(choices, lambda a: a["a"] != 3 or a["c"] == 1)
        large = nn.Linear(1, 1)
        nas.fit_supernet(
            large,
            lambda arch: nn.Linear(1, 1),
            space,
            [torch.ones(1, 1)],
            lambda net, x: net(x).sum(),
            steps=1,
            paths=3000,
        )
        members = [space.encode(a) for a in space]
        drawn = [space.encode(a) for a in space.drawn]
        counts = [drawn.count(m) for m in members]
        assert sum(counts) == len(drawn) == 3000 and len(members) == 10
        assert scipy.stats.chisquare(counts).pvalue > 0.01

    def test_paths_change_from_step_to_step(self):
        space = Recorder(HIDDEN.choices)
        feed = train.batches(X, Y, size=24, epochs=400)
        nas.fit_supernet(seeded(Plain), plain, space, feed)
        widths = [a["hidden"] for a in space.drawn]
        assert len(widths) == 400
        counts = [widths.count(n) for n in (2, 3, 5, 8)]
        assert scipy.stats.chisquare(counts).pvalue > 0.01
        pairs = {*itertools.pairwise(widths)}
        assert len(pairs) == 16  # no pattern

    def test_same_seed_same_weights(self):
        large, feed = seeded(MLP), train.batches(X, Y, size=8, epochs=5)
        random.seed(3)
        states = random.getstate(), torch.get_rng_state()

        def fitted(seed, build=mlp):
            new = nas.fit_supernet(large, build, HIDDEN, feed, seed=seed)
            return frozen(new)

        def on_meta(arch):
            with torch.device("meta"):
                return mlp(arch)

        first = fitted(0)
        assert same(first, fitted(0))
        assert same(first, fitted(0, on_meta))  # what build draws is nothing
        assert not same(first, fitted(1))
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])

    def test_goes_on_from_a_checkpoint(self, tmp_path):
        large, feed = seeded(MLP), train.batches(X, Y, size=8, epochs=5)
        options = {"paths": 2, "extremes": ({"hidden": 8},)}

        def stop(step, model, value):
            if step == 6:
                signal.raise_signal(signal.SIGINT)

        fit = partial(nas.fit_supernet, large, mlp, HIDDEN, feed, **options)
        with pytest.raises(KeyboardInterrupt):
            fit(checkpoint=tmp_path / "run", on_step=stop)
        steps = []
        again = fit(
            checkpoint=tmp_path / "run", on_step=lambda s, *_: steps.append(s)
        )
        assert steps == list(range(7, 16))
        assert same(frozen(again), frozen(fit()))

    def test_networks_are_built_once(self):
        built = []

        def build(arch):
            built.append(arch["hidden"])
            return mlp(arch)

        feed = train.batches(X, Y, size=8, epochs=20)
        nas.fit_supernet(seeded(MLP), build, HIDDEN, feed)
        assert sorted(built) == [2, 3, 5, 8]

    def test_random_layers_are_in_training_mode(self):
        def build(arch):
            return nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)).eval()

        large = build({})
        with torch.no_grad():
            large[1].weight.fill_(1)
        seen = []

        def loss(net, batch):
            seen.append(net(torch.ones(40, 6)))
            return seen[-1].mean()

        space = nas.Space({"only": (1,)})
        nas.fit_supernet(large, build, space, [X], loss)
        assert seen[0][:, 0].std() > 0

    def test_names_decide_what_is_shared(self):
        """SPOS: a choice block has weights of its own for each operation."""

        def build(arch):
            op = arch["op"]
            layers = {"stem": convolution(1, 2, 3)}
            layers["block"] = nn.Sequential(OrderedDict({op: operation(op, 2)}))
            layers["end"] = nn.Flatten()
            return nn.Sequential(OrderedDict(layers))

        ops = ("conv1", "conv3", "skip")
        large = build({"op": "conv1"})
        large.block = nn.ModuleDict({op: operation(op, 2) for op in ops})
        x = torch.randn(5, 1, 4, 4)
        feed, loss = [x] * 5, lambda net, x: net(x).square().mean()
        space = nas.Space({"op": ("conv3", "skip")})  # never conv1
        new = nas.fit_supernet(large, build, space, feed, loss, paths=3, lr=0.1)
        for op, changes in {"conv1": False, "conv3": True}.items():
            pair = [m.block[op].conv.weight for m in (large, new)]
            assert torch.equal(*pair) != changes
        weights = nas.inherit(large, build({"op": "conv3"}))
        assert "block.conv3.conv.weight" in weights
        assert "block.conv1.conv.weight" not in weights

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"paths": 0}, "paths: 0, and no extremes"),
            ({"distill": True}, "distill: the first of extremes"),
            ({"extremes": ({"hidden": 4},)}, "arch: 'hidden' cannot be 4"),
            ({"extremes": ({"width": 4},)}, "arch: ['width']"),
        ],
    )
    def test_what_cannot_be_trained(self, options, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            step(seeded(Plain), plain, HIDDEN, **options)

    def test_a_network_that_does_not_fit(self):
        with pytest.raises(ValueError, match=r"up.weight: \(8, 6\) is no part"):
            step(Plain(5), plain, nas.Space({"hidden": (8,)}))


class TestRecalibrate:
    def test_closed_form(self):
        """Means of batch means, means of unbiased batch variances."""
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)
        ).double()
        batches = [torch.randn(n, 2, 5, 5).double() for n in (4, 4, 7)]
        new = nas.recalibrate(model.eval(), batches)

        def channels(y):
            return y.transpose(0, 1).flatten(1)

        h = [channels(model[0](x)) for x in batches]
        want = torch.stack([y.mean(1) for y in h]).mean(0)
        torch.testing.assert_close(new[1].running_mean, want)
        want = torch.stack([y.var(1) for y in h]).mean(0)
        torch.testing.assert_close(new[1].running_var, want)
        # the second norm sees what the first makes of each batch
        z = [
            (y - y.mean(1, keepdim=True))
            / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            for y in h
        ]
        want = torch.stack([y.relu().mean(1) for y in z]).mean(0)
        torch.testing.assert_close(new[3].running_mean, want)

    def test_forgets_what_was(self):
        model = seeded(MLP).eval()
        first = nas.recalibrate(model, [X])
        model.norm.running_mean.fill_(99)
        model.norm.num_batches_tracked.fill_(7)
        assert same(frozen(first), frozen(nas.recalibrate(model, [(X, Y)])))

    def test_leaves_the_rest_as_it_is(self):
        model = nn.Sequential(MLP(), nn.Dropout(0.5), nn.BatchNorm1d(3))
        model.eval()[1].train()
        before = frozen(model)
        new = nas.recalibrate(model, [X, X])
        assert same(before, frozen(model))
        assert new[0].norm.momentum == model[0].norm.momentum == 0.1
        assert new[1].training and not new[2].training
        # dropout rested: the last norm saw all of its inputs
        torch.testing.assert_close(new[2].running_mean, outputs(model).mean(0))
        for name, p in new.named_parameters():
            assert torch.equal(p, before[name])

    def test_without_batch_norm_nothing_changes(self):
        model = lm()
        assert same(frozen(model), frozen(nas.recalibrate(model, [TOKENS])))
        free = nn.BatchNorm1d(6, track_running_stats=False)
        assert nas.recalibrate(free, [X]).running_mean is None

    def test_models_with_several_inputs(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(6)

            def forward(self, a, b):
                return self.norm(a + b)

        batches = [{"a": X, "b": 2 * X}]
        new = nas.recalibrate(
            Two(), batches, forward=lambda m, batch: m(**batch)
        )
        torch.testing.assert_close(new.norm.running_mean, 3 * X.mean(0))

    def test_needs_batches(self):
        with pytest.raises(ValueError, match="batches: there are none"):
            nas.recalibrate(MLP(), [])

    def test_a_member_of_a_supernet_needs_it(self):
        task = data.digits()
        images, labels = (t[:600] for t in task.train)
        space = nas.digits_space()

        def build(arch):
            with torch.device("meta"):
                return nas.digits_network(arch)

        large = seeded(nas.digits_network, chain(8, *["conv5"] * 4))
        feed = train.batches(images, labels, size=50, epochs=15)
        large = nas.fit_supernet(large, build, space, feed, lr=3e-2, paths=2)
        archs = [
            chain(4, "conv3", "skip", "conv3", "skip"),
            chain(8, "conv3", "conv3", "conv3", "conv3"),
            chain(8, "pool", "skip", "conv5", "skip"),
        ]
        small = [nas.subnet(large, build(arch)) for arch in archs]
        new = [nas.recalibrate(net, images.split(100)) for net in small]
        bad, good = (
            np.mean([train.accuracy(net, *task.val) for net in nets])
            for nets in (small, new)
        )
        assert bad < 0.25 and good > bad + 0.25


def outputs(model):
    """Return what a whole MLP makes of X with the statistics of X."""
    first = deepcopy(model[0]).train()
    with torch.no_grad():
        return first(X)


class TestSortedChannels:
    def test_of_a_multilayer_perceptron(self):
        model = seeded(MLP).eval()
        model.norm.running_mean.normal_()
        before = frozen(model)
        new = nas.sorted_channels(model, ["up", "norm"], ["out"])
        torch.testing.assert_close(new(X), model(X))
        order = np.argsort(-model.out.weight.detach().abs().sum(0).numpy())
        assert not np.array_equal(order, np.arange(8))
        assert torch.equal(new.up.weight, model.up.weight[order])
        assert torch.equal(
            new.norm.running_mean, model.norm.running_mean[order]
        )
        assert torch.equal(new.out.weight, model.out.weight[:, order])
        assert same(before, frozen(model))
        half = nas.sorted_channels(model, ["up"], ["out"])  # knock-out
        assert not torch.allclose(half(X), model(X), atol=1e-2)

    def test_a_narrow_network_gets_the_best(self):
        model = seeded(MLP).eval()
        with torch.no_grad():
            model.out.weight[:, ::2] = 0
        new = nas.sorted_channels(model, ["up", "norm"], ["out"])
        torch.testing.assert_close(nas.subnet(new, MLP(4))(X), model(X))
        worst = nas.subnet(model, MLP(4))(X)
        assert not torch.allclose(worst, model(X), atol=1e-2)

    def test_convolutions(self):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.BatchNorm2d(6),
            nn.PReLU(6),
            nn.Conv2d(6, 6, 3, groups=6),
            nn.Flatten(),
            nn.Linear(6 * 4, 5),
        ).double()
        nn.init.normal_(model[2].weight)
        x = torch.randn(8, 2, 6, 6).double()
        model(x)
        model.eval()
        score = torch.tensor([3.0, 1.0, 6.0, 2.0, 5.0, 4.0])
        new = nas.sorted_channels(model, list("0123"), ["5"], score=score)
        torch.testing.assert_close(new(x), model(x))
        assert torch.equal(new[0].weight[0], model[0].weight[2])
        columns = model[5].weight.unflatten(1, (6, 4))
        assert torch.equal(new[5].weight[:, :4], columns[:, 2])

    def test_several_readers_count_together(self):
        model = nn.ModuleDict(
            {n: nn.Linear(2, 2, bias=False) for n in ("w", "a", "b")}
        )
        with torch.no_grad():
            model["a"].weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
            model["b"].weight.copy_(torch.tensor([[0.0, -1.0], [0.0, 2.0]]))
        new = nas.sorted_channels(model, ["w"], ["a", "b"])
        assert torch.equal(new["w"].weight, model["w"].weight.flip(0))
        only = nas.sorted_channels(model, ["w"], ["a"])
        assert torch.equal(only["w"].weight, model["w"].weight)

    def test_heads_and_hidden_units_of_a_transformer(self):
        model = lm()
        path = "blocks.1.attention"
        new = nas.sorted_channels(
            model,
            [f"{path}.{f}" for f in "qkv"],
            [f"{path}.out"],
            units=4,
            score=torch.tensor([1.0, 3.0, 2.0, 4.0]),
        )
        torch.testing.assert_close(new(TOKENS), model(TOKENS))
        q = [m.get_submodule(path).q.weight for m in (model, new)]
        assert torch.equal(q[1][:4], q[0][12:])
        new = nas.sorted_channels(model, ["blocks.0.up"], ["blocks.0.down"])
        torch.testing.assert_close(new(TOKENS), model(TOKENS))
        norms = new.blocks[0].down.weight.abs().sum(0)
        assert bool((norms.diff() <= 0).all())

    def test_equal_channels_keep_their_order(self):
        model = MLP()
        new = nas.sorted_channels(
            model, ["up", "norm"], ["out"], score=torch.ones(8)
        )
        assert same(frozen(new), frozen(model))

    @pytest.mark.parametrize(
        "writers, readers, options, message",
        [
            ([], ["2"], {}, "name some"),
            (["9"], ["2"], {}, "'9': the model has no such module"),
            (["1"], ["2"], {}, "1: GroupNorm"),
            (["0"], ["1"], {}, "1: GroupNorm"),
            (["0"], ["3"], {}, "3: Conv2d"),
            (["0"], ["2"], {"units": 4}, "0: (6, 2, 1, 1) has no 4 units"),
            (["0"], ["2"], {"score": torch.ones(5)}, "score: (5,), not (6,)"),
        ],
    )
    def test_errors(self, writers, readers, options, message):
        model = nn.Sequential(
            nn.Conv2d(2, 6, 1),
            nn.GroupNorm(2, 6),
            nn.Conv2d(6, 4, 1),
            nn.Conv2d(6, 4, 1, groups=2),
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            nas.sorted_channels(model, writers, readers, **options)


class TestElasticKernels:
    def test_starts_as_the_plain_middle(self):
        large = seeded(nas.digits_network, chain(8, *["conv5"] * 4)).eval()
        new = nas.elastic_kernels(large, sizes=(1, 3))
        extra = {*frozen(new)} - {*frozen(large)}
        layers = {f"layer{i}.conv.to{k}" for i in range(1, 5) for k in (1, 3)}
        assert extra == layers | {"stem.conv.to1"}
        small = nas.digits_network(chain(4, "conv3", "conv1", "conv5", "skip"))
        a, b = (nas.subnet(m, small) for m in (large, new))
        torch.testing.assert_close(frozen(a), frozen(b), rtol=0, atol=0)

    def test_seven_to_five_to_three(self):
        torch.manual_seed(0)
        large = nn.Conv2d(3, 4, 7, bias=False).double()
        large = nas.elastic_kernels(large, sizes=(3, 5))
        for k in (3, 5):
            nn.init.normal_(getattr(large, f"to{k}"))
        w = large.weight.detach().numpy()
        m5, m3 = (getattr(large, f"to{k}").detach().numpy() for k in (5, 3))
        five = (w[..., 1:6, 1:6].reshape(4, 3, 25) @ m5).reshape(4, 3, 5, 5)
        three = (five[..., 1:4, 1:4].reshape(4, 3, 9) @ m3).reshape(4, 3, 3, 3)
        for want in (five, three):
            small = nn.Conv2d(2, 1, want.shape[-1], bias=False)
            got = nas.inherit(large, small)["weight"].detach()
            np.testing.assert_allclose(got, want[:1, :2], rtol=1e-12)
        whole = nas.inherit(large, nn.Conv2d(3, 4, 7, bias=False))["weight"]
        assert torch.equal(whole, large.weight)

    @pytest.mark.parametrize("kind, n", [(nn.Conv1d, 3), (nn.Conv3d, 27)])
    def test_other_dimensions(self, kind, n):
        large = nas.elastic_kernels(kind(2, 2, 5))
        assert large.to3.shape == (n, n)
        with torch.no_grad():
            large.to3.mul_(2)
        small = kind(2, 2, 3)
        got, plain = (
            nas.inherit(m, small)["weight"]
            for m in (large, by_weight(kind, large.weight))
        )
        torch.testing.assert_close(got, 2 * plain)

    def test_matrices_learn_and_are_multiplied_in(self):
        large = seeded(nas.digits_network, chain(8, *["conv5"] * 4))
        large = nas.elastic_kernels(large)
        before = frozen(large)
        ends = [chain(8, *[op] * 4) for op in ("conv5", "conv3")]
        images = torch.randn(20, 64)
        new = nas.fit_supernet(
            large,
            nas.digits_network,
            nas.digits_space(),
            [(images, torch.arange(20) % 10)] * 3,
            paths=0,
            extremes=ends,
        )
        assert same(before, frozen(large))
        assert not torch.equal(new.layer1.conv.to3, torch.eye(9))
        small = nas.subnet(new, nas.digits_network(ends[1]))
        assert {*frozen(small)} == {*frozen(nas.digits_network(ends[1]))}
        middle = new.layer1.conv.weight[..., 1:4, 1:4]
        assert not torch.equal(small.layer1.conv.weight, middle)

    def test_errors(self):
        for model in (nn.Linear(3, 3), nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 4)):
            with pytest.raises(ValueError, match="sizes: no kernel can be"):
                nas.elastic_kernels(model)


def by_weight(kind, w):
    """Make a convolution without matrices."""
    conv = kind(2, 2, 5)
    conv.weight = nn.Parameter(w.detach())
    return conv
