"""Write a snapshot again from what read_snapshot.py read: in the other layout, as a delta, or with
a change that all checksums, digests and ids agree with. For the tests of read_snapshot.py.

A section is [type, flags, value, body] here. A body lacks the checksum behind it; of stream sets it
is the payload, of native sections the images.
"""
import struct

from snapshot_group import read_streams, up8, xxh64, xxh128

SUMMED = (3, 4, 8, 9, 11, 12, 14)
STREAMS = (1, 2, 5, 10)


def stream_set(streams):
    """Raw; {kind: native bytes}."""
    streams = sorted((kind, data) for kind, data in streams.items() if data)
    table = struct.pack("<II", len(streams), 0)
    for kind, data in streams:
        table += struct.pack("<HBBIIIQ", kind, 0, 0, len(data), len(data), 0, xxh64(data))
    stored = b"".join(data for _, data in streams)
    stored += bytes(up8(len(stored)) - len(stored))
    return table + struct.pack("<Q", xxh64(table)) + stored


def stream_sums(payload):
    """The checksums of a stream set whose bytes were changed."""
    payload, n = bytearray(payload), struct.unpack_from("<I", payload)[0]
    at = 16 + 24 * n
    for i in range(n):
        size = struct.unpack_from("<I", payload, 12 + 24 * i)[0]
        struct.pack_into("<Q", payload, 24 + 24 * i, xxh64(bytes(payload[at:at + size])))
        at += size
    struct.pack_into("<Q", payload, 8 + 24 * n, xxh64(bytes(payload[:8 + 24 * n])))
    return bytes(payload)


def padded(name):
    return name + bytes(up8(len(name)) - len(name))


def parent_body(parent, inherited, depth, name):
    return struct.pack("<16sQII", parent, inherited, depth, len(name)) + padded(name)


def piece_body(name, data):
    return padded(struct.pack("<IIQ", len(name), 0, len(data)) + name) + padded(data)


def digests_body(n, form, images):
    digests = b"".join(xxh128(image) for image in images)
    return xxh128(struct.pack("<II", n, form) + digests) + digests


def sections_of(reader):
    """All but the index and the end."""
    sections = []
    for kind, flags, value, payload in reader.sections:
        if kind in SUMMED:
            payload = payload[:-8]
        sections.append([kind, flags, value, payload[value:] if kind == 13 else payload])
    return sections[:-2]


def head_of(header):
    """The header, its checksum computed again."""
    return header[:-8] + struct.pack("<Q", xxh64(header[:-8]))


def join(header, sections, change=None):
    """A file of all these sections. Ids and digests of blocks are those of the digests sections.
    change(name, x) is what is to be there instead of x: the index' entries ("index"), the end
    without its checksum ("end") and with it ("footer"), a native section's value ("value") and the
    zeros before its images ("padding")."""
    change = change or (lambda name, data: data)
    parts, index, size, unknown = [head_of(header)], [], len(header), {}
    for kind, flags, value, body in sections:
        start = size
        if kind in STREAMS:
            body = stream_sums(body)
        elif kind == 13:
            value = change("value", -(size + 32) % 64)
            body = change("padding", bytes(value)) + body
        else:
            body += struct.pack("<Q", xxh64(body))
        head = struct.pack("<IIQQ", kind, flags, len(body), value)
        parts += [head, struct.pack("<Q", xxh64(head)), body]
        size += 32 + len(body)
        if kind == 14:
            index[-1][3:] = [size - index[-1][2], body[:16]]
        elif kind in (1, 2, 10):
            n = struct.unpack_from("<I", body, 16)[0]
            digest = xxh128(native(body, n))
            index.append([kind, value, start, size - start, digest])
        elif kind != 5 and kind != 13:
            index.append([kind, value, start, size - start, xxh128(body[:-8])])
            unknown[len(index)] = flags if kind < 1 or kind > 14 else 0
    entries = b"".join(struct.pack("<IIQQQ16s", entry[0], unknown.get(i, 0), *entry[1:])
                       for i, entry in enumerate(index, 1))
    entries = change("index", entries)
    named = b"".join(entries[at:at + 4] + entries[at + 8:at + 16] + entries[at + 32:at + 48]
                     for at in range(0, len(entries), 48))
    body = entries + struct.pack("<Q", xxh64(entries))
    head = struct.pack("<IIQQ", 6, 1, len(body), 0)
    parts += [head, struct.pack("<Q", xxh64(head)), body]
    end = size + 32 + len(body)
    head = struct.pack("<IIQQ", 7, 1, 48, 0)
    body = change("end", struct.pack("<QQ", size, end + 80) + xxh128(parts[0] + named))
    body += struct.pack("<Q", xxh64(body)) + b"KVTE\r\n\x1a\n"
    parts += [head, struct.pack("<Q", xxh64(head)), change("footer", body)]
    return b"".join(parts)


def native(payload, size):
    """The one stream of a set of 32-bit integers, as it is before filter and codec."""
    kind = struct.unpack_from("<H", payload, 8)[0]
    return read_streams(payload, {kind: size}, {kind: (4, 0, 0, 0, 0)})[kind]


def relaid(reader, native_blocks, change=lambda streams: streams):
    """Sections with all blocks in one layout: native, or layers of raw streams."""
    sections, layers = [], iter(reader.layers)
    for kind, flags, value, body in sections_of(reader):
        if kind in (5, 13, 14):
            continue
        if kind == 4:
            group = reader.groups[struct.unpack_from("<I", body)[0]]
            sections.append([4, 1, value, body[:20] + struct.pack("<IQ", native_blocks, 0)])
            of = [next(layers) for _ in group.layers]
            images = [group.image(n, form, streams) for _, n, form, streams in of]
            if native_blocks:
                sections.append([13, 1, 0, b"".join(images)])
            else:
                sections += [[5, 1, i, stream_set(layer[3])] for i, layer in enumerate(of)]
            sections.append([14, 1, value, digests_body(of[0][1], of[0][2], images)])
        else:
            sections.append([kind, flags, value, body])
    return sections


def delta(reader, name, inherited, keep):
    """Sections of a delta of the same contents; all blocks but number `keep` are in the parent."""
    sections = [[11, 1, 0, parent_body(reader.id, inherited, reader.depth + 1, name)]]
    rows, block = {1: (1, reader.ids), 2: (2, reader.positions), 10: (7, reader.shifts)}, None
    for kind, flags, value, body in sections_of(reader):
        if kind == 11 or kind in rows:
            continue
        if kind == 3:
            for section in (1, 2, 10)[:2 + reader.moved]:
                stream, numbers = rows[section]
                sections += [[section, 1, first, stream_set({
                    stream: numbers[first:first + 16384].tobytes()})]
                             for first in range(inherited, reader.n_tokens, 16384)]
            body = b"".join(bytes(16) + body[32 * b + 16:32 * b + 30] + bytes(2) if b == keep else
                            reader.names[b] + body[32 * b + 16:32 * b + 30] + b"\1\0"
                            for b in range(reader.n_blocks))
        block = value if kind == 4 else block
        if kind not in (4, 5, 13, 14) or block == keep:
            sections.append([kind, flags, value, body])
    return sections
