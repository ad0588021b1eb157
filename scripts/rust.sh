# A Rust toolchain that is new enough. Source it after common.sh.
# shellcheck shell=bash

rust_needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/../Cargo.toml")

# need_rust: put a cargo that is new enough in PATH. Tried in this order: PATH, the home of the user who called sudo
# (sudo leaves that directory out of PATH), Debian's package where it is new enough (Debian 13 and later).
need_rust() {
    if new_enough cargo; then
        return 0
    fi
    local home='' candidate
    if [[ -n ${SUDO_USER:-} && $SUDO_USER != root ]]; then
        home=$(getent passwd "$SUDO_USER" | cut -d: -f6)
    fi
    if [[ -n $home && -x $home/.cargo/bin/cargo ]]; then
        # rustup's cargo looks for its toolchains below $HOME, which is root's now.
        export RUSTUP_HOME=${RUSTUP_HOME:-$home/.rustup} CARGO_HOME=${CARGO_HOME:-$home/.cargo}
        export PATH=$home/.cargo/bin:$PATH
        rust_owner=$SUDO_USER
        if new_enough cargo; then
            return 0
        fi
    fi
    candidate=$(apt-cache policy cargo 2>/dev/null | sed -n 's/^ *Candidate: *\([0-9.]*\).*/\1/p')
    # Debian numbers cargo as Rust since 1.8x; before, cargo was 0.N+1 for Rust 1.N, which is too old anyway.
    if [[ -n $candidate ]] && at_least "$candidate" "$rust_needed" && [[ $(id -u) -eq 0 ]]; then
        install_missing cargo rustc
        hash -r
        if new_enough cargo; then
            return 0
        fi
    fi
    die "Rust $rust_needed or newer is needed to build: found $(found_rust)." \
        "Install it with rustup (https://rustup.rs) as the user who calls sudo, then run this again"
}

# new_enough CARGO: whether it runs and is at least $rust_needed.
new_enough() {
    local version
    version=$("$1" --version 2>/dev/null | awk '{ print $2 }') && [[ -n $version ]] && at_least "$version" "$rust_needed"
}

# at_least VERSION LEAST
at_least() {
    [[ $(printf '%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]
}

found_rust() {
    cargo --version 2>/dev/null || echo "no cargo in PATH${SUDO_USER:+ nor in the home of $SUDO_USER}"
}

# give_back DIRECTORY...: what a build as root has made in a user's checkout and cargo directory goes to that user,
# so that the next build without sudo can write there. Call it when the build is over.
give_back() {
    local directory
    if [[ -z ${rust_owner:-} ]]; then
        return 0
    fi
    for directory in "$@" "$CARGO_HOME"; do
        if [[ -d $directory ]]; then
            find "$directory" -xdev -user root -exec chown --no-dereference "$rust_owner:" {} +
        fi
    done
}

# build_release ROOT: build the release binary of the checkout at ROOT and print its path.
build_release() {
    local root=$1 target
    need_rust
    target=${CARGO_TARGET_DIR:-$root/target}
    (cd "$root" && cargo build --release --locked >&2) || die "the build failed (cargo's output is above)"
    give_back "$target"
    readlink -f "$target/release/qm-hotplug"
}
