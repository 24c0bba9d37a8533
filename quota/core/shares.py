"""A limit that clients share, so that none takes all of it."""

from __future__ import annotations

import threading
from collections import Counter


def fits(limit: int, total: int, own: int, amount: int) -> bool:
    """Whether a client that holds `own` of `total` may take `amount` more: it never holds more than is left for others.
    A client alone gets half of the limit, each of n clients an n + 1st part; together they stay below the limit, and
    something is left for one that comes later (Choudhury and Hahne, IEEE/ACM Trans. Networking 6, 1998)."""
    return own + amount <= limit - total - amount


class Shares:
    """What each client holds of a limit. Threads may share it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: Counter[str] = Counter()
        self._lock = threading.RLock()  # a finalizer may give back in the middle

    @property
    def total(self) -> int:
        return self._held.total()

    def take(self, client: str, amount: int) -> bool:
        """Whether it fits; then it is counted until it is given back."""
        with self._lock:
            good = self.fits(client, amount)
            if good:
                self._held[client] += amount
            return good

    def fits(self, client: str, amount: int) -> bool:
        return fits(self.limit, self.total, self._held[client], amount)

    def give_back(self, client: str, amount: int) -> None:
        with self._lock:
            self._held[client] -= amount
            if not self._held[client]:
                del self._held[client]
