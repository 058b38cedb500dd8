"""The errors a user can cause and mend. Each message names the thing, its value and the fix, in one
line; the commands print it after `error:` and exit with code 2. Any other exception is a bug.
"""

import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Base of them all."""


class ConfigError(UserError, ValueError):
    """A setting is unknown, of the wrong type, or invalid."""


class DataError(UserError, ValueError):
    """A token or text file cannot be used: missing, empty, wrong dtype, ids out of range, …"""


class CheckpointError(UserError, ValueError):
    """A checkpoint is missing, damaged, or belongs to another architecture."""


class NewerFormatError(CheckpointError):
    """A checkpoint is whole, but of a later version of this package."""


class DeviceError(UserError, ValueError, RuntimeError):
    """The requested device is unknown or unavailable.

    Both a ValueError (the argument is wrong) and a RuntimeError (what torch raises, and what
    existing training loops catch).
    """


class CompileError(UserError, RuntimeError):
    """torch.compile cannot work here."""


class OutputError(UserError, OSError):
    """A directory or file cannot be written."""


class DivergedError(UserError, RuntimeError):
    """Training does not go on, as one bad step follows the other; or logits are not finite."""


class RankLostError(UserError, RuntimeError):
    """Another process of this run was killed, hangs, or cannot be reached."""


class Elsewhere(Exception):
    """Another rank has failed, and says why: this one ends as it does, and says nothing."""

    def __init__(self, rank: int, exit_code: int):
        super().__init__(f"rank {rank} has failed")
        self.rank, self.exit_code = rank, exit_code


class ExtensionError(UserError, ImportError):
    """The compiled extension `fastlm._C` is missing or older than its sources."""


def shown(value: Any) -> str:
    """`value` as a message shows it: its repr on one line, cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no integer of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:100]}…"


def exit_code(error: BaseException) -> int:
    """What a command ends with that raises `error`."""
    if isinstance(error, Elsewhere):
        return error.exit_code
    if isinstance(error, UserError | PermissionError):
        return 2
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1


def run_command(command: Callable[[], None]) -> int:
    """Runs a command; returns its exit code: 0, 2 after a user's error, 130 after Ctrl-C, and the
    failed rank's where another one has failed."""
    if hasattr(sys.stdout, "reconfigure"):
        # A file name need not be UTF-8: its bytes are printed as they are.
        sys.stdout.reconfigure(errors="surrogateescape")
    try:
        command()
    except UserError as error:
        # On one line: the messages of the libraries behind it may have several.
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return exit_code(error)
    except PermissionError as error:  # already from asking whether something is there
        print(
            f"error: {error.filename}: {error.strerror}; change its or its directory's "
            f"permissions, or choose another",
            file=sys.stderr,
        )
        return exit_code(error)
    except (KeyboardInterrupt, Elsewhere) as error:
        return exit_code(error)
    return 0
