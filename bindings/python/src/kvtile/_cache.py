"""Cache and Sequence.

Who uses an object is counted under a lock of the cache: calls that only read a sequence may
overlap, any other call is alone on it, and close() needs that no call runs. What the C library
leaves undefined is BusyError or ClosedError here, never a crash.
"""

from __future__ import annotations

import ctypes
import io
import os
import struct
import sys
import threading
import weakref
from ctypes import byref, c_size_t, c_uint64, c_void_p, sizeof
from dataclasses import dataclass
from typing import (Any, BinaryIO, Callable, Dict, List, Optional, Sequence as Seq, Tuple,
                    Type as Class, Union)

import numpy as np

from . import _lib
from ._config import ConfigC, Group, GroupFlag, Precision, Type, _whole
from ._errors import BusyError, ClosedError, StateError, throw
from ._lib import lib
from ._tensor import F16, F32, SIZES, _dense, describe, floats, int32s, rows, span

PathLike = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]

# ---- the structs of the calls of a decode step, packed at once ----

_TENSORS = struct.Struct("PiqqPiqq")
_ATTEND = struct.Struct("NIIPNPiqqPiqqPffPPI0P")
_ITEM = struct.Struct("PQPPNQQQ")
_SCRATCH_ITEMS = 64
assert _TENSORS.size == 2 * sizeof(_lib.Tensor) and _ITEM.size == sizeof(_lib.AttendItem)
assert _ATTEND.size == sizeof(_lib.AttendArgs)


def _make_scratch(n_items: int) -> Tuple[Any, int]:
    memory = ctypes.create_string_buffer(_ATTEND.size + n_items * _ITEM.size)
    return memory, ctypes.addressof(memory)


# Buffers for the structs of calls that are not running: list.pop and append are atomic.
_scratch: List[Tuple[Any, int]] = []

_length, _pending = lib.kvt_seq_length, lib.kvt_seq_pending
_attend, _append = lib.kvt_attend, lib.kvt_append


# ---- results ----


@dataclass(frozen=True)
class CacheStats:
    """What a cache's memory is used for; fields as in kvt_cache_stats."""

    bytes: int
    blocks_free: int
    blocks_reserved: int
    blocks_used: int
    blocks_shared: int
    blocks_sealed: int
    bytes_free: int
    bytes_reserved: int
    bytes_used: int
    bytes_shared: int


@dataclass(frozen=True)
class SequenceStats:
    """own_bytes: that only this sequence has. shared_bytes: that others have as well."""

    own_bytes: int
    shared_bytes: int


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


# ---- handles ----


class _Handle:
    """A pointer of the library, and who uses it: users > 0 readers, -1 a writer."""

    _kind = ""
    _lock: Any

    def _take(self, write: bool = False) -> int:
        with self._lock:
            pointer = self._pointer
            if pointer is None:
                raise ClosedError(f"the {self._kind} is closed")
            if self._users and (write or self._users < 0):
                raise BusyError(f"the {self._kind} is in use by another call")
            self._users = -1 if write else self._users + 1
            return pointer

    def _give(self) -> None:
        with self._lock:
            self._users = 0 if self._users < 0 else self._users - 1

    _pointer: Optional[int]
    _users: int

    @property
    def closed(self) -> bool:
        return self._pointer is None


class Cache(_Handle):
    """A cache: geometry, storage types, limits. Sequences of it hold the tokens.

    groups: a Group or several, whose layers are numbered from 0 on, each once
    max_tokens: of one sequence
    n_threads: of one call, the caller's included; they are the cache's own
    memory_budget_bytes: of what the cache keeps; 0: no bound
    fingerprint: up to 64 bytes that identify the model's weights; in snapshots
    isa: a name of `isa_names`; None: the widest

    ArgError, LimitError, UnsupportedError, OutOfMemoryError, BudgetError.

    Threads: calls on different sequences of one cache may run at the same time, and long ones run
    without the interpreter's lock. One-call attends of a cache take turns.

    A Sequence keeps its Cache alive. close(), or the end of a with statement, closes its sequences
    too; BusyError, and nothing is closed, while a call on one of them runs.
    """

    _kind = "cache"

    def __init__(self, groups: Union[Group, Seq[Group]], max_tokens: int, *, n_threads: int = 1,
                 memory_budget_bytes: int = 0, fingerprint: bytes = b"",
                 isa: Optional[str] = None) -> None:
        self._pointer = None
        self._users = 0
        self._lock = threading.RLock()
        config = ConfigC(groups, max_tokens, n_threads, memory_budget_bytes, fingerprint, isa)
        out = c_void_p()
        config.check(lib.kvt_cache_create(byref(config.c), byref(out)))
        self._pointer = out.value
        self._sequences: "weakref.WeakSet[Sequence]" = weakref.WeakSet()
        self.groups: Tuple[Group, ...] = tuple(config.list)
        self.max_tokens = int(max_tokens)
        # (query heads, kv heads, k dims, v dims, V is in K) of each layer
        layers: Dict[int, Tuple[int, int, int, int, bool]] = {}
        for g in self.groups:
            numbers = g.layers if g.layers is not None else \
                range(len(layers), len(layers) + g.n_layers)
            for x in numbers:
                layers[int(x)] = (g.n_q_heads, g.n_kv_heads, g.k_dim,
                                  g.k_dim if g.v_dim is None else g.v_dim,
                                  bool(g.flags & GroupFlag.V_IN_K))
        self._layers = [layers[i] for i in range(len(layers))]

    def __del__(self, destroy: Callable[[int], None] = lib.kvt_cache_destroy) -> None:
        pointer, self._pointer = getattr(self, "_pointer", None), None
        if pointer:
            destroy(pointer)

    def __enter__(self) -> "Cache":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<kvtile.Cache of {len(self._layers)} layers{', closed' if self.closed else ''}>"

    def close(self) -> None:
        """Release the cache and its sequences. BusyError: a call on one of them runs."""
        with self._lock:
            open_ones = [s for s in self._sequences if s._pointer is not None]
            if self._users or any(s._users for s in open_ones):
                raise BusyError("the cache is in use by another call")
            pointers = [s._pointer for s in open_ones]
            for s in open_ones:
                s._pointer = None
            pointer, self._pointer = self._pointer, None
        for p in pointers:
            lib.kvt_seq_destroy(p)
        if pointer:
            lib.kvt_cache_destroy(pointer)

    def _check(self, status: int) -> None:
        if status:
            throw(status, _lib.error_of(self._pointer, status))

    def _layer(self, layer: int) -> Tuple[int, int, int, int, bool]:
        if not 0 <= layer < len(self._layers):
            raise ValueError(f"layer {layer}: the cache has {len(self._layers)}")
        return self._layers[layer]

    @property
    def n_layers(self) -> int:
        return len(self._layers)

    @property
    def isa(self) -> str:
        """The name of the kernels in use."""
        pointer = self._take()
        try:
            return lib.kvt_cache_isa(pointer).decode()
        finally:
            self._give()

    @property
    def memory_bytes(self) -> int:
        """Bytes that the cache holds now, its sequences and free blocks included."""
        pointer = self._take()
        try:
            return lib.kvt_cache_memory_bytes(pointer)
        finally:
            self._give()

    @property
    def bytes_per_token(self) -> float:
        """Bytes of codes, scales and offsets of one token over all layers: to compare types."""
        pointer = self._take()
        try:
            return lib.kvt_cache_bytes_per_token(pointer)
        finally:
            self._give()

    def stats(self) -> CacheStats:
        """What the memory is used for; exact when no other thread is inside a call."""
        pointer = self._take()
        try:
            c = _lib.CacheStats(struct_size=sizeof(_lib.CacheStats))
            self._check(lib.kvt_cache_get_stats(pointer, byref(c)))
            return CacheStats(*[getattr(c, name) for name in CacheStats.__dataclass_fields__])
        finally:
            self._give()

    def trim(self) -> None:
        """Give blocks that no sequence uses back to the system."""
        pointer = self._take()
        try:
            self._check(lib.kvt_cache_trim(pointer))
        finally:
            self._give()

    def sequence(self) -> "Sequence":
        """A new, empty sequence. OutOfMemoryError, BudgetError."""
        return Sequence(self)

    def attend(self, layer: int, sequences: "Seq[Sequence]", q: Any, out: Any = None, *,
               n_queries: Union[int, Seq[int]] = 1, causal: bool = True,
               precision: Precision = Precision.NEAR, lse: Any = None, scale: float = 0.0,
               softcap: float = 0.0, sink_logits: Any = None, alibi_slopes: Any = None,
               query_positions: Optional[Seq[Any]] = None,
               masks: Optional[Seq[Any]] = None) -> Any:
        """Attend over several sequences of this cache in one call.

        sequences: of this cache; forks of one prompt stand next to each other
        q: [n][n_q_heads][k_dim], n the sum of n_queries: the sequences' queries one after another
        out: [n][n_q_heads][v_dim], written; None: a new array
        n_queries: of each sequence, or one number for all
        query_positions, masks: one for each sequence (None: none), as in `Sequence.attend`, which
            has the other arguments, the result and the errors

        A q that is no array of the right form is TypeError or ValueError.
        """
        items = list(sequences)
        counts = [n_queries] * len(items) if isinstance(n_queries, int) else list(n_queries)
        if len(counts) != len(items):
            raise ValueError(f"n_queries: {len(counts)} numbers for {len(items)} sequences")
        for name, given in (("query_positions", query_positions), ("masks", masks)):
            if given is not None and len(given) != len(items):
                raise ValueError(f"{name}: {len(given)} for {len(items)} sequences")
        for s in items:
            if not isinstance(s, Sequence):
                raise TypeError(f"sequences: {type(s).__name__} is no Sequence")
            if s.cache is not self:
                raise ValueError("sequences: one is of another cache")
        if items:
            return self._attend(layer, items, counts, q, out, causal, precision, lse, scale,
                                softcap, sink_logits, alibi_slopes, query_positions, masks)
        raise ValueError("sequences: none")

    def _attend(self, layer: int, items: "List[Sequence]", counts: List[int], q: Any, out: Any,
                causal: bool, precision: int, lse: Any, scale: float, softcap: float,
                sink_logits: Any, alibi_slopes: Any, positions: Optional[Seq[Any]],
                masks: Optional[Seq[Any]]) -> Any:
        n_heads, _, k_dim, v_dim, _ = self._layer(layer)
        n = sum(counts) if len(counts) > 1 else counts[0]
        qa, qd, qt, qh, n_rows, q_owner, q_ndim = rows(q, "q", n_heads, k_dim, False,
                                                       None if n < 0 else n)
        if n < 0:  # all rows of q are the one sequence's
            n = n_rows
            counts = [n]
        if out is None:
            out = _empty_like(q, (n, n_heads, v_dim), qd)
            oa, od, ot, oh, _, o_owner, _ = rows(out, "out", n_heads, v_dim, True, n)
            if q_ndim == 2:
                out = out[0]
        else:
            oa, od, ot, oh, _, o_owner, _ = rows(out, "out", n_heads, v_dim, True, n)
            if n:
                q0, q1 = span(qa, n, n_heads, k_dim * SIZES[qd], qt, qh)
                o0, o1 = span(oa, n, n_heads, v_dim * SIZES[od], ot, oh)
                if q0 < o1 and o0 < q1:
                    raise ValueError("out: overlaps q")
        la = sinks = slopes = 0
        keep: List[Any] = []
        if lse is not None and lse is not False:
            if lse is True:
                lse = np.empty((n, n_heads), np.float32)
            la = _dense_f32(lse, "lse", (n, n_heads))
        else:
            lse = None
        if sink_logits is not None:
            keep.append(floats(sink_logits, "sink_logits", n_heads))
            sinks = keep[-1].ctypes.data
        if alibi_slopes is not None:
            keep.append(floats(alibi_slopes, "alibi_slopes", n_heads))
            slopes = keep[-1].ctypes.data
        n_items = len(items)
        if n_items > _SCRATCH_ITEMS:
            scratch = _make_scratch(n_items)
        else:
            try:
                scratch = _scratch.pop()
            except IndexError:
                scratch = _make_scratch(_SCRATCH_ITEMS)
        memory, address = scratch
        taken = 0
        try:
            at = _ATTEND.size
            for s in items:
                pointer = s._take()
                taken += 1
                pa = ma = m_stride = m_tokens = 0
                if positions is not None and positions[taken - 1] is not None:
                    keep.append(int32s(positions[taken - 1], "query_positions",
                                       counts[taken - 1]))
                    pa = keep[-1].ctypes.data
                if masks is not None and masks[taken - 1] is not None:
                    packed, m_tokens = _pack_mask(masks[taken - 1], counts[taken - 1])
                    keep.append(packed)
                    ma, m_stride = packed.ctypes.data, packed.shape[1]
                _ITEM.pack_into(memory, at, pointer, counts[taken - 1], pa, ma, m_stride, m_tokens,
                                0, 0)
                at += _ITEM.size
            _ATTEND.pack_into(memory, 0, _ATTEND.size, layer, (1 if causal else 0) | precision,
                              address + _ATTEND.size, n_items, qa, qd, qt, qh, oa, od, ot, oh, la,
                              scale, softcap, sinks, slopes, 0)
            status = _attend(self._pointer, address)
            if status:
                self._check(status)
        finally:
            for s in items[:taken]:
                s._give()
            if n_items <= _SCRATCH_ITEMS:
                _scratch.append(scratch)
        del q_owner, o_owner, keep
        return out if lse is None else (out, lse)


def _empty_like(q: Any, shape: Tuple[int, ...], dtype: int) -> Any:
    """A new array of q's kind and dtype: NumPy's, or PyTorch's where q is its."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(q, torch.Tensor):
        return torch.empty(shape, dtype=q.dtype)
    return np.empty(shape, np.float16 if dtype == F16 else np.float32)


def _dense_f32(obj: Any, name: str, shape: Tuple[int, int]) -> int:
    address, dtype, found, strides, _ = describe(obj, name, True)
    if dtype != F32:
        raise TypeError(f"{name}: needs float32")
    if tuple(found) != shape or tuple(strides) != _dense(shape, 4):
        raise ValueError(f"{name}: shape {tuple(found)}, strides {tuple(strides)}: needs "
                         f"{shape}, contiguous")
    return address


def _pack_mask(mask: Any, n_queries: int) -> Tuple[np.ndarray, int]:
    array = np.asarray(mask)
    if array.dtype != np.bool_:
        raise TypeError(f"mask: {array.dtype}, needs bool")
    if array.ndim != 2 or array.shape[0] != n_queries:
        raise ValueError(f"mask: shape {array.shape}, needs ({n_queries}, tokens)")
    packed = np.packbits(array, axis=1, bitorder="little")
    if packed.shape[1] == 0:
        packed = np.zeros((n_queries, 1), np.uint8)
    return packed, array.shape[1]


class Step:
    """A pending step of a sequence: `with seq.step(n) as step:`, then append for each layer.

    The end of the block commits; an exception in it aborts the step.
    """

    def __init__(self, seq: "Sequence", n_tokens: int, token_ids: Any, positions: Any) -> None:
        self.seq = seq
        self.token_ids = token_ids  #: what the commit records; may be set within the block
        self._n_tokens = n_tokens
        self._positions = positions

    def __enter__(self) -> "Step":
        self.seq.begin(self._n_tokens, self._positions)
        return self

    def __exit__(self, kind: Optional[Class[BaseException]], *_: Any) -> None:
        if kind is None:
            try:
                self.seq.commit(self.token_ids)
            except BaseException:
                self.seq.abort()
                raise
        elif not self.seq.closed:
            self.seq.abort()

    def append(self, layer: int, k: Any, v: Any = None) -> None:
        """`Sequence.append`."""
        self.seq.append(layer, k, v)

    def attend(self, layer: int, q: Any, out: Any = None, **options: Any) -> Any:
        """`Sequence.attend`."""
        return self.seq.attend(layer, q, out, **options)


class Sequence(_Handle):
    """The tokens of one conversation: `cache.sequence()`.

    A step of the model: begin(n), for each layer append and attend, then commit or abort; or
    `with seq.step(n) as step:`. What a call that fails changes: nothing.

    Arrays: NumPy, DLPack on the CPU (PyTorch), anything with the buffer protocol; f32, f16 or bf16
    (`BFloat16` for NumPy), [n_tokens][n_heads][dims] with contiguous dims and any token and head
    stride, or [n_heads][dims] for one token. They are read and written in place, never copied.
    TypeError: no such array or dtype. ValueError: its shape, its strides, another device, read-only
    where it is written.

    Threads: calls that only read (attend, keys, values, save, the counts) may overlap on a
    sequence; a call that changes it while another one runs is BusyError, as is close().
    """

    _kind = "sequence"

    def __init__(self, cache: Cache, _pointer: Optional[int] = None) -> None:
        self._pointer = None
        self._users = 0
        self._lock = cache._lock
        self.cache = cache  #: kept alive
        if _pointer is None:
            out = c_void_p()
            owner = cache._take()
            try:
                cache._check(lib.kvt_seq_create(owner, byref(out)))
            finally:
                cache._give()
            _pointer = out.value
        self._pointer = _pointer
        cache._sequences.add(self)

    def __del__(self, destroy: Callable[[int], None] = lib.kvt_seq_destroy) -> None:
        pointer, self._pointer = getattr(self, "_pointer", None), None
        if pointer:
            destroy(pointer)

    def __enter__(self) -> "Sequence":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __len__(self) -> int:
        return self.length

    def __bool__(self) -> bool:
        return True  # an empty sequence is a sequence

    def __repr__(self) -> str:
        what = "closed" if self._pointer is None else f"{self.length} tokens"
        return f"<kvtile.Sequence of {what}>"

    def close(self) -> None:
        """Release it; blocks that no other sequence has go to the cache. BusyError: a call runs."""
        with self._lock:
            if self._pointer is None:
                return
            if self._users:
                raise BusyError("the sequence is in use by another call")
            pointer, self._pointer = self._pointer, None
        lib.kvt_seq_destroy(pointer)

    def _read(self, function: Callable[..., int], *args: Any) -> None:
        """function(seq, ...) that takes the sequence as const."""
        pointer = self._take()
        try:
            status = function(pointer, *args)
            if status:
                self.cache._check(status)
        finally:
            self._give()

    def _write(self, function: Callable[..., int], *args: Any) -> None:
        pointer = self._take(True)
        try:
            status = function(pointer, *args)
            if status:
                self.cache._check(status)
        finally:
            self._give()

    def _count(self, function: Callable[..., int], *args: Any) -> int:
        pointer = self._take()
        try:
            return function(pointer, *args)
        finally:
            self._give()

    # ---- counts ----

    @property
    def length(self) -> int:
        """Tokens committed."""
        return self._count(_length)

    @property
    def pending(self) -> int:
        """Tokens of the pending step; 0 when there is none."""
        return self._count(_pending)

    @property
    def capacity(self) -> int:
        """Length that it can reach in steps of one token without allocating."""
        return self._count(lib.kvt_seq_capacity)

    @property
    def max_tokens(self) -> int:
        return self._count(lib.kvt_seq_max_tokens)

    @property
    def memory_bytes(self) -> int:
        """Bytes of this sequence; what it shares with others counts in full."""
        return self._count(lib.kvt_seq_memory_bytes)

    def stats(self) -> SequenceStats:
        c = _lib.SeqStats(struct_size=sizeof(_lib.SeqStats))
        self._read(lib.kvt_seq_get_stats, byref(c))
        return SequenceStats(c.own_bytes, c.shared_bytes)

    @property
    def next_position(self) -> int:
        """The RoPE position of the next token. Setting it: ArgError, StateError (a step pending)."""
        return self._count(lib.kvt_seq_next_position)

    @next_position.setter
    def next_position(self, position: int) -> None:
        if not 0 <= position < 2**31:
            raise ValueError(f"next_position: {position} is not 0 to 2**31 - 1")
        self._write(lib.kvt_seq_set_next_position, position)

    @property
    def tag(self) -> bytes:
        """Up to 256 bytes on which keys and values depend besides the weights: an adapter, a tenant.

        Setting it: StateError (it has tokens), LimitError.
        """
        size = c_size_t()
        buffer = ctypes.create_string_buffer(_lib.MAX_TAG)
        self._read(lib.kvt_seq_tag, buffer, len(buffer), byref(size))
        return buffer.raw[:size.value]

    @tag.setter
    def tag(self, tag: bytes) -> None:
        tag = bytes(tag)
        self._write(lib.kvt_seq_set_tag, tag, len(tag))

    # ---- steps ----

    def step(self, n_tokens: int, token_ids: Any = None, positions: Any = None) -> Step:
        """begin and commit (or abort, on an exception) as a with statement."""
        return Step(self, n_tokens, token_ids, positions)

    def begin(self, n_tokens: int, positions: Any = None) -> None:
        """Begin a step: reserve room for n_tokens in every layer. The only call that allocates.

        positions: [n_tokens] >= 0; None: they count on from next_position

        StateError: a step is pending. FullError, OutOfMemoryError, BudgetError, ArgError.
        """
        n_tokens = _whole(n_tokens, "n_tokens", 63)
        if positions is None:
            self._write(lib.kvt_seq_begin, n_tokens, None)
            return
        array = int32s(positions, "positions", n_tokens)
        self._write(lib.kvt_seq_begin, n_tokens, array.ctypes.data)

    def append(self, layer: int, k: Any, v: Any = None) -> None:
        """Append the pending step's keys and values to one layer.

        k: [n_tokens][n_kv_heads][k_dim], keys after RoPE
        v: [n_tokens][n_kv_heads][v_dim]; None where V is in K

        StateError: no step is pending, or the layer has its tokens. NumberError: a value is not
        finite or beyond what the type can store; the layer can be appended again.
        """
        _, n_heads, k_dim, v_dim, v_in_k = self.cache._layer(layer)
        ka, kd, kt, kh, n, k_owner, _ = rows(k, "k", n_heads, k_dim)
        va = vd = vt = vh = 0
        v_owner = None
        if v is not None:
            va, vd, vt, vh, _, v_owner, _ = rows(v, "v", n_heads, v_dim, False, n)
        elif not v_in_k:
            raise TypeError("v: needed, as V is not in K")
        try:
            scratch = _scratch.pop()
        except IndexError:
            scratch = _make_scratch(_SCRATCH_ITEMS)
        memory, address = scratch
        try:
            pointer = self._take(True)
            try:
                pending = _pending(pointer)
                if n != pending:  # the library reads as many tokens as the step has
                    if not pending:
                        raise StateError("append: no step is pending; begin one")
                    raise ValueError(f"k: {n} tokens, the step has {pending}")
                _TENSORS.pack_into(memory, 0, ka, kd, kt, kh, va, vd, vt, vh)
                status = _append(pointer, layer, address, None if v is None else address + 32)
                if status:
                    self.cache._check(status)
            finally:
                self._give()
        finally:
            _scratch.append(scratch)
        del k_owner, v_owner

    def commit(self, token_ids: Any = None) -> None:
        """Make the pending tokens part of the sequence.

        token_ids: [n_tokens] >= 0 or TOKEN_NONE; None: all TOKEN_NONE

        StateError: no step is pending, or a layer was not appended; the step stays pending.
        """
        if token_ids is None:
            self._write(lib.kvt_seq_commit, None)
            return
        ids = int32s(token_ids, "token_ids")
        pointer = self._take(True)
        try:
            pending = _pending(pointer)
            if pending and len(ids) != pending:
                raise ValueError(f"token_ids: {len(ids)} for a step of {pending} tokens")
            self.cache._check(lib.kvt_seq_commit(pointer, ids.ctypes.data))
        finally:
            self._give()

    def commit_selected(self, indices: Any, token_ids: Any = None) -> None:
        """Make some of the pending tokens part of the sequence and drop the others.

        indices: [n] of the step's tokens, strictly ascending; token_ids: [n] of the selected ones

        ArgError, StateError, NumberError: the step stays pending.
        """
        array = int32s(indices, "indices")
        if (array < 0).any():
            raise ValueError("indices: negative")
        picked = array.astype(np.uint64)
        ids = None if token_ids is None else int32s(token_ids, "token_ids", len(picked))
        self._write(lib.kvt_seq_commit_selected, picked.ctypes.data, len(picked),
                    None if ids is None else ids.ctypes.data)

    def abort(self) -> None:
        """Drop the pending step, if there is one."""
        self._write(lib.kvt_seq_abort)

    # ---- attention ----

    def attend(self, layer: int, q: Any, out: Any = None, *, causal: bool = True,
               precision: Precision = Precision.NEAR, lse: Any = None, scale: float = 0.0,
               softcap: float = 0.0, sink_logits: Any = None, alibi_slopes: Any = None,
               query_positions: Any = None, mask: Any = None) -> Any:
        """Attend over the tokens of one layer, the pending ones included where it has them.

        q: [n][n_q_heads][k_dim], or [n_q_heads][k_dim] for one query
        out: [n][n_q_heads][v_dim], written; may not overlap q. None: a new array of q's kind and
            dtype (NumPy, or PyTorch; float32 for BFloat16)
        causal: query i of n sees all tokens but the last n - 1 - i
        lse: True, or a float32 array [n][n_q_heads]: the log of the softmax's denominator
        scale: 0 stands for 1 / sqrt(k_dim). softcap: 0: none
        sink_logits, alibi_slopes: [n_q_heads]
        query_positions: [n], for ALiBi and windows; None: those of the last n tokens
        mask: bool [n][m], which of the last m tokens a query sees; replaces the causal rule

        Returns out, or (out, lse) where lse is asked for. The same bits for any number of threads,
        alone or in a batch (`Cache.attend`).

        ArgError, StateError (tokens that a window has released), NumberError (not finite).
        """
        return self.cache._attend(layer, [self], [-1] if mask is None and query_positions is None
                                  else [_n_rows(q)], q, out, causal, precision, lse, scale,
                                  softcap, sink_logits, alibi_slopes,
                                  None if query_positions is None else [query_positions],
                                  None if mask is None else [mask])

    # ---- reading ----

    def _get(self, side: int, layer: int, first: int, n: Optional[int], out: Any,
             dtype: Any) -> Any:
        _, n_heads, k_dim, v_dim, _ = self.cache._layer(layer)
        dims = v_dim if side else k_dim
        first = _whole(first, "first", 63)
        pointer = self._take()
        try:
            if n is None:
                if out is not None:
                    n = _n_rows(out, "out")
                else:
                    # Pending tokens count where the layer has them: the read itself knows.
                    n = max(_length(pointer) - first, 0)
            n = _whole(n, "n", 63)
            if out is None:
                out = np.empty((n, n_heads, dims), dtype)
            a, d, t, h, _, owner, _ = rows(out, "out", n_heads, dims, True, n)
            tensor = _lib.Tensor(a, d, t, h)
            if n or first:
                self.cache._check(lib.kvt_read(pointer, layer, side, first, n, byref(tensor)))
            del owner
            return out
        finally:
            self._give()

    def keys(self, layer: int, first: int = 0, n: Optional[int] = None, out: Any = None,
             dtype: Any = np.float32) -> Any:
        """K of tokens first .. first + n - 1, dequantized, as they were appended.

        n None: out's, or up to the last committed token. Pending tokens where the layer has them.
        out: [n][n_kv_heads][k_dim], f32, f16 or bf16, any strides; None: a new one of dtype

        ArgError: beyond the tokens. StateError: a window has released some of them.
        """
        return self._get(0, layer, first, n, out, dtype)

    def values(self, layer: int, first: int = 0, n: Optional[int] = None, out: Any = None,
               dtype: Any = np.float32) -> Any:
        """V likewise: [n][n_kv_heads][v_dim]."""
        return self._get(1, layer, first, n, out, dtype)

    def _ints(self, function: Callable[..., int], first: int, n: Optional[int]) -> np.ndarray:
        first = _whole(first, "first", 63)
        pointer = self._take()
        try:
            count = max(_length(pointer) - first, 0) if n is None else _whole(n, "n", 31)
            out = np.empty(count, np.int32)
            self.cache._check(function(pointer, first, count, out.ctypes.data))
            return out
        finally:
            self._give()

    def token_ids(self, first: int = 0, n: Optional[int] = None) -> np.ndarray:
        """int32 [n]: ids of committed tokens, TOKEN_NONE where unknown. ArgError: beyond them."""
        return self._ints(lib.kvt_seq_token_ids, first, n)

    def positions(self, first: int = 0, n: Optional[int] = None) -> np.ndarray:
        """int32 [n]: positions of committed tokens."""
        return self._ints(lib.kvt_seq_positions, first, n)

    def key_positions(self, first: int = 0, n: Optional[int] = None) -> np.ndarray:
        """int32 [n]: the positions at which the keys were computed, which `keys` gives them for."""
        return self._ints(lib.kvt_seq_key_positions, first, n)

    # ---- what changes the length ----

    def reserve(self, n_tokens: int) -> None:
        """Take blocks ahead, so that it can grow to n_tokens without an allocation.

        StateError, FullError, OutOfMemoryError, BudgetError: nothing is taken.
        """
        self._write(lib.kvt_seq_reserve, _whole(n_tokens, "n_tokens", 64))

    def fork(self, n_tokens: Optional[int] = None) -> "Sequence":
        """A new sequence of the first n_tokens (None: all committed ones); nothing is copied.

        ArgError: above the length. StateError: released by a window. BudgetError.
        """
        pointer = self._take(True)
        try:
            n = _length(pointer) if n_tokens is None else _whole(n_tokens, "n_tokens", 64)
            out = c_void_p()
            self.cache._check(lib.kvt_seq_fork(pointer, n, byref(out)))
            return Sequence(self.cache, out.value)
        finally:
            self._give()

    def truncate(self, n_tokens: int) -> None:
        """Shorten to the first n_tokens. ArgError: above the length. StateError: see `reachable`."""
        self._write(lib.kvt_seq_truncate, _whole(n_tokens, "n_tokens", 64))

    def reachable(self, n_tokens: int) -> int:
        """The largest number of tokens, at most n_tokens, that it can be truncated to."""
        return self._count(lib.kvt_seq_reachable, _whole(n_tokens, "n_tokens", 64))

    def remove(self, first: int, n: int) -> None:
        """Take tokens first .. first + n - 1 out; later ones move up, and so do their positions
        where the groups' RoPE is described (Group.rope).

        n and first are multiples of 64, or the tokens lie behind all that is sealed.
        ArgError, StateError, UnsupportedError, BudgetError.
        """
        self._write(lib.kvt_seq_remove, _whole(first, "first", 64), _whole(n, "n", 64))

    def clear(self) -> None:
        """Forget all tokens and a pending step; the blocks stay with the cache."""
        self._write(lib.kvt_seq_clear)

    # ---- checkpoints ----

    def checkpoint(self, blob: bytes = b"") -> None:
        """Mark the length as one that it can be truncated to exactly, with bytes of the caller's.

        StateError: a step is pending. OutOfMemoryError, BudgetError.
        """
        blob = bytes(blob)
        self._write(lib.kvt_seq_checkpoint, blob, len(blob))

    def checkpoints(self) -> List[int]:
        """The lengths at which there are checkpoints, ascending."""
        pointer = self._take()
        try:
            n = c_size_t()
            self.cache._check(lib.kvt_seq_checkpoints(pointer, None, 0, byref(n)))
            out = (c_uint64 * max(n.value, 1))()
            self.cache._check(lib.kvt_seq_checkpoints(pointer, out, n.value, byref(n)))
            return list(out[:n.value])
        finally:
            self._give()

    def checkpoint_read(self, n_tokens: int) -> bytes:
        """The bytes of the checkpoint at n_tokens. ArgError: there is none."""
        n_tokens = _whole(n_tokens, "n_tokens", 64)
        pointer = self._take()
        try:
            size = c_size_t()
            self.cache._check(lib.kvt_seq_checkpoint_read(pointer, n_tokens, None, 0, byref(size)))
            buffer = ctypes.create_string_buffer(max(size.value, 1))
            self.cache._check(lib.kvt_seq_checkpoint_read(pointer, n_tokens, buffer, size.value,
                                                          byref(size)))
            return buffer.raw[:size.value]
        finally:
            self._give()

    def checkpoint_drop(self, n_tokens: int) -> None:
        """Drop the checkpoint at n_tokens. ArgError: there is none."""
        self._write(lib.kvt_seq_checkpoint_drop, _whole(n_tokens, "n_tokens", 64))

    # ---- snapshots ----

    def save(self, file: Union[PathLike, BinaryIO], *, compress: bool = True, zstd_level: int = 1,
             fsync: bool = True, in_place: bool = False) -> None:
        """Save it to a path, or to a binary file object that is open for writing.

        compress, zstd_level: -7 to 19. fsync, in_place: of a path alone; in_place writes over a
        file that cannot be renamed over, which is not atomic.

        StateError: a step is pending. IoError: the old file is in place. An exception of the file
        object's write is raised as it is.
        """
        options = _lib.SaveOptions(sizeof(_lib.SaveOptions), 0 if compress else 1, not fsync,
                                   zstd_level, in_place)
        if not hasattr(file, "write"):
            self._read(lib.kvt_seq_save, os.fsencode(file), byref(options))  # type: ignore
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
            self._read(lib.kvt_seq_save_stream, byref(writer), byref(options))
        except Exception:
            if failure:
                raise failure[0]
            raise

    def save_bytes(self, *, compress: bool = True, zstd_level: int = 1) -> bytes:
        """The snapshot as bytes: what `save` writes."""
        buffer = io.BytesIO()
        self.save(buffer, compress=compress, zstd_level=zstd_level)
        return buffer.getvalue()

    def load(self, file: Union[PathLike, BinaryIO], prompt: Any = None) -> LoadResult:
        """Replace the contents by a snapshot: of a path, or of a binary file object.

        prompt: the whole prompt's token ids; the result says how much of it the snapshot has

        On any error it is as it was: StateError, IoError, FormatError, CorruptError, MismatchError,
        FullError, BudgetError. An exception of the file object's read is raised as it is.
        """
        ids = None if prompt is None else int32s(prompt, "prompt")
        options = _lib.LoadOptions(sizeof(_lib.LoadOptions), None, 0)
        if ids is not None:
            options.prompt, options.n_prompt = ids.ctypes.data, len(ids)
        result = _lib.LoadResult()
        if not hasattr(file, "read"):
            self._write(lib.kvt_seq_load, os.fsencode(file), byref(options),  # type: ignore
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
                self._write(lib.kvt_seq_load_stream, byref(reader), byref(options), byref(result))
            except Exception:
                if failure:
                    raise failure[0]
                raise
        at = result.checkpoint_tokens
        return LoadResult(result.n_tokens, result.prefix_tokens, result.reuse_tokens,
                          None if at == 2**64 - 1 else at)

    def load_bytes(self, data: Any, prompt: Any = None) -> LoadResult:
        """`load` from bytes or any buffer."""
        return self.load(io.BytesIO(data), prompt)


def _n_rows(q: Any, name: str = "q") -> int:
    shape = describe(q, name)[2]
    return int(shape[0]) if len(shape) == 3 else 1


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
