"""The networks that look at images: an MLP and three convolutional ones.

All take images as (N, C, H, W), and flat or gray ones too. Their forwards
read no width from the configuration, so a model whose layers were pruned,
factorized or removed still runs.
"""

import itertools
import math

import torch.nn.functional as F
from torch import Tensor, nn

from .config import MOST, configured


def as_images(x: Tensor) -> Tensor:
    """Give flat square images (N, H·W) or gray ones (N, H, W) all four axes.

    Examples
    --------
    >>> import torch
    >>> as_images(torch.zeros(5, 64)).shape
    torch.Size([5, 1, 8, 8])
    """
    if x.dim() == 2:
        side = math.isqrt(x.shape[1])
        if side * side != x.shape[1]:
            raise ValueError(f"x: {x.shape[1]} pixels are not a square")
        x = x.unflatten(1, (side, side))  # (N, H, W)
    return x.unsqueeze(1) if x.dim() == 3 else x  # (N, C, H, W)


class MLP(nn.Module):
    """A multilayer perceptron with ReLU; the default is the digits model.

    Parameters
    ----------
    widths : tuple of int
        Inputs, hidden units layer by layer, classes.

    Examples
    --------
    >>> sum(p.numel() for p in MLP().parameters())
    6570
    """

    @configured
    def __init__(self, widths: tuple[int, ...] = (64, 64, 32, 10)):
        if len(widths) < 2:
            raise ValueError(f"widths needs inputs and outputs: {widths}")
        pairs = itertools.pairwise(widths)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of a batch (N, ...)."""
        x = x.flatten(1)  # (N, inputs)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


def lenet_300_100() -> MLP:
    """Build LeNet-300-100, the MLP of the pruning papers (266,610 weights)."""
    return MLP(widths=(784, 300, 100, 10))


class LeNet5(nn.Module):
    """LeNet-5 in Caffe's widths, 20-50-500: the one of Deep Compression.

    As in Caffe the convolutions have no ReLU: max pooling is their
    nonlinearity.

    Parameters
    ----------
    classes : int

    References
    ----------
    LeCun et al. 1998, "Gradient-based learning applied to document
    recognition"; Han et al. 2015, arXiv:1510.00149, table 3.
    """

    @configured
    def __init__(self, classes: int = 10):
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, 1, 28, 28)."""
        x = F.max_pool2d(self.conv1(as_images(x)), 2)  # (N, 20, 12, 12)
        x = F.max_pool2d(self.conv2(x), 2)  # (N, 50, 4, 4)
        x = F.relu(self.fc1(x.flatten(1)))  # (N, 500)
        return self.fc2(x)


class CNN(nn.Module):
    """A plain convolutional network: 3×3 convolution, BatchNorm, ReLU, pool.

    Parameters
    ----------
    channels : tuple of int
        Filters of each convolution; each one but the last is followed by
        2×2 max pooling, the last by the mean over all positions.
    classes : int
    inputs : int
        Channels of the image.

    Examples
    --------
    >>> import torch
    >>> CNN(channels=(8, 16))(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    @configured
    def __init__(
        self,
        channels: tuple[int, ...] = (16, 32, 64),
        classes: int = 10,
        inputs: int = 1,
    ):
        pairs = zip([inputs, *channels[:-1]], channels, strict=True)
        self.convs = nn.ModuleList(conv3x3(a, b) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c) for c in channels)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, inputs, H, W)."""
        x = as_images(x)
        layers = zip(self.convs, self.norms, strict=True)
        for i, (conv, norm) in enumerate(layers):
            x = F.relu(norm(conv(x)))  # (N, channels[i], H, W)
            if i + 1 < len(self.convs):
                x = F.max_pool2d(x, 2)  # H and W halve
        return self.head(x.mean((2, 3)))  # (N, classes)


class ResNet(nn.Module):
    """A residual network for small images, with BatchNorm.

    `ResNet((16, 32, 64), blocks=3, inputs=3)` is the ResNet-20 for CIFAR
    with projection shortcuts (option B).

    Parameters
    ----------
    channels : tuple of int
        Filters of each stage; every stage but the first halves H and W.
    blocks : int
        Residual blocks in each stage, two convolutions each.
    classes : int
    inputs : int
        Channels of the image.

    References
    ----------
    He et al. 2016, arXiv:1512.03385, section 4.2.
    """

    @configured
    def __init__(
        self,
        channels: tuple[int, ...] = (16, 32, 64),
        blocks: int = 1,
        classes: int = 10,
        inputs: int = 1,
    ):
        if len(channels) * blocks > MOST:
            raise ValueError(f"blocks: {blocks} in each of {len(channels)}")
        self.conv = conv3x3(inputs, channels[0])
        self.norm = nn.BatchNorm2d(channels[0])
        self.blocks = nn.ModuleList()
        before = channels[0]
        for stage, width in enumerate(channels):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                self.blocks.append(Residual(before, width, stride))
                before = width
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, classes) of images (N, inputs, H, W)."""
        x = F.relu(self.norm(self.conv(as_images(x))))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))  # (N, classes)


class Residual(nn.Module):
    """Two convolutions beside a shortcut, which projects if shapes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if inputs != outputs or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False),
                nn.BatchNorm2d(outputs),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H/stride, W/stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Build a padded 3×3 convolution; BatchNorm makes its bias needless."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
