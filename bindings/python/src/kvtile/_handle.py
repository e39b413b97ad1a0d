"""Who uses a cache or a sequence, counted under a lock of the cache.

Calls that only read a sequence may overlap, any other call is alone on it, and close() needs that
no call runs. What the C library leaves undefined is BusyError or ClosedError here, never a crash.
"""

from __future__ import annotations

from typing import Any, Optional

from ._errors import BusyError, ClosedError


class Handle:
    """A pointer of the library, and who uses it: users > 0 readers, -1 a writer."""

    _kind = ""
    _instead = ""  # of a copy
    _lock: Any

    def _take(self, write: bool = False) -> int:
        with self._lock:
            pointer = self._pointer
            if pointer is None:
                raise ClosedError(f"the {self._kind} is closed")
            if self._users and (write or self._users < 0):
                raise BusyError(f"the {self._kind} is in use by another call")
            self._users = -1 if write else self._users + 1
            return pointer

    def _give(self) -> None:
        with self._lock:
            self._users = 0 if self._users < 0 else self._users - 1

    _pointer: Optional[int]
    _users: int

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What copy and pickle call: two objects with one pointer would both free it."""
        raise TypeError(f"a {self._kind} cannot be copied or pickled{self._instead}")

    @property
    def closed(self) -> bool:
        return self._pointer is None
