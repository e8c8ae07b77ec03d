"""A conductor: takes operations from the job board and works on them, beside others of the same site.

What it works on stays its own as long as it says so in time. If it is killed, another finds the job free, and
the rows tell that one how far the operation was. If it was only slow, the other finds the operation's subject
locked and gives the job back: two never work on the same thing (``alone.py``).
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from oslo_log import log
from taskflow.jobs.backends.impl_redis import RedisJob

from cloudlet.service.board import CLAIM_SECONDS, Board, lane_of, operation_of, subject_of
from cloudlet.service.steps import Lane

LOG = log.getLogger(__name__)
_LOOK_SECONDS, _IDLE_SECONDS = 0.02, 0.2
_BUSY_SECONDS = 0.3
"""So long until a job is free again with whose subject another process works."""
_KEEP_SECONDS = CLAIM_SECONDS / 4
_CANCEL_SECONDS = 0.5


class Conductor:
    """The threads of a process that work on what is on a board; ``threads`` for each lane, or a multiple."""

    def __init__(
        self, board: Board, perform: Callable[[str], bool], hear_cancelled: Callable[[], None], threads: int
    ) -> None:
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self._board = board
        self._perform = perform
        self._hear_cancelled = hear_cancelled
        self._most = threads
        most = sum(lane.threads(threads) for lane in Lane)
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="conductor")
        self._lock = threading.Lock()
        self._held: dict[str, RedisJob] = {}
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (("board", self._take), ("claims", self._keep), ("cancelled", self._hear))
        ]

    def begin(self) -> None:
        """Take jobs from now on."""
        LOG.info("conductor %s takes jobs", self.name)
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Take no more; what is being worked on is for others, as far as it is."""
        self._closed.set()
        for thread in self._threads:
            thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for job in self._jobs():
            self._board.give_back(job, self.name)

    def _take(self) -> None:
        wait = _LOOK_SECONDS
        while not self._closed.wait(wait):
            taken = [self._take_one(job) for job in self._board.jobs()]
            wait = _LOOK_SECONDS if any(taken) else min(2 * wait, _IDLE_SECONDS)

    def _take_one(self, job: RedisJob) -> bool:
        with self._lock:
            lane = lane_of(job)
            alike = sum(lane_of(held) is lane for held in self._held.values())
            if job.uuid in self._held or alike >= lane.threads(self._most) or self._closed.is_set():
                return False
            if subject_of(job) in map(subject_of, self._held.values()):
                return False  # when what is being done with the same has ended
        if not self._board.claim(job, self.name):
            return False
        with self._lock:
            self._held[job.uuid] = job
        self._pool.submit(self._do, job)
        return True

    def _do(self, job: RedisJob) -> None:
        done = self._perform(operation_of(job))
        if self._closed.is_set():
            return  # it may have been left as it was
        if done:
            self._board.done(job, self.name)
        else:
            self._closed.wait(_BUSY_SECONDS)
            self._board.give_back(job, self.name)
        with self._lock:
            del self._held[job.uuid]

    def _keep(self) -> None:
        while not self._closed.wait(_KEEP_SECONDS):
            for job in self._jobs():
                self._board.keep(job)

    def _hear(self) -> None:
        while not self._closed.wait(_CANCEL_SECONDS):
            try:
                self._hear_cancelled()
            except Exception:
                LOG.exception("whether operations were cancelled could not be read")

    def _jobs(self) -> list[RedisJob]:
        with self._lock:
            return list(self._held.values())
