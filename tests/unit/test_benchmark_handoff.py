"""The benchmark of the hand-off: the user who asks, and what the page says of figures."""

import itertools
import socketserver
import threading
import time
from contextlib import contextmanager

import pytest
from benchmarks import handoff, handoff_report, report
from benchmarks.handoff_client import Answer, Using, using
from benchmarks.results import Results

ABOUT = {
    "date": "2026-01-01", "seed": 1, "cpu": "a processor", "cores": 2, "memory_mib": 2048, "kernel": "6.1",
    "qemu": "7.2", "accelerator": "tcg", "python": "3.11", "load_before": 0.1, "seconds": 1,
    "preparing_seconds": {},
}  # fmt: skip


@contextmanager
def counter(address=("127.0.0.1", 0)):
    """A server that counts lines, as the guest's does."""
    counted = itertools.count(1)
    connections = []

    class Counting(socketserver.StreamRequestHandler):
        def handle(self):
            connections.append(self.connection)
            while self.rfile.readline():
                self.wfile.write(b"%d\n" % next(counted))

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True

    with Server(address, Counting) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address, connections
        finally:
            server.shutdown()
            thread.join()


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_user_asks_wherever_somebody_listens():
    with counter() as (gone, _):
        pass
    with counter() as (there, connections), using(gone, there) as user:
        wait_for(lambda: connections)
        with counter(gone) as (_, later):
            wait_for(lambda: later)
            time.sleep(0.2)
    assert {answer.where for answer in user.answers} == {0, 1}
    assert sorted(answer.at for answer in user.answers) == [answer.at for answer in user.answers]


def test_a_connection_that_ends_is_made_again():
    with counter() as (there, connections), using(there) as user:
        wait_for(lambda: connections)
        time.sleep(0.1)
        connections[0].shutdown(2)
        wait_for(lambda: len(connections) > 1)
        time.sleep(0.1)
    assert len(user.answers) > 2
    assert user.kept_counting()


def test_gaps_are_between_answers_and_ends():
    user = Using([Answer(1.0, 0, 1), Answer(1.5, 1, 2), Answer(3.5, 0, 3)])
    assert user.gap(0.5, 4.0) == 2.0
    assert user.gap(0.5, 4.0, where=0) == 2.5
    assert user.gap(0.5, 4.0, held=0.5) == 1.5
    assert user.gap(0.5, 9.5) == 6.0


def test_a_number_that_comes_twice_is_something_forgotten():
    assert Using([Answer(1.0, 0, 1), Answer(1.1, 0, 2)]).kept_counting()
    assert not Using([Answer(1.0, 0, 1), Answer(1.1, 1, 1)]).kept_counting()
    assert not Using().kept_counting()


def figures(results, name, **values):
    usual = {
        "seconds_s": 1.0, "bytes": 1 << 20, "operation_s": 2.0, "pause_s": 0.05, "forecast_pause_s": 0.05,
        "gap_s": 0.1, "old_gap_s": 0.1, "rounds": 3, "private_mib": 100, "source_cpu_s": 0.5,
        "target_cpu_s": 0.1, "deadline_s": 40.0,
    }  # fmt: skip
    for figure, value in {**usual, **values}.items():
        results.add(f"{name}.{figure}", value)


@pytest.fixture
def measured():
    """What a run makes that keeps every promise."""
    results = Results()
    for rate, busy, way in itertools.product(handoff.RATES, handoff.BUSY, handoff.WAYS):
        figures(results, f"handoff.{busy}.{way}.{rate}")
    for busy in handoff.BUSY:
        name = f"migration.{busy}.{handoff.PROMISED}"
        for figure, value in {
            "failed": 0, "ended": 1, "seconds_s": 60.0, "bytes": 600 << 20, "disk_bytes": 17 << 20,
            "differing_pages": 9, "alive": 1, "gap_s": 0.2,
        }.items():  # fmt: skip
            results.add(f"{name}.{figure}", value)
    results.add("migration.5.10.ended", 0)
    for held in handoff.ALLOCS_MIB:
        figures(results, f"handoff.alloc.{held}", private_mib=100 + held, pause_s=0.05 + held / 5000)
    for written in handoff.DISKS_MIB:
        figures(results, f"handoff.disk.{written}")
    for rate in handoff.THIN:
        figures(results, f"handoff.early.{rate}", early=1, missing_pages=500, wanted_pages=9, serving_s=5.0)
    for _ in range(50):
        results.add("handoff.equal", 1)
    for number in range(20):
        results.add("handoff.many.operation_s", 10.0 + number / 10)
    for name, value in {
        "bytes": 60 << 20, "near_before_mib": 400, "near_most_mib": 600, "far_before_mib": 90,
        "far_most_mib": 340,
    }.items():  # fmt: skip
        results.add(f"handoff.many.{name}", value)
    results.add("handoff.failed", 0)
    return results


def rows(results):
    return {row.what: row for row in report.rows(results, handoff_report.LINES)}


def test_every_promise_is_a_line(measured):
    made = rows(measured)
    assert len(made) == len(handoff_report.LINES)
    assert all(row.met for row in made.values())


@pytest.mark.parametrize(
    ("name", "value", "broken"),
    [
        (f"handoff.0.base.{handoff.PROMISED}.seconds_s", 12.1, 1),
        (f"handoff.0.overlay.{handoff.PROMISED}.bytes", 7 << 20, 1),
        (f"handoff.5.overlay.{handoff.PROMISED}.seconds_s", 2.5, 1),
        (f"handoff.5.overlay.{handoff.PROMISED}.pause_s", 0.091, 1),
        (f"handoff.5.overlay.{handoff.PROMISED}.gap_s", 0.16, 1),
        (f"handoff.alloc.{handoff.ALLOCS_MIB[-1]}.pause_s", 0.6, 1),
        ("handoff.5.base.5.pause_s", 0.07, 1),
        ("handoff.5.overlay.10.seconds_s", 60.0, 1),
        ("handoff.early.5.gap_s", 2.1, 1),
        ("handoff.early.10.early", 0, 1),
        ("handoff.many.far_most_mib", 347, 1),
    ],
)
def test_a_figure_that_breaks_a_promise_is_seen(measured, name, value, broken):
    measured.samples[name] = [value]
    assert [row.met for row in rows(measured).values()].count(False) == broken


def test_one_unequal_machine_breaks_the_promise(measured):
    measured.samples["handoff.equal"][7] = 0
    assert [row.figure for row in rows(measured).values() if not row.met] == ["equal in 49 of 50"]


def test_one_that_waits_for_the_others_breaks_the_promise(measured):
    measured.samples["handoff.many.operation_s"][3] = 23.0
    assert [row.met for row in rows(measured).values()].count(False) == 1


def test_fewer_runs_than_promised_do_not_keep_it(measured):
    measured.samples["handoff.equal"] = [1] * 49
    assert [row.met for row in rows(measured).values()].count(False) == 1


def test_what_was_not_measured_is_left_out():
    assert rows(Results()) == {}
    assert "did not go" not in handoff_report.markdown(Results(), ABOUT)


def test_the_page_has_all_tables_and_what_failed(measured):
    measured.add("handoff.failed", 1)
    measured.notes["handoff.failed"] = "the peer does not answer"
    page = handoff_report.markdown(measured, ABOUT)
    for head in ("By the link's rate", "Switched early", "By private memory", "By what was written"):
        assert f"## {head}" in page
    assert "Of 2 hand-offs 1 did not go" in page
    assert "of 1 migrations 1 with pages that differ (9), 0 with a dead guest" in page
    widths = {}
    for line in page.splitlines():
        if line.startswith("|"):
            widths.setdefault(line.count("|"), 0)
            widths[line.count("|")] += 1
    assert min(widths.values()) >= 3, "a row has another number of cells than its table"
