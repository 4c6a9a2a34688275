"""MNIST and Fashion-MNIST, and the idx files that they come in."""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .sources import Source, find, locate
from .tasks import Task

DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4"}
DTYPES[0x0E] = ">f8"
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


MNIST = Source(
    "MNIST",
    ("mnist", "MNIST/raw"),
    (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    dict(
        zip(
            FILES,
            (
                "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "d53e105ee54ea40749a09fcbcd1e9432",
                "9fb629c4189551a2d022fa330f9573f3",
                "ec29112dd5afa0611ce80d1b7f02629c",
            ),
            strict=True,
        )
    ),
    tuple("0123456789"),
)
FASHION = Source(
    "Fashion-MNIST",
    ("fashion-mnist", "fashion_mnist", "FashionMNIST/raw"),
    (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/"
        "master/data/fashion/",
    ),
    dict(
        zip(
            FILES,
            (
                "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "25c81989df183df01b3e8a0aad5dffbe",
                "bef4ecab320f06d8554ea6380940ec79",
                "bb300cfdad3c16e7a12a480ee83cd310",
            ),
            strict=True,
        )
    ),
    (
        "T-shirt/top",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
)


def mnist(
    root: str | os.PathLike | None = None,
    *,
    download: bool = False,
    validation: int = 5_000,
) -> Task:
    """Load MNIST, 70,000 handwritten digits of 28 x 28 pixels.

    The last `validation` of the 60,000 training pictures validate, the 10,000
    test pictures test.  The four files (11 MB, gzip or plain) are looked for
    below `root`, else below the folder that the environment variable
    MINICOMPRESS_DATA names, else below the user's cache folder: in a folder
    ``mnist`` or ``MNIST/raw`` there, or in `root` itself.

    MNIST is by Y. LeCun, C. Cortes and C. Burges (1998), from NIST's special
    databases 1 and 3; it is widely passed on under CC BY-SA 3.0.

    Parameters
    ----------
    root : path, optional
        Where to look, and where to download to.
    download : bool, default=False
        Fetch the files that are missing; their md5 is checked.
    validation : int, default=5_000
        Training pictures that are set aside.

    Returns
    -------
    Task
        Features (n, 1, 28, 28) float32 from 0 to 1 in steps of 1/255, 10
        classes.

    Raises
    ------
    FileNotFoundError
        If files are missing; says which and where to put them.
    ConnectionError
        If files cannot be downloaded.
    ValueError
        If a file is damaged or `validation` takes all.

    Examples
    --------
    >>> mnist("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: MNIST needs train-images-idx3-ubyte.gz, ...
    """
    return load(MNIST, root, download=download, validation=validation)


def fashion_mnist(
    root: str | os.PathLike | None = None,
    *,
    download: bool = False,
    validation: int = 5_000,
) -> Task:
    """Load Fashion-MNIST, 70,000 pictures of clothes of 28 x 28 pixels.

    Same files, arguments and errors as `mnist` (31 MB); the folder is
    ``fashion-mnist``, ``fashion_mnist`` or ``FashionMNIST/raw``.  By
    Zalando Research, MIT license.

    Parameters
    ----------
    root : path, optional
        Where to look, and where to download to.
    download : bool, default=False
        Fetch the files that are missing; their md5 is checked.
    validation : int, default=5_000
        Training pictures that are set aside.

    Returns
    -------
    Task
        Features (n, 1, 28, 28) float32 from 0 to 1, 10 classes.

    References
    ----------
    H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a Novel Image Dataset for
    Benchmarking Machine Learning Algorithms", arXiv:1708.07747.
    """
    return load(FASHION, root, download=download, validation=validation)


def load(
    source: Source,
    root: str | os.PathLike | None,
    *,
    download: bool,
    validation: int,
) -> Task:
    """Find or fetch the four files of a source and make a task of them."""
    folder = locate(source, root, download)
    arrays = {stem: read(find(folder, stem)) for stem in FILES}
    for part in ("train", "t10k"):
        images, labels = (arrays[s] for s in FILES if s.startswith(part))
        _check(folder, part, images, labels, len(source.names))
    X, y, X_test, y_test = arrays.values()
    if not 0 < validation < len(X):
        raise ValueError(
            f"validation={validation} must lie between 1 and {len(X) - 1}"
        )
    cut = len(X) - validation
    parts = (X[:cut], y[:cut]), (X[cut:], y[cut:]), (X_test, y_test)
    return Task(*((x[:, None] / 255, y.long()) for x, y in parts), source.names)


def read(path: str | os.PathLike) -> Tensor:
    """Read one idx file, compressed with gzip or plain.

    The format: two zero bytes, a byte for the type, a byte for the number of
    dimensions, each dimension as a big-endian 32-bit number, the values.

    Parameters
    ----------
    path : path
        The name does not matter; the first two bytes tell what is gzip.

    Returns
    -------
    Tensor
        Of the shape and type that the header names.

    Raises
    ------
    ValueError
        If the header is not idx or its shape does not fit the length.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if packed else open)(path, "rb") as file:
            head = file.read(4)
            known = len(head) == 4 and head[:2] == b"\0\0" and 0 < head[3] < 9
            if not known or head[2] not in DTYPES:
                raise ValueError(f"{path}: no idx file, starts with {head!r}")
            dims = file.read(4 * head[3])
            if len(dims) < 4 * head[3]:
                raise ValueError(f"{path}: ends within the header")
            shape = struct.unpack(f">{head[3]}I", dims)
            dtype = np.dtype(DTYPES[head[2]])
            size = math.prod(shape) * dtype.itemsize
            # in pieces: a false header must not reserve memory
            body = bytearray()
            while len(body) <= size and (piece := file.read(1 << 20)):
                body += piece
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error})") from error
    if len(body) != size:
        fault = "more" if len(body) > size else len(body)
        raise ValueError(
            f"{path}: shape {shape} needs {size} bytes of values, found {fault}"
        )
    values = np.frombuffer(body, dtype).reshape(shape)
    return torch.from_numpy(values.astype(dtype.newbyteorder("=")))


def _check(
    folder: Path, part: str, images: Tensor, labels: Tensor, classes: int
) -> None:
    """Make sure that pictures and labels belong together."""
    good = (
        images.dtype == labels.dtype == torch.uint8
        and images.shape[1:] == (28, 28)
        and labels.shape == images.shape[:1]
        and len(labels) > 0
        and labels.max() < classes
    )
    if not good:
        raise ValueError(
            f"the {part} files in {folder} hold {tuple(images.shape)} and"
            f" {tuple(labels.shape)}, expected bytes (n, 28, 28) and (n,) with"
            f" labels below {classes}"
        )
