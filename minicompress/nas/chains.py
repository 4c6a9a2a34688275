"""The space of small networks for digits, and how one of them is built."""

from collections import OrderedDict

from torch import nn

from .spaces import Arch, Space

OPS = ("skip", "pool", "conv1", "conv3", "conv5")


def digits_space(widths: tuple[int, ...] = (4, 8)) -> Space:
    """List convolutional networks of four layers for images of 8×8 pixels.

    Each layer is one of five operations.  The first two see 8×8 positions
    and `width` channels, the others 4×4 positions and twice the channels.
    Skipping the first of two layers or the second is the same network: only
    the second form belongs to the space.

    Returns
    -------
    Space
        21² · len(widths) networks, 882 by default.

    Examples
    --------
    >>> len(list(digits_space())), digits_space().size
    (882, 1250)
    """
    layers = {f"layer{i}": OPS for i in range(1, 5)}
    return Space({"width": tuple(widths), **layers}, valid=_skips_last)


def _skips_last(arch: Arch) -> bool:
    pairs = (("layer1", "layer2"), ("layer3", "layer4"))
    return all(arch[a] != "skip" or arch[b] == "skip" for a, b in pairs)


def digits_network(arch: Arch, *, classes: int = 10) -> nn.Sequential:
    """Build an untrained member of `digits_space`.

    A convolution of any size has the same name, so that smaller networks
    can be cut out of larger ones.

    Parameters
    ----------
    arch
        "width" and "layer1" to "layer4".
    classes
        outputs.

    Returns
    -------
    nn.Sequential
        Maps (N, 64) to logits (N, classes).

    Raises
    ------
    ValueError
        If a layer is no operation of the space.

    Examples
    --------
    >>> arch = {"width": 8, "layer1": "conv3", "layer2": "pool"}
    >>> net = digits_network({**arch, "layer3": "conv5", "layer4": "skip"})
    >>> sum(p.numel() for p in net.parameters())
    7442
    """
    c = arch["width"]
    return nn.Sequential(
        OrderedDict(
            image=nn.Unflatten(1, (1, 8, 8)),
            stem=convolution(1, c, 3),
            layer1=operation(arch["layer1"], c),
            layer2=operation(arch["layer2"], c),
            down=nn.MaxPool2d(2),
            wider=convolution(c, 2 * c, 1),
            layer3=operation(arch["layer3"], 2 * c),
            layer4=operation(arch["layer4"], 2 * c),
            mean=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            head=nn.Linear(2 * c, classes),
        )
    )


def operation(op: str, channels: int) -> nn.Module:
    """Build one of `OPS`; it keeps the shape (N, channels, H, W)."""
    if op == "skip":
        return nn.Identity()
    if op == "pool":
        return nn.AvgPool2d(3, stride=1, padding=1)
    if op not in OPS:
        raise ValueError(f"op: {op!r} is none of {OPS}")
    return convolution(channels, channels, int(op.removeprefix("conv")))


def convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Build a padded convolution with BatchNorm and ReLU."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(
                inputs, outputs, kernel, padding=kernel // 2, bias=False
            ),
            norm=nn.BatchNorm2d(outputs),
            relu=nn.ReLU(),
        )
    )
