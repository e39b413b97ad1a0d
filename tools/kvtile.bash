# bash completion for kvtile(1)

_kvtile()
{
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]}
    local command=${COMP_WORDS[1]} word ended= words= values= keys=' --key-file'
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W 'info verify dump diff convert merge store --help --version' -- "$current")
        return
    fi
    case $command in
    info) words='--quick --verify' ;;
    verify | diff) ;;
    dump) words='--npy --output --safetensors --dtype --layer --side --tokens --force' ;;
    convert)
        words='--codec --level --tokens --layer --k-type --v-type --new-key-file --decrypt --force' ;;
    merge) words='--codec --level --new-key-file --decrypt --force' ;;
    store)
        if ((COMP_CWORD == 2)); then
            mapfile -t COMPREPLY < <(compgen -W 'ls stats gc verify --help --version' -- "$current")
            return
        fi
        case ${COMP_WORDS[2]} in
        ls) words='--sort' ;;
        gc) words='--max-bytes' ;;
        verify) words='--remove' ;;
        stats) ;;
        *) return ;;
        esac
        words+=' --password-file --prefix --ca-file --cert-file'
        keys=' --key-file' ;;
    *) return ;;
    esac
    words+="$keys"
    words+=' --json --quiet --progress --help --version'
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
        --output | --safetensors | --key-file | --new-key-file | --password-file | --ca-file | \
            --cert-file)
            mapfile -t COMPREPLY < <(compgen -f -- "$current")
            compopt -o filenames 2>/dev/null
            return ;;
        --dtype) values='f32 f16 bf16' ;;
        --k-type) values='f32 f16 i8 i4' ;;
        --v-type) values='f32 f16 i8 i5 i4' ;;
        --side) values='k v' ;;
        --layer) values='all' ;;
        --codec) values='auto raw zstd' ;;
        --sort) values='key size age' ;;
        --tokens | --level | --prefix | --max-bytes) return ;;
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
    if [[ $command == store ]]; then
        mapfile -t COMPREPLY < <(compgen -d -- "$current")
        compopt -o filenames 2>/dev/null
        return
    fi
    # Snapshots and folders; any file where no name ends in .kvt: the ending is the user's choice.
    mapfile -t COMPREPLY < <(compgen -d -- "$current"; compgen -f -X '!*.kvt' -- "$current")
    ((${#COMPREPLY[@]})) || mapfile -t COMPREPLY < <(compgen -f -- "$current")
    compopt -o filenames 2>/dev/null
} && complete -F _kvtile kvtile
