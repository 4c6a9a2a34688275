"""The command line of minicompress.

python -m minicompress info model.mc
python -m minicompress verify model.mc
python -m minicompress compress glyphs-cnn --recipe int8
python -m minicompress compress model.safetensors --budget 20000000
python -m minicompress export model.mc -o model.safetensors
python -m minicompress score entry.mc
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import commands, pipeline, train
from .pipeline import contest

INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments
        words of the command line, by default those of this process.

    Returns
    -------
    int
        Exit status: 0 if all is well, 1 if a file is bad or missing or did
        not pass, 130 after Ctrl-C.  A wrong command line ends in status 2.
    """
    given = parser().parse_args(arguments)
    try:
        return given.run(given)
    except KeyboardInterrupt:
        print("interrupted; no file was written", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser("minicompress", description=__doc__)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    added = top.add_subparsers(required=True, metavar="command")

    def add(name: str, run: Callable, what: str) -> argparse.ArgumentParser:
        command = added.add_parser(name, help=what, description=what)
        command.set_defaults(run=run)
        return command

    for name, what in (
        ("info", "list the tensors of a file and their sizes"),
        ("verify", "decode everything, and write it again"),
    ):
        add(name, look, what).add_argument("file", nargs="+", type=Path)
        added.choices[name].set_defaults(look=getattr(commands, name))
    one = add("compress", compress, "write a network as a smaller file")
    one.set_defaults(wrong=one.error)
    one.add_argument(
        "source",
        nargs="?",
        help="a network of the zoo, a .mc file, a .safetensors checkpoint or "
        "the folder of a BERT or a GPT-2",
    )
    how = one.add_mutually_exclusive_group(required=True)
    names = [*pipeline.RECIPES, "deep"]
    how.add_argument("--recipe", choices=names, help="the same for all weights")
    how.add_argument(
        "--budget",
        type=whole,
        metavar="BYTES",
        help="the best recipe for each weight in a file of this size",
    )
    how.add_argument("--list", action="store_true", help="say what there is")
    one.add_argument(
        "--slow",
        action="store_true",
        help="try context models too: some seconds for a thousand weights",
    )
    two = add("export", export, "write decoded tensors for other programs")
    two.add_argument("source", type=Path, metavar="file")
    for command in (one, two):
        command.add_argument(
            "-o", "--output", type=Path, required=command is two, metavar="FILE"
        )
        command.add_argument("--force", action="store_true", help="overwrite")
    three = add("score", score, "measure an entry of the byte contest")
    three.add_argument("file", nargs="+", type=Path)
    three.add_argument("--seed", type=whole, help="repeat an earlier score")
    return top


def look(given: argparse.Namespace) -> int:
    """Say something of each file."""
    return max(reported(path, given.look, path) for path in given.file)


def compress(given: argparse.Namespace) -> int:
    """Compress one source, or list what could be done to it."""
    if given.list:
        print(commands.recipes())
        return 0
    if given.source is None:
        given.wrong("name a source, or --list")
    return reported(
        given.source,
        commands.compress,
        given.source,
        recipe=given.recipe,
        budget=given.budget,
        slow=given.slow,
        output=given.output,
        force=given.force,
    )


def export(given: argparse.Namespace) -> int:
    """Write the tensors of a file in another format."""
    how = {"output": given.output, "force": given.force}
    return reported(given.source, commands.exported, given.source, **how)


def score(given: argparse.Namespace) -> int:
    """Score each file; all of them must pass."""
    found: list[contest.Score] = []

    def scored(path: Path) -> contest.Score:
        with train.threads(1):  # one small picture at a time
            found.append(contest.score(path, given.seed))
        return found[-1]

    bad = [reported(path, scored, path) for path in given.file]
    return max(*bad, int(not all(one.passed for one in found)))


def reported(source, run: Callable, *arguments, **options) -> int:
    """Print what a command says, or what is wrong with its source."""
    try:
        print(run(*arguments, **options))
    except (ImportError, OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        print(f"{source}: {why}", file=sys.stderr)
        return 1
    return 0


def whole(text: str) -> int:
    """Read a whole number that is not negative."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
