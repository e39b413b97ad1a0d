#!/usr/bin/env python3
"""Make the keys of stored prefixes and read their values: a second reader, written from
docs/format.md ("Stored values") and docs/numerics.md.

read_value.py --golden LIST PAGE PROGRAM FOLDER   have PROGRAM (dump_values.c) fill the folder, which is
                                                  emptied first; compare all keys and numbers with
                                                  what this reader makes of them, the values with
                                                  LIST, and one with the example of PAGE
read_value.py --update LIST PAGE PROGRAM FOLDER   and write LIST and the example

Each value is damaged, too, at every byte of its head and at some of its images. Exit code 77: numpy,
libxxhash or libzstd is missing, or the library was built without SHA-256.
"""
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys

from snapshot_group import FINE, I4, I5, OPEN, REOPENED, SEALED, Group, Refused, need, np, xxh64, xxh128

VERSION = 1
MARK = "<!-- the stored example: tests/read_value.py -->\n<!-- test: output -->\n```\n"


def sized(data):
    return struct.pack("<Q", len(data)) + data


def sha256(label, *parts):
    return hashlib.sha256(label + b"".join(parts)).digest()


class Keys:
    """The keys of a prompt. A case: see dump_values.c."""

    def __init__(self, case):
        self.ids, self.positions = case["ids"], case["positions"]
        self.extras = {e["block"]: bytes.fromhex(e["data"]) for e in case["extras"]}
        self.fine_rows = [(g["fine_tokens"] + 63) // 64 if {g["k_type"], g["v_type"]} & {I4, I5} else 0
                          for g in case["groups"]]
        self.geometry = [sha256(b"kvt:geom", struct.pack(
            "<9IQII", number, len(g["layers"]), g["n_q_heads"], g["n_kv_heads"], g["k_dim"], g["v_dim"],
            g["k_type"], g["v_type"], g["flags"], g["rotation_seed"], g["window_tokens"],
            g["sink_tokens"]), struct.pack("<%dI" % len(g["layers"]), *g["layers"]))
            for number, g in enumerate(case["groups"])]
        names = [sized(bytes.fromhex(case[name])) for name in ("name_space", "salt", "fingerprint", "tag")]
        self.rows = [sha256(b"kvt:seed", struct.pack("<I", VERSION), *names)]  # of 0, 1, ... rows
        for row in range(len(self.ids) // 64):
            self.rows.append(sha256(b"kvt:rows", self.rows[-1], self.tokens(row, 64)))

    def tokens(self, row, n):
        """The extra bytes of a row, then ids and positions of its first n tokens."""
        ints = self.ids[64 * row:64 * row + n] + self.positions[64 * row:64 * row + n]
        return sized(self.extras.get(row, b"")) + struct.pack("<%di" % (2 * n), *ints)

    def form(self, row, group):
        return FINE if row < self.fine_rows[group] else SEALED

    def block(self, row, group):
        return sha256(b"kvt:bloc", self.rows[row + 1], self.geometry[group],
                      struct.pack("<I", self.form(row, group)))

    def checkpoint(self, n_tokens):
        row, n = divmod(n_tokens, 64)
        groups = [geometry + (struct.pack("<I", self.form(row, g)) if n else b"")
                  for g, geometry in enumerate(self.geometry)]
        return sha256(b"kvt:chec", self.rows[row], struct.pack("<I", n), self.tokens(row, n) if n else b"",
                      *groups)


class Value:
    """A value that has been checked: entries of (row, group, form, tokens, [images])."""

    def __init__(self, data, key, groups):
        need(len(data) >= 80, "cut")
        (magic, version, self.flags, named, size, self.n_tokens, blob, self.next_position,
         n) = struct.unpack("<8sII32sQQQiI", data[:80])
        need(magic == b"\x89KVB\r\n\x1a\n" and version == VERSION, "magic or version")
        need(named == key, "another key")
        need(size == len(data) and self.flags < 2 and 1 <= self.n_tokens <= 2**30, "head")
        need(self.next_position >= -1, "next position")
        need(self.flags or (n == 1 and blob == 0 and self.next_position == -1), "head of a block")
        need(80 + 32 * n <= len(data), "cut")
        entries = [struct.unpack("<QIIIIQ", data[80 + 32 * i:112 + 32 * i]) for i in range(n)]
        for row, g, form, tokens, layers, image in entries:
            need(g < len(groups) and form in groups[g].forms, "group or form of an entry")
            need(64 * row < self.n_tokens and tokens == min(64, self.n_tokens - 64 * row), "tokens")
            need((layers, image) == (groups[g].n_layers, groups[g].image_bytes(form)), "size of an entry")
        at = 80 + 32 * n
        digests = [data[i:i + 16] for i in range(at, at + 16 * (sum(e[4] for e in entries) + self.flags), 16)]
        end = at + 16 * len(digests)
        head = (end + 8 + 63) // 64 * 64
        need(len(data) == head + sum(e[4] * e[5] for e in entries) + blob, "size")
        need(struct.unpack("<Q", data[end:end + 8])[0] == xxh64(data[:end]), "checksum of the head")
        need(not any(data[end + 8:head]), "padding")
        self.head, self.entries, at = head, [], head
        for row, g, form, tokens, layers, image in entries:
            images = [data[at + image * i:at + image * (i + 1)] for i in range(layers)]
            at += layers * image
            for piece in images:
                need(xxh128(piece) == digests.pop(0), "digest of an image")
            self.entries.append((row, g, form, tokens, images))
        self.blob = data[at:]
        need(not self.flags or xxh128(self.blob) == digests.pop(0), "digest of the blob")

    def block_of(self, row, group, form):
        """What a block's value has to be."""
        need(not self.flags and self.n_tokens == 64 * (row + 1), "a block's value")
        need(self.entries[0][:3] == (row, group, form), "another block")

    def point_of(self, n_tokens, groups, keys):
        """What a checkpoint's has to be: of each group its last rows, sealed before open."""
        need(self.flags == 1 and self.n_tokens == n_tokens, "a checkpoint's value")
        need([e[1] for e in self.entries] == sorted(e[1] for e in self.entries), "order of the groups")
        for g in range(len(groups)):
            rows = [e for e in self.entries if e[1] == g]
            first = rows[0][0] if rows else n_tokens // 64
            need([e[0] for e in rows] == list(range(first, (n_tokens + 63) // 64)), "rows of a checkpoint")
            opens = [e[2] in (OPEN, REOPENED) for e in rows]
            need(opens == sorted(opens), "a sealed block after an open one")
            need(REOPENED not in [e[2] for e in rows][opens.count(False) + 1:], "open again after an open block")
            for row, _, form, _, _ in rows:
                need(form in (OPEN, REOPENED) or form == keys.form(row, g), "form of a block")


class Case:
    def __init__(self, folder):
        self.folder = folder
        with open(os.path.join(folder, "case.json")) as file:
            self.case = json.load(file)
        self.keys = Keys(self.case)
        self.groups = [Group(struct.pack(
            "<8IQII", len(g["layers"]), g["n_q_heads"], g["n_kv_heads"], g["k_dim"], g["v_dim"],
            g["k_type"], g["v_type"], g["flags"], g["rotation_seed"], g["window_tokens"],
            g["sink_tokens"])) for g in self.case["groups"]]
        self.layers = {layer: (g, i) for g, group in enumerate(self.case["groups"])
                       for i, layer in enumerate(group["layers"])}
        self.n_numbers = self.n_values = 0
        self.forms = set()
        self.lines = []

    def read(self, name):
        try:
            with open(os.path.join(self.folder, name), "rb") as file:
                return file.read()
        except FileNotFoundError:
            raise Refused("there is no " + name) from None

    def value(self, key, check):
        """Checked and damaged; check(value) does the rest of what a reader must check."""
        data = self.read(key.hex() + ".bin")
        value = Value(data, key, self.groups)
        check(value)
        for at in list(range(value.head)) + list(range(value.head, len(data), 997)) + [len(data) - 1]:
            other = bytearray(data)
            other[at] ^= 1 << at % 8
            self.refuses(bytes(other), key, "a changed byte %d" % at)
        for other in (data[:-1], data + b"\0", data[:value.head], b""):
            self.refuses(other, key, "another length")
        self.refuses(data, bytes(32), "another key")
        self.n_values += 1
        self.forms |= {entry[2] for entry in value.entries}
        self.lines.append("%s %s %s" % (os.path.basename(self.folder), key.hex(),
                                        hashlib.sha256(data).hexdigest()))
        return value

    def refuses(self, data, key, what):
        try:
            Value(data, key, self.groups)
        except Refused:
            return
        raise Refused(what + " is taken")

    def compare(self, entries, numbers, n_tokens):
        """The numbers are of the rows from first on, of all layers; entries: those that are there."""
        at = 0
        for row in sorted({e[0] for e in entries}):
            tokens = min(64, n_tokens - 64 * row)
            for layer in sorted(self.layers):
                g, i = self.layers[layer]
                group = self.groups[g]
                sizes = [4 * tokens * group.heads * dim for dim in (group.k_dim, group.v_dim)]
                for entry in entries:
                    if entry[:2] == (row, g):
                        form, images = entry[2], entry[4]
                        mine = group.values(tokens, form, group.streams(tokens, form, images[i]))
                        for side, x in enumerate(mine):
                            begin = at + sum(sizes[:side])
                            theirs = numbers[begin:begin + sizes[side]]
                            need(np.ascontiguousarray(x, "<f4").tobytes() == theirs,
                                 "other numbers: row %d, layer %d, %s" % (row, layer, "KV"[side]))
                            self.n_numbers += x.size
                at += sum(sizes)
        need(at == len(numbers), "numbers that are left")

    def run(self):
        files = {name for name in os.listdir(self.folder) if name.endswith(".bin")}
        numbers, n_rows = self.read("rows.f32"), self.case["n_tokens"] // 64
        need(n_rows > 0 and len(numbers) % n_rows == 0, "rows")
        names, row_bytes = set(), len(numbers) // n_rows
        for row in range(n_rows):
            entries = []
            for g in range(len(self.groups)):
                key, form = self.keys.block(row, g), self.keys.form(row, g)
                names.add(key.hex() + ".bin")
                value = self.value(key, lambda value: value.block_of(row, g, form))
                entries += value.entries
            self.compare(entries, numbers[row * row_bytes:(row + 1) * row_bytes], 64 * n_rows)
        for point in self.case["checkpoints"]:
            n_tokens = point["n_tokens"]
            key = self.keys.checkpoint(n_tokens)
            names.add(key.hex() + ".bin")
            value = self.value(key, lambda value: value.point_of(n_tokens, self.groups, self.keys))
            need(value.blob == bytes.fromhex(point["blob"]), "blob")
            need(value.next_position == point["next_position"], "next position of a checkpoint")
            numbers = self.read("checkpoint-%d.f32" % n_tokens)
            first = min((e[0] for e in value.entries), default=None)
            if first is not None:
                self.compare(value.entries, numbers[first * row_bytes:], n_tokens)
        need(names == files, "values under other keys: %s" % sorted(files ^ names))


class Example:
    """The first row's key and its value's head, byte for byte."""

    def __init__(self, folder):
        self.case, self.lines, self.hashed, self.at = Case(folder), [], b"", None
        keys, group = self.case.keys, self.case.case["groups"][0]
        names = [bytes.fromhex(self.case.case[name])
                 for name in ("name_space", "salt", "fingerprint", "tag")]
        self.begin("H(0): SHA-256 of", b"kvt:seed")
        self.word("I", VERSION, "version")
        for name, data in zip(("namespace", "salt", "fingerprint", "tag"), names):
            self.word("Q", len(data), "size of the " + name)
            self.put(data, "%s: %r" % (name, data.decode()))
        self.end(keys.rows[0])
        self.begin("G: SHA-256 of", b"kvt:geom")
        self.word("I", 0, "number of the group")
        self.word("I", len(group["layers"]), "n_layers")
        for name in ("n_q_heads", "n_kv_heads", "k_dim", "v_dim", "k_type", "v_type", "flags"):
            self.word("I", group[name], name)
        self.word("Q", group["rotation_seed"], "rotation_seed")
        for name in ("window_tokens", "sink_tokens"):
            self.word("I", group[name], name)
        for layer in group["layers"]:
            self.word("I", layer, "layer number")
        self.end(keys.geometry[0])
        self.begin("H(1): SHA-256 of", b"kvt:rows")
        self.put(keys.rows[0], "H(0)")
        self.word("Q", 0, "size of the extra bytes")
        for name, ints in (("id", keys.ids), ("position", keys.positions)):
            for t in range(3):
                self.word("i", ints[t], "%s of token %d" % (name, t))
            data = struct.pack("<60i", *ints[3:63])
            self.lines.append("%-31s%ss of tokens 3 to 62" % ("..", name))
            self.hashed += data
            self.word("i", ints[63], "%s of token 63" % name)
        self.end(keys.rows[1])
        self.begin("key: SHA-256 of", b"kvt:bloc")
        self.put(keys.rows[1], "H(1)")
        self.put(keys.geometry[0], "G")
        self.word("I", keys.form(0, 0), "representation")
        key = keys.block(0, 0)
        self.end(key)
        self.head(key)

    def put(self, data, text):
        for i in range(0, len(data), 8):
            where = "" if self.at is None else "%04x  " % (self.at + i)
            self.lines.append(("%-31s%s" % (where + data[i:i + 8].hex(" "), text if i == 0 else "")).rstrip())
        self.hashed += data
        if self.at is not None:
            self.at += len(data)

    def word(self, form, x, text):
        self.put(struct.pack("<" + form, x), "%s: %d" % (text, x))

    def begin(self, text, label):
        self.lines += [""] * bool(self.lines) + ["-- " + text]
        self.hashed = b""
        self.put(label, repr(label.decode()))

    def end(self, digest):
        need(hashlib.sha256(self.hashed).digest() == digest, "the example's hash")
        self.lines.append("is")
        self.put(digest, "")

    def head(self, key):
        data, at = self.case.read(key.hex() + ".bin"), 0
        self.lines += ["", "-- the value's head"]
        self.at, self.hashed = 0, b""
        self.put(data[:8], "magic")
        for form, text in (("I", "version"), ("I", "flags: of a block"), ("", "key"), ("Q", "size of the value"),
                           ("Q", "n_tokens"), ("Q", "blob size"), ("i", "next position"),
                           ("I", "entries"), ("Q", "row of entry 0"), ("I", "group"),
                           ("I", "representation"), ("I", "tokens"), ("I", "n_layers"),
                           ("Q", "size of an image")):
            if form:
                self.word(form, *struct.unpack_from("<" + form, data, self.at), text)
            else:
                self.put(key, text)
        self.put(data[self.at:self.at + 16], "digest of the image: XXH3-128")
        self.put(data[self.at:self.at + 8], "XXH64 of all before it")
        zeros = -self.at % 64
        self.put(data[self.at:self.at + zeros], "zeros: the images begin at a multiple of 64")
        need(self.hashed == data[:self.at], "the example's head")
        self.lines.append("%04x  .. up to %04x             the image" % (self.at, len(data)))

    def compare(self, page, update):
        text = "\n".join(self.lines) + "\n"
        with open(page, encoding="utf-8") as file:
            old = file.read()
        need(old.count(MARK) == 1, "%s has no place for the example" % page)
        begin = old.index(MARK) + len(MARK)
        end = old.index("```\n", begin)
        if update:
            with open(page, "w", encoding="utf-8") as file:
                file.write(old[:begin] + text + old[end:])
        else:
            need(old[begin:end] == text, "%s has another example; --update puts it there" % page)


def main(arguments):
    if len(arguments) != 5 or arguments[0] not in ("--golden", "--update"):
        sys.exit(__doc__)
    mode, path, page, program, folder = arguments
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    subprocess.run([program, folder], check=True)
    lines, forms = [], set()
    try:
        for name in sorted(os.listdir(folder)):
            case = Case(os.path.join(folder, name))
            case.run()
            print("%s: %d values, %d numbers" % (name, case.n_values, case.n_numbers))
            lines += case.lines
            forms |= case.forms
        need(forms == {SEALED, OPEN, FINE, REOPENED}, "not all representations are there")
        name = "example"
        Example(os.path.join(folder, name)).compare(page, mode == "--update")
    except Refused as refused:
        sys.exit("%s: %s" % (name, refused))
    text = "".join(line + "\n" for line in lines)
    if mode == "--update":
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
        return
    with open(path, encoding="ascii") as file:
        golden = file.read()
    if golden != text:
        before = set(golden.splitlines())
        sys.exit("values are other ones than %s has, first:\n%s" % (
            path, next((line for line in lines if line not in before), "(some are missing)")))


if __name__ == "__main__":
    main(sys.argv[1:])
