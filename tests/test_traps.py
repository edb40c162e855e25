"""The table of `make traps` says what the tests showed, and a trap that is not wholly covered fails the run."""

from pathlib import Path

import pytest
from support import traps

pytest_plugins = ["pytester"]
TESTS = Path(__file__).parent


def _outcomes(**changes: list[bool]) -> dict[traps.Claim, list[bool]]:
    """Every trap with a test that holds and a broken version that is caught, but for changes at T4."""
    whole = {(trap, broken): [True] for trap in traps.TITLES for broken in ("", f"mutant_of_{trap}")}
    return whole | {("T4", broken.removeprefix("holds")): passed for broken, passed in changes.items()}


def _line(outcomes: dict[traps.Claim, list[bool]], trap: str = "T4", width: int = 200) -> str:
    return traps.table(traps.rows(outcomes), width).splitlines()[int(trap[1:])]


def _last(outcomes: dict[traps.Claim, list[bool]]) -> str:
    return traps.table(traps.rows(outcomes), 200).splitlines()[-1]


def _open(outcomes: dict[traps.Claim, list[bool]]) -> list[str]:
    return [row.trap for row in traps.rows(outcomes) if not row.complete]


def test_there_are_31_traps_in_order():
    assert list(traps.TITLES) == [f"T{i}" for i in range(1, 32)]


def test_whole_table_has_a_line_for_each_trap_and_counts_them():
    lines = traps.table(traps.rows(_outcomes()), 200).splitlines()
    assert len(lines) == 33 and [line.split()[0] for line in lines[1:-1]] == list(traps.TITLES)
    assert lines[-1] == "31 of 31 properties hold; 31 of 31 broken versions are caught"
    assert not _open(_outcomes())


def test_property_that_fails_once_does_not_hold():
    outcomes = _outcomes(holds=[True, False, True])
    assert "2 of 3" in _line(outcomes) and _open(outcomes) == ["T4"]
    assert _last(outcomes).startswith("30 of 31 properties hold; 31 of 31")


def test_broken_version_that_escapes_one_test_is_named_as_missed():
    outcomes = _outcomes(sneaky=[True, False], found=[True, True])
    assert _line(outcomes).endswith("2 of 3    MISSED sneaky, found, mutant_of_T4") and _open(outcomes) == ["T4"]
    assert _last(outcomes).endswith("32 of 33 broken versions are caught")


@pytest.mark.parametrize(("missing", "shown"), [("", "no test"), ("mutant_of_T4", "0 of 0")])
def test_trap_without_a_test_or_without_a_broken_version_is_open(missing: str, shown: str):
    outcomes = _outcomes()
    del outcomes["T4", missing]
    assert shown in _line(outcomes) and _open(outcomes) == ["T4"]


def test_lines_are_cut_to_the_width():
    outcomes = _outcomes(**{f"a_mutant_with_a_long_name_{i}": [True] for i in range(9)})
    assert len(_line(outcomes, width=100)) == 100 and _line(outcomes, width=100).endswith("…")
    assert len(_line(outcomes, width=900)) > 200


SMALL = """
import pytest
{every}

@pytest.fixture
def unlucky():
    raise RuntimeError("no model")

@pytest.mark.trap("T1")
@pytest.mark.trap("T2", broken="both")
def test_passes():
    pass

@pytest.mark.parametrize("case", [1, pytest.param(2, marks=pytest.mark.trap("T3", broken="by_parameter"))])
@pytest.mark.trap("T3")
def test_of_cases(case):
    assert case

def test_without_a_mark():
    raise AssertionError("not selected by -m trap")
{more}
"""
EVERY = "\n".join(
    f'@pytest.mark.trap("{trap}")\n@pytest.mark.trap("{trap}", broken="mutant")\ndef test_all_{trap}():\n    pass\n'
    for trap in traps.TITLES
)
FAILS = '@pytest.mark.trap("T2", broken="escapes")\ndef test_fails():\n    assert False'
NEVER_CALLED = '@pytest.mark.trap("T2")\ndef test_error(unlucky):\n    pass'
SKIPPED = '@pytest.mark.trap("T2")\n@pytest.mark.skip\ndef test_skipped():\n    pass'


def _run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, more: str, *options: str, every: str = EVERY
) -> pytest.RunResult:
    """pytest with this suite's own conftest on a small suite."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("COLUMNS", "200")
    pytester.makeconftest((TESTS / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = trap: as in pyproject.toml")
    pytester.makepyfile(SMALL.format(every=every, more=more))
    return pytester.runpytest_subprocess("-p", "xdist", "-q", "-m", "trap", "--traps", *options)


def test_results_reach_the_table_from_workers(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    result = _run(pytester, monkeypatch, "", "-n", "2")
    result.stdout.fnmatch_lines(["T1   training and rollout disagree*2 of 2 *1 of 1 *mutant"])
    result.stdout.fnmatch_lines(["T2 *1 of 1 *2 of 2 *both, mutant", "T3 *3 of 3 *2 of 2 *by_parameter, mutant"])
    result.stdout.fnmatch_lines(["31 of 31 properties hold; 33 of 33 broken versions are caught"])
    assert result.ret == pytest.ExitCode.OK


def test_what_fails_is_skipped_or_never_called_does_not_count_as_shown(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
):
    result = _run(pytester, monkeypatch, "\n".join((FAILS, NEVER_CALLED, SKIPPED)))
    result.stdout.fnmatch_lines(["T2 *1 of 3 *2 of 3 *MISSED escapes, both, mutant"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_trap_that_no_test_names_fails_a_run_in_which_everything_passed(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
):
    result = _run(pytester, monkeypatch, "", every="")
    result.stdout.fnmatch_lines(["T4 *no test *0 of 0", "2 of 31 properties hold; 2 of 2 broken versions are caught"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_a_tests_claims_are_its_marks(request: pytest.FixtureRequest):
    assert traps.claims(request.node) == []
    request.node.add_marker(pytest.mark.trap("T4"))
    request.node.add_marker(pytest.mark.trap("T5", broken="a_mutant"))
    assert set(traps.claims(request.node)) == {("T4", ""), ("T5", "a_mutant")}


@pytest.mark.parametrize(
    "mark",
    [pytest.mark.trap("T32"), pytest.mark.trap("T1", "T2"), pytest.mark.trap("T1", mutant="a"), pytest.mark.trap],
)
def test_mark_that_names_no_trap_stops_the_run(request: pytest.FixtureRequest, mark: pytest.MarkDecorator):
    request.node.add_marker(mark)
    with pytest.raises(pytest.UsageError, match="allowed: trap"):
        traps.claims(request.node)
