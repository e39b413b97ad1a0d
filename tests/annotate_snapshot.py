#!/usr/bin/env python3
"""Print a snapshot of native blocks byte by byte, with what each field is: the example of
docs/format.md.

annotate_snapshot.py SNAPSHOT                 print it
annotate_snapshot.py --check PAGE SNAPSHOT    and compare with the block that the page has of it
annotate_snapshot.py --update PAGE SNAPSHOT   and put it there

Runs of zeros are left out. Exit code 77: see read_snapshot.py.
"""
import struct
import sys

from read_snapshot import Reader, parents_of

MARK = "<!-- the example: tests/annotate_snapshot.py -->\n<!-- test: output -->\n```\n"
TYPES = {1: "token ids", 2: "positions", 3: "block table", 4: "block", 6: "index", 7: "end",
         13: "native", 14: "digests"}


class Page:
    def __init__(self, reader, data):
        self.reader, self.data, self.at, self.lines = reader, data, 0, []

    def line(self, text=""):
        self.lines.append(text.rstrip())

    def put(self, n, text):
        """The next n bytes, 8 to a line; the text is of them all, or a list: of each line."""
        texts = text if isinstance(text, list) else [text]
        for i in range(0, n, 8):
            here = self.data[self.at:self.at + min(8, n - i)]
            what = texts[i // 8] if i // 8 < len(texts) else ""
            self.line("%04x  %-23s  %s" % (self.at, " ".join("%02x" % x for x in here), what))
            self.at += len(here)

    def word(self, form, text):
        """A number, whose value is put behind the text."""
        x, = struct.unpack_from("<" + form, self.data, self.at)
        self.put(struct.calcsize("<" + form), text % x if "%" in text else "%s: %d" % (text, x))
        return x

    def rest(self, end, what):
        """Rows of 8 bytes up to an offset: those of zeros are one line; what(offset) is a row's."""
        while self.at < end:
            zeros = self.at
            while zeros < end and not any(self.data[zeros:min(zeros + 8, end)]):
                zeros = min(zeros + 8, end)
            if zeros - self.at > 8:
                self.line("%04x  %-23s" % (self.at, "00 .. up to %04x" % zeros))
                self.at = zeros
            else:
                self.put(min(8, end - self.at), what(self.at))

    def header(self):
        self.line("-- header")
        self.put(8, "magic")
        self.word("I", "version")
        self.word("I", "header size")
        self.word("I", "tokens of a block")
        self.word("I", "tokens of a tile")
        self.word("Q", "n_tokens")
        groups = self.word("I", "n_groups")
        layers = self.word("I", "n_layers")
        fingerprint = self.word("I", "fingerprint size")
        self.word("I", "flags")
        self.word("Q", "n_blocks")
        self.word("Q", "largest native size of a layer's streams")
        for _ in range(groups):
            for name in ("n_layers", "n_q_heads", "n_kv_heads", "k_dim", "v_dim", "k_type",
                         "v_type", "flags"):
                self.word("I", "group's " + name)
            self.word("Q", "rotation_seed")
            self.word("I", "window_tokens")
            self.word("I", "sink_tokens")
        for _ in range(layers):
            self.word("I", "layer number")
        self.put(-self.at % 8, "zeros")
        self.put(fingerprint, "fingerprint: %r" % self.reader.fingerprint.decode())
        self.put(-self.at % 8, "zeros")
        self.put(8, "XXH64")

    def section(self):
        kind = struct.unpack_from("<I", self.data, self.at)[0]
        self.line()
        self.line("-- %s" % TYPES[kind])
        self.word("I", "type")
        self.word("I", "flags: %d, required")
        size = self.word("Q", "size of the payload")
        value = self.word("Q", "value")
        self.put(8, "XXH64 of the head")
        return kind, self.at + size, value

    def ints(self, name):
        self.word("I", "streams")
        self.word("I", "reserved")
        self.word("H", "kind")
        self.word("B", "filter")
        self.word("B", "codec")
        size = self.word("I", "stored size")
        self.word("I", "native size")
        self.word("I", "reserved")
        self.put(8, "XXH64 of the stored bytes")
        self.put(8, "XXH64 of all before it")
        for i in range(size // 4):
            self.word("i", "%s of token %d" % (name, i) + ": %d")
        self.put(-self.at % 8, "zeros")

    def entries(self, n):
        for b in range(n):
            self.put(16, "no id: the block is in this file")
            self.word("I", "group of entry %d" % b)
            self.word("I", "row")
            self.word("I", "tokens")
            self.word("H", "representation")
            self.word("H", "place")
        self.put(8, "XXH64")

    def images(self, value, end):
        """Of one layer of one head, sealed, K and V of i8 and K with an offset."""
        group, n, form, streams = self.reader.layers[0]
        self.put(value, ["zeros: the images begin at a multiple of 64"])
        size, pieces = group.layout(n, form)
        begin, names = self.at, ["K codes", "K scales", "K offsets", "V scales", "V codes"]
        for (_, _, _, _, at, (rows, row)), name in zip(sorted(pieces, key=lambda p: p[4]), names):
            self.line("      %-23s  %s: at %d of the image" % ("", name, at))

            def what(offset, at=at, name=name):
                i = offset - begin - at
                if name == "K codes":
                    return "tokens %d, %d, dims %d to %d" % (
                        i % 64 // 4, i % 64 // 4 + 1, i // 64 % (row // 64) * 4,
                        i // 64 % (row // 64) * 4 + 3)
                if name == "V codes":
                    return "dims %d, %d, tokens 0 to 3" % (i // 4 % (row // 4), i // 4 % (row // 4) + 1)
                x = struct.unpack_from("<4e", self.data, offset)
                return ", ".join("%g" % y for y in x)
            ends = sorted(begin + p[4] for p in pieces if begin + p[4] > begin + at)
            self.rest(ends[0] if ends else begin + size, what)

    def run(self):
        self.header()
        n_layers = self.reader.groups[0].n_layers
        while self.at < len(self.data):
            kind, end, value = self.section()
            if kind in (1, 2):
                self.ints({1: "id", 2: "position"}[kind])
            elif kind == 3:
                self.entries(self.reader.n_blocks)
            elif kind == 4:
                for name in ("group", "row", "tokens", "representation", "n_layers",
                             "layout: %d, a native section"):
                    self.word("I", name)
                self.word("Q", "reserved")
                self.put(8, "XXH64")
            elif kind == 13:
                self.images(value, end)
            elif kind == 14:
                self.put(16, "id of the block")
                for i in range(n_layers):
                    self.put(16, "digest of layer %d: XXH3-128 of its image" % i)
                self.put(8, "XXH64")
            elif kind == 6:
                while self.at < end - 8:
                    section = self.word("I", "type")
                    self.word("I", "reserved")
                    self.word("Q", "value")
                    self.word("Q", "offset: %#x")
                    self.word("Q", "size")
                    self.put(16, "digest: " + (
                        "the block's id" if section == 4 else "of the native stream" if section < 3
                        else "of the entries"))
                self.put(8, "XXH64")
            else:
                self.word("Q", "offset of the index: %#x")
                self.word("Q", "size of the snapshot")
                self.put(16, "snapshot id")
                self.put(8, "XXH64 of the 32 bytes before it")
                self.put(8, "footer")
            if self.at != end:
                sys.exit("a section of type %d is not what this program prints" % kind)
        return "\n".join(self.lines) + "\n"


def main(arguments):
    mode = arguments[0] if arguments[0].startswith("--") else None
    with open(arguments[-1], "rb") as file:
        data = file.read()
    text = Page(Reader(data, parents_of(arguments[-1])), data).run()
    if not mode:
        print(text, end="")
        return
    with open(arguments[1], encoding="utf-8") as file:
        page = file.read()
    if page.count(MARK) != 1:
        sys.exit("%s has no place for the example" % arguments[1])
    begin = page.index(MARK) + len(MARK)
    end = page.index("```\n", begin)
    if mode == "--update":
        with open(arguments[1], "w", encoding="utf-8") as file:
            file.write(page[:begin] + text + page[end:])
    elif page[begin:end] != text:
        sys.exit("%s: the example is not what %s holds; --update puts it there" % (
            arguments[1], arguments[-1]))


if __name__ == "__main__":
    main(sys.argv[1:])
