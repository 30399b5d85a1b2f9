"""The limits of a server. The command line, the checks and the docs use this one definition."""

from dataclasses import dataclass

from tinyprompt.settings import COUNT, NOT_NEGATIVE, POSITIVE, check_fields, setting


@dataclass(frozen=True)
class Limits:
    """The limits of requests and batches. Raises TypeError or ValueError that names the limit.

    Example: `Limits(max_rows=64, timeout=10.0)`.
    """

    # fmt: off
    max_bytes: int = setting(2**20, "limits", "bytes of a request's body", COUNT)
    max_rows: int = setting(64, "limits", "rows of a request", COUNT)
    max_characters: int = setting(10_000, "limits", "characters of a row", COUNT)
    max_waiting: int = setting(256, "limits", "rows waiting for an answer; more are refused", COUNT)
    max_connections: int = setting(256, "limits", "connections at once; more are refused", COUNT)
    timeout: float = setting(30.0, "limits", "seconds from a request to its answer", POSITIVE)
    batch_rows: int = setting(32, "batches", "rows computed together", COUNT)
    batch_wait: float = setting(0.005, "batches", "seconds that a row waits for other rows", NOT_NEGATIVE)
    reload_every: float = setting(1.0, "batches", "seconds between two checks of the folder", POSITIVE)
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)
        if self.max_rows > self.max_waiting:
            found = f"found {self.max_waiting} for {self.max_rows} rows of a request"
            raise ValueError(f"setting max_waiting: expected at least max_rows, {found}")
