"""When a server is left alone: a circuit breaker that knows nothing of requests, threads or clocks."""

__all__ = ["ServerHealth"]


class ServerHealth:
    """Counts failures in a row and says whether a server may be asked.

    After ``rest_after`` failures it rests for ``rest_seconds``; then one request tries it while the others wait, and
    the first success ends the rest. Requests that were on their way when a failure was counted do not count again: a
    burst of them has one cause. Times are seconds of any one clock. Not locked: the owner's business.

    Args:
        rest_after: failures in a row after which the server rests.
        rest_seconds: how long.

    Example:
        >>> health = ServerHealth(rest_after=1, rest_seconds=20.0)
        >>> health.failed(sent=0.0, now=1.0)
        >>> health.allows(2.0), health.allows(21.0)
        (False, True)
    """

    def __init__(self, rest_after: int, rest_seconds: float) -> None:
        self._rest_after, self._rest_seconds = rest_after, rest_seconds
        self._failures = 0
        self._counted = float("-inf")
        self.resting_until = float("-inf")

    def allows(self, now: float) -> bool:
        """Whether a request may be sent."""
        return now >= self.resting_until

    def sent(self, now: float) -> None:
        """Note a request. Behind a rest it is the one that tries, and the others wait for what becomes of it."""
        if self._failures >= self._rest_after:
            self.resting_until = now + self._rest_seconds

    def succeeded(self) -> None:
        """Note that the server answered, be it with a refusal: it is alive."""
        self._failures = 0
        self.resting_until = float("-inf")

    def failed(self, sent: float, now: float) -> None:
        """Note that a request which was sent at ``sent`` failed at ``now``."""
        if sent < self._counted:
            return
        self._counted = now
        self._failures += 1
        if self._failures >= self._rest_after:
            self.resting_until = now + self._rest_seconds
