#!/usr/bin/env bash
# Shows the main job: a device is plugged in while a container runs, opens inside, is unplugged and gone.
#   sudo scripts/demo.sh [--binary PATH] [--device keyboard|console]
# --binary    use this build of qm-hotplug instead of making one
# --device    keyboard: a virtual keyboard (uinput), which the container asks for by annotation (default)
#             console: a virtual console, attached by hand (default where the kernel has no uinput)
# Everything happens in a mount namespace of its own, and nothing is left behind, after Ctrl-C neither.
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
# shellcheck source=scripts/common.sh
source "$here/common.sh"
# shellcheck source=scripts/rust.sh
source "$here/rust.sh"

run_directories=(/run/qm-hotplug /run/runc /run/crun)

main() {
    local binary='' device=''
    while [[ $# -gt 0 ]]; do
        case $1 in
        --binary | --device)
            [[ -n ${2:-} ]] || die "$1 needs a value"
            declare "${1#--}=$2"
            shift 2
            ;;
        -h | --help)
            sed -n '2,7s/^# \{0,3\}//p' "$0"
            return
            ;;
        *) die "unknown option: $1 (see --help)" ;;
        esac
    done
    [[ $device =~ ^(keyboard|console|)$ ]] || die "--device is keyboard or console, not $device"
    need_root "the demo" "it starts a container, loads a BPF program and makes a device; run it with sudo"

    install_missing podman runc conmon busybox-static kmod
    if [[ -z $binary ]]; then
        install_missing libudev-dev pkg-config gcc libc6-dev
        say "building qm-hotplug"
        binary=$(build_release "$here/..")
    fi
    [[ -f $binary && -x $binary ]] || die "$binary is no program: give --binary a build of qm-hotplug"
    binary=$(readlink -f "$binary")
    be_fit "$binary"
    device=$(choose_device "$device")
    be_alone "$binary"
    exec unshare --mount --propagation private -- "$BASH" "$0" --inside "$binary" "$device"
}

# What keeps the demo from working ends it before it begins. Hooks and agent it has of its own, and a cgroup2 it mounts.
be_fit() {
    local checks
    checks=$("$1" doctor --json 2>/dev/null) || true
    if [[ $checks =~ \"topic\":\"(rights|kernel|filter|config)\",\"state\":\"problem\" ]]; then
        "$1" doctor >&2 || true
        die "this machine cannot show it yet: see each problem above"
    fi
}

# The device filter is one for the whole kernel: neither an installed agent nor a test may be at work on it.
be_alone() {
    local status
    # Tests that run the demo hold the lock themselves.
    if [[ -z ${QM_HOTPLUG_TESTS_LOCKED:-} ]]; then
        exec {lock}>/run/lock/qm-hotplug-tests
        flock --nonblock "$lock" || die "a test or another demo of qm-hotplug is running: wait for it"
    fi
    # It fails where no cgroup2 is mounted yet: then nothing can be in force either.
    status=$("$1" status --json 2>/dev/null) || return 0
    if [[ $status == *'"agent":true'* || $status != *'"grants":0'* ]]; then
        die "qm-hotplug is at work on this machine: stop it first (systemctl stop qm-hotplug, qm-hotplug agent --release)"
    fi
}

# Prints keyboard or console: the one that was asked for, or the first that this kernel can make.
choose_device() {
    if [[ $1 != console ]]; then
        # Most systems have the node and load the module when it is opened; others do not.
        modprobe --quiet uinput || true
        if [[ -c /dev/uinput ]]; then
            echo keyboard
            return
        fi
        [[ $1 != keyboard ]] || die "this kernel has no uinput, so no virtual keyboard can be made: try --device console"
        say "this kernel has no uinput, so no virtual keyboard can be made: a virtual console takes its place"
    fi
    [[ -c /dev/tty0 && -e /sys/class/vc ]] || die "this kernel has neither uinput nor virtual consoles, so no device can be hot-plugged here"
    echo console
}

# --- from here on in the mount namespace of its own ---

inside() {
    binary=$1 device=$2
    work='' made=() agent='' plugged='' number='' ended='' manager='' controllers=''
    trap clean_up EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    # The agent's log goes to a file here: in one colour, and not to the journal when this runs below a service.
    export NO_COLOR=1 LC_ALL=C
    unset JOURNAL_STREAM

    prepare
    begin
    "show_$device"
    step "that is all; cleaning up"
    clean_up
    step "nothing is left behind"
}

# What the demo sees is its own: its ledger and socket, the containers that the agent finds, Podman's locks.
prepare() {
    local directory applet
    for directory in "${run_directories[@]}"; do
        if [[ ! -d $directory ]]; then
            made+=("$directory")
            mkdir -m 0700 "$directory"
        fi
    done
    work=$(mktemp -d /tmp/qm-hotplug-demo.XXXXXX)
    for directory in "$work" "${run_directories[@]}" /dev/shm; do
        mount -t tmpfs -o mode=0700 qm-hotplug-demo "$directory"
    done
    if [[ $(stat -f -c %T /sys/fs/cgroup) != cgroup2fs ]]; then
        # A hybrid host: Podman and runc shall find the unified hierarchy where they look for it.
        mount -t cgroup2 qm-hotplug-demo /sys/fs/cgroup
    elif [[ -d /run/systemd/system && -S /run/dbus/system_bus_socket ]]; then
        manager=systemd
    fi
    if [[ -z $manager ]]; then
        if [[ ! -d /sys/fs/cgroup/libpod_parent ]]; then
            made+=(/sys/fs/cgroup/libpod_parent)
        fi
        controllers=$(</sys/fs/cgroup/cgroup.subtree_control)
        manager=cgroupfs
    fi

    mkdir -p "$work"/rootfs/{bin,dev,etc,proc,run,sys,tmp} "$work/hooks"
    cp "$(command -v busybox)" "$work/rootfs/bin/busybox"
    for applet in sh sleep ls dd mknod; do
        ln -s busybox "$work/rootfs/bin/$applet"
    done
}

# Podman with storage of its own, and without the hooks and the log of the machine.
pod() {
    podman --root "$work/storage" --runroot "$work/runroot" --tmpdir "$work/tmp" --storage-driver vfs \
        --cgroup-manager "$manager" --events-backend none --hooks-dir "$work/hooks" --runtime runc "$@"
}

# quietly COMMAND...: leaves what it prints in $said. Not $(...), in which a trap may fail to run (bash 5.2).
quietly() {
    local status=0
    ("$@") >"$work/said" 2>&1 || status=$?
    said=$(<"$work/said")
    return "$status"
}

# start NAME [OPTION...]: a container that sleeps.
start() {
    local name=$1
    shift
    # The limits: what a machine without CAP_SYS_RESOURCE can set. AppArmor: runc's own profile on Ubuntu may not
    # send signals into containers, so that they could not be ended.
    quietly pod run --detach --name "$name" --network none --log-driver none --security-opt apparmor=unconfined \
        --pids-limit=-1 --ulimit nofile=1024:1024 --ulimit nproc=1024:1024 "$@" \
        --rootfs "$work/rootfs:O" sleep 1000 || fail "the container did not start: $said"
}

# in_container NAME SHELL-LINE: its output is left in $said.
in_container() {
    quietly pod exec "$1" sh -c "$2"
}

begin() {
    local programs=''
    version "$binary" --version
    version uname -sr
    version podman --version
    version runc --version
    echo "${programs#, }"
    case $device in
    keyboard) echo "A virtual keyboard is plugged in; a running container has asked for input devices by annotation." ;;
    console) echo "A virtual console is plugged in and attached to a running container by hand." ;;
    esac
    echo
    started=${EPOCHREALTIME/[.,]/}
    last=$started
}

version() {
    quietly "$@"
    programs+=", ${said%%$'\n'*}"
}

# step TEXT: one line of the timeline: when, how long since the line before, what.
step() {
    local now=${EPOCHREALTIME/[.,]/}
    printf '%+9.3f s  %7.1f ms  %s\n' "$((now - started))e-6" "$((now - last))e-3" "$1"
    last=${EPOCHREALTIME/[.,]/}
}

fail() {
    printf '\n%s\n' "$1" >&2
    if [[ -s $work/agent.log ]]; then
        echo "the agent's last lines:" >&2
        tail -n 20 "$work/agent.log" >&2
    fi
    exit 1
}

start_agent() {
    : >"$work/agent.log"
    "$binary" agent 2>"$work/agent.log" </dev/null &
    agent=$!
    await 'INFO ready' "the agent to be ready"
    step "agent runs, events from $(sed -n 's/.*events from //p' "$work/agent.log")"
}

# await PATTERN WHAT: wait for a line of the agent's log and leave it in $heard.
await() {
    local tries
    for ((tries = 0; tries < 1000; tries++)); do
        if grep -m 1 -e "$1" "$work/agent.log" >"$work/heard"; then
            heard=$(<"$work/heard")
            return
        fi
        sleep 0.01
    done
    fail "timed out waiting for $2"
}

# micros LINE: how long the agent took from reading the event to having done it.
micros() {
    sed -n 's/.*micros=\([0-9]*\).*/\1/p' <<<"$1"
}

show_keyboard() {
    local node
    start demo --annotation org.containers.qm.device.input=true
    step "container 'demo' runs, annotated org.containers.qm.device.input=true"
    start bystander --cap-add MKNOD
    step "container 'bystander' runs, without annotation"
    start_agent
    in_container demo 'ls /dev/input 2>/dev/null' || true
    step "in demo, /dev/input has: $(tr '\n' ' ' <<<"${said:-nothing}")"

    plug_keyboard
    node=/dev/input/$(basename "$(dirname "$(dirname "$(find_keyboard)")")")
    step "PLUGGED IN: the kernel made $node"
    await "granted $node " "$node to be granted"
    step "granted to demo: event received → openable in $(micros "$heard") µs"
    show_use "$node"

    unplug_keyboard
    step "UNPLUGGED"
    show_end "$node"
}

show_console() {
    local node before
    start demo
    step "container 'demo' runs"
    start bystander --cap-add MKNOD
    step "container 'bystander' runs"
    start_agent

    plug_console
    node=/dev/vcs$number
    step "PLUGGED IN: the kernel made $node"
    before=${EPOCHREALTIME/[.,]/}
    "$binary" attach demo "$node" >"$work/attach.log" || fail "attach failed"
    before=$((${EPOCHREALTIME/[.,]/} - before))
    step "qm-hotplug attach demo $node: done, openable; the whole command took $(printf '%.1f' "${before}e-3") ms"
    show_use "$node"

    unplug_console || fail "the console /dev/tty$number stays in use"
    step "UNPLUGGED"
    show_end "$node"
}

# show_use NODE: it opens in demo, and in no other container.
show_use() {
    local node=$1 major minor
    in_container demo "exec 3<$node && ls -l $node" || fail "it does not open in demo: $said"
    step "demo opens it (through podman exec): $said"
    major=$((0x$(stat -c %t "$node"))) minor=$((0x$(stat -c %T "$node")))
    if in_container bystander "mknod /dev/copy c $major $minor && exec 3</dev/copy"; then
        fail "bystander could open it too"
    fi
    [[ $said == *'peration not permitted'* ]] || fail "bystander failed in another way: $said"
    step "bystander makes a node with the same numbers and is refused: ${said##*: }"
}

show_end() {
    local node=$1
    await "revoked $node\$\|revoked $node " "$node to be revoked"
    step "node and right are taken back: event received → gone in $(micros "$heard") µs"
    if in_container demo "ls -l $node"; then
        fail "the node is still there: $said"
    fi
    [[ $("$binary" list --json) != *"$node"* ]] || fail "the grant is still listed"
    step "in demo, $said"
}

# A keyboard with one key that is never pressed (linux/uinput.h: UI_SET_EVBIT, UI_SET_KEYBIT, struct uinput_user_dev,
# UI_DEV_CREATE). It is plugged in until its maker ends. In Perl, since every Debian and Ubuntu has perl-base.
plug_keyboard() {
    perl -e '
        open(my $device, "+<", "/dev/uinput") or die "/dev/uinput: $!\n";
        ioctl($device, 0x40045564, 1) && ioctl($device, 0x40045565, 30) or die "uinput: $!\n";
        syswrite($device, pack("Z80 S4 L x1024", "qm-hotplug demo", 6, 0, 0, 1, 0)) or die "uinput: $!\n";
        ioctl($device, 0x5501, 0) or die "uinput: $!\n";
        sleep 600;
    ' </dev/null &
    plugged=$!
    wait_until find_keyboard "the kernel's keyboard"
}

# Prints the file that holds its name, /sys/class/input/eventN/device/name.
find_keyboard() {
    grep -lsx -m 1 'qm-hotplug demo' /sys/class/input/event*/device/name
}

unplug_keyboard() {
    end_process "$plugged"
    plugged=''
}

# The kernel makes /dev/vcsN when /dev/ttyN is opened for the first time, and removes it when the console is given up.
plug_console() {
    for ((number = 63; number > 12; number--)); do
        if [[ -c /dev/tty$number && ! -e /sys/class/vc/vcs$number ]]; then
            break
        fi
    done
    [[ $number -gt 12 ]] || fail "all virtual consoles are in use"
    # A child's, so that it does not become this shell's terminal.
    sleep 600 <>"/dev/tty$number" &
    plugged=$!
    wait_until console_is_there "the kernel's console"
}

console_is_there() {
    [[ -c /dev/vcs$number ]]
}

unplug_console() {
    local tries
    end_process "$plugged"
    plugged=''
    # The kernel lets go of a closed terminal a moment later.
    for ((tries = 0; tries < 200; tries++)); do
        if busybox deallocvt "$number" 2>/dev/null; then
            # Not a bare `return`: in a trap that returns the status from before the trap.
            return 0
        fi
        sleep 0.01
    done
    return 1
}

# wait_until COMMAND WHAT
wait_until() {
    local tries
    for ((tries = 0; tries < 500; tries++)); do
        if "$1" >/dev/null; then
            return
        fi
        sleep 0.01
    done
    fail "timed out waiting for $2"
}

end_process() {
    kill -TERM "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
}

# Takes everything back, as far as it was made. Goes on after failures: what it could not do it says.
clean_up() {
    local status=$? directory controller left
    if [[ -n $ended ]]; then
        return
    fi
    ended=yes
    trap '' HUP INT TERM
    set +e
    if [[ -n $agent ]]; then
        end_process "$agent"
        "$binary" agent --release
    fi
    if [[ -n $plugged ]] && ! "unplug_$device"; then
        echo "the console /dev/tty$number stays allocated" >&2
    fi
    # An interrupted Podman may need a second call.
    if [[ -n $work && -d $work/storage ]] && ! quietly pod rm --all --force --time 0; then
        quietly pod rm --all --force --time 0 || echo "$said" >&2
    fi
    # Podman's monitors end a moment after their containers.
    for ((left = 0; left < 500; left++)); do
        [[ -n $(others_here) ]] || break
        sleep 0.01
    done
    left=$(others_here)
    [[ -z $left ]] || echo "still running: $left" >&2
    # The other mounts end with the namespace.
    if [[ -n $work ]]; then
        if mountpoint -q "$work"; then
            umount --recursive "$work"
        fi
        rmdir "$work"
    fi
    for directory in "${made[@]}"; do
        if mountpoint -q "$directory"; then
            umount "$directory"
        fi
        if [[ -d $directory ]]; then
            find "$directory" -xdev -depth -type d -exec rmdir {} +
        fi
    done
    if [[ $manager == cgroupfs ]]; then
        # What Podman switched on for its cgroups.
        for controller in $(</sys/fs/cgroup/cgroup.subtree_control); do
            if [[ " $controllers " != *" $controller "* ]]; then
                echo "-$controller" >/sys/fs/cgroup/cgroup.subtree_control
            fi
        done
    fi
    set -e
    return "$status"
}

# Prints the processes that are in this mount namespace beside this script.
others_here() {
    local process
    for process in /proc/[0-9]*; do
        if [[ ${process#/proc/} != "$$" && ${process#/proc/} != "$BASHPID" && $process/ns/mnt -ef /proc/self/ns/mnt ]]; then
            printf '%s ' "$(tr '\0' ' ' 2>/dev/null <"$process/cmdline")"
        fi
    done
}

if [[ ${1:-} == --inside ]]; then
    inside "${@:2}"
else
    main "$@"
fi
