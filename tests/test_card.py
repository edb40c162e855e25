"""A saved policy speaks for itself: its card says what the run's files say, and its snippet runs without the kit."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from policy_forms import LORA, new_adapter, with_moved_adapter

from grpo_kit.config import PROJECT_ROOT, Config, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.models.policy import Policy, load_policy
from grpo_kit.runs.card import add_results, save_with_card

RESULTS = {
    "num_prompts": 20,
    "seeds_per_prompt": 2,
    "confidence": 0.95,
    "variants": {
        name: {"reward": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}}
        for name, mean in (("raw", 0.125), ("trained", 0.75))
    },
}
ASKED = ["a crimson ball, at night", "two golden pluses", "a violet hoop left of a rosy box", "a tiny azure pyramid"]


def _policy(kit: Experiment, form: str) -> tuple[Policy, Config]:
    """A policy that training has moved, with the config that it belongs to."""
    if form == "adapter":
        return with_moved_adapter(new_adapter(kit)), load_config(kit.config, {"model_settings.lora": LORA})
    policy = load_policy(kit.config, PROJECT_ROOT / "data" / "demo_run" / "best")
    return policy, kit.config


def _alone(code: str, folder: Path, prompts: list[str]) -> list[str]:
    """What the card's snippet prints for each prompt, in a fresh process that cannot import the kit."""
    (head, *_), body = code.split("prompt = ")[:1], code.split("prompt = ", 1)[1].split("\n", 1)[1]
    loop = "\n".join(f"    {line}" for line in body.splitlines())
    script = f"import sys\nsys.modules['grpo_kit'] = None\n{head}\nfor prompt in {prompts!r}:\n{loop}\n"
    found = subprocess.run(
        [sys.executable, "-c", script.replace('folder = "."', f"folder = {str(folder)!r}")],
        cwd=PROJECT_ROOT if "data/shapeworld" in code else folder,  # an embedded base model is named from there
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout.splitlines()


@pytest.mark.parametrize("form", ["weights", "adapter"])
def test_the_cards_snippet_gives_the_kits_rewrites_without_the_kit(kit: Experiment, form: str, tmp_path: Path):
    policy, config = _policy(kit, form)
    save_with_card(policy, config, tmp_path, iteration=7)
    (code,) = re.findall(r"```python\n(.*?)\n```", (tmp_path / "README.md").read_text(), re.DOTALL)
    assert ("PeftModel" in code) == (form == "adapter") and "grpo_kit" not in code
    assert _alone(code, tmp_path, ASKED) == [str(text) for text in policy.enhance_prompts(ASKED)]
    assert policy.enhance_prompts(ASKED) != policy.enhance_prompts(ASKED, reference=True), "nothing was trained"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["weights", "adapter"])
def test_weights_come_back_bit_for_bit(kit: Experiment, form: str, dtype: torch.dtype, tmp_path: Path):
    policy, config = _policy(kit, form)
    policy.model.to(dtype)
    save_with_card(policy, config, tmp_path, iteration=1)
    other = load_policy(config)
    other.model.to(dtype)
    changed = {
        name for name, value in other.trainable_state().items() if not value.equal(policy.trainable_state()[name])
    }
    assert changed, "the two were alike before"
    other.load_pretrained(tmp_path)
    assert all(value.equal(policy.trainable_state()[name]) for name, value in other.trainable_state().items())
    assert all(p.requires_grad for p in other.trainable_parameters()) and other.trainable_state().keys() >= changed


def test_another_models_weights_are_refused_in_one_line(kit: Experiment, tmp_path: Path):
    adapter, config = _policy(kit, "adapter")
    save_with_card(adapter, config, tmp_path / "adapter", iteration=1)
    with pytest.raises(Exception, match=r"policy|vlm_model") as error:
        load_policy(kit.config).load_pretrained(tmp_path / "adapter")
    assert "\n" not in str(error.value)
    wider = load_policy(load_config(kit.config, {"model_settings.lora": LORA | {"target_modules": ["o_proj"]}}))
    with pytest.raises(Exception, match="other tensors than the policy has") as error:
        wider.load_pretrained(tmp_path / "adapter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["weights", "adapter"])
def test_a_card_names_what_it_is_made_of_and_no_path_of_the_machine(kit: Experiment, form: str, tmp_path: Path):
    policy, config = _policy(kit, form)
    save_with_card(policy, config, tmp_path, iteration=7)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "data/shapeworld/policy" and card.data.iteration == 7
    assert card.data.library_name == ("peft" if form == "adapter" else "transformers")
    for said in ("held-out prompts `", "1 · clip_similarity", "group_size 8", "torch 2", "weights after iteration 7"):
        assert said in card.text, said
    assert "## Results" not in card.text and card.data.eval_results is None, "nothing was evaluated"
    for file in tmp_path.rglob("*.*"):
        assert str(PROJECT_ROOT).encode() not in file.read_bytes(), file.name


def test_an_evaluation_fills_in_the_results_that_it_found_and_nothing_else(kit: Experiment, tmp_path: Path):
    policy, config = _policy(kit, "weights")
    add_results(tmp_path, config, RESULTS)
    assert not list(tmp_path.iterdir()), "a run without best/ gets no card"
    save_with_card(policy, config, tmp_path / "best", iteration=7)
    before = ModelCard.load(tmp_path / "best" / "README.md")
    add_results(tmp_path, config, RESULTS | {"variants": {"raw": RESULTS["variants"]["raw"]}})
    assert ModelCard.load(tmp_path / "best" / "README.md").content == before.content
    add_results(tmp_path, config, RESULTS)
    after = ModelCard.load(tmp_path / "best" / "README.md")
    assert "| this policy | 0.750 [0.650, 0.850] |" in after.text and "| the user's own prompt | 0.125" in after.text
    assert [(one.metric_type, one.metric_value) for one in after.data.eval_results] == [("reward", 0.75)]
    assert before.text.split("## Training")[1] == after.text.split("## Training")[1] and after.data.iteration == 7
    json.loads((tmp_path / "best" / "config.json").read_text())
