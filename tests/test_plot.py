"""Figures are readable, reproducible and show what they were given."""

import re
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from minicompress import plot

mpl.use("Agg")
BOOK = Path(__file__).parents[1] / "book"


@pytest.fixture(autouse=True)
def closed():
    with mpl.rc_context():
        yield
    plt.close("all")


DRAWN = {
    "curve": lambda: plot.curve(
        [2, 4, 8], np.ones((3, 3)), label="a", family="quantize"
    ),
    "bars": lambda: plot.bars({"a": 3.0, "b": 1.0}, xlabel="size (kB)"),
    "ledger": lambda: plot.ledger([("1 original", 20_000), ("5 int8", 5_000)]),
    "taxonomy": plot.taxonomy,
}


@pytest.mark.parametrize("kind", ["png", "svg"])
@pytest.mark.parametrize("name", DRAWN)
def test_two_runs_give_the_same_file(name, kind, tmp_path):
    first = plot.save(DRAWN[name]().figure, tmp_path / f"a.{kind}")
    second = plot.save(DRAWN[name]().figure, tmp_path / f"b.{kind}")
    assert first.read_bytes() == second.read_bytes()
    assert b"Software" not in first.read_bytes()


@pytest.mark.parametrize("name", DRAWN)
def test_text_is_at_least_11_points_inside_the_figure(name):
    fig = DRAWN[name]().figure
    assert fig.get_figwidth() == 6.5
    fig.canvas.draw()
    box = fig.bbox.padded(1)
    texts = [
        t
        for t in fig.findobj(mpl.text.Text)
        if t.get_visible() and t.get_text()
    ]
    sup = "mathdefault"  # 10^4 on a logarithmic axis
    assert len(texts) > 3
    for text in texts:
        assert text.get_fontsize() >= 11 or sup in text.get_text()
        place = text.get_window_extent()
        ticks = text.get_text() in {
            t.get_text()
            for ax in fig.axes
            for t in (*ax.get_xticklabels(), *ax.get_yticklabels())
        }
        # labels of ticks outside the limits exist but are not drawn
        assert ticks or (
            box.x0 <= place.x0
            and place.x1 <= box.x1
            and box.y0 <= place.y0
            and place.y1 <= box.y1
        ), text.get_text()


def test_style_is_white_without_a_frame():
    ax = plot.figure()[1]
    assert ax.figure.get_facecolor() == (1.0, 1.0, 1.0, 1.0)
    assert not ax.spines["top"].get_visible()
    assert not ax.spines["right"].get_visible()


# Viénot, Brettel and Mollon (1999): what a dichromat sees, in linear RGB
SEEN = {
    "normal": np.eye(3),
    "protan": [[0.1124, 0.8876, 0], [0.1124, 0.8876, 0], [0.004, -0.004, 1]],
    "deutan": [[0.2927, 0.7073, 0], [0.2927, 0.7073, 0], [-0.0223, 0.0223, 1]],
}


@pytest.mark.parametrize("eye", SEEN)
def test_colors_stay_apart(eye):
    # distance in linear light; a second green beside orange would fail
    rgb = np.array([to_rgb(c) for c in plot.COLORS.values()]) ** 2.2
    seen = rgb @ np.asarray(SEEN[eye]).T
    gaps = np.linalg.norm(seen[:, None] - seen[None], axis=-1)
    np.fill_diagonal(gaps, np.inf)
    assert gaps.min() > 0.1


def test_curve_draws_mean_and_sample_deviation():
    runs = np.array([[1.0, 5.0], [3.0, 5.0], [5.0, 8.0]])
    ax = plot.curve([2, 4], runs, label="x", family="prune")
    assert np.allclose(ax.lines[0].get_ydata(), [3, 6])
    assert ax.lines[0].get_color() == plot.COLORS["prune"]
    band = ax.collections[0].get_paths()[0].vertices
    assert np.isclose(band[:, 1].min(), 3 - np.std([1, 3, 5], ddof=1))
    assert np.isclose(band[:, 1].max(), 6 + np.std([5, 5, 8], ddof=1))


def test_one_run_has_no_band():
    ax = plot.curve([1, 2], [3, 4], label="x", family="prune")
    assert not ax.collections
    same = plot.curve([1, 2], [4, 4], label="y", family="share", ax=ax)
    assert same is ax and len(ax.lines) == 2


def test_bars_run_from_top_to_bottom_with_their_values():
    ax = plot.bars(
        {"a": 3.25, "b": 1.5},
        xlabel="size (kB)",
        text="{:.2f} kB",
        family=["original", "prune"],
    )
    assert [p.get_width() for p in ax.patches] == [3.25, 1.5]
    assert ax.yaxis_inverted()
    assert [t.get_text() for t in ax.texts] == ["3.25 kB", "1.50 kB"]
    assert ax.get_xlabel() == "size (kB)"
    assert to_rgb(ax.patches[1].get_facecolor()) == to_rgb(plot.COLORS["prune"])


def test_ledger_starts_at_100_percent_and_its_bars_are_to_scale():
    ax = plot.ledger([("original", 20_000), ("int8", 5_000), ("end", 150)])
    assert [bar.get_width() for bar in ax.patches] == [20_000, 5_000, 150]
    assert ax.get_xscale() == "linear" and ax.get_xlim()[0] == 0
    assert [t.get_text() for t in ax.texts] == [
        "20,000 B = 100 %",
        "5,000 B = 25 %",
        "150 B = 0.75 %",
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot.curve([1], [[1, 2]], label="", family="prune"), "runs"),
        (lambda: plot.curve([1], [1], label="", family="pink"), "family"),
        (lambda: plot.bars({}, xlabel="x"), "values"),
        (lambda: plot.bars({"a": 0}, xlabel="x", log=True), "values"),
        (
            lambda: plot.bars({"a": 1}, xlabel="", family=["prune"] * 2),
            "name 1",
        ),
        (lambda: plot.ledger([]), "entries"),
        (lambda: plot.ledger([("a", 0)]), "entries"),
        (lambda: plot.save(plt.figure(), "a.jpg"), "path must end"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_taxonomy_names_every_technique_and_chapter():
    texts = [t.get_text() for t in plot.taxonomy().texts]
    for family, methods in plot.TAXONOMY.items():
        assert family in texts
        for method in methods:
            assert set(method[:3]) <= set(texts)
    chapters = {m[0] for ms in plot.TAXONOMY.values() for m in ms}
    assert chapters == {str(n) for n in range(2, 13)}


def test_the_map_page_shows_the_current_taxonomy(tmp_path):
    # matplotlib writes each text of an SVG beside its outlines; those may
    # move with its version, the words may not
    stored = BOOK / "figures" / "map.svg"
    fresh = plot.save(plot.taxonomy().figure, tmp_path / "map.svg")
    words = [
        re.findall("<!-- (.*?) -->", path.read_text("utf8"))
        for path in (stored, fresh)
    ]
    assert len(words[0]) > 30
    assert words[0] == words[1]


FRONT = {2: (1e3, 70.0), 3: (1e5, 90.0)}
POINTS = {"prune": [(1e3, 70.0), (2e4, 75.0)], "share": [(1e5, 90.0)]}


class TestPareto:
    def drawn(self, front, **how):
        ax = plot.pareto(POINTS, front, xlabel="bytes", ylabel="% right", **how)
        plt.close(ax.figure)
        return ax

    def labels(self, places):
        front = dict(enumerate(places, 1))
        points = {"prune": [(1e2, 0.0), (1e6, 100.0)]}
        ax = plot.pareto(points, front, xlabel="bytes", ylabel="% right")
        plt.close(ax.figure)
        return [label.get_text() for label in ax.texts]

    def test_all_points_are_there_in_the_colors_of_their_families(self):
        ax = self.drawn(FRONT, names={"share": "sharing"})
        found = {
            tuple(map(float, place)): mpl.colors.to_hex(dots.get_facecolor()[0])
            for dots in ax.collections
            for place in dots.get_offsets()
        }
        assert found == {
            place: plot.COLORS[family]
            for family, own in POINTS.items()
            for place in own
        }
        legend = [text.get_text() for text in ax.figure.legends[0].texts]
        assert legend == ["prune", "sharing"]

    def test_the_front_is_a_staircase_with_its_numbers(self):
        ax = self.drawn(FRONT)
        (line,) = ax.lines
        assert [*zip(*line.get_data(), strict=True)] == [*FRONT.values()]
        assert line.get_drawstyle() == "steps-post"
        assert [label.get_text() for label in ax.texts] == ["2", "3"]

    def test_better_is_up(self):
        for less in (False, True):
            low, high = self.drawn(FRONT, less=less).get_ylim()
            assert (low > high) == less

    def test_ticks_are_written_as_asked(self):
        ax = self.drawn(FRONT, tick=lambda x: f"{x / 1000:g} kB")
        ax.figure.canvas.draw()
        texts = [t.get_text() for t in ax.get_xticklabels()]
        assert {"1 kB", "10 kB", "100 kB"} <= {*texts}

    def test_far_points_have_their_own_number(self):
        assert self.labels([(1e3, 10.0), (1e5, 60.0)]) == ["1", "2"]

    def test_near_points_share_one(self):
        places = [(1e3, 10.0), (1e5, 60.0), (1.1e5, 60.0), (1.2e5, 60.5)]
        assert self.labels(places) == ["1", "2–4"]

    def test_an_unknown_family_is_an_error(self):
        with pytest.raises(ValueError, match="magic"):
            plot.pareto(
                {"magic": [(1, 1)]}, {1: (1, 1)}, xlabel="x", ylabel="y"
            )
