"""Paths, texts and memory on their way to C and back, where ctypes does not check."""

from __future__ import annotations

import ctypes
import os
from typing import Any, Optional, Union

PathLike = Union[str, bytes, "os.PathLike[str]", "os.PathLike[bytes]"]


def _whole_text(data: bytes, name: str) -> bytes:
    """c_char_p would end at the first NUL."""
    if b"\0" in data:
        raise ValueError(f"{name}: embedded null byte")
    return data


def path(value: PathLike, name: str) -> bytes:
    return _whole_text(os.fsencode(value), name)


def path_or_none(value: Optional[PathLike], name: str) -> Optional[bytes]:
    return None if value is None else path(value, name)


def text_or_none(value: Optional[str], name: str) -> Optional[bytes]:
    return None if value is None else _whole_text(value.encode(), name)


def piece_name(value: PathLike, name: str) -> bytes:
    """UTF-8 whatever the locale: a snapshot is read elsewhere."""
    value = os.fspath(value)
    return _whole_text(value.encode("utf-8", "surrogateescape") if isinstance(value, str)
                       else value, name)


def piece_text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def contents(value: Any, name: str) -> bytes:
    """The bytes of bytes or a buffer. bytes(value) would make so many zeros of a number."""
    if type(value) is bytes:
        return value
    try:
        return memoryview(value).tobytes()
    except TypeError:
        raise TypeError(f"{name}: {type(value).__name__} is neither bytes nor a buffer") from None


_STRING_AT_MAX = 2**31 - 1  # its size is a C int in CPython 3.11, which cuts what is longer


def view(address: int, size: int) -> memoryview:
    """C's memory, not copied: not for anybody who may keep it."""
    return memoryview((ctypes.c_char * size).from_address(address))


def copied(address: Optional[int], size: int) -> bytes:
    """A copy of C's memory, of any size."""
    if not size:
        return b""
    if size <= _STRING_AT_MAX:
        return ctypes.string_at(address, size)  # type: ignore
    return view(address, size).tobytes()  # type: ignore
