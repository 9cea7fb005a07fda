#!/bin/bash
# debian-disk.sh [--small|--guest] OUTDIR: makes, once, a bootable Debian 12 disk and its next days, as sparse raw images.
#
#   base.raw  the system as installed: MBR, one ext4 partition at 1 MiB, extlinux, console on the serial port
#   day1.raw  a day later: files added, changed and deleted, a database written
#   day2.raw  after 2,000 random updates in that database                              (not with --small)
#
# --small makes a minimal system on a smaller disk, whose day 1 is one changed file, for what must be quick.
# --guest makes a minimal system that is backed up while it runs: with the guest agent, a service that counts across both of its
# disks (guest/counter.c), and one that greets at TCP port 7 of the address that QEMU's own network expects. Instead of days it has a second disk, data.raw, an ext4 file system without partitions.
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

partition_start=1048576
root_uuid=6f1c8a52-3b7e-4d09-9a61-5e2f84c07d13
data_uuid=0d5a1c6e-8f42-4b7b-b1d9-77c3a9e2f016
here="$workspace/tests/scripts"

# `recipe` is to be raised whenever the images would come out otherwise: an older set is then made anew.
if [ "${1:-}" = --guest ]; then
    shift
    kind=guest recipe=2 disk_mib=2048 variant=minbase days=(base)
    packages=(linux-image-cloud-amd64 systemd-sysv udev qemu-guest-agent)
elif [ "${1:-}" = --small ]; then
    shift
    kind=small recipe=1 disk_mib=2048 variant=minbase days=(base day1)
    # The kernel for virtual machines has a tenth of the modules.
    packages=(linux-image-cloud-amd64 systemd-sysv udev)
else
    kind=full recipe=1 disk_mib=8192 variant= days=(base day1 day2)
    packages=(linux-image-amd64 openssh-server postgresql git gcc libc6-dev make perl python3 python3-setuptools
        man-db manpages manpages-dev tmux curl rsync strace sqlite3 locales)
fi
[ $# = 1 ] || die "usage: debian-disk.sh [--small|--guest] OUTDIR"

# The mirror is the one that apt is configured with for this release.
mirror() {
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Codename: bookworm' 'Origin: Debian' | head -n 1
}

in_tree() { chroot "$tree" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C DEBIAN_FRONTEND=noninteractive "$@"; }

install_system() {
    local from proxy=
    from="$(mirror)"
    [ -n "$from" ] || { apt-get -q update >&2; from="$(mirror)"; }
    [ -n "$from" ] || die "apt has no source for Debian 12 (bookworm)"
    eval "$(apt-config shell proxy Acquire::http::Proxy)"
    [ -z "$proxy" ] || export http_proxy="$proxy"
    mkdir -p "$cache/debs"
    debootstrap --cache-dir="$cache/debs" ${variant:+--variant=$variant} bookworm "$tree" "$from" >&2
    # No service may start on the machine that builds the disk.
    printf '#!/bin/sh\nexit 101\n' >"$tree/usr/sbin/policy-rc.d"
    chmod +x "$tree/usr/sbin/policy-rc.d"
    mount -t proc proc "$tree/proc"
    mount --bind "$cache/debs" "$tree/var/cache/apt/archives"
    in_tree apt-get -y -q -o Dpkg::Use-Pty=0 -o APT::Keep-Downloaded-Packages=true \
        install --no-install-recommends initramfs-tools zstd "${packages[@]}" </dev/null >&2
    umount "$tree/var/cache/apt/archives" "$tree/proc"
    rm -f "$tree/usr/sbin/policy-rc.d" "$tree"/var/lib/apt/lists/*_* \
        "$tree"/var/cache/apt/*.bin "$tree"/var/cache/apt/archives/*.deb
}

configure_system() {
    echo reseal-test >"$tree/etc/hostname"
    printf '127.0.0.1 localhost\n127.0.1.1 reseal-test\n' >"$tree/etc/hosts"
    echo "UUID=$root_uuid / ext4 errors=remount-ro 0 1" >"$tree/etc/fstab"
    echo 'Installed as a test disk.' >"$tree/etc/motd"
    echo 'root:test' | in_tree chpasswd
    # Empty: filled at the first boot, as on a fresh clone.
    : >"$tree/etc/machine-id"
    local kernel
    kernel="$(basename "$(echo "$tree"/boot/vmlinuz-*)")"
    mkdir -p "$tree/boot/extlinux"
    cat >"$tree/boot/extlinux/extlinux.conf" <<CONF
DEFAULT debian
PROMPT 0
TIMEOUT 0
LABEL debian
    LINUX /boot/$kernel
    INITRD /boot/${kernel/vmlinuz/initrd.img}
    APPEND root=UUID=$root_uuid ro console=ttyS0,115200
CONF
}

# Runs a command with the partition of image $1 mounted at $mnt. By offset: not every kernel scans loop devices for partitions.
with_mounted() {
    local image="$1"
    shift
    mount -o "loop,offset=$partition_start" "$image" "$mnt"
    "$@"
    sync -f "$mnt"
    umount "$mnt"
}

configure_guest() {
    gcc -O2 -Wall -Werror -static -o "$tree/usr/local/sbin/counter" "$here/guest/counter.c"
    cp "$here/guest/counter.service" "$tree/etc/systemd/system/"
    in_tree systemctl -q enable counter.service
    cp "$here/guest/"greeter{.socket,@.service} "$tree/etc/systemd/system/"
    cp "$here/guest/user.network" "$tree/etc/systemd/network/"
    in_tree systemctl -q enable greeter.socket systemd-networkd.service
    in_tree systemctl -q mask systemd-networkd-wait-online.service
    mkdir "$tree/data"
    echo "UUID=$data_uuid /data ext4 errors=remount-ro 0 2" >>"$tree/etc/fstab"
    # What wakes up by itself would make the deltas of a test differ from run to run.
    in_tree systemctl -q mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer
}

make_data() {
    truncate -s 256M "$1"
    mke2fs -q -t ext4 -U "$data_uuid" -L data -E "hash_seed=$root_uuid" "$1"
}

make_base() {
    local image="$1"
    truncate -s "${disk_mib}M" "$image"
    printf 'label: dos\nlabel-id: 0x7265736c\nstart=2048, type=83, bootable\n' | sfdisk -q "$image"
    dd if=/usr/lib/EXTLINUX/mbr.bin of="$image" bs=440 count=1 conv=notrunc status=none
    # extlinux reads neither 64-bit block numbers nor what later ext4 features change.
    mke2fs -q -t ext4 -O ^64bit,^metadata_csum,^orphan_file -U "$root_uuid" -L root -d "$tree" \
        -E "offset=$partition_start,hash_seed=$root_uuid" "$image" "$((disk_mib - 1))M"
    with_mounted "$image" extlinux --install "$mnt/boot/extlinux" >&2
}

build() {
    tree="$part/tree" mnt="$part/mnt"
    mkdir -p "$mnt"
    install_system
    configure_system
    if [ $kind = guest ]; then
        configure_guest
        make_data "$part/data.raw"
    fi
    make_base "$part/base.raw"
    local before=base day
    for day in "${days[@]:1}"; do
        cp --sparse=always "$part/$before.raw" "$part/$day.raw"
        with_mounted "$part/$day.raw" python3 "$here/days.py" "$kind" "$day" "$mnt"
        before=$day
    done
}

summary() {
    local before= day
    for day in "${days[@]}"; do
        python3 "$here/days.py" compare "${before:-/dev/null}" "$part/$day.raw"
        before="$part/$day.raw"
    done
}

mkdir -p "$1"
out="$(cd "$1" && pwd)"
part="$out/part"
if [ "$(cat "$out/complete" 2>/dev/null)" != "$kind $recipe" ]; then
    [ "$(id -u)" = 0 ] || die "run as root: it mounts and changes root"
    # In a mount namespace of its own, so that whatever ends this run, no mount is left behind.
    if [ -z "${RESEAL_DISK_NAMESPACE:-}" ]; then
        lock "disk-$kind"
        arguments=("$out")
        [ $kind = full ] || arguments=("--$kind" "$out")
        RESEAL_DISK_NAMESPACE=1 unshare --mount --propagation private "$here/debian-disk.sh" "${arguments[@]}"
        exit
    fi
    say "making the $kind disk in $out (some minutes, once)"
    rm -rf "$part" "$out/complete"
    build
    summary >"$part/summary.txt"
    mv "$part"/*.raw "$part/summary.txt" "$out/"
    rm -rf "$part"
    echo "$kind $recipe" >"$out/complete"
fi
cat "$out/summary.txt"
