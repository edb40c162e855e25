"""The table of `make traps`: for each known trap, whether its property holds and which broken versions are caught.

A test that shows a property carries `@pytest.mark.trap("T4")`; one that shows that a broken version is caught carries
`@pytest.mark.trap("T4", broken="its_name")`. A broken version counts as caught when all tests that carry its name pass.
"""

import shutil
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pytest

TITLES = {
    "T1": "training and rollout disagree",
    "T2": "ratio taken against the reference",
    "T3": "leakage between groups",
    "T4": "order matters",
    "T5": "scaling by the deviation",
    "T6": "length bias",
    "T7": "gradient of the KL term",
    "T8": "temperature of what is scored",
    "T9": "truncated support",
    "T10": "end of sequence",
    "T11": "padding",
    "T12": "re-tokenising",
    "T13": "dropout",
    "T14": "micro-batches",
    "T15": "advantages per process",
    "T16": "failed sample as a reward",
    "T17": "silent stabilisers",
    "T18": "what CLIP scores",
    "T19": "latent seed as confounder",
    "T20": "moving reference",
    "T21": "loss 0 read as failure",
    "T22": "unbounded negative side",
    "T23": "flat groups still move weights",
    "T24": "resume",
    "T25": "overflow",
    "T26": "user text becomes control tokens",
    "T27": "a later turn scored without its picture",
    "T28": "pictures of other rows",
    "T29": "context that gets gradient",
    "T30": "keep that is drawn again",
    "T31": "words that leak the reward",
}
Claim = tuple[str, str]  # (trap, name of a broken version, or "" for the property itself)


@dataclass(frozen=True)
class Row:
    """What the tests showed about one trap."""

    trap: str
    properties: list[bool]  # of each test of the property: it passed
    broken: dict[str, bool]  # broken version → it was caught

    @property
    def holds(self) -> bool:
        """The property has tests, and all of them passed."""
        return bool(self.properties) and all(self.properties)

    @property
    def complete(self) -> bool:
        """The property holds, there are broken versions, and all of them are caught."""
        return self.holds and bool(self.broken) and all(self.broken.values())


def claims(item: pytest.Item) -> list[Claim]:
    """What a test shows about which traps, by its marks."""
    found = []
    for mark in item.iter_markers("trap"):
        if len(mark.args) != 1 or mark.args[0] not in TITLES or set(mark.kwargs) - {"broken"}:
            raise pytest.UsageError(
                f'{item.nodeid}: found trap{mark.args}, {mark.kwargs}; allowed: trap("T1" … "T31", broken="a_name")'
            )
        found.append((mark.args[0], mark.kwargs.get("broken", "")))
    return found


def rows(outcomes: Mapping[Claim, Iterable[bool]]) -> list[Row]:
    """A row for every trap, from whether the tests of each claim passed."""
    found = {trap: Row(trap, [], {}) for trap in TITLES}
    for (trap, broken), passed in outcomes.items():
        if broken:
            found[trap].broken[broken] = all(passed)
        else:
            found[trap].properties.extend(passed)
    return list(found.values())


def table(found: list[Row], width: int) -> str:
    """The rows as text, cut to `width` columns, and below them how many properties hold and versions are caught."""
    lines = [_line("", "trap", "property holds", "caught", "broken versions"), *map(_row_line, found)]
    versions = [caught for row in found for caught in row.broken.values()]
    total = (
        f"{sum(row.holds for row in found)} of {len(found)} properties hold; "
        f"{sum(versions)} of {len(versions)} broken versions are caught"
    )
    return "\n".join([*(line if len(line) <= width else f"{line[: width - 1]}…" for line in lines), total])


def _row_line(row: Row) -> str:
    kept, caught = sum(row.properties), sum(row.broken.values())
    holds = f"{kept} of {len(row.properties)}" if row.properties else "no test"
    names = sorted(row.broken, key=lambda name: (row.broken[name], name))
    missed = [name if row.broken[name] else f"MISSED {name}" for name in names]
    return _line(row.trap, TITLES[row.trap], holds, f"{caught} of {len(names)}", ", ".join(missed))


def _line(trap: str, title: str, holds: str, caught: str, names: str) -> str:
    return f"{trap:4} {title:34} {holds:15} {caught:9} {names}".rstrip()


class TrapReport:
    """Collects whether the tests of each claim passed."""

    def __init__(self) -> None:
        self.outcomes: dict[Claim, list[bool]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test counts once it was called, and as failed where it never came to that."""
        if report.when == "call" or not report.passed:
            for name, claim in report.user_properties:
                if name == "trap":
                    self.outcomes[tuple(claim)].append(report.passed)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A trap without a test that holds or a broken version that is caught fails the run."""
        if session.exitstatus == pytest.ExitCode.OK and not all(row.complete for row in rows(self.outcomes)):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The table."""
        terminalreporter.section("traps")
        terminalreporter.write_line(table(rows(self.outcomes), shutil.get_terminal_size((120, 24)).columns))
