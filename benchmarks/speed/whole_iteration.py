"""The whole iteration on the embedded world, images and rewards included, beside TRL with two reward functions.

Both sides train the same embedded policy on the same prompts with profile tiny's two inner updates, and draw with the
same pipeline, steps, guidance, latents and CLIP model. TRL's reward function draws (a) all images in one pipeline call
or (b) one call an image, as most public code does; either way one CLIP call scores them. The learning rate is next to
nothing, so that the policies stay what they are and write alike; they sample from streams of their own, so lengths
agree on average. The kit draws equal (text, seed) pairs once. At the start of training there are next to none, at its
end about a third, so both are measured: the initial policy, and the one that the demo run trained.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.speed import equality, measure
from benchmarks.speed.peer import Peer, make_optimizer, make_peer
from benchmarks.speed.results import Figure, Gate, Result, Settings, require
from grpo_kit.config import PROJECT_ROOT, Config, load_config
from grpo_kit.config.prompts import Prompt, balanced_batch
from grpo_kit.experiment import Experiment, load_experiment
from grpo_kit.models.loading import load_language_model
from grpo_kit.rollout import Rollout, collect_rollout, latent_seeds
from grpo_kit.training.iteration import run_iteration

STAGES = {"initial policy": None, "trained policy": PROJECT_ROOT / "data" / "demo_run" / "best"}
GOALS = {"one call": (1.3, 1.5), "a call an image": (3.0, 4.0)}
LEVELS = 1  # most that a value of 255 may differ where the batch around an image differs
LENGTHS = 0.1  # most that mean lengths may differ: both sides sample, from different streams

Draw = Callable[[Experiment, Sequence[str], Sequence[int]], list[Image.Image]]


def whole_iteration(settings: Settings) -> Result:
    """Seconds of an iteration with images: the kit, TRL with one call for all images, TRL with one call an image."""
    kit = load_experiment(configured())
    peers = {name: make_image_peer(kit, draw) for name, draw in PEERS.items()}
    cases, gates, notes = [], [], []
    ratios = {name: {clock: [] for clock in measure.CLOCKS} for name in PEERS}
    for stage, weights in list(STAGES.items())[: 1 if settings.quick else None]:
        if weights is not None:
            _put_weights(weights, [kit.policy.model, *(side.peer.trainer.model for side in peers.values())])
        timings, passed, drawn = compare(kit, peers, 2 * settings.pairs, 1 + 1000 * len(cases), stage)
        for name, clock in itertools.product(PEERS, measure.CLOCKS):
            ratios[name][clock].append(measure.paired_ratios(timings[name], timings["kit"], clock))
        cases.append({"case": stage, "distinct_images": drawn, "raw": measure.raw(timings)})
        gates += [replace(gate, name=f"{stage}: {gate.name}") for gate in passed]
        notes.append(f"{stage}: the kit drew {drawn:.1f} images an iteration, TRL 32: equal rewrites are drawn once")
    figures = [figure for name, found in ratios.items() for figure in _figures(name, found)]
    return Result("W2", "whole iteration on the embedded world, profile tiny", figures, cases, gates, notes)


def _figures(name: str, ratios: dict[str, list[np.ndarray]]) -> list[Figure]:
    """The goals hold for start and end of training together; each stands beside them."""
    total, wall = (measure.geometric_mean(stages) for stages in ratios.values())
    title = f"TRL with {name} / kit"
    figures = [Figure(f"{title}, start and end of training", *vars(total).values(), *GOALS[name], wall=wall.value)]
    for stage, own, other in zip(STAGES, *ratios.values(), strict=False):
        found = measure.median(own)
        figures.append(Figure(f"{title}, {stage}", *vars(found).values(), wall=float(np.median(other))))
    return figures


def compare(
    kit: Experiment, peers: dict[str, "ImagePeer"], rounds: int, first: int, label: str
) -> tuple[measure.Timings, list[Gate], float]:
    """All sides' seconds on the iterations from `first` on, the gates, and how many different images the kit drew."""
    gates = check(kit, peers["one call"].peer)
    optimizer = make_optimizer(kit.policy.trainable_parameters(), kit.config.training_settings)
    written: list[Rollout] = []
    for side in peers.values():
        side.peer.trainer._metrics["train"].clear()
    sides = {"kit": lambda number: written.append(run_iteration(kit, optimizer, number + 1 + first)[0])}
    sides |= {name: lambda number, side=side: side.iterate(number + 1 + first) for name, side in peers.items()}
    timings = measure.alternate(sides, rounds, label=label)
    gates += require([_same_lengths(name, written, side.peer) for name, side in peers.items()])
    return timings, gates, float(np.mean([_distinct(rollout) for rollout in written]))


def _put_weights(folder: Path, models: Sequence[torch.nn.Module]) -> None:
    trained, _ = load_language_model(str(folder), torch.float32)
    for model in models:
        model.load_state_dict(trained.state_dict())


def configured() -> Config:
    """Profile tiny with next to no learning, nothing scored that is not rewarded, and all steps in training too."""
    overrides = {"training_settings.learning_rate": 1e-8, "reward_settings.monitors": []}
    overrides |= {"generation_settings.rollout_steps": None}  # the peer draws with all of them
    return load_config("tiny", overrides | {"model_settings.device": "cpu"})


@dataclass
class ImagePeer:
    """TRL on the embedded policy, with a reward that draws."""

    peer: Peer
    kit: Experiment
    draw: Draw
    number: int = 0

    def iterate(self, number: int) -> None:
        """One iteration on the prompts that the kit's iteration of the same number has."""
        self.number = number
        self.peer.iterate([conversation(self.kit, prompt) for prompt in prompts_of(self.kit.config, self.kit, number)])

    def reward(self, texts: Sequence[str], _: object) -> list[float]:
        """Draw every text and score its image against the user's prompt."""
        settings = self.kit.config.training_settings
        users = [p.user_prompt for p in prompts_of(self.kit.config, self.kit, self.number)]
        groups = torch.arange(len(users)).repeat_interleave(settings.group_size)
        seeds = latent_seeds(self.number, groups, settings.group_size, 1, share_seeds=True).flatten().tolist()
        images = self.draw(self.kit, texts, seeds)
        return similarity(self.kit, images, users, groups)


def make_image_peer(kit: Experiment, draw: Draw) -> ImagePeer:
    """TRL on weights of its own, loaded from where the kit's came from."""
    config = kit.config
    model, processor = load_language_model(config.model_settings.vlm_model, torch.float32)
    length, temperature = config.generation_settings.max_new_tokens, config.generation_settings.temperature
    side = ImagePeer(None, kit, draw)
    side.peer = make_peer(
        model, processor, lambda *texts: side.reward(*texts), config.training_settings, length, temperature
    )
    return side


def prompts_of(config: Config, kit: Experiment, number: int) -> list[Prompt]:
    """The prompts of an iteration."""
    settings = config.training_settings
    return balanced_batch(kit.train_prompts, settings.prompts_per_iteration, settings.seed, number)


def conversation(kit: Experiment, prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as TRL's conversational data sets have it."""
    return [{"role": "user", "content": kit.policy.instruction.replace("{prompt}", prompt.user_prompt)}]


def draw_together(
    kit: Experiment, texts: Sequence[str], seeds: Sequence[int], **embedded: torch.Tensor
) -> list[Image.Image]:
    """All images in one call of the pipeline, from texts or from their embeddings."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    steps = kit.generator.num_inference_steps
    return kit.generator.pipeline(
        **(embedded or {"prompt": list(texts)}),
        num_inference_steps=steps,
        sigmas=[1 - i / steps for i in range(steps)],
        guidance_scale=kit.generator.guidance_scale,
        max_sequence_length=0,  # T5 is left out, as in the kit
        generator=generators,
    ).images


def draw_singly(kit: Experiment, texts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """One call of the pipeline for each image."""
    return [draw_together(kit, [text], [seed])[0] for text, seed in zip(texts, seeds, strict=True)]


PEERS = {"one call": draw_together, "a call an image": draw_singly}


@torch.no_grad()
def similarity(kit: Experiment, images: Sequence[Image.Image], users: list[str], groups: torch.Tensor) -> list[float]:
    """open_clip's cosine of each image and its user's prompt: one call for the images, one for the distinct texts."""
    clip = kit.rewards.parts["clip_similarity"]
    pixels = torch.stack([clip.preprocess(image) for image in images])
    seen = clip.model.encode_image(pixels, normalize=True)
    read = clip.model.encode_text(clip.tokenizer(users), normalize=True)
    return (seen * read[groups]).sum(dim=-1).tolist()


def check(kit: Experiment, peer: Peer) -> list[Gate]:
    """Both sides do the same work: tokens, log-probabilities, gradients, images, rewards."""
    settings = kit.config.training_settings
    prompts = prompts_of(kit.config, kit, 1)
    rollout = collect_rollout(kit.policy, kit.generator, kit.rewards, prompts, settings.group_size, seed=1)
    ids = peer.trainer._tokenize_prompts([conversation(kit, prompt) for prompt in prompts])[0]
    own = kit.policy.encode([prompt.user_prompt for prompt in prompts]).inputs
    same = [row[keep].tolist() == list(found) for row, keep, found in zip(*_rows(own), ids, strict=True)]
    left_out = kit.generator.num_inference_steps
    with kit.generator.steps(kit.config.generation_settings.rollout_steps):
        left_out -= kit.generator.num_inference_steps
    gates = [Gate("prompts tokenised differently", same.count(False), 0)]
    gates += [Gate("denoising steps that the kit leaves out", left_out, 0)]
    gates += equality.gates(kit.policy, peer.trainer, rollout, kit.config, ids)
    return require(gates + _image_gates(kit, rollout))


def _rows(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return inputs["input_ids"], inputs["attention_mask"].bool()


def _image_gates(kit: Experiment, rollout: Rollout) -> list[Gate]:
    """Pictures of the same texts and seeds: in the same batch, one by one, and their rewards."""
    pairs = list(dict.fromkeys(zip(rollout.enhanced_prompts, rollout.image_seeds.flatten().tolist(), strict=True)))
    texts, seeds = zip(*pairs[: kit.generator.images_at_once], strict=True)  # as many as the kit draws in one call
    kept = kit.generator.generate_images(texts, seeds)
    users = [prompt.user_prompt for prompt in rollout.prompts]
    everything = draw_together(kit, rollout.enhanced_prompts, rollout.image_seeds.flatten().tolist())
    rewards = torch.tensor(similarity(kit, everything, users, rollout.group_ids), dtype=torch.float64)
    embedded = draw_together(kit, texts, seeds, **kit.generator._text_inputs(list(texts)))
    together, singly = draw_together(kit, texts, seeds), draw_singly(kit, texts, seeds)
    return [
        Gate("pixels, same embeddings and batch, levels of 255", _levels(kept, embedded), 0),
        Gate("pixels, texts embedded by the pipeline, levels of 255", _levels(kept, together), LEVELS),
        Gate("pixels, drawn one by one, levels of 255", _levels(kept, singly), LEVELS),
        Gate("rewards", float((rewards - rollout.rewards).abs().max()), 1e-3),
    ]


def _levels(some: Sequence[Image.Image], others: Sequence[Image.Image]) -> int:
    return max(int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max()) for a, b in zip(some, others, strict=True))


def _same_lengths(name: str, written: Sequence[Rollout], peer: Peer) -> Gate:
    """Mean lengths agree, which is all that can be asked of two samplers with streams of their own."""
    own = np.mean([float(rollout.completion_mask.sum(dim=1).float().mean()) for rollout in written])
    other = np.mean(peer.logged("completions/mean_length"))
    return Gate(f"mean completion length beside TRL with {name}, relative", float(abs(own - other) / own), LENGTHS)


def _distinct(rollout: Rollout) -> int:
    return len(set(zip(rollout.enhanced_prompts, rollout.image_seeds.flatten().tolist(), strict=True)))
