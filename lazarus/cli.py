"""The command line ``lazarus``. Each command is a module of ``lazarus.commands``.

A command module has ``register(subparsers)`` and ``run(args) -> int``. Only the module of the
given command is imported; heavy packages (torch, Ray) are imported when the command runs. The
environment is read here and passed to commands as ``args.environment``.

Exit codes: 0 finished; 1 failed; 2 bad input, nothing started; 3 ended early but can be resumed;
130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TextIO

from lazarus import commands
from lazarus.errors import ConfigError, LazarusError, UserCodeError
from lazarus.version import __version__

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
_STARTS_RUNS = ("train", "demo")  # an OSError of a run keeps its traceback


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line with exit code 2.

    Abbreviated options are not accepted.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        command = self.prog.removeprefix("lazarus").strip()
        hint = f"lazarus {command} --help".replace("  ", " ")
        self.exit(EXIT_BAD_INPUT, f"error: {message} (see {hint})\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A ``LazarusError`` is printed without traceback.

    Args:
        argv: Arguments without the program's name; default: ``sys.argv[1:]``.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # so that a user's policies can be imported, as with python -m
    try:
        parser = _parser(arguments)
        parsed, unknown = parser.parse_known_args(arguments)
        if unknown:
            close = _nearest_option(parser, arguments, unknown[0])
            parser.error(f"unknown option {unknown[0]}{close}")
        parsed.environment = dict(os.environ)  # read here and nowhere else
        return int(parsed.run(parsed))
    except ConfigError as error:
        for problem in error.problems:
            _say(f"error: {problem}")
        return error.exit_code
    except UserCodeError as error:
        if error.traceback_text:
            _say(error.traceback_text.rstrip())
        _say(f"error: {error}")
        return error.exit_code
    except LazarusError as error:
        for note in getattr(error, "__notes__", ()):
            _say(note.rstrip())
        _say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt as stop:
        _say(f"interrupted: {stop}" if str(stop) else "interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of stdout went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        place = error.filename2 or error.filename
        if place is None or _asked(arguments) in _STARTS_RUNS:
            raise
        _say(f"error: {os.fsdecode(place)}: {error.strerror}")
        return EXIT_BAD_INPUT


def command_names() -> list[str]:
    """Names of all commands: modules that define ``register``. The modules are not imported."""
    folder = Path(commands.__path__[0])
    modules = [m.name for m in pkgutil.iter_modules([str(folder)])]
    found = [m for m in modules if "\ndef register(" in (folder / f"{m}.py").read_text("utf-8")]
    return sorted(name.replace("_", "-") for name in found)


def _parser(arguments: Sequence[str]) -> Parser:
    parser = Parser(
        prog="lazarus",
        description="Train Mixture-of-Experts models on machines that come and go.",
    )
    parser.add_argument("--version", action="version", version=f"lazarus {__version__}")
    subparsers = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=Parser
    )
    known = command_names()
    asked = _asked(arguments)
    if asked is not None and asked not in known:
        close = get_close_matches(asked, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
        parser.error(f"unknown command {asked!r}; {hint}")
    for name in known if asked is None else [asked]:
        module = importlib.import_module(f"lazarus.commands.{name.replace('-', '_')}")
        module.register(subparsers)
        if (added := subparsers.choices.get(name)) is not None:
            _default_run(added, module.run)
    return parser


def _asked(arguments: Sequence[str]) -> str | None:
    """The name of the command in the arguments, if any."""
    return next((a for a in arguments if not a.startswith("-")), None)


def _nearest_option(parser: Parser, arguments: Sequence[str], unknown: str) -> str:
    """A hint at the known option nearest to ``unknown``; empty if none is close."""
    known: list[str] = []
    current: argparse.ArgumentParser | None = parser
    words = iter(arguments)
    while current is not None:
        known += current._option_string_actions
        choices = [a.choices for a in current._actions if isinstance(a.choices, dict)]
        named = next((w for w in words if choices and w in choices[0]), None)
        current = choices[0][named] if named else None
    close = get_close_matches(unknown.split("=")[0], known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _default_run(parser: argparse.ArgumentParser, run: object) -> None:
    """Let a command use its module's ``run``, unless its parser sets another one."""
    if parser.get_default("run") is None:
        parser.set_defaults(run=run)


def _say(line: str, stream: TextIO | None = None) -> None:
    print(line, file=stream or sys.stderr, flush=True)
