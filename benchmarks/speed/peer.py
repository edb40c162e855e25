"""The peer: TRL's GRPOTrainer at its best legal settings, driven one training iteration at a time.

An iteration is what TRL's own loop does with one batch, once for each inner update: `training_step` (generation,
rewards and advantages the first time; log-probabilities, loss, backward), gradient clipping, optimizer step. TRL gets
the benefit of every doubt: it is handed its batch without a data loader, and runs without callbacks, logging, schedule,
saving, evaluation and progress bar. Two settings were tried and make no difference or are slower on a CPU:
`cache_implementation="static"` (equal within noise) and `use_transformers_continuous_batching` (five times slower).
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from grpo_kit.config import TrainingSettings

RewardOfTexts = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # (completions, user prompts) → one each


@dataclass
class Peer:
    """A trainer with its optimizer."""

    trainer: GRPOTrainer
    optimizer: torch.optim.Optimizer

    def iterate(self, prompts: Sequence[object]) -> None:
        """One iteration on these prompts, each answered G times."""
        inputs = [{"prompt": prompt} for prompt in prompts for _ in range(self.trainer.num_generations)]
        model = self.trainer.model
        for _ in range(self.trainer.num_iterations):
            self.trainer.training_step(model, inputs, None)
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.trainer.args.max_grad_norm)
            self.optimizer.step()
            model.zero_grad()

    def logged(self, name: str) -> list[float]:
        """A metric of every iteration so far."""
        return self.trainer._metrics["train"][name]


def make_peer(
    model: torch.nn.Module,
    processor: object,
    reward: RewardOfTexts,
    settings: TrainingSettings,
    max_completion_length: int,
    temperature: float = 1.0,
) -> Peer:
    """TRL's trainer with the kit's settings.

    Args:
        model: loaded from a folder, from which TRL loads its reference where beta is not 0.
        reward: gets all completions of an iteration at once.
    """

    def reward_function(prompts: list, completions: list, **_: object) -> list[float]:
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return list(reward(texts, prompts))

    placeholder = Dataset.from_dict({"prompt": ["never read: iterations are handed their prompts"]})
    with tempfile.TemporaryDirectory() as folder:
        arguments = _arguments(settings, max_completion_length, temperature, folder)
        trainer = GRPOTrainer(model, reward_function, arguments, placeholder, processing_class=processor)
    trainer.current_gradient_accumulation_steps = 1
    return Peer(trainer, make_optimizer(trainer.model.parameters(), settings))


def _arguments(settings: TrainingSettings, length: int, temperature: float, folder: str) -> GRPOConfig:
    """The kit's settings under TRL's names. The folder is asked for; nothing is written into it."""
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,  # would compute something else, and halves the speed of most CPUs; TRL's default is True
        gradient_checkpointing=False,  # computes the forward pass twice; TRL's default is True
        report_to="none",
        log_completions=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
        per_device_train_batch_size=settings.prompts_per_iteration * settings.group_size,
        num_generations=settings.group_size,
        num_iterations=settings.updates_per_rollout,
        max_completion_length=length,
        temperature=temperature,
        learning_rate=settings.learning_rate,
        beta=settings.beta,
        use_bias_correction_kl=False,  # the kit's KL term is GRPO's own; TRL's default is True, another gradient
        epsilon=settings.epsilon,
        loss_type=settings.loss_type,
        scale_rewards=settings.scale_rewards,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
    )


def make_optimizer(parameters: object, settings: TrainingSettings) -> torch.optim.Optimizer:
    """The optimizer of both sides."""
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
