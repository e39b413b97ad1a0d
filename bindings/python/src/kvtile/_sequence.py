"""Sequence and its steps."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_size_t, c_uint64, c_void_p, sizeof
from dataclasses import dataclass
from typing import (TYPE_CHECKING, Any, Callable, List, Optional, Type as Class)

import numpy as np

from . import _lib, _snapshot, _store
from ._attend import SCRATCH_ITEMS, TENSOR_SIZE, TENSORS, attend, make_scratch, n_rows, scratch_pool
from ._bytes import contents
from ._config import Precision, _whole
from ._errors import BusyError, ClosedError, StateError
from ._handle import Handle
from ._lib import lib
from ._tensor import int32s, rows

if TYPE_CHECKING:
    from ._cache import Cache

_length, _pending, _append = lib.kvt_seq_length, lib.kvt_seq_pending, lib.kvt_append


@dataclass(frozen=True)
class SequenceStats:
    """own_bytes: that only this sequence has. shared_bytes: that others have as well."""

    own_bytes: int
    shared_bytes: int


class Step:
    """A pending step of a sequence: `with seq.step(n) as step:`, then append for each layer.

    The end of the block commits; an exception in it aborts the step. One of a signal's handler just
    before or after the block may leave the step pending: abort it.
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


class Sequence(Handle):
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
    _instead = "; fork() it, or save() it"

    def __init__(self, cache: "Cache", _source: "Optional[Sequence]" = None,
                 _n_tokens: Optional[int] = None) -> None:
        self._pointer = None
        self._users = set()
        self._lock = cache._lock
        self.cache = cache  #: kept alive
        owner: Handle = cache if _source is None else _source
        out = c_void_p()
        use, give = object(), owner._users.discard
        try:
            # The cache's close() looks through its sequences under the lock. It does not come
            # between this and the pointer: it would be BusyError, as the owner is in use.
            pointer = owner._take(use, _source is not None)
            with self._lock:
                cache._sequences.add(self)
            if _source is None:
                status = lib.kvt_seq_create(pointer, byref(out))
            else:
                n = _length(pointer) if _n_tokens is None else _n_tokens
                status = lib.kvt_seq_fork(pointer, n, byref(out))
            cache._check(status)
        finally:
            self._pointer = out.value  # calls nothing
            give(use)

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
        try:
            what = ", closed" if self._pointer is None else f" of {self.length} tokens"
        except BusyError:  # a debugger's look into a callback
            what = " in use by another call"
        except ClosedError:  # meanwhile
            what = ", closed"
        return f"<kvtile.Sequence{what}>"

    def close(self) -> None:
        """Release it; blocks that no other sequence has go to the cache. BusyError: a call runs."""
        pointer = None
        try:
            with self._lock:
                if self._users:
                    raise BusyError("the sequence is in use by another call")
                pointer, self._pointer = self._pointer, None
        finally:
            lib.kvt_seq_destroy(pointer)

    def _read(self, function: Callable[..., int], *args: Any) -> None:
        """function(seq, ...) that takes the sequence as const."""
        use, give = object(), self._users.discard
        try:
            status = function(self._take(use), *args)
            if status:
                self.cache._check(status)
        finally:
            give(use)

    def _write(self, function: Callable[..., int], *args: Any) -> None:
        use, give = object(), self._users.discard
        try:
            status = function(self._take(use, True), *args)
            if status:
                self.cache._check(status)
        finally:
            give(use)

    def _count(self, function: Callable[..., int], *args: Any) -> int:
        use, give = object(), self._users.discard
        try:
            return function(self._take(use), *args)
        finally:
            give(use)

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
        """The RoPE position of the next token. Setting it: StateError (a step is pending)."""
        return self._count(lib.kvt_seq_next_position)

    @next_position.setter
    def next_position(self, position: int) -> None:
        self._write(lib.kvt_seq_set_next_position, _whole(position, "next_position", 31))

    @property
    def tag(self) -> bytes:
        """Up to 256 bytes that keys and values depend on besides the weights: adapter, tenant.

        Setting it: StateError (it has tokens), LimitError.
        """
        size = c_size_t()
        buffer = ctypes.create_string_buffer(_lib.MAX_TAG)
        self._read(lib.kvt_seq_tag, buffer, len(buffer), byref(size))
        return buffer.raw[:size.value]

    @tag.setter
    def tag(self, tag: bytes) -> None:
        tag = contents(tag, "tag")
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
            scratch = scratch_pool.pop()
        except IndexError:
            scratch = make_scratch(SCRATCH_ITEMS)
        memory, address = scratch
        try:
            use, give = object(), self._users.discard
            try:
                pointer = self._take(use, True)
                pending = _pending(pointer)
                if n != pending:  # the library reads as many tokens as the step has
                    if not pending:
                        raise StateError("append: no step is pending; begin one")
                    raise ValueError(f"k: {n} tokens, the step has {pending}")
                TENSORS.pack_into(memory, 0, ka, kd, kt, kh, va, vd, vt, vh)
                status = _append(pointer, layer, address,
                                 None if v is None else address + TENSOR_SIZE)
                if status:
                    self.cache._check(status)
            finally:
                give(use)
        finally:
            scratch_pool.append(scratch)
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
        use, give = object(), self._users.discard
        try:
            pointer = self._take(use, True)
            pending = _pending(pointer)
            if pending and len(ids) != pending:
                raise ValueError(f"token_ids: {len(ids)} for a step of {pending} tokens")
            self.cache._check(lib.kvt_seq_commit(pointer, ids.ctypes.data))
        finally:
            give(use)

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
        lse: True, or a float32 array [n][n_q_heads], contiguous, written; may overlap neither q nor
            out: the log of the softmax's denominator
        scale: 0 stands for 1 / sqrt(k_dim). softcap: 0: none
        sink_logits, alibi_slopes: [n_q_heads]; slopes are 0 to 1e28
        query_positions: [n], for ALiBi and windows; None: those of the last n tokens
        mask: bool [n][m], which of the last m tokens a query sees; replaces the causal rule

        Returns out, or (out, lse) where lse is asked for. The same bits for any number of threads,
        alone or in a batch (`Cache.attend`).

        ArgError, StateError (tokens that a window has released), NumberError (not finite).
        """
        return attend(self.cache, layer, [self], [-1] if mask is None and query_positions is None
                                  else [n_rows(q)], q, out, causal, precision, lse, scale,
                                  softcap, sink_logits, alibi_slopes,
                                  None if query_positions is None else [query_positions],
                                  None if mask is None else [mask])

    # ---- reading ----

    def _get(self, side: int, layer: int, first: int, n: Optional[int], out: Any,
             dtype: Any) -> Any:
        _, n_heads, k_dim, v_dim, _ = self.cache._layer(layer)
        dims = v_dim if side else k_dim
        first = _whole(first, "first", 63)
        use, give = object(), self._users.discard
        try:
            pointer = self._take(use)
            if n is None:
                if out is not None:
                    n = n_rows(out, "out")
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
            give(use)

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
        use, give = object(), self._users.discard
        try:
            pointer = self._take(use)
            count = max(_length(pointer) - first, 0) if n is None else _whole(n, "n", 31)
            out = np.empty(count, np.int32)
            self.cache._check(function(pointer, first, count, out.ctypes.data))
            return out
        finally:
            give(use)

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
        n = None if n_tokens is None else _whole(n_tokens, "n_tokens", 64)
        return Sequence(self.cache, self, n)

    def truncate(self, n_tokens: int) -> None:
        """Shorten to the first n_tokens. ArgError: above the length. StateError: `reachable`."""
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
        blob = contents(blob, "blob")
        self._write(lib.kvt_seq_checkpoint, blob, len(blob))

    def checkpoints(self) -> List[int]:
        """The lengths at which there are checkpoints, ascending."""
        use, give = object(), self._users.discard
        try:
            pointer = self._take(use)
            n = c_size_t()
            self.cache._check(lib.kvt_seq_checkpoints(pointer, None, 0, byref(n)))
            out = (c_uint64 * max(n.value, 1))()
            self.cache._check(lib.kvt_seq_checkpoints(pointer, out, n.value, byref(n)))
            return list(out[:n.value])
        finally:
            give(use)

    def checkpoint_read(self, n_tokens: int) -> bytes:
        """The bytes of the checkpoint at n_tokens. ArgError: there is none."""
        n_tokens = _whole(n_tokens, "n_tokens", 64)
        use, give = object(), self._users.discard
        try:
            pointer = self._take(use)
            size = c_size_t()
            self.cache._check(lib.kvt_seq_checkpoint_read(pointer, n_tokens, None, 0, byref(size)))
            buffer = ctypes.create_string_buffer(max(size.value, 1))
            self.cache._check(lib.kvt_seq_checkpoint_read(pointer, n_tokens, buffer, size.value,
                                                          byref(size)))
            return buffer.raw[:size.value]
        finally:
            give(use)

    def checkpoint_drop(self, n_tokens: int) -> None:
        """Drop the checkpoint at n_tokens. ArgError: there is none."""
        self._write(lib.kvt_seq_checkpoint_drop, _whole(n_tokens, "n_tokens", 64))

    # ---- snapshots ----

    def save(self, file: _snapshot.File, **options: Any) -> None:
        """Save it to a path, a file descriptor, or a binary file object that is open for writing.

        codec: "auto" (compress where a sample says that it saves), "raw" (the fastest, and can be
            mapped) or "zstd"; level: of zstd, -7 to 19 (0: 1, and 6 for
            small streams)
        fsync, in_place: of a path alone. False: do not wait for the disk; True: write over a file
            that cannot be renamed over, which is not atomic: on an error a part of the new file may
            be in its place
        tokens: a range of step 1 of those to save, from a multiple of 64 on; checkpoints up to its
            end are kept if it begins with 0, a next position that was set if it ends with the last
        layers: ascending numbers of those to save, as layers 0, 1, ... of the file
        types: convert; "i4" for K and V, ("i8", "i4") for each, or a list of one of these for
            each group. None in a pair: as it is
        parent: the path of a snapshot in the same folder: save what it lacks, a delta
        pieces: {name: bytes} that travel with it; names of 1 to 64 bytes without NUL
        key: 32 bytes: encrypt
        progress: called as progress(done, total) in bytes of keys and values; what it raises is
            raised, with nothing changed; if it answers something true, that is CancelledError

        StateError: a step is pending, or a window has released tokens. IoError: the old file is in
        place. MismatchError, FormatError, CorruptError: the parent. LimitError: too many parents, or
        blocks. NumberError: beyond a type. UnsupportedError: a key, and the library was built
        without encryption. ArgError, OutOfMemoryError. An exception of the file object's write is
        raised as it is.
        """
        _snapshot.save(self, file, options)

    def save_bytes(self, **options: Any) -> bytes:
        """The snapshot as bytes: what `save` writes, with its options."""
        return _snapshot.save_bytes(self, options)

    def save_into(self, memory: Any, **options: Any) -> int:
        """`save` into a writable buffer: bytearray, mmap, NumPy array. How many bytes it has taken.

        FullError: it has no room. Then what it holds is unspecified. See `save_bound`.
        """
        return _snapshot.save_into(self, memory, options)

    def save_bound(self, **options: Any) -> int:
        """The most bytes that a `save` with these options writes now."""
        return _snapshot.save_bound(self, options)

    def load(self, file: _snapshot.File, prompt: Any = None,
             **options: Any) -> _snapshot.LoadResult:
        """Replace the contents by a snapshot: of a path, a file descriptor, a binary file object.

        prompt: the whole prompt's token ids; the result says how much of it the snapshot has
        reuse: "all", or cut it to what the prompt can use: "prefix" to reuse_tokens, "checkpoint"
            to checkpoint_tokens (nothing where there is none)
        map: use what was saved with codec="raw" where it lies in the file, of a path: "verify" all
            at once, or "lazy" at the first use: then attend, keys, values, begin, remove and save
            can be CorruptError. The file must not be changed as long as the sequence lives
        convert: a snapshot of other types is converted to the cache's
        layers: which of the file's the cache's layers are, ascending
        folder: where a delta's parents are; None: beside the file
        key: 32 bytes, of an encrypted snapshot and its parents
        pieces: False: the result has no pieces
        progress: see `save`

        On any error it is as it was: StateError, IoError, FormatError, CorruptError, MismatchError,
        FullError, LimitError, BudgetError, NumberError, UnsupportedError, CancelledError, ArgError,
        OutOfMemoryError. An exception of the file object's read is raised as it is.
        """
        return _snapshot.load(self, file, {**options, "prompt": prompt})

    def load_bytes(self, data: Any, prompt: Any = None, **options: Any) -> _snapshot.LoadResult:
        """`load` from bytes or any buffer, which is not copied."""
        return _snapshot.load_bytes(self, data, {**options, "prompt": prompt})

    # ---- prefixes in a store ----

    def prefix_put(self, store: _store.Store, **options: Any) -> _store.PrefixResult:
        """Put the sealed blocks into a store, as far as it has not got them.

        Blocks of 64 tokens that are full, sealed in all groups (Group.residual_tokens: the newest
        64 to 127 tokens are not), and of which all tokens were committed with ids.

        namespace, salt: bytes that the keys depend on: whose prefixes these are; a secret, without
            which keys cannot be guessed from tokens
        extras: {block: bytes} that tokens from 64 * block on depend on: an image, an adapter
        n_tokens: of no more than the first so many; 0: all
        checkpoints: True: put checkpoints, too

        StateError: a step is pending. UnsupportedError: the library was built without libsodium.
        IoError, FullError: the store's. CorruptError: of a mapped snapshot.
        """
        return _store.prefix_put(self, store, options)

    def prefix_get(self, store: _store.Store, prompt: Any, positions: Any = None,
                   **options: Any) -> _store.PrefixResult:
        """Restore the longest prefix of a prompt that a store has into this empty sequence.

        prompt: the whole prompt's token ids. At most all but the last are restored, in whole blocks
        positions: of the prompt's tokens; None: 0, 1, 2, ...
        namespace, salt, extras: as `prefix_put` had them. So is `tag`, which is to be set before
        checkpoints: True: up to the last checkpoint, or up to one at one of these lengths, whose
            bytes `checkpoint_read` has

        On any error it is empty as before: StateError (it is not empty), IoError and others of the
        store, BudgetError, UnsupportedError.
        """
        return _store.prefix_find(self, store, prompt, True, positions, options)

    def prefix_probe(self, store: _store.Store, prompt: Any, positions: Any = None,
                     **options: Any) -> _store.PrefixResult:
        """How much `prefix_get` would restore into an empty sequence, without reading values."""
        return _store.prefix_find(self, store, prompt, False, positions, options)
