#!/bin/sh
# The tinylm program as a user runs it. usage: test_tinylm.sh PART PROGRAM
set -u
part=$1
tinylm=$2
here=$(dirname "$0")
dir=$(mktemp -d "${TMPDIR:-/tmp}/tinylm-test-XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM

fail() {
    echo "$part: $*" >&2
    exit 1
}

# The command must exit with 1, print nothing and explain itself in one line.
refused() {
    "$tinylm" "$@" >"$dir/out" 2>"$dir/err" </dev/null
    code=$?
    [ $code -eq 1 ] || fail "exit code $code, not 1: $*"
    [ ! -s "$dir/out" ] || fail "output besides the refusal: $*"
    [ "$(wc -l <"$dir/err")" -eq 1 ] || fail "not one line: $* gave $(cat "$dir/err")"
}

case $part in
arguments)
    refused
    refused sing
    refused generate --colour red
    refused generate -n
    refused generate -n many
    refused generate -n -1
    refused generate -n 1.5
    refused generate -n 1e99
    refused generate -n nan
    refused generate -n ''
    refused generate --temperature -1
    refused generate --top-p 0
    refused generate --top-p 2
    refused generate --k i5
    refused generate --v ''
    refused generate --threads 0
    refused generate --threads 9999
    refused generate --save x
    refused eval --tokens 100000
    refused eval --chunk 0
    refused stories --tokens 3
    refused demo --k i8
    "$tinylm" --help | grep -q generate || fail "no help"
    "$tinylm" eval --help | grep -q -- --chunk || fail "no help for eval"
    ;;
bad_files)
    refused generate --model "$dir/none"
    refused generate --model "$dir"
    refused generate --model "$here/README.md"
    refused generate --tokenizer "$here/tinylm.f16.bin"
    refused generate --tokenizer "$here/README.md"
    : >"$dir/empty"
    refused generate --model "$dir/empty"
    refused generate --tokenizer "$dir/empty"
    refused eval --text "$dir/empty"
    head -c 100000 "$here/tinylm.f16.bin" >"$dir/cut"
    refused generate --model "$dir/cut"
    refused chat --load "$dir/none"
    refused chat --load "$dir/cut" --prompt x
    "$tinylm" chat --prompt "The hat of Anna is red." -n 20 --save "$dir/good" >"$dir/out" ||
        fail "cannot save"
    head -c 1000 "$dir/good" >"$dir/short"
    refused chat --load "$dir/short" --prompt x
    refused chat --load "$dir/good" --k i8 --prompt x
    refused chat --prompt x --ids -n 0 --save "$dir/no/such/folder/x"
    # Another model, same shape: one weight differs.
    cp "$here/tinylm.f16.bin" "$dir/other"
    printf '\001\001' | dd of="$dir/other" bs=1 seek=5000 conv=notrunc 2>"$dir/err"
    refused chat --load "$dir/good" --model "$dir/other" --prompt x
    ;;
deterministic)
    for seed in 1 2; do
        "$tinylm" generate --seed $seed -n 60 --ids >"$dir/a$seed" || fail "generate failed"
        "$tinylm" generate --seed $seed -n 60 --ids --threads 2 >"$dir/b$seed" || fail "generate failed"
        cmp "$dir/a$seed" "$dir/b$seed" || fail "not the same with two threads"
        [ "$(wc -l <"$dir/a$seed")" -eq 60 ] || fail "not 60 tokens"
    done
    cmp -s "$dir/a1" "$dir/a2" && fail "the seed has no effect"
    "$tinylm" stories --seed 5 --count 3 --tokens 700 >"$dir/s1"
    "$tinylm" stories --seed 5 --count 3 --tokens 700 >"$dir/s2"
    cmp "$dir/s1" "$dir/s2" || fail "stories differ"
    ;;
continuation)
    # Cut at lengths around a tile and a block; the same tokens must come as without a cut.
    prompt=$("$tinylm" stories --seed 77 --tokens 300)
    for type in f32 f16 i8; do
        for n in 1 20 63 64 65 100; do
            rest=$((130 - n))
            "$tinylm" chat --k $type --v $type --seed 3 --prompt "$prompt" -n 130 --ids \
                >"$dir/whole" || fail "$type: no whole"
            "$tinylm" chat --k $type --v $type --seed 3 --prompt "$prompt" -n $n --ids \
                --save "$dir/file" >"$dir/parts" || fail "$type: no first part"
            "$tinylm" chat --load "$dir/file" --seed 3 --prompt "" -n $rest --ids --threads 2 \
                >>"$dir/parts" || fail "$type: no second part"
            cmp "$dir/whole" "$dir/parts" || fail "$type: cut at $n: other tokens"
        done
    done
    # The types of K and V are independent.
    "$tinylm" chat --k i8 --v f16 --prompt "$prompt" -n 40 --ids >"$dir/whole"
    "$tinylm" chat --k i8 --v f16 --prompt "$prompt" -n 10 --ids --save "$dir/file" >"$dir/parts"
    "$tinylm" chat --load "$dir/file" --prompt "" -n 30 --ids >>"$dir/parts"
    cmp "$dir/whole" "$dir/parts" || fail "i8/f16: other tokens"
    ;;
chat)
    # Turns from stdin, with a save in between.
    printf 'The hat of Anna is red.\nThe dog of Tom is Pip.\n\nQuestion: What colour\n' |
        "$tinylm" chat --k i8 --v i8 -n 15 --ids >"$dir/whole" || fail "no conversation"
    printf 'The hat of Anna is red.\nThe dog of Tom is Pip.\n' |
        "$tinylm" chat --k i8 --v i8 -n 15 --ids --save "$dir/file" >"$dir/parts" || fail "no save"
    printf '\nQuestion: What colour\n' |
        "$tinylm" chat --load "$dir/file" -n 15 --ids --save "$dir/file" >>"$dir/parts" ||
        fail "no load"
    cmp "$dir/whole" "$dir/parts" || fail "other tokens after a load"
    # Nothing to continue, an empty conversation, one that fills the context.
    "$tinylm" chat --load "$dir/file" --save "$dir/file" </dev/null || fail "no idle load and save"
    "$tinylm" chat --save "$dir/none" </dev/null || fail "cannot save an empty conversation"
    "$tinylm" chat --load "$dir/none" --prompt "One day," -n 3 >"$dir/out" || fail "empty conversation"
    "$tinylm" generate --k f16 --v f16 -n 5000 --ids >"$dir/full" 2>"$dir/err" || fail "full context"
    grep -q full "$dir/err" || fail "a full context is not told"
    "$tinylm" stories --tokens 5000 >"$dir/long"
    refused generate --prompt "$(cat "$dir/long")"
    ;;
recall)
    "$tinylm" eval --k i8 --v i8 --stories 4 --threads 2 >"$dir/out" 2>"$dir/err" || fail "eval failed"
    cat "$dir/out"
    # First table: name bytes ratio perplexity change KL same-top recall.
    awk '$1 == "f32/f32" && NF == 8 && $8 + 0 >= RECALL { a = 1 }
         $1 == "i8/i8" && NF == 8 && $8 + 0 >= RECALL && $7 + 0 > 99.5 && $2 > 0 { b = 1 }
         END { exit !(a && b) }' RECALL=95 "$dir/out" || fail "recall or agreement is low"
    "$tinylm" eval --k f32 --v f32 --stories 1 --tokens 300 --chunk 7 >"$dir/out" || fail "eval failed"
    awk '$1 == "f32/f32" && NF == 8 && $6 + 0 == 0 && $7 + 0 == 100 { n++ } END { exit n != 2 }' \
        "$dir/out" || fail "f32 differs from f32"
    "$tinylm" eval --text "$here/stories.c" --tokens 256 >"$dir/out" 2>"$dir/err" || fail "text failed"
    ;;
*)
    fail "no such part"
    ;;
esac
