#!/usr/bin/env python3
"""Read a kvtile snapshot: a second reader, written from docs/format.md and docs/numerics.md.

read_snapshot.py SNAPSHOT...                      check and describe
read_snapshot.py --compare PROGRAM SNAPSHOT...    and compare all values with what
                                                  `PROGRAM SNAPSHOT` writes (dump_golden.c)
read_snapshot.py --damage SNAPSHOT...             and check that damage is found

Exit code 77: numpy, libxxhash or libzstd is missing.
"""
import ctypes
import ctypes.util
import functools
import struct
import subprocess
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


F32, F16, I8, I4, I5 = range(5)
SEALED, OPEN, FINE, REOPENED = range(4)
OPENS = (OPEN, REOPENED)
ABSENT = 2**32 - 1
ELEMENT = {F32: 4, F16: 2, I8: 1, I4: 0, I5: 0}  # bytes; 0: no filter
NUMPY = {F32: "<f4", F16: "<f2", I8: "i1", I4: "u1", I5: "u1"}
LEVELS = np.array([-63, -48, -37, -29, -22, -15, -9, -3, 3, 9, 15, 22, 29, 37, 48, 63], "f4")


def gain_of(byte):
    return np.float32(1) + (byte.astype("f4") - np.float32(128)) / np.float32(1024)


class Group:
    def __init__(self, data):
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
        """See Reader.unfilter."""
        k_type, v_type = self.types(form)
        return {3: (ELEMENT[k_type], self.heads, (n + 15) // 16 * 16, self.k_dim, True),
                4: (ELEMENT[v_type], self.heads, (n + 3) // 4 * 4, self.v_dim, False),
                5: (2, 0, 0, 0, 0)}

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


class Reader:
    def __init__(self, data):
        self.data, self.at = data, 0
        self.index = []
        self.header()
        self.sequence()
        self.ids = self.ints(1)
        self.positions = self.ints(2)
        need((self.ids >= -1).all() and (self.positions >= 0).all(), "ids or positions")
        shifts = self.ints(10, 7) if self.moved else np.zeros(self.n_tokens, "<i4")
        need((shifts != -2**31).all(), "shifts")
        self.key_positions = self.positions + shifts
        self.blocks()
        self.checkpoints()
        self.end()

    def take(self, n):
        need(n <= len(self.data) - self.at, "cut")
        self.at += n
        return self.data[self.at - n:self.at]

    def header(self):
        fixed = self.take(64)
        need(fixed[:8] == b"\x89KVT\r\n\x1a\n", "magic")
        (version, size, block, tile, self.n_tokens, n_groups, n_layers, fingerprint, flags, self.n_blocks,
         largest) = struct.unpack("<4IQ4IQQ", fixed[8:])
        need(version == 1 and block == 64 and tile == 16 and flags < 2, "version")
        self.moved = flags == 1
        need(self.n_tokens <= 2**30 and 1 <= n_groups <= 8 and 1 <= n_layers <= 1024 and
             fingerprint <= 64, "limits")
        need(size == 64 + 48 * n_groups + up8(4 * n_layers) + up8(fingerprint) + 8, "header size")
        rest = self.take(size - 64)
        need(struct.unpack("<Q", rest[-8:])[0] == xxh64(fixed + rest[:-8]), "header checksum")
        self.groups = [Group(rest[48 * g:48 * g + 48]) for g in range(n_groups)]
        at = 48 * n_groups
        layers = struct.unpack("<%dI" % n_layers, rest[at:at + 4 * n_layers])
        need(sorted(layers) == list(range(n_layers)), "layer numbers")
        need(sum(g.n_layers for g in self.groups) == n_layers, "layers of the groups")
        for g in self.groups:
            g.layers, layers = layers[:g.n_layers], layers[g.n_layers:]
            need(list(g.layers) == sorted(g.layers), "layer numbers of a group")
        need(not any(rest[at + 4 * n_layers:at + up8(4 * n_layers)]), "padding")
        at += up8(4 * n_layers)
        self.fingerprint = rest[at:at + fingerprint]
        need(not any(rest[at + fingerprint:-8]), "padding")
        self.rows = (self.n_tokens + 63) // 64
        need(sum(min(self.rows, g.sink_rows + 1) if g.window else self.rows for g in self.groups)
             <= self.n_blocks < ABSENT, "n_blocks")
        need(largest == max(sum(g.sizes(64, form).values()) for g in self.groups for form in g.forms),
             "largest layer")

    def peek(self):
        """Type and value of the next section that is known; those before it are checked."""
        at = self.at
        while True:
            head = self.take(32)
            kind, _, _, value, check = struct.unpack("<IIQQQ", head)
            need(check == xxh64(head[:24]), "section checksum")
            if 1 <= kind <= 10:
                self.at = at
                return kind, value
            self.at -= 32
            at = self.skip()

    def skip(self):
        """A section of an unknown type."""
        _, flags, size, _, _ = struct.unpack("<IIQQQ", self.take(32))
        need(flags == 0 and size >= 8, "section of unknown type")
        payload = self.take(size)
        need(struct.unpack("<Q", payload[-8:])[0] == xxh64(payload[:-8]), "section checksum")
        return self.at

    def section(self, want, want_value):
        while True:
            start = self.at
            head = self.take(32)
            kind, flags, size, value, check = struct.unpack("<IIQQQ", head)
            need(check == xxh64(head[:24]), "section checksum")
            if 1 <= kind <= 10:
                need(flags == 1 and kind == want and value == want_value, "section order")
                return start, self.take(size)
            need(want != 5, "section of unknown type")
            self.at = start
            self.skip()

    def note(self, kind, value, start):
        self.index.append(struct.pack("<IIQQQ", kind, 0, value, start, self.at - start))

    def streams(self, payload, sizes, shapes):
        """{kind: native bytes}; sizes: {kind: native size}, shapes: {kind: see unfilter}."""
        n, zero = struct.unpack("<II", payload[:8])
        kinds = [kind for kind in sorted(sizes) if sizes[kind]]
        need(n == len(kinds) and zero == 0, "streams")
        table = 8 + 24 * n
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
                room = ctypes.create_string_buffer(native)
                need(ZSTD.ZSTD_decompress(room, native, data, stored) == native, "zstd")
                data = room.raw
            result[kind] = self.unfilter(data, how, shapes[kind])
            at += stored
        need(not any(payload[at:]) and len(payload) == up8(at), "padding")
        return result

    @staticmethod
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

    def ints(self, section, kind=None):
        kind = kind or section
        parts = [np.zeros(0, "<i4")]
        for first in range(0, self.n_tokens, 16384):
            start, payload = self.section(section, first)
            n = min(16384, self.n_tokens - first)
            data = self.streams(payload, {kind: 4 * n}, {kind: (4, 0, 0, 0, 0)})[kind]
            self.note(section, first, start)
            parts.append(np.frombuffer(data, "<i4"))
        return np.concatenate(parts)

    def sequence(self):
        self.next_position, self.tag = -1, b""
        if self.peek()[0] != 8:
            return
        start, payload = self.section(8, 0)
        need(len(payload) >= 16 and struct.unpack("<Q", payload[-8:])[0] == xxh64(payload[:-8]),
             "sequence checksum")
        self.next_position, size = struct.unpack("<iI", payload[:8])
        need(size <= 256 and len(payload) == up8(8 + size) + 8, "tag size")
        self.tag = payload[8:8 + size]
        need(not any(payload[8 + size:-8]), "padding")
        need(self.next_position >= -1 and (self.next_position >= 0 or size), "an empty sequence section")
        self.note(8, 0, start)

    def row_tokens(self, row, n_tokens):
        return min(64, n_tokens - 64 * row)

    def blocks(self):
        start, table = self.section(3, 0)
        need(len(table) == 32 * self.n_blocks + 8, "block table size")
        need(struct.unpack("<Q", table[-8:])[0] == xxh64(table[:-8]), "block table checksum")
        self.note(3, 0, start)
        self.entries = [struct.unpack("<16sIIII", table[32 * b:32 * b + 32]) for b in range(self.n_blocks)]
        self.own, b = {}, 0  # (group, row): its entry
        for row in range(self.rows):
            for g, group in enumerate(self.groups):
                if b < self.n_blocks and self.entries[b][1:3] == (g, row):
                    need(self.entries[b][3] == self.row_tokens(row, self.n_tokens), "block table entry")
                    self.own[g, row] = b
                    b += 1
                else:
                    need(group.window and group.first == row and row + 1 < self.rows, "a row is missing")
                    group.first = row + 1
        self.n_own = b
        for g in range(len(self.groups)):
            self.check_rows(g, [self.own.get((g, row)) for row in range(self.rows)], self.n_tokens)
        for entry in self.entries[self.n_own:]:
            need(entry[1] < len(self.groups) and entry[2] < self.rows and 1 <= entry[3] <= 64,
                 "entry of a checkpoint's block")
            need(self.entries.count(entry) == 1, "an entry is there twice")
        self.values, self.layers = [], []  # of each block: {layer: (K, V)}
        for b, (name, g, row, n, form) in enumerate(self.entries):
            group = self.groups[g]
            entry = table[32 * b:32 * b + 32]
            need(form in (SEALED, OPEN, FINE, REOPENED), "representation")
            need(form in group.forms, "a representation that the group's blocks do not have")
            start, payload = self.section(4, b)
            need(len(payload) == 48 and payload[:32] == entry, "block")
            need(struct.unpack("<IIQ", payload[32:]) == (group.n_layers, 0, xxh64(payload[:40])), "block")
            digests, values = entry[24:], {}
            for i, layer in enumerate(group.layers):
                _, payload = self.section(5, i)
                streams = self.streams(payload, group.sizes(n, form), group.shapes(n, form))
                digests += xxh128(b"".join(streams[kind] for kind in sorted(streams)))
                values[layer] = group.values(n, form, streams)
                self.layers.append((group, n, form, streams))
            need(name == xxh128(digests), "block id")
            self.values.append(values)
            self.note(4, b, start)

    def check_rows(self, g, view, n_tokens):
        """A sequence's or checkpoint's entries of a group, None where released: leading sealed (or
        released) rows, and the first row behind the released ones."""
        group, sealed, first, is_open = self.groups[g], 0, self.groups[g].sink_rows, False
        for row, b in enumerate(view):
            if b is None:
                need(group.window and first == row and row + 1 < len(view) and not is_open, "a released row")
                first = row + 1
            else:
                need(self.entries[b][1:4] == (g, row, self.row_tokens(row, n_tokens)), "a row's block")
                need(self.entries[b][4] in OPENS or not is_open, "a sealed block after an open one")
                is_open = self.entries[b][4] in OPENS
            if not is_open:
                sealed = row + 1
        if first > group.sink_rows:  # what the next query sees has to be there
            see = int(self.positions[n_tokens - 1]) + 1 - group.window
            need(not (self.positions[:64 * first].reshape(-1, 64)[group.sink_rows:] > see).any(),
                 "rows that a window needs")
        return sealed, first

    def checkpoints(self):
        """points: (tokens, next position, blob, by groups the entries of the rows)."""
        self.points, named, before = [], 0, [(0, 0)] * len(self.groups)
        ends = [self.check_rows(g, [self.own.get((g, row)) for row in range(self.rows)], self.n_tokens)
                for g in range(len(self.groups))]
        while self.peek()[0] == 9:
            n_tokens = self.peek()[1]
            start, payload = self.section(9, n_tokens)
            need((self.points[-1][0] if self.points else -1) < n_tokens <= self.n_tokens, "checkpoint order")
            need(len(payload) >= 24 and struct.unpack("<Q", payload[-8:])[0] == xxh64(payload[:-8]),
                 "checkpoint checksum")
            next_position, zero, size = struct.unpack("<iIQ", payload[:16])
            need(next_position >= -1 and zero == 0, "checkpoint")
            at, end, rows, views = 16, len(payload) - 8, (n_tokens + 63) // 64, []
            for g, group in enumerate(self.groups):
                need(at + 4 <= end, "checkpoint size")
                begin = struct.unpack("<I", payload[at:at + 4])[0]
                need(begin <= rows and at + 4 + 4 * (rows - begin) <= end, "checkpoint size")
                words = struct.unpack("<%dI" % (rows - begin), payload[at + 4:at + 4 + 4 * (rows - begin)])
                at += 4 + 4 * (rows - begin)
                view = [self.own.get((g, row)) for row in range(begin)]
                for row, b in enumerate(words, begin):
                    need(b == ABSENT or b < self.n_blocks, "checkpoint entry")
                    need(b == ABSENT or b >= self.n_own or b == self.own.get((g, row)), "another row's block")
                    if b != ABSENT and b >= self.n_own:
                        need(b <= self.n_own + named, "order of the checkpoints' blocks")
                        named += b == self.n_own + named
                    view.append(None if b == ABSENT else b)
                need(begin == rows or view[begin] != self.own.get((g, begin)), "begins with the sequence's row")
                sealed, first = self.check_rows(g, view, n_tokens)
                if REOPENED in group.forms and n_tokens % 64 and self.entries[view[-1]][4] == SEALED:
                    sealed -= 1  # it is open again when the sequence goes on
                need(before[g][0] <= sealed <= ends[g][0] and before[g][1] <= first <= ends[g][1],
                     "rows that are open or there again")
                before[g] = sealed, first
                kept = min([n_tokens // 64] + [sealed] * group.seals + [first] * bool(group.window))
                need(kept <= begin, "a row that cannot have changed")
                views.append(view)
            need(size <= end and up8(at) + up8(size) == end, "blob size")
            blob = payload[up8(at):up8(at) + size]
            need(not any(payload[at:up8(at)]) and not any(payload[up8(at) + size:end]), "padding")
            self.points.append((n_tokens, next_position, blob, views))
            self.note(9, n_tokens, start)
        need(self.n_own + named == self.n_blocks, "blocks of no checkpoint")

    def end(self):
        start, index = self.section(6, 0)
        need(index[:-8] == b"".join(self.index), "index")
        need(struct.unpack("<Q", index[-8:])[0] == xxh64(index[:-8]), "index checksum")
        _, end = self.section(7, 0)
        need(len(end) == 32 and end[24:] == b"KVTE\r\n\x1a\n", "footer")
        need(struct.unpack("<QQQ", end[:24]) == (start, self.at, xxh64(end[:16])), "footer")
        need(self.at == len(self.data), "bytes after the end")

    def dump_rows(self, n_tokens, next_position, views):
        parts = [self.ids[:n_tokens].tobytes(), self.positions[:n_tokens].tobytes(),
                 self.key_positions[:n_tokens].tobytes()]
        where = {layer: g for g, group in enumerate(self.groups) for layer in group.layers}
        for layer in sorted(where):
            for side in range(2):
                parts += [self.values[b][layer][side].astype("<f4").tobytes()
                          for b in views[where[layer]] if b is not None]
        if next_position < 0 and n_tokens:
            next_position = min(int(self.positions[n_tokens - 1]) + 1, 2**31 - 1)
        return b"".join(parts) + struct.pack("<i", max(next_position, 0))

    def dump(self):
        """As dump_golden.c writes it."""
        own = [[self.own.get((g, row)) for row in range(self.rows)] for g in range(len(self.groups))]
        parts = [self.dump_rows(self.n_tokens, self.next_position, own)]
        for n_tokens, next_position, blob, views in reversed(self.points):
            parts += [struct.pack("<Q", n_tokens), blob, self.dump_rows(n_tokens, next_position, views)]
        return b"".join(parts)


def refuses(group, n, form, streams):
    bare, kept = group.bare, group.kept
    try:
        group.values(n, form, streams)
    except Refused:
        return True
    finally:
        group.bare, group.kept = bare, kept
    return False


def damage_signs(reader):
    """A sign on a scale is refused, except on those of open blocks that mean something."""
    for group, n, form, streams in reader.layers:
        at = 0
        for name, count in group.smalls(n, form).items():
            sound = {"k": group.offsets if form in OPENS else group.types(form)[0] == I4,
                     "offset": True, "seed scale": True, "seed middle": True,
                     "v": form == REOPENED and group.v_type == I4}.get(name, False)
            for i in (at, at + count - 1):
                small = np.frombuffer(streams[5], "<u2").copy()
                small[i] |= 0x8000
                if refuses(group, n, form, {**streams, 5: small.tobytes()}) == sound:
                    sys.exit("a sign on number %d, %s, form %d: %s" % (
                        i, name, form, "refused" if sound else "taken"))
            at += count


def damage_gains(reader):
    """A gain of 0 is refused in sealed blocks, one of 256 in all."""
    for group, n, form, streams in reader.layers:
        count = group.smalls(n, form).get("gain", 0)
        for i in range(-count, 0):
            for gain in (0, 1, 255, 256):
                small = np.frombuffer(streams[5], "<u2").copy()
                small[i] = gain
                if refuses(group, n, form, {**streams, 5: small.tobytes()}) != (
                        gain == 256 or gain == 0 and form == SEALED):
                    sys.exit("a gain of %d, form %d: refused, or taken" % (gain, form))


def check_seeds(reader):
    """K's rows that have been 4-bit codes are, without their gain, still multiples of the seed's
    scale from its middle; they are V's rows that are taken over."""
    for group, n, form, streams in reader.layers:
        if form != REOPENED:
            continue
        small, at, parts = np.frombuffer(streams[5], "<f2").astype("f4"), 0, {}
        for name, count in group.smalls(n, form).items():
            parts[name] = small[at:at + count].reshape(group.heads, -1)
            at += count
        parts["gain"] = np.frombuffer(streams[5], "<u2")[-group.heads * n:].reshape(group.heads, n)
        counts = group.bare, group.kept
        k = group.values(n, form, streams)[0].transpose(1, 0, 2)
        group.bare, group.kept = counts
        for h in range(group.heads):
            scale, middle = parts["seed scale"][h], parts["seed middle"][h]
            was = parts["gain"][h] != 0
            if group.v_type == I4 and (np.signbit(parts["v"][h]) != was).any():
                sys.exit("a row of which K or V alone has been sealed")
            if scale.all() and was.any():
                rest = np.where(np.signbit(scale), middle, 0)
                x = (k[h] - rest) / gain_of(parts["gain"][h])[:, None] - (middle - rest)
                code = x[was] / abs(scale) + np.float32(7.5)
                if (abs(code - code.round()) > 0.1).any() or (code < -0.1).any() or (code > 15.1).any():
                    sys.exit("a seed that is not the rows'")
            elif was.any() or scale.any() or middle.any():
                sys.exit("a seed in part")


def damage_dead(reader):
    """Each bit of the last tile or run of V that is no token's, or no dim's, is refused."""
    for group, n, form, streams in reader.layers:
        if group.types(form)[1] not in (I4, I5):
            continue
        run, dims = (n + 7) // 8 * 8, group.v_dim
        for bit in range(8 * len(streams[4])):
            at = bit % (8 * len(streams[4]) // group.heads)
            token = at // (32 * dims) * 8 + at // 4 % 2 * 4 + at // 8 % 4
            dead = token >= n
            if at >= run * dims * 4:  # fifth bits
                at -= run * dims * 4
                wide = (dims + 15) // 16
                token = at // (128 * wide) * 8 + at // 64 % 2 * 4 + at % 4
                dead = token >= n or at // 128 % wide * 16 + at // 4 % 16 >= dims
            if dead and bit % 5 == 0:
                v = bytearray(streams[4])
                v[bit // 8] |= 1 << bit % 8
                if not refuses(group, n, form, {**streams, 4: bytes(v)}):
                    sys.exit("bit %d of V is nobody's and was taken" % bit)


def damage(data):
    """Every 7th byte changed, cut at every 11th length; of long files about 2500 and 1500 in all."""
    for i in range(0, len(data), max(7, len(data) // 2500)):
        try:
            Reader(data[:i] + bytes([data[i] ^ 0x40]) + data[i + 1:])
        except Refused:
            continue
        sys.exit("damage at %d was not found" % i)
    for i in range(0, len(data), max(11, len(data) // 1500)):
        try:
            Reader(data[:i])
        except Refused:
            continue
        sys.exit("a cut at %d was not found" % i)


def main(arguments):
    program, damages = None, False
    if arguments[:1] == ["--compare"]:
        program, arguments = arguments[1], arguments[2:]
    elif arguments[:1] == ["--damage"]:
        damages, arguments = True, arguments[1:]
    for path in arguments:
        with open(path, "rb") as file:
            data = file.read()
        reader = Reader(data)
        if program:
            theirs = subprocess.run([program, path], check=True, stdout=subprocess.PIPE).stdout
            if theirs != reader.dump():
                sys.exit("%s: the library reads other values" % path)
        check_seeds(reader)
        bare, kept = sum(g.bare for g in reader.groups), sum(g.kept for g in reader.groups)
        if damages:
            damage(data)
            damage_signs(reader)
            damage_gains(reader)
            damage_dead(reader)
        forms = [sum(entry[4] in of for entry in reader.entries)
                 for of in (OPENS, (REOPENED,), (FINE,))]
        print("%s: %d tokens, %d layers; %d blocks, %d open, %d of them again, %d fine; rows without offset: %d, "
              "taken over: %d; %d checkpoints%s" % (
                  path, reader.n_tokens, sum(g.n_layers for g in reader.groups), reader.n_blocks,
                  *forms, bare, kept, len(reader.points), ", as the library reads it" if program else ""))


if __name__ == "__main__":
    main(sys.argv[1:])
