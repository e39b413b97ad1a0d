#!/usr/bin/env python3
"""Read a kvtile snapshot: a second reader, written from docs/format.md and docs/numerics.md.

read_snapshot.py SNAPSHOT...                      check and describe
read_snapshot.py --compare PROGRAM SNAPSHOT...    and compare all values with what
                                                  `PROGRAM SNAPSHOT` writes (dump_golden.c)
read_snapshot.py --damage SNAPSHOT...             and check that damage is found

The parents of a delta are read from its folder. Exit code 77: numpy, libxxhash or libzstd is
missing.
"""
import os
import struct
import subprocess
import sys

from snapshot_group import (ABSENT, FINE, OPEN, OPENS, REOPENED, SEALED, Group, Refused, need, np,
                            read_streams, up8, xxh64, xxh128)


class Reader:
    """A snapshot that has been checked. parents(name) gives the Reader of a file beside it."""

    def __init__(self, data, parents):
        self.data, self.at = data, 0
        self.index, self.sections = [], []
        self.header()
        self.inherit(parents)
        self.sequence()
        self.caller()
        self.ids = self.ints(1, 1, "ids")
        self.positions = self.ints(2, 2, "positions")
        need((self.ids >= -1).all() and (self.positions >= 0).all(), "ids or positions")
        if self.moved:
            self.shifts = self.ints(10, 7, "shifts")
        else:
            self.shifts = np.zeros(self.n_tokens, "<i4")
            need(not self.parent or not self.parent.shifts[:self.inherited].any(),
                 "shifts of the parent")
        need((self.shifts != -2**31).all(), "shifts")
        key_positions = self.positions.astype("<i8") + self.shifts
        need((key_positions >= 0).all() and (key_positions < 2**31).all(), "shifts")
        self.key_positions = key_positions.astype("<i4")
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
        need(version == 1 and block == 64 and tile == 16 and flags < 4, "version")
        need(flags < 2 or self.n_tokens, "flags")
        self.moved, self.unkeyed = flags & 1 == 1, flags & 2 == 2
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
        self.head = fixed + rest
        need(largest == max(sum(g.sizes(64, form).values()) for g in self.groups for form in g.forms),
             "largest layer")

    def peek(self):
        """Type and value of the next section that is known; those before it are checked."""
        at = self.at
        while True:
            head = self.take(32)
            kind, _, _, value, check = struct.unpack("<IIQQQ", head)
            need(check == xxh64(head[:24]), "section checksum")
            if 1 <= kind <= 14:
                self.at = at
                return kind, value
            self.at -= 32
            at = self.skip()

    def skip(self):
        """A section of an unknown type."""
        start = self.at
        kind, flags, size, value, _ = struct.unpack("<IIQQQ", self.take(32))
        need(flags == 0 and size >= 8, "section of unknown type")
        payload = self.take(size)
        need(struct.unpack("<Q", payload[-8:])[0] == xxh64(payload[:-8]), "section checksum")
        self.note(kind, value, start, xxh128(payload[:-8]))
        return self.at

    def section(self, want, want_value):
        while True:
            start = self.at
            head = self.take(32)
            kind, flags, size, value, check = struct.unpack("<IIQQQ", head)
            need(check == xxh64(head[:24]), "section checksum")
            if 1 <= kind <= 14:
                need(flags == (kind != 12), "section flags")
                need(kind == want and value == want_value, "section order")
                payload = self.take(size)
                self.sections.append((kind, flags, value, payload))
                return start, payload
            need(want not in (5, 7, 13, 14), "section of unknown type")
            self.at = start
            self.skip()

    def note(self, kind, value, start, digest):
        """An entry of the index. (Sections of unknown types that are read have no flags.)"""
        self.index.append(struct.pack("<IIQQQ", kind, 0, value, start, self.at - start) + digest)

    def summed(self, payload, what):
        """What a payload has before its checksum."""
        need(len(payload) >= 8, what + " size")
        need(struct.unpack("<Q", payload[-8:])[0] == xxh64(payload[:-8]), what + " checksum")
        return payload[:-8]

    def ints(self, section, kind, what):
        """The parent's first tokens, then those of this file's sections."""
        parts = [getattr(self.parent, what)[:self.inherited] if self.parent else np.zeros(0, "<i4")]
        for first in range(self.inherited, self.n_tokens, 16384):
            start, payload = self.section(section, first)
            n = min(16384, self.n_tokens - first)
            data = read_streams(payload, {kind: 4 * n}, {kind: (4, 0, 0, 0, 0)})[kind]
            self.note(section, first, start, xxh128(data))
            parts.append(np.frombuffer(data, "<i4"))
        return np.concatenate(parts)

    def inherit(self, parents):
        self.parent, self.inherited, self.depth, self.found = None, 0, 0, {}  # found: blocks by id
        if self.peek()[0] != 11:
            return
        start, payload = self.section(11, 0)
        body = self.summed(payload, "parent")
        need(len(body) >= 32, "parent size")
        name, self.inherited, self.depth, size = struct.unpack("<16sQII", body[:32])
        need(1 <= size <= 255 and len(body) == up8(32 + size), "size of the parent's name")
        path = body[32:32 + size]
        need(not any(body[32 + size:]), "padding")
        need(not {0, ord("/")} & set(path) and path not in (b".", b".."), "name of the parent")
        need(self.inherited <= self.n_tokens, "inherited tokens")
        need(1 <= self.depth <= 256, "depth")
        self.note(11, 0, start, xxh128(body))
        self.parent = parents(path)
        need(self.parent.id == name, "another parent")
        need(self.depth == self.parent.depth + 1, "depth of the parent")
        need(self.inherited <= self.parent.n_tokens, "inherited tokens of the parent")
        need(self.same() == self.parent.same(), "header of the parent")
        self.found = dict(self.parent.found)

    def same(self):
        """What of the header is the parent's."""
        return self.head[:24], self.head[32:44], self.head[56:-8]

    def sequence(self):
        self.next_position, self.tag = -1, b""
        if self.peek()[0] != 8:
            return
        start, payload = self.section(8, 0)
        body = self.summed(payload, "sequence")
        need(len(body) >= 8, "sequence size")
        self.next_position, size = struct.unpack("<iI", body[:8])
        need(size <= 256 and len(body) == up8(8 + size), "tag size")
        self.tag = body[8:8 + size]
        need(not any(body[8 + size:]), "padding")
        need(self.next_position >= -1 and (self.next_position >= 0 or size), "an empty sequence section")
        self.note(8, 0, start, xxh128(body))

    def caller(self):
        self.pieces = {}
        while self.peek()[0] == 12:
            number = len(self.pieces)
            start, payload = self.section(12, number)
            body = self.summed(payload, "piece")
            need(len(body) >= 16, "piece size")
            size, zero, count = struct.unpack("<IIQ", body[:16])
            need(1 <= size <= 64 and zero == 0, "size of a piece's name")
            at = up8(16 + size)
            need(len(body) == at + up8(count), "piece size")
            name = body[16:16 + size]
            need(0 not in name, "name of a piece")
            need(name not in self.pieces, "two pieces of a name")
            need(not any(body[16 + size:at]) and not any(body[at + count:]), "padding")
            self.pieces[name] = body[at:at + count]
            self.note(12, number, start, xxh128(body))

    def row_tokens(self, row, n_tokens):
        return min(64, n_tokens - 64 * row)

    def blocks(self):
        start, payload = self.section(3, 0)
        table = self.summed(payload, "block table")
        need(len(table) == 32 * self.n_blocks, "block table size")
        self.note(3, 0, start, xxh128(table))
        self.entries = [struct.unpack("<16sIIIHH", table[32 * b:32 * b + 32])
                        for b in range(self.n_blocks)]
        for name, group, _, _, form, place in self.entries:
            need(group < len(self.groups), "group of a block")
            need(form in (SEALED, OPEN, FINE, REOPENED), "representation")
            need(form in self.groups[group].forms, "a representation that the group's blocks do not have")
            need(place < 2, "place of a block")
            need(self.parent or place == 0, "a block of a parent, without one")
            need(any(name) == (place == 1), "id of a block")
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
            need(entry[2] < self.rows and 1 <= entry[3] <= 64, "entry of a checkpoint's block")
        self.values, self.layers = [], []  # of each block: {layer: (K, V)}
        self.names, ids = [], set()
        for b, (name, g, row, n, form, place) in enumerate(self.entries):
            if place == 0:
                name = self.block(b, table[32 * b + 16:32 * b + 32])
            else:
                need(name in self.parent.found, "a block that the parent does not have")
            need((name, g, row) not in ids, "a block is there twice")
            ids.add((name, g, row))
            self.names.append(name)
            self.values.append(self.values_of(name, self.groups[g], n, form))

    def values_of(self, name, group, n, form):
        """{layer: (K, V)}; a parent may have the block in another group of the same layout."""
        of, tokens, was, images, values = self.found[name]
        need((tokens, was, len(images)) == (n, form, group.n_layers), "another block of the parent")
        if of.layout_bytes != group.layout_bytes:
            need(len(images[0]) == group.image_bytes(form), "another block of the parent")
            values = [group.values(n, form, group.streams(n, form, image)) for image in images]
        return dict(zip(group.layers, values))

    def block(self, b, entry):
        """A block that is in this file. Its id; it is in self.found then."""
        _, g, _, n, form, _ = self.entries[b]
        group = self.groups[g]
        start, payload = self.section(4, b)
        need(len(payload) == 40, "block size")
        body = self.summed(payload, "block")
        need(body[:16] == entry, "block")
        n_layers, native, zero = struct.unpack("<IIQ", body[16:])
        need(n_layers == group.n_layers and native < 2 and zero == 0, "block")
        images, layers = [], []
        if native:
            padding = -(self.at + 32) % 64
            _, payload = self.section(13, padding)
            size = group.image_bytes(form)
            need(len(payload) == padding + n_layers * size, "size of a native section")
            need(not any(payload[:padding]), "padding of a native section")
            images = [payload[at:at + size] for at in range(padding, len(payload), size)]
        else:
            for i in range(n_layers):
                _, payload = self.section(5, i)
                streams = read_streams(payload, group.sizes(n, form), group.shapes(n, form))
                layers.append((streams, group.values(n, form, streams)))
                images.append(group.image(n, form, streams))
        _, payload = self.section(14, b)
        need(len(payload) == 24 + 16 * n_layers, "size of digests")
        body = self.summed(payload, "digests")
        digests = b"".join(xxh128(image) for image in images)
        need(body[16:] == digests, "digest of a layer")
        need(body[:16] == xxh128(struct.pack("<II", n, form) + digests), "block id")
        for image in images if native else []:
            streams = group.streams(n, form, image)
            layers.append((streams, group.values(n, form, streams)))
        self.layers += [(group, n, form, streams) for streams, _ in layers]
        self.found[body[:16]] = group, n, form, images, [values for _, values in layers]
        self.note(4, b, start, body[:16])
        return body[:16]

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
                need(self.entries[b][4] != REOPENED or not is_open, "open again after an open block")
                is_open = self.entries[b][4] in OPENS
            if not is_open:
                sealed = row + 1
        if first > group.sink_rows:  # what a query behind all others sees has to be there
            see = int(self.positions[:n_tokens].max()) + 1 - group.window
            need(not (self.positions[:64 * first] > see).any(), "rows that a window needs")
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
            body = self.summed(payload, "checkpoint")
            need(len(body) >= 16, "checkpoint size")
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
            self.note(9, n_tokens, start, xxh128(body))
        need(self.n_own + named == self.n_blocks, "blocks of no checkpoint")

    def end(self):
        start, payload = self.section(6, 0)
        index = self.summed(payload, "index")
        need(index == b"".join(self.index), "index")
        _, end = self.section(7, 0)
        need(len(end) == 48 and end[40:] == b"KVTE\r\n\x1a\n", "footer")
        need(struct.unpack("<QQ", end[:16]) == (start, self.at), "end")
        need(struct.unpack("<Q", end[32:40])[0] == xxh64(end[:32]), "end checksum")
        self.id = xxh128(self.head + b"".join(e[:4] + e[8:16] + e[32:] for e in self.index))
        need(end[16:32] == self.id, "snapshot id")
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


def parents_of(path):
    """Readers of the files beside a path, by name."""
    folder, known = os.path.dirname(os.fsencode(path)), {}

    def parents(name):
        if name not in known:
            known[name] = None
            try:
                with open(os.path.join(folder, name), "rb") as file:
                    data = file.read()
            except OSError:
                raise Refused("no parent") from None
            known[name] = Reader(data, parents)
        need(known[name], "a parent that is its own, or was refused")
        return known[name]
    return parents


def main(arguments):
    import snapshot_damage
    program, damages = None, False
    if arguments[:1] == ["--compare"]:
        program, arguments = arguments[1], arguments[2:]
    elif arguments[:1] == ["--damage"]:
        damages, arguments = True, arguments[1:]
    for path in arguments:
        with open(path, "rb") as file:
            data = file.read()
        parents = parents_of(path)
        reader = Reader(data, parents)
        bare, kept = sum(g.bare for g in reader.groups), sum(g.kept for g in reader.groups)
        if program:
            theirs = subprocess.run([program, path], check=True, stdout=subprocess.PIPE).stdout
            if theirs != reader.dump():
                sys.exit("%s: the library reads other values" % path)
        snapshot_damage.check_seeds(reader)
        if damages:
            snapshot_damage.damage(reader, data, parents)
        forms = [sum(entry[4] in of for entry in reader.entries)
                 for of in (OPENS, (REOPENED,), (FINE,))]
        places = sum(entry[5] for entry in reader.entries)
        print("%s: %d tokens, %d layers; %d blocks, %d open, %d of them again, %d fine; "
              "rows without offset: %d, taken over: %d; %d checkpoints%s%s" % (
                  path, reader.n_tokens, sum(g.n_layers for g in reader.groups), reader.n_blocks,
                  *forms, bare, kept, len(reader.points),
                  "; %d blocks and %d tokens of a parent" % (places, reader.inherited)
                  if reader.parent else "", ", as the library reads it" if program else ""))


if __name__ == "__main__":
    main(sys.argv[1:])
