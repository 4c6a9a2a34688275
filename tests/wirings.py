"""Small networks with one thing each that a tracer of channels can miss."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn import BatchNorm1d, Conv1d, Conv2d, ConvTranspose2d, Linear


class Wired(nn.Module):
    """Named parts and a forward that connects them."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.connect = forward
        for name, part in parts.items():
            if isinstance(part, torch.Tensor):
                self.register_buffer(name, part)
            else:
                self.add_module(name, part)

    def forward(self, x):
        return self.connect(self, x)


def rotary(s, x):
    """Rotary positions, norms in each head, a mask; all by einsum."""

    def turn(x):
        a, b = x[..., :2], x[..., 2:]
        return x * s.cos + torch.cat([-b, a], -1) * s.sin

    q, k, v = (
        f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (s.q, s.k, s.v)
    )
    q, k = turn(s.qn(q)), turn(s.kn(k))
    w = torch.einsum("bhqd,bhkd->bhqk", q, k) / 2 + s.bias
    w = w.masked_fill(s.mask == 0, -1e9).softmax(-1)
    return s.o(torch.einsum("bhqk,bhkd->bqhd", w, v).flatten(2))


def queries(s, x):
    """Learned queries look at the tokens."""
    q = s.q(s.query).view(1, 3, -1, 4).transpose(1, 2).expand(2, -1, -1, -1)
    k, v = (f(x).view(2, 5, -1, 4).transpose(1, 2) for f in (s.k, s.v))
    y = F.scaled_dot_product_attention(q, k, v)
    return s.o(y.transpose(1, 2).reshape(2, 3, -1))


def twice(s, x):
    y = s.a(x)
    return s.h(F.relu(s.c(F.relu(s.c(y)) + y)).amax((2, 3)))


def one_gate(s, x):
    y = F.relu(s.a(x))
    return s.h((y * torch.sigmoid(s.m(y))).mean((2, 3)))


def pooled(s, x):
    y = s.a(x)
    return s.h((y * s.w(torch.tanh(y)).softmax(1)).sum(1))


def with_input(s, x):
    y = torch.cat([x, F.relu(s.a(x)), x.sum(-1, keepdim=True)], -1)
    return s.b(y)


def last_axis(s, x):
    """LayerNorm over channels of an image (ConvNeXt)."""
    return s.h(s.n(s.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def temporal(s, x):
    y = s.b(F.gelu(s.a(x.transpose(1, 2))))
    return s.h(s.n(y).mean(-1))


def in_place(s, x):
    return s.h(s.a(x).clone().mul_(s.b(x)).add_(1).clamp_(0))


def two_outputs(s, x):
    y = s.a(x)
    return s.h(y), {"features": s.b(y)}


def chain(s, x):
    return s.h(s.d(s.a(x)))


def outer(s, x):
    return s.h((s.a(x)[..., None] * s.b(x)[..., None, :]).flatten(-2))


def matrix(s, x):
    return s.h(F.relu(s.w.T @ F.relu(s.w @ s.a(x))))


IMAGE, TOKENS = (2, 3, 8, 8), (2, 5, 6)


def two(forward, h=4):
    return lambda: Wired(
        forward, a=Linear(6, 4), b=Linear(6, 4), h=Linear(h, 2)
    )


def image(forward, a=8, h=8, **parts):
    return lambda: Wired(forward, a=Conv2d(3, a, 1), h=Conv2d(h, 2, 1), **parts)


def tokens(forward, a=8, h=8, **parts):
    return lambda: Wired(forward, a=Linear(6, a), h=Linear(h, 2), **parts)


def heads(forward, **parts):
    return lambda: Wired(
        forward,
        q=Linear(6, 12),
        k=Linear(6, 12),
        v=Linear(6, 12),
        o=Linear(12, 3),
        **parts,
    )


# name: (network, shape of the input, {group: size})
WIRINGS = {
    "rotary": (
        heads(
            rotary,
            qn=nn.LayerNorm(4),
            kn=nn.RMSNorm(4),
            cos=torch.rand(5, 4),
            sin=torch.rand(5, 4),
            bias=torch.rand(3, 5, 5),
            mask=torch.ones(5, 5).tril(),
        ),
        TOKENS,
        {"q": 3},
    ),
    "queries": (heads(queries, query=torch.rand(1, 3, 6)), TOKENS, {"q": 3}),
    "twice": (
        lambda: Wired(
            twice, a=Conv2d(3, 6, 3), c=Conv2d(6, 6, 1), h=Linear(6, 2)
        ),
        IMAGE,
        {"a": 6},
    ),
    "one gate": (
        lambda: Wired(
            one_gate, a=Conv2d(3, 6, 3), m=Conv2d(6, 1, 1), h=Linear(6, 2)
        ),
        IMAGE,
        {"a": 6},
    ),
    "pooled": (tokens(pooled, w=Linear(8, 1)), TOKENS, {"a": 8}),
    "with input": (
        lambda: Wired(with_input, a=Linear(6, 7), b=Linear(14, 2)),
        TOKENS,
        {"a": 7},
    ),
    "last axis": (image(last_axis, n=nn.LayerNorm(8)), IMAGE, {"a": 8}),
    "no affine": (
        tokens(
            lambda s, x: s.h(s.n(s.a(x))),
            n=nn.LayerNorm(8, elementwise_affine=False),
        ),
        TOKENS,
        {"a": 8},
    ),
    "group norm": (
        image(
            lambda s, x: s.h(s.n(s.a(x))),
            n=nn.GroupNorm(4, 8, affine=False),
        ),
        IMAGE,
        {"a": 4},
    ),
    "temporal": (
        lambda: Wired(
            temporal,
            a=Conv1d(6, 8, 3, padding=2, dilation=2),
            b=Conv1d(8, 6, 3),
            n=BatchNorm1d(6),
            h=Linear(6, 2),
        ),
        TOKENS,
        {"a": 8, "b": 6},
    ),
    "in place": (two(in_place), TOKENS, {"a": 4}),
    "two outputs": (tokens(two_outputs, b=Linear(8, 3)), TOKENS, {"a": 8}),
    "multiplier": (
        image(chain, 4, 12, d=Conv2d(4, 12, 3, groups=4)),
        IMAGE,
        {"a": 4},
    ),
    "transposed groups": (
        image(chain, 4, 12, d=ConvTranspose2d(4, 12, 3, 2, groups=2)),
        IMAGE,
        {"a": 2},
    ),
    "reflected": (
        image(chain, d=Conv2d(8, 8, 3, padding="same", padding_mode="reflect")),
        IMAGE,
        {"a": 8, "d": 8},
    ),
    "graph": (tokens(matrix, w=torch.rand(5, 5)), TOKENS, {"a": 8}),
    "gated": (tokens(lambda s, x: s.h(F.glu(s.a(x))), h=4), TOKENS, {"a": 4}),
    "maxout": (
        tokens(lambda s, x: s.h(s.a(x).unflatten(-1, (-1, 2)).amax(-1)), h=4),
        TOKENS,
        {"a": 4},
    ),
    "repeated": (
        tokens(lambda s, x: s.h(s.a(x).relu().repeat_interleave(2, -1)), h=16),
        TOKENS,
        {"a": 8},
    ),
    "tiled": (
        tokens(lambda s, x: s.h(s.a(x).relu().repeat(1, 1, 2)), h=16),
        TOKENS,
        {"a": 8},
    ),
    "stacked": (
        two(lambda s, x: s.h(torch.stack([s.a(x), s.b(x)], -1).amax(-1))),
        TOKENS,
        {"a": 4},
    ),
    "larger": (
        two(lambda s, x: s.h(torch.max(s.a(x), s.b(x)))),
        TOKENS,
        {"a": 4},
    ),
    "chosen": (
        two(lambda s, x: s.h(torch.where(s.a(x) > 0, s.b(x), -1.0))),
        TOKENS,
        {"a": 4},
    ),
    "pixels": (
        image(lambda s, x: s.h(F.pixel_shuffle(s.a(x), 2)), h=2),
        IMAGE,
        {"a": 2},
    ),
    "fewer pixels": (
        image(lambda s, x: s.h(F.pixel_unshuffle(s.a(x), 2)), h=32),
        IMAGE,
        {"a": 8},
    ),
    "interleaved": (
        image(lambda s, x: s.h(F.channel_shuffle(s.a(x), 2))),
        IMAGE,
        {"a": 4},
    ),
    "single channels": (
        lambda: Wired(
            lambda s, x: s.h(torch.cat([s.a(x), s.b(x)], 1).relu() + s.c(x)),
            a=Conv2d(3, 1, 1),
            b=Conv2d(3, 1, 1),
            c=Conv2d(3, 2, 1),
            h=Conv2d(2, 2, 1),
        ),
        IMAGE,
        {},
    ),
    "outer product": (two(outer, h=16), TOKENS, {}),
}
