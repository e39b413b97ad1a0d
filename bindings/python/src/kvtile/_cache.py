"""Cache."""

from __future__ import annotations

import threading
import weakref
from ctypes import byref, c_void_p, sizeof
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence as Seq, Tuple, Union

import numpy as np

from . import _lib
from ._attend import attend
from ._config import ConfigC, Group, GroupFlag, Precision
from ._errors import BusyError, throw
from ._handle import Handle
from ._lib import lib
from ._sequence import Sequence


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


class Cache(Handle):
    """A cache: geometry, storage types, limits. Sequences of it hold the tokens.

    groups: a Group or several, whose layers are numbered from 0 on, each once
    max_tokens: of one sequence
    n_threads: of one call, the caller's included; they are the cache's own
    memory_budget_bytes: of what the cache keeps; 0: no bound
    fingerprint: up to 64 bytes that identify the model's weights; in snapshots
    isa: a name of `isa_names`; None: the widest. With "amx" alternate signal stacks of the process
        have to be larger from then on (kvt_config.isa in kvtile.h)

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
        self._users = set()
        self._lock = threading.RLock()
        config = ConfigC(groups, max_tokens, n_threads, memory_budget_bytes, fingerprint, isa)
        out = c_void_p()
        try:
            config.check(lib.kvt_cache_create(byref(config.c), byref(out)))
        finally:
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
        """Release the cache and its sequences. BusyError: a call on one of them runs.

        What a signal's handler raises may end it with some of them closed: close it again.
        """
        pointer = None
        pointers: List[Optional[int]] = []
        destroying = map(lib.kvt_seq_destroy, pointers)
        try:
            try:
                with self._lock:
                    open_ones = [s for s in self._sequences if s._pointer is not None]
                    if self._users or any(s._users for s in open_ones):
                        raise BusyError("the cache is in use by another call")
                    for s in open_ones:
                        p, s._pointer = s._pointer, None  # no handler runs before it is in the list
                        pointers.append(p)
                    pointer, self._pointer = self._pointer, None
            finally:
                any(destroying)
        finally:
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
        use, give = object(), self._users.discard
        try:
            return lib.kvt_cache_isa(self._take(use)).decode()
        finally:
            give(use)

    @property
    def memory_bytes(self) -> int:
        """Bytes that the cache holds now, its sequences and free blocks included."""
        use, give = object(), self._users.discard
        try:
            return lib.kvt_cache_memory_bytes(self._take(use))
        finally:
            give(use)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of codes, scales and offsets of one token over all layers: to compare types."""
        use, give = object(), self._users.discard
        try:
            return lib.kvt_cache_bytes_per_token(self._take(use))
        finally:
            give(use)

    def stats(self) -> CacheStats:
        """What the memory is used for; exact when no other thread is inside a call."""
        use, give = object(), self._users.discard
        try:
            pointer = self._take(use)
            c = _lib.CacheStats(struct_size=sizeof(_lib.CacheStats))
            self._check(lib.kvt_cache_get_stats(pointer, byref(c)))
            return CacheStats(*[getattr(c, name) for name in CacheStats.__dataclass_fields__])
        finally:
            give(use)

    def trim(self) -> None:
        """Give blocks that no sequence uses back to the system."""
        use, give = object(), self._users.discard
        try:
            self._check(lib.kvt_cache_trim(self._take(use)))
        finally:
            give(use)

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
        counts = [n_queries] * len(items) if isinstance(n_queries, (int, np.integer)) \
            else list(n_queries)
        if len(counts) != len(items):
            raise ValueError(f"n_queries: {len(counts)} numbers for {len(items)} sequences")
        if min(counts, default=1) < 1:
            raise ValueError(f"n_queries: {min(counts)}")
        for name, given in (("query_positions", query_positions), ("masks", masks)):
            if given is not None and len(given) != len(items):
                raise ValueError(f"{name}: {len(given)} for {len(items)} sequences")
        for s in items:
            if not isinstance(s, Sequence):
                raise TypeError(f"sequences: {type(s).__name__} is no Sequence")
            if s.cache is not self:
                raise ValueError("sequences: one is of another cache")
        if items:
            return attend(self, layer, items, counts, q, out, causal, precision, lse, scale,
                                softcap, sink_logits, alibi_slopes, query_positions, masks)
        raise ValueError("sequences: none")
