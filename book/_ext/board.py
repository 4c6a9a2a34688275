"""The scoreboard as tables, figures and single numbers in Markdown.

A page says ``[[digits-mlp: GPTQ, 4 bits]]`` for the file and the quality of
one row, ``[[digits-mlp: GPTQ, 4 bits: file]]`` for one of `FIELDS`, and
``{board front encoder}``, ``{board all encoder}`` or ``{board figure
encoder}`` for what takes a paragraph.
"""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt

from minicompress import measure, plot, widgets

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "chapters" / "results" / "scoreboard.json"
DRAWN = ROOT / "book" / "_build" / "scoreboard"
PAGES = ("book/scoreboard", "book/which_method", "book/outlook")
TITLES = {
    "digits-mlp": "the MLP for digits",
    "glyphs-cnn": "the CNN for glyphs",
    "reference-lm": "the language model",
    "encoder": "the pretrained encoder",
}
COSTS = {"bytes": "front", "macs": "lean", "latency": "fast"}
LABELS = {
    "bytes": "bytes of the file",
    "macs": "multiplications for one sample",
    "latency": "time of one call, the original takes 1",
}
TICKS = {
    "bytes": lambda x: measure.tables.size(round(x)).replace(".0", ""),
    "macs": lambda x: f"{x / 1e3:,.0f} k" if x < 1e6 else f"{x / 1e6:,.0f} M",
    "latency": lambda x: f"{x:g}",
}
NAMES = {  # families in the legend
    "original": "original, formats",
    "distill": "distillation",
    "prune": "pruning",
    "quantize": "quantization",
    "share": "sharing",
    "lowrank": "low rank",
    "nas": "search",
    "combine": "combined",
}


def load():
    return json.loads(DATA.read_text(encoding="utf8"))


def cost(row, kind):
    """Return what a row costs; the original's shapes take its time."""
    return 1.0 if row[kind] is None else row[kind]


def front(rows, kind="bytes"):
    """List what no other row beats in both, from the cheapest on."""
    on = (x for x in rows if x[COSTS[kind]])
    return sorted(on, key=lambda x: (cost(x, kind), x["quality"]))


def quality(row, better):
    """Write per cent with one digit, bits for each character with two."""
    digits = 1 if better > 0 else 3
    text = f"{row['quality']:.{digits}f}"
    if row["sd"] is not None:
        text += f" ± {row['sd']:.{digits}f}"
    return text


FIELDS = {
    "file": lambda row, first, better: measure.tables.size(row["bytes"]),
    "times": lambda row, first, better: f"{first['bytes'] / row['bytes']:.1f}",
    "quality": lambda row, first, better: (
        f"{row['quality']:.1f} %"
        if better > 0
        else f"{row['quality']:.3f} bits"
    ),
    "macs": lambda row, first, better: f"{row['macs'] / first['macs']:.0%}",
    "latency": lambda row, first, better: f"{cost(row, 'latency'):.2f}",
    "cosine": lambda row, first, better: f"{row['cosine']:.3f}",
    "trained": lambda row, first, better: str(row["trained"]),
}


def find(board, model, name):
    """Return a row of a model by its name."""
    rows = [x for x in board["board"].get(model, ()) if x["name"] == name]
    if len(rows) != 1:
        raise ValueError(f"scoreboard: no row {name!r} of {model!r}")
    return rows[0]


def number(board, text):
    """Expand ``model: row`` or ``model: row: field``."""
    model, name, *field = (part.strip() for part in text.split(":"))
    if name.isdigit():  # 2:4
        name, field = f"{name}:{field[0]}", field[1:]
    first, row = board["board"][model][0], find(board, model, name)
    better = board["models"][model]["better"]
    fields = field or ("file", "quality")
    return ", ".join(FIELDS[f](row, first, better) for f in fields)


def table(header, lines):
    """Write a Markdown table, the first column to the left."""
    ruler = [":--", *["--:"] * (len(header) - 1)]
    rows = (header, ruler, *lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def name(row):
    """Mark what has seen inputs (°) or was trained (*)."""
    mark = "\\*" if row["trained"] else "°" if row["data"] != "none" else ""
    return row["name"] + mark


def front_table(board, model):
    """List the front of file and quality, numbered as in the figure."""
    rows, better = board["board"][model], board["models"][model]["better"]
    lines = [
        (
            f"{i}. {name(x)}",
            measure.tables.size(x["bytes"]),
            quality(x, better),
        )
        for i, x in enumerate(front(rows), 1)
    ]
    return table(("on the front", "file", metric(board, model)), lines)


def whole_table(board, model):
    """List every row, in the order of the chapters."""
    rows, better = board["board"][model], board["models"][model]["better"]
    lines = [
        (
            name(x),
            measure.tables.size(x["bytes"]),
            FIELDS["macs"](x, rows[0], better),
            "="
            if x["latency"] is None
            else FIELDS["latency"](x, rows[0], better),
            quality(x, better),
        )
        for x in sorted(rows, key=lambda x: x["chapter"])
    ]
    header = ("recipe", "file", "MACs", "time", metric(board, model))
    return table(header, lines)


def metric(board, model):
    return board["models"][model]["metric"]


def pareto(rows, how, *, kind="bytes"):
    """Draw cost and quality of a model's rows, and number the front.

    rows     of one model
    how      its entry in the scoreboard's "models"
    kind     "bytes", "macs" or "latency"
    """

    def place(x):
        return cost(x, kind), x["quality"]

    def shown(x):
        return how["better"] * (x["quality"] - how["worst"]) >= 0

    points = {
        family: [place(x) for x in rows if x["family"] == family and shown(x)]
        for family in NAMES
    }
    best = enumerate(front(rows, kind), 1)
    return plot.pareto(
        {family: own for family, own in points.items() if own},
        {i: place(x) for i, x in best if shown(x)},
        xlabel=LABELS[kind],
        ylabel=how["metric"],
        names=NAMES,
        tick=TICKS[kind],
        less=how["better"] < 0,
    ).figure


def drawn(board, model):
    """Write the figure of a model and return what shows it."""
    rows, how = board["board"][model], board["models"][model]
    DRAWN.mkdir(parents=True, exist_ok=True)
    fig = pareto(rows, how)
    path = DRAWN / f"{model}.png"
    path.write_bytes(widgets.png(fig, colors=96))
    plt.close(fig)
    best = ", ".join(
        f"{i} {x['name']} ({number(board, f'{model}: ' + x['name'])})"
        for i, x in enumerate(front(rows), 1)
    )
    alt = f"Bytes and quality of {len(rows)} rows. On the front: {best}."
    return (
        f"```{{image}} _build/scoreboard/{path.name}\n:alt: {alt}\n"
        ":class: dark-light\n:width: 100%\n```"
    )


PARTS = {"front": front_table, "all": whole_table, "figure": drawn}


def expand(text, board):
    """Put what was measured into the text of a page."""
    text = re.sub(
        r"\[\[([a-z-]+: [^]]+)\]\]", lambda m: number(board, m[1]), text
    )
    return re.sub(
        r"^\{board (\w+) ([\w-]+)\}$",
        lambda m: PARTS[m[1]](board, m[2]),
        text,
        flags=re.MULTILINE,
    )


def insert(app, docname, source):
    """Expand the pages that show the scoreboard."""
    if docname in PAGES:
        source[0] = expand(source[0], load())


def always_read(app, env, added, changed, removed):
    """Expand them at each build: the scoreboard may have changed."""
    return [page for page in PAGES if page in env.found_docs]


def connect(app):
    app.connect("source-read", insert)
    app.connect("env-get-outdated", always_read)
