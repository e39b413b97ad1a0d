"""Snapshots: files, streams, memory, and what is in them."""

from __future__ import annotations

import ctypes
import os
from ctypes import byref, c_size_t, c_uint32, c_uint64, sizeof
from dataclasses import dataclass, field
from typing import (TYPE_CHECKING, Any, BinaryIO, Callable, Dict, List, Mapping, Optional, Tuple,
                    Union)

import numpy as np

from . import _bytes, _lib
from ._bytes import PathLike, copied
from ._callback import Call
from ._config import Group, GroupFlag, Type, TypeLike, _whole, as_type
from ._errors import FullError, throw
from ._lib import lib
from ._tensor import int32s

if TYPE_CHECKING:
    from ._sequence import Sequence

File = Union[PathLike, int, BinaryIO]
Progress = Callable[[int, int], Any]
TypePair = Tuple[Optional[TypeLike], Optional[TypeLike]]
Types = Union[TypeLike, TypePair, "List[Union[TypeLike, TypePair]]"]

KEY_BYTES = 32
"""Of a key for encrypted snapshots."""

_CODECS = {"auto": 0, "raw": 1, "zstd": 2}
_REUSE = {"all": 0, "prefix": 1, "checkpoint": 2}
_MAP = {None: 0, "verify": 1, "lazy": 2}


@dataclass(frozen=True)
class LoadResult:
    """n_tokens: restored; with a prompt: truncate to reuse_tokens, compute the rest of the prompt.

    checkpoint_tokens: the last checkpoint at or before reuse, None where there is none.
    mapped_bytes: of blocks that lie in the file. pieces: the caller's, by name.
    """

    n_tokens: int
    prefix_tokens: int
    reuse_tokens: int
    checkpoint_tokens: Optional[int]
    mapped_bytes: int = 0
    pieces: Dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class SnapshotInfo:
    """What `inspect` knows of a file; fields as in kvt_snapshot_info.

    Where it has not read the file to its end (verify=False), counts of the contents are 0,
    snapshot_id is None and there are no pieces. parent_id, parent_name: None where it is no delta.
    """

    version: int
    groups: Tuple[Group, ...]
    fingerprint: bytes
    tag: bytes
    next_position: Optional[int]
    n_tokens: int
    n_blocks: int
    n_open_blocks: int
    n_checkpoints: int
    file_bytes: int
    stored_bytes: int
    native_bytes: int
    n_elements: int
    snapshot_id: Optional[bytes]
    parent_id: Optional[bytes]
    parent_name: Optional[str]
    depth: int
    encrypted: bool
    inherited_tokens: int
    inherited_blocks: int
    native_blocks: int
    n_pieces: int
    n_layers: int
    layer_groups: Tuple[int, ...]
    pieces: Dict[str, bytes]


def _progress(call: Call, function: Optional[Progress]) -> Any:
    if function is None:
        return _lib.PROGRESS()
    return _lib.PROGRESS(call.guarded(
        lambda _, done, total: 1 if function(done, total) else 0, 1))


def _on_piece(call: Call, found: Optional[Dict[str, bytes]]) -> Any:
    if found is None:
        return _lib.ON_PIECE()

    def take(_: Any, piece: Any) -> int:
        p = piece.contents
        found[_bytes.piece_text(p.name)] = copied(p.data, p.bytes)
        return 0

    return _lib.ON_PIECE(call.guarded(take, 1))


def _chosen(value: Any, known: Mapping[Any, int], name: str) -> int:
    try:
        return known[value]
    except (KeyError, TypeError):
        names = ", ".join(repr(x) for x in known)
        raise ValueError(f"{name}: {value!r} is not one of {names}") from None


def _key(call: Call, key: Any) -> Any:
    if key is None:
        return None
    view = memoryview(key).cast("B")
    if len(view) != KEY_BYTES:
        raise ValueError(f"key: {len(view)} bytes, needs {KEY_BYTES}")
    return call.key(view)


def _address(memory: Any, name: str, writable: bool = False) -> Tuple[Any, int, int]:
    """(owner, address, bytes) of a buffer, which is not copied."""
    view = memoryview(memory)
    if writable and view.readonly:
        raise ValueError(f"{name}: read-only")
    if not view.contiguous:
        raise ValueError(f"{name}: not contiguous")
    if not view.nbytes:
        empty = ctypes.create_string_buffer(1)
        return empty, ctypes.addressof(empty), 0
    array = np.frombuffer(view, np.uint8)
    return array, array.ctypes.data, view.nbytes


def _layer_numbers(layers: Any) -> Any:
    return (c_uint32 * max(len(layers), 1))(*[_whole(x, "layers", 32) for x in layers])


def _pair(types: Any) -> TypePair:
    if isinstance(types, tuple):
        if len(types) != 2:
            raise ValueError(f"types: {len(types)} of a pair (K, V)")
        return types[0], types[1]
    return types, types


def _types(types: Any, n_groups: Optional[int]) -> List[Any]:
    """k_types and v_types as arrays, NULL for a side that is not converted."""
    if isinstance(types, list):
        pairs = [_pair(x) for x in types]
        if n_groups is not None and len(pairs) != n_groups:
            raise ValueError(f"types: {len(pairs)} for {n_groups} groups")
    else:
        pairs = [_pair(types)]  # one for all groups
    sides: List[Any] = []
    for side in range(2):
        column = [pair[side] for pair in pairs]
        if all(x is None for x in column):
            sides.append(None)
        elif any(x is None for x in column):
            raise ValueError("types: None for some groups of a side and not for others")
        else:
            sides.append((ctypes.c_int * len(column))(
                *[as_type(x, "types") for x in column]))  # type: ignore
    if sides == [None, None]:
        raise ValueError("types: None for both sides")
    return sides


class _Save:
    """kvt_save_options, with what they point to."""

    def __init__(self, n_groups: Optional[int], call: Call, *, codec: str = "auto",
                 level: int = 0, fsync: bool = True, in_place: bool = False,
                 tokens: Optional[range] = None, layers: Any = None, types: Optional[Types] = None,
                 parent: Optional[PathLike] = None,
                 pieces: Optional[Mapping[str, Any]] = None, key: Any = None,
                 progress: Optional[Progress] = None) -> None:
        if not -7 <= level <= 19:
            raise ValueError(f"level: {level} is not -7 to 19")
        self.keep: List[Any] = []
        c = self.c = _lib.SaveOptions(
            struct_size=sizeof(_lib.SaveOptions), codec=_chosen(codec, _CODECS, "codec"),
            no_fsync=not fsync, zstd_level=level, in_place=in_place,
            progress=_progress(call, progress))
        if tokens is not None:
            if not isinstance(tokens, range) or tokens.step != 1 or not tokens:
                raise ValueError(f"tokens: {tokens!r} is no range of step 1 that is not empty")
            c.first_token = _whole(tokens.start, "tokens", 64)
            c.n_tokens = len(tokens)
        if layers is not None:
            c.layers, c.n_layers = _layer_numbers(layers), len(layers)
        if types is not None:
            c.convert = 1
            self.k_types, self.v_types = _types(types, n_groups)
            for name in ("k_types", "v_types"):
                if getattr(self, name) is not None:
                    setattr(c, name, ctypes.addressof(getattr(self, name)))
                    c.n_types = len(getattr(self, name))
        if parent is not None:
            c.parent = _bytes.path(parent, "parent")
        if pieces:
            array = (_lib.SnapshotPiece * len(pieces))()
            for piece, (name, data) in zip(array, pieces.items()):
                owner, piece.data, piece.bytes = _address(data, f"pieces[{name!r}]")
                piece.name = _bytes.piece_name(name, f"pieces[{name!r}]")
                self.keep.append(owner)
            c.pieces, c.n_pieces = array, len(pieces)
        self.key = _key(call, key)
        if self.key is not None:
            c.key = ctypes.addressof(self.key)


class _Load:
    """kvt_load_options, with what they point to; `found` takes the pieces."""

    def __init__(self, call: Call, *, prompt: Any = None, reuse: str = "all",
                 map: Optional[str] = None, convert: bool = False, layers: Any = None,
                 folder: Optional[PathLike] = None, key: Any = None, pieces: bool = True,
                 progress: Optional[Progress] = None) -> None:
        self.found: Dict[str, bytes] = {}
        c = self.c = _lib.LoadOptions(
            struct_size=sizeof(_lib.LoadOptions), reuse=_chosen(reuse, _REUSE, "reuse"),
            map=_chosen(map, _MAP, "map"), convert=bool(convert),
            on_piece=_on_piece(call, self.found if pieces else None),
            progress=_progress(call, progress))
        self.ids = None if prompt is None else int32s(prompt, "prompt")
        if self.ids is not None:
            c.prompt, c.n_prompt = self.ids.ctypes.data, len(self.ids)
        if layers is not None:
            c.layers, c.n_layers = _layer_numbers(layers), len(layers)
        c.folder = _bytes.path_or_none(folder, "folder")
        self.key = _key(call, key)
        if self.key is not None:
            c.key = ctypes.addressof(self.key)

    def result(self, c: "_lib.LoadResult") -> LoadResult:
        at = c.checkpoint_tokens
        return LoadResult(c.n_tokens, c.prefix_tokens, c.reuse_tokens,
                          None if at == 2**64 - 1 else at, c.mapped_bytes, self.found)


def _is_fd(file: Any) -> bool:
    return isinstance(file, (int, np.integer)) and not isinstance(file, bool)


def _fd(fd: int) -> int:
    if not 0 <= fd < 2**31:
        raise ValueError(f"file descriptor {fd}")
    return int(fd)


_WRITE_BYTES = 1 << 20


def _taker(write: Callable[[Any], Any]) -> Callable[[Any, int, int], int]:
    """What C writes to. The file may keep what it is given, so that gets copies, of parts."""
    def take(_: Any, data: int, size: int) -> int:
        for at in range(0, size, _WRITE_BYTES):
            piece = memoryview(copied(data + at, min(size - at, _WRITE_BYTES)))
            while piece:  # a raw file may take a part
                n = write(piece)
                if not n:
                    raise OSError("the file takes no more bytes")
                piece = piece[n:]
        return 0
    return take


def save(seq: "Sequence", file: File, options: Mapping[str, Any]) -> None:
    """`Sequence.save`."""
    with Call() as call:
        o = _Save(len(seq.cache.groups), call, **options)
        if _is_fd(file):
            call.run(seq._read, lib.kvt_seq_save_fd, _fd(file), byref(o.c))  # type: ignore
        elif not hasattr(file, "write"):
            path = _bytes.path(file, "file")  # type: ignore
            call.run(seq._read, lib.kvt_seq_save, path, byref(o.c))
        else:
            take = _taker(file.write)  # type: ignore
            writer = _lib.Writer(None, _lib.WRITE(call.guarded(take, 1)))
            call.run(seq._read, lib.kvt_seq_save_stream, byref(writer), byref(o.c))


def save_bound(seq: "Sequence", options: Mapping[str, Any]) -> int:
    """`Sequence.save_bound`."""
    with Call() as call:
        o = _Save(len(seq.cache.groups), call, **options)
        bound = c_uint64()
        seq._read(lib.kvt_seq_save_bound, byref(bound), byref(o.c))
        return bound.value


def save_into(seq: "Sequence", memory: Any, options: Mapping[str, Any]) -> int:
    """`Sequence.save_into`."""
    owner, address, room = _address(memory, "memory", True)
    with Call() as call:
        o = _Save(len(seq.cache.groups), call, **options)
        size = c_size_t()
        call.run(seq._read, lib.kvt_seq_save_memory, address, room, byref(size), byref(o.c))
    del owner
    return size.value


def save_bytes(seq: "Sequence", options: Mapping[str, Any]) -> bytes:
    """`Sequence.save_bytes`."""
    bound = save_bound(seq, options)
    while True:
        # The bound is address space until it is written to.
        memory = np.empty(bound, np.uint8)
        try:
            return memory[:save_into(seq, memory, options)].tobytes()
        except FullError:  # another thread has appended meanwhile
            before, bound = bound, save_bound(seq, options)
            if bound <= before:
                raise


def load(seq: "Sequence", file: File, options: Mapping[str, Any]) -> LoadResult:
    """`Sequence.load`."""
    result = _lib.LoadResult()
    with Call() as call:
        o = _Load(call, **options)
        if _is_fd(file):
            call.run(seq._write, lib.kvt_seq_load_fd, _fd(file), byref(o.c),  # type: ignore
                     byref(result))
        elif not hasattr(file, "read"):
            path = _bytes.path(file, "file")  # type: ignore
            call.run(seq._write, lib.kvt_seq_load, path, byref(o.c), byref(result))
        else:
            read = file.read  # type: ignore

            def give(_: Any, data: int, size: int) -> int:
                piece = _bytes.contents(read(size), "read")
                if len(piece) > size:
                    raise OSError("the file gives more bytes than it is asked for")
                ctypes.memmove(data, piece, len(piece))
                return len(piece)

            reader = _lib.Reader(None, _lib.READ(call.guarded(give, -1)))
            call.run(seq._write, lib.kvt_seq_load_stream, byref(reader), byref(o.c),
                     byref(result))
    return o.result(result)


def load_bytes(seq: "Sequence", data: Any, options: Mapping[str, Any]) -> LoadResult:
    """`Sequence.load_bytes`."""
    owner, address, size = _address(data, "data")
    result = _lib.LoadResult()
    with Call() as call:
        o = _Load(call, **options)
        call.run(seq._write, lib.kvt_seq_load_memory, address, size, byref(o.c), byref(result))
    del owner
    return o.result(result)


def _check(status: int, text: Any) -> None:
    if status:
        throw(status, text.value.decode("utf-8", "replace") or _lib.error_of(None, status))


def inspect(path: PathLike, verify: bool = False, *, folder: Optional[PathLike] = None,
            key: Any = None, progress: Optional[Progress] = None) -> SnapshotInfo:
    """Describe a snapshot without a cache; verify: read it to its end and check all.

    folder: where the parents of a delta are, None: beside it. key: of an encrypted one.
    progress: see `Sequence.load`.

    IoError, FormatError, CorruptError, OutOfMemoryError; MismatchError: another key, another parent.
    """
    c = _lib.SnapshotInfo(struct_size=sizeof(_lib.SnapshotInfo))
    text = ctypes.create_string_buffer(1024)
    pieces: Dict[str, bytes] = {}
    file = _bytes.path(path, "path")
    with Call() as call:
        secret = _key(call, key)
        options = _lib.InspectOptions(
            struct_size=sizeof(_lib.InspectOptions), verify=bool(verify),
            folder=_bytes.path_or_none(folder, "folder"),
            key=None if secret is None else ctypes.addressof(secret),
            on_piece=_on_piece(call, pieces), progress=_progress(call, progress))
        call.run(lambda: _check(lib.kvt_snapshot_inspect_with(
            file, byref(options), byref(c), text, len(text)), text))
    of_layers = tuple(c.layer_groups[:c.n_layers])
    groups = tuple(
        Group(n_layers=g.n_layers, n_q_heads=g.n_q_heads, n_kv_heads=g.n_kv_heads, k_dim=g.k_dim,
              v_dim=g.v_dim, k_type=Type(g.k_type), v_type=Type(g.v_type), flags=GroupFlag(g.flags),
              layers=tuple(i for i, x in enumerate(of_layers) if x == number)
              if c.n_groups > 1 else None,
              rotation_seed=g.rotation_seed, window_tokens=g.window_tokens,
              sink_tokens=g.sink_tokens)
        for number, g in enumerate(c.groups[:c.n_groups]))
    return SnapshotInfo(
        version=c.version, groups=groups, fingerprint=bytes(c.fingerprint[:c.fingerprint_bytes]),
        tag=bytes(c.tag[:c.tag_bytes]),
        next_position=None if c.next_position < 0 else c.next_position,
        snapshot_id=bytes(c.snapshot_id) if verify else None,
        parent_id=bytes(c.parent_id) if c.depth else None,
        parent_name=os.fsdecode(c.parent_name) if c.depth else None, encrypted=bool(c.encrypted),
        layer_groups=of_layers, pieces=pieces,
        **{name: getattr(c, name) for name in
           ("n_tokens", "n_blocks", "n_open_blocks", "n_checkpoints", "file_bytes", "stored_bytes",
            "native_bytes", "n_elements", "depth", "inherited_tokens", "inherited_blocks",
            "native_blocks", "n_pieces", "n_layers")})


def convert(source: PathLike, target: PathLike, *, source_key: Any = None,
            folder: Optional[PathLike] = None, progress: Optional[Progress] = None,
            **options: Any) -> None:
    """Save a snapshot anew: other codec or types, a part of it, a chain of deltas as one file.

    source_key: where the source, with its parents, is encrypted. folder: where these are
    progress: told of the reading first, then of the writing
    options: those of `Sequence.save`. types, tokens and layers are of the source; key is the
        target's, None: it is not encrypted; pieces come beside those of the source

    Errors as `Sequence.load` and `Sequence.save`. On any of them the target is as it was; with
    in_place=True it may be a part of the new file, which loading refuses.
    """
    from_file, to_file = _bytes.path(source, "source"), _bytes.path(target, "target")
    n_groups = None
    if isinstance(options.get("types"), list):
        n_groups = len(inspect(source, folder=folder, key=source_key).groups)
    text = ctypes.create_string_buffer(1024)
    with Call() as call:
        reads = _Load(call, folder=folder, key=source_key, pieces=False, progress=progress)
        writes = _Save(n_groups, call, progress=progress, **options)
        call.run(lambda: _check(lib.kvt_snapshot_convert(
            from_file, byref(reads.c), to_file, byref(writes.c), text, len(text)), text))
