#!/bin/sh
# kvtile store: test_tool_store.sh KVTILE WORK_FOLDER MAKE_SNAPSHOT
# With redis-server on the machine also a server, on a socket in the work folder and on loopback.
tool=$1 work=$2 make=$3
rm -rf "$work" && mkdir -p "$work" && work=$(cd "$work" && pwd) || exit 1
failures=0
server= # its process
trap '[ -z "$server" ] || kill "$server"' EXIT
trap 'exit 1' HUP INT TERM
unset KVTILE_STORE_PASSWORD

fails() {
    echo "$*"
    failures=$((failures + 1))
}
# run CODE ARGUMENTS...: `kvtile store` has to exit with CODE. Output is in $work/out and $work/err.
run() {
    want=$1
    shift
    "$tool" store "$@" >"$work/out" 2>"$work/err"
    got=$?
    [ $got -eq "$want" ] ||
        fails "kvtile store $*: exit code $got, not $want: $(cat "$work/out" "$work/err")"
}
# says FILE PATTERN: a line of $work/FILE matches.
says() {
    grep -q -- "$2" "$work/$1" || fails "no \"$2\" in: $(cat "$work/$1")"
}
silent() {
    [ ! -s "$work/$1" ] || fails "unexpected output: $(cat "$work/$1")"
}
# refuses CODE PATTERN ARGUMENTS...: exits with CODE, one line on stderr, nothing on stdout
refuses() {
    want=$1 pattern=$2
    shift 2
    run "$want" "$@"
    silent out
    says err "^kvtile: .*$pattern"
    [ "$(wc -l <"$work/err")" -eq 1 ] || fails "kvtile store $*: not one line: $(cat "$work/err")"
}
# json: each line of $work/out is a JSON object
json() {
    command -v python3 >/dev/null 2>&1 || return
    python3 -c 'import json, sys
for line in sys.stdin:
    assert type(json.loads(line)) is dict' <"$work/out" || fails "not JSON: $(cat "$work/out")"
}
# lines N: $work/out has so many
lines() {
    [ "$(wc -l <"$work/out")" -eq "$1" ] || fails "not $1 lines: $(cat "$work/out")"
}

# ---- the command line ----
run 2
says err 'no command: ls, stats, gc or verify'
refuses 2 'unknown command store frobnicate' frobnicate x
refuses 2 'unknown option --remove' ls --remove y
refuses 2 'unknown option --sort' verify --sort key y
refuses 2 'unknown option --max-bytes' stats --max-bytes 1 y
for command in ls stats gc verify; do
    refuses 2 'no store' $command
    refuses 2 'one store too many: b' $command a b
done
for value in '' x 0 1x 1kk -1 1e3 18446744073709551616 17179869184g 'k'; do
    refuses 2 '--max-bytes' gc --max-bytes "$value" a
done
for value in '' keys Key '-1'; do
    refuses 2 '--sort' ls --sort "$value" a
done
for url in redis:// redis://:secret@ redis://host:0 redis://host:65536 redis://host:x redis://host/x \
    redis://host:secret:1 'redis://[::1' 'redis://[::1]2' redis://u:%4@host redis://u:%00@host \
    redis+unix:// redis+unix://secret redis+unix://secret@ redis://host/1/2 rediss://; do
    refuses 2 'redis: the URL is not redis\[s\]://' ls "$url"
    grep -q secret "$work/err" && fails "the error shows a password"
done
refuses 2 "redis://h:1/0: a server's bound" gc --max-bytes 1k redis://h:1
refuses 2 "redis://\[::1\]:6379/0: --ca-file" ls --ca-file x 'redis://[::1]'
refuses 2 'redis://h:6379/0: --cert-file' ls --cert-file x --key-file y redis://h
for option in --cert-file --key-file; do
    refuses 2 'one without the other' ls $option x rediss://h
done
printf 'x\n' >"$work/password"
refuses 2 'redis://h:1/3: two passwords' ls --password-file "$work/password" redis://u:secret@h:1/3
for text in '' '\n' 'a\nb' 'a\0b'; do
    printf "$text" >"$work/bad"
    refuses 3 'bad: no password' ls --password-file "$work/bad" redis://h:1
done
refuses 3 'nothing: the password cannot be opened' ls --password-file "$work/nothing" redis://h:1

# ---- what is no store, and does not become one ----
mkdir "$work/empty" "$work/other" && : >"$work/other/file"
for command in ls stats gc 'gc --max-bytes 1g' verify 'verify --remove'; do
    refuses 3 'missing: there is no such store: No such file' $command "$work/missing"
    refuses 3 'other/file: there is no such store: Not a directory' $command "$work/other/file"
    refuses 3 'empty: there is no store: it is empty' $command "$work/empty"
    refuses 1 'other: the directory is not empty, and no store$' $command "$work/other"
done
[ ! -e "$work/missing" ] || fails "a store was made"
[ -z "$(ls -A "$work/empty")" ] || fails "a store was made in an empty directory"
[ "$(ls -A "$work/other")" = file ] || fails "a store was made in another directory"
for option in --password-file --prefix --ca-file; do
    refuses 2 'empty: a directory has no' ls $option x "$work/empty"
done
refuses 2 'empty: a directory has no prefix' ls --prefix= "$work/empty"
refuses 2 'empty: a directory has no TLS' ls --cert-file x --key-file y "$work/empty"

# ---- a directory ----
"$make" "store:$work/store" 1100 >"$work/out"
code=$?
[ $code -eq 77 ] && exit 77
[ $code -eq 0 ] || fails "$make: exit code $code"
n=$(cat "$work/out") # 64 tokens each but for the newest ones
[ "$n" -ge 15 ] || fails "$n values"

run 0 ls "$work/store"
lines $((n + 1))
says out '^key	bytes	used	left$'
[ "$(grep -cE '^[0-9a-f]{64}	[1-9][0-9]*	[0-9]+	-$' "$work/out")" -eq "$n" ] || fails "$(cat "$work/out")"
run 0 ls --quiet "$work/store"
silent out
run 0 ls --json -- "$work/store"
lines "$n"
json
says out '^{"file":"[^"]*store","status":0,"ok":true,"key":"[0-9a-f]\{64\}","bytes":[1-9][0-9]*,"used_seconds":[0-9]*,"left_seconds":null}$'
run 0 ls --sort key "$work/store"
tail -n +2 "$work/out" | LC_ALL=C sort -c || fails "not sorted by key"
lines $((n + 1))
# The oldest and the largest, to be told from the others.
first=$(sed -n 2p "$work/out" | cut -f 1) last=$(tail -n 1 "$work/out" | cut -f 1)
file=$(find "$work/store" -name "$last*" -type f)
cp -p "$file" "$work/sound"
printf 'more' >>"$file"
touch -d '2020-01-01' "$(find "$work/store" -name "$first*" -type f)"
run 0 ls --sort size "$work/store"
[ "$(sed -n 2p "$work/out" | cut -f 1)" = "$last" ] || fails "not the largest first: $(cat "$work/out")"
run 0 ls --sort=age "$work/store"
[ "$(sed -n 2p "$work/out" | cut -f 1)" = "$first" ] || fails "not the oldest first: $(cat "$work/out")"
[ "$(sed -n 2p "$work/out" | cut -f 3)" -gt 100000000 ] || fails "not its age: $(cat "$work/out")"
cp -p "$work/sound" "$file"

bytes=$(find "$work/store" -type f -path '*/[0-9a-f][0-9a-f]/*' | xargs cat | wc -c)
run 0 stats "$work/store"
says out "^  values  $n\$"
says out "^  bytes   $bytes\$"
says out '^  bound   none$'
run 0 stats --json "$work/store"
says out "\"n_values\":$n,\"bytes\":$bytes,\"max_bytes\":0}\$"
json

# ---- verify ----
run 0 verify --progress "$work/store"
says out "store: $n sound, 0 damaged, $bytes bytes\$"
says err 'verifying 100%$'
# It uses the values, but what is evicted next stays the same.
day=0
for name in $(find "$work/store" -type f -path '*/[0-9a-f][0-9a-f]/*'); do
    day=$((day + 1))
    touch -d "2020-01-$((9 + day * 7 % 19))" "$name" # an order that is not the names'
done
by_age() {
    find "$work/store" -type f -path '*/[0-9a-f][0-9a-f]/*' | xargs ls -tr
}
before=$(by_age)
run 0 verify "$work/store"
[ "$(by_age)" = "$before" ] || fails "a verification changes the order of eviction"
run 0 verify --json "$work/store"
says out "\"status\":0,\"ok\":true,\"n_sound\":$n,\"n_damaged\":0,\"n_other_version\":0,\"n_removed\":0,\"n_gone\":0,\"bytes\":$bytes}\$"
lines 1
json
run 0 verify --quiet "$work/store"
silent out
silent err
# A bit of the middle, the end, all of it, another's value.
cp -p "$(find "$work/store" -name "$first*" -type f)" "$work/another"
for damage in flip cut empty swap; do
    cp -p "$work/sound" "$file"
    case $damage in
    flip) printf '\377\376' | dd of="$file" bs=1 seek=9000 conv=notrunc 2>/dev/null ;;
    cut) head -c 9000 "$work/sound" >"$file" ;;
    empty) : >"$file" ;;
    swap) cp "$work/another" "$file" ;;
    esac
    run 1 verify --progress "$work/store"
    says out "store: $((n - 1)) sound, 1 damaged, "
    says err "^kvtile: .*store: $last: a stored value: "
    says err 'verifying 100%$'
done
says err 'put under another key$'
run 1 verify --json "$work/store"
says out "\"ok\":false,\"error\":\"a stored value: it was put under another key\",\"key\":\"$last\"}\$"
says out "\"ok\":false,\"error\":\"1 damaged\",\"n_sound\":$((n - 1)),\"n_damaged\":1,\"n_other_version\":0,\"n_removed\":0,"
lines 2
json
[ -e "$file" ] || fails "removed without --remove"
# Another version of the format is none of ours, and no damage.
cp -p "$work/sound" "$file"
printf '\002' | dd of="$file" bs=1 seek=8 conv=notrunc 2>/dev/null
run 0 verify --remove "$work/store"
says out "store: $((n - 1)) sound, 0 damaged, 1 of another version of the format, 0 removed, "
[ -e "$file" ] || fails "a value of another version was removed"
cp "$work/another" "$file"
run 1 verify --remove "$work/store"
says out "store: $((n - 1)) sound, 1 damaged, 1 removed, "
[ ! -e "$file" ] || fails "not removed"
run 0 verify --remove "$work/store"
says out "store: $((n - 1)) sound, 0 damaged, 0 removed, "

# ---- gc ----
touch "$work/store/tmp/put-0123456789abcdef" # of a process that has died
cp "$work/sound" "$file"          # not counted
run 0 gc "$work/store"
says out "store: $n values, $bytes bytes, 0 values evicted\$"
[ ! -e "$work/store/tmp/put-0123456789abcdef" ] || [ ! -d "$work/store/tmp" ] || fails "a leftover stays"
run 0 gc --max-bytes "$((bytes / 2048))K" "$work/store"
says out " bytes of $((bytes / 2048 * 1024)), [1-9][0-9]* values evicted\$"
run 0 stats --json "$work/store"
says out ",\"max_bytes\":$((bytes / 2048 * 1024))}\$"
run 0 gc --max-bytes=3g --json "$work/store"
says out ',"max_bytes":3221225472,"n_evicted":0}$'
json
run 0 verify "$work/store"
grep -q " $n sound" "$work/out" && fails "nothing was evicted"

# A directory that may only be read; root may write anyway.
if [ "$(id -u)" -ne 0 ]; then
    chmod -R a-w "$work/store"
    run 0 ls "$work/store"
    run 0 stats "$work/store"
    run 0 verify "$work/store"
    refuses 3 'store: ' gc "$work/store"
    chmod -R u+w "$work/store"
fi
if [ -c /dev/full ] && [ -w /dev/full ]; then
    "$tool" store ls "$work/store" >/dev/full 2>"$work/err"
    [ $? -eq 3 ] || fails "a full disk was not noticed"
fi

# ---- a server ----
# serve ARGUMENTS...: start one on a socket in the work folder, and on a port of loopback.
serve() {
    port=$((20000 + $$ % 20000))
    for attempt in 1 2 3 4 5; do
        : >"$work/server" # what an earlier server has said is not this one's
        redis-server --port $port --bind 127.0.0.1 --unixsocket "$socket" --save '' --appendonly no \
            --dir "$work" "$@" >"$work/server" 2>&1 &
        server=$!
        for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
            kill -0 $server 2>/dev/null || break # the port is another's
            grep -q 'ready to accept connections at\|The server is now ready.*unix' "$work/server" && return 0
            sleep 0.1
        done
        kill $server 2>/dev/null
        wait $server 2>/dev/null
        server=
        port=$((port + 1))
    done
    return 1
}
# serve_tls: the same, with TLS on another port.
serve_tls() {
    for attempt in 1 2 3 4 5; do
        tls_port=$((port + 100 + 7 * attempt))
        serve --tls-port $tls_port --tls-cert-file "$work/tls/server.crt" \
            --tls-key-file "$work/tls/server.key" --tls-ca-cert-file "$work/tls/ca.crt" && return 0
    done
    return 1
}
stop() {
    kill $server
    wait $server 2>/dev/null
    server=
}
socket=$(mktemp -u "${TMPDIR:-/tmp}/kvtile-XXXXXX") # paths of sockets are short
refuses 3 'redis+unix:///nowhere/at/all: ' ls redis+unix:///nowhere/at/all
if grep -q 'hiredis' "$work/err"; then
    echo "skipped: a server, without hiredis"
elif ! command -v redis-server >/dev/null 2>&1; then
    echo "skipped: a server, without redis-server"
elif ! serve; then
    fails "redis-server: $(cat "$work/server")"
else
    n=$("$make" redis:$port 1100) || fails "$make: redis"
    for store in redis://127.0.0.1:$port "redis+unix://$socket"; do
        run 0 ls "$store"
        lines $((n + 1))
        run 0 ls --json --sort size "$store"
        lines "$n"
        json
        run 0 stats "$store"
        says out "^  values  $n\$"
        run 0 stats --json "$store"
        says out "\"n_values\":$n,\"bytes\":[1-9][0-9]*,"
        run 0 verify "$store"
        says out "$n sound, 0 damaged, "
    done
    # A server that is busy for longer than the library waits where nothing else is said: 1 s.
    kill -STOP $server
    (sleep 1.5 && kill -CONT $server) &
    run 0 stats "redis://127.0.0.1:$port"
    wait $!
    run 0 ls --prefix other: "redis://127.0.0.1:$port"
    lines 1
    run 0 ls --prefix= "redis://127.0.0.1:$port" # keys that are the digits alone
    lines 1
    run 0 ls "redis://127.0.0.1:$port/1"
    lines 1
    refuses 3 'redis://127.0.0.1:' gc "redis://127.0.0.1:$port"
    # Started without stdout or stderr: the connection does not get their numbers.
    "$tool" store verify --progress "redis+unix://$socket" 2>&- >"$work/out" || fails "verify without stderr"
    says out "$n sound, 0 damaged, "
    "$tool" store ls "redis+unix://$socket" 0<&- >&- 2>"$work/err"
    [ $? -eq 3 ] || fails "a closed stdout was not noticed"
    says err '^kvtile: stdout: cannot be written$'
    # A damaged value.
    run 0 ls --sort key "redis://127.0.0.1:$port"
    key=$(sed -n 2p "$work/out" | cut -f 1)
    name=$(redis-cli -p $port --raw keys '*' 2>/dev/null | LC_ALL=C sort | sed -n 1p)
    if [ -n "$name" ]; then
        redis-cli -p $port rename "$name" "${name#kvt:}" >/dev/null
        run 0 verify --prefix '' "redis://127.0.0.1:$port"
        says out ' 1 sound, 0 damaged, '
        redis-cli -p $port rename "${name#kvt:}" "$name" >/dev/null
        redis-cli -p $port setrange "$name" 9000 '~~~~' >/dev/null
        run 1 verify "redis://127.0.0.1:$port"
        says out "$((n - 1)) sound, 1 damaged, "
        run 1 verify --remove "redis://127.0.0.1:$port"
        says out "$((n - 1)) sound, 1 damaged, 1 removed, "
        run 0 verify "redis://127.0.0.1:$port"
        says out "$((n - 1)) sound, 0 damaged, "
    fi
    stop
    refuses 3 "redis://127.0.0.1:$port/0: " ls "redis://127.0.0.1:$port"
    # Passwords.
    serve --requirepass 'se cr:et/@' || fails "redis-server: $(cat "$work/server")"
    printf 'se cr:et/@\n' >"$work/password"
    refuses 3 "redis://127.0.0.1:$port/0: " stats "redis://127.0.0.1:$port"
    refuses 3 "redis://127.0.0.1:$port/0: " stats "redis://:wrong@127.0.0.1:$port"
    run 0 stats --password-file "$work/password" "redis://127.0.0.1:$port"
    run 0 stats "redis://:se%20cr%3Aet%2f%40@127.0.0.1:$port"
    says out "^redis://127.0.0.1:$port/0\$"
    run 0 stats "redis://:se cr:et/@@127.0.0.1:$port/2"
    says out "^redis://127.0.0.1:$port/2\$"
    KVTILE_STORE_PASSWORD='se cr:et/@'
    export KVTILE_STORE_PASSWORD
    run 0 stats "redis+unix://$socket"
    stop
    unset KVTILE_STORE_PASSWORD
    # TLS, of a server that wants to know its clients.
    mkdir "$work/tls"
    "$(dirname "$0")/make_certificates.sh" "$work/tls" >"$work/out" 2>&1
    made=$?
    run 3 stats --ca-file "$work/tls/nothing" rediss://localhost:1
    if grep -q KVTILE_TLS "$work/err"; then
        echo "skipped: TLS, without it in the library"
    elif [ $made -eq 77 ] || redis-server --port 0 --tls-port 0 2>&1 | grep -q 'Bad directive'; then
        echo "skipped: TLS, without openssl or a redis-server that has it"
    elif [ $made -ne 0 ] || ! serve_tls; then
        fails "TLS: $(cat "$work/out" "$work/server")"
    else
        client="--cert-file $work/tls/client.crt --key-file $work/tls/client.key"
        says err ': --ca-file: .*/nothing: No such file'
        refuses 3 ': --cert-file: .*/ca.key: it is no certificate in PEM$' ls \
            --cert-file "$work/tls/ca.key" --key-file "$work/tls/client.key" rediss://localhost:$tls_port
        refuses 3 ': --key-file: .*/ca.key: it is not the key of --cert-file$' ls \
            --cert-file "$work/tls/client.crt" --key-file "$work/tls/ca.key" rediss://localhost:$tls_port
        run 0 stats --ca-file "$work/tls/ca.crt" $client rediss://localhost:$tls_port
        says out "^rediss://localhost:$tls_port/0\$"
        run 0 ls --ca-file "$work/tls/ca.crt" $client rediss://127.0.0.1:$tls_port/2
        lines 1
        refuses 3 "rediss://localhost:$tls_port/0: .*client certificate" stats \
            --ca-file "$work/tls/ca.crt" rediss://localhost:$tls_port
        refuses 3 "rediss://localhost:$tls_port/0: .*certificate verify failed" stats \
            --ca-file "$work/tls/stranger.crt" $client rediss://localhost:$tls_port
        refuses 3 "redis://127.0.0.1:$tls_port/0: .*TLS" stats redis://127.0.0.1:$tls_port
        stop
    fi
fi

[ $failures -eq 0 ] && rm -rf "$work"
exit $((failures != 0))
