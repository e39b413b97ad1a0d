#!/usr/bin/env python3
"""Decrypt an encrypted file: a second reader, written from docs/format.md, "Encrypted files".

read_encrypted.py KEY FILE             write the plain bytes to standard output; KEY: 64 hex digits
read_encrypted.py --golden FILE        check tests/golden/encrypted.kvx, and that damage is found

Python alone: no libsodium.
"""
import hashlib
import struct
import sys

MAGIC = b"\x89KVX\r\n\x1a\n"
HEAD, MORE = 64, 49


class Refused(Exception):
    pass


def need(condition, what):
    if not condition:
        raise Refused(what)


# ---- XXH64 (seed 0) of fewer than 64 bytes, and more than 31 ----

P1, P2, P3, P4, P5 = (11400714785074694791, 14029467366897019727, 1609587929392839161,
                      9650029242287828579, 2870177450012600261)
M64, M32 = 2**64 - 1, 2**32 - 1


def left64(x, n):
    return (x << n | x >> 64 - n) & M64


def xxh64(data):
    def turn(state, lane):
        return left64(state + lane * P2 & M64, 31) * P1 & M64

    words = struct.unpack(f"<{len(data) // 8}Q", data)
    lanes = [turn(s & M64, w) for s, w in zip((P1 + P2, P2, 0, -P1), words)]
    h = sum(left64(lane, n) for lane, n in zip(lanes, (1, 7, 12, 18))) & M64
    for lane in lanes:
        h = ((h ^ turn(0, lane)) * P1 + P4) & M64
    h = h + len(data) & M64
    for word in words[4:]:
        h = (left64(h ^ turn(0, word), 27) * P1 + P4) & M64
    h = (h ^ h >> 33) * P2 & M64
    h = (h ^ h >> 29) * P3 & M64
    return h ^ h >> 32


# ---- ChaCha20 and Poly1305 (RFC 8439), HChaCha20 ----

def rounds(x):
    def quarter(a, b, c, d):
        for s, t in ((16, 12), (8, 7)):
            x[a] = x[a] + x[b] & M32
            y = x[d] ^ x[a]
            x[d] = (y << s | y >> 32 - s) & M32
            x[c] = x[c] + x[d] & M32
            y = x[b] ^ x[c]
            x[b] = (y << t | y >> 32 - t) & M32

    for _ in range(10):
        for i in range(4):
            quarter(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return x


SIGMA = struct.unpack("<4I", b"expand 32-byte k")


def hchacha20(key, nonce):
    x = rounds([*SIGMA, *struct.unpack("<8I", key), *struct.unpack("<4I", nonce)])
    return struct.pack("<8I", *x[:4], *x[12:])


def chacha20(key, nonce, first, n):
    """n blocks from block `first` on."""
    out = []
    for block in range(first, first + n):
        before = [*SIGMA, *struct.unpack("<8I", key), block, *struct.unpack("<3I", nonce)]
        out += [a + b & M32 for a, b in zip(before, rounds(before[:]))]
    return struct.pack(f"<{len(out)}I", *out)


def poly1305(key, data):
    r = int.from_bytes(key[:16], "little") & 0x0ffffffc0ffffffc0ffffffc0fffffff
    total = 0
    for i in range(0, len(data), 16):
        total = (total + int.from_bytes(data[i:i + 16] + b"\1", "little")) * r % (2**130 - 5)
    return (total + int.from_bytes(key[16:], "little") & 2**128 - 1).to_bytes(16, "little")


def xor(a, b):
    return bytes(x ^ y for x, y in zip(a, b))


# ---- the container ----

def read_head(data, key):
    """The segment size and the file key."""
    need(data[:8] == MAGIC, "magic")
    need(len(data) >= HEAD, "cut in the head")
    version, size = struct.unpack_from("<II", data, 8)
    need(version == 1, "version")
    need(struct.unpack_from("<Q", data, 56)[0] == xxh64(data[:56]), "sum of the head")
    need(data[48:56] == bytes(8), "zeros of the head")
    need(4096 <= size <= 2**24 and size & size - 1 == 0, "segment size")
    derived = hashlib.blake2b(data[:32], key=key, digest_size=48).digest()
    need(derived[32:] == data[32:48], "another key")
    return size, derived[:32]


def read_segment(segment, head, number, size, key):
    """The plain bytes of the segment that `segment` begins with, and whether it is the last."""
    need(len(segment) >= MORE, "cut")
    n, flags = struct.unpack_from("<II", segment)
    need(flags <= 1, "flags")
    last = flags == 1
    need(n == size or last and n < size and (n > 0 or number == 0), "size of a segment")
    need(len(segment) >= n + MORE, "cut")
    header, secret = segment[8:32], segment[33:33 + n]
    k, nonce = hchacha20(key, header[:16]), struct.pack("<I", 1) + header[16:]
    first = chacha20(k, nonce, 0, 2)
    tag = segment[32] ^ first[64]
    data = head + struct.pack("<Q", number) + segment[:8]
    mac = poly1305(first[:32], data + segment[32:33] + first[65:128] + secret + bytes(n % 16)
                   + struct.pack("<QQ", len(data), 64 + n))
    need(mac == segment[33 + n:49 + n], f"segment {number} is not authentic")
    need(tag == (3 if last else 1), "tag")
    return xor(secret, chacha20(k, nonce, 2, (n + 63) // 64)), last


def decrypt(data, key):
    size, file_key = read_head(data, key)
    out, at, number, last = [], HEAD, 0, False
    while not last:
        plain, last = read_segment(data[at:], data[:HEAD], number, size, file_key)
        out.append(plain)
        at += len(plain) + MORE
        number += 1
    need(at == len(data), "bytes after the last segment")
    return b"".join(out)


# ---- tests ----

def check_golden(path):
    key = b"a key of 32 bytes, for tests ..."
    # RFC 8439, 2.3.2 and 2.5.2; draft-irtf-cfrg-xchacha, 2.2.1
    block = chacha20(bytes(range(32)), bytes.fromhex("000000090000004a00000000"), 1, 1)
    assert block.hex().startswith("10f1e7e4d13b5915500fdd1fa32071c4")
    assert poly1305(bytes.fromhex("85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b"),
                    b"Cryptographic Forum Research Group").hex() == "a8061dc1305136c6c22b8baf0c0127a9"
    assert hchacha20(bytes(range(32)), bytes.fromhex("000000090000004a0000000031415927")).hex() == (
        "82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc")

    with open(path, "rb") as file:
        data = file.read()
    plain = bytes((i * 2654435761 & M32) >> 24 for i in range(2 * 4096 + 100))
    assert decrypt(data, key) == plain, "other plain bytes"
    whole = 4096 + MORE
    changed = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1:]
               for i in (*range(0, HEAD + 40, 3), HEAD + whole, HEAD + whole + 4, HEAD + whole + 500,
                         len(data) - 17, len(data) - 1)]
    changed += [data[:n] for n in (0, 8, 63, HEAD, HEAD + whole - 1, HEAD + whole, len(data) - 1)]
    changed += [data + b"\0", data[:HEAD] + data[HEAD + whole:],
                data[:HEAD + whole] + data[HEAD:]]
    for i, other in enumerate(changed):
        try:
            decrypt(other, key)
        except Refused:
            continue
        sys.exit(f"damage {i} is not found")
    try:
        decrypt(data, bytes(32))
        sys.exit("another key is taken")
    except Refused as refused:
        assert str(refused) == "another key"
    print(f"{path}: {len(plain)} bytes, {len(changed)} damages found")


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    if sys.argv[1] == "--golden":
        check_golden(sys.argv[2])
        return
    with open(sys.argv[2], "rb") as file:
        sys.stdout.buffer.write(decrypt(file.read(), bytes.fromhex(sys.argv[1])))


main()
