"""Trains the models of the world of tones from nothing: `python -m tools.tones`, about half an hour on one core."""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from grpo_kit.config import PROJECT_ROOT, load_config
from grpo_kit.config.media import Sound, thumbnail
from grpo_kit.models.policy import load_policy
from grpo_kit.shapeworld.tones import RATE, oracle_caption
from grpo_kit.show.images import image_grid
from tools.shapeworld.cards import emptied, write_card
from tools.tones import measure
from tools.tones.clap import train_clap
from tools.tones.codec import new_vae
from tools.tones.generator import padded, train_generator
from tools.tones.policy import train_policy
from tools.tones.words import write_prompts

STAGES = ("prompts", "generator", "clap", "policy")
STEPS = {"generator": 3000, "clap": 800, "policy": 900}
COMMAND = "python -m tools.tones"


def main(
    stages: Annotated[list[str] | None, typer.Argument(help=f"of: {', '.join(STAGES)}; all by default")] = None,
    out: Annotated[Path, typer.Option(help="where the models go")] = PROJECT_ROOT / "data" / "tones",
    work: Annotated[Path, typer.Option(help="where half-done training is kept")] = PROJECT_ROOT
    / "data"
    / "tones"
    / ".work",
    scale: Annotated[float, typer.Option(help="share of the training steps; 0.01 is a rehearsal")] = 1.0,
    seed: Annotated[int, typer.Option(help="of data, weights and batches")] = 0,
) -> None:
    """Train the models of the world of tones. A stopped build goes on where it was."""
    torch.set_num_threads(1)
    if unknown := set(stages or STAGES) - set(STAGES):
        raise typer.BadParameter(f"found {min(unknown)!r}, allowed: {', '.join(STAGES)}")
    steps = {name: max(2, round(count * scale)) for name, count in STEPS.items()}
    builders = {"prompts": _prompts, "generator": _generator, "clap": _clap, "policy": _policy}
    for stage in stages or STAGES:
        builders[stage](out, work, steps, seed)
        typer.echo(f"{stage}: done")


def _prompts(out: Path, work: Path, steps: dict[str, int], seed: int) -> None:
    write_prompts(out.parent / "prompts")


def _generator(out: Path, work: Path, steps: dict[str, int], seed: int) -> None:
    tones, waves = measure.sounds(1500, seed)
    vae = new_vae(padded(waves[:100]))
    pipeline, outcome = train_generator(vae, tones, waves, work, steps["generator"], seed)

    def draw(captions: list[str]) -> list[np.ndarray]:
        generators = [torch.Generator().manual_seed(number) for number in range(len(captions))]
        drawn = pipeline(captions, 1.0, num_inference_steps=10, guidance_scale=1.0, generator=generators)
        return list(drawn.audios[:, 0].numpy())

    pipeline.set_progress_bar_config(disable=True)
    clean, sounds = measure.sounds(100, seed + 3, "clean")
    metrics = {
        "obeys the best caption": measure.obedience(draw, 150),
        "through the autoencoder": measure.attribute_rates(measure.through(vae, sounds), clean),
        "check": measure.check_accuracy(),
    }
    folder = emptied(out / "generator")
    captions = [oracle_caption(tone) for tone in clean[:24]]
    sheet = [thumbnail(Sound(wave[None], RATE)).convert("RGB") for wave in draw(captions)]
    _save(pipeline, folder)
    image_grid(sheet, captions, columns=6).save(folder / "contact_sheet.png", dpi=80)
    _card(folder, "generator", seed, {"generator": outcome.minutes}, metrics)


def _clap(out: Path, work: Path, steps: dict[str, int], seed: int) -> None:
    model, processor, outcome = train_clap(*measure.sounds(5000, seed + 2), work, steps["clap"], seed)
    metrics = measure.discernment(model, processor)
    folder = emptied(out / "clap")
    _save(model, folder)
    processor.save_pretrained(folder)
    _card(folder, "clap", seed, {"clap": outcome.minutes}, metrics)


def _policy(out: Path, work: Path, steps: dict[str, int], seed: int) -> None:
    model, processor, outcome = train_policy(work, steps["policy"], seed)
    folder = emptied(out / "policy")
    _save(model, folder)
    processor.save_pretrained(folder)
    policy = load_policy(load_config("tiny", {"model_settings.vlm_model": str(folder)}))
    _card(folder, "policy", seed, {"policy": outcome.minutes}, measure.manners(policy))


def _save(model: object, folder: Path) -> None:
    """In half precision, half the size on disk; loaded as float32 unless told otherwise."""
    model.to(torch.float16)
    model.save_pretrained(folder)


def _card(folder: Path, name: str, seed: int, minutes: dict[str, float], metrics: dict) -> None:
    write_card(folder, f"tones_{name}", command=f"{COMMAND} {name}", seed=seed, minutes=minutes, metrics=metrics)


if __name__ == "__main__":
    typer.run(main)
