"""Threads: the interpreter's lock is released, and what C leaves undefined is refused."""

import io
import os
import signal
import sys
import tempfile
import threading
import time
import unittest
import weakref

import numpy as np

import kvtile
from support import fill, group, random


def during(call):
    """Runs call in a thread; how often this thread's loop turned in the middle of that time."""
    times = []

    def body():
        start = time.perf_counter()
        call()
        times.append((start, time.perf_counter()))

    thread = threading.Thread(target=body)
    ticks = []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(0)
    thread.join()
    (start, end), = times
    quarter = (end - start) / 4
    return sum(start + quarter < t < end - quarter for t in ticks), end - start


class Threads(unittest.TestCase):
    def setUp(self):
        self.cache = kvtile.Cache(group(n_layers=1, k_type="i8", v_type="i8"), 8192)
        self.seq = self.cache.sequence()
        fill(self.seq, 2048)

    def tearDown(self):
        self.cache.close()

    def test_lock_is_released(self):
        """Attend, append, load and save: another thread runs in the meantime."""
        q = random((4096 // 8, 8, 64))
        k, v = random((2, 4096, 8, 128))
        wide = kvtile.Cache(group(n_layers=1, n_kv_heads=8, k_dim=128), 4096)
        self.addCleanup(wide.close)
        copy = wide.sequence()
        copy.begin(4096)
        full = wide.sequence()
        with full.step(4096) as step:
            step.append(0, k, v)
        data = full.save_bytes()  # 32 MiB: a load of less is too short to be seen
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = os.path.join(folder.name, "a.kvt")
        for name, call in (
            ("attend", lambda: self.seq.attend(0, q)),
            ("append", lambda: copy.append(0, k, v)),
            ("save", lambda: self.seq.save(path, fsync=False, codec="zstd", level=12)),
            ("load", lambda: full.load_bytes(data)),
        ):
            with self.subTest(name):
                for _ in range(5):  # other programs may keep this thread off the CPU
                    if name == "append":
                        copy.abort()
                        copy.begin(4096)
                    turns, took = during(call)
                    if turns > 5:
                        break
                self.assertGreater(turns, 5, f"{name} of {took * 1e3:.1f} ms")

    def test_readers_overlap(self):
        """Attend and read from several threads over one sequence: the same bits."""
        q = random((16, 8, 64))
        expected = self.seq.attend(0, q).tobytes()
        keys = self.seq.keys(0).tobytes()
        failures = []

        def work():
            try:
                for _ in range(10):
                    assert self.seq.attend(0, q).tobytes() == expected
                    assert self.seq.keys(0).tobytes() == keys
                    assert self.seq.fork is not None and self.seq.length == 2048
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.assertEqual(failures, [])

    def test_sequences_side_by_side(self):
        """A thread for each sequence of one cache: each is as if it had been alone."""
        def fill_one(seq, seed, out):
            for i in range(20):
                fill(seq, 7, seed + i)
                out.append(seq.attend(0, random((8, 64), i)).tobytes())

        alone, together = [[] for _ in range(4)], [[] for _ in range(4)]
        seqs = [self.cache.sequence() for _ in range(8)]
        for i in range(4):
            fill_one(seqs[i], 100 * i, alone[i])
        threads = [threading.Thread(target=fill_one, args=(seqs[4 + i], 100 * i, together[i]))
                   for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.assertEqual(alone, together)

    def test_conflicts(self):
        """A change or a close while a call runs: BusyError, and the call ends well."""
        q = random((1024, 8, 64))
        other = self.cache.sequence()
        expected = self.seq.attend(0, q).tobytes()
        busy, results = set(), []
        calls = {"seq.close": self.seq.close, "cache.close": self.cache.close,
                 "begin": lambda: self.seq.begin(1), "clear": self.seq.clear,
                 "truncate": lambda: self.seq.truncate(0)}
        for _ in range(20):
            thread = threading.Thread(target=lambda: results.append(self.seq.attend(0, q)))
            thread.start()
            while not self.seq._users and thread.is_alive():
                pass
            for name, call in calls.items():
                if self.seq._users:
                    try:
                        call()
                        # It came between the test above and the call: undo what it did.
                        self.fail(f"{name} while attend runs") if self.seq._users else None
                        break
                    except kvtile.BusyError:
                        busy.add(name)
            thread.join()
            if busy == set(calls):
                break
        self.assertEqual(busy, set(calls))
        self.assertEqual({r.tobytes() for r in results}, {expected})
        self.assertEqual((self.seq.length, other.length), (2048, 0))
        self.seq.close()

    def test_repr(self):
        """What a debugger shows of a sequence in use is no exception."""
        shown = []

        class Shows(io.BytesIO):
            def read(inner, n=-1):
                shown.append(repr(self.seq))
                return super().read(n)

            def write(inner, data):
                shown.append(repr(self.seq))
                return len(data)

        data = self.seq.save_bytes()
        self.seq.save(Shows())
        self.assertEqual(set(shown), {"<kvtile.Sequence of 2048 tokens>"})
        shown.clear()
        self.seq.load(Shows(data))
        self.assertEqual(set(shown), {"<kvtile.Sequence in use by another call>"})
        self.assertEqual(repr(self.seq), "<kvtile.Sequence of 2048 tokens>")

    def test_new_ones_and_close(self):
        """A sequence that is being made is not missed by the cache's close, nor in its way."""
        seen = []

        def look():
            seen.append(self.cache._lock.acquire(blocking=False))
            if seen[-1]:
                self.cache._lock.release()

        class Watch(weakref.WeakSet):
            def add(inner, seq):
                with self.assertRaises(kvtile.BusyError):
                    self.cache.close()
                thread = threading.Thread(target=look)
                thread.start()
                thread.join()
                super().add(seq)

        watch = Watch()
        weakref.WeakSet.add(watch, self.seq)
        self.cache._sequences = watch
        made = self.cache.sequence()
        fork = self.seq.fork()
        self.assertEqual(seen, [False, False])  # close would wait
        self.cache.close()
        self.assertTrue(made.closed and fork.closed)

    def test_random_use(self):
        """Threads that do anything to shared objects: our exceptions, no crash, no lost blocks."""
        shared = [self.cache.sequence() for _ in range(3)]
        strange = []
        stop = time.monotonic() + 1.5

        def work(seed):
            rng = np.random.default_rng(seed)
            q = random((1, 8, 64), seed)
            while time.monotonic() < stop:
                i = rng.integers(3)
                s = shared[i]
                actions = (lambda: fill(s, int(rng.integers(1, 90))), lambda: s.attend(0, q),
                           lambda: s.truncate(int(rng.integers(50))), lambda: s.abort(),
                           lambda: s.save_bytes(), lambda: s.keys(0), lambda: s.fork().close(),
                           lambda: self.cache.attend(0, shared, np.concatenate([q] * 3)),
                           lambda: s.close(), lambda: s.clear(), lambda: self.cache.trim(),
                           lambda: shared.__setitem__(i, self.cache.sequence()))
                try:
                    actions[rng.integers(len(actions))]()
                except (kvtile.StateError, kvtile.ArgError, kvtile.FullError):
                    pass
                except ValueError as error:  # a step that another thread has begun
                    if "the step has" not in str(error) and "for a step of" not in str(error):
                        strange.append(error)
                except BaseException as error:
                    strange.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.assertEqual(strange, [])
        for s in shared + [self.seq]:
            s.close()
        self.assertEqual(self.cache.stats().blocks_used, 0)

    def test_signal_within_callback(self):
        """KeyboardInterrupt in a file's write comes through; the sequence is free again."""
        class Interrupted:
            def write(self, data):
                os.kill(os.getpid(), signal.SIGINT)
                return len(data)

        saved = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with self.assertRaises(KeyboardInterrupt):
                self.seq.save(Interrupted())
                time.sleep(1)
        finally:
            signal.signal(signal.SIGINT, saved)
        self.assertFalse(self.seq._users)
        self.seq.truncate(2047)

    def test_pool(self):
        """Threads of the cache's own give the same bits."""
        try:
            cache = kvtile.Cache(self.cache.groups, 8192, n_threads=4)
        except kvtile.UnsupportedError:
            self.skipTest("built without a pool")
        with cache, cache.sequence() as seq:
            fill(seq, 2048)
            q = random((3, 8, 64))
            self.assertEqual(seq.attend(0, q).tobytes(), self.seq.attend(0, q).tobytes())


if __name__ == "__main__":
    sys.exit(unittest.main())
