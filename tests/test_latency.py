"""Latency tables: with clocks that only move when a test says so."""

import json
import math
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minicompress import measure, models, nas
from minicompress.measure import hardware

X = torch.zeros(2, 3)


@pytest.fixture
def clock(monkeypatch):
    """Replace the clock by one that only `Work` moves."""

    class Clock:
        now = 0.0

        @classmethod
        def perf_counter(cls):
            return cls.now

    monkeypatch.setattr(hardware, "time", Clock)
    return Clock


class Work(nn.Module):
    """A user's layer that takes a known time, powers of two: sums are exact."""

    def __init__(self, clock, cost, **settings):
        super().__init__()
        self._clock, self._calls, self.cost = clock, 0, cost
        for name, value in settings.items():
            setattr(self, name, value)

    def forward(self, x, scale=1):
        self._calls += 1
        self._clock.now += self.cost
        return x


class Block(nn.Module):
    """A user's block: two layers, and something that no layer does."""

    def __init__(self, clock, a, b, extra=0.0):
        super().__init__()
        self.a, self.b = Work(clock, a), Work(clock, b)
        self._clock, self.extra = clock, extra

    def forward(self, x):
        self._clock.now += self.extra
        return x + self.b(self.a(x))


class Deep(Block):
    """A subclass of a part is a part."""


def whole(net, *inputs):
    return measure.latency(net, *inputs, repeats=3).median


class TestSums:
    def test_the_sum_is_the_time_of_the_whole(self, clock):
        net = nn.Sequential(Work(clock, 0.5), Block(clock, 0.25, 2.0))
        table = nas.latency_table([(net, X)])
        assert table.seconds(net, X) == whole(net, X) == 2.75
        assert sorted(table.times.values()) == [0.25, 0.5, 2.0]

    def test_a_network_that_was_never_measured(self, clock):
        a, b = Work(clock, 0.5), Work(clock, 0.25)
        table = nas.latency_table([(nn.Sequential(a, b), X)])
        clock.now = 0.0
        parts = [Work(clock, c) for c in (0.25, 0.5, 0.25, 0.25)]
        new = nn.Sequential(*parts)
        assert table.seconds(new, X) == 1.25
        assert clock.now == 1.25  # one forward, nothing was timed
        assert [p._calls for p in parts] == [1, 1, 1, 1]

    def test_equal_parts_are_measured_once(self, clock):
        parts = [Work(clock, 0.5) for _ in range(4)]
        nas.latency_table([(nn.Sequential(*parts), X)], repeats=5, warmup=2)
        assert [p._calls for p in parts] == [1 + 5 + 2, 1, 1, 1]

    def test_a_shared_block_counts_each_use(self, clock):
        block = Block(clock, 0.5, 1.0)
        net = nn.Sequential(block, block, block)
        table = nas.latency_table([(net, X)], parts=(Block,))
        assert list(table.calls(net, X).values()) == [3]
        assert table.seconds(net, X) == whole(net, X) == 4.5

    def test_a_part_hides_what_is_inside(self, clock):
        inner = Work(clock, 0.25)
        block = Block(clock, 0.5, 1.0, extra=4.0)
        block.a = inner
        net = nn.Sequential(block, inner)  # inside of a part and outside
        table = nas.latency_table([(net, X)], parts=(Block,))
        assert sorted(table.times.values()) == [0.25, 5.25]
        assert table.seconds(net, X) == whole(net, X) == 5.5

    def test_what_no_part_computes_is_not_seen(self, clock):
        net = nn.Sequential(Block(clock, 0.5, 1.0, extra=4.0))
        leaves = nas.latency_table([(net, X)])
        assert (leaves.seconds(net, X), whole(net, X)) == (1.5, 5.5)

    def test_parts_of_parts_and_subclasses(self, clock):
        deep = Deep(clock, 0.5, 1.0)
        deep.b = Block(clock, 0.25, 0.125)
        net = nn.Sequential(deep)
        table = nas.latency_table([(net, X)], parts=(Block,))
        assert list(table.times.values()) == [0.875]

    def test_the_whole_network_is_no_part(self, clock):
        inner = nn.Sequential(Work(clock, 0.5), Work(clock, 0.25))
        net = nn.Sequential(inner, Work(clock, 1.0))
        table = nas.latency_table([(net, X)], parts=(nn.Sequential,))
        assert list(table.times.values()) == [0.75, 1.0]

    def test_a_network_of_one_layer(self, clock):
        work = Work(clock, 0.5)
        assert nas.latency_table([(work, X)]).seconds(work, X) == 0.5

    def test_the_lower_quartile_counts(self, clock):
        times = iter([9.0, 9.0, *[8.0, 2.0, 3.0, 1.0, 7.0], 0.0])
        work = Work(clock, 0.0)

        def slower(module, args, output):
            clock.now += next(times)

        work.register_forward_hook(slower)
        table = nas.latency_table([(work, X)], repeats=5, warmup=1)
        assert list(table.times.values()) == [2.0]

    def test_several_inputs_and_keywords(self, clock):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.work = Work(clock, 0.5)

            def forward(self, x, y):
                return self.work(x, scale=2) + self.work(x, scale=3) + y

        table = nas.latency_table([(Two(), (X, X))])
        assert table.seconds(Two(), X, X) == 1.0
        assert [k.rsplit(", ", 1)[1] for k in table.times] == [
            "scale=2",
            "scale=3",
        ]


class TestKeys:
    def table(self, *nets, x=X, parts=()):
        table = nas.LatencyTable({}, tuple(p.__name__ for p in parts))
        return [key for net in nets for key in table.calls(net, x)]

    def differ(self, *nets, x=X, parts=()):
        keys = self.table(*nets, x=x, parts=parts)
        assert len(keys) == len(nets)
        return len({*keys}) == len(nets)

    def test_torch_layers_read_as_they_print(self):
        key = self.table(nn.Linear(3, 4, bias=False))
        assert key == [
            "Linear(in_features=3, out_features=4, bias=False) on float32[2, 3]"
        ]

    def test_configurations_differ(self):
        assert self.differ(
            nn.Linear(3, 4), nn.Linear(3, 5), nn.Linear(3, 4, bias=False)
        )
        conv = partial(nn.Conv2d, 3, 6, 3)
        x = torch.zeros(1, 3, 8, 8)
        assert self.differ(
            conv(), conv(stride=2), conv(groups=3), conv(dilation=2), x=x
        )

    def test_heads_differ_although_all_weights_have_the_same_shape(self):
        blocks = [models.language.PreNorm(8, h, 8) for h in (1, 2, 4)]
        nets = [nn.Sequential(b) for b in blocks]
        x, parts = torch.zeros(1, 3, 8), (models.language.Block,)
        assert self.differ(*nets, x=x, parts=parts)
        same = [nn.Sequential(models.language.PreNorm(8, 2, 8)), nets[1]]
        assert not self.differ(*same, x=x, parts=parts)

    def test_settings_of_a_users_layer(self, clock):
        settings = [
            {},
            {"mode": "a"},
            {"mode": "b"},
            {"sizes": (1, 2)},
            {"sizes": (1, 3)},
            {"f": F.relu},
            {"f": F.gelu},
            {"f": partial(F.gelu, approximate="tanh")},
            {"config": {"k": 1}},
            {"config": {"k": 2}},
            {"table": torch.zeros(2)},
            {"table": torch.zeros(3)},
        ]
        assert self.differ(*[Work(clock, 1.0, **s) for s in settings])

    def test_objects_bring_no_addresses(self, clock):
        a, b = (Work(clock, 1.0, thing=object()) for _ in range(2))
        assert not self.differ(a, b)
        assert "0x" not in self.table(a)[0]

    def test_a_users_own_parameters(self):
        class Gain(nn.Module):
            def __init__(self, n):
                super().__init__()
                self.gain = nn.Parameter(torch.ones(n))

            def forward(self, x):
                return x * self.gain

        assert self.differ(Gain(1), Gain(3))

    def test_values_of_weights_do_not_matter(self):
        assert not self.differ(nn.Linear(3, 4), nn.Linear(3, 4))

    def test_inputs_differ(self):
        layer, table = nn.ReLU(), nas.LatencyTable({})
        inputs = [X, X[:1], X.double(), X.long(), X[None]]
        keys = {k for x in inputs for k in table.calls(layer, x)}
        assert len(keys) == len(inputs)

    def test_types_of_weights_differ(self):
        x = torch.zeros(1, 2, dtype=torch.long)
        tables = nn.Embedding(4, 2), nn.Embedding(4, 2).bfloat16()
        assert self.differ(*tables, x=x)
        assert "bfloat16" in self.table(tables[1], x=x)[0]

    def test_training_mode_does_not_matter(self):
        a, b = nn.BatchNorm1d(3).train(), nn.BatchNorm1d(3).eval()
        assert not self.differ(a, b)


class TestTable:
    def test_a_network_on_the_meta_device_is_looked_up(self):
        sizes = {"width": 8, "layers": 2, "heads": 2, "ff": 16, "context": 4}
        model, ids = models.LM(vocab=9, **sizes), torch.ones(1, 4).long()
        table = nas.latency_table([(model, ids)], repeats=1, warmup=0)
        with torch.device("meta"):
            shape = models.LM(vocab=9, **sizes)
        assert table.seconds(shape, ids.to("meta")) == table.seconds(model, ids)

    def test_known_parts_are_not_measured_again(self, clock):
        a, b = Work(clock, 0.5), Work(clock, 0.25)
        old = nas.latency_table([(a, X)], repeats=3, warmup=1)
        a.cost = 0.5  # the same part, whatever happened to it
        new = nas.latency_table(
            [(a, X), (b, X)], repeats=3, warmup=1, known=old
        )
        assert a._calls == (1 + 4) + 1
        assert len(old.times) == 1
        assert sorted(new.times.values()) == [0.25, 0.5]

    def test_nothing_to_measure(self, clock):
        old = nas.latency_table([(Work(clock, 0.5), X)])
        assert nas.latency_table([], known=old).times == old.times

    def test_known_with_other_parts_or_threads(self, clock):
        old = nas.latency_table([(Work(clock, 0.5), X)])
        for other in ({"parts": (Block,)}, {"threads": 2}):
            with pytest.raises(ValueError, match="known"):
                nas.latency_table([], known=old, **other)

    def test_a_missing_part_is_named(self):
        table = nas.latency_table([(nn.Linear(3, 4), X)], repeats=1)
        with pytest.raises(ValueError, match=r"out_features=5.*\[2, 3\]"):
            table.seconds(nn.Linear(3, 5), X)
        with pytest.raises(ValueError, match=r"float32\[1, 3\]"):
            table.seconds(nn.Linear(3, 4), X[:1])

    def test_save_and_load(self, clock, tmp_path):
        net = nn.Sequential(Block(clock, 0.5, 0.25), Work(clock, 0.1))
        table = nas.latency_table([(net, X)], parts=(Block,), threads=1)
        table.save(tmp_path / "table.json")
        again = nas.LatencyTable.load(tmp_path / "table.json")
        assert again == table
        assert again.seconds(net, X) == table.seconds(net, X)
        assert repr(again) == "LatencyTable(2 parts)"

    def test_the_file_says_what_machine_but_not_which(self, clock, tmp_path):
        table = nas.latency_table([(Work(clock, 0.5), X)])
        table.save(tmp_path / "table.json")
        found = json.loads((tmp_path / "table.json").read_text())
        assert list(found["machine"]) == ["cores", "threads", "torch"]
        assert found["machine"]["threads"] == 1

    def test_models_are_left_as_they_are(self):
        net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
        net[1].eval()
        before = {n: t.clone() for n, t in net.state_dict().items()}
        table = nas.latency_table([(net, X)], repeats=2)
        table.seconds(net, X)
        assert [m.training for m in net] == [True, False, True]
        assert not any(m._forward_hooks for m in net.modules())
        assert not any(m._forward_pre_hooks for m in net.modules())
        after = net.state_dict()
        assert all(torch.equal(after[n], t) for n, t in before.items())

    def test_hooks_go_after_an_error_too(self):
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 3))
        with pytest.raises(RuntimeError):
            nas.latency_table([(net, X)])
        assert not any(m._forward_hooks for m in net.modules())

    def test_real_parts_take_time(self):
        net = nn.Sequential(nn.Linear(256, 256), nn.ReLU())
        x = torch.randn(64, 256)
        table = nas.latency_table([(net, x)], repeats=5)
        linear, relu = table.times.values()
        assert linear > 0 and relu > 0
        assert math.isclose(table.seconds(net, x), linear + relu)

    def test_a_limit_makes_a_smaller_space(self, clock):
        def build(arch):
            return nn.Sequential(*[Work(clock, 0.5)] * arch["layers"])

        space = nas.Space({"layers": (1, 2, 3, 4)})
        table = nas.latency_table([(build({"layers": 1}), X)])
        sizes = []
        for limit in (0.4, 0.5, 1.0, 1.7, 9.0):
            within = space.where(
                lambda a, T=limit: table.seconds(build(a), X) <= T
            )
            sizes.append(len(list(within)))
        assert sizes == [0, 1, 2, 3, 4]


class TestObjectives:
    TIMES = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])

    def test_a_sure_choice_has_its_own_latency(self):
        alpha = torch.full((2, 3), -1e9)
        alpha[0, 1] = alpha[1, 2] = 0.0
        assert nas.expected_latency(alpha, self.TIMES).item() == 34.0

    def test_it_is_the_mean_over_drawn_networks(self):
        alpha = torch.tensor([[0.0, 1.0, -1.0], [0.5, 0.0, 0.0]])
        P = alpha.softmax(-1).tolist()
        mean = sum(
            P[0][i] * P[1][j] * (self.TIMES[0, i] + self.TIMES[1, j])
            for i in range(3)
            for j in range(3)
        )
        found = nas.expected_latency(alpha, self.TIMES)
        assert torch.allclose(found, mean)

    def test_its_gradient_leads_to_the_fastest(self):
        alpha = torch.zeros(2, 3, requires_grad=True)
        nas.expected_latency(alpha, self.TIMES).backward()
        # P_o (T_o - mean): negative only where faster than the mean
        mean = self.TIMES.mean(-1, keepdim=True)
        assert torch.allclose(alpha.grad, (self.TIMES - mean) / 3)

    def test_other_shapes(self):
        with pytest.raises(ValueError, match=r"times.*\(2, 3\).*\(3, 2\)"):
            nas.expected_latency(torch.zeros(3, 2), self.TIMES)

    def test_five_percent_for_half_the_time(self):
        w = -math.log2(1.05)
        slow = nas.soft_limit(0.6 * 1.05, 2.0, limit=1.0, below=w, above=w)
        assert math.isclose(slow, nas.soft_limit(0.6, 1.0, limit=1.0))
        assert abs(w - -0.07) < 5e-4

    def test_a_hard_limit(self):
        hard = partial(nas.soft_limit, limit=2.0, below=0, above=-1)
        assert hard(0.6, 0.1) == hard(0.6, 2.0) == -0.6
        assert math.isclose(hard(0.6, 4.0), -0.3)

    def test_the_less_the_better(self):
        rng = random.Random(0)
        for _ in range(20):
            a, t = rng.random(), rng.random()
            soft = partial(nas.soft_limit, limit=0.5)
            assert soft(a, t) < soft(a, t * 1.1)
            assert soft(a * 1.1, t) < soft(a, t)

    def test_times_are_positive(self):
        with pytest.raises(ValueError, match="limit=0"):
            nas.soft_limit(0.5, 1.0, limit=0)
