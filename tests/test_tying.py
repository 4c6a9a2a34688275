"""Shared weights: one tensor, many places; against copies and arithmetic."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import (
    calibrate,
    codes,
    measure,
    models,
    prune,
    quantize,
    share,
    storage,
    through,
    train,
)

SIZES = {"width": 16, "heads": 2, "ff": 20, "context": 8}
TOKENS = torch.randint(
    0, 40, (3, 8), generator=torch.Generator().manual_seed(0)
)
MILLION = 1e6


def lm(layers=3, **sizes):
    """Build a language model in which no number is at its initial value."""
    torch.manual_seed(0)
    model = models.LM(vocab=40, layers=layers, **{**SIZES, **sizes}).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


class Mixer(nn.Module):
    """A user's block: convolution, running statistics, a bare parameter."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm1d(channels)
        self.gain = nn.Parameter(torch.rand(channels, 1))
        self.register_buffer("window", torch.tensor([0.0, 1.0, 0.5, 0.25]))

    def forward(self, x):
        return x + self.gain * F.relu(self.norm(self.conv(x))) * self.window


class Users(nn.Module):
    """A model that is not from this library."""

    def __init__(self, count=3):
        super().__init__()
        self.body = nn.ModuleDict()
        self.body["steps"] = nn.ModuleList(Mixer() for _ in range(count))
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        for step in self.body["steps"]:
            x = step(x)
        return self.head(x.mean(-1))


def users(count=3):
    torch.manual_seed(1)
    return Users(count).double()


SIGNALS = torch.randn(
    5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
)


def snapshot(model):
    return deepcopy(model.state_dict()), share.uses(model)


def unchanged(model, before):
    tensors, uses = before
    now = model.state_dict()
    same = all(torch.equal(now[name], t) for name, t in tensors.items())
    return same and list(now) == list(tensors) and share.uses(model) == uses


def loss(model, ids=TOKENS):
    logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def gradients(model):
    """Map every name, shared or not, to the gradient of its tensor."""
    model.zero_grad()
    loss(model).backward()
    named = model.named_parameters(remove_duplicate=False)
    return {name: p.grad.clone() for name, p in named}


def one_tensor(model, *names):
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    return len({tensors[name].data_ptr() for name in names}) == 1


def inside(block):
    return [name for name, _ in block.named_parameters()]


class TestTie:
    def test_all_of_a_block_is_shared_norms_included(self):
        tied = share.tie_blocks(lm(), "blocks")
        for name in inside(tied.blocks[0]):
            same = {id(b.get_parameter(name)) for b in tied.blocks}
            assert len(same) == 1, name
        one, three = measure.params(lm(1)), measure.params(lm(3))
        assert measure.params(tied) == one
        assert three - one == 2 * sum(
            p.numel() for p in lm(1).blocks.parameters()
        )

    @pytest.mark.parametrize(
        ("parts", "want"),
        [
            ("attention", {"attention"}),
            (("up", "down"), {"up", "down"}),
            (["norm1.weight"], {"norm1"}),
            (lambda name, w: w.ndim == 2, {"attention", "up", "down"}),
        ],
    )
    def test_parts_select_what_is_shared(self, parts, want):
        tied = share.tie_blocks(lm(), "blocks", parts=parts)
        inner = [n for n in share.uses(tied) if n.startswith("blocks.")]
        assert {n.split(".")[2] for n in inner} == want
        assert all(
            names == [f"blocks.{i}.{first[9:]}" for i in range(3)]
            for first, names in share.uses(tied).items()
            if first in inner
        )

    def test_a_path_is_no_prefix_of_a_longer_word(self):
        block = nn.ModuleDict({"a": nn.Linear(2, 2), "ab": nn.Linear(2, 2)})
        tied = share.tie_blocks(
            nn.ModuleList([block, deepcopy(block)]), "", parts="a"
        )
        assert list(share.uses(tied)) == ["0.a.weight", "0.a.bias"]

    def test_starts_at_the_first_or_at_the_mean(self):
        model = lm()
        first = share.tie_blocks(model, "blocks")
        mean = share.tie_blocks(model, "blocks", source="mean")
        for name in inside(model.blocks[0]):
            three = [b.get_parameter(name) for b in model.blocks]
            assert torch.equal(first.blocks[2].get_parameter(name), three[0])
            torch.testing.assert_close(
                mean.blocks[2].get_parameter(name), sum(three) / 3
            )

    def test_equal_blocks_compute_what_they_did(self):
        model = lm()
        for block in model.blocks[1:]:
            block.load_state_dict(model.blocks[0].state_dict())
        for source in ("first", "mean"):
            tied = share.tie_blocks(model, "blocks", source=source)
            torch.testing.assert_close(tied(TOKENS), model(TOKENS))

    @pytest.mark.parametrize(
        "groups", [[0, 0, 1, 1], [0, 1, 0, 1], [5, 7, 7, 5], [3, 1, 2, 0]]
    )
    def test_blocks_with_one_number_share(self, groups):
        model = lm(4)
        tied = share.tie_blocks(model, "blocks", groups=groups)
        for i in range(4):
            first = groups.index(groups[i])
            for a, b in zip(
                tied.blocks[i].parameters(),
                model.blocks[first].parameters(),
                strict=True,
            ):
                assert torch.equal(a, b)
            for j in range(4):
                same = tied.blocks[i].up.weight is tied.blocks[j].up.weight
                assert same == (groups[i] == groups[j])

    def test_a_mean_is_that_of_the_group(self):
        model = lm(4)
        tied = share.tie_blocks(
            model, "blocks", source="mean", groups=[0, 1, 0, 1]
        )
        W = [b.up.weight for b in model.blocks]
        torch.testing.assert_close(tied.blocks[3].up.weight, (W[1] + W[3]) / 2)

    def test_other_ties_stay(self):
        tied = share.tie_blocks(lm(), "blocks")
        assert tied.head.weight is tied.tokens.weight

    def test_ties_to_the_outside_follow(self):
        model = lm()
        model.norm.weight = model.blocks[1].norm2.weight
        model.blocks[2].attention.k.weight = model.blocks[2].attention.q.weight
        tied = share.tie_blocks(model, "blocks", source="mean")
        assert one_tensor(tied, "norm.weight", "blocks.0.norm2.weight")
        names = [
            f"blocks.{i}.attention.{k}.weight" for i in range(3) for k in "qk"
        ]
        assert one_tensor(tied, *names)  # one tie makes all of them one

    def test_tying_again_adds(self):
        once = share.tie_blocks(lm(), "blocks")
        two = share.tie_blocks(lm(), "blocks", parts="attention")
        two = share.tie_blocks(two, "blocks", parts=lambda n, w: n[0] != "a")
        assert share.uses(once) == share.uses(two)
        assert torch.equal(once(TOKENS), two(TOKENS))

    def test_frozen_stays_frozen(self):
        model = lm().requires_grad_(False)
        tied = share.tie_blocks(model, "blocks", source="mean")
        assert not any(p.requires_grad for p in tied.parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_keeps_the_dtype(self, dtype):
        tied = share.tie_blocks(lm().to(dtype), "blocks", source="mean")
        assert {p.dtype for p in tied.parameters()} == {dtype}

    def test_the_mean_of_bfloat16_is_rounded_once(self):
        blocks = nn.Sequential(*[nn.Linear(1, 1) for _ in range(3)]).bfloat16()
        for block, w in zip(blocks, (256.0, 1.0, 1.0), strict=True):
            nn.init.constant_(block.weight, w)  # 256 + 1 = 256 in bfloat16
        tied = share.tie_blocks(blocks, "", source="mean")
        assert tied[0].weight == torch.tensor(258 / 3).bfloat16()

    def test_leaves_the_model_as_it_is(self):
        model = lm()
        before = snapshot(model)
        tied = share.tie_blocks(model, "blocks", source="mean")
        with torch.no_grad():
            tied.blocks[0].up.weight.zero_()
        share.untie(tied)
        assert unchanged(model, before)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"stack": "layers"}, "stack: the model has no 'layers'"),
            ({"stack": "head"}, "stack: 'head' is a Linear, not an"),
            ({"parts": "mlp"}, r"parts: blocks\.0 has no tensors in 'mlp'"),
            ({"parts": ("up", "atten")}, "has no tensors in 'atten'"),
            ({"parts": lambda n, w: False}, "parts selects nothing"),
            ({"parts": ()}, "parts selects nothing"),
            ({"source": "last"}, 'source must be "first" or "mean", got'),
            ({"groups": [0, 1]}, "groups: 2 numbers for 3 blocks"),
        ],
    )
    def test_says_what_is_wrong(self, arguments, message):
        arguments = {"stack": "blocks", **arguments}
        with pytest.raises(ValueError, match=message):
            share.tie_blocks(lm(), arguments.pop("stack"), **arguments)

    def test_blocks_must_agree_in_what_they_share(self):
        model = lm()
        model.blocks[1].up = nn.Linear(16, 24).double()
        with pytest.raises(
            ValueError, match=r"blocks\.1\.up\.weight is \(24, 16\).*\(20, 16\)"
        ):
            share.tie_blocks(model, "blocks")
        share.tie_blocks(model, "blocks", parts="attention")  # these do
        share.tie_blocks(model, "blocks", groups=[0, 1, 0])
        model = lm()
        model.blocks[2].down.bias = None
        with pytest.raises(ValueError, match=r"2\.down\.bias is missing"):
            share.tie_blocks(model, "blocks")
        model = lm()
        model.blocks[2].float()
        with pytest.raises(ValueError, match=r"float32, not .* torch\.float64"):
            share.tie_blocks(model, "blocks")

    def test_computed_weights_are_refused(self):
        model = through.attach(lm(), "blocks.1.up.weight", torch.round)
        for change in (
            lambda: share.tie_blocks(model, "blocks"),
            lambda: share.untie(model),
            lambda: share.tie_embeddings(model, "tokens", "head"),
        ):
            with pytest.raises(ValueError, match=r"blocks\.1\.up: is param"):
                change()


class TestUsersModel:
    def test_shares_parameters_but_not_running_statistics(self):
        model = users()
        tied = share.tie_blocks(model, "body.steps")
        assert measure.params(tied) == measure.params(users(1))
        shared = [n.split(".", 3)[3] for n in share.uses(tied)]
        assert shared == [
            "gain",
            "conv.weight",
            "conv.bias",
            "norm.weight",
            "norm.bias",
        ]
        trained = train.fit(
            tied,
            [(SIGNALS, torch.tensor([0, 1, 0, 1, 0]))] * 5,
            lr=0.01,
        )
        steps = trained.body["steps"]
        assert steps[0].conv.weight is steps[2].conv.weight
        means = [s.norm.running_mean for s in steps]
        assert not torch.allclose(means[0], means[1])

    def test_a_buffer_that_is_named_is_shared(self):
        tied = share.tie_blocks(
            users(), "body.steps", parts=("", "window"), source="mean"
        )
        names = [f"body.steps.{i}.window" for i in range(3)]
        assert share.uses(tied)[names[0]] == names
        assert torch.equal(
            tied.body["steps"][1].window, users().body["steps"][0].window
        )
        assert isinstance(tied.body["steps"][0].gain, nn.Parameter)
        assert names[0] in dict(tied.named_buffers())

    def test_counters_start_at_the_first_also_with_the_mean(self):
        model = users()
        for i, step in enumerate(model.body["steps"]):
            step.norm.num_batches_tracked += 10 * i + 1
        tied = share.tie_blocks(
            model,
            "body.steps",
            parts="norm.num_batches_tracked",
            source="mean",
        )
        counter = tied.body["steps"][2].norm.num_batches_tracked
        assert counter.dtype == torch.int64
        assert counter == 1

    def test_computes_the_unrolled_model_and_loads_like_it(self):
        tied = share.tie_blocks(users(), "body.steps").eval()
        torch.testing.assert_close(share.untie(tied)(SIGNALS), tied(SIGNALS))
        again = storage.loads(storage.dumps(tied), like=users())
        assert share.uses(again) == share.uses(tied)
        assert torch.equal(again(SIGNALS), tied(SIGNALS))

    def test_recurrent_layers_use_what_they_share(self):
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.LSTM(3, 3) for _ in range(2)).double()
        x = torch.randn(4, 2, 3, dtype=torch.float64)
        tied = share.tie_blocks(layers, "")
        nn.init.zeros_(tied[0].weight_hh_l0)
        nn.init.zeros_(tied[0].weight_ih_l0)
        nn.init.zeros_(tied[0].bias_hh_l0)
        nn.init.zeros_(tied[0].bias_ih_l0)
        assert tied[1](x)[0].eq(0).all()
        free = share.untie(tied)
        nn.init.ones_(free[1].bias_ih_l0)
        assert free[0](x)[0].eq(0).all()
        assert not free[1](x)[0].eq(0).any()

    @pytest.mark.parametrize("norm_first", [True, False])
    def test_blocks_of_torch(self, norm_first):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first
        )
        model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        x = torch.randn(2, 5, 8)
        tied = share.tie_blocks(model, "layers", parts="self_attn")
        count = sum(p.numel() for p in layer.self_attn.parameters())
        assert measure.params(model) - measure.params(tied) == 2 * count
        torch.testing.assert_close(tied(x), share.untie(tied)(x))
        assert not torch.allclose(tied(x), model(x))
        again = storage.loads(storage.dumps(tied), like=model)
        assert share.uses(again) == share.uses(tied)


class TestUntie:
    @pytest.mark.parametrize("parts", ["", "attention", ("up", "down")])
    def test_copies_compute_the_same(self, parts):
        tied = share.tie_blocks(lm(), "blocks", parts=parts)
        free = share.untie(tied)
        assert share.uses(free) == {}
        assert torch.equal(free(TOKENS), tied(TOKENS))
        assert list(free.state_dict()) == list(tied.state_dict())
        assert measure.params(free) == sum(
            p.numel() for p in tied.state_dict().values()
        )
        pointers = [p.data_ptr() for p in free.parameters()]
        assert len(set(pointers)) == len(pointers)

    def test_gradient_is_the_sum_of_the_copies(self):
        tied = share.tie_blocks(lm(), "blocks")
        got, each = gradients(tied), gradients(share.untie(tied))
        assert set(share.uses(tied)) > {"tokens.weight", "blocks.0.up.bias"}
        for names in share.uses(tied).values():
            want = sum(each[name] for name in names)
            torch.testing.assert_close(got[names[0]], want)
            largest = max(each[name].abs().max() for name in names)
            assert largest > 0 or names[0].endswith("k.bias")

    def test_copies_go_their_own_way(self):
        tied = share.tie_blocks(lm(), "blocks")
        free = train.fit(
            share.untie(tied), train_batches(), lr=0.01, seed=0
        ).blocks
        assert not torch.allclose(free[0].up.weight, free[1].up.weight)

    def test_layers_that_stand_twice_become_two(self):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        model = nn.Sequential(layer, nn.ReLU(), layer, layer[0]).eval()
        free = share.untie(model)
        assert len(share.uses(model)) == 7
        assert share.uses(free) == {}
        assert len({id(m) for m in free.modules()}) == 1 + 3 + 3 + 1 + 1
        x = torch.randn(4, 3)
        assert torch.equal(free(x), model(x))

    def test_frozen_copies(self):
        model = share.untie(lm().requires_grad_(False))
        assert not any(p.requires_grad for p in model.parameters())


def train_batches(steps=4):
    ids = torch.arange(200) * 7 % 40
    return train.passages(ids, length=8, size=2, steps=steps)


class TestOrders:
    def test_by_hand(self):
        assert share.sequence(6, 3) == [0, 0, 1, 1, 2, 2]
        assert share.cycle(7, 3) == [0, 1, 2, 0, 1, 2, 0]
        assert share.cycle_reversed(8, 3) == [0, 1, 2, 0, 1, 2, 2, 1]
        assert share.cycle_reversed(3, 3) == [0, 1, 2]

    @given(st.integers(1, 40), st.integers(1, 40))
    def test_all_sets_are_used_as_evenly_as_can_be(self, N, M):
        M = min(N, M)
        for order in (share.sequence, share.cycle, share.cycle_reversed):
            found = order(N, M)
            assert len(found) == N
            assert set(found) == set(range(M))
            times = [found.count(i) for i in range(M)]
            assert max(times) - min(times) <= 1
            assert order(N, N) == list(range(N))
            assert order(N, 1) == [0] * N
        assert share.sequence(N, M) == sorted(share.sequence(N, M))
        assert share.cycle_reversed(2 * M, M)[M:] == list(range(M))[::-1]

    @pytest.mark.parametrize("M", [0, 5])
    def test_needs_one_set_to_one_for_each_block(self, M):
        for order in (share.sequence, share.cycle, share.cycle_reversed):
            with pytest.raises(ValueError, match=f"M must be .* got {M}"):
                order(4, M)


class TestCost:
    def test_multiplications_are_those_of_the_untied(self):
        model, tied = lm(), share.tie_blocks(lm(), "blocks")
        assert measure.macs(tied, TOKENS) == measure.macs(model, TOKENS)
        layers = measure.macs_by_layer(tied, TOKENS)
        assert layers == measure.macs_by_layer(model, TOKENS)
        assert layers["blocks.2.up"] == 8 * 16 * 20

    def test_what_training_keeps_in_memory_too(self):
        model, tied = lm(), share.tie_blocks(lm(), "blocks")

        kept = [train.saved_bytes(lambda m=m: loss(m)) for m in (model, tied)]
        assert kept[0] == kept[1] > 0


class TestTraining:
    def test_an_optimizer_moves_a_shared_tensor_once(self):
        tied = share.tie_blocks(lm(), "blocks")
        start = deepcopy(tied)
        lr, decay = 0.1, 0.5

        def sgd(weights, lr):
            weights = list(weights)
            assert len({id(w) for w in weights}) == len(weights)
            assert sum(w.numel() for w in weights) == measure.params(tied)
            return torch.optim.SGD(weights, lr=lr, weight_decay=decay)

        batch = TOKENS[:, :-1], TOKENS[:, 1:]
        got = train.fit(
            tied, [batch], lr=lr, optimizer=sgd, schedule=train.constant
        )
        each = gradients(share.untie(start))
        for names in share.uses(start).values():
            w = dict(start.named_parameters())[names[0]]
            want = w - lr * (sum(each[n] for n in names) + decay * w)
            now = dict(got.named_parameters())[names[0]]
            torch.testing.assert_close(now, want)
        assert share.uses(got) == share.uses(start)

    def test_a_shared_weight_is_computed_alike_and_baked_to_one(self):
        tied = share.tie_blocks(lm(), "blocks")
        scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        attached = through.attach(
            tied, "blocks.1.up.weight", lambda w, a: w * a, a=scale
        )
        for block in attached.blocks:
            assert torch.equal(block.up.weight, tied.blocks[0].up.weight * 2)
        attached = train.fit(attached, train_batches(), lr=0.01)
        baked = through.bake(attached)
        assert share.uses(baked) == share.uses(tied)
        assert torch.equal(baked(TOKENS), attached(TOKENS))

    def test_fewer_blocks_still_share(self):
        tied = share.tie_blocks(lm(4), "blocks")
        keep = torch.tensor([True, False, True, False])
        small = prune.remove_blocks(tied, "blocks", keep, TOKENS)
        assert measure.params(small) == measure.params(tied)
        assert small.blocks[0].up.weight is small.blocks[1].up.weight
        untied = share.untie(tied)
        want = prune.remove_blocks(untied, "blocks", keep, TOKENS)
        assert torch.equal(small(TOKENS), want(TOKENS))
        again = storage.loads(storage.dumps(small))
        assert again.blocks[0].up.weight is again.blocks[1].up.weight

    def test_statistics_of_all_uses_add_up_to_those_of_the_weight(self):
        tied = share.tie_blocks(lm(), "blocks")
        seen = []
        for block in tied.blocks:
            block.up.register_forward_pre_hook(
                lambda layer, args: seen.append(args[0].flatten(0, 1))
            )
        stats = calibrate.inputs(tied, [TOKENS])
        X = torch.cat(seen)
        names = share.uses(tied)["blocks.0.up.weight"]
        each = {id(stats[n]): stats[n] for n in names}.values()
        assert sum(s.count for s in each) == len(X) == 3 * TOKENS.numel()
        torch.testing.assert_close(sum(s.gram for s in each), X.T @ X)


def in_bytes(W):
    return quantize.min_max(W, bits=8, each="row")


def size_of(layers, tied=True, quantized=False):
    model = models.LM(vocab=40, layers=layers, **SIZES)
    model = share.tie_blocks(model, "blocks") if tied else model
    state = codes.encode(model, in_bytes) if quantized else None
    return len(storage.dumps(model, state))


class TestStorage:
    def test_a_file_grows_with_the_depth_by_names_only(self):
        two, three, many = (size_of(n) for n in (2, 3, 8))
        inner = inside(lm(1).blocks[0])
        # a name of its own and that of the first, 16 times
        entry = '"blocks.2.%s":{"as":"blocks.0.%s"},'
        names = sum(len(entry % (name, name)) for name in inner)
        assert three - two == names == 936
        assert many - two == 6 * names
        block = sum(p.numel() for p in lm(1).blocks.parameters())
        free = size_of(3, tied=False) - size_of(2, tied=False)
        assert free > 4 * block > 5 * names

    @pytest.mark.parametrize("quantized", [False, True])
    def test_loads_shared(self, quantized):
        tied = share.tie_blocks(lm().float(), "blocks")
        state = codes.encode(tied, in_bytes) if quantized else None
        again = storage.loads(storage.dumps(tied, state))
        assert share.uses(again) == share.uses(tied)
        assert measure.params(again) == measure.params(tied)
        for names in share.uses(tied).values():
            assert one_tensor(again, *names)
        if quantized:
            decoded = deepcopy(tied)
            decoded.load_state_dict(codes.decode(state))
            assert not torch.equal(decoded(TOKENS), tied(TOKENS))
            torch.testing.assert_close(again(TOKENS), decoded(TOKENS))
        else:
            assert torch.equal(again(TOKENS), tied(TOKENS))

    def test_one_code_under_all_names(self):
        tied = share.tie_blocks(lm().float(), "blocks")
        state = codes.encode(tied, in_bytes)
        for names in share.uses(tied).values():
            assert len({id(state[name]) for name in names}) == 1
        extra = size_of(8, quantized=True) - size_of(2, quantized=True)
        assert extra == size_of(8) - size_of(2)

    def test_a_code_for_each_name_is_stored_for_each_name(self):
        tied = share.tie_blocks(lm().float(), "blocks")
        each = {
            name: in_bytes(t) if t.ndim == 2 else t
            for name, t in tied.state_dict().items()
        }
        together = codes.encode(tied, in_bytes)
        long, short = (len(storage.dumps(tied, s)) for s in (each, together))
        assert long - short > 2 * measure.params(lm(1).blocks)
        assert not one_tensor(
            storage.loads(storage.dumps(tied, each)),
            "blocks.0.up.weight",
            "blocks.1.up.weight",
        )

    def test_untied_loads_untied(self):
        free = share.untie(share.tie_blocks(lm(), "blocks"))
        again = storage.loads(storage.dumps(free))
        assert share.uses(again) == {}
        assert torch.equal(again(TOKENS), free(TOKENS))

    def test_what_is_trained_after_loading_still_shares(self):
        tied = share.tie_blocks(lm().float(), "blocks")
        again = storage.loads(storage.dumps(tied))
        again = train.fit(again, train_batches(), lr=0.01)
        want = train.fit(tied, train_batches(), lr=0.01)
        assert torch.equal(again(TOKENS), want(TOKENS))

    @pytest.mark.parametrize("quantized", [False, True])
    def test_a_factorized_table_with_its_output(self, quantized):
        model = share.tie_blocks(lm().float(), "blocks")
        small = share.factorize_vocabulary(model, "tokens", "head", width=5)
        state = codes.encode(small, in_bytes) if quantized else None
        again = storage.loads(storage.dumps(small, state))
        assert again.tokens[0].weight is again.head[1].weight
        assert again.tokens[1].weight is not again.head[0].weight
        assert share.uses(again) == share.uses(small)
        if not quantized:
            assert torch.equal(again(TOKENS), small(TOKENS))


def table(V=30, H=12, seed=0, rank=None):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(V, H, generator=g, dtype=torch.float64)
    if rank is not None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        W = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return nn.Embedding.from_pretrained(W, freeze=False)


def product(new):
    thin, projection = new
    return (thin.weight @ projection.weight.T).detach()


def often(V=30, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1000, (V,), generator=g) ** 2


class TestTieEmbeddings:
    def test_one_parameter_that_is_the_table(self):
        model = lm(tied=False)
        before = snapshot(model)
        tied = share.tie_embeddings(model, "tokens", "head")
        assert tied.head.weight is tied.tokens.weight
        assert torch.equal(tied.head.weight, model.tokens.weight)
        assert measure.params(model) - measure.params(tied) == 40 * 16
        assert measure.macs(tied, TOKENS) == measure.macs(model, TOKENS)
        assert unchanged(model, before)

    def test_gradient_is_the_sum_of_both_roles(self):
        tied = share.tie_embeddings(lm(tied=False), "tokens", "head")
        each = gradients(share.untie(tied))
        both = each["tokens.weight"], each["head.weight"]
        assert min(g.abs().max() for g in both) > 0
        got = gradients(tied)["tokens.weight"]
        torch.testing.assert_close(got, sum(both))

    def test_a_bias_of_the_output_stays(self):
        model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
        tied = share.tie_embeddings(model, "0", "1")
        assert torch.equal(tied[1].bias, model[1].bias)
        assert share.uses(tied) == {"0.weight": ["0.weight", "1.weight"]}

    def test_three_uses(self):
        model = nn.ModuleDict(
            {
                "encoder": nn.Embedding(5, 3),
                "decoder": nn.Embedding(5, 3),
                "head": nn.Linear(3, 5),
            }
        )
        model["head"].weight = model["decoder"].weight
        tied = share.tie_embeddings(model, "encoder", "head")
        names = ["encoder.weight", "decoder.weight", "head.weight"]
        assert share.uses(tied)["encoder.weight"] == names

    def test_loads_tied(self):
        tied = share.tie_embeddings(lm(tied=False), "tokens", "head")
        again = storage.loads(storage.dumps(tied))
        assert again.head.weight is again.tokens.weight
        assert torch.equal(again(TOKENS), tied(TOKENS))

    @pytest.mark.parametrize(
        ("table", "head", "message"),
        [
            ("words", "head", "table: the model has no 'words'"),
            ("norm", "head", "table: 'norm' is a LayerNorm, not an nn.Emb"),
            ("tokens", "tokens", "head: 'tokens' is a Embedding, not an nn.L"),
            ("positions", "head", r"head: head has a weight \(40, 16\).*\(8, "),
        ],
    )
    def test_says_what_is_wrong(self, table, head, message):
        with pytest.raises(ValueError, match=message):
            share.tie_embeddings(lm(tied=False), table, head)


class TestFactorize:
    def test_lookup_is_that_of_the_product(self):
        new = share.factorize_embedding(table(), width=4)
        ids = torch.tensor([[3, 0], [29, 3]])
        torch.testing.assert_close(new(ids), product(new)[ids])
        assert torch.linalg.matrix_rank(product(new)) == 4

    @pytest.mark.parametrize("width", [1, 5, 11])
    def test_loses_the_singular_values_that_are_left_out(self, width):
        W = table().weight
        new = share.factorize_embedding(table(), width=width)
        want = torch.linalg.svdvals(W)[width:].square().sum()
        got = (product(new) - W).square().sum()
        torch.testing.assert_close(got, want)

    @pytest.mark.parametrize(("V", "H"), [(30, 12), (6, 9), (7, 7)])
    def test_all_directions_are_exact(self, V, H):
        for counts in (None, often(V)):
            new = share.factorize_embedding(
                table(V, H), width=min(V, H), counts=counts
            )
            torch.testing.assert_close(product(new), table(V, H).weight.data)

    def test_a_projection_that_is_the_identity_changes_nothing(self):
        old = table()
        new = nn.Sequential(old, nn.Linear(12, 12, bias=False).double())
        nn.init.eye_(new[1].weight)
        ids = torch.arange(30)
        assert torch.equal(new(ids), old(ids))

    def test_a_table_of_low_rank_is_exact(self):
        old = table(rank=3)
        for counts in (None, often()):
            new = share.factorize_embedding(old, width=5, counts=counts)
            torch.testing.assert_close(product(new), old.weight.data)
            assert new[0].weight.abs().max() < 100  # nothing was divided by 0

    def test_nothing_but_zeros(self):
        old = nn.Embedding.from_pretrained(torch.zeros(4, 3))
        assert product(share.factorize_embedding(old, width=2)).eq(0).all()

    def test_both_factors_carry_the_roots_of_the_singular_values(self):
        A, B = share.factorize_embedding(table(), width=4)
        root = torch.linalg.svdvals(table().weight)[:4].sqrt()
        torch.testing.assert_close(A.weight.norm(dim=0), root)
        torch.testing.assert_close(B.weight.norm(dim=0), root)

    def test_equal_counts_are_no_counts(self):
        even = share.factorize_embedding(
            table(), width=4, counts=torch.full((30,), 7)
        )
        plain = share.factorize_embedding(table(), width=4)
        torch.testing.assert_close(product(even), product(plain))

    @pytest.mark.parametrize("seed", range(4))
    def test_counts_weight_the_errors(self, seed):
        old, counts = table(seed=seed), often(seed=seed)
        W, c = old.weight.detach(), counts.double()[:, None]

        def errors(new):
            E = (product(new) - W).square()
            return float((c * E).sum()), float(E.sum())

        plain = errors(share.factorize_embedding(old, width=4))
        mine = errors(share.factorize_embedding(old, width=4, counts=counts))
        assert mine[0] < plain[0]
        assert mine[1] > plain[1]
        lost = torch.linalg.svdvals(c.sqrt() * W)[4:].square().sum()
        assert mine[0] == pytest.approx(float(lost))

    def test_no_alternating_least_squares_finds_less(self):
        old, counts = table(), often()
        W, c = old.weight.detach(), counts.double()
        new = share.factorize_embedding(old, width=3, counts=counts)
        best = (c[:, None] * (product(new) - W).square()).sum()
        B = torch.randn(3, 12, generator=torch.Generator().manual_seed(5))
        B = B.double()
        for _ in range(500):
            A = W @ torch.linalg.pinv(B)
            B = torch.linalg.solve(
                A.T @ (c[:, None] * A), A.T @ (c[:, None] * W)
            )
        found = (c[:, None] * (A @ B - W).square()).sum()
        torch.testing.assert_close(found, best, rtol=1e-6, atol=0)

    def test_tokens_that_never_occur_are_still_near_their_rows(self):
        old, counts = table(rank=4), often()
        counts[:10] = 0
        new = share.factorize_embedding(old, width=4, counts=counts)
        torch.testing.assert_close(product(new), old.weight.data)

    @given(st.integers(1, 9), st.integers(0, 100))
    @settings(max_examples=30)
    def test_wider_is_never_worse(self, width, seed):
        old = table(15, 10, seed=seed)
        errors = [
            (
                product(share.factorize_embedding(old, width=w)) - old.weight
            ).norm()
            for w in (width, width + 1)
        ]
        assert errors[1] <= errors[0] * (1 + 1e-9)

    def test_padding_freezing_and_dtype_stay(self):
        old = nn.Embedding(6, 4, padding_idx=2).bfloat16().eval()
        old.requires_grad_(False)
        new = share.factorize_embedding(old, width=3)
        assert new[0].padding_idx == 2
        assert new[0].weight[2].eq(0).all()
        assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
        assert not any(p.requires_grad for p in new.parameters())
        assert not new.training

    def test_leaves_the_table_as_it_is(self):
        old, counts = table(), often()
        before, c = old.weight.detach().clone(), counts.clone()
        new = share.factorize_embedding(old, width=12, counts=counts)
        new[0].weight.data.zero_()
        assert torch.equal(old.weight, before)
        assert torch.equal(counts, c)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"width": 0}, r"width must be 1 to 12 for a table \(30, 12\)"),
            ({"width": 13}, "width must be 1 to 12"),
            ({"counts": torch.ones(12)}, r"counts must have shape \(30,\)"),
            ({"counts": -torch.ones(30)}, "counts must be 0 or more"),
            ({"counts": torch.zeros(30)}, "counts must be .* not all 0"),
        ],
    )
    def test_says_what_is_wrong(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            share.factorize_embedding(table(), **{"width": 3, **arguments})

    def test_a_table_that_changes_itself_is_refused(self):
        with pytest.raises(ValueError, match="embedding: max_norm"):
            share.factorize_embedding(nn.Embedding(5, 4, max_norm=1), width=2)


class TestVocabulary:
    def test_computes_what_the_factors_say(self):
        model = lm()
        before = snapshot(model)
        small = share.factorize_vocabulary(model, "tokens", "head", width=6)
        want = deepcopy(model)
        W = product(share.factorize_embedding(model.tokens, width=6))
        want.tokens.weight.data.copy_(W)  # of the head as well
        torch.testing.assert_close(small(TOKENS), want(TOKENS))
        assert unchanged(model, before)

    def test_all_directions_are_exact(self):
        small = share.factorize_vocabulary(lm(), "tokens", "head", width=16)
        torch.testing.assert_close(small(TOKENS), lm()(TOKENS))

    def test_counts(self):
        model, V, H, E = lm(), 40, 16, 6
        small = share.factorize_vocabulary(model, "tokens", "head", width=E)
        saved = measure.params(model) - measure.params(small)
        assert saved == V * H - (V * E + 2 * E * H)
        assert small.head[1].weight is small.tokens[0].weight
        # a lookup costs nothing, its projection and the output do
        more = 8 * (E * H + H * E + E * V - H * V)
        assert measure.macs(small, TOKENS) - measure.macs(model, TOKENS) == more

    def test_a_table_of_its_own_keeps_the_output(self):
        model = lm(tied=False)
        small = share.factorize_vocabulary(model, "tokens", width=6)
        assert torch.equal(small.head.weight, model.head.weight)
        assert len(small.tokens) == 2

    def test_an_output_with_a_bias(self):
        model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9)).double()
        model = share.tie_embeddings(model, "0", "1")
        small = share.factorize_vocabulary(model, "0", "1", width=4)
        ids = torch.arange(9)
        torch.testing.assert_close(small(ids), model(ids))
        assert torch.equal(small[1][1].bias, model[1].bias)

    def test_a_tie_is_not_lost_silently(self):
        for model, head in ((lm(), None), (lm(tied=False), "head")):
            with pytest.raises(ValueError, match="head: one tensor must be"):
                share.factorize_vocabulary(model, "tokens", head, width=6)
        with pytest.raises(ValueError, match="table: the model has no 'x'"):
            share.factorize_vocabulary(lm(), "x", width=6)


class TestFresh:
    @pytest.mark.parametrize("std", [1.0, 0.02])
    @pytest.mark.parametrize("width", [1, 16, 200])
    def test_the_product_varies_like_a_full_table(self, std, width):
        torch.manual_seed(0)
        got = product(share.factorized_embedding(2000, width, 500, std=std))
        # E |A_i|^2 |B_j|^2 / E^2: the spread of the mean square is at most
        # sqrt(2/E (1/V + 1/H) + ...) of it; 4 % for E = 16
        tolerance = 0.25 if width == 1 else 0.05
        assert got.square().mean().sqrt() == pytest.approx(std, rel=tolerance)

    def test_repeats_with_the_seed(self):
        new = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            new.append(product(share.factorized_embedding(9, 2, 4)))
        assert torch.equal(new[0], new[1])
        assert not torch.equal(new[0], new[2])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((0, 4, 8), "V must be at least 1, got 0"),
            ((9, 0, 8), "width must be at least 1"),
            ((9, 4, -1), "features must be at least 1"),
        ],
    )
    def test_says_what_is_wrong(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            share.factorized_embedding(*arguments)
        with pytest.raises(ValueError, match="std must be above 0, got 0"):
            share.factorized_embedding(9, 4, 8, std=0)

    @given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000))
    def test_break_even(self, V, H, E):
        smaller = V * E + E * H < V * H
        assert smaller == (share.break_even_width(V, H) > E)

    def test_break_even_needs_sizes(self):
        with pytest.raises(ValueError, match="got 0 and 3"):
            share.break_even_width(0, 3)


def albert(layers=12, width=768, E=128, parts=""):
    """Build ALBERT's encoder: thin tables, their norm, a projection."""
    with torch.device("meta"):
        model = models.Encoder(
            vocab=30_000,
            width=width,
            layers=layers,
            heads=width // 64,
            ff=4 * width,
            pooler=True,
        )
        if E is not None:
            model.tokens = nn.Embedding(30_000, E)
            model.positions = nn.Embedding(512, E)
            model.types = nn.Embedding(2, E)
            model.norm = nn.Sequential(
                nn.LayerNorm(E, eps=1e-12), nn.Linear(E, width)
            )
    if parts is None:
        return model
    return share.tie_blocks(model, "blocks", parts=parts)


class TestAlbert:
    """arXiv:1909.11942: arithmetic exactly, the printed millions nearly."""

    @pytest.mark.parametrize(
        ("model", "exact", "printed"),
        [
            (("bert", 12, 768), 109_081_344, 108),
            (("bert", 24, 1024), 334_607_360, 334),
            (("albert", 12, 768), 11_683_584, 12),
            (("albert", 24, 1024), 17_683_968, 18),
            (("albert", 24, 2048), 58_724_864, 60),
            # prints 235 M, which these sizes do not give
            (("albert", 12, 4096), 222_595_584, None),
        ],
    )
    def test_models(self, model, exact, printed):
        kind, layers, width = model
        whole = {"E": None, "parts": None} if kind == "bert" else {}
        count = measure.params(albert(layers, width, **whole))
        assert count == exact
        if printed is not None:
            assert count / MILLION == pytest.approx(printed, abs=1.3)

    @pytest.mark.parametrize(
        ("E", "separate", "shared"),
        [
            (64, (87.6, 87), (9.7, 10)),
            (128, (89.7, 89), (11.7, 12)),
            (256, (93.7, 93), (15.7, 16)),
            (None, (109.1, 108), (31.1, 31)),  # the width itself: no projection
        ],
    )
    def test_widths_of_the_table(self, E, separate, shared):
        for parts, (exact, printed) in ((None, separate), ("", shared)):
            count = measure.params(albert(E=E, parts=parts)) / MILLION
            assert count == pytest.approx(exact, abs=0.05)
            assert count == pytest.approx(printed, abs=1.2)

    @pytest.mark.parametrize(
        ("parts", "wide", "thin"),
        [
            ("", (31.1, 31), (11.7, 12)),
            (("attention", "norm1"), (83.1, 83), (63.6, 64)),
            (("up", "down", "norm2"), (57.1, 57), (37.7, 38)),
            (None, (109.1, 108), (89.7, 89)),
        ],
    )
    def test_what_is_shared(self, parts, wide, thin):
        for E, (exact, printed) in ((None, wide), (128, thin)):
            count = measure.params(albert(E=E, parts=parts)) / MILLION
            assert count == pytest.approx(exact, abs=0.05)
            assert count == pytest.approx(printed, abs=1.2)

    def test_norms_that_are_not_shared(self):
        parts = ("attention", "up", "down")
        more = measure.params(albert(parts=parts)) - measure.params(albert())
        assert more == 11 * 2 * 2 * 768

    def test_multiplies_like_bert(self):
        ids = torch.zeros(1, 128, dtype=torch.long)
        bert = measure.macs(albert(E=None, parts=None), ids)
        assert measure.macs(albert(), ids) == bert + 128 * 128 * 768
        assert bert == pytest.approx(11.174e9, rel=1e-3)

    def test_does_not_depend_on_the_depth(self):
        counts = {measure.params(albert(layers)) for layers in (1, 2, 12, 48)}
        assert len(counts) == 1

    def test_the_table_of_bert_base(self):
        with torch.device("meta"):
            thin = share.factorized_embedding(30_000, 128, 768)
        full, small = 30_000 * 768, measure.params(thin)
        assert (full, small) == (23_040_000, 3_938_304)
        assert full / small == pytest.approx(5.85, abs=0.005)
        assert math.floor(share.break_even_width(30_000, 768)) == 748

    def test_small_one_runs_trains_and_loads(self):
        torch.manual_seed(0)
        model = models.Encoder(
            vocab=40, width=16, layers=3, heads=2, ff=20, positions=8
        )
        model.tokens = nn.Embedding(40, 4)
        model.positions = nn.Embedding(8, 4)
        model.types = nn.Embedding(2, 4)
        model.norm = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 16))
        tied = share.tie_blocks(model, "blocks").eval()
        again = storage.loads(storage.dumps(tied))
        assert torch.equal(again(TOKENS), tied(TOKENS))
        assert share.uses(again) == share.uses(tied)
