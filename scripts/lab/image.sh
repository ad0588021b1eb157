# The recipe of the lab's image: a Debian root file system, its kernel and a small initrd.
# Source it after common.sh. This file and its neighbours `initrd-init` and `guest/` are the cache key:
# changing any of them makes the next run build a new image.
# shellcheck shell=bash

lab_dir=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")

# lab_packages RELEASE: every package that a lab test may count on, without recommended ones.
lab_packages() {
    printf '%s\n' \
        systemd systemd-sysv udev dbus kmod linux-image-amd64 \
        podman crun runc conmon netavark uidmap \
        docker.io containerd lxc systemd-container \
        busybox-static bpftool iproute2 ca-certificates \
        libinput-tools v4l-utils alsa-utils python3-pyudev
    # In bookworm the client is a part of docker.io, and there is a CRIU that Podman's runc can call. Its policy of SELinux
    # knows no containers, and Incus is not in it.
    if [[ $1 == bookworm ]]; then
        echo criu
    else
        printf '%s\n' docker-cli docker-compose incus-base incus-client selinux-policy-default policycoreutils selinux-utils
    fi
}

# What the initrd loads before the root file system can be mounted.
initrd_modules=(virtio_pci virtio_blk ext4)

# lab_image_key RELEASE: the directory name of the image made by the recipe as it is now.
lab_image_key() {
    local hash
    hash=$(cd "$lab_dir" && find image.sh initrd-init guest -type f -print0 | LC_ALL=C sort -z |
        xargs -0 sha256sum | sha256sum | cut -c1-12)
    printf '%s-%s\n' "$1" "$hash"
}

# lab_image RELEASE: print the directory with root.ext4, vmlinuz and initrd, building it when it is not there.
lab_image() {
    local release=$1 cache=${QMH_LAB_CACHE:-/var/cache/qm-hotplug-lab} image
    image=$cache/$(lab_image_key "$release")
    mkdir -p "$cache"
    # Two runs at once: the second waits and finds the image of the first.
    exec {lab_lock}>"$cache/lock-$release"
    flock "$lab_lock"
    if [[ ! -e $image/root.ext4 ]]; then
        build_image "$release" "$image" >&2
        local old
        for old in "$cache/$release"-*; do
            [[ $old == "$image" ]] || rm -rf --one-file-system "$old"
        done
    fi
    exec {lab_lock}>&-
    printf '%s\n' "$image"
}

build_image() {
    local release=$1 image=$2 work started=$SECONDS
    say "building the $release image (some minutes, once)"
    work=$(mktemp -d "$image.tmp.XXXXXX")
    # One file system: should a mount of the bootstrap be left over, nothing below it is deleted.
    # shellcheck disable=SC2064 # the path of now is meant
    trap "rm -rf --one-file-system '$work'" EXIT

    bootstrap "$release" "$work/root" >"$work/log" 2>&1 || {
        tail -n 50 "$work/log"
        die "could not build the root file system of $release (mmdebstrap's last lines are above)"
    }
    customize "$work/root"
    make_initrd "$work/root" "$work/initrd-root" "$work/initrd"
    cp "$work"/root/boot/vmlinuz-* "$work/vmlinuz"
    # No journal: every boot starts from this file and throws its changes away.
    truncate -s 4G "$work/root.ext4"
    mkfs.ext4 -q -F -m 0 -L lab -O ^has_journal -d "$work/root" "$work/root.ext4"
    rm -rf --one-file-system "$work/root" "$work/initrd-root" "$work/log"
    chmod 0755 "$work"
    mv -T "$work" "$image"
    trap - EXIT
    say "built $image in $((SECONDS - started)) s"
}

# lab_sources RELEASE: sources.list lines, from the mirror that this machine's apt uses for Debian.
lab_sources() {
    local release=$1 main security options
    options='[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]'
    main=$(host_mirror '|Debian|main|' '-(security|updates|backports)')
    security=$(host_mirror '-security|Debian|main|' '')
    printf 'deb %s %s %s main\n' "$options" "${main:-http://deb.debian.org/debian}" "$release"
    if [[ -n $security ]]; then
        printf 'deb %s %s %s-security main\n' "$options" "$security" "$release"
    fi
}

# host_mirror TEXT NOT: the first repository URI of this machine whose description has TEXT and does not match NOT.
host_mirror() {
    apt-get indextargets --format '$(CODENAME)|$(ORIGIN)|$(COMPONENT)| $(REPO_URI)' 'Created-By: Packages' |
        { grep -F -e "$1" || true; } | { if [[ -n $2 ]]; then grep -Ev -e "$2" || true; else cat; fi; } |
        awk 'NR == 1 { print $2 }'
}

bootstrap() {
    local release=$1 root=$2 options=() line
    # Proxies, certificates and date checks as the administrator set them for this machine.
    while read -r line; do
        options+=(--aptopt="$line")
    done < <(apt-config dump | grep -E '^Acquire::(http|https|ftp|Check)[^ ]* "[^"]+";$')

    # INITRD=No: the lab brings an initrd of its own, which boots faster and needs no minute to build.
    lab_sources "$release" | INITRD=No mmdebstrap --mode=root --variant=essential --format=directory \
        "${options[@]}" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --include="$(lab_packages "$release" | paste -sd,)" \
        "$release" "$root" -
}

# customize ROOT: the guest's files, no password for root, and none of the units that only cost time.
customize() {
    local root=$1
    cp -a --no-preserve=ownership "$lab_dir/guest/." "$root/"
    chown -R 0:0 "$root/usr/local" "$root/etc/systemd/system"
    mkdir -p "$root/mnt/repo" "$root/mnt/bin"
    echo lab >"$root/etc/hostname"
    echo 127.0.0.1 localhost lab >"$root/etc/hosts"
    cat >"$root/etc/fstab" <<-'FSTAB'
		/dev/vda / ext4 defaults 0 0
		repo /mnt/repo 9p trans=virtio,version=9p2000.L,msize=262144,cache=none,ro 0 0
		bin /mnt/bin 9p trans=virtio,version=9p2000.L,msize=262144,cache=none,ro 0 0
	FSTAB
    ln -sf /usr/share/zoneinfo/UTC "$root/etc/localtime"
    chroot "$root" passwd -q -d root
    # Always the same id: first-boot logic (presets, hardware database) stays out of every boot.
    echo 6c61626c61626c61626c61626c61620a >"$root/etc/machine-id"
    # The image is newer than its /usr: no "first boot after an update" work (hardware database, ldconfig) at boot.
    chroot "$root" systemd-hwdb update
    touch "$root/etc/.updated" "$root/var/.updated"
    local unit
    for unit in dpkg-db-backup.timer fstrim.timer systemd-pstore.service systemd-update-utmp.service \
        getty@tty1.service podman-auto-update.timer podman-auto-update.service podman-restart.service podman.socket; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit"
    done
    # The case that needs them starts them: they would double the time of every boot.
    for unit in docker.service docker.socket containerd.service lxc.service lxc-net.service lxcfs.service \
        incus.service incus.socket incus-startup.service incus-user.service incus-user.socket; do
        [[ ! -e $root/usr/lib/systemd/system/$unit ]] || chroot "$root" systemctl --quiet disable "$unit"
    done
    local wants=$root/etc/systemd/system/multi-user.target.wants
    mkdir -p "$wants"
    ln -s ../qmh-lab-agent.service ../qmh-lab-binary.service "$wants/"
    [[ ! -d $root/etc/selinux/default ]] || label "$root"
}

# label ROOT: what SELinux calls each file, for the machine that a case boots with it: to do so there takes minutes.
# Any other boot knows nothing of it, as Debian's kernel takes AppArmor where it is told nothing.
label() {
    local root=$1
    printf 'SELINUX=permissive\nSELINUXTYPE=default\n' >"$root/etc/selinux/config"
    # Debian's policy for Podman itself lets it start neither containers with runc nor those with a user namespace.
    echo '(typepermissive podman_t)' >"$root/root/lab.cil"
    chroot "$root" semodule --noreload --install=/root/lab.cil
    # Without /proc: from there it would learn that no file system here has labels.
    chroot "$root" setfiles -F /etc/selinux/default/contexts/files/file_contexts /
}

# make_initrd ROOT TREE OUTPUT: busybox, the modules that reach the disk, and `initrd-init`.
make_initrd() {
    local root=$1 tree=$2 output=$3 kernel module file
    kernel=$(basename "$root"/lib/modules/*)
    mkdir -p "$tree"/{bin,dev,proc,root,modules}
    cp "$root/bin/busybox" "$tree/bin/busybox"
    install -m 0755 "$lab_dir/initrd-init" "$tree/init"
    # One numbered list: dependencies come first, as modprobe prints them.
    for module in "${initrd_modules[@]}"; do
        chroot "$root" /sbin/modprobe --set-version "$kernel" --show-depends "$module"
    done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }' | while read -r file; do
        # Trixie's modules are compressed, which the kernel's plain loader does not read.
        case $file in
        *.xz) xz -dc "$root/$file" >"$tree/modules/$(basename "$file" .xz)" ;;
        *.zst) zstd -dcq "$root/$file" >"$tree/modules/$(basename "$file" .zst)" ;;
        *) cp "$root/$file" "$tree/modules/" ;;
        esac
        basename "$file" | sed -E 's/\.(xz|zst)$//' >>"$tree/modules/order"
    done
    (cd "$tree" && find . | busybox cpio -o -H newc 2>/dev/null) >"$output"
}
