"""GPT-2 is a language model of this library with another activation."""

import math
import pickle
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from shapes import randomized

from minicompress import (
    calibrate,
    codes,
    distill,
    export,
    lowrank,
    measure,
    models,
    prune,
    quantize,
    storage,
    train,
)

CONFIG = {"vocab": 20, "width": 16, "layers": 3, "heads": 4, "ff": 24}
CONFIG |= {"context": 8}
IDS = torch.randint(0, 20, (6, 8), generator=torch.Generator().manual_seed(0))


def small(cls=models.GPT2, **options):
    """Return a float64 model whose biases and norms are not trivial."""
    torch.manual_seed(0)
    return randomized(cls(**CONFIG, **options)).double()


def near(a, b, atol=1e-9):
    return torch.allclose(a, b, rtol=0, atol=atol * b.abs().max().item())


class TestModel:
    @pytest.mark.parametrize(
        ("sizes", "published"),
        [
            ({}, 124_439_808),
            ({"width": 1024, "layers": 24, "heads": 16}, 354_823_168),
            ({"width": 1280, "layers": 36, "heads": 20}, 774_030_080),
            ({"width": 1600, "layers": 48, "heads": 25}, 1_557_611_200),
        ],
    )
    def test_has_the_sizes_of_the_four_gpt_2(self, sizes, published):
        width = sizes.get("width", 768)
        with torch.device("meta"):
            model = models.GPT2(**sizes, ff=4 * width)
        layers = sizes.get("layers", 12)
        tables = (50257 + 1024) * width + 2 * width
        block = 12 * width**2 + 13 * width
        assert measure.params(model) == tables + layers * block == published

    def test_activation_is_the_formula_with_tanh(self):
        block = small().blocks[0]
        x = torch.linspace(-6, 6, 5 * 16, dtype=torch.float64).view(5, 16)
        u = block.up(x)
        tanh = torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3))
        assert near(block.mlp(x), block.down(u / 2 * (1 + tanh)))

    def test_differs_from_lm_by_the_activation_only(self, monkeypatch):
        model, other = small(), small(models.LM)
        other.load_state_dict(model.state_dict())
        assert not near(model(IDS), other(IDS), 1e-7)
        assert near(model(IDS), other(IDS), 1e-2)
        gelu = F.gelu
        monkeypatch.setattr(F, "gelu", lambda x, approximate="": gelu(x))
        assert torch.equal(model(IDS), other(IDS))

    def test_the_two_activations_are_as_near_as_said(self):
        x = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
        far = (F.gelu(x) - F.gelu(x, approximate="tanh")).abs().max()
        assert 4e-4 < far < 5e-4

    def test_sees_no_token_that_comes_later(self):
        model, other = small(), IDS.clone()
        other[:, 5:] = (other[:, 5:] + 1) % 20
        a, b = model(IDS), model(other)
        assert torch.equal(a[:, :5], b[:, :5])
        assert (a[:, 5:] != b[:, 5:]).any(-1).all()

    def test_starts_as_gpt_2_does(self):
        torch.manual_seed(0)
        model = models.GPT2(500, 128, 8, 4, 512, 64)
        for name, w in model.named_parameters():
            if w.ndim == 1:
                assert (w == float("norm" in name and "weight" in name)).all()
                continue
            branch = name.endswith(("attention.out.weight", "down.weight"))
            std = 0.02 / 4 if branch else 0.02  # √(2 · 8 layers) = 4
            error = 4 / math.sqrt(2 * w.numel())  # 4 standard deviations
            assert w.std().item() == pytest.approx(std, rel=error), name

    @pytest.mark.parametrize("tied", [True, False])
    def test_output_layer_is_the_token_table_if_tied(self, tied):
        model = small(tied=tied)
        assert (model.head.weight is model.tokens.weight) == tied
        assert model.config == {**CONFIG, "tied": tied}
        again = models.build("GPT2", model.config)
        assert type(again) is models.GPT2
        again.double().load_state_dict(model.state_dict())
        assert torch.equal(again(IDS), model(IDS))

    def test_wrong_arguments_are_named(self):
        with pytest.raises(ValueError, match="heads: 3 do not divide width 16"):
            models.GPT2(**CONFIG | {"heads": 3})
        with pytest.raises(ValueError, match="layers must be 1 to 128"):
            models.GPT2(layers=1000)
        with pytest.raises(ValueError, match="positions for 8"):
            small()(torch.zeros(1, 9, dtype=torch.long))

    def test_can_be_copied_pickled_and_run_in_bfloat16(self):
        model = small()
        for again in (deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(again(IDS), model(IDS))
        half = deepcopy(model).bfloat16()(IDS)
        assert half.dtype == torch.bfloat16
        assert near(half.double(), model(IDS), 0.1)

    def test_learns(self):
        torch.manual_seed(0)
        model = models.GPT2(**CONFIG)
        ids = torch.arange(8).repeat(4, 1)
        batch = ids[:, :-1], ids[:, 1:]
        adam = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(40):
            adam.zero_grad()
            loss = train.cross_entropy(model, batch)
            loss.backward()
            adam.step()
        assert loss < 0.1 < math.log(20)


class TestWhateverTakesAnLM:
    @pytest.mark.parametrize("tied", [True, False])
    def test_file(self, tied):
        model = small(tied=tied)
        again = storage.loads(storage.dumps(model))
        assert type(again) is models.GPT2 and again.config == model.config
        assert torch.equal(again(IDS), model(IDS))

    def test_cache(self):
        model = small()
        exact = quantize.CachedLM(model, quantize.Cache(8, group=2, window=8))
        assert near(exact(IDS), model(IDS))
        rough = quantize.CachedLM(model, quantize.Cache(2, group=2, window=0))
        assert not near(rough(IDS), model(IDS), 1e-3)

    def test_removed_blocks(self):
        model, keep = small(), torch.tensor([True, False, True])
        short = prune.remove_blocks(model, "blocks", keep, IDS)
        middle = model.blocks[1]
        middle.attention.out.weight.data.zero_()
        middle.attention.out.bias.data.zero_()
        middle.down.weight.data.zero_()
        middle.down.bias.data.zero_()
        assert near(short(IDS), model(IDS))  # a block that adds nothing
        again = storage.loads(storage.dumps(short))
        assert torch.equal(again(IDS), short(IDS)) and len(again.blocks) == 2

    def test_rotation(self):
        model = small()
        plain = prune.without_scales(model)
        Q = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64))[0]
        turned = prune.slicing.rotated(plain, Q)
        assert type(turned) is models.GPT2
        assert near(plain(IDS), model(IDS)) and near(turned(IDS), model(IDS))
        again = storage.loads(storage.dumps(turned))
        assert torch.equal(again(IDS), turned(IDS))

    def test_slices_and_channels(self):
        model = small()
        assert near(prune.sliced(model, [IDS], width=16)(IDS), model(IDS))
        narrow = prune.sliced(model, [IDS], width=12)
        assert narrow.tokens.weight.shape == (20, 12)
        keep = {"blocks.0.up": torch.arange(24) < 15}
        less = prune.remove_channels(model, keep, IDS)
        model.blocks[0].down.weight.data[:, 15:] = 0
        assert near(less(IDS), model(IDS))
        again = storage.loads(storage.dumps(less))
        assert torch.equal(again(IDS), less(IDS))

    def test_gptq_layer_by_layer_through_a_file(self):
        model = small().float()
        stored = {}

        def gptq(name, layer, stats):
            W = layer.weight
            grid = quantize.min_max(W, bits=3, each=8)
            stored[name] = quantize.gptq(W, stats.H.float(), grid)
            return stored[name]

        def inside(name, w):
            return name.startswith("blocks.")

        less = calibrate.sequential(model, [IDS], gptq, where=inside)
        assert len(stored) == 6 * 3 and not near(less(IDS), model(IDS), 1e-3)
        state = codes.encode(less, codes.value) | stored
        data = storage.dumps(less, state)
        assert len(data) < len(storage.dumps(model)) / 2
        assert torch.equal(storage.loads(data)(IDS), less(IDS))

    def test_low_rank(self):
        model = small().float()
        chosen = {"blocks.0.up": 4, "blocks.2.attention.q": 3}
        less = lowrank.factorize(
            model,
            {
                n: lowrank.svd(model.get_submodule(n).weight, rank=r)
                for n, r in chosen.items()
            },
        )
        again = storage.loads(storage.dumps(less))
        assert type(again) is models.GPT2
        assert torch.equal(again(IDS), less(IDS))

    def test_bits_per_token_and_texts(self):
        model = small().float()
        ids = IDS.flatten()
        logp = torch.stack(
            [model(ids[None, i - i % 8 : i + 1])[0, -1] for i in range(47)]
        ).log_softmax(-1)
        nats = -logp[torch.arange(47), ids[1:]].sum().item()
        bits = train.bits_per_char(model, ids)
        assert bits == pytest.approx(nats / 47 / math.log(2), rel=1e-5)
        by_byte = train.bits_per_char(model, ids, chars=100)
        assert by_byte == pytest.approx(bits * 47 / 100, rel=1e-9)
        written = distill.continuations(
            model, IDS[:2, :3], length=8, temperature=0
        )
        assert torch.equal(written[:, 3], model(IDS[:2, :3])[:, -1].argmax(-1))

    def test_macs_and_other_programs(self, tmp_path):
        model = small().float()
        assert measure.macs(model, IDS[:1]) == measure.macs(
            small(models.LM).float(), IDS[:1]
        )
        export.to_state_dict(tmp_path / "x.pt", model)
        found = torch.load(tmp_path / "x.pt")
        assert torch.equal(found["tokens.weight"], model.tokens.weight)
