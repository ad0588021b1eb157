#!/usr/bin/env bash
# Throws inputs at what reads other people's text, guided by the code that they reach. Stable Rust will do.
#   scripts/fuzz.sh [SECONDS]              each target (tests/fuzz/*.rs) for that long (default: 20)
# What was found stays in target/fuzz: corpus/TARGET goes on from there the next time, found/TARGET-* is what failed.
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
root=$(dirname "$here")
# shellcheck source=scripts/common.sh
source "$here/common.sh"
# shellcheck source=scripts/rust.sh
source "$here/rust.sh"

targets=(selector spec annotation)

# As cargo-fuzz has the compiler count: through LLVM's own pass, which needs no nightly as a sanitizer would.
counters='--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
    -Cllvm-args=-sanitizer-coverage-trace-compares'

main() {
    local seconds=${1:-20} target passed=0 failed=0
    if [[ $seconds == -h || $seconds == --help ]]; then
        sed -n '2,4s/^# \{0,3\}//p' "$0"
        return
    fi
    [[ $seconds =~ ^[1-9][0-9]*$ ]] || die "not a number of seconds: $seconds"
    install_missing g++ libc6-dev libudev-dev pkg-config # libFuzzer itself is C++
    need_rust
    directory=$(readlink -m "${CARGO_TARGET_DIR:-$root/target}")/fuzz
    build
    for target in "${targets[@]}"; do
        if fuzz "$target" "$seconds"; then
            passed=$((passed + 1))
        else
            failed=$((failed + 1))
        fi
    done
    give_back "$directory"
    echo "test result: fuzz. $passed passed; $failed failed"
    [[ $failed -eq 0 ]]
}

build() {
    # The flags are for the target alone: what runs while building has nothing to count with.
    host=$(rustc -vV | sed -n 's/^host: //p')
    (cd "$root/tests/fuzz" && RUSTFLAGS=$(tr -s ' \n' ' ' <<<"$counters") CARGO_TARGET_DIR=$directory \
        cargo build --release --target "$host") >&2 || die "the build failed (cargo's output is above)"
}

# fuzz TARGET SECONDS
fuzz() {
    local target=$1 seconds=$2 log=$directory/$1.log fixture
    mkdir -p "$directory/corpus/$target" "$directory/found"
    if [[ $target == spec ]]; then
        for fixture in "$root"/tests/fixtures/*/*/config.json; do
            cp "$fixture" "$directory/corpus/spec/$(sha1sum "$fixture" | cut -d' ' -f1)"
        done
    fi
    say "fuzz: $target for $seconds s"
    # Its own limit ends an input that takes long, timeout(1) a fuzzer that hangs.
    if ! timeout --kill-after=10 "$((seconds + 60))" "$directory/$host/release/$target" \
        -max_total_time="$seconds" -max_len=16384 -timeout=5 -rss_limit_mb=1024 -print_final_stats=1 \
        -dict="$root/tests/fuzz/words.dict" -artifact_prefix="$directory/found/$target-" \
        "$directory/corpus/$target" "$root/tests/fuzz/seeds/$target" >"$log" 2>&1 </dev/null; then
        tail -n 40 "$log" >&2
        echo "FAILED: $target (all of its output: $log)" >&2
        return 1
    fi
    awk -v target="$target" '
        /INITED|NEW|REDUCE|DONE/ { for (i = 1; i < NF; i++) if ($i == "cov:") reached = $(i + 1) }
        /number_of_executed_units/ { runs = $2 }
        END { print target ": " runs " inputs, " reached " edges reached, nothing found" }' "$log"
}

main "$@"
