#!/bin/sh
# The command line: test_tool.sh KVTILE GOLDEN_FOLDER WORK_FOLDER MAKE_SNAPSHOT
# (What dump and diff say of keys and values is tried by test_tool_arrays.py.)
tool=$1 golden=$2 work=$3 make=$4
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
fails() {
    echo "$*"
    failures=$((failures + 1))
}
# refuses CODE PATTERN ARGUMENTS...: exits with CODE, one line on stderr, nothing on stdout
refuses() {
    want=$1 pattern=$2
    shift 2
    run "$want" "$@"
    says err "^kvtile: .*$pattern"
    silent out
    [ "$(wc -l <"$work/err")" -eq 1 ] || fails "kvtile $*: not one line: $(cat "$work/err")"
}
# json: $work/out is one JSON object
json() {
    [ "$(wc -l <"$work/out")" -eq 1 ] || fails "not one line: $(cat "$work/out")"
    if command -v python3 >/dev/null 2>&1; then
        python3 -m json.tool <"$work/out" >/dev/null || fails "not JSON: $(cat "$work/out")"
    fi
}
# leaves NAME...: these files, and no temporary, are in $work/new, which is emptied
leaves() {
    got=$(ls -A "$work/new" | tr '\n' ' ')
    [ "$got" = "${*:+$* }" ] || fails "files: $got, not $*"
    rm -rf "$work/new" && mkdir "$work/new"
}

run 0 --help
says out 'kvtile info'
says out 'Exit code'
run 0 --version
says out '^kvtile [0-9]*\.[0-9]*\.[0-9]*$'
run 2
refuses 2 frobnicate frobnicate "$golden/i8.kvt"
refuses 2 'no file' info
refuses 2 'unknown option --loud' info --loud "$golden/i8.kvt"
refuses 2 'unknown option --quick' verify --quick "$golden/i8.kvt"
refuses 2 'unknown option --jso' info --jso "$golden/i8.kvt"
refuses 2 'unknown option --json=1' info --json=1 "$golden/i8.kvt"
refuses 2 '--quick and --verify' info --quick --verify "$golden/i8.kvt"
for command in info verify dump diff convert merge; do
    refuses 2 'no file' $command
    refuses 2 'unknown option -x' $command -x
done
for command in info verify dump; do
    refuses 2 'the name of a file is empty' $command ''
done
refuses 2 'the name of a file is empty' info "$golden/i8.kvt" ''
for command in diff convert merge; do
    refuses 2 'the name of a file is empty' $command "$golden/i8.kvt" ''
    refuses 2 'the name of a file is empty' $command '' "$work/none"
done
for command in ls stats gc verify; do
    refuses 2 'the name of the store is empty' store $command ''
done
refuses 2 'a file is missing' diff "$golden/i8.kvt"
refuses 2 'a file is missing' convert "$golden/i8.kvt"
refuses 2 'one file too many: c' convert a b c
refuses 2 'one file too many: b' dump a b
for value in '--layer' '--layer=' '--layer=x' '--layer=1024' '--layer=-1' '--tokens=' '--tokens=a' \
    '--tokens=1:2:3' '--tokens=1:b' '--tokens=-1:' '--tokens=1073741825' '--tokens=1e3' '--side=q' \
    '--dtype=f64' '--npy=' '--output=' '--safetensors='; do
    refuses 2 "${value%%=*}" dump "$value"
done
for value in '--codec=lz4' '--codec' '--level=20' '--level=-8' '--level=x' '--level=' '--level= 5' '--level=+5' '--level=- 5' '--level=-' '--tokens=' '--k-type=i5' '--k-type=x' \
    '--v-type=' '--layer=x' '--new-key-file='; do
    refuses 2 "${value%%=*}" convert a b "$value"
done
refuses 2 bf16 dump --dtype bf16 --npy "$work/x" "$golden/i8.kvt"
refuses 2 stdout dump --json --output - --layer 0 --side k "$golden/i8.kvt"
refuses 2 'has to be a file' convert "$golden/i8.kvt" -
refuses 2 'unknown option --k-type' merge --k-type=i8 a b
refuses 2 '--decrypt without --key-file' convert --decrypt a b
refuses 2 '--new-key-file and --decrypt' merge --decrypt --new-key-file x --key-file y a b

run 0 info "$golden/i8.kvt"
says out 'tokens  *300 in 5 blocks, 2 of them open$'
says out 'fingerprint  *676f6c64656e'
says out ' 0  *3  *4  *2  *24  *16  *i8  *i8  *rotated, with offset  *rotated  *none$'
says out 'bits per element'
silent err
run 0 info --quick "$golden/groups.kvt"
says out ' 1  *1  *4  *2  *8  *16  *f32  *i8  *as it is  *rotated  *none$'
says out ' 0  *2  *2  *1  *16  *32  *i8  *f16  *with offset  *as it is  *none$'
says out 'layers of 0  *0, 2$'
says out 'layers of 1  *1$'
run 0 info "$golden/i8-plain.kvt" # all flags are set
says out ' *i8  *i8  *as it is  *as it is  *none$'
run 0 info --json "$golden/i8-plain.kvt"
says out '"rotation":false,"offset":false,"v_rotation":false,"v_in_k":false,'
run 0 info --json "$golden/v-in-k.kvt"
says out '"rotation":true,"offset":true,"v_rotation":false,"v_in_k":true,'
run 0 info --json "$golden/groups.kvt"
says out '"groups":\[{"n_layers":2,"layers":\[0,2\],"n_q_heads":2,[^{]*},{"n_layers":1,"layers":\[1\],'
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
# A byte of a block that is flipped: the section, the layer and the offset are named.
{ head -c 20000 "$golden/i8.kvt"; printf '\125'; tail -c +20002 "$golden/i8.kvt"; } >"$work/flipped.kvt"
cmp -s "$golden/i8.kvt" "$work/flipped.kvt" && fails "the byte was that already"
for command in verify info; do
    refuses 1 'flipped.kvt: .*offset [0-9]*, block 1 .*, layer 0: .*checksum' $command "$work/flipped.kvt"
done
run 0 info --quick "$work/flipped.kvt"
for command in "verify --json" "info --json" "dump --json" "diff --json $golden/i8.kvt"; do
    run 1 $command "$work/flipped.kvt"
    says err '^kvtile: .*flipped.kvt: .*block 1'
    says out '"file":"[^"]*flipped.kvt","status":11,"ok":false,"error":"[^"]*block 1'
    json
done
run 0 info --verify --quiet "$golden/i8.kvt"
silent out
run 0 verify --quiet "$golden/i8.kvt"
silent out
run 0 verify --quiet --json "$golden/i8.kvt"
says out '"ok":true'
run 0 verify --progress "$golden/i8.kvt"
says err '^kvtile: .*i8.kvt: reading 100%$'
run 1 verify --progress "$work/cut.kvt"
grep -q '100%' "$work/err" && fails "progress of 100% of a file that is cut"
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
accents="$work/$(printf '\303\251\342\202\254').kvt" # UTF-8, which stays
cp "$golden/empty.kvt" "$accents"
run 0 info --json --quick "$accents"
says out "\"file\":\"$accents\",\"status\""
c1="$work/$(printf 'x\302\200y\302\237z\302\240').kvt" # U+0080, U+009F; U+00A0 stays
cp "$golden/empty.kvt" "$c1"
run 0 info --json --quick "$c1"
says out "\"file\":\"[^\"]*/x\\\\u0080y\\\\u009fz$(printf '\302\240').kvt\",\"status\""
run 0 verify "$c1"
says out "/x?y?z$(printf '\302\240').kvt: sound"
refuses 3 "a?\[31mb: .*No such file" verify "$work/$(printf 'a\302\233[31mb')"
if command -v python3 >/dev/null 2>&1; then
    "$tool" info --json "$golden"/*.kvt "$odd" "$work"/*.kvt 2>/dev/null |
        python3 -c 'import json, sys; [json.loads(line) for line in sys.stdin]' ||
        { echo "not JSON"; failures=$((failures + 1)); }
fi
refuses 3 'a?b: .*No such file or directory$' verify "$work/a
b" # which stays one line
# A name with a newline: each error, and each file, is a line.
mkdir "$work/lines"
newline="$work/lines/$(printf 'new\nline')"
cp "$golden/empty.kvt" "$newline"
refuses 2 'unknown option --x?y (see' info "$(printf -- '--x\ny')"
refuses 2 'unknown command a?b ' "$(printf 'a\nb')"
refuses 3 'new?line.kvt: .*No such file' info "$newline.kvt"
refuses 3 'new?line.d/x: .*No such file' convert "$golden/tag.kvt" "$newline.d/x"
refuses 2 'is the output .*new?line too' dump --force --layer 0 --side k --output "$newline" --safetensors "$work/lines/../lines/$(printf 'new\nline')" "$golden/tag.kvt"
for how in verify 'info --quick' 'diff --progress'; do
    set -- $how "$newline"
    [ "$1" = diff ] && set -- "$@" "$newline"
    run 0 "$@"
    says out 'lines/new?line'
    grep -q '^line' "$work/out" "$work/err" && fails "$how: a name of two lines"
done
run 0 convert --progress "$newline" "$newline.kvt"
says out 'new?line.kvt: 0 tokens'
says err '^kvtile: .*new?line: converting 100%$'
rm -r "$work/lines"

(cd "$work" && cp "$golden/empty.kvt" ./--json && "$tool" verify -- --json >/dev/null) ||
    { echo "-- does not end the options"; failures=$((failures + 1)); }

# ---- dump: tokens ----
mkdir "$work/new"
run 0 dump --tokens 229:231 "$golden/moved.kvt"
printf 'index\tposition\ttoken_id\tkey_position\n229\t252\t341\t322\n230\t253\t378\t323\n' |
    cmp - "$work/out" || fails "a table of tokens"
run 0 dump --tokens=2 "$golden/i8.kvt"
printf 'index\tposition\ttoken_id\n0\t0\t-1\n1\t1\t37\n' | cmp - "$work/out" || fails "a table of tokens"
run 0 dump "$golden/i8.kvt"
[ "$(wc -l <"$work/out")" -eq 301 ] || fails "not a line a token"
run 0 dump --quiet "$golden/i8.kvt"
silent out
run 0 dump --tokens 298: --json "$golden/i8.kvt"
says out '"status":0,"ok":true,"n_tokens":300,"first":298,"end":300,"next_position":329,"checkpoints":\[\],"released":\[\],"files":\[\],"token_ids":\[26,63\],"positions":\[327,328\],"key_positions":\[327,328\]}$'
json
run 0 dump --json "$golden/checkpoints.kvt"
says out '"checkpoints":\[100,330,345,410\],"released":\[{"group":0,"first":64,"end":256}\]'
json
for name in empty tag v-in-k groups; do
    run 0 dump --json "$golden/$name.kvt"
    json
done
refuses 2 'it has 300 tokens, not 0:301' dump --tokens 301 "$golden/i8.kvt"
refuses 2 'it has 300 tokens, not 9:8' dump --tokens 9:8 "$golden/i8.kvt"
refuses 3 'missing.kvt: .*No such file' dump "$work/missing.kvt"

# ---- dump: arrays ----
run 0 dump --npy "$work/new/folder" --progress "$golden/tag.kvt"
silent out
says err '^kvtile: .*tag.kvt: writing 100%$'
[ "$(ls -A "$work/new/folder" | tr '\n' ' ')" = "layers.0.k.npy layers.0.v.npy layers.1.k.npy layers.1.v.npy layers.2.k.npy layers.2.v.npy positions.npy token_ids.npy " ] ||
    fails "arrays: $(ls -A "$work/new/folder")"
refuses 3 'token_ids.npy: is there already' dump --npy "$work/new/folder" "$golden/tag.kvt"
rm "$work/new/folder/token_ids.npy"
refuses 3 'positions.npy: is there already' dump --npy "$work/new/folder" "$golden/tag.kvt"
[ -e "$work/new/folder/token_ids.npy" ] && fails "an array of a dump that was refused"
run 0 dump --npy "$work/new/folder" --force "$golden/tag.kvt"
leaves folder
run 0 dump --output "$work/new/k.npy" --safetensors "$work/new/k.st" --layer 1 --side k "$golden/tag.kvt"
run 0 dump --output - --layer 1 --side k "$golden/tag.kvt"
cmp "$work/out" "$work/new/k.npy" || fails "another array on stdout"
run 0 dump --safetensors - --layer 1 --side k "$golden/tag.kvt"
cmp "$work/out" "$work/new/k.st" || fails "other arrays on stdout"
run 0 dump --json --output "$work/new/v.npy" --layer 1 --side v "$golden/tag.kvt"
says out '"files":\["[^"]*new/v.npy"\]}$'
json
leaves k.npy k.st v.npy
for how in '' '--layer 1' '--side k' '--layer 0 --layer 1 --side k'; do
    refuses 2 'one side of one layer' dump --output "$work/new/x.npy" $how "$golden/tag.kvt"
done
refuses 2 'it has 3 layers, and none of number 3' dump --layer 3 --npy "$work/new/x" "$golden/tag.kvt"
refuses 2 'layer 0 has no tokens 128 to 191: .*--tokens 192:' dump --npy "$work/new/x" "$golden/window.kvt"
run 0 dump --layer 1 --npy "$work/new/x" "$golden/checkpoints.kvt" # whose group has no window
refuses 3 'no/x: cannot be created: No such file' dump --safetensors "$work/new/no/x" "$golden/tag.kvt"
leaves x
: >"$work/new/x"
for how in --safetensors '--layer 0 --side v --output'; do
    refuses 3 'x: is there already (--force replaces it)' dump $how "$work/new/x" "$golden/tag.kvt"
done
[ -s "$work/new/x" ] && fails "a file was written over"
chmod 640 "$work/new/x"
run 0 dump --force --safetensors "$work/new/x" "$golden/tag.kvt"
[ -s "$work/new/x" ] || fails "--force does not replace"
case $(ls -l "$work/new/x") in -rw-r-----*) ;; *) fails "another mode" ;; esac
# Who could not read the file that is replaced cannot read the new one: its group, its ACL.
cat >"$work/acl.py" <<'END'
import os, struct, sys
def acl(*entries): # tag, permissions, id
    return struct.pack('<I', 2) + b''.join(struct.pack('<HHI', *e) for e in entries)
access, default = 'system.posix_acl_access', 'system.posix_acl_default'
of, path = sys.argv[1:]
nobody = 2**32 - 1
if of == 'default': # of new files: none for others
    os.setxattr(path, default, acl((1, 7, nobody), (2, 6, 54321), (4, 5, nobody), (16, 7, nobody), (32, 0, nobody)))
elif of == 'access':
    os.setxattr(path, access, acl((1, 6, nobody), (2, 4, 54322), (4, 0, nobody), (16, 4, nobody), (32, 0, nobody)))
else:
    try:
        print(oct(os.stat(path).st_mode), os.getxattr(path, access).hex())
    except OSError:
        print(oct(os.stat(path).st_mode), 'none')
END
if [ "$(id -u)" -eq 0 ] && chgrp 54321 "$work/new/x" 2>/dev/null; then
    run 0 dump --force --safetensors "$work/new/x" "$golden/tag.kvt"
    [ "$(stat -c '%g %a' "$work/new/x")" = '54321 640' ] || fails "another group: $(ls -l "$work/new/x")"
    # It has a group that the process may not give: the process's own gets no more than others.
    if setpriv --reuid 54321 --regid 54322 --clear-groups "$tool" info "$golden/tag.kvt" >"$work/out" 2>&1; then
        chmod 711 "$work"
        chown 54321 "$work/new" "$work/new/x"
        chmod 664 "$work/new/x"
        setpriv --reuid 54321 --regid 54322 --clear-groups "$tool" dump --force \
            --safetensors "$work/new/x" "$golden/tag.kvt" || fails "dump of another user"
        [ "$(stat -c '%g %a' "$work/new/x")" = '54322 644' ] || fails "access of another group: $(ls -l "$work/new/x")"
        chown 0 "$work/new"
        mkdir "$work/new/sticky" && chmod 1777 "$work/new/sticky" && : >"$work/new/sticky/y" && chmod 666 "$work/new/sticky/y"
        whole=$tool tool="setpriv --reuid 54321 --regid 54322 --clear-groups $tool"
        for how in "dump --force --safetensors $work/new/sticky/y $golden/i8.kvt" "convert --force $golden/i8.kvt $work/new/sticky/y"; do
            $tool $how >"$work/out" 2>"$work/err"
            [ $? -eq 3 ] || fails "$how: another user's file"
            silent out
            says err '^kvtile: .*sticky/y: is another user.s, in a folder where each may replace only his own'
        done
        tool=$whole
        chown 54321 "$work/new/sticky/y"
        setpriv --reuid 54321 --regid 54322 --clear-groups "$tool" dump --force \
            --safetensors "$work/new/sticky/y" "$golden/tag.kvt" || fails "dump to a sticky folder"
        rm -r "$work/new/sticky"
    fi
fi
if command -v python3 >/dev/null 2>&1 && mkdir "$work/new/acl" && : >"$work/new/acl/x" &&
    chmod 640 "$work/new/acl/x" && python3 "$work/acl.py" default "$work/new/acl" 2>/dev/null; then
    run 0 dump --force --safetensors "$work/new/acl/x" "$golden/tag.kvt"
    [ "$(python3 "$work/acl.py" show "$work/new/acl/x")" = '0o100640 none' ] ||
        fails "a list that it had not: $(python3 "$work/acl.py" show "$work/new/acl/x")"
    python3 "$work/acl.py" access "$work/new/acl/x"
    before=$(python3 "$work/acl.py" show "$work/new/acl/x")
    run 0 dump --force --safetensors "$work/new/acl/x" "$golden/tag.kvt"
    [ "$(python3 "$work/acl.py" show "$work/new/acl/x")" = "$before" ] ||
        fails "another list: $(python3 "$work/acl.py" show "$work/new/acl/x"), not $before"
    : >"$work/new/acl/y" # as the system makes a new file
    run 0 dump --safetensors "$work/new/acl/z" "$golden/tag.kvt"
    [ "$(python3 "$work/acl.py" show "$work/new/acl/z")" = "$(python3 "$work/acl.py" show "$work/new/acl/y")" ] ||
        fails "a new file: $(python3 "$work/acl.py" show "$work/new/acl/z")"
fi
rm -rf "$work/new/acl"
(umask 026 && "$tool" dump --safetensors "$work/new/y" "$golden/tag.kvt")
case $(ls -l "$work/new/y") in -rw-r-----*) ;; *) fails "another mode: $(ls -l "$work/new/y")" ;; esac
rm "$work/new/y"
refuses 3 'new: is a folder' dump --safetensors "$work/new" "$golden/tag.kvt"
ln -s nowhere "$work/new/link"
refuses 3 'link: is there already' dump --safetensors "$work/new/link" "$golden/tag.kvt"
# A link is followed: the file that it leads to is replaced, the link stays.
mkdir "$work/new/there"
echo old >"$work/new/there/k.npy"
ln -s there/k.npy "$work/new/k.npy"
run 0 dump --force --output "$work/new/k.npy" --layer 1 --side k "$golden/tag.kvt"
[ -h "$work/new/k.npy" ] || fails "dump --force: the link was replaced"
[ "$(ls -A "$work/new/there")" = k.npy ] || fails "files: $(ls -A "$work/new/there")"
"$tool" dump --output - --layer 1 --side k "$golden/tag.kvt" | cmp - "$work/new/there/k.npy" ||
    fails "dump --force: not to the file that the link leads to"
refuses 3 'link: .*link.*: No such file' dump --force --safetensors "$work/new/link" "$golden/tag.kvt"
[ -h "$work/new/link" ] || fails "dump --force: the link was replaced"
leaves k.npy link there x

# ---- outputs that are inputs ----
cp "$golden/tag.kvt" "$work/new/a.kvt"
cp "$work/new/a.kvt" "$work/same.kvt"
printf '01234567890123456789012345678901' >"$work/new/key"
cp "$work/new/key" "$work/same.key"
ln -s key "$work/new/soft"
ln "$work/new/key" "$work/new/hard"
ln "$work/new/a.kvt" "$work/new/b.kvt"
for name in a.kvt b.kvt; do
    for how in --safetensors '--layer 0 --side v --output'; do
        refuses 2 "$name: is the input too" dump --force $how "$work/new/$name" "$work/new/a.kvt"
    done
done
for name in key soft hard; do
    for how in --safetensors '--layer 0 --side v --output'; do
        refuses 2 "$name: is the key file too" dump --force --key-file "$work/new/key" $how "$work/new/$name" "$golden/tag.kvt"
    done
    for command in convert merge; do
        refuses 2 "$name: is the key file too" $command --force --key-file "$work/new/key" "$golden/tag.kvt" "$work/new/$name"
        refuses 2 "$name: is the file of the new key too" $command --force --new-key-file "$work/new/key" "$golden/tag.kvt" "$work/new/$name"
    done
done
mkdir "$work/new/npy"
ln "$work/new/a.kvt" "$work/new/npy/layers.1.k.npy"
refuses 2 'layers.1.k.npy: is the input too' dump --force --npy "$work/new/npy" "$work/new/a.kvt"
[ "$(ls -A "$work/new/npy")" = layers.1.k.npy ] || fails "arrays of a dump that was refused"
"$tool" dump --layer 0 --side k --output - "$work/new/a.kvt" >>"$work/new/a.kvt" 2>"$work/err"
[ $? -eq 2 ] || fails "stdout is the input"
says err '^kvtile: -: is the input too'
cmp "$work/same.kvt" "$work/new/a.kvt" && cmp "$work/same.key" "$work/new/key" || fails "an input was replaced"
cmp "$work/same.key" "$work/new/hard" || fails "a key file was replaced"
[ -h "$work/new/soft" ] || fails "a link was replaced"
leaves a.kvt b.kvt hard key npy soft
# Nor is one a parent of the input.
"$make" "$work/new/first.kvt" 300 && "$make" "$work/new/second.kvt" 500 none "$work/new/first.kvt" &&
    "$make" "$work/new/third.kvt" 640 none "$work/new/second.kvt" || fails "$make"
ln -s first.kvt "$work/new/link"
mkdir "$work/new/npy" && ln "$work/new/first.kvt" "$work/new/npy/layers.1.v.npy"
for name in first.kvt second.kvt link; do
    for how in --safetensors '--layer 0 --side v --output'; do
        refuses 2 "$name: is a parent of the input: the output has to be another file" dump --force $how "$work/new/$name" "$work/new/third.kvt"
    done
done
refuses 2 'layers.1.v.npy: is a parent of the input' dump --force --npy "$work/new/npy" "$work/new/third.kvt"
(cd "$work/new" && "$tool" dump --force --safetensors "$work/new/first.kvt" third.kvt) 2>"$work/err"
says err 'first.kvt: is a parent of the input'
run 0 verify "$work/new/third.kvt"
run 0 dump --force --safetensors "$work/new/first.kvt" "$golden/tag.kvt" # no parent of that
refuses 1 'in the parent first.kvt' dump --safetensors "$work/new/x" "$work/new/third.kvt"
leaves first.kvt link npy second.kvt third.kvt

# ---- outputs that are one file ----
mkdir "$work/new/g" "$work/new/npy"
ln -s x "$work/new/g/link"
one='--layer 0 --side k'
refuses 2 'g/x: is the output .*g/x too' dump $one --output "$work/new/g/x" --safetensors "$work/new/g/../g/x" "$golden/tag.kvt"
: >"$work/new/g/x"
for paths in x:../g/x x:link link:./x; do
    refuses 2 'is the output .* too' dump --force $one --output "$work/new/g/${paths%:*}" --safetensors "$work/new/g/${paths#*:}" "$golden/tag.kvt"
done
[ -s "$work/new/g/x" ] && fails "an output was written"
for made in npy fresh; do
    refuses 2 'token_ids.npy: is the output .* too' dump $one --npy "$work/new/$made" --output "$work/new/$made/token_ids.npy" "$golden/tag.kvt"
    refuses 2 'layers.0.k.npy: is the output .* too' dump $one --npy "$work/new/$made" --safetensors "$work/new/$made/layers.0.k.npy" "$golden/tag.kvt"
done
: >"$work/new/npy/positions.npy"
ln -s positions.npy "$work/new/npy/token_ids.npy"
refuses 2 'positions.npy: is the output .*token_ids.npy too' dump --force --npy "$work/new/npy" "$golden/tag.kvt"
rm "$work/new/npy/positions.npy" "$work/new/npy/token_ids.npy"
run 0 dump $one --npy "$work/new/npy" --output "$work/new/npy/k.npy" --safetensors "$work/new/npy/k.st" "$golden/tag.kvt"
ln "$work/new/npy/k.npy" "$work/new/npy/hard.npy" # other names get files of their own
run 0 dump $one --force --output "$work/new/npy/k.npy" --safetensors "$work/new/npy/hard.npy" "$golden/tag.kvt"
cmp "$work/new/npy/k.st" "$work/new/npy/hard.npy" && cmp "$work/new/npy/k.npy" "$work/new/npy/layers.0.k.npy" ||
    fails "two names of a file"
if [ -e /dev/stdout ]; then
    run 2 dump $one --json --output /dev/stdout "$golden/tag.kvt"
    says err '^kvtile: /dev/stdout: is the standard output, which --json writes to'
    json
    "$tool" dump $one --json --output /dev/stdout "$golden/tag.kvt" 2>"$work/err" | cat >"$work/out"
    json
    refuses 2 '/dev/stdout: is the output - too' dump $one --output - --safetensors /dev/stdout "$golden/tag.kvt"
fi
"$tool" dump $one --json --force --npy "$work/new/npy" "$golden/tag.kvt" >>"$work/new/npy/token_ids.npy" 2>"$work/err"
[ $? -eq 2 ] || fails "stdout is an array"
says err 'token_ids.npy: is the standard output, which --json writes to'
leaves g npy

# ---- inputs that are pipes ----
if [ -e /dev/stdin ] && command -v timeout >/dev/null 2>&1 && mkfifo "$work/pipe"; then
    printf '#!/bin/sh\nexec timeout -s KILL 20 "%s" "$@"\n' "$tool" >"$work/limited" # to open it again may block
    chmod +x "$work/limited"
    whole=$tool tool=$work/limited
    for how in "dump /dev/stdin" "diff $golden/i8.kvt /dev/stdin" "diff /dev/stdin $golden/i8.kvt" \
        "convert /dev/stdin $work/new/x" "merge /dev/stdin $work/new/x"; do
        cat "$golden/i8.kvt" >"$work/pipe" &
        {
            refuses 3 '/dev/stdin: not a regular file: it is read more than once' $how
            cmp - "$golden/i8.kvt" || fails "$how: the pipe was read"
        } <"$work/pipe"
        wait
    done
    for command in verify info; do
        cat "$golden/i8.kvt" >"$work/pipe" &
        run 0 $command /dev/stdin <"$work/pipe"
        wait
    done
    tool=$whole
    leaves
fi

# ---- diff ----
run 0 diff "$golden/i8.kvt" "$golden/i8.kvt"
says out 'are equal: 300 tokens$'
run 0 diff --json "$golden/window.kvt" "$golden/window.kvt"
says out '"equal":true,"same":{"fingerprint":true,"geometry":true,"types":true,"tag":true,"next_position":true,"checkpoints":true,"pieces":true},"n_tokens":\[400,400\],"equal_token_ids":400,"equal_positions":400,"checkpoints":\[\],"pieces":\[\],"layers":\[\]}$'
json
"$make" "$work/a.kvt" 400 && "$make" "$work/b.kvt" 400 300 || fails "$make"
run 1 diff "$work/a.kvt" "$work/b.kvt"
says out 'the first 400 have equal ids, the first 400 equal positions'
says out 'layer 1 K: 64 tokens in 1 block differ, the first is 256, by up to '
says out 'layer 1 V: 1 token in 1 block differs, the first is 300, by up to '
grep -q 'layer 0' "$work/out" && fails "layer 0 does not differ"
run 1 diff --json "$work/a.kvt" "$work/b.kvt"
says out '"equal":false,.*"layers":\[{"layer":1,"side":"k","compared":true,"tokens":64,"blocks":1,"released":0,"first":256,'
json
run 1 diff --quiet "$work/a.kvt" "$work/b.kvt"
silent out
"$make" "$work/a.kvt" 100 100 && "$make" "$work/b.kvt" 100 101 || fails "$make"
run 1 diff --json "$work/a.kvt" "$work/b.kvt" # the blobs of their checkpoints
says out '"tag":true,"next_position":true,"checkpoints":false,.*"checkpoints":\[{"tokens":100,"blob":false,"next_position":true,"rows":true}\],"pieces":\[\],"layers":\[\]}$'
"$make" "$work/a.kvt" 400 || fails "$make"
run 1 diff "$golden/tag.kvt" "$golden/f16-f32.kvt"
for what in 'types, ' 'tags' 'next positions' 'geometries'; do
    says out "  $what.* differ"
done
run 1 diff "$work/a.kvt" "$golden/i8.kvt"
says out '  fingerprints differ'
run 1 diff "$golden/checkpoints.kvt" "$golden/i4-checkpoints.kvt"
says out '  checkpoints differ'
# What only a checkpoint has: a window's tokens, open blocks that are sealed since, the next position.
"$make" "points:$work/a.kvt" 640 && "$make" "points:$work/b.kvt" 640 150 || fails "$make"
run 1 diff "$work/a.kvt" "$work/b.kvt"
says out '^  checkpoint of 256 tokens: keys or values differ$'
run 1 diff --json "$work/a.kvt" "$work/b.kvt"
says out '"checkpoints":false,"pieces":true},.*"checkpoints":\[{"tokens":256,"blob":true,"next_position":true,"rows":false}\],"pieces":\[\],"layers":\[\]}$'
json
"$make" "points:$work/b.kvt" 640 '~200' || fails "$make"
run 1 diff "$work/a.kvt" "$work/b.kvt"
says out '^  checkpoint of 256 tokens: keys or values differ$'
grep -q layer "$work/out" && fails "another layer of the sequence: $(cat "$work/out")"
"$make" "points:$work/b.kvt" 640 none 300 || fails "$make"
run 1 diff "$work/a.kvt" "$work/b.kvt"
says out '^  checkpoint of 256 tokens: next positions differ: 256, 300$'
run 1 diff --json "$work/a.kvt" "$work/b.kvt"
says out '"checkpoints":\[{"tokens":256,"blob":true,"next_position":false,"rows":true}\]'
"$make" "points:$work/b.kvt" 640 || fails "$make"
run 0 diff "$work/a.kvt" "$work/b.kvt"
"$make" "$work/a.kvt" 400 || fails "$make"
refuses 3 'missing.kvt: .*No such file' diff "$golden/i8.kvt" "$work/missing.kvt"

# ---- convert ----
run 0 convert --codec raw --progress "$golden/checkpoints.kvt" "$work/new/raw.kvt"
says out 'raw.kvt: 410 tokens, [0-9]* bytes'
says err 'converting 100%$'
run 0 verify "$work/new/raw.kvt"
run 0 diff "$golden/checkpoints.kvt" "$work/new/raw.kvt"
[ "$(wc -c <"$work/new/raw.kvt")" -gt "$(wc -c <"$golden/checkpoints.kvt")" ] || fails "--codec raw"
run 0 convert --level 19 --codec auto "$work/new/raw.kvt" "$work/new/small.kvt"
run 0 diff "$golden/checkpoints.kvt" "$work/new/small.kvt"
run 0 convert --json --tokens 200 "$golden/i8.kvt" "$work/new/part.kvt"
says out '"status":0,"ok":true,"output":"[^"]*part.kvt","n_tokens":200,"file_bytes":[0-9]*}$'
json
run 0 info "$work/new/part.kvt"
says out 'tokens  *200 in '
refuses 3 'part.kvt: is there already' convert "$golden/i8.kvt" "$work/new/part.kvt"
refuses 2 'it has 300 tokens, not 0:301' convert --tokens 301 "$golden/i8.kvt" "$work/new/x.kvt"
refuses 1 'flipped.kvt: .*block 1' convert "$work/flipped.kvt" "$work/new/x.kvt"
refuses 3 'no/x: .*No such file or directory$' convert "$golden/tag.kvt" "$work/new/no/x"
# A name that the library's text has no room for; the input's begins with the same letters, or not.
long=$work/new/$(printf '%0250d' 0)
mkdir "$long"
cp "$golden/tag.kvt" "$long/in.kvt"
refuses 3 '0/no/x: opening its folder failed: No such file or directory$' convert "$golden/tag.kvt" "$long/no/x"
refuses 3 '0/no/x: opening its folder failed: No such file or directory$' convert "$long/in.kvt" "$long/no/x"
refuses 3 '0/no.kvt: open failed: No such file or directory$' convert "$long/no.kvt" "$long/x"
rm -r "$long"
if [ "$(id -u)" -ne 0 ]; then
    mkdir "$work/new/there" && : >"$work/new/there/x" && chmod 500 "$work/new/there"
    refuses 3 'there/x: .*Permission denied (make the folder writable)$' convert --force "$golden/tag.kvt" "$work/new/there/x"
    chmod 700 "$work/new/there" && rm -r "$work/new/there"
elif setpriv --reuid 54321 --regid 54322 --clear-groups "$tool" info "$golden/tag.kvt" >"$work/out" 2>&1; then
    mkdir "$work/new/there" && : >"$work/new/there/x" && chmod 755 "$work" "$work/new"
    setpriv --reuid 54321 --regid 54322 --clear-groups "$tool" convert --force "$golden/tag.kvt" \
        "$work/new/there/x" 2>"$work/err" && fails "a folder of another user"
    says err 'there/x: .*Permission denied (make the folder writable)$'
    rm -r "$work/new/there"
fi
run 0 convert --force --quiet "$golden/i8.kvt" "$work/new/part.kvt"
silent out
run 0 diff --quiet "$golden/i8.kvt" "$work/new/part.kvt"
run 0 convert --force --tokens 100 "$work/new/part.kvt" "$work/new/part.kvt" # onto itself
run 0 verify "$work/new/part.kvt"
says out 'sound, 100 tokens'
leaves part.kvt raw.kvt small.kvt
ln -s there/part.kvt "$work/new/link"
refuses 3 'link: .*link.*: No such' convert --force "$golden/i8.kvt" "$work/new/link"
mkdir "$work/new/there"
cp "$golden/tag.kvt" "$work/new/there/part.kvt"
chmod 640 "$work/new/there/part.kvt"
run 0 convert --force "$golden/i8.kvt" "$work/new/link"
[ -h "$work/new/link" ] || fails "convert --force: the link was replaced"
[ "$(ls -A "$work/new/there")" = part.kvt ] || fails "files: $(ls -A "$work/new/there")"
run 0 diff "$golden/i8.kvt" "$work/new/there/part.kvt"
case $(ls -l "$work/new/there/part.kvt") in -rw-r-----*) ;; *) fails "another mode" ;; esac
(umask 026 && "$tool" convert --quiet "$golden/i8.kvt" "$work/new/x")
case $(ls -l "$work/new/x") in -rw-r-----*) ;; *) fails "another mode: $(ls -l "$work/new/x")" ;; esac
leaves link there x
# Some tokens, some layers, other types.
run 0 convert --tokens 64:200 "$golden/f16-f32.kvt" "$work/new/x.kvt" --tokens 64: --quiet
run 0 dump --json "$work/new/x.kvt"
says out '"n_tokens":2,.*"token_ids":\[368,-1\],"positions":\[70,71\]'
refuses 2 'a multiple of 64, not at 10' convert --tokens 10: "$golden/i8.kvt" "$work/new/y.kvt"
for range in 0:256 256 64: 64:256; do
    refuses 2 'window.kvt: a window has released tokens .*(--tokens [1:]' convert --tokens $range "$golden/window.kvt" "$work/new/y.kvt"
done
says err '(--tokens 192: has those behind)$'
run 0 convert --tokens 192: --quiet "$golden/window.kvt" "$work/new/x.kvt" --force
refuses 2 '(--tokens :273 or more can be had)$' convert --tokens 272 "$golden/window.kvt" "$work/new/y.kvt"
run 0 convert --tokens 273 --quiet "$golden/window.kvt" "$work/new/x.kvt" --force
run 0 convert --layer 1 --tokens 64: --quiet "$golden/checkpoints.kvt" "$work/new/x.kvt" --force # no window
refuses 2 'which are none' convert --tokens 64:64 "$golden/i8.kvt" "$work/new/y.kvt"
refuses 2 'none of number 3' convert --layer 3 "$golden/i8.kvt" "$work/new/y.kvt"
run 0 convert --layer 2 --layer=0 "$golden/groups.kvt" "$work/new/two.kvt"
run 0 info --json "$work/new/two.kvt"
says out '"groups":\[{"n_layers":2,"layers":\[0,1\],[^{]*"k_type":"i8",[^{]*}\]'
for layer in 0 1; do
    "$tool" dump --output - --layer $layer --side v "$work/new/two.kvt" >"$work/new/v$layer.npy"
    "$tool" dump --output - --layer $((2 * layer)) --side v "$golden/groups.kvt" | cmp - "$work/new/v$layer.npy" ||
        fails "--layer of convert: layer $layer"
done
run 0 convert --layer 1 --k-type f16 "$golden/groups.kvt" "$work/new/one.kvt"
run 0 info --json "$work/new/one.kvt"
says out '"groups":\[{"n_layers":1,"layers":\[0\],[^{]*"k_type":"f16","v_type":"i8"[^{]*}\]'
run 0 convert --k-type i8 --v-type i4 "$golden/f16-f32.kvt" "$work/new/types.kvt"
run 0 info --json "$work/new/types.kvt"
says out '"k_type":"i8","v_type":"i4"'
run 1 diff "$golden/f16-f32.kvt" "$work/new/types.kvt"
says out '  types, flags or rotations differ'
run 0 convert --k-type f32 --v-type f16 "$golden/v-in-k.kvt" "$work/new/f32.kvt" # V is K's
run 0 info --json "$work/new/f32.kvt"
says out '"k_type":"f32","v_type":"f32"'
run 1 diff --json "$golden/v-in-k.kvt" "$work/new/f32.kvt"
says out '"types":false.*"layers":\[\]}$' # f32 has the values that i8 has
leaves f32.kvt one.kvt two.kvt types.kvt v0.npy v1.npy x.kvt

# ---- deltas ----
"$make" "$work/new/first.kvt" 300 && "$make" "$work/new/second.kvt" 500 none "$work/new/first.kvt" &&
    "$make" "$work/new/third.kvt" 640 none "$work/new/second.kvt" && "$make" "$work/whole.kvt" 640 ||
    fails "$make"
run 0 info "$work/new/third.kvt"
says out 'parent  *"second.kvt", [0-9a-f]\{32\}$'
says out 'inherited  *500 tokens, [1-9][0-9]* blocks; parents: 2$'
says out 'piece  *5 bytes: "title"$'
run 0 info --json "$work/new/second.kvt"
says out '"depth":1,"parent_name":"first.kvt","parent_id":"[0-9a-f]\{32\}","inherited_tokens":300,'
says out '"pieces":\[{"name":"title","bytes":5}\]'
id=$(sed 's/.*"parent_id":"\([0-9a-f]*\)".*/\1/' "$work/out")
json
run 0 info --json "$work/new/first.kvt"
says out "\"snapshot_id\":\"$id\""
says out '"depth":0,"parent_name":"","parent_id":"","inherited_tokens":0,'
run 0 verify "$work/new/first.kvt" "$work/new/second.kvt" "$work/new/third.kvt"
run 1 diff "$work/whole.kvt" "$work/new/third.kvt" # which has a piece
says out '^  piece "title": 5 bytes, in the second file alone$'
grep -q layer "$work/out" && fails "layers differ: $(cat "$work/out")"
run 1 diff --json "$work/new/third.kvt" "$work/whole.kvt"
says out '"next_position":true,"checkpoints":true,"pieces":false},.*"pieces":\[{"name":"title","bytes":\[5,null\]}\],"layers":\[\]}$'
json
"$make" "$work/new/other.kvt" 640 none "$work/new/second.kvt" other || fails "$make"
run 1 diff "$work/new/other.kvt" "$work/new/third.kvt"
says out '^  piece "title": 5 bytes, 5 bytes, which differ$'
"$make" "$work/new/other.kvt" 640 none "$work/new/second.kvt" longer || fails "$make"
run 1 diff --json "$work/new/other.kvt" "$work/new/third.kvt"
says out '"pieces":\[{"name":"title","bytes":\[6,5\]}\]'
rm "$work/new/other.kvt"
run 0 merge --json "$work/new/third.kvt" "$work/new/merged.kvt"
says out '"ok":true,"output":"[^"]*merged.kvt","n_tokens":640,"file_bytes":[0-9]*}$'
run 0 merge --codec raw "$work/new/second.kvt" "$work/new/merged2.kvt"
says out 'merged2.kvt: 500 tokens'
run 0 diff "$work/new/third.kvt" "$work/new/merged.kvt"
# Not over one of its parents: what else has that for a parent would be lost.
refuses 2 'first.kvt: .*the output is a parent' merge --force "$work/new/third.kvt" "$work/new/first.kvt"
run 0 verify "$work/new/third.kvt"
# In its own place: another codec leaves the deltas of a file that is none, a fold does not.
run 0 convert --force --codec raw "$work/new/first.kvt" "$work/new/first.kvt"
run 0 verify "$work/new/second.kvt" "$work/new/third.kvt"
cp "$work/new/second.kvt" "$work/new/kept.kvt"
run 0 merge --force "$work/new/second.kvt" "$work/new/second.kvt"
refuses 3 'third.kvt: .*another snapshot .*second.kvt' verify "$work/new/third.kvt"
mv "$work/new/kept.kvt" "$work/new/second.kvt"
run 0 verify "$work/new/third.kvt"
chmod 600 "$work/new/merged2.kvt" # what is replaced keeps its permissions
run 0 merge --force "$work/new/third.kvt" "$work/new/merged2.kvt"
[ "$(stat -c %a "$work/new/merged2.kvt")" = 600 ] || fails "permissions of a file that was replaced"
run 0 merge --force --codec raw "$work/new/second.kvt" "$work/new/merged2.kvt"
rm "$work/new/first.kvt"
run 1 diff --json "$work/whole.kvt" "$work/new/merged.kvt"
says out '"layers":\[\]}$'
run 0 info "$work/new/merged.kvt"
says out 'piece  *5 bytes: "title"$'
grep -q parent "$work/out" && fails "a merged file has a parent"
refuses 3 'third.kvt: .*No such file.*first.kvt' merge "$work/new/third.kvt" "$work/new/x.kvt"
refuses 3 'third.kvt: .*No such file.*first.kvt' verify "$work/new/third.kvt"
# The input is named even where the output's name is a part of the text.
(cd "$work/new" && "$tool" merge third.kvt t) 2>"$work/err"
says err '^kvtile: third.kvt: .*No such file.*first.kvt$'
cp "$work/whole.kvt" "$work/new/first.kvt" # another file of that name
refuses 3 'third.kvt: .*first.kvt' verify "$work/new/third.kvt"
refuses 3 'merged.kvt: is there already' merge "$work/new/third.kvt" "$work/new/merged.kvt"
leaves first.kvt merged.kvt merged2.kvt second.kvt third.kvt

# ---- keys ----
printf '0123456789abcdef0123456789ABCDEF0123456789abcdef0123456789abcdef\n' >"$work/key"
printf '01234567890123456789012345678901' >"$work/key2"
for text in '' short '0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdeg' \
    '0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0'; do
    printf '%s' "$text" >"$work/bad"
    refuses 3 'bad: no key' info --key-file "$work/bad" "$golden/i8.kvt"
done
refuses 3 'nokey: the key cannot be opened: No such file' info --key-file "$work/nokey" "$golden/i8.kvt"
refuses 3 'the key cannot be read: Is a directory' info --key-file "$work" "$golden/i8.kvt"
"$tool" convert "$golden/i8.kvt" "$work/new/crypt.kvt" --new-key-file "$work/key" >"$work/out" 2>"$work/err"
if grep -q libsodium "$work/err"; then
    echo "skipped: encryption, without libsodium"
else
    says out 'crypt.kvt: 300 tokens'
    refuses 3 'crypt.kvt: .*a key is needed' info "$work/new/crypt.kvt"
    refuses 3 'crypt.kvt: .*another key' info --key-file "$work/key2" "$work/new/crypt.kvt"
    refuses 3 'i8.kvt: .*not encrypted' info --key-file "$work/key2" "$golden/i8.kvt"
    run 0 info --key-file "$work/key" "$work/new/crypt.kvt"
    says out 'version  *1, encrypted$'
    bytes=$(wc -c <"$work/new/crypt.kvt") # of the file, not of what is encrypted in it
    run 0 info --json --key-file "$work/key" "$work/new/crypt.kvt"
    says out '"encrypted":true,'
    says out "\"file_bytes\":$bytes,"
    run 0 verify --key-file "$work/key" "$work/new/crypt.kvt"
    says out "crypt.kvt: sound, 300 tokens, $bytes bytes\$"
    run 0 dump --key-file "$work/key" --tokens 1 "$work/new/crypt.kvt"
    run 0 convert --key-file "$work/key" "$work/new/crypt.kvt" "$work/new/same.kvt" # the key stays
    run 0 diff --key-file "$work/key" "$work/new/crypt.kvt" "$work/new/same.kvt"
    run 0 merge --key-file "$work/key" --new-key-file "$work/key2" "$work/new/crypt.kvt" "$work/new/new.kvt"
    refuses 3 'another key' info --key-file "$work/key" "$work/new/new.kvt"
    run 0 convert --key-file "$work/key2" --decrypt "$work/new/new.kvt" "$work/new/plain.kvt"
    run 0 diff "$golden/i8.kvt" "$work/new/plain.kvt"
    leaves crypt.kvt new.kvt plain.kvt same.kvt
fi

# ---- outputs that fail ----
# A write error on a full disk is an error of the tool.
if [ -c /dev/full ] && [ -w /dev/full ]; then
    for command in info dump diff; do
        "$tool" $command "$golden/i8.kvt" $([ $command = diff ] && echo "$golden/i8.kvt") \
            >/dev/full 2>"$work/err"
        [ $? -eq 3 ] || fails "$command: a full disk was not noticed"
        says err '^kvtile: stdout: cannot be written$'
    done
    refuses 3 '/dev/full: cannot be written: No space' dump --safetensors /dev/full "$golden/i8.kvt"
    refuses 3 '/dev/full: cannot be written: No space' dump --output /dev/full --layer 0 --side k "$golden/i8.kvt"
    refuses 3 '/dev/full: not a regular file' convert "$golden/i8.kvt" /dev/full
fi
"$make" "$work/big.kvt" 60000 || fails "$make" # 245 MB as f32
# Started with standard descriptors that are closed: no file that is opened gets their numbers.
"$tool" convert --progress --quiet --level 9 "$work/big.kvt" "$work/new/y" 0<&- 2>&- || fails "convert without stderr"
run 0 diff --quiet "$work/big.kvt" "$work/new/y"
leaves y
"$tool" dump --json --layer 0 --side k --output "$work/new/x" "$golden/tag.kvt" >&- 2>"$work/err"
[ $? -eq 3 ] || fails "a closed stdout was not noticed"
says err '^kvtile: stdout: cannot be written$'
[ "$(wc -l <"$work/err")" -eq 1 ] || fails "not one line: $(cat "$work/err")"
"$tool" dump --output - --layer 0 --side k "$golden/tag.kvt" 0<&- >&- 2>"$work/err"
[ $? -eq 3 ] || fails "a closed stdout was not noticed"
says err '^kvtile: -: cannot be written: Bad file descriptor$'
leaves x
if [ -e /dev/stdout ]; then
    "$tool" dump --safetensors /dev/stdout "$golden/tag.kvt" >&- 2>"$work/err"
    [ $? -eq 3 ] || fails "an output was written to a closed stdout"
fi
if (ulimit -f 4000) 2>/dev/null; then # a limit on the size of files, met on the way
    for how in "dump --safetensors" "convert --force" convert; do
        case $how in dump*) set -- $how "$work/new/x" "$work/big.kvt" ;; *) set -- $how "$work/big.kvt" "$work/new/x" ;; esac
        (ulimit -f 4000; exec "$tool" "$@" >"$work/out" 2>"$work/err")
        [ $? -eq 3 ] || fails "$how: a limit on files was not noticed"
        says err '^kvtile: .*new/x: .*: File too large$'
        leaves
    done
    for there in '' x; do # the folder of arrays goes again if it was made, and is empty
        [ -z "$there" ] || mkdir "$work/new/x"
        (ulimit -f 4; exec "$tool" dump --npy "$work/new/x" "$work/big.kvt" >"$work/out" 2>"$work/err")
        [ $? -eq 3 ] || fails "dump --npy: a limit on files was not noticed"
        says err '^kvtile: .*new/x/token_ids.npy: .*: File too large$'
        leaves $there
    done
    (ulimit -f 4000; exec "$tool" dump --npy "$work/new/x" "$work/big.kvt" >"$work/out" 2>"$work/err")
    says err '^kvtile: .*new/x/layers.0.k.npy: .*: File too large$'
    [ "$(ls -A "$work/new/x" | tr '\n' ' ')" = 'positions.npy token_ids.npy ' ] || fails "arrays: $(ls -A "$work/new/x")"
    leaves x
fi
if [ "$(id -u)" -ne 0 ]; then
    chmod 500 "$work/new"
    refuses 3 'new/x: cannot be created: Permission denied' dump --safetensors "$work/new/x" "$golden/i8.kvt"
    chmod 700 "$work/new"
fi
# A signal: no temporary is left, and the tool ends by it. (What is started with & ignores QUIT.)
default=
env --default-signal=QUIT true 2>/dev/null && default='env --default-signal=QUIT'
for how in "TERM dump --safetensors" "TERM dump --npy" "TERM convert --level=19" "HUP dump --npy" \
    "QUIT convert --level=19" "ALRM dump --npy" "XCPU convert --level=19" "USR1 dump --npy" "USR2 dump --npy"; do
    signal=${how%% *} how=${how#* }
    [ "$signal" = QUIT ] && [ -z "$default" ] && continue
    case $how in dump*) set -- $how "$work/new/x" "$work/big.kvt" ;; *) set -- $how "$work/big.kvt" "$work/new/x" ;; esac
    (ulimit -c 0; exec $default "$tool" "$@" >"$work/out" 2>"$work/err") &
    pid=$!
    i=0 # the temporary is there before the signal
    until [ -n "$(find "$work/new" -name '.*kvtile*' -o -name '.*tmp*' 2>/dev/null)" ] || [ $i -ge 500 ]; do
        i=$((i + 1))
        sleep 0.01
    done
    kill -$signal $pid
    wait $pid 2>/dev/null
    code=$?
    [ $code -gt 128 ] && [ "$(kill -l $code)" = $signal ] || fails "$how: exit code $code after $signal"
    says err ': interrupted$'
    [ -z "$(find "$work/new" -name '.*kvtile*' -o -name '.*tmp*')" ] || fails "$how: a temporary is left: $(find "$work/new")"
    [ -z "$(find "$work/new" -mindepth 1 -type d -empty)" ] || fails "$how: an empty folder is left"
    rm -rf "$work/new" && mkdir "$work/new"
done
# Nobody reads the progress, or the array, any more.
if [ "$(trap - PIPE && sh -c 'kill -PIPE $$; echo ignored')" != ignored ] && mkfifo "$work/errors"; then
    for how in "dump --npy" "convert --level=19"; do
        case $how in dump*) set -- $how "$work/new/x" "$work/big.kvt" ;; *) set -- $how "$work/big.kvt" "$work/new/x" ;; esac
        head -n 1 <"$work/errors" >"$work/out" &
        "$tool" "$@" --progress 2>"$work/errors"
        code=$?
        wait $!
        [ $code -eq 141 ] || fails "$how: exit code $code without a reader"
        [ -z "$(find "$work/new" -name '.*kvtile*')" ] || fails "$how: a temporary is left: $(find "$work/new")"
        rm -rf "$work/new" && mkdir "$work/new"
    done
    { "$tool" dump --output - --layer 0 --side k "$work/big.kvt" 2>"$work/err"; echo $? >"$work/code"; } | head -c 9 >"$work/out"
    [ "$(cat "$work/code")" -eq 141 ] || fails "dump: exit code $(cat "$work/code") without a reader"
    silent err
    { "$tool" dump --json "$work/big.kvt" 2>"$work/err"; echo $? >"$work/code"; } | head -c 9 >"$work/out"
    [ "$(cat "$work/code")" -eq 141 ] || fails "dump: exit code $(cat "$work/code") without a reader"
    silent err
    { "$tool" dump --json --npy "$work/new/x" "$golden/tag.kvt" 2>"$work/err"; echo $? >"$work/code"; } | true
    silent err
    rm -rf "$work/new" && mkdir "$work/new"
    # Where the signal is ignored it is an error of the output.
    { (trap '' PIPE; exec "$tool" dump --output - --layer 0 --side k "$work/big.kvt" 2>"$work/err"); echo $? >"$work/code"; } | head -c 9 >"$work/out"
    [ "$(cat "$work/code")" -eq 3 ] || fails "dump: exit code $(cat "$work/code") of a closed pipe"
    says err '^kvtile: -: cannot be written: Broken pipe$'
    [ "$(wc -l <"$work/err")" -eq 1 ] || fails "not one line: $(cat "$work/err")"
fi

[ $failures -eq 0 ] && rm -rf "$work"
exit $((failures != 0))
