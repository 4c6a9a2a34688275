"""How long a network takes, looked up in a table instead of measured.

A search asks for the latency of thousands of networks that consist of the
same few parts.  `latency_table` measures each part once, and the latency of
a network is the sum over the parts that it calls.  The sum is exact only for
a machine that runs one part after the other and spends no time in between:
compare it with a few whole networks before a search relies on it.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..measure import compare
from ..train import evaluating


@dataclass(frozen=True)
class LatencyTable:
    """Times of parts, which add up to the times of networks.

    Made by `latency_table`.  It measures nothing itself, so that it can be
    sent to the processes of a search and used on another machine.

    Parameters
    ----------
    times
        {part: seconds per call}.  The name of a part says its type, its
        configuration and its input.
    parts
        names of the types that count as one part, whatever is inside.
    machine
        "cores", "threads" and "torch": where the times come from.
    """

    times: Mapping[str, float]
    parts: tuple[str, ...] = ()
    machine: Mapping[str, object] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"LatencyTable({len(self.times)} parts)"

    def calls(self, model: nn.Module, *inputs) -> Counter[str]:
        """Count how often one forward calls each part.

        A network and inputs on the meta device are not computed and count
        like those of the CPU.

        Parameters
        ----------
        model
            left as it is; runs in evaluation mode.
        inputs
            what the model is called with.

        Returns
        -------
        Counter
            {part: calls}; a block that is used three times counts three
            times.
        """
        return Counter(c.key for c in _calls(model, inputs, self.parts))

    def seconds(self, model: nn.Module, *inputs) -> float:
        """Add up the times of all parts that one forward calls.

        Parameters
        ----------
        model, inputs
            as for `calls`.

        Raises
        ------
        ValueError
            If a part is not in the table.
        """
        total = 0.0
        for key, n in self.calls(model, *inputs).items():
            if key not in self.times:
                raise ValueError(f"model: the table has no time for {key}")
            total += n * self.times[key]
        return total

    def save(self, path: str | os.PathLike) -> None:
        """Write the table as JSON."""
        text = json.dumps(asdict(self), indent=1) + "\n"
        Path(path).write_text(text, encoding="utf8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> "LatencyTable":
        """Read a table that `save` wrote."""
        found = json.loads(Path(path).read_text(encoding="utf8"))
        return cls(**{**found, "parts": tuple(found["parts"])})


def latency_table(
    examples: Iterable[tuple[nn.Module, Tensor | tuple]],
    *,
    parts: tuple[type, ...] = (),
    repeats: int = 30,
    warmup: int = 3,
    threads: int = 1,
    known: LatencyTable | None = None,
) -> LatencyTable:
    """Measure each part of some networks once per configuration and input.

    Parts are modules without submodules, and modules of the types in
    `parts`, which hide what is inside.  What a forward computes outside of
    them is not seen: functions, sums of branches, and parameters that a
    module with submodules holds itself (name its type in `parts`).

    All parts run in turns, and the lower quartile of the repeats counts:
    other processes make a call slower, never faster.

    Parameters
    ----------
    examples
        pairs of a model and its input, or a tuple of inputs.  The models
        are left as they are and measured in evaluation mode.
    parts
        types of modules.  They are recognized by their names.
    repeats, warmup
        timed and untimed calls of each part.
    threads
        torch may use.
    known
        a table that the new one extends; its parts are not measured again.

    Returns
    -------
    LatencyTable

    Raises
    ------
    ValueError
        If `known` has other `parts` or `threads`.

    References
    ----------
    Cai et al., ProxylessNAS, arXiv:1812.00332, section 3.3.
    Wu et al., FBNet, arXiv:1812.03443, section 3.2.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    >>> table = latency_table([(net, torch.zeros(1, 8))], repeats=5)
    >>> list(table.calls(net, torch.zeros(1, 8)).values())
    [2, 1]
    >>> longer = nn.Sequential(net, nn.Linear(8, 8))
    >>> table.seconds(longer, torch.zeros(1, 8)) > table.seconds(
    ...     net, torch.zeros(1, 8)
    ... )
    True
    """
    names = tuple(t.__name__ for t in parts)
    machine = {
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
    }
    old = LatencyTable({}, names, machine) if known is None else known
    if old.parts != names or old.machine.get("threads") != threads:
        raise ValueError(
            f"known: a table of {old.parts} with {old.machine}, not of "
            f"{names} with threads={threads}"
        )
    new: dict[str, _Call] = {}
    with ExitStack() as stack:
        for model, x in examples:
            inputs = x if isinstance(x, tuple) else (x,)
            for call in _calls(model, inputs, names):
                if call.key not in old.times and call.key not in new:
                    new[call.key] = call
                    stack.enter_context(evaluating(call.module))
        timings = compare(
            {key: call.run for key, call in new.items()},
            repeats=repeats,
            warmup=warmup,
            threads=threads,
        )
    times = {key: timing.low for key, timing in timings.items()}
    return LatencyTable({**old.times, **times}, names, machine)


def expected_latency(alpha: Tensor, times: Tensor) -> Tensor:
    """Average the latency over the choices of a softmax, differentiably.

    Parameters
    ----------
    alpha
        (layers, operations) logits of the choices.
    times
        (layers, operations) seconds.

    Returns
    -------
    Tensor
        Seconds, a scalar: the sum over layers of sum_o P_o T_o.

    Raises
    ------
    ValueError
        If the shapes differ.

    References
    ----------
    Cai et al., ProxylessNAS, arXiv:1812.00332, section 3.3.1.

    Examples
    --------
    >>> times = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    >>> expected_latency(torch.zeros(2, 2), times)
    tensor(4.)
    """
    if alpha.shape != times.shape:
        raise ValueError(
            f"times: shape {(*times.shape,)} for alpha {(*alpha.shape,)}"
        )
    return (alpha.softmax(-1) * times).sum()


def soft_limit(
    accuracy: float,
    seconds: float,
    *,
    limit: float,
    below: float = -0.07,
    above: float = -0.07,
) -> float:
    """Join accuracy and latency in one number that a search minimizes.

    It is the reward of MnasNet with a minus.  With -0.07 twice the time is
    worth as much as 5 % more accuracy, as 2^-0.07 = 1/1.05; below=0 and
    above=-1 reward no speed beyond the limit and punish every excess.

    Parameters
    ----------
    accuracy
        0 to 1, larger is better.
    seconds, limit
        latency and the one that is aimed at, T.
    below, above
        exponent w up to the limit and beyond it.

    Returns
    -------
    float
        -accuracy (seconds / limit)^w.

    References
    ----------
    Tan et al., MnasNet, arXiv:1807.11626, equations 2 and 3.

    Examples
    --------
    >>> soft_limit(0.75, 0.02, limit=0.02)
    -0.75
    >>> round(soft_limit(0.75 * 1.05, 0.04, limit=0.02), 3)
    -0.75
    """
    if seconds <= 0 or limit <= 0:
        raise ValueError(
            f"seconds={seconds} and limit={limit} must be positive"
        )
    w = below if seconds <= limit else above
    return -accuracy * (seconds / limit) ** w


@dataclass(frozen=True)
class _Call:
    """A part and what it was called with."""

    key: str
    module: nn.Module
    args: tuple
    kwargs: dict

    def run(self):
        return self.module(*self.args, **self.kwargs)


def _calls(
    model: nn.Module, inputs: tuple, parts: tuple[str, ...]
) -> list[_Call]:
    """Run a model once and list its outermost parts in the order of calls."""
    found, open_ = [], []

    def enter(module, args, kwargs):
        if not open_:  # what runs inside of a part is a piece of it
            key = _key(module, args, kwargs)
            found.append(_Call(key, module, args, kwargs))
        open_.append(module)

    def leave(module, args, output):
        open_.pop()

    with ExitStack() as stack:
        for module in model.modules():
            if _is_part(module, model, parts):
                hooks = (
                    module.register_forward_pre_hook(enter, with_kwargs=True),
                    module.register_forward_hook(leave),
                )
                for hook in hooks:
                    stack.callback(hook.remove)
        with evaluating(model):
            model(*inputs)
    return found


def _is_part(module: nn.Module, model: nn.Module, parts: tuple) -> bool:
    if next(module.children(), None) is None:
        return True
    # a table in which the whole network is a part would say nothing new
    named = any(c.__name__ in parts for c in type(module).__mro__)
    return named and module is not model


def _key(module: nn.Module, args: tuple, kwargs: dict) -> str:
    """Name a part by all that its time can depend on."""
    given = [_label(x) for x in tree_leaves(args)]
    given += [
        f"{name}={_label(x)}"
        for name, value in kwargs.items()
        for x in tree_leaves(value)
    ]
    types = {p.dtype for p in module.parameters()} - {torch.float32}
    odd = "".join(sorted(f" {str(t).removeprefix('torch.')}" for t in types))
    return f"{_describe(module)}{odd} on {', '.join(given)}"


def _label(x) -> str:
    if not isinstance(x, Tensor):
        return _text(x)
    kind = str(x.dtype).removeprefix("torch.")
    place = "" if x.device.type in ("cpu", "meta") else f" {x.device.type}"
    return f"{kind}{list(x.shape)}{place}"


def _describe(module: nn.Module) -> str:
    """Write a module's type and configuration, submodules included."""
    if type(module).__module__.startswith("torch.nn."):
        settings = [module.extra_repr()]
    else:  # nothing obliges a user's module to have a telling repr
        public = {n: v for n, v in vars(module).items() if n[0] != "_"}
        public.pop("training")
        settings = [f"{n}={_text(v)}" for n, v in public.items()]
        own = module.named_parameters(recurse=False)
        settings += [f"{n}={list(p.shape)}" for n, p in own]
    settings += [f"{n}={_describe(m)}" for n, m in module.named_children()]
    return f"{type(module).__name__}({', '.join(filter(None, settings))})"


def _text(value) -> str:
    """Write a setting; of objects only the name, as a repr has an address."""
    if isinstance(value, dict):
        inside = (f"{n}: {_text(v)}" for n, v in value.items())
        return "{" + ", ".join(inside) + "}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, str | int | float | None):
        return repr(value)
    if isinstance(value, partial):
        return f"{_text(value.func)}{_text(value.args)}{_text(value.keywords)}"
    if isinstance(value, Tensor):
        return _label(value)
    return getattr(value, "__name__", type(value).__name__)
