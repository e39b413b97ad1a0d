"""Snapshots: files, streams and what is in them."""

from __future__ import annotations

import ctypes
import os
from ctypes import byref, sizeof
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, List, Optional, Tuple, Union

from . import _lib
from ._config import Group, GroupFlag, Type
from ._errors import throw
from ._lib import lib
from ._tensor import int32s

if TYPE_CHECKING:
    from ._sequence import Sequence

PathLike = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]


@dataclass(frozen=True)
class LoadResult:
    """n_tokens: restored; with a prompt: truncate to reuse_tokens, compute the rest of the prompt.

    checkpoint_tokens: the last checkpoint at or before reuse, None where there is none.
    """

    n_tokens: int
    prefix_tokens: int
    reuse_tokens: int
    checkpoint_tokens: Optional[int]


@dataclass(frozen=True)
class SnapshotInfo:
    """What `inspect` knows of a file; fields as in kvt_snapshot_info.

    Where it has not read the file to its end (verify=False), counts of the contents are 0.
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


def save(seq: "Sequence", file: Union[PathLike, BinaryIO], compress: bool, zstd_level: int,
         fsync: bool, in_place: bool) -> None:
    """`Sequence.save`."""
    if not -7 <= zstd_level <= 19:
        raise ValueError(f"zstd_level: {zstd_level} is not -7 to 19")
    options = _lib.SaveOptions(sizeof(_lib.SaveOptions), 0 if compress else 1, not fsync,
                               zstd_level, in_place)
    if not hasattr(file, "write"):
        seq._read(lib.kvt_seq_save, os.fsencode(file), byref(options))  # type: ignore
        return
    write = file.write  # type: ignore
    failure: List[BaseException] = []

    def take(_: Any, data: int, size: int) -> int:
        try:
            piece = memoryview(ctypes.string_at(data, size))
            while piece:  # a raw file may take a part
                n = write(piece)
                if not n:
                    raise OSError("the file takes no more bytes")
                piece = piece[n:]
            return 0
        except BaseException as error:
            failure.append(error)
            return 1

    writer = _lib.Writer(None, _lib.WRITE(take))
    try:
        seq._read(lib.kvt_seq_save_stream, byref(writer), byref(options))
    except Exception:
        if failure:
            raise failure[0]
        raise


def load(seq: "Sequence", file: Union[PathLike, BinaryIO], prompt: Any) -> LoadResult:
    """`Sequence.load`."""
    ids = None if prompt is None else int32s(prompt, "prompt")
    options = _lib.LoadOptions(sizeof(_lib.LoadOptions), None, 0)
    if ids is not None:
        options.prompt, options.n_prompt = ids.ctypes.data, len(ids)
    result = _lib.LoadResult()
    if not hasattr(file, "read"):
        seq._write(lib.kvt_seq_load, os.fsencode(file), byref(options),  # type: ignore
                    byref(result))
    else:
        read = file.read  # type: ignore
        failure: List[BaseException] = []

        def give(_: Any, data: int, size: int) -> int:
            try:
                piece = read(size)
                if len(piece) > size:
                    raise OSError("the file gives more bytes than it is asked for")
                ctypes.memmove(data, bytes(piece), len(piece))
                return len(piece)
            except BaseException as error:
                failure.append(error)
                return -1

        reader = _lib.Reader(None, _lib.READ(give))
        try:
            seq._write(lib.kvt_seq_load_stream, byref(reader), byref(options), byref(result))
        except Exception:
            if failure:
                raise failure[0]
            raise
    at = result.checkpoint_tokens
    return LoadResult(result.n_tokens, result.prefix_tokens, result.reuse_tokens,
                      None if at == 2**64 - 1 else at)


def inspect(path: PathLike, verify: bool = False) -> SnapshotInfo:
    """Describe a snapshot without a cache; verify: read it to its end and check all.

    IoError, FormatError, CorruptError, OutOfMemoryError.
    """
    c = _lib.SnapshotInfo(struct_size=sizeof(_lib.SnapshotInfo))
    text = ctypes.create_string_buffer(1024)
    status = lib.kvt_snapshot_inspect(os.fsencode(path), verify, byref(c), text, len(text))
    if status:
        throw(status, text.value.decode("utf-8", "replace") or _lib.error_of(None, status))
    groups = tuple(
        Group(n_layers=g.n_layers, n_q_heads=g.n_q_heads, n_kv_heads=g.n_kv_heads, k_dim=g.k_dim,
              v_dim=g.v_dim, k_type=Type(g.k_type), v_type=Type(g.v_type), flags=GroupFlag(g.flags),
              rotation_seed=g.rotation_seed, window_tokens=g.window_tokens,
              sink_tokens=g.sink_tokens)
        for g in c.groups[:c.n_groups])
    return SnapshotInfo(
        version=c.version, groups=groups, fingerprint=bytes(c.fingerprint[:c.fingerprint_bytes]),
        tag=bytes(c.tag[:c.tag_bytes]),
        next_position=None if c.next_position < 0 else c.next_position,
        **{name: getattr(c, name) for name in
           ("n_tokens", "n_blocks", "n_open_blocks", "n_checkpoints", "file_bytes", "stored_bytes",
            "native_bytes", "n_elements")})
