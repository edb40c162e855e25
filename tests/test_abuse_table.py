"""The table of `make abuse` counts what the tests tried, and fails where a kind was not tried or got through."""

from pathlib import Path

import pytest
from support import abuse

pytest_plugins = ["pytester"]
TESTS = Path(__file__).parent
SMALL = """
import pytest
{every}

@pytest.mark.abuse("S4")
def test_more(attempts):
    with attempts(40) as got_through:
        {more}
"""
EVERY = "\n".join(
    f'@pytest.mark.abuse("{kind}")\n@pytest.mark.abuse("{kind}", broken="weak")\n'
    f"def test_all_{kind}(attempts):\n    with attempts(100): pass\n"
    for kind in abuse.TITLES
)


def _run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, more: str, every: str = EVERY) -> pytest.RunResult:
    """pytest in two workers with this suite's own conftest on a small suite."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest((TESTS / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers = abuse: as in pyproject.toml")
    pytester.makepyfile(SMALL.format(every=every, more=more))
    return pytester.runpytest_subprocess("-p", "xdist", "-n", "2", "-q", "-m", "abuse", "--abuse")


def test_attempts_reach_the_table_from_workers(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    result = _run(pytester, monkeypatch, "pass")
    result.stdout.fnmatch_lines(["S4 * 140 * 0   1 of 1", "740 attempts, 0 got through"])
    assert result.ret == pytest.ExitCode.OK


@pytest.mark.parametrize(
    ("more", "through"), [("got_through += ['a', 'b']; assert not got_through", "2"), ("assert False", "1")]
)
def test_what_got_through_is_counted(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, more: str, through: str
):
    result = _run(pytester, monkeypatch, more)
    result.stdout.fnmatch_lines([f"S4 * 140 * {through}   1 of 1", f"740 attempts, {through} got through"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_a_kind_that_got_through_unasserted_or_was_not_tried_fails_the_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
):
    assert _run(pytester, monkeypatch, "got_through += ['a']").ret == pytest.ExitCode.TESTS_FAILED
    assert _run(pytester, monkeypatch, "pass", every="").ret == pytest.ExitCode.TESTS_FAILED


def test_a_weakened_version_that_escapes_one_test_is_named_as_missed():
    found = abuse.rows([("S4", 5, 0)], {("S4", "found"): [True, True], ("S4", "sneaky"): [True, False]})
    assert "1 of 2, MISSED sneaky" in abuse.table(found) and not any(row.complete for row in found)


@pytest.mark.parametrize("mark", [pytest.mark.abuse("S2"), pytest.mark.abuse("S1", weak="a"), pytest.mark.abuse])
def test_a_mark_that_names_no_abuse_stops_the_run(request: pytest.FixtureRequest, mark: pytest.MarkDecorator):
    request.node.add_marker(mark)
    with pytest.raises(pytest.UsageError, match="allowed: abuse"):
        abuse.claims(request.node)


def test_attempts_want_a_mark(request: pytest.FixtureRequest):
    with pytest.raises(pytest.UsageError, match="wants one mark"), abuse.counted(request.node, 3):
        pass
