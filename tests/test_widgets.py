"""Sliders carry every frame with them and are described in words."""

import base64
import io
import re

import ipywidgets
import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from minicompress import plot, widgets

mpl.use("Agg")


def line(value, height=3.0):
    ax = plot.figure(height=height)[1]
    x = np.linspace(0, 1, 50)
    ax.plot(x, x**value, color=plot.COLORS["quantize"])
    ax.set(xlabel="x", ylabel="y", xlim=(0, 1), ylim=(0, 1))
    return ax


def images_in(widget):
    if isinstance(widget, ipywidgets.HTML):
        return [widget.value]
    return [x for c in getattr(widget, "children", ()) for x in images_in(c)]


@pytest.fixture(scope="module")
def bits():
    return widgets.slider(
        line, [1, 2, 3], label="bits", alt="A curve at {} bits.", start=2
    )


def test_each_value_has_its_frame_and_its_words(bits):
    control, stack = bits.children
    assert isinstance(control, ipywidgets.SelectionSlider)
    assert isinstance(stack, ipywidgets.Stack)
    assert control.options == ("1", "2", "3")
    assert control.description == "bits"
    assert (control.index, stack.selected_index) == (1, 1)
    alts = [re.search('alt="(.*?)"', i)[1] for i in images_in(bits)]
    assert alts == [f"A curve at {b} bits." for b in (1, 2, 3)]
    assert all('class="dark-light"' in i for i in images_in(bits))


def test_the_slider_is_linked_in_the_browser(monkeypatch):
    linked = []
    monkeypatch.setattr(
        ipywidgets, "jslink", lambda a, b: linked.append((a, b))
    )
    frames = widgets.slider(line, [1, 2], label="p", alt="p is {}")
    control, stack = frames.children
    assert linked == [((control, "index"), (stack, "selected_index"))]


def test_frames_are_small_pngs_of_one_size_and_white(bits):
    for text in images_in(bits):
        data = base64.b64decode(re.search('base64,(.*?)"', text)[1])
        image = Image.open(io.BytesIO(data))
        assert image.format == "PNG" and image.size == (845, 390)
        assert len(image.getcolors()) <= 48
        assert image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        assert 'width="845" height="390"' in text
        assert "max-width:100%;height:auto" in text


def test_the_same_figure_gives_the_same_bytes():
    ax = line(2)
    again = line(2)
    assert widgets.png(ax) == widgets.png(again) == widgets.png(ax.figure)
    assert b"Software" not in widgets.png(ax)
    assert widgets.png(ax) != widgets.png(line(3))


def test_shrunk_picture_looks_the_same_in_half_the_bytes():
    raw = io.BytesIO()
    line(2).figure.savefig(raw, format="png")
    small = widgets.shrink(raw.getvalue(), colors=64)
    assert len(small) < 0.5 * len(raw.getvalue())
    before, after = (
        np.asarray(Image.open(io.BytesIO(b)).convert("RGB"), dtype=float)
        for b in (raw.getvalue(), small)
    )
    assert before.shape == after.shape
    assert np.abs(before - after).mean() < 1
    assert widgets.shrink(small) == small


def test_twenty_frames_of_a_line_weigh_less_than_200_kb():
    frames = widgets.slider(line, range(1, 21), label="p", alt="p is {}")
    assert len(images_in(frames)) == 20
    assert sum(map(len, images_in(frames))) < 200_000


def test_figures_are_closed():
    before = mpl.pyplot.get_fignums()
    widgets.slider(line, [1, 2], label="p", alt="p is {}")
    assert mpl.pyplot.get_fignums() == before


def test_a_still_image_stands_in_where_widgets_do_not_work(bits):
    bundle = bits._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["image/png"] in images_in(bits)[1]
    assert len(bundle["text/plain"]) < 200


def test_alt_may_be_a_function_and_is_escaped():
    data = widgets.png(line(1))
    frames = widgets.frames(
        [data, data], values=["a", "b"], label="x", alt=lambda v: f'<"{v}">'
    )
    assert 'alt="&lt;&quot;a&quot;&gt;"' in images_in(frames)[0]


def test_toggle_uses_buttons():
    frames = widgets.toggle(line, [1, 2], label="power", alt="power {}")
    assert isinstance(frames.children[0], ipywidgets.ToggleButtons)
    assert len(images_in(frames)) == 2


def test_two_sliders_nest_their_stacks(monkeypatch):
    linked = []
    monkeypatch.setattr(
        ipywidgets, "jslink", lambda a, b: linked.append((a[0], b[0]))
    )
    frames = widgets.two_sliders(
        lambda a, b: line(a * b),
        [1, 2],
        [1, 3, 5],
        labels=("a", "b"),
        alt="a is {}, b is {}",
    )
    first, second, stack = frames.children
    assert [len(inner.children) for inner in stack.children] == [3, 3]
    assert {(id(a), id(b)) for a, b in linked} == {
        (id(second), id(stack.children[0])),
        (id(second), id(stack.children[1])),
        (id(first), id(stack)),
    }
    inner = stack.children[1].children[2].value
    assert 'alt="a is 2, b is 5"' in inner
    assert base64.b64encode(widgets.png(line(10))).decode() in inner


PIXEL = widgets.png(line(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": [1]}, "2 images for 1 values"),
        ({"values": [1, 1]}, "values must be distinct"),
        ({"values": []}, "values must be distinct"),
        ({"alt": "the same for all"}, "alt must differ"),
        ({"label": " "}, "label must name"),
        ({"start": 9}, "start must be one of"),
        ({"images": [PIXEL, b"GIF89a"]}, "must be PNG"),
        ({"images": [PIXEL, widgets.png(line(1, 4.0))]}, "one size"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = {
        "images": [PIXEL, PIXEL],
        "values": [1, 2],
        "label": "x",
        "alt": "x = {}",
    }
    arguments = {**good, **arguments}
    with pytest.raises(ValueError, match=message):
        widgets.frames(arguments.pop("images"), **arguments)


def test_draw_must_return_a_figure():
    with pytest.raises(ValueError, match="draw must return"):
        widgets.slider(lambda v: None, [1, 2], label="x", alt="{}")
