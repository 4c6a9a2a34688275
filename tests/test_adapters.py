"""Adapters and corrections: exact merges, ranks, gradients, files."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from minicompress import (
    codes,
    lowrank,
    models,
    quantize,
    storage,
    through,
    train,
)


@pytest.fixture(autouse=True)
def one_thread():
    with train.threads(1):
        yield


def drawn(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype)


def net(seed=0):
    torch.manual_seed(seed)
    return models.MLP(widths=(6, 8, 3))


def language(tied=True):
    torch.manual_seed(0)
    return models.LM(
        vocab=11, width=8, layers=1, heads=2, ff=16, context=5, tied=tied
    )


class Users(nn.Module):
    """A module of a user: a kernel, a matrix and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, (3, 2), padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def matrices(name, w):
    return w.ndim >= 2


def trained(model, x, y, steps=20, lr=1e-2):
    batches = train.batches(x, y, size=len(x), epochs=steps)
    return train.fit(model, batches, lr=lr)


def task(n=32, inputs=6, classes=3):
    return drawn(n, inputs), torch.arange(n) % classes


def rounded(model, bits=3):
    """A base in few bits, as a state and as a model."""
    base = codes.encode(model, partial(quantize.min_max, bits=bits))
    model = copy.deepcopy(model)
    model.load_state_dict(codes.decode(base))
    return model, base


class TestLora:
    def test_nothing_changes_at_first(self):
        model, x = net(), drawn(5, 6)
        new = lowrank.lora(model, matrices, rank=2, alpha=7.0)
        assert torch.equal(new(x), model(x))

    @pytest.mark.parametrize("make", [net, Users])
    def test_merged_is_unmerged(self, make):
        model = make()
        x = drawn(32, 6) if make is net else drawn(32, 2, 5, 5)
        tuned = trained(
            lowrank.lora(model, matrices, rank=2), x, torch.arange(32) % 3
        )
        merged = through.bake(tuned)
        assert torch.equal(merged(x), tuned(x))
        assert not torch.equal(merged(x), model.eval()(x))
        assert merged.state_dict().keys() == model.state_dict().keys()
        assert [type(m) for m in merged.modules()] == [
            type(m) for m in model.modules()
        ]

    def test_the_change_is_what_was_trained_and_has_that_rank(self):
        model, (x, y) = net(), task()
        tuned = trained(lowrank.lora(model, matrices, rank=2, alpha=6), x, y)
        for name, own in through.tensors(tuned).items():
            w = dict(through.bake(tuned).named_parameters())[name]
            change = w - dict(model.named_parameters())[name]
            want = 6 / 2 * own["B"] @ own["A"]
            torch.testing.assert_close(change, want, atol=1e-6, rtol=1e-5)
            s = torch.linalg.svdvals(change.double())
            assert s[1] > 1e-4 and (s[2:] < 1e-6).all()

    def test_first_gradients(self):
        """0 for A, not for B: dL/dA = (α/r) B^T G, dL/dB = (α/r) G A^T."""
        model, (x, y) = net(), task()
        new = lowrank.lora(model, matrices, rank=2, alpha=6)
        train.cross_entropy(new, (x, y)).backward()
        train.cross_entropy(model, (x, y)).backward()
        for name, own in through.tensors(new).items():
            G = dict(model.named_parameters())[name].grad
            assert (own["A"].grad == 0).all()
            torch.testing.assert_close(own["B"].grad, 3 * G @ own["A"].T)
            assert own["B"].grad.abs().max() > 0

    def test_only_the_change_is_trained(self):
        model, (x, y) = net(), task()
        new = lowrank.lora(model, "layers.0.weight", rank=2)
        open_ = [p for p in new.parameters() if p.requires_grad]
        assert [tuple(p.shape) for p in open_] == [(8, 2), (2, 6)]
        tuned = through.bake(trained(new, x, y))
        before = model.state_dict()
        for name, w in tuned.state_dict().items():
            same = name != "layers.0.weight"
            assert torch.equal(w, before[name]) == same

    def test_a_256th_of_a_matrix_of_4096(self):
        with torch.device("meta"):
            layer = nn.Linear(4096, 4096, bias=False)
        new = lowrank.lora(layer, "weight", rank=8)
        count = sum(p.numel() for p in new.parameters() if p.requires_grad)
        assert count == 65_536 == 8 * (4096 + 4096)
        assert count * 256 == 4096**2

    def test_alpha_is_a_factor_of_the_change(self):
        change = codes.Factors(drawn(8, 2), drawn(2, 6, seed=1))
        model = net()
        w = model.layers[0].weight
        for scale in (1.0, 4.0):
            new = lowrank.with_adapter(
                model, {"layers.0.weight": change}, scale=scale
            )
            got = new.layers[0].weight - w
            want = scale * change.decode()
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        scales = {
            alpha: through.tensors(
                lowrank.lora(model, "layers.0.weight", rank=4, alpha=alpha)
            )["layers.0.weight"]["scale"].item()
            for alpha in (None, 0.0, 8.0)
        }
        assert scales == {None: 1.0, 0.0: 0.0, 8.0: 2.0}

    def test_a_is_drawn_with_variance_one_over_in(self):
        new = lowrank.lora(nn.Linear(400, 10), "weight", rank=50)
        A = through.tensors(new)["weight"]["A"]
        assert A.var().item() == pytest.approx(1 / 400, rel=0.03)
        assert abs(A.mean().item()) < 0.001

    def test_seeds(self):
        model, state = net(), torch.random.get_rng_state()
        first, again, other = (
            through.tensors(lowrank.lora(model, matrices, rank=2, seed=seed))
            for seed in (1, 1, 2)
        )
        assert torch.equal(torch.random.get_rng_state(), state)
        for name in first:
            assert torch.equal(first[name]["A"], again[name]["A"])
            assert not torch.equal(first[name]["A"], other[name]["A"])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_types(self, dtype):
        model = net().to(dtype)
        new = lowrank.lora(model, matrices, rank=2)
        x = drawn(5, 6, dtype=dtype)
        assert torch.equal(new(x), model(x))
        merged = through.bake(new)
        assert {p.dtype for p in merged.parameters()} == {dtype}
        kinds = {
            own[k].dtype for own in through.tensors(new).values() for k in own
        }
        assert kinds == {torch.promote_types(dtype, torch.float32)}

    def test_tied_weights_have_one_change(self):
        model = language()
        new = lowrank.lora(model, "head.weight", rank=2)
        open_ = [p for p in new.parameters() if p.requires_grad]
        assert sum(p.numel() for p in open_) == 2 * (11 + 8)
        nn.init.ones_(open_[0])
        merged = through.bake(new)
        assert merged.head.weight is merged.tokens.weight
        found = lowrank.adapter(new)
        assert found["head.weight"] is found["tokens.weight"]

    def test_the_model_is_left_as_it_is(self):
        model = net()
        before = copy.deepcopy(model.state_dict())
        lowrank.lora(model, matrices, rank=2)
        assert all(p.requires_grad for p in model.parameters())
        for name, w in model.state_dict().items():
            assert torch.equal(w, before[name])

    def test_errors(self):
        model = net()
        with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
            lowrank.lora(model, matrices, rank=0)
        for name in ("layers.9.weight", "layers.0.bias"):
            with pytest.raises(ValueError, match=name):
                lowrank.lora(model, name, rank=2)
        with pytest.raises(ValueError, match="selects no parameter"):
            lowrank.lora(model, lambda n, w: False, rank=2)
        wrong = codes.Factors(drawn(1, 2), drawn(2, 6))
        with pytest.raises(ValueError, match=r"layers.0.weight: .*\(1, 6\)"):
            lowrank.with_adapter(model, {"layers.0.weight": wrong})
        with pytest.raises(ValueError, match="no adapter"):
            lowrank.adapter(model)


class TestAdapter:
    def test_taken_off_and_put_on_another_base(self):
        model, (x, y) = net(), task()
        tuned = trained(lowrank.lora(model, matrices, rank=2, alpha=6), x, y)
        change = lowrank.adapter(tuned)
        assert torch.equal(lowrank.with_adapter(model, change)(x), tuned(x))
        other = net(seed=1)
        swapped = through.bake(lowrank.with_adapter(other, change))
        for name, factors in change.items():
            diff = (
                swapped.state_dict()[name]
                - other.state_dict()[name]
                - factors.decode()
            )
            assert diff.abs().max() < 1e-6

    def test_it_goes_on_where_it_was(self):
        """Training on from an adapter is training on."""
        model, (x, y) = net(), task()
        one = trained(lowrank.lora(model, matrices, rank=2), x, y)
        on = lowrank.with_adapter(model, lowrank.adapter(one))
        a, b = trained(one, x, y, steps=3), trained(on, x, y, steps=3)
        torch.testing.assert_close(a(x), b(x))

    def test_it_is_a_copy(self):
        tuned = lowrank.lora(net(), "layers.0.weight", rank=2)
        change = lowrank.adapter(tuned)["layers.0.weight"]
        kept = change.v.clone()
        with torch.no_grad():
            through.tensors(tuned)["layers.0.weight"]["A"].zero_()
        assert torch.equal(change.v, kept)
        assert not change.u.requires_grad and not change.v.requires_grad

    def test_other_attachments_are_no_adapters(self):
        model = through.attach(net(), "layers.1.weight", torch.round)
        change = codes.Factors(drawn(8, 2), drawn(2, 6))
        new = lowrank.with_adapter(model, {"layers.0.weight": change})
        assert list(lowrank.adapter(new)) == ["layers.0.weight"]

    def test_a_file_of_its_own(self, tmp_path):
        model, (x, y) = Users(), (drawn(32, 2, 5, 5), torch.arange(32) % 3)
        tuned = trained(lowrank.lora(model, matrices, rank=2), x, y).eval()
        change = lowrank.adapter(tuned)
        path = tmp_path / "task.mc"
        size = lowrank.save_adapter(path, change)
        assert size == path.stat().st_size
        numbers = 2 * (4 + 2 * 3 * 2) + 2 * (3 + 4)
        assert 4 * numbers < size < 4 * numbers + 250
        again = storage.read(path).state
        assert again.keys() == change.keys()
        for name in change:
            assert torch.equal(again[name].u, change[name].u)
            assert torch.equal(again[name].v, change[name].v)

    def test_in_eight_bits(self, tmp_path):
        """Factors are tensors or codes: a quarter of the bytes."""
        W = drawn(64, 96)
        change = codes.Factors(drawn(64, 4), drawn(4, 96, seed=1))
        rule = partial(quantize.min_max, bits=8)
        small = codes.Factors(rule(change.u), rule(change.v))
        layer = nn.Linear(96, 64, bias=False)
        with torch.no_grad():
            layer.weight.copy_(W)
        new = lowrank.with_adapter(layer, {"weight": small})
        torch.testing.assert_close(
            through.bake(new).weight, W + small.decode(), atol=1e-5, rtol=1e-5
        )
        full = lowrank.save_adapter(tmp_path / "a", {"weight": change})
        less = lowrank.save_adapter(tmp_path / "b", {"weight": small})
        assert less < 0.5 * full


class TestEncoded:
    @pytest.mark.parametrize("make", [net, Users])
    def test_a_base_in_few_bits_and_its_change_exactly(self, make):
        model, base = rounded(make())
        x = drawn(32, 6) if make is net else drawn(32, 2, 5, 5)
        tuned = trained(
            lowrank.lora(model, matrices, rank=2, alpha=3),
            x,
            torch.arange(32) % 3,
        )
        state = lowrank.encode_adapted(tuned, base)
        merged = through.bake(tuned).eval()
        again = storage.loads(storage.dumps(merged, state), like=merged)
        for name, w in merged.state_dict().items():
            assert torch.equal(again.state_dict()[name], w), name
        assert torch.equal(again(x), tuned(x))
        for name in lowrank.adapter(tuned):
            assert isinstance(state[name], codes.Sum)
            assert state[name].a is base[name]

    def test_bytes_of_a_base_and_its_change(self):
        layer = nn.Linear(256, 128, bias=False)
        base = codes.encode(layer, quantize.nf4)
        layer.load_state_dict(codes.decode(base))
        new = lowrank.lora(layer, "weight", rank=4)
        state = lowrank.encode_adapted(new, base)
        n = 256 * 128
        small = storage.payload(base["weight"])
        assert small == n // 2 + 4 * n // 64 + 4 * 16
        want = small + 4 * 4 * (256 + 128)
        assert storage.payload(state["weight"]) == want

    def test_half_precision(self):
        model = net().to(torch.bfloat16)
        model, base = rounded(model)
        x, y = task()
        tuned = trained(lowrank.lora(model, matrices, rank=2), x.bfloat16(), y)
        merged = through.bake(tuned)
        state = lowrank.encode_adapted(tuned, base)
        again = storage.loads(storage.dumps(merged, state), like=merged)
        for name, w in merged.state_dict().items():
            got = again.state_dict()[name]
            assert got.dtype == w.dtype == torch.bfloat16
            # the base is rounded to 8 bits in the one, and not in the other
            assert (got - w).abs().max() <= 2**-7 * w.abs().max()
        with pytest.raises(ValueError, match="base is not"):
            wrong = {n: codes.value(x) * 1.05 for n, x in base.items()}
            lowrank.encode_adapted(tuned, wrong)

    def test_tied_weights_are_stored_once(self):
        model, base = rounded(language())
        new = lowrank.lora(model, matrices, rank=2)
        for own in through.tensors(new).values():
            nn.init.normal_(own["B"])
        state = lowrank.encode_adapted(new, base)
        assert state["head.weight"] is state["tokens.weight"]
        merged = through.bake(new)
        again = storage.loads(storage.dumps(merged, state))
        assert again.head.weight is again.tokens.weight
        assert torch.equal(again.head.weight, merged.head.weight)

    def test_what_else_was_trained(self):
        model, base = rounded(net())
        new = lowrank.lora(model, "layers.0.weight", rank=2)
        new.layers[1].bias.requires_grad_(True)
        new.layers[1].weight.requires_grad_(True)
        tuned = trained(new, *task())
        state = lowrank.encode_adapted(tuned, base)
        merged = through.bake(tuned).state_dict()
        for name, w in codes.decode(state).items():
            assert torch.equal(w, merged[name])
        assert isinstance(state["layers.1.weight"], torch.Tensor)
        assert state["layers.0.bias"] is base["layers.0.bias"]

    def test_errors(self):
        model, base = rounded(net())
        other = lowrank.lora(net(), "layers.0.weight", rank=2)
        with pytest.raises(ValueError, match=r"layers.0.weight: base is not"):
            lowrank.encode_adapted(other, base)
        new = lowrank.lora(model, "layers.0.weight", rank=2)
        del base["layers.1.bias"]
        with pytest.raises(ValueError, match=r"base: \['layers.1.bias'\]"):
            lowrank.encode_adapted(new, base)


THREE = partial(quantize.min_max, bits=3)


def moments(n, seed=0):
    X = drawn(400, n, seed=seed) @ drawn(n, n, seed=seed + 1)
    return (X.T @ X / len(X)).double()


def loss(W, code, H=None):
    D = W.double() - code.decode().double()
    return (D.square() if H is None else (D @ H) * D).sum().item()


class TestCorrected:
    @pytest.mark.parametrize("rank", [1, 4, 11])
    def test_one_round_by_numpy(self, rank):
        W = drawn(16, 12)
        code = lowrank.corrected(W, THREE, rank=rank)
        E = (W - THREE(W).decode()).double().numpy()
        U, s, Vh = np.linalg.svd(E, full_matrices=False)
        want = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        assert torch.equal(code.a.decode(), THREE(W).decode())
        np.testing.assert_allclose(code.b.decode(), want, atol=1e-5)
        assert loss(W, code) == pytest.approx((s[rank:] ** 2).sum(), rel=1e-4)

    def test_full_rank_gives_the_weight_back(self):
        W = drawn(16, 12)
        code = lowrank.corrected(W, THREE, rank=12)
        torch.testing.assert_close(code.decode(), W)

    def test_what_needs_no_correction(self):
        W = torch.arange(12.0).reshape(3, 4)
        code = lowrank.corrected(W, torch.round, rank=2)
        assert (code.b.decode() == 0).all()

    @pytest.mark.parametrize("H", [None, moments(12)], ids=["plain", "aware"])
    def test_the_best_of_more_rounds_is_never_worse(self, H):
        for seed in range(5):
            W = drawn(16, 12, seed=seed)
            A = None if H is None else H
            losses = [
                loss(
                    W,
                    lowrank.corrected(W, THREE, rank=3, rounds=n, H=A, damp=0),
                    A,
                )
                for n in (1, 2, 3, 6)
            ]
            assert losses == sorted(losses, reverse=True)
            assert losses[-1] < losses[0]

    def test_the_second_round_is_the_papers(self):
        """LoftQ's algorithm, written out, for a case in which it gains."""
        W = drawn(16, 12)
        A, B = torch.zeros(16, 3), torch.zeros(3, 12)
        errors = []
        for _ in range(4):
            Q = THREE(W - A @ B).decode()
            U, s, Vh = torch.linalg.svd(W - Q, full_matrices=False)
            A, B = U[:, :3] * s[:3].sqrt(), s[:3, None].sqrt() * Vh[:3]
            errors.append((W - Q - A @ B).square().sum().item())
        assert min(errors) < errors[0]
        for n in (1, 2, 4):
            code = lowrank.corrected(W, THREE, rank=3, rounds=n)
            assert loss(W, code) == pytest.approx(min(errors[:n]), rel=1e-4)

    def test_white_inputs_change_nothing(self):
        W = drawn(16, 12)
        plain = lowrank.corrected(W, THREE, rank=3, rounds=3)
        white = lowrank.corrected(
            W, THREE, rank=3, rounds=3, H=5 * torch.eye(12)
        )
        torch.testing.assert_close(white.decode(), plain.decode())

    @pytest.mark.parametrize("rank", [1, 3])
    def test_with_moments_the_outputs_are_as_near_as_can_be(self, rank):
        W, H = drawn(16, 12), moments(12)
        plain = lowrank.corrected(W, THREE, rank=rank)
        aware = lowrank.corrected(W, THREE, rank=rank, H=H, damp=0)
        E = (W - THREE(W).decode()).double().numpy()
        root = np.linalg.cholesky(H.numpy())
        s = np.linalg.svd(E @ root, compute_uv=False)
        least = (s[rank:] ** 2).sum()
        assert loss(W, aware, H) == pytest.approx(least, rel=1e-4)
        assert loss(W, plain, H) > 1.05 * least
        assert loss(W, aware) > loss(W, plain)

    def test_any_quantizer(self):
        W, H = drawn(16, 64), moments(64)
        rules = {
            "nf4": quantize.nf4,
            "gptq": lambda w: quantize.gptq(
                w, H.float(), quantize.mse(w, bits=2)
            ),
            "binary": quantize.binary,
        }
        for name, rule in rules.items():
            code = lowrank.corrected(W, rule, rank=4, H=H)
            layer = nn.Linear(64, 16, bias=False)
            file = storage.dumps(layer, {"weight": code})
            again = storage.loads(file, like=layer)
            assert torch.equal(again.weight, code.decode()), name
            assert loss(W, code, H) < loss(W, rule(W), H)

    def test_where_training_may_start(self):
        W = drawn(8, 6)
        model = net()
        with torch.no_grad():
            model.layers[0].weight.copy_(W)
        code = lowrank.corrected(W, THREE, rank=2)
        state = codes.encode(model, codes.value, lambda n, w: False)
        base = state | {"layers.0.weight": code.a}
        model.load_state_dict(codes.decode(base))
        new = lowrank.with_adapter(model, {"layers.0.weight": code.b})
        assert torch.equal(new.layers[0].weight.detach(), code.decode())
        state = lowrank.encode_adapted(new, base)
        assert torch.equal(state["layers.0.weight"].decode(), code.decode())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_types(self, dtype):
        W = drawn(16, 12, dtype=dtype)
        kept = W.clone()
        code = lowrank.corrected(W, THREE, rank=2, rounds=2, H=moments(12))
        assert code.b.u.dtype == code.b.v.dtype == dtype
        assert torch.equal(W, kept)
        W = nn.Parameter(W)
        for rule in (THREE, torch.round):
            assert not lowrank.corrected(W, rule, rank=2).decode().requires_grad

    def test_errors(self):
        W = drawn(16, 12)
        with pytest.raises(ValueError, match="rounds must be at least 1"):
            lowrank.corrected(W, THREE, rank=2, rounds=0)
        with pytest.raises(ValueError, match="rank must be 1 to 12"):
            lowrank.corrected(W, THREE, rank=13)
        with pytest.raises(ValueError, match=r"H must be \(12, 12\)"):
            lowrank.corrected(W, THREE, rank=2, H=torch.eye(5))
        with pytest.raises(ValueError, match=r"quantize returned .*\(12, 16\)"):
            lowrank.corrected(W, lambda w: w.T, rank=2)
