#!/bin/sh
# The command line: test_tool.sh KVTILE GOLDEN_FOLDER WORK_FOLDER
tool=$1 golden=$2 work=$3
rm -rf "$work" && mkdir -p "$work" || exit 1
failures=0

# run CODE ARGUMENTS...: the tool has to exit with CODE. Output is in $work/out and $work/err.
run() {
    want=$1
    shift
    "$tool" "$@" >"$work/out" 2>"$work/err"
    got=$?
    if [ $got -ne "$want" ]; then
        echo "kvtile $*: exit code $got, not $want"
        cat "$work/out" "$work/err"
        failures=$((failures + 1))
    fi
}
# says FILE PATTERN: a line of $work/FILE matches.
says() {
    if ! grep -q -- "$2" "$work/$1"; then
        echo "no \"$2\" in:"
        cat "$work/$1"
        failures=$((failures + 1))
    fi
}
silent() {
    if [ -s "$work/$1" ]; then
        echo "unexpected output:"
        cat "$work/$1"
        failures=$((failures + 1))
    fi
}

run 0 --help
says out 'kvtile info'
says out 'Exit code'
run 0 --version
says out '^kvtile [0-9]*\.[0-9]*\.[0-9]*$'
run 2
run 2 frobnicate "$golden/i8.kvt"
says err frobnicate
run 2 info
run 2 info --loud "$golden/i8.kvt"
run 2 verify --quick "$golden/i8.kvt"

run 0 info "$golden/i8.kvt"
says out 'tokens  *300 in 5 blocks, 2 of them open$'
says out 'fingerprint  *676f6c64656e'
says out ' 0  *3  *4  *2  *24  *16  *i8  *i8  *rotated, with offset  *rotated  *none$'
says out 'bits per element'
silent err
run 0 info --quick "$golden/groups.kvt"
says out ' 1  *1  *4  *2  *8  *16  *f32  *i8  *as it is  *rotated  *none$'
says out ' 0  *2  *2  *1  *16  *32  *i8  *f16  *with offset  *as it is  *none$'
run 0 info "$golden/i8-plain.kvt" # all flags are set
says out ' *i8  *i8  *as it is  *as it is  *none$'
run 0 info --json "$golden/i8-plain.kvt"
says out '"rotation":false,"offset":false,"v_rotation":false,"v_in_k":false,'
run 0 info --json "$golden/v-in-k.kvt"
says out '"rotation":true,"offset":true,"v_rotation":false,"v_in_k":true,'
run 0 info --json "$golden/groups.kvt"
says out '"v_type":"f16","rotation":false,"offset":true,"v_rotation":false,'
says out '"v_type":"i8","rotation":false,"offset":false,"v_rotation":true,'
run 0 info "$golden/window.kvt"
says out ' 0  *3  *2  *1  *24  *8  *i8  *i8  *rotated, with offset  *rotated  *90 tokens, 70 sinks$'
run 0 info --json "$golden/window.kvt"
says out '"window_tokens":90,"sink_tokens":70}'
run 0 info "$golden/checkpoints.kvt"
says out 'checkpoints  *4$'
says out ' 0  *2  .*  *50 tokens$'
run 0 info --json "$golden/checkpoints.kvt"
says out '"n_checkpoints":4,'
run 0 info --quick "$golden/tag.kvt"
says out 'tag  *"lora: 7"$'
says out 'next position  *77$'
run 0 info --json --quick "$golden/tag.kvt"
says out '"tag":"6c6f72613a2037","next_position":77,'
run 0 info "$golden/i4-i5.kvt"
says out 'tokens  *331 in 6 blocks, 2 of them open$'
says out ' 0  *3  *4  *2  *40  *24  *i4  *i5  *with offset  *rotated  *none$'
run 0 info --json "$golden/i4-i5-cut.kvt"
says out '"k_type":"i4","v_type":"i5",'
says out '"v_rotation":false,'
run 0 info "$golden/i8-i4.kvt"
says out ' 0  *3  *4  *2  *40  *24  *i8  *i4  *rotated, with offset  *rotated  *none$'
run 0 info "$golden/empty.kvt"
run 0 verify "$golden"/*.kvt
says out 'i8.kvt: sound, 300 tokens'
run 0 info --json "$golden"/*.kvt
[ "$(wc -l <"$work/out")" -eq "$(ls "$golden"/*.kvt | wc -l)" ] || { echo "not a line a file"; failures=$((failures + 1)); }
says out '"n_tokens":300,'
says out '"k_type":"f16"'
says out '"v_in_k":true'
run 0 info "$golden/v-in-k.kvt"
says out ' 0  *3  *4  *2  *48  *32  *i8  *in K  *rotated, with offset  *K.s  *none$'

# Damage, and the largest code of several files.
head -c 1000 "$golden/i8.kvt" >"$work/cut.kvt"
{ cat "$golden/i8.kvt"; printf x; } >"$work/longer.kvt"
: >"$work/nothing.kvt"
echo 'once upon a time, in a file that is no snapshot at all' >"$work/text.kvt"
for name in cut longer nothing text; do
    run 1 verify "$work/$name.kvt"
    silent out
    says err "$name.kvt"
    run 1 info --json "$work/$name.kvt"
    says out '"ok":false,"error":"'
done
run 1 verify "$golden/i8.kvt" "$work/cut.kvt" "$golden/empty.kvt"
says out 'empty.kvt: sound'
run 3 verify "$work/cut.kvt" "$work/missing.kvt"
says err 'No such file'
run 3 info "$work"

# Names that need escaping, and a name that looks like an option.
odd="$work/a\"b\\c	d.kvt"
cp "$golden/empty.kvt" "$odd"
run 0 info --json "$odd"
says out '"file":".*a\\"b\\\\c\\u0009d.kvt"'
cp "$golden/empty.kvt" "$work/$(printf 'bad\377name.kvt')"
run 0 info --json "$work/$(printf 'bad\377name.kvt')"
says out 'bad\\ufffdname'
if command -v python3 >/dev/null 2>&1; then
    "$tool" info --json "$golden"/*.kvt "$odd" "$work"/*.kvt 2>/dev/null |
        python3 -c 'import json, sys; [json.loads(line) for line in sys.stdin]' ||
        { echo "not JSON"; failures=$((failures + 1)); }
fi
(cd "$work" && cp "$golden/empty.kvt" ./--json && "$tool" verify -- --json >/dev/null) ||
    { echo "-- does not end the options"; failures=$((failures + 1)); }

# A write error on a full disk is an error of the tool.
if [ -c /dev/full ] && [ -w /dev/full ]; then
    "$tool" info "$golden/i8.kvt" >/dev/full 2>/dev/null
    [ $? -eq 3 ] || { echo "a full disk was not noticed"; failures=$((failures + 1)); }
fi

[ $failures -eq 0 ] && rm -rf "$work"
exit $((failures != 0))
