"""A saved policy speaks for itself: its card says what the run's files say, and its snippet runs without the kit."""

import json
import logging
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from support.gpt2 import write_gpt2
from support.policy_forms import LORA, new_adapter, with_moved_adapter

from grpo_kit.config import PROJECT_ROOT, Config, load_config
from grpo_kit.experiment import Experiment
from grpo_kit.models.card import add_results, model_card, save_with_card
from grpo_kit.models.policy import Policy, load_policy

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
FORMS = ("weights", "adapter", "pictures", "text-only", "own-settings")
TRAINED = PROJECT_ROOT / "data" / "demo_run" / "best"


def _policy(kit: Experiment, form: str, folder: Path) -> tuple[Policy, Config]:
    """A policy that training has moved, with the config that it belongs to."""
    if form == "adapter":
        return with_moved_adapter(new_adapter(kit)), load_config(kit.config, {"model_settings.lora": LORA})
    if form == "text-only":  # learned places for kinds of tokens, no chat template, no token to pad with
        write_gpt2(folder)
        config = load_config(
            kit.config, {"model_settings.vlm_model": str(folder), "model_settings.system_prompt": "Be brief."}
        )
        return load_policy(config), config
    config = load_config(kit.config, {"model_settings.use_image": form == "pictures"})
    policy = load_policy(config, TRAINED)
    if form == "own-settings":  # as Qwen2.5-VL comes
        policy.model.generation_config.repetition_penalty = 1.5
        policy.model.generation_config.max_new_tokens = 3
    return policy, config


# --- what the card's code does ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """A policy in a folder, with the code that its card gives and the picture that it was shown, if any."""

    policy: Policy
    folder: Path
    code: str
    seen: Image.Image | None

    def function(self, name: str) -> str:
        """The code as a function that answers each prompt; it prints one line a prompt, as JSON."""
        code = self.code.replace('folder = "."', f"folder = {str(self.folder)!r}")
        code = code.replace('"drawn.png"', repr(str(self.folder / "drawn.png")))
        head, body = re.split(r'^prompt = "a crimson ball, at night"$', code, flags=re.MULTILINE)
        body = re.sub(r"^print\((.*)\)$", r"print(json.dumps(\1))", body, flags=re.MULTILINE)
        lines = [*head.splitlines(), f"for prompt in {ASKED!r}:", *(f"    {line}" for line in body.splitlines())]
        return f"def {name}():\n" + "\n".join(f"    {line}" for line in lines) + f"\n\n{name}()\n"

    def expected(self) -> list[str]:
        """The kit's answers."""
        pictures = None if self.seen is None else [self.seen] * len(ASKED)
        return self.policy.sample(ASKED, 1, seed=0, images=pictures, greedy=True).texts


@pytest.fixture(scope="module")
def saved(kit: Experiment, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Saved]:
    found = {}
    for form in FORMS:
        folder = tmp_path_factory.mktemp(form)
        policy, config = _policy(kit, form, folder / "base")
        save_with_card(policy, config, folder, iteration=7)
        (code,) = re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
        seen = kit.generator.generate_image(ASKED[0], seed=0) if form == "pictures" else None
        if seen is not None:
            seen.save(folder / "drawn.png")
        found[form] = Saved(policy, folder, code, seen)
    return found


def _without_the_kit(saved: list[Saved]) -> list[list[str]]:
    """What the cards' code prints, in one fresh process that cannot import the kit."""
    functions = "\n".join(one.function(f"form_{place}") for place, one in enumerate(saved))
    found = subprocess.run(
        [sys.executable, "-c", f"import json, sys\nsys.modules['grpo_kit'] = None\n{functions}"],
        cwd=PROJECT_ROOT,  # from where an embedded base model is named
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    return [lines[place : place + len(ASKED)] for place in range(0, len(lines), len(ASKED))]


@pytest.fixture(scope="module")
def answers(saved: dict[str, Saved]) -> dict[str, list[str]]:
    """What each form's code prints, and "broken": one that leaves the model's own generation settings as they are."""
    own = saved["own-settings"]
    code, count = re.subn(r"^model\.generation_config = .*\n", "", own.code, flags=re.MULTILINE)
    assert count == 1
    asked = saved | {"broken": Saved(own.policy, own.folder, code, None)}
    return dict(zip(asked, _without_the_kit(list(asked.values())), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_cards_code_gives_the_kits_rewrites_without_the_kit(
    saved: dict[str, Saved], answers: dict[str, list[str]], form: str
):
    one = saved[form]
    assert "grpo_kit" not in one.code and ("PeftModel" in one.code) == (form == "adapter")
    assert answers[form] == one.expected() and len(set(answers[form])) > 1
    if form == "adapter":
        assert answers[form] != one.policy.enhance_prompts(ASKED, reference=True), "nothing was trained"


def test_code_that_leaves_the_models_own_generation_settings_would_answer_otherwise(
    saved: dict[str, Saved], answers: dict[str, list[str]]
):
    assert answers["broken"] != saved["own-settings"].expected()


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["weights", "adapter"])
def test_weights_come_back_bit_for_bit(kit: Experiment, form: str, dtype: torch.dtype, tmp_path: Path):
    policy, config = _policy(kit, form, tmp_path)
    policy.model.to(dtype)
    save_with_card(policy, config, tmp_path, iteration=1)
    other = load_policy(config)
    other.model.to(dtype)
    trained, before = policy.trainable_state(), other.trainable_state()
    assert not all(value.equal(trained[name]) for name, value in before.items()), "the two were alike before"
    assert policy.is_saved_in(tmp_path) and not other.is_saved_in(tmp_path)
    other.load_pretrained(tmp_path)
    assert all(value.equal(trained[name]) for name, value in other.trainable_state().items())
    assert other.is_saved_in(tmp_path) and all(p.requires_grad for p in other.trainable_parameters())


def test_weights_in_several_files_come_back_tied_as_they_were(kit: Experiment, tmp_path: Path):
    policy = load_policy(kit.config, TRAINED)
    policy.model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    other = load_policy(kit.config)
    other.load_pretrained(tmp_path)
    state = other.model.state_dict()
    assert all(value.equal(state[name]) for name, value in policy.model.state_dict().items())
    embeddings = [part.model.get_input_embeddings().weight for part in (policy, other)]
    heads = [part.model.get_output_embeddings().weight for part in (policy, other)]
    assert [head is rows for head, rows in zip(heads, embeddings, strict=True)] == [
        policy.model.config.tie_word_embeddings
    ] * 2


def test_saving_an_adapter_asks_the_hub_nothing(kit: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[object] = []
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *given: asked.append(given))
    policy, _ = _policy(kit, "adapter", tmp_path)
    for settings in policy.model.peft_config.values():
        settings.base_model_name_or_path = "somebody/base"  # as where the base model is the hub's
    policy.save_pretrained(tmp_path / "own")
    policy.load_pretrained(tmp_path / "own")
    assert not asked
    with pytest.warns(UserWarning, match="Could not find a config file in somebody/base"):
        policy.model.save_pretrained(tmp_path / "peft")
    assert asked, "peft alone asks"


def test_another_models_weights_are_refused_in_one_line(kit: Experiment, tmp_path: Path):
    adapter, config = _policy(kit, "adapter", tmp_path)
    save_with_card(adapter, config, tmp_path / "adapter", iteration=1)
    with pytest.raises(Exception, match=r"policy|vlm_model") as error:
        load_policy(kit.config).load_pretrained(tmp_path / "adapter")
    assert "\n" not in str(error.value)
    for other in (LORA | {"target_modules": ["o_proj"]}, LORA | {"r": 2}):
        policy = load_policy(load_config(kit.config, {"model_settings.lora": other}))
        with pytest.raises(Exception, match="other tensors than the policy has") as error:
            policy.load_pretrained(tmp_path / "adapter")
        assert "\n" not in str(error.value)


# --- what the card says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["weights", "adapter"])
def test_a_card_names_what_it_is_made_of_and_no_path_of_the_machine(kit: Experiment, form: str, tmp_path: Path):
    policy, config = _policy(kit, form, tmp_path)
    save_with_card(policy, config, tmp_path, iteration=7, num_prompts=420)
    found = ModelCard.load(tmp_path / "README.md")
    assert found.data.base_model is None, "a folder is no model of the hub, which refuses such a card"
    assert found.data.iteration == 7
    assert found.data.library_name == ("peft" if form == "adapter" else "transformers")
    said = [
        "From `data/shapeworld/policy`",
        "* 420 prompts of `data/prompts/shapeworld_train.jsonl`; held-out prompts of `data/prompts/shapeworld_val.json",
        "1 · clip_similarity",
        "watched and not rewarded: gold",
        "group_size 8",
        "torch 2",
        "weights after iteration 7",
        *(["LoRA of rank 4, alpha 8"] if form == "adapter" else []),
    ]
    assert not [text for text in said if text not in found.text]
    assert "## Results" not in found.text and found.data.eval_results is None, "nothing was evaluated"
    for file in tmp_path.rglob("*.*"):
        assert str(PROJECT_ROOT).encode() not in file.read_bytes(), file.name


def test_models_and_files_outside_the_project_go_by_their_names(kit: Experiment, tmp_path: Path):
    base, prompts = tmp_path / "home" / "base", tmp_path / "home" / "mine.jsonl"
    policy, _ = _policy(kit, "text-only", base)
    prompts.write_text('{"user_prompt": "a cat"}\n')
    places = {"model_settings.vlm_model": base, "training_settings.train_prompts": prompts}
    config = load_config(kit.config, {name: str(place) for name, place in places.items()})
    text = model_card(policy, config, iteration=1)
    assert "From `base`" in text and "prompts of `mine.jsonl`" in text and "home" not in text


def test_a_base_model_of_the_hub_is_named_to_it(kit: Experiment):
    config = load_config(kit.config, {"model_settings.vlm_model": "Qwen/Qwen2.5-VL-3B-Instruct"})
    text = model_card(kit.policy, config, iteration=1)
    assert ModelCard(text).data.base_model == "Qwen/Qwen2.5-VL-3B-Instruct"


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(kit: Experiment, tmp_path: Path) -> tuple[Policy, Path]:
    """A policy in a run's `best/`, with its card."""
    policy, config = _policy(kit, "weights", tmp_path)
    save_with_card(policy, config, tmp_path / "best", iteration=7)
    return policy, tmp_path


def _read(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "best" / "README.md")


def test_an_evaluation_fills_in_the_results_that_it_found_and_nothing_else(run: tuple[Policy, Path]):
    policy, folder = run
    before = _read(folder)
    add_results(folder, policy, RESULTS | {"variants": {"raw": RESULTS["variants"]["raw"]}})
    assert _read(folder).content == before.content
    add_results(folder, policy, RESULTS)
    after = _read(folder)
    assert "| this policy | 0.750 [0.650, 0.850] |" in after.text and "| the user's own prompt | 0.125" in after.text
    assert "20 prompts, 2 images each" in after.text and "[95% interval over prompts]" in after.text
    assert [(one.metric_type, one.metric_value) for one in after.data.eval_results] == [("reward", 0.75)]
    assert "".join(re.split(r"## Results.*?(?=## )", after.text, flags=re.DOTALL)) == before.text
    assert after.data.to_dict().items() >= before.data.to_dict().items()
    place = folder / "best" / "README.md"
    place.write_text(place.read_text() + "\n## Notes\n\nBy hand.\n")
    add_results(folder, policy, RESULTS | {"num_prompts": 33})
    again = _read(folder).text
    assert again.count("## Results") == 1 and "33 prompts, 2" in again and "20 prompts, 2" not in again
    assert again.rstrip().endswith("## Notes\n\nBy hand.")


def test_a_run_without_best_gets_no_card(kit: Experiment, tmp_path: Path):
    add_results(tmp_path, kit.policy, RESULTS)
    assert not list(tmp_path.iterdir())


def test_figures_of_another_policy_than_best_stay_out_of_its_card(
    run: tuple[Policy, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    policy, folder = run
    before = _read(folder).content
    with torch.no_grad():
        policy.trainable_parameters()[-1][0] += 1e-3
    with caplog.at_level(logging.WARNING, "grpo_kit"):
        add_results(folder, policy, RESULTS)
    assert _read(folder).content == before and "another policy was evaluated" in caplog.text
    monkeypatch.setattr(Policy, "is_saved_in", lambda *_: True)
    add_results(folder, policy, RESULTS)
    assert _read(folder).content != before, "without the comparison they would stand there"


def test_what_could_not_be_scored_is_no_figure(run: tuple[Policy, Path]):
    policy, folder = run
    before = _read(folder)
    unknown = {"mean": math.nan, "low": None, "high": math.nan}
    variants = {name: {"reward": unknown} for name in ("raw", "trained")} | {"initial": {}}
    add_results(folder, policy, RESULTS | {"variants": variants})
    found = _read(folder)
    assert "| this policy | not known |" in found.text and found.data.eval_results is None
    assert found.data.to_dict().keys() == before.data.to_dict().keys()


@pytest.mark.parametrize("damage", ["---\n: [\n---\n", "no front matter"])
def test_a_card_that_cannot_be_read_is_left_as_it_is_with_a_warning(
    run: tuple[Policy, Path], damage: str, caplog: pytest.LogCaptureFixture
):
    policy, folder = run
    (folder / "best" / "README.md").write_text(damage)
    with caplog.at_level(logging.WARNING, "grpo_kit"):
        add_results(folder, policy, RESULTS)
    found = (folder / "best" / "README.md").read_text()
    if damage.startswith("---"):
        assert found == damage and "left as it is" in caplog.text
    else:
        assert found.rstrip().endswith("0.850] |") and "no front matter" in found
