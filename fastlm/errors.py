"""The exceptions a user can meet. Each message names the argument, its value and the fix, in one line."""


class DataError(ValueError):
    """A token file or a text file cannot be used (missing, empty, wrong dtype, ids out of range, not UTF-8)."""


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or belongs to another architecture."""


class DeviceError(ValueError, RuntimeError):
    """The requested device is unknown or unavailable.

    Both a ValueError (the argument is wrong) and a RuntimeError (what torch raises, and what
    existing training loops catch).
    """


class ExtensionError(ImportError):
    """The compiled extension `fastlm._C` is missing or older than its sources."""
