"""The chaos program: its table says what happened, its short form loses nothing, and broken versions are caught."""

from pathlib import Path

import pytest
from support.forked import Forked

from grpo_kit.config import PROJECT_ROOT
from tests.chaos import FAULTS, Fault, Outcome, every_fault, fault, table
from tests.chaos.__main__ import main
from tests.chaos.damages import noticed_by_loaders

OURS = ("R1", "R2", "R6", "R7", "R8", "R17")


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """What the program says of the broken versions and of the short form; the libraries are loaded already."""
    folder = tmp_path_factory.mktemp("chaos")
    done = Forked(lambda: main(["--broken", "--short", *OURS]), folder / "said", folder / "errors")
    assert done.wait() == 0, done.said + (folder / "errors").read_text()
    lines = done.said.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("fault "))
    return lines[:head], lines[head + 1 :]


@pytest.mark.slow
def test_short_form_loses_nothing_and_needs_no_repair(tried: tuple[list[str], list[str]]):
    rows = [line.split() for line in tried[1]]
    assert [row[0] for row in rows] == list(OURS)
    assert all(int(row[-3]) > 0 and row[-2:] == ["0", "0"] for row in rows)


@pytest.mark.slow
def test_broken_versions_of_the_kit_are_caught(tried: tuple[list[str], list[str]]):
    assert {line.split()[0] for line in tried[0]} == {"R2", "R6", "R7", "R8", "R17"}
    assert all(line.endswith(" caught") for line in tried[0])


def test_a_fault_that_is_none_is_named(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as stop:
        main(["R1", "R99"])
    assert stop.value.code == 2 and "fault 'R99': allowed: R1, R2" in capsys.readouterr().err


def test_loaders_alone_notice_no_flipped_bit_in_weights():
    """Why checkpoints carry hashes."""
    file = Path(PROJECT_ROOT, "data", "shapeworld", "policy", "model.safetensors")
    assert noticed_by_loaders(file, 20) == {"safetensors": 0, "torch": 0}


def _row(name: str, *counts: int, remark: str = "") -> tuple[Fault, Outcome]:
    return Fault(name, "something", lambda short: Outcome(1)), Outcome(*counts, remarks=(remark,) if remark else ())


def test_table_has_a_line_for_each_fault_and_remarks_below():
    lines = table([_row("R1", 200), _row("R2", 80, 1, 2, remark="iteration 3 is gone")]).splitlines()
    assert lines[0].split() == ["fault", "tried", "lost", "repaired", "by", "hand"]
    assert [line.split()[-3:] for line in lines[1:3]] == [["200", "0", "0"], ["80", "1", "2"]]
    assert lines[3] == "R2: iteration 3 is gone"


@pytest.mark.parametrize("counts", [(0,), (5, 1), (5, 0, 1)])
def test_outcome_with_nothing_tried_something_lost_or_repaired_is_not_withstood(counts: tuple[int, ...]):
    assert Outcome(5).withstood and not Outcome(*counts).withstood
    assert not (Outcome(5) + Outcome(*counts)).withstood or counts == (0,)


def test_faults_are_found_in_order_and_a_name_is_taken_once():
    names = [one.name for one in every_fault()]
    assert set(OURS) <= set(names) and names == sorted(names, key=lambda name: int(name[1:]))
    with pytest.raises(ValueError, match="fault R1: registered twice"):
        fault("R1", "again")(lambda short: Outcome(1))
    assert FAULTS["R1"].title == "SIGKILL at random times"
