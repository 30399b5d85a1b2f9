"""Errors that a user can cause. A message names the file, the key or the row, what was expected, and what to do."""


class CheckpointError(ValueError):
    """A file of a model or a prompt that cannot be used."""


class DataError(ValueError):
    """Rows that cannot be used."""


class DeviceError(RuntimeError):
    """A device that cannot be used here."""
