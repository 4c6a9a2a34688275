"""Stages against their definitions, and the whole of Deep Compression."""

from copy import deepcopy
from functools import cache, partial

import pytest
import torch
from torch import nn

from minicompress import (
    codes,
    distill,
    entropy,
    pipeline,
    prune,
    share,
    storage,
    train,
)


@pytest.fixture(autouse=True)
def one_thread():
    with train.threads(1):
        yield


class Mine(nn.Module):
    """A model that the library does not know, with a norm and a tie."""

    def __init__(self):
        super().__init__()
        self.read = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.first = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.again.weight = self.first.weight
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = self.norm(self.read(x)).relu()
        return self.out(self.again(self.first(x).relu()).relu())


def mine(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Mine().eval()


def task(n=96):
    g = torch.Generator().manual_seed(1)
    X = torch.randn(n, 6, generator=g)
    return X, X[:, :3].argmax(1)


def trained():
    return deepcopy(teacher())


@cache
def teacher():
    feed = train.batches(*task(), epochs=60)
    return train.fit(mine(), feed, lr=1e-2)


def tune(steps=6, seen=None, **options):
    feed = train.batches(*task(), size=16, epochs=steps // 6)
    fit = pipeline.finetuning(feed, lr=1e-2, **options)

    def noted(model, on_step=None):
        if seen is not None:
            seen.append((model, on_step))
        return fit(model, on_step)

    return noted


def weights(model):
    return {n: w.detach() for n, w in model.named_parameters() if w.ndim > 1}


def unchanged(model, before):
    now = model.state_dict()
    return all(torch.equal(now[n], w) for n, w in before.items())


def copy(model):
    return {n: w.clone() for n, w in model.state_dict().items()}


class TestFinetuning:
    def test_is_train_fit(self):
        feed = train.batches(*task(), epochs=2)
        one = pipeline.finetuning(feed, lr=1e-2, seed=3)(mine())
        two = train.fit(mine(), feed, lr=1e-2, seed=3)
        assert unchanged(one, copy(two))

    def test_a_teacher_makes_it_distillation(self):
        feed = train.batches(*task(), epochs=2)
        how = {"temperature": 3.0, "alpha": 0.7}
        teacher = trained()
        one = pipeline.finetuning(feed, teacher=teacher, **how)(mine())
        loss = distill.taught(teacher, **how)
        assert unchanged(one, copy(train.fit(mine(), feed, loss)))
        alone = pipeline.finetuning(feed)(mine())
        assert not unchanged(one, copy(alone))

    def test_only_the_labels_teach_at_alpha_0(self):
        feed = train.batches(*task(), epochs=2)
        one = pipeline.finetuning(feed, teacher=trained(), alpha=0.0)(mine())
        alone = pipeline.finetuning(feed)(mine())
        for a, b in zip(one.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a, b)

    def test_takes_a_loss_and_calls_back(self):
        steps = []
        fit = pipeline.finetuning(
            train.batches(*task(), epochs=1),
            loss=lambda model, batch: model(batch[0]).square().mean(),
        )
        small = fit(mine(), lambda step, model, loss: steps.append(step))
        assert steps == [1, 2]
        X = task()[0]
        assert small(X).square().mean() < mine()(X).square().mean()


class TestPruned:
    @pytest.mark.parametrize("steps", [None, 12])
    def test_removes_exactly_the_fraction(self, steps):
        model = trained()
        small, masks = pipeline.pruned(
            model, tune(12), sparsity=0.8, steps=steps
        )
        n = sum(w.numel() for w in weights(model).values())
        kept = sum(int((w != 0).sum()) for w in weights(small).values())
        assert kept == n - round(0.8 * n)
        for name, w in weights(small).items():
            assert torch.equal(w != 0, masks[name])

    def test_each_layer_can_have_its_own(self):
        want = {"read.weight": 0.5, "out.weight": 0.75}
        for steps in (None, 12):
            small, masks = pipeline.pruned(
                trained(), tune(12), sparsity=want, steps=steps
            )
            assert masks.keys() == want.keys()
            for name, s in want.items():
                w = weights(small)[name]
                assert int((w == 0).sum()) == round(s * w.numel())
            assert weights(small)["first.weight"].all()

    def test_at_once_it_is_the_masks_of_the_original(self):
        model = trained()
        _, masks = pipeline.pruned(model, tune(), sparsity=0.5)
        want = prune.keep_global(prune.magnitudes(model), sparsity=0.5)
        for name, mask in want.items():
            assert torch.equal(masks[name], mask)

    def test_little_by_little_it_grows_during_the_training(self):
        seen = []
        pipeline.pruned(
            trained(), tune(12, seen), sparsity=0.5, steps=12, every=1
        )
        (model, on_step), *more = seen
        assert not more and on_step is not None
        assert all(w.all() for w in weights(model).values())

    def test_takes_another_score(self):
        model = trained()
        _, masks = pipeline.pruned(
            model,
            tune(),
            sparsity={"read.weight": 0.5},
            score=lambda m: {"read.weight": -m.read.weight.detach().abs()},
        )
        w = model.read.weight.abs()
        mask = masks["read.weight"]
        assert w[mask].max() <= w[~mask].min()

    @pytest.mark.parametrize("calls", [0, 5])
    def test_a_fit_that_ends_before_the_last_cut_is_an_error(self, calls):
        def fit(model, on_step=None):
            for step in range(1, calls + 1):
                on_step(step, model, 0.0)
            return model

        with pytest.raises(ValueError, match=f"up to step {calls}, .* at ste"):
            pipeline.pruned(mine(), fit, sparsity=0.8, steps=10)

    def test_unknown_names_are_errors(self):
        with pytest.raises(ValueError, match=r"'lost\.weight' has no scores"):
            pipeline.pruned(mine(), tune(), sparsity={"lost.weight": 0.5})

    def test_leaves_the_model(self):
        model = trained()
        before = copy(model)
        pipeline.pruned(model, tune(12), sparsity=0.5, steps=12)
        assert unchanged(model, before)


class TestClustered:
    def test_without_training_it_is_kmeans(self):
        model = trained()
        small, state = pipeline.clustered(model, bits=2)
        for name, w in weights(model).items():
            want = share.kmeans(w, bits=2).decode()
            assert torch.equal(weights(small)[name], want)
            assert torch.equal(state[name].decode(), want)

    def test_zeros_stay_and_the_rest_is_shared(self):
        model, masks = pipeline.pruned(trained(), tune(), sparsity=0.5)
        small, state = pipeline.clustered(model, tune(), bits=2)
        for name, w in weights(small).items():
            assert torch.equal(w != 0, masks[name])
            assert len(w[w != 0].unique()) <= 4
            assert torch.equal(state[name].decode(), w)

    def test_training_moves_the_centroids_not_the_members(self):
        model = trained()
        _, before = pipeline.clustered(model, bits=2)
        _, after = pipeline.clustered(model, tune(), bits=2)
        a, b = before["read.weight"], after["read.weight"]
        assert torch.equal(a.index.values, b.index.values)
        assert not torch.equal(a.centroids, b.centroids)

    def test_ties_are_one_code(self):
        small, state = pipeline.clustered(trained(), tune(), bits=2)
        assert state["first.weight"] is state["again.weight"]
        assert small.first.weight is small.again.weight

    def test_biases_with_more_numbers_than_centroids(self):
        model = trained()
        _, state = pipeline.clustered(model, bits=2, bias_bits=2)
        assert isinstance(state["read.bias"], codes.Codebook)
        assert isinstance(state["out.bias"], torch.Tensor)  # only 3

    def test_zeros_of_a_bias_count_for_nothing(self):
        model = nn.Linear(2, 6)
        with torch.no_grad():
            model.bias.copy_(torch.tensor([0.0, 1, 1, 2, 2, 0]))
        _, state = pipeline.clustered(model, bits=1, bias_bits=1)
        assert state["bias"].centroids.tolist() == [1.0, 2.0]

    def test_bits_of_each(self):
        _, state = pipeline.clustered(
            trained(), bits={"read.weight": 1, "out.weight": 3}
        )
        assert len(state["read.weight"].centroids) == 2
        assert len(state["out.weight"].centroids) == 8
        assert isinstance(state["first.weight"], torch.Tensor)
        with pytest.raises(ValueError, match="no parameter 'lost'"):
            pipeline.clustered(mine(), bits={"lost": 2})

    def test_zeros_stay_where_nothing_is_shared(self):
        model, masks = pipeline.pruned(trained(), tune(), sparsity=0.5)
        small, _ = pipeline.clustered(model, tune(), bits={"out.weight": 2})
        for name, w in weights(small).items():
            assert torch.equal(w != 0, masks[name])
        assert not torch.equal(small.read.weight, model.read.weight)

    def test_a_layer_without_weights(self):
        model = trained()
        with torch.no_grad():
            model.first.weight.zero_()
        small, state = pipeline.clustered(model, tune(), bits=2)
        assert not state["again.weight"].decode().any()
        assert state["first.weight"] is state["again.weight"]
        assert not small.first.weight.any()
        file = storage.dumps(small, state)
        assert not storage.loads(file, like=small).first.weight.any()


class TestRounded:
    @pytest.mark.parametrize("fit", [None, tune()])
    def test_is_on_a_grid_with_the_zeros_kept(self, fit):
        model, masks = pipeline.pruned(trained(), tune(), sparsity=0.5)
        small, state = pipeline.rounded(model, fit, bits=3)
        for name, w in weights(small).items():
            assert not w[~masks[name]].any()
            code = state[name]
            assert torch.equal(code.decode(), w)
            q = w / code.values.scale
            torch.testing.assert_close(q, q.round())
            assert q.min() >= -4 and q.max() <= 3

    def test_different_bits(self):
        _, state = pipeline.rounded(
            trained(), tune(), bits={"read.weight": 2, "first.weight": 5}
        )
        assert state["first.weight"] is state["again.weight"]
        assert isinstance(state["out.weight"], torch.Tensor)
        wide = state["first.weight"]
        wide = wide.values if isinstance(wide, codes.Sparse) else wide
        assert wide.q.bits == 5

    def test_training_helps(self):
        model, (X, y) = trained(), task()

        def loss(net):
            return train.cross_entropy(net, (X, y)).item()

        without, _ = pipeline.rounded(model, bits=2)
        with_it, _ = pipeline.rounded(model, tune(60), bits=2)
        assert loss(with_it) < loss(without)


class TestConnected:
    def net(self, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = nn.Sequential(
                nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU()
            )
            net.append(nn.Linear(7, 3))
            with torch.no_grad():
                for w in weights(net).values():
                    w[torch.rand(w.shape) < 0.75] = 0
        return net

    def paths(self, net):
        """Find by brute force which weights are on a path."""
        A, B, C = ((w != 0).double() for w in weights(net).values())
        ones = torch.ones
        into = [ones(5), A @ ones(5).double(), B @ A @ ones(5).double()]
        out = [C.T @ ones(3).double(), ones(3).double()]
        out = [B.T @ out[0], *out]
        return [
            (m > 0) & (o[:, None] > 0) & (i[None] > 0)
            for m, o, i in zip((A, B, C), out, into, strict=True)
        ]

    @pytest.mark.parametrize("seed", range(8))
    def test_keeps_what_is_on_a_path(self, seed):
        net = self.net(seed)
        small = pipeline.connected(net, torch.zeros(1, 5))
        for w, on in zip(weights(small).values(), self.paths(net), strict=True):
            assert torch.equal(w != 0, on)

    @pytest.mark.parametrize("seed", range(8))
    def test_changes_nothing_where_only_readers_are_missing(self, seed):
        # without biases a unit without inputs sends nothing
        net = self.net(seed)
        with torch.no_grad():
            for layer in (net[0], net[2]):
                layer.bias.zero_()
        X = torch.randn(20, 5)
        small = pipeline.connected(net, X)
        assert torch.equal(small(X), net(X))
        assert torch.equal(small[4].bias, net[4].bias)

    def test_biases_of_idle_units_go(self):
        net = self.net(1)
        small = pipeline.connected(net, torch.zeros(1, 5))
        on = self.paths(net)
        for layer, mask in ((small[0], on[0]), (small[2], on[1])):
            assert torch.equal(layer.bias != 0, mask.any(1))

    def test_works_on_convolutions_and_leaves_its_input(self):
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
        )
        with torch.no_grad():
            net[3].weight[:, 4:8] = 0  # nothing reads the second channel
        before = copy(net)
        X = torch.randn(3, 1, 4, 4)
        small = pipeline.connected(net, X)
        assert unchanged(net, before)
        assert not small[0].weight[1].any() and small[0].bias[1] == 0
        assert small[0].weight[[0, 2, 3]].all()
        torch.testing.assert_close(small(X), net(X))


class TestDeepCompression:
    def stages(self, **how):
        how = {"sparsity": 0.8, "bits": 2} | how
        return list(pipeline.deep_compression(trained(), tune(12), **how))

    @pytest.mark.parametrize("steps", [None, 12])
    def test_every_stage_is_a_file_of_its_model(self, steps):
        sizes = []
        for stage in self.stages(steps=steps):
            file = storage.dumps(stage.model, stage.state)
            again = storage.loads(file, like=stage.model)
            sizes.append(len(file))
            for name, w in again.state_dict().items():
                assert torch.equal(w, stage.model.state_dict()[name]), name
        assert sizes == sorted(sizes, reverse=True)

    def test_names_and_numbers(self):
        stages = self.stages()
        names = ["original", "pruned", "clustered", "coded"]
        assert [s.name for s in stages] == names
        last = weights(stages[-1].model)
        n = sum(w.numel() for w in last.values())
        kept = sum(int((w != 0).sum()) for w in last.values())
        assert kept == n - round(0.8 * n)
        for w in last.values():
            assert len(w[w != 0].unique()) <= 4
        assert "coded" in repr(stages[-1]) and "bytes" in repr(stages[-1])

    def test_no_coder_before_the_last_stage(self):
        coded = (entropy.Huffman, entropy.Rans)
        *before, _ = self.stages()
        for stage in before:
            for x in stage.state.values():
                assert not any(isinstance(y, coded) for y in tree(x))

    def test_fits_twice_and_the_centroids_apart(self):
        first, second = [], []
        list(
            pipeline.deep_compression(
                trained(),
                tune(seen=first),
                sparsity=0.5,
                bits=2,
                centroids=tune(seen=second),
            )
        )
        assert len(first) == len(second) == 1
        list(
            pipeline.deep_compression(
                trained(), tune(seen=first), sparsity=0.5, bits=2
            )
        )
        assert len(first) == 3

    def test_can_be_stopped_before_the_next_training(self):
        seen = []
        stages = pipeline.deep_compression(
            trained(), tune(seen=seen), sparsity=0.5, bits=2
        )
        next(stages), next(stages)
        assert len(seen) == 1

    def test_works_with_a_loop_of_ones_own(self):
        X, y = task()

        def fit(model, on_step=None):
            model.train()
            own = [p for p in model.parameters() if p.requires_grad]
            opt = torch.optim.SGD(own, lr=0.1)
            for step in range(1, 13):
                loss = nn.functional.cross_entropy(model(X), y)
                opt.zero_grad()
                loss.backward()
                opt.step()
                if on_step is not None:
                    on_step(step, model, loss.item())
            return model.eval()

        model = trained()
        before = copy(model)
        *_, last = pipeline.deep_compression(
            model, fit, sparsity=0.8, bits=2, steps=12
        )
        n = sum(w.numel() for w in weights(model).values())
        kept = sum(int((w != 0).sum()) for w in weights(last.model).values())
        assert kept == n - round(0.8 * n)
        assert unchanged(model, before)

    def test_table(self):
        X, y = task()
        metric = partial(train.accuracy, X=X, y=y)
        stages = self.stages()
        table = pipeline.stage_table(iter(stages), metric)
        assert table.header[0] == "model" and table.header[-1] == "accuracy"
        assert [row[0] for row in table.rows] == [s.name for s in stages]
        want = [f"{metric(s.model):.3f}" for s in stages]
        assert [row[-1] for row in table.rows] == want

    def test_teaches(self):
        # what it reaches is far above what pruning alone leaves
        X, y = task()
        model = trained()
        *_, last = pipeline.deep_compression(
            model, tune(60, teacher=model), sparsity=0.8, bits=3, steps=60
        )
        same = lambda net, on_step=None: net  # noqa: E731
        *_, untaught = pipeline.deep_compression(
            model, same, sparsity=0.8, bits=3
        )
        found = train.accuracy(last.model, X, y)
        assert found > train.accuracy(untaught.model, X, y) + 0.2


def tree(x):
    yield x
    if isinstance(x, codes.Code):
        for name in x.__dataclass_fields__:
            yield from tree(getattr(x, name))
