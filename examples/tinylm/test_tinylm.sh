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
    refused demo --tokens 2049
    refused eval --text "$here/README.md" --stories 2
    refused eval --text "$here/README.md" --seed 2
    for server in redis:// redis://:6380 redis://host: redis://host:abc redis://host:63x redis://host:0 \
        redis://host:65536 redis://host:6379/1 redis://user:pw@host redis://user@host; do
        refused serve-demo --store $server
    done
    refused generate --shift
    refused generate --parallel 2
    refused generate --ctx 1
    refused generate --ctx 2049
    refused generate --window 0
    refused generate --sinks 4
    refused generate --draft 0
    refused generate --draft 64
    refused chat --parallel 1 --prompt x
    refused chat --parallel 17 --prompt x
    refused chat --parallel 2
    refused chat --parallel 2 --prompt x --save "$dir/x"
    refused chat --parallel 2 --prompt x --shift
    refused chat --parallel 2 --prompt x --draft 2
    refused chat --shift --ctx 191 --prompt x
    refused chat --shift --ctx 512 --window 257 --prompt x
    refused chat --shift --window 64 --sinks 65 --prompt x
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
    # A snapshot whose sinks are more than what --shift keeps.
    "$tinylm" chat --window 64 --sinks 100 --prompt "The hat of Anna is red." -n 5 --save "$dir/sinks" \
        >"$dir/out" 2>"$dir/err" || fail "cannot save with sinks"
    refused chat --load "$dir/sinks" --shift --prompt x
    # A context that leaves nothing to predict, or no room for an answer.
    cp "$here/tinylm.f16.bin" "$dir/short"
    printf '\001\000\000\000' | dd of="$dir/short" bs=1 seek=28 conv=notrunc 2>"$dir/err"
    refused eval --text "$here/README.md" --model "$dir/short"
    printf '\300\000\000\000' | dd of="$dir/short" bs=1 seek=28 conv=notrunc 2>"$dir/err"
    refused serve-demo --model "$dir/short"
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
    for type in f32 f16 i8 i4; do
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
    # Cut where a block has just been sealed: also the same snapshot, which has the last logits.
    for type in i8 i4; do
        "$tinylm" chat --k $type --v $type --seed 3 --prompt "$prompt" -n 1000 --ctx 384 --ids \
            --save "$dir/file" >"$dir/parts" 2>"$dir/err" || fail "$type: no first part of 384"
        n=$(wc -l <"$dir/parts")
        [ $n -gt 0 ] || fail "$type: the prompt fills 384 tokens"
        "$tinylm" chat --load "$dir/file" --seed 3 --prompt "" -n 40 --ids --save "$dir/second" \
            >>"$dir/parts" || fail "$type: no second part behind 384"
        "$tinylm" chat --k $type --v $type --seed 3 --prompt "$prompt" -n $((n + 40)) --ids \
            --save "$dir/first" >"$dir/whole" || fail "$type: no whole of 384 and more"
        cmp "$dir/whole" "$dir/parts" || fail "$type: cut at 384: other tokens"
        cmp "$dir/first" "$dir/second" || fail "$type: cut at 384: other bytes"
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
    cp "$dir/parts" "$dir/parts.two"
    printf '\nQuestion: What colour\n' |
        "$tinylm" chat --load "$dir/file" -n 15 --ids --save "$dir/file" >>"$dir/parts" ||
        fail "no load"
    cmp "$dir/whole" "$dir/parts" || fail "other tokens after a load"
    # A turn that does not fit is refused: the others stay, are saved, and the exit code tells.
    { printf 'The hat of Anna is red.\n'; yes 'The dog of Tom is Pip.' | head -2000 | tr '\n' ' '
      printf '\nThe dog of Tom is Pip.\n'; } >"$dir/turns"
    code=0
    "$tinylm" chat --k i8 --v i8 -n 15 --ids --save "$dir/kept" <"$dir/turns" >"$dir/refused" \
        2>"$dir/err" || code=$?
    [ $code = 1 ] && grep -q "the context has room" "$dir/err" && grep -q "turns refused: 1" "$dir/err" ||
        fail "a long turn: exit code $code"
    cmp "$dir/refused" "$dir/parts.two" || fail "a refused turn changes the others"
    "$tinylm" chat --load "$dir/kept" --prompt "x" -n 1 >"$dir/out" || fail "what is kept is not saved"
    # What cannot be read of stdin ends it, and what was read is saved.
    code=0
    printf 'The hat of Anna is red.\nThe dog of Tom is Pip.\nx\0y\n' |
        "$tinylm" chat --k i8 --v i8 -n 15 --ids --save "$dir/kept" >"$dir/out" 2>"$dir/err" || code=$?
    [ $code = 1 ] && grep -q "stdin is no text" "$dir/err" || fail "a byte of 0: exit code $code"
    cmp "$dir/out" "$dir/parts.two" || fail "a byte of 0 changes other turns"
    "$tinylm" chat --load "$dir/kept" --prompt "x" -n 1 >"$dir/out" || fail "turns before a 0 are not saved"
    code=0
    "$tinylm" chat --k i8 --v i8 <"$dir" >"$dir/out" 2>"$dir/err" || code=$?
    [ $code = 1 ] && grep -q "stdin: " "$dir/err" || fail "a folder as stdin: exit code $code"
    # Nothing to continue, an empty conversation, one that fills the context.
    "$tinylm" chat --load "$dir/file" --save "$dir/file" </dev/null || fail "no idle load and save"
    "$tinylm" chat --save "$dir/none" </dev/null || fail "cannot save an empty conversation"
    "$tinylm" chat --load "$dir/none" --prompt "One day," -n 3 >"$dir/out" || fail "empty conversation"
    "$tinylm" generate --k f16 --v f16 -n 5000 --ids >"$dir/full" 2>"$dir/err" || fail "full context"
    grep -q full "$dir/err" || fail "a full context is not told"
    "$tinylm" stories --tokens 5000 >"$dir/long"
    refused generate --prompt "$(cat "$dir/long")"
    ;;
serve_demo)
    refused serve-demo --prefix-tokens 100
    refused serve-demo --prefix-tokens 2000
    refused serve-demo --prompt x
    mkdir "$dir/tmp"
    TMPDIR="$dir/tmp"
    export TMPDIR
    # served STORE ARGUMENTS...: the second process gets blocks of the prompt, and the first none.
    served() {
        "$tinylm" serve-demo "$@" >"$dir/out" 2>"$dir/err" || fail "$* failed: $(cat "$dir/err")"
        grep -q '^.store: .*\(libsodium\|hiredis\)' "$dir/err" && return 77
        grep -q '^first process: [0-9]* tokens, 0 of them .* put [1-9]' "$dir/out" &&
            grep -q '^second process: [0-9]* tokens, [1-9][0-9]* of them ' "$dir/out" &&
            grep -q '^prefill: .* times as fast' "$dir/out" || fail "$*: $(cat "$dir/out" "$dir/err")"
        grep -q ': the same logits, the same text$' "$dir/out" || fail "$*: no comparison"
        grep -q 'the story says' "$dir/out" && fail "$*: a fact was not found: $(cat "$dir/out")"
        return 0
    }
    # not_served ARGUMENTS...: a store that fails costs a message and a recompute.
    not_served() {
        "$tinylm" serve-demo "$@" >"$dir/out" 2>"$dir/err" || fail "$*: failed: $(cat "$dir/err")"
        grep -q '^.store: ' "$dir/err" || fail "$*: no message"
        grep -q 'nothing came from the store' "$dir/out" || fail "$*: $(cat "$dir/out")"
        grep -q ': the same logits, the same text$' "$dir/out" || fail "$*: no comparison"
    }
    served --prefix-tokens 512
    [ $? -eq 77 ] && exit 77
    [ -z "$(ls -A "$dir/tmp")" ] || fail "the temporary directory stays"
    for type in f32 i4; do
        served --k $type --v $type --prefix-tokens 700 --threads 2
    done
    served --store "$dir/store"
    served --store "$dir/store" # another run has its own name space
    : >"$dir/file"
    not_served --prefix-tokens 300 --store "$dir/file"
    not_served --prefix-tokens 300 --store redis://127.0.0.1:1
    grep -q '^.store: get: ' "$dir/err" || fail "no message of the get"
    command -v redis-server >/dev/null 2>&1 || exit 0
    port=$((20000 + $$ % 20000))
    KVTILE_STORE_PASSWORD=secret
    export KVTILE_STORE_PASSWORD
    redis-server --port $port --bind 127.0.0.1 --save '' --appendonly no --dir "$dir" \
        --requirepass secret >"$dir/server" 2>&1 &
    server=$!
    trap 'kill $server 2>/dev/null; wait $server 2>/dev/null; rm -rf "$dir"' EXIT
    for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
        grep -qi 'ready to accept' "$dir/server" && break
        kill -0 $server 2>/dev/null || exit 0 # the port is another's
        sleep 0.1
    done
    served --prefix-tokens 512 --store redis://127.0.0.1:$port
    [ $? -eq 77 ] && exit 0 # a library without hiredis
    KVTILE_STORE_PASSWORD=wrong
    not_served --prefix-tokens 300 --store redis://127.0.0.1:$port
    ;;
parallel)
    prompt=$("$tinylm" stories --seed 78 --tokens 500)
    for type in f32 i8; do
        "$tinylm" chat --k $type --v $type --prompt "$prompt" -n 90 --seed 7 --parallel 4 --ids \
            --threads 2 >"$dir/all" 2>"$dir/bytes" || fail "$type: no texts"
        for seed in 7 8 9 10; do
            "$tinylm" chat --k $type --v $type --prompt "$prompt" -n 90 --seed $seed --ids
            echo
        done >"$dir/each"
        cmp "$dir/all" "$dir/each" || fail "$type: other texts than one by one"
        # The prompt is held once: four caches would take much more.
        awk '$1 == "seed" && $4 > 0 && $6 > $4 { n++ }
             /separate caches/ && $4 > 1.5 * $8 { m++ }
             END { exit !(n == 4 && m == 1) }' "$dir/bytes" || fail "$type: $(cat "$dir/bytes")"
    done
    awk 'NF == 0 { n++ } END { exit n != 4 }' "$dir/all" || fail "not four texts"
    # Of a loaded conversation, and over a window; nothing to decode; a full context.
    "$tinylm" chat --prompt "$prompt" -n 20 --save "$dir/file" >"$dir/out" || fail "no save"
    "$tinylm" chat --load "$dir/file" --prompt "" -n 30 --seed 3 --ids >"$dir/one" || fail "no load"
    "$tinylm" chat --load "$dir/file" --prompt "" -n 30 --seed 3 --ids --parallel 2 2>"$dir/err" |
        sed '/^$/,$d' >"$dir/first"
    cmp "$dir/one" "$dir/first" || fail "other text after a load"
    "$tinylm" chat --prompt "$prompt" -n 30 --window 128 --ids >"$dir/one" 2>"$dir/err" ||
        fail "no window"
    "$tinylm" chat --prompt "$prompt" -n 30 --window 128 --ids --parallel 16 2>"$dir/err" |
        sed '/^$/,$d' >"$dir/first"
    cmp "$dir/one" "$dir/first" || fail "other text over a window"
    "$tinylm" chat --prompt "$prompt" -n 0 --parallel 2 >"$dir/out" || fail "no empty texts"
    "$tinylm" chat --prompt "One day," -n 90 --ctx 50 --parallel 2 >"$dir/out" 2>"$dir/err" ||
        fail "full context"
    grep -q full "$dir/err" || fail "a full context is not told"
    ;;
window)
    for type in f32 i8; do
        kv="--k $type --v $type --prompt Once"
        # As long as all is in sight there is no difference.
        "$tinylm" generate $kv -n 250 --ids >"$dir/plain" || fail "$type: no text"
        "$tinylm" generate $kv -n 250 --ids --window 256 >"$dir/window" 2>"$dir/err" ||
            fail "$type: no window"
        cmp "$dir/plain" "$dir/window" || fail "$type: a window beyond the text changes it"
        # Bounded memory, deterministic, on any number of threads.
        "$tinylm" generate $kv -n 1900 --ids --window 256 >"$dir/a" 2>"$dir/err" || fail "$type: long"
        "$tinylm" generate $kv -n 1900 --ids --window 256 --sinks 4 --threads 2 >"$dir/b" \
            2>"$dir/err" || fail "$type: long"
        cmp "$dir/a" "$dir/b" || fail "$type: not the same again"
        [ "$(wc -l <"$dir/a")" -eq 1900 ] || fail "$type: not 1900 tokens"
        # [window of 256 tokens, 4 sinks: N tokens in X KiB, at most Y KiB; without a window Z KiB]
        awk '/^.window of 256 tokens, 4 sinks/ && $14 <= 1.5 * $10 && $14 < 0.5 * $19 { n++ }
             END { exit n != 1 }' "$dir/err" || fail "$type: $(cat "$dir/err")"
    done
    "$tinylm" generate --prompt Once -n 400 --window 64 --sinks 0 --ids >"$dir/a" 2>"$dir/err"
    "$tinylm" generate --prompt Once -n 400 --ids >"$dir/b" 2>"$dir/err"
    cmp -s "$dir/a" "$dir/b" && fail "a window has no effect"
    "$tinylm" generate --prompt Once -n 400 --ctx 100 --window 64 --ids >"$dir/a" 2>"$dir/err"
    # "Once" is five tokens with BOS.
    [ "$(wc -l <"$dir/a")" -eq 95 ] || fail "--ctx is not the limit"
    grep -q 'context of 100 tokens is full' "$dir/err" || fail "a full context is not told"
    ;;
shift)
    for type in f32 i8; do
        kv="--k $type --v $type"
        # Far beyond the context in one turn, with and without a window and drafts.
        for more in "--ctx 192" "--ctx 500" "--ctx 512 --window 128"; do
            "$tinylm" chat $kv --shift $more --prompt "One day," -n 1200 --ids >"$dir/a" \
                2>"$dir/err" || fail "$type: $more: $(cat "$dir/err")"
            "$tinylm" chat $kv --shift $more --prompt "One day," -n 1200 --ids --threads 2 \
                --draft 5 >"$dir/b" 2>"$dir/err2" || fail "$type: $more: $(cat "$dir/err2")"
            [ "$(wc -l <"$dir/a")" -eq 1200 ] || fail "$type: $more: not 1200 tokens"
            cmp "$dir/a" "$dir/b" || fail "$type: $more: not the same again"
            grep -q '^.shifted: [0-9]* tokens left out, [0-9]* kept.$' "$dir/err" ||
                fail "$type: $more: not told"
        done
        # In turns; a prompt that needs more than half of the context.
        long=$("$tinylm" stories --seed 79 --tokens 180)
        line='What did Tom see in the garden when the rain came and the wind was cold?'
        for i in 1 2 3 4 5 6 7 8; do echo "$line"; done >"$dir/turns"
        echo "$long" | tr '\n' ' ' >>"$dir/turns"
        echo >>"$dir/turns"
        "$tinylm" chat $kv --shift --ctx 256 -n 50 --ids <"$dir/turns" >"$dir/whole" \
            2>"$dir/err" || fail "$type: $(cat "$dir/err")"
        [ "$(grep -c shifted "$dir/err")" -ge 3 ] || fail "$type: no shifts"
        "$tinylm" chat $kv --shift --ctx 256 -n 50 --ids --draft 3 <"$dir/turns" >"$dir/again" \
            2>"$dir/err" || fail "$type: $(cat "$dir/err")"
        cmp "$dir/whole" "$dir/again" || fail "$type: turns: other tokens"
        # A conversation that has not been shifted yet can be put away.
        "$tinylm" chat $kv --shift --ctx 256 --prompt Once -n 350 --ids >"$dir/whole" 2>"$dir/err"
        "$tinylm" chat $kv --shift --ctx 256 --prompt Once -n 150 --ids --save "$dir/file" \
            >"$dir/parts" 2>"$dir/err" || fail "$type: no save"
        "$tinylm" chat --load "$dir/file" --shift --ctx 256 --prompt "" -n 200 --ids \
            >>"$dir/parts" 2>"$dir/err" || fail "$type: no load"
        cmp "$dir/whole" "$dir/parts" || fail "$type: other tokens after a load"
        # So can one whose keys have moved, and one with a window.
        for more in "--shift --ctx 256" "--shift --ctx 400 --window 100 --sinks 8"; do
            "$tinylm" chat $kv $more --prompt Once -n 550 --ids >"$dir/whole" 2>"$dir/err" ||
                fail "$type: $(cat "$dir/err")"
            "$tinylm" chat $kv $more --prompt Once -n 350 --ids --save "$dir/file" \
                >"$dir/parts" 2>"$dir/err" || fail "$type: $more: $(cat "$dir/err")"
            "$tinylm" chat --load "$dir/file" $more --prompt "" -n 200 --ids >>"$dir/parts" \
                2>"$dir/err" || fail "$type: $more: $(cat "$dir/err")"
            cmp "$dir/whole" "$dir/parts" || fail "$type: $more: other tokens after a load"
        done
    done
    # The model's own context.
    "$tinylm" chat --k i8 --v i8 --shift --prompt "One day," -n 2300 --ids >"$dir/a" \
        2>"$dir/err" || fail "the model's context: $(cat "$dir/err")"
    [ "$(wc -l <"$dir/a")" -eq 2300 ] && grep -q shifted "$dir/err" || fail "no 2300 tokens"
    # Up to the first shift nothing differs from a chat that ends there.
    "$tinylm" chat --ctx 192 --prompt "One day," -n 300 --ids >"$dir/plain" 2>"$dir/err"
    "$tinylm" chat --ctx 192 --shift --prompt "One day," -n 300 --ids 2>"$dir/err" |
        head -n "$(wc -l <"$dir/plain")" >"$dir/shifted"
    cmp "$dir/plain" "$dir/shifted" || fail "differs before the first shift"
    refused chat --shift --ctx 192 --prompt "$("$tinylm" stories --tokens 400)"
    ;;
draft)
    for type in f32 f16 i8; do
        for seed in 81 82; do
            prompt=$("$tinylm" stories --seed $seed --tokens $((seed * 4)))
            for how in "--temperature 0" "--temperature 0.3 --seed 4"; do
                "$tinylm" generate --k $type --v $type --prompt "$prompt" -n 200 --ids $how \
                    >"$dir/plain" || fail "$type: no text"
                for n in 5 63; do
                    "$tinylm" generate --k $type --v $type --prompt "$prompt" -n 200 --ids $how \
                        --draft $n >"$dir/draft" 2>"$dir/err" || fail "$type: $(cat "$dir/err")"
                    cmp "$dir/plain" "$dir/draft" || fail "$type: --draft $n: another text"
                done
            done
        done
    done
    # These stories repeat themselves: drafts must save steps.
    awk '/^.drafts: 200 tokens in [0-9]* steps/ && $5 < 170 { a++ } /the same text/ { b++ }
         END { exit !(a && b) }' "$dir/err" || fail "$(cat "$dir/err")"
    # Turns, and a conversation that is put away: the same as plainly.
    printf 'The hat of Anna is red.\n\nThe hat of Anna is\n' >"$dir/turns"
    "$tinylm" chat --k i8 --v i8 -n 100 --ids <"$dir/turns" >"$dir/plain" || fail "no chat"
    "$tinylm" chat --k i8 --v i8 -n 100 --ids --draft 4 --save "$dir/file" <"$dir/turns" \
        >"$dir/draft" 2>"$dir/err" || fail "no chat"
    cmp "$dir/plain" "$dir/draft" || fail "chat: another text"
    grep -q '^.drafts: 300 tokens' "$dir/err" || fail "chat: $(cat "$dir/err")"
    "$tinylm" chat --k i8 --v i8 -n 100 --ids --save "$dir/file2" <"$dir/turns" >"$dir/plain"
    cmp "$dir/file" "$dir/file2" || fail "other bytes in the cache"
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
