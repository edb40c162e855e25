"""`grpo-kit draw`: one prompt, its rewrites with their pictures, on a page that needs no network."""

import re
from pathlib import Path

import pytest
from support.hostile import active_nodes

from grpo_kit import cli


def test_draw_writes_a_page_of_one_group_best_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "here" / "first.html"
    prompt = 'a crimson ball <script>alert("x")</script>'
    with pytest.raises(SystemExit, match="0"):
        cli.main(["draw", prompt, "--html", str(page)])
    text = page.read_text(encoding="utf-8")
    assert str(page) in capsys.readouterr().out
    rewards = [float(found) for found in re.findall(r"<b>reward (-?[\d.]+)</b>", text)]
    advantages = [float(found) for found in re.findall(r"<b>advantage ([-+][\d.]+)</b>", text)]
    assert rewards == sorted(rewards, reverse=True) and len(rewards) == 8
    assert abs(sum(advantages)) < 0.05 and text.count("data:image/png") == 8
    assert active_nodes(text) == [] and "://" not in text
