"""A limit that clients share, so that none takes all of it."""

from __future__ import annotations

from collections import Counter


def fits(limit: int, total: int, own: int, amount: int) -> bool:
    """Whether a client that holds `own` of `total` may take `amount` more: it never holds more than is left for others.
    A client alone gets half of the limit, each of n clients an n + 1st part; together they stay below the limit, and
    something is left for one that comes later (Choudhury and Hahne, IEEE/ACM Trans. Networking 6, 1998)."""
    return own + amount <= limit - total - amount


class Shares:
    """What each client holds of a limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return self._held.total()

    def take(self, client: str, amount: int) -> bool:
        """Whether it fits; then it is counted until it is given back."""
        if not fits(self.limit, self.total, self._held[client], amount):
            return False
        self._held[client] += amount
        return True

    def give_back(self, client: str, amount: int) -> None:
        self._held[client] -= amount
        if not self._held[client]:
            del self._held[client]
