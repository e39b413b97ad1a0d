"""Stores of prefixes: directories, Redis servers, tiers, and mappings of Python (store.h)."""

from __future__ import annotations

import ctypes
import threading
from ctypes import byref, c_uint64, sizeof
from itertools import repeat
from typing import (TYPE_CHECKING, Any, Callable, Iterable, List, Mapping, MutableMapping,
                    NamedTuple, Optional, Type as Class, Union)

from . import _bytes, _lib
from ._bytes import PathLike, copied
from ._callback import Call, Guard
from ._config import _whole
from ._errors import BusyError, UnsupportedError, throw
from ._handle import Handle
from ._lib import lib
from ._tensor import int32s

if TYPE_CHECKING:
    from ._sequence import Sequence

_UNKNOWN = 2**64 - 1
_IO = 9  # KVT_ERR_IO


class PrefixResult(NamedTuple):
    """What a call on prefixes found or did.

    n_tokens: put: of the first so many all that is needed is in the store now; get: restored;
        probe: that a get would restore
    n_values, n_bytes: put: written; get: read
    n_refused: get: damaged, or another's, and removed. n_checkpoints: put: written
    """

    n_tokens: int
    n_values: int
    n_bytes: int
    n_refused: int
    n_checkpoints: int


class StoreStats(NamedTuple):
    """What a store has; None where that is unknown. The counters are of this process.

    max_bytes: its bound, 0 for none. n_failed: calls that failed.
    """

    n_values: Optional[int]
    bytes: Optional[int]
    max_bytes: Optional[int]
    n_got: Optional[int]
    n_missed: Optional[int]
    n_put: Optional[int]
    n_evicted: Optional[int]
    n_failed: Optional[int]


class StoreEntry(NamedTuple):
    """A value in a store; None where a field is unknown.

    used_seconds: since it was put or got last. left_seconds: until it expires; None: never, too.
    """

    key: bytes
    bytes: Optional[int]
    used_seconds: Optional[int]
    left_seconds: Optional[int]


class ValueInfo(NamedTuple):
    """What a value tells of itself: see `value_check`.

    n_tokens: from the prompt's beginning to its end. blob_bytes: of a checkpoint.
    """

    version: int
    checkpoint: bool
    n_tokens: int
    n_blocks: int
    blob_bytes: int


class _Mapping:
    """The functions of a kvt_store over a mapping of bytes to bytes."""

    def __init__(self, mapping: MutableMapping[bytes, Any], c: "_lib.Store") -> None:
        self.mapping = mapping
        for name in ("get", "put", "exists", "remove", "list"):
            setattr(c, name, getattr(_lib, f"STORE_{name.upper()}")(
                self.guarded(getattr(self, name))))

    @staticmethod
    def guarded(function: Callable[..., None]) -> Guard:
        def call(*args: Any) -> int:
            try:
                function(*args[1:])
                return 0
            except BaseException as error:
                text = f"{type(error).__name__}: {error}".encode("utf-8", "replace")
                args[-1].contents.text = text[:255]
                raise
        return Guard(call, _IO)

    @staticmethod
    def keys(keys: Any, n: int) -> List[bytes]:
        return [bytes(key.bytes) for key in keys[:n]]

    def get(self, keys: Any, n: int, receiver: Any, error: Any) -> None:
        to = receiver.contents
        for i, key in enumerate(self.keys(keys, n)):
            value = self.mapping.get(key)
            if value is None:
                continue
            data = _bytes.contents(value, "value")
            address = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p)
            if to.part(to.user, i, len(data), 0, address, len(data)) == _lib.STORE_STOP:
                return

    def put(self, keys: Any, values: Any, n: int, n_put: Any, error: Any) -> None:
        n_put[0] = 0
        for i, key in enumerate(self.keys(keys, n)):
            value = values[i]
            self.mapping[key] = b"".join(copied(part.data, part.bytes)
                                         for part in value.parts[:value.n_parts])
            n_put[0] = i + 1

    def exists(self, keys: Any, n: int, found: Any, error: Any) -> None:
        for i, key in enumerate(self.keys(keys, n)):
            found[i] = key in self.mapping

    def remove(self, keys: Any, n: int, error: Any) -> None:
        for key in self.keys(keys, n):
            self.mapping.pop(key, None)

    def list(self, on_entry: Any, user: Any, error: Any) -> None:
        for key in list(self.mapping):
            value = self.mapping.get(key)
            if len(key) != _lib.STORE_KEY_BYTES or value is None:
                continue
            entry = _lib.StoreEntry(bytes=len(value), used_seconds=-1, left_seconds=-1)
            entry.key.bytes[:] = key
            if on_entry(user, byref(entry)):
                return


class Store(Handle):
    """A store of prefixes, which threads, processes and machines share: `Store.directory`,
    `Store.redis`, `Store.tiers`, `Store.mapping`.

    `Sequence.prefix_put` puts a prompt's blocks there, `Sequence.prefix_get` takes the longest
    prefix that is there. Values are verified before anything of them is used. A store that fails
    costs an exception and a recompute.

    Threads: all calls on it may run at the same time, but close(): BusyError while one runs.
    """

    _kind = "store"

    def __init__(self, _c: "_lib.Store", _keep: Any = None) -> None:
        self._users = set()
        self._lock = threading.RLock()
        self._c = _c
        self._keep = _keep  # what its functions need
        self._pointer = ctypes.addressof(_c)

    @classmethod
    def _open(cls, function: Callable[..., int], config: Any) -> "Store":
        text = ctypes.create_string_buffer(1024)
        config.struct_size = sizeof(config)
        config.error_text = ctypes.cast(text, ctypes.c_char_p)
        config.error_text_bytes = len(text)
        made = cls(_lib.Store())
        status = function(byref(config), byref(made._c))
        if status:
            throw(status, text.value.decode("utf-8", "replace") or _lib.error_of(None, status))
        return made

    @classmethod
    def directory(cls, path: PathLike, *, max_bytes: int = 0, sync: bool = False) -> "Store":
        """A directory, for any number of processes on one machine; it is made, not its parents.

        max_bytes: of all values; 0: no bound, or the one that it has. The values that were used the
            longest time ago are removed for new ones
        sync: a put waits for the disk

        IoError, FormatError (another program's), UnsupportedError.
        """
        return cls._open(lib.kvt_store_open_directory, _lib.DirectoryConfig(
            path=_bytes.path(path, "path"), max_bytes=_whole(max_bytes, "max_bytes", 64),
            sync=bool(sync)))

    @classmethod
    def redis(cls, host: Optional[str] = None, port: int = 0, *,
              unix_path: Optional[PathLike] = None, database: int = 0,
              username: Optional[str] = None, password: Optional[str] = None, tls: bool = False,
              tls_ca_file: Optional[PathLike] = None, tls_cert_file: Optional[PathLike] = None,
              tls_key_file: Optional[PathLike] = None, ttl_seconds: int = 0,
              connect_timeout_ms: int = 0, timeout_ms: int = 0, call_timeout_ms: int = 0,
              retry_ms: int = 0, pipeline: int = 0, prefix: Optional[str] = None) -> "Store":
        """A Redis or Valkey server, or a cluster of them; it is connected to when it is needed.

        host, port: None, 0: 127.0.0.1, 6379; of a cluster any node. unix_path: in their place
        ttl_seconds: values expire so long after they were put, got or asked for last; 0: never
        connect_timeout_ms, timeout_ms (of silence), call_timeout_ms, retry_ms (calls fail at once
            for so long after a failed connection), pipeline, prefix: None, 0: store.h's defaults
        tls: the server's certificate and its host's name are verified; with it, files in PEM:
            tls_ca_file: certificates that are trusted; None: the system's
            tls_cert_file, tls_key_file: the client's, where the server wants one; or None

        IoError: a file for TLS cannot be read. ArgError: it has no certificate or key.
        UnsupportedError: the library was built without hiredis, or without OpenSSL and tls is set.
        """
        whole = {name: _whole(value, name, 32) for name, value in (
            ("port", port), ("database", database), ("ttl_seconds", ttl_seconds),
            ("connect_timeout_ms", connect_timeout_ms), ("timeout_ms", timeout_ms),
            ("call_timeout_ms", call_timeout_ms), ("retry_ms", retry_ms), ("pipeline", pipeline))}
        paths = {name: _bytes.path_or_none(path, name) for name, path in (
            ("unix_path", unix_path), ("tls_ca_file", tls_ca_file),
            ("tls_cert_file", tls_cert_file), ("tls_key_file", tls_key_file))}
        texts = {name: _bytes.text_or_none(text, name) for name, text in (
            ("host", host), ("username", username), ("password", password), ("prefix", prefix))}
        return cls._open(lib.kvt_store_open_redis, _lib.RedisConfig(
            tls=bool(tls), **whole, **paths, **texts))

    @classmethod
    def tiers(cls, near: "Store", far: "Store") -> "Store":
        """Two as one: what near lacks comes from far, and is put into near on the way.

        It takes both over: they are closed, and with it what they were. BusyError, and both stay
        as they are, while a call on one of them runs.
        """
        if near is far:
            raise ValueError("tiers: one store as both")
        made = cls(_lib.Store(), (near._c, near._keep, far._c, far._keep))  # _c: its callbacks
        pointer, made._pointer = made._pointer, None
        use = object()
        giving = map(set.discard, (near._users, far._users), repeat(use))
        try:
            try:
                status = lib.kvt_store_open_tiers(near._take(use, True), far._take(use, True),
                                                  byref(made._c))
                if status:
                    throw(status, _lib.error_of(None, status))
                return made
            finally:
                if made._c.struct_size:  # a signal's handler may have raised after it
                    near._pointer, far._pointer, made._pointer = None, None, pointer
        finally:
            any(giving)

    @classmethod
    def mapping(cls, mapping: MutableMapping[bytes, Any]) -> "Store":
        """A mapping of keys (32 bytes) to values (bytes): a dict, a MutableMapping of yours.

        Its get, __setitem__, __contains__, pop, and for `entries` its iterator, are called by
        whichever thread uses the store. What they raise is raised by the call that needed them;
        where the cache's threads call them, as a far tier of a directory's, IoError with its text.
        Ctrl-C, and what handlers of other signals raise, is raised in any case.
        """
        c = _lib.Store(struct_size=sizeof(_lib.Store))
        return cls(c, _Mapping(mapping, c))

    def __del__(self, close: Callable[..., None] = lib.kvt_store_close) -> None:
        pointer, self._pointer = getattr(self, "_pointer", None), None
        if pointer:
            close(pointer)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, kind: Optional[Class[BaseException]], *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<kvtile.Store{', closed' if self.closed else ''}>"

    def close(self) -> None:
        """Close it. BusyError: a call runs."""
        pointer = None
        try:
            with self._lock:
                if self._users:
                    raise BusyError("the store is in use by another call")
                pointer, self._pointer = self._pointer, None
        finally:
            lib.kvt_store_close(pointer)

    def _call(self, running: Call, name: str, *args: Any) -> None:
        use, give = object(), self._users.discard
        try:
            self._take(use)
            function = getattr(self._c, name)
            if not function:
                raise UnsupportedError(f"the store has no {name}")
            error = _lib.StoreError()

            def call() -> None:
                status = function(self._c.user, *args, byref(error))
                if status:
                    throw(status, error.text.decode("utf-8", "replace")
                          or _lib.error_of(None, status))
            running.run(call)
        finally:
            give(use)

    def stats(self) -> StoreStats:
        """What it has and has done. UnsupportedError: it does not count. IoError."""
        c = _lib.StoreStats()
        self._call(Call(), "stats", byref(c))
        values = (getattr(c, name) for name in StoreStats._fields)
        return StoreStats(*(None if value == _UNKNOWN else value for value in values))

    def collect(self) -> None:
        """Remove what dead processes have left, count anew, keep the bound. UnsupportedError."""
        self._call(Call(), "collect")

    def entries(self) -> List[StoreEntry]:
        """All its values. UnsupportedError: it cannot list them. IoError."""
        found: List[StoreEntry] = []

        def take(_: Any, entry: Any) -> int:
            e = entry.contents
            found.append(StoreEntry(bytes(e.key.bytes), None if e.bytes == _UNKNOWN else e.bytes,
                                    None if e.used_seconds < 0 else e.used_seconds,
                                    None if e.left_seconds < 0 else e.left_seconds))
            return 0

        call = Call()
        self._call(call, "list", _lib.STORE_ON_ENTRY(call.guarded(take, 1)), None)
        return found


class _Options:
    """kvt_prefix_options, with what they point to."""

    def __init__(self, *, namespace: bytes = b"", salt: bytes = b"",
                 extras: Optional[Mapping[int, bytes]] = None, n_tokens: int = 0,
                 positions: Any = None, checkpoints: Union[bool, Iterable[int]] = False) -> None:
        namespace, salt = _bytes.contents(namespace, "namespace"), _bytes.contents(salt, "salt")
        c = self.c = _lib.PrefixOptions(
            struct_size=sizeof(_lib.PrefixOptions), name_space=namespace or None,
            name_space_bytes=len(namespace), salt=salt or None, salt_bytes=len(salt),
            n_tokens=_whole(n_tokens, "n_tokens", 64))
        if extras:
            array = (_lib.PrefixExtra * len(extras))()
            for extra, block in zip(array, sorted(extras)):
                data = _bytes.contents(extras[block], f"extras[{block}]")
                extra.block = _whole(block, "extras", 64)
                extra.data, extra.bytes = data, len(data)
            c.extras, c.n_extras = array, len(extras)
        if positions is not None:
            self.positions = positions
            c.positions = positions.ctypes.data
        if not isinstance(checkpoints, bool):
            lengths = sorted(_whole(x, "checkpoints", 64) for x in checkpoints)
            self.lengths = (c_uint64 * max(len(lengths), 1))(*lengths)  # NULL would be any length
            c.checkpoints = 1
            c.checkpoint_tokens, c.n_checkpoint_tokens = self.lengths, len(lengths)
        else:
            c.checkpoints = checkpoints


def _result(c: "_lib.PrefixResult") -> PrefixResult:
    return PrefixResult(*(getattr(c, name) for name in PrefixResult._fields))


def prefix_put(seq: "Sequence", store: Store, options: Mapping[str, Any]) -> PrefixResult:
    """`Sequence.prefix_put`."""
    o = _Options(**options)
    result = _lib.PrefixResult()
    use, give = object(), store._users.discard
    try:
        pointer = store._take(use)
        Call().run(seq._read, lambda s: lib.kvt_prefix_put(pointer, s, byref(o.c), byref(result)))
    finally:
        give(use)
    return _result(result)


def prefix_find(seq: "Sequence", store: Store, prompt: Any, read: bool, positions: Any,
                options: Mapping[str, Any]) -> PrefixResult:
    """`Sequence.prefix_get`, or, where read is false, `Sequence.prefix_probe`."""
    ids = int32s(prompt, "prompt")
    if positions is not None:
        positions = int32s(positions, "positions", len(ids))
    o = _Options(positions=positions, **options)
    result = _lib.PrefixResult()
    function = lib.kvt_prefix_get if read else lib.kvt_prefix_probe
    use, give = object(), store._users.discard
    try:
        pointer = store._take(use)
        Call().run(seq._write if read else seq._read, lambda s: function(
            pointer, s, ids.ctypes.data, len(ids), byref(o.c), byref(result)))
    finally:
        give(use)
    return _result(result)


def value_check(data: Any, key: Optional[bytes] = None) -> ValueInfo:
    """Check a value as a store has it: that it is one, is that of the key, and is sound.

    data: bytes, or a buffer. key: its 32 bytes; None: of any

    FormatError, CorruptError, MismatchError (of another key).
    """
    view = memoryview(data).cast("B")
    memory = bytes(view)
    c_key = None
    if key is not None:
        if len(key) != _lib.STORE_KEY_BYTES:
            raise ValueError(f"key: {len(key)} bytes, needs {_lib.STORE_KEY_BYTES}")
        c_key = byref(_lib.StoreKey((ctypes.c_uint8 * _lib.STORE_KEY_BYTES)(*key)))
    info = _lib.ValueInfo(struct_size=sizeof(_lib.ValueInfo))
    text = ctypes.create_string_buffer(1024)
    status = lib.kvt_value_check(c_key, memory, len(memory), byref(info), text, len(text))
    if status:
        throw(status, text.value.decode("utf-8", "replace") or _lib.error_of(None, status))
    return ValueInfo(info.version, bool(info.checkpoint), info.n_tokens, info.n_blocks,
                     info.blob_bytes)
