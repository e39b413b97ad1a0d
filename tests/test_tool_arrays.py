#!/usr/bin/env python3
"""What `kvtile dump` and `kvtile diff` say of keys and values, against read_snapshot.py.

test_tool_arrays.py KVTILE WORK_FOLDER SNAPSHOT...

Each array of --npy and --safetensors, in each dtype, is compared with what the second reader has
read of the same file. --npy's files are read with NumPy, safetensors' by a reader here. Then diff's
figures of each two of the snapshots are compared with NumPy's.

Exit code 77: numpy, libxxhash or libzstd is missing.
"""
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys

from read_snapshot import Reader, np, parents_of  # exits with 77 where something is missing

KVTILE, WORK = sys.argv[1], sys.argv[2]


def run(*arguments, code=0):
    done = subprocess.run([KVTILE, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode != code:
        sys.exit("kvtile %s: exit code %d, not %d: %s" % (
            " ".join(arguments), done.returncode, code, done.stderr.decode()))
    return done.stdout


def expect(condition, what):
    if not condition:
        sys.exit(what)


DTYPES = {"I32": "<i4", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def read_safetensors(path):
    """As https://huggingface.co/docs/safetensors describes it: names -> arrays, metadata."""
    with open(path, "rb") as file:
        data = file.read()
    size = struct.unpack("<Q", data[:8])[0]
    expect(size % 8 == 0 and 8 + size <= len(data) and data[8:9] == b"{", "safetensors: header")
    header = json.loads(data[8:8 + size].decode())
    metadata, arrays, at = header.pop("__metadata__"), {}, 0
    expect(all(isinstance(value, str) for value in metadata.values()), "safetensors: metadata")
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        expect(begin == at, "safetensors: a gap before " + name)
        array = np.frombuffer(data[8 + size + begin:8 + size + end], DTYPES[tensor["dtype"]])
        arrays[name] = array.reshape(tensor["shape"])  # which fails where the sizes differ
        at = end
    expect(8 + size + at == len(data), "safetensors: bytes at the end")
    return arrays, metadata


def read_npy(folder):
    return {name[:-4]: np.load(os.path.join(folder, name)) for name in os.listdir(folder)}


def as_dtype(x, dtype):
    """f32 as f16, saturated, or bf16's bits, ties to even."""
    if dtype == "f16":
        return np.clip(x, -65504, 65504).astype("<f2")
    bits = x.astype("<f4").view("<u4")
    return ((bits + 0x7fff + (bits >> 16 & 1)) >> 16).astype("<u2")


def second_reader(path):
    """Ids, positions, those of the keys, (layer, side) -> [tokens][heads][dims], NaN where released;
    pieces."""
    with open(path, "rb") as file:
        reader = Reader(file.read(), parents_of(path))
    dump, n, rows = reader.dump(), reader.n_tokens, {}
    ints = [np.frombuffer(dump[4 * n * i:4 * n * (i + 1)], "<i4") for i in range(3)]
    at = 12 * n
    of = {layer: g for g, group in enumerate(reader.groups) for layer in group.layers}
    for layer in sorted(of):
        group = reader.groups[of[layer]]
        there = np.repeat([(of[layer], row) in reader.own for row in range((n + 63) // 64)], 64)[:n]
        for side, dim in enumerate((group.k_dim, group.v_dim)):
            x = np.full((n, group.heads, dim), np.nan, "<f4")
            size = 4 * int(there.sum()) * group.heads * dim
            x[there.astype(bool)] = np.frombuffer(dump[at:at + size], "<f4").reshape(
                -1, group.heads, dim)
            at += size
            rows[layer, side] = x
    return ints, rows, reader.pieces


def check_file(path):
    ints, rows, pieces = second_reader(path)
    n, (ids, positions, key_positions) = len(ints[0]), ints
    told = json.loads(run("dump", "--json", path))
    expect(told["n_tokens"] == n and told["files"] == [], path + ": counts")
    for name, want in zip(("token_ids", "positions", "key_positions"), ints):
        expect(told[name] == want.tolist(), "%s: %s" % (path, name))
    info = json.loads(run("info", "--json", path))
    gaps = [None] * len(info["groups"])
    for gap in told["released"]:
        gaps[gap["group"]] = gap["first"], gap["end"]
    for group, gap in zip(info["groups"], gaps):
        ranges = [(0, n)] if not gap else [(0, gap[0]), (gap[1], n)]
        ranges += [(begin + 1, end - 1) for begin, end in ranges if end - begin > 2]
        for (begin, end), dtype in itertools.product(ranges, ("f32", "f16", "bf16")):
            layers = ["--layer=%d" % layer for layer in group["layers"]]
            out = os.path.join(WORK, "arrays")
            shutil.rmtree(out, ignore_errors=True)
            how = ["--tokens=%d:%d" % (begin, end), "--dtype", dtype, *layers,
                   "--safetensors", os.path.join(WORK, "x.safetensors"), "--force"]
            how += ["--npy", out] if dtype != "bf16" else []
            told = json.loads(run("dump", "--json", *how, path))
            tensors, metadata = read_safetensors(os.path.join(WORK, "x.safetensors"))
            expect(metadata["fingerprint"] == info["fingerprint"] and metadata["tag"] == info["tag"]
                   and metadata["first_token"] == str(begin), path + ": metadata")
            want = {"token_ids": ids[begin:end], "positions": positions[begin:end]}
            if (positions[begin:end] != key_positions[begin:end]).any():
                want["key_positions"] = key_positions[begin:end]
            for layer in group["layers"]:
                for side in range(2):
                    x = rows[layer, side][begin:end]
                    expect(not np.isnan(x).any(), path + ": released rows")
                    want["layers.%d.%s" % (layer, "kv"[side])] = (
                        x if dtype == "f32" else as_dtype(x, dtype))
            for arrays in [tensors] + ([read_npy(out)] if dtype != "bf16" else []):
                expect(sorted(arrays) == sorted(want), "%s: arrays %s" % (path, sorted(arrays)))
                for name in want:
                    expect(arrays[name].dtype == want[name].dtype and
                           arrays[name].shape == want[name].shape and
                           arrays[name].tobytes() == want[name].tobytes(),
                           "%s: %s of %s %d:%d" % (path, name, dtype, begin, end))
        if gap:  # a range with a released token is refused, and makes no file
            shutil.rmtree(out, ignore_errors=True)
            run("dump", "--npy", out, "--layer=%d" % group["layers"][0],
                "--tokens=%d:%d" % (gap[1] - 1, gap[1]), path, code=2)
            expect(not os.path.exists(out), path + ": files of a range that was refused")
    return ints, rows, pieces


def check_diff(a, b):
    (path, (ints, rows, pieces)), (other, (other_ints, other_rows, other_pieces)) = a, b
    same = path.replace("-native", "") == other.replace("-native", "")  # stored in another way
    equal = same and pieces == other_pieces
    told = json.loads(run("diff", "--json", path, other, code=int(not equal)))
    n = min(len(ints[0]), len(other_ints[0]))
    expect(told["equal"] == equal, "diff: equal")
    if same:
        expect(all(told["same"][what] == (what != "pieces" or equal) for what in told["same"]),
               "diff %s %s: same" % (path, other))
    names = [*pieces, *(name for name in other_pieces if name not in pieces)]
    expect(told["pieces"] == [
        {"name": name.decode(), "bytes": [len(of[name]) if name in of else None
                                          for of in (pieces, other_pieces)]}
        for name in names if pieces.get(name) != other_pieces.get(name)], "diff: pieces")

    def leading(x, y):
        return int(np.append(x[:n] != y[:n], True).argmax())
    expect(told["n_tokens"] == [len(ints[0]), len(other_ints[0])] and
           told["equal_token_ids"] == leading(ints[0], other_ints[0]) and
           told["equal_positions"] == min(leading(ints[1], other_ints[1]),
                                          leading(ints[2], other_ints[2])), "diff: tokens")
    want = []
    for layer, side in sorted(rows):
        x, y = rows[layer, side][:n], other_rows[layer, side][:n]
        line = {"layer": layer, "side": "kv"[side], "compared": x.shape == y.shape, "tokens": 0,
                "blocks": 0, "released": 0}
        if line["compared"]:
            gone, other_gone = np.isnan(x[:, 0, 0]), np.isnan(y[:, 0, 0])
            line["released"] = int((gone != other_gone).sum())
            delta = np.abs(x.astype("f8") - y.astype("f8")).max(axis=(1, 2)) if n else np.zeros(0)
            at = np.flatnonzero(~gone & ~other_gone & (delta != 0))
            line["tokens"], line["blocks"] = len(at), len(set(at // 64))
            if len(at):
                line["first"] = int(at[0])
                largest = float(delta[at].max())
        if not line["compared"] or line["tokens"] or line["released"]:
            if line["tokens"]:
                line["largest"] = largest
            want.append(line)
    for got, line in itertools.zip_longest(told["layers"], want, fillvalue={}):
        if "largest" in line:
            expect(abs(got.pop("largest", 0) - line["largest"]) <= 1e-8 * line["largest"],
                   "diff %s %s: largest" % (path, other))
            line.pop("largest")
        expect(got == line, "diff %s %s: %s, not %s" % (path, other, got, line))


def main(paths):
    shutil.rmtree(WORK, ignore_errors=True)
    os.makedirs(WORK)
    read = [(path, check_file(path)) for path in paths]
    for a, b in itertools.combinations_with_replacement(read, 2):
        check_diff(a, b)
    shutil.rmtree(WORK)
    print("%d snapshots, and each two of them" % len(paths))


if __name__ == "__main__":
    main(sys.argv[3:])
