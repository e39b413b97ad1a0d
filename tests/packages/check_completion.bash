# What tools/kvtile.bash offers: check_completion.bash COMPLETION KVTILE WORK_FOLDER
# Commands and options are those of `kvtile --help`.
completion=$1 kvtile=$2 work=$3
failures=0
rm -rf "$work" && mkdir -p "$work/folder" && cd "$work" || exit 1
touch "a b.kvt" other.txt folder/c.kvt
. "$completion" || exit 1

# offers WANTED WORDS...: the offers for the last of the words, sorted, "|" after each
offers() {
    local want=$1 got
    shift
    COMP_WORDS=(kvtile "$@") COMP_CWORD=$#
    COMPREPLY=()
    _kvtile
    got=$(((${#COMPREPLY[@]})) && printf '%s|' "${COMPREPLY[@]}" | tr '|' '\n' | LC_ALL=C sort | tr '\n' '|')
    if [[ $got != "$want" ]]; then
        echo "kvtile $*: offered '$got', not '$want'"
        failures=$((failures + 1))
    fi
}

offers '--help|--version|convert|diff|dump|info|merge|store|verify|' ''
offers 'verify|' ve
offers '--help|--json|--key-file|--progress|--quick|--quiet|--verify|--version|' info --
offers '--help|--json|--key-file|--progress|--quiet|--version|' verify -
offers '--help|--json|--key-file|--progress|--quiet|--version|' diff -
offers '--safetensors|--side|' dump --s
offers '--codec|' convert --c
offers '--decrypt|' merge --d
offers '' merge --k-t
offers '--k-type|--key-file|' convert --k
offers '' verify --quick
offers '--help|--version|gc|ls|stats|verify|' store ''
offers 'stats|' store s
offers '--ca-file|--cert-file|--help|--json|--key-file|--password-file|--prefix|--progress|--quiet|--sort|--version|' store ls -
offers '--ca-file|--cert-file|--help|--json|--key-file|--password-file|--prefix|--progress|--quiet|--version|' store stats -
offers '--max-bytes|' store gc --m
offers '--remove|' store verify --r
offers '--key-file|' store ls --k
offers '' store frobnicate ''
offers 'folder|' store ls ''
offers 'folder|' store verify --remove f
offers '' frobnicate ''
offers 'a b.kvt|folder|' info ''
offers 'a b.kvt|' verify --json a
offers 'a b.kvt|' diff 'a b.kvt' a
offers 'other.txt|' info o
offers 'folder/c.kvt|' info folder/
offers '' info -- --
offers 'a b.kvt|folder|' dump -- ''
# Values of options.
offers 'bf16|f16|f32|' dump --dtype ''
offers 'bf16|f16|f32|' dump --dtype = ''
offers 'f16|f32|' dump --dtype = f
offers 'k|v|' dump --side =
offers 'all|' dump --layer ''
offers '' dump --tokens ''
offers 'auto|raw|zstd|' convert --codec ''
offers '' convert --level ''
offers 'f16|f32|i4|i8|' convert --k-type ''
offers 'i4|i5|i8|' convert --v-type i
offers 'other.txt|' merge --new-key-file o
offers 'folder|' dump --npy ''
offers 'age|key|size|' store ls --sort ''
offers '' store gc --max-bytes ''
offers 'other.txt|' store stats --password-file o
offers 'other.txt|' dump --safetensors o
offers 'a b.kvt|folder|' dump --side k ''
offers 'a b.kvt|folder|' verify --side '' # not an option of this command
complete -p kvtile >/dev/null || failures=$((failures + 1))

# Each command and option of the help is offered, and the tool knows each offer.
help=$("$kvtile" --help)
for word in $(grep -oE -- '--[a-z][a-z-]*|kvtile [a-z]+ ([a-z]+ )?' <<<"$help" | sed 's/kvtile //' | tr ' ' '\n' | sort -u); do
    if ! grep -qE -- "[' ]$word[' ]" "$completion"; then
        echo "$word of the help is not offered"
        failures=$((failures + 1))
    fi
done
for word in $(grep -oE -- "(words\+?=|values=|-W )'[^']*'" "$completion" | tr -d "'" | sed -E 's/^(words\+?=|values=|-W )//'); do
    if ! grep -qE -- "(^|[^-a-z])$word([^-a-z]|$)" <<<"$help"; then
        echo "$word is offered, and not in the help"
        failures=$((failures + 1))
    fi
done
exit $((failures > 0))
