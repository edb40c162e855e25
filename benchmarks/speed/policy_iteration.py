"""The policy's part of an iteration (sampling, rewards of texts, one update) beside TRL's, on a text-only policy.

Kit: `Policy.sample`, rewards, `grpo_step`. TRL: one iteration of its trainer (see `peer`). Same weights, prompts, group
size, exact numbers of tokens, reward, optimizer and learning rate; what differs is what was sampled.
"""

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.speed import equality, measure, text_policy
from benchmarks.speed.peer import Peer, make_optimizer, make_peer
from benchmarks.speed.results import Figure, Gate, Result, Settings, require
from benchmarks.speed.text_policy import Shape
from grpo_kit.config import Config, load_config
from grpo_kit.config.prompts import Prompt
from grpo_kit.models.policy import Policy
from grpo_kit.rollout import Rollout
from grpo_kit.training.step import StepStats, grpo_step

TOKENS = ((24, 32), (96, 32), (256, 32), (256, 64))
BETAS = (0.0, 0.04)
QUICK = 3  # cases of a quick run


@dataclass
class Kit:
    """The kit's side: a policy with its optimizer and settings."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    config: Config

    def rollout(self, prompts: Sequence[str], seed: int) -> Rollout:
        """Sampled completions with the rewards of their texts; there are no images."""
        group = self.config.training_settings.group_size
        completions = self.policy.sample(prompts, group, seed=seed)
        ends = torch.tensor(self.policy.eos_token_ids)
        rewards = torch.tensor(text_policy.share_of_even_words(completions.texts), dtype=torch.float64)
        return Rollout(
            prompts=[Prompt(prompt) for prompt in prompts],
            group_ids=torch.arange(len(prompts)).repeat_interleave(group),
            completion_ids=completions.ids,
            completion_mask=completions.mask,
            enhanced_prompts=completions.texts,
            images=[],
            image_seeds=torch.empty(len(completions.texts), 0, dtype=torch.int64),
            reward_parts={},
            rewards=rewards,
            old_logprobs=completions.logprobs,
            truncated=~(torch.isin(completions.ids, ends) & completions.mask).any(dim=1),
        )

    def iterate(self, prompts: Sequence[str], seed: int) -> StepStats:
        """One iteration: sample, reward, update."""
        return grpo_step(self.policy, self.optimizer, self.rollout(prompts, seed), self.config)


def configured(shape: Shape, beta: float) -> Config:
    """The settings of both sides."""
    training = {
        "prompts_per_iteration": shape.prompts,
        "group_size": shape.group,
        "updates_per_rollout": 1,
        "learning_rate": 1e-5,
        "beta": beta,
    }
    overrides = {f"training_settings.{name}": value for name, value in training.items()}
    return load_config("tiny", overrides | {"generation_settings.max_new_tokens": shape.completion_tokens})


def make_kit(folder: Path, shape: Shape, config: Config) -> Kit:
    """The kit on the weights of a folder."""
    settings = config.training_settings
    policy = text_policy.load_policy(folder, shape, reference=settings.beta != 0)
    return Kit(policy, make_optimizer(policy.trainable_parameters(), settings), config)


def make_text_peer(folder: Path, shape: Shape, config: Config) -> Peer:
    """TRL on the weights of a folder."""
    twin = text_policy.load_policy(folder, shape, reference=False)

    def reward(texts: Sequence[str], prompts: Sequence[str]) -> list[float]:
        return text_policy.share_of_even_words(texts)

    return make_peer(twin.model, twin.tokenizer, reward, config.training_settings, shape.completion_tokens)


def check(kit: Kit, peer: Peer, shape: Shape) -> list[Gate]:
    """Both sides do the same work: log-probabilities, advantages, gradients, and the number of tokens."""
    prompts = text_policy.prompts(shape, seed=-1)
    rollout = kit.rollout(prompts, seed=0)
    prompt_ids = peer.trainer._tokenize_prompts(list(prompts))[0]
    gates = equality.gates(kit.policy, peer.trainer, rollout, kit.config, prompt_ids)
    peer.iterate(prompts)
    lengths = [peer.logged(f"completions/{name}_length")[-1] for name in ("min", "max")]
    lengths += rollout.completion_mask.sum(dim=1).tolist()
    gates.append(Gate("prompt tokens", max(abs(len(ids) - shape.prompt_tokens) for ids in prompt_ids), 0))
    gates.append(Gate("completion tokens", max(abs(n - shape.completion_tokens) for n in lengths), 0))
    return require(gates)


def compare(shape: Shape, beta: float, rounds: int) -> tuple[measure.Timings, list[Gate]]:
    """Both sides' seconds for one shape, after the gates."""
    config = configured(shape, beta)
    with tempfile.TemporaryDirectory() as place:
        folder = text_policy.build(Path(place))
        kit, peer = make_kit(folder, shape, config), make_text_peer(folder, shape, config)
        passed = check(kit, peer, shape)
    sides = {
        "kit": lambda number: kit.iterate(text_policy.prompts(shape, number), seed=number + 1),
        "trl": lambda number: peer.iterate(text_policy.prompts(shape, number)),
    }
    return measure.alternate(sides, rounds, label=str(shape)), passed


def iteration(settings: Settings) -> Result:
    """Every length of prompt and completion, with and without a KL term."""
    cases, gates, figures, ratios = [], [], [], {clock: [] for clock in measure.CLOCKS}
    few = slice(QUICK) if settings.quick else slice(None)
    for (prompt, completion), beta in list(itertools.product(TOKENS, BETAS))[few]:
        shape = Shape(prompt_tokens=prompt, completion_tokens=completion)
        timings, passed = compare(shape, beta, settings.pairs)
        name = f"({prompt}, {completion}) tokens, beta {beta:g}"
        figures.append(measure.ratio_figure(f"TRL / kit, {name}", timings["trl"], timings["kit"]))
        for clock, found in ratios.items():
            found.append(measure.paired_ratios(timings["trl"], timings["kit"], clock))
        cases.append({"case": name, "raw": measure.raw(timings)})
        gates += [replace(gate, name=f"{name}: {gate.name}") for gate in passed]
    total, wall = (measure.geometric_mean(found) for found in ratios.values())
    title = f"TRL / kit, geometric mean of {len(cases)} cases"
    figures.insert(0, Figure(title, *vars(total).values(), 3.0, 4.0, wall=wall.value))
    return Result("W1", "policy iteration, text policy, 4 prompts × 8", figures, cases, gates)
