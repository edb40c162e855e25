"""What writes the prompts of a variant: the user, a policy before or after training, one who knows the best prompt."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from grpo_kit.config import KitError, load_config
from grpo_kit.config.prompts import Prompt
from grpo_kit.config.seeds import derive_seed
from grpo_kit.evaluation.table import VARIANTS
from grpo_kit.experiment import Experiment
from grpo_kit.models.conversation import Conversation, LookAt, require_words, shown
from grpo_kit.models.policy import Policy, load_policy
from grpo_kit.rewards.gold import best_prompt
from grpo_kit.rollout import picture_prompts


class Request(NamedTuple):
    """One text for the generator, and the user's prompt that its pictures are judged by."""

    prompt_id: int  # the prompt's place in the evaluation
    prompt: Prompt
    text: str  # before a writer has written it: the user's words
    asked: Conversation | None = None  # what a policy read that may look at the picture and write again


def requests_of(prompts: Sequence[Prompt]) -> list[Request]:
    """The prompts as requests in the users' own words."""
    return [Request(number, prompt, prompt.user_prompt) for number, prompt in enumerate(prompts)]


@dataclass(frozen=True)
class Writer:
    """A variant's way from users' prompts to the generator's; `policy` is None where nothing is read."""

    kit: Experiment
    variant: str
    policy: Policy | None = None
    turns: int = 1
    use_image: bool = False
    look_at: LookAt = "own"

    def __call__(self, requests: Sequence[Request]) -> list[Request]:
        """The requests with the texts that this variant gives the generator; a `KitError` where it has none."""
        if self.variant == "raw":
            return list(requests)
        if self.variant == "oracle":
            return [request._replace(text=_best_prompt(request, self.kit)) for request in requests]
        words = [request.text for request in requests]
        seed = derive_seed(self.kit.config.training_settings.seed, "evaluation")
        seen = picture_prompts(self.kit.generator, words, seed) if self.use_image else None
        asked = [
            Conversation(request.text, (*request.prompt.pictures(), *(seen[place : place + 1] if seen else [])))
            for place, request in enumerate(requests)
        ]
        texts, again = self.answers(asked), self.turns > 1
        return [
            request._replace(text=text, asked=one if again else None)
            for request, text, one in zip(requests, texts, asked, strict=True)
        ]

    def answers(self, asked: Sequence[Conversation], look_at: LookAt | None = None, step: int = 1) -> list[str]:
        """What the policy writes in these conversations, greedy; it sees of their pictures what `look_at` says."""
        sees = any(one.pictures or one.turns for one in asked)
        read = shown(asked, look_at or self.look_at, step) if sees else [one.prompt for one in asked]
        return list(self.policy.enhance_prompts(read, reference=self.variant == "initial"))


def name_variants(compare: Sequence[str | Path]) -> dict[str, str]:
    """What each variant is called in tables → the variant: itself, or the path of a saved run or policy.

    A folder has its own name (a run's, where its `best/` is given), and its parent's before it where two are alike.

    Raises:
        KitError: a variant stands twice, or is neither known nor a folder with a policy.
    """
    named: dict[str, str] = {}
    for variant in map(str, compare):
        if variant in named.values():
            raise KitError(f"compare: {variant!r} stands twice. Give it once")
        names = [variant]
        if variant not in VARIANTS:
            parts = [part for part in _policy_folder(variant).resolve().parts if part != "best"]
            names = [re.sub(r"[^A-Za-z0-9._]+", "_", "/".join(parts[-depth:]))[-80:] for depth in (1, 2, 3)]
            names = [name for name in names if name not in VARIANTS]
        free = [name for name in names if name not in named]
        if not free:
            raise KitError(f"compare: {variant!r} has the name of another one ({names[-1]}). Rename a folder")
        named[free[0]] = variant
    return named


def _policy_folder(variant: str) -> Path:
    """The folder that holds a saved variant's weights: a run's `best/`, or the folder itself."""
    folder = Path(variant)
    for place in (folder / "best", folder):
        if any((place / name).is_file() for name in ("adapter_config.json", "generation_config.json")):
            return place
    allowed = ", ".join(VARIANTS)
    raise KitError(f"compare: found {variant!r:.200}, allowed: {allowed}, or the folder of a trained run or policy")


def writer(kit: Experiment, variant: str) -> Writer:
    """What writes a variant's prompts; a saved policy is loaded once, here.

    A saved policy answers under the settings of its run; one without a run has the experiment's.
    """
    if variant == "oracle" and kit.config.evaluation_settings.gold is None:
        raise KitError("compare: found 'oracle', which only the embedded world has; leave it out")
    if variant in ("raw", "oracle"):
        return Writer(kit, variant)
    policy, config = kit.policy, kit.config
    if variant not in VARIANTS:
        weights = _policy_folder(variant)
        if weights.name == "best" and (weights.parent / "config.json").is_file():
            config = load_config(weights.parent, {"model_settings.device": config.model_settings.device})
        policy = load_policy(config, weights)
    models = config.model_settings
    require_words(models.look_at, kit.generator)
    return Writer(kit, variant, policy, config.generation_settings.turns, models.use_image, models.look_at)


def _best_prompt(request: Request, kit: Experiment) -> str:
    best = best_prompt(request.text, request.prompt.metadata, getattr(kit.generator, "medium", "image"))
    if best is None:
        raise KitError(f"prompt {request.text!r}: outside the embedded world's grammar, so it has no oracle")
    return best
