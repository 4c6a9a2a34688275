"""Sliders that need no kernel: every frame is drawn beforehand.

A slider is linked in the browser to a stack of images, so it moves in the
published book as it does in Jupyter.
"""

import base64
import html
import io
from collections.abc import Callable, Sequence

import ipywidgets
import matplotlib.pyplot as plt
from PIL import Image


class Frames(ipywidgets.VBox):
    """Controls above a stack of images, with one image to fall back on."""

    def __init__(self, children, still: bytes):
        super().__init__(children)
        self.add_class("mc-frames")
        self._still = base64.b64encode(still).decode()

    def _repr_mimebundle_(self, **kwargs):
        # where widgets cannot be drawn (PDF, GitHub) the still image is
        bundle = super()._repr_mimebundle_(**kwargs)
        return {**bundle, "image/png": self._still}


def png(figure, *, dpi: int = 130, colors: int = 48) -> bytes:
    """Draw a matplotlib figure as a small PNG, always the same bytes.

    Parameters
    ----------
    figure : Figure or Axes
        What to draw, at its own size.
    dpi : int
        Pixels per inch: 130 makes 845 of a figure of 6.5 inches.
    colors : int
        Size of the palette, 2 to 256.

    Returns
    -------
    bytes
        The file.
    """
    figure = getattr(figure, "figure", None)
    if not hasattr(figure, "savefig"):
        raise ValueError("draw must return a matplotlib Figure or Axes")
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=dpi, metadata={"Software": None})
    return shrink(raw.getvalue(), colors=colors)


def shrink(image: bytes, *, colors: int = 48) -> bytes:
    """Store a PNG with few colors: a third of the bytes, for a chart.

    Parameters
    ----------
    image : bytes
        A PNG; one that has a palette already is returned as it is.
    colors : int
        Size of the palette, 2 to 256.

    Returns
    -------
    bytes
        A PNG of the same size in pixels, without transparency.
    """
    opened = Image.open(io.BytesIO(image))
    if opened.mode == "P":
        return image
    small = io.BytesIO()
    few = opened.convert("RGB").quantize(
        colors, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
    )
    few.save(small, format="png", optimize=True)
    return small.getvalue()


def frames(
    images: Sequence[bytes],
    *,
    values: Sequence,
    label: str,
    alt: str | Callable[..., str],
    start=None,
) -> Frames:
    """Put finished images behind a slider.

    Parameters
    ----------
    images : sequence of bytes
        One PNG per value, all of one size in pixels.
    values : sequence
        What the slider shows, one distinct value per image.
    label : str
        Name of the slider, with the unit.
    alt : str or callable
        Description of an image for readers who cannot see it: a format
        string with one `{}` for the value, or a function of the value.
    start : object, optional
        The value shown first; default is the first.

    Returns
    -------
    Frames
        A widget that works without a kernel.

    Raises
    ------
    ValueError
        If the numbers of images and values differ, an image is not a PNG
        of the common size, a value or a description occurs twice, or
        `start` is not one of the values.
    """
    return _single(
        ipywidgets.SelectionSlider, images, values, label, alt, start
    )


def slider(
    draw: Callable,
    values: Sequence,
    *,
    label: str,
    alt: str | Callable[..., str],
    start=None,
) -> Frames:
    """Draw one figure per value and put them behind a slider.

    Parameters
    ----------
    draw : callable
        `draw(value)` returns a matplotlib Figure or Axes; it is closed
        here.  Fix the axis limits in it, or the picture jumps.
    values, label, alt, start
        As in `frames`.

    Returns
    -------
    Frames
        A widget that works without a kernel.
    """
    images = [_drawn(draw, value) for value in values]
    return frames(images, values=values, label=label, alt=alt, start=start)


def toggle(
    draw: Callable,
    values: Sequence,
    *,
    label: str,
    alt: str | Callable[..., str],
    start=None,
) -> Frames:
    """Draw one figure per value and choose among them with buttons.

    Parameters
    ----------
    draw, values, label, alt, start
        As in `slider`.

    Returns
    -------
    Frames
        A widget that works without a kernel.
    """
    images = [_drawn(draw, value) for value in values]
    return _single(ipywidgets.ToggleButtons, images, values, label, alt, start)


def two_sliders(
    draw: Callable,
    first: Sequence,
    second: Sequence,
    *,
    labels: tuple[str, str],
    alt: str | Callable[..., str],
) -> Frames:
    """Draw one figure per pair of values, behind two sliders.

    Parameters
    ----------
    draw : callable
        `draw(a, b)` returns a matplotlib Figure or Axes.
    first, second : sequence
        Values of the two sliders; len(first) * len(second) figures are
        drawn and stored, so keep both short.
    labels : tuple of str
        Names of the two sliders.
    alt : str or callable
        A format string with two `{}`, or a function of two values.

    Returns
    -------
    Frames
        A widget that works without a kernel.
    """
    pairs = [(a, b) for a in first for b in second]
    images = [_drawn(draw, *pair) for pair in pairs]
    shown = _images(images, pairs, [_describe(alt, *p) for p in pairs])
    kind, n = ipywidgets.SelectionSlider, len(second)
    outer = _control(kind, first, labels[0], None)
    inner = _control(kind, second, labels[1], None)
    stacks = [_linked(inner, shown[i : i + n]) for i in range(0, len(shown), n)]
    return Frames([outer, inner, _linked(outer, stacks)], images[0])


def _single(kind, images, values, label, alt, start) -> Frames:
    control = _control(kind, values, label, start)
    texts = [_describe(alt, value) for value in values]
    stack = _linked(control, _images(images, values, texts))
    return Frames([control, stack], images[control.index])


def _control(kind, values, label: str, start):
    options = [str(value) for value in values]
    if not options or len(set(options)) < len(options):
        raise ValueError(f"values must be distinct, got {options}")
    if not label.strip():
        raise ValueError("label must name the slider")
    first = options[0] if start is None else str(start)
    if first not in options:
        raise ValueError(f"start must be one of {options}, got {start!r}")
    style = {"description_width": "initial"}
    if kind is ipywidgets.ToggleButtons:
        style["button_width"] = "auto"
    return kind(
        options=options,
        value=first,
        description=label,
        style=style,
        layout={"width": "auto", "max_width": "40rem"},
    )


def _linked(control, children) -> ipywidgets.Stack:
    stack = ipywidgets.Stack(children, selected_index=control.index)
    ipywidgets.jslink((control, "index"), (stack, "selected_index"))
    return stack


def _images(images, values, texts) -> list[ipywidgets.HTML]:
    if len(images) != len(values):
        raise ValueError(
            f"images and values must match, got {len(images)} images "
            f"for {len(values)} values"
        )
    if len(set(texts)) < len(texts):
        raise ValueError(f"alt must differ from frame to frame: {texts[0]!r}")
    sizes = {_size(image) for image in images}
    if len(sizes) > 1:
        raise ValueError(f"images must have one size, got {sorted(sizes)}")
    return [_html(i, t) for i, t in zip(images, texts, strict=True)]


def _html(image: bytes, text: str) -> ipywidgets.HTML:
    width, height = _size(image)
    data = base64.b64encode(image).decode()
    # dark-light: the theme must not dim the image in dark mode
    return ipywidgets.HTML(
        f'<img class="dark-light" alt="{html.escape(text)}" '
        f'width="{width}" height="{height}" '
        'style="max-width:100%;height:auto;background:white" '
        f'src="data:image/png;base64,{data}">'
    )


def _size(image: bytes) -> tuple[int, int]:
    if image[:8] != b"\x89PNG\r\n\x1a\n":
        raise ValueError("images must be PNG files as bytes")
    with Image.open(io.BytesIO(image)) as opened:
        return opened.size


def _describe(alt, *values) -> str:
    return alt(*values) if callable(alt) else alt.format(*values)


def _drawn(draw, *values) -> bytes:
    figure = draw(*values)
    image = png(figure)
    plt.close(figure.figure)
    return image
