"""Trains the embedded world's models from nothing: `python -m tools.shapeworld`, or `make models`."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from grpo_kit.config import PROJECT_ROOT, load_config
from grpo_kit.config.hardware import choose_device
from grpo_kit.models.generator import load_generator
from grpo_kit.models.policy import load_policy
from grpo_kit.rewards.clip import load_clip_similarity
from grpo_kit.shapeworld.scene import random_scenes
from tools.shapeworld import measure, measure_eyes
from tools.shapeworld.cards import contact_sheet, emptied, write_card
from tools.shapeworld.eyes import train_eyes
from tools.shapeworld.generator import train_generator
from tools.shapeworld.picture_prompts import write_picture_prompts
from tools.shapeworld.pictures import draw_all
from tools.shapeworld.policy import train_policy
from tools.shapeworld.prompts import write_prompts
from tools.shapeworld.reward_model import save_reward_model, train_reward_model
from tools.shapeworld.vae import peak_signal_to_noise, train_vae

STAGES = ("prompts", "clip", "generator", "policy", "eyes")
STEPS = {"vae": 1500, "generator": 5000, "clip": 2500, "policy": 2600, "eyes": 3000, "looks": 1200}
COMMAND = "python -m tools.shapeworld"


def main(
    stages: Annotated[
        list[str] | None, typer.Argument(help=f"what to build, of: {', '.join(STAGES)}; all by default")
    ] = None,
    out: Annotated[Path, typer.Option(help="where the models go")] = PROJECT_ROOT / "data" / "shapeworld",
    work: Annotated[Path, typer.Option(help="where half-done training is kept")] = PROJECT_ROOT
    / "data"
    / "shapeworld"
    / ".work",
    scale: Annotated[float, typer.Option(help="share of the training steps; 0.01 is a rehearsal")] = 1.0,
    seed: Annotated[int, typer.Option(help="of data, weights and batches")] = 0,
    threads: Annotated[int, typer.Option(help="of torch; 0 leaves its default")] = 0,
) -> None:
    """Train the embedded world's models; two hours on two cores. A stopped build goes on where it was."""
    if threads:
        torch.set_num_threads(threads)
    unknown = set(stages or STAGES) - set(STAGES)
    if unknown:
        raise typer.BadParameter(f"found {min(unknown)!r}, allowed: {', '.join(STAGES)}")
    steps = {name: max(2, round(count * scale)) for name, count in STEPS.items()}
    builders = {"prompts": _prompts, "clip": _clip, "generator": _generator, "policy": _policy, "eyes": _eyes}
    for stage in stages or STAGES:
        builders[stage](out, work, steps, seed)
        typer.echo(f"{stage}: done")


def _prompts(out: Path, work: Path, steps: dict[str, int], seed: int) -> None:
    write_prompts(out.parent / "prompts")
    write_picture_prompts(out.parent / "prompts")


def _clip(out: Path, work: Path, steps: dict[str, int], seed: int) -> None:
    model, outcome = train_reward_model(random_scenes(20_000, seed + 2), work, steps["clip"], seed)
    folder = emptied(out / "clip")
    save_reward_model(model, folder)
    clip = load_clip_similarity(str(folder), None, choose_device("cpu")[0])
    metrics = measure.discernment(clip)
    write_card(folder, "clip", command=f"{COMMAND} clip", seed=seed, minutes={"clip": outcome.minutes}, metrics=metrics)


def _generator(out: Path, work: Path, steps: dict[str, int], seed: int) -> None:
    scenes = random_scenes(24_000, seed)
    pixels = draw_all(scenes, seed)
    vae, vae_outcome = train_vae(pixels, work, steps["vae"], seed)
    pipeline, outcome = train_generator(vae, scenes, pixels, work, steps["generator"], seed)
    folder = emptied(out / "generator")
    pipeline.transformer.half()  # half the size on disk; loaded as float32 unless told otherwise
    pipeline.save_pretrained(folder)
    generator = load_generator(load_config("tiny", {"model_settings.sd_model": str(folder)}))
    scenes = random_scenes(500, seed + 3, held_out=True, style="clean")
    metrics = {
        "obeys the best caption": measure.obedience(generator, scenes),
        "autoencoder, dB": peak_signal_to_noise(vae, draw_all(random_scenes(500, seed + 3, held_out=True), seed)),
        "verifier": measure.verifier_accuracy(),
    }
    minutes = {"vae": vae_outcome.minutes, "generator": outcome.minutes}
    contact_sheet(generator, scenes[:40], folder / "contact_sheet.png")
    write_card(folder, "generator", command=f"{COMMAND} generator", seed=seed, minutes=minutes, metrics=metrics)


def _policy(out: Path, work: Path, steps: dict[str, int], seed: int) -> None:
    model, processor, outcome = train_policy(random_scenes(24_000, seed + 4), work, steps["policy"], seed)
    folder = emptied(out / "policy")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    policy = load_policy(load_config("tiny", {"model_settings.vlm_model": str(folder)}))
    metrics = measure.manners(policy)
    minutes = {"policy": outcome.minutes}
    write_card(folder, "policy", command=f"{COMMAND} policy", seed=seed, minutes=minutes, metrics=metrics)


def _eyes(out: Path, work: Path, steps: dict[str, int], seed: int) -> None:
    numbers, scenes = (steps["eyes"], steps["looks"]), random_scenes(24_000, seed + 5)
    model, processor, outcomes = train_eyes(out / "policy", scenes, work, numbers, seed)
    folder = emptied(out / "policy_eyes")
    model.half().save_pretrained(folder)  # as the generator's: loaded as float32 unless told otherwise
    processor.save_pretrained(folder)
    policies = {
        name: load_policy(load_config("tiny_refine", {"model_settings.vlm_model": str(out / name)}))
        for name in ("policy_eyes", "policy")
    }
    policy = policies["policy_eyes"]
    metrics = {
        "without pictures": measure.manners(policy),
        "without pictures, the policy it began as": measure.manners(policies["policy"]),
        "greedy rewrite states all that is meant": measure_eyes.reading(policy),
        "second answer is what the painter needs": measure_eyes.looking(policy),
        "keeps": measure_eyes.keeping(policy),
    }
    minutes = {name: outcome.minutes for name, outcome in outcomes.items()}
    write_card(folder, "policy_eyes", command=f"{COMMAND} eyes", seed=seed, minutes=minutes, metrics=metrics)


if __name__ == "__main__":
    typer.run(main)
