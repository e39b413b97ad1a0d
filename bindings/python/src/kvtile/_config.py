"""Types, layer groups, and what a cache is made of."""

from __future__ import annotations

import ctypes
import enum
from dataclasses import dataclass, replace
from typing import Any, List, Optional, Sequence as Seq, Tuple, Union

from . import _lib
from ._bytes import contents, text_or_none
from ._errors import throw
from ._lib import lib
from ._tensor import floats


class Type(enum.IntEnum):
    """How K or V is stored. Bits per element at 128 dims, scales and offsets included."""

    F32 = 0  #: 32
    F16 = 1  #: 16
    I8 = 2  #: K 8.375, V 8.125; the newest tokens f16
    I4 = 3  #: K 4.5625, V 4.125; likewise, and the first tokens i8
    I5 = 4  #: V only: 5.125; likewise


class GroupFlag(enum.IntFlag):
    """Group.flags. The first, second and fourth concern sides stored as i8, i4 or i5."""

    NONE = 0
    NO_ROTATION = 1  #: K (and q) without the signed Hadamard transform
    NO_OFFSET = 2  #: K without a block's offset vector
    V_IN_K = 4  #: V is the first v_dim dims of K: latent attention; append takes no v
    NO_V_ROTATION = 8  #: V without the transform


class RopePairing(enum.IntEnum):
    """Which dims rotary position embedding turns together."""

    UNKNOWN = 0
    HALVES = 1  #: dim i with i + dims / 2: GPT-NeoX, and transformers' Llama
    NEIGHBOURS = 2  #: dims 2i and 2i + 1: RoFormer, GPT-J, Meta's Llama
    NONE = 3  #: keys do not depend on positions


class Precision(enum.IntEnum):
    """How i8, i4 and i5 are multiplied: KVT_ATTEND_."""

    NEAR = 0  #: near-exact, the default
    F32 = 2  #: the most exact, the slowest
    FAST = 4  #: 7 bits or more


RESIDUAL_NONE = 2**32 - 1
"""Group.residual_tokens: only the block being filled is f16."""
FINE_NONE = 2**32 - 1
"""Group.fine_tokens: none."""
TOKEN_NONE = -1
"""The id of a token that was committed without one."""
BLOCK_TOKENS = 64
"""The unit of allocation, of the snapshot and of `Sequence.remove`."""
SELECT_TOKENS = 64
"""Of a step that `Sequence.commit_selected` selects from."""

TypeLike = Union[Type, str]


def as_type(value: TypeLike, name: str = "type") -> Type:
    """A Type, or its name in any case ("i8")."""
    if isinstance(value, str):
        try:
            return Type[value.upper()]
        except KeyError:
            raise ValueError(f'{name}: "{value}" is not f32, f16, i8, i4 or i5') from None
    return Type(value)


@dataclass(frozen=True)
class Rope:
    """A group's rotary position embedding, which `Sequence.remove` needs to move positions.

    inverse_frequencies: [n_pairs], as the model has them in the end, with their scaling
    first_dim: of the 2 * n_pairs dims that are turned
    """

    pairing: RopePairing
    inverse_frequencies: Seq[float] = ()
    first_dim: int = 0


@dataclass(frozen=True)
class Group:
    """A layer group: layers that share geometry and storage types. Most models have one.

    n_q_heads: a multiple of n_kv_heads
    k_dim, v_dim: a multiple of 8, 8 to 1024; v_dim None: as k_dim
    k_type, v_type: Type or its name
    layers: the model's numbers of these layers, ascending; None: those after the groups before
    residual_tokens: how many of the newest tokens stay f16 beside i8, i4 or i5 until their block
        of 64 is sealed; 0: the default (64), RESIDUAL_NONE: only the block being filled
    window_tokens: sliding window, by positions; 0: none
    sink_tokens: the first tokens, seen from beyond the window too
    fine_tokens: the first tokens, i8 where the type is i4 or i5; 0: the default (64), FINE_NONE
    """

    n_layers: int
    n_q_heads: int
    n_kv_heads: int
    k_dim: int
    v_dim: Optional[int] = None
    k_type: TypeLike = Type.I8
    v_type: TypeLike = Type.I8
    flags: int = GroupFlag.NONE
    layers: Optional[Tuple[int, ...]] = None
    rotation_seed: int = 0
    residual_tokens: int = 0
    window_tokens: int = 0
    sink_tokens: int = 0
    rope: Optional[Rope] = None
    fine_tokens: int = 0

    def split_ends(self, n_first: int, n_last: int, k_type: TypeLike,
                   v_type: TypeLike) -> "List[Group]":
        """The groups of a model whose first and last layers have types of their own."""
        n_first, n_last = _whole(n_first, "n_first", 32), _whole(n_last, "n_last", 32)
        first = self.layers or tuple(range(self.n_layers))
        ends = min(n_first, self.n_layers)
        middle = first[ends:max(ends, self.n_layers - n_last)]
        outer = tuple(x for x in first if x not in middle)
        groups = [replace(self, n_layers=len(middle), layers=middle),
                  replace(self, n_layers=len(outer), layers=outer, k_type=k_type, v_type=v_type)]
        return [g for g in groups if g.n_layers]


def _whole(value: Any, name: str, bits: int) -> int:
    """ctypes cuts integers without a word."""
    number = int(value)
    if number != value or not 0 <= number < 2**bits:
        raise ValueError(f"{name}: {value} is no whole number below 2**{bits}")
    return number


class ConfigC:
    """A kvt_config with everything that it points to."""

    def __init__(self, groups: "Union[Group, Seq[Group]]", max_tokens: int, n_threads: int,
                 memory_budget_bytes: int, fingerprint: bytes, isa: Optional[str]) -> None:
        listed = [groups] if isinstance(groups, Group) else list(groups)
        self.keep: List[Any] = []
        self.groups = (_lib.GroupConfig * max(len(listed), 1))()
        for c, g in zip(self.groups, listed):
            self._group(c, g)
        self.text = ctypes.create_string_buffer(1024)
        fingerprint = contents(fingerprint, "fingerprint")
        self.c = _lib.Config(
            struct_size=ctypes.sizeof(_lib.Config), groups=self.groups, n_groups=len(listed),
            n_threads=_whole(n_threads, "n_threads", 32),
            max_tokens=_whole(max_tokens, "max_tokens", 64),
            memory_budget_bytes=_whole(memory_budget_bytes, "memory_budget_bytes", 64),
            fingerprint=fingerprint, fingerprint_bytes=len(fingerprint),
            isa=text_or_none(isa, "isa"),
            error_text=ctypes.cast(self.text, ctypes.c_char_p), error_text_bytes=len(self.text))
        self.list = listed

    def _group(self, c: _lib.GroupConfig, g: Group) -> None:
        c.struct_size = ctypes.sizeof(c)
        for name in ("n_layers", "n_q_heads", "n_kv_heads", "k_dim", "flags", "residual_tokens",
                     "window_tokens", "sink_tokens", "fine_tokens"):
            setattr(c, name, _whole(getattr(g, name), name, 32))
        c.v_dim = c.k_dim if g.v_dim is None else _whole(g.v_dim, "v_dim", 32)
        c.k_type = as_type(g.k_type, "k_type")
        c.v_type = as_type(g.v_type, "v_type")
        c.rotation_seed = _whole(g.rotation_seed, "rotation_seed", 64)
        if g.layers is not None:
            if len(g.layers) != g.n_layers:
                raise ValueError(f"layers: {len(g.layers)} numbers for {g.n_layers} layers")
            numbers = (ctypes.c_uint32 * max(g.n_layers, 1))(
                *[_whole(x, "layers", 32) for x in g.layers])
            self.keep.append(numbers)
            c.layers = numbers
        if g.rope is not None:
            frequencies = floats(g.rope.inverse_frequencies, "inverse_frequencies",
                                 len(g.rope.inverse_frequencies))
            self.keep.append(frequencies)
            c.rope_pairing = RopePairing(g.rope.pairing)
            c.rope_first_dim = _whole(g.rope.first_dim, "first_dim", 32)
            c.rope_dims = 2 * len(frequencies)
            if len(frequencies):
                c.rope_inverse_frequencies = frequencies.ctypes.data_as(
                    ctypes.POINTER(ctypes.c_float))

    def check(self, status: int) -> None:
        if status:
            throw(status, self.text.value.decode("utf-8", "replace")
                  or _lib.error_of(None, status))


def memory_forecast(groups: "Union[Group, Seq[Group]]", max_tokens: int, n_sequences: int,
                    n_tokens: int, *, n_threads: int = 1) -> int:
    """Bytes that a cache with n_sequences sequences of n_tokens tokens each takes, to the byte.

    ArgError, LimitError, UnsupportedError as `Cache`; LimitError: n_tokens is above max_tokens.
    """
    config = ConfigC(groups, max_tokens, n_threads, 0, b"", None)
    out = ctypes.c_uint64()
    config.check(lib.kvt_memory_forecast(ctypes.byref(config.c),
                                         _whole(n_sequences, "n_sequences", 64),
                                         _whole(n_tokens, "n_tokens", 64), ctypes.byref(out)))
    return out.value


def working_forecast(groups: "Union[Group, Seq[Group]]", max_tokens: int, n_tokens: int, *,
                     n_threads: int = 1) -> int:
    """The most bytes that one save or load of a sequence of n_tokens tokens holds while it runs.

    An upper bound, on top of `memory_forecast`, and not held against the budget. n_threads: of the
    cache, each of which has buffers. Errors likewise.
    """
    config = ConfigC(groups, max_tokens, n_threads, 0, b"", None)
    out = ctypes.c_uint64()
    config.check(lib.kvt_working_forecast(ctypes.byref(config.c),
                                          _whole(n_tokens, "n_tokens", 64), ctypes.byref(out)))
    return out.value


def isa_names() -> List[str]:
    """The instruction sets that the library has kernels for and this CPU runs, narrowest first."""
    names: List[str] = []
    while (name := lib.kvt_isa_name(len(names))) is not None:
        names.append(name.decode())
    return names


def version() -> str:
    """Of the C library that runs."""
    return lib.kvt_version().decode()
