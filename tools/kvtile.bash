# bash completion for kvtile(1)

_kvtile()
{
    local current=${COMP_WORDS[COMP_CWORD]} command=${COMP_WORDS[1]} word ended=
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W 'info verify --help --version' -- "$current")
        return
    fi
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        [[ $word == -- ]] && ended=1
    done
    if [[ -z $ended && $current == -* ]]; then
        case $command in
        info) mapfile -t COMPREPLY < <(compgen -W '--quick --json --help --version' -- "$current") ;;
        verify) mapfile -t COMPREPLY < <(compgen -W '--json --help --version' -- "$current") ;;
        esac
        return
    fi
    [[ $command == info || $command == verify ]] || return
    # Snapshots and folders; any file where no name ends in .kvt: the ending is the user's choice.
    mapfile -t COMPREPLY < <(compgen -d -- "$current"; compgen -f -X '!*.kvt' -- "$current")
    ((${#COMPREPLY[@]})) || mapfile -t COMPREPLY < <(compgen -f -- "$current")
    compopt -o filenames 2>/dev/null
} && complete -F _kvtile kvtile
