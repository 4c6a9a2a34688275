"""The space of Transformers: closed forms, one description each, files."""

import random
from collections import defaultdict
from copy import deepcopy

import pytest
import torch

from minicompress import measure, models, nas, storage, train

VOCAB, CONTEXT = 40, 8
SHARING = ("none", "pairs", "all")
IDS = torch.randint(
    0, VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(0)
)
BASE = {
    "width": 32,
    "layers": 4,
    "heads": 4,
    "ff_ratio": 2,
    "sharing": "none",
    "embedding": 0,
}


def built(seed=0, **changes):
    torch.manual_seed(seed)
    return nas.transformer(BASE | changes, vocab=VOCAB, context=CONTEXT)


def sampled(n=25):
    space, rng = nas.transformer_space(), random.Random(0)
    return [space.sample(rng) for _ in range(n)]


def params(arch):
    """Count as one does on paper."""
    w, n, E = arch["width"], arch["layers"], arch["embedding"]
    f = w * arch["ff_ratio"]
    block = 4 * (w * w + w) + (w * f + f) + (f * w + w) + 2 * 2 * w
    blocks = {"none": n, "pairs": -(-n // 2), "all": 1}[arch["sharing"]]
    table = VOCAB * E + 2 * E * w if E else VOCAB * w
    return table + CONTEXT * w + blocks * block + 2 * w


def macs(arch, T=CONTEXT):
    """Count for T tokens; attention without regard to causality."""
    w, n, E = arch["width"], arch["layers"], arch["embedding"]
    block = T * (4 * w * w + 2 * w * w * arch["ff_ratio"]) + 2 * T * T * w
    ends = T * (E * w + w * E + E * VOCAB) if E else T * w * VOCAB
    return n * block + ends


class TestSpace:
    def test_count(self):
        # sharing: 1 way for one layer, 2 for two, 3 for more; (layers) 1, 2,
        # 3, 4, 6 make 12.  All heads divide all widths.  Tables: 0 and 16
        # everywhere, 32 for the three widths above it.
        tables = 3 * 3 + 2
        space = nas.transformer_space()
        assert len(list(space)) == tables * 12 * 3 * 3 == 1188

    def test_every_description_is_another_network(self):
        found = defaultdict(list)
        small = nas.transformer_space(
            width=(8, 16),
            layers=(1, 2, 3, 4),
            heads=(1, 2, 3),
            ff_ratio=(1,),
            embedding=(0, 8),
        )
        for arch in small:
            model = nas.transformer(arch, vocab=VOCAB, context=CONTEXT)
            ids = [id(block.up.weight) for block in model.blocks]
            ties = tuple(ids.index(i) for i in ids)
            dim = model.blocks[0].attention.head_dim
            found[(ties, dim, params(arch))].append(arch)
        assert all(len(same) == 1 for same in found.values())
        assert len(found) == 2 * (1 + 2 + 3 + 3) + 2 * 2 * (1 + 2 + 3 + 3)

    def test_what_is_left_out(self):
        accepts = nas.transformer_space().accepts
        assert accepts(BASE)
        for wrong in (
            {"layers": 1, "sharing": "all"},
            {"layers": 1, "sharing": "pairs"},
            {"layers": 2, "sharing": "pairs"},
            {"heads": 3},
            {"embedding": 32},
        ):
            assert not accepts(BASE | wrong)

    def test_children_and_mutants_can_be_built(self):
        space, rng = nas.transformer_space(), random.Random(1)
        a, b = space.sample(rng), space.sample(rng)
        for _ in range(20):
            a, b = space.cross(a, b, rng), space.mutate(b, rng)
            model = nas.transformer(a, vocab=VOCAB, context=CONTEXT)
            assert model(IDS).shape == (3, CONTEXT, VOCAB)

    def test_encoding_there_and_back(self):
        space = nas.transformer_space()
        for arch in sampled(5):
            assert space.decode(space.encode(arch)) == arch


class TestNetwork:
    @pytest.mark.parametrize("arch", sampled(), ids=str)
    def test_parameters_and_macs(self, arch):
        model = nas.transformer(arch, vocab=VOCAB, context=CONTEXT)
        assert measure.params(model) == params(arch)
        assert measure.macs(model, IDS) == macs(arch)
        assert not any(p.is_meta for p in model.parameters())

    def test_without_sharing_it_is_the_library_s_model(self):
        torch.manual_seed(3)
        plain = models.LM(
            vocab=VOCAB, width=32, layers=4, heads=4, ff=64, context=CONTEXT
        )
        mine = built(seed=3)
        assert list(mine.state_dict()) == list(plain.state_dict())
        assert torch.equal(mine(IDS), plain(IDS))

    @pytest.mark.parametrize(
        "layers, sharing, owners",
        [
            (3, "none", [0, 1, 2]),
            (3, "pairs", [0, 0, 2]),
            (4, "pairs", [0, 0, 2, 2]),
            (4, "all", [0, 0, 0, 0]),
        ],
    )
    def test_who_shares(self, layers, sharing, owners):
        blocks = built(layers=layers, sharing=sharing).blocks
        for name, p in blocks[0].named_parameters():
            ids = [id(b.get_parameter(name)) for b in blocks]
            assert [ids.index(i) for i in ids] == owners, name
            assert id(p) == ids[0]

    def test_shared_blocks_compute_like_copies(self):
        shared = built(sharing="all")
        apart = built()
        apart.load_state_dict(shared.state_dict())
        assert torch.equal(shared(IDS), apart(IDS))
        assert measure.params(apart) > measure.params(shared)

    def test_a_factorized_table_is_the_product(self):
        thin = built(embedding=16)
        full = built()
        table, down = thin.tokens
        state = full.state_dict() | {
            n: t for n, t in thin.state_dict().items() if n in full.state_dict()
        }
        state["tokens.weight"] = table.weight @ down.weight.T
        state["head.weight"] = table.weight @ thin.head[0].weight
        full.head.weight = torch.nn.Parameter(state["head.weight"])
        full.load_state_dict(state)
        assert torch.allclose(thin(IDS), full(IDS), atol=1e-5)

    def test_the_output_layer_is_the_table(self):
        thin = built(embedding=16)
        assert thin.head[1].weight is thin.tokens[0].weight
        assert thin.head[0].weight is not thin.tokens[1].weight
        assert torch.equal(thin.head[0].weight, thin.tokens[1].weight.T)
        full = built()
        assert full.head.weight is full.tokens.weight

    @pytest.mark.parametrize("E", [0, 8, 16])
    def test_both_tables_start_alike(self, E):
        torch.manual_seed(0)
        arch = BASE | {"width": 64, "embedding": E}
        model = nas.transformer(arch, vocab=2000, context=CONTEXT)
        rows = model.tokens(torch.arange(2000))
        assert abs(rows.std().item() * 8 - 1) < 0.1  # 1 / sqrt(64)
        x = torch.nn.functional.layer_norm(torch.randn(500, 64), (64,))
        assert abs(model.head(x).std().item() - 1) < 0.25

    def test_the_gradient_of_a_shared_block_is_a_sum(self):
        shared, apart = built(sharing="all"), built()
        apart.load_state_dict(shared.state_dict())
        for model in (shared, apart):
            train.cross_entropy(model, (IDS[:, :-1], IDS[:, 1:])).backward()
        parts = [block.up.weight.grad for block in apart.blocks]
        whole = shared.blocks[0].up.weight.grad
        assert torch.allclose(whole, sum(parts), atol=1e-6)

    def test_training_keeps_what_is_shared(self):
        model = built(sharing="pairs", embedding=16)
        before = deepcopy(model.state_dict())
        feed = [(IDS[:, :-1], IDS[:, 1:])] * 3
        tuned = train.fit(model, feed, lr=1e-2)
        size = measure.params(model)
        assert measure.params(tuned) == size
        assert not torch.equal(tuned(IDS), model(IDS))
        assert all(
            torch.equal(model.state_dict()[n], t) for n, t in before.items()
        )

    @pytest.mark.parametrize("arch", sampled(8), ids=str)
    def test_files(self, arch):
        model = nas.transformer(arch, vocab=VOCAB, context=CONTEXT)
        data = storage.dumps(model)
        for like in (None, model):
            again = storage.loads(data, like=like)
            assert torch.equal(again(IDS), model(IDS))
            assert measure.params(again) == params(arch)
        head = len(data) - 4 * params(arch)
        assert 0 < head < 8000  # names, not weights

    def test_shared_blocks_are_stored_once(self):
        sizes = [len(storage.dumps(built(sharing=s))) for s in SHARING]
        block = 4 * sum(p.numel() for p in built().blocks[0].parameters())
        none, pairs, all_ = sizes
        assert none - pairs > 1.9 * block
        assert none - all_ > 2.9 * block

    def test_unknown_sharing(self):
        with pytest.raises(ValueError, match="sharing: 'some'"):
            built(sharing="some")

    def test_heads_divide_the_width(self):
        with pytest.raises(ValueError, match="heads"):
            built(heads=5)

    def test_on_the_meta_device(self):
        with torch.device("meta"):
            model = built(sharing="pairs", embedding=16)
        assert all(p.is_meta for p in model.parameters())
        assert model(IDS.to("meta")).shape == (3, CONTEXT, VOCAB)


class TestLatency:
    def test_blocks_are_the_parts(self):
        block = (models.language.Block,)
        model = built(sharing="pairs")
        table = nas.latency_table([(model, IDS)], parts=block, repeats=1)
        calls = table.calls(model, IDS)
        uses = {k.partition("(")[0]: n for k, n in calls.items()}
        assert uses["PreNorm"] == 4
        assert len(calls) == 5  # table, positions, block, norm, head

    def test_sharing_costs_as_much_time_as_none(self):
        block = (models.language.Block,)
        table = nas.latency_table([(built(), IDS)], parts=block, repeats=1)
        times = {table.seconds(built(sharing=s), IDS) for s in SHARING}
        assert len(times) == 1
