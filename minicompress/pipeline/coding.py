"""The same numbers in the fewest bytes: one way of writing for each part.

Nothing here changes a weight.  Which coder is best depends on the numbers: a
table of frequencies costs more than it saves on a short list, and positions
can be written as one bit each, as gaps, or together with the values.  So the
ways are tried, and the lengths decide.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from .. import codes, entropy, storage
from ..codes import Code, State

Coder = Callable[[Code], Code]
Dumps = Callable[[nn.Module, State], bytes]

#: Huffman and rANS, which `smallest` tries by default.
FAST: tuple[Coder, ...] = (entropy.huffman, entropy.rans)
#: `FAST`, and context modeling.
SLOW: tuple[Coder, ...] = (
    *FAST,
    entropy.contextual,
)
WIDTHS = range(1, 9)  # bits of a gap
LIKELY = 2  # of them are coded


def smallest(
    code: Tensor | Code,
    *,
    coders: Sequence[Coder] = FAST,
    dumps: Dumps = storage.dumps,
) -> Tensor | Code:
    """Write every integer of a code in the way that takes the fewest bytes.

    Each list of integers gets no more bits than its largest one needs, and
    is tried so and with every coder.  The positions of a `Sparse` are
    tried as one bit each, coded or not, and as gaps of 1 to 8 bits, the two
    most promising widths coded too; if its values are shared, also as one
    list with theirs: see `merged`.  Context modeling sees them on the grid
    that the mask has: that of a matrix (300, 784) that looks at images may be
    (300, 28, 28).

    Parameters
    ----------
    code
        a tensor is returned as it is.
    coders
        functions from integers to a code of them.  `FAST` are Huffman and
        rANS; `SLOW` adds context modeling, some microseconds a bit.  With
        none, the best of what needs no coder.
    dumps
        what will write the file: its header counts too, and a coded list
        takes a longer entry there.

    Returns
    -------
    Tensor or Code
        Decodes to the same numbers, bit for bit.

    References
    ----------
    Han, Mao, Dally, Deep Compression, arXiv:1510.00149, section 4 (Huffman
    coding of the weights and of the gaps).

    Examples
    --------
    >>> often = torch.tensor([0, 0, 0, 3] * 250)
    >>> type(smallest(codes.Ints(often, 4))).__name__
    'Rans'
    >>> smallest(codes.Ints(often[:10], 4))
    Ints(uint8[10], 2)
    """
    if not isinstance(code, Code):
        return code
    if hasattr(code, "bits"):
        return _least(_written(_narrow(code), coders), dumps)
    if isinstance(code, codes.Gaps):  # its longest step has a meaning
        steps = codes.Ints(code.steps.decode(), code.steps.bits)
        return replace(code, steps=_least(_written(steps, coders), dumps))
    parts = {
        f.name: smallest(getattr(code, f.name), coders=coders, dumps=dumps)
        for f in fields(code)
        if isinstance(getattr(code, f.name), Code)
    }
    if not isinstance(code, codes.Sparse):
        return replace(code, **parts)
    code = replace(code, values=parts.get("values", code.values))
    ways = [replace(code, mask=m) for m in _masks(code, coders)]
    if _shares(code):
        one = merged(code)
        lists = _written(_narrow(one.index), coders)
        books = [replace(one, index=index) for index in lists]
        same = one.shape == code.shape
        ways += [b if same else codes.View(b, code.shape) for b in books]
    return _least(ways, dumps)


def merged(code: codes.Sparse) -> codes.Codebook:
    """Write positions and shared values as one list, in which 0 is a value.

    By frequency alone this takes as many bits as the two lists do: the
    entropy of the pair is that of the positions, and on what is left that of
    the values.  What differs are tables, and what a coder can see: here a
    value has its place in the matrix.

    Parameters
    ----------
    code
        its values are a `Codebook` of numbers.

    Returns
    -------
    Codebook
        With 0 as its first centroid; of the code's shape, or of that of its
        mask, if that is another grid.

    Raises
    ------
    ValueError
        If the values are not shared, or there is no room for one more.

    Examples
    --------
    >>> book = codes.Codebook(codes.Ints(torch.tensor([0, 1]), 1),
    ...                       torch.tensor([-2.0, 5.0]))
    >>> mask = torch.tensor([[True, False], [False, True]])
    >>> merged(codes.Sparse(mask, book, (2, 2))).index.values
    tensor([[1, 0],
            [0, 2]], dtype=torch.uint8)
    """
    if not _shares(code):
        raise ValueError(f"code: no shared values to join in {code!r}")
    index, c = code.values.index, codes.value(code.values.centroids)
    values = index.decode().int() + 1
    one = replace(code, values=values).decode().reshape(_grid(code))
    ints = codes.Ints(one, index.bits + 1)
    return codes.Codebook(ints, torch.cat([c.new_zeros(1), c]))


def coded(
    state: State,
    *,
    coders: Sequence[Coder] = FAST,
    dumps: Dumps = storage.dumps,
) -> State:
    """Write every code of a state in the fewest bytes; see `smallest`.

    Parameters
    ----------
    state
        {name: Tensor or Code}; what is tied stays so.
    coders, dumps
        as for `smallest`.

    Examples
    --------
    >>> many = codes.Ints(torch.arange(1000) % 3, 2)
    >>> coded({"a": many, "b": torch.zeros(2)}, coders=())
    {'a': Ints(uint8[1000], 2), 'b': tensor([0., 0.])}
    """
    once = {id(x): x for x in state.values()}
    done = {
        key: smallest(x, coders=coders, dumps=dumps) for key, x in once.items()
    }
    return {name: done[id(x)] for name, x in state.items()}


def file_bytes(x: Tensor | Code, *, dumps: Dumps = storage.dumps) -> int:
    """Count the bytes of a file that holds nothing but one code.

    Parameters
    ----------
    x
        a tensor or a code.
    dumps
        writes the file.

    Examples
    --------
    >>> a, b = (codes.Ints(torch.zeros(n).int(), 1) for n in (800, 80))
    >>> file_bytes(a) - file_bytes(b)  # 90 bytes, and a digit of its shape
    91
    """
    only = nn.Module()
    shape = codes.shape(x)
    only.w = nn.Parameter(torch.empty(shape, device="meta"))
    return len(dumps(only, {"w": x}))


def _narrow(code: Code) -> codes.Ints:
    """Return the integers with no more bits than the largest one needs."""
    values = code.decode()
    top = int(values.max()) if values.numel() else 0
    return codes.Ints(values, max(1, top.bit_length()))


def _written(ints: codes.Ints, coders: Sequence[Coder]) -> list[Code]:
    return [ints, *(coder(ints) for coder in coders)]


def _masks(code: codes.Sparse, coders: Sequence[Coder]) -> list:
    """List the ways to say which weights there are."""
    mask = codes.value(code.mask).bool().reshape(_grid(code))
    gaps = [codes.gaps(mask, bits=k) for k in WIDTHS]
    likely = sorted(gaps, key=lambda g: _guess(g.steps))[:LIKELY]
    return [
        mask,
        *_written(codes.Ints(mask.byte(), 1), coders)[1:],
        *gaps,
        *(
            replace(g, steps=steps)
            for g in likely
            for steps in _written(g.steps, coders)[1:]
        ),
    ]


def _guess(ints: codes.Ints) -> float:
    """Guess the bits in which a coder writes integers and its table."""
    return entropy.bound(ints) + 8 * len(ints.values.unique())


def _grid(code: codes.Sparse) -> tuple[int, ...]:
    """Return the shape of the mask, or that of the code if it is a list."""
    grid = codes.shape(code.mask)
    return grid if len(grid) > 1 else code.shape


def _shares(code: codes.Sparse) -> bool:
    """Tell whether the values are shared numbers, with room for one more."""
    book = code.values
    return (
        isinstance(book, codes.Codebook)
        and len(codes.shape(book.centroids)) == 1
        and getattr(book.index, "bits", 16) < 16
    )


def _least(ways: Iterable, dumps: Dumps):
    """Return the one that makes the shortest file, the first of equals."""
    return min(ways, key=lambda x: file_bytes(x, dumps=dumps))
