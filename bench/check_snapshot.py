"""kvt-bench snapshot: check_snapshot.py PROGRAM FOLDER [MODEL TOKENIZER]

Every figure is a line of JSON with its name once, has the keys that compare and report read, and
says whether it met its bar; --bars alone makes a missed one the exit code.
"""
import json
import math
import subprocess
import sys

SPEED = {"memory_save", "memory_load", "memory_load_fresh", "file_save", "file_load", "file_save_2",
         "file_load_2"}
CRYPT = {"crypt_%s_%d" % (what, n) for what in ("save_memory", "save_file", "load_memory") for n in (1, 2)}
THREADS = {"threads_%s_%s" % (op, codec) for op in ("save", "load") for codec in ("raw", "zstd")}
ZSTD = {"zstd_save", "zstd_load", "zstd_size"}
DELTA = {"delta_size", "delta_size_auto", "delta_changed", "delta_size_residual_none",
         "delta_size_f16", "delta_time_file", "delta_time_memory", "delta_time_file_raw",
         "delta_time_memory_raw"}
MAP = {"map_lazy", "map_verify", "map_second_process"}
MODEL = {"model_auto_%s" % t for t in ("i8", "f16", "i4")}
LEVELS = {"model_level_%d_%s" % (n, t) for n in (1, -1, 3, 6, 9, 12) for t in ("i8", "f16", "i4")}
BARS = {"memory_save": 0.8, "memory_load": 0.8, "zstd_save": 0.9, "zstd_load": 0.9,
        "file_save": 0.9, "file_load": 0.9, "file_save_2": 0.9, "file_load_2": 0.9,
        "delta_size": 1.05, "delta_size_residual_none": 1.05, "delta_size_f16": 1.05,
        "delta_time_file": 0.02, "delta_time_memory": 0.02, "delta_time_file_raw": 0.02,
        "delta_time_memory_raw": 0.02, "map_lazy": 0.05, "map_second_process": 0.01,
        "model_auto_i8": 1.01, "model_auto_f16": 1.01, "model_auto_i4": 1.01,
        "crypt_save_memory_1": 0.5, "crypt_save_memory_2": 0.5, "crypt_save_file_1": 0.5,
        "crypt_save_file_2": 0.5}


def fail(text):
    sys.exit("check_snapshot: " + text)


def run(*arguments):
    return subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def lines_of(command):
    done = run(*command)
    if done.returncode != 0:
        fail("%s: code %d: %s" % (command, done.returncode, done.stderr))
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_line(line):
    name, value, bar = line["name"], line["value"], line["bar"]
    for key in ("part", "unit", "rival", "rival_value", "cpu", "compiler", "commit", "p25", "p75"):
        if key not in line:
            fail("%s: no %s" % (name, key))
    if BARS.get(name) != bar:
        fail("%s: the bar is %s, not %s" % (name, bar, BARS.get(name)))
    if value is None:
        if not (line["note"] or "").startswith("not measured: ") or line["met"] is not None:
            fail("%s: no value and no reason" % name)
    elif not (math.isfinite(value) and value > 0):
        fail("%s: the value is %s" % (name, value))
    elif bar is not None:
        met = value >= bar if line["better"] == "higher" else value <= bar
        if line["met"] != ("yes" if met else "no"):
            fail("%s: %s beside %s is %s" % (name, value, bar, line["met"]))


def main(program, folder, *model):
    given = ["--model", model[0], "--tokenizer", model[1]] if model else []
    base = [program, "snapshot", "--quick", "--json", "--dir", folder]
    parts = {"memory,file": SPEED, "zstd": ZSTD, "crypt": CRYPT, "threads": THREADS,
             "delta": DELTA, "map": MAP}
    lines = lines_of(base + ["--part", "memory,file,zstd,crypt,threads,delta,map,model"] + given)
    for line in lines:
        check_line(line)
    names = [line["name"] for line in lines]
    measured = {line["name"] for line in lines if line["value"] is not None}
    expected = set().union(*parts.values()) | MODEL | (LEVELS if MODEL & measured else set())
    if len(set(names)) != len(names) or set(names) != expected:
        fail("names: missing %s, too many %s" % (expected - set(names), set(names) - expected))
    if model and not MODEL <= measured:
        fail("the model's figures were not measured")
    # A bar that any machine misses or meets: 256 tokens of a short sequence against a full save.
    one = base + ["--part", "delta"]
    missed = any(line["met"] == "no" for line in lines_of(one))
    if not missed:
        fail("no bar is missed where one must be")
    if run(*one, "--bars").returncode != 1:
        fail("--bars: a missed bar is not the exit code")


main(*sys.argv[1:])
