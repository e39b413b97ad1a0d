"""kvtile: a quantized KV cache for transformers, with attention in place and snapshots.

    import kvtile
    group = kvtile.Group(n_layers=1, n_q_heads=8, n_kv_heads=2, k_dim=64)
    with kvtile.Cache(group, max_tokens=4096) as cache, cache.sequence() as seq:
        with seq.step(100) as step:               # a step of 100 tokens
            step.append(0, keys, values)          # for each layer: [100][2][64]
            out = step.attend(0, queries)         # [100][8][64], causal
        seq.save("first.kvt")

Arrays are NumPy's, PyTorch's (on the CPU, without a copy), or anything with DLPack or a buffer.
Each status of the C library is an exception below `kvtile.Error`, with the cache's text. Long calls
run without the interpreter's lock. `kvtile.transformers` has a cache for Hugging Face transformers.

What is stored and computed is the C library's, bit for bit: kvtile.h documents every call.
"""

from ._cache import Cache, CacheStats
from ._config import (BLOCK_TOKENS, FINE_NONE, RESIDUAL_NONE, SELECT_TOKENS, TOKEN_NONE, Group,
                      GroupFlag, Precision, Rope, RopePairing, Type, isa_names, memory_forecast,
                      version, working_forecast)
from ._errors import (ERRORS, ArgError, BudgetError, BusyError, CancelledError, ClosedError,
                      CorruptError, Error, FormatError, FullError, IoError, LimitError,
                      MismatchError, NumberError, OutOfMemoryError, StateError, UnsupportedError)
from ._lib import VERSION as __version__
from ._sequence import Sequence, SequenceStats, Step
from ._snapshot import KEY_BYTES, LoadResult, SnapshotInfo, convert, inspect
from ._store import PrefixResult, Store, StoreEntry, StoreStats, ValueInfo, value_check
from ._tensor import BFloat16

__all__ = [
    "ArgError", "BFloat16", "BLOCK_TOKENS", "BudgetError", "BusyError", "Cache", "CacheStats",
    "CancelledError", "ClosedError", "CorruptError", "Error", "ERRORS", "FINE_NONE",
    "FormatError", "FullError", "Group", "GroupFlag", "IoError", "KEY_BYTES", "LimitError",
    "LoadResult", "MismatchError", "NumberError", "OutOfMemoryError", "Precision",
    "PrefixResult", "RESIDUAL_NONE", "Rope", "RopePairing", "SELECT_TOKENS", "Sequence",
    "SequenceStats", "SnapshotInfo", "StateError", "Step", "Store", "StoreEntry", "StoreStats",
    "TOKEN_NONE", "Type", "UnsupportedError", "ValueInfo", "__version__", "convert", "inspect",
    "isa_names", "memory_forecast", "value_check", "version", "working_forecast",
]
