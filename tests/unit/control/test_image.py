"""Importing images: one file becomes a disk; what leads to other files is refused before they are read."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloudlet.control.bases import BaseRequest, build, import_image
from cloudlet.control.image import check_header, check_info
from cloudlet.control.site import Site
from cloudlet.errors import UsageError
from cloudlet.model import LARGEST_DISK_BYTES, MEBIBYTE
from cloudlet.settings import Settings
from cloudlet.store import bases as store
from cloudlet.store.bases import Base


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    opened = Site.open(Settings(tmp_path / "cache", tmp_path / "state", tmp_path / "keys", hypervisor="fake"))
    yield opened
    assert opened.bases.reap() == []


def qemu_img(folder: Path, *arguments: str) -> None:
    subprocess.run(["qemu-img", *arguments], cwd=folder, check=True, capture_output=True)


def take(site: Site, image: Path, **changes: object) -> Base:
    request = BaseRequest(**{"name": "taken", "memory_bytes": 4 * MEBIBYTE} | changes)  # type: ignore[arg-type]
    return import_image(site, request, image, say=lambda text: None)


@pytest.mark.parametrize(
    "options", ["qcow2", "vdi", "vhdx", "vpc", "vmdk", "vmdk -o subformat=streamOptimized"]
)
def test_what_is_one_file_may_be_taken(options: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu_img(tmp_path, "create", "-f", *options.split()[:1], *options.split()[1:], "image", "4M")
    check_header(image)
    asked = subprocess.run(["qemu-img", "info", "--output=json", image], check=True, capture_output=True)
    check_info(image, json.loads(asked.stdout))


def test_an_image_becomes_a_disk(site: Site, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(3 * MEBIBYTE) + b"content" + bytes(MEBIBYTE - 7))
    qemu_img(tmp_path, "convert", "-f", "raw", "-O", "qcow2", "raw", "image")
    disk = (take(site, tmp_path / "image").path / store.DISK).read_bytes()
    # The fake guest has its files at the beginning.
    assert disk[2 * MEBIBYTE :] == (tmp_path / "raw").read_bytes()[2 * MEBIBYTE :]


def _backing(folder: Path) -> None:
    qemu_img(folder, "create", "-f", "qcow2", "-b", "other", "-F", "raw", "image", "4M")


def _data_file(folder: Path) -> None:
    qemu_img(folder, "create", "-f", "qcow2", "-o", "data_file=data", "image", "4M")
    (folder / "data").unlink()


def _raw_data_file(folder: Path) -> None:
    qemu_img(folder, "create", "-f", "qcow2", "-o", "data_file=data,data_file_raw=on", "image", "4M")


def _encrypted(folder: Path) -> None:
    secret = ("--object", "secret,id=s,data=x")
    options = "encrypt.format=aes,encrypt.key-secret=s"
    qemu_img(folder, "create", *secret, "-f", "qcow2", "-o", options, "image", "4M")


def _flat(folder: Path) -> None:
    qemu_img(folder, "create", "-f", "vmdk", "-o", "subformat=monolithicFlat", "image", "4M")


def _extents(folder: Path) -> None:
    qemu_img(folder, "create", "-f", "vmdk", "-o", "subformat=twoGbMaxExtentSparse", "image", "4M")


def _descriptor_in_disguise(folder: Path) -> None:
    _flat(folder)
    text = (folder / "image").read_text()
    (folder / "image").write_text(text.replace("# Disk DescriptorFile", "# Anything"))


def _vmdk_backing(folder: Path) -> None:
    qemu_img(folder, "create", "-f", "vmdk", "other.vmdk", "4M")
    qemu_img(folder, "create", "-f", "vmdk", "-b", "other.vmdk", "-F", "vmdk", "image")


def _other_format(folder: Path) -> None:
    qemu_img(folder, "create", "-f", "qed", "image", "4M")


def _too_large(folder: Path) -> None:
    qemu_img(folder, "create", "-f", "qcow2", "image", str(LARGEST_DISK_BYTES + MEBIBYTE))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_backing, "backing file"),
        (_data_file, "data file"),
        (_raw_data_file, "data file"),
        (_encrypted, "encrypted"),
        (_flat, "list of other files"),
        (_extents, "list of other files"),
        (_descriptor_in_disguise, "list of other files"),
        (_vmdk_backing, "needs another file"),
        (_other_format, "format qed"),
        (_too_large, "4 TiB"),
    ],
)
def test_what_leads_elsewhere_is_refused(make, says: str, site: Site, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(4 * MEBIBYTE))
    make(tmp_path)
    with pytest.raises(UsageError, match=says) as caught:
        take(site, tmp_path / "image")
    assert caught.value.hint
    assert site.bases.all() == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"disk_bytes": 5 * MEBIBYTE + 512}, "multiple of 1 MiB"),
        ({"disk_bytes": LARGEST_DISK_BYTES + MEBIBYTE}, "too large"),
        ({"name": "a" * 16}, "looks like"),
        ({"name": "a name"}, "cannot be"),
    ],
)
def test_what_is_asked_wrong_is_said_before_the_work(changes, says: str, site: Site, tmp_path: Path) -> None:
    (tmp_path / "build").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UsageError, match=says):
        take(site, tmp_path / "not-there", **changes)
    request = BaseRequest(**{"name": "made", "memory_bytes": 4 * MEBIBYTE, "disk_bytes": MEBIBYTE} | changes)
    with pytest.raises(UsageError, match=says):
        build(site, request, str(tmp_path), say=lambda text: None)


def test_a_kernel_is_readable_by_whom_qemu_runs_as(site: Site, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(4 * MEBIBYTE))
    (tmp_path / "kernel").write_bytes(b"kernel")
    (tmp_path / "kernel").chmod(0o600)
    seen = []

    def say(text: str) -> None:
        if text.startswith("booting"):
            (kernel,) = site.bases.folder.glob(f".new-*/{store.KERNEL}")
            seen.append(kernel.stat().st_mode & 0o777)

    request = BaseRequest("taken", 4 * MEBIBYTE)
    import_image(site, request, tmp_path / "raw", say, kernel=tmp_path / "kernel")
    assert seen == [0o444]


def test_what_a_guest_recipe_made_is_readable_too(site: Site, tmp_path: Path) -> None:
    (tmp_path / "build").write_text(
        '#!/bin/sh\numask 077\ncd "$CLOUDLET_OUT"\n'
        'truncate -s "$CLOUDLET_DISK_BYTES" disk.raw; echo > vmlinuz; echo > initrd.img\n'
    )
    (tmp_path / "build").chmod(0o755)
    seen = set()

    def say(text: str) -> None:
        if text.startswith("booting"):
            for name in (store.KERNEL, store.INITRD):
                (file,) = site.bases.folder.glob(f".new-*/{name}")
                seen.add(file.stat().st_mode & 0o777)

    build(site, BaseRequest("made", 4 * MEBIBYTE, 4 * MEBIBYTE), str(tmp_path), say)
    assert seen == {0o444}
