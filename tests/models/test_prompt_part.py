"""F6: which part of a completion is drawn is one rule: in training, validation, `enhance_prompt`, and on the card."""

import copy
import dataclasses
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from support.quick_runs import fresh

from grpo_kit.config import ConfigError, load_config
from grpo_kit.evaluation.evaluate import evaluate, rewrites
from grpo_kit.evaluation.validation import validate
from grpo_kit.experiment import Experiment
from grpo_kit.models.card import model_card
from grpo_kit.models.policy import Policy
from grpo_kit.models.prompt_part import part_patterns, prompt_part
from grpo_kit.rollout import collect_rollout
from grpo_kit.runs.folder import RunFolder
from grpo_kit.training.loop import train
from grpo_kit.training.replay import replay

pytestmark = pytest.mark.field("F6")
FOUND = [
    ("after_thinking", "The user wants a ball.\n</think>\n\nA red ball, crisp", "A red ball, crisp"),
    ("after_thinking", "<think>The user wants a ball.</think>\n\nA red ball", "A red ball"),
    ("after_thinking", "<thinking>round</thinking> A red ball", "A red ball"),
    ("after_thinking", "[THINK]round[/THINK]A red ball", "A red ball"),
    ("after_thinking", "<think>a</think>A draft<think>b</think> A red ball", "A red ball"),
    ("after_thinking", "A red ball", "A red ball"),
    ("quoted", 'Sure! Here is a better prompt: "A red ball on grass"', "A red ball on grass"),
    ("quoted", 'Sure! Here is a better prompt: "A red ball on', "A red ball on"),
    ("quoted", 'Sure!\n\n"A red ball." This uses the word "crisp".', "A red ball."),
    ("quoted", '"A sign that says "Open" on a door"', 'A sign that says "Open" on a door'),
    ("quoted", 'Prompt: A sign that says "Open"', 'A sign that says "Open"'),
    ("quoted", "Here you go: “A red ball”", "A red ball"),
    ("quoted", "Gern: „Ein roter Ball“ passt.", "Ein roter Ball"),
    ("quoted", "Voici : « Un ballon rouge »", "Un ballon rouge"),
    ("quoted", "こちら：「赤いボール」", "赤いボール"),
    ("quoted", "프롬프트: 빨간 공", "빨간 공"),
    ("quoted", "Try this: 'It's a red ball, crisp'", "It's a red ball, crisp"),
    ("quoted", "Sure:\n```\nA red ball\n```\nEnjoy!", "A red ball"),
    ("quoted", '```text\n"A red ball"\n```', "A red ball"),
    ("quoted", "**Enhanced Prompt:** A red ball\n\nThis adds detail.", "A red ball"),
    ("quoted", "**Prompt:** **A red ball**", "A red ball"),
    ("quoted", "### Improved prompt:\nA red ball\n", "A red ball"),
    ("quoted", '```json\n{"enhanced_prompt": "A red ball"}\n```', "A red ball"),
    ("quoted", 'I would write "a red ball on green grass" instead.', "a red ball on green grass"),
    ("quoted", '<think>maybe "bright red and crisp"</think>\n"A red ball"', "A red ball"),
    (r"Answer: (.*)", "So.\nAnswer: a red ball", "a red ball"),
]
NOT_FOUND = [
    ("after_thinking", "<think>The user wants a ball, so", ""),  # the length limit came before the prompt
    ("after_thinking", "<think>The user wants a ball.</think>\n", ""),
    ("quoted", "<think>Maybe 'bright", ""),
    ("quoted", 'A sign that says "Open"', 'A sign that says "Open"'),
    ("quoted", "A red ball", "A red ball"),
    (r"Answer: (.*)", "A red ball", "A red ball"),
    (r"Answer:( yes)?", "Answer: no", "Answer: no"),
]


@pytest.mark.parametrize(("rule", "text", "part"), FOUND)
def test_the_prompt_is_found(rule: str, text: str, part: str):
    assert prompt_part(text, part_patterns(rule)) == (part, True)


@pytest.mark.parametrize(("rule", "text", "part"), NOT_FOUND)
def test_what_has_no_prompt_is_said_to_have_none(rule: str, text: str, part: str):
    assert prompt_part(text, part_patterns(rule)) == (part, False)


def test_a_template_that_opens_the_thinking_has_no_prompt_before_its_end():
    opened = part_patterns("after_thinking", opens_thinking=True)
    assert prompt_part("the user wants", opened) == ("", False)
    assert prompt_part("round</think> A red ball", opened) == ("A red ball", True)


def test_whole_completions_are_what_they_were(kit: Experiment):
    assert prompt_part(' "a" ', part_patterns("whole")) == (' "a" ', True) and kit.policy.part_patterns == []
    assert kit.policy.sample(["a red ball"], 2, seed=0).unmatched is None


@pytest.mark.parametrize("rule", ["after_thinkin", "(a", "a", "(a)(b)", "quoted ", "(?P<x>"])
def test_a_rule_that_is_none_is_refused_before_models_are_loaded(rule: str):
    with pytest.raises(ConfigError, match=r"^generation_settings.prompt_part: found .*regular expression with one"):
        load_config("tiny", {"generation_settings.prompt_part": rule})


class Wrapping(Policy):
    """The embedded policy, whose completions read as a chatty model's; every third is not finished."""

    def decode(self, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
        texts = super().decode(ids, mask)
        finished = [f'<think>It wants\nthat.</think>\nSure! A better prompt: "{text}"' for text in texts]
        return ["<think>It wants" if row % 3 == 2 else text for row, text in enumerate(finished)]


def _chatty(kit: Experiment, rule: str) -> Policy:
    policy = copy.copy(kit.policy)
    policy.__class__ = Wrapping
    policy.part_patterns = part_patterns(rule)
    return policy


def test_a_rollout_draws_the_part_and_learns_from_the_whole(kit: Experiment):
    prompts = kit.train_prompts[:2]
    plain = collect_rollout(kit.policy, kit.generator, kit.rewards, prompts, 3, seed=0)
    found = collect_rollout(_chatty(kit, "quoted"), kit.generator, kit.rewards, prompts, 3, seed=0)
    for name in ("completion_ids", "completion_mask", "old_logprobs"):
        assert torch.equal(getattr(found, name), getattr(plain, name))
    assert found.unmatched.tolist() == [False, False, True] * 2
    expected = ["" if row % 3 == 2 else text for row, text in enumerate(plain.enhanced_prompts)]
    assert found.enhanced_prompts == expected
    assert found.rewards[[0, 1, 3, 4]].tolist() == plain.rewards[[0, 1, 3, 4]].tolist()
    assert found.metrics()["completions/unmatched_ratio"] == pytest.approx(1 / 3)
    assert "completions/unmatched_ratio" not in plain.metrics()


def test_plain_use_and_evaluation_follow_the_rule_and_fall_back_where_nothing_was_written(kit: Experiment):
    asked = ["a red ball", "a blue box", "two green rings"]
    plain, chatty = kit.policy.enhance_prompts(asked), _chatty(kit, "quoted").enhance_prompts(asked)
    assert chatty == [*plain[:2], asked[2]] and [text.fell_back for text in chatty] == [False, False, True]
    assert [text.matched for text in chatty] == [True, True, False] and plain[0].matched
    own = dataclasses.replace(kit, policy=_chatty(kit, "quoted"))
    assert rewrites(own, kit.val_prompts[:2], "trained") == rewrites(kit, kit.val_prompts[:2], "trained")


def test_validations_and_evaluations_count_what_has_no_prompt(kit: Experiment, tmp_path: Path):
    own = dataclasses.replace(fresh(kit, {"evaluation_settings.validation_prompts": 3}), policy=_chatty(kit, "quoted"))
    assert validate(own, 0, RunFolder(tmp_path))["unmatched"] == 1
    found = evaluate(own, kit.val_prompts[:3], ("raw", "trained"), seeds_per_prompt=1, paraphrases=False)
    assert found.results["unmatched"] == {"trained": 1}


FIRST = r"^(\w+ \w+ \w+)"


def test_a_run_with_a_pattern_is_replayed_bit_for_bit(kit: Experiment, tmp_path: Path):
    from grpo_kit import load_experiment

    other = {"generation_settings.prompt_part": FIRST, "model_settings.device": "cpu"}
    own = load_experiment(fresh(kit, other, num_iterations=1, validate_every=1).config)
    train(own, tmp_path, progress=False)
    rows = pd.read_parquet(tmp_path / "rollouts" / "iter_000001.parquet")
    texts = ["".join(tokens) for tokens in rows["tokens"]]
    assert all(text.strip().startswith(part) for text, part in zip(texts, rows["enhanced_prompt"], strict=True))
    assert {len(part.split()) for part in rows["enhanced_prompt"]} == {3} and max(len(t.split()) for t in texts) > 3
    validated = json.loads((tmp_path / "validation_iter_000001.json").read_text())
    assert {len(sample["enhanced_prompt"].split()) for sample in validated["samples"]} == {3}
    assert replay(tmp_path, 1, progress=False).equal


@pytest.mark.parametrize("rule", ["after_thinking", "quoted", FIRST])
def test_the_card_says_the_rule(kit: Experiment, rule: str):
    config = load_config(kit.config, {"generation_settings.prompt_part": rule})
    code = re.search(r"```python\n(.*?)\n```\n", model_card(_chatty(kit, rule), config, 1), re.DOTALL)[1]
    compile(code, "card", "exec")
    lines = code[code.index("text = processor.decode") :].splitlines()
    for _, text, _ in [*FOUND, *NOT_FOUND]:
        said: list[str] = []
        names = {"re": re, "prompt": "asked", "print": said.append, "decoded": text}
        exec("\n".join(["text = decoded", *lines[1:]]), names)
        assert said == [prompt_part(text, part_patterns(rule))[0] or "asked"]
    assert "re.search" not in model_card(kit.policy, kit.config, 1)
