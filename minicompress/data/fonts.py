"""Outlines of characters, and their picture as exact pixel coverage.

Font engines change how they round and hint.  The outline in a font file does
not, so the pictures are computed from it here, alike on every machine.
"""

from functools import cache
from pathlib import Path

import numpy as np

CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Shipped inside matplotlib.  Left out: symbol fonts (cmsy, cmex, STIXSiz),
# fonts without these characters (DejaVu*Display, STIXNonUni), LastResort.
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
    "cmb10",
    "cmmi10",
    "cmr10",
    "cmss10",
    "cmti10",
    "cmtt10",
)

SIZE, INK = 40, 28  # side of a picture, longer side of the character in it
SCANLINES = 4  # per row of pixels
STEPS = 6  # straight pieces per curve


def flatten(vertices: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Turn an outline of lines and quadratic curves into line segments.

    Parameters
    ----------
    vertices : ndarray of shape (n, 2)
        Points, x and y.
    codes : ndarray of shape (n,)
        matplotlib's path codes: 1 move, 2 line, 3 curve (control point and
        end point have one entry each), 79 close.

    Returns
    -------
    ndarray of shape (segments, 4)
        From x, y to x, y, in any order; every contour is closed.
    """
    control = (codes == 3) & (np.cumsum(codes == 3) % 2 == 1)
    stop = ~control & (codes != 79)
    p, kind = vertices[stop], codes[stop]
    before = np.roll(p, 1, axis=0)
    t = np.linspace(0, 1, STEPS + 1)[:, None, None]
    a, b, c = before[kind == 3], vertices[control], p[kind == 3]
    curve = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
    start = np.flatnonzero(kind == 1)
    last = np.append(start[1:], len(p)) - 1
    return np.vstack(
        [
            np.hstack([before[kind == 2], p[kind == 2]]),
            np.concatenate([curve[:-1], curve[1:]], axis=2).reshape(-1, 4),
            np.hstack([p[last], p[start]]),
        ]
    )


def fit(segments: np.ndarray) -> np.ndarray:
    """Center an outline in the picture, y downwards, INK pixels long."""
    points = segments.reshape(-1, 2)
    low, high = points.min(axis=0), points.max(axis=0)
    zoom = INK / (high - low).max() * np.array([1, -1])
    return ((points - (low + high) / 2) * zoom + SIZE / 2).reshape(-1, 4)


def coverage(segments: np.ndarray, owner: np.ndarray, n: int) -> np.ndarray:
    """Fill outlines: the share of each pixel that lies inside.

    An edge that crosses a scanline at x adds its direction (+1 up, -1 down)
    to everything on its right.  The running sum along the scanline is the
    winding number, and inside is where that is not zero.  Exact along x,
    SCANLINES samples per pixel along y.

    Parameters
    ----------
    segments : ndarray of shape (segments, 4)
        Edges in pixels, as `fit` returns them.
    owner : ndarray of shape (segments,)
        Number of the picture that an edge belongs to.
    n : int
        How many pictures.

    Returns
    -------
    ndarray of shape (n, SIZE, SIZE)
        float32 between 0 and 1.

    Examples
    --------
    >>> box = [[9, 9, 9, 11], [9, 11, 12, 11], [12, 11, 12, 9], [12, 9, 9, 9]]
    >>> picture = coverage(np.array(box, float), np.zeros(4, int), 1)[0]
    >>> float(picture.sum()), float(picture[9:11, 9:12].min())
    (6.0, 1.0)
    """
    x0, y0, x1, y1 = segments.T
    # scanline k lies at y = (k + 1/2) / SCANLINES; an edge meets first..last
    first, last = (
        np.ceil(f(y0, y1) * SCANLINES - 0.5).astype(int)
        for f in (np.minimum, np.maximum)
    )
    count = last - first
    edge = np.repeat(np.arange(len(segments)), count)
    nth = np.arange(count.sum()) - np.repeat(count.cumsum() - count, count)
    line = first[edge] + nth
    y = (line + 0.5) / SCANLINES
    x = x0[edge] + (y - y0[edge]) * ((x1 - x0)[edge] / (y1 - y0)[edge])
    direction = np.sign(y1 - y0)[edge] / SCANLINES
    column = np.floor(x).astype(int)
    cell = (owner[edge] * SIZE + line // SCANLINES) * SIZE + column
    total = np.zeros(n * SIZE * SIZE)
    for shift, share in ((0, column + 1 - x), (1, x - column)):
        total += np.bincount(cell + shift, direction * share, total.size)
    winding = total.reshape(n, SIZE, SIZE).cumsum(axis=2)
    return np.abs(winding).clip(0, 1).astype(np.float32)


@cache
def pictures() -> np.ndarray:
    """Draw all characters in all fonts; do not write to the result.

    Returns
    -------
    ndarray of shape (fonts, characters, SIZE, SIZE)
        float32, ink is 1.

    Raises
    ------
    ImportError
        If matplotlib, which brings the fonts, is not installed.
    """
    try:
        from matplotlib import get_data_path
        from matplotlib.ft2font import FT2Font, LoadFlags
    except ImportError as error:
        raise ImportError(
            "glyphs() draws with the fonts inside matplotlib, version 3.10 or"
            " newer: pip install matplotlib"
        ) from error
    folder = Path(get_data_path(), "fonts", "ttf")
    edges = []
    for name in FONTS:
        font = FT2Font(str(folder / f"{name}.ttf"))
        for character in CHARACTERS:
            # the outline in the font's own units: no hinting, no rounding
            font.load_char(ord(character), flags=LoadFlags.NO_SCALE)
            edges.append(fit(flatten(*font.get_path())))
    owner = np.repeat(np.arange(len(edges)), [len(e) for e in edges])
    drawn = coverage(np.concatenate(edges), owner, len(edges))
    drawn.flags.writeable = False
    return drawn.reshape(len(FONTS), len(CHARACTERS), SIZE, SIZE)
