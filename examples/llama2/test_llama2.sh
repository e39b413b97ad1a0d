#!/bin/sh
# The program as a user runs it. usage: test_llama2.sh PART LLAMA2 TINYLM
# LLAMA2_THREADS: for the drafts; 1 in a build without a thread pool.
set -u
part=$1
llama2=$2
tinylm=$3
here=$(dirname "$0")
model=$here/../tinylm/tinylm.f16.bin
tokens=$here/../tinylm/tokenizer.bin
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM

fail() {
    echo "$part: $*" >&2
    exit 1
}

# Its text, without what it says about it.
run() {
    "$llama2" "$model" "$tokens" "$@" 2>"$dir/err" || fail "$* exits with $?: $(cat "$dir/err")"
}

# It exits with 1 and explains itself in one line.
refused() {
    "$@" >"$dir/out" 2>"$dir/err" </dev/null
    code=$?
    [ $code -eq 1 ] || fail "exit code $code, not 1: $*"
    [ "$(wc -l <"$dir/err")" -eq 1 ] || fail "not one line: $* gave $(cat "$dir/err")"
    grep -q "^llama2: " "$dir/err" || fail "$* gave $(cat "$dir/err")"
}

story="$("$tinylm" stories --seed 5 --tokens 250)"
prompt="The hat of Anna is red. Ünïcode, \"quotes\" & numbers 42."

all="f32 f16 i8 i4" sealed="i8 i4"
if [ -n "${KVT_TEST_QUICK:-}" ]; then # under sanitizers
    all="f32 i4" sealed="i4"
fi

case $part in
text) # that of another implementation of the same model, over the same cache
    for type in $all; do
        for text in "$prompt" "$story" ""; do
            run -p "$text" -n 120 -k $type >"$dir/ours"
            "$tinylm" generate --prompt "$text" -n 120 --k $type --v $type --temperature 0 \
                >"$dir/theirs" || fail "tinylm exits with $?"
            cmp "$dir/ours" "$dir/theirs" || fail "$type: another text than tinylm's: $(cat "$dir/ours")"
        done
    done
    # What it is, whatever the two have in common.
    run -k f32 -n 16 -p "One morning, Anna and Tom went to the" >"$dir/ours"
    expected="One morning, Anna and Tom went to the school. The day was windy. The trade of Sid is a singer. The"
    [ "$(cat "$dir/ours")" = "$expected" ] || fail "$(cat "$dir/ours")"
    ;;
restore) # the same text, however often it is put away
    for type in $sealed; do
        run -p "$story" -n 200 -k $type >"$dir/whole"
        run -p "$story" -n 70 -k $type -s "$dir/a" >"$dir/first"
        run -l "$dir/a" -n 93 -k $type -s "$dir/b" >"$dir/second"
        run -l "$dir/b" -n 37 -k $type -s "$dir/c" >"$dir/third"
        printf '%s%s%s\n' "$(cat "$dir/first")" "$(cat "$dir/second")" "$(cat "$dir/third")" >"$dir/parts"
        cmp "$dir/whole" "$dir/parts" || fail "$type: restored, the text goes on differently"
        run -p "$story" -n 200 -k $type -s "$dir/d" >/dev/null
        cmp "$dir/c" "$dir/d" || fail "$type: the last snapshot is not that of one run"
        # Another turn goes on with what is there.
        run -l "$dir/a" -k $type -n 5 -p " Question: What is the" >"$dir/turn"
        grep -q "Question" "$dir/turn" || fail "a second turn"
    done
    ;;
draft) # the same text in fewer steps
    for type in $sealed; do
        run -p "$story" -n 200 -k $type >"$dir/plain"
        run -p "$story" -n 200 -k $type -d 8 -t "${LLAMA2_THREADS:-1}" >"$dir/drafted"
        cmp "$dir/plain" "$dir/drafted" || fail "$type: with drafts another text"
        steps=$(sed -n 's/.* in \([0-9]*\) steps.*/\1/p' "$dir/err")
        [ "$steps" -lt 170 ] || fail "$steps steps for 200 tokens"
        run -p "$story" -n 200 -k $type -s "$dir/plain.kvt" >/dev/null
        run -p "$story" -n 200 -k $type -s "$dir/drafted.kvt" -d 8 >/dev/null
        cmp "$dir/plain.kvt" "$dir/drafted.kvt" || fail "$type: drafts have left a trace"
    done
    ;;
refusals)
    refused "$llama2" "$dir/none" "$tokens"
    refused "$llama2" "$dir" "$tokens"
    refused "$llama2" "$here/README.md" "$tokens"
    refused "$llama2" "$model" "$here/README.md"
    refused "$llama2" "$model" "$model"
    head -c 100000 "$model" >"$dir/cut"
    refused "$llama2" "$dir/cut" "$tokens"
    : >"$dir/empty"
    refused "$llama2" "$dir/empty" "$tokens"
    refused "$llama2" "$model" "$dir/empty"
    head -c 5000 "$tokens" >"$dir/cut"
    refused "$llama2" "$model" "$dir/cut"
    refused "$llama2" "$model" "$tokens" -k q8
    refused "$llama2" "$model" "$tokens" -k i5
    refused "$llama2" "$model" "$tokens" -n 1x
    refused "$llama2" "$model" "$tokens" -d 64
    refused "$llama2" "$model" "$tokens" -l "$dir/none"
    refused "$llama2" "$model" "$tokens" -l "$model"
    refused "$llama2" "$model" "$tokens" -p "$(seq 3000)"
    run -p "$prompt" -n 10 -s "$dir/saved" >/dev/null
    refused "$llama2" "$model" "$tokens" -l "$dir/saved" -k f16 # another type
    head -c 3000 "$dir/saved" >"$dir/cut"
    refused "$llama2" "$model" "$tokens" -l "$dir/cut"
    "$tinylm" chat --prompt "$prompt" -n 5 --k i8 --v i8 --save "$dir/tinylm.kvt" >/dev/null || fail tinylm
    refused "$llama2" "$model" "$tokens" -l "$dir/tinylm.kvt" # another fingerprint
    "$llama2" "$model" "$tokens" -n 5 -s "$dir/none/x" >"$dir/out" 2>"$dir/err"
    [ $? -eq 1 ] || fail "a folder that is not there"
    grep -q "^llama2: $dir/none/x: " "$dir/err" || fail "$(cat "$dir/err")"
    if [ -c /dev/full ]; then
        "$llama2" "$model" "$tokens" -n 5 >/dev/full 2>"$dir/err"
        [ $? -eq 1 ] || fail "output that cannot be written"
        grep -q "^llama2: standard output" "$dir/err" || fail "$(cat "$dir/err")"
    fi
    for line in "" "$model" "$model $tokens -x 1" "$model $tokens -p" "$model $tokens p"; do
        "$llama2" $line >/dev/null 2>"$dir/err"
        [ $? -eq 2 ] || fail "not exit code 2: $line"
        grep -q "^usage" "$dir/err" || fail "no usage: $line"
    done
    ;;
*) fail "no such part" ;;
esac
