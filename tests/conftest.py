"""Fixtures that several tests share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from synthetic_run import write_synthetic_run


@pytest.fixture(scope="session")
def synthetic_run_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder in the documented schema, written once; do not change it."""
    return write_synthetic_run(tmp_path_factory.mktemp("template") / "run")


@pytest.fixture
def synthetic_run(synthetic_run_template: Path, tmp_path: Path) -> Path:
    """A run folder of one's own."""
    return Path(shutil.copytree(synthetic_run_template, tmp_path / "run"))
