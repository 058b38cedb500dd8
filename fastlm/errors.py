"""The errors a user can cause and mend. Each message names the thing, its value and the fix, in one
line; the commands print it after `error:` and exit with code 2. Any other exception is a bug.
"""


class UserError(Exception):
    """Base of them all."""


class ConfigError(UserError, ValueError):
    """A setting is unknown, of the wrong type, or cannot be."""


class DataError(UserError, ValueError):
    """A token or text file cannot be used: missing, empty, wrong dtype, ids out of range, …"""


class CheckpointError(UserError, ValueError):
    """A checkpoint is missing, damaged, or belongs to another architecture."""


class DeviceError(UserError, ValueError, RuntimeError):
    """The requested device is unknown or unavailable.

    Both a ValueError (the argument is wrong) and a RuntimeError (what torch raises, and what
    existing training loops catch).
    """


class CompileError(UserError, RuntimeError):
    """torch.compile cannot work here."""


class OutputError(UserError, OSError):
    """A directory or file cannot be written."""


class ExtensionError(UserError, ImportError):
    """The compiled extension `fastlm._C` is missing or older than its sources."""


def permission_line(error: PermissionError) -> str:
    """The line for a file that the user may not use."""
    return (
        f"error: {error.filename}: {error.strerror}; change its or its directory's permissions, or "
        f"choose another"
    )
