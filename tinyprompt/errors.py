"""Errors that a user can cause. A message names the file, the key or the row, the expectation, and the remedy."""


class TinypromptError(Exception):
    """Base class of the errors below."""


class CheckpointError(TinypromptError, ValueError):
    """A file of a model or a prompt cannot be used."""


class DataError(TinypromptError, ValueError):
    """Rows cannot be used."""


class DeviceError(TinypromptError, RuntimeError):
    """A device cannot be used here."""
