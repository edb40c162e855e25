"""The README's code works as pasted."""

import re

from grpo_kit.config import PROJECT_ROOT
from grpo_kit.experiment import Experiment

BLOCKS = re.findall(r"```python\n(.*?)```", (PROJECT_ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_first_snippet_loads_enhances_draws_and_scores() -> None:
    names: dict[str, object] = {}
    exec(BLOCKS[0], names)
    assert names["image"].size == (32, 32)
    assert -1 <= names["reward"] <= 1


def test_a_reward_of_ones_own_is_a_function(kit: Experiment) -> None:
    block = next(block for block in BLOCKS if "redness" in block)
    names: dict[str, object] = {"kit": kit}
    exec(block, names)
    image = kit.generator.generate_image("a large red circle, in the center, white background, sharp")
    assert 0 < names["kit"].rewards.calculate_reward(image, "a crimson ball") <= 1
