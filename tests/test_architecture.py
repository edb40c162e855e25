"""The drawn picture of the architecture is that of the files."""

import pytest

from benchmarks.size import house
from tools import architecture


def test_the_picture_is_drawn_from_the_package_as_it_is():
    assert architecture.missing_on_the_way() == []
    drawn = architecture.PICTURE.read_text(encoding="utf-8")
    assert f"<dc:description>{architecture.digest()}</dc:description>" in drawn, "draw it: python -m tools.architecture"
    assert set(architecture.WHAT) == house.rooms() - {"__init__"}


def test_a_function_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch):
    gone = (("rollout", "collect_rollouts"), ("models.policy", "Policy.no_such"), ("no.such", "thing"))
    monkeypatch.setattr(architecture, "WAY", gone)
    assert len(architecture.missing_on_the_way()) == 3
    with pytest.raises(ValueError, match=r"not in the package: rollout: collect_rollouts, .* Mend WAY"):
        architecture.draw()
