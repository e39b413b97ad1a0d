"""Damage that read_snapshot.py has to find: bytes and cuts; contradictions in files whose checksums,
digests and ids are sound; values that no append can store.
"""
import copy
import struct
import sys

import snapshot_rewrite as rewrite
from snapshot_group import I4, I5, I8, OPEN, OPENS, REOPENED, SEALED, Refused, gain_of, np, xxh128


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


def damage_rows(reader):
    """The largest code that an open row's scale allows is taken, the next one refused."""
    for group, n, form, streams in reader.layers:
        if form not in OPENS:
            continue
        parts, at = {}, 0
        for name, count in group.smalls(n, form).items():
            parts[name] = (at, np.frombuffer(streams[5], "<u2")[at:at + count])
            at += count
        for name, kind, type in (("k", 3, group.k_type), ("v", 4, group.v_type)):
            if name not in parts:
                continue
            for i in (0, group.heads * n - 1):
                small, codes = (np.frombuffer(streams[s], "<u2").copy() for s in (5, kind))
                head, token = divmod(i, n)
                place = i * group.v_dim + np.arange(group.v_dim)
                if name == "k":
                    place = ((head * ((n + 15) // 16) + token // 16) * group.k_dim
                             + np.arange(group.k_dim)) * 16 + token % 16
                codes[place] = 0
                sealed = form == REOPENED and parts["gain"][1][i] != 0
                if name == "k":
                    most = 8000000 if type == I8 else 786048 if sealed else 240000
                else:
                    most = {I4: 2000000, I5: 2030624 if form == REOPENED else 2000000}.get(
                        type, 8319008 if form == REOPENED else 8000000)
                power = 256  # with it no code of 65504 is taken
                if form == REOPENED and name == "v" and type == I4 and sealed:
                    most, power = 63 * power, -power
                small[parts[name][0] + i] = np.array([power], "<f2").view("<u2")[0]
                code = np.arange(0x7c00, dtype="<u2").view("<f2").astype("f8")
                code = int(np.searchsorted(code * 256, most, side="right")) - 1
                for more in (0, 1):
                    codes[place[-1]] = code + more
                    changed = {**streams, 5: small.tobytes(), kind: codes.tobytes()}
                    if refuses(group, n, form, changed) != bool(more):
                        sys.exit("%s, form %d, row %d, a code of %x: %s" % (
                            name, form, i, code + more, "taken" if more else "refused"))


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
    """A bit of the last tile or run of V that is no token's, or no dim's, is refused: every 11th."""
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
            if dead and bit % 11 == 0:
                v = bytearray(streams[4])
                v[bit // 8] |= 1 << bit % 8
                if not refuses(group, n, form, {**streams, 4: bytes(v)}):
                    sys.exit("bit %d of V is nobody's and was taken" % bit)

def damage_gaps(reader):
    """A byte of an image that is nobody's is refused: every 17th, one layer of each kind of block."""
    seen = set()
    for group, n, form, streams in reader.layers:
        if (group, n, form) in seen:
            continue
        seen.add((group, n, form))
        image = group.image(n, form, streams)
        full = group.image(n, form, {kind: b"\xff" * len(data) for kind, data in streams.items()})
        for i in np.flatnonzero(np.frombuffer(full, "u1") == 0)[::17]:
            try:
                group.streams(n, form, image[:i] + b"\x01" + image[i + 1:])
            except Refused:
                continue
            sys.exit("byte %d of an image is nobody's and was taken" % i)


def damage_bytes(read, data):
    """Every 7th byte changed, cut at every 11th length; of long files about 300 and 200 in all."""
    for i in range(0, len(data), max(7, len(data) // 300)):
        if not refused(read, data[:i] + bytes([data[i] ^ 0x40]) + data[i + 1:]):
            sys.exit("damage at %d was not found" % i)
    for i in range(0, len(data), max(11, len(data) // 200)):
        if not refused(read, data[:i]):
            sys.exit("a cut at %d was not found" % i)


def refused(read, data):
    """Why, or None."""
    try:
        read(data)
    except Refused as why:
        return str(why)
    return None


class Contradiction:
    """A change of a file whose checksums are computed again; read(file) has to say why not."""

    def __init__(self, read, reader, sections, name):
        self.read, self.reader, self.base, self.name = read, reader, sections, name

    def refuse(self, why, edit=None, change=None, header=None):
        """edit(sections); change: see rewrite.join; why: how the refusal begins."""
        sections = [list(section) for section in self.base]
        if edit:
            edit(sections)
        data = rewrite.join(header or self.reader.head, sections, change)
        text = refused(self.read, data)
        if text is None or not text.startswith(why):
            sys.exit("%s: %r, not %r" % (self.name, text, why))

    def accept(self, edit):
        sections = [list(section) for section in self.base]
        edit(sections)
        text = refused(self.read, rewrite.join(self.reader.head, sections))
        if text is not None:
            sys.exit("%s: %r" % (self.name, text))

    def put(self, why, kind, at, new, nth=0):
        """Other bytes at a place of the n-th section's body."""
        def edit(sections):
            section = [s for s in sections if s[0] == kind][nth]
            begin = at % len(section[3])
            section[3] = section[3][:begin] + new + section[3][begin + len(new):]
        self.refuse(why, edit)

    def body(self, why, kind, body):
        def edit(sections):
            section = [s for s in sections if s[0] == kind][0]
            section[3] = body(section[3]) if callable(body) else body
        self.refuse(why, edit)

    def section(self, why, kind, edit):
        """edit(sections, number of the first of the kind)."""
        self.refuse(why, lambda sections: edit(sections, [s[0] for s in sections].index(kind)))

    def number(self, why, kind, at, x, form="<I"):
        self.put(why, kind, at, struct.pack(form, x))


def number(x):
    return struct.pack("<I", x)


def contradict_blocks(c, native):
    """The block table, blocks, native and digests sections of a file without parent."""
    c.number("place", 3, 30, 2, "<H")
    c.number("place", 3, 30, 0x101, "<H")
    c.number("a block of a parent", 3, 30, 1, "<H")
    c.put("id of a block", 3, 15, b"\1")
    c.put("id of a block", 3, 0, xxh128(b""))
    c.number("representation", 3, 28, 4, "<H")
    c.number("group", 3, 16, 8)
    c.body("block table", 3, lambda body: body + bytes(32))
    c.body("block table", 3, lambda body: body[:-1])
    c.number("block", 4, 0, 7)
    c.number("block", 4, 14, 1, "<H")
    c.number("block", 4, 16, 77)
    c.number("section", 4, 20, 1 - native)
    c.number("block", 4, 20, 2)
    c.number("block", 4, 24, 1)
    c.number("block", 4, 28, 1)
    c.body("block size", 4, lambda body: body + bytes(8))
    c.body("block size", 4, lambda body: body[:-8])
    c.put("block id", 14, 0, bytes(16))
    c.put("digest", 14, 16, bytes(16))
    c.put("digest", 14, -1, b"\xff")
    c.body("size of digests", 14, lambda body: body + bytes(16))
    c.body("size of digests", 14, lambda body: body[:-16])
    c.section("section order", 14, lambda sections, i: sections.pop(i))
    c.section("section order", 14, lambda sections, i: sections[i].__setitem__(2, 77))
    c.section("section order", 4, lambda sections, i: sections[i].__setitem__(2, 77))
    c.section("section flags", 14, lambda sections, i: sections[i].__setitem__(1, 0))
    for kind in (13 if native else 5, 14):  # before these there is nothing else
        c.section("section of unknown type", kind,
                  lambda sections, i: sections.insert(i, [77, 0, 0, b"other"]))
    for other in (0, 15):
        for flags in (1, 2):
            c.section("section of unknown type", 4,
                      lambda sections, i: sections.insert(i, [other, flags, 0, b"other"]))
        c.accept(lambda sections: sections.insert(
            [s[0] for s in sections].index(4), [other, 0, 9, b"other"]))
    if not native:
        return
    c.section("digest", 13, lambda sections, i: sections[i].__setitem__(
        3, bytes([sections[i][3][0] ^ 2]) + sections[i][3][1:]))
    c.body("size of a native", 13, lambda body: body + bytes(64))
    c.body("size of a native", 13, lambda body: body[:-64])
    c.refuse("section order", None, lambda name, data: (data + 1) % 64 if name == "value" else data)
    c.refuse("section order", None, lambda name, data: data + 64 if name == "value" else data)
    if any(section[0] == 13 and section[2] for section in c.base):
        c.refuse("padding of a native", None, lambda name, data:
                 data[:-1] + b"\1" if name == "padding" and data else data)


def contradict_end(c):
    def cut(name, at, new):
        def change(what, data):
            if what != name:
                return data
            begin = at + len(data) if at < 0 else at
            return data[:begin] + new + data[begin + len(new):]
        return change
    c.refuse("index", None, cut("index", 4, number(1)))
    c.refuse("index", None, cut("index", 8, number(1)))
    c.refuse("index", None, cut("index", 16, number(1)))
    c.refuse("index", None, cut("index", 24, number(1)))
    c.refuse("index", None, cut("index", 32, bytes(16)))
    c.refuse("index", None, cut("index", -16, bytes(16)))
    c.refuse("index", None, lambda name, data: data + data[-48:] if name == "index" else data)
    c.refuse("index", None, lambda name, data: data[:-48] if name == "index" else data)
    c.refuse("end", None, cut("end", 0, number(8)))
    c.refuse("end", None, cut("end", 8, number(8)))
    c.refuse("snapshot id", None, cut("end", 16, bytes(16)))
    c.refuse("footer", None, cut("footer", -1, b"\x0b"))
    c.refuse("end checksum", None, cut("footer", -16, b"\0\0\0\0\0\0\0\0"))


def contradict_caller(c):
    """The base has a caller's section, of name "name" and 9 bytes."""
    make = rewrite.piece_body
    c.number("size of a piece", 12, 0, 0)
    c.number("size of a piece", 12, 0, 65)
    c.body("size of a piece", 12, make(b"", b"data"))
    c.body("size of a piece", 12, make(b"x" * 65, b"data"))
    c.number("size of a piece", 12, 4, 1)
    c.number("piece size", 12, 8, 17, "<Q")
    c.number("piece size", 12, 8, 8, "<Q")
    c.number("piece size", 12, 8, 2**64 - 1, "<Q")
    c.body("piece size", 12, b"")
    c.body("piece size", 12, lambda body: body + bytes(8))
    c.put("name of a piece", 12, 17, b"\0")
    c.put("padding", 12, 23, b"\1")
    c.put("padding", 12, 39, b"\1")
    c.section("section flags", 12, lambda sections, i: sections[i].__setitem__(1, 1))
    c.section("section order", 12, lambda sections, i: sections[i].__setitem__(2, 1))
    for name, value, why in ((b"name", 1, "two pieces"), (b"other", 0, "section order"),
                             (b"other", 2, "section order")):
        c.section(why, 12, lambda sections, i: sections.insert(
            i + 1, [12, 0, value, make(name, b"")]))
    c.section("section order", 3, lambda sections, i: sections.insert(
        i, sections.pop([s[0] for s in sections].index(12))))  # behind the block table


def contradict_parent(c, parent, inherited):
    """The base is a delta, some of its blocks are in the parent."""
    def name(why, x):
        c.body(why, 11, rewrite.parent_body(parent.id, inherited, parent.depth + 1, x))

    for bad in (b".", b"..", b"a/b", b"/", b"a\0", b"\0"):
        name("name of the parent", bad)
    name("size of the parent's name", b"")
    name("size of the parent's name", b"x" * 256)
    name("no parent", b"x" * 255)
    c.body("parent size", 11, b"")
    c.body("size of the parent", 11, lambda body: body + bytes(8))
    c.body("size of the parent", 11, lambda body: body[:-8])
    c.put("padding", 11, -1, b"\1")
    c.put("another parent", 11, 0, bytes(16))
    c.number("inherited tokens", 11, 16, c.reader.n_tokens + 1, "<Q")
    c.number("inherited tokens", 11, 16, 2**64 - 1, "<Q")
    if inherited:
        c.number("section order", 11, 16, inherited - 1, "<Q")
    c.number("depth", 11, 24, 0)
    c.number("depth", 11, 24, 257)
    c.number("depth of the parent", 11, 24, parent.depth + 2)
    c.section("section flags", 11, lambda sections, i: sections[i].__setitem__(1, 0))
    c.section("section order", 11, lambda sections, i: sections[i].__setitem__(2, 1))
    c.section("", 3, lambda sections, i: sections.insert(i, sections.pop(0)))
    c.section("section order", 11, lambda sections, i: sections.insert(i, list(sections[i])))
    for at in (64 + 32, len(c.reader.head) - 9):  # a seed; the last byte of fingerprint or padding
        head = bytearray(c.reader.head)
        head[at] ^= 1
        c.refuse("header of the parent" if at == 96 else "", None, None, bytes(head))
    placed = [b for b, entry in enumerate(c.reader.entries) if entry[5] == 1]
    if placed:
        at = 32 * placed[-1]
        c.put("id of a block", 3, at, bytes(16))
        c.put("a block that the parent", 3, at, b"\1" * 16)
        c.number("id of a block", 3, at + 30, 0, "<H")
        c.number("place", 3, at + 30, 2, "<H")
        for form in c.reader.groups[c.reader.entries[placed[-1]][1]].forms:
            if form != c.reader.entries[placed[-1]][4]:
                c.refuse("", lambda sections: form_of(sections, at, form))
    if placed or inherited:
        c.section("", 11, lambda sections, i: sections.pop(i))


def damage_window(c):
    """Positions of a file that has released rows: the query that has to see all that it can stands
    behind the highest one, and the rows of the sinks count with those that are released."""
    reader = c.reader
    for g, group in enumerate(reader.groups):
        first = [row for row in range(reader.rows) if (g, row) in reader.own][group.sink_rows:][0]
        if first == group.sink_rows or group.sink_rows == 0:
            continue
        for token, position, sound in ((-1, 0, True), (0, int(reader.positions.max()), False),
                                       (0, int(reader.positions[64 * first - 1]), True)):
            positions = reader.positions.copy()
            positions[token] = position

            def edit(sections):
                [s for s in sections if s[0] == 2][0][3] = rewrite.stream_set({2: positions.tobytes()})
            if not sound:
                c.refuse("rows that a window needs", edit)
                continue
            sections = [list(section) for section in c.base]
            edit(sections)
            why = refused(c.read, rewrite.join(reader.head, sections))
            if why:
                sys.exit("%s: %s, with token %d at %d" % (c.name, why, token, position))


def form_of(sections, at, form):
    table = [section for section in sections if section[0] == 3][0]
    table[3] = table[3][:at + 28] + struct.pack("<H", form) + table[3][at + 30:]


def contradict_forms(c):
    """In a group with K of i4: of two rows that follow one another the first one open, the second
    open again."""
    entries, groups = c.reader.entries, c.reader.groups
    for b, (_, g, row, _, _, _) in enumerate(entries[:c.reader.n_own]):
        after = c.reader.own.get((g, row + 1))
        if REOPENED in groups[g].forms and after is not None:
            for form in (OPEN, REOPENED):
                def edit(sections):
                    form_of(sections, 32 * b, form)
                    form_of(sections, 32 * after, REOPENED)
                c.refuse("open again after an open block", edit)


def damage(reader, data, parents):
    """All of it, of one file."""
    make = type(reader)
    damage_bytes(lambda x: make(x, parents), data)
    damage_signs(reader)
    damage_gains(reader)
    damage_rows(reader)
    damage_dead(reader)
    damage_gaps(reader)

    def again(sections, parents, name):
        """The same contents, written in another way."""
        file = rewrite.join(reader.head, sections)
        other = make(file, parents)
        if other.dump() != reader.dump():
            sys.exit("%s: other values" % name)
        base = rewrite.sections_of(other)
        return other, Contradiction(lambda x: make(x, parents), other, base, name)

    for native in (0, 1):
        other, c = again(rewrite.relaid(reader, native), parents, "native" if native else "layers")
        if other.id != reader.id:
            sys.exit("the snapshot id depends on how the blocks lie")
        if any(section[0] == 4 for section in c.base) and not reader.parent:
            contradict_blocks(c, native)
            if not (reader.moved or reader.points):
                damage_window(c)
    contradict_forms(c)
    contradict_end(c)
    sections = [section for section in rewrite.sections_of(reader) if section[0] != 12]
    sections.insert([s[0] in (8, 11) for s in sections].index(False),
                    [12, 0, 0, rewrite.piece_body(b"name", b"123456789")])
    contradict_caller(again(sections, parents, "caller")[1])

    def named(**files):
        def parents(name):
            if name not in [key.encode() + b".kvt" for key in files]:
                raise Refused("no parent")
            return files[name[:-4].decode()]
        return parents

    here = [b for b, entry in enumerate(reader.entries[:reader.n_own]) if entry[5] == 0] or [-1]
    for inherited, keep in ((reader.n_tokens, -1), (reader.n_tokens // 3, here[-1]), (0, here[0])):
        parents = named(first=reader)
        sections = rewrite.delta(reader, b"first.kvt", inherited, keep)
        child, c = again(sections, parents, "delta")
        contradict_parent(c, reader, inherited)
        if keep >= 0:  # a block that the delta alone has is in no parent
            lacking = copy.copy(reader)
            lacking.found = {name: of for name, of in reader.found.items() if name != reader.names[keep]}
            _, c = again(sections, named(first=lacking), "delta with a block of its own")
            for b in [b for b, entry in enumerate(reader.entries) if b > keep][-1:]:
                c.put("a block that the parent", 3, 32 * b, reader.names[keep])
        parents = named(first=reader, second=child)
        sections = rewrite.delta(child, b"second.kvt", reader.n_tokens // 2, -1)
        grandchild, _ = again(sections, parents, "delta of a delta")
        if grandchild.depth != reader.depth + 2:
            sys.exit("depth of a delta of a delta")
