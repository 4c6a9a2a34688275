"""Hints, attention transfer, TinyBERT and MiniLM against what they must be."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicompress import distill, models, train


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def orthogonal(n, seed=0):
    return torch.linalg.qr(rand(n, n, seed=seed)).Q


def encoder(width=8, heads=2, layers=2):
    torch.manual_seed(0)
    model = models.Encoder(
        vocab=11, width=width, heads=heads, layers=layers, ff=8, positions=8
    ).double()
    for p in model.parameters():  # larger than at the start: not uniform
        p.data *= 20 if p.ndim == 2 else 1
    return model


def ids(n=3, length=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(11, (n, length), generator=g)


def qkv_names(block):
    return [f"blocks.{block}.attention.{x}" for x in "qkv"]


MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True] * 6])


class TestRecord:
    def test_keeps_the_latest_outputs_and_takes_its_hooks_away(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU()))
        x = rand(4, 2).float()
        with distill.record(model, ["0", "1.0"]) as seen:
            assert seen == {}
            model(2 * x)
            model(x)
        assert torch.equal(seen["0"], model[0](x))
        assert torch.equal(seen["1.0"], model(x))
        kept = dict(seen)
        model(3 * x)
        assert all(seen[n] is kept[n] for n in kept)
        assert not any(m._forward_hooks for m in model.modules())

    def test_hooks_go_after_an_error_too(self):
        model = nn.Sequential(nn.Linear(2, 3))
        with pytest.raises(RuntimeError), distill.record(model, ["0"]):
            model(torch.zeros(1, 5))
        assert not model[0]._forward_hooks

    def test_gradients_flow_through_what_was_recorded(self):
        model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        with distill.record(model, ["0"]) as seen:
            model(torch.ones(1, 2))
        seen["0"].sum().backward()
        assert torch.equal(model[0].weight.grad, torch.ones(3, 2))

    def test_one_module_under_two_names(self):
        layer = nn.Linear(2, 2)
        model = nn.Sequential(layer, layer)
        with distill.record(model, ["0", "1"]) as seen:
            y = model(torch.ones(1, 2))
        assert seen["0"] is y
        assert seen["1"] is y

    def test_names_what_the_model_does_not_have(self):
        with (
            pytest.raises(ValueError, match=r"names: .*\['7'\]"),
            distill.record(nn.Sequential(nn.ReLU()), ["0", "7"]),
        ):
            pass

    def test_attention_is_what_the_recorded_queries_and_keys_say(self):
        """The model needs no change: softmax(q k^T / sqrt(d)) v is y."""
        for model, causal in ((encoder(), False), (lm(), True)):
            options = {} if causal else {"mask": MASK}
            names = [*qkv_names(1), "blocks.1.attention.out"]
            with distill.record(model, names) as seen:
                model(ids(), *options.values())
            q, k, v, y = seen.values()
            A = distill.attention_scores(q, k, 2, causal=causal, **options)
            mixed = A.softmax(-1) @ distill.heads(v, 2)
            out = model.blocks[1].attention.out
            torch.testing.assert_close(out(mixed.transpose(1, 2).flatten(2)), y)


def lm():
    torch.manual_seed(0)
    return models.LM(
        vocab=11, width=8, layers=2, heads=2, ff=8, context=8
    ).double()


class TestHint:
    def test_is_half_the_squared_length_of_the_difference(self):
        s, t = rand(3, 4), rand(3, 4, seed=1)
        want = (
            sum(0.5 * (a - b).norm() ** 2 for a, b in zip(s, t, strict=True))
            / 3
        )
        torch.testing.assert_close(distill.hint(s, t), want)

    def test_the_best_linear_regressor_is_least_squares(self):
        """There the gradient vanishes: the residual is orthogonal to s."""
        s, t = rand(20, 3), rand(20, 5, seed=1)
        r = distill.regressor(3, 5).double()
        design = torch.cat([s, torch.ones(20, 1).double()], 1)
        best = torch.linalg.lstsq(design, t).solution  # (4, 5)
        with torch.no_grad():
            r.weight.copy_(best[:3].T)
            r.bias.copy_(best[3])
        loss = distill.hint(s, t, r)
        loss.backward()
        assert r.weight.grad.abs().max() < 1e-12
        residual = t - r(s)
        assert (design.T @ residual).abs().max() < 1e-12
        assert loss > 0.1

    def test_is_zero_in_the_span_of_the_student(self):
        s, M = rand(20, 3), rand(3, 5, seed=1)
        r = distill.regressor(3, 5).double()
        with torch.no_grad():
            r.weight.copy_(M.T)
            r.bias.zero_()
        assert distill.hint(s, s @ M, r) < 1e-24

    def test_a_convolution_is_the_linear_map_at_each_place(self):
        r = distill.regressor(3, 5, dims=2).double()
        s, t = rand(2, 3, 4, 4), rand(2, 5, 4, 4, seed=1)
        rows = s.permute(0, 2, 3, 1) @ r.weight[:, :, 0, 0].T + r.bias
        want = distill.hint(rows, t.permute(0, 2, 3, 1))
        torch.testing.assert_close(distill.hint(s, t, r), want)

    def test_fit_trains_the_regressor_with_the_student(self):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        student = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        r = distill.regressor(4, 8)
        X = rand(64, 4).float()

        def loss(model, batch):
            student, r = model
            with (
                train.evaluating(teacher),
                distill.record(teacher, ["1"]) as t,
            ):
                teacher(batch[0])
            with distill.record(student, ["1"]) as s:
                student(batch[0])
            return distill.hint(s["1"], t["1"], r)

        both = nn.ModuleList([student, r])
        feed = train.batches(X, size=16, epochs=40)
        after = train.fit(both, feed, loss, lr=0.02)
        assert not torch.equal(after[1].weight, r.weight)
        assert loss(after, (X,)) < 0.1 * loss(both, (X,))
        # a regressor left as it was: a much worse hint
        frozen = nn.ModuleList([student, r.requires_grad_(False)])
        worse = train.fit(frozen, feed, loss, lr=0.02)
        assert loss(worse, (X,)) > 2 * loss(after, (X,))


class TestAttentionTransfer:
    def test_the_map_by_hand(self):
        A = rand(2, 3, 4, 5)
        for p in (1, 2, 3):
            flat = (A.abs() ** p).sum(1).reshape(2, 20)
            want = flat / flat.square().sum(1, keepdim=True).sqrt()
            got = distill.attention_map(A, p=p)
            torch.testing.assert_close(got, want)

    @settings(deadline=None, max_examples=20)
    @given(st.floats(0.01, 100), st.integers(0, 2**16))
    def test_scale_and_rotation_of_channels_do_not_matter(self, c, seed):
        A = rand(2, 4, 3, 3, seed=seed)
        mixed = torch.einsum("ij,njhw->nihw", c * orthogonal(4, seed), A)
        torch.testing.assert_close(
            distill.attention_map(mixed), distill.attention_map(A)
        )
        assert distill.attention_transfer(c * A, A) < 1e-12
        # for p = 1 a rotation does
        one = distill.attention_map(mixed, p=1)
        assert (one - distill.attention_map(A, p=1)).abs().max() > 1e-4

    def test_is_a_distance_not_its_square_and_channels_may_differ(self):
        s, t = rand(3, 2, 4, 4), rand(3, 7, 4, 4, seed=1)
        a, b = distill.attention_map(s), distill.attention_map(t)
        want = sum((a[i] - b[i]).square().sum().sqrt() for i in range(3)) / 3
        got = distill.attention_transfer(s, t)
        torch.testing.assert_close(got, want)

    def test_the_larger_map_is_resized(self):
        big = rand(2, 3, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
        small = big[:, :, ::2, ::2]
        assert distill.attention_transfer(small, small) == 0
        near = distill.attention_transfer(small, big)
        far = distill.attention_transfer(small, big.flip(2))
        assert near < 0.5 * far

    def test_dead_maps_and_equal_maps_have_finite_gradients(self):
        s = rand(2, 3, 4, 4)
        s[0] = 0
        s.requires_grad_()
        t = rand(2, 3, 4, 4, seed=1)
        t[1] = s[1].detach()
        distill.attention_transfer(s, t).backward()
        assert s.grad.isfinite().all()


class TestTinyBERT:
    def test_attention_by_hand_on_the_scores_before_the_softmax(self):
        q, k = rand(2, 3, 8), rand(2, 3, 8, seed=1)
        S = distill.attention_scores(q, k, 2)
        for n in range(2):
            for h in range(2):
                a, b = (x[n, :, 4 * h : 4 * h + 4] for x in (q, k))
                torch.testing.assert_close(S[n, h], a @ b.T / 2)
        T = rand(2, 2, 3, 3, seed=2)
        want = sum(F.mse_loss(S[:, h], T[:, h]) for h in range(2)) / 2
        torch.testing.assert_close(distill.tinybert_attention(S, T), want)
        # a constant in each row is lost in the softmax, but not here
        assert distill.tinybert_attention(S, S + 1) == 1

    def test_hidden_with_the_identity_is_the_mean_squared_error(self):
        s, t = rand(2, 3, 4), rand(2, 3, 4, seed=1)
        r = distill.regressor(4, 4).double()
        with torch.no_grad():
            r.weight.copy_(torch.eye(4))
            r.bias.zero_()
        want = F.mse_loss(s, t)
        torch.testing.assert_close(distill.tinybert_hidden(s, t), want)
        torch.testing.assert_close(distill.tinybert_hidden(s, t, r), want)
        narrow = distill.tinybert_hidden(
            rand(2, 3, 2), t, distill.regressor(2, 4).double()
        )
        assert narrow.ndim == 0

    def test_padding_does_not_count(self):
        s, t = rand(3, 6, 4), rand(3, 6, 4, seed=1)
        rows = torch.cat([s[0], s[1, :4], s[2]])
        wanted = torch.cat([t[0], t[1, :4], t[2]])
        got = distill.tinybert_hidden(s, t, mask=MASK)
        torch.testing.assert_close(got, F.mse_loss(rows, wanted))
        got = distill.cosine(s, t, mask=MASK)
        torch.testing.assert_close(got, distill.cosine(rows, wanted))
        S, T = rand(3, 2, 6, 6), rand(3, 2, 6, 6, seed=1)
        square = (S - T).square()
        kept = [square[0].sum(), square[1, :, :4, :4].sum(), square[2].sum()]
        want = sum(kept) / (2 * (36 + 16 + 36))
        got = distill.tinybert_attention(S, T, mask=MASK)
        torch.testing.assert_close(got, want)

    def test_cosine_is_half_the_distance_of_normalized_states(self):
        s, t = rand(5, 4), rand(5, 4, seed=1)
        a, b = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
        want = 0.5 * (a - b).square().sum(-1).mean()  # PKD's form
        torch.testing.assert_close(distill.cosine(s, t), want)
        assert distill.cosine(3 * s, s) < 1e-15

    @pytest.mark.parametrize(
        ("sizes", "layers"),
        [
            ((4, 12), [2, 5, 8, 11]),
            ((6, 12), [1, 3, 5, 7, 9, 11]),
            ((4, 6), [0, 2, 3, 5]),
            ((3, 3), [0, 1, 2]),
            ((1, 12), [11]),
        ],
    )
    def test_layer_map(self, sizes, layers):
        assert distill.layer_map(*sizes) == layers


@pytest.mark.parametrize(
    "loss",
    [distill.cosine, distill.tinybert_hidden, distill.hint],
)
def test_states_of_the_teacher_itself_cost_nothing(loss):
    model = encoder()
    with distill.record(model, ["blocks.0", "blocks.1"]) as seen:
        model(ids())
    first, second = seen.values()
    x = first.detach().requires_grad_()
    value = loss(x, first)
    value.backward()
    assert value.abs() < 1e-15
    assert x.grad.abs().max() < 1e-15
    assert loss(second, first) > 0.01


def test_scores_of_the_teacher_itself_cost_nothing():
    q, k, v = last(encoder())
    S = distill.attention_scores(q, k, 2, causal=True)
    assert distill.tinybert_attention(S, S) == 0
    other = distill.attention_scores(q, v, 2, causal=True)
    assert distill.tinybert_attention(other, S) > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_in_half_precision(dtype):
    s, t = (
        tuple(x.detach().to(dtype) for x in last(encoder(width=w), MASK))
        for w in (4, 8)
    )
    wide = distill.minilm(*(tuple(x.double() for x in y) for y in (s, t)), 2)
    for options in ({}, {"causal": True}, {"mask": MASK}):
        q, k, v = (x.clone().requires_grad_() for x in s)
        loss = distill.minilm((q, k, v), t, 2, **options)
        loss.backward()
        assert loss.dtype == dtype and loss > 0
        assert all(x.grad.isfinite().all() for x in (q, k, v))
        if not options:
            torch.testing.assert_close(loss.double(), wide, rtol=0.1, atol=0)


class TestInherit:
    @staticmethod
    def model(layers, seed=0, **options):
        torch.manual_seed(seed)
        config = dict(vocab=11, width=8, heads=2, ff=8, context=8)
        return models.LM(layers=layers, **{**config, **options})

    def test_all_layers_are_the_teacher(self):
        teacher, student = self.model(3), self.model(3, seed=1)
        assert not torch.equal(student(ids()), teacher(ids()))
        got = distill.inherit(student, teacher)
        assert torch.equal(got(ids()), teacher(ids()))
        assert got.head.weight is got.tokens.weight  # tied as before
        # the knock-out: each layer, but not in this order
        mixed = distill.inherit(student, teacher, layers=[1, 0, 2])
        assert not torch.equal(mixed(ids()), teacher(ids()))
        # and the teacher's layers alone are not the teacher
        for name in ("tokens", "positions", "norm"):
            part = distill.inherit(student, teacher)
            part.get_submodule(name).weight.data += 0.1 * torch.rand(8)
            assert not torch.equal(part(ids()), teacher(ids()))

    @pytest.mark.parametrize(
        ("layers", "taken"),
        [(None, [1, 3, 5]), ([0, 2, 4], [0, 2, 4]), ((5, 5, 0), [5, 5, 0])],
    )
    def test_which_layers(self, layers, taken):
        teacher, student = self.model(6), self.model(3, seed=1)
        got = distill.inherit(student, teacher, layers=layers)
        want = self.model(3)
        want.blocks = nn.ModuleList(teacher.blocks[j] for j in taken)
        want.load_state_dict(
            {
                name: x
                for name, x in teacher.state_dict().items()
                if not name.startswith("blocks.")
            },
            strict=False,
        )
        assert torch.equal(got(ids()), want(ids()))

    def test_copies_and_leaves_both_alone(self):
        teacher, student = self.model(4), self.model(2, seed=1).double()
        before = [m(ids()) for m in (teacher, student)]
        got = distill.inherit(student, teacher)
        assert got.head.weight.dtype == torch.float64
        with torch.no_grad():
            for p in got.parameters():
                p.zero_()
        for x, m in zip(before, (teacher, student), strict=True):
            assert torch.equal(m(ids()), x)
        assert all(p.requires_grad for p in got.parameters())

    def test_what_does_not_fit_outside_the_stack_stays(self):
        teacher = self.model(4)
        student = self.model(2, seed=1, vocab=13, context=6)
        got = distill.inherit(student, teacher)
        assert torch.equal(got.tokens.weight, student.tokens.weight)
        assert torch.equal(got.positions.weight, student.positions.weight)
        assert torch.equal(got.norm.weight, teacher.norm.weight)
        for a, b in zip(
            got.blocks.parameters(),
            [*teacher.blocks[1].parameters(), *teacher.blocks[3].parameters()],
            strict=True,
        ):
            assert torch.equal(a, b)

    def test_any_stack_with_buffers(self):
        def net(layers):
            return nn.ModuleDict(
                {
                    "body": nn.ModuleList(
                        nn.BatchNorm1d(3) for _ in range(layers)
                    ),
                    "last": nn.BatchNorm1d(3),
                }
            )

        teacher = net(4)
        for i, m in enumerate([*teacher["body"], teacher["last"]]):
            m.running_mean += i
        got = distill.inherit(net(2), teacher, stack="body")
        means = [m.running_mean[0].item() for m in got["body"]]
        assert means == [1, 3]
        assert got["last"].running_mean[0] == 4

    def test_bad_arguments_are_named(self):
        teacher, student = self.model(4), self.model(2)
        wide = self.model(2, width=12)
        plain = nn.Linear(2, 2)
        for call, words in (
            (lambda: distill.inherit(plain, teacher), "stack: student"),
            (lambda: distill.inherit(student, plain), "stack: teacher"),
            (
                lambda: distill.inherit(student, teacher, stack="norm"),
                "stack: student .*'norm'",
            ),
            (lambda: distill.inherit(teacher, student), "student: 4"),
            (
                lambda: distill.inherit(student, teacher, layers=[1]),
                r"layers: 2 indices below 4, not \[1\]",
            ),
            (
                lambda: distill.inherit(student, teacher, layers=[1, -1]),
                "layers",
            ),
            (
                lambda: distill.inherit(wide, teacher),
                r"student: blocks.0 does not fit blocks.1 (.|\n)*q.weight",
            ),
        ):
            with pytest.raises(ValueError, match=words):
                call()


def last(model, mask=None):
    names = qkv_names(len(model.blocks) - 1)
    with distill.record(model, names) as seen:
        model(ids(), mask)
    return tuple(seen[name] for name in names)


class TestMiniLM:
    def test_is_zero_for_the_teacher_itself_and_its_gradient_too(self):
        q, k, v = (x.detach().requires_grad_() for x in last(encoder()))
        loss = distill.minilm((q, k, v), (q, k, v), 2)
        loss.backward()
        assert loss == 0
        assert max(x.grad.abs().max() for x in (q, k, v)) < 1e-15

    def test_by_hand(self):
        s = last(encoder(width=4))
        t = last(encoder(width=8))
        total = 0.0
        for a, b in ((0, 1), (2, 2)):
            for n in range(3):
                for h in range(2):
                    P, Q = (
                        (
                            x[a][n, :, d * h : d * h + d]
                            @ x[b][n, :, d * h : d * h + d].T
                            / d**0.5
                        ).softmax(-1)
                        for x, d in ((t, 4), (s, 2))
                    )
                    total += (P * (P / Q).log()).sum() / (3 * 2 * 6)
        torch.testing.assert_close(distill.minilm(s, t, 2), total)

    def test_rows_of_a_relation_sum_to_one_and_padding_has_none(self):
        q, k, _ = last(encoder(), MASK)
        R = distill.attention_scores(q, k, 2, mask=MASK).softmax(-1)
        torch.testing.assert_close(R.sum(-1), torch.ones(3, 2, 6).double())
        assert (R[1, :, :, 4:] == 0).all()
        C = distill.attention_scores(q, k, 2, causal=True).softmax(-1)
        assert (C.triu(1) == 0).all()
        torch.testing.assert_close(C.sum(-1), torch.ones(3, 2, 6).double())

    @settings(deadline=None, max_examples=15)
    @given(st.integers(0, 2**16))
    def test_a_rotation_of_the_values_of_a_head_does_not_matter(self, seed):
        q, k, v = last(encoder())
        R = torch.block_diag(orthogonal(4, seed), orthogonal(4, seed + 1))
        loss = distill.minilm((q, k, v @ R), (q, k, v), 2)
        assert loss.abs() < 1e-12
        mixed = v @ orthogonal(8, seed)  # of all heads together it does
        assert distill.minilm((q, k, mixed), (q, k, v), 2) > 1e-4

    def test_padding_neither_looks_nor_is_seen(self):
        s, t = last(encoder(width=4), MASK), last(encoder(), MASK)
        loss = distill.minilm(s, t, 2, mask=MASK)
        dirty = tuple(x.clone() for x in s)
        for x in dirty:
            x[~MASK] = 1000.0
        same = distill.minilm(dirty, t, 2, mask=MASK)
        torch.testing.assert_close(same, loss)
        assert distill.minilm(dirty, t, 2) > 2 * loss  # without the mask
        # the mean of the rows alone, each cut to its tokens
        parts = [
            distill.minilm(
                tuple(x[i : i + 1, :n] for x in s),
                tuple(x[i : i + 1, :n] for x in t),
                2,
            )
            * n
            for i, n in enumerate((6, 4, 6))
        ]
        torch.testing.assert_close(loss, sum(parts) / 16)

    def test_relation_heads_can_be_cut_anew(self):
        """MiniLMv2: students with other numbers of heads."""
        s, t = rand(2, 5, 12), rand(2, 5, 24, seed=1)
        values = [distill.relation_kl((s, s), (t, t), n) for n in (1, 3, 6)]
        assert len({round(x.item(), 6) for x in values}) == 3

    def test_the_teacher_is_the_first_argument_of_the_divergence(self):
        s, t = (tuple(rand(3, 2, 5, 8, seed=i)) for i in (0, 1))
        forth, back = distill.minilm(s, t, 2), distill.minilm(t, s, 2)
        assert (forth - back).abs() > 1e-3


@pytest.mark.parametrize(
    "loss",
    [
        distill.hint,
        distill.cosine,
        distill.tinybert_hidden,
        lambda s, t: distill.tinybert_attention(s[:, None], t[:, None]),
        lambda s, t: distill.attention_transfer(s[:, None], t[:, None]),
        lambda s, t: distill.relation_kl((s, s), (t, t), 2),
        lambda s, t: distill.minilm((s, s, s), (t, t, t), 2),
    ],
)
def test_only_the_student_receives_a_gradient(loss):
    s, t = (rand(2, 4, 4, seed=i).requires_grad_() for i in (0, 1))
    loss(s, t).backward()
    assert s.grad.abs().max() > 0
    assert t.grad is None
    # and it comes from the teacher: another one, another gradient
    before, s.grad = s.grad, None
    loss(s, t.detach().flip(1)).backward()
    assert not torch.allclose(before, s.grad)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: distill.hint(rand(2, 3), rand(2, 4)), r"t must .*\(2, 3\)"),
        (lambda: distill.regressor(2, 3, dims=1), "dims"),
        (lambda: distill.attention_map(rand(2, 3)), r"A: .*\(2, 3\)"),
        (
            lambda: distill.attention_transfer(
                rand(2, 1, 2, 2), rand(3, 1, 2, 2)
            ),
            "At: 3",
        ),
        (lambda: distill.heads(rand(2, 3, 4), 3), "3 heads"),
        (lambda: distill.layer_map(5, 4), "student: 5"),
        (
            lambda: distill.tinybert_attention(
                rand(1, 2, 3, 3), rand(1, 3, 3, 3)
            ),
            r"t must have shape \(1, 2, 3, 3\)",
        ),
        (
            lambda: distill.tinybert_hidden(
                rand(3, 6, 2), rand(3, 6, 2), mask=MASK[:2]
            ),
            r"mask must be bool of shape \(3, 6\)",
        ),
        (
            lambda: distill.cosine(
                rand(3, 6, 2), rand(3, 6, 2), mask=MASK.int()
            ),
            "mask must be bool",
        ),
        (
            lambda: distill.tinybert_hidden(
                rand(3, 6, 2), rand(3, 6, 2), mask=MASK & ~MASK
            ),
            "no token",
        ),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
