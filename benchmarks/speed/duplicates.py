"""What drawing equal (text, seed) pairs once saves, beside what it should save.

A share of 32 rewrites repeats others; each share, and batches of several sizes without duplicates, take turns. What is
saved is counted from the 32 different ones, as they would be drawn without deduplication. Two predictions: from the
seconds of batches without duplicates, read between the sizes that were measured, which must hold; and from the share of
duplicates alone, which forgets that an image's cost depends on the batch around it.
"""

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.speed import measure
from benchmarks.speed.results import Figure, Result, Settings
from grpo_kit.config import load_config
from grpo_kit.config.prompts import load_prompts
from grpo_kit.models.generator import Generator, load_generator

ROWS = 32
SHARES = (0.0, 0.5, 0.9)
SIZES = (2, 6, 12, 20, ROWS)  # images of a batch, all different; not those that the shares leave
POINTS = 5.0  # most that saved and predicted may differ, in percentage points of the time without saving


def duplicates(settings: Settings) -> Result:
    """Seconds saved at three shares of duplicates."""
    config = load_config("tiny", {"model_settings.device": "cpu"})
    texts = [prompt.user_prompt for prompt in load_prompts(config.training_settings.train_prompts)][:ROWS]
    sides = _sides(load_generator(config), texts)
    timings = measure.alternate(sides, 2 * settings.pairs, label="duplicates", shuffled=True)
    found = [_saving(share, timings) for share in SHARES]
    figures = [figure for figure, _ in found]
    notes = [note for _, note in found]
    case = {"case": "all", "raw": measure.raw(timings)}
    return Result("W12", f"{ROWS} rewrites with duplicates, drawn by the kit", figures, [case], notes=notes)


def _sides(generator: Generator, texts: Sequence[str]) -> dict[str, Callable[[int], object]]:
    """Drawing each share of duplicates and each size of batch; every text is embedded before, in either way."""
    generator.generate_images(texts, [0] * ROWS)

    def draw(rows: Sequence[str], number: int) -> None:
        generator.generate_images(rows, [number + 100] * len(rows))

    batches = {f"{size} different": texts[:size] for size in SIZES}
    batches |= {f"{share:.0%}": [texts[row % _distinct(share)] for row in range(ROWS)] for share in SHARES}
    return {name: lambda number, rows=rows: draw(rows, number) for name, rows in batches.items()}


def _distinct(share: float) -> int:
    return ROWS - round(share * ROWS)


def _saving(share: float, timings: measure.Timings) -> tuple[Figure, str]:
    """By how many points the saving is off its prediction, and both in words."""
    left = measure.median(measure.paired_ratios(timings[f"{share:.0%}"], timings[f"{ROWS} different"]))
    saved, high, low = (100 * (1 - value) for value in vars(left).values())
    costs = [np.median([seconds.cpu for seconds in timings[f"{size} different"]]) for size in SIZES]
    predicted = 100 * (1 - np.interp(_distinct(share), SIZES, costs) / costs[-1])
    alone = 100 * (1 - _distinct(share) / ROWS)
    name = f"{share:.0%} duplicates: saved and predicted apart"
    note = f"{share:.0%} duplicates saved {saved:.1f} % [{low:.1f}, {high:.1f}]; predicted {predicted:.1f} %"
    note += f" (from the share alone {alone:.1f} %)"
    return Figure(name, abs(saved - predicted), None, None, POINTS, more_is_better=False, unit=" points"), note
