"""Block by block in bounded memory gives what the whole model gives."""

from copy import deepcopy

import pytest
import torch
from test_checkpoint import write
from torch import nn

from minicompress import (
    calibrate,
    codes,
    measure,
    models,
    pipeline,
    quantize,
    storage,
    train,
)
from minicompress.zoo.checkpoint import open_safetensors


@pytest.fixture(autouse=True)
def one_thread():
    with train.threads(1):
        yield


def gptq(W, x):
    return quantize.gptq(W, x.H.float(), quantize.mse(W, bits=3))


def nearest(W, x):
    return quantize.min_max(W, bits=3)


def rough(name, w):
    return quantize.min_max(w, bits=3)


def lm(layers=3, kind="LM", **changes):
    torch.manual_seed(0)
    sizes = {"vocab": 40, "width": 16, "heads": 2, "ff": 32, "context": 8}
    return models.build(kind, sizes | {"layers": layers} | changes).eval()


def encoder():
    torch.manual_seed(0)
    model = models.Encoder(
        vocab=40, width=16, layers=3, heads=2, ff=32, positions=8, pooler=True
    )
    for w in model.parameters():  # so that a block changes what it gets
        w.data *= 10
    return model.eval()


def batches():
    g = torch.Generator().manual_seed(1)
    return list(torch.randint(40, (3, 2, 8), generator=g))


def shapes(model):
    with torch.device("meta"):
        return models.build(type(model).__name__, model.config)


def masked(model, ids):
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 5:] = False
    return model(ids, mask)


def whole(model, rule, forward=None, tables=None):
    """Compress with all of the model in memory, as its definition says."""
    model = deepcopy(model)
    with torch.no_grad():
        for name, w in model.named_parameters():
            if tables and w.ndim > 1 and not name.startswith("blocks."):
                w.copy_(tables(name, w.detach()).decode())
        for i in range(len(model.blocks)):
            inside = f"blocks.{i}."
            stats = calibrate.inputs(
                model,
                batches(),
                where=lambda n, w, p=inside: n.startswith(p),
                forward=forward,
            )
            made = {n: rule(model.get_parameter(n), stats[n]) for n in stats}
            for name, code in made.items():
                model.get_parameter(name).copy_(code.decode())
    return model


def alike(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return [n for n in a if not torch.equal(a[n], b[n])] == []


class Spy(dict):
    """A mapping that notes what is read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def __getitem__(self, name):
        self.seen.append(name)
        return super().__getitem__(name)

    def shape(self, name):
        return super().__getitem__(name).shape

    def rows(self, name, ids):
        self.seen.append((name, len(ids)))
        return super().__getitem__(name)[ids]


class TestSameAsWhole:
    @pytest.mark.parametrize("kind", ["LM", "GPT2"])
    def test_language_model(self, tmp_path, kind):
        model = lm(kind=kind)
        args = (shapes(model), model.state_dict(), batches(), gptq)
        folder = pipeline.streamed(*args, tmp_path, tables=rough, rows=7)
        small = pipeline.assembled(folder)
        assert alike(small, whole(model, gptq, tables=rough))
        assert small.head.weight is small.tokens.weight
        assert not small.training and type(small) is type(model)
        assert not alike(small, model)

    def test_encoder_with_a_mask(self, tmp_path):
        model = encoder()
        args = (shapes(model), model.state_dict(), batches(), gptq)
        pipeline.streamed(*args, tmp_path, forward=masked)
        small = pipeline.assembled(tmp_path)
        assert alike(small, whole(model, gptq, masked))
        # the mask counts, and so does that each block sees the ones before
        assert not alike(small, whole(model, gptq))
        stats = calibrate.inputs(
            model,
            batches(),
            where=lambda n, w: "pooler" not in n,
            forward=masked,
        )
        name = "blocks.2.up.weight"
        once = gptq(model.get_parameter(name).detach(), stats[name]).decode()
        assert not torch.equal(small.get_parameter(name), once)

    def test_untied_head_and_a_file(self, tmp_path):
        model = lm(tied=False)
        path = write(tmp_path / "x.safetensors", model.state_dict())
        folder = tmp_path / "deep" / "small"  # made as needed
        args = (shapes(model), open_safetensors(path), batches(), gptq, folder)
        pipeline.streamed(*args, tables=rough, rows=9, progress=True)
        small = pipeline.assembled(folder)
        want = whole(model, gptq)
        for layer in (want.tokens, want.positions, want.head):
            layer.weight.data = rough("", layer.weight.detach()).decode()
        assert torch.equal(small.head.weight, want.head.weight)
        assert torch.equal(small.tokens.weight, want.tokens.weight)

    def test_half_precision_stays_what_it_is(self, tmp_path):
        model = lm().bfloat16()
        args = (shapes(model).bfloat16(), model.state_dict(), batches(), gptq)
        small = pipeline.assembled(
            pipeline.streamed(*args, tmp_path), shapes(model).bfloat16()
        )
        assert small.blocks[0].up.weight.dtype == torch.bfloat16
        assert alike(small, whole(model, gptq))

    def test_where(self, tmp_path):
        model = lm()

        def where(name, w):
            return "up" in name and "blocks.1" not in name

        args = (shapes(model), model.state_dict(), batches(), gptq, tmp_path)
        small = pipeline.assembled(pipeline.streamed(*args, where=where))
        for name, w in model.named_parameters():
            same = torch.equal(w, small.get_parameter(name))
            assert same != (where(name, w) and w.ndim > 1), name


class Gate(nn.Module):
    """A block of a user's: two outputs, one keyword, a buffer of its own."""

    def __init__(self, width):
        super().__init__()
        self.one = nn.Linear(width, width)
        self.two = nn.Linear(width, width, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("shift", torch.arange(float(width)))
        self.register_buffer("none", None)

    def forward(self, x, *, scale):
        return x + scale * self.two(self.one(x).tanh()) + self.shift, None


class Mine(nn.Module):
    """A model that the library does not know."""

    def __init__(self, tables=True):
        super().__init__()
        self.project = nn.Linear(3, 4)
        self.start = nn.Parameter(torch.randn(4))
        self.body = nn.ModuleDict({"stack": nn.ModuleList(map(Gate, [4, 4]))})
        self.end = nn.Linear(4, 2)

    def forward(self, x, scale=0.5):
        x = self.project(x) + self.start
        for block in self.body["stack"]:
            x, _ = block(x, scale=scale)
        return self.end(x)


class TestOwnModel:
    def setup_method(self):
        torch.manual_seed(0)
        self.model = Mine()
        with torch.device("meta"):
            self.shapes = Mine()
        g = torch.Generator().manual_seed(1)
        self.batches = [(torch.randn(6, 3, generator=g), "label")]

    def run(self, folder, shapes=None, tensors=None, **options):
        return pipeline.streamed(
            shapes or self.shapes,
            tensors or self.model.state_dict(),
            self.batches,
            gptq,
            folder,
            blocks="body.stack",
            **options,
        )

    def test_against_the_whole(self, tmp_path):
        small = pipeline.assembled(self.run(tmp_path), self.shapes)
        want = deepcopy(self.model)
        for i in range(2):
            inside = f"body.stack.{i}."
            stats = calibrate.inputs(
                want,
                self.batches,
                where=lambda n, w, p=inside: n.startswith(p),
            )
            W = want.get_parameter(f"{inside}one.weight")
            code = gptq(W.detach(), stats[f"{inside}one.weight"])
            W.data.copy_(code.decode())
        assert alike(small, want)
        stack = small.body["stack"]
        assert stack[1].one.weight is stack[1].two.weight
        x = self.batches[0][0]
        assert torch.equal(small(x), want(x))

    def test_needs_the_model_to_be_assembled(self, tmp_path):
        self.run(tmp_path)
        with pytest.raises(ValueError, match="model: needed"):
            pipeline.assembled(tmp_path)

    def test_a_model_with_values_is_left_alone(self, tmp_path):
        real = Mine()
        before = deepcopy(real.state_dict())
        small = pipeline.assembled(self.run(tmp_path, real), real)
        after = real.state_dict()
        assert all(torch.equal(before[n], after[n]) for n in before)
        # its values are not those that count
        want = pipeline.assembled(self.run(tmp_path / "x"), self.shapes)
        assert alike(small, want)

    def test_buffers_may_have_values_in_the_model_alone(self, tmp_path):
        tensors = self.model.state_dict()
        for i in range(2):
            tensors.pop(f"body.stack.{i}.shift")
        with pytest.raises(ValueError, match=r"stack\.0\.shift: not in tens"):
            self.run(tmp_path / "x", tensors=tensors)
        for block in self.shapes.body["stack"]:
            block.shift = torch.arange(4.0)
        small = pipeline.assembled(
            self.run(tmp_path, tensors=tensors), self.shapes
        )
        want = pipeline.assembled(self.run(tmp_path / "y"), self.shapes)
        assert alike(small, want)

    def test_a_block_that_nobody_calls(self, tmp_path):
        with pytest.raises(ValueError, match=r"body\.stack\.0 is not called"):
            self.run(tmp_path, forward=lambda model, batch: None)

    def test_a_weight_of_two_blocks(self, tmp_path):
        stack = self.shapes.body["stack"]
        stack[1].one.weight = stack[0].one.weight
        with pytest.raises(ValueError, match="shared with another block"):
            self.run(tmp_path)


class TestResume:
    def go(self, folder, rule=gptq, model=None, **options):
        model = model or lm()
        args = (shapes(model), model.state_dict(), batches(), rule, folder)
        return pipeline.streamed(*args, **options)

    @pytest.mark.parametrize("calls", [0, 5, 6, 17])
    def test_goes_on_where_it_stopped(self, tmp_path, calls):
        left = [calls]

        def tired(W, x):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return gptq(W, x)

        with pytest.raises(KeyboardInterrupt):
            self.go(tmp_path / "a", tired)
        made = {p: p.stat().st_ino for p in (tmp_path / "a").glob("*.mc")}
        with pytest.raises(ValueError, match=r"blocks\.\d.*not in tensors"):
            pipeline.assembled(tmp_path / "a")
        count = [0]

        def counted(W, x):
            count[0] += 1
            return gptq(W, x)

        self.go(tmp_path / "a", counted)
        assert count[0] == 18 - calls // 6 * 6  # of 6 matrices in each of 3
        assert all(p.stat().st_ino == inode for p, inode in made.items())
        self.go(tmp_path / "b")
        for path in (tmp_path / "b").iterdir():
            again = tmp_path / "a" / path.name
            assert again.read_bytes() == path.read_bytes()

    def test_done_is_done(self, tmp_path):
        self.go(tmp_path)

        def never(W, x):
            raise AssertionError

        assert self.go(tmp_path, never) == tmp_path

    def test_another_model_needs_another_folder(self, tmp_path):
        self.go(tmp_path)
        for options in ({"model": lm(layers=2)}, {"rows": 5}):
            with pytest.raises(ValueError, match="parts of another model"):
                self.go(tmp_path, **options)

    def test_errors_name_the_tensor(self, tmp_path):
        model = lm()
        tensors = model.state_dict()
        args = (batches(), gptq, tmp_path)
        less = {n: w for n, w in tensors.items() if "1.up.bias" not in n}
        with pytest.raises(ValueError, match=r"blocks\.1\.up\.bias: not in"):
            pipeline.streamed(shapes(model), less, *args)
        for name in ("blocks.2.up.bias", "tokens.weight"):
            long = tensors | {name: torch.cat([tensors[name]] * 2)}
            with pytest.raises(ValueError, match=rf"{name} has shape"):
                pipeline.streamed(
                    shapes(model), long, *args[:2], tmp_path / name
                )

    def test_a_rule_that_changes_the_shape(self, tmp_path):
        with pytest.raises(ValueError, match=r"attention\.q\.weight: shape"):
            self.go(tmp_path, lambda W, x: W[:1])


class TestMemory:
    def test_what_is_read_and_when(self, tmp_path):
        model = lm(tied=False)
        spy = Spy(model.state_dict())

        def rule(W, x):
            spy.seen.append("rule")
            return W

        args = (shapes(model), spy, batches(), rule, tmp_path)
        pipeline.streamed(*args, rows=7)
        named = [n for n in spy.seen if isinstance(n, str)]
        seen = [n.split(".")[1] if "blocks" in n else n for n in named]
        order = list(dict.fromkeys(s for s in seen if s in "012"))
        assert order == ["0", "1", "2"]
        for i in range(2):  # a block is done before the next is read
            last = max(k for k, s in enumerate(seen) if s == str(i))
            assert seen[last + 1 : last + 7] == ["rule"] * 6
            assert seen[last + 7] == str(i + 1)
        # a matrix outside of the blocks is never whole
        rows = [s for s in spy.seen if isinstance(s, tuple)]
        assert {name for name, _ in rows} == {
            "tokens.weight",
            "positions.weight",
            "head.weight",
        }
        assert max(n for _, n in rows) == 7
        assert sum(n for _, n in rows) == 40 + 8 + 40
        assert not {name for name, _ in rows} & set(named)

    def test_does_not_grow_with_depth(self, tmp_path):
        def peak(layers, lazy):
            model = lm(layers, vocab=400, width=32, ff=64)
            own = tmp_path / f"{layers}{lazy}"
            path = write(tmp_path / "x.safetensors", model.state_dict())
            shape, size = (
                shapes(model),
                sum(w.nbytes for w in model.parameters()),
            )

            def run():
                tensors = open_safetensors(path)
                tensors = tensors if lazy else dict(tensors)
                args = (shape, tensors, batches(), nearest, own)
                pipeline.streamed(*args, rows=50)

            return measure.peak_memory(run), size

        (a, _), (b, _) = peak(2, True), peak(16, True)
        assert b == a
        (c, small), (d, large) = peak(2, False), peak(16, False)
        assert d - c == pytest.approx(large - small, rel=0.01)
        assert b < 0.5 * large

    def test_parts_are_what_was_written(self, tmp_path):
        model = lm()
        args = (shapes(model), model.state_dict(), batches(), gptq, tmp_path)
        pipeline.streamed(*args, tables=rough, rows=16)
        found = {
            (n, start): code for n, start, code in pipeline.parts(tmp_path)
        }
        assert {s for n, s in found if n == "tokens.weight"} == {0, 16, 32}
        code = found["blocks.1.up.weight", 0]
        assert isinstance(code, codes.Affine) and code.q.bits == 3
        assert ("head.weight", 0) not in found  # tied: written once
        files = list(tmp_path.glob("*.mc"))
        assert len(files) == 3 + 3 + 1 + 2
        size = sum(p.stat().st_size for p in files)
        assert size < len(storage.dumps(model)) / 3


def test_the_last_block_is_not_run_again(tmp_path, monkeypatch):
    ran = []
    model = lm()
    shape = shapes(model)
    forward = models.language.PreNorm.forward

    def counted(self, x):
        ran.append(x.shape)
        return forward(self, x)

    monkeypatch.setattr(models.language.PreNorm, "forward", counted)
    args = (shape, model.state_dict(), batches(), nearest, tmp_path)
    pipeline.streamed(*args)
    assert len(ran) == 3 * (3 + 2)  # batches: to record, and to go on
