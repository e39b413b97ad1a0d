#!/usr/bin/env bash
# The share of a decoding step's instructions that the library spends outside of its kernels.
#
#   bench/step_overhead.sh [BUILD] [FLAGS of kvt-bench step]
#
# Runs `kvt-bench step --count` under callgrind, which collects inside bench_step_once only. Kernels are
# the functions of the objects made from simd/, and all of SLEEF. The bench's own functions are left
# out of the sum. Everything else counts as overhead: src/, the C library's memcpy and memset,
# locks. A function name that occurs both in simd/ and in src/ is counted as overhead and reported.
# valgrind has no AVX-512. Defaults: --isa avx2, --mode near,f32, --ctx 4090 and --steps 8, so that
# one step begins a block. BUILD (default build/overhead) is configured if it does not exist. Takes
# minutes. Needs valgrind.
set -euo pipefail
cd "$(dirname "$0")/.."
build=build/overhead
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then build=$1 && shift; fi
if [ ! -f "$build/CMakeCache.txt" ]; then
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DKVTILE_TESTS=OFF >/dev/null
fi
cmake --build "$build" --target kvt-bench >/dev/null
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

functions() { # of the objects under a folder
  find "$build" -path "*/$1/*.o" -exec nm --defined-only {} + | awk 'NF == 3 && $2 ~ /[tTW]/ {print $3}' | sort -u
}
functions 'kvtile_*.dir/simd' >"$work/simd"
functions 'kvtile_core.dir' >"$work/src"
functions 'kvt-bench.dir' >"$work/bench"

run_mode() { # the mode, and the flags
  valgrind --tool=callgrind --callgrind-out-file="$work/out" '--toggle-collect=bench_step_once*' \
    "$build/bench/kvt-bench" step --count --json --quick "$@" \
    >"$work/json" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
  sed 's/.*"isa": "\([^"]*\)".*"mode": "\([^"]*\)".*"layers": \([0-9]*\).*"steps": \([0-9]*\).*"allocations": \([0-9]*\), "allocations_block": \([0-9.a-z]*\).*/\1 \2: \3 layers, \4 steps; allocations outside of block boundaries \5, at one \6/' "$work/json"
  callgrind_annotate --threshold=100 --show-percs=no "$work/out" | awk -v work="$work" '
    BEGIN {
      while ((getline name < (work "/simd")) > 0) simd[name] = 1
      while ((getline name < (work "/src")) > 0) src[name] = 1
      while ((getline name < (work "/bench")) > 0) bench[name] = 1
    }
    /^ *[0-9,]+ +[^ ]*:[^ ]/ {
      count = $1; gsub(",", "", count)
      name = $2; sub(/^[^:]*:/, "", name); sub(/\047[0-9]+$/, "", name)
      object = $0; sub(/.*\[/, "", object); sub(/\].*/, "", object); sub(/.*\//, "", object)
      if (name in simd && name in src) both[name] = 1
      if (name ~ /^Sleef_/ || object ~ /^libsleef/ || (name in simd && !(name in src))) {
        kernels += count; kernel[name] += count
      } else if (name in bench && !(name in src)) {
        own += count
      } else {
        rest += count; other[name " [" object "]"] += count
      }
    }
    END {
      all = kernels + rest
      if (all == 0) { print "callgrind collected nothing"; exit 1 }
      printf "instructions %.0f, kernels %.2f%%, overhead %.2f%% (the bench itself: %.2f%%, left out)\n", \
        all, 100 * kernels / all, 100 * rest / all, 100 * own / (all + own)
      for (name in both) print "in simd/ and in src/, counted as overhead: " name
      sort = "sort -rn | head -12"
      print "kernels:"
      for (name in kernel) printf "%8.3f%%  %s\n", 100 * kernel[name] / all, name | sort
      close(sort)
      sort = "sort -rn | head -24"
      print "overhead:"
      for (name in other) printf "%8.3f%%  %s\n", 100 * other[name] / all, name | sort
      close(sort)
    }'
}

# One mode a run: --mode takes a list. Of the rest, what was not given.
modes=near,f32
flags=()
while [ $# -gt 0 ]; do
  case $1 in
  --mode) modes=$2 && shift 2 ;;
  --mode=*) modes=${1#--mode=} && shift ;;
  *) flags+=("$1") && shift ;;
  esac
done
for default in "--isa avx2" "--ctx 4090" "--steps 8"; do
  [[ " ${flags[*]-} " == *" ${default% *}"[\ =]* ]] || flags+=($default)
done
for mode in ${modes//,/ }; do
  run_mode --mode "$mode" "${flags[@]}"
done
