"""Networks of the shapes that people prune, small, for test_channels."""

import torch
import torch.nn.functional as F
from torch import nn


def norm_relu(c, act=nn.ReLU):
    return nn.Sequential(nn.BatchNorm2d(c), act())


class Bottleneck(nn.Module):
    """ResNet: 1×1, 3×3, 1×1; where shapes differ zeros are appended."""

    def __init__(self, inputs, width, outputs, stride=1, groups=1):
        super().__init__()
        self.a = nn.Conv2d(inputs, width, 1, bias=False)
        self.b = nn.Conv2d(
            width, width, 3, stride, padding=1, groups=groups, bias=False
        )
        self.c = nn.Conv2d(width, outputs, 1)
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(n) for n in (width, width, outputs)
        )
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x):
        y = self.norms[0](self.a(x)).relu_()
        y = F.relu(self.norms[1](self.b(y)))
        y = self.norms[2](self.c(y))
        x = x[:, :, :: self.stride, :: self.stride]
        y += F.pad(x, (0, 0, 0, 0, 0, self.more))
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(
            Bottleneck(6, 4, 6, groups=groups),
            Bottleneck(6, 4, 10, 2, groups),
            Bottleneck(10, 8, 10, groups=groups),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 3, 2, 1)
        return self.fc(torch.flatten(self.pool(self.blocks(x)), 1))


class Inverted(nn.Module):
    """MobileNet v3: expand, depthwise, squeeze and excite, project."""

    def __init__(self, inputs, hidden, outputs, stride=1):
        super().__init__()
        self.expand = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.act1 = norm_relu(hidden, nn.ReLU6)
        self.depth = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden)
        self.act2 = norm_relu(hidden, nn.Hardswish)
        self.squeeze = nn.Conv2d(hidden, 3, 1)
        self.excite = nn.Conv2d(3, hidden, 1)
        self.project = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.skip = inputs == outputs and stride == 1

    def forward(self, x):
        y = self.act2(self.depth(self.act1(self.expand(x))))
        s = F.adaptive_avg_pool2d(y, 1)
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(s))))
        y = self.norm(self.project(y))
        return x + y if self.skip else y


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), norm_relu(4))
        self.blocks = nn.Sequential(
            Inverted(4, 8, 4), Inverted(4, 6, 5, 2), Inverted(5, 7, 5)
        )
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(5, 4))

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean([2, 3]))


class DenseNet(nn.Module):
    """Each layer reads everything before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(3))
        self.convs = nn.ModuleList(
            nn.Conv2d(4 + 3 * i, 3, 3, padding=1) for i in range(3)
        )
        self.transition = nn.Conv2d(13, 6, 1)
        self.last = nn.BatchNorm2d(6)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x):
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        x = F.avg_pool2d(self.transition(torch.cat(features, 1)), 4)
        return self.head(F.elu(self.last(x)).flatten(1))


class ViT(nn.Module):
    """Patches, a class token, fused queries, keys and values, LayerScale."""

    def __init__(self, width=12, head_dim=3):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 5, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.rand(width))
        self.mlp = nn.Sequential(
            nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)
        self.head_dim = head_dim

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        token = self.token.expand(len(x), -1, -1)
        x = torch.cat([token, x], 1) + self.places
        qkv = self.qkv(self.norm1(x))
        qkv = qkv.reshape(len(x), 5, 3, -1, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        w = q @ k.transpose(-2, -1) / self.head_dim**0.5
        y = (w.softmax(-1) @ v).transpose(1, 2).reshape(len(x), 5, -1)
        x = x + self.scale * self.out(y)
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


class Llama(nn.Module):
    """RMSNorm, grouped queries, a gated MLP, the table as output layer."""

    def __init__(self, width=8, heads=4, kv=2, head_dim=2, hidden=10):
        super().__init__()
        self.tokens = nn.Embedding(11, width)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.kv = nn.Linear(width, 2 * kv * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.norm = nn.RMSNorm(width)
        self.head_dim = head_dim
        self.register_buffer("mask", torch.ones(9, 9).tril())

    def forward(self, ids):
        x = self.tokens(ids)
        n, t, _ = x.shape
        y = self.norm1(x)
        q, (k, v) = self.q(y), self.kv(y).chunk(2, -1)
        q, k, v = (
            z.view(n, t, -1, self.head_dim).transpose(1, 2) for z in (q, k, v)
        )
        y = F.scaled_dot_product_attention(
            q, k, v, self.mask[:t, :t] > 0, enable_gqa=True
        )
        x = x + self.out(y.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        x = x + self.down(F.silu(gate) * up)
        return self.norm(x) @ self.tokens.weight.T


class UNet(nn.Module):
    """Down and up again, with a skip connection and GroupNorm."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.GroupNorm(3, 6)
        self.b = nn.Conv2d(6, 5, 3, stride=2, padding=1)
        self.act = nn.PReLU(5)
        self.up = nn.ConvTranspose2d(5, 4, 2, 2)
        self.depth = nn.ConvTranspose2d(10, 20, 2, 2, groups=10)
        self.c = nn.Conv2d(20, 2, 1)

    def forward(self, x):
        x = F.leaky_relu(self.norm(self.a(x)), 0.1)
        y = self.up(self.act(self.b(x)))
        y = torch.cat([y, x], 1)
        y = F.interpolate(F.instance_norm(self.depth(y)), scale_factor=2)
        return self.c(y)


class Shuffle(nn.Module):
    """ShuffleNet v2: half of the channels pass, then both are interleaved."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.branch = nn.Sequential(
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1, groups=4),
            nn.Conv2d(4, 4, 1),
        )
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat([a, F.relu(self.branch(b))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)
        return self.head(x).mean((2, 3))


class Mixer(nn.Module):
    """MLP-Mixer: a linear layer over the places of each channel."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, 4)
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.places = nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 4))
        self.features = nn.Sequential(
            nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)
        )
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.places(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.features(self.norm2(x))
        return self.head(x.mean(1))


class Own(nn.Module):
    """A user's module: raw parameters, functional layers, odd wiring."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(7, 6))
        self.b = nn.Parameter(torch.randn(7))
        self.v = nn.Parameter(torch.randn(7, 5))
        self.kernel = nn.Parameter(torch.randn(4, 1, 3))
        self.register_buffer("shift", torch.randn(7, 1).squeeze(1))
        self.shared = nn.Linear(5, 5)
        self.a, self.c = nn.Linear(5, 3), nn.Linear(5, 2)
        self.last = nn.Linear(9, 2)

    def forward(self, x):
        y = torch.tanh(F.linear(x, self.w, self.b) - self.shift)
        y = y @ self.v
        y = self.shared(F.softplus(self.shared(y)))
        z = torch.cat([self.a(y), self.c(y)], -1)
        y = y * z + z.clamp(min=0)
        k = F.conv1d(x[:, None], self.kernel).amax(-1)
        return self.last(torch.cat((y, k), 1))


IMAGE = (2, 3, 8, 8)
SHAPES = {
    "ResNet": (ResNet, IMAGE),
    "ResNeXt": (lambda: ResNet(groups=2), IMAGE),
    "MobileNet": (MobileNet, IMAGE),
    "DenseNet": (DenseNet, IMAGE),
    "ViT": (ViT, IMAGE),
    "Llama": (Llama, None),
    "UNet": (UNet, (2, 1, 8, 8)),
    "Shuffle": (Shuffle, IMAGE),
    "Mixer": (Mixer, IMAGE),
    "Own": (Own, (2, 6)),
}


def example(name: str, seed: int = 0):
    """Build a network and its input; statistics of norms are random."""
    torch.manual_seed(seed)
    build, shape = SHAPES[name]
    model = randomized(build())
    if shape is None:
        return model, torch.randint(0, 11, (2, 6))
    return model, torch.randn(shape, dtype=torch.float64)


def randomized(model: nn.Module) -> nn.Module:
    for m in model.modules():
        for t in m.parameters(recurse=False):
            if t.ndim > 1:
                nn.init.xavier_normal_(t)
            else:
                nn.init.normal_(t, std=0.5)
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return model.double().eval()
