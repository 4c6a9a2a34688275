"""The residual stream rotated: the same function, then fewer directions."""

import pytest
import torch
from shapes import randomized
from torch import nn

from minicompress import measure, models, prune, storage
from minicompress.prune import slicing

IDS = torch.randint(0, 20, (6, 8), generator=torch.Generator().manual_seed(0))


def lm(seed=0, tied=True):
    torch.manual_seed(seed)
    config = {"vocab": 20, "width": 16, "layers": 2, "heads": 4, "ff": 24}
    return randomized(models.LM(**config, context=8, tied=tied))


def orthogonal(n=16):
    g = torch.Generator().manual_seed(1)
    return torch.linalg.qr(torch.randn(n, n, generator=g).double())[0]


def equal(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-9 * b.abs().max().item())


class TestIdentities:
    def test_layer_norm_is_rms_norm_of_centered_inputs(self):
        x = torch.randn(5, 12, dtype=torch.float64)
        C = torch.eye(12).double() - 1 / 12
        layer, rms = (
            nn.LayerNorm(12).double(),
            nn.RMSNorm(12, eps=1e-5).double(),
        )
        assert equal(layer(x), rms(x @ C))
        assert not equal(layer(x), rms(x))

    def test_rms_norm_commutes_with_rotations_and_layer_norm_does_not(self):
        x, Q = torch.randn(5, 16, dtype=torch.float64), orthogonal()
        rms, layer = nn.RMSNorm(16).double(), nn.LayerNorm(16).double()
        assert equal(rms(x @ Q), rms(x) @ Q)
        assert not torch.allclose(layer(x @ Q), layer(x) @ Q, atol=1e-3)


class TestSameFunction:
    @pytest.mark.parametrize("tied", [True, False])
    def test_without_scales(self, tied):
        model = lm(tied=tied)
        plain = slicing.without_scales(model)
        assert equal(plain(IDS), model(IDS))
        norms = [m for m in plain.modules() if isinstance(m, nn.RMSNorm)]
        assert len(norms) == 5
        assert all((m.weight == 1).all() for m in norms)
        assert not any(isinstance(m, nn.LayerNorm) for m in plain.modules())

    def test_rotated(self):
        model = lm()
        plain = slicing.without_scales(model)
        turned = slicing.rotated(plain, orthogonal())
        assert equal(turned(IDS), model(IDS))
        assert not equal(turned.tokens.weight, plain.tokens.weight)

    def test_all_directions(self):
        model = lm()
        assert equal(prune.sliced(model, [IDS], width=16)(IDS), model(IDS))

    def test_the_model_is_left_alone(self):
        model = lm()
        before = {n: t.clone() for n, t in model.state_dict().items()}
        prune.sliced(model, [IDS], width=8)
        after = model.state_dict()
        assert all(torch.equal(after[n], t) for n, t in before.items())
        assert model.head.weight is model.tokens.weight


class TestPrincipal:
    def test_is_pca_of_what_the_norms_pass_on(self):
        plain = slicing.without_scales(lm())
        seen = []
        for m in plain.modules():
            if isinstance(m, nn.RMSNorm):
                m.register_forward_hook(
                    lambda m, a, out: seen.append(out.detach().flatten(0, 1))
                )
        plain(IDS)
        x = torch.cat(seen)
        for m in plain.modules():
            m._forward_hooks.clear()
        share, Q = slicing.principal(plain, [IDS[:3], (IDS[3:], None)])
        _, sizes, V = torch.linalg.svd(x, full_matrices=False)
        want = sizes.square() / sizes.square().sum()
        assert torch.allclose(share, want, atol=1e-9)
        clear = (want[:-1] - want[1:])[:8] > 1e-3
        overlap = (V[:8] @ Q[:, :8]).diagonal().abs()
        assert torch.allclose(
            overlap[clear], torch.ones(int(clear.sum())).double()
        )
        assert equal(Q.T @ Q, torch.eye(16).double())

    def test_components_beat_coordinates(self):
        """If the stream lies in a few directions, nothing is lost."""
        model = slicing.without_scales(lm())
        basis = orthogonal()[:, :6]
        low = basis @ basis.T  # onto six directions

        slicing._change(model, lambda rows: rows @ low, None)
        share, Q = slicing.principal(model, [IDS])
        assert share[6:].sum() < 1e-12
        turned = slicing.rotated(model, Q)
        keep = {"tokens": torch.arange(16) < 6}
        small = prune.remove_channels(turned, keep, IDS)
        for m in small.modules():
            if isinstance(m, nn.RMSNorm):
                m.weight.data *= (16 / 6) ** 0.5
        exact = (small(IDS) - model(IDS)).abs().max()
        plain = prune.remove_channels(model, keep, IDS)
        assert exact < 1e-4 * (plain(IDS) - model(IDS)).abs().max()


class TestSliced:
    def test_size_and_file(self):
        model = lm()
        small = prune.sliced(model, [IDS], width=8)
        assert small.tokens.embedding_dim == 8
        # embeddings, per block: q k v, out, up, down, two norms; norm, head
        block = 3 * (8 * 16 + 16) + (16 * 8 + 8)
        block += (8 * 24 + 24) + (24 * 8 + 8) + 2 * 8
        want = (20 + 8) * 8 + 2 * block + 8 + (8 * 20 + 20)
        assert measure.params(small) == want
        again = storage.loads(storage.dumps(small.float()))
        assert torch.equal(again(IDS), small(IDS))

    def test_errors(self):
        with pytest.raises(ValueError, match="width must be 1 to 16, got 17"):
            prune.sliced(lm(), [IDS], width=17)
        with pytest.raises(ValueError, match="batches: there are none"):
            prune.sliced(lm(), [], width=8)
        with pytest.raises(ValueError, match=r"LM with nn.LayerNorm, got MLP"):
            prune.sliced(models.MLP(), [IDS], width=8)
        with pytest.raises(ValueError, match=r"nn.RMSNorm, got LM with Layer"):
            slicing.rotated(lm(), orthogonal())
        with pytest.raises(ValueError, match=r"Q must be \(16, 16\), got"):
            slicing.rotated(slicing.without_scales(lm()), torch.eye(4))
