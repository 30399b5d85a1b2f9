"""The limits of a server. The command line, the checks and the docs read one line for each."""

from dataclasses import dataclass

from tinyprompt.settings import COUNT, NOT_NEGATIVE, POSITIVE, check_fields, setting


@dataclass(frozen=True)
class Limits:
    """What a server takes, and how it makes batches. Raises TypeError or ValueError that names the limit.

    Example: `Limits(max_rows=64, timeout=10.0)`.
    """

    # fmt: off
    max_bytes: int = setting(2**20, "limits", "bytes of a request's body", COUNT)
    max_rows: int = setting(64, "limits", "rows of a request", COUNT)
    max_characters: int = setting(10_000, "limits", "characters of a row", COUNT)
    max_waiting: int = setting(256, "limits", "rows that wait to be answered; more are refused", COUNT)
    max_connections: int = setting(256, "limits", "connections at once; more are refused", COUNT)
    timeout: float = setting(30.0, "limits", "seconds for a request, until it is answered", POSITIVE)
    batch_rows: int = setting(32, "batches", "rows that are computed together", COUNT)
    batch_wait: float = setting(0.005, "batches", "seconds that a row waits for others", NOT_NEGATIVE)
    reload_every: float = setting(1.0, "batches", "seconds between two looks at the folder", POSITIVE)
    # fmt: on

    def __post_init__(self):
        check_fields(self)
        if self.max_rows > self.max_waiting:
            found = f"found {self.max_waiting} for {self.max_rows} rows of a request"
            raise ValueError(f"setting max_waiting: expected at least max_rows, {found}")
