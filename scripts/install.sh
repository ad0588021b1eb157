#!/usr/bin/env bash
# Installs qm-hotplug: the program, the OCI hook, the systemd service, the manual and what shells complete by.
#   scripts/install.sh [--destdir DIR] [--prefix /usr] [--binary PATH]
#   scripts/install.sh --uninstall [--destdir DIR] [--prefix /usr]
# --destdir   install below DIR, for packages; nothing is started or stopped then
# --prefix    /usr if not given: Podman looks for hooks there without being told
# --binary    install this build instead of making one
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
root=$(dirname "$here")
# shellcheck source=scripts/common.sh
source "$here/common.sh"
# shellcheck source=scripts/rust.sh
source "$here/rust.sh"

destdir='' prefix=/usr binary='' uninstall=''
while [[ $# -gt 0 ]]; do
    case $1 in
    --destdir | --prefix | --binary)
        [[ -n ${2:-} ]] || die "$1 needs a value"
        declare "${1#--}=$2"
        shift 2
        ;;
    --uninstall)
        uninstall=yes
        shift
        ;;
    -h | --help)
        sed -n '2,7s/^# \{0,3\}//p' "$0"
        exit 0
        ;;
    *) die "unknown option: $1 (see --help)" ;;
    esac
done
[[ $prefix == /* ]] || die "--prefix must be an absolute path: $prefix"
# The prefix is written into JSON, into a unit and through sed.
[[ $prefix =~ ^[A-Za-z0-9/._+-]+$ ]] || die "--prefix has characters that a unit's path cannot have: $prefix"
# One path, however many slashes it was given with.
prefix=$(realpath -ms "$prefix")
prefix=${prefix%/}
if [[ -n $destdir ]]; then
    destdir=$(realpath -ms "$destdir")
    [[ $destdir != / ]] || destdir=''
fi
if [[ -z $destdir ]]; then
    need_root "${0##*/}" "it writes below ${prefix:-/} and talks to systemd; --destdir DIR works without"
fi

program=$destdir$prefix/bin/qm-hotplug
hook=$destdir$prefix/share/containers/oci/hooks.d/qm-hotplug.json
hook_links=$destdir$prefix/libexec/oci/hooks.d
unit=$destdir$prefix/lib/systemd/system/qm-hotplug.service
socket=$destdir$prefix/lib/systemd/system/qm-hotplug.socket
group=$destdir$prefix/lib/sysusers.d/qm-hotplug.conf
manual=$destdir$prefix/share/man
bash_completion=$destdir$prefix/share/bash-completion/completions/qm-hotplug
fish_completion=$destdir$prefix/share/fish/vendor_completions.d/qm-hotplug.fish
# Debian's zsh looks for those of packages in a directory of its own.
zsh_completions=("$destdir$prefix"/share/zsh/{site-functions,vendor-completions}/_qm-hotplug)
if [[ $prefix == /usr && -e /etc/debian_version ]]; then
    zsh_completion=${zsh_completions[1]}
else
    zsh_completion=${zsh_completions[0]}
fi

# Whether this is about the running system, systemd runs it, and looks for units there.
has_systemd() {
    [[ -z $destdir && -d /run/systemd/system && $prefix =~ ^(/usr|/usr/local)$ ]]
}

# put MODE FILE < CONTENT: whole or not at all. Containers may be starting, and each starts the hook and its program.
put() {
    local mode=$1 file=$2 new
    mkdir -p "$(dirname "$file")"
    new=$(mktemp "$file.XXXXXX")
    cat >"$new"
    chmod "$mode" "$new"
    mv -fT "$new" "$file"
}

# for_prefix FILE: its text with the paths of this installation.
for_prefix() {
    sed "s#/usr/bin/qm-hotplug#$prefix/bin/qm-hotplug#" "$1"
}

# The program itself says how a shell is to ask it, so that both are always of one version.
put_completions() {
    local program=$prefix/bin/qm-hotplug
    put 0644 "$bash_completion" <<<"source <(COMPLETE=bash $program 2>/dev/null)"
    put 0644 "$fish_completion" <<<"COMPLETE=fish $program 2>/dev/null | source"
    # Read at the first Tab, which is to be answered too.
    printf '%s\n' '#compdef qm-hotplug' "source <(COMPLETE=zsh $program 2>/dev/null)" \
        '_clap_dynamic_completer_qm_hotplug "$@"' | put 0644 "$zsh_completion"
}

install_all() {
    local page
    if [[ -z $binary ]]; then
        # libudev's headers; gcc links.
        install_missing libudev-dev pkg-config gcc libc6-dev
        binary=$(build_release "$root")
    fi
    [[ -f $binary && -x $binary ]] || die "$binary is no program: give --binary a build of qm-hotplug"
    put 0755 "$program" <"$binary"
    for_prefix "$root/units/qm-hotplug.service" | put 0644 "$unit"
    put 0644 "$socket" <"$root/units/qm-hotplug.socket"
    put 0644 "$group" <"$root/units/qm-hotplug.sysusers"
    for page in "$root"/src/man/*; do
        put 0644 "$manual/man${page##*.}/${page##*/}" <"$page"
    done
    put_completions
    # Last: from here on containers are started through the program.
    for_prefix "$root/hooks/qm-hotplug.json" | put 0644 "$hook"
    say "installed $program"
    say "installed $unit, with $(basename "$socket")"
    say "installed $group"
    say "installed $hook"
    say "installed the manual below $manual: man qm-hotplug"
    if [[ $prefix != /usr ]]; then
        say "Podman looks for hooks in /usr/share/containers/oci/hooks.d: add $prefix/share/containers/oci/hooks.d to hooks_dir in containers.conf"
    fi
    if has_systemd; then
        systemd-sysusers "$group"
        systemctl daemon-reload
        # An agent that runs already: the new one takes over, and grants stay in force meanwhile.
        systemctl try-restart qm-hotplug.service
        say "start it with: systemctl enable --now qm-hotplug"
    fi
    if [[ -z $destdir ]]; then
        # What it finds is for whoever reads it: the installation itself is done.
        "$program" doctor || true
    fi
}

uninstall_all() {
    # The hook first: no container is started through a program that is about to go.
    rm -f "$hook"
    # Links by which it acts as a hook of containers/qm: an engine that finds them dangling starts nothing.
    if [[ -d $hook_links ]]; then
        find "$hook_links" -maxdepth 1 -type l -name 'oci-qm-*' -lname "$prefix/bin/qm-hotplug" -delete
    fi
    if has_systemd && [[ -e $unit ]]; then
        systemctl disable --now --quiet qm-hotplug.service qm-hotplug.socket
    fi
    if [[ -z $destdir ]]; then
        if [[ -x $program && -e /run/qm-hotplug ]]; then
            # Nodes, rights and programs of ours are in force without the agent too.
            "$program" agent --release ||
                die "not everything could be taken out (the reason is above); $program is still there to try again"
        fi
        if [[ -d /run/qm-hotplug ]]; then
            find /run/qm-hotplug -xdev -mindepth 1 -delete
            # Not there any more, but for a mount point.
            rmdir /run/qm-hotplug 2>/dev/null || true
        fi
    fi
    rm -f "$unit" "$socket" "$group" "$program" "$bash_completion" "$fish_completion" "${zsh_completions[@]}"
    # Those of an older version may have other names.
    rm -f "$manual"/man?/qm-hotplug{,-*,.toml}.?
    if has_systemd; then
        systemctl daemon-reload
        systemctl reset-failed --quiet qm-hotplug.service 2>/dev/null || true
    fi
    say "qm-hotplug is not installed any more"
}

if [[ -n $uninstall ]]; then
    uninstall_all
else
    install_all
fi
