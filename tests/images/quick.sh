#!/bin/bash
# The quick guest: busybox on a whole-disk ext4, an ordinary Debian kernel, the guest agent; seconds to boot under TCG.
#
# usage: quick.sh CACHE      leaves CACHE/quick.{raw,vmlinux,initrd}
#
# It stands for every guest that is not a distribution: no systemd, no udev, no package manager, no SSH, no cloud-init.
# What it answers to is written in README.md. Packages are unpacked, never installed: nothing of them runs here.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cache=$1
[[ -e $cache/quick.raw && -e $cache/quick.vmlinux && -e $cache/quick.initrd ]] && exit 0

mkdir -p "$cache"
work=$(mktemp -d "$cache/.quick.XXXXXX")
trap 'rm -rf "$work"' EXIT
debian=$work/debian root=$work/root early=$work/early

mmdebstrap --quiet --variant=extract --aptopt='APT::Install-Recommends "false"' --dpkgopt='path-exclude=/usr/share/*' \
  --include=linux-image-amd64,qemu-guest-agent,busybox-static bookworm "$debian"
release=$(cd "$debian/lib/modules" && echo *)
depmod --basedir "$debian" "$release"

# Busybox is copied to both roots; its applets are links that name it.
plant_busybox() {
  mkdir -p "$1"/{bin,sbin,dev,proc,sys,run,tmp,mnt}
  install -m 755 "$debian/bin/busybox" "$1/bin/busybox"
  local applet
  for applet in $("$debian/bin/busybox" --list); do
    [[ $applet == busybox ]] || ln -s /bin/busybox "$1/bin/$applet"
  done
}

# initrd: what stands between the kernel and the disk, plus every other driver of the machine, in loading order, so
# that no later moment of the guest depends on udev. It is not compressed: reading costs less than unpacking under TCG.
plant_busybox "$early"
mkdir -p "$early/modules"
ln -s /bin/busybox "$early/sbin/init"
for module in virtio_pci virtio_blk crc32c_generic ext4 virtio_net virtio_console virtio_rng sr_mod virtio_scsi isofs; do
  modprobe --dirname "$debian" --set-version "$release" --show-depends "$module" | awk '$1 == "insmod" {print $2}'
done | awk '!seen[$0]++' > "$work/modules"
while read -r path; do
  cp "$path" "$early/modules/"
  echo "/modules/${path##*/}"
done < "$work/modules" > "$early/modules/order"
install -m 755 "$here/quick/early-init" "$early/init"
(cd "$early" && find . | cpio --quiet --create --format=newc --owner=0:0) > "$work/initrd"

# root: busybox, our few files, and the agent with the libraries it names.
plant_busybox "$root"
cp -r "$here/quick/root/." "$root/"
ln -sf /bin/busybox "$root/sbin/init"
mkdir -p "$root"/usr/{sbin,lib} "$root/lib64" "$root/var/run" "$root/root"
install -m 755 "$debian/usr/sbin/qemu-ga" "$root/usr/sbin/qemu-ga"
libraries=$(find "$debian/lib" "$debian/usr/lib" -type d -name x86_64-linux-gnu | paste -s -d :)
"$debian/lib64/ld-linux-x86-64.so.2" --library-path "$libraries" --list "$root/usr/sbin/qemu-ga" |
  awk '$2 == "=>" && !/ld-linux/ {print $3}' | xargs cp -L -t "$root/usr/lib"
cp -L "$debian/lib64/ld-linux-x86-64.so.2" "$root/lib64/"
chmod 755 "$root"/etc/rc "$root"/sbin/shutdown "$root"/usr/sbin/counter "$root"/www/cgi-bin/*

# Few inodes and a small journal, all of it written now: nothing in the background after the first boot.
truncate --size=4G "$work/disk"
mke2fs -q -t ext4 -L quick -N 8192 -J size=8 -E lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0 \
  -d "$root" "$work/disk"

# The kernel as the ELF file inside vmlinuz: QEMU starts it by its PVH note, which saves 2.5 s of unpacking under TCG.
vmlinuz=$(echo "$debian"/boot/vmlinuz-*)
start=$(LC_ALL=C grep --text --byte-offset --only-matching $'\xfd7zXZ' "$vmlinuz" | awk -F : 'NR == 1 {print $1}')
tail --bytes=+$((start + 1)) "$vmlinuz" | xz --decompress --single-stream --stdout 2> /dev/null > "$work/vmlinux" || true
# What follows the payload stops xz with an error, so look at what came out instead.
[[ $(head --bytes=4 "$work/vmlinux") == $'\x7fELF' ]]

mv "$work/vmlinux" "$cache/quick.vmlinux"
mv "$work/initrd" "$cache/quick.initrd"
mv "$work/disk" "$cache/quick.raw"
