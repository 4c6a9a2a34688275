"""The table of a compressed model, layer by layer, as papers print it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from torch import Tensor, nn

from .. import codes, measure, storage
from ..codes import Code, State
from .coding import WIDTHS, Dumps

SIDE = {"centroids", "scale", "zero", "by", "signs"}  # few, for many weights


@dataclass(frozen=True)
class LayerCost:
    """What one weight takes, in the terms of Deep Compression's tables.

    Parameters
    ----------
    name
        of the weight.
    params
        positions, zeros included.
    kept
        positions that are not zero.
    bytes
        of its code in the file, without its entry in the header.
    value_bits, value_coded
        bits of a value: at fixed width, and as stored.  Codebooks and scales
        count only in `bytes`.
    index_bits, index_coded
        bits of the positions for each value that is kept, fillers counted:
        in the best way without a coder, and as stored.  None if nothing
        says them.
    coded
        bits as stored of both together.  If both are one list, that alone
        is known, and the other two are None.
    """

    name: str
    params: int
    kept: int
    bytes: int
    value_bits: float
    value_coded: float | None
    index_bits: float | None
    index_coded: float | None
    coded: float

    @property
    def percent(self) -> float:
        """Bytes as a percentage of 32 bits for each position."""
        return 25 * self.bytes / self.params if self.params else 0.0


def layer_costs(state: State) -> list[LayerCost]:
    """List what each weight of a state takes.

    Parameters
    ----------
    state
        {name: Tensor or Code}; what is tied counts once, under its first
        name.

    Returns
    -------
    list of LayerCost

    Examples
    --------
    >>> import torch
    >>> w = torch.tensor([[0.0, 1.0, 0.0, 2.0]])
    >>> (cost,) = layer_costs({"w": codes.sparse(w, w != 0)})
    >>> cost.params, cost.kept, cost.bytes, cost.value_bits, cost.index_bits
    (4, 2, 9, 32.0, 4.0)
    """
    once = {id(x): name for name, x in reversed(state.items())}
    return [_cost(n, x) for n, x in state.items() if once[id(x)] == n]


def layer_table(
    model: nn.Module,
    state: State,
    *,
    paper: Mapping[str, Mapping[str, object]] | None = None,
    dumps: Dumps = storage.dumps,
) -> measure.Table:
    """Print what each weight takes, and what the whole file does.

    Parameters
    ----------
    model
        whose state it is.
    state
        {name: Tensor or Code}.
    paper
        {row: {column: number, or a pair for two bits}}, set in brackets
        beside ours; rows and columns as they are printed.
    dumps
        writes the file.

    Returns
    -------
    Table
        A row for each weight with two dimensions or more or that has a
        code; one for all others, one for header and checksum, one for the
        file.  Bits are those of a value that is kept, before and after
        entropy coding; "coded" is value and index together.

    References
    ----------
    Han, Mao, Dally, Deep Compression, arXiv:1510.00149, tables 2 and 3.

    Examples
    --------
    >>> import torch
    >>> model = nn.Linear(8, 4, bias=False)
    >>> w = torch.tensor([[0.0, 1.0, 0.0, 2.0]]).expand(8, 4).reshape(4, 8)
    >>> state = {"weight": codes.sparse(w, w != 0)}
    >>> layer_table(model, state, paper={"weight": {"kept %": 40}})
    layer   bytes  % of fp32   kept %  value bits  index bits  coded  params
    weight     68      53.12  50 (40)          32           2     34      32
    header     88
    file      156      121.9       50                                     32
    """
    costs = layer_costs(state)
    main = [c for c in costs if _is_main(state[c.name])]
    side = [c for c in costs if c not in main]
    size = len(dumps(model, state))
    rows = [_cells(c) for c in main]
    if side:
        rows.append(_sum("the rest", side, sum(c.bytes for c in side)))
    header = size - sum(c.bytes for c in costs)
    rows.append({"layer": "header", "bytes": f"{header:,}"})
    rows.append(_sum("file", costs, size))
    columns = [*_cells(costs[0])]
    if paper:
        _check(paper, {r["layer"] for r in rows}, columns)
        rows = [_beside(row, paper.get(row["layer"], {})) for row in rows]
    lines = (tuple(row.get(c, "") for c in columns) for row in rows)
    return measure.Table(tuple(columns), tuple(lines))


def _is_main(x: Tensor | Code) -> bool:
    return len(codes.shape(x)) >= 2 or isinstance(x, Code)


def _cost(name: str, x: Tensor | Code) -> LayerCost:
    """Add up the bits of the values and of the positions in a code."""
    w = codes.value(x)
    n, kept = w.numel(), int(w.count_nonzero())
    values = [leaf for kind, leaf in _leaves(x) if kind == "value"]
    masks = [leaf for kind, leaf in _leaves(x) if kind == "index"]
    stored = [8 * sum(map(storage.payload, own)) for own in (values, masks)]
    fixed = sum(map(_fixed, values)), sum(map(_positions, masks))
    one, many = _is_merged(x), max(1, kept if masks or _is_merged(x) else n)
    if one:
        K = codes.shape(_book(x).centroids)[0] - 1
        fixed = _whole(kept * max(1, (K - 1).bit_length())), _positions(w)
    apart = bool(masks) and not one
    return LayerCost(
        name,
        params=n,
        kept=kept,
        bytes=storage.payload(x),
        value_bits=fixed[0] / many,
        value_coded=None if one else stored[0] / many,
        index_bits=fixed[1] / many if masks or one else None,
        index_coded=stored[1] / many if apart else None,
        coded=sum(stored) / many,
    )


def _book(x: Tensor | Code) -> Tensor | Code:
    return _book(x.x) if isinstance(x, codes.View) else x


def _is_merged(x: Tensor | Code) -> bool:
    """Tell whether zero is one of the shared values, the first."""
    book = _book(x)
    if not isinstance(book, codes.Codebook):
        return False
    c = codes.value(book.centroids)
    return c.ndim == 1 and len(c) > 1 and bool(c[0] == 0)


def _leaves(x, kind: str = "value") -> Iterator[tuple[str, Tensor | Code]]:
    """Yield the lists of numbers in a code: values, and positions."""
    if isinstance(x, codes.Sparse):
        yield "index", x.mask
        yield from _leaves(x.values)
    elif isinstance(x, Tensor) or hasattr(x, "bits"):
        yield kind, x
    elif isinstance(x, Code):
        for f in fields(x):
            if f.name not in SIDE:
                yield from _leaves(getattr(x, f.name))


def _fixed(x: Tensor | Code) -> int:
    """Count the bits of a list whose numbers take the same width each."""
    if isinstance(x, Tensor):
        return 8 * storage.payload(x)
    return _whole(math.prod(x.shape) * x.bits)


def _positions(mask: Tensor | Code) -> int:
    """Count the bits of a mask in the best way that needs no coder."""
    mask = codes.value(mask) != 0
    gaps = (codes.gaps(mask, bits=k).steps for k in WIDTHS)
    return min(_whole(mask.numel()), *map(_fixed, gaps))


def _whole(bits: int) -> int:
    """Fill the last byte."""
    return -(-bits // 8) * 8


def _cells(c: LayerCost) -> dict[str, str]:
    return {
        "layer": c.name,
        "bytes": f"{c.bytes:,}",
        "% of fp32": f"{c.percent:.4g}",
        "kept %": f"{100 * c.kept / max(1, c.params):.3g}",
        "value bits": _arrow(c.value_bits, c.value_coded),
        "index bits": _arrow(c.index_bits, c.index_coded),
        "coded": _short(c.coded),
        "params": f"{c.params:,}",
    }


def _sum(name: str, costs: list[LayerCost], size: int) -> dict[str, str]:
    n, kept = sum(c.params for c in costs), sum(c.kept for c in costs)
    none = dict.fromkeys(("value bits", "index bits", "coded"), "")
    own = LayerCost(name, n, kept, size, 0, None, None, None, 0)
    return _cells(own) | none


def _arrow(fixed: float | None, coded: float | None) -> str:
    """Write the bits before and after coding, once if they are the same."""
    known = [_short(b) for b in (fixed, coded) if b is not None]
    return " → ".join(dict.fromkeys(known)) or "–"


def _short(number: object) -> str:
    if isinstance(number, tuple):
        return " → ".join(map(_short, number))
    return f"{number:.3g}" if isinstance(number, int | float) else str(number)


def _beside(row: dict[str, str], paper: Mapping) -> dict[str, str]:
    """Set a paper's numbers in brackets beside ours."""
    return row | {
        c: f"{row.get(c, '')} ({_short(x)})".strip() for c, x in paper.items()
    }


def _check(paper: Mapping, rows: set, columns: list) -> None:
    for row, own in paper.items():
        if row not in rows or not {*own} <= {*columns}:
            raise ValueError(
                f"paper: {row!r} with {[*own]}, but there are the rows "
                f"{sorted(rows)} and the columns {columns}"
            )
