"""C calls that call Python back: what a callback raises ends the call, and is raised when it has ended.

A callback must not raise: ctypes would print the exception and return an uninitialised integer to
C. `try` in the callback is not enough. The handlers of signals run on the main thread between
instructions, since CPython 3.11 at the first one of a function, which is before its `try`; so does
Ctrl-C that came while C code ran. What they raise there arrives at sys.unraisablehook alone, which
`Call.run` therefore replaces for as long as the C call runs. That one callback has answered at
random, so C may go on until the next one, which says that the call has failed. If there is none, the
call may have done all that it does; the exception is raised as if the signal had come after it.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from functools import partial
from typing import Any, Callable, List, Optional

from ._errors import Error

class _Running(threading.local):
    """call: the `Call` that runs on this thread."""

    call: "Optional[Call]" = None


_running = _Running()


def _raised_by_handler(error: BaseException) -> bool:
    """Whether the handler of a signal has raised it."""
    handlers = set()
    for number in signal.valid_signals():
        handler: Any = signal.getsignal(number)
        while isinstance(handler, partial):
            handler = handler.func
        if callable(handler):
            handlers.add(getattr(handler, "__code__", None)
                         or getattr(type(handler).__call__, "__code__", None))
    place = error.__traceback__
    while place is not None:
        if place.tb_frame.f_code in handlers:
            return True
        place = place.tb_next
    return False


class Guard:
    """A function for C to call. It answers `failed` where it raises, and when the call has failed.

    call: None: the one that runs on the thread, if any; it may be one on several stores. What
    `function` raises is then raised only if the C call fails, but for exceptions that are no
    Exception and those of signals.
    """

    def __init__(self, function: Callable[..., int], failed: int,
                 call: "Optional[Call]" = None) -> None:
        self.function = function
        self.failed = failed
        self.call = call

    def __call__(self, *args: Any) -> int:
        # Neither statement calls anything: no handler runs outside of the try, but for the one at
        # the function's first instruction.
        call = _running.call if self.call is None else self.call
        try:
            if call is not None and call.failures:
                return self.failed
            return self.function(*args)
        except BaseException as error:
            if call is not None:
                if (self.call is None and isinstance(error, Exception)
                        and not _raised_by_handler(error)):
                    call.raised = error
                else:
                    call.failures.append(error)
            return self.failed


_GUARD = Guard.__call__.__code__


class Call:
    """One call of C with callbacks. As a context manager it wipes the keys that it was given."""

    def __init__(self) -> None:
        self.failures: List[BaseException] = []
        self.raised: Optional[BaseException] = None
        self._keys: List[Any] = []

    def __enter__(self) -> "Call":
        return self

    def __exit__(self, *_: Any) -> None:
        for key in self._keys:
            ctypes.memset(key, 0, ctypes.sizeof(key))
        self._keys.clear()

    def key(self, view: memoryview) -> Any:
        """A copy of it, until the end of the `with` statement."""
        copy = (ctypes.c_char * view.nbytes).from_buffer_copy(view)
        self._keys.append(copy)
        return copy

    def guarded(self, function: Callable[..., int], failed: int) -> Guard:
        return Guard(function, failed, self)

    def _hook(self, before: Callable[[Any], Any]) -> Callable[[Any], None]:
        """sys.unraisablehook for a call on this thread; `before` gets what is not its own.

        A traceback that begins in a Guard is that of a callback. (Up to Python 3.12 the exception
        also comes with the Guard, later without.) Two signals that come before one callback, whose
        handlers both raise, are beyond it: the second one's runs as the hook begins.
        """
        thread = threading.get_ident()

        def hook(unraisable: Any) -> None:
            place = unraisable.exc_traceback
            if (place is not None and place.tb_frame.f_code is _GUARD
                    and threading.get_ident() == thread and _running.call is self):
                self.failures.append(unraisable.exc_value)
            else:
                before(unraisable)
        return hook

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args), which calls C. Raises what ended it, whatever C has answered."""
        around = _running.call
        # Signals' handlers run on the main thread. Calls on one thread are nested, so that each of
        # them puts back the hook that it has found.
        hook: Any = None
        before: Any = None
        failed: Optional[BaseException] = None
        result: Any = None
        try:
            _running.call = self
            if threading.get_ident() == threading.main_thread().ident:
                before = sys.unraisablehook
                hook = self._hook(before)
                sys.unraisablehook = hook
            result = function(*args)
        except Exception as error:
            failed = error
        finally:
            if hook is not None and sys.unraisablehook is hook:  # not another's, set meanwhile
                sys.unraisablehook = before
            _running.call = around
        if self.failures:  # before an Exception: Ctrl-C
            failed = next((x for x in self.failures if not isinstance(x, Exception)),
                          self.failures[0])
        elif self.raised is not None and isinstance(failed, Error):
            failed = self.raised
        self.failures, self.raised = [], None
        try:
            if failed is not None:
                raise failed
            return result
        finally:
            del failed, hook  # whose tracebacks and cells refer to here
