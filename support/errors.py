"""How a mistake is answered: one sentence, an exit code, no traceback."""

from __future__ import annotations

import functools
import io
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

from sgld_nrg.support.signals import orderly

SECONDS_TO_SAY_WHY = 2


class UserError(Exception):
    """A mistake that the user can fix: one sentence that says what was found and what to do."""


class Stopped(Exception):
    """A training was stopped by a signal and saved its state; the message says how to go on."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number  # as shells report it


def first_line(error: BaseException) -> str:
    """Return why an error was raised: the first line of its message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def torchrun_rank() -> int:
    """Return the number of this process among those that torchrun started, 0 without it."""
    return int(os.environ.get("RANK", 0))


def wait_for_first() -> None:
    """Let rank 0 say first why all processes end: torchrun ends the others once one has failed."""
    if torchrun_rank():
        time.sleep(SECONDS_TO_SAY_WHY)


def exits_cleanly(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a script's main: a mistake becomes one line on stderr and exit code 2.

    A signal becomes 128 + its number, a training that diverged 1.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        rank = torchrun_rank()
        if isinstance(sys.stdout, io.TextIOWrapper):  # names may be beyond a terminal's letters
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with orderly():
                return main(*args, **kwargs)
        except UserError as error:
            say, exit_code = f"error: {error}", 2
        except (
            OSError
        ) as error:  # a full disk, a folder that vanished: the last checkpoint is whole
            place = f"{str(error.filename)!r}: " if error.filename else ""
            say = (
                f"error: {place}{error.strerror or error}; fix that and run it again; "
                "a training goes on with --resume"
            )
            exit_code = 2
        except (MemoryError, RuntimeError) as error:
            reason = first_line(error)
            no_memory = "allocate memory|out of memory|size calculation"
            if rank and re.search("peer|Gloo|NCCL", reason):
                say, exit_code = f"the other processes are gone ({reason})", 1
            elif isinstance(error, MemoryError) or re.search(no_memory, reason):
                say = (
                    f"error: not enough memory ({reason}): "
                    "lower --batch-size, --width, --buffer-size or --chunk-size"
                )
                exit_code = 2
            else:
                raise
        except FloatingPointError as error:
            say, exit_code = f"error: {error}", 1
        except Stopped as stopped:
            say, exit_code = str(stopped), stopped.exit_code
        except KeyboardInterrupt:
            say = "interrupted; a training goes on from its last checkpoint with --resume"
            exit_code = 130
        if exit_code in (1, 2):
            wait_for_first()
        print(f"process {rank}: {say}" if rank else say, file=sys.stderr)
        raise SystemExit(exit_code)

    return wrapped
