"""Stores of prefixes: what is got is what was put, errors, mappings, and who may close."""

import gc
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import unittest
import weakref

import numpy as np

import kvtile
from support import fill, group, has_keys


KEYS = has_keys()


class Base(unittest.TestCase):
    def setUp(self):
        if not KEYS:
            self.skipTest("the library was built without libsodium")
        self.cache = kvtile.Cache(group(k_type="i8", v_type="i8"), 2000, fingerprint=b"weights")
        self.addCleanup(self.cache.close)
        self.seq = self.cache.sequence()
        self.data = fill(self.seq, 300)
        self.prompt = list(range(300))
        self.other = self.cache.sequence()

    def check_got(self, n, of=None):
        """other has the first n tokens."""
        of = of or self.seq
        self.assertEqual(self.other.length, n)
        np.testing.assert_array_equal(self.other.token_ids(), np.arange(n))
        for layer in range(2):
            np.testing.assert_array_equal(self.other.keys(layer), of.keys(layer, 0, n))
            np.testing.assert_array_equal(self.other.values(layer), of.values(layer, 0, n))

    def opened(self, function, *args, **options):
        try:
            store = function(*args, **options)
        except kvtile.UnsupportedError as error:
            self.skipTest(str(error))
        self.addCleanup(store.close)
        return store


class Broken(dict):
    """A dict that raises `error` once it is set."""

    error = None

    def check(self):
        if self.error is not None:
            raise self.error

    def get(self, key, default=None):
        self.check()
        return super().get(key, default)

    def __setitem__(self, key, value):
        self.check()
        super().__setitem__(key, value)

    def __contains__(self, key):
        self.check()
        return super().__contains__(key)

    def pop(self, *args):
        self.check()
        return super().pop(*args)


class Prefixes(Base):
    def test_round_trip(self):
        values = {}
        with kvtile.Store.mapping(values) as store:
            put = self.seq.prefix_put(store)
            self.assertEqual((put.n_tokens, put.n_values, put.n_checkpoints), (192, 3, 0))
            self.assertEqual(put.n_bytes, sum(len(v) for v in values.values()))
            self.assertTrue(all(len(key) == 32 for key in values))
            self.assertEqual(self.seq.prefix_put(store), (192, 0, 0, 0, 0))
            probed = self.other.prefix_probe(store, self.prompt)
            self.assertEqual((probed.n_tokens, self.other.length), (192, 0))
            got = self.other.prefix_get(store, np.array(self.prompt))
            self.assertEqual((got.n_tokens, got.n_values, got.n_bytes, got.n_refused),
                             (192, 3, put.n_bytes, 0))
            self.check_got(192)
            self.other.clear()
            self.assertEqual(self.other.prefix_get(store, self.prompt[:129]).n_tokens, 128)
            self.check_got(128)
            self.other.clear()
            changed = self.prompt[:]
            changed[70] = 7
            self.assertEqual(self.other.prefix_get(store, changed).n_tokens, 64)
            self.check_got(64)
            self.assertEqual(self.other.prefix_probe(store, []).n_tokens, 0)

    def test_options(self):
        """Each of these is a part of the keys, to be given by put and get alike."""
        for options in ({"namespace": b"tenant"}, {"salt": b"\0secret\0"},
                        {"extras": {2: b"image", 0: b"\0adapter"}}):
            with self.subTest(options), kvtile.Store.mapping({}) as store:
                self.assertEqual(self.seq.prefix_put(store, **options).n_tokens, 192)
                self.assertEqual(self.other.prefix_probe(store, self.prompt).n_tokens, 0)
                self.assertEqual(self.other.prefix_probe(store, self.prompt,
                                                         **options).n_tokens, 192)
                wrong = {name: {2: b"image", 0: b"\0adaptor"} if name == "extras" else
                         value[:-1] + b"!" for name, value in options.items()}
                self.assertEqual(self.other.prefix_get(store, self.prompt, **wrong).n_tokens, 0)
        store = kvtile.Store.mapping({})
        self.assertEqual(self.seq.prefix_put(store, n_tokens=130).n_tokens, 128)
        positions = np.arange(300) + 1
        self.assertEqual(self.other.prefix_probe(store, self.prompt, positions).n_tokens, 0)
        self.assertEqual(self.other.prefix_probe(store, self.prompt, positions - 1).n_tokens, 128)
        self.other.tag = b"adapter"
        self.assertEqual(self.other.prefix_probe(store, self.prompt).n_tokens, 0)

    def test_checkpoints(self):
        self.seq.clear()
        fill(self.seq, 200)
        self.seq.checkpoint(b"blob")
        fill(self.seq, 100)
        store = kvtile.Store.mapping({})
        self.seq.prefix_put(store)
        self.assertEqual(self.other.prefix_probe(store, self.prompt, checkpoints=True).n_tokens, 0)
        self.assertEqual(self.seq.prefix_put(store, checkpoints=True).n_checkpoints, 1)
        for lengths, n in (([100, 199], 0), ([], 0), ((200, 100), 200), (True, 200), (False, 192)):
            self.assertEqual(self.other.prefix_probe(store, self.prompt,
                                                     checkpoints=lengths).n_tokens, n, lengths)
        self.assertEqual(self.other.prefix_get(store, self.prompt, checkpoints=[]), (0,) * 5)
        self.assertEqual(self.other.prefix_get(store, self.prompt, checkpoints=True).n_tokens, 200)
        self.check_got(200, self.seq.fork(200))  # where less was sealed
        self.assertEqual(self.other.checkpoint_read(200), b"blob")

    def test_damage(self):
        values = {}
        store = kvtile.Store.mapping(values)
        self.seq.prefix_put(store)
        for key in list(values):
            info = kvtile.value_check(values[key], key)
            self.assertEqual((info.checkpoint, info.n_blocks, info.blob_bytes), (False, 1, 0))
            self.assertIn(info.n_tokens, (64, 128, 192))
            damaged = bytearray(values[key])
            damaged[-1] ^= 1
            with self.assertRaises(kvtile.CorruptError):
                kvtile.value_check(damaged)
            with self.assertRaises(kvtile.MismatchError):
                kvtile.value_check(values[key], key[::-1])
            with self.assertRaises(kvtile.FormatError):
                kvtile.value_check(b"")
            with self.assertRaises(ValueError):
                kvtile.value_check(values[key], key[1:])
            if info.n_tokens == 128:
                values[key] = damaged
        got = self.other.prefix_get(store, self.prompt)
        self.assertEqual((got.n_tokens, got.n_refused, len(values)), (64, 1, 2))
        self.check_got(64)

    def test_errors(self):
        store = kvtile.Store.mapping({})
        closed = self.cache.sequence()
        closed.close()
        with self.assertRaises(kvtile.StateError):
            self.seq.prefix_get(store, self.prompt)
        self.seq.begin(1)
        with self.assertRaisesRegex(kvtile.StateError, "pending"):
            self.seq.prefix_put(store)
        self.seq.abort()
        for error, call in (
            (TypeError, lambda: self.other.prefix_get(store, [0.5])),
            (kvtile.ArgError, lambda: self.other.prefix_get(store, [-1] * 100)),
            (ValueError, lambda: self.other.prefix_get(store, self.prompt, [0, 1])),
            (ValueError, lambda: self.seq.prefix_put(store, n_tokens=-1)),
            (ValueError, lambda: self.seq.prefix_put(store, extras={-1: b""})),
            (TypeError, lambda: self.seq.prefix_put(store, salt="text")),
            (TypeError, lambda: self.seq.prefix_put(store, salt=32)),
            (TypeError, lambda: self.seq.prefix_put(store, namespace=5)),
            (TypeError, lambda: self.seq.prefix_put(store, extras={1: 5})),
            (TypeError, lambda: self.seq.prefix_probe(store, self.prompt, salt=[1, 2])),
            (TypeError, lambda: self.seq.prefix_put(store, prompt=self.prompt)),
            (kvtile.ArgError, lambda: self.other.prefix_get(store, self.prompt, n_tokens=5)),
            (kvtile.StateError, lambda: self.seq.prefix_get(store, self.prompt, checkpoints=[])),
            (kvtile.ClosedError, lambda: closed.prefix_get(store, self.prompt, checkpoints=[])),
            (kvtile.ClosedError, lambda: closed.prefix_probe(store, self.prompt, checkpoints=[])),
        ):
            with self.assertRaises(error):
                call()
        self.assertEqual((self.other.length, store.entries()), (0, []))
        store.close()
        store.close()
        self.assertTrue(store.closed)
        for call in (lambda: self.seq.prefix_put(store), store.stats, store.entries,
                     lambda: self.other.prefix_get(store, self.prompt)):
            with self.assertRaises(kvtile.ClosedError):
                call()


class Mappings(Base):
    def test_raises(self):
        """What a mapping raises goes on, and nothing has changed."""
        values = Broken()
        store = kvtile.Store.mapping(values)
        self.seq.prefix_put(store)
        for error in (KeyError("mine"), OSError("disk"), KeyboardInterrupt()):
            values.error = error
            for call in (lambda: self.seq.prefix_put(store, salt=b"new"),
                         lambda: self.other.prefix_get(store, self.prompt),
                         lambda: self.other.prefix_probe(store, self.prompt)):
                with self.assertRaises(type(error)) as caught:
                    call()
                self.assertIs(caught.exception, error)
            self.assertEqual(self.other.length, 0)
            values.error = None
        self.assertEqual(self.other.prefix_get(store, self.prompt).n_tokens, 192)

    def test_kinds_of_values(self):
        """What a mapping gives is bytes or a buffer; a number is not so many zeros."""
        values = {}
        store = kvtile.Store.mapping(values)
        self.seq.prefix_put(store)
        kept = dict(values)
        values.update((key, np.frombuffer(value, np.uint8)) for key, value in kept.items())
        self.assertEqual(self.other.prefix_get(store, self.prompt).n_tokens, 192)
        self.other.clear()
        values.update((key, len(value)) for key, value in kept.items())
        with self.assertRaisesRegex(TypeError, "value: int "):
            self.other.prefix_get(store, self.prompt)
        self.assertEqual(len(values), 3)  # none was taken for a damaged one, and removed

    def test_entries(self):
        values = {b"not a key": b"x"}
        store = kvtile.Store.mapping(values)
        self.seq.prefix_put(store)
        entries = store.entries()
        self.assertEqual({e.key: e.bytes for e in entries},
                         {k: len(v) for k, v in values.items() if len(k) == 32})
        self.assertEqual({e[2:] for e in entries}, {(None, None)})
        for call in (store.stats, store.collect):
            with self.assertRaises(kvtile.UnsupportedError):
                call()

    def test_busy(self):
        """A call on a store may run beside others, and not beside close."""
        seen = []

        class Watch(dict):
            def __contains__(self, key):
                for call in (store.close, lambda: kvtile.Store.tiers(store, spare),
                             lambda: kvtile.Store.tiers(spare, store)):
                    try:
                        call()
                    except kvtile.BusyError as error:
                        seen.append(error)
                return dict.__contains__(self, key)

        spare = kvtile.Store.mapping({})
        store = kvtile.Store.mapping(Watch())
        self.other.prefix_probe(store, self.prompt)
        self.assertTrue(seen and len(seen) % 3 == 0)
        self.assertFalse(spare.closed or store.closed)

    def test_threads(self):
        values = {}
        store = kvtile.Store.mapping(values)
        self.seq.prefix_put(store)
        found = []

        def work():
            seq = self.cache.sequence()
            for _ in range(10):
                seq.clear()
                found.append(seq.prefix_get(store, self.prompt).n_tokens)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        self.assertEqual(found, [192] * 40)

    def test_references(self):
        """Nothing of a store is kept."""
        values = Broken()
        gc.collect()
        before = sys.getrefcount(values)
        for _ in range(3):
            store = kvtile.Store.mapping(values)
            self.seq.prefix_put(store)
            self.other.clear()
            self.other.prefix_get(store, self.prompt)
            error = values.error = KeyError("mine")
            with self.assertRaises(KeyError):
                self.other.prefix_probe(store, self.prompt)
            values.error = None
            del store, error
        self.assertEqual(sys.getrefcount(values), before)


    def test_unknown_status(self):
        """Error, with the status; its traceback is no cycle."""
        try:
            kvtile._errors.throw(2044, "text")
        except kvtile.Error as error:
            self.assertEqual((type(error), error.status), (kvtile.Error, 2044))
            left = weakref.ref(error)
        self.assertIsNone(left())


class Opened(Base):
    """The library's own; skipped where it has none."""

    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def test_directory(self):
        path = os.path.join(self.folder, "store")
        store = self.opened(kvtile.Store.directory, path, max_bytes=1 << 24, sync=True)
        put = self.seq.prefix_put(store)
        self.assertEqual((put.n_tokens, put.n_values), (192, 3))
        with kvtile.Store.directory(path) as again:
            self.assertEqual(self.other.prefix_get(again, self.prompt).n_tokens, 192)
            self.check_got(192)
            stats = again.stats()
            self.assertEqual((stats.n_values, stats.max_bytes, stats.n_got), (3, 1 << 24, 3))
            again.collect()
            self.assertEqual(sorted(e.key for e in again.entries()),
                             sorted(e.key for e in store.entries()))
            self.assertEqual(len(again.entries()), 3)

    def test_no_directory(self):
        self.opened(kvtile.Store.directory, os.path.join(self.folder, "store"))
        nowhere = os.path.join(self.folder, "no", "store")
        with self.assertRaisesRegex(kvtile.IoError, "no/store"):
            kvtile.Store.directory(nowhere)
        with self.assertRaises(ValueError):
            kvtile.Store.directory(self.folder, max_bytes=-1)

    def test_redis(self):
        """Nothing listens at port 1; a server is not needed for the opening."""
        store = self.opened(kvtile.Store.redis, "127.0.0.1", 1, connect_timeout_ms=500,
                            prefix="test:", ttl_seconds=60)
        with self.assertRaisesRegex(kvtile.IoError, "127.0.0.1"):
            self.seq.prefix_put(store)
        with self.assertRaises(kvtile.IoError):
            self.other.prefix_get(store, self.prompt)
        with self.assertRaises(ValueError):
            kvtile.Store.redis(port=2**32)
        for options in ({"tls_ca_file": "ca"}, {"tls": True, "tls_cert_file": "cert"},
                        {"tls": True, "tls_key_file": "key"}, {"tls": True, "unix_path": "path"}):
            with self.assertRaisesRegex(kvtile.ArgError, "tls"):
                kvtile.Store.redis("127.0.0.1", 1, **options)

    def test_nul(self):
        """C would take what is before it: nothing is done."""
        with self.assertRaisesRegex(ValueError, "path: embedded null byte"):
            kvtile.Store.directory(os.path.join(self.folder, "a\0b"))
        self.assertEqual(os.listdir(self.folder), [])
        for name in ("host", "unix_path", "username", "password", "prefix", "tls_ca_file",
                     "tls_cert_file", "tls_key_file"):
            with self.assertRaisesRegex(ValueError, name + ": embedded null byte"):
                kvtile.Store.redis(**{name: "a\0b"})

    def test_redis_by_tls(self):
        nothing = os.path.join(self.folder, "nothing")
        try:
            with self.assertRaisesRegex(kvtile.IoError, "tls_ca_file: .*nothing"):
                kvtile.Store.redis("localhost", 1, tls=True, tls_ca_file=nothing)
        except kvtile.UnsupportedError as error:
            self.skipTest(str(error))
        script = os.path.join(os.path.dirname(__file__), "../../../tests/make_certificates.sh")
        if subprocess.run([script, self.folder], check=False).returncode == 77:
            self.skipTest("no openssl")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

        def path(name):
            return os.path.join(self.folder, name)

        context.load_cert_chain(path("server.crt"), path("server.key"))
        context.load_verify_locations(path("ca.crt"))
        context.verify_mode = ssl.CERT_REQUIRED
        with socket.create_server(("127.0.0.1", 0)) as listener:
            def serve():  # whatever is wanted is not there
                for _ in range(2):
                    try:
                        connection = context.wrap_socket(listener.accept()[0], server_side=True)
                        with connection:
                            while data := connection.recv(65536):
                                connection.sendall(b":0\r\n" if b"EXISTS" in data else b"$-1\r\n")
                    except OSError:
                        pass
            thread = threading.Thread(target=serve)
            thread.start()
            port = listener.getsockname()[1]
            options = {"tls": True, "connect_timeout_ms": 20000, "timeout_ms": 20000,
                       "pipeline": 1, "tls_ca_file": path("ca.crt"),
                       "tls_cert_file": path("client.crt"), "tls_key_file": path("client.key")}
            with kvtile.Store.redis("localhost", port, **options) as store:
                self.assertEqual(self.other.prefix_get(store, self.prompt).n_tokens, 0)
            options["tls_ca_file"] = path("stranger.crt")
            with kvtile.Store.redis("localhost", port, **options) as store:
                with self.assertRaisesRegex(kvtile.IoError, "certificate verify failed"):
                    self.other.prefix_get(store, self.prompt)
            thread.join()

    def test_tiers(self):
        near, far = {}, Broken()
        self.seq.prefix_put(kvtile.Store.mapping(far))
        stores = [kvtile.Store.mapping(near), kvtile.Store.mapping(far)]
        store = self.opened(kvtile.Store.tiers, *stores)
        self.assertTrue(stores[0].closed and stores[1].closed)
        del stores
        gc.collect()
        self.assertEqual(self.other.prefix_get(store, self.prompt).n_tokens, 192)
        self.check_got(192)
        self.assertEqual(near, far)
        self.other.clear()
        far.error = OSError("far away")  # near has all of it
        self.assertEqual(self.other.prefix_get(store, self.prompt[:193]).n_tokens, 192)
        self.other.clear()
        near.popitem()  # then what near has
        self.assertLess(self.other.prefix_get(store, self.prompt).n_tokens, 192)
        self.other.clear()
        far.error = KeyboardInterrupt()
        with self.assertRaises(KeyboardInterrupt):
            self.other.prefix_get(store, self.prompt)
        far.error = None

    def test_same_tiers(self):
        store = kvtile.Store.mapping({})
        with self.assertRaises(ValueError):
            kvtile.Store.tiers(store, store)
        self.assertFalse(store.closed)


if __name__ == "__main__":
    unittest.main()
