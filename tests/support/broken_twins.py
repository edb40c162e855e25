"""Properties and the versions that are broken on purpose, as marked parameters of tests."""

from collections.abc import Callable, Mapping

import pytest

Known = list[tuple[str, Callable, list[Callable]]]  # trap, property, broken versions that it has to catch


def holding(known: Known) -> list:
    """Each property, with the mark of its trap."""
    return [
        pytest.param(holds, marks=pytest.mark.trap(trap), id=f"{trap}-{holds.__name__}") for trap, holds, _ in known
    ]


def twins(known: Known) -> list:
    """Each property with each version that it has to catch, with the mark of both."""
    return [
        pytest.param(
            holds,
            mutant,
            marks=pytest.mark.trap(trap, broken=mutant.__name__),
            id=f"{trap}-{holds.__name__}-{mutant.__name__}",
        )
        for trap, holds, mutants in known
        for mutant in mutants
    ]


def broken_versions(versions: Mapping[Callable, str]) -> list:
    """Parameters for a test that each broken version is caught: a function → the traps that it falls into, "T1 T8"."""
    return [
        pytest.param(
            version, id=(name := version.__name__), marks=[pytest.mark.trap(t, broken=name) for t in of.split()]
        )
        for version, of in versions.items()
    ]
