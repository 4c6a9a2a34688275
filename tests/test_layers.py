"""Blocks: skipped at random, measured, removed; each against its meaning."""

import itertools
import math
import re
from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import measure, models, storage, train
from minicompress.prune import layers

TOKENS = torch.randint(
    0, 40, (2, 7), generator=torch.Generator().manual_seed(0)
)
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    """x -> x + g(x) with a linear g."""

    def __init__(self, width):
        super().__init__()
        self.g = nn.Linear(width, width)

    def forward(self, x):
        return x + self.g(x)


class Gated(nn.Module):
    """A block that takes more than the stream."""

    def __init__(self, width):
        super().__init__()
        self.g = nn.Linear(width, width)

    def forward(self, x, gate, *, shift=0.0):
        return x + gate * self.g(x) + shift


class Deep(nn.Module):
    """A stack of gated blocks in some user's model."""

    def __init__(self, width=5, count=3):
        super().__init__()
        self.layers = nn.ModuleList(Gated(width) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, torch.full_like(x, 0.5), shift=0.1)
        return x


def stack(count=4, width=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*[Residual(width) for _ in range(count)]).double()


def lm(count=4, **sizes):
    torch.manual_seed(0)
    sizes = {"width": 16, "heads": 2, "ff": 20, "context": 8, **sizes}
    return models.LM(vocab=40, layers=count, **sizes).double().eval()


def encoder(count=4):
    torch.manual_seed(0)
    return models.Encoder(
        vocab=40, width=16, layers=count, heads=2, ff=20, positions=8
    ).eval()


def resnet():
    torch.manual_seed(0)
    return models.ResNet((4, 6), blocks=3, inputs=3).eval()


def mask(text):
    return torch.tensor([c == "1" for c in text])


def snapshot(model):
    return deepcopy(model.state_dict()), [
        (name, type(m), m.training) for name, m in model.named_modules()
    ]


def unchanged(model, before):
    tensors, modules = before
    now, kinds = snapshot(model)
    same = all(torch.equal(tensors[name], t) for name, t in now.items())
    return same and modules == kinds and not hooks(model)


def hooks(model):
    modules = model.modules()
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def silence(block):
    """Let the branches of one of our blocks add nothing: g = 0."""
    for layer in (block.attention.out, block.down):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


x5 = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).double()


class TestDecay:
    def test_by_hand(self):
        assert layers.linear_decay(2).tolist() == [0.75, 0.5]
        assert layers.linear_decay(5, last=0.2)[-1] == pytest.approx(0.2)

    @given(st.integers(1, 200))
    @settings(deadline=None, max_examples=30)
    def test_expected_depth(self, count):
        depth = layers.linear_decay(count).sum().item()
        assert depth == pytest.approx((3 * count - 1) / 4)

    def test_the_paper_s_depth(self):
        assert layers.linear_decay(54).sum().item() == pytest.approx(40.25)

    def test_last_one_keeps_everything(self):
        assert layers.linear_decay(7, last=1).tolist() == [1.0] * 7

    @pytest.mark.parametrize("last", [0, -0.1, 1.1, math.nan])
    def test_bad_probability(self, last):
        with pytest.raises(ValueError, match=f"last must.*{last}"):
            layers.linear_decay(3, last=last)

    def test_bad_count(self):
        with pytest.raises(ValueError, match=r"count must.*0"):
            layers.linear_decay(0)


def depths(model, x, draws):
    """Count the blocks that run in each of many passes."""
    ran = []
    for block in model.modules():
        if isinstance(block, Residual):
            block.register_forward_hook(lambda *_: ran.append(1))
    torch.manual_seed(0)
    found = []
    for _ in range(draws):
        ran.clear()
        model(x)
        found.append(len(ran))
    return torch.tensor(found).double()


class TestSkipping:
    @pytest.mark.parametrize(
        ("wrap", "keep"),
        [
            (
                lambda m: layers.layerdrop(m, "", rate=0.3),
                torch.full((6,), 0.7).double(),
            ),
            (
                lambda m: layers.stochastic_depth(m, ""),
                layers.linear_decay(6),
            ),
        ],
    )
    def test_depth_is_a_sum_of_coins(self, wrap, keep):
        draws = 4000
        got = depths(wrap(stack(6)).train(), x5, draws)
        mean, variance = keep.sum(), (keep * (1 - keep)).sum()
        assert abs(got.mean() - mean) < 4 * (variance / draws).sqrt()
        assert got.var().item() == pytest.approx(variance.item(), rel=0.15)

    def test_layerdrop_with_rate_0_is_the_baseline_bit_for_bit(self):
        data = torch.randn(40, 5), torch.randn(40, 5)
        model = nn.Sequential(
            OrderedDict(
                blocks=nn.Sequential(Residual(5), nn.Dropout(0.3), Residual(5)),
                head=nn.Linear(5, 5),  # learns even if all are skipped
            )
        )

        def fit(start):
            feed = train.batches(*data, size=8, epochs=3)
            return train.fit(
                start, feed, lambda m, b: F.mse_loss(m(b[0]), b[1])
            )

        plain = fit(model).state_dict()
        wrapped = fit(layers.layerdrop(model, "blocks", rate=0.0))
        other = fit(layers.layerdrop(model, "blocks", rate=0.5))
        got = layers.unskipped(wrapped).state_dict()
        assert all(torch.equal(got[k], v) for k, v in plain.items())
        other = layers.unskipped(other).state_dict()
        assert not all(torch.equal(other[k], v) for k, v in plain.items())

    def test_evaluation_is_the_plain_model(self):
        model, x = lm(), TOKENS
        for new in (
            layers.layerdrop(model, "blocks", rate=0.9),
            layers.stochastic_depth(model, "blocks", last=0.1),
        ):
            assert torch.equal(new.eval()(x), model(x))
            assert not torch.equal(new.train()(x), model(x))
            back = layers.unskipped(new)
            assert list(back.state_dict()) == list(model.state_dict())
            assert torch.equal(back(x), model(x))
            assert str(back) == str(model)

    def test_stochastic_depth_has_the_mean_of_the_block(self):
        model = layers.stochastic_depth(stack(1), "", last=0.3).train()
        torch.manual_seed(0)
        y = torch.stack([model(x5) for _ in range(20_000)])
        y, right = y.mean(0), model.eval()(x5)
        # one coin for the batch, so that the error is one number times g(x)
        ratio = ((y - x5) / (right - x5)).flatten()
        assert ratio.std() < 1e-9
        assert abs(ratio.mean() - 1) < 4 * (0.7 / 0.3 / 20_000) ** 0.5

    def test_layerdrop_has_another_mean(self):
        model = layers.layerdrop(stack(1), "", rate=0.7).train()
        torch.manual_seed(0)
        y = torch.stack([model(x5) for _ in range(20_000)]).mean(0)
        ratio = (y - x5) / (model.eval()(x5) - x5)
        assert ratio.mean().item() == pytest.approx(0.3, abs=0.02)

    def test_a_block_that_runs_is_rescaled_only_in_stochastic_depth(self):
        model = stack(1)
        g = model[0].g(x5)
        for wrap, factor in [
            (lambda m: layers.stochastic_depth(m, "", last=0.25), 4),
            (lambda m: layers.layerdrop(m, "", rate=0.75), 1),
        ]:
            new = wrap(model).train()
            outputs = [new(x5) for _ in range(60)]
            ran = [y for y in outputs if not torch.equal(y, x5)]
            assert 0 < len(ran) < 60
            for y in ran:
                torch.testing.assert_close(y, x5 + factor * g)

    def test_a_skipped_block_has_no_gradient_and_costs_nothing(self):
        model = layers.layerdrop(stack(3), "", rate=0.5).train()
        some = set()
        for seed in range(20):
            torch.manual_seed(seed)
            model.zero_grad()
            x = x5.clone().requires_grad_()
            model(x).sum().backward()
            torch.manual_seed(seed)
            ran = [torch.rand(()).item() < 0.5 for _ in range(3)]
            grads = [skip.block.g.weight.grad for skip in model]
            assert [g is not None and bool(g.any()) for g in grads] == ran
            some.add(tuple(ran))
        assert len(some) > 4

    def test_more_arguments_pass_through(self):
        model, x = Deep(), torch.randn(4, 5)
        for new in (
            layers.layerdrop(model, "layers", rate=0.2),
            layers.stochastic_depth(model, "layers"),
        ):
            assert torch.equal(new.eval()(x), model(x))
            assert new.train()(x).shape == x.shape
        padded = torch.ones(2, 7, dtype=torch.bool)
        padded[0, 4:] = False
        bert = encoder()
        new = layers.layerdrop(bert, "blocks", rate=0.2).eval()
        assert torch.equal(new(TOKENS, padded), bert(TOKENS, padded))
        assert not torch.equal(new(TOKENS), bert(TOKENS, padded))

    def test_inputs_are_left_alone(self):
        model = lm().train()
        before = snapshot(model)
        new = layers.stochastic_depth(model, "blocks")
        new(TOKENS).sum().backward()
        wrapped = snapshot(new)
        layers.unskipped(new)
        assert unchanged(new, wrapped)
        assert unchanged(model, before)
        assert all(p.grad is None for p in model.parameters())

    def test_shared_blocks_stay_shared(self):
        block = Residual(5)
        model = nn.Sequential(block, block, Residual(5))
        new = layers.stochastic_depth(model, "")
        assert new[0].block is new[1].block is not new[2].block
        assert [round(s.keep, 3) for s in new] == [0.833, 0.667, 0.5]
        back = layers.unskipped(new)
        assert back[0] is back[1] is not block
        assert measure.params(back) == measure.params(model)

    def test_skips_in_skips_are_all_taken_away(self):
        model = stack(2)
        twice = layers.layerdrop(
            layers.layerdrop(model, "", rate=0.2), "", rate=0.2
        )
        assert str(layers.unskipped(twice)) == str(model)
        assert str(layers.unskipped(layers.Skip(model, 0.5, rescale=False)))
        alone = layers.unskipped(layers.Skip(model[0], 0.5, rescale=False))
        assert type(alone) is Residual

    def test_training_is_repeatable(self):
        ids = torch.randint(40, (500,))
        feed = train.passages(ids, length=8, size=4, steps=5)
        runs = [
            train.fit(
                layers.layerdrop(lm(), "blocks", rate=0.5), feed, seed=seed
            )
            for seed in (0, 0, 1)
        ]
        first, second, other = (m.state_dict() for m in runs)
        assert all(torch.equal(first[k], second[k]) for k in first)
        assert not all(torch.equal(first[k], other[k]) for k in first)

    def test_blocks_that_change_the_shape_can_stay(self):
        model = layers.layerdrop(resnet(), "blocks", rate=0.5, always=[3])
        model.train()
        shapes = {tuple(model(IMAGES).shape) for _ in range(30)}
        assert shapes == {(2, 10)}
        assert [s.keep for s in model.blocks] == [0.5, 0.5, 0.5, 1, 0.5, 0.5]

    def test_a_block_that_changes_the_shape_is_named(self):
        model = layers.layerdrop(resnet(), "blocks", rate=1e-9).train()
        text = (
            "blocks.3 turns (2, 4, 8, 8) into (2, 6, 4, 4), so that it "
            "cannot be skipped: name its number in always"
        )
        with pytest.raises(ValueError, match=re.escape(text)):
            model(IMAGES)

    def test_a_block_that_returns_a_tuple_is_named(self):
        class Pair(nn.Module):
            def forward(self, x):
                return x, x

        model = layers.layerdrop(nn.Sequential(Pair()), "", rate=1e-9)
        with pytest.raises(ValueError, match=r"0 turns \(1,\) into tuple"):
            model(torch.ones(1))

    @pytest.mark.parametrize("rate", [-0.1, 1, 2, math.nan])
    def test_bad_rate(self, rate):
        with pytest.raises(ValueError, match=f"rate must.*{rate}"):
            layers.layerdrop(stack(), "", rate=rate)

    def test_bad_always(self):
        with pytest.raises(ValueError, match="always: '' has blocks 0 to 3"):
            layers.layerdrop(stack(), "", rate=0.2, always=[4])

    def test_bad_last(self):
        with pytest.raises(ValueError, match="last must"):
            layers.stochastic_depth(stack(), "", last=0)


class TestStack:
    @pytest.mark.parametrize(
        "call",
        [
            lambda m, s: layers.layerdrop(m, s, rate=0.1),
            lambda m, s: layers.stochastic_depth(m, s),
            lambda m, s: layers.block_influence(m, s, [TOKENS]),
            lambda m, s: layers.angular_distance(m, s, [TOKENS], span=1),
            lambda m, s: layers.remove_blocks(m, s, mask("1"), TOKENS),
            lambda m, s: layers.greedy_blocks(m, s, id, TOKENS, remove=1),
        ],
    )
    def test_a_wrong_path_is_named(self, call):
        model = lm(1)
        with pytest.raises(ValueError, match="stack: the model has no 'h'"):
            call(model, "h")
        with pytest.raises(ValueError, match="stack: 'norm' is a LayerNorm"):
            call(model, "norm")
        model.empty = nn.ModuleList()
        with pytest.raises(ValueError, match="stack: 'empty' has no blocks"):
            call(model, "empty")


class TestEveryOther:
    def test_half(self):
        # the authors keep 0, 2, 4, ... of 16
        kept = layers.every_other(16, rate=0.5).nonzero()[:, 0].tolist()
        assert kept == [*range(0, 16, 2)]

    @given(st.integers(1, 60), st.integers(2, 60))
    @settings(deadline=None)
    def test_every_nth_goes(self, count, n):
        keep = layers.every_other(count, rate=1 / n)
        assert [d % n == 0 for d in range(1, count + 1)] == (~keep).tolist()
        assert keep[0]

    @given(st.integers(1, 60), st.floats(0, 0.5))
    @settings(deadline=None)
    def test_at_least_as_many_as_asked_for_go_up_to_rounding(self, n, rate):
        gone = int((~layers.every_other(n, rate=rate)).sum())
        assert math.floor(n * rate) <= gone <= n / 2

    def test_nothing(self):
        assert layers.every_other(3, rate=0).all()

    @pytest.mark.parametrize("rate", [-0.1, 0.51, 1, math.nan])
    def test_bad_rate(self, rate):
        with pytest.raises(ValueError, match=f"rate must.*{rate}"):
            layers.every_other(3, rate=rate)

    def test_bad_count(self):
        with pytest.raises(ValueError, match=r"count must.*0"):
            layers.every_other(0, rate=0.5)


def streams(model, ids):
    """Walk through our language model by hand: the stream at each place."""
    x = model.tokens(ids) + model.positions.weight[: ids.shape[1]]
    found = [x]
    for block in model.blocks:
        x = block(x)
        found.append(x)
    return found


def cosines(a, b):
    return (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)


class TestInfluence:
    def test_is_the_formula_on_the_residual_stream(self):
        model = lm()
        s = streams(model, TOKENS)
        right = [
            1 - cosines(a, b).mean().item() for a, b in itertools.pairwise(s)
        ]
        got = layers.block_influence(model, "blocks", [TOKENS])
        assert got.dtype == torch.float64
        assert got.tolist() == pytest.approx(right, abs=1e-12)
        # knock-out: the branch alone would say something else
        branch = [
            1 - cosines(a, b - a).mean().item()
            for a, b in itertools.pairwise(s)
        ]
        assert min(branch) > max(right)

    def test_all_positions_of_all_batches_count_once(self):
        model = lm()
        parts = [TOKENS[:1, :3], TOKENS, TOKENS[1:, :6]]
        each = [layers.block_influence(model, "blocks", [p]) for p in parts]
        n = [p.numel() for p in parts]
        right = sum(e * k for e, k in zip(each, n, strict=True)) / sum(n)
        got = layers.block_influence(model, "blocks", iter(parts))
        torch.testing.assert_close(got, right)

    def test_a_silent_block_has_none_and_goes_without_a_trace(self):
        model = lm()
        silence(model.blocks[2])
        got = layers.block_influence(model, "blocks", [TOKENS])
        assert got[2] == 0
        assert (got[[0, 1, 3]] > 1e-6).all()
        small = layers.remove_blocks(model, "blocks", mask("1101"), TOKENS)
        assert torch.equal(small(TOKENS), model(TOKENS))

    def test_a_silent_post_norm_block_still_counts(self):
        model = encoder()
        block = model.blocks[2]
        silence(block)
        nn.init.uniform_(block.norm1.weight, 0, 2)  # as after training
        got = layers.block_influence(model, "blocks", [TOKENS])
        assert got[2] > 0.01
        small = layers.remove_blocks(model, "blocks", mask("1101"), TOKENS)
        assert not torch.allclose(small(TOKENS), model(TOKENS), atol=0.01)

    @given(st.floats(-100, 100))
    @settings(deadline=None, max_examples=20)
    def test_the_size_of_the_stream_does_not_matter(self, exponent):
        model = stack()
        for block in model:
            nn.init.zeros_(block.g.bias)  # linear: x scales, so does g(x)
        a = layers.block_influence(model, "", [x5])
        b = layers.block_influence(model, "", [x5 * 10.0**exponent * 1.7])
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)

    def test_a_turn_by_hand(self):
        class Turn(nn.Module):
            def __init__(self, degrees):
                super().__init__()
                a = math.radians(degrees)
                c, s = math.cos(a), math.sin(a)
                self.R = torch.tensor([[c, -s], [s, c]]).double()

            def forward(self, x):
                return 3 * x @ self.R

        angles = [30, 60, 80]
        model = nn.Sequential(*map(Turn, angles))
        x = torch.randn(9, 2).double()
        got = layers.block_influence(model, "", [x])
        right = [1 - math.cos(math.radians(a)) for a in angles]
        assert got.tolist() == pytest.approx(right)
        got = layers.angular_distance(model, "", [x], span=1)
        assert got.tolist() == pytest.approx([a / 180 for a in angles])
        got = layers.angular_distance(model, "", [x], span=2)
        assert got.tolist() == pytest.approx([90 / 180, 140 / 180])
        got = layers.angular_distance(model, "", [x], span=3)
        assert got.tolist() == pytest.approx([170 / 180])

    def test_zeros_that_stay_are_no_change(self):
        x = torch.zeros(2, 3)
        x[0] = 1
        got = layers.block_influence(nn.Sequential(nn.ReLU()), "", [x])
        assert got.item() == 0

    def test_images_have_a_vector_of_channels_at_each_place(self):
        model = nn.Sequential(nn.Conv2d(3, 3, 1)).double()
        x = IMAGES.double()
        rows = x.permute(0, 2, 3, 1)
        right = 1 - cosines(rows, model(x).permute(0, 2, 3, 1)).mean()
        got = layers.block_influence(model, "", [x], axis=1)
        torch.testing.assert_close(got[0], right)
        assert layers.block_influence(model, "", [x]) != got

    def test_a_change_of_shape_is_infinite(self):
        model = resnet()
        got = layers.block_influence(model, "blocks", [IMAGES] * 2, axis=1)
        assert got.isinf().tolist() == [i == 3 for i in range(6)]
        got = layers.angular_distance(model, "blocks", [IMAGES], span=2, axis=1)
        assert got.isinf().tolist() == [i in (2, 3) for i in range(5)]

    def test_angles_are_measured_over_the_span(self):
        model = lm()
        s = streams(model, TOKENS)
        for span in range(1, 5):
            right = [
                (cosines(s[i], s[i + span]).arccos() / math.pi).mean().item()
                for i in range(5 - span)
            ]
            got = layers.angular_distance(model, "blocks", [TOKENS], span=span)
            assert got.tolist() == pytest.approx(right, abs=1e-9)

    def test_angle_of_one_block_and_one_token_is_its_influence(self):
        model, one = lm(), TOKENS[:1, :1]
        angle = layers.angular_distance(model, "blocks", [one], span=1)
        got = layers.block_influence(model, "blocks", [one])
        torch.testing.assert_close(1 - (angle * math.pi).cos(), got)

    def test_batches_may_be_tuples_or_need_a_forward(self):
        model = lm()
        right = layers.block_influence(model, "blocks", [TOKENS])
        batch = (TOKENS, "label")
        assert torch.equal(
            layers.block_influence(model, "blocks", [batch]), right
        )
        got = layers.block_influence(
            model, "blocks", [batch], forward=lambda m, b: m(b[0][:, :3])
        )
        assert torch.equal(
            got, layers.block_influence(model, "blocks", [TOKENS[:, :3]])
        )

    def test_blocks_that_write_into_their_input_are_measured_right(self):
        class InPlace(nn.Module):
            def forward(self, x):
                return x.relu_()

        x = torch.tensor([[1.0, -1.0]])
        model = nn.Sequential(nn.Identity(), InPlace())
        got = layers.block_influence(model, "", [x.clone()])
        assert got.tolist() == pytest.approx([0, 1 - 0.5**0.5])

    def test_shared_blocks_are_measured_at_every_place(self):
        model = stack(2)
        shared = nn.Sequential(model[0], model[1], model[0])
        apart = nn.Sequential(*map(deepcopy, shared))
        torch.testing.assert_close(
            layers.block_influence(shared, "", [x5]),
            layers.block_influence(apart, "", [x5]),
        )

    def test_the_model_is_left_alone(self):
        model = resnet().train()
        before = snapshot(model)
        layers.block_influence(model, "blocks", [IMAGES], axis=1)
        layers.angular_distance(model, "blocks", [IMAGES], span=2, axis=1)
        with pytest.raises(RuntimeError):
            layers.block_influence(model, "blocks", [IMAGES[:, :1]])
        assert unchanged(model, before)

    def test_no_batches(self):
        for batches in ([], [TOKENS[:0]]):
            with pytest.raises(ValueError, match="batches: there are none"):
                layers.block_influence(lm(), "blocks", batches)

    @pytest.mark.parametrize("span", [0, 5])
    def test_bad_span(self, span):
        with pytest.raises(ValueError, match=f"span must.*4, got {span}"):
            layers.angular_distance(lm(), "blocks", [TOKENS], span=span)

    def test_blocks_in_another_order(self):
        class Backwards(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = stack(2)

            def forward(self, x):
                return self.blocks[0](self.blocks[1](x))

        with pytest.raises(ValueError, match=r"stack.*2 blocks of 'blocks'"):
            layers.block_influence(Backwards(), "blocks", [x5])
        with pytest.raises(ValueError, match=r"stack.*once each"):
            layers.block_influence(
                stack(2), "", [x5], forward=lambda m, x: m(m(x))
            )


CASES = {
    "LM": (lm, "blocks", TOKENS, "1010"),
    "LM, all but the first": (lm, "blocks", TOKENS, "1000"),
    "LM, none left": (lm, "blocks", TOKENS, "0000"),
    "Encoder": (encoder, "blocks", TOKENS, "0110"),
    "ResNet": (resnet, "blocks", IMAGES, "101101"),
    "Sequential": (stack, "", x5, "1001"),
    "user's": (Deep, "layers", x5.float(), "101"),
}


class TestRemoval:
    @pytest.mark.parametrize("case", CASES.values(), ids=CASES)
    def test_what_is_left_is_the_model_with_identities(self, case):
        build, path, x, bits = case
        model = build()
        before = snapshot(model)
        small = layers.remove_blocks(model, path, mask(bits), x)
        assert unchanged(model, before)
        assert len(small.get_submodule(path)) == bits.count("1")
        mute = deepcopy(model)
        blocks = mute.get_submodule(path)
        for i, bit in enumerate(bits):
            if bit == "0":
                blocks[i].forward = lambda x, *args, **kwargs: x
        assert torch.equal(small(x), mute(x))
        assert not torch.equal(small(x), model(x))
        gone = sum(
            measure.params(model.get_submodule(path)[i])
            for i, bit in enumerate(bits)
            if bit == "0"
        )
        assert measure.params(small) == measure.params(model) - gone

    def test_removing_in_two_goes_is_removing_at_once(self):
        model = lm()
        once = layers.remove_blocks(model, "blocks", mask("1001"), TOKENS)
        twice = layers.remove_blocks(
            layers.remove_blocks(model, "blocks", mask("1101"), TOKENS),
            "blocks",
            mask("101"),
            TOKENS,
        )
        a, b = once.state_dict(), twice.state_dict()
        assert list(a) == list(b)
        assert all(torch.equal(a[k], b[k]) for k in a)

    def test_keeping_everything_is_a_copy(self):
        model = lm()
        same = layers.remove_blocks(model, "blocks", mask("1111"), TOKENS)
        assert str(same) == str(model)
        assert torch.equal(same(TOKENS), model(TOKENS))
        assert same.tokens.weight is not model.tokens.weight
        assert same.head.weight is same.tokens.weight  # tied as before

    def test_names_are_kept_and_numbers_are_counted_anew(self):
        named = nn.Sequential(
            OrderedDict((n, nn.Linear(2, 2)) for n in ("a", "b", "c"))
        )
        small = layers.remove_blocks(named, "", mask("101"), torch.ones(2))
        assert list(small._modules) == ["a", "c"]
        small = layers.remove_blocks(stack(), "", mask("0101"), x5)
        assert list(small._modules) == ["0", "1"]
        small.append(Residual(5))
        assert len(small) == 3

    def test_shared_blocks_stay_shared(self):
        block = Residual(5)
        model = nn.Sequential(block, Residual(5), block, block).double()
        small = layers.remove_blocks(model, "", mask("1010"), x5)
        assert small[0] is small[1]
        assert torch.equal(small(x5), block(block(x5)))

    def test_mode_is_kept(self):
        model = resnet().train()
        small = layers.remove_blocks(model, "blocks", mask("110111"), IMAGES)
        assert small.training
        assert all(m.training for m in small.modules())

    def test_models_with_skips_can_be_shortened(self):
        model = layers.layerdrop(lm(), "blocks", rate=0.2)
        small = layers.remove_blocks(model, "blocks", mask("1011"), TOKENS)
        right = layers.remove_blocks(lm(), "blocks", mask("1011"), TOKENS)
        small = layers.unskipped(small)
        assert torch.equal(small(TOKENS), right(TOKENS))

    def test_a_shortened_model_trains(self):
        model = layers.remove_blocks(lm(), "blocks", mask("1001"), TOKENS)
        ids = torch.arange(40).repeat(20)
        feed = train.passages(ids, length=8, size=8, steps=60)
        trained = train.fit(model, feed, lr=1e-2)
        before = train.bits_per_char(model, ids)
        assert train.bits_per_char(trained, ids) < before / 4

    def test_a_block_that_changes_the_shape_is_named(self):
        text = (
            "keep: the model does not run without blocks.0, blocks.3: "
            ".*; blocks.3 turns (2, 4, 8, 8) into (2, 6, 4, 4)"
        )
        with pytest.raises(ValueError) as error:
            layers.remove_blocks(resnet(), "blocks", mask("011011"), IMAGES)
        pattern = re.escape(text).replace(r"\.\*", ".*")
        assert re.fullmatch(pattern, str(error.value))

    def test_an_output_of_another_shape_is_an_error(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
        text = (
            "keep: the model does not run without 1: its output has shape "
            "(4, 2), not (4, 3); 1 turns (4, 2) into (4, 3)"
        )
        with pytest.raises(ValueError, match=re.escape(text)):
            layers.remove_blocks(model, "", mask("10"), torch.ones(4, 2))

    def test_blocks_that_only_fit_away_together(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(3, 2))
        x = torch.ones(4, 2)
        small = layers.remove_blocks(model, "", mask("100"), x)
        assert torch.equal(small(x), model[0](x))
        with pytest.raises(ValueError, match="1 turns"):
            layers.remove_blocks(model, "", mask("101"), x)

    def test_a_forward_that_counts_its_blocks(self):
        class Counts(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(Residual(5) for _ in range(3))

            def forward(self, x):
                return self.blocks[2](self.blocks[0](x))

        with pytest.raises(ValueError, match=r"run without blocks.1: .*range"):
            layers.remove_blocks(
                Counts(), "blocks", mask("101"), torch.ones(1, 5)
            )

    def test_bad_masks(self):
        model = lm()
        for keep in ([True] * 4, torch.ones(4), None):
            with pytest.raises(ValueError, match="keep must be a bool"):
                layers.remove_blocks(model, "blocks", keep, TOKENS)
        text = (
            "keep must have shape (4,), one entry for each block of "
            "'blocks', got (3,)"
        )
        with pytest.raises(ValueError, match=re.escape(text)):
            layers.remove_blocks(model, "blocks", mask("110"), TOKENS)

    def test_no_inputs(self):
        with pytest.raises(ValueError, match="inputs: give"):
            layers.remove_blocks(lm(), "blocks", mask("1110"))

    @pytest.mark.parametrize("case", ["Sequential", "user's"])
    def test_a_file_gives_a_user_s_model_back(self, case, tmp_path):
        self.check_file(CASES[case], tmp_path, own=True)

    @pytest.mark.parametrize("case", [*CASES][:5])
    def test_a_file_gives_the_same_model_back(self, case, tmp_path):
        self.check_file(CASES[case], tmp_path, own=False)

    def check_file(self, case, folder, *, own):
        build, path, x, bits = case
        model = build()
        small = layers.remove_blocks(model, path, mask(bits), x)
        size = storage.save(folder / "small.mc", small)
        assert size < storage.save(folder / "model.mc", model)
        like = small if own else None
        again = storage.load(folder / "small.mc", like=like)
        assert torch.equal(again(x), small(x))


def worth(model):
    """A cost with a known best order: what the model makes of ones."""
    with torch.no_grad():
        return -model(torch.ones(1, 1).double()).item()


def products(*factors):
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in factors])
    for block, w in zip(model, factors, strict=True):
        block.weight.data.fill_(w)
    return model.double()


ONE = torch.ones(1, 1).double()


class TestGreedy:
    @given(st.permutations([0.5, 0.8, 1.5, 2.0, 3.0]))
    @settings(deadline=None, max_examples=20)
    def test_smallest_factors_go_first(self, factors):
        model = products(*factors)
        order = layers.greedy_blocks(model, "", worth, ONE, remove=5)
        right = sorted(range(5), key=lambda i: factors[i])
        assert order == right
        most = layers.greedy_blocks(
            model, "", lambda m: -worth(m), ONE, remove=5
        )
        assert most == right[::-1]

    @given(st.integers(0, 10**6))
    @settings(deadline=None, max_examples=15)
    def test_every_step_is_the_best_by_brute_force(self, seed):
        model, y = stack(4, seed=seed), x5.flip(0)

        def cost(m):
            return F.mse_loss(m(x5), y).item()

        order = layers.greedy_blocks(model, "", cost, x5, remove=4)
        assert sorted(order) == [0, 1, 2, 3]
        for n in range(1, 5):
            tried = {}
            for i in range(4):
                gone = {*order[: n - 1], i}
                if len(gone) == n:
                    left = [b for j, b in enumerate(model) if j not in gone]
                    tried[i] = cost(nn.Sequential(*left))
            assert order[n - 1] == min(tried, key=tried.get)

    def test_the_first_removal_is_the_exhaustive_best(self):
        model = lm(3, width=8)

        def cost(m):
            return F.mse_loss(m(TOKENS), model(TOKENS)).item()

        keeps = [mask(b) for b in ("011", "101", "110")]
        costs = [
            cost(layers.remove_blocks(model, "blocks", k, TOKENS))
            for k in keeps
        ]
        (first,) = layers.greedy_blocks(model, "blocks", cost, TOKENS, remove=1)
        assert costs[first] == min(costs)

    def test_blocks_that_do_not_fit_stay(self):
        model = resnet()

        def cost(m):
            return float(len(m.blocks))

        order = layers.greedy_blocks(model, "blocks", cost, IMAGES, remove=5)
        assert order == [0, 1, 2, 4, 5]  # ties: the first one
        text = (
            "remove: 'blocks' runs without 5 of its blocks, but not without 6"
        )
        with pytest.raises(ValueError, match=text):
            layers.greedy_blocks(model, "blocks", cost, IMAGES, remove=6)

    def test_nan_is_the_worst(self):
        model = products(1.0, 2.0, 3.0)

        def cost(m):
            y = worth(m)
            return math.nan if y == -6 else -y  # without the first

        assert layers.greedy_blocks(model, "", cost, ONE, remove=1) == [2]

    def test_errors_of_the_cost_are_its_own(self):
        def cost(m):
            raise ValueError("mine")

        with pytest.raises(ValueError, match="mine"):
            layers.greedy_blocks(stack(), "", cost, x5, remove=1)

    def test_nothing_to_remove(self):
        assert layers.greedy_blocks(stack(), "", worth, x5, remove=0) == []

    @pytest.mark.parametrize("remove", [-1, 5])
    def test_bad_number(self, remove):
        with pytest.raises(ValueError, match=f"remove must.*4, got {remove}"):
            layers.greedy_blocks(stack(), "", worth, x5, remove=remove)

    def test_the_model_is_left_alone(self):
        model = lm()
        before = snapshot(model)
        layers.greedy_blocks(
            model, "blocks", lambda m: m(TOKENS).sum().item(), TOKENS, remove=2
        )
        assert unchanged(model, before)


class TestTraining:
    def test_layerdrop_makes_removal_cheaper_than_dropout_does(self):
        """Blocks must learn y = 2x together; then each is missing once."""
        torch.manual_seed(0)
        x = torch.randn(256, 4)
        feed = train.batches(x, 2 * x, size=64, epochs=50)

        def loss(m, batch):
            return F.mse_loss(m(batch[0]), batch[1])

        def harm(start):
            model = layers.unskipped(train.fit(start, feed, loss, lr=0.01))
            assert loss(model, (x, 2 * x)) < 0.1
            keeps = [mask(b) for b in ("0111", "1011", "1101", "1110")]
            return sum(
                loss(layers.remove_blocks(model, "0", k, x), (x, 2 * x)).item()
                for k in keeps
            )

        def network(make):
            blocks = stack(4, width=4).float()
            for block in blocks:
                block.g.weight.data /= 10
            return nn.Sequential(nn.Sequential(*map(make, blocks)), Residual(4))

        def same(block):
            return block

        def dropped(block):
            block.g = nn.Sequential(block.g, nn.Dropout(0.25))
            return block

        plain = harm(network(same))
        robust = harm(layers.layerdrop(network(same), "0", rate=0.25))
        assert robust < 0.5 * plain
        assert harm(network(dropped)) > 1.5 * robust
