#!/usr/bin/env bash
# The lab tier: an emulated Debian machine with systemd, udevd, Podman and USB hot-plug.
#   scripts/lab.sh [bookworm|trixie] [TEST-FILTER]      build what is missing and run the tests (default: bookworm)
#   scripts/lab.sh soak [RELEASE] [SECONDS]             random plugs, starts, kills and reloads, five minutes by default;
#                                                       prints a seed, which $QMH_SOAK_SEED repeats
#   scripts/lab.sh image [RELEASE]                      only build the image, print its directory
#   scripts/lab.sh shell [RELEASE]                      boot and give a root shell at the serial console
# Images are kept in $QMH_LAB_CACHE (default /var/cache/qm-hotplug-lab).
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
# shellcheck source=scripts/common.sh
source "$here/common.sh"
# shellcheck source=scripts/lab/image.sh
source "$here/lab/image.sh"

# What is tried is the same, and is built in a quarter of the time.
export CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16

is_release() {
    [[ $1 == bookworm || $1 == trixie ]]
}

prepare() {
    need_root "the lab" "mmdebstrap makes a root file system with device nodes and foreign owners"
    install_missing qemu-system-x86 qemu-system-data seabios mmdebstrap e2fsprogs busybox-static xz-utils \
        debian-archive-keyring libudev-dev pkg-config
}

# Prints the path of the release binary after building it.
build_binary() {
    (cd "$here/.." && cargo build --release --locked >&2)
    readlink -f "${CARGO_TARGET_DIR:-$here/../target}/release/qm-hotplug"
}

run_tests() {
    local release=$1 image binary
    shift
    prepare
    image=$(lab_image "$release")
    binary=$(build_binary)
    cd "$here/.."
    QMH_LAB_IMAGE=$image QMH_LAB_RELEASE=$release QMH_BIN=$binary \
        cargo test --release --locked --test lab -- "$@"
}

shell() {
    local image binary
    prepare
    image=$(lab_image "$1")
    binary=$(build_binary)
    say "root is logged in without a password; 'poweroff' ends the machine, Ctrl-A X kills it"
    exec bash "$here/lab/qemu.sh" "$image" "$(dirname "$binary")" quiet -no-reboot -serial mon:stdio
}

command=${1:-bookworm}
case $command in
image | shell)
    release=${2:-bookworm}
    is_release "$release" || die "unknown release: $release (bookworm or trixie)"
    if [[ $command == image ]]; then
        prepare
        lab_image "$release"
    else
        shell "$release"
    fi
    ;;
soak)
    release=${2:-bookworm} seconds=${3:-300}
    is_release "$release" || die "unknown release: $release (bookworm or trixie)"
    [[ $seconds =~ ^[1-9][0-9]*$ ]] || die "'$seconds' is no number of seconds"
    QMH_SOAK_SECONDS=$seconds run_tests "$release"
    ;;
-h | --help) sed -n '2,8s/^# \{0,3\}//p' "$0" ;;
bookworm | trixie)
    shift || true
    run_tests "$command" "$@"
    ;;
*) run_tests bookworm "$@" ;;
esac
