# Shell functions shared by the scripts in this directory. Source it; it does nothing by itself.
# shellcheck shell=bash

# Without it, `set -e` does not hold inside $(...): a step that fails there would go unnoticed.
shopt -s inherit_errexit

# die MESSAGE: print it to stderr and end the script with status 1.
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# say MESSAGE: progress for a person, kept apart from output that a script may read.
say() {
    printf '==> %s\n' "$*" >&2
}

# need_root NAME WHY: end the script unless it runs as root.
need_root() {
    local name=$1 why=$2
    if [[ $(id -u) -ne 0 ]]; then
        die "$name needs root: $why"
    fi
}

# install_missing PACKAGE...: install those Debian packages that are not installed yet.
# Quiet when nothing is missing, so that scripts can call it every time; needs root only when something is.
install_missing() {
    local package missing=()
    for package in "$@"; do
        # `Status` and not the exit code: removed packages with configuration left are known to dpkg too.
        if [[ $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) != installed ]]; then
            missing+=("$package")
        fi
    done
    if [[ ${#missing[@]} -eq 0 ]]; then
        return 0
    fi
    need_root "installing ${missing[*]}" "apt-get writes to the system"
    say "installing Debian packages: ${missing[*]}"

    local log apt
    log=$(mktemp)
    # Another one of these scripts, or another apt, may be at work; wait for its lock rather than fail.
    exec {apt}>/run/lock/qm-hotplug-apt
    flock "$apt"
    if ! {
        apt-get -qq -o DPkg::Lock::Timeout=300 update &&
            DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 \
                install --no-install-recommends "${missing[@]}"
    } >"$log" 2>&1 </dev/null; then
        cat "$log" >&2
        rm -f "$log"
        die "could not install: ${missing[*]} (apt's output is above)"
    fi
    exec {apt}>&-
    rm -f "$log"
}
