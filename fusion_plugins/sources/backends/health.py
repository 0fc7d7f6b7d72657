"""A circuit breaker: when a server that fails is left alone. It knows nothing of requests, threads or clocks."""


class ServerHealth:
    """Counts consecutive failures and decides whether a server may be asked.

    After ``rest_after`` failures the server rests for ``rest_seconds``. Then one request tries it while the others
    wait; the first success ends the rest. All times are seconds of one clock. Not locked: callers hold their own lock.

    Args:
        rest_after: consecutive failures after which the server rests.
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
        self._last_counted = float("-inf")
        self.resting_until = float("-inf")

    def allows(self, now: float) -> bool:
        """Whether a request may be sent."""
        return now >= self.resting_until

    def sent(self, now: float) -> None:
        """Note a request. The first one after a rest starts the next rest, so that the others wait for its result."""
        if self._failures >= self._rest_after:
            self.resting_until = now + self._rest_seconds

    def succeeded(self) -> None:
        """Note an answer. A refusal counts too: the server is alive."""
        self._failures = 0
        self.resting_until = float("-inf")

    def failed(self, sent: float, now: float) -> None:
        """Note that a request which was sent at ``sent`` failed at ``now``."""
        # Requests that were under way when a failure was counted have the same cause. With 32 requests in flight, one
        # restart of a server would otherwise count as 32 failures.
        if sent < self._last_counted:
            return
        self._last_counted = now
        self._failures += 1
        if self._failures >= self._rest_after:
            self.resting_until = now + self._rest_seconds
