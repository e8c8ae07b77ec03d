"""The page of a site that serves: its promises, and the tables that stand behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import report
from benchmarks.report import Figures, Line, MissingError, Row
from benchmarks.results import Results
from benchmarks.site import CONNECTIONS, LISTED, POSTS
from benchmarks.site_hostile import KINDS
from benchmarks.site_polite import RATE, STORM_SECONDS

_MOST_TO_BARE, _MOST_TO_RUN, _MOST_DISTURBED, _MOST_AFTER = 2.5, 1.25, 2.0, 10.0
_OPERATIONS = {
    "get": "GET of one instance",
    "list": f"list of {LISTED} instances",
    "post": "POST of an instance to its 202",
}


def _api(f: Figures, name: str, least: float, rate: str) -> Row:
    """A line of the API; ``rate`` names the figure of which so many per second are promised."""
    ours, bare = f(f"api.site.{name}.cpu_ms"), f(f"api.bare.{name}.cpu_ms")
    promised = f"; >= {least:,.0f} /s on one core" if least else ""
    rates = f(f"api.bare.{name}.per_second") / f(f"api.site.{name}.per_second")
    reached = f"{ours / bare:.2f} x its CPU: {_spread(f, f'api.site.{name}.cpu_ms', 2)} ms; "
    reached += f"{_spread(f, f'api.site.{rate}.per_second')} /s"
    if rate != name:
        reached += f" while instances are made, {_spread(f, f'api.site.{name}.per_second')} /s while none is"
    return Row(
        f"API, one process, SQLite, passwords and policy on: {_OPERATIONS[name]}",
        f"<= {_MOST_TO_BARE} x the bare handler's CPU{promised}",
        reached,
        f"bare handler {_spread(f, f'api.bare.{name}.cpu_ms', 2)} ms, "
        f"{_spread(f, f'api.bare.{name}.per_second')} /s ({rates:.2f} x)",
        ours <= _MOST_TO_BARE * bare and f(f"api.site.{rate}.per_second") >= least,
    )


def _steps(f: Figures) -> Row:
    more = f("steps.taskflow.ms") - f("steps.plain.ms")
    return Row(
        "what TaskFlow adds to an operation of two steps",
        "",
        f"{more:.1f} ms: {_spread(f, 'steps.taskflow.ms', 1)} ms, {f('steps.taskflow.cpu_ms'):.1f} of it CPU",
        f"called without it {_spread(f, 'steps.plain.ms', 1)} ms, {f('steps.plain.cpu_ms'):.1f} of it CPU",
        None,
    )


def _over_http(f: Figures, way: str, what: str) -> Row:
    ours, run, alone = (f(f"http.{way}.{name}_s") for name in ("answer", "run_answer", "synthesis"))
    return Row(
        f"POST of an instance to its first answer over HTTP, overlay in the store: {what}",
        f"<= {_MOST_TO_RUN} x `cloudlet run`",
        f"{ours / run:.2f} x: {f.seconds(f'http.{way}.answer_s')}; {ours / alone:.2f} x the synthesis in it",
        f"`cloudlet run`, from its start as a program {f.seconds(f'http.{way}.run_answer_s')}; "
        f"the synthesis that the site's keeper did {f.seconds(f'http.{way}.synthesis_s')}",
        ours <= _MOST_TO_RUN * run,
    )


def _hostile(f: Figures) -> Row:
    usual = f("hostile.undisturbed.p99_ms")
    times = {kind: f(f"hostile.{kind}.p99_ms") / usual for kind in KINDS}
    after = max(f(f"hostile.{kind}.after_s") for kind in KINDS)
    let_in = sum(f(f"hostile.{kind}.let_in") for kind in KINDS)
    worst = max(times, key=lambda kind: times[kind])
    kept = sum(value <= _MOST_DISTURBED for value in times.values())
    later = sum(f(f"hostile.{kind}.later_p99_ms") <= _MOST_DISTURBED * usual for kind in KINDS)
    return Row(
        "hostile clients: p99 of another user's GET; nothing let in; until all is as before",
        f"<= {_MOST_DISTURBED:.0f} x undisturbed; 0; <= {_MOST_AFTER:.0f} s",
        f"kept with {kept} of {len(KINDS)} kinds, at worst {times[worst]:.1f} x ({worst}); {let_in:.0f}; "
        f"{after:.1f} s",
        f"undisturbed {usual:.1f} ms; without the first {STORM_SECONDS:.0f} s, in which they come all at "
        f"once, kept with {later} of {len(KINDS)}",
        kept == len(KINDS) and not let_in and after <= _MOST_AFTER,
    )


LINES: Sequence[Line] = (
    lambda f: _api(f, "get", 1000, "get"),
    lambda f: _api(f, "list", 0, "list"),
    lambda f: _api(f, "post", 150, "working"),
    _steps,
    lambda f: _over_http(f, "first", "first start of the app at the site"),
    lambda f: _over_http(f, "again", "later starts"),
    _hostile,
)


def markdown(results: Results, about: dict[str, Any]) -> str:
    """The page of the documentation."""
    f = Figures(results)
    return "\n".join(
        [
            "# Measured: a site that serves",
            "",
            *report.origin(about, "python -m benchmarks --only site"),
            *report.table(report.rows(results, LINES)),
            "",
            *_api_text(f),
            *_hostile_table(f),
        ]
    )


def _api_text(f: Figures) -> Iterator[str]:
    yield "## The API\n"
    yield (
        "`cloudlet serve` as it is where nobody configures more than users and high limits: its log goes "
        "to a file, passwords are checked (who was here a moment ago is remembered), the usual policy "
        "decides. *Bare* (`benchmarks/site_bare.py`) is what one would write otherwise: a route of "
        "falcon, a query of SQLAlchemy core, JSON, for POST two rows in one transaction; no "
        "authentication, no policy, no validation, no log, no events, no work afterwards. Both are served "
        "by cheroot with 16 threads, on the same rows, with WAL and without waiting for the disk; both "
        f"were measured in turns, on one core, all threads together, by {CONNECTIONS} connections that are "
        "kept, from a process on the other core. CPU is the server's, user and system, as "
        "`/proc/PID/stat` has it; the processes that keep instances, and the machines, are not in it and "
        "are on the other core.\n"
    )
    whole, each = _number(f, "api.site.whole.cpu_ms", 1), _number(f, "api.site.working.cpu_ms", 1)
    yield (
        f"{LISTED} instances on the fake driver run meanwhile, idle. A POST leaves work behind, which goes "
        f"on in the background. So it is measured twice, {POSTS} in one go: while the instances are made, "
        "from the first request to the last 202, which is the rate that is promised; and while that "
        "process stands still of which their keepers are forked, so that all who work wait, and the CPU "
        f"is that of the requests. From POST to an instance that answers the server used {whole} ms of CPU "
        f"in all, and {each} ms for each 202 that it gave meanwhile. TaskFlow's share is a line of its "
        "own: an operation whose two steps do nothing, its rows and events written as always, with "
        "TaskFlow and without.\n"
    )


def _hostile_table(f: Figures) -> Iterator[str]:
    yield "## Hostile clients\n"
    yield (
        f"A polite user asks for an instance {RATE} times a second, every second time on a new connection; "
        "time counts from when a request was due. The server has both cores, as in earnest. Hostile clients "
        "are a process of their own, on one of them, which is the polite one's too and where they give way "
        "(`nice`): on two cores, which are shared with others, they cost some of what is seen here by "
        f"themselves. They come all at once: *after {STORM_SECONDS:.0f} s* is the p99 of what was asked "
        "later. *As before*: until a second began of whose requests at most one in fifty took more than "
        "twice the undisturbed p99.\n"
    )
    yield _row(
        "clients", "median, ms", "p99, ms", "x", f"after {STORM_SECONDS:.0f} s", "failed",
        "as before after, s", "server's CPU", "its MiB",
        "answers",
    )  # fmt: skip
    yield _row("---", *["---:"] * 8, "---")
    usual = "hostile.undisturbed"
    yield _row(
        "none", _number(f, f"{usual}.median_ms", 1), _number(f, f"{usual}.p99_ms", 1), "1", "",
        _number(f, f"{usual}.failed"), *[""] * 4,
    )  # fmt: skip
    for kind, clients in KINDS.items():
        name = f"hostile.{kind}"
        try:
            times = f"{f(f'{name}.p99_ms') / f(f'{usual}.p99_ms'):.1f}"
            share = f"{f(f'{name}.server_cpu_share'):.0%}"
        except MissingError:
            continue
        yield _row(
            clients.what, _number(f, f"{name}.median_ms", 1), _number(f, f"{name}.p99_ms", 1), times,
            _number(f, f"{name}.later_p99_ms", 1),
            _number(f, f"{name}.failed"), _number(f, f"{name}.after_s", 1), share,
            _number(f, f"{name}.server_mib"), f.note(f"{name}.answers") or "none",
        )  # fmt: skip
    yield ""


def _spread(f: Figures, name: str, digits: int = 0) -> str:
    """A median with its range."""
    median = f(name)
    low, high = f.range(name)
    text = f"{median:.{digits}f}"
    return text if low == high else f"{text} ({low:.{digits}f}-{high:.{digits}f})"


def _number(f: Figures, name: str, digits: int = 0) -> str:
    try:
        return f"{f(name):.{digits}f}"
    except MissingError:
        return "-"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
