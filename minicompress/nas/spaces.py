"""What can be searched: choices by name, and which combinations count."""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

Arch = dict[str, object]
TRIES = 100_000


@dataclass(frozen=True)
class Space:
    """A search space: every way to pick one value for each name.

    An architecture is a plain dict, so that it can be printed, written to a
    log and sent to another machine.  What an architecture means is up to the
    function that builds it.

    Parameters
    ----------
    choices
        {name: values}: the values differ from one another and are strings,
        numbers, bools or None, so that JSON keeps them.
    valid
        tells of an architecture whether it belongs to the space; all do if
        it is left out.  Two descriptions of one network are two members of
        the space, and random search draws that network twice as often: a
        `valid` that accepts only one of them makes the space even.

    Raises
    ------
    ValueError
        If a name has no values, equal ones, or one of another kind.

    Examples
    --------
    >>> space = Space({"width": (8, 16), "depth": (1, 2, 3)})
    >>> space.size, len(list(space))
    (6, 6)
    >>> small = space.where(lambda a: a["width"] * a["depth"] <= 16)
    >>> [tuple(a.values()) for a in small]
    [(8, 1), (8, 2), (16, 1)]
    """

    choices: Mapping[str, tuple]
    valid: Callable[[Arch], bool] | None = None

    def __post_init__(self):
        choices = {name: tuple(v) for name, v in self.choices.items()}
        object.__setattr__(self, "choices", choices)
        if not choices:
            raise ValueError("choices: a space needs at least one name")
        for name, values in choices.items():
            kinds = {type(v) for v in values}
            if not kinds <= {str, int, float, bool, type(None)}:
                raise ValueError(f"choices[{name!r}]: JSON keeps no {kinds}")
            if not values or len({*values}) < len(values):
                raise ValueError(
                    f"choices[{name!r}]: {values} are not distinct"
                )

    @property
    def size(self) -> int:
        """Count all combinations, those that are not valid too."""
        return math.prod(map(len, self.choices.values()))

    def __iter__(self) -> Iterator[Arch]:
        """Enumerate the valid architectures; the last name runs fastest."""
        for values in itertools.product(*self.choices.values()):
            arch = dict(zip(self.choices, values, strict=True))
            if self.accepts(arch):
                yield arch

    def accepts(self, arch: Arch) -> bool:
        """Tell whether an architecture with these names is valid."""
        return self.valid is None or bool(self.valid(arch))

    def where(self, limit: Callable[[Arch], bool]) -> "Space":
        """Return the part of the space in which `limit` holds as well."""
        if self.valid is None:
            return replace(self, valid=limit)
        return replace(self, valid=lambda a: self.valid(a) and limit(a))

    def sample(self, rng: random.Random) -> Arch:
        """Draw a valid architecture, each with the same probability.

        Parameters
        ----------
        rng
            `random.Random(seed)`, whose numbers are the same everywhere.

        Raises
        ------
        ValueError
            If 100,000 draws brought no valid one.
        """
        for _ in range(TRIES):
            arch = {n: rng.choice(v) for n, v in self.choices.items()}
            if self.accepts(arch):
                return arch
        raise ValueError(f"valid: it refused {TRIES:,} random architectures")

    def mutate(self, arch: Arch, rng: random.Random) -> Arch:
        """Change one choice, drawn first, to another value, drawn second.

        A choice that cannot change alone without leaving the space is passed
        over.

        Raises
        ------
        ValueError
            If no single change leads to a valid architecture.
        """
        for name in rng.sample(list(self.choices), len(self.choices)):
            near = [{**arch, name: v} for v in self.choices[name]]
            near = [a for a in near if a != arch and self.accepts(a)]
            if near:
                return rng.choice(near)
        raise ValueError(f"arch: nothing valid is one change from {arch}")

    def cross(self, a: Arch, b: Arch, rng: random.Random) -> Arch:
        """Take each choice from one of two parents: uniform crossover.

        After 100 children outside of the space it is a copy of `a`.
        """
        for _ in range(100):
            child = {name: rng.choice((a[name], b[name])) for name in a}
            if self.accepts(child):
                return child
        return dict(a)

    def encode(self, arch: Arch) -> tuple[int, ...]:
        """Return the position of each choice among its values.

        Raises
        ------
        ValueError
            If a name is missing, unknown, or has a value it cannot have.

        Examples
        --------
        >>> space = Space({"width": (8, 16), "op": ("conv", "pool")})
        >>> space.encode({"width": 16, "op": "conv"})
        (1, 0)
        """
        if arch.keys() != self.choices.keys():
            raise ValueError(f"arch: {list(arch)}, not {list(self.choices)}")
        for name, value in arch.items():
            if value not in self.choices[name]:
                raise ValueError(f"arch: {name!r} cannot be {value!r}")
        return tuple(v.index(arch[n]) for n, v in self.choices.items())

    def decode(self, positions: Sequence[int]) -> Arch:
        """Return the architecture of which these are the positions.

        Raises
        ------
        ValueError
            If there is not one position in range for each name.
        """
        sizes = [len(values) for values in self.choices.values()]
        inside = len(positions) == len(sizes) and all(
            0 <= i < n for i, n in zip(positions, sizes, strict=True)
        )
        if not inside:
            raise ValueError(f"positions: {positions} in a space of {sizes}")
        pairs = zip(self.choices.items(), positions, strict=True)
        return {name: values[i] for (name, values), i in pairs}
