#!/usr/bin/env bash
# The lab's machine, defined once for tests and people.
#   qemu.sh IMAGE-DIR BIN-DIR KERNEL-ARGUMENTS [QEMU-ARGUMENT...]
# IMAGE-DIR is what image.sh built, BIN-DIR holds qm-hotplug. The process becomes qemu, so its pid stays.
set -euo pipefail

image=$1 bin=$2 append=$3
shift 3
repo=$(readlink -f "$(dirname "$0")/../..")

# tcg: neither the machines of developers nor those of CI can be counted on to have /dev/kvm.
# One processor: emulated ones wait for each other for many milliseconds at each turn. And before qemu 8.1, one with a
#   thread of its own may translate code that another one is just patching; the guest then dies of a stale int3.
# icount: the guest's clock counts its instructions, one a nanosecond. How busy the host is changes nothing of what the guest
#   measures, and nothing there times out for it.
# norandmaps: the emulator keeps translated code by its virtual address; starting a program takes 20 ms instead of 50.
# no_timer_check: at boot the kernel counts a few ticks, and panics where a busy host has kept it from getting them.
# snapshot: writes go to a temporary file that qemu has already unlinked; the image stays as it was built.
exec qemu-system-x86_64 \
    -nodefaults -no-user-config -display none \
    -machine pc -accel "${QMH_LAB_ACCEL:-tcg}" -cpu max -smp 1 -icount shift=0 -m 2048 \
    -kernel "$image/vmlinuz" -initrd "$image/initrd" \
    -append "root=/dev/vda rw console=ttyS0 net.ifnames=0 no5lvl norandmaps no_timer_check mitigations=off random.trust_cpu=on $append" \
    -drive "file=$image/root.ext4,format=raw,if=virtio,snapshot=on,cache=unsafe" \
    -device qemu-xhci,id=usb,p2=15,p3=4 \
    -virtfs "local,path=$repo,mount_tag=repo,security_model=none,readonly=on,multidevs=remap" \
    -virtfs "local,path=$bin,mount_tag=bin,security_model=none,readonly=on,multidevs=remap" \
    -audiodev none,id=silence \
    "$@"
