"""The `festina` command. Each subcommand is a module of this package; nothing else imports them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Protocol, cast

from festina import __version__

COMMANDS = ("info", "demo", "bench", "convert")
"""The subcommands. Each is a module of this package that satisfies `Command`."""


class Command(Protocol):
    """The interface of a module in `COMMANDS`. Its docstring is the help text, the first line the summary in the overview."""

    __doc__: str | None

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the command and return the exit code. A `UsageError` becomes a message and exit code 2."""


class UsageError(Exception):
    """A request that cannot be carried out. The text says what was wanted, what came and what to do."""


def missing(package: str, extra: str) -> UsageError:
    """The error for an optional package that is not installed.

    >>> print(missing("rich", "demo"))
    this command needs the package rich, which is not installed; install it with: pip install 'festina[demo]'
    """
    return UsageError(
        f"this command needs the package {package}, which is not installed; "
        f"install it with: pip install 'festina[{extra}]'"
    )


def printable(text: str) -> str:
    r"""A text in which characters that a terminal may obey or cannot show are escaped; names in files may hold any.

    >>> printable("rnn.\x1b[2Jweight")
    'rnn.\\x1b[2Jweight'
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="festina", description="Layer-normalised recurrent layers for PyTorch, as fast as the plain ones."
    )
    parser.add_argument("--version", action="version", version=f"festina {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = cast(Command, import_module(f"festina.cli.{name}"))
        text = command.__doc__ or ""
        sub = subparsers.add_parser(
            name,
            help=text.partition("\n")[0].rstrip("."),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: `sys.argv`) and return the exit code."""
    args = build_parser().parse_args(argv)
    try:
        return cast(int, args.run(args))
    except (UsageError, OSError) as error:  # OSError: a file or the disk
        print(printable(f"festina: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
