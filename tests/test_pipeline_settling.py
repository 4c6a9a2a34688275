"""Shared values that weights may still choose."""

import pytest
import torch
from torch import nn

from minicompress import pipeline, prune, share, through, train
from minicompress.pipeline.settling import nearest


def still(model):
    return model


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


class TestNearest:
    def test_it_is_the_nearest(self):
        g = torch.Generator().manual_seed(0)
        w, c = torch.randn(40, generator=g), torch.randn(5, generator=g)
        mask = torch.rand(40, generator=g) < 0.7
        want = c[(w[:, None] - c).abs().argmin(1)] * mask
        assert torch.equal(nearest(w, c, mask), want)

    def test_gradients_by_hand(self):
        g = torch.Generator().manual_seed(1)
        w = torch.randn(30, generator=g).requires_grad_()
        c = torch.randn(4, generator=g).requires_grad_()
        mask, up = torch.rand(30, generator=g) < 0.6, torch.randn(30)
        (nearest(w, c, mask) * up).sum().backward()
        assert torch.equal(w.grad, up * mask)
        own = (w[:, None] - c).abs().argmin(1)
        for k in range(4):
            sum_k = (up * mask)[own == k].sum()
            torch.testing.assert_close(c.grad[k], sum_k)

    def test_a_value_far_away_stays_exact(self):
        w = torch.tensor([1e-30, 3e4])
        c = torch.tensor([0.1, 12345.678])
        assert torch.equal(nearest(w, c, torch.ones(2).bool()), c)


class TestSettled:
    def test_without_training_it_is_k_means(self):
        model = network()
        made = pipeline.settled(model, still, bits=2)
        want = share.kmeans(model[0].weight.detach(), bits=2).decode()
        torch.testing.assert_close(made[0].weight.detach(), want)
        assert torch.equal(made[0].bias, model[0].bias)

    def test_few_values_zeros_stay_and_the_input_too(self):
        model = network()
        masks = prune.keep_global(prune.magnitudes(model), sparsity=0.7)
        model = through.bake(prune.masked(model, masks))
        before = [p.clone() for p in model.parameters()]
        X = torch.randn(200, 12, generator=torch.Generator().manual_seed(0))
        feed = train.batches(X, X[:, :4].argmax(1), epochs=5)
        fit = pipeline.finetuning(feed, lr=0.02)
        made = pipeline.settled(
            model, fit, bits={"0.weight": 2, "2.weight": 1}, bias_bits=2
        )
        for old, p in zip(before, model.parameters(), strict=True):
            assert torch.equal(old, p)
        for layer, K in ((0, 4), (2, 2)):
            w, mask = made[layer].weight, model[layer].weight != 0
            assert torch.equal(w != 0, mask)
            assert len(w[mask].unique()) <= K
        assert len(made[0].bias.unique()) <= 4  # 16 of them
        assert len(made[2].bias.unique()) == 4  # too few to share
        state = pipeline.clustered(
            made, bits={"0.weight": 2, "2.weight": 1}, bias_bits=2
        )[1]
        again = pipeline.realized(made, state)
        for p, q in zip(made.parameters(), again.parameters(), strict=True):
            torch.testing.assert_close(p, q)

    def test_weights_change_their_value_and_that_helps(self):
        X = torch.randn(400, 12, generator=torch.Generator().manual_seed(0))
        y = (X[:, :4] ** 2).argmax(1)
        parts = {"size": 32, "epochs": 15}
        wide = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 4))
        gain, moved = [], 0
        for seed in range(3):
            feed = train.batches(X, y, **parts, seed=seed)
            fit = pipeline.finetuning(feed, lr=0.01)
            torch.manual_seed(seed)
            for layer in (wide[0], wide[2]):
                layer.reset_parameters()
            model = fit(wide)
            fixed, state = pipeline.clustered(model, fit, bits=1)
            free = pipeline.settled(model, fit, bits=1)
            ends = [train.accuracy(m, X, y) for m in (fixed, free)]
            gain.append(ends[1] - ends[0])
            first = state["0.weight"].index.decode()
            w = free[0].weight
            moved += int(((w > w.mean()) != first.bool()).sum())
        assert moved > 100
        assert min(gain) > 0.02

    @pytest.mark.parametrize("bits", [{"no": 2}, {"0.weight": 9}])
    def test_wrong_bits(self, bits):
        with pytest.raises(ValueError, match="bits"):
            pipeline.settled(network(), still, bits=bits)
