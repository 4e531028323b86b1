"""Read a command line, once: flags as rows of a table, presets, mistakes in a sentence.

No torch here: a script reads its command line before it loads torch, so --help and a mistyped flag
answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sgld_nrg.support.errors import torchrun_rank, wait_for_first

HERE = Path(__file__).resolve().parent.parent


class Flag(NamedTuple):
    """One row of a table of flags; see `flag`."""

    name: str
    default: Any
    settings: dict[str, Any]


class Either(NamedTuple):
    """Flags of which at most one may be given."""

    flags: tuple[Flag, ...]


Group = tuple[str, Sequence[Flag | Either]]


def flag(name: str, kind: Any, help: str, default: Any = None, **more: Any) -> Flag:
    """Return a row of a table of flags; a name without dashes is that of words by themselves.

    kind: what makes a value of a word; bool: the flag takes no value; argparse's
    BooleanOptionalAction: it has a --no- twin. more: as in argparse's add_argument.
    """
    if kind is bool:
        more["action"], default = "store_true", bool(default)
    elif kind is argparse.BooleanOptionalAction:
        more["action"] = kind
    elif kind is not str:
        more["type"] = kind
    return Flag(name, default, {"help": help, **more})


def _number(kind: Callable, low: float, high: float, low_open: bool, words: str) -> Callable:
    """Make an argparse type: a finite number within bounds, described in words when it is not."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}") from None
        if not math.isfinite(value) or value < low or value > high or (low_open and value == low):
            raise argparse.ArgumentTypeError(f"{text} is not {words}")
        return value

    return convert


positive_int = _number(int, 1, math.inf, False, "a whole number from 1 up")
count = _number(int, 0, math.inf, False, "a whole number from 0 up")
seed = _number(int, 0, 2**32 - 1, False, "a whole number from 0 to 4294967295")
positive = _number(float, 0, math.inf, True, "a number above 0")
non_negative = _number(float, 0, math.inf, False, "a number from 0 up")
fraction = _number(float, 0, 1, False, "a number from 0 to 1")
decay = _number(float, 0, 0.999999, False, "a number from 0 to 0.999999")
level = _number(float, 0, 0.999999, True, "a number above 0 and below 1")


class Parser(argparse.ArgumentParser):
    """ArgumentParser with the project's conventions.

    No abbreviations, defaults in the help, a mistake in one sentence with exit code 2.

    doc: shown above the flags. groups: the table, in the order of the help. defaults_of: given the
    flags that stand on the command line, {name: value}, returns defaults that depend on them.
    """

    def __init__(
        self,
        doc: str | None,
        groups: Sequence[Group],
        defaults_of: Callable[[dict[str, Any]], dict[str, Any]] = lambda given: {},
    ):
        super().__init__(
            usage="%(prog)s [flags]",  # they stand below in their groups
            description=doc,
            allow_abbrev=False,
            add_help=False,
            argument_default=argparse.SUPPRESS,  # what is parsed is what was given
            formatter_class=_HelpFormatter,
        )
        self.defaults: dict[str, Any] = {}
        self.defaults_of = defaults_of
        self.add_argument("-h", "--help", action=_Help, nargs=0, help="show this help and exit")
        for title, rows in groups:
            group = self.add_argument_group(title)
            for row in rows:
                if isinstance(row, Either):
                    exclusive = group.add_mutually_exclusive_group()
                    for each in row.flags:
                        self._add(exclusive, each)
                else:
                    self._add(group, row)

    def _add(self, group: Any, row: Flag) -> None:
        action = group.add_argument(row.name, **row.settings)
        action.default = argparse.SUPPRESS
        if not action.option_strings:
            self.usage = f"{self.usage} {action.metavar} ..."
        self.defaults[action.dest] = row.default

    def completed(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the value of every flag: those given, and the defaults of the others."""
        chosen = self.defaults_of({**self.defaults, **given})
        return {**self.defaults, **{k: chosen[k] for k in chosen if k in self.defaults}, **given}

    def parse_with_out(self, argv: Sequence[str] | None = None) -> Namespace:
        """Read as `parse` does; a folder for the file --out must be there."""
        args = self.parse(argv)
        if not Path(args.out).absolute().parent.is_dir():
            self.error(f"there is no folder for --out {args.out}: make it, or name another place")
        return args

    def parse(self, argv: Sequence[str] | None = None) -> Namespace:
        """Read a list of arguments, or the command line's.

        The result has every flag and two more attributes: `given`, the names of the flags on the
        command line, and `started`, when it was read on the clock of time.perf_counter.
        """
        started = time.perf_counter()
        if argv is None:
            self._check_installation()
        given = vars(self.parse_args(argv))
        return Namespace(**self.completed(given), given=frozenset(given), started=started)

    def error(self, message: str) -> Any:
        """Print one sentence and exit with code 2; for a mistyped flag it names the nearest."""
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        known = self._option_string_actions
        near = difflib.get_close_matches(unknown[1], known, n=1) if unknown else None
        if near:
            message += f"; did you mean {near[0]}?"
        wait_for_first()
        rank = torchrun_rank()  # rank 0 says it for all
        self.exit(2, "" if rank else f"error: {message} (see {self.prog} --help)\n")

    def _check_installation(self) -> None:
        """Refuse to run one clone's script on the package of another clone."""
        script = getattr(sys.modules["__main__"], "__file__", None)
        for folder in Path(script).resolve().parents[:2] if script else ():
            if folder != HERE and (folder / "support" / "parser.py").exists():
                self.error(
                    f"the package that is installed lies in {str(HERE)!r} and this script in "
                    f"{str(folder)!r}: run pip install -r requirements.txt there"
                )


class _Help(argparse.Action):
    """Shows the help with the defaults that the flags before it imply."""

    def __call__(self, parser: Any, namespace: Namespace, *_: Any) -> None:
        values = parser.completed(vars(namespace))
        for action in parser._actions:
            action.default = values.get(action.dest, argparse.SUPPRESS)
        parser.print_help()
        parser.exit()


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default, and the module's docstring as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def plain(args: Namespace) -> dict[str, Any]:
    """Return the flags as a dict of plain types, without what `Parser.parse` adds to them."""
    return {name: value for name, value in vars(args).items() if name not in ("given", "started")}
