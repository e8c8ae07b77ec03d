"""The page of the early start: what was computed says so, and what was not measured is left out."""

import pytest
from benchmarks import report
from benchmarks.early import RATES, RTT
from benchmarks.early_report import APPS, LINES, eager_seconds, image_and_boot_seconds, markdown
from benchmarks.report import Figures, MissingError
from benchmarks.results import Results

MIB = 1 << 20
ABOUT = {
    "date": "2026-01-01", "seed": 1, "cpu": "a CPU", "cores": 2, "memory_mib": 4096, "kernel": "6.1",
    "qemu": "7.2", "accelerator": "tcg", "python": "3.11", "load_before": 0.1, "seconds": 10,
    "preparing_seconds": {},
}  # fmt: skip


@pytest.fixture
def results():
    """The reference application, and no other."""
    made = Results()
    for name, value in {
        "early.reference.overlay_bytes": 12_500_000,
        "early.reference.image_bytes": 125_000_000,
        "early.reference.boot_s": 20.0,
        "eager.reference.1000.first_s": 0.5,
        "eager.reference.100.first_s": 1.5,
        **{f"early.reference.{rate}.{RTT}.first_s": 0.25 for rate in RATES},
        **{f"early.reference.{rate}.{RTT}.answering_s": 0.125 for rate in RATES},
        **{f"early.reference.{rate}.{RTT}.known.first_s": 0.375 for rate in RATES},
    }.items():
        made.add(name, value)
    return made


def test_a_measured_eager_start_is_not_computed(results):
    assert eager_seconds(Figures(results), "reference", 100) == (1.5, False)


def test_a_computed_one_adds_to_the_wire_what_the_fastest_link_showed(results):
    seconds, computed = eager_seconds(Figures(results), "reference", 10)
    assert computed
    assert seconds == pytest.approx(10.0 + (0.5 - 0.1))


def test_an_image_takes_its_wire_and_its_boot(results):
    assert image_and_boot_seconds(Figures(results), "reference", 10) == pytest.approx(100.0 + 20.0)


def test_what_was_not_measured_is_an_error_and_its_line_is_left_out(results):
    with pytest.raises(MissingError):
        eager_seconds(Figures(results), "heap", 10)
    rows = report.rows(results, LINES)
    assert [row.promise for row in rows] == ["<= 0.9 s", "<= 0.5 s"]
    assert all(row.met for row in rows)
    assert "asks from the start 0.38 s" in rows[0].figure
    assert "all bytes first 10.4 s (computed)" in rows[0].beside
    assert "(computed)" not in rows[1].beside.partition(";")[0]


def test_a_promise_that_is_not_kept_is_said(results):
    results.samples[f"early.reference.10.{RTT}.first_s"] = [2.0, 2.5, 3.0]
    row, _ = report.rows(results, LINES)
    assert not row.met
    assert "2.50 s (2.00-3.00, 3 runs)" in row.figure
    assert "**no**" in "\n".join(report.table([row]))


def test_the_page_has_a_table_for_each_app_and_dashes_for_what_is_missing(results):
    page = markdown(results, ABOUT)
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) >= len(APPS)
    for table in tables:
        assert {line.count("|") for line in table} == {table[0].count("|")}
    assert "| 10 | - | 0.25 | - | - | - | 10.4 c | 120 c |" in page
    assert "| 10 | - | - | - | - | - | - | - |" in page
