"""A progress bar on a terminal's standard error; nothing in a pipe."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


@contextmanager
def progress_bar(title: str, *, in_bytes: bool = False, quiet: bool) -> Iterator[Report]:
    """A bar that the given function shows and moves; it is gone when the context is left.

    The function may be called by any thread, also later, when it does nothing.
    """
    if quiet or not sys.stderr.isatty():
        yield _nothing
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    amount = DownloadColumn(binary_units=True) if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(title, total=None)

    lock, closed = threading.Lock(), False

    def report(done: int, total: int) -> None:
        with lock:
            if not closed:
                progress.start()
                progress.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        with lock:
            closed = True
            progress.stop()


def _nothing(_done: int, _total: int) -> None:
    pass
