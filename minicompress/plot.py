"""The look of the book's figures, and the few kinds of figure it repeats.

Colors are those of Okabe and Ito, which stay apart for readers with any
common color blindness; each family of techniques keeps one of them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogLocator, NullFormatter

COLORS = {
    "original": "#6e6e6e",
    "distill": "#cc79a7",
    "prune": "#d55e00",
    "share": "#e69f00",
    "lowrank": "#009e73",
    "nas": "#56b4e9",
    "quantize": "#0072b2",
    "combine": "#000000",
}

STYLE = {
    "figure.figsize": (6.5, 3.8),
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    "savefig.facecolor": "white",
    "font.family": ["DejaVu Sans"],
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=[*COLORS.values()][1:]),
    "grid.color": "#e5e5e5",
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "svg.hashsalt": "minicompress",  # stable ids inside SVG files
}

# family: (chapter, technique, what it does, key of COLORS)
TAXONOMY = {
    "Better small models": (
        ("2", "distillation", "learn from a larger model", "distill"),
    ),
    "Fewer numbers": (
        ("3", "structured pruning", "remove rows, filters, layers", "prune"),
        ("4", "unstructured pruning", "remove single weights", "prune"),
        ("8", "weight sharing", "one number, many places", "share"),
        ("9", "low rank", "two thin matrices for one", "lowrank"),
        ("10", "architecture search", "find a leaner shape", "nas"),
    ),
    "Fewer bits per number": (
        ("5", "number formats", "floating and fixed point", "quantize"),
        ("6", "choosing the bits", "8, 4, 3, 2, by layer", "quantize"),
        ("7", "binary and ternary", "two or three values", "quantize"),
        ("8", "clustering", "a short list and an index", "share"),
        ("11", "entropy coding", "short codes for the frequent", "quantize"),
    ),
    "Combinations": (
        ("11", "one pipeline", "prune, share, then code", "combine"),
        ("12", "large models", "what carries over", "combine"),
    ),
}


def style() -> None:
    """Give every later figure of this session the look of the book.

    Examples
    --------
    >>> style()
    >>> mpl.rcParams["axes.spines.top"]
    False
    """
    mpl.rcParams.update(STYLE)
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None and hasattr(shell, "kernel"):
        from matplotlib_inline.config import InlineBackend

        # the same figure gives the same bytes, whatever drew it
        InlineBackend.instance(parent=shell).print_figure_kwargs = {
            "bbox_inches": "tight",
            "metadata": {"Software": None},
        }


def figure(*, width: float = 6.5, height: float = 3.8):
    """Open one empty figure in the book's style.

    Parameters
    ----------
    width, height : float
        Size in inches; 6.5 fills the text column.

    Returns
    -------
    tuple
        The Figure and its Axes.
    """
    style()
    return plt.subplots(figsize=(width, height))


def save(fig, path) -> Path:
    """Write a figure as PNG or SVG, the same bytes on every run.

    Parameters
    ----------
    fig : Figure
        What to write.
    path : str or Path
        File to write; the ending chooses the format.

    Returns
    -------
    Path
        The path.
    """
    path = Path(path)
    drop = {".png": {"Software": None}, ".svg": {"Date": None}}
    if path.suffix not in drop:
        raise ValueError(f"path must end in .png or .svg, got {path.name}")
    fig.savefig(path, metadata=drop[path.suffix])
    return path


def curve(x, runs, *, label: str, family: str, ax=None, marker: str = "o"):
    """Draw the mean of several runs as a line, ± 1 standard deviation.

    Parameters
    ----------
    x : array_like, shape (points,)
        Horizontal positions.
    runs : array_like, shape (runs, points) or (points,)
        One row per run; a single run has no band.
    label : str
        Name in the legend.
    family : str
        Key of `COLORS`.
    ax : Axes, optional
        Where to draw; default is a new figure.
    marker : str
        Shape of the points, so that lines differ without color too.

    Returns
    -------
    Axes
        The axes drawn on.
    """
    x, runs = np.asarray(x, float), np.atleast_2d(np.asarray(runs, float))
    if x.ndim != 1 or runs.ndim != 2 or runs.shape[1] != len(x):
        raise ValueError(
            f"runs must have one column per x, got x {x.shape} "
            f"and runs {runs.shape}"
        )
    ax = ax or figure()[1]
    color = _color(family)
    mean = runs.mean(0)
    ax.plot(x, mean, marker=marker, color=color, label=label)
    if len(runs) > 1:
        sd = runs.std(0, ddof=1)
        ax.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.2, lw=0)
    return ax


def bars(
    values: Mapping[str, float],
    *,
    xlabel: str,
    family: str | Sequence[str] = "original",
    text: str = "{:,.0f}",
    log: bool = False,
    ax=None,
):
    """Draw named values as horizontal bars with the value at the end.

    Parameters
    ----------
    values : mapping of str to float
        Name and value of each bar, drawn from top to bottom.
    xlabel : str
        What the values are, with the unit.
    family : str or sequence of str
        Key of `COLORS` for all bars, or one per bar.
    text : str
        Format of the number at the end of a bar.
    log : bool
        Whether the axis is logarithmic.
    ax : Axes, optional
        Where to draw; default is a new figure.

    Returns
    -------
    Axes
        The axes drawn on.
    """
    names, sizes = list(values), [float(v) for v in values.values()]
    if not names or (log and min(sizes) <= 0):
        raise ValueError(f"values must be positive on a log axis: {values}")
    labels = [text.format(size) for size in sizes]
    return _bars(names, sizes, labels, family, xlabel, log, ax)


def ledger(entries: Sequence[tuple[str, int]], *, ax=None):
    """Draw the running ledger: the model's file after each chapter.

    Parameters
    ----------
    entries : sequence of (str, int)
        Name of a step and the length of its file in bytes; the first is
        the original and counts as 100 %.
    ax : Axes, optional
        Where to draw; default is a new figure.

    Returns
    -------
    Axes
        The axes drawn on.
    """
    if not entries or min(size for _, size in entries) <= 0:
        raise ValueError(f"entries need positive sizes, got {entries}")
    names = [name for name, _ in entries]
    sizes = [size for _, size in entries]
    labels = [f"{s:,} B = {100 * s / sizes[0]:.3g} %" for s in sizes]
    family = ["original"] + ["combine"] * (len(names) - 1)
    label = "file of the model (bytes)"
    return _bars(names, sizes, labels, family, label, False, ax)


def pareto(
    points: Mapping[str, Sequence[tuple[float, float]]],
    front: Mapping[int, tuple[float, float]],
    *,
    xlabel: str,
    ylabel: str,
    names: Mapping[str, str] | None = None,
    tick: Callable[[float], str] = "{:g}".format,
    less: bool = False,
):
    """Draw cost and quality of many, and number those that nothing beats.

    Parameters
    ----------
    points : mapping of str to sequence of (float, float)
        Key of `COLORS`, and the (cost, quality) of that family.
    front : mapping of int to (float, float)
        Number and place of each point of the front, from the cheapest on;
        numbers that would overlap share a label.
    xlabel, ylabel : str
        What cost and quality are, with units.  Costs are on a log axis.
    names : mapping, optional
        Family to its name in the legend.
    tick : callable
        From a cost to its label on the axis.
    less : bool
        Whether less quality is better; better is up in any case.

    Returns
    -------
    Axes
        The axes drawn on.
    """
    fig, ax = figure(width=5.2, height=4.6)
    for family, own in points.items():
        label = (names or {}).get(family, family)
        color = _color(family)
        ax.scatter(*zip(*own, strict=True), 36, color, lw=0, label=label)
    ax.set(xscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=20))
    ax.xaxis.set_major_formatter(lambda x, _: tick(x))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.tick_params(axis="x", labelsize=10)
    if less:
        ax.invert_yaxis()
    line = {"drawstyle": "steps-post", "color": "#444444", "lw": 1}
    ax.plot(*zip(*front.values(), strict=True), zorder=0, **line)
    _number(ax, front)
    fig.legend(loc="outside lower center", ncols=3, handletextpad=0.2)
    return ax


def taxonomy(*, ax=None):
    """Draw the map of techniques: families, methods, chapters.

    Parameters
    ----------
    ax : Axes, optional
        Where to draw; default is a new figure of 6.5 by 8.2 inches.

    Returns
    -------
    Axes
        The axes drawn on.
    """
    ax = ax or _blank(height=8.2)
    rows = sum(len(methods) + 1.5 for methods in TAXONOMY.values())
    ax.set(xlim=(0, 100), ylim=(rows + 2.3, 0))
    ax.set_axis_off()
    size = "model size = how many numbers × bits per number"
    ax.text(50, 0.8, size, ha="center", va="center", fontsize=14)
    top = 1.7
    for family, methods in TAXONOMY.items():
        _family(ax, top, family, methods)
        top += len(methods) + 1.5
    note = "the number in the circle is the chapter"
    ax.text(98, top + 0.2, note, ha="right", va="center", fontsize=11)
    return ax


def _blank(height: float):
    style()
    fig = plt.figure(figsize=(6.5, height), layout="none")
    return fig.add_axes((0, 0, 1, 1))


def _family(ax, top, family, methods) -> None:
    box = FancyBboxPatch(
        (2, top),
        96,
        len(methods) + 1.15,
        boxstyle="round,pad=0,rounding_size=1.5",
        mutation_aspect=0.2,
        facecolor="#f4f4f4",
        edgecolor="#9a9a9a",
    )
    ax.add_patch(box)
    middle = {"va": "center"}
    ax.text(5, top + 0.65, family, weight="bold", fontsize=15, **middle)
    for i, (chapter, name, what, key) in enumerate(methods):
        y, color = top + 1.55 + i, COLORS[key]
        ax.plot(8, y, "o", ms=22, color=color)
        red, green, blue = mpl.colors.to_rgb(color)
        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.45
        ink = {"color": "white" if dark else "black", "weight": "bold"}
        ax.text(8, y, chapter, ha="center", fontsize=12, **middle, **ink)
        ax.text(13, y, name, fontsize=14, **middle)
        ax.text(54, y, what, fontsize=12, color="#404040", **middle)


def _bars(names, sizes, labels, family, xlabel, log, ax):
    ax = ax or figure(height=1.1 + 0.42 * len(names))[1]
    drawn = ax.barh(names, sizes, color=_colors(family, len(names)), height=0.7)
    ax.bar_label(drawn, labels, padding=4, fontsize=11)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    # room for the text at the end of the longest bar: 11 pt letters are
    # about 0.1 inch wide, and the names to the left need theirs
    space = ax.figure.get_figwidth() - 0.1 * max(map(len, names)) - 0.3
    share = 1 - min(0.1 * max(map(len, labels)) / space, 0.6)
    low, high = min(sizes), max(sizes)
    if log:
        ax.set_xscale("log")
        left = 10 ** np.floor(np.log10(low) - 0.2)
        ax.set_xlim(left, left * (high / left) ** (1 / share))
    else:
        ax.set_xlim(min(low, 0), high / share)
    ax.set_xlabel(xlabel)
    return ax


def _number(ax, points: Mapping[int, tuple[float, float]], near=17) -> None:
    """Write numbers above points; those `near` each other share a label."""
    seen = ax.transData.transform([*points.values()])
    groups = []
    for (i, place), pixels in zip(points.items(), seen, strict=True):
        if groups and math.dist(groups[-1][2], pixels) < near:
            groups[-1][1:] = place, pixels, i
        else:
            groups.append([i, place, pixels, i])
    for first, place, _, last in groups:
        text = str(first) if first == last else f"{first}–{last}"
        offset = {"xytext": (-3, 5), "textcoords": "offset points"}
        ax.annotate(text, place, **offset, ha="right", fontsize=11)


def _color(family: str) -> str:
    if family not in COLORS:
        raise ValueError(f"family must be one of {[*COLORS]}, got {family!r}")
    return COLORS[family]


def _colors(family, n: int) -> list[str]:
    families = [family] * n if isinstance(family, str) else list(family)
    if len(families) != n:
        raise ValueError(f"family must name {n} colors, got {families}")
    return [_color(name) for name in families]
