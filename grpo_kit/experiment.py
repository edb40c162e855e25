"""Everything that an experiment needs, loaded from one config."""

from dataclasses import dataclass, replace
from pathlib import Path

from grpo_kit.config import Config
from grpo_kit.config.contents import decisive_contents
from grpo_kit.config.display import Shown, table
from grpo_kit.config.hardware import placement
from grpo_kit.config.prompts import Prompt, load_prompts
from grpo_kit.config.quiet import loading_quietly
from grpo_kit.config.schedule import scheduled_rates
from grpo_kit.models.adapters import base_and_adapter
from grpo_kit.models.generator import Generator, load_generator
from grpo_kit.models.policy import Policy, load_policy
from grpo_kit.rewards.composition import Rewards
from grpo_kit.rewards.loading import check_reward_settings, load_rewards


@dataclass(frozen=True, repr=False)
class Experiment(Shown):
    """A policy, a generator, rewards and prompts that belong together."""

    config: Config
    policy: Policy
    generator: Generator
    rewards: Rewards
    train_prompts: list[Prompt]
    val_prompts: list[Prompt]

    def __post_init__(self) -> None:
        self.rewards.require_medium(getattr(self.generator, "medium", "image"))  # before anything is drawn

    def _shown(self) -> dict[str, object]:
        models = {"policy": type(self.policy.model).__name__, "generator": type(self.generator.pipeline).__name__}
        prompts = {name: len(getattr(self, name)) for name in ("train_prompts", "val_prompts")}
        return {"profile": self.config.profile, **models, "rewards": ", ".join(self.rewards.parts), **prompts}

    def _repr_html_(self) -> str:
        return table("Experiment", ((name, repr(getattr(self, name))) for name in self.__dataclass_fields__))

    @property
    def overlap(self) -> bool:
        """Whether a rollout's pictures are scored while its next are drawn.

        As `reward_settings.overlap` says; left open, where the generator and the rewards have different devices.
        """
        wanted = self.config.reward_settings.overlap
        placed = placement(self.config.model_settings)
        return placed["generator_device"][0] != placed["reward_device"][0] if wanted is None else wanted

    def contents(self) -> dict[str, str]:
        """Dotted key → digest of what decides its result beside the settings: its prompts, and what lies in files."""
        return decisive_contents(self.config, self.train_prompts, self.val_prompts)

    def with_rewards(self, rewards: Rewards) -> "Experiment":
        """The same experiment under other rewards, whose failures are treated as its `on_bad_reward` says."""
        on_error = "raise" if self.config.training_settings.on_bad_reward == "raise" else "nan"
        return replace(self, rewards=replace(rewards, on_error=on_error))


@loading_quietly()
def load_experiment(config: Config, trained: Path | str | None = None) -> Experiment:
    """Load models, rewards and prompts.

    Args:
        config: from `load_config`.
        trained: a run's `best/` folder; its weights become the policy, the config's own remain the reference.

    Raises:
        KitError: one line on what is missing, damaged or wrong, and what to do.
    """
    placement(config.model_settings)  # what is wrong is said before any model is loaded
    check_reward_settings(config)
    scheduled_rates(config.training_settings, 1)
    base_and_adapter(config.model_settings)
    generator = load_generator(config)
    return Experiment(
        config=config,
        train_prompts=load_prompts(config.training_settings.train_prompts),
        val_prompts=load_prompts(config.evaluation_settings.val_prompts),
        policy=load_policy(config, None if trained is None else Path(trained)),
        generator=generator,
        rewards=load_rewards(config, generator),
    )
