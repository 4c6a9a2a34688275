"""One card per model with everything it costs, and tables of such cards."""

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .. import models, storage
from ..codes import State
from .counts import macs, nonzero, params
from .hardware import Timing, latency, peak_memory


@dataclass(frozen=True)
class Report:
    """What a model costs; None is what was not measured.

    Parameters
    ----------
    name : label of its row in a table.
    params : parameters, shared ones counted once.
    nonzero : parameters that are not 0.
    bytes : length of the file that `storage` writes.
    bits_per_weight : 8 * bytes / parameters of the original.
    macs : multiply-accumulates for one sample.
    latency : `Timing` of one call on the example.
    peak_memory : bytes of activations of one call on the example.
    quality : what `metric` returned.
    """

    name: str
    params: int
    nonzero: int
    bytes: int
    bits_per_weight: float
    macs: int | None = None
    latency: Timing | None = None
    peak_memory: int | None = None
    quality: float | None = None


def report(
    model: nn.Module,
    state: State | None = None,
    *,
    name: str = "",
    like: nn.Module | None = None,
    example: Tensor | tuple | None = None,
    repeats: int = 0,
    batches: object = None,
    metric: Callable[..., float] | None = None,
) -> Report:
    """Write a model to a file, load the file, and measure what was loaded.

    Parameters
    ----------
    model : the model, left as it is.
    state : its compressed tensors {name: Tensor or Code}; by default the
        tensors of the model.
    name : label for tables.
    like : the original, whose parameters divide the bits; by default the
        model itself.
    example : an input with a batch dimension, or a tuple of inputs; needed
        for MACs, activation memory and latency.
    repeats : timed calls; 0 leaves the latency out.
    batches, metric : quality is ``metric(model, batches)``, or
        ``metric(model)`` without batches.

    Returns
    -------
    Report.

    Examples
    --------
    >>> import torch
    >>> model = models.MLP()
    >>> card = report(model, name="MLP", example=torch.zeros(1, 64))
    >>> card.params, card.macs, card.peak_memory
    (6570, 6464, 512)
    """
    if repeats and example is None:
        raise ValueError(f"example is needed for repeats={repeats}")
    if batches is not None and metric is None:
        raise ValueError("metric is needed to use batches")
    data = storage.dumps(model, state)
    # A model of the library comes from its file alone, without `like`.
    ours = models.MODELS.get(type(model).__name__) is type(model)
    loaded = storage.loads(data, like=None if ours else model)
    device = next((p.device for p in model.parameters()), None)
    loaded = loaded.to(device).eval()
    cost = {}
    if example is not None:
        inputs = example if isinstance(example, tuple) else (example,)
        cost["macs"] = macs(loaded, *inputs)
        cost["peak_memory"] = peak_memory(loaded, *inputs)
        if repeats:
            cost["latency"] = latency(loaded, *inputs, repeats=repeats)
    if metric is not None:
        with_batches = () if batches is None else (batches,)
        cost["quality"] = float(metric(loaded, *with_batches))
    return Report(
        name=name,
        params=params(loaded),
        nonzero=nonzero(loaded),
        bytes=len(data),
        bits_per_weight=8 * len(data) / params(like or model),
        **cost,
    )


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading, for a page or a terminal."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(map(len, c)) for c in zip(*lines, strict=True)]
        text = []
        for line in lines:
            first = line[0].ljust(widths[0])
            rest = map(str.rjust, line[1:], widths[1:])
            text.append("  ".join([first, *rest]).rstrip())
        return "\n".join(text)

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        ruler = (":--", *["--:"] * (len(self.header) - 1))
        lines = [self.header, ruler, *self.rows]
        cells = [[c.replace("|", "\\|") for c in line] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)

    def _repr_html_(self) -> str:
        def line(tag: str, cells: Sequence[str]) -> str:
            sides = ["left", *["right"] * (len(cells) - 1)]
            inner = "".join(
                f'<{tag} style="text-align: {side}; white-space: nowrap">'
                f"{html.escape(c)}</{tag}>"
                for c, side in zip(cells, sides, strict=True)
            )
            return f"<tr>{inner}</tr>"

        head = line("th", self.header)
        body = "\n".join(line("td", row) for row in self.rows)
        return (
            f'<table class="table">\n<thead>\n{head}\n</thead>\n'
            f"<tbody>\n{body}\n</tbody>\n</table>"
        )


def table(reports: Iterable[Report], *, quality: str = "quality") -> Table:
    """Set reports below one another.

    Parameters
    ----------
    reports : one row each, in this order.
    quality : heading of the last column, the name of the metric.

    Returns
    -------
    Table with a column for everything that was measured at least once; the
    non-zero parameters are shown if a model has zeros.

    Examples
    --------
    >>> dense = Report("dense", 1000, 1000, 4_100, 32.8, quality=0.97)
    >>> pruned = Report("pruned", 1000, 100, 1_250, 10.0, quality=0.951)
    >>> table([dense, pruned], quality="accuracy")
    model   params  non-zero    file  bits/weight  accuracy
    dense    1,000     1,000  4.1 kB         32.8     0.970
    pruned   1,000       100  1.2 kB         10.0     0.951
    """
    reports = list(reports)
    columns: dict[str, list[str]] = {"model": [r.name for r in reports]}

    def add(title: str, values: list, text: Callable[..., str]) -> None:
        if any(v is not None for v in values):
            columns[title] = ["–" if v is None else text(v) for v in values]

    add("params", [r.params for r in reports], "{:,}".format)
    if any(r.nonzero < r.params for r in reports):
        add("non-zero", [r.nonzero for r in reports], "{:,}".format)
    add("file", [r.bytes for r in reports], size)
    bits = [r.bits_per_weight for r in reports]
    add("bits/weight", bits, lambda b: f"{b:.1f}" if b >= 10 else f"{b:.2f}")
    add("MACs", [r.macs for r in reports], "{:,}".format)
    add("activations", [r.peak_memory for r in reports], size)
    add("latency", [r.latency for r in reports], milliseconds)
    add(quality, [r.quality for r in reports], "{:.3f}".format)
    return Table(tuple(columns), tuple(zip(*columns.values(), strict=True)))


def size(n: int) -> str:
    """Write a number of bytes in B, kB or MB (powers of 1000).

    Examples
    --------
    >>> size(999), size(12_345), size(203_008), size(90_800_000)
    ('999 B', '12.3 kB', '203 kB', '90.8 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5 or unit == "GB":
            break
        n /= 1000
    digits = 0 if unit == "B" or n >= 99.95 else 1
    return f"{n:.{digits}f} {unit}"


def milliseconds(t: Timing) -> str:
    """Write the median of a timing in ms, with three digits."""
    return f"{1e3 * t.median:.3g} ms"
