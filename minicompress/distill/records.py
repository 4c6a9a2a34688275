"""The teacher's logits, computed once and kept in a file."""

import contextlib
import hashlib
import os
import pickle
import time

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..train import evaluating

EVERY = 30  # seconds between two saves


def teacher_logits(
    teacher: nn.Module,
    X: Tensor,
    *,
    size: int = 256,
    path: str | os.PathLike | None = None,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Tensor:
    """Run the teacher once over all inputs, or read what it said before.

    With a path the logits are saved now and then, at the end, and when
    something stops the run; a second call goes on from there.  For
    `cached`: ``batches(X, y, teacher_logits(teacher, X))``.

    Parameters
    ----------
    teacher
        from inputs to logits; runs in evaluation mode without gradients.
    X
        inputs (n, ...).
    size
        rows that go through the teacher together.
    path
        file to write, and to read if it exists.
    dtype
        of the result; torch.float16 halves the file and rounds the logits
        to three digits.
    progress
        whether to show a bar.

    Returns
    -------
    (n, classes), or (n, ..., classes), on the CPU.

    Raises
    ------
    ValueError
        If the file is damaged, or of another teacher, other inputs or
        another dtype; the teacher is known by its class and its weights.

    Examples
    --------
    >>> teacher_logits(nn.Softsign(), torch.tensor([[1.0, 0.0], [3.0, 1.0]]))
    tensor([[0.5000, 0.0000],
            [0.7500, 0.5000]])
    """
    if len(X) == 0 or size < 1:
        raise ValueError(f"X {tuple(X.shape)} and size {size}: one or more")
    record = _Record(path, teacher, X, dtype)
    bar = tqdm(total=len(X), initial=record.done, disable=not progress)
    with bar, record, evaluating(teacher) as device:
        for x in X[record.done :].split(size):
            v = teacher(x.to(device)).to("cpu", dtype)
            if v.ndim < 2 or len(v) != len(x):
                raise ValueError(
                    f"teacher: logits {tuple(v.shape)} for {len(x)} inputs"
                )
            record.add(v)
            bar.update(len(x))
    return torch.cat(record.parts)


def digest(*tensors: Tensor) -> str:
    """Return a hash of the dtypes, shapes and bytes of tensors.

    Examples
    --------
    >>> digest(torch.zeros(2)) == digest(torch.zeros(2, 1))
    False
    """
    state = hashlib.sha256()
    for t in tensors:
        state.update(f"{t.dtype} {tuple(t.shape)} ".encode())
        # copied to the CPU in parts: the inputs may be large
        for part in t.detach().reshape(-1).split(2**24):
            state.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return state.hexdigest()


class _Record:
    """Logits so far, in a file that a crash leaves whole."""

    def __init__(
        self,
        path: str | os.PathLike | None,
        teacher: nn.Module,
        X: Tensor,
        dtype: torch.dtype,
    ):
        self.path = None if path is None else os.fspath(path)
        self.parts: list[Tensor] = []
        self.saved, self.time = 0, time.monotonic()
        if self.path is not None:
            folder = os.path.dirname(self.path) or "."
            if not os.path.isdir(folder):  # say so before, not after, the run
                raise ValueError(f"path: there is no folder {folder}")
            state = teacher.state_dict()
            self.plan = {
                "teacher": f"{type(teacher).__name__} {list(state)}",
                "weights": digest(*state.values()),
                "inputs": digest(X),
                "dtype": str(dtype),
            }
            if os.path.exists(self.path):
                self.read(len(X))

    @property
    def done(self) -> int:
        return sum(map(len, self.parts))

    def add(self, v: Tensor) -> None:
        self.parts.append(v)
        if time.monotonic() - self.time > EVERY:
            self.save()

    def __enter__(self) -> "_Record":
        return self

    def __exit__(self, *_) -> None:
        self.save()  # also when an error or Ctrl-C ends the run

    def save(self) -> None:
        if self.path is None or self.done == self.saved:
            return
        logits = torch.cat(self.parts)
        data = {"plan": self.plan, "logits": logits, "check": digest(logits)}
        try:
            torch.save(data, self.path + ".part")
            os.replace(self.path + ".part", self.path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path + ".part")
        self.saved, self.time = len(logits), time.monotonic()

    def read(self, n: int) -> None:
        try:
            data = torch.load(self.path, "cpu", weights_only=True)
            plan, logits = data["plan"], data["logits"]
            other = [k for k, x in self.plan.items() if plan[k] != x]
            if other:
                raise ValueError(f"it has another {', another '.join(other)}")
            if data["check"] != digest(logits) or not 0 < len(logits) <= n:
                raise ValueError("its logits are damaged")
        except (
            OSError,
            ValueError,
            RuntimeError,
            LookupError,
            TypeError,
            AttributeError,
            EOFError,
            pickle.UnpicklingError,
        ) as error:
            raise ValueError(f"path {self.path}: {error}") from error
        self.parts, self.saved = [logits], len(logits)
