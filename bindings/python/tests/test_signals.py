"""Signals during calls: what their handlers raise is raised by the call; nothing stays in use."""

import functools
import gc
import io
import os
import random
import signal
import sys
import tempfile
import threading
import time
import types
import unittest

import kvtile
from kvtile import _callback
from support import fill, group, has_keys, random as numbers

KEYS = has_keys()
SURE = sys.version_info >= (3, 10)  # _handle.py says what is left before
TIMES = 60  # for each call
LOOPS = 400  # of short calls, for each of these


class Stop(Exception):
    pass


class Leave(BaseException):
    pass


class Watched(dict):
    """A mapping of Python code, as a user's is."""

    def get(self, key, default=None):
        return super().get(key, default)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)

    def __contains__(self, key):
        return super().__contains__(key)


class Base(unittest.TestCase):
    def setUp(self):
        self.cache = kvtile.Cache(group(n_layers=2, k_type="i8", v_type="i8"), 4096)
        self.addCleanup(self.cache.close)
        self.seq = self.cache.sequence()
        for i in range(4):
            fill(self.seq, 512, i)
        self.prompt = list(range(2048))
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = os.path.join(folder.name, "a.kvt")
        self.files = []
        self.addCleanup(lambda: [f.close() for f in self.files])
        self.seq.save(self.path, pieces={str(i): b"x" * 1000 for i in range(9)}, fsync=False)
        self.data = self.seq.save_bytes()
        self.used = []
        self.unraisable = []
        before = sys.unraisablehook
        self.hook = sys.unraisablehook = self.unraisable.append
        self.addCleanup(setattr, sys, "unraisablehook", before)
        self.random = random.Random(1)

    def handle(self, action):
        """SIGALRM's handler; how often it has run is counted in self.handled."""
        self.handled = 0

        def handler(number, frame):
            self.handled += 1
            action()
        self.addCleanup(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, handler))
        self.addCleanup(signal.setitimer, signal.ITIMER_REAL, 0)

    def use(self, handle):
        """It is closed after the call."""
        self.used.append(handle)
        return handle

    def free(self):
        """Closes what was used: BusyError if a call has left it in use."""
        while self.used:
            try:
                self.used.pop().close()
            except kvtile.BusyError:
                if SURE:
                    raise

    def interrupted(self, prepare):
        """Calls what prepare() returns, with a signal somewhere in it; how often that was raised."""
        error = [Stop]

        def action():
            raise error[0]()
        self.handle(action)
        prepare()()
        start = time.perf_counter()
        prepare()()
        took = time.perf_counter() - start
        n = 0
        # What a handler raises in a finalizer is lost, as Python has it: none runs in the call.
        gc.collect()
        gc.disable()
        self.addCleanup(gc.enable)
        for i in range(TIMES):
            error[0] = (Stop, Leave)[i % 2]
            call = prepare()
            self.handled = 0
            raised = None
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, max(self.random.random() * took, 1e-6))
                    call()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except BaseException as e:
                raised = type(e)
            self.assertEqual(raised, error[0] if self.handled else None)
            self.assertIs(sys.unraisablehook, self.hook)
            self.assertEqual(self.unraisable, [])
            self.free()
            n += self.handled
        return n

    def every(self, calls):
        for name, prepare in calls.items():
            with self.subTest(name):
                self.assertGreater(self.interrupted(prepare), 0)


class Times(Base):
    """A signal at many times."""

    def test_snapshots(self):
        def progress(done, total):
            pass

        def saves(*args, **options):
            seq = self.use(self.seq.fork())
            return lambda: seq.save(*args, **options)

        def loads(name, *args, **options):
            seq = self.use(self.cache.sequence())
            return lambda: getattr(seq, name)(*args, **options)

        def raw(*args):
            self.files.append(io.FileIO(*args))
            return self.files[-1]

        other = self.path + "b"
        options = {"progress": progress, "fsync": False}
        self.every({
            "save": lambda: saves(other, **options),
            "save to a file object": lambda: saves(io.BytesIO(), codec="raw"),
            "save to a raw file": lambda: saves(raw(other, "w")),
            "save_bytes": lambda: functools.partial(self.use(self.seq.fork()).save_bytes,
                                                    **options),
            "load": lambda: loads("load", self.path, progress=progress),
            "load of pieces": lambda: loads("load", self.path),
            "load from a file object": lambda: loads("load", io.BytesIO(self.data)),
            "load from a raw file": lambda: loads("load", raw(self.path)),
            "load_bytes": lambda: loads("load_bytes", self.data, progress=progress),
            "inspect": lambda: lambda: kvtile.inspect(self.path, True, progress=progress),
            "convert": lambda: lambda: kvtile.convert(self.path, other, types="i4", **options),
        })

    @unittest.skipUnless(KEYS, "the library was built without libsodium")
    def test_stores(self):
        values = Watched()
        self.seq.prefix_put(kvtile.Store.mapping(values))

        def mapping(values):
            return self.use(kvtile.Store.mapping(values))

        def tiers(near, far):
            return self.use(kvtile.Store.tiers(mapping(near), mapping(far)))

        def puts(store):
            seq = self.use(self.seq.fork())
            return lambda: seq.prefix_put(store)

        def finds(name, store):
            seq = self.use(self.cache.sequence())
            return lambda: getattr(seq, name)(store, self.prompt)

        self.every({
            "put": lambda: puts(mapping({})),
            "put to Python code": lambda: puts(mapping(Watched())),
            "put to tiers": lambda: puts(tiers(Watched(), Watched())),
            "get": lambda: finds("prefix_get", mapping(values)),
            "get from tiers": lambda: finds("prefix_get", tiers(Watched(), values)),
            "get from both": lambda: finds("prefix_get", tiers(values, values)),
            "probe": lambda: finds("prefix_probe", mapping(values)),
            "entries": lambda: mapping(values).entries,
        })

    @unittest.skipUnless(SURE, "CPython 3.8 and 3.9 leave gaps around try")
    def test_short_calls(self):
        """In a loop of calls, most of whose time is Python's, the signal is seldom within C code."""
        cache = kvtile.Cache(group(n_layers=1), 512)
        q, k = numbers((2, 8, 64)), numbers((1, 2, 64))
        values = Watched()
        mapping = kvtile.Store.mapping(values)

        def step(a, b):
            with a.step(1) as step:
                step.append(0, k, k)
            b.reserve(1)

        def tiers(a, b):
            near, far = (self.use(kvtile.Store.mapping({})) for _ in range(2))
            self.use(kvtile.Store.tiers(near, far))

        calls = {
            "length": lambda a, b: a.length,
            "attend": lambda a, b: a.attend(0, q[0]),
            "attend over two": lambda a, b: cache.attend(0, [a, b], q),
            "step": step,
            "begin": lambda a, b: (a.begin(1), a.abort()),
            "read": lambda a, b: (a.keys(0), a.positions(), a.tag, a.checkpoints()),
            "fork": lambda a, b: a.fork().close(),
            "sequence": lambda a, b: cache.sequence().close(),
            "save": lambda a, b: a.save_bound(),
            "cache": lambda a, b: (cache.memory_bytes, cache.stats(), cache.trim()),
            "store": lambda a, b: mapping.entries(),
            "tiers": tiers,
        }
        if KEYS:
            calls["probe"] = lambda a, b: a.prefix_probe(mapping, [1, 2, 3])

        def action():
            raise Stop
        self.handle(action)
        for name, call in calls.items():
            with self.subTest(name):
                self.handled = 0
                for _ in range(LOOPS):
                    pair = [self.use(cache.sequence()) for _ in range(2)]
                    for seq in pair:
                        fill(seq, 1)
                    try:
                        try:
                            signal.setitimer(signal.ITIMER_REAL, self.random.uniform(5e-5, 1e-3))
                            for _ in range(400):  # it ends if a finalizer has had the signal
                                call(*pair)
                        finally:
                            signal.setitimer(signal.ITIMER_REAL, 0)
                    except Stop:
                        pass
                    for seq in pair:
                        seq.abort()
                    self.free()
                self.assertGreater(self.handled, 0)
                gc.collect()
                self.assertEqual(cache.stats().blocks_used, 0, "a sequence is lost")
        mapping.close()
        cache.close()


class Pending(Base):
    """A signal that has come before the callback begins."""

    def signal_in_read(self, data):
        """A file whose read leaves a signal pending for the next one."""
        main = threading.main_thread().ident

        class File(io.BytesIO):
            def read(self, size=-1):
                piece = super().read(size)
                threading.Timer(0, signal.pthread_kill, (main, signal.SIGALRM)).start()
                time.sleep(0.01)
                return piece
        return File(data)

    def test_long_callback(self):
        def action():
            raise Stop
        self.handle(action)
        with self.assertRaises(Stop):
            self.cache.sequence().load(self.signal_in_read(self.data))

    def test_handler_without_exception(self):
        """A call goes on after a handler that returns."""
        self.handle(lambda: None)
        seq = self.cache.sequence()
        for _ in range(20):
            signal.setitimer(signal.ITIMER_REAL, 1e-4, 1e-4)
            seq.load(io.BytesIO(self.data))
            signal.setitimer(signal.ITIMER_REAL, 0)
        self.assertGreater(self.handled, 0)
        self.assertEqual(seq.length, 2048)


class Hook(Base):
    """sys.unraisablehook while a call runs."""

    def save(self, progress, **options):
        return self.seq.save_bytes(progress=progress, **options)

    def test_others(self):
        """What is not a callback's goes to the hook that was there, at once."""
        class Bad:
            def __del__(self):
                raise KeyError("not a callback's")

        seen = []

        def progress(done, total):
            self.assertIsNot(sys.unraisablehook, self.hook)
            Bad()
            thread = threading.Thread(target=Bad)
            thread.start()
            thread.join()
            seen.extend(type(x.exc_value) for x in self.unraisable)
            self.unraisable.clear()
        self.save(progress)
        self.assertEqual(seen[:2], [KeyError, KeyError])
        self.assertIs(sys.unraisablehook, self.hook)

    def test_replaced(self):
        """A hook that a callback sets stays; the call's own passes everything on afterwards."""
        theirs = []

        def progress(done, total):
            before = sys.unraisablehook

            def hook(unraisable):
                theirs.append(unraisable)
                before(unraisable)
            sys.unraisablehook = hook
        self.save(progress)
        self.assertIsNot(sys.unraisablehook, self.hook)
        given = types.SimpleNamespace(exc_traceback=None)
        sys.unraisablehook(given)
        self.assertEqual((theirs, self.unraisable), ([given], [given]))

    def test_nested(self):
        hooks = []

        def inner(done, total):
            hooks.append(sys.unraisablehook)
            raise Stop

        def outer(done, total):
            hooks.append(sys.unraisablehook)
            with self.assertRaises(Stop):
                self.save(inner)
            self.assertIs(sys.unraisablehook, hooks[0])
        self.save(outer)
        self.assertEqual(len(set(map(id, hooks + [self.hook]))), 3)
        self.assertIs(sys.unraisablehook, self.hook)

    def test_other_threads(self):
        """Signals' handlers do not run there: the hook is left alone."""
        hooks = []
        thread = threading.Thread(
            target=self.save, args=(lambda *_: hooks.append(sys.unraisablehook),))
        thread.start()
        thread.join()
        self.assertEqual(set(map(id, hooks)), {id(self.hook)})


class Order(unittest.TestCase):
    """Which of several exceptions is raised."""

    def test_first_but_for_interrupts(self):
        for raised, expected in (([Stop("1"), Stop("2")], 0), ([Stop(), Leave()], 1),
                                 ([Leave(), KeyboardInterrupt()], 0)):
            call = _callback.Call()
            call.failures = raised[:]
            with self.assertRaises(BaseException) as caught:
                call.run(lambda: None)
            self.assertIs(caught.exception, raised[expected])

    def test_failed_at_once(self):
        """A callback after the one that has failed is not called."""
        call = _callback.Call()
        calls = []

        def fail():
            calls.append(1)
            raise Stop
        guard = call.guarded(fail, 7)
        with self.assertRaises(Stop):
            call.run(lambda: self.assertEqual([guard() for _ in range(3)], [7, 7, 7]))
        self.assertEqual(calls, [1])

    def test_handlers(self):
        """Exceptions of handlers are told from those of a mapping."""
        def plain(number, frame):
            raise Stop

        class Object:
            def method(self, number, frame):
                raise Stop

            def __call__(self, number, frame):
                plain(number, frame)

        def extra(_, number, frame):
            raise Stop
        saved = signal.getsignal(signal.SIGALRM)
        try:
            for handler in (plain, Object().method, Object(), functools.partial(extra, 0)):
                signal.signal(signal.SIGALRM, handler)
                for by_signal in (True, False):
                    try:
                        if by_signal:
                            signal.raise_signal(signal.SIGALRM)
                        raise Stop
                    except Stop as error:
                        self.assertEqual(_callback._raised_by_handler(error), by_signal)
        finally:
            signal.signal(signal.SIGALRM, saved)


if __name__ == "__main__":
    unittest.main()
