"""Pictures that need no download: real digits and rendered characters."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .fonts import CHARACTERS, pictures
from .tasks import Task, permutation, stratify

# What one unit of difficulty allows at most, on either side
ROTATION = math.radians(40)
SCALE = 0.35  # natural logarithm
SHEAR = 0.4
SHIFT = 3.5  # pixels
STROKE = 0.5  # 1: the stroke grows or shrinks by one template pixel a side
NOISE = 0.2  # standard deviation


def digits() -> Task:
    """Load scikit-learn's 1,797 handwritten digits of 8 x 8 pixels.

    Features are (n, 64) float32 from 0 to 1 in steps of 1/16, row by row; a
    convolution takes ``X.view(-1, 1, 8, 8)``.  1,000 rows train, 297 validate
    and 500 test, fixed for good, each with its share of every digit.

    The pictures are the test part of "Optical Recognition of Handwritten
    Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository,
    CC BY 4.0), which scikit-learn (BSD license) ships in its package.

    Returns
    -------
    Task
        10 classes.

    Raises
    ------
    ImportError
        If scikit-learn is not installed.

    Examples
    --------
    >>> digits()
    Task(train 1000, val 297, test 500 of shape (64,), 10 classes)
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "digits() reads the pictures that come with scikit-learn:"
            " pip install scikit-learn"
        ) from error
    rows = load_digits()
    X = torch.tensor(rows.data / 16, dtype=torch.float32)
    y = torch.tensor(rows.target, dtype=torch.int64)
    parts = stratify(rows.target, sizes=(1000, 297, 500), seed=0)
    train, val, test = ((X[i], y[i]) for i in map(torch.from_numpy, parts))
    return Task(train, val, test, tuple("0123456789"))


def glyphs(n: int = 12_000, *, difficulty: float = 1.0, seed: int = 0) -> Task:
    """Render distorted characters of 28 x 28 pixels: 0-9 and A-Z.

    Each picture is one of 36 characters in one of 22 fonts, rotated, scaled,
    sheared and shifted, with thinner or thicker strokes and with noise.
    `difficulty` multiplies all of these: 0 is clean print (then many of the
    pictures are equal).  Two thirds train, one sixth validates, one sixth
    tests.  All parts use the same fonts: the task asks for robustness to the
    distortions, not to unseen fonts.  Every part has a random stream of its
    own, and its classes are balanced.

    Equal arguments give equal pictures, on other machines too, up to rounding
    (about 1e-5) and as long as NumPy's normal numbers and matplotlib's fonts
    stay what they are.

    The fonts ship inside matplotlib: DejaVu (Bitstream Vera license), STIX
    and Computer Modern (BaKoMa); all may be used freely.

    Parameters
    ----------
    n : int, default=12_000
        Pictures in all three parts together.
    difficulty : float, default=1.0
        From 0 (clean print) on.  0.5 leaves a convolution little to do
        wrong; at 1.0 a plain perceptron falls far behind it.
    seed : int, default=0
        Another seed is another data set of the same kind.

    Returns
    -------
    Task
        Features (m, 1, 28, 28) float32 from 0 (paper) to 1 (ink), 36 classes.

    Raises
    ------
    ValueError
        If `n` is below 6 or `difficulty` is negative or not finite.
    ImportError
        If matplotlib is not installed.

    Examples
    --------
    >>> glyphs(600, difficulty=0.5)
    Task(train 400, val 100, test 100 of shape (1, 28, 28), 36 classes)
    """
    if n < 6:
        raise ValueError(f"n={n} is too few for three parts, 6 is the least")
    if not 0 <= difficulty < math.inf:
        raise ValueError(f"difficulty={difficulty} must be 0 or more")
    part = n // 6
    sizes = (n - 2 * part, part, part)
    strokes = _strokes()
    parts = (
        _render(size, strokes, difficulty, [seed, number])
        for number, size in enumerate(sizes)
    )
    return Task(*parts, tuple(CHARACTERS))


def _render(
    n: int, strokes: Tensor, difficulty: float, seed: list[int]
) -> tuple[Tensor, Tensor]:
    """Draw n labeled pictures from one random stream."""
    fonts, classes = strokes.shape[1:3]
    y = torch.from_numpy(permutation(n, seed=[*seed, 0])) % classes
    random = np.random.default_rng([*seed, 1])
    font = torch.from_numpy(random.random(n) * fonts).long()
    # seven numbers in -difficulty ... difficulty decide on a distortion
    u = torch.from_numpy(random.random((7, n), np.float32) * 2 - 1) * difficulty
    noise = random.standard_normal((n, 1, 28, 28), np.float32)
    noise *= NOISE * difficulty
    X = torch.from_numpy(noise)
    stroke = (STROKE * u[6]).clamp(-1, 1)
    for some in torch.arange(n).split(1000):  # keeps the memory low
        ink = _restroke(strokes, font[some], y[some], stroke[some])
        X[some] += _warp(ink, u[:6, some])
    return X.clamp(0, 1), y


def _strokes() -> Tensor:
    """Stack all drawings with thinner, true and thicker strokes."""
    drawn = torch.from_numpy(pictures().copy())  # (fonts, 36, SIZE, SIZE)
    thick = functional.max_pool2d(drawn, 3, 1, 1)
    # thinning the ink is thickening the paper
    thin = -functional.max_pool2d(-drawn, 3, 1, 1)
    return torch.stack([thin, drawn, thick])


def _restroke(
    strokes: Tensor, font: Tensor, label: Tensor, amount: Tensor
) -> Tensor:
    """Pick drawings, thinner (amount -1) to thicker (1) by a pixel a side."""
    ink = strokes[1, font, label]
    other = strokes[1 + amount.sign().long(), font, label]
    return ink.lerp(other, amount.abs().view(-1, 1, 1))[:, None]


def _warp(ink: Tensor, u: Tensor) -> Tensor:
    """Sample (n, 1, SIZE, SIZE) at 28 x 28 points moved by u (6, n)."""
    angle, stretch, aspect, shear = u[0] * ROTATION, *(SCALE * u[1:3]), u[3]
    shear = shear * SHEAR
    zoom_x, zoom_y = (-stretch - aspect / 2).exp(), (aspect / 2 - stretch).exp()
    cos, sin = angle.cos(), angle.sin()
    shift = u[4:6] * (SHIFT / 14)
    # theta takes a point of the result (-1 ... 1) to its source
    rows = [
        [zoom_x * cos, zoom_x * (shear * cos - sin), shift[0]],
        [zoom_y * sin, zoom_y * (shear * sin + cos), shift[1]],
    ]
    theta = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
    grid = functional.affine_grid(
        theta, [len(ink), 1, 28, 28], align_corners=False
    )
    return functional.grid_sample(ink, grid, align_corners=False)
