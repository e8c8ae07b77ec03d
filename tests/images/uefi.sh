#!/bin/bash
# A GPT disk that only UEFI starts: an EFI system partition with GRUB on the removable path, then ext4.
#
# usage: uefi.sh CACHE      leaves CACHE/uefi.raw (4 GiB)
#
# Everything is written into one plain file at its offset: no loop device, no mount. The guest is an ordinary systemd
# Debian without cloud-init and without SSH: it takes its address by DHCP and listens to the guest agent only.
set -euo pipefail
cache=$1
image=$cache/uefi.raw
[[ -e $image ]] && exit 0

mkdir -p "$cache"
work=$(mktemp -d "$cache/.uefi.XXXXXX")
trap 'rm -rf "$work"' EXIT
root=$work/root

cat > "$work/any.network" <<'NETWORK'
[Match]
Type=ether
[Link]
RequiredForOnline=no
[Network]
DHCP=yes
NETWORK
printf 'LABEL=uefi-root / ext4 defaults 0 1\nLABEL=UEFI-ESP /boot/efi vfat umask=0077 0 1\n' > "$work/fstab"
cat > "$work/grub.cfg" <<'GRUB'
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
search --no-floppy --label uefi-root --set=root
linux /vmlinuz root=LABEL=uefi-root ro quiet console=ttyS0,115200
initrd /initrd.img
boot
GRUB

mmdebstrap --quiet --variant=minbase \
  --aptopt='APT::Install-Recommends "false"' \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
  --dpkgopt='path-exclude=/usr/share/doc/*' \
  --include=systemd-sysv,udev,dbus,linux-image-amd64,qemu-guest-agent,iproute2 \
  --customize-hook="copy-in $work/fstab /etc" \
  --customize-hook="copy-in $work/any.network /etc/systemd/network" \
  --customize-hook='mkdir "$1/boot/efi"; echo uefi > "$1/etc/hostname"' \
  --customize-hook='chroot "$1" systemctl enable systemd-networkd' \
  bookworm "$root"

# The loader carries its menu inside, as grub-mkstandalone's does, and needs nothing else from the partition.
grub-mkimage --format=x86_64-efi --output="$work/BOOTX64.EFI" --prefix=/boot/grub --config="$work/grub.cfg" \
  part_gpt fat ext2 normal linux serial terminal search search_label boot

mib=$((1024 * 1024))
truncate --size=4G "$work/disk"
sfdisk --quiet "$work/disk" <<'TABLE'
label: gpt
start=1MiB, size=64MiB, type=uefi, name=esp
start=65MiB, type=linux, name=root
TABLE
truncate --size=64M "$work/esp"
mformat -i "$work/esp" -F -v UEFI-ESP ::
mmd -i "$work/esp" ::EFI ::EFI/BOOT
mcopy -i "$work/esp" "$work/BOOTX64.EFI" ::EFI/BOOT/BOOTX64.EFI
dd if="$work/esp" of="$work/disk" bs=1M seek=1 conv=notrunc,sparse status=none
# The backup table takes the last 33 sectors: leave the last mebibyte alone.
mke2fs -q -t ext4 -L uefi-root -E offset=$((65 * mib)),lazy_itable_init=0,lazy_journal_init=0 -d "$root" \
  "$work/disk" $((4096 - 65 - 1))M
mv "$work/disk" "$image"
