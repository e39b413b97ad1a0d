#!/usr/bin/env python3
"""
Cycles per byte of K or V of the NEON kernels' inner loops, as llvm-mca predicts them: a bound that
needs neither the processors nor a quiet machine.

    python3 bench/mca.py [FILE ...] [--cc COMPILER] [--flag=FLAG ...] [--mca LLVM-MCA]
                         [--cpu NAME ...] [--rows N ...]

Compiles the files (of simd/arm: neon.c, neon_near.c, neon_4bit.c, dotprod.c, i8mm.c; all by default)
for aarch64, and takes of each function of a block of rows (qk_KIND_ROWS, pv_KIND_ROWS) the innermost
loop with the most multiplications. For each processor, or `-` where it lacks the instructions:

    code    cycles an iteration over the codes (elements) it consumes
    c/B     the same over their bytes (of 5-bit V, those of the nibbles)
    mul     the same for its multiplications and one load for every 16 bytes of codes alone, without
            stalls: the throughput of the ports
    min     the same with the instructions that the storage format requires: the widening of codes to
            the multiplier's type, the isolation of nibbles and the levels they stand for, or the
            transpose for smmla. Not counted: loads of weights, a
            second instruction where one would suffice, pointers, branches
    over    c/B over min
    block   c/B over the ports' throughput for the loop's own mix of instructions
    spills  loads and stores of vectors on the stack in the loop: should be none

llvm-mca uses LLVM's scheduling models. Up to LLVM 14 the Cortex-A76 and the Neoverse N1 have the
Cortex-A57's, with one load a cycle instead of two; LLVM 19 models the N1, whose core is the A76's,
and the Neoverse V1, which has i8mm.

On Debian 12 it needs gcc-aarch64-linux-gnu (or clang: --cc clang), libc6-dev-arm64-cross and llvm-14.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FLAGS = {
    "neon.c": "-march=armv8-a",
    "neon_near.c": "-march=armv8-a",
    "neon_4bit.c": "-march=armv8-a",
    "dotprod.c": "-march=armv8.2-a+dotprod",
    "i8mm.c": "-march=armv8.2-a+dotprod+i8mm",
}
# Products of one instruction, by its name; of those that lengthen, by their number of lanes.
PRODUCTS = {"sdot": 16, "udot": 16, "smmla": 32, "ummla": 32, "fmla": 4}
LENGTHENING = ["smlal", "smlal2", "smull", "smull2"]
# Processors without the instructions, which llvm-mca does not check.
LACKING = {"dotprod.c": ["cortex-a53"], "i8mm.c": ["cortex-a53", "cortex-a76", "neoverse-n1"]}
# Of each kind: bytes of an element, instructions' products for each element and row.
KINDS = {"F32": (4, 1), "F16": (2, 1), "I8": (1, 1), "near": (1, None), "fast": (1, None),
         "i4": (0.5, None), "i5": (0.5, None)}
DIGITS = {("dotprod.c", "near"): 2, ("i8mm.c", "near"): 2}
# What the storage format requires: an instruction for every so many bytes of codes. As f32, four
# codes are isolated and converted by at least two instructions. 16 bytes of nibbles are two registers;
# each takes a mask or a shift, and of V a table. Of 5 bits, the bits of 16 codes are spread by a table
# and a comparison, and merged with the nibbles.
NIBBLES = [("and\tv0.16b, v1.16b, v2.16b", 16), ("ushr\tv0.16b, v1.16b, #4", 16)]
LEVELS = [("tbl\tv0.16b, {v1.16b}, v2.16b", 8)]
FIFTHS = [("cmtst\tv0.16b, v1.16b, v2.16b", 8), ("sri\tv0.16b, v1.16b, #4", 8)]
ZIPS = [("zip1\tv0.4s, v1.4s, v2.4s", 16)]
FORCED = {
    "qk_i4": NIBBLES,
    "pv_i4": NIBBLES + LEVELS,
    "pv_i5": LEVELS + FIFTHS,
    ("neon_near.c", "near"): [("sshll\tv0.8h, v1.8b, #0", 8)],
    ("neon.c", "F16"): [("fcvtl\tv0.4s, v1.4h", 8)],
    ("neon.c", "I8"): [("shl\tv0.4s, v1.4s, #24", 4), ("scvtf\tv0.4s, v1.4s, #24", 4)],
    ("i8mm.c", "near"): [("trn1\tv0.4s, v1.4s, v2.4s", 16)],
}
# The ports of vector instructions by the names of LLVM's models. An instruction is bound to one of
# them or to none, so their pressures are added up.
VECTOR_PORTS = r"A57Unit[WX]|[NV]\d+UnitV\d+"


def run(command, **options):
    try:
        done = subprocess.run(command, capture_output=True, text=True, **options)
    except OSError as error:
        sys.exit("%s: %s" % (command[0], error.strerror))
    if done.returncode:
        sys.exit("%s: %s" % (command[0], done.stderr[:500]))
    return done.stdout


def functions(assembly):
    """Name and lines of each function of the compiler's output."""
    name, body = None, []
    for line in assembly.splitlines():
        label = re.match(r"([A-Za-z_]\w*):", line)
        if label:
            name, body = label.group(1), []
        elif re.match(r"\s*\.size\s", line) and name:
            yield name, body
            name = None
        elif name:
            body.append(line)


def is_instruction(line):
    return bool(re.match(r"\s+[a-z]", line)) and not line.strip().startswith(".")


def innermost_loops(body):
    """From a label to a conditional branch back to it, no other such pair within."""
    labels = {}
    loops = []
    for at, line in enumerate(body):
        label = re.match(r"(\.\w+):", line)
        if label:
            labels[label.group(1)] = at
        branch = re.match(r"\s+(?:b\.?[a-z]{2}|cbnz|cbz|tbnz|tbz)\s.*?(\.\w+)\s*(?://.*)?$", line)
        if branch and branch.group(1) in labels:
            loops.append((labels[branch.group(1)], at))
    for start, end in loops:
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops):
            yield [line.split("//")[0] for line in body[start:end + 1] if is_instruction(line)]


def name_of(line):
    return line.split()[0]


def products_of(line):
    if name_of(line) in LENGTHENING:
        return int(re.match(r"\s*\w+\s+v\d+\.(\d)", line).group(1))
    return PRODUCTS.get(name_of(line), 0)


def analyse(mca, cpu, lines):
    """Cycles of an iteration, and what its instructions take of the ports."""
    text = "\n".join(re.sub(r"\.L\w+", "label", line) for line in lines) + "\n"
    text = re.sub(r"prfm(\s.*, -)", r"prfum\1", text)  # as assemblers do
    out = run([mca, "-march=aarch64", "-mattr=+dotprod,+i8mm", "-mcpu=" + cpu, "-iterations=200",
               "-instruction-info=0", "-"], input="label:\n" + text)
    cycles = int(re.search(r"Total Cycles:\s+(\d+)", out).group(1)) / 200
    block = float(re.search(r"Block RThroughput:\s+([\d.]+)", out).group(1))
    names = re.findall(r"^\[[\d.]+\]\s+- (\w+)", out, re.M)
    row = re.search(r"Resource pressure per iteration:\n.*\n(.*)", out).group(1).split()
    vector = [float(x.replace("-", "0")) for name, x in zip(names, row)
              if re.fullmatch(VECTOR_PORTS, name)]
    return cycles, max(block, sum(vector) / max(len(vector), 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cc", default="aarch64-linux-gnu-gcc", help="%(default)s")
    parser.add_argument("--mca", default="llvm-mca-14", help="%(default)s")
    parser.add_argument("--cpu", nargs="+", default=["cortex-a53", "cortex-a76", "neoverse-n1"],
                        help="%(default)s")
    parser.add_argument("--flag", action="append", default=[], help="for the compiler, as --flag=-O2")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 7, 8], help="%(default)s")
    parser.add_argument("files", nargs="*", default=list(FLAGS), metavar="FILE")
    options = parser.parse_args()
    options.files = [os.path.basename(file) for file in options.files]
    unknown = [file for file in options.files if file not in FLAGS]
    if unknown:
        parser.error("not one of %s: %s" % (", ".join(FLAGS), ", ".join(unknown)))
    target = ["--target=aarch64-linux-gnu"] if "clang" in options.cc else []

    print("%-11s %-10s %4s " % ("file", "kernel", "rows") +
          " ".join("%-39s" % cpu for cpu in options.cpu) + " spills")
    print(" " * 28 + " ".join(" code   c/B   mul   min  over block     " for _ in options.cpu))
    for file in options.files:
        with tempfile.TemporaryDirectory() as out:
            run([options.cc, *target, "-std=c11", "-O3", "-DNDEBUG", "-ffp-contract=off",
                 "-fno-math-errno", "-fPIC", "-I" + ROOT, "-fno-asynchronous-unwind-tables", FLAGS[file],
                 *options.flag, "-S",
                 "-o", out + "/a.s", os.path.join(ROOT, "simd", "arm", file)])
            assembly = open(out + "/a.s").read()
        for name, body in functions(assembly):
            parts = re.match(r"((?:qk|pv)_(\w+?))_(\d+)$", name)
            if not parts or parts.group(2) not in KINDS:
                continue
            kind, rows = parts.group(2), int(parts.group(3))
            loops = list(innermost_loops(body))
            if rows not in options.rows or not loops:
                continue
            loop = max(loops, key=lambda lines: sum(map(products_of, lines)))
            products = [line for line in loop if products_of(line)]
            element = KINDS[kind][0]
            digits = DIGITS.get((file, kind), 1)
            # A matrix product of one digit takes rows in pairs.
            pairs = kind in ("i4", "i5") and any("mmla" in line for line in products)
            codes = sum(map(products_of, products)) / digits / (rows + rows % 2 * pairs)
            bytes_ = codes * element
            least = products + ["\tldr\tq0, [x0]"] * int(bytes_ / 16)
            forced = FORCED.get((file, kind), FORCED.get(parts.group(1), [])) + (ZIPS if pairs else [])
            forced = [line for text, each in forced
                      for line in ["\t" + text] * int(bytes_ / each)]
            spills = sum(bool(re.search(r"\sq\d+,.*\[sp", line)) for line in loop)
            cells = []
            for cpu in options.cpu:
                if cpu in LACKING.get(file, []):
                    cells.append("%5s%34s" % ("-", ""))
                    continue
                cycles, block = analyse(options.mca, cpu, loop)
                multiplied = analyse(options.mca, cpu, least)[1]
                minimum = analyse(options.mca, cpu, least + forced)[1]
                cells.append("%5.3f %5.3f %5.3f %5.3f %5.2f %5.2f     " % (
                    cycles / codes, cycles / bytes_, multiplied / bytes_, minimum / bytes_, cycles / minimum,
                    cycles / block))
            print("%-11s %-10s %4d " % (file, parts.group(1), rows) + " ".join(cells) +
                  " %d" % spills)


if __name__ == "__main__":
    sys.exit(main())
