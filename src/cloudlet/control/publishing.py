"""Making an overlay: a private instance of a base is changed by a recipe, made quiet, captured, packed.

The files go into the guest by its optical drive, as one image; the commands by its guest agent. What is
captured is what the recipe's readiness rule says is a running app: warm, in memory.
"""

from __future__ import annotations

import os
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cloudlet.control.media import write_iso
from cloudlet.control.profile import Trial, WarmUp, run_here
from cloudlet.control.readiness import guest_port, wait_ready
from cloudlet.control.recipe import BUILD_PREFIX, Recipe, read_recipe
from cloudlet.control.site import Site
from cloudlet.control.spool import PageSpool
from cloudlet.control.synthesis import Progress, resume_base
from cloudlet.errors import FailedError, NotFoundError, RefusedError, UsageError
from cloudlet.hypervisor.driver import GuestAgent, Instance
from cloudlet.hypervisor.records import MARKER, Workspace
from cloudlet.model import PublishedPort, ReadinessKind
from cloudlet.output import written
from cloudlet.overlay.apply import apply
from cloudlet.overlay.create import CreateReport, Description, create
from cloudlet.overlay.pages import PageSource, Space
from cloudlet.overlay.plan import Hot
from cloudlet.overlay.reader import OverlayReader
from cloudlet.overlay.root import App
from cloudlet.overlay.sign import Sign
from cloudlet.store.bases import Base
from cloudlet.transfer.source import Bytes

COMMAND_SECONDS = 1800.0
READY_SECONDS = 600.0
QUIET = "/usr/lib/cloudlet/quiet"
_QUIET_BY_HAND = "sync; fstrim -a 2>/dev/null; sync; echo 3 > /proc/sys/vm/drop_caches; sleep 1; exit 0"
_MOUNT = "/run/cloudlet-media"
_MOUNT_COMMANDS = (
    f"mkdir -p {_MOUNT}",
    # The drive tells the guest of its new medium when it is asked next.
    f"for try in 1 2 3 4 5 6 7 8 9; do mount -o ro /dev/sr0 {_MOUNT} 2>/dev/null && break; sleep 1; done",
    f"grep -q ' {_MOUNT} ' /proc/mounts",
)

Say = Callable[[str], None]
"""Told what is being done, a line each."""


@dataclass(slots=True)
class Published:
    """An overlay that was made, and what it cost."""

    path: Path
    report: CreateReport
    pause_seconds: float
    paused: dict[str, float] = field(default_factory=dict)
    """Seconds of each step within the pause."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds per step, in order."""


def create_overlay(
    site: Site,
    base: Base,
    folder: Path,
    output: Path,
    *,
    build_folder: Path,
    sign: Sign | None,
    say: Say,
    progress: Progress | None = None,
    plain_delta: bool = False,
    profile: bool = True,
) -> Published:
    """Make an overlay from a recipe's folder.

    :param build_folder: where the recipe's ``prepare`` commands keep what they make.
    :param plain_delta: measure the plain delta too, for the report.
    :param profile: end with a trial that shows what the guest touches first.
    """
    recipe = read_recipe(folder)
    check_output(output)
    steps = _Steps(say)
    if not base.description.guest.agent:
        raise UsageError(
            f"the guest of base {base.name} has no guest agent to run a recipe with",
            hint="use --interactive, or a seed image",
        )
    with steps("prepare"):
        prepare(site, recipe, folder, build_folder)
    with ExitStack() as stack:
        with steps("start"):
            instance = stack.enter_context(resume_base(site, base, _ports(recipe), name=recipe.name))
            agent = _agent(instance)
        if recipe.files:
            with steps("copy files"):
                _copy_files(instance, agent, recipe, folder, build_folder)
        for number, command in enumerate(recipe.run, 1):
            with steps(f"run {number}/{len(recipe.run)}", command):
                _run(agent, command)
        with steps("wait until ready", recipe.ready):
            _wait_ready(base, instance, recipe.app())
        warm_up = WarmUp(recipe.warm_up, folder) if profile else None
        plan = _Plan(recipe.app(), output, sign, steps, progress, plain_delta, warm_up)
        return _capture_and_pack(site, base, instance, plan)


def create_interactively(
    site: Site,
    base: Base,
    app: App,
    output: Path,
    *,
    until: Callable[[Instance], None],
    sign: Sign | None,
    say: Say,
    ports: Sequence[PublishedPort] = (),
    seed: Path | None = None,
    progress: Progress | None = None,
    profile: bool = True,
) -> Published:
    """Make an overlay of whatever was done to a private instance until ``until`` returns."""
    check_output(output)
    steps = _Steps(say)
    with ExitStack() as stack:
        with steps("start"):
            instance = stack.enter_context(resume_base(site, base, ports, name=app.name))
            if seed:
                instance.insert_optical(seed)
        with steps("by hand"):
            until(instance)
        if seed:
            instance.eject_optical()
        with steps("wait until ready", str(app.ready)):
            _wait_ready(base, instance, app)
        warm_up = WarmUp((), output.parent) if profile else None
        plan = _Plan(app, output, sign, steps, progress, False, warm_up)
        return _capture_and_pack(site, base, instance, plan)


def reorder(
    site: Site,
    source: Bytes,
    output: Path,
    *,
    sign: Sign | None,
    say: Say,
    allow_unsigned: bool = False,
    warm_up: WarmUp | None = None,
    progress: Progress | None = None,
) -> Published:
    """Make a new overlay from one that is there: the same pages, those that are needed first in front.

    :raises IntegrityError: the old one is not whole, or not signed by a key that is trusted here.
    """
    check_output(output)
    steps = _Steps(say)
    reader = OverlayReader(source, site.keys.verify, allow_unsigned=allow_unsigned)
    root = reader.root
    base = site.bases.get(root.base)
    site.hypervisor.check(root.machine)
    with ExitStack() as stack:
        workspace = stack.enter_context(Workspace.create(site.settings.instances_dir, prefix="reorder-"))
        spool = PageSpool(workspace.path)
        with steps("read"), base.pages() as pages:
            apply(reader, pages, spool, progress)
        description = Description(
            root.app, root.created, root.machine, root.device_sections, spool.device_state
        )
        plan = _Plan(root.app, output, sign, steps, progress, False, warm_up or WarmUp((), output.parent))
        report = _try_and_pack(site, base, description, spool.sources(), plan)
    return Published(output, report, 0.0, {}, steps.seconds)


def prepare(site: Site, recipe: Recipe, folder: Path, build_folder: Path) -> None:
    """Run the recipe's ``prepare`` commands on this machine."""
    if recipe.prepare:
        build_folder.mkdir(parents=True, exist_ok=True)
        run_here(site, recipe.prepare, folder, {"CLOUDLET_RECIPE_BUILD": str(build_folder)}, "prepare")


def check_output(output: Path) -> None:
    """Whether an overlay can be written to ``output``; said before an hour's work rather than after."""
    if not output.parent.is_dir():
        raise NotFoundError(f"the folder {output.parent} is not there")
    if output.is_dir():
        raise UsageError(f"{output} is a folder", hint="name a file")
    if not os.access(output.parent, os.W_OK):
        raise RefusedError(f"{output.parent} may not be written to")


def make_quiet(agent: GuestAgent | None, has_script: bool) -> None:
    """Write back, trim and drop what need not be captured."""
    if agent is None:
        return
    argv = [QUIET] if has_script else ["/bin/sh", "-c", _QUIET_BY_HAND]
    status, output = agent.run(argv, timeout=COMMAND_SECONDS)
    if status:
        raise FailedError(
            f"the guest could not be made quiet: {output.decode(errors='replace').strip()[-300:]}"
        )


@dataclass(frozen=True, slots=True)
class _Plan:
    """What all ways to an overlay need at their end."""

    app: App
    output: Path
    sign: Sign | None
    steps: _Steps
    progress: Progress | None
    plain_delta: bool
    warm_up: WarmUp | None
    """None: without a trial."""


def _capture_and_pack(site: Site, base: Base, instance: Instance, plan: _Plan) -> Published:
    guest, steps = base.description.guest, plan.steps
    with steps("make quiet"):
        make_quiet(instance.agent if guest.agent else None, guest.quiet)
        _wait_ready(base, instance, plan.app)
    with steps("capture"):
        capture = instance.capture()
    description = Description(
        app=plan.app,
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        machine=base.machine,
        device_sections=capture.sections,
        device_state=capture.device_state,
    )
    sources = {Space.RAM: capture.ram, Space.DISK: capture.disk}
    report = _try_and_pack(site, base, description, sources, plan)
    return Published(plan.output, report, capture.pause_seconds, capture.seconds, steps.seconds)


def _wait_ready(base: Base, instance: Instance, app: App) -> None:
    # The line by which the base showed that it is ready came before it was captured, and not again.
    if app.ready.kind is ReadinessKind.SERIAL and app.ready == base.description.ready:
        return
    wait_ready(instance, app.ready, READY_SECONDS)


def _try_and_pack(
    site: Site, base: Base, description: Description, sources: Mapping[Space, PageSource], plan: _Plan
) -> CreateReport:
    """Find out what is needed first, and write the overlay in that order."""
    hot: Hot = ()
    obstacle = site.hypervisor.early_obstacle()
    if plan.warm_up and obstacle:
        plan.steps.note(f"no trial, so this overlay will not start early: {obstacle}")
    elif plan.warm_up:
        with plan.steps("trial", "; ".join(plan.warm_up.commands)):
            trial = Trial(site, base, plan.app, sources, description.device_state, plan.warm_up)
            hot = trial.order()
    with (
        plan.steps("pack"),
        base.pages() as pages,
        written(plan.output) as out,
        tempfile.TemporaryFile(dir=plan.output.parent) as spool,
    ):
        return create(
            out, spool, description, sources[Space.RAM], sources[Space.DISK], pages, base.index(),
            sign=plan.sign, hot=hot, plain_delta=plan.plain_delta, progress=plan.progress,
        )  # fmt: skip


def _copy_files(
    instance: Instance, agent: GuestAgent, recipe: Recipe, folder: Path, build_folder: Path
) -> None:
    """Put the recipe's files into the guest by way of its optical drive."""
    tree: dict[str, Path] = {}
    copies = []
    for number, entry in enumerate(recipe.files):
        plain = entry.source.removeprefix(BUILD_PREFIX)
        source = (build_folder if entry.source.startswith(BUILD_PREFIX) else folder) / plain
        if not source.exists():
            raise NotFoundError(f"files: {source} is not there")
        tree[f"/{number}" if source.is_dir() else f"/{number}/{source.name}"] = source
        copies += _copy_commands(f"{_MOUNT}/{number}", entry.target, None if source.is_dir() else source.name)
    medium = instance.directory / "files.iso"
    write_iso(medium, tree, "cloudlet", {MARKER: str(instance.directory)})
    instance.insert_optical(medium)
    _run(agent, "\n".join([*_MOUNT_COMMANDS, *copies, f"umount {_MOUNT}", f"rmdir {_MOUNT}"]))
    instance.eject_optical()
    medium.unlink()


def _copy_commands(medium: str, target: str, file: str | None) -> list[str]:
    """Shell commands for a folder's content, or for one file; the medium's modes lack the right to write."""
    place = shlex.quote(target)
    if file is None:
        return [f"mkdir -p {place}", f"cp -a {medium}/. {place}", f"chmod -R u+w {place}"]
    if target.endswith("/"):
        place = shlex.quote(target + file)
    return [
        f'mkdir -p "$(dirname {place})"',
        f"cp -a {medium}/{shlex.quote(file)} {place}",
        f"chmod u+w {place}",
    ]


def _run(agent: GuestAgent, command: str) -> None:
    status, output = agent.run(["/bin/sh", "-ec", command], timeout=COMMAND_SECONDS)
    if status:
        tail = output.decode(errors="replace").strip()[-800:]
        first = command.strip().splitlines()[0]
        raise FailedError(f"in the guest, {first!r} gave {status}: {tail}")


def _agent(instance: Instance) -> GuestAgent:
    agent = instance.agent
    if agent is None or not agent.ping(30.0):
        raise FailedError("the guest agent of the resumed base does not answer")
    return agent


def _ports(recipe: Recipe) -> list[PublishedPort]:
    numbers = {port.port for port in recipe.ports}
    if (asked := guest_port(recipe.app().ready)) is not None:
        numbers.add(asked)
    return [PublishedPort(number) for number in sorted(numbers)]


class _Steps:
    """Names each step while it runs and keeps its seconds."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self.seconds: dict[str, float] = {}
        self._name = ""
        self._began = 0.0

    def note(self, text: str) -> None:
        """Say something that is not a step."""
        self._say(text)

    def __call__(self, name: str, detail: str = "") -> _Steps:
        self._name = name
        first = detail.strip().splitlines()[0] if detail.strip() else ""
        self._say(f"{name}: {first}" if first else name)
        return self

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self._name] = round(time.monotonic() - self._began, 3)
