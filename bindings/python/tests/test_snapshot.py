"""Snapshots: where bytes go to and come from, what each option does, and how it fails."""

import ctypes
import gc
import io
import mmap
import os
import shutil
import socket
import sys
import tempfile
import threading
import unittest
from unittest import mock

import numpy as np

import kvtile
from kvtile import _bytes, _callback, _snapshot
from support import fill, group

KEY = bytes(range(32))


def can_encrypt():
    with kvtile.Cache(group(), 100) as cache, cache.sequence() as seq:
        try:
            seq.save_bytes(key=KEY)
        except kvtile.UnsupportedError:
            return False
        return True


ENCRYPTS = can_encrypt()


class Base(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.cache = kvtile.Cache(group(k_type="i8", v_type="i8"), 4096)
        self.seq = self.cache.sequence()
        fill(self.seq, 300)
        self.other = self.cache.sequence()

    def tearDown(self):
        self.cache.close()
        self.folder.cleanup()

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def contents(self, seq):
        return seq.save_bytes(codec="raw")

    def check_same(self, seq=None):
        self.assertEqual(self.contents(seq or self.other), self.contents(self.seq))


class Places(Base):
    def test_memory(self):
        """Any buffer, in place; the bound of codec="raw" is exact."""
        data = self.contents(self.seq)
        self.assertEqual(self.seq.save_bound(codec="raw"), len(data))
        with mmap.mmap(-1, len(data)) as mapped:
            for memory in (bytearray(len(data)), np.zeros(len(data), np.int8), mapped,
                           memoryview(bytearray(len(data) + 5)),
                           np.zeros((len(data) + 3) // 4, np.float32)):
                n = self.seq.save_into(memory, codec="raw")
                self.assertEqual(n, len(data))
                self.assertEqual(memoryview(memory).cast("B")[:n], data)
        for memory in (data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
            self.other.clear()
            self.other.load_bytes(memory)
            self.check_same()
        self.assertGreaterEqual(self.seq.save_bound(), len(self.seq.save_bytes()))
        for error, call in (
            (kvtile.FullError, lambda: self.seq.save_into(bytearray(len(data) - 1), codec="raw")),
            (kvtile.FullError, lambda: self.seq.save_into(bytearray())),
            (ValueError, lambda: self.seq.save_into(bytes(len(data)))),
            (ValueError, lambda: self.seq.save_into(np.zeros(2 * len(data), np.uint8)[::2])),
            (TypeError, lambda: self.seq.save_into(5)),
            (ValueError, lambda: self.other.load_bytes(memoryview(data)[::2])),
            (kvtile.CorruptError, lambda: self.other.load_bytes(b"")),
            (kvtile.CorruptError, lambda: self.other.load_bytes(data + b"x")),
        ):
            with self.assertRaises(error):
                call()
        self.check_same()

    def test_descriptor(self):
        with open(self.path("fd"), "w+b") as f:
            f.write(b"head")
            f.flush()
            self.seq.save(np.int64(f.fileno()), codec="raw")
            f.write(b"tail")
            f.flush()
            os.lseek(f.fileno(), 4, os.SEEK_SET)
            self.other.load(f.fileno())
            self.check_same()
            self.assertEqual(os.read(f.fileno(), 9), b"tail")  # nothing behind it is read
        with self.assertRaises(ValueError):
            self.seq.save(-1)
        folder = os.open(self.folder.name, os.O_RDONLY)
        self.addCleanup(os.close, folder)
        with self.assertRaises(kvtile.IoError):
            self.seq.load(folder)

    def test_socket(self):
        a, b = socket.socketpair()
        with a, b:
            thread = threading.Thread(target=lambda: self.other.load(b.fileno()))
            thread.start()
            self.seq.save(a.fileno())
            thread.join()
        self.check_same()

    def test_mapped(self):
        self.seq.save(self.path("raw"), codec="raw")
        for how in ("verify", "lazy"):
            with self.subTest(how):
                result = self.other.load(self.path("raw"), map=how)
                self.assertGreater(result.mapped_bytes, 0)
                self.check_same()
                fill(self.other, 1)
                self.other.truncate(300)
        self.assertEqual(self.other.load(self.path("raw")).mapped_bytes, 0)
        with self.assertRaises(kvtile.ArgError):
            self.other.load_bytes(self.contents(self.seq), map="lazy")
        with open(self.path("raw"), "r+b") as f:  # in the middle of keys and values
            f.seek(os.path.getsize(self.path("raw")) // 2)
            f.write(b"damaged")
        other = self.cache.sequence()
        with self.assertRaises(kvtile.CorruptError):
            other.load(self.path("raw"), map="verify")
        self.assertEqual(other.length, 0)
        other.load(self.path("raw"), map="lazy")
        with self.assertRaises(kvtile.CorruptError):
            for layer in range(2):
                other.keys(layer), other.values(layer)
        with self.assertRaises(kvtile.CorruptError):
            other.save_bytes()


class Options(Base):
    def test_codecs(self):
        sizes = {}
        for codec in ("auto", "raw", "zstd"):
            self.seq.save(self.path(codec), codec=codec, fsync=False)
            sizes[codec] = os.path.getsize(self.path(codec))
            self.other.load(self.path(codec))
            self.check_same()
        self.assertGreater(sizes["raw"], sizes["zstd"])
        info = kvtile.inspect(self.path("raw"), verify=True)
        self.assertGreater(info.native_blocks, 0)
        self.assertEqual(kvtile.inspect(self.path("zstd"), verify=True).native_blocks, 0)
        self.assertEqual(info.snapshot_id, kvtile.inspect(self.path("zstd"), True).snapshot_id)
        self.assertIsNone(kvtile.inspect(self.path("raw")).snapshot_id)

    def test_files(self):
        """level, fsync and in_place reach the library."""
        with kvtile.Cache(group(k_type="f16", v_type="f16"), 4096) as cache, \
                cache.sequence() as seq:
            k = np.resize(np.arange(97, dtype=np.float32), (300, 2, 64))
            with seq.step(300) as step:
                for layer in range(2):
                    step.append(layer, k, k)
            sizes = [len(seq.save_bytes(codec="zstd", level=level)) for level in (-7, 1, 0, 19)]
            self.assertGreater(sizes[0], sizes[1])
            self.assertGreater(sizes[1], sizes[2])  # small streams at level 6
            self.assertGreaterEqual(sizes[2], sizes[3])
        path = self.path("a")
        self.seq.save(path)
        first = os.stat(path).st_ino
        self.seq.save(path, in_place=True)
        self.assertEqual(os.stat(path).st_ino, first)
        self.seq.save(path)
        self.assertNotEqual(os.stat(path).st_ino, first)
        for fsync in (True, False):
            options = _snapshot._Save(1, _snapshot.Call(), fsync=fsync)
            self.assertEqual(options.c.no_fsync, not fsync)

    def test_part(self):
        ids = self.seq.token_ids(64, 100)
        self.other.load_bytes(self.seq.save_bytes(tokens=range(64, 164)))
        self.assertEqual(self.other.token_ids().tobytes(), ids.tobytes())
        self.assertEqual(self.other.keys(1).tobytes(), self.seq.keys(1, 64, 100).tobytes())
        with kvtile.Cache(group(n_layers=1, k_type="i8", v_type="i8"), 4096) as small, \
                small.sequence() as seq:
            seq.load_bytes(self.seq.save_bytes(layers=[1]))
            self.assertEqual(seq.values(0).tobytes(), self.seq.values(1).tobytes())
            seq.load_bytes(self.seq.save_bytes(), layers=[1])
            self.assertEqual(seq.values(0).tobytes(), self.seq.values(1).tobytes())
            with self.assertRaises(kvtile.MismatchError):
                seq.load_bytes(self.seq.save_bytes())

    def test_prompt(self):
        self.seq.truncate(200)
        self.seq.checkpoint(b"state")
        fill(self.seq, 100)
        data = self.seq.save_bytes()
        prompt = [*range(250), 7, 8, 9]
        result = self.other.load_bytes(data, prompt)
        self.assertEqual((result.n_tokens, result.prefix_tokens, result.reuse_tokens,
                          result.checkpoint_tokens), (300, 250, 250, 200))
        result = self.other.load_bytes(data, prompt, reuse="prefix")
        self.assertEqual((result.n_tokens, self.other.length), (250, 250))
        result = self.other.load_bytes(data, prompt, reuse="checkpoint")
        self.assertEqual((result.n_tokens, self.other.length), (200, 200))
        self.assertEqual(self.other.checkpoint_read(200), b"state")
        self.assertEqual(self.other.load_bytes(data, [5], reuse="checkpoint").n_tokens, 0)

    def test_types(self):
        f16 = kvtile.Type.F16
        cases = {"i4": ("I4", "I4"), ("i8", "i4"): ("I8", "I4"), (None, f16): ("I8", "F16")}
        for types, (k, v) in cases.items():
            for given in (types,) if types == (None, f16) else (types, [types]):
                with self.subTest(given):
                    data = self.seq.save_bytes(types=given)
                    g = group(k_type=k, v_type=v)
                    with kvtile.Cache(g, 4096) as cache, cache.sequence() as seq:
                        seq.load_bytes(data)
                        self.assertEqual(seq.length, 300)
                    with self.assertRaises(kvtile.MismatchError):
                        self.other.load_bytes(data)
                    self.assertEqual(self.other.load_bytes(data, convert=True).n_tokens, 300)
        np.testing.assert_allclose(self.other.values(0), self.seq.values(0), atol=0.05)
        for error, types in ((ValueError, ["i4", "i4"]), (ValueError, "i9"), (ValueError, ("i4",)),
                             (ValueError, (None, None)), (ValueError, [("i4", None), "i4"]),
                             (kvtile.ArgError, "i5")):
            with self.subTest(types), self.assertRaises(error):
                self.seq.save_bytes(types=types)

    def test_delta(self):
        """A chain is loaded with its parents, by their ids, and folded."""
        self.seq.save(self.path("0.kvt"))
        whole = os.path.getsize(self.path("0.kvt"))
        for i in range(1, 4):
            fill(self.seq, 64, seed=i)
            self.seq.save(self.path(f"{i}.kvt"), parent=self.path(f"{i - 1}.kvt"))
            self.assertLess(os.path.getsize(self.path(f"{i}.kvt")), whole)
        self.other.load(self.path("3.kvt"))
        self.check_same()
        with open(self.path("3.kvt"), "rb") as f:
            self.other.load(f, folder=self.folder.name)
        self.check_same()
        info = kvtile.inspect(self.path("3.kvt"), verify=True)
        self.assertEqual((info.depth, info.parent_name, info.n_tokens), (3, "2.kvt", 492))
        self.assertEqual(info.parent_id, kvtile.inspect(self.path("2.kvt"), True).snapshot_id)
        self.assertGreater(info.inherited_blocks, 0)
        first = kvtile.inspect(self.path("0.kvt"), True)
        self.assertEqual((first.depth, first.parent_name, first.parent_id), (0, None, None))

        kvtile.convert(self.path("3.kvt"), self.path("whole.kvt"))
        self.assertEqual(kvtile.inspect(self.path("whole.kvt"), True).depth, 0)
        self.other.clear()
        self.other.load(self.path("whole.kvt"))
        self.check_same()
        with tempfile.TemporaryDirectory() as elsewhere:
            moved = os.path.join(elsewhere, "3.kvt")
            shutil.copy(self.path("3.kvt"), moved)
            with self.assertRaises(kvtile.IoError):
                kvtile.inspect(moved, verify=True)
            self.assertEqual(kvtile.inspect(moved, True, folder=self.folder.name).depth, 3)
            kvtile.convert(moved, self.path("again.kvt"), folder=self.folder.name)
            self.other.load(moved, folder=self.folder.name)
            self.check_same()
        with self.assertRaises(kvtile.IoError), open(self.path("3.kvt"), "rb") as f:
            self.other.load(f, folder=self.path("nowhere"))
        os.replace(self.path("whole.kvt"), self.path("2.kvt"))  # a sound file, but another
        with self.assertRaises(kvtile.MismatchError):
            self.other.load(self.path("3.kvt"))
        with self.assertRaises(kvtile.IoError):
            self.seq.save(self.path("4.kvt"), parent=self.path("none.kvt"))
        self.check_same()

    def test_piece_names(self):
        """UTF-8 whatever the locale is; bytes that are none come back as they are."""
        with mock.patch("os.fsencode", lambda s: s.encode("latin-1")), \
                mock.patch("os.fsdecode", lambda s: s.decode("latin-1")):
            data = self.seq.save_bytes(pieces={"näme": b"1", b"\xff": b"2"})
        self.assertIn("näme".encode(), data)
        self.assertEqual(self.other.load_bytes(data).pieces, {"näme": b"1", "\udcff": b"2"})
        again = self.seq.save_bytes(pieces=self.other.load_bytes(data).pieces)
        self.assertEqual(self.other.load_bytes(again).pieces, {"näme": b"1", "\udcff": b"2"})
        with self.assertRaises(ValueError):
            self.seq.save_bytes(pieces={"a\0b": b""})

    def test_bytes_of_a_growing_sequence(self):
        """Tokens that another thread appends between the bound and the save."""
        true_bound = _snapshot.save_bound
        with mock.patch.object(_snapshot, "save_bound", side_effect=[
                100, true_bound(self.seq, {})]) as bound:
            self.assertEqual(self.seq.save_bytes(), self.seq_bytes())
            self.assertEqual(bound.call_count, 2)
        with mock.patch.object(_snapshot, "save_bound", return_value=100), \
                self.assertRaises(kvtile.FullError):
            self.seq.save_bytes()

    def seq_bytes(self):
        file = io.BytesIO()
        self.seq.save(file)
        return file.getvalue()

    def test_pieces(self):
        pieces = {"sampler": b"state\0", "näme": np.arange(3, dtype=np.int16), "empty": b""}
        found = {"sampler": b"state\0", "näme": b"\0\0\1\0\2\0", "empty": b""}
        data = self.seq.save_bytes(pieces=pieces)
        self.assertEqual(self.other.load_bytes(data).pieces, found)
        self.assertEqual(self.other.load_bytes(data, pieces=False).pieces, {})
        self.assertEqual(self.other.load_bytes(self.seq.save_bytes()).pieces, {})
        self.seq.save(self.path("a"), pieces=pieces)
        info = kvtile.inspect(self.path("a"), verify=True)
        self.assertEqual((info.pieces, info.n_pieces), (found, 3))
        self.assertEqual(kvtile.inspect(self.path("a")).pieces, {})
        kvtile.convert(self.path("a"), self.path("b"), pieces={"empty": b"no more", "new": b"1"})
        self.assertEqual(kvtile.inspect(self.path("b"), verify=True).pieces,
                         {**found, "empty": b"no more", "new": b"1"})
        for error, bad in ((kvtile.ArgError, {"x" * 65: b""}), (kvtile.ArgError, {"": b""}),
                           (TypeError, {"a": "text"})):
            with self.assertRaises(error):
                self.seq.save_bytes(pieces=bad)

    def test_convert(self):
        self.seq.save(self.path("a"))
        kvtile.convert(self.path("a"), self.path("b"), codec="raw", types=["i4"], layers=[1],
                       tokens=range(0, 128))
        info = kvtile.inspect(self.path("b"), verify=True)
        self.assertEqual((info.n_layers, info.n_tokens, info.layer_groups), (1, 128, (0,)))
        self.assertEqual((info.groups[0].k_type, info.groups[0].layers), (kvtile.Type.I4, None))
        with self.assertRaises(ValueError):
            kvtile.convert(self.path("a"), self.path("b"), types=["i4", "i4"])
        with self.assertRaisesRegex(kvtile.IoError, "none.kvt"):
            kvtile.convert(self.path("none.kvt"), self.path("b"))
        with self.assertRaises(TypeError):
            kvtile.convert(self.path("a"), self.path("b"), prompt=[1])

    def test_failed_convert(self):
        """The target is as it was; with in_place it is what loading refuses."""
        self.seq.save(self.path("a"))
        self.seq.truncate(100)
        for in_place in (False, True):
            self.seq.save(self.path("b"))
            calls = []

            def progress(done, total):
                calls.append(done)
                if len(calls) == 2:  # the first one is of the reading
                    raise KeyError("stop")
            with self.assertRaises(KeyError):
                kvtile.convert(self.path("a"), self.path("b"), in_place=in_place,
                               progress=progress)
            if in_place:
                with self.assertRaises((kvtile.CorruptError, kvtile.FormatError)):
                    self.other.load(self.path("b"))
            else:
                self.other.load(self.path("b"))
                self.check_same()

    def test_groups(self):
        """Groups that inspect tells are those of a cache that can load it."""
        groups = group(n_layers=5).split_ends(1, 1, "f16", "f16")
        with kvtile.Cache(groups, 1000) as cache, cache.sequence() as seq:
            fill(seq, 100)
            seq.save(self.path("g"))
            info = kvtile.inspect(self.path("g"))
            self.assertEqual(info.layer_groups, (1, 0, 0, 0, 1))
            self.assertEqual([g.layers for g in info.groups], [(1, 2, 3), (0, 4)])
            with kvtile.Cache(info.groups, 1000) as same, same.sequence() as again:
                again.load(self.path("g"))
                self.assertEqual(self.contents(again), self.contents(seq))
            half = seq.save_bytes(types=["i8", ("f32", "f16")])
            seq.load_bytes(half, convert=True)
            kvtile.convert(self.path("g"), self.path("all"), types="f16")
            self.assertEqual([(g.k_type, g.v_type) for g in kvtile.inspect(self.path("all")).groups],
                             [(kvtile.Type.F16, kvtile.Type.F16)] * 2)

    def test_key(self):
        if not ENCRYPTS:
            self.skipTest("the library has no encryption")
        self.seq.save(self.path("a"), key=KEY)
        before = self.contents(self.other)
        for bad in (None, bytes(32)):
            with self.assertRaises(kvtile.MismatchError):
                self.other.load(self.path("a"), key=bad)
        with self.assertRaises(kvtile.UnsupportedError):
            self.other.load(self.path("a"), key=KEY, map="lazy")
        self.assertEqual(self.contents(self.other), before)
        self.other.load(self.path("a"), key=bytearray(KEY))
        self.check_same()
        info = kvtile.inspect(self.path("a"), verify=True, key=KEY)
        self.assertTrue(info.encrypted)
        self.assertEqual(info.file_bytes, os.path.getsize(self.path("a")))
        fill(self.seq, 10)
        self.seq.save(self.path("b"), key=KEY, parent=self.path("a"))
        self.other.load(self.path("b"), key=KEY)
        self.check_same()
        kvtile.convert(self.path("b"), self.path("plain"), source_key=KEY)
        kvtile.convert(self.path("plain"), self.path("again"), key=bytes(32))
        self.assertFalse(kvtile.inspect(self.path("plain"), True).encrypted)
        self.other.load(self.path("again"), key=bytes(32))
        self.check_same()
        self.other.load_bytes(self.seq.save_bytes(key=KEY), key=KEY)
        self.check_same()

    def test_arguments(self):
        data = self.seq.save_bytes()
        for error, call in (
            (ValueError, lambda: self.seq.save_bytes(codec="gzip")),
            (ValueError, lambda: self.seq.save_bytes(codec=["raw"])),
            (ValueError, lambda: self.seq.save_bytes(tokens=range(0))),
            (ValueError, lambda: self.seq.save_bytes(tokens=range(0, 9, 2))),
            (ValueError, lambda: self.seq.save_bytes(tokens=range(-64, 9))),
            (ValueError, lambda: self.seq.save_bytes(tokens=5)),
            (kvtile.ArgError, lambda: self.seq.save_bytes(tokens=range(1, 9))),
            (kvtile.ArgError, lambda: self.seq.save_bytes(tokens=range(0, 301))),
            (ValueError, lambda: self.seq.save_bytes(layers=[-1])),
            (kvtile.ArgError, lambda: self.seq.save_bytes(layers=[1, 0])),
            (kvtile.ArgError, lambda: self.seq.save_bytes(layers=[])),
            (ValueError, lambda: self.seq.save_bytes(key=bytes(31))),
            (ValueError, lambda: self.seq.save_bytes(key=bytes(33))),
            (TypeError, lambda: self.seq.save_bytes(key="x" * 32)),
            (TypeError, lambda: self.seq.save_bytes(compress=False)),
            (ValueError, lambda: self.other.load_bytes(data, reuse="some")),
            (ValueError, lambda: self.other.load_bytes(data, map="yes")),
            (ValueError, lambda: self.other.load_bytes(data, key=b"")),
            (kvtile.ArgError, lambda: self.other.load_bytes(data, layers=[0])),
            (TypeError, lambda: self.other.load_bytes(data, codec="raw")),
            (TypeError, lambda: self.other.load_bytes(data, [0.5])),
        ):
            with self.assertRaises(error):
                call()
        self.assertEqual(self.other.length, 0)


    def test_nul(self):
        """C would take what is before it: nothing is done."""
        self.seq.save(self.path("a"), pieces={"x": b"1"})
        fill(self.other, 5)
        before = self.contents(self.other)
        bad = self.path("a\0b")
        for call in (
            lambda: self.seq.save(bad),
            lambda: self.seq.save(os.fsencode(bad)),
            lambda: self.seq.save(self.path("c"), parent=bad),
            lambda: self.seq.save(self.path("c"), pieces={"x\0y": b""}),
            lambda: self.seq.save_bytes(pieces={"\0": b""}),
            lambda: self.other.load(bad),
            lambda: self.other.load(self.path("a"), folder=self.folder.name + "\0"),
            lambda: kvtile.inspect(bad),
            lambda: kvtile.inspect(self.path("a"), True, folder=self.folder.name + "\0"),
            lambda: kvtile.convert(bad, self.path("c")),
            lambda: kvtile.convert(self.path("a"), self.path("c\0d"), types=["i4"]),
            lambda: kvtile.convert(self.path("a"), self.path("c"), pieces={"x\0y": b""}),
            lambda: kvtile.Cache(group(), 100, isa="scalar\0more"),
        ):
            with self.assertRaisesRegex(ValueError, "embedded null byte"):
                call()
        self.assertEqual(os.listdir(self.folder.name), ["a"])
        self.assertEqual(self.contents(self.other), before)

    def test_key_is_wiped(self):
        """No copy of a key is left after a call, also where it has failed."""
        self.seq.save(self.path("a"))
        copies = []

        copy_key = _callback.Call.key

        def key(call, view):
            copies.append(copy_key(call, view))
            self.assertEqual(copies[-1].raw, KEY)
            return copies[-1]

        class Stop(BaseException):
            pass

        def progress(done, total):
            raise Stop
        for call in (
            lambda **o: self.seq.save(self.path("b"), **o),
            lambda **o: self.seq.save(io.BytesIO(), **o),
            lambda **o: self.seq.save(5.5, **o),
            self.seq.save_bound, self.seq.save_bytes,
            lambda **o: self.seq.save_into(bytearray(self.seq.save_bound()), **o),
            lambda **o: self.other.load(self.path("a"), **o),
            lambda **o: self.other.load(self.path("none"), **o),
            lambda **o: self.other.load_bytes(b"", **o),
            lambda **o: kvtile.inspect(self.path("a"), True, **o),
            lambda **o: kvtile.inspect(self.path("none"), **o),
            lambda **o: kvtile.convert(self.path("a"), self.path("c"), source_key=KEY, **o),
            lambda **o: kvtile.convert(self.path("a"), self.path("c"), codec="none",
                                       source_key=KEY, **o),
        ):
            for options in ({}, {"progress": progress}):
                copies.clear()
                with mock.patch.object(_callback.Call, "key", key):
                    try:
                        call(key=KEY, **options)
                    except (kvtile.Error, ValueError, TypeError, Stop):
                        pass
                self.assertTrue(copies)
                self.assertEqual({copy.raw for copy in copies}, {bytes(32)})


class Memory(unittest.TestCase):
    """Memory of C of 2 GiB and more; pages that are only read take none."""

    BYTES = 2**32 + 8

    def setUp(self):
        try:
            self.memory = mmap.mmap(-1, self.BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            self.skipTest(str(error))
        one = ctypes.c_char.from_buffer(self.memory)
        self.address = ctypes.addressof(one)
        del one
        self.memory[-3:] = b"end"

    def tearDown(self):
        self.memory.close()

    def test_view(self):
        view = _bytes.view(self.address, self.BYTES)
        self.assertEqual((view.nbytes, view[-3:].tobytes()), (self.BYTES, b"end"))

    def test_copied(self):
        end = self.address + self.BYTES - 3
        self.assertEqual(_bytes.copied(end, 3), b"end")
        self.assertEqual(_bytes.copied(None, 0), b"")
        with mock.patch.object(_bytes, "_STRING_AT_MAX", 2):
            self.assertEqual(_bytes.copied(end, 3), b"end")
        with mock.patch.object(_bytes, "view") as view, \
                mock.patch.object(ctypes, "string_at") as string_at:
            for n in (2**31, 2**32, self.BYTES):
                _bytes.copied(self.address, n)
                view.assert_called_with(self.address, n)
            string_at.assert_not_called()
            _bytes.copied(self.address, 2**31 - 1)
            string_at.assert_called_with(self.address, 2**31 - 1)

    def test_write(self):
        """A file object gets all of it, in parts of its own."""
        kept, n = None, 0

        def write(piece):
            nonlocal kept, n
            kept, n = piece, n + len(piece)
            self.assertLessEqual(len(piece), 1 << 20)
            return len(piece)
        self.assertEqual(_snapshot._taker(write)(None, self.address, self.BYTES), 0)
        self.assertEqual(n, self.BYTES)
        self.memory[-3:] = b"new"
        self.assertEqual(bytes(kept[-3:]), b"end")


class Callbacks(Base):
    def test_progress(self):
        calls = []
        options = {"progress": lambda done, total: calls.append((done, total))}
        self.seq.save(self.path("a"), **options)
        self.seq.save_bytes(**options)
        self.seq.save_into(bytearray(self.seq.save_bound(**options)), **options)
        self.other.load(self.path("a"), **options)
        kvtile.inspect(self.path("a"), verify=True, **options)
        kvtile.convert(self.path("a"), self.path("b"), **options)
        self.assertEqual(len(calls), 7)
        self.assertTrue(all(done == total > 0 for done, total in calls), calls)

    def every(self, progress, error):
        """Each call with it raises, and has changed nothing."""
        data = self.seq.save_bytes()
        self.seq.save(self.path("a"))
        null = open(os.devnull, "wb")
        file = open(self.path("a"), "rb")
        self.addCleanup(null.close)
        self.addCleanup(file.close)
        fill(self.other, 5)
        before = self.contents(self.other)
        o = {"progress": progress}
        for call in (
            lambda: self.seq.save(self.path("b"), **o),
            lambda: self.seq.save_bytes(**o),
            lambda: self.seq.save_into(bytearray(len(data) * 2), **o),
            lambda: self.seq.save(null.fileno(), **o),
            lambda: self.other.load(self.path("a"), **o),
            lambda: self.other.load_bytes(data, **o),
            lambda: self.other.load(file, **o),
            lambda: kvtile.inspect(self.path("a"), verify=True, **o),
            lambda: kvtile.convert(self.path("a"), self.path("b"), **o),
        ):
            with self.assertRaises(error):
                call()
        self.assertFalse(os.path.exists(self.path("b")))
        self.assertEqual(self.contents(self.other), before)

    def test_cancelled(self):
        self.every(lambda done, total: True, kvtile.CancelledError)

    def test_exceptions(self):
        def progress(done, total):
            raise KeyError("stop")
        self.every(progress, KeyError)

    def test_interrupt(self):
        def progress(done, total):
            raise KeyboardInterrupt
        self.every(progress, KeyboardInterrupt)

    def test_busy(self):
        """A callback may read the sequence that is saved, and not use the one that is loaded."""
        seen = []
        self.seq.save_bytes(progress=lambda *_: seen.append(self.seq.length))
        self.assertEqual(seen, [300])
        with self.assertRaises(kvtile.BusyError):
            self.seq.save_bytes(progress=lambda *_: self.seq.clear())
        with self.assertRaises(kvtile.BusyError):
            self.other.load_bytes(self.contents(self.seq), progress=lambda *_: self.other.length)
        self.assertEqual((self.seq.length, self.other.length), (300, 0))

    def test_references(self):
        """Nothing of a call is kept."""
        def progress(done, total):
            pass
        data = self.seq.save_bytes(pieces={"a": b"b"})
        before = sys.getrefcount(progress), sys.getrefcount(data)
        for _ in range(5):
            self.seq.save_bytes(progress=progress, pieces={"data": data})
            self.other.load_bytes(data, progress=progress)
        gc.collect()
        self.assertEqual((sys.getrefcount(progress), sys.getrefcount(data)), before)


if __name__ == "__main__":
    unittest.main()
