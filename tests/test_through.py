"""Training through masks and quantizers, and back to ordinary models."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from minicompress import through


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


class Tied(nn.Module):
    """The two weights of a language model, one Parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(self.tokens(ids))


def mask_for(w):
    return torch.rand(w.shape, generator=torch.Generator().manual_seed(3)) > 0.5


def masked(w, mask):
    return w * mask


def train(model, optimizer, steps=20, x=None):
    torch.manual_seed(1)
    for _ in range(steps):
        batch = torch.randn(16, 4) if x is None else x
        loss = (model(batch) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    ],
)
def test_masks_hold_while_training(make):
    model = mlp()
    masks = {
        n: mask_for(model.get_parameter(n)) for n in ("0.weight", "2.weight")
    }
    new = through.attach(model, masks, masked, mask=masks)
    train(new, make(new.parameters()))
    baked = through.bake(new)
    for name, mask in masks.items():
        w = baked.get_parameter(name)
        assert torch.equal(w != 0, mask)
        assert not torch.equal(w, model.get_parameter(name) * mask)


def test_attach_computes_and_bake_writes():
    model, x = mlp(), torch.randn(5, 4)
    before = deepcopy(model.state_dict())
    new = through.attach(model, lambda n, w: w.ndim == 2, torch.round)
    assert torch.equal(new[0].weight, model[0].weight.round())
    assert torch.equal(new[0].bias, model[0].bias)
    baked = through.bake(new)
    assert list(baked.state_dict()) == list(before)  # the same order too
    assert torch.equal(baked(x), new(x))
    assert not any(parametrize.is_parametrized(m) for m in baked.modules())
    assert [type(m) for m in baked] == [type(m) for m in model]
    assert all(p.requires_grad and p.is_leaf for p in baked.parameters())
    # nothing happened to the model, and the attached one still works
    assert not parametrize.is_parametrized(model[0])
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k])
    assert parametrize.is_parametrized(new[0])
    assert torch.equal(new[0].weight, model[0].weight.round())


def test_copies_share_no_class():
    one = through.attach(mlp(), "0.weight", torch.round)
    two = through.attach(one, "0.bias", torch.round)
    assert torch.equal(two[0].bias, one[0].bias.round())
    assert not torch.equal(one[0].bias, one[0].bias.round())
    through.bake(two)
    assert list(through.bake(two).state_dict()) == list(mlp().state_dict())
    assert torch.equal(one[0].weight, two[0].weight)


def test_several_functions_apply_in_order():
    model = mlp()
    mask = mask_for(model[0].weight)
    new = through.attach(model, "0.weight", lambda w: 10 * w)
    new = through.attach(new, "0.weight", torch.round)
    new = through.attach(new, "0.weight", masked, mask=mask)
    want = (10 * model[0].weight).round() * mask
    assert torch.equal(new[0].weight, want)
    assert torch.equal(through.bake(new)[0].weight, want)
    assert torch.equal(through.tensors(new)["0.weight"]["mask"], mask)


def test_parameters_train_and_buffers_do_not():
    model = mlp()
    index = torch.arange(24).reshape(6, 4) % 3
    centroids = nn.Parameter(torch.tensor([-0.5, 0.0, 0.5]))
    new = through.attach(
        model,
        "0.weight",
        lambda w, centroids, index: centroids[index],
        centroids=centroids,
        index=index,
    )
    loss = new(torch.ones(2, 4)).square().sum()
    loss.backward()
    got = new[0].parametrizations.weight[0].centroids.grad
    # the gradient of a centroid is the sum over the weights that share it
    W = model[0].weight.detach().new_tensor([-0.5, 0.0, 0.5])[index]
    W.requires_grad_(True)
    h = F.relu(F.linear(torch.ones(2, 4), W, model[0].bias))
    model[2](h).square().sum().backward()
    want = torch.zeros(3).index_add(0, index.flatten(), W.grad.flatten())
    torch.testing.assert_close(got, want)
    train(new, torch.optim.SGD(new.parameters(), lr=0.1))
    moved = through.tensors(new)["0.weight"]
    assert not torch.equal(moved["centroids"], centroids)
    assert torch.equal(moved["index"], index)
    assert centroids.tolist() == [-0.5, 0.0, 0.5]  # the caller's is a copy
    w = through.bake(new)[0].weight
    assert torch.equal(w, moved["centroids"][index])


def test_low_rank_factors_on_a_frozen_base():
    model = mlp()
    base = model[0].weight.detach().clone()
    new = through.attach(
        model,
        "0.weight",
        lambda w, a, b: w.detach() + b @ a,
        a=nn.Parameter(torch.randn(2, 4)),
        b=nn.Parameter(torch.zeros(6, 2)),
    )
    train(new, torch.optim.SGD(new.parameters(), lr=0.1))
    assert torch.equal(new[0].parametrizations.weight.original, base)
    change = through.bake(new)[0].weight - base
    assert torch.linalg.matrix_rank(change, rtol=1e-4) == 2


def test_straight_through():
    w = torch.randn(5, requires_grad=True)
    y = through.straight(w, w.round())
    torch.testing.assert_close(y, w.round())
    (y * torch.arange(5)).sum().backward()
    assert torch.equal(w.grad, torch.arange(5.0))
    w.grad = None
    w.round().sum().backward()  # without it nothing arrives
    assert torch.equal(w.grad, torch.zeros(5))


@pytest.mark.parametrize("name", ["tokens.weight", "head.weight"])
def test_tied_weights_stay_one_weight(name):
    model = Tied()
    mask = mask_for(model.tokens.weight)
    new = through.attach(model, name, masked, mask=mask)
    assert torch.equal(new.head.weight, new.tokens.weight)
    assert torch.equal(new.head.weight, model.head.weight * mask)
    count = sum(p.numel() for p in new.parameters())
    assert count == sum(p.numel() for p in model.parameters())
    ids = torch.arange(10)
    opt = torch.optim.SGD(new.parameters(), lr=0.1, momentum=0.9)
    for _ in range(5):
        opt.zero_grad()
        F.cross_entropy(new(ids), ids).backward()
        opt.step()
    baked = through.bake(new)
    assert baked.head.weight is baked.tokens.weight
    assert list(baked.state_dict()) == list(model.state_dict())
    assert torch.equal(baked.head.weight != 0, mask)
    assert torch.equal(baked(ids), new(ids))


def test_tied_weights_may_take_their_tensors_under_either_name():
    model = Tied()
    mask = mask_for(model.tokens.weight)
    both = ("tokens.weight", "head.weight")
    for owner in both:
        new = through.attach(model, both, masked, mask={owner: mask})
        assert len(new.tokens.parametrizations.weight) == 1
        assert torch.equal(new.head.weight, model.head.weight * mask)


def test_a_partner_that_is_not_computed_is_not_overwritten():
    model = Tied()
    parametrize.register_parametrization(
        model.tokens, "weight", through.Through(torch.round)
    )
    baked = through.bake(model)
    assert torch.equal(baked.head.weight, model.head.weight)
    assert torch.equal(baked.tokens.weight, model.head.weight.round())


def test_a_module_that_occurs_twice_is_computed_once():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    new = through.attach(model, lambda n, w: w.ndim == 2, lambda w: w / 2)
    assert new[0] is new[2]
    assert torch.equal(new[0].weight, layer.weight / 2)
    baked = through.bake(new)
    assert baked[0] is baked[2]
    assert torch.equal(baked[0].weight, layer.weight / 2)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)),
        (nn.Conv1d(3, 4, 3, bias=False), torch.randn(2, 3, 6)),
        (nn.Embedding(7, 3), torch.arange(7)),
        (nn.LayerNorm(3), torch.randn(2, 3)),
    ],
)
def test_any_layer_and_torch_parametrizations(layer, x):
    new = through.attach(nn.Sequential(layer), "0.weight", lambda w: w * 2)
    want = deepcopy(layer)
    want.weight.data *= 2
    assert torch.equal(new(x), want(x))
    assert torch.equal(through.bake(new)(x), want(x))
    if layer.weight.ndim > 1:
        normed = nn.utils.parametrizations.weight_norm(deepcopy(layer))
        baked = through.bake(normed)
        assert not parametrize.is_parametrized(baked)
        torch.testing.assert_close(baked(x), layer(x))


@pytest.mark.parametrize(
    ("names", "f", "tensors", "word"),
    [
        ("0.wieght", torch.round, {}, "0.wieght"),
        ([], torch.round, {}, "names"),
        ("0.weight", lambda w: w[:2], {}, "0.weight.*shape"),
        ("0.weight", lambda w: w > 0, {}, "0.weight.*dtype"),
        ("0.weight", masked, {"mask": torch.ones(5)}, "0.weight"),
        ("0.weight", masked, {"mask": {"2.weight": 1}}, "0.weight: mask"),
        ("0.weight", masked, {"mask": [1]}, "mask must be a tensor"),
        ("0.weight", masked, {"forward": torch.ones(1)}, "forward"),
    ],
)
def test_errors_name_the_weight(names, f, tensors, word):
    with pytest.raises(ValueError, match=word):
        through.attach(mlp(), names, f, **tensors)


def test_recurrent_layers_are_refused():
    model = nn.Sequential(nn.LSTM(3, 4))
    with pytest.raises(ValueError, match=r"0\.weight_ih_l0"):
        through.attach(model, "0.weight_ih_l0", torch.round)


def test_straight_through_is_exact():
    w = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    wq = 0.37 * w.sign()
    assert torch.equal(through.straight(w, wq), wq)
    assert not torch.equal(w + (wq - w), wq)  # the usual form is not
