"""What the binding costs beside the C call.

    KVTILE_LIBRARY=build/test/libkvtile.so.0 PYTHONPATH=src python3 bench_overhead.py

A decode step of one layer is: append one token's K and V, attend with its query. It is done in
turns, by the raw function pointers of the same library with structs made beforehand (the cheapest
call from Python there is), and by the public API with NumPy arrays and PyTorch tensors. Times are
the thread's CPU time (one thread does all), which other programs on the machine disturb the least.
Of each pair of turns the ratio is taken; printed are the median of the ratios and the quartiles
around it. Begin and commit are part of both turns, outside the times at 32k, where one layer is
what counts, and inside them for the small contexts, where the difference in microseconds counts.

--check R: exit with 1 where the median at 32k is above R three times in succession.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import statistics
import sys
import time
from typing import Any, Callable, List, Tuple

try:
    import numpy as np
except ImportError:
    print("skipped: NumPy is not installed")
    sys.exit(77)

import kvtile
from kvtile import _lib
from kvtile._lib import lib

Q_HEADS, KV_HEADS, DIMS = 32, 8, 128


def fill(seq: kvtile.Sequence, n_tokens: int) -> None:
    rng = np.random.default_rng(1)
    while seq.length < n_tokens:
        n = min(1024, n_tokens - seq.length)
        with seq.step(n) as step:
            step.append(0, *rng.standard_normal((2, n, KV_HEADS, DIMS), dtype=np.float32))


class Raw:
    """The C calls with structs made beforehand."""

    def __init__(self, seq: kvtile.Sequence, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        self.out = np.empty((1, Q_HEADS, DIMS), np.float32)
        self.keep = (q, k, v)
        seq_p, cache_p = seq._pointer, seq.cache._pointer
        self.tk, self.tv = (_lib.Tensor(x.ctypes.data, 0, 0, 0) for x in (k, v))
        self.item = _lib.AttendItem(seq=seq_p, n_queries=1)
        self.args = _lib.AttendArgs(
            struct_size=ctypes.sizeof(_lib.AttendArgs), layer=0, flags=1,
            items=ctypes.addressof(self.item), n_items=1, q=_lib.Tensor(q.ctypes.data, 0, 0, 0),
            out=_lib.Tensor(self.out.ctypes.data, 0, 0, 0))
        a, append = ctypes.addressof(self.args), lib.kvt_append
        tk, tv, attend = ctypes.addressof(self.tk), ctypes.addressof(self.tv), lib.kvt_attend

        def step() -> None:
            if append(seq_p, 0, tk, tv) or attend(cache_p, a):
                raise RuntimeError("a call failed")

        def begin() -> None:
            if lib.kvt_seq_begin(seq_p, 1, None):
                raise RuntimeError("begin failed")

        def commit() -> None:
            if lib.kvt_seq_commit(seq_p, None):
                raise RuntimeError("commit failed")

        self.step, self.begin, self.commit = step, begin, commit


class Public:
    """The public API, arrays given as they are; without `out` a new array each time."""

    def __init__(self, seq: kvtile.Sequence, arrays: Tuple[Any, ...], out: Any) -> None:
        q, k, v = arrays
        self.begin: Callable[[], None] = lambda: seq.begin(1)
        self.commit: Callable[[], None] = seq.commit

        def step() -> None:
            seq.append(0, k, v)
            self.result = seq.attend(0, q, out)

        self.step = step


def turn(side: Any, whole: bool) -> float:
    clock = time.thread_time
    if whole:
        start = clock()
        side.begin()
        side.step()
        side.commit()
        return clock() - start
    side.begin()
    start = clock()
    side.step()
    end = clock()
    side.commit()
    return end - start


def compare(raw: Raw, public: Public, seq: kvtile.Sequence, n: int, whole: bool
            ) -> Tuple[List[float], float, float]:
    """Ratios of n pairs, and the medians of both sides in seconds. The length stays the same."""
    length = seq.length
    ratios, a, b = [], [], []
    for i in range(n + 2):
        times = {}
        for side in ((raw, public) if i % 2 else (public, raw)):  # neither is always the first
            times[side] = turn(side, whole)
            seq.truncate(length)
        if i < 2:
            continue  # warms up
        ratios.append(times[public] / times[raw])
        a.append(times[raw])
        b.append(times[public])
    return ratios, statistics.median(a), statistics.median(b)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ctx", type=int, default=32768)
    parser.add_argument("--pairs", type=int, default=60, help="at 32k")
    parser.add_argument("--small", type=int, default=3000, help="pairs for the small contexts")
    parser.add_argument("--check", type=float)
    options = parser.parse_args()
    sides = ["numpy, out=", "numpy"]
    torch: Any = None
    try:
        torch = importlib.import_module("torch")
        sides += ["torch, out=", "torch"]
    except ImportError:
        pass
    group = kvtile.Group(1, Q_HEADS, KV_HEADS, DIMS, k_type="i8", v_type="i8")
    rng = np.random.default_rng(2)
    q = rng.standard_normal((1, Q_HEADS, DIMS), dtype=np.float32)
    k, v = rng.standard_normal((2, 1, KV_HEADS, DIMS), dtype=np.float32)
    worst = 0.0
    print(f"kvtile {kvtile.version()}, {kvtile.isa_names()[-1]}, Python "
          f"{sys.version.split()[0]}, i8, {Q_HEADS}:{KV_HEADS} heads, {DIMS} dims, 1 thread")
    with kvtile.Cache(group, options.ctx + 64) as cache:
        for n_tokens, pairs in ((64, options.small), (1024, options.small // 4),
                                (options.ctx, options.pairs)):
            seq = cache.sequence()
            fill(seq, n_tokens)
            seq.reserve(n_tokens + 1)
            raw = Raw(seq, q, k, v)
            for name in sides:
                arrays: Tuple[Any, ...] = (q, k, v)
                out: Any = np.empty_like(raw.out) if "out=" in name else None
                if name.startswith("torch"):
                    arrays = tuple(torch.from_numpy(x) for x in arrays)
                    out = None if out is None else torch.from_numpy(out)
                public = Public(seq, arrays, out)
                large = n_tokens == options.ctx
                for _ in range(3):
                    ratios, a, b = compare(raw, public, seq, pairs, not large)
                    if np.asarray(public.result).tobytes() != raw.out.tobytes():
                        print("the results differ", file=sys.stderr)
                        return 1
                    low, mid, high = statistics.quantiles(ratios, n=4)
                    print(f"{n_tokens:6} tokens  {name:12}  C {a * 1e6:8.1f} us  Python "
                          f"{b * 1e6:8.1f} us  +{(b - a) * 1e6:6.1f} us  ratio {mid:.4f} "
                          f"({low:.4f} to {high:.4f})", flush=True)
                    if not (large and options.check and mid > options.check):
                        break
                if large:
                    worst = max(worst, mid)
            seq.close()
    if options.check and worst > options.check:
        print(f"{worst:.4f} is above {options.check}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
