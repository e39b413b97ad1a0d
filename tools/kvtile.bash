# bash completion for kvtile(1)

_kvtile()
{
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}
    local command=${COMP_WORDS[1]} word ended= words= values=
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W 'info verify dump diff convert merge --help --version' -- "$current")
        return
    fi
    case $command in
    info) words='--quick --verify' ;;
    verify | diff) ;;
    dump) words='--npy --output --safetensors --dtype --layer --side --tokens --force' ;;
    convert)
        words='--codec --level --tokens --layer --k-type --v-type --new-key-file --decrypt --force' ;;
    merge) words='--codec --level --new-key-file --decrypt --force' ;;
    *) return ;;
    esac
    words+=' --json --quiet --progress --key-file --help --version'
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        [[ $word == -- ]] && ended=1
    done
    # --name=VALUE comes as three words, or two; what counts is the name.
    [[ $current == '=' ]] && current=
    [[ $previous == '=' ]] && previous=${COMP_WORDS[COMP_CWORD-2]}
    if [[ -z $ended && " $words " == *" $previous "* ]]; then
        case $previous in
        --npy)
            mapfile -t COMPREPLY < <(compgen -d -- "$current")
            compopt -o filenames 2>/dev/null
            return ;;
        --output | --safetensors | --key-file | --new-key-file)
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            compopt -o filenames 2>/dev/null
            return ;;
        --dtype) values='f32 f16 bf16' ;;
        --k-type) values='f32 f16 i8 i4' ;;
        --v-type) values='f32 f16 i8 i5 i4' ;;
        --side) values='k v' ;;
        --layer) values='all' ;;
        --codec) values='auto raw zstd' ;;
        --tokens | --level) return ;;
        esac
        if [[ $values ]]; then
            mapfile -t COMPREPLY < <(compgen -W "$values" -- "$current")
            return
        fi
    fi
    if [[ -z $ended && $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
        return
    fi
    # Snapshots and folders; any file where no name ends in .kvt: the ending is the user's choice.
    mapfile -t COMPREPLY < <(compgen -d -- "$current"; compgen -f -X '!*.kvt' -- "$current")
    ((${#COMPREPLY[@]})) || mapfile -t COMPREPLY < <(compgen -f -- "$current")
    compopt -o filenames 2>/dev/null
} && complete -F _kvtile kvtile
