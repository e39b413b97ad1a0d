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


F32, F16, I8 = 0, 1, 2
SEALED, OPEN = 0, 1
ABSENT = 2**32 - 1
ELEMENT = {F32: 4, F16: 2, I8: 1}
NUMPY = {F32: "<f4", F16: "<f2", I8: "i1"}


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
        need(self.k_type <= 2 and self.v_type <= 2, "group: types")
        self.rotates = self.k_type == I8 and not self.flags & 1
        self.offsets = self.k_type == I8 and not self.flags & 2
        self.v_in_k = bool(self.flags & 4)
        self.v_rotates = self.v_type == I8 and not self.flags & 8 and not self.v_in_k
        # Rows that the window leaves, and the first row behind those that it has released.
        self.sink_rows = max((self.sinks + 63) // 64, int(self.offsets)) if self.window else 0
        self.first = self.sink_rows
        self.bare = 0  # open rows of K without the offset
        self.seals = I8 in (self.k_type, self.v_type)
        if self.v_in_k:
            need(self.v_dim <= self.k_dim and self.v_type == self.k_type, "group: V in K")
            need(not self.rotates or self.v_dim % (self.k_dim & -self.k_dim) == 0, "group: V in K")

    def types(self, form):
        """How K and V lie in a block: f16 instead of i8 in an open one."""
        return [F16 if form == OPEN and t == I8 else t for t in (self.k_type, self.v_type)]

    def sizes(self, n, form):
        """Native sizes of kinds 3, 4, 5."""
        tiles, quads = (n + 15) // 16, (n + 3) // 4
        k_type, v_type = self.types(form)
        k = self.heads * tiles * 16 * self.k_dim * ELEMENT[k_type]
        v = self.heads * (quads * 4 if v_type == I8 else n) * self.v_dim * ELEMENT[v_type]
        scales = (self.k_type == I8) + (self.v_type == I8)
        if self.v_in_k:
            v, scales = 0, self.k_type == I8
        return {3: k, 4: v, 5: 2 * self.heads * (scales * n + self.offsets * self.k_dim)}

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

    def values(self, n, form, streams):
        """K and V of a layer as f32 [token][head][dim]."""
        heads, tiles, quads = self.heads, (n + 15) // 16, (n + 3) // 4
        k_type, v_type = self.types(form)
        k = np.frombuffer(streams[3], NUMPY[k_type])
        if k_type == I8:
            need(not (k == -128).any(), "a code of -128")
            k = k.reshape(heads, tiles, self.k_dim // 4, 16, 4).transpose(0, 1, 3, 2, 4)
        else:
            k = k.reshape(heads, tiles, self.k_dim, 16).transpose(0, 1, 3, 2)
        k = k.reshape(heads, tiles * 16, self.k_dim)
        v = np.frombuffer(streams.get(4, b""), NUMPY[v_type])
        if self.v_in_k:
            v = np.zeros((heads, n, 0), NUMPY[v_type])
        elif v_type == I8:
            need(not (v == -128).any(), "a code of -128")
            v = v.reshape(heads, quads, self.v_dim, 4).transpose(0, 1, 3, 2)
            v = v.reshape(heads, quads * 4, self.v_dim)
        else:
            v = v.reshape(heads, n, self.v_dim)
        for x in (k[:, n:], v[:, n:]):  # also a zero with a sign is none
            need(not any(x.tobytes()), "a value where there is no token")
        k, v = k[:, :n].astype("f4"), v[:, :n].astype("f4")
        small, at = np.frombuffer(streams.get(5, b""), "<f2").astype("f4"), 0
        need(np.isfinite(k).all() and np.isfinite(v).all() and np.isfinite(small).all(), "not finite")
        for side in range(2):
            if (self.k_type, self.v_type)[side] == I8 and not (side == 1 and self.v_in_k):
                scale = small[at:at + heads * n].reshape(heads, n, 1)
                at += heads * n
                bare = np.signbit(scale)  # open rows of K without the offset
                need(form == OPEN and side == 0 and self.offsets or not bare.any(), "a negative scale")
                scale = np.abs(scale)
                need(form != OPEN or np.isin(scale, 2.0 ** np.arange(16)).all(), "an open scale")
                if side == 1:
                    v = v * scale
                elif self.offsets:
                    offset = small[-heads * self.k_dim:].reshape(heads, 1, self.k_dim)
                    k = np.where(bare, k * scale, k * scale + offset)
                    self.bare += bare.sum()
                else:
                    k = k * scale
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
        need(largest == max(sum(g.sizes(64, form).values()) for g in self.groups for form in
                            ((SEALED, OPEN) if g.seals else (SEALED,))), "largest layer")

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
        """shape: element size, and for i8 (heads, tokens rounded up, dims, is K)."""
        element, heads, tokens, dims, is_k = shape
        x = np.frombuffer(data, "u1")
        if how == 0:
            return data
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
            need(form in (SEALED, OPEN), "representation")
            need(form == SEALED or group.seals, "an open block without i8")
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
                need(self.entries[b][4] == OPEN or not is_open, "a sealed block after an open one")
                is_open = self.entries[b][4] == OPEN
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


def damage_signs(reader):
    """A sign on a scale is refused, except on K's in an open block that has an offset."""
    for group, n, form, streams in reader.layers:
        scales = len(streams.get(5, b"")) // 2 - group.offsets * group.heads * group.k_dim
        for i in sorted(set((0, group.heads * n - 1, group.heads * n, scales - 1)) & set(range(scales))):
            small = np.frombuffer(streams[5], "<u2").copy()
            small[i] |= 0x8000
            refused, fine = False, form == OPEN and group.offsets and i < group.heads * n
            try:
                group.values(n, form, {**streams, 5: small.tobytes()})
            except Refused:
                refused = True
            if refused == fine:
                sys.exit("a sign on scale %d, form %d: %s" % (i, form, "refused" if refused else "taken"))


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
        bare = sum(g.bare for g in reader.groups)
        if damages:
            damage(data)
            damage_signs(reader)
        print("%s: %d tokens, %d layers, %d of %d blocks open, %d rows without offset, %d checkpoints%s" % (
            path, reader.n_tokens, sum(g.n_layers for g in reader.groups),
            sum(entry[4] for entry in reader.entries), reader.n_blocks, bare, len(reader.points),
            ", as the library reads it" if program else ""))


if __name__ == "__main__":
    main(sys.argv[1:])
