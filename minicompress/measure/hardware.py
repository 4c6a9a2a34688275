"""How long a model takes, how much memory, and what the machine allows."""

import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..train import evaluating


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median and the quartiles of `repeats` calls."""

    median: float
    low: float
    high: float
    repeats: int
    threads: int

    def __str__(self) -> str:
        low, median, high = (
            f"{1e3 * t:.3g}" for t in (self.low, self.median, self.high)
        )
        return f"{median} ms ({low} to {high})"


@dataclass(frozen=True)
class Machine:
    """What this machine can do: MACs and bytes moved per second."""

    peak: float
    bandwidth: float
    threads: int


def latency(
    f: Callable,
    *args,
    repeats: int = 30,
    warmup: int = 3,
    threads: int = 1,
) -> Timing:
    """Time calls of a function or a model, without gradients.

    Parameters
    ----------
    f : called as ``f(*args)``; a model runs in evaluation mode.
    args : the arguments.
    repeats : timed calls.
    warmup : calls before, not timed.
    threads : number of threads torch may use, restored afterwards.

    Returns
    -------
    Timing, in seconds per call.
    """
    with ExitStack() as stack:
        if isinstance(f, nn.Module):
            stack.enter_context(evaluating(f))
        return compare(
            {"f": lambda: f(*args)},
            repeats=repeats,
            warmup=warmup,
            threads=threads,
        )["f"]


def compare(
    functions: dict[str, Callable[[], object]],
    *,
    repeats: int = 30,
    warmup: int = 3,
    threads: int = 1,
) -> dict[str, Timing]:
    """Time several functions in turns, so that their ratios are honest.

    A machine that slows down for a while slows all of them alike.

    Parameters
    ----------
    functions : {name: function without arguments}.
    repeats : timed rounds, in each of which every function runs once.
    warmup : rounds before, not timed.
    threads : number of threads torch may use, restored afterwards.

    Returns
    -------
    {name: Timing}.
    """
    if repeats < 1 or warmup < 0 or threads < 1:
        raise ValueError(
            f"repeats={repeats} and threads={threads} must be at least 1, "
            f"warmup={warmup} at least 0"
        )
    times: dict[str, list[float]] = {name: [] for name in functions}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            for i in range(-warmup, repeats):
                for name, f in functions.items():
                    seconds = _seconds(f)
                    if i >= 0:
                        times[name].append(seconds)
    finally:
        torch.set_num_threads(before)
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    result = {}
    for name, ts in times.items():
        ts = torch.tensor(ts, dtype=torch.float64)
        low, median, high = ts.quantile(quartiles).tolist()
        result[name] = Timing(median, low, high, repeats, threads)
    return result


def _seconds(f: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    f()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    # A GPU call returns before its work is done.
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory(f: Callable, *args) -> int:
    """Measure the most memory that a call's tensors take at one moment.

    What exists before the call (weights, inputs) is not counted, nor are
    buffers that one operation uses inside: these are the activations.

    Parameters
    ----------
    f : called as ``f(*args)``.  A model runs in evaluation mode without
        gradients; any other function runs as it is, so that a training
        step shows what its backward pass keeps.
    args : the arguments.

    Returns
    -------
    Bytes.

    Examples
    --------
    >>> peak_memory(nn.Linear(100, 50), torch.zeros(8, 100))  # 8 * 50 * 4
    1600
    """
    with ExitStack() as stack:
        if isinstance(f, nn.Module):
            stack.enter_context(evaluating(f))
        meter = stack.enter_context(_Meter())
        f(*args)
    return meter.peak


class _Meter(TorchDispatchMode):
    """Follows the storage of every tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, int] = {}  # bytes, 0 if from before the call
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for t in tree_leaves((args, kwargs)):
            self._meet(t, new=False)
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            self._meet(t, new=True)
        self.peak = max(self.peak, self.now)
        return out

    def _meet(self, t, *, new: bool) -> None:
        if not isinstance(t, Tensor) or t.layout != torch.strided:
            return
        if t.is_meta:  # only a shape
            return
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes() if new else 0
            self.now += self.live[key]
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self.live.pop(key)


def machine(*, threads: int = 1, size: int = 1024) -> Machine:
    """Measure the fastest matrix product and the fastest pass over memory.

    Parameters
    ----------
    threads : number of threads torch may use.
    size : the product is (size, size) by (size, size) in float32; what is
        copied and summed has 64 bytes for each of its entries.

    Returns
    -------
    Machine, for `roofline`.
    """
    a, b = torch.rand(2, size, size)
    source = torch.zeros(16, size, size)
    target = torch.empty_like(source)
    functions = {
        "macs": lambda: a @ b,
        "copy": lambda: target.copy_(source),
        "read": source.sum,
    }
    times = compare(functions, repeats=10, threads=threads)
    copied = 2 * source.nbytes / times["copy"].low  # read and written
    return Machine(
        peak=size**3 / times["macs"].low,
        bandwidth=max(copied, source.nbytes / times["read"].low),
        threads=threads,
    )


def roofline(
    macs: float, bytes: float, *, peak: float, bandwidth: float
) -> float:
    """Bound the time of a computation from below.

    Parameters
    ----------
    macs, bytes : work to do and data to move.
    peak, bandwidth : MACs and bytes per second of the machine.

    Returns
    -------
    Seconds; the larger of the two times decides.

    References
    ----------
    Williams et al., Roofline, Communications of the ACM 52(4), 2009.

    Examples
    --------
    >>> roofline(1e9, 4e9, peak=1e10, bandwidth=1e10)  # memory bound
    0.4
    """
    return max(macs / peak, bytes / bandwidth)


def amdahl(fraction: float, factor: float) -> float:
    """Compute the speed-up of the whole from that of a part.

    Parameters
    ----------
    fraction : share of the time that the part takes, 0 to 1.
    factor : how many times faster the part becomes.

    Returns
    -------
    Time before divided by time after.

    References
    ----------
    Amdahl, AFIPS Spring Joint Computer Conference, 1967.

    Examples
    --------
    >>> amdahl(0.5, 2)
    1.3333333333333333
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    return 1 / ((1 - fraction) + fraction / factor)
