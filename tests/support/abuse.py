"""The table of `make abuse`: for each kind of abuse, how often it was tried, and how often it got through.

A test that tries abuse carries `@pytest.mark.abuse("S4")` and counts with the fixture `attempts`; one that shows that
a weakened kit lets it through, and that this is seen, carries `@pytest.mark.abuse("S4", broken="its_name")`.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pytest

TITLES = {
    "S1": "code that comes with data: pickles, eval, YAML objects",
    "S3": "code in the names and values of parameters",
    "S4": "names that lead out of a folder",
    "S5": "markup in prompts, on pages and in widgets",
    "S6": "special tokens in a user's text",
    "S7": "keys of the environment in a run's files",
    "S9": "formulas in titles, escape codes in logs and errors",
}
Count = Callable[[int], contextlib.AbstractContextManager[list]]
Claim = tuple[str, str]  # (abuse, name of a weakened version, or "" for the kit as it is)


@dataclass
class Row:
    """What the tests found about one kind of abuse."""

    abuse: str
    tried: int = 0
    through: int = 0
    weakened: dict[str, bool] = field(default_factory=dict)  # weakened version → it was caught

    @property
    def complete(self) -> bool:
        """It was tried, nothing got through, there are weakened versions, and all of them are caught."""
        return self.tried > 0 and not self.through and bool(self.weakened) and all(self.weakened.values())


def claims(item: pytest.Item) -> list[Claim]:
    """What a test tries, by its marks."""
    found = []
    for mark in item.iter_markers("abuse"):
        if len(mark.args) != 1 or mark.args[0] not in TITLES or set(mark.kwargs) - {"broken"}:
            allowed = f'abuse("{" or ".join(TITLES)}", broken="a_name")'
            raise pytest.UsageError(f"{item.nodeid}: found abuse{mark.args}, {mark.kwargs}; allowed: {allowed}")
        found.append((mark.args[0], mark.kwargs.get("broken", "")))
    return found


@contextlib.contextmanager
def counted(item: pytest.Item, tried: int) -> Iterator[list]:
    """Note in a test's report that `tried` attempts were made, and what was added to the list as having got through.

    A check that fails before anything was added counts as one that got through.
    """
    kinds = [abuse for abuse, broken in claims(item) if not broken]
    if len(kinds) != 1:
        raise pytest.UsageError(f'{item.nodeid}: counts attempts; it wants one mark of what it tries, abuse("S1")')
    through: list = []
    try:
        yield through
    except BaseException:
        through[:] = through or ["a check failed"]
        raise
    finally:
        item.user_properties.append(("attempts", (kinds[0], tried, len(through))))


def rows(attempts: list[tuple[str, int, int]], caught: Mapping[Claim, list[bool]]) -> list[Row]:
    """A row for every kind, from what was counted and from whether the tests of weakened versions passed."""
    tried, through = Counter(), Counter()
    for abuse, many, escaped in attempts:
        tried[abuse] += many
        through[abuse] += escaped
    found = {abuse: Row(abuse, tried[abuse], through[abuse]) for abuse in TITLES}
    for (abuse, broken), passed in caught.items():
        found[abuse].weakened[broken] = all(passed)
    return list(found.values())


def table(found: list[Row]) -> str:
    """The rows as text."""
    lines = [_line("", "abuse", "tried", "got through", "weakened versions caught")]
    for row in found:
        missed = [name for name, caught in row.weakened.items() if not caught]
        seen = f"{len(row.weakened) - len(missed)} of {len(row.weakened)}{''.join(f', MISSED {n}' for n in missed)}"
        lines.append(_line(row.abuse, TITLES[row.abuse], f"{row.tried:,}", f"{row.through:,}", seen))
    total = f"{sum(row.tried for row in found):,} attempts, {sum(row.through for row in found):,} got through"
    return "\n".join([*lines, total])


def _line(abuse: str, title: str, tried: str, through: str, seen: str) -> str:
    return f"{abuse:3} {title:56} {tried:>8} {through:>12}   {seen}".rstrip()


class AbuseReport:
    """Collects what the tests counted."""

    def __init__(self) -> None:
        self.attempts: list[tuple[str, int, int]] = []
        self.caught: dict[Claim, list[bool]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A weakened version counts as caught once its test was called and passed."""
        if report.when != "call" and report.passed:
            return
        for name, value in report.user_properties:
            if name == "attempts":
                self.attempts.append(tuple(value))
            elif name == "abuse" and value[1]:
                self.caught[tuple(value)].append(report.passed)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """A kind that was not tried, or that got through, fails the run."""
        if session.exitstatus == pytest.ExitCode.OK and not all(row.complete for row in self.rows()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The table."""
        terminalreporter.section("abuse")
        terminalreporter.write_line(table(self.rows()))

    def rows(self) -> list[Row]:
        """The table's rows."""
        return rows(self.attempts, self.caught)
