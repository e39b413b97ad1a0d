"""What a layer of a block holds: its streams, its image and its values, as docs/format.md and
docs/numerics.md have them. For read_snapshot.py.
"""
import ctypes
import ctypes.util
import functools
import struct
import sys

try:
    import numpy as np
except ImportError:
    print("skipped: no numpy")
    sys.exit(77)


def library(name, *files):
    for file in files + (ctypes.util.find_library(name),):
        try:
            return ctypes.CDLL(file)
        except (OSError, TypeError):
            continue
    print("skipped: no lib" + name)
    sys.exit(77)


XXHASH = library("xxhash", "libxxhash.so.0")
ZSTD = library("zstd", "libzstd.so.1")


class Hash128(ctypes.Structure):
    _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]


XXHASH.XXH64.restype = ctypes.c_uint64
XXHASH.XXH64.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64]
XXHASH.XXH3_128bits.restype = Hash128
XXHASH.XXH3_128bits.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
ZSTD.ZSTD_decompress.restype = ctypes.c_size_t
ZSTD.ZSTD_findFrameCompressedSize.restype = ctypes.c_size_t
ZSTD.ZSTD_findFrameCompressedSize.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
ZSTD.ZSTD_decompress.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]


class Refused(Exception):
    pass


def need(condition, what):
    if not condition:
        raise Refused(what)


def xxh64(data):
    return XXHASH.XXH64(data, len(data), 0)


def xxh128(data):
    h = XXHASH.XXH3_128bits(data, len(data))
    return struct.pack(">QQ", h.high, h.low)


def up8(n):
    return (n + 7) // 8 * 8


def up64(n):
    return (n + 63) // 64 * 64


F32, F16, I8, I4, I5 = range(5)
SEALED, OPEN, FINE, REOPENED = range(4)
OPENS = (OPEN, REOPENED)
ABSENT = 2**32 - 1
ELEMENT = {F32: 4, F16: 2, I8: 1, I4: 0, I5: 0}  # bytes; 0: no filter
NUMPY = {F32: "<f4", F16: "<f2", I8: "i1", I4: "u1", I5: "u1"}
LEVELS = np.array([-63, -48, -37, -29, -22, -15, -9, -3, 3, 9, 15, 22, 29, 37, 48, 63], "f4")


def gain_of(byte):
    return np.float32(1) + (byte.astype("f4") - np.float32(128)) / np.float32(1024)


def read_streams(payload, sizes, shapes):
    """{kind: native bytes}; sizes: {kind: native size}, shapes: {kind: see unfilter}."""
    need(len(payload) >= 8, "streams")
    n, zero = struct.unpack("<II", payload[:8])
    kinds = [kind for kind in sorted(sizes) if sizes[kind]]
    need(n == len(kinds) and zero == 0, "streams")
    table = 8 + 24 * n
    need(len(payload) >= table + 8, "streams")
    need(struct.unpack("<Q", payload[table:table + 8])[0] == xxh64(payload[:table]), "table checksum")
    at, result = table + 8, {}
    for i, want in enumerate(kinds):
        kind, how, codec, stored, native, zero, check = struct.unpack(
            "<HBBIIIQ", payload[8 + 24 * i:32 + 24 * i])
        need(kind == want and native == sizes[kind] and zero == 0 and codec < 2, "stream")
        need(stored == native if codec == 0 else stored < native, "stored size")
        data = payload[at:at + stored]
        need(len(data) == stored and check == xxh64(data), "stream checksum")
        if codec == 1:
            frames = data
            while frames:
                need(frames[:4] == b"\x28\xb5\x2f\xfd", "a frame that is none, or skippable")
                need(len(frames) > 5 and (frames[4] & 32 or frames[5] >> 3 <= 20), "a frame's window")
                frames = frames[min(ZSTD.ZSTD_findFrameCompressedSize(frames, len(frames)), len(frames)):]
            room = ctypes.create_string_buffer(native)
            need(ZSTD.ZSTD_decompress(room, native, data, stored) == native, "zstd")
            data = room.raw
        result[kind] = unfilter(data, how, shapes[kind])
        at += stored
    need(not any(payload[at:]) and len(payload) == up8(at), "padding")
    return result


def unfilter(data, how, shape):
    """shape: element size, 0 where there is no filter; of i8 (heads, tokens rounded up, dims, is K)."""
    element, heads, tokens, dims, is_k = shape
    x = np.frombuffer(data, "u1")
    if how == 0:
        return data
    need(element, "filter")
    if element > 1:
        need(how == 3, "filter")
        return np.ascontiguousarray(x.reshape(element, -1).T).tobytes()
    need(how in (1, 2), "filter")
    lane = 16 if is_k else 4
    if is_k:
        native = lambda y: y.reshape(heads, tokens // 16, 16, dims // 4, 4).transpose(0, 1, 3, 2, 4)
        rows = lambda y: y.reshape(heads, tokens // 16, dims // 4, 16, 4).transpose(0, 1, 3, 2, 4)
    else:
        native = lambda y: y.reshape(heads, tokens // 4, 4, dims).transpose(0, 1, 3, 2)
        rows = lambda y: y.reshape(heads, tokens // 4, dims, 4).transpose(0, 1, 3, 2)
    if how == 1:
        y = x.reshape(heads, tokens // lane, lane, dims)
    else:
        y = np.cumsum(rows(x).reshape(heads, tokens, dims), axis=1, dtype="u1")
    return np.ascontiguousarray(native(np.ascontiguousarray(y))).tobytes()


class Group:
    def __init__(self, data):
        self.layout_bytes = data[8:40]
        (self.n_layers, self.q_heads, self.heads, self.k_dim, self.v_dim, self.k_type, self.v_type,
         self.flags, self.seed, self.window, self.sinks) = struct.unpack("<8IQII", data)
        need(self.flags < 16, "group: flags")
        need(self.window or not self.sinks, "group: sinks without a window")
        need(1 <= self.n_layers <= 1024 and 1 <= self.heads <= 1024, "group: counts")
        need(1 <= self.q_heads <= 1024 and self.q_heads % self.heads == 0, "group: n_q_heads")
        for dim in (self.k_dim, self.v_dim):
            need(8 <= dim <= 1024 and dim % 8 == 0, "group: dims")
        need(self.k_type <= I4 and self.v_type <= I5, "group: types")
        need(self.k_type != I4 or not self.flags & 2, "group: 4 bits without offset")
        self.rotates = self.k_type == I8 and not self.flags & 1
        self.offsets = self.k_type in (I8, I4) and not self.flags & 2
        self.v_in_k = bool(self.flags & 4)
        self.v_rotates = self.v_type in (I8, I4, I5) and not self.flags & 8 and not self.v_in_k
        # Rows that the window leaves, and the first row behind those that it has released.
        self.sink_rows = max((self.sinks + 63) // 64, int(self.offsets)) if self.window else 0
        self.first = self.sink_rows
        self.bare = 0  # open rows of K without the offset
        self.kept = 0  # open rows of V whose codes and scale stay
        self.forms = [SEALED]
        self.forms += [OPEN] if {I8, I4, I5} & {self.k_type, self.v_type} else []
        self.forms += [FINE] if {I4, I5} & {self.k_type, self.v_type} else []
        self.forms += [REOPENED] if self.k_type == I4 else []
        self.seals = OPEN in self.forms
        if self.v_in_k:
            need(self.v_dim <= self.k_dim and self.v_type == self.k_type != I4, "group: V in K")
            need(not self.rotates or self.v_dim % (self.k_dim & -self.k_dim) == 0, "group: V in K")

    def types(self, form):
        """How K and V lie in a block: f16 in an open one, i8 instead of fewer bits in a fine one."""
        rows = {I8: F16, I4: F16, I5: F16}
        one = {OPEN: rows, REOPENED: rows, FINE: {I4: I8, I5: I8}}.get(form, {})
        return [one.get(t, t) for t in (self.k_type, self.v_type)]

    def smalls(self, n, form):
        """The parts of kind 5: their names and numbers of elements."""
        parts = {}
        if self.k_type in (I8, I4):
            parts["k"] = self.k_dim if self.types(form)[0] == I4 else n
        if self.v_type in (I8, I4, I5) and not self.v_in_k:
            parts["v"] = n
        if self.offsets:
            parts["offset"] = self.k_dim
        if form == REOPENED:
            parts["seed scale"] = parts["seed middle"] = self.k_dim
        if self.k_type == I4 and form in (SEALED, REOPENED):
            parts["gain"] = n
        return {name: self.heads * count for name, count in parts.items()}

    def sizes(self, n, form):
        """Native sizes of kinds 3, 4, 5."""
        k_type, v_type = self.types(form)
        tiles, runs = (n + 15) // 16, (n + 7) // 8
        k = tiles * 8 * self.k_dim if k_type == I4 else tiles * 16 * self.k_dim * ELEMENT[k_type]
        if v_type in (I4, I5):
            v = runs * 4 * self.v_dim + (v_type == I5) * runs * ((self.v_dim + 15) // 16 * 16)
        else:
            v = ((n + 3) // 4 * 4 if v_type == I8 else n) * self.v_dim * ELEMENT[v_type]
        return {3: self.heads * k, 4: 0 if self.v_in_k else self.heads * v,
                5: 2 * sum(self.smalls(n, form).values())}

    def shapes(self, n, form):
        """See unfilter."""
        k_type, v_type = self.types(form)
        return {3: (ELEMENT[k_type], self.heads, (n + 15) // 16 * 16, self.k_dim, True),
                4: (ELEMENT[v_type], self.heads, (n + 3) // 4 * 4, self.v_dim, False),
                5: (2, 0, 0, 0, 0)}

    def layout(self, n, form):
        """Size of a record of an image, and what lies in it: (stream's kind, where it begins there,
        bytes to the next head's, shape there, where it begins in the record, shape there). A shape
        is rows and bytes of a row; all that is longer in the record is filled up with zeros."""
        k_type, v_type = self.types(form)
        wide_k, wide_v = (self.k_dim + 15) // 16 * 16, (self.v_dim + 15) // 16 * 16
        sizes, smalls, pieces, small, at = self.sizes(n, form), self.smalls(n, form), [], {}, 0
        for name, count in smalls.items():
            small[name] = at
            at += 2 * count

        def put(name, room, at):  # a part of kind 5
            size = 2 * smalls[name] // self.heads
            pieces.append((5, small[name], size, (1, size), at, (1, room)))

        def put_gains(at):
            size = 2 * smalls["gain"] // self.heads
            pieces.append((5, small["gain"], size, (size // 2, 2), at, (64, 1)))

        lane, per = {F32: (64, 1), F16: (32, 1), I8: (64, 4), I4: (64, 8)}[k_type]
        tiles = (n + 15) // 16
        pieces.append((3, 0, sizes[3] // self.heads, (tiles, self.k_dim // per * lane),
                       0, (4, wide_k // per * lane)))
        at = 4 * (wide_k // per * lane)
        if "k" in smalls:
            if k_type == I4:
                put("k", 2 * wide_k, at)
                put_gains(at + up64(2 * wide_k))
                at += up64(2 * wide_k) + 64
            else:
                put("k", 128, at)
                at += 128
        if "offset" in smalls:
            put("offset", 2 * wide_k, at)
            at += up64(2 * wide_k)
        if form == REOPENED:
            put("seed scale", 2 * wide_k, at)
            put("seed middle", 2 * wide_k, at + 2 * wide_k)
            put_gains(at + 4 * wide_k)
            at += 2 * up64(2 * wide_k) + 64
        if "v" in smalls:
            put("v", 128, at)
            at += 128
        if not self.v_in_k:
            lane, per = {F32: (4, 1), F16: (2, 1), I8: (4, 4), I4: (4, 8), I5: (4, 8)}[v_type]
            rows, head = (n + per - 1) // per, sizes[4] // self.heads
            pieces.append((4, 0, head, (rows, self.v_dim * lane), at, (64 // per, wide_v * lane)))
            at += 64 // per * wide_v * lane
            if v_type == I5:
                pieces.append((4, rows * self.v_dim * lane, head, (rows, wide_v), at, (8, wide_v)))
                at += 8 * wide_v
        return at, pieces

    def image_bytes(self, form):
        """Of a layer."""
        return self.heads * self.layout(64, form)[0]

    def image(self, n, form, streams):
        """The image of a layer; its gains are 8 bits (see check_scales)."""
        size, pieces = self.layout(n, form)
        image = np.zeros((self.heads, size), "u1")
        for kind, begin, head, (rows, row), at, (more, wide) in pieces:
            for h in range(self.heads):
                x = np.frombuffer(streams[kind], "u1", rows * row, begin + h * head).reshape(rows, row)
                room = image[h, at:at + more * wide].reshape(more, wide)
                room[:rows, :min(row, wide)] = x[:, :wide]
        return image.tobytes()

    def streams(self, n, form, image):
        """The native streams of an image; it holds nothing else."""
        size, pieces = self.layout(n, form)
        records = np.frombuffer(image, "u1").reshape(self.heads, size)
        streams = {kind: np.zeros(size, "u1") for kind, size in self.sizes(n, form).items() if size}
        for kind, begin, head, (rows, row), at, (more, wide) in pieces:
            for h in range(self.heads):
                x = records[h, at:at + more * wide].reshape(more, wide)
                room = streams[kind][begin + h * head:begin + h * head + rows * row].reshape(rows, row)
                room[:, :wide] = x[:rows, :row]
        streams = {kind: x.tobytes() for kind, x in streams.items()}
        need(self.image(n, form, streams) == image, "an image with something where nothing is")
        return streams

    @functools.lru_cache(maxsize=None)
    def signs(self, dim, first):
        mask, words, signs = 2**64 - 1, (dim + 63) // 64, np.ones((self.heads, dim), "f4")
        for h in range(self.heads):
            for d in range(dim):
                z = (self.seed + (first + h * words + d // 64 + 1) * 0x9E3779B97F4A7C15) & mask
                z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
                z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
                if (z ^ z >> 31) >> d % 64 & 1:
                    signs[h, d] = -1
        return signs

    def unrotate(self, x, first):
        """x[head][token][dim], f32 throughout, in the order of numerics.md."""
        dim = x.shape[2]
        log2 = (dim & -dim).bit_length() - 1
        h = 1
        while h < 1 << log2:
            y = x.reshape(x.shape[0], x.shape[1], -1, 2, h)
            x = np.stack([y[..., 0, :] + y[..., 1, :], y[..., 0, :] - y[..., 1, :]], axis=-2)
            x = x.reshape(y.shape[0], y.shape[1], -1)
            h *= 2
        return x * np.float32(2.0 ** -((log2 + 1) // 2)) * self.signs(dim, first)[:, None, :]

    def k_codes(self, n, kind, data):
        """[head][token], the places without a token too, [dim]."""
        heads, tiles, dims = self.heads, (n + 15) // 16, self.k_dim
        k = np.frombuffer(data, NUMPY[kind])
        if kind == I4:  # a byte: dims d and d + 4
            k = k.reshape(heads, tiles, dims // 8, 16, 4).transpose(0, 1, 3, 2, 4)
            k = np.stack([k & 15, k >> 4], axis=4)  # [head][tile][token][dim / 8][half][dim % 4]
        elif kind == I8:
            need(not (k == -128).any(), "a code of -128")
            k = k.reshape(heads, tiles, dims // 4, 16, 4).transpose(0, 1, 3, 2, 4)
        else:
            k = k.reshape(heads, tiles, dims, 16).transpose(0, 1, 3, 2)
        return k.reshape(heads, tiles * 16, dims)

    def v_codes(self, n, kind, data):
        heads, runs, dims = self.heads, (n + 7) // 8, self.v_dim
        v = np.frombuffer(data, NUMPY[kind])
        if kind in (I4, I5):  # a byte: tokens t and t + 4
            v = v.reshape(heads, -1)
            low = v[:, :runs * dims * 4].reshape(heads, runs, dims, 4)
            low = np.stack([low & 15, low >> 4], axis=1)  # [head][half][run][dim][token % 4]
            low = low.transpose(0, 2, 1, 4, 3).reshape(heads, runs * 8, dims)
            if kind == I4:
                return low
            bits = v[:, runs * dims * 4:].copy().view("<u8").reshape(heads, runs, -1, 2)
            bits = bits[..., None, None] >> np.arange(64, dtype="<u8").reshape(16, 4) & np.uint64(1)
            # [head][run][dim / 16][half][dim % 16][token % 4]
            fifth = bits.transpose(0, 1, 3, 5, 2, 4).reshape(heads, runs * 8, -1).astype("u1")
            need(not fifth[..., dims:].any(), "a fifth bit where there is no dim")
            return low + 16 * fifth[..., :dims]
        if kind == I8:
            need(not (v == -128).any(), "a code of -128")
            return v.reshape(heads, -1, dims, 4).transpose(0, 1, 3, 2).reshape(heads, -1, dims)
        return v.reshape(heads, n, dims)

    def check_scales(self, form, parts):
        """parts: {name: numbers of kind 5}."""
        open_k = form in OPENS and "k" in parts
        signs = self.offsets if open_k else self.types(form)[0] == I4
        need(signs or not np.signbit(parts.get("k", 0)).any(), "a negative scale")
        need(form == REOPENED and self.v_type == I4 or
             not np.signbit(parts.get("v", 0)).any(), "a negative scale of V")
        least = 0 if form == REOPENED else 1  # 0: a row that has never been sealed
        gain = parts.get("gain", np.ones(1))
        need((gain >= least).all() and (gain <= 255).all(), "a gain that is none")
        for name in ["k", "v"] if form == OPEN else ["k"] if open_k else []:
            scale = np.abs(parts.get(name, 1))
            need(np.isin(scale, 2.0 ** np.arange(16)).all(), "an open scale")

    def check_rows(self, form, parts, k, v):
        """Of open rows the largest value, offsets apart."""
        if self.k_type in (I8, I4):
            most = np.full(parts["k"].shape, 8e6 if self.k_type == I8 else 2.4e5)
            if form == REOPENED:
                most = np.where(parts["gain"] != 0, 12 * 65504, most)
            need((abs(k).max(axis=2).ravel() * abs(parts["k"]) <= most).all(), "an open row of K")
        if "v" in parts:
            scale = abs(parts["v"])
            if form == OPEN:
                most = 8e6 if self.v_type == I8 else 2e6
            else:
                most = {I8: 127 * 65504, I5: 31 * 65504}.get(self.v_type, 2e6)
                if self.v_type == I4:
                    most = np.where(np.signbit(parts["v"]), 63 * scale, most)
            need((abs(v).max(axis=2).ravel() * scale <= most).all(), "an open row of V")

    def values(self, n, form, streams):
        """K and V of a layer as f32 [token][head][dim]."""
        heads = self.heads
        k_type, v_type = self.types(form)
        k = self.k_codes(n, k_type, streams[3])
        v = np.zeros((heads, n, 0), "f4") if self.v_in_k else self.v_codes(n, v_type, streams[4])
        for x in (k[:, n:], v[:, n:]):  # also a zero with a sign is none
            need(not any(x.tobytes()), "a value where there is no token")
        v = LEVELS[v] if v_type == I4 else v.astype("f4")
        k, v = k[:, :n].astype("f4"), v[:, :n]
        k = k - np.float32(7.5) if k_type == I4 else k
        v = 2 * v - 31 if v_type == I5 else v
        small, at, parts = np.frombuffer(streams.get(5, b""), "<f2").astype("f4"), 0, {}
        need(np.isfinite(k).all() and np.isfinite(v).all() and np.isfinite(small).all(), "not finite")
        for name, count in self.smalls(n, form).items():
            parts[name] = small[at:at + count]
            if name == "gain":  # an integer
                parts[name] = np.frombuffer(streams[5], "<u2")[at:at + count].astype("f4")
            at += count
        self.check_scales(form, parts)
        if form in OPENS:
            self.check_rows(form, parts, k, v)
        if "v" in parts:
            v = v * np.abs(parts["v"]).reshape(heads, n, 1)
            self.kept += np.signbit(parts["v"]).sum()
        if k_type == I4:
            scale, offset = (parts[name].reshape(heads, 1, -1) for name in ("k", "offset"))
            gain = gain_of(parts["gain"]).reshape(heads, n, 1)
            k = k * np.abs(scale)
            k = np.where(np.signbit(scale), k * gain + offset, (k + offset) * gain)
        elif "k" in parts:
            scale = parts["k"].reshape(heads, n, 1)
            bare = np.signbit(scale)  # open rows of K without the offset
            k = k * np.abs(scale)
            if self.offsets:
                k = np.where(bare, k, k + parts["offset"].reshape(heads, 1, self.k_dim))
            self.bare += bare.sum()
        if self.rotates:
            k = self.unrotate(k, 0)
        if self.v_rotates:
            v = self.unrotate(v, 2**32)
        if self.v_in_k:
            v = k[..., :self.v_dim]
        return k.transpose(1, 0, 2), v.transpose(1, 0, 2)
