"""Reading a run: what it costs, what an iteration's files are called, and what is damaged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from grpo_kit.config import PROJECT_ROOT, KitError
from grpo_kit.runs.folder import RunFolder
from grpo_kit.runs.iterations import checkpoints_of, files_of_iterations, iteration_name, iteration_of, iterations_of
from grpo_kit.runs.record import read_run

LIBRARIES = ("torch", "transformers", "diffusers", "pandas", "PIL", "papermill")


def _loaded(statement: str) -> list[str]:
    """Which of the libraries a process of its own has loaded after it read the recorded run."""
    code = f"import sys\nfrom grpo_kit.runs.record import read_run\nrun = read_run('data/demo_run')\n{statement}\n"
    code += f"print(*[name for name in {LIBRARIES} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_reading_a_run_loads_pandas_for_a_table_alone_and_never_a_model_library():
    assert _loaded("assert len(run.lines) == run.iterations > 0 and run.validations and run.rollout_iterations") == []
    assert _loaded("assert len(run.metrics) == len(run.lines) and len(run.evaluation)") == ["pandas"]


def test_writer_and_reader_say_the_same(synthetic_run: Path):
    folder, record = RunFolder(synthetic_run), read_run(synthetic_run)
    assert folder.metrics() == record.lines and folder.validations() == record.validations


# --- names of iterations ----------------------------------------------------------------------------------------------


@given(st.integers(0, 10**9))
def test_a_name_says_its_iteration(iteration: int):
    name = iteration_name(iteration)
    names = (name, f"{name}.parquet", f"validation_{name}.json", f"{name}_row_003.jpg")
    assert {iteration_of(one) for one in names} == {iteration}
    assert iteration_of(f"{iteration_name(iteration, 'validation')}_007.jpg") == iteration


def test_iterations_are_in_the_order_of_their_numbers():
    paths = [Path(iteration_name(number)) for number in (1_000_000, 999_999, 2)]
    assert list(iterations_of([*paths, Path("notes.txt"), Path("iter_7")])) == [2, 999_999, 1_000_000]


def test_a_checkpoint_that_is_being_written_or_was_copied_is_none(tmp_path: Path):
    for name in ("iter_000003", "iter_000012", ".writing-iter_000013", "iter_000014.bak", "iter_x"):
        (tmp_path / name).mkdir()
    assert checkpoints_of(tmp_path) == {number: tmp_path / iteration_name(number) for number in (3, 12)}


def test_pictures_of_the_evaluation_belong_to_no_iteration_whatever_their_seeds(tmp_path: Path):
    run = RunFolder(tmp_path)
    for name in ("evaluation_3_trained_123456", "iter_000004_row_000", "validation_000004_000"):
        run.save_thumbnail(Image.new("RGB", (8, 8)), name)
    assert {path.stem for path in files_of_iterations(tmp_path)} == {"iter_000004_row_000", "validation_000004_000"}


# --- what is damaged --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "final_results.json", "sentinel.json", "validation_iter_000008.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
def test_a_damaged_file_is_named_in_one_line(synthetic_run: Path, name: str, content: bytes):
    (synthetic_run / name).write_bytes(content)
    with pytest.raises(KitError, match=name) as caught:
        read_run(synthetic_run)
    assert "\n" not in str(caught.value) and "Restore the file or delete it" in str(caught.value)


def test_a_number_that_json_does_not_have_is_read_back_as_none(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.append_metrics({"iteration": 1, "reward": float("nan")})
    run.write_json("validation_iter_000001.json", {"iteration": 1, "rewards": [float("inf"), 0.5]})
    record = read_run(tmp_path)
    assert record.lines == [{"iteration": 1, "reward": None}] and record.validations[0]["rewards"] == [None, 0.5]
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == record.lines[0]
