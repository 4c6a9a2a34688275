"""Find the files of a data set, or fetch them."""

import hashlib
import http.client
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm


@dataclass(frozen=True, eq=False)
class Source:
    """Say where the files of a data set come from.

    Parameters
    ----------
    name : str
        What messages call it.
    folders : tuple of str
        Looked for below the data folder; downloads go into the first.
    mirrors : tuple of str
        Addresses to which the file name is appended, tried in turn.
    files : dict of str to str
        The name of each file without ``.gz``, and the md5 of the file that
        the mirrors hold (with ``.gz``).
    names : tuple of str
        What each label stands for.
    """

    name: str
    folders: tuple[str, ...]
    mirrors: tuple[str, ...]
    files: dict[str, str]
    names: tuple[str, ...]


def locate(
    source: Source, root: str | os.PathLike | None, download: bool
) -> Path:
    """Return the folder that holds all files of a source.

    Parameters
    ----------
    source : Source
        What is wanted.
    root : path or None
        Where to look; else where the environment variable MINICOMPRESS_DATA
        points, else the user's cache folder.
    download : bool
        Whether to fetch what is missing.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileNotFoundError
        If files are missing and `download` is false.
    ConnectionError
        If they cannot be downloaded.
    """
    base = root or os.environ.get("MINICOMPRESS_DATA")
    if not base:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        base = Path(cache, "minicompress")
    base = Path(base).expanduser()
    folders = [base / name for name in source.folders]
    # only where the caller points: both data sets use the same file names
    for folder in [*folders, base] if root else folders:
        if all(find(folder, stem) for stem in source.files):
            return folder
    target = folders[0]
    missing = [s + ".gz" for s in source.files if not find(target, s)]
    if not download:
        raise FileNotFoundError(
            f"{source.name} needs {', '.join(missing)} in {target.absolute()}"
            " (gzip or plain).  Put them there, name another folder by root="
            " or by the environment variable MINICOMPRESS_DATA, or pass"
            f" download=True to fetch them from {source.mirrors[0]}"
        )
    for stem, md5 in source.files.items():
        if not find(target, stem):
            try:
                fetch(stem + ".gz", target, mirrors=source.mirrors, md5=md5)
            except ConnectionError as error:
                raise ConnectionError(
                    f"{error}\nWithout a network, put {', '.join(missing)}"
                    f" into {target.absolute()} by hand"
                ) from error
    return target


def find(folder: Path, stem: str) -> Path | None:
    """Return the file of this stem, however it is spelled, or None.

    ``train-images-idx3-ubyte`` is also found with ``.gz`` at the end and with
    a dot in place of the second hyphen, as some sites spell it.
    """
    dotted = stem.replace("-idx", ".idx")
    names = (stem + ".gz", stem, dotted + ".gz", dotted)
    files = (folder / name for name in names)
    return next((file for file in files if file.is_file()), None)


def fetch(
    name: str, folder: Path, *, mirrors: tuple[str, ...], md5: str
) -> Path:
    """Download one file from the first mirror that delivers it intact.

    Parameters
    ----------
    name : str
        Of the file, on the mirror and in the folder.
    folder : Path
        Made if it does not exist.  The file appears in it only when it is
        complete and its md5 is right.
    mirrors : tuple of str
        Addresses to which the name is appended, tried in turn.
    md5 : str
        Of the file, in hexadecimal digits.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    ConnectionError
        If no mirror delivers it; says what was wrong with each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{name}.{os.getpid()}.part"
    problems = []
    for mirror in mirrors:
        url = mirror.rstrip("/") + "/" + name
        try:
            found = _transfer(url, part)
            if found != md5:
                raise ValueError(f"md5 is {found}, expected {md5}")
            part.replace(folder / name)
            return folder / name
        except (OSError, ValueError, http.client.HTTPException) as error:
            problems.append(f"{url}: {error or type(error).__name__}")
        finally:
            part.unlink(missing_ok=True)
    raise ConnectionError(
        f"{name} could not be downloaded:\n  " + "\n  ".join(problems)
    )


def _transfer(url: str, path: Path) -> str:
    """Copy an address into a file, show progress, return the md5."""
    digest = hashlib.md5(usedforsecurity=False)
    with (
        urllib.request.urlopen(url, timeout=30) as response,
        open(path, "wb") as file,
        tqdm(
            total=int(response.headers.get("Content-Length", 0)) or None,
            unit="B",
            unit_scale=True,
            desc=url.rsplit("/", 1)[1],
        ) as bar,
    ):
        while block := response.read(1 << 16):
            file.write(block)
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()
