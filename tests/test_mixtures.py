"""Soft weight-sharing against scipy, scikit-learn and k-means."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from sklearn.mixture import GaussianMixture
from torch import nn

from minicompress import codes, share, storage, train

MEANS = torch.tensor([-0.5, 0.0, 0.1, 0.8], dtype=torch.float64)
LOG_VARIANCES = torch.tensor([-4.0, -5.0, -2.0, -3.0], dtype=torch.float64)
LOGITS = torch.tensor([0.0, 2.0, -1.0, 0.5], dtype=torch.float64)
ALL = (MEANS, LOG_VARIANCES, LOGITS)


@pytest.fixture(autouse=True)
def one_thread():
    with train.threads(1):
        yield


def drawn(*size, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=g, dtype=torch.float64)


def by_scipy(w, means, log_variances, logits):
    """log π_k N(w_i) as numpy, the last axis k."""
    log_pi = logits.numpy() - logsumexp(logits.numpy())
    sigma = np.exp(log_variances.numpy() / 2)
    return log_pi + stats.norm.logpdf(
        w.numpy()[..., None], means.numpy(), sigma
    )


class TestPenalty:
    def test_is_minus_log_of_the_mixture(self):
        w = drawn(6, 7)
        want = -logsumexp(by_scipy(w, *ALL), axis=-1).sum()
        got = float(share.mixture_penalty(w, *ALL))
        assert got == pytest.approx(want, rel=1e-12)

    def test_is_that_of_scikit_learn(self):
        w = torch.cat([drawn(200) * 0.1, drawn(100, seed=1) * 0.3 + 1])
        peer = GaussianMixture(3, random_state=0).fit(w[:, None].numpy())
        own = [
            torch.from_numpy(x)
            for x in (
                peer.means_[:, 0],
                np.log(peer.covariances_[:, 0, 0]),
                np.log(peer.weights_),
            )
        ]
        want = -peer.score_samples(w[:, None].numpy()).sum()
        got = float(share.mixture_penalty(w, *own))
        assert got == pytest.approx(want, rel=1e-9)
        got = share.responsibilities(w, *own).numpy()
        want = peer.predict_proba(w[:, None].numpy())
        np.testing.assert_allclose(got, want, atol=1e-9)
        code = share.collapse(w, *own).decode()
        want = peer.means_[peer.predict(w[:, None].numpy()), 0]
        np.testing.assert_allclose(code.numpy(), want)

    def test_one_component_at_zero_is_weight_decay(self):
        w, zero = drawn(50).requires_grad_(), torch.zeros(1).double()
        v = torch.tensor([0.3], dtype=torch.float64)
        share.mixture_penalty(w, zero, v.log(), zero).backward()
        torch.testing.assert_close(w.grad, w.detach() / v)

    def test_far_from_every_mean_it_stays_finite(self):
        w = torch.tensor([1e4, -1e4], requires_grad=True)
        narrow = torch.full((4,), -12.0)
        penalty = share.mixture_penalty(
            w, MEANS.float(), narrow, LOGITS.float()
        )
        penalty.backward()
        want = (1e4 - 0.8) * math.exp(12)  # pulled by the nearest alone
        assert penalty.isfinite()
        assert float(w.grad[0]) == pytest.approx(want, rel=1e-5)

    def test_gradients_by_responsibilities(self):
        w = drawn(30)
        parts = [t.clone().requires_grad_() for t in (w, *ALL)]
        share.mixture_penalty(*parts).backward()
        r = share.responsibilities(w, *ALL)
        assert torch.equal(r, share.responsibilities(*parts).detach())
        off = (w[:, None] - MEANS) / LOG_VARIANCES.exp()
        pi = LOGITS.softmax(0)
        wants = [
            (r * off).sum(1),
            -(r * off).sum(0),
            (r * (1 - off.square() * LOG_VARIANCES.exp())).sum(0) / 2,
            30 * pi - r.sum(0),
        ]
        for part, want in zip(parts, wants, strict=True):
            torch.testing.assert_close(part.grad, want)

    def test_logits_count_only_by_their_differences(self):
        w = drawn(10)
        a = share.mixture_penalty(w, *ALL)
        b = share.mixture_penalty(w, MEANS, LOG_VARIANCES, LOGITS + 5)
        torch.testing.assert_close(a, b)

    def test_a_component_that_narrows_gains_without_end(self):
        """Which is what the prior on the precisions is for."""
        w, means = drawn(10), torch.zeros(2).double()
        means[1] = w[3]
        equal = torch.zeros(2, dtype=torch.float64)
        penalties, bounded = [], []
        for log_v in (0.0, -20.0, -40.0, -60.0):
            both = torch.tensor([0.0, log_v], dtype=torch.float64)
            p = share.mixture_penalty(w, means, both, equal)
            penalties.append(float(p))
            prior = share.precision_penalty(both, shape=5.0, rate=0.1)
            bounded.append(float(p + prior))
        assert np.diff(penalties)[1:] == pytest.approx([-10, -10], abs=1e-4)
        assert bounded.index(min(bounded)) == 0


class TestResponsibilities:
    def test_sum_to_one(self):
        r = share.responsibilities(drawn(5, 6), *ALL)
        assert r.shape == (5, 6, 4)
        torch.testing.assert_close(r.sum(-1), torch.ones(5, 6).double())

    def test_narrow_components_are_k_means(self):
        w = drawn(200)
        c = share.kmeans(w, bits=2).centroids
        equal = torch.zeros(4, dtype=torch.float64)
        r = share.responsibilities(w, c, equal - 20, equal)
        nearest = (w[:, None] - c).abs().argmin(1)
        want = nn.functional.one_hot(nearest, 4).double()
        torch.testing.assert_close(r, want)
        code = share.collapse(w, c, equal - 20, equal)
        want = share.kmeans(w, bits=2)
        assert torch.equal(code.index.values, want.index.values)
        assert torch.equal(code.decode(), want.decode())
        # and 2 σ² of the penalty is the squared error
        scaled = (
            2 * math.exp(-20) * share.mixture_penalty(w, c, equal - 20, equal)
        )
        error = (code.decode() - w).square().sum()
        torch.testing.assert_close(scaled, error, rtol=1e-4, atol=0)
        # a step of EM is a step of k-means: the means stay
        torch.testing.assert_close((r * w[:, None]).sum(0) / r.sum(0), c)


class TestPriors:
    def test_precisions_by_scipy(self):
        a, b = 3.0, 0.2
        v = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)
        own = [
            float(share.precision_penalty(x.log()[None], shape=a, rate=b))
            for x in v
        ]
        want = -stats.gamma.logpdf(1 / v.numpy(), a, scale=1 / b)
        np.testing.assert_allclose(np.diff(own), np.diff(want))
        both = share.precision_penalty(v.log(), shape=a, rate=b)
        assert float(both) == pytest.approx(sum(own))

    @pytest.mark.parametrize("zeros", [0.5, 0.99, 0.999])
    def test_the_zero_is_held(self, zeros):
        means, logits = share.with_zero(MEANS, LOGITS, zeros=zeros)
        pi = logits.softmax(0)
        assert means.tolist() == [0, *MEANS.tolist()]
        assert float(pi[0]) == pytest.approx(zeros)
        torch.testing.assert_close(pi[1:], (1 - zeros) * LOGITS.softmax(0))

    def test_no_gradient_moves_the_zero(self):
        m, z = MEANS.clone().requires_grad_(), LOGITS.clone().requires_grad_()
        means, logits = share.with_zero(m, z)
        logits.log_softmax(0)[0].backward()
        assert z.grad.abs().max() < 1e-12
        means[0].backward()
        assert (m.grad == 0).all()

    def test_errors(self):
        for zeros in (0, 1, 1.5):
            with pytest.raises(ValueError, match=f"got {zeros}"):
                share.with_zero(MEANS, LOGITS, zeros=zeros)


class TestMixture:
    def test_finds_the_clusters_of_weights(self):
        """Weights of three heaps: all means that are in use move there."""
        w = torch.cat([drawn(300) * 0.01, drawn(50, seed=1) * 0.02 + 0.7])
        w = torch.cat([w, drawn(50, seed=2) * 0.02 - 0.4])
        start = share.Mixture(w, clusters=6, zeros=0.75)

        def loss(mixture, batch):
            prior = share.precision_penalty(
                mixture.log_variances, shape=100.0, rate=0.04
            )
            return mixture(w) + prior

        mixture = train.fit(start, [0] * 300, loss, lr=0.02)
        got = share.collapse(w, *mixture.components()).decode()
        want = torch.tensor([0, 0.7, -0.4]).double()
        want = want.repeat_interleave(torch.tensor([300, 50, 50]))
        assert (got[:300] == 0).all()
        torch.testing.assert_close(got, want, atol=0.01, rtol=0)
        before = share.collapse(w, *start.components()).decode()
        assert (before - want).abs().max() > 0.04

    def test_starts_over_the_range_of_the_weights(self):
        w = drawn(4, 50).float()
        mixture = share.Mixture(w, clusters=9)
        means, log_variances, logits = mixture.components()
        assert means[0] == 0 and means[1] == w.min() and means[-1] == w.max()
        steps = means[1:].diff()
        torch.testing.assert_close(steps, steps[:1].expand(7))
        torch.testing.assert_close(
            log_variances.exp().sqrt(), (steps[:1] / 2).expand(9)
        )
        assert float(logits.softmax(0)[0].detach()) == pytest.approx(0.99)
        whole = mixture(w[:2], w[2:])
        torch.testing.assert_close(whole, mixture(w))
        want = share.mixture_penalty(w, means, log_variances, logits)
        torch.testing.assert_close(whole, want)

    def test_draws_weights_of_a_network_together_and_prunes(self):
        torch.manual_seed(0)
        X = drawn(256, 20).float()
        y = (X[:, 0] - X[:, 1] > 0).long()  # two inputs of 20 matter
        feed = train.batches(X, y, size=32, epochs=40)
        net = train.fit(nn.Linear(20, 2), feed, lr=0.02)
        both = nn.ModuleDict(
            {"net": net, "mixture": share.Mixture(net.weight, clusters=5)}
        )

        def soft(by):
            def loss(model, batch):
                net, mixture = model["net"], model["mixture"]
                prior = share.precision_penalty(
                    mixture.log_variances, shape=50.0, rate=0.02
                )
                penalty = mixture(net.weight) + prior
                return train.cross_entropy(net, batch) + by * penalty / len(X)

            return loss

        def lost(model):
            w = model["net"].weight.detach()
            code = share.collapse(w, *model["mixture"].components())
            return code, float((code.decode() - w).square().mean())

        tied, free = (train.fit(both, feed, soft(by), lr=0.02) for by in (1, 0))
        code, error = lost(tied)
        assert error < 0.05 * lost(free)[1]
        kept = (code.decode() != 0).sum(0)
        assert kept[:2].tolist() == [2, 2] and kept[2:].sum() < 10
        small = replace_weight(net, code)
        assert train.accuracy(small, X, y) > train.accuracy(net, X, y) - 0.03

    def test_errors(self):
        with pytest.raises(ValueError, match="at least 3, got 2"):
            share.Mixture(drawn(5), clusters=2)
        with pytest.raises(ValueError, match=r"w \(5,\) holds only 1"):
            share.Mixture(torch.ones(5), clusters=4)


def replace_weight(net, code):
    new = nn.Linear(20, 2)
    new.load_state_dict({"weight": code.decode(), "bias": net.bias})
    return new


class TestCollapse:
    def test_goes_to_the_most_responsible_not_to_the_nearest(self):
        w = drawn(500)
        code = share.collapse(w, *ALL)
        best = by_scipy(w, *ALL).argmax(-1)
        assert torch.equal(code.decode(), MEANS[best])
        nearest = (w[:, None] - MEANS).abs().argmin(1)
        assert (torch.from_numpy(best) != nearest).any()

    def test_means_without_weights_are_left_out(self):
        w = torch.tensor([[0.0, 0.01], [0.79, 0.0]]).double()
        code = share.collapse(w, *ALL)
        assert torch.equal(code.centroids, MEANS[[1, 3]])
        assert code.index.bits == 1 and code.shape == (2, 2)

    def test_sparse_and_shared_in_a_file(self):
        w = drawn(30, 40).float() * 0.3
        code = share.collapse(w, *ALL)
        dense = code.decode()
        assert dense.dtype == torch.float32
        s = codes.sparse(dense, dense != 0)
        s = replace(s, values=share.kmeans(s.values, bits=2))
        assert torch.equal(s.decode(), dense)
        model = nn.Linear(40, 30, bias=False)
        data = storage.dumps(model, {"weight": s})
        assert torch.equal(storage.loads(data, like=model).weight, dense)

    def test_nothing_else_changes(self):
        w = drawn(9).requires_grad_()
        before = [t.detach().clone() for t in (w, *ALL)]
        code = share.collapse(w, *ALL)
        share.mixture_penalty(w, *ALL)
        share.responsibilities(w, *ALL)
        assert not code.centroids.requires_grad
        for a, b in zip((w, *ALL), before, strict=True):
            assert torch.equal(a, b)

    def test_errors(self):
        w, many = drawn(3), torch.zeros(300)
        with pytest.raises(ValueError, match="1 to 256, got 300"):
            share.collapse(w, many, many, many)
        with pytest.raises(ValueError, match=r"logits \(3,\) must have one"):
            share.mixture_penalty(w, MEANS, LOG_VARIANCES, LOGITS[:3])
