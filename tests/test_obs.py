"""Oracles of the OBS loop: explicit updates, least squares, degenerate H."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicompress import obs


def case(out=6, n=12, rows=200, seed=0, dtype=torch.float64):
    """Weights and the second moments of strongly correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(out, n, generator=g, dtype=dtype)
    mix = torch.randn(n, n, generator=g, dtype=dtype)
    X = torch.randn(rows, n, generator=g, dtype=dtype) @ (mix + 1)
    return W, X.T @ X / rows, X


def grid(step):
    return lambda w: (w / step).round() * step


def rounding(step):
    return lambda block, d, columns: lambda i, w: grid(step)(w)


def sparsegpt(block, d, columns):
    """Keep the half of each block whose loss w^2 / d^2 is larger."""
    score = (block / d) ** 2
    k = score.numel() // 2
    keep = score >= score.flatten().kthvalue(k + 1).values
    return lambda i, w: w * keep[:, i]


def two_four(block, d, columns):
    """2:4, chosen from the weights as they are when a group of 4 starts."""
    keep = torch.zeros(block.shape, dtype=torch.bool)

    def rule(i, w):
        if i % 4 == 0:
            score = (block[:, i : i + 4] / d[i : i + 4]) ** 2
            keep[:, i : i + 4].scatter_(1, score.topk(2, 1).indices, True)
        return w * keep[:, i]

    return rule


def explicit(W, H, decide):
    """Fix columns left to right, inverting the rest of H afresh each time."""
    W = W.clone()
    for j in range(W.shape[1]):
        Hinv = torch.linalg.inv(H[j:, j:])
        q = decide(j, W[:, j], W)
        step = (W[:, j] - q) / Hinv[0, 0]
        W[:, j:] -= torch.outer(step, Hinv[0])
        W[:, j] = q
    return W


def test_factor_is_the_upper_cholesky_factor_of_the_inverse():
    _, H, _ = case(n=300, rows=900)
    U = obs.factor(H, damp=0.01)
    A = H + 0.01 * H.diagonal().mean() * torch.eye(300)
    want = torch.linalg.cholesky(torch.linalg.inv(A), upper=True)
    torch.testing.assert_close(U, want, rtol=1e-8, atol=1e-10)
    assert torch.equal(U, U.triu())


def test_rounding_equals_the_explicit_update():
    W, H, _ = case()
    Q, _ = obs.sweep(W, H, rounding(0.5), damp=0)
    want = explicit(W, H, lambda j, w, W: grid(0.5)(w))
    torch.testing.assert_close(Q, want, rtol=0, atol=1e-9)


def test_masking_equals_the_explicit_update():
    W, H, _ = case()
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) > 0.5

    def choose(block, d, columns):
        return lambda i, w: w * keep[:, columns[i]]

    Q, _ = obs.sweep(W, H, choose, damp=0, block=5)
    want = explicit(W, H, lambda j, w, W: w * keep[:, j])
    torch.testing.assert_close(Q, want, rtol=0, atol=1e-9)
    assert torch.equal(Q != 0, keep)


def test_n_m_masks_see_the_live_weights():
    W, H, _ = case()
    keep = torch.zeros(W.shape, dtype=torch.bool)

    def decide(j, w, W):
        if j % 4 == 0:
            U = torch.linalg.inv(torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1))
            score = (W[:, j : j + 4] / U.diagonal()[j : j + 4]) ** 2
            keep[:, j : j + 4].scatter_(1, score.topk(2, 1).indices, True)
        return w * keep[:, j]

    want = explicit(W, H, decide)
    Q, _ = obs.sweep(W, H, two_four, damp=0)
    torch.testing.assert_close(Q, want, rtol=0, atol=1e-9)
    assert ((Q.reshape(6, 3, 4) != 0).sum(-1) == 2).all()


def test_diagonal_entries_are_those_of_the_trailing_inverse():
    _, H, _ = case()
    U = obs.factor(H, damp=0)
    for j in range(len(H)):
        trailing = torch.linalg.inv(H[j:, j:])
        assert U[j, j] ** 2 == pytest.approx(trailing[0, 0].item(), rel=1e-8)


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 24), block=st.integers(1, 30), seed=st.integers(0, 2**16)
)
def test_the_block_size_is_irrelevant(n, block, seed):
    W, H, _ = case(n=n, seed=seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    one, _ = obs.sweep(W, H, rounding(1.0), block=1, order=order)
    Q, _ = obs.sweep(W, H, rounding(1.0), block=block, order=order)
    torch.testing.assert_close(Q, one)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 24), seed=st.integers(0, 2**16))
@pytest.mark.parametrize("choose", [rounding(0.7), sparsegpt])
def test_loss_is_the_sum_of_squared_errors(choose, n, seed):
    W, H, _ = case(n=n, seed=seed)
    Q, loss = obs.sweep(W, H, choose, block=8)
    A = obs.damped(H)
    want = ((W - Q) @ A @ (W - Q).T).diagonal()
    torch.testing.assert_close(loss, want, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(obs.layer_loss(W, Q, A), want)


@pytest.mark.parametrize("h", ["identity", "diagonal"])
def test_without_correlation_it_is_plain_rounding_and_masking(h):
    W, H, _ = case(dtype=torch.float32)
    H = torch.eye(12) if h == "identity" else H.diagonal().diag()
    Q, _ = obs.sweep(W, H, rounding(0.25), damp=0)
    assert torch.equal(Q, grid(0.25)(W))
    # SparseGPT is then Wanda over the block: |w| * sqrt(H_jj)
    Q, _ = obs.sweep(W, H, sparsegpt, damp=0)
    score = W.abs() * H.diagonal().sqrt()
    keep = score > score.flatten().sort().values[W.numel() // 2 - 1]
    assert torch.equal(Q, W * keep)


def test_the_update_is_what_beats_rounding():
    W, H, X = case(out=64, n=32, rows=500)
    Q, _ = obs.sweep(W, H, rounding(1.0))
    plain, _ = obs.sweep(W, H.diagonal().diag(), rounding(1.0))  # knocked out
    assert torch.equal(plain, W.round())
    ratio = obs.layer_loss(W, Q, H).sum() / obs.layer_loss(W, plain, H).sum()
    assert ratio < 0.5
    direct = ((W - Q) @ X.T).square().sum() / ((W - plain) @ X.T).square().sum()
    assert ratio.item() == pytest.approx(direct.item())


def test_order_is_undone_and_reported_to_choose():
    W, H, _ = case()
    order = obs.activation_order(H)
    assert (H.diagonal()[order].diff() <= 0).all()
    seen = []

    def choose(block, d, columns):
        seen.append(columns)
        return lambda i, w: grid(0.5)(w)

    Q, loss = obs.sweep(W, H, choose, block=5, order=order)
    assert torch.equal(torch.cat(seen), order)
    want, same = obs.sweep(
        W[:, order], H[order][:, order], rounding(0.5), block=5
    )
    assert torch.equal(Q[:, order], want)
    assert torch.equal(loss, same)


def test_inputs_are_not_modified():
    W, H, _ = case(dtype=torch.float32)
    before = W.clone(), H.clone()
    obs.sweep(W, H, sparsegpt)
    obs.factor(H)
    obs.surgeon(W, H, 3)
    obs.downdate(H, 3)
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


def test_dead_and_repeated_inputs():
    W, H, X = case(dtype=torch.float32)
    X = X[:5].clone()  # fewer samples than inputs: H is singular
    X[:, 3] = 0
    H = X.T @ X / 5
    Q, _ = obs.sweep(W, H, rounding(0.5))
    assert Q.isfinite().all()
    assert torch.equal(Q[:, 3], grid(0.5)(W[:, 3]))
    Q, _ = obs.sweep(W, H, sparsegpt)
    assert (Q[:, 3] == 0).all()  # a weight without input goes first
    zero = torch.zeros(12, 12)
    Q, _ = obs.sweep(W, zero, rounding(0.5))
    assert torch.equal(Q, grid(0.5)(W))


def test_float32_agrees_with_float64_and_half_types_work():
    W, H, _ = case(out=32, n=64, rows=500)
    _, loss = obs.sweep(W, H, lambda *_: lambda i, w: w * (w.abs() > 0.5))
    q, l = obs.sweep(W.float(), H, lambda *_: lambda i, w: w * (w.abs() > 0.5))
    assert q.dtype == torch.float32
    torch.testing.assert_close(l.sum(), loss.sum().float(), rtol=0.02, atol=0)
    b, _ = obs.sweep(W.bfloat16(), H, rounding(0.5))
    assert b.dtype == torch.bfloat16
    assert torch.equal(b.float(), grid(0.5)(b.float()))


def test_float32_falls_back_to_float64():
    n = 40
    i = torch.arange(1, n + 1, dtype=torch.float64)
    H = torch.exp(-(((i[:, None] - i) / 8) ** 2)).float()
    A = obs.damped(H, damp=1e-7).flip(0, 1)
    _, failed = torch.linalg.cholesky_ex(A)
    assert failed  # positive, but too ill-conditioned for float32
    U = obs.factor(H, damp=1e-7)
    assert torch.equal(U, obs.factor(H.double(), damp=1e-7).float())


@pytest.mark.parametrize("q", [0, 4, 11])
def test_surgeon_is_the_constrained_optimum(q):
    W, H, _ = case()
    got = obs.surgeon(W, torch.linalg.inv(H), q)
    rest = [j for j in range(12) if j != q]
    # least squares on what is left: w_rest + H_rr^-1 H_rq w_q
    want = W.clone()
    want[:, q] = 0
    refit = torch.linalg.solve(H[rest][:, rest], H[rest, q])
    want[:, rest] += torch.outer(W[:, q], refit)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    assert (got[:, q] == 0).all()
    cost = obs.layer_loss(W, got, H)
    saliency = W[:, q] ** 2 / torch.linalg.inv(H)[q, q]
    torch.testing.assert_close(cost, saliency)


def test_removing_two_in_sequence_is_refitting_the_rest_in_any_order():
    W, H, _ = case()
    Hinv = torch.linalg.inv(H)
    results = []
    for first, second in [(2, 7), (7, 2)]:
        once = obs.surgeon(W, Hinv, first)
        down = obs.downdate(Hinv, first)
        rest = [j for j in range(12) if j != first]
        torch.testing.assert_close(
            down[rest][:, rest], torch.linalg.inv(H[rest][:, rest])
        )
        results.append(obs.surgeon(once, down, second))
    torch.testing.assert_close(*results)
    keep = [j for j in range(12) if j not in (2, 7)]
    refit = torch.linalg.solve(H[keep][:, keep], (H @ W.T)[keep]).T
    torch.testing.assert_close(results[0][:, keep], refit)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"H": torch.eye(3)}, "H must be"),
        ({"block": 0}, "block"),
        ({"damp": -1.0}, "damp"),
        ({"order": torch.tensor([0, 1, 2, 2])}, "order"),
        ({"H": torch.zeros(4, 4), "damp": 0}, "damp=0"),
        ({"H": torch.full((4, 4), torch.nan)}, "finite"),
    ],
)
def test_bad_arguments_are_named(kwargs, word):
    kwargs = {"W": torch.ones(2, 4), "H": torch.eye(4), **kwargs}
    with pytest.raises(ValueError, match=word):
        obs.sweep(choose=rounding(1.0), **kwargs)
