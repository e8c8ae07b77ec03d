#!/bin/bash
# A cloud image as distributions publish them: MBR disk, GRUB, cloud-init, nothing prepared for us.
#
# usage: grub-bios.sh CACHE      leaves CACHE/grub-bios.qcow2 (8 GiB, of which the root partition fills 2)
#
# genimage lays out the disk, makes the filesystem and places the boot loader, all on plain files: no loop
# device, no mount, no running systemd. The root partition grows on the first boot, by cloud-init.
set -euo pipefail
cache=$1
image=$cache/grub-bios.qcow2
[[ -e $image ]] && exit 0

mkdir -p "$cache"
work=$(mktemp -d "$cache/.grub-bios.XXXXXX")
trap 'rm -rf "$work"' EXIT
root=$work/root boot=$work/boot
mkdir -p "$boot" "$work/tmp" "$work/nothing"

cat > "$work/grub.cfg" <<'GRUB'
serial --unit=0 --speed=115200
terminal_input serial console
terminal_output serial console
search --no-floppy --label cloudimg-rootfs --set=root
linux /vmlinuz root=LABEL=cloudimg-rootfs ro console=tty0 console=ttyS0,115200
initrd /initrd.img
boot
GRUB
printf 'LABEL=cloudimg-rootfs / ext4 defaults,x-systemd.growfs 0 1\n' > "$work/fstab"

# gettext-free and man-free, as the "cloud" variants are; netplan is what Ubuntu's and Debian's images render to.
mmdebstrap --quiet --variant=minbase \
  --aptopt='APT::Install-Recommends "false"' \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  --dpkgopt='path-exclude=/usr/share/doc/*' \
  --include=systemd-sysv,systemd-resolved,udev,dbus,linux-image-amd64,cloud-init,cloud-guest-utils,netplan.io \
  --include=fdisk,iproute2,openssh-server,qemu-guest-agent,sudo \
  --customize-hook="copy-in $work/fstab /etc" \
  --customize-hook='rm -f "$1"/etc/ssh/ssh_host_*_key* "$1/etc/hostname"' \
  --customize-hook='printf "uninitialized\n" > "$1/etc/machine-id"' \
  --customize-hook='chroot "$1" systemctl enable systemd-networkd' \
  bookworm "$root"
install -D -m 644 "$work/grub.cfg" "$root/boot/grub/grub.cfg"

# core.img follows boot.img directly: boot.img looks for it at sector 1, and grub-mkimage fills in its length.
cp /usr/lib/grub/i386-pc/boot.img "$boot/boot.img"
grub-mkimage --format=i386-pc --output="$boot/core.img" --prefix='(hd0,msdos1)/boot/grub' \
  biosdisk part_msdos ext2 normal linux serial terminal search search_label configfile boot

cat > "$work/genimage.cfg" <<'LAYOUT'
image root.ext4 {
	ext4 {
		label = "cloudimg-rootfs"
		use-mke2fs = true
	}
	size = 2000M
}
image disk.raw {
	hdimage { align = 1M }
	partition mbr {
		in-partition-table = false
		image = "boot.img"
		offset = 0
		size = 512
		holes = {"(440; 512)"}
	}
	partition core {
		in-partition-table = false
		image = "core.img"
		offset = 512
	}
	partition root {
		partition-type = 0x83
		bootable = true
		image = "root.ext4"
		offset = 1M
	}
}
LAYOUT
genimage --loglevel 0 --config "$work/genimage.cfg" --rootpath "$root" --tmppath "$work/tmp/g" \
  --inputpath "$boot" --outputpath "$work/out"

qemu-img convert -O qcow2 "$work/out/disk.raw" "$work/disk.qcow2"
qemu-img resize -q "$work/disk.qcow2" 8G
mv "$work/disk.qcow2" "$image"
