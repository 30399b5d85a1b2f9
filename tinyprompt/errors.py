"""Errors that a user can cause. Each message names the file, key or row, the expected value, and the remedy."""


class TinypromptError(Exception):
    """Base class of all errors of tinyprompt."""


class CheckpointError(TinypromptError, ValueError):
    """A file of a model or a prompt cannot be used."""


class DataError(TinypromptError, ValueError):
    """Rows cannot be used."""


class DeviceError(TinypromptError, RuntimeError):
    """A device is not available, or fails."""
