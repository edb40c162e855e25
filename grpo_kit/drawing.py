"""A rollout's pictures and their scores: one after the other, or each part scored while the next is drawn."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from types import TracebackType

import torch
from PIL import Image

from grpo_kit.models.generator import Generator, Pair, even_batches
from grpo_kit.rewards.calls import started
from grpo_kit.rewards.composition import Rewards

_TO_UNWIND = 2.0  # seconds that a call of the rewards has to end after an error or Ctrl-C; it cannot be stopped

Pictures = list[list[Image.Image | None]]  # N x M; None where one came out unusable


@dataclass(frozen=True)
class Wanted:
    """What shall be drawn: N rewrites, group-major, each from M latent seeds."""

    prompts: list[str]  # N users' prompts, which the pictures are scored against
    rewrites: list[str]  # N
    group_ids: torch.Tensor  # (N,), ascending
    seeds: torch.Tensor  # (N, M)

    def __getitem__(self, rows: slice) -> "Wanted":
        """Some consecutive rows of it."""
        return Wanted(self.prompts[rows], self.rewrites[rows], self.group_ids[rows], self.seeds[rows])

    def pairs(self) -> list[list[Pair]]:
        """N x M pairs of a text and a seed; equal ones are one picture."""
        rows = zip(self.rewrites, self.seeds.tolist(), strict=True)
        return [[(text, seed) for seed in seeds] for text, seeds in rows]


@dataclass(frozen=True)
class Drawn:
    """The pictures, each reward's (N,) mean over a rewrite's pictures, and the seconds of both."""

    images: Pictures
    parts: dict[str, torch.Tensor]
    seconds: dict[str, float]  # images; rewards: what they take beyond the drawing


def draw_and_score(generator: Generator, rewards: Rewards, wanted: Wanted, *, overlap: bool = False) -> Drawn:
    """Draw what is wanted, equal pairs once, and score it.

    Args:
        overlap: score the groups that are drawn to their end in a thread, while the next batch is drawn. The pictures
            are the same to the last bit. A reward sees whole groups, but no longer all of them in one call.

    Raises:
        Exception: whatever the generator or the rewards raise, in either order.
    """
    return _overlapped(generator, rewards, wanted) if overlap else _in_turn(generator, rewards, wanted)


def _in_turn(generator: Generator, rewards: Rewards, wanted: Wanted) -> Drawn:
    clock = time.perf_counter()
    pairs = wanted.pairs()
    flat = iter(generator.generate_images(*zip(*(pair for row in pairs for pair in row), strict=True)))
    images = [[next(flat) for _ in row] for row in pairs]
    drawn = time.perf_counter()
    parts = _score(rewards, wanted, images)
    return Drawn(images, parts, {"images": drawn - clock, "rewards": time.perf_counter() - drawn})


def _overlapped(generator: Generator, rewards: Rewards, wanted: Wanted) -> Drawn:
    clock = time.perf_counter()
    images: Pictures = []
    with _Scoring(rewards) as scoring:
        for part, pictures in _whole_groups(generator, wanted):
            scoring.start(part, pictures)
            images += pictures
        scoring.finish()
    parts = {name: torch.cat([scores[name] for scores in scoring.scores]) for name in scoring.scores[0]}
    passed = time.perf_counter() - clock
    return Drawn(images, parts, {"images": passed - scoring.waited, "rewards": scoring.waited})


def _whole_groups(generator: Generator, wanted: Wanted) -> Iterator[tuple[Wanted, Pictures]]:
    """Rows with their pictures, in order, as soon as all of their groups are drawn.

    The batches are those that the generator makes of the whole, and equal pairs are drawn once in the whole.
    """
    pairs = wanted.pairs()
    drawn: dict[Pair, Image.Image | None] = {}
    begin = 0
    for batch in even_batches(list(dict.fromkeys(pair for row in pairs for pair in row)), generator.batch_size):
        drawn.update(zip(batch, generator.generate_images(*zip(*batch, strict=True)), strict=True))
        missing = next((row for row in range(begin, len(pairs)) if not drawn.keys() >= set(pairs[row])), None)
        end = len(pairs) if missing is None else _first_row_of_its_group(wanted.group_ids, missing)
        if end > begin:
            yield wanted[begin:end], [[drawn[pair] for pair in row] for row in pairs[begin:end]]
            begin = end


def _first_row_of_its_group(group_ids: torch.Tensor, row: int) -> int:
    return int(torch.searchsorted(group_ids, group_ids[row]))


class _Scoring:
    """Scores the parts of a rollout in a thread, one after the other.

    `scores` holds what came back, in order; `waited` the seconds for which the drawing was held up.
    """

    def __init__(self, rewards: Rewards) -> None:
        self.scores: list[dict[str, torch.Tensor]] = []
        self.waited = 0.0
        self._rewards = rewards
        self._running: Future | None = None

    def start(self, wanted: Wanted, images: Pictures) -> None:
        """Score a part, once the part before it is scored; raises what that one raised."""
        self.finish()
        self._running = started(_score, self._rewards, wanted, images)

    def finish(self) -> None:
        """Wait for the part that is being scored; raises what the rewards raised."""
        if self._running is None:
            return
        clock = time.perf_counter()
        self.scores.append(self._running.result())
        self.waited += time.perf_counter() - clock
        self._running = None

    def __enter__(self) -> "_Scoring":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an error, let the thread come to its end: models of an object must not compute for two at once."""
        if error is not None and self._running is not None:
            wait([self._running], _TO_UNWIND)


def _score(rewards: Rewards, wanted: Wanted, images: Pictures) -> dict[str, torch.Tensor]:
    """Each part's mean over a rewrite's images that could be scored: {name: (N,)}."""
    count = wanted.seeds.shape[1]
    flat = [image for row in images for image in row]
    repeated = ([text for text in texts for _ in range(count)] for texts in (wanted.prompts, wanted.rewrites))
    groups = wanted.group_ids.repeat_interleave(count)
    scores = rewards.score(flat, *repeated, group_ids=groups, image_seeds=wanted.seeds.flatten())
    return {name: values.reshape(-1, count).nanmean(dim=1) for name, values in scores.items()}
