"""Every tree round-trips; every bad file ends in StorageError."""

import json
import os
import random
import struct
import time
import zlib
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from trees import integers, same, tensor, trees

from minicompress import codes, entropy, models, storage
from minicompress.storage import StorageError, layers

SHAPES = [(), (0,), (1,), (9,), (3, 8), (5, 7), (4, 3, 3, 3), (2, 0, 3)]


class Holder(nn.Module):
    """A user's own module with one parameter of any shape."""

    def __init__(self, shape):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(shape))


def parts(data: bytes):
    """Split a file into its header and its blobs."""
    size = struct.unpack("<I", data[5:9])[0]
    return json.loads(data[9 : 9 + size]), data[9 + size : -4]


def assemble(header, blobs) -> bytes:
    """Put a file together, with a right checksum."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = b"MINC\x01" + struct.pack("<I", len(text)) + text + blobs
    return body + struct.pack("<I", zlib.crc32(body))


# ---- round trips


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(data=st.data())
def test_any_tree_round_trips_bit_for_bit(data, tmp_path_factory):
    shape = data.draw(st.sampled_from(SHAPES))
    x = data.draw(trees(shape, depth=data.draw(st.integers(0, 3))))
    holder, path = Holder(shape), tmp_path_factory.mktemp("t") / "x.mc"
    size = storage.save(path, holder, {"w": x})
    assert size == path.stat().st_size
    back = storage.read(path).state["w"]
    assert same(x, back)
    assert codes.shape(back) == shape
    assert torch.equal(
        codes.value(x).nan_to_num(), codes.value(back).nan_to_num()
    )
    assert storage.dumps(holder, {"w": back}) == path.read_bytes()
    again = storage.load(path, like=holder)
    assert again.w.shape == shape and (holder.w == 0).all()


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_model_round_trips(name, small_models):
    model = small_models[name]
    data = storage.dumps(model)
    again = storage.loads(data)
    assert type(again) is type(model) and again.config == model.config
    mine, theirs = model.state_dict(), again.state_dict()
    assert list(mine) == list(theirs)
    assert all(same(mine[n], theirs[n]) for n in mine)
    assert storage.dumps(again) == data
    assert not again.training


@pytest.fixture(scope="module")
def small_models():
    torch.manual_seed(0)
    made = {
        "MLP": models.MLP(widths=[6, 5, 4]),
        "LeNet5": models.LeNet5(),
        "CNN": models.CNN(),
        "ResNet": models.ResNet(),
        "LM": models.LM(vocab=30, width=8, layers=2, heads=2),
        "GPT2": models.GPT2(vocab=30, width=8, layers=2, heads=2, ff=16),
        "Encoder": models.Encoder(vocab=50, width=8, layers=2, heads=2, ff=16),
    }
    assert set(made) == set(models.MODELS)
    return made


def test_the_file_is_as_long_as_its_parts_say():
    model = models.MLP(widths=[8, 4])
    data = storage.dumps(model)
    header, blobs = parts(data)
    assert len(blobs) == 4 * (8 * 4 + 4)
    assert len(data) == 9 + len(json.dumps(header, separators=(",", ":"))) + (
        len(blobs) + 4
    )
    state = codes.encode(model, lambda w: codes.sparse(w, w > 0))
    _, blobs = parts(storage.dumps(model, state))
    assert len(blobs) == sum(map(storage.payload, state.values()))


def test_tied_tensors_are_written_once_and_stay_tied():
    model = nn.Module()
    model.a, model.b = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
    model.b.weight = model.a.weight
    data = storage.dumps(model)
    assert len(parts(data)[1]) == 4 * (64 + 8)
    again = storage.loads(data, like=model)
    assert again.a.weight is again.b.weight
    with torch.no_grad():
        again.a.weight.zero_()
    assert again.b.weight.abs().sum() == 0
    assert model.a.weight.abs().sum() > 0

    codes_ = codes.encode(model, lambda w: codes.Scaled(w, 2.0))
    twice = storage.loads(storage.dumps(model, codes_), like=model)
    assert twice.a.weight is twice.b.weight
    assert torch.equal(twice.a.weight, 2 * model.a.weight)


def test_transformed_models_rebuild():
    mlp = models.MLP(widths=[6, 8, 4])
    linear = [m for m in mlp.modules() if isinstance(m, nn.Linear)]
    names = {m: n for n, m in mlp.named_modules()}
    first, second = (names[m] for m in linear)
    pruned = layers.replaced(
        mlp,
        {
            first: ["Linear", {"in_features": 6, "out_features": 3}],
            second: [
                "Sequential",
                {
                    "0": ["Linear", {"in_features": 3, "out_features": 1}],
                    "1": ["Linear", {"in_features": 1, "out_features": 4}],
                },
            ],
        },
    )
    again = storage.loads(storage.dumps(pruned))
    x = torch.randn(5, 6)
    assert torch.equal(again(x), pruned(x))
    assert again.get_submodule(first).out_features == 3
    assert storage.dumps(again) == storage.dumps(pruned)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(3, 4, bias=False),
        nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), groups=2),
        nn.Conv1d(2, 2, 3, dilation=2, bias=False),
        nn.BatchNorm2d(5, eps=1e-3),
        nn.LayerNorm(7),
        nn.LayerNorm((2, 3), bias=False),
        nn.Embedding(5, 2, padding_idx=1),
        nn.GELU("tanh"),
        nn.Sequential(nn.Flatten(), nn.Sequential(nn.ReLU())),
    ],
)
def test_descriptions_rebuild_the_layer(layer):
    text = json.dumps(layers.describe(layer))
    again = layers.make(json.loads(text))
    assert repr(again) == repr(layer)
    mine, theirs = layer.state_dict(), again.state_dict()
    assert {n: t.shape for n, t in mine.items()} == {
        n: t.shape for n, t in theirs.items()
    }


@pytest.mark.parametrize("gone", [[1], [0, 3]])
def test_stack_of_fewer_blocks(gone):
    torch.manual_seed(0)
    model = models.ResNet((4, 6), blocks=2)
    kept = [b for i, b in enumerate(model.blocks) if i not in gone]
    model.blocks = nn.ModuleList(kept)
    again = storage.loads(storage.dumps(model.eval()))
    x = torch.randn(2, 1, 8, 8)
    assert len(again.blocks) == 4 - len(gone)
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    "numbers", [[0, 2], [1, 0], [0, 0], [-1], [1.0], [True, "0"], ["0"]]
)
def test_numbers_of_blocks_are_checked(numbers):
    stack = models.LM(vocab=30, width=8, layers=2, heads=2)
    with pytest.raises((ValueError, TypeError)):
        layers.replaced(stack, {"blocks": ["Kept", {"numbers": numbers}]})
    with pytest.raises(ValueError):
        layers.replaced(stack, {"norm": ["Kept", {"numbers": [0]}]})


def test_only_known_layers_can_be_described():
    assert layers.describe(nn.LSTM(2, 2)) is None
    assert layers.describe(nn.Conv2d(1, 1, 3, padding_mode="circular")) is None
    with pytest.raises(ValueError, match="LSTM"):
        layers.make(["LSTM", {"input_size": 2, "hidden_size": 2}])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_type_of_a_parameter_survives_its_code(dtype):
    model = nn.Linear(4, 4).to(dtype)
    state = codes.encode(model, lambda w: codes.Scaled(w, 1.0))
    again = storage.loads(storage.dumps(model, state), like=nn.Linear(4, 4))
    assert again.weight.dtype == again.bias.dtype == dtype
    assert torch.equal(again.weight, model.weight)


def test_what_is_stored_in_half_computes_as_the_model_does():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2).double())
    state = {n: t.half() for n, t in model.state_dict().items()}
    again = storage.loads(storage.dumps(model, state), like=model)
    assert again[0].bias.dtype == torch.float32
    assert again[1].bias.dtype == torch.float64
    assert torch.equal(again[0].bias, model[0].bias.half().float())
    assert len(storage.dumps(model, state)) < len(storage.dumps(model)) - 60


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.mc"
    storage.save(path, nn.Linear(2, 2))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="missing"):
        storage.save(path, nn.Linear(2, 2), {"weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="shape"):
        bad = {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}
        storage.save(path, nn.Linear(2, 2), bad)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.mc"]


def test_meta_survives(tmp_path):
    storage.save(tmp_path / "m", nn.Linear(1, 1), meta={"accuracy": 0.5})
    assert storage.read(tmp_path / "m").meta == {"accuracy": 0.5}


# ---- bad files


def holder_file():
    mask = tensor((4, 8), 1) > 0.5
    s = codes.sparse(tensor((4, 8), 0), mask)
    book = codes.Codebook(integers((len(s.values),), 4, 2), tensor((16,), 3))
    s = replace(s, values=replace(book, index=entropy.huffman(book.index)))
    return storage.dumps(Holder((4, 8)), {"w": s})


def test_a_compact_header_says_the_same_in_fewer_bytes(tmp_path):
    model = models.LeNet5()
    plain = storage.dumps(model, meta={"seed": 3})
    data = storage.dumps(model, meta={"seed": 3}, compact=True)
    assert len(data) < len(plain) - 100
    size = storage.save(
        tmp_path / "a.mc", model, meta={"seed": 3}, compact=True
    )
    assert size == len(data) == (tmp_path / "a.mc").stat().st_size
    assert storage.read(tmp_path / "a.mc").meta == {"seed": 3}
    back = storage.loads(data).state_dict()
    for name, w in model.state_dict().items():
        assert torch.equal(back[name], w)
    for i in range(9, len(data) - len(plain) + 9 + 300):
        bad = bytearray(data)
        bad[i] ^= 1 << (i % 8)
        with pytest.raises(StorageError):
            storage.loads(bytes(bad))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text[:-3], "cut off, or longer"),
        (lambda text: text + b"x", "cut off, or longer"),
        (lambda text: zlib.compress(b" " * (1 << 25))[2:], "cut off, or"),
        (lambda text: b"nonsense", "Error -"),
    ],
)
def test_a_compact_header_is_not_trusted(change, message):
    data = storage.dumps(models.LeNet5(), compact=True)
    size = struct.unpack("<I", data[5:9])[0]
    text = change(data[9 : 9 + size])
    body = data[:5] + struct.pack("<I", len(text)) + text + data[9 + size : -4]
    base = reset_peak()
    with pytest.raises(StorageError, match=message):
        storage.loads(body + struct.pack("<I", zlib.crc32(body)))
    assert peak_above(base) < 40 << 20


def test_truncation_at_every_byte_is_noticed():
    data = holder_file()
    for n in range(len(data)):
        with pytest.raises(StorageError):
            storage.loads(data[:n], like=Holder((4, 8)))


def test_any_flipped_bit_is_noticed():
    data = holder_file()
    for i in range(len(data)):
        bad = bytearray(data)
        bad[i] ^= 1 << (i % 8)
        with pytest.raises(StorageError):
            storage.loads(bytes(bad), like=Holder((4, 8)))


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not a minicompress file"),
        (b"PK\x03\x04" + bytes(100), "not a minicompress file"),
        (b"MINC\x01", "truncated"),
        (b"MINC\x07" + bytes(20), "format 7"),
    ],
)
def test_foreign_files_are_named(data, message):
    with pytest.raises(StorageError, match=message):
        storage.loads(data)


def test_errors_say_what_to_do():
    data = storage.dumps(nn.Linear(2, 2))
    with pytest.raises(StorageError, match="like="):
        storage.loads(data)
    with pytest.raises(StorageError, match="names do not match"):
        storage.loads(data, like=nn.Conv2d(1, 1, 1, bias=False))
    with pytest.raises(StorageError, match=r"weight: shape \(2, 2\)"):
        storage.loads(data, like=nn.Linear(3, 2))
    big = storage.dumps(nn.Linear(64, 64))
    with pytest.raises(StorageError, match="limit"):
        storage.loads(big, like=nn.Linear(64, 64), limit=1000)


U8 = {"u1": [0]}
BOMBS = {
    "hash": ["Hashed", 1, {"f4": [1]}, [1 << 20, 1 << 20]],
    "codebook": ["Codebook", ["Ints", [1 << 40], 1], {"f4": [2, 1 << 20]}],
    "nested": ["View", ["Hashed", 1, {"f4": [1]}, [1 << 50]], [4, 8]],
    "leaf": {"f4": [1 << 62, 8]},
    "overflow": {"f4": [1 << 62, 1 << 62]},
    "gaps": ["Gaps", ["Ints", [1], 4], 1 << 45],
    "deep": json.loads('["View",' * 300 + "0" + ",[1]]" * 300),
    "not a code": ["os.system", "echo"],
    "no such type": {"f128": [4, 8]},
    "text": "w",
    "null": None,
    "negative": ["Hashed", 1, {"f4": [1]}, [-4, -8]],
    "boolean": ["Ints", [4, 8], True],
    "wide": ["Ints", [4, 8], 1 << 60],
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_memory_is_taken(name):
    header = {"model": None, "state": {"w": BOMBS[name]}}
    data = assemble(header, tensor((64,), 0).numpy().tobytes())
    began = time.process_time()
    base = reset_peak()
    with pytest.raises(StorageError):
        storage.loads(data, like=Holder((4, 8)))
    assert time.process_time() - began < 1
    assert peak_above(base) < 16 << 20


@pytest.mark.parametrize(
    "model",
    [
        ["MLP", {"widths": [1 << 40, 1 << 40]}],
        ["MLP", {"widths": [2] * 100_000}],
        ["LM", {"layers": 1 << 40}],
        ["LM", {"vocab": -1}],
        ["Path", {}],
        ["MLP", {"widths": "abc"}],
        ["MLP", {"nonsense": 1}],
        "MLP",
        [],
    ],
)
def test_hostile_configurations_are_refused(model):
    data = assemble({"model": model, "state": {}}, b"")
    began = time.process_time()
    with pytest.raises(StorageError):
        storage.loads(data)
    assert time.process_time() - began < 1


def test_a_header_that_is_not_json_is_refused():
    for text in [b"", b"{", b"[]", b'{"model":null}', b"[" * 10_000, b"\xff"]:
        with pytest.raises(StorageError):
            storage.loads(assemble(text, b""), like=Holder((1,)))
    with pytest.raises(StorageError, match="NaN"):
        storage.loads(assemble(b'{"model":NaN,"state":{}}', b""))


def test_bytes_that_nothing_claims_are_refused():
    header, blobs = parts(holder_file())
    with pytest.raises(StorageError, match="3 bytes that no tensor claims"):
        storage.loads(assemble(header, blobs + b"abc"), like=Holder((4, 8)))


# ---- fuzzing


def reset_peak() -> int:
    """Start a new peak of resident memory (Linux); return its base."""
    try:
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")
    except OSError:
        pytest.skip("peak memory can be reset only on Linux")
    return status("VmRSS")


def peak_above(base: int) -> int:
    return status("VmHWM") - base


def status(key: str) -> int:
    with open("/proc/self/status") as f:
        line = next(line for line in f if line.startswith(key))
    return int(line.split()[1]) << 10


EXTREME = [0, 1, -1, 2, 3, 255, 256, 1 << 16, 1 << 31, 1 << 40, 1 << 63]
EXTREME += [1e308, 0.5, None, True, "", "w", [], {}, [1], "Rans", "Huffman"]


def mutate_json(node, rng):
    """Change one place of a JSON tree."""
    if isinstance(node, (list, dict)) and node and rng.random() < 0.9:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key, copy = rng.choice(list(keys)), node.copy()
        act = rng.random()
        if act < 0.06:
            del copy[key]
        elif act < 0.12 and isinstance(copy, list):
            copy.insert(key, rng.choice(copy))
        elif act < 0.18:
            copy[key] = copy[rng.choice(list(keys))]
        else:
            copy[key] = mutate_json(copy[key], rng)
        return copy
    if type(node) is int and rng.random() < 0.6:
        return node + rng.choice([-2, -1, 1, 2, 8, node, -node // 2])
    return rng.choice(EXTREME)


def mutate(data: bytes, rng) -> bytes:
    """Change the header, the blobs or both; the checksum is made right."""
    header, blobs = parts(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        act, at = rng.random(), rng.randrange(len(blobs) + 1)
        if act < 0.5:
            header = mutate_json(header, rng)
        elif act < 0.8 and blobs:
            flip = bytearray(blobs)
            flip[at % len(blobs)] = rng.choice([0, 1, 127, 255, at & 255])
            blobs = bytes(flip)
        elif act < 0.9:
            blobs = blobs[:at] + blobs[at + rng.choice([1, 2, 9]) :]
        else:
            blobs = blobs[:at] + rng.randbytes(rng.choice([1, 4])) + blobs[at:]
    text = json.dumps(header).encode()
    if rng.random() < 0.1:  # below the level of JSON
        flip = bytearray(text)
        flip[rng.randrange(len(flip))] = rng.randrange(256)
        text = bytes(flip)
    return assemble(text, blobs)


def subjects():
    """Small files that between them hold every kind of code."""
    torch.manual_seed(0)
    mlp = models.MLP(widths=[16, 12, 4])

    def deep_compression(coder, gaps):
        def f(w):
            s = codes.sparse(w, w.abs() > w.abs().median())
            index = integers((len(s.values),), 3, 0)
            book = codes.Codebook(coder(index), tensor((8,), 0).half())
            mask = codes.gaps(s.mask, bits=3) if gaps else s.mask
            if gaps:
                mask = codes.Gaps(coder(mask.steps), mask.numel)
            return replace(s, values=book, mask=mask)

        return f

    def grouped(w):
        g = codes.groups(w, 8)
        q = integers(tuple(g.shape), 4, 1)
        scale = codes.Affine(integers((*g.shape[:-1], 1), 8, 2), 0.01, 0)
        return codes.View(codes.Affine(q, scale, 8), tuple(w.shape))

    def low_rank(w):
        out, inputs = w.shape
        product = codes.Factors(tensor((out, 2), 0), tensor((2, inputs), 1))
        hashed = codes.Hashed(7, tensor((9,), 0), (out, inputs))
        return codes.Sum(codes.Scaled(hashed, 0.5), product)

    yield storage.dumps(mlp), None
    for f in [
        deep_compression(entropy.huffman, False),
        deep_compression(entropy.rans, True),
        deep_compression(entropy.huffman, True),
        deep_compression(entropy.contextual, False),
        grouped,
        low_rank,
    ]:
        yield storage.dumps(mlp, codes.encode(mlp, f)), None
    cnn = models.CNN(channels=[3, 4])
    yield storage.dumps(cnn), None
    holder = Holder((6, 8))
    core = codes.Rotated(tensor((6, 8), 0), integers((8,), 1, 5))
    yield storage.dumps(holder, {"w": core}), holder
    conv = Holder((4, 3, 2, 2))
    tucker = codes.Factors(
        tensor((4, 2), 0), tensor((2, 3), 1), tensor((2, 2, 2, 2), 2)
    )
    yield storage.dumps(conv, {"w": tucker}), conv


def test_ten_thousand_mutated_files_do_no_harm():
    rng, limit = random.Random(0), 4 << 20
    files = list(subjects())
    refused = survived = 0
    for i in range(10_008):
        data, like = files[i % len(files)]
        bad = mutate(data, rng)
        base, began = reset_peak(), time.process_time()
        try:
            model = storage.loads(bad, like=like, limit=limit)
        except StorageError as error:
            assert str(error)
            refused += 1
        else:
            survived += 1
            assert set(model.state_dict()) == set(parts(bad)[0]["state"])
        took = time.process_time() - began
        assert took < 1, (i, took)
        # what decoding may take at most, and slack for the allocator
        assert peak_above(base) < 2 * limit + (8 << 20), i
    assert refused > 5000 and survived > 300, (refused, survived)


def large(kind):
    """A code of about a million weights."""
    n = 1024
    w, q = tensor((n, n), 0), integers((n, n), 4, 0)
    half, grid = w > 0, tensor((16,), 1)
    if kind == "huffman":
        return codes.Codebook(entropy.huffman(q), grid)
    if kind == "rans":
        return codes.Affine(entropy.rans(q), 0.1, 8)
    if kind == "mask":
        return codes.sparse(w, half)
    if kind == "gaps":
        steps = codes.gaps(half, bits=3)
        return codes.Sparse(steps, w[half], (n, n))
    if kind == "rotated":
        return codes.Rotated(w, integers((n,), 1, 0))
    if kind == "hashed":
        return codes.Hashed(0, grid, (n, n))
    if kind == "factors":
        return codes.Factors(w[:, :8], w[:8])
    if kind == "groups":
        scale = tensor((n, n // 32, 1), 1).half()
        q = codes.Ints(codes.groups(q.values, 32), 4)
        return codes.View(codes.Affine(q, scale, 8), (n, n))
    return codes.Sum(codes.Scaled(w, 0.5), w)


@pytest.mark.parametrize(
    "kind",
    [
        "huffman",
        "rans",
        "mask",
        "gaps",
        "rotated",
        "hashed",
        "factors",
        "groups",
        "sum",
    ],
)
def test_decoding_takes_at_most_twice_the_declared_memory(kind):
    holder = Holder((1024, 1024))
    data = storage.dumps(holder, {"w": large(kind)})
    with torch.device("meta"):
        like = Holder((1024, 1024))
    storage.loads(data, like=like)  # warm: tables and threads exist
    declared = storage.footprint(large(kind))
    base = reset_peak()
    model = storage.loads(data, like=like)
    assert model.w.shape == (1024, 1024)
    assert peak_above(base) <= 2 * declared + (2 << 20), declared
