"""What does it gain to score a rollout's pictures while its next are drawn? The plain order's seconds over the other's.

Profile tiny: its pictures, its own rewards, and one that waits for an answer, as from a server, for each picture.
`python -m benchmarks.speed.overlap` prints, for answers of several lengths, how many times as long the plain order
takes by the wall's clock, and the most that it could be: in each step the longer of drawing a part and scoring the one
before.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
import typer

import grpo_kit as gk
from benchmarks.speed.measure import alternate, median, paired_ratios
from grpo_kit.experiment import Experiment
from grpo_kit.models.drawing import DrawRequest, DrawResult, draw_and_score
from grpo_kit.models.generator import Generator
from grpo_kit.rewards import Rewards
from grpo_kit.rollout import latent_seeds, score

ANSWERS = (0.0, 0.25, 0.5, 1.0, 2.0)  # seconds of a picture's answer, in units of what drawing it takes


def main(
    rounds: Annotated[int, typer.Option(min=2, help="in which both orders take turns")] = 15,
    batches: Annotated[int, typer.Option(min=2, help="in which the generator draws the rollout")] = 4,
) -> None:
    """Measure, and print a line for each length of the answer."""
    kit = gk.load_experiment(gk.load_config("tiny", {"model_settings.device": "cpu"}))
    settings = kit.config.training_settings
    wanted = wanted_pictures(kit, settings.prompts_per_iteration, settings.group_size)
    count = len(wanted.rewrites)
    kit.generator.batch_size = count // batches
    drawing = min(drawn(kit.generator, kit.rewards, wanted).seconds["images"] for _ in range(3)) / count
    typer.echo(f"{count} pictures in {batches} batches, {1000 * drawing:.0f} ms each")
    for answer in ANSWERS:
        typer.echo(measured(kit.generator, answering(kit.rewards, answer * drawing), wanted, rounds, batches))


def wanted_pictures(kit: Experiment, groups: int, size: int) -> DrawRequest:
    """As many rewrites as an iteration has, all different."""
    asked = [prompt.user_prompt for prompt in kit.train_prompts]
    ids = torch.arange(groups).repeat_interleave(size)
    rewrites = [f"{text}, sharp" for text in asked[: len(ids)]]
    return DrawRequest([asked[group] for group in ids], rewrites, ids, latent_seeds(0, ids, size, 1, True))


def drawn(generator: Generator, rewards: Rewards, wanted: DrawRequest, overlap: bool = False) -> DrawResult:
    """What is asked for, drawn and scored as a rollout does it."""
    return draw_and_score(generator, partial(score, rewards), wanted, overlap)


def answering(rewards: Rewards, seconds: float) -> Rewards:
    """The rewards, and one more whose answer to each picture takes so long."""

    def answer(images: Sequence, prompts: Sequence[str], enhanced_prompts: Sequence[str]) -> list[float]:
        time.sleep(seconds * len(images))
        return [0.0] * len(images)

    return Rewards({**rewards.parts, "answer": answer}, {**rewards.weights, "answer": 1.0}, rewards.monitors)


def measured(generator: Generator, rewards: Rewards, wanted: DrawRequest, rounds: int, batches: int) -> str:
    """One line: the share that scoring takes, the median ratio with its interval of 95 %, and the most possible."""
    sides = {
        name: lambda _, overlap=overlap: drawn(generator, rewards, wanted, overlap)
        for name, overlap in (("plain", False), ("overlapped", True))
    }
    timings = alternate(sides, rounds)
    gain = median(paired_ratios(timings["plain"], timings["overlapped"], "wall"))
    seconds = drawn(generator, rewards, wanted).seconds
    together, longer = sum(seconds.values()), max(seconds.values())
    most = together / (together / batches + longer * (batches - 1) / batches)
    share = seconds["rewards"] / seconds["images"]
    return f"scoring takes {share:.2f} of the drawing: {gain} times as fast; {most:.2f} at most"


if __name__ == "__main__":
    typer.run(main)
