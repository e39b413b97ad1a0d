"""Sequences: every call, every exception class, the life of objects."""

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import tempfile
import unittest
import weakref

import numpy as np

import kvtile
from kvtile import _lib
from support import fill, group, random


class Base(unittest.TestCase):
    def setUp(self):
        self.cache = kvtile.Cache(group(k_type="i8", v_type="i8"), 4096, fingerprint=b"weights")
        self.seq = self.cache.sequence()

    def tearDown(self):
        self.cache.close()

    def state(self, seq):
        """All that a failed call must leave as it was."""
        layers = range(seq.cache.n_layers)
        return (seq.length, seq.pending, seq.memory_bytes, seq.tag, seq.next_position,
                seq.checkpoints(), seq.token_ids().tobytes(), seq.positions().tobytes(),
                [seq.keys(i).tobytes() + seq.values(i).tobytes() for i in layers])


class Steps(Base):
    def test_counts(self):
        self.assertEqual((len(self.seq), self.seq.pending, self.seq.next_position), (0, 0, 0))
        self.assertTrue(self.seq)
        self.seq.begin(3, [5, 6, 9])
        self.assertEqual(self.seq.pending, 3)
        k, v = random((2, 3, 2, 64))
        for layer in range(2):
            self.seq.append(layer, k, v)
        self.seq.commit(np.array([1, -1, 3], np.int64))
        self.assertEqual(self.seq.token_ids().tolist(), [1, kvtile.TOKEN_NONE, 3])
        self.assertEqual(self.seq.positions(1).tolist(), [6, 9])
        self.assertEqual(self.seq.key_positions(0, 2).tolist(), [5, 6])
        self.assertEqual(self.seq.next_position, 10)
        self.seq.next_position = 50
        self.assertEqual(self.seq.next_position, 50)
        for wrong in (3.5, -1, 2**31, "7"):
            with self.subTest(wrong), self.assertRaisesRegex(ValueError, "next_position: "):
                self.seq.next_position = wrong
        with self.assertRaises(TypeError):
            self.seq.next_position = None
        self.assertEqual(self.seq.next_position, 50)
        self.assertEqual(self.seq.max_tokens, 4096)
        self.assertEqual(repr(self.seq), "<kvtile.Sequence of 3 tokens>")

    def test_empty(self):
        for get in (self.seq.keys, self.seq.values):
            self.assertEqual(get(0).shape, (0, 2, 64))
        self.assertEqual(self.seq.token_ids().shape, (0,))
        with self.assertRaises(kvtile.ArgError):
            self.seq.attend(0, np.empty((0, 8, 64), np.float32))
        self.assertEqual(abs(self.seq.attend(0, random((8, 64)), causal=False)).max(), 0)
        with self.assertRaises(kvtile.ArgError):
            self.seq.begin(0)

    def test_step_aborts(self):
        fill(self.seq, 5)
        before = self.state(self.seq)
        with self.assertRaises(ZeroDivisionError):
            with self.seq.step(2) as step:
                step.append(0, *random((2, 2, 2, 64)))
                1 / 0
        self.assertEqual(self.state(self.seq), before)
        with self.assertRaisesRegex(kvtile.StateError, "layer 1"):
            with self.seq.step(2) as step:  # layer 1 is missing
                step.append(0, *random((2, 2, 2, 64)))
        self.assertEqual(self.state(self.seq), before)
        with self.seq.step(1) as step:
            step.token_ids = [7]
            for layer in range(2):
                step.append(layer, *random((2, 2, 64)))
        self.assertEqual(self.seq.token_ids(5).tolist(), [7])

    def test_select(self):
        data = random((2, 2, 6, 2, 64), 3)
        self.seq.begin(6)
        for layer in range(2):
            self.seq.append(layer, *data[layer])
        self.seq.commit_selected([0, 2, 5], [10, 12, 15])
        other = self.cache.sequence()
        with other.step(3, [10, 12, 15], [0, 2, 5]) as step:
            for layer in range(2):
                step.append(layer, *data[layer][:, [0, 2, 5]])
        self.assertEqual(self.state(self.seq), self.state(other))
        self.seq.begin(2)
        for layer in range(2):
            self.seq.append(layer, *data[layer][:, :2])
        for bad in ([1, 0], [2], [-1]):
            with self.assertRaises(ValueError):
                self.seq.commit_selected(bad)
        self.assertEqual(self.seq.pending, 2)
        self.seq.abort()

    def test_fork_truncate(self):
        fill(self.seq, 200)
        copy = self.seq.fork()
        part = self.seq.fork(64)
        self.assertEqual(self.state(copy), self.state(self.seq))
        self.assertEqual(part.keys(1).tobytes(), self.seq.keys(1, 0, 64).tobytes())
        self.assertGreater(copy.stats().shared_bytes, 0)
        fill(copy, 10, 8)
        self.assertEqual((copy.length, self.seq.length), (210, 200))
        copy.truncate(200)
        self.assertEqual(copy.length, 200)
        self.assertEqual(self.seq.reachable(70), 70)
        self.seq.clear()
        self.assertEqual(self.seq.length, 0)
        self.assertEqual(copy.length, 200)

    def test_bytes(self):
        """Buffers are taken; bytes(5) are five zeros, and bytes of a list what nobody has meant."""
        self.seq.tag = np.array([1, 256], "<u2")
        self.assertEqual(self.seq.tag, b"\1\0\0\1")
        self.seq.checkpoint(memoryview(bytearray(b"0123"))[::2])
        self.assertEqual(self.seq.checkpoint_read(0), b"02")
        self.seq.clear()
        for wrong in (5, 5.0, "text", None, [1, 2]):
            for name, call in (("tag", lambda x: setattr(self.seq, "tag", x)),
                               ("blob", self.seq.checkpoint),
                               ("fingerprint", lambda x: kvtile.Cache(group(), 1, fingerprint=x))):
                with self.subTest(f"{name}: {wrong!r}"), \
                        self.assertRaisesRegex(TypeError, f"{name}: {type(wrong).__name__} "):
                    call(wrong)
        self.assertEqual((self.seq.tag, self.seq.checkpoints()), (b"\1\0\0\1", []))

    def test_remove(self):
        rope = kvtile.Rope(kvtile.RopePairing.HALVES, [10000 ** (-i / 32) for i in range(32)])
        with kvtile.Cache(group(rope=rope), 1000) as cache, cache.sequence() as seq:
            fill(seq, 300)
            keys = seq.keys(0)
            seq.remove(64, 128)
            self.assertEqual(seq.length, 172)
            self.assertEqual(seq.positions().tolist(), list(range(172)))
            self.assertEqual(seq.key_positions(64, 1).tolist(), [192])
            self.assertEqual(seq.keys(0, 64).tobytes(), keys[192:].tobytes())

    def test_checkpoints(self):
        fill(self.seq, 10)
        self.seq.checkpoint(b"state\0of 10")
        fill(self.seq, 100)
        self.seq.checkpoint()
        self.assertEqual(self.seq.checkpoints(), [10, 110])
        self.assertEqual(self.seq.checkpoint_read(10), b"state\0of 10")
        self.assertEqual(self.seq.checkpoint_read(110), b"")
        self.seq.checkpoint_drop(110)
        self.assertEqual(self.seq.checkpoints(), [10])
        self.seq.truncate(10)
        self.assertEqual(self.seq.length, 10)

    def test_reserve_and_memory(self):
        self.seq.reserve(1000)
        self.assertGreaterEqual(self.seq.capacity, 1000)
        self.assertGreater(self.cache.stats().blocks_reserved, 0)
        held = self.cache.memory_bytes
        fill(self.seq, 1000)
        self.assertEqual(self.cache.memory_bytes, held)
        self.assertEqual(self.cache.stats().bytes, held)
        g = self.cache.groups
        with kvtile.Cache(g, 4096) as cache, cache.sequence() as seq:
            fill(seq, 500)
            self.assertEqual(cache.memory_bytes, kvtile.memory_forecast(g, 4096, 1, 500))
            seq.clear()
            cache.trim()
            self.assertEqual(cache.memory_bytes, kvtile.memory_forecast(g, 4096, 1, 0))
        one = kvtile.working_forecast(g, 4096, 500)
        self.assertGreater(one, 0)
        self.assertGreater(kvtile.working_forecast(g, 4096, 500, n_threads=2), one)
        # K and V of 2 layers, 2 heads, 64 dims: 1 byte an element, and scales
        self.assertAlmostEqual(cache_bytes(self.cache) / (2 * 2 * 2 * 64), 1.1, delta=0.1)

    def test_config(self):
        g = group(n_layers=6, k_type="i4", v_type="i4")
        between, ends = g.split_ends(1, 2, "i8", kvtile.Type.F16)
        self.assertEqual((between.layers, ends.layers), ((1, 2, 3), (0, 4, 5)))
        self.assertEqual((ends.k_type, ends.v_type), ("i8", kvtile.Type.F16))
        self.assertEqual(len(g.split_ends(9, 0, "i8", "i8")), 1)
        for counts, name in (((-1, 0), "n_first"), ((0, -1), "n_last"), ((0.5, 0), "n_first"),
                             ((0, 2**32), "n_last")):
            with self.subTest(counts), self.assertRaisesRegex(ValueError, name):
                g.split_ends(*counts, "i8", "i8")
        with kvtile.Cache([between, ends], 100, isa="scalar") as cache, cache.sequence() as seq:
            fill(seq, 5)
            self.assertEqual((cache.isa, cache.n_layers), ("scalar", 6))
        for bad in (dict(k_type="i7"), dict(n_layers=-1), dict(n_layers=2**32), dict(k_dim=64.5),
                    dict(layers=(0,)), dict(k_dim=63), dict(n_q_heads=3)):
            with self.subTest(bad), self.assertRaises(ValueError):
                kvtile.Cache(group(**bad), 100)
        self.assertEqual(kvtile.isa_names()[0], "scalar")
        self.assertEqual(kvtile.version(), kvtile.__version__)


def cache_bytes(cache):
    return cache.bytes_per_token


class Snapshots(Base):
    def test_round_trip(self):
        self.seq.tag = b"tenant\x00\xff"
        fill(self.seq, 150)
        self.seq.checkpoint(b"blob")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "ä.kvt")
            self.seq.save(path)
            info = kvtile.inspect(path, verify=True)
            self.assertEqual((info.n_tokens, info.n_checkpoints, info.fingerprint, info.tag),
                             (150, 1, b"weights", self.seq.tag))
            self.assertEqual(info.groups[0].k_type, kvtile.Type.I8)
            data = open(path, "rb").read()
            self.assertEqual(self.seq.save_bytes(), data)
            raw = self.seq.save_bytes(codec="raw")
            self.assertGreater(len(raw), len(data))
            with open(path, "r+b", buffering=0) as f:  # a raw file, which may take a part
                self.seq.save(f)
            copies = [self.cache.sequence() for _ in range(4)]
            for c in copies:
                c.tag = self.seq.tag
            copies[0].load(path)
            copies[1].load_bytes(memoryview(data))
            with open(path, "rb") as f:
                copies[2].load(f)
            copies[3].load_bytes(raw)
            self.seq.save(path, in_place=True, fsync=False, codec="zstd", level=3)
            for c in copies:
                self.assertEqual(self.state(c)[3:], self.state(self.seq)[3:])
                self.assertEqual(c.checkpoint_read(150), b"blob")

    def test_prompt(self):
        fill(self.seq, 150)
        data = self.seq.save_bytes()
        result = self.seq.load_bytes(data, prompt=[*range(100), 7, 8, 9])
        self.assertEqual(result, kvtile.LoadResult(150, 100, 100, None, 0, {}))
        self.assertEqual(self.seq.load_bytes(data, range(150)).reuse_tokens, 149)

    def test_damage(self):
        """Any damage is an exception, and the sequence is as it was."""
        fill(self.seq, 150)
        data = self.seq.save_bytes()
        fill(self.seq, 1)
        before = self.state(self.seq)
        for at in range(0, len(data), max(len(data) // 50, 1)):
            bad = bytearray(data)
            bad[at] ^= 1
            with self.assertRaises((kvtile.CorruptError, kvtile.FormatError)):
                self.seq.load_bytes(bad)
            with self.assertRaises((kvtile.CorruptError, kvtile.FormatError)):
                self.seq.load_bytes(data[:at])
        self.assertEqual(self.state(self.seq), before)

    def test_exceptions_of_files(self):
        """An exception of the caller's file comes through, and nothing has changed."""
        class Broken(io.RawIOBase):
            def write(self, data):
                raise KeyError("disk")

            def read(self, n=-1):
                raise KeyError("disk")

        class Full(Broken):
            def write(self, data):
                return 0

        class TooMuch(Broken):
            def read(self, n=-1):
                return b"x" * (n + 1)

        class Text(Broken):
            def read(self, n=-1):
                return "text"

        class Closing(Broken):
            def write(inner, data):
                self.seq.close()

        fill(self.seq, 10)
        before = self.state(self.seq)
        for error, call in (
            (KeyError, lambda: self.seq.save(Broken())),
            (OSError, lambda: self.seq.save(Full())),
            (KeyError, lambda: self.seq.load(Broken())),
            (OSError, lambda: self.seq.load(TooMuch())),
            (TypeError, lambda: self.seq.load(Text())),
            (kvtile.BusyError, lambda: self.seq.save(Closing())),
        ):
            with self.assertRaises(error):
                call()
        self.assertEqual(self.state(self.seq), before)


class Errors(Base):
    def test_all_classes(self):
        """Each status as its class, with the cache's text, and the sequence as it was."""
        g = self.cache.groups
        fill(self.seq, 100)
        data = self.seq.save_bytes()
        nan = np.full((1, 2, 64), np.nan, np.float32)
        small = kvtile.Cache(g, 64)
        other = kvtile.Cache(g, 4096, fingerprint=b"others")
        poor = kvtile.Cache(g, 4096, memory_budget_bytes=kvtile.memory_forecast(g, 4096, 1, 64))
        poor_seq = poor.sequence()

        def number():
            self.seq.begin(1)
            try:
                self.seq.append(0, nan, nan)
            finally:
                self.seq.abort()

        cases = {
            "ArgError": (lambda: self.seq.truncate(101), "101"),
            "StateError": (lambda: self.seq.commit(), "step"),
            "NumberError": (number, "finite"),
            "BudgetError": (lambda: fill(poor_seq, 1000), "budget"),
            "FullError": (lambda: small.sequence().begin(65), "at most 64"),
            "LimitError": (lambda: setattr(self.cache.sequence(), "tag", bytes(257)), "257"),
            "UnsupportedError": (lambda: kvtile.Cache(g, 100, isa="mmx"), "mmx"),
            "IoError": (lambda: self.seq.load("/nonexistent/file.kvt"), "/nonexistent/file.kvt"),
            "FormatError": (lambda: self.seq.load_bytes(b"no snapshot" * 100), "snapshot"),
            "CorruptError": (lambda: self.seq.load_bytes(data[:-1]), "."),
            "CancelledError": (lambda: self.seq.save_bytes(progress=lambda done, total: True),
                               "progress"),
            "MismatchError": (lambda: other.sequence().load_bytes(data), "fingerprint"),
        }
        before = self.state(self.seq)
        for name, (call, text) in cases.items():
            with self.subTest(name):
                cls = getattr(kvtile, name)
                with self.assertRaisesRegex(kvtile.Error, text) as caught:
                    call()
                self.assertIs(type(caught.exception), cls)
                self.assertIs(kvtile.ERRORS[caught.exception.status], cls)
        self.assertEqual(self.state(self.seq), before)
        self.assertEqual(set(kvtile.ERRORS.values()) - {kvtile.OutOfMemoryError},
                         {getattr(kvtile, name) for name in cases})
        for c in (small, other, poor):
            c.close()

    def test_out_of_memory(self):
        """KVT_ERR_MEMORY, in a process of its own that may not have more."""
        program = """if True:
            import resource, kvtile
            g = kvtile.Group(8, 8, 8, 1024, k_type="f32", v_type="f32")
            cache = kvtile.Cache(g, 2**20)
            seq = cache.sequence()
            with open("/proc/self/statm") as f:
                used = int(f.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
            try:
                seq.begin(2**20)
            except kvtile.OutOfMemoryError as error:
                assert isinstance(error, MemoryError) and error.status == 4
                assert seq.pending == 0
                print("refused")
            """
        if not sys.platform.startswith("linux"):
            self.skipTest("/proc is Linux's")
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        self.assertEqual(result.stdout, "refused\n", result.stderr)

    def test_bases(self):
        for cls, base in ((kvtile.ArgError, ValueError), (kvtile.IoError, OSError),
                          (kvtile.LimitError, ValueError), (kvtile.ClosedError, kvtile.StateError),
                          (kvtile.NumberError, ArithmeticError)):
            self.assertTrue(issubclass(cls, base) and issubclass(cls, kvtile.Error))


class Lives(Base):
    def test_closed(self):
        """Every public name of a closed sequence or cache raises, but for close() and constants."""
        q, k = random((1, 8, 64)), random((1, 2, 64))
        arguments = {"begin": (1,), "append": (0, k, k), "attend": (0, q), "keys": (0,),
                     "values": (0,), "reserve": (1,), "truncate": (0,), "reachable": (0,),
                     "remove": (0, 64), "checkpoint_read": (0,), "checkpoint_drop": (0,),
                     "save": ("/tmp/never.kvt",), "load": ("/tmp/never.kvt",),
                     "load_bytes": (b"",), "save_into": (bytearray(9),), "commit_selected": ([0],),
                     "prefix_put": (kvtile.Store.mapping({}),),
                     "prefix_get": (kvtile.Store.mapping({}), [0]),
                     "prefix_probe": (kvtile.Store.mapping({}), [0])}
        quiet = {"close", "closed", "cache", "step", "groups", "max_tokens", "n_layers"}
        other = self.cache.sequence()
        self.seq.close()
        self.seq.close()
        self.assertTrue(self.seq.closed)
        for obj in (self.seq, self.cache):
            if obj is self.cache:
                self.cache.close()
                self.cache.close()
                self.assertTrue(other.closed)
            tried = 0
            for name in dir(type(obj)):
                if name.startswith("_") or name in quiet:
                    continue
                args = arguments.get(name, ())
                if obj is self.cache and name == "attend":
                    args = (0, [other], q)
                with self.subTest(name), self.assertRaises(kvtile.ClosedError):
                    value = getattr(obj, name)
                    if callable(value):
                        value(*args)
                tried += 1
            self.assertGreater(tried, 6)
        with self.assertRaises(kvtile.ClosedError):
            with self.seq.step(1):
                pass
        self.assertIn("closed", repr(self.seq) + repr(self.cache))

    def test_with(self):
        with kvtile.Cache(group(), 100) as cache:
            with cache.sequence() as seq:
                pass
            self.assertTrue(seq.closed)
            self.assertFalse(cache.closed)
        self.assertTrue(cache.closed)

    def test_sequence_keeps_cache(self):
        cache = kvtile.Cache(group(), 100)
        seq = cache.sequence()
        gone = weakref.ref(cache)
        del cache
        gc.collect()
        fill(seq, 10)
        self.assertEqual(seq.attend(0, random((8, 64))).shape, (8, 64))
        copy = seq.fork()
        del seq
        gc.collect()
        self.assertEqual(copy.keys(0).shape, (10, 2, 64))
        self.assertIsNotNone(gone())
        del copy
        gc.collect()
        self.assertIsNone(gone())

    def test_copies_are_refused(self):
        """A copy would have the same pointer, and free it a second time."""
        fill(self.seq, 10)
        with kvtile.Store.mapping({}) as store:
            for handle, text in ((self.seq, "sequence cannot be copied.*fork"),
                                 (self.cache, "cache cannot be copied"),
                                 (store, "store cannot be copied")):
                for call in (copy.copy, copy.deepcopy, pickle.dumps, lambda x: pickle.dumps(x, 0)):
                    with self.subTest(text), self.assertRaisesRegex(TypeError, text):
                        made = call(handle)
                        made._pointer = None  # not freed by this test
            self.assertFalse(store.closed or self.cache.closed)
        self.assertEqual(self.seq.length, 10)

    def test_cycles(self):
        """Objects in reference cycles are finalized in any order."""
        for _ in range(20):
            cache = kvtile.Cache(group(), 100)
            seq = cache.sequence()
            cache.back, seq.back = seq, seq
            del cache, seq
        gc.collect()

    def test_failed_construction(self):
        for _ in range(3):
            with self.assertRaises(kvtile.ArgError):
                kvtile.Cache([], 100)
        gc.collect()

    def test_leaks(self):
        """Many lives of all kinds of objects: the process does not grow."""
        def cycle():
            with kvtile.Cache(group(), 256, fingerprint=b"x") as cache:
                seq = cache.sequence()
                fill(seq, 70)
                seq.checkpoint(b"blob")
                copy = seq.fork(64)
                data = seq.save_bytes()
                copy.load_bytes(data, range(70))
                copy.checkpoints(), copy.checkpoint_read(70), copy.token_ids(), cache.stats()
                seq.attend(0, random((2, 8, 64)), lse=True, mask=np.ones((2, 3), bool))
                for call in (lambda: seq.truncate(99), lambda: copy.load_bytes(data[:-1]),
                             lambda: seq.attend(0, np.zeros((1, 8, 63), np.float32))):
                    try:
                        call()
                    except ValueError:
                        pass
                    except kvtile.Error:
                        pass

        if not os.path.exists("/proc/self/statm"):
            self.skipTest("/proc is Linux's")

        def least():
            """KiB of the process, the least of several looks, as malloc keeps more or less."""
            looks = []
            for _ in range(10):
                for _ in range(5):
                    cycle()
                gc.collect()
                with open("/proc/self/statm") as f:
                    looks.append(int(f.read().split()[1]) * 4)
            return min(looks)

        least()
        before = least()
        blocks = sys.getallocatedblocks()
        least()
        # 100 leaked caches would have 50 MiB, 100 leaked snapshots 10 MiB.
        self.assertLess(least() - before, 4000)
        # Nor objects of Python, of which each cycle makes hundreds.
        self.assertLess(sys.getallocatedblocks() - blocks, 80)

    def test_finalizers_free(self):
        """What is dropped without close() is freed as well."""
        saved = []
        real = _lib.lib.kvt_seq_destroy
        seq = self.cache.sequence()
        self.assertIs(type(seq).__del__.__defaults__[0], real)
        fill(seq, 200)
        used = self.cache.stats().blocks_used
        saved.append(used)
        del seq
        gc.collect()
        self.assertLess(self.cache.stats().blocks_used, used)


if __name__ == "__main__":
    unittest.main()
