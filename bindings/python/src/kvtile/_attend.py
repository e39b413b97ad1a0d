"""Attend: its arguments checked, and packed into the library's structs at once."""

from __future__ import annotations

import ctypes
import struct
import sys
from ctypes import sizeof
from itertools import repeat
from typing import TYPE_CHECKING, Any, List, Optional, Sequence as Seq, Set, Tuple

import numpy as np

from . import _lib
from ._config import Precision
from ._lib import lib
from ._tensor import F16, F32, SIZES, dense, describe, floats, int32s, rows, span

if TYPE_CHECKING:
    from ._cache import Cache
    from ._sequence import Sequence

TENSORS = struct.Struct("PiqqPiqq")
TENSOR_SIZE = sizeof(_lib.Tensor)
_ATTEND = struct.Struct("NIIPNPiqqPiqqPffPPI0P")
_ITEM = struct.Struct("PQPPNQQQ")
SCRATCH_ITEMS = 64
assert TENSORS.size == 2 * TENSOR_SIZE and _ITEM.size == sizeof(_lib.AttendItem)
assert _ATTEND.size == sizeof(_lib.AttendArgs)


def make_scratch(n_items: int) -> Tuple[Any, int]:
    memory = ctypes.create_string_buffer(_ATTEND.size + n_items * _ITEM.size)
    return memory, ctypes.addressof(memory)


# Buffers for the structs of calls that are not running: list.pop and append are atomic.
scratch_pool: List[Tuple[Any, int]] = []

_attend = lib.kvt_attend


def attend(cache: "Cache", layer: int, items: "List[Sequence]", counts: List[int], q: Any, out: Any,
            causal: bool, precision: int, lse: Any, scale: float, softcap: float,
            sink_logits: Any, alibi_slopes: Any, positions: Optional[Seq[Any]],
            masks: Optional[Seq[Any]]) -> Any:
    n_heads, _, k_dim, v_dim, _ = cache._layer(layer)
    n = sum(counts) if len(counts) > 1 else counts[0]
    qa, qd, qt, qh, n_q, q_owner, q_ndim = rows(q, "q", n_heads, k_dim, False,
                                                   None if n < 0 else n)
    if n < 0:  # all rows of q are the one sequence's
        n = n_q
        counts = [n]
    if out is None:
        out = _empty_like(q, (n, n_heads, v_dim), qd)
        oa, od, ot, oh, _, o_owner, _ = rows(out, "out", n_heads, v_dim, True, n)
        if q_ndim == 2:
            out = out[0]
    else:
        oa, od, ot, oh, _, o_owner, _ = rows(out, "out", n_heads, v_dim, True, n)
        if n:
            q_rows = (qa, n, n_heads, k_dim * SIZES[qd], qt, qh)
            o_rows = (oa, n, n_heads, v_dim * SIZES[od], ot, oh)
            q0, q1 = span(*q_rows)
            o0, o1 = span(*o_rows)
            if q0 < o1 and o0 < q1 and _meet(q_rows, o_rows):
                raise ValueError("out: overlaps q")
    if precision:
        precision = Precision(precision)
    la = sinks = slopes = 0
    keep: List[Any] = []
    if lse is not None and lse is not False:
        given = lse is not True
        if not given:
            lse = np.empty((n, n_heads), np.float32)
        la, l_owner = _dense_f32(lse, "lse", (n, n_heads))
        keep.append(l_owner)
        if given and n:
            l_rows = (la, n, 1, n_heads * 4, 0, 0)
            if _overlap(l_rows, (qa, n, n_heads, k_dim * SIZES[qd], qt, qh)):
                raise ValueError("lse: overlaps q")
            if _overlap(l_rows, (oa, n, n_heads, v_dim * SIZES[od], ot, oh)):
                raise ValueError("lse: overlaps out")
    else:
        lse = None
    if sink_logits is not None:
        keep.append(floats(sink_logits, "sink_logits", n_heads))
        sinks = keep[-1].ctypes.data
    if alibi_slopes is not None:
        keep.append(floats(alibi_slopes, "alibi_slopes", n_heads))
        slopes = keep[-1].ctypes.data
    n_items = len(items)
    if n_items > SCRATCH_ITEMS:
        scratch = make_scratch(n_items)
    else:
        try:
            scratch = scratch_pool.pop()
        except IndexError:
            scratch = make_scratch(SCRATCH_ITEMS)
    memory, address = scratch
    use = object()
    taken: List[Set[object]] = []
    giving = map(set.discard, taken, repeat(use))
    try:
        at = _ATTEND.size
        for i, s in enumerate(items):
            taken.append(s._users)
            pointer = s._take(use)
            pa = ma = m_stride = m_tokens = 0
            if positions is not None and positions[i] is not None:
                keep.append(int32s(positions[i], "query_positions", counts[i]))
                pa = keep[-1].ctypes.data
            if masks is not None and masks[i] is not None:
                packed, m_tokens = _pack_mask(masks[i], counts[i])
                keep.append(packed)
                ma, m_stride = packed.ctypes.data, packed.shape[1]
            _ITEM.pack_into(memory, at, pointer, counts[i], pa, ma, m_stride, m_tokens, 0, 0)
            at += _ITEM.size
        _ATTEND.pack_into(memory, 0, _ATTEND.size, layer, (1 if causal else 0) | precision,
                          address + _ATTEND.size, n_items, qa, qd, qt, qh, oa, od, ot, oh, la,
                          scale, softcap, sinks, slopes, 0)
        status = _attend(cache._pointer, address)
        if status:
            cache._check(status)
    except struct.error as error:
        raise TypeError(f"attend: {error}") from None
    finally:
        any(giving)
        if n_items <= SCRATCH_ITEMS:
            scratch_pool.append(scratch)
    del q_owner, o_owner, keep
    return out if lse is None else (out, lse)


_Rows = Tuple[int, int, int, int, int, int]  # what `span` takes


def _overlap(a: _Rows, b: _Rows) -> bool:
    a0, a1 = span(*a)
    b0, b1 = span(*b)
    return a0 < b1 and b0 < a1 and _meet(a, b)


def _meet(*tensors: _Rows) -> bool:
    """Whether rows of two tensors have bytes in common: both may lie in one buffer."""
    starts, ends = [], []
    for address, n, n_heads, row_bytes, token_stride, head_stride in tensors:
        head_stride = head_stride or row_bytes
        token_stride = token_stride or n_heads * head_stride
        start = (address + np.arange(n, dtype=np.int64)[:, None] * token_stride
                 + np.arange(n_heads, dtype=np.int64) * head_stride).ravel()
        starts.append(start)
        ends.append(start + row_bytes)
    start, end = np.concatenate(starts), np.concatenate(ends)
    order = np.argsort(start, kind="stable")
    return bool((start[order][1:] < end[order][:-1]).any())


def _empty_like(q: Any, shape: Tuple[int, ...], dtype: int) -> Any:
    """A new array of q's kind and dtype: NumPy's, or PyTorch's where q is its."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(q, torch.Tensor):
        return torch.empty(shape, dtype=q.dtype)
    return np.empty(shape, np.float16 if dtype == F16 else np.float32)


def _dense_f32(obj: Any, name: str, shape: Tuple[int, int]) -> Tuple[int, Any]:
    """(address, owner)"""
    address, dtype, found, strides, owner = describe(obj, name, True)
    if dtype != F32:
        raise TypeError(f"{name}: needs float32")
    if tuple(found) != shape or any(n > 1 and stride != needed for n, stride, needed
                                    in zip(shape, strides, dense(shape, 4))):
        raise ValueError(f"{name}: shape {tuple(found)}, strides {tuple(strides)}: needs "
                         f"{shape}, contiguous")
    return address, owner


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


def n_rows(q: Any, name: str = "q") -> int:
    shape = describe(q, name)[2]
    return int(shape[0]) if len(shape) == 3 else 1
