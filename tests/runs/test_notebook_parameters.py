"""Notebooks run with other parameters than their own, as papermill gives them, with few steps and small pictures.

A file of its own, so that another worker runs it while test_notebooks.py runs them as they are committed.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import papermill
import pytest

from grpo_kit.runs.notebooks import OWN_PROFILE, execute, plan, select_notebooks, write_profile

NOTEBOOKS = select_notebooks()
TRAIN = {"07_train", "08_evaluate", "09_ablations"}  # test_series.py runs them in short
PLANS = "10_scale_up"  # plans with any parameters for minutes
FEW = {"generation_settings.num_inference_steps": 2, "generation_settings.rollout_steps": 1}
FEW |= {"generation_settings.height": 32, "generation_settings.width": 32}
# Each set is given to the notebooks that have such a parameter.
SMALL = {"seed": "1", "group_size": "4", "num_iterations": "2", "judged_prompts": "4"}
SMALL |= {"prompts_per_category": "3", "pictures_per_prompt": "3", "num_prompts": "6"}
OTHER = {"seed": "2", "group_size": "6", "num_iterations": "3", "trial_iterations": "2", "seeds_per_prompt": "1"}


def by_name(path: Path) -> str:
    return path.stem


def run_with(path: Path, wanted: dict[str, str], run_dir: Path) -> nbformat.NotebookNode:
    """Execute a notebook as `grpo-kit run` does, on a profile of its own, and return it with its outputs."""
    known = papermill.inspect_notebook(str(path))
    parameters = {name: value for name, value in wanted.items() if name in known}
    (planned,) = plan([path], "workshop", run_dir, parameters, FEW)
    write_profile(run_dir, "workshop", FEW)
    done = execute(planned, run_dir / "notebooks", minutes_per_cell=15)
    assert done.error is None, done.error
    return nbformat.read(done.path, as_version=4)


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem not in TRAIN | {PLANS}], ids=by_name)
def test_it_runs_with_other_parameters(path: Path, tmp_path: Path) -> None:
    executed = run_with(path, SMALL, tmp_path / "run")
    injected = next(cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert f'profile = "{tmp_path / "run" / OWN_PROFILE}"' in injected.source


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "path", [path for path in NOTEBOOKS if path.stem in ("07_train", "09_ablations", PLANS)], ids=by_name
)
def test_it_runs_with_a_second_set_of_parameters(path: Path, tmp_path: Path) -> None:
    run_with(path, OTHER, tmp_path / "run")
