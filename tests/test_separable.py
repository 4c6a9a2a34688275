"""Depthwise-separable factors of kernels against SVDs and counts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minicompress import lowrank, measure


def layer(seed=0, dtype=torch.float64, **kwargs):
    sizes = {"in_channels": 5, "out_channels": 7, "kernel_size": 3} | kwargs
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Conv2d(**sizes).to(dtype)


def images(seed=0, n=4, channels=5, size=8):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, size, size, generator=g, dtype=torch.float64)
    return F.avg_pool2d(x, 3, 1)  # neighbors are correlated


def kernel(new):
    """Multiply both layers out to one kernel (out, in, kh, kw)."""
    depthwise, pointwise = new
    D = depthwise.weight.unflatten(0, (depthwise.groups, -1)).squeeze(2)
    P = pointwise.weight[:, :, 0, 0].unflatten(1, (depthwise.groups, -1))
    return torch.einsum("oct,cthw->ochw", P, D)


def moments(conv, x):
    X = F.unfold(
        x,
        conv.kernel_size,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
    )
    X = X.transpose(1, 2).flatten(0, 1)  # (patches, in·kh·kw)
    return X.T @ X / len(X)


def loss(conv, new, H):
    E = (kernel(new) - conv.weight).flatten(1)
    return ((E @ H) * E).sum()


class TestSeparable:
    @pytest.mark.parametrize("terms", [1, 2, 5])
    def test_loses_the_singular_values_that_were_left_out(self, terms):
        conv = layer()
        new = lowrank.separable(conv, terms=terms)
        want = sum(
            torch.linalg.svdvals(conv.weight[:, c].flatten(1))[terms:]
            .square()
            .sum()
            for c in range(5)
        )
        error = (kernel(new) - conv.weight).square().sum()
        torch.testing.assert_close(error, want)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"stride": 2, "padding": 1},
            {"padding": (2, 1), "dilation": 2},
            {"padding": "same", "bias": False},
            {"padding": 1, "padding_mode": "reflect"},
            {"kernel_size": (2, 4), "out_channels": 3},
        ],
    )
    def test_is_exact_at_full_rank(self, options):
        conv, x = layer(**options), images()
        full = min(conv.out_channels, conv.weight[0, 0].numel())
        new = lowrank.separable(conv, terms=full)
        torch.testing.assert_close(new(x), conv(x))
        assert (new[1].bias is None) == (conv.bias is None)

    def test_computes_what_its_kernel_says(self):
        conv, x = layer(padding=1, stride=2), images()
        new = lowrank.separable(conv)
        want = F.conv2d(x, kernel(new), conv.bias, stride=2, padding=1)
        torch.testing.assert_close(new(x), want)

    def test_a_separable_kernel_comes_back(self):
        g = torch.Generator().manual_seed(0)
        D = torch.randn(5, 3, 3, generator=g, dtype=torch.float64)
        P = torch.randn(7, 5, generator=g, dtype=torch.float64)
        conv = layer()
        with torch.no_grad():
            conv.weight.copy_(P[:, :, None, None] * D)
        new = lowrank.separable(conv)
        torch.testing.assert_close(kernel(new), conv.weight)

    @pytest.mark.parametrize("out, size", [(512, 3), (16, 5)])
    def test_parameters_and_arithmetic(self, out, size):
        """1/N + 1/k², exactly."""
        conv = layer(
            in_channels=8,
            out_channels=out,
            kernel_size=size,
            padding=size // 2,
            bias=False,
            dtype=torch.float32,
        )
        new, x = lowrank.separable(conv), torch.zeros(2, 8, 6, 6)
        for count in (measure.params, lambda m: measure.macs(m, x)):
            # new / old = 1/N + 1/k², without division
            assert count(new) * out * size**2 == count(conv) * (out + size**2)
        if out == 512:
            ratio = measure.params(new) / measure.params(conv)
            assert round(ratio, 4) == 0.1131

    def test_ordinary_layers_and_their_types(self):
        conv = layer(dtype=torch.bfloat16).eval()
        new = lowrank.separable(conv, terms=2)
        assert [type(m) for m in new] == [nn.Conv2d, nn.Conv2d]
        assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
        assert not new.training and not new[0].training

    def test_nothing_else_changes(self):
        conv = layer()
        before = conv.weight.clone()
        state = torch.random.get_rng_state()
        lowrank.separable(conv, terms=2)
        assert torch.equal(conv.weight, before)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_a_dead_channel(self):
        conv = layer()
        with torch.no_grad():
            conv.weight[:, 2] = 0
        new = lowrank.separable(conv)
        assert (kernel(new)[:, 2] == 0).all()

    def test_errors(self):
        with pytest.raises(ValueError, match="groups=1, got 5"):
            lowrank.separable(layer(out_channels=5, groups=5))
        for terms in (0, 8):
            with pytest.raises(ValueError, match=f"1 to 7, got {terms}"):
                lowrank.separable(layer(), terms=terms)
        with pytest.raises(ValueError, match=r"H must be \(45, 45\)"):
            lowrank.separable(layer(), H=torch.eye(9))


class TestMoments:
    @pytest.mark.parametrize("terms", [1, 3])
    def test_white_inputs_change_nothing(self, terms):
        conv = layer()
        plain = lowrank.separable(conv, terms=terms)
        white = lowrank.separable(conv, terms=terms, H=torch.eye(45))
        torch.testing.assert_close(kernel(white), kernel(plain))

    @pytest.mark.parametrize("terms", [1, 2])
    def test_the_outputs_are_closer(self, terms):
        conv = layer()
        H = moments(conv, images(n=50))
        plain = lowrank.separable(conv, terms=terms)
        aware = lowrank.separable(conv, terms=terms, H=H, damp=0)
        assert loss(conv, aware, H) < 0.7 * loss(conv, plain, H)

    def test_the_second_layer_is_the_least_squares_fit(self):
        conv, x = layer(padding=1), images(n=50)
        new = lowrank.separable(conv, H=moments(conv, x), damp=0)
        inner = new[0](x).transpose(0, 1).flatten(1).T  # (pixels, in)
        target = conv(x) - conv.bias[:, None, None]
        target = target.transpose(0, 1).flatten(1).T
        want = torch.linalg.lstsq(inner, target).solution.T
        torch.testing.assert_close(new[1].weight[:, :, 0, 0], want)

    def test_one_channel_is_optimal(self):
        """With one input channel: the best product of rank 1 there is."""
        conv = layer(in_channels=1)
        H = moments(conv, images(n=50, channels=1))
        new = lowrank.separable(conv, H=H, damp=0)
        root = torch.linalg.cholesky(H)
        s = torch.linalg.svdvals(conv.weight.flatten(1) @ root)
        torch.testing.assert_close(loss(conv, new, H), s[1:].square().sum())

    def test_exact_at_full_rank(self):
        conv, x = layer(), images(n=50)
        new = lowrank.separable(conv, terms=7, H=moments(conv, x))
        torch.testing.assert_close(new(x), conv(x))
