"""The benchmarks' own arithmetic: pairing, intervals, exponents, gates, memory, and what is written. No times."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.speed import measure, results, table, text_policy
from benchmarks.speed.results import BenchmarkError, Figure, Gate, Result, Settings
from grpo_kit.config import load_config

Seconds = measure.Seconds


def _seconds(*values: float) -> list[Seconds]:
    return [Seconds(value, 2 * value) for value in values]


# --- turns and ratios -------------------------------------------------------------------------------------------------


def test_sides_take_turns_and_get_the_same_numbers():
    calls = []
    sides = {name: lambda number, name=name: calls.append((name, number)) for name in ("a", "b")}
    timings = measure.alternate(sides, rounds=2, warm_up=1)
    assert calls == [(name, number) for number in (-1, 0, 1) for name in ("a", "b")]
    assert {name: len(found) for name, found in timings.items()} == {"a": 2, "b": 2}


def test_shuffled_sides_are_each_called_once_a_round_in_an_order_that_comes_again():
    def order() -> list[tuple[str, int]]:
        calls = []
        sides = {name: lambda number, name=name: calls.append((name, number)) for name in "abcdef"}
        measure.alternate(sides, rounds=5, warm_up=0, shuffled=True)
        return calls

    calls = order()
    assert calls == order() and sorted(calls) == [(name, number) for name in "abcdef" for number in range(5)]
    assert calls != [(name, number) for number in range(5) for name in "abcdef"]


def test_ratios_are_those_of_the_same_round():
    slower, quicker = _seconds(2.0, 30.0, 2.0), _seconds(1.0, 10.0, 1.0)  # the second round met a busy machine
    assert measure.paired_ratios(slower, quicker).tolist() == [2.0, 3.0, 2.0]
    assert measure.median(measure.paired_ratios(slower, quicker)).value == 2.0
    unpaired = np.median([s.cpu for s in sorted(slower, key=lambda s: -s.cpu)]) / 1.0
    assert unpaired == 2.0 and measure.paired_ratios(slower, quicker, "wall").tolist() == [2.0, 3.0, 2.0]


def test_rounds_of_different_number_are_refused():
    with pytest.raises(BenchmarkError, match="pairs: found 2 and 1 rounds"):
        measure.paired_ratios(_seconds(1.0, 1.0), _seconds(1.0))
    with pytest.raises(BenchmarkError, match="pairs: found 0 and 0"):
        measure.paired_ratios([], [])


# --- intervals --------------------------------------------------------------------------------------------------------


def test_interval_of_the_median_covers_it_as_often_as_it_says():
    source = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        found = measure.median(source.normal(3.0, 0.1, size=15))
        assert found.low <= found.value <= found.high
        covered += found.low <= 3.0 <= found.high
    assert covered >= 50  # 57 expected; 49 or fewer would come about once in 10,000


def test_equal_rounds_have_an_interval_of_no_width():
    assert measure.median([2.0] * 7) == measure.Interval(2.0, 2.0, 2.0)


def test_geometric_mean_is_of_the_cases_medians():
    found = measure.geometric_mean([np.array([2.0, 2.0, 100.0]), np.array([8.0, 8.0, 8.0])])
    assert found.value == pytest.approx(4.0)
    assert found.low == pytest.approx(4.0) and found.high > 4.0  # the odd round widens the interval, not the estimate


@pytest.mark.parametrize("power", [0.0, 0.4, 1.0, 1.7])
def test_exponent_of_a_power_law_is_found_whatever_its_scale(power: float):
    sizes = np.array([32, 64, 128, 512])
    rounds = np.stack([scale * sizes**power for scale in (0.1, 1.0, 7.0)])  # rounds on machines of any speed
    found = measure.exponent(sizes, rounds)
    assert found.value == pytest.approx(power, abs=1e-9)
    assert found.high - found.low == pytest.approx(0, abs=1e-9)


def test_exponent_is_the_least_squares_line_through_the_logarithms():
    sizes, seconds = np.array([1.0, 2.0, 5.0, 9.0]), np.array([[0.3, 0.4, 0.9, 1.1]])
    expected = np.polyfit(np.log(sizes), np.log(seconds[0]), 1)[0]
    assert measure.exponent(sizes, seconds).value == pytest.approx(expected)


def test_slope_is_not_moved_by_an_odd_value():
    values = 5 + 0.01 * np.arange(100)
    values[50] = 1e6
    found = measure.slope(values)
    assert found.value == pytest.approx(0.01) and found.low <= 0.01 <= found.high
    assert abs(np.polyfit(np.arange(100), values, 1)[0] - 0.01) > 1  # a line of least squares is


# --- memory -----------------------------------------------------------------------------------------------------------


def _fill(megabytes: int) -> None:
    block = np.ones(megabytes * 125_000)  # 8 bytes each
    del block


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark is Linux's")
def test_growth_of_memory_is_that_of_the_peak_and_starts_again_each_time():
    _fill(400)
    assert measure.peak_growth_mb(lambda: _fill(200)) == pytest.approx(200, abs=20)
    assert measure.peak_growth_mb(lambda: _fill(80)) == pytest.approx(80, abs=20)


def test_fresh_process_returns_what_was_computed_there():
    assert measure.in_fresh_process(pow, 2, 10) == 1024


# --- gates ------------------------------------------------------------------------------------------------------------


def test_gates_within_their_limits_pass():
    gates = [Gate("log-probabilities", 1e-6, 1e-5), Gate("tokens", 0, 0)]
    assert results.require(gates) == gates


@pytest.mark.parametrize("measured", [1.1e-5, float("nan"), float("inf")])
def test_gate_that_fails_is_an_error_in_one_line(measured: float):
    with pytest.raises(BenchmarkError, match=r"gate 'log-probabilities': found .* allowed: at most 1e-05") as error:
        results.require([Gate("tokens", 0, 0), Gate("log-probabilities", measured, 1e-5)])
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def both_sides(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """The kit and TRL's own trainer on a few tokens, with a KL term."""
    policy_iteration, shape = pytest.importorskip("benchmarks.speed.policy_iteration"), text_policy.Shape(2, 3, 5, 4)
    config = policy_iteration.configured(shape, beta=0.04)
    folder = text_policy.build(tmp_path_factory.mktemp("policy"))
    kit = policy_iteration.make_kit(folder, shape, config)
    return policy_iteration, kit, policy_iteration.make_text_peer(folder, shape, config), shape


def test_gates_of_kit_and_trl_pass_and_put_the_weights_back(both_sides: tuple):
    policy_iteration, kit, peer, shape = both_sides
    before = {name: value.clone() for name, value in kit.policy.model.state_dict().items()}
    gates = policy_iteration.check(kit, peer, shape)
    assert [gate.name for gate in gates[:3]] == ["log-probabilities", "advantages", "gradient, relative"]
    assert all(gate.measured > 0 for gate in gates[:3])  # two ways of computing, compared for real
    assert all(torch.equal(value, before[name]) for name, value in kit.policy.model.state_dict().items())


def _hotter(peer: object, kit: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kit.policy, "temperature", 1.01)


def _other_kl_gradient(peer: object, kit: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer.trainer.args, "use_bias_correction_kl", True)


def _no_kl(peer: object, kit: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer.trainer, "beta", 0.0)


def _other_rewards(peer: object, kit: object, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(kit.config, {"training_settings.scale_rewards": "none"})
    monkeypatch.setattr(kit, "config", config)


@pytest.mark.parametrize(
    ("change", "gate"),
    [(_hotter, "log-prob"), (_other_kl_gradient, "gradient"), (_no_kl, "gradient"), (_other_rewards, "advantages")],
)
def test_gates_catch_sides_that_do_different_work(
    both_sides: tuple, change: Callable, gate: str, monkeypatch: pytest.MonkeyPatch
):
    policy_iteration, kit, peer, shape = both_sides
    change(peer, kit, monkeypatch)
    with pytest.raises(BenchmarkError, match=f"gate '{gate}"):
        policy_iteration.check(kit, peer, shape)


# --- figures, records, table ------------------------------------------------------------------------------------------


def test_goal_is_reached_by_both_clocks_or_not_at_all():
    assert Figure("time", 3.1, must=3.0, wall=3.2).reaches(3.0)
    assert not Figure("time", 3.1, must=3.0, wall=2.9).reaches(3.0)
    assert not Figure("time", 2.9, must=3.0, wall=3.1).reaches(3.0)
    assert Figure("overhead", 1.04, more_is_better=False, wall=1.05).reaches(1.1)
    assert not Figure("overhead", 1.04, more_is_better=False, wall=1.2).reaches(1.1)


FIGURES = [
    Figure("TRL / kit", 3.4, 3.1, 3.7, 3.0, 4.0, wall=3.3),
    Figure("TRL / kit, memory", 2.0, None, None, 3.0, 4.0),
    Figure("growth by prompt", 0.3, 0.2, 0.4, 0.4, 0.3, more_is_better=False, unit=""),
    Figure("TRL: growth by prompt", 0.8, 0.7, 0.9, more_is_better=False, unit=""),
    Figure("memory held", 50.0, 40.0, 60.0, 1.0, 0.2, more_is_better=False, unit=" MB"),
    Figure("full logits / kit", 2.0, 1.9, 2.1),
]


def _record(folder: Path, name: str = "W1", **changes: object) -> dict:
    parts = {"workload": "a policy", "figures": FIGURES, "cases": [{"raw": [1.0, 2.0]}], "notes": ["a note"]} | changes
    gates = [Gate("gradient", 1e-6, 1e-4), Gate("pixels", 1, 1), Gate("tokens", 0, 0)]
    path = results.write(Result(name, gates=gates, **parts), folder / f"{name}.json", vars(Settings()) | {"code": "0"})
    return results.read(path)


def test_record_keeps_figures_raw_values_gates_and_the_machine_without_its_name(tmp_path: Path):
    record = _record(tmp_path)
    assert results.figures_of(record) == FIGURES
    assert record["cases"] == [{"raw": [1.0, 2.0]}] and record["gates"][0]["measured"] == 1e-6
    assert set(record["machine"]) == {"processor", "cores"} and record["versions"]["torch"] and record["date"]
    assert [path.name for path in tmp_path.iterdir()] == ["W1.json"]  # nothing half written is left


def test_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    before = _record(tmp_path)
    with pytest.raises(TypeError):
        _record(tmp_path, cases=[{"raw": object()}])
    assert results.read(tmp_path / "W1.json") == before and len(list(tmp_path.iterdir())) == 1


def test_table_shows_goals_values_intervals_and_what_was_reached(tmp_path: Path):
    _record(tmp_path, "W12")
    _record(tmp_path, "W2")
    text = table.write_table(tmp_path).read_text()
    assert "| W2 | TRL / kit | ≥ 3× | ≥ 4× | **3.4×** | 3.1 to 3.7 | 3.3× | must |" in text
    assert "| W2 | TRL / kit, memory | ≥ 3× | ≥ 4× | **2×** |  |  | **no** |" in text
    assert "| W2 | growth by prompt | ≤ 0.4 | ≤ 0.3 | **0.3** | 0.2 to 0.4 |  | aim |" in text
    assert "| W2 | full logits / kit | – | – | **2×** | 1.9 to 2.1 |  |" in text
    assert "| W2 | 3 passed | pixels: 1, allowed 1 |" in text and "* W2: a note." in text
    assert text.index("| W2 |") < text.index("| W12 |")  # by number, not by letter
    assert text.index("full logits / kit") > text.index("Beside it")


def test_plot_names_every_promised_figure_and_marks_what_lies_far_out(tmp_path: Path):
    drawing = table.draw([("W1", figure) for figure in FIGURES])
    labels = [label.get_text() for axes in drawing.axes for label in axes.get_yticklabels()]
    assert labels[:2] == ["W1  TRL / kit", "W1  TRL / kit, memory"]
    assert labels[-1] == "W1  memory held: 50 MB" and len(drawing.axes) == 3
    assert not any("full logits" in label for label in labels)
    far_out = drawing.axes[-1]
    assert far_out.get_xlim()[1] < 50 and any(line.get_marker() == ">" for line in far_out.lines)
    assert drawing.to_png().startswith(b"\x89PNG")


# --- the command ------------------------------------------------------------------------------------------------------


def test_record_of_the_same_code_and_settings_is_kept_and_another_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    command = pytest.importorskip("benchmarks.__main__")
    started = []
    monkeypatch.setattr(command.subprocess, "run", lambda *args, **options: started.append(args) or _Finished())
    record = _record(tmp_path)
    record["settings"] = command.fingerprint(Settings())
    (tmp_path / "W1.json").write_text(json.dumps(record))
    assert command.measure_apart("W1", Settings(), tmp_path, again=False) and not started
    assert command.measure_apart("W1", Settings(pairs=9), tmp_path, again=False) and len(started) == 1
    assert not (tmp_path / "W1.json").exists()  # an old figure is never taken for a new one


class _Finished:
    returncode = 0


def test_unknown_workload_is_refused_in_one_line():
    from typer.testing import CliRunner

    command = pytest.importorskip("benchmarks.__main__")
    app = command.typer.Typer()
    app.command()(command.main)
    found = CliRunner().invoke(app, ["W11"])
    allowed = "found 'W11', allowed: W1, W2, W3, W4, W5, W6, W8, W9, W10, W12, W13, W7, W14, W15"
    assert found.exit_code == 2 and allowed in found.output
