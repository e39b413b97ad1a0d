"""The caller's arrays as kvt_tensor: pointer, dtype and strides, never a copy.

What is taken, in this order: NumPy's arrays and what has __array_interface__, PyTorch's tensors by
their own attributes, DLPack on the CPU, the buffer protocol. `describe` answers

    (address, dtype, shape, strides in bytes, owner)

where `owner` keeps the memory alive and has to be held while the library works on it.

Attention over a long context leaves nothing of the interpreter in the CPU's caches: what a decode
step runs here takes ten times as long as in a loop. Hence the short ways for NumPy and PyTorch:
__array_interface__ calls Python code for a description that is not needed, and PyTorch's __dlpack__
is Python code too.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, Dict, Optional, Sequence as Seq, Tuple

import numpy as np

F32, F16, BF16 = 0, 1, 2
SIZES = (4, 2, 2)

Description = Tuple[int, int, Tuple[int, ...], Tuple[int, ...], Any]


class BFloat16:
    """A view of a 16-bit integer array as bf16, which NumPy has no type for.

    `array`: uint16 or int16, any shape and strides: the upper half of each f32. Not copied.
    """

    __slots__ = ("array",)

    def __init__(self, array: np.ndarray) -> None:
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" \
                or array.dtype.itemsize != 2 or not array.dtype.isnative:
            raise TypeError("BFloat16 takes a NumPy array of uint16 or int16")
        self.array = array

    @property
    def shape(self) -> Tuple[int, ...]:
        return self.array.shape


# ---- DLPack (dlpack.h) ----


class _DLTensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32),
                ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
                ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
                ("shape", ctypes.POINTER(ctypes.c_int64)),
                ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64)]


class _DLVersioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = [("major", ctypes.c_uint32), ("minor", ctypes.c_uint32),
                ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
                ("flags", ctypes.c_uint64), ("tensor", _DLTensor)]


_DL_READ_ONLY, _DL_COPIED = 1, 2
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.restype = ctypes.c_int
_capsule_is.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_DL_CPU, _DL_CUDA_HOST = 1, 3
_DL_DTYPES = {(2, 32, 1): F32, (2, 16, 1): F16, (4, 16, 1): BF16}


def _capsule_of(obj: Any, name: str, writable: bool) -> Tuple[Any, _DLTensor]:
    """A capsule and what it has. The versioned one says whether it may be written."""
    try:
        try:
            capsule = obj.__dlpack__(max_version=(1, 0))
        except TypeError:  # older than the versions
            capsule = obj.__dlpack__()
    except (BufferError, RuntimeError) as error:  # PyTorch: needs a gradient, is sparse, ...
        raise TypeError(f"{name}: {error}") from error
    if not _capsule_is(capsule, b"dltensor_versioned"):
        return capsule, _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    t = _DLVersioned.from_address(_capsule_pointer(capsule, b"dltensor_versioned"))
    if t.major != 1:
        raise TypeError(f"{name}: DLPack {t.major}.{t.minor}")
    if writable and t.flags & (_DL_READ_ONLY | _DL_COPIED):
        raise ValueError(f"{name}: read-only")
    return capsule, t.tensor


def _is_read_only(obj: Any) -> bool:
    """Whether its buffer, where it has one, says so: JAX's arrays never change."""
    try:
        return memoryview(obj).readonly
    except (TypeError, BufferError, ValueError, NotImplementedError, RuntimeError):
        return False


def _from_dlpack(obj: Any, name: str, writable: bool) -> Description:
    device = obj.__dlpack_device__()
    if device[0] not in (_DL_CPU, _DL_CUDA_HOST):
        raise ValueError(f"{name}: on device {tuple(map(int, device))}, needs memory of the CPU")
    if writable and _is_read_only(obj):
        raise ValueError(f"{name}: read-only")
    # The capsule keeps its name: it still owns the tensor, and releases it when it goes.
    capsule, t = _capsule_of(obj, name, writable)
    dtype = _DL_DTYPES.get((t.code, t.bits, t.lanes))
    if dtype is None:
        raise TypeError(f"{name}: {getattr(obj, 'dtype', 'its dtype')} is not float32, float16 or "
                        "bfloat16")
    ndim, size = t.ndim, SIZES[dtype]
    shape = tuple(t.shape[:ndim])
    if t.strides:
        strides = tuple([s * size for s in t.strides[:ndim]])
    else:
        strides = dense(shape, size)
    return (t.data or 0) + t.byte_offset, dtype, shape, strides, capsule


# ---- PyTorch ----

_torch_dtypes: Dict[Any, int] = {}


def _torch_tensor() -> Any:
    """torch.Tensor where PyTorch has been imported, else a type that nothing has."""
    torch: Any = sys.modules.get("torch")
    tensor = getattr(torch, "Tensor", None)  # absent while another thread imports it
    if tensor is None:
        return _Nothing
    if not _torch_dtypes:
        _torch_dtypes.update({torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16})
    return tensor


class _Nothing:
    pass


def _from_torch(t: Any, name: str) -> Description:
    if not t.is_cpu:
        raise ValueError(f"{name}: on device {t.device}, needs memory of the CPU")
    dtype = _torch_dtypes.get(t.dtype)
    if dtype is None:
        raise TypeError(f"{name}: {t.dtype} is not float32, float16 or bfloat16")
    if t.requires_grad:
        raise TypeError(f"{name}: needs a gradient, which is not computed here: detach() it")
    if t.is_neg():
        raise TypeError(f"{name}: a view that negates: resolve_neg() it")
    try:
        address = t.data_ptr()
        strides = t.stride()
    except RuntimeError as error:  # sparse, or without memory
        raise TypeError(f"{name}: {str(error).splitlines()[0]}") from error
    size = SIZES[dtype]
    return address, dtype, t.shape, tuple([s * size for s in strides]), t


# ---- NumPy and buffers ----


class _ArrayHead(ctypes.Structure):
    """The beginning of PyArrayObject_fields behind PyObject's head: a part of NumPy's ABI."""

    _fields_ = [("data", ctypes.c_void_p), ("nd", ctypes.c_int), ("dimensions", ctypes.c_void_p),
                ("strides", ctypes.c_void_p), ("base", ctypes.c_void_p),
                ("descr", ctypes.c_void_p), ("flags", ctypes.c_int)]


_WRITEABLE = 0x400
_array_head = _ArrayHead.from_address
_ARRAY_HEAD_AT = object.__basicsize__
_NATIVE_F32 = np.dtype(np.float32)
_NATIVE_F16 = np.dtype(np.float16)


def _has_array_head() -> bool:
    """Whether objects of this interpreter and NumPy lie as _from_array reads them."""
    if sys.implementation.name != "cpython":
        return False
    for writable in (True, False):
        array = np.zeros((2, 3), np.float32)[:, 1:]
        array.flags.writeable = writable
        head = _array_head(id(array) + _ARRAY_HEAD_AT)
        if (head.data, head.nd, bool(head.flags & _WRITEABLE)) != \
                (array.__array_interface__["data"][0], 2, writable):
            return False
    return True


def _from_array(array: np.ndarray, name: str, writable: bool) -> Description:
    dtype = array.dtype
    if dtype is _NATIVE_F32:
        code = F32
    elif dtype is _NATIVE_F16:
        code = F16
    else:
        return _from_numpy(array, name, writable)
    head = _array_head(id(array) + _ARRAY_HEAD_AT)
    if writable and not head.flags & _WRITEABLE:
        raise ValueError(f"{name}: read-only")
    return head.data, code, array.shape, array.strides, array


_TYPESTR = {"<f4": F32, "<f2": F16} if sys.byteorder == "little" else {}


def dense(shape: Seq[int], size: int) -> Tuple[int, ...]:
    strides = []
    for n in reversed(shape):
        strides.append(size)
        size *= n
    return tuple(reversed(strides))


def _from_numpy(array: Any, name: str, writable: bool, bits: bool = False) -> Description:
    interface = array.__array_interface__
    if not isinstance(interface, dict):  # of a class
        interface = {}
    typestr, shape, data = map(interface.get, ("typestr", "shape", "data"))
    if typestr is None or shape is None or not (  # a buffer in place of an address, or its own
            isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], (int, np.integer))):
        raise TypeError(f"{name}: its __array_interface__ lacks typestr, shape, or data as "
                        "(address, read-only)")
    dtype: Optional[int] = BF16 if bits else _TYPESTR.get(typestr)
    if dtype is None:
        kind = getattr(array, "dtype", typestr)
        if str(kind) != "bfloat16":  # ml_dtypes
            raise TypeError(f"{name}: {kind} is not float32, float16 or bfloat16")
        dtype = BF16
    address, read_only = data
    if writable and read_only:
        raise ValueError(f"{name}: read-only")
    return address, dtype, shape, interface.get("strides") or dense(shape, SIZES[dtype]), array


if not _has_array_head():
    _from_array = _from_numpy  # type: ignore


def describe(obj: Any, name: str, writable: bool = False) -> Description:
    """See the head of this file. TypeError: no array, or not of f32, f16 or bf16."""
    kind = type(obj)
    if kind is np.ndarray:
        return _from_array(obj, name, writable)
    if isinstance(obj, _torch_tensor()):
        return _from_torch(obj, name)
    if kind is BFloat16:
        return _from_numpy(obj.array, name, writable, True)
    if isinstance(obj, np.ma.MaskedArray):
        raise TypeError(f"{name}: a masked array; fill it first")
    if hasattr(obj, "__array_interface__"):
        return _from_numpy(obj, name, writable)
    if hasattr(obj, "__dlpack__"):
        return _from_dlpack(obj, name, writable)
    try:
        view = memoryview(obj)
    except TypeError:
        raise TypeError(f"{name}: {type(obj).__name__} is no array: it has neither "
                        "__array_interface__, nor __dlpack__, nor a buffer") from None
    if writable and view.readonly:
        raise ValueError(f"{name}: read-only")
    return _from_numpy(np.asarray(view), name, writable)


def rows(obj: Any, name: str, n_heads: int, dims: int, writable: bool = False,
         n_tokens: Optional[int] = None) -> Tuple[int, int, int, int, int, Any, int]:
    """[n][n_heads][dims] (or [n_heads][dims], one token) as kvt_tensor has it.

    (address, dtype, token_stride, head_stride, n, owner, ndim); ValueError: another shape, dims
    that are not contiguous, strides that the library cannot take.
    """
    address, dtype, shape, strides, owner = describe(obj, name, writable)
    ndim = len(shape)
    size = SIZES[dtype]
    if ndim == 3:
        n, heads, last = shape
        token_stride, head_stride, last_stride = strides
    elif ndim == 2:
        heads, last = shape
        head_stride, last_stride = strides
        n, token_stride = 1, 0
    else:
        heads = -1
    if heads != n_heads or last != dims or (n_tokens is not None and n != n_tokens):
        needs = "n" if n_tokens is None else n_tokens
        raise ValueError(f"{name}: shape {tuple(shape)}, needs ({needs}, {n_heads}, {dims})")
    if n == 0:  # NumPy gives such arrays any strides
        return address, dtype, 0, 0, 0, owner, ndim
    if last_stride != size:
        raise ValueError(f"{name}: the last dimension is not contiguous: a stride of {last_stride} "
                         f"bytes, needs {size}")
    # The stride of a single token or head means nothing; 0 stands for a dense one.
    if n_heads == 1:
        head_stride = 0
    elif head_stride <= 0:
        raise ValueError(f"{name}: heads at a stride of {head_stride} bytes: broadcast or reversed")
    if n == 1:
        token_stride = 0
    elif token_stride <= 0:
        raise ValueError(f"{name}: tokens at a stride of {token_stride} bytes: broadcast or "
                         "reversed")
    return address, dtype, token_stride, head_stride, n, owner, ndim


def int32s(values: Any, name: str, n: Optional[int] = None) -> np.ndarray:
    """A dense int32 array of [n] of any integers. Copies only where it has to."""
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.int32)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: {array.dtype}, needs integers")
    if array.ndim != 1 or (n is not None and array.shape[0] != n):
        raise ValueError(f"{name}: shape {array.shape}, needs ({'n' if n is None else n},)")
    if array.dtype == np.int32 and array.flags.c_contiguous:
        return array
    if array.size and (array.min() < -2**31 or array.max() >= 2**31):
        raise ValueError(f"{name}: beyond 32 bits")
    return np.ascontiguousarray(array, dtype=np.int32)


def floats(values: Any, name: str, n: int) -> np.ndarray:
    """A dense f32 array of [n]."""
    array = np.ascontiguousarray(values, dtype=np.float32)
    if array.shape != (n,):
        raise ValueError(f"{name}: shape {array.shape}, needs ({n},)")
    return array


def span(address: int, n: int, n_heads: int, row_bytes: int, token_stride: int,
         head_stride: int) -> Tuple[int, int]:
    """First byte and the byte behind the last one of a tensor's memory."""
    head_stride = head_stride or row_bytes
    token_stride = token_stride or n_heads * head_stride
    return address, address + (n - 1) * token_stride + (n_heads - 1) * head_stride + row_bytes
