"""The C library: where it is found, its structs and prototypes (kvtile.h and store.h, by ctypes).

ctypes and not cffi: a call by ctypes takes 0.25 microseconds, by cffi 0.2, by a compiled cffi
module 0.15 to 0.2, and ctypes needs neither a compiler nor a package at run time.

Every function is called without the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import (CFUNCTYPE, POINTER, Structure, c_char, c_char_p, c_double, c_float, c_int,
                    c_int32, c_int64, c_size_t, c_uint8, c_uint32, c_uint64, c_void_p)

MAX_GROUPS = 8
MAX_FINGERPRINT = 64
MAX_TAG = 256
MAX_LAYERS = 1024


class Tensor(Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int), ("token_stride", c_int64),
                ("head_stride", c_int64)]


class Allocator(Structure):
    _fields_ = [("user", c_void_p), ("alloc", c_void_p), ("free", c_void_p)]


class Executor(Structure):
    _fields_ = [("user", c_void_p), ("run", c_void_p), ("n_threads", c_uint32)]


class GroupConfig(Structure):
    _fields_ = [("struct_size", c_size_t), ("n_layers", c_uint32), ("n_q_heads", c_uint32),
                ("n_kv_heads", c_uint32), ("k_dim", c_uint32), ("v_dim", c_uint32),
                ("k_type", c_int), ("v_type", c_int), ("flags", c_uint32),
                ("layers", POINTER(c_uint32)), ("rotation_seed", c_uint64),
                ("residual_tokens", c_uint32), ("window_tokens", c_uint32),
                ("sink_tokens", c_uint32), ("rope_pairing", c_int), ("rope_first_dim", c_uint32),
                ("rope_dims", c_uint32), ("rope_inverse_frequencies", POINTER(c_float)),
                ("fine_tokens", c_uint32), ("reserved", c_uint32)]


class Config(Structure):
    _fields_ = [("struct_size", c_size_t), ("groups", POINTER(GroupConfig)),
                ("n_groups", c_uint32), ("n_threads", c_uint32), ("max_tokens", c_uint64),
                ("memory_budget_bytes", c_uint64), ("fingerprint", c_char_p),
                ("fingerprint_bytes", c_size_t), ("allocator", Allocator), ("executor", Executor),
                ("isa", c_char_p), ("error_text", c_char_p), ("error_text_bytes", c_size_t)]


class CacheStats(Structure):
    _fields_ = [("struct_size", c_size_t)] + [
        (name, c_uint64) for name in
        ("bytes", "blocks_free", "blocks_reserved", "blocks_used", "blocks_shared",
         "blocks_sealed", "bytes_free", "bytes_reserved", "bytes_used", "bytes_shared")
    ] + [("reserved", c_uint64 * 8)]


class SeqStats(Structure):
    _fields_ = [("struct_size", c_size_t), ("own_bytes", c_uint64), ("shared_bytes", c_uint64),
                ("reserved", c_uint64 * 4)]


class AttendItem(Structure):
    _fields_ = [("seq", c_void_p), ("n_queries", c_uint64), ("query_positions", c_void_p),
                ("mask", c_void_p), ("mask_stride", c_size_t), ("mask_tokens", c_uint64),
                ("reserved", c_uint64 * 2)]


class AttendArgs(Structure):
    _fields_ = [("struct_size", c_size_t), ("layer", c_uint32), ("flags", c_uint32),
                ("items", c_void_p), ("n_items", c_size_t), ("q", Tensor), ("out", Tensor),
                ("lse", c_void_p), ("scale", c_float), ("softcap", c_float),
                ("sink_logits", c_void_p), ("alibi_slopes", c_void_p), ("n_threads", c_uint32)]


WRITE = CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t)
READ = CFUNCTYPE(c_int64, c_void_p, c_void_p, c_size_t)


class Writer(Structure):
    _fields_ = [("user", c_void_p), ("write", WRITE)]


class Reader(Structure):
    _fields_ = [("user", c_void_p), ("read", READ)]


class SnapshotPiece(Structure):
    _fields_ = [("name", c_char_p), ("data", c_void_p), ("bytes", c_size_t)]


PROGRESS = CFUNCTYPE(c_int, c_void_p, c_uint64, c_uint64)
ON_PIECE = CFUNCTYPE(c_int, c_void_p, POINTER(SnapshotPiece))


class SaveOptions(Structure):
    _fields_ = [("struct_size", c_size_t), ("codec", c_uint32), ("no_fsync", c_uint32),
                ("zstd_level", c_int32), ("in_place", c_uint32), ("first_token", c_uint64),
                ("n_tokens", c_uint64), ("layers", POINTER(c_uint32)), ("n_layers", c_uint32),
                ("convert", c_uint32), ("n_types", c_uint32), ("reserved", c_uint32),
                ("k_types", c_void_p), ("v_types", c_void_p),
                ("parent", c_char_p), ("pieces", POINTER(SnapshotPiece)), ("n_pieces", c_size_t),
                ("key", c_void_p), ("progress", PROGRESS), ("progress_user", c_void_p)]


class LoadOptions(Structure):
    _fields_ = [("struct_size", c_size_t), ("prompt", c_void_p), ("n_prompt", c_uint64),
                ("reuse", c_uint32), ("map", c_uint32), ("convert", c_uint32),
                ("n_layers", c_uint32), ("layers", POINTER(c_uint32)), ("folder", c_char_p),
                ("key", c_void_p), ("on_piece", ON_PIECE), ("piece_user", c_void_p),
                ("progress", PROGRESS), ("progress_user", c_void_p)]


class InspectOptions(Structure):
    _fields_ = [("struct_size", c_size_t), ("verify", c_uint32), ("reserved", c_uint32),
                ("folder", c_char_p), ("key", c_void_p), ("on_piece", ON_PIECE),
                ("piece_user", c_void_p), ("progress", PROGRESS), ("progress_user", c_void_p)]


class LoadResult(Structure):
    _fields_ = [("n_tokens", c_uint64), ("prefix_tokens", c_uint64), ("reuse_tokens", c_uint64),
                ("checkpoint_tokens", c_uint64), ("mapped_bytes", c_uint64),
                ("reserved", c_uint64 * 3)]


class SnapshotGroup(Structure):
    _fields_ = [("n_layers", c_uint32), ("n_q_heads", c_uint32), ("n_kv_heads", c_uint32),
                ("k_dim", c_uint32), ("v_dim", c_uint32), ("k_type", c_int), ("v_type", c_int),
                ("flags", c_uint32), ("rotation_seed", c_uint64), ("window_tokens", c_uint32),
                ("sink_tokens", c_uint32), ("reserved", c_uint64 * 3)]


class SnapshotInfo(Structure):
    _fields_ = [("struct_size", c_size_t), ("version", c_uint32), ("n_groups", c_uint32),
                ("groups", SnapshotGroup * MAX_GROUPS), ("fingerprint", c_uint8 * MAX_FINGERPRINT),
                ("fingerprint_bytes", c_uint32), ("next_position", c_int32),
                ("tag", c_uint8 * MAX_TAG), ("tag_bytes", c_uint32), ("reserved", c_uint32),
                ("n_tokens", c_uint64), ("n_blocks", c_uint64), ("n_open_blocks", c_uint64),
                ("n_checkpoints", c_uint64), ("file_bytes", c_uint64), ("stored_bytes", c_uint64),
                ("native_bytes", c_uint64), ("n_elements", c_uint64), ("snapshot_id", c_uint8 * 16),
                ("parent_id", c_uint8 * 16), ("parent_name", c_char * 256), ("depth", c_uint32),
                ("encrypted", c_uint32), ("inherited_tokens", c_uint64),
                ("inherited_blocks", c_uint64), ("native_blocks", c_uint64),
                ("n_pieces", c_uint64), ("reserved2", c_uint64 * 8), ("n_layers", c_uint32),
                ("layer_groups", c_uint8 * MAX_LAYERS)]


# ---- store.h ----

STORE_KEY_BYTES = 32
STORE_STOP = 2


class StoreKey(Structure):
    _fields_ = [("bytes", c_uint8 * STORE_KEY_BYTES)]


class StoreError(Structure):
    _fields_ = [("text", c_char * 256)]


class StorePart(Structure):
    _fields_ = [("data", c_void_p), ("bytes", c_size_t)]


class StoreValue(Structure):
    _fields_ = [("parts", POINTER(StorePart)), ("n_parts", c_size_t), ("bytes", c_uint64)]


STORE_PART = CFUNCTYPE(c_int, c_void_p, c_size_t, c_uint64, c_uint64, c_void_p, c_size_t)


class StoreReceiver(Structure):
    _fields_ = [("user", c_void_p), ("part", STORE_PART), ("place", c_void_p)]


class StoreEntry(Structure):
    _fields_ = [("key", StoreKey), ("bytes", c_uint64), ("used_seconds", c_int64),
                ("left_seconds", c_int64)]


class StoreStats(Structure):
    _fields_ = [(name, c_uint64) for name in
                ("n_values", "bytes", "max_bytes", "n_got", "n_missed", "n_put", "n_evicted",
                 "n_failed")] + [("reserved", c_uint64 * 8)]


_KEYS = POINTER(StoreKey)
_ERROR = POINTER(StoreError)
STORE_ON_ENTRY = CFUNCTYPE(c_int, c_void_p, POINTER(StoreEntry))
STORE_GET = CFUNCTYPE(c_int, c_void_p, _KEYS, c_size_t, POINTER(StoreReceiver), _ERROR)
STORE_PUT = CFUNCTYPE(c_int, c_void_p, _KEYS, POINTER(StoreValue), c_size_t, POINTER(c_size_t),
                      _ERROR)
STORE_EXISTS = CFUNCTYPE(c_int, c_void_p, _KEYS, c_size_t, POINTER(c_uint8), _ERROR)
STORE_REMOVE = CFUNCTYPE(c_int, c_void_p, _KEYS, c_size_t, _ERROR)
STORE_LIST = CFUNCTYPE(c_int, c_void_p, STORE_ON_ENTRY, c_void_p, _ERROR)
STORE_STATS = CFUNCTYPE(c_int, c_void_p, POINTER(StoreStats), _ERROR)
STORE_COLLECT = CFUNCTYPE(c_int, c_void_p, _ERROR)


class Store(Structure):
    _fields_ = [("struct_size", c_size_t), ("user", c_void_p), ("get", STORE_GET),
                ("put", STORE_PUT), ("exists", STORE_EXISTS), ("remove", STORE_REMOVE),
                ("list", STORE_LIST), ("stats", STORE_STATS), ("collect", STORE_COLLECT),
                ("close", c_void_p), ("n_at_once", c_size_t), ("reserved", c_void_p * 3)]


class DirectoryConfig(Structure):
    _fields_ = [("struct_size", c_size_t), ("path", c_char_p), ("max_bytes", c_uint64),
                ("sync", c_uint32), ("reserved", c_uint32), ("error_text", c_char_p),
                ("error_text_bytes", c_size_t)]


class RedisConfig(Structure):
    _fields_ = [("struct_size", c_size_t), ("host", c_char_p), ("unix_path", c_char_p),
                ("port", c_uint32), ("database", c_uint32), ("username", c_char_p),
                ("password", c_char_p), ("tls", c_uint32), ("ttl_seconds", c_uint32),
                ("connect_timeout_ms", c_uint32), ("timeout_ms", c_uint32),
                ("call_timeout_ms", c_uint32), ("retry_ms", c_uint32), ("pipeline", c_uint32),
                ("reserved", c_uint32), ("prefix", c_char_p), ("tls_ca_file", c_char_p),
                ("tls_cert_file", c_char_p), ("tls_key_file", c_char_p),
                ("error_text", c_char_p), ("error_text_bytes", c_size_t)]


class PrefixExtra(Structure):
    _fields_ = [("block", c_uint64), ("data", c_char_p), ("bytes", c_size_t)]


class PrefixOptions(Structure):
    _fields_ = [("struct_size", c_size_t), ("name_space", c_char_p), ("name_space_bytes", c_size_t),
                ("salt", c_char_p), ("salt_bytes", c_size_t), ("extras", POINTER(PrefixExtra)),
                ("n_extras", c_size_t), ("positions", c_void_p), ("n_tokens", c_uint64),
                ("checkpoints", c_uint32), ("reserved", c_uint32),
                ("checkpoint_tokens", POINTER(c_uint64)), ("n_checkpoint_tokens", c_size_t)]


class PrefixResult(Structure):
    _fields_ = [("n_tokens", c_uint64), ("n_values", c_uint64), ("n_bytes", c_uint64),
                ("n_refused", c_uint64), ("n_checkpoints", c_uint64), ("reserved", c_uint64 * 3)]


class ValueInfo(Structure):
    _fields_ = [("struct_size", c_size_t), ("version", c_uint32), ("checkpoint", c_uint32),
                ("n_tokens", c_uint64), ("n_blocks", c_uint32), ("reserved", c_uint32),
                ("blob_bytes", c_uint64), ("reserved2", c_uint64 * 4)]


STRUCTS = {
    "kvt_tensor": Tensor, "kvt_allocator": Allocator, "kvt_executor": Executor,
    "kvt_group_config": GroupConfig, "kvt_config": Config, "kvt_cache_stats": CacheStats,
    "kvt_seq_stats": SeqStats, "kvt_attend_item": AttendItem, "kvt_attend_args": AttendArgs,
    "kvt_writer": Writer, "kvt_reader": Reader, "kvt_snapshot_piece": SnapshotPiece,
    "kvt_save_options": SaveOptions, "kvt_load_options": LoadOptions,
    "kvt_inspect_options": InspectOptions, "kvt_load_result": LoadResult,
    "kvt_snapshot_group": SnapshotGroup, "kvt_snapshot_info": SnapshotInfo,
    "kvt_store_key": StoreKey, "kvt_store_error": StoreError, "kvt_store_part": StorePart,
    "kvt_store_value": StoreValue, "kvt_store_receiver": StoreReceiver,
    "kvt_store_entry": StoreEntry, "kvt_store_stats": StoreStats, "kvt_store": Store,
    "kvt_directory_config": DirectoryConfig, "kvt_redis_config": RedisConfig,
    "kvt_prefix_extra": PrefixExtra, "kvt_prefix_options": PrefixOptions,
    "kvt_prefix_result": PrefixResult, "kvt_value_info": ValueInfo,
}
"""The headers' structs: the tests compare size and offsets with what a C compiler says."""

_P = c_void_p
_PROTOTYPES = {
    "kvt_status_string": (c_char_p, [c_int]),
    "kvt_version": (c_char_p, []),
    "kvt_isa_name": (c_char_p, [c_uint32]),
    "kvt_cache_create": (c_int, [_P, _P]),
    "kvt_cache_destroy": (None, [_P]),
    "kvt_cache_error": (c_int, [_P, _P, c_size_t]),
    "kvt_cache_isa": (c_char_p, [_P]),
    "kvt_cache_memory_bytes": (c_uint64, [_P]),
    "kvt_cache_get_stats": (c_int, [_P, _P]),
    "kvt_cache_bytes_per_token": (c_double, [_P]),
    "kvt_cache_trim": (c_int, [_P]),
    "kvt_memory_forecast": (c_int, [_P, c_uint64, c_uint64, _P]),
    "kvt_working_forecast": (c_int, [_P, c_uint64, _P]),
    "kvt_seq_create": (c_int, [_P, _P]),
    "kvt_seq_reserve": (c_int, [_P, c_uint64]),
    "kvt_seq_fork": (c_int, [_P, c_uint64, _P]),
    "kvt_seq_destroy": (None, [_P]),
    "kvt_seq_length": (c_uint64, [_P]),
    "kvt_seq_pending": (c_uint64, [_P]),
    "kvt_seq_next_position": (c_int32, [_P]),
    "kvt_seq_set_next_position": (c_int, [_P, c_int32]),
    "kvt_seq_set_tag": (c_int, [_P, c_char_p, c_size_t]),
    "kvt_seq_tag": (c_int, [_P, _P, c_size_t, _P]),
    "kvt_seq_capacity": (c_uint64, [_P]),
    "kvt_seq_max_tokens": (c_uint64, [_P]),
    "kvt_seq_memory_bytes": (c_uint64, [_P]),
    "kvt_seq_get_stats": (c_int, [_P, _P]),
    "kvt_seq_token_ids": (c_int, [_P, c_uint64, c_uint64, _P]),
    "kvt_seq_positions": (c_int, [_P, c_uint64, c_uint64, _P]),
    "kvt_seq_key_positions": (c_int, [_P, c_uint64, c_uint64, _P]),
    "kvt_seq_clear": (c_int, [_P]),
    "kvt_seq_truncate": (c_int, [_P, c_uint64]),
    "kvt_seq_reachable": (c_uint64, [_P, c_uint64]),
    "kvt_seq_remove": (c_int, [_P, c_uint64, c_uint64]),
    "kvt_seq_checkpoint": (c_int, [_P, c_char_p, c_size_t]),
    "kvt_seq_checkpoints": (c_int, [_P, _P, c_size_t, _P]),
    "kvt_seq_checkpoint_read": (c_int, [_P, c_uint64, _P, c_size_t, _P]),
    "kvt_seq_checkpoint_drop": (c_int, [_P, c_uint64]),
    "kvt_seq_begin": (c_int, [_P, c_uint64, _P]),
    "kvt_append": (c_int, [_P, c_uint32, _P, _P]),
    "kvt_seq_commit": (c_int, [_P, _P]),
    "kvt_seq_commit_selected": (c_int, [_P, _P, c_uint64, _P]),
    "kvt_seq_abort": (c_int, [_P]),
    "kvt_attend": (c_int, [_P, _P]),
    "kvt_read": (c_int, [_P, c_uint32, c_int, c_uint64, c_uint64, _P]),
    "kvt_seq_save": (c_int, [_P, c_char_p, _P]),
    "kvt_seq_save_stream": (c_int, [_P, _P, _P]),
    "kvt_seq_save_fd": (c_int, [_P, c_int, _P]),
    "kvt_seq_save_memory": (c_int, [_P, _P, c_size_t, _P, _P]),
    "kvt_seq_save_bound": (c_int, [_P, _P, _P]),
    "kvt_seq_load": (c_int, [_P, c_char_p, _P, _P]),
    "kvt_seq_load_stream": (c_int, [_P, _P, _P, _P]),
    "kvt_seq_load_fd": (c_int, [_P, c_int, _P, _P]),
    "kvt_seq_load_memory": (c_int, [_P, _P, c_size_t, _P, _P]),
    "kvt_snapshot_inspect_with": (c_int, [c_char_p, _P, _P, _P, c_size_t]),
    "kvt_snapshot_convert": (c_int, [c_char_p, _P, c_char_p, _P, _P, c_size_t]),
    "kvt_store_close": (None, [_P]),
    "kvt_store_open_directory": (c_int, [_P, _P]),
    "kvt_store_open_redis": (c_int, [_P, _P]),
    "kvt_store_open_tiers": (c_int, [_P, _P, _P]),
    "kvt_prefix_put": (c_int, [_P, _P, _P, _P]),
    "kvt_prefix_get": (c_int, [_P, _P, _P, c_uint64, _P, _P]),
    "kvt_prefix_probe": (c_int, [_P, _P, _P, c_uint64, _P, _P]),
    "kvt_value_check": (c_int, [_P, c_char_p, c_size_t, _P, _P, c_size_t]),
}

VERSION = "0.1.0"
_SONAME = "libkvtile.so.0"


def _open() -> ctypes.CDLL:
    """$KVTILE_LIBRARY, else the library in this folder (of a wheel), else the system's."""
    named = os.environ.get("KVTILE_LIBRARY")
    bundled = os.path.join(os.path.dirname(os.path.abspath(__file__)), _SONAME)
    path = named or (bundled if os.path.exists(bundled) else _SONAME)
    try:
        opened = ctypes.CDLL(path)
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(opened, name)
            function.restype = result
            function.argtypes = arguments
    except (OSError, AttributeError) as error:
        raise ImportError(f"kvtile: no C library: {error}; install it (Debian: libkvtile0), or set "
                          "KVTILE_LIBRARY to the path of libkvtile.so") from error
    # Before 1.0 structs may change with the minor version.
    found = opened.kvt_version().decode()
    if found.split(".")[:2] != VERSION.split(".")[:2]:
        raise ImportError(f"kvtile: {path} is version {found}, this package needs {VERSION}")
    return opened


lib = _open()


def error_of(cache: "int | None", status: int) -> str:
    """The text of a failure: the cache's own words where it has them."""
    text = b""
    if cache:
        buffer = (c_char * 1024)()
        if lib.kvt_cache_error(cache, buffer, len(buffer)) == 0:
            text = buffer.value
    return (text or lib.kvt_status_string(status)).decode("utf-8", "replace")
