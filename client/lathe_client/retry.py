"""When a request is sent again, and after how long.

408, 429, 5xx and failed connections only, with exponential back-off and jitter. The service's `Retry-After` is obeyed
where it is longer than the back-off; its `x-should-retry: false` forbids a retry, and `true` allows none that the
status does not. Attempts and total time are capped: a wait that would go beyond the cap is not begun.

Everything that is retried may be repeated: what creates something carries an `Idempotency-Key`, a repeated
enrichment finds its finished nodes in the service's cache, and what is found deleted or cancelled when the first answer
was lost counts as done.
"""

import email.utils
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass

_RETRIED = frozenset({408, 429})


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How stubborn a client is.

    Attributes:
        max_attempts: sends of one request, the first included; 1 never retries.
        max_seconds: between a request's first send and the end of its last wait.
        first_seconds: the wait before the second send; it doubles each time.
        longest_seconds: the most that doubling reaches.
    """

    max_attempts: int = 6
    max_seconds: float = 120.0
    first_seconds: float = 0.5
    longest_seconds: float = 20.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        for name in ("max_seconds", "first_seconds", "longest_seconds"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")

    def wait_seconds(
        self,
        num_sent: int,
        elapsed_seconds: float,
        status: int | None,
        headers: Mapping[str, str],
    ) -> float | None:
        """How long to wait before the next send; None where there is to be none.

        Args:
            num_sent: sends so far, at least 1.
            elapsed_seconds: since the first send.
            status: of the answer; None where the connection failed.
        """
        if num_sent >= self.max_attempts or not _may_retry(status, headers):
            return None
        backoff = min(self.first_seconds * 2.0 ** (num_sent - 1), self.longest_seconds)
        # Half of it is jitter, so that clients that failed together do not come back together.
        wait = max(backoff * random.uniform(0.5, 1.0), _retry_after(headers))
        return wait if elapsed_seconds + wait <= self.max_seconds else None


def _may_retry(status: int | None, headers: Mapping[str, str]) -> bool:
    if headers.get("x-should-retry", "").strip().lower() == "false":
        return False
    return status is None or status in _RETRIED or status >= 500


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the service asks for, as a number or a date (RFC 9110, 10.2.3); 0 where it asks for nothing."""
    value = headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return seconds if seconds > 0 else 0.0  # also where it is no number
