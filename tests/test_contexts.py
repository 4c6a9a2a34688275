"""Arithmetic coding against its law, context modeling against its bound."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_entropy import integers

from minicompress import codes, entropy, models, storage
from minicompress.codes import Ints
from minicompress.entropy import arithmetic, contexts


def coded(pairs):
    coder = arithmetic.Encoder()
    for p, bit in pairs:
        assert coder.bit(p, bit) == bit
    return coder.finish()


def ideal(pairs):
    """Sum up -log2 of the probabilities, as the coder rounds them."""
    total = 0.0
    for p, bit in pairs:
        one = arithmetic.cut(arithmetic.ONE, p) / arithmetic.ONE
        total -= math.log2(one if bit else 1 - one)
    return total


class TestArithmetic:
    @settings(deadline=None)
    @given(
        st.lists(
            st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 1)),
            max_size=400,
        )
    )
    def test_round_trip_within_two_bytes_of_the_law(self, pairs):
        data = coded(pairs)
        coder = arithmetic.Decoder(data)
        assert [coder.bit(p) for p, _ in pairs] == [b for _, b in pairs]
        # an interval of size s holds a number of ceil(-log2 s) + 1 digits;
        # ranges of 24 bits and more round p by 2^-8 of a bit at most
        assert 8 * len(data) <= ideal(pairs) + len(pairs) / 256 + 16

    def test_long_messages_cost_their_information(self):
        dice = random.Random(0)
        pairs = [(p := dice.random(), int(dice.random() < p)) for _ in "x" * 40]
        pairs = [(p, int(dice.random() < p)) for p, _ in pairs * 500]
        assert abs(8 * len(coded(pairs)) - ideal(pairs)) < 24

    def test_carries_run_through_full_bytes(self):
        # rare 0s put `low` just below a power of 256, then it passes it
        dice, carried = random.Random(1), 0
        for _ in range(300):
            pairs = [(0.999, int(dice.random() < 0.6)) for _ in range(60)]
            data = coded(pairs)
            coder = arithmetic.Decoder(data)
            assert [coder.bit(p) for p, _ in pairs] == [b for _, b in pairs]
            carried += b"\xff" in data or b"\0" in data
        assert carried

    def test_nothing_takes_nothing(self):
        assert coded([]) == b""
        assert coded([(0.0, 0)] * 1000) == b""

    def test_least_is_what_the_surest_bit_costs(self):
        n = 200_000
        data = coded([(0.0, 0)] * n + [(0.5, 0), (0.5, 1)] * 40)
        assert abs(len(data) - 10 - n * arithmetic.LEAST) < 3


class TestContextual:
    @settings(deadline=None, max_examples=150)
    @given(ints=integers(), data=st.data())
    def test_round_trip(self, ints, data):
        n = ints.shape[0]
        rows = data.draw(
            st.sampled_from([k for k in (1, 2, 3, 5) if not n % k])
        )
        ints = Ints(ints.values.reshape(rows, -1, 1), ints.bits)
        before = ints.values.clone()
        code = entropy.contextual(ints)
        assert code.shape == ints.shape and code.bits == ints.bits
        assert code.decode().dtype == ints.values.dtype
        assert torch.equal(code.decode(), ints.values)
        assert torch.equal(before, ints.values)

    @pytest.mark.parametrize("bits", [1, 2, 3, 8, 9, 16])
    @pytest.mark.parametrize("shape", [(), (0,), (3, 0), (5, 7), (2, 3, 2, 4)])
    def test_widths_and_shapes(self, bits, shape):
        g = torch.Generator().manual_seed(bits)
        ints = Ints(torch.randint(0, 1 << bits, shape, generator=g), bits)
        code = entropy.contextual(ints)
        assert code.shape == shape
        assert torch.equal(code.decode(), ints.values)

    def test_rows_and_columns_beat_frequency(self):
        g = torch.Generator().manual_seed(0)
        rows, columns = torch.randn(2, 80, generator=g) * 2
        p = (rows[:, None] + columns - 2.5).sigmoid()
        ints = Ints((torch.rand(80, 80, generator=g) < p).byte(), 1)
        exact = -(ints.values * p.log2() + (1 - ints.values) * (1 - p).log2())
        size = 8 * len(entropy.contextual(ints).stream)
        assert size < 0.85 * entropy.bound(ints)
        assert exact.sum() < size < 1.25 * float(exact.sum())

    def test_without_structure_it_costs_a_little_more(self):
        g = torch.Generator().manual_seed(0)
        ints = Ints((torch.rand(120, 120, generator=g) < 0.05).byte(), 1)
        size = 8 * len(entropy.contextual(ints).stream)
        assert 1.0 < size / entropy.bound(ints) < 1.12

    def test_shuffled_weights_have_no_context(self):
        g = torch.Generator().manual_seed(0)
        x = (torch.arange(90)[:, None] // 9 + torch.arange(90) // 9) % 4
        mixed = x.flatten()[torch.randperm(8100, generator=g)].reshape(90, 90)
        sizes = [len(entropy.contextual(Ints(y, 2)).stream) for y in (x, mixed)]
        assert sizes[0] < 0.35 * sizes[1]

    def test_neighbors_are_looked_for_in_the_shape(self):
        # rings in 16 images of 12x12: seen as images, not as rows of 144
        a = torch.arange(12) - 5.5
        ring = ((a[:, None] ** 2 + a**2 - 16).abs() < 6).byte()
        g = torch.Generator().manual_seed(0)
        moved = [
            ring.roll(tuple(torch.randint(-3, 4, (2,), generator=g)), (0, 1))
            for _ in range(16)
        ]
        x = torch.stack(moved)
        image = entropy.contextual(Ints(x, 1))
        row = entropy.contextual(Ints(x.reshape(16, 144), 1))
        assert len(image.stream) < 0.9 * len(row.stream)

    def test_the_stream_is_the_same_everywhere(self):
        # bytes of a file: whoever changes a constant breaks old files
        x = torch.arange(60).reshape(6, 10) ** 2 % 11 % 5
        stream = bytes(entropy.contextual(Ints(x, 3)).stream.tolist())
        assert stream.hex() == STREAM

    def test_sigmoid(self):
        for x in (-11.0, -3.0, -0.1, 0.0, 0.1, 3.0, 11.0):
            exact = 1 / (1 + math.exp(-x))
            assert abs(contexts.sigmoid(x) - exact) < 3e-3
        assert contexts.sigmoid(0.0) == 0.5
        assert 0 < contexts.sigmoid(-1e9) < 1e-5 < 1 - 1e-5
        assert contexts.sigmoid(2.0) + contexts.sigmoid(-2.0) == 1

    def test_in_a_file(self):
        model = models.MLP(widths=[20, 8, 4])

        def code(w):
            x = entropy.contextual(Ints((w > 0.1).byte(), 1))
            return codes.Sparse(x, w[w > 0.1], tuple(w.shape))

        state = codes.encode(model, code)
        data = storage.dumps(model, state)
        back = storage.loads(data).state_dict()
        for name, w in codes.decode(state).items():
            assert torch.equal(back[name], w)

    def test_a_long_list_of_zeros_is_within_the_limit(self):
        ints = Ints(torch.zeros(500, 800, dtype=torch.uint8), 1)
        ints.values[0, :40] = 1
        code = entropy.contextual(ints)
        assert len(code.stream) < 50
        assert torch.equal(code.decode(), ints.values)

    def test_bombs_are_refused(self):
        none = torch.zeros(0, dtype=torch.uint8)
        with pytest.raises(ValueError, match="0 bytes, which hold"):
            entropy.Contextual(none, 1, (1000, 1000))
        most = int(4 / arithmetic.LEAST)
        assert not entropy.Contextual(none, 1, (most // 8,)).decode().any()

    @pytest.mark.parametrize("seed", range(20))
    def test_any_stream_decodes_to_integers_of_its_width(self, seed):
        g = torch.Generator().manual_seed(seed)
        stream = torch.randint(0, 256, (30,), generator=g, dtype=torch.uint8)
        for bits in (1, 3, 8):
            x = entropy.Contextual(stream, bits, (7, 9)).decode()
            assert x.shape == (7, 9) and int(x.max()) < 1 << bits

    @pytest.mark.parametrize(
        "fields, message",
        [
            ((torch.zeros(3), 1, (2,)), "stream must be bytes"),
            ((torch.zeros(3, dtype=torch.uint8), 17, (2,)), "bits must be"),
            ((torch.zeros(3, dtype=torch.uint8), 2, [2]), "must be a tuple"),
        ],
    )
    def test_faulty_fields(self, fields, message):
        with pytest.raises(ValueError, match=message):
            entropy.Contextual(*fields)


STREAM = "65b6fa325abab53a7bbfce876b0ea15230"
