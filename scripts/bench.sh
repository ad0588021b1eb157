#!/usr/bin/env bash
# Prints the figures, as root: all parts, or those that are named.
#   sudo scripts/bench.sh [PART...]            parts: filter hook selectors commands events many mirror
# Installs the Debian packages that are missing. Figures from a machine that does other work at the time are worth nothing.
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
root=$(dirname "$here")
# shellcheck source=scripts/common.sh
source "$here/common.sh"
# shellcheck source=scripts/rust.sh
source "$here/rust.sh"

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,4s/^# \{0,3\}//p' "$0"
    exit
fi
for part in "$@"; do
    [[ $part =~ ^(filter|hook|selectors|commands|events|many|mirror)$ ]] || die "unknown part: $part (filter hook selectors commands events many mirror)"
done
need_root "${0##*/}" "the figures are of cgroups, namespaces, device nodes, BPF programs and containers"
# jq is for a hook in shell, to compare with.
install_missing libudev-dev pkg-config gcc libc6-dev podman runc conmon busybox-static jq findutils
need_rust
cd "$root"
trap 'give_back "${CARGO_TARGET_DIR:-$root/target}"' EXIT
cargo bench --locked --bench figures -- "$@"
