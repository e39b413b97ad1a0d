"""Who uses a cache, a sequence or a store: uses in a set, admitted under a lock.

Calls that only read a sequence may overlap, any other call is alone on it, and close() needs that
no call runs. What the C library leaves undefined is BusyError or ClosedError here, never a crash.

A handle that a signal's handler (Ctrl-C) has left in use could not be closed, aborted or saved any
more. Every call therefore has the form

    use, give = object(), handle._users.discard
    try:
        pointer = handle._take(use)
        ...
    finally:
        give(use)

Handlers run where a Python function begins, where a loop goes back, and after a call. From `_take`
on that is inside `try`; `give` is one C function without a Python one or a lock around it, and does
nothing for a use that was never taken. Where a call uses several handles, `any` drives a `map` of
their `discard`, also one C function. Nothing that calls may stand before it in the `finally`.

This holds on CPython from 3.10 on, for any number of signals. 3.8 and 3.9 run handlers between more
instructions: one that comes within the few nanoseconds between the end of `try` and `give`, or a
second one just after the first, still leaves the handle in use.
"""

from __future__ import annotations

from typing import Any, Optional, Set

from ._errors import BusyError, ClosedError


class Handle:
    """A pointer of the library, and the uses that it is in: several readers', or a writer's."""

    _kind = ""
    _instead = ""  # of a copy
    _lock: Any
    _pointer: Optional[int]
    _users: Set[object]
    _writer: Optional[object] = None  # the last one; in _users as long as it writes

    def _take(self, use: object, write: bool = False) -> int:
        """The pointer, for as long as `use` is in _users, from which the caller discards it."""
        with self._lock:
            pointer = self._pointer
            if pointer is None:
                raise ClosedError(f"the {self._kind} is closed")
            if self._users and (write or self._writer in self._users):
                raise BusyError(f"the {self._kind} is in use by another call")
            if write:
                self._writer = use
            self._users.add(use)
            return pointer

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What copy and pickle call: two objects with one pointer would both free it."""
        raise TypeError(f"a {self._kind} cannot be copied or pickled{self._instead}")

    @property
    def closed(self) -> bool:
        return self._pointer is None
