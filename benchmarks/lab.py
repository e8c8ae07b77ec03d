"""The benchmarks' own site: guests, bases, overlays and images, made when first asked for and kept.

What takes minutes and does not change from run to run lies in ``.setup/bench`` of the checkout, under
names that hold a digest of what it is made from. What is measured is made anew in each run.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import plain
from benchmarks.answers import REFERENCE, wait_agent
from cloudlet.control import bases
from cloudlet.control.publishing import Published, create_overlay, make_quiet
from cloudlet.control.site import Site
from cloudlet.control.start import Start
from cloudlet.control.synthesis import Request, synthesise
from cloudlet.errors import FailedError, NotFoundError
from cloudlet.hypervisor.qemu.instance import DISK
from cloudlet.model import GIBIBYTE, MEBIBYTE
from cloudlet.overlay.header import VERSION
from cloudlet.settings import Settings
from cloudlet.store.bases import Base
from cloudlet.store.hints import HintStore
from cloudlet.store.images import ImageStore
from cloudlet.transfer.source import open_source

CHECKOUT = Path(__file__).parents[1]
KEPT = CHECKOUT / ".setup" / "bench"
ROUTE_PLANNER = CHECKOUT / "examples" / "route-planner"
MEMORY_MIB, MODEL_MIB = 512, 16
MODEL = {"REFERENCE_MIB": str(MODEL_MIB)}
"""What the reference application's recipe is told."""
_PROGRAMS = REFERENCE / "model.py", REFERENCE.with_name("ask.py")
_PACKS = CHECKOUT / "src" / "cloudlet" / "overlay"
_TRIES = tuple(CHECKOUT / "src" / "cloudlet" / "control" / name for name in ("profile.py", "order.py"))
_GUEST = CHECKOUT / "src" / "cloudlet" / "guests" / "debian"
_SHUT_DOWN_SECONDS = 120.0
_KIND_TO_DELTAS = "init_on_free=1"
"""What our guests' kernels do so that captures stay small; to a plain guest it is a loss of time."""


def say(text: str) -> None:
    """Tell the person who waits what is being done."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


@dataclass
class Lab:
    """A site with bases and files for all benchmarks; ``scratch`` is a folder of this run."""

    site: Site
    scratch: Path
    seed: int
    quick: bool
    preparing: dict[str, float] = field(default_factory=dict)
    """Seconds spent on what is kept, which no figure contains."""

    @classmethod
    @contextmanager
    def open(cls, seed: int, quick: bool) -> Iterator[Lab]:
        """The laboratory; its scratch folder and all machines are gone afterwards."""
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="run-", dir=KEPT) as folder:
            settings = Settings(
                cache_dir=KEPT / "cache", state_dir=Path(folder) / "state", keys_dir=KEPT / "keys"
            )
            # What a site learns of an app is learned anew in each run.
            site = replace(
                Site.open(settings),
                images=ImageStore(Path(folder) / "images", settings.image_cache_mib * MEBIBYTE),
                hints=HintStore(Path(folder) / "hints"),
            )
            if not site.keys.all():
                site.keys.generate()
            yield cls(site, Path(folder), seed, quick)

    @property
    def settings(self) -> Settings:
        return self.site.settings

    def times(self, full: int, quick: int = 1) -> int:
        """How often to repeat something."""
        return quick if self.quick else full

    def base(self, memory_mib: int = MEMORY_MIB, *, ours: bool = True) -> Base:
        """A base of our guest; with ``ours=False`` its kernel does nothing for the sake of captures."""
        key = _digest_of(_GUEST)
        name = f"{'ours' if ours else 'default'}-{memory_mib}-{key}"
        try:
            return self.site.bases.find(name)
        except NotFoundError:
            pass
        image = self._image(key)
        cmdline = _cmdline(image, ours=ours)
        request = bases.BaseRequest(name=name, memory_bytes=memory_mib * MEBIBYTE)
        with self._prepares(f"base {name}"):
            return bases.import_image(
                self.site, request, image / "disk.raw", _quietly, kernel=image / "vmlinuz",
                initrd=image / "initrd.img", cmdline=cmdline,
            )  # fmt: skip

    def booted_image(self) -> plain.Plain:
        """The base's image as a plain guest likes it best: booted once, shut down, our kernel option off."""
        base = self.base()
        disk = KEPT / "images" / f"base-{base.id[:16]}.raw"
        made = plain.Plain(
            base.machine, disk, base.image().kernel, base.image().initrd, best_cmdline(base), "raw"
        )
        if not disk.exists():
            with self._prepares("image of the base"), _made(disk) as new:
                shutil.copyfile(self._image(_digest_of(_GUEST)) / "disk.raw", new)
                with plain.run(self.settings, _with_disk(made, new), None) as instance:
                    wait_agent(instance)
                    make_quiet(instance.agent, has_script=True)
                    if not instance.shut_down(_SHUT_DOWN_SECONDS):
                        raise FailedError("the guest did not shut down")
                _dig(new)
        return made

    def overlay(self, memory_mib: int = MEMORY_MIB, model_mib: int = MODEL_MIB, *, ours: bool = True) -> Path:
        """The reference application's overlay on one of our bases, kept."""
        return self.overlay_of(REFERENCE, {"REFERENCE_MIB": str(model_mib)}, memory_mib, ours=ours)

    def overlay_of(
        self, recipe: Path, environment: Mapping[str, str], memory_mib: int = MEMORY_MIB, *, ours: bool = True
    ) -> Path:
        """A recipe's overlay on one of our bases, kept.

        :param environment: what the recipe's ``prepare`` is told.
        """
        base = self.base(memory_mib, ours=ours)
        words = base.id[:16], recipe.name, *environment.values(), _digest_of(recipe, *_PROGRAMS)
        # Before the dot what the guest is made from, behind it what tries and packs it.
        name = f"{'-'.join(words)}.{_digest_of(_PACKS, *_TRIES)}-v{VERSION}.overlay"
        path = KEPT / "overlays" / name
        if not path.exists():
            what = " ".join(["overlay", recipe.name, *environment.values(), "on", base.name])
            with self._prepares(what), _made(path) as new:
                self.publish(base, new, environment, recipe=recipe)
        return path

    def publish(
        self,
        base: Base,
        output: Path,
        environment: Mapping[str, str] = MODEL,
        told: Callable[[str], None] | None = None,
        *,
        recipe: Path = REFERENCE,
        plain_delta: bool = False,
    ) -> Published:
        """Make the overlay of the reference application, or of another recipe, now."""
        os.environ.update(environment)
        build = self.build_folder(recipe, environment)
        return create_overlay(
            self.site, base, recipe, output, build_folder=build, sign=self.site.keys.signer(),
            say=told or _quietly, plain_delta=plain_delta,
        )  # fmt: skip

    @staticmethod
    def build_folder(recipe: Path, environment: Mapping[str, str]) -> Path:
        """Where what ``prepare`` makes is kept."""
        return KEPT / "recipes" / "-".join([recipe.name, *environment.values()])

    def customised_image(
        self, overlay: Path | None = None, files: Mapping[str, Path] | None = None
    ) -> plain.Plain:
        """An application installed and enabled in a full image, kept; the reference if none is named.

        :param overlay: of an application on our base.
        :param files: what is to be put into the image besides, by its place in the guest.
        """
        overlay = overlay or self.overlay()
        disk = self._kept_image(overlay, "raw")
        if not disk.exists():
            with self._prepares(f"full customised image {disk.stem}"), _made(disk) as new:
                made = full_image(self.site, overlay, new, self.disk_changes(overlay))
                for place, file in (files or {}).items():
                    tool(["debugfs", "-w", "-R", f"write {file} {place}", str(new)])
                return _with_disk(made, disk)
        base = self.base()
        return plain.Plain(
            base.machine, disk, base.image().kernel, base.image().initrd, best_cmdline(base), "raw"
        )

    def packed_bytes(self, image: plain.Plain) -> int:
        """The bytes of a kept image as it would be downloaded."""
        packed = image.disk.with_suffix(".qcow2")
        if not packed.exists():
            with self._prepares(f"compressed image {image.disk.stem}"), _made(packed) as new:
                compress_image(image.disk, new)
        return packed.stat().st_size

    def disk_changes(self, overlay: Path | None = None) -> Path:
        """What the customised image changed on the base's disk: a machine restored elsewhere needs it too."""
        return self._kept_image(overlay or self.overlay(), "changes.qcow2")

    @staticmethod
    def _kept_image(overlay: Path, suffix: str) -> Path:
        """A file of an overlay's guest, whatever packed the overlay."""
        return KEPT / "images" / f"{overlay.name.partition('.')[0]}.{suffix}"

    def _image(self, key: str) -> Path:
        folder = KEPT / "images" / f"guest-{key}"
        if not (folder / "cmdline").exists():
            with self._prepares("guest image"), _made(folder) as new:
                new.mkdir()
                environment = {
                    **os.environ,
                    "CLOUDLET_OUT": str(new),
                    "CLOUDLET_DISK_BYTES": str(4 * GIBIBYTE),
                    "CLOUDLET_ACCELERATOR": self.site.hypervisor.accelerator().value,
                }
                tool([str(_GUEST / "build")], env=environment)
        return folder

    @contextmanager
    def _prepares(self, what: str) -> Iterator[None]:
        say(f"preparing, once: {what}")
        began = time.monotonic()
        yield
        self.preparing[what] = round(time.monotonic() - began, 1)


def full_image(site: Site, overlay: Path, disk: Path, changes: Path | None = None) -> plain.Plain:
    """What a clone of an overlay has on its disk, shut down cleanly, as one raw image that boots.

    :param changes: where to put what of it differs from the base, as a qcow2 file compressed with zstd.
    """
    with (
        open_source(str(overlay), io.BytesIO()) as source,
        synthesise(site, source, Request(allow_unsigned=True, start=Start.FULL)) as made,
    ):
        instance, base = made.instance, site.bases.find(made.root.base)
        make_quiet(instance.agent, base.description.guest.quiet)
        if not instance.shut_down(_SHUT_DOWN_SECONDS):
            raise FailedError("the clone did not shut down")
        top = {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": str(instance.directory / DISK)},
            "backing": {"driver": "raw", "file": {"driver": "file", "filename": str(base.image().disk)}},
        }
        whole = f"json:{json.dumps(top)}"
        tool(["qemu-img", "convert", "-O", "raw", "-S", "4k", whole, str(disk)])
        if changes:
            command = ["qemu-img", "convert", "-O", "qcow2", "-c", "-o", "compression_type=zstd", "-F", "raw"]
            tool([*command, "-B", str(base.image().disk), whole, str(changes)])
    image = base.image()
    return plain.Plain(base.machine, disk, image.kernel, image.initrd, best_cmdline(base), "raw")


def best_cmdline(base: Base) -> str:
    """The kernel's command line of a base for a guest that will not be captured."""
    return " ".join(word for word in base.description.cmdline.split() if word != _KIND_TO_DELTAS)


@contextmanager
def copy_of(image: plain.Plain, folder: Path) -> Iterator[plain.Plain]:
    """A copy that may be written to, made before any clock runs."""
    disk = folder / "copy.disk"
    disk.unlink(missing_ok=True)
    tool(["cp", "--sparse=always", str(image.disk), str(disk)])
    try:
        yield _with_disk(image, disk)
    finally:
        disk.unlink()


def compress_image(image: Path, target: Path) -> int:
    """An image as it would be downloaded, a qcow2 file compressed with zstd; its bytes."""
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", "-o", "compression_type=zstd"]
    tool([*command, str(image), str(target)])
    return target.stat().st_size


def tool(command: list[str], env: dict[str, str] | None = None, seconds: float | None = None) -> None:
    """Run a program to its end.

    :raises FailedError: it failed; with what it said last.
    :raises subprocess.TimeoutExpired: it did not end within so many seconds, and was killed.
    """
    result = subprocess.run(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if result.returncode:
        said = (result.stderr or result.stdout).strip().splitlines()
        raise FailedError(f"{command[0]}: {said[-1] if said else result.returncode}")


def _quietly(text: str) -> None:
    """A base that is being made says much."""


def _cmdline(image: Path, *, ours: bool) -> str:
    words = (image / "cmdline").read_text().split()
    return " ".join(word for word in words if ours or word != _KIND_TO_DELTAS)


def _with_disk(image: plain.Plain, disk: Path) -> plain.Plain:
    return replace(image, disk=disk)


def _dig(path: Path) -> None:
    tool(["fallocate", "--dig-holes", str(path)])


def _digest_of(folder: Path, *files: Path) -> str:
    """Of a folder, and of files outside it."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


@contextmanager
def _made(path: Path) -> Iterator[Path]:
    """Make a file or folder under another name, so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    _remove(new)
    try:
        yield new
        new.rename(path)
    finally:
        _remove(new)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
