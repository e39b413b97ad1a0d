"""Exceptions: one class for each kvt_status."""

from __future__ import annotations

from typing import Dict, NoReturn, Type


class Error(Exception):
    """Base of all errors that the library reports. `status` is the kvt_status."""

    status: int = -1


class ArgError(Error, ValueError):
    """KVT_ERR_ARG: an argument is out of range or contradicts another."""

    status = 1


class StateError(Error):
    """KVT_ERR_STATE: the call does not fit the state: no step, a step pending, tokens released."""

    status = 2


class ClosedError(StateError):
    """The cache or the sequence has been closed."""


class BusyError(StateError):
    """Another thread (or the call that runs a callback) uses the object: see `Sequence`."""


class NumberError(Error, ArithmeticError):
    """KVT_ERR_VALUE: a number is not finite, or beyond what the type can store."""

    status = 3


class OutOfMemoryError(Error, MemoryError):
    """KVT_ERR_MEMORY: the system has no memory for it."""

    status = 4


class BudgetError(Error):
    """KVT_ERR_BUDGET: the memory budget of the cache would be passed."""

    status = 5


class FullError(Error):
    """KVT_ERR_FULL: max_tokens of the sequence would be passed; a buffer has no room."""

    status = 6


class LimitError(Error, ValueError):
    """KVT_ERR_LIMIT: a size is beyond a limit of the library."""

    status = 7


class UnsupportedError(Error):
    """KVT_ERR_UNSUPPORTED: this build or this CPU cannot do it."""

    status = 8


class IoError(Error, OSError):
    """KVT_ERR_IO: a file or stream could not be opened, read or written."""

    status = 9


class FormatError(Error):
    """KVT_ERR_FORMAT: not a kvtile snapshot, or of a version this build cannot read."""

    status = 10


class CorruptError(Error):
    """KVT_ERR_CORRUPT: a snapshot is damaged."""

    status = 11


class MismatchError(Error):
    """KVT_ERR_MISMATCH: a sound snapshot of another model, geometry, storage type or key."""

    status = 12


class CancelledError(Error):
    """KVT_ERR_CANCELLED: a progress function has answered something true."""

    status = 13


ERRORS: Dict[int, Type[Error]] = {
    cls.status: cls
    for cls in (
        ArgError, StateError, NumberError, OutOfMemoryError, BudgetError, FullError, LimitError,
        UnsupportedError, IoError, FormatError, CorruptError, MismatchError,
        CancelledError,
    )
}
"""The exception class of each kvt_status but KVT_OK."""


def throw(status: int, text: str) -> NoReturn:
    """Raise the exception of a status."""
    cls = ERRORS.get(status)
    if cls is not None:
        raise cls(text)
    error = Error(f"status {status}: {text}")
    error.status = status
    try:
        raise error
    finally:
        del error  # whose traceback refers to here
