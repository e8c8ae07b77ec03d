"""The job board: a queue of operations in Redis, from which several conductors take what they work on.

It is TaskFlow's. A conductor claims a job for some seconds, and claims it again before they are over; the job
of one that was killed is free after them. The board holds nothing that the database does not know: one that
has lost its memory is filled again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from oslo_log import log
from taskflow.exceptions import JobFailure, NotFound, TaskFlowException, UnclaimableJob
from taskflow.jobs.backends.impl_redis import RedisJob, RedisJobBoard
from taskflow.jobs.base import JobPriority

from cloudlet.errors import FailedError, UsageError
from cloudlet.service.steps import Lane
from cloudlet.store.rows import Operation

LOG = log.getLogger(__name__)
CLAIM_SECONDS = 10
"""How long a job stays with a conductor that says nothing more."""


class Board:
    """The job board of a site; any number of threads and processes."""

    def __init__(self, url: str, site_id: str) -> None:
        self._where = url.rpartition("@")[2]  # not its password
        name = f"cloudlet-{site_id}"
        patience = {"socket_timeout": 5, "socket_connect_timeout": 2}
        self._board = RedisJobBoard(name, {**_parse(url), **patience, "namespace": name})
        self._lost = False

    def connect(self) -> None:
        """Have a connection.

        :raises FailedError: the server does not answer.
        """
        try:
            self._board.connect()
        except TaskFlowException as error:
            raise FailedError(
                f"the job board {self._where} cannot be reached", hint="start Redis, or correct job_board"
            ) from error

    def post(self, operation: Operation, lane: Lane) -> None:
        """Offer an operation to the conductors. If the board is away, it is offered when it is back."""
        with self._tolerant():
            self._board.post(
                operation.kind,
                details={"operation": operation.id, "subject": operation.subject, "lane": lane},
                priority=JobPriority.HIGH if lane is Lane.URGENT else JobPriority.NORMAL,
            )

    def known(self) -> set[str] | None:
        """The ids of the operations on the board; None if it is away."""
        jobs = self._jobs()
        return None if jobs is None else {operation_of(job) for job in jobs}

    def jobs(self) -> list[RedisJob]:
        """All jobs, claimed or not, those first that are to be done first."""
        return self._jobs() or []

    def claim(self, job: RedisJob, who: str) -> bool:
        """Take a job for some seconds; whether nobody else has."""
        with self._tolerant():
            try:
                self._board.claim(job, who, expiry=CLAIM_SECONDS)
            except (UnclaimableJob, NotFound):
                return False
            return True
        return False

    def keep(self, job: RedisJob) -> None:
        """Keep a claimed job for some seconds more."""
        with self._tolerant():
            job.extend_expiry(CLAIM_SECONDS)

    def done(self, job: RedisJob, who: str) -> None:
        """Take a job from the board."""
        with self._tolerant():
            self._board.consume(job, who)

    def give_back(self, job: RedisJob, who: str) -> None:
        """Let others have a claimed job."""
        with self._tolerant():
            self._board.abandon(job, who)

    def close(self) -> None:
        self._board.close()

    def _jobs(self) -> list[RedisJob] | None:
        with self._tolerant():
            return list(self._board.iterjobs())
        return None

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        """The board may be away for a while: that is logged once, and nothing is lost."""
        try:
            yield
        except (JobFailure, NotFound) as error:
            # A connection that failed comes as this too; a job that somebody else has meanwhile, or has done.
            if not isinstance(error, NotFound) and error.__cause__ is not None:
                self._away(error)
            return
        if self._lost:
            LOG.info("the job board %s answers again", self._where)
            self._lost = False

    def _away(self, error: Exception) -> None:
        if not self._lost:
            LOG.error("the job board %s does not answer: %s", self._where, error)
            self._lost = True


def operation_of(job: RedisJob) -> str:
    """The id of the operation that a job is about."""
    return str(job.details["operation"])


def subject_of(job: RedisJob) -> str:
    """The id of what the operation of a job must be alone with."""
    return str(job.details["subject"])


def lane_of(job: RedisJob) -> Lane:
    """Among which others a job waits."""
    return Lane(job.details.get("lane", Lane.LONG))


def _parse(url: str) -> dict[str, object]:
    """``redis://[USER:PASSWORD@]HOST[:PORT][/NUMBER]``, or ``rediss:`` with TLS.

    :raises UsageError: it is not that.
    """
    parts = urlsplit(url)
    try:
        conf: dict[str, object] = {"host": parts.hostname, "port": parts.port or 6379, "db": 0}
        conf["db"] = int(parts.path.strip("/") or 0)
    except ValueError:
        conf = {}
    if parts.scheme not in ("redis", "rediss") or not conf.get("host"):
        raise UsageError(
            "job_board is not the URL of a Redis server", hint="such as redis://127.0.0.1:6379/0"
        )
    if parts.username:
        conf["username"] = unquote(parts.username)
    if parts.password:
        conf["password"] = unquote(parts.password)
    return {**conf, "ssl": True} if parts.scheme == "rediss" else conf
