#!/usr/bin/env bash
# Runs the tests, as root: all tiers, or those that are named.
#   sudo scripts/test.sh [TIER...]             tiers: style unit fuzz kernel runtime readme bookworm trixie; lab is both of the last
#   sudo SKIP="lab" scripts/test.sh            all but these
# Installs the Debian packages that are missing. A tier that cannot run fails. The last line is the sum of all tests.
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
root=$(dirname "$here")
# shellcheck source=scripts/common.sh
source "$here/common.sh"
# shellcheck source=scripts/rust.sh
source "$here/rust.sh"

all_tiers=(style unit fuzz kernel runtime readme bookworm trixie)

# How long a tier may take, in seconds: one that hangs is ended and counts as failed. The first run builds the lab's image.
declare -A limit=([style]=900 [unit]=900 [fuzz]=900 [kernel]=600 [runtime]=2000 [readme]=900 [bookworm]=2900 [trixie]=2900)

# --- the tiers; each prints what its tools print ---

tier_style() {
    local failed=0 passed=0
    check cargo fmt --check
    check cargo fmt --check --manifest-path tests/fuzz/Cargo.toml
    check cargo clippy --locked --all-targets --features mock-devices -- -D warnings
    # Those that a plain `cargo test` leaves out are no part of all targets.
    check cargo clippy --locked --features fail-points --test kernel --test runtime --test lab --test readme -- -D warnings
    # With the private items, whose links are read by those who work on it.
    check env RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps --document-private-items
    local script
    for script in scripts/*.sh scripts/lab/*.sh tests/bench/*.sh .ci/run; do
        check bash -n "$script"
    done
    check unit_is_valid
    check manual_is_valid
    # Not a dependency: it is run where a developer has it.
    if command -v shellcheck >/dev/null; then
        check shellcheck --severity=warning --external-sources scripts/*.sh scripts/lab/*.sh tests/bench/*.sh .ci/run
    fi
    echo "test result: style. $passed passed; $failed failed"
    [[ $failed -eq 0 ]]
}

# check COMMAND...: counts it as a test.
check() {
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $*" >&2
    fi
}

# systemd's own check of the unit, with the program where the unit says it is.
unit_is_valid() {
    if ! command -v systemd-analyze >/dev/null; then
        echo "systemd-analyze is missing, so units/ is not checked" >&2
        return 1
    fi
    local scratch status=0
    scratch=$(mktemp -d)
    sed "s#/usr/bin/qm-hotplug#$(command -v true)#" units/qm-hotplug.service >"$scratch/qm-hotplug.service"
    cp units/qm-hotplug.socket "$scratch/"
    # What it does not know it ignores, says so, and succeeds: any word is a failure.
    systemd-analyze verify "$scratch/qm-hotplug.service" "$scratch/qm-hotplug.socket" >"$scratch/said" 2>&1 || status=1
    if [[ -s $scratch/said ]]; then
        cat "$scratch/said" >&2
        status=1
    fi
    rm -r "$scratch"
    return "$status"
}

# man's own check of the pages: whatever it warns of is a failure.
manual_is_valid() {
    local page said status=0
    for page in src/man/*; do
        said=$(LC_ALL=C.UTF-8 MANROFFSEQ='' man --warnings --encoding=UTF-8 --local-file --troff-device=utf8 --ditroff \
            "$page" 2>&1 >/dev/null) || status=1
        if [[ -n $said ]]; then
            printf '%s: %s\n' "$page" "$said" >&2
            status=1
        fi
    done
    return "$status"
}

# With the feature: the mock hook is tested here, and ships nowhere.
tier_unit() {
    cargo test --locked --features mock-devices
}

# Coverage-guided, for a short while; `scripts/fuzz.sh 300` looks longer.
tier_fuzz() {
    bash scripts/fuzz.sh 20
}

tier_kernel() {
    cargo test --locked --test kernel
}

# With the feature: the program is killed at its fail points here, and nowhere else.
tier_runtime() {
    cargo test --locked --features fail-points --test runtime
}

# Every command of README.md, and with that the demo and the installation.
tier_readme() {
    cargo test --locked --test readme
}

tier_bookworm() {
    bash scripts/lab.sh bookworm
}

tier_trixie() {
    bash scripts/lab.sh trixie
}

# --- running them ---

main() {
    local tiers=() tier
    if [[ ${1:-} == -h || ${1:-} == --help ]]; then
        sed -n '2,5s/^# \{0,3\}//p' "$0"
        return
    fi
    # Not in $(...): a wrong name shall end the script with its message once.
    names "$@"
    wanted=("${found[@]}")
    # shellcheck disable=SC2086 # SKIP is a list of words
    names ${SKIP:-none}
    for tier in "${all_tiers[@]}"; do
        if contains "$tier" "${wanted[@]}" && ! contains "$tier" "${found[@]}"; then
            tiers+=("$tier")
        fi
    done
    [[ ${#tiers[@]} -gt 0 ]] || die "no tier is left to run"

    need_root "${0##*/}" "the tests make cgroups, namespaces, device nodes and BPF programs, and install what they need"
    prepare "${tiers[@]}"
    cd "$root"
    run_tiers "${tiers[@]}"
}

# names WORD...: leaves the tiers that are meant in $found; no word means all.
names() {
    local word
    found=()
    for word in "${@:-all}"; do
        case $word in
        none) ;;
        all) found+=("${all_tiers[@]}") ;;
        lab) found+=(bookworm trixie) ;;
        *)
            contains "$word" "${all_tiers[@]}" || die "unknown tier: $word (${all_tiers[*]} lab)"
            found+=("$word")
            ;;
        esac
    done
}

# contains WORD ITEM...
contains() {
    local item
    for item in "${@:2}"; do
        if [[ $item == "$1" ]]; then
            return 0
        fi
    done
    return 1
}

prepare() {
    local tier packages=(libudev-dev pkg-config gcc libc6-dev)
    for tier in "$@"; do
        case $tier in
        style) packages+=(systemd man-db groff-base) ;;
        fuzz) packages+=(g++) ;;
        kernel) packages+=(iproute2 busybox-static) ;;
        runtime) packages+=(podman runc crun conmon busybox-static uidmap udev kmod iproute2 systemd) ;;
        # The shells are for the completion.
        readme) packages+=(podman runc crun conmon busybox-static uidmap udev kmod iproute2 bash-completion zsh fish) ;;
        bookworm | trixie) ;; # scripts/lab.sh knows what it needs
        esac
    done
    install_missing "${packages[@]}"
    need_rust
    # rustup leaves these out of its minimal profile; they are looked for now and not after minutes.
    if contains style "$@"; then
        cargo fmt --version >/dev/null 2>&1 || die "cargo fmt is missing: rustup component add rustfmt, or apt-get install rustfmt"
        cargo clippy --version >/dev/null 2>&1 || die "cargo clippy is missing: rustup component add clippy, or apt-get install rust-clippy"
    fi
}

run_tiers() {
    local tier status passed failed all_passed=0 all_failed=0 summary=()
    declare -A running=() started=()
    logs=$(mktemp -d)
    trap 'rm -rf "$logs"; give_back "${CARGO_TARGET_DIR:-$root/target}"' EXIT
    # shellcheck disable=SC2046 # one word each
    trap 'kill -TERM $(jobs -pr) || true; wait; exit 130' INT TERM
    for tier in "$@"; do
        say "tier $tier"
        start_tier "$tier"
        # An emulated machine keeps one core busy: both at once take little longer than one.
        if [[ $tier == bookworm ]] && contains trixie "$@"; then
            start_tier trixie
        fi
        # In the background too: a trap waits for what runs in the foreground, but not for `wait`.
        # One that has ended is not asked for by its number, which may be another's by now.
        if [[ " $(jobs -pr | tr '\n' ' ') " == *" ${running[$tier]} "* ]]; then
            tail --pid="${running[$tier]}" --lines=+1 --follow "$logs/$tier" &
            wait "$!" || true
        else
            cat "$logs/$tier"
        fi
        status=0
        wait "${running[$tier]}" || status=$?
        unset "running[$tier]"
        read -r passed failed < <(count "$logs/$tier")
        # The tools report what failed; what kept them from reporting at all is a failure too.
        if [[ $status -ne 0 && $failed -eq 0 ]]; then
            failed=1
            [[ $status -ne 124 ]] || echo "tier $tier was ended after ${limit[$tier]} s" >&2
        fi
        if [[ $((passed + failed)) -eq 0 ]]; then
            echo "tier $tier ran no test" >&2
            failed=1
        fi
        all_passed=$((all_passed + passed)) all_failed=$((all_failed + failed))
        summary+=("$(printf '%-9s %4d passed %4d failed %5d s' "$tier" "$passed" "$failed" "$(($(stat -c %Y "$logs/$tier") - ${started[$tier]}))")")
    done
    echo
    printf '%s\n' "${summary[@]}"
    echo "$all_passed passed, $all_failed failed"
    [[ $all_failed -eq 0 ]]
}

# start_tier TIER: unless it runs already. As a program of its own, so that the limit can end it with all that it
# started; it gets no terminal to wait at.
start_tier() {
    [[ -z ${running[$1]:-} ]] || return 0
    started[$1]=$EPOCHSECONDS
    : >"$logs/$1"
    timeout --kill-after=60 "${limit[$1]}" "$BASH" "$0" --tier "$1" </dev/null >"$logs/$1" 2>&1 &
    running[$1]=$!
}

# count LOG: the sums of all `test result:` lines, which cargo's harness and libtest-mimic write alike.
count() {
    awk '/^test result: / {
        for (i = 2; i <= NF; i++) {
            if ($i ~ /^passed/) passed += $(i - 1)
            if ($i ~ /^failed/) failed += $(i - 1)
        }
    }
    END { print passed + 0, failed + 0 }' "$1"
}

if [[ ${1:-} == --tier ]]; then
    "tier_$2"
else
    main "$@"
fi
