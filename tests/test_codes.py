"""Each code against an independent computation, and the laws of states."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from trees import integers, tensor, trees

from minicompress import codes


def test_affine_is_scale_times_q_minus_zero():
    q = torch.tensor([[0, 7], [3, 15]])
    x = codes.Affine(codes.Ints(q, 4), torch.tensor([[0.5], [2.0]]), 3)
    expected = np.array([[0.5], [2.0]]) * (q.numpy() - 3)
    assert np.array_equal(x.decode().numpy(), expected)
    # subtracting first in unsigned arithmetic would wrap around
    assert x.decode()[0, 0] == -1.5


def test_a_codebook_index_is_no_mask():
    index = codes.Ints(torch.tensor([0, 1, 1, 0]), 1)
    x = codes.Codebook(index, torch.tensor([10.0, 20.0]))
    assert x.decode().tolist() == [10, 20, 20, 10]


def test_a_codebook_of_vectors_is_product_quantization():
    index = torch.tensor([[0, 2], [1, 1]])
    vectors = tensor((3, 4), 0)
    x = codes.View(codes.Codebook(codes.Ints(index, 2), vectors), (2, 8))
    assert torch.equal(x.decode()[0], torch.cat([vectors[0], vectors[2]]))
    assert x.shape == (2, 8)


def test_rotation_is_undone():
    w, signs = tensor((5, 8), 0), integers((8,), 1, 0)
    sign = signs.values * 2.0 - 1
    H = torch.tensor(scipy.linalg.hadamard(8) / np.sqrt(8)).float()
    x = codes.Rotated((w * sign) @ H, signs)
    torch.testing.assert_close(x.decode(), w)
    plus = codes.Rotated((w * sign) @ H, sign)
    assert torch.equal(plus.decode(), x.decode())


@pytest.mark.parametrize("d", [1, 2, 8, 64])
def test_the_fast_transform_is_the_hadamard_matrix(d):
    x = tensor((3, d), 1).double()
    H = scipy.linalg.hadamard(d) / np.sqrt(d)
    np.testing.assert_allclose(codes.hadamard(x), x.numpy() @ H, atol=1e-12)


def test_a_tucker_core_multiplies_both_sides():
    u, v, core = tensor((4, 2), 0), tensor((3, 5), 1), tensor((2, 3, 3, 3), 2)
    x = codes.Factors(u, v, core)
    expected = np.einsum("or,rskl,si->oikl", u, core, v)
    np.testing.assert_allclose(x.decode().numpy(), expected, atol=1e-5)
    assert x.shape == expected.shape


def test_a_hashed_layer_is_feature_hashing():
    # W x = phi(x) values, where phi collects the inputs that share a value
    values, x = tensor((7,), 0), tensor((6,), 1)
    W = codes.Hashed(3, values, (5, 6)).decode()
    index, sign = codes.buckets(3, torch.arange(30), 7)
    for row in range(5):
        part = slice(6 * row, 6 * row + 6)
        phi = torch.zeros(7).index_add(0, index[part], sign[part] * x)
        torch.testing.assert_close(W[row] @ x, phi @ values)


def test_a_large_hashed_tensor_is_decoded_in_parts_that_fit_together():
    values = tensor((11,), 0)
    index, sign = codes.buckets(9, torch.arange(70_000), 11)
    W = codes.Hashed(9, values, (70, 1000)).decode()
    assert torch.equal(W.flatten(), values[index] * sign)


def test_the_hash_is_the_same_everywhere_and_even():
    index, sign = codes.buckets(0, torch.arange(6), 1000)
    assert index.tolist() == [HASHED[p] % 1000 for p in range(6)]
    index, sign = codes.buckets(5, torch.arange(100_000), 10)
    expected = 100_000 / 10
    chi2 = ((torch.bincount(index) - expected) ** 2 / expected).sum()
    assert chi2 < 27.9  # 99.9 % of the chi-square law with 9 degrees
    assert abs(sign.mean()) < 0.0105  # 3.3 standard deviations
    assert set(sign.tolist()) == {-1.0, 1.0}


def split_mix(x: int) -> int:
    """SplitMix64's finalizer in Python's own integers."""
    full = (1 << 64) - 1
    x = x * 0x9E3779B97F4A7C15 & full
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & full
    x = (x ^ x >> 27) * 0x94D049BB133111EB & full
    return x ^ x >> 31


HASHED = [split_mix(p) >> 1 & (1 << 62) - 1 for p in range(6)]


def test_gaps_by_hand():
    # two bits: 3 means "three zeros, no weight here"
    mask = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0]).bool()
    x = codes.gaps(mask, bits=2)
    assert x.steps.values.tolist() == [0, 3, 0, 3, 3, 0]
    assert torch.equal(x.decode(), mask)


@settings(max_examples=60, deadline=None)
@given(
    places=st.sets(st.integers(0, 299)),
    numel=st.integers(300, 310),
    bits=st.integers(1, 10),
)
def test_gaps_round_trip(places, numel, bits):
    mask = torch.zeros(numel, dtype=torch.bool)
    mask[sorted(places)] = True
    x = codes.gaps(mask, bits=bits)
    assert torch.equal(x.decode(), mask)
    # one step for each weight and one for each full run of zeros before it
    top, last, steps = (1 << bits) - 1, -1, 0
    for p in sorted(places):
        steps += (p - last - 1) // top + 1
        last = p
    assert len(x.steps.values) == steps


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_shape_is_known_before_decoding(data):
    shape = data.draw(st.sampled_from([(), (5,), (3, 4), (2, 3, 2, 2), (0,)]))
    x = data.draw(trees(shape, depth=2))
    assert codes.shape(x) == shape == tuple(codes.value(x).shape)


def test_groups_and_view_undo_each_other():
    w = tensor((3, 10), 0)
    g = codes.groups(w, 4)
    assert g.shape == (3, 3, 4) and (g[:, 2, 2:] == 0).all()
    assert torch.equal(codes.View(g, (3, 10)).decode(), w)


def test_encode_touches_only_what_is_asked_and_keeps_ties():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    before = {n: t.clone() for n, t in model.state_dict().items()}
    seen = []

    def double(w):
        seen.append(w)
        return codes.Scaled(w, 2.0)

    state = codes.encode(model, double)
    assert len(seen) == 1 and state["a.weight"] is state["b.weight"]
    assert isinstance(state["a.bias"], torch.Tensor)
    dense = codes.decode(state)
    assert dense["a.weight"] is dense["b.weight"]
    assert torch.equal(dense["a.weight"], 2 * before["a.weight"])
    state["a.bias"].zero_()  # a copy: the model must not notice
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())

    chosen = codes.encode(model, double, lambda name, w: name == "a.bias")
    kinds = {n: type(x) for n, x in chosen.items()}
    assert kinds["a.bias"] is codes.Scaled and kinds["a.weight"] is torch.Tensor


V = torch.zeros(4)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: codes.Ints(torch.tensor([4]), 2), r"\[0, 4\) .* 4 to 4"),
        (lambda: codes.Ints(torch.tensor([-1]), 8), "-1 to -1"),
        (lambda: codes.Ints(torch.tensor([256]), 8), "256"),
        (lambda: codes.Ints(V, 8), "integer tensor"),
        (lambda: codes.Ints(torch.tensor([1]), 17), "1 to 16"),
        (lambda: codes.Affine(V, torch.zeros(3)), r"\(4,\), \(3,\)"),
        (lambda: codes.Affine(3, 1.0), "q must be a tensor"),
        (lambda: codes.Sparse(V.bool(), V, (5,)), "does not cover"),
        (lambda: codes.Sparse(V.bool(), V, (4,)).decode(), "keeps 0 weights"),
        (lambda: codes.Sparse(V.bool(), torch.zeros(5), (4,)), "fit into"),
        (lambda: codes.Gaps(codes.Ints(V.byte(), 2), 3), "do not fit"),
        (lambda: codes.Gaps(V, 9), "integer code"),
        (lambda: codes.Codebook(V.long() + 4, V).decode(), "out of range"),
        (lambda: codes.Factors(V, V), "do not chain"),
        (lambda: codes.View(V, (5,)), "cannot be read"),
        (lambda: codes.View(V, [4]), "tuple of sizes"),
        (lambda: codes.Hashed(-1, V, (2,)), "seed"),
        (lambda: codes.Hashed(0, torch.zeros(0), (2,)), "not empty"),
        (lambda: codes.Rotated(V, torch.zeros(3)), "last dimension"),
        (lambda: codes.hadamard(torch.zeros(6)), "power of two"),
        (lambda: codes.sparse(V, V), "mask must be bool"),
        (lambda: codes.gaps(V, bits=2), "mask must be bool"),
        (lambda: codes.groups(V, 0), "size"),
        (lambda: codes.Sum(V, torch.zeros(3)), "do not match"),
    ],
)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_large_codes_decode_in_parts_to_the_same_numbers():
    g = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (700, 400), generator=g)  # more than one part
    scale = torch.rand(700, 1, generator=g)
    zero = torch.randint(0, 16, (700, 1), generator=g)
    levels = torch.randn(16, 3, generator=g)
    ints = codes.Ints(q, 4)
    affine = codes.Affine(ints, scale, codes.Ints(zero, 4)).decode()
    assert torch.equal(affine, scale * (q - zero).float())
    assert torch.equal(codes.Codebook(ints, levels).decode(), levels[q])
    scaled = codes.Scaled(codes.Codebook(ints, levels[:, 0]), 0.3).decode()
    assert torch.equal(scaled, levels[:, 0][q] * 0.3)
    one = codes.Affine(ints, 0.5, 7).decode()
    assert torch.equal(one, 0.5 * (q - 7).float())
