"""Trains the models of the small world of films from nothing: `python -m tools.moving`."""

import random
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

from grpo_kit.config import PROJECT_ROOT, load_config
from grpo_kit.config.media import Video
from grpo_kit.models.generator import load_generator
from grpo_kit.models.policy import load_policy
from grpo_kit.rewards.gold import grammatical, keeps_objects
from grpo_kit.rewards.video import load_xclip_similarity
from grpo_kit.shapeworld.moving import FRAME_RATE, STYLE_WORDS, Film, check, describe, oracle_caption, render
from grpo_kit.show.images import image_grid
from grpo_kit.show.style import Drawing
from tools.moving.captions import change_one
from tools.moving.films import random_films
from tools.moving.generator import train_decoder, train_generator, train_vae
from tools.moving.policy import train_policy
from tools.moving.prompts import write_prompts
from tools.moving.reward_model import train_reward_model
from tools.shapeworld.cards import emptied, write_card

STAGES = ("prompts", "generator", "xclip", "policy")
STEPS = {"vae": 800, "generator": 3200, "decoder": 800, "xclip": 1200, "policy": 1000}
COMMAND = "python -m tools.moving"


def main(
    stages: Annotated[list[str] | None, typer.Argument(help=f"what to build, of: {', '.join(STAGES)}")] = None,
    out: Annotated[Path, typer.Option(help="where the models go")] = PROJECT_ROOT / "data" / "moving",
    work: Annotated[Path, typer.Option(help="for half-done training")] = PROJECT_ROOT / "data" / "moving" / ".work",
    scale: Annotated[float, typer.Option(help="share of the training steps; 0.01 is a rehearsal")] = 1.0,
    seed: Annotated[int, typer.Option(help="of data, weights and batches")] = 0,
) -> None:
    """Train them on one core; a stopped build goes on where it was."""
    torch.set_num_threads(1)
    steps = {name: max(2, round(count * scale)) for name, count in STEPS.items()}
    builders = {"prompts": _prompts, "generator": _generator, "xclip": _xclip, "policy": _policy}
    for stage in stages or STAGES:
        torch.manual_seed(seed)
        builders[stage](out, work, steps, seed)
        typer.echo(f"{stage}: done")


def _prompts(out: Path, work: Path, steps: dict[str, int], seed: int) -> None:
    write_prompts(out.parent / "prompts")


def _generator(out: Path, work: Path, steps: dict[str, int], seed: int) -> None:
    films, rng = random_films(2000, seed), random.Random(seed)
    frames = np.stack([render(film, rng) for film in films])
    vae, vae_outcome = train_vae(frames, work, steps["vae"], seed)
    centred = np.stack([render(film, rng, jitter=1) for film in films])
    pipeline, outcome = train_generator(vae, films, centred, work, steps["generator"], seed)
    decoder_outcome = train_decoder(vae, frames, work, steps["decoder"], seed)
    for part in (pipeline.transformer, pipeline.text_encoder, vae):
        part.half()  # half the size on disk; loaded as float32 unless told otherwise
    pipeline.save_pretrained(emptied(out / "generator"))
    generator = load_generator(load_config("tiny_video", {"model_settings.sd_model": str(out / "generator")}))
    asked = random_films(200, seed + 3, "clean")
    drawn = generator.generate_images([oracle_caption(film) for film in asked], range(len(asked)))
    metrics = {"obeys the best caption": attribute_rates(drawn, asked), "check": check_accuracy()}
    _contact_sheet(asked[:24], drawn).save(out / "generator" / "contact_sheet.png", dpi=80)
    outcomes = {"vae": vae_outcome, "decoder": decoder_outcome, "transformer": outcome}
    minutes = {name: one.minutes for name, one in outcomes.items()}
    _card(out / "generator", "moving_generator", "generator", seed, minutes, metrics)


def _contact_sheet(asked: list[Film], drawn: list[Video | None]) -> Drawing:
    """The films that were drawn, each as its nine frames, three in a row."""
    shown = [(film, video.frames) for film, video in zip(asked, drawn, strict=False) if video is not None]
    sheets = [
        Image.fromarray(np.vstack([np.hstack(frames[row : row + 3]) for row in (0, 3, 6)])) for _, frames in shown
    ]
    return image_grid(sheets, [oracle_caption(film) for film, _ in shown], columns=6)


def _xclip(out: Path, work: Path, steps: dict[str, int], seed: int) -> None:
    model, processor, outcome = train_reward_model(random_films(2000, seed + 2), work, steps["xclip"], seed)
    folder = emptied(out / "xclip")
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    _card(folder, "moving_xclip", "xclip", seed, {"xclip": outcome.minutes}, discernment(folder))


def _policy(out: Path, work: Path, steps: dict[str, int], seed: int) -> None:
    model, processor, outcome = train_policy(random_films(6000, seed + 4), work, steps["policy"], seed)
    folder = emptied(out / "policy")
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)
    policy = load_policy(load_config("tiny_video", {"model_settings.vlm_model": str(folder)}))
    rng = random.Random(seed)
    prompts = [describe(film, 0.5, rng) for film in random_films(100, seed + 5)]
    asked, texts = [prompt for prompt in prompts for _ in range(4)], list(policy.sample(prompts, 4, seed=seed).texts)
    metrics = {
        "grammatical": float(np.mean(grammatical([None] * 400, asked, texts))),
        "keeps the request": float(np.mean(keeps_objects([None] * 400, asked, texts))),
    }
    _card(folder, "moving_policy", "policy", seed, {"policy": outcome.minutes}, metrics)


# --- figures for the cards --------------------------------------------------------------------------------------------


def attribute_rates(videos: list[Video | None], films: list[Film]) -> dict[str, float]:
    """Share of the videos on which each stated attribute holds, and "everything"; a failed one shows nothing."""
    held: dict[str, list[bool]] = defaultdict(list)
    for video, film in zip(videos, films, strict=True):
        result = check(np.zeros((9, 32, 32, 3), np.uint8) if video is None else video, film)
        for name, holds in (result | {"everything": all(result.values())}).items():
            held[name].append(holds)
    return {name: float(np.mean(values)) for name, values in held.items()}


def check_accuracy(count: int = 1000, seed: int = 20) -> dict[str, float]:
    """Share of films that the check reads right in all: a clean one as it is, a spoiled one as spoiled."""
    rng, table = random.Random(seed), {}
    for style in STYLE_WORDS:
        results = [check(render(film, rng), film) for film in random_films(count, seed, style)]
        wrong = {"clean": None, "still": "direction", "blurry": "clean"}[style]
        table[style] = float(np.mean([not result[wrong] if wrong else all(result.values()) for result in results]))
    return table


def discernment(folder: Path, count: int = 300, seed: int = 30) -> dict[str, float]:
    """Share of pairs in which a film scores above one that is wrong in an attribute, against the same prompt.

    Prompts state all but the style, half of them in each dialect.
    """
    xclip, rng = load_xclip_similarity(str(folder)), random.Random(seed)
    films = random_films(count, seed, "clean")
    texts = [describe(film, rng.choice(("generator", "user"))) for film in films]

    def scores(shown: list[Film]) -> torch.Tensor:
        return xclip([Video(render(film, rng), FRAME_RATE) for film in shown], texts, texts)

    own = scores(films)
    names = ("colour", "shape", "direction", "speed", "style")
    return {name: float((own > scores([change_one(f, rng, name) for f in films])).float().mean()) for name in names}


def _card(folder: Path, name: str, stage: str, seed: int, minutes: dict[str, float], metrics: dict) -> None:
    write_card(folder, name, command=f"{COMMAND} {stage}", seed=seed, minutes=minutes, metrics=metrics)


if __name__ == "__main__":
    typer.run(main)
