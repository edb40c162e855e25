"""Pictures and their scores: draw what rewrites ask for, equal pairs once, and score them, afterwards or meanwhile."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

import torch
from PIL import Image

from grpo_kit.config.threads import started
from grpo_kit.models.decoding import even_batches
from grpo_kit.models.generator import Generator, Pair

_UNWIND_SECONDS = 2.0  # that a call of the rewards has to end after an error or Ctrl-C; it cannot be stopped

Pictures = list[list[Image.Image | None]]  # N x M; None where a picture came out unusable


@dataclass(frozen=True)
class DrawRequest:
    """What to draw: N rewrites, group-major, each from M latent seeds."""

    prompts: list[str]  # N users' prompts, which the pictures are scored against
    rewrites: list[str]  # N
    group_ids: torch.Tensor  # (N,), ascending
    seeds: torch.Tensor  # (N, M)
    metadata: list[dict] = field(default_factory=list)  # N, the prompts' further fields; empty: none has any
    references: list[list[Image.Image] | None] = field(default_factory=list)  # N, the prompts' own pictures

    def __getitem__(self, rows: slice) -> "DrawRequest":
        """Some consecutive rows of it."""
        return DrawRequest(*(values[rows] for values in vars(self).values()))

    def some(self, rows: Sequence[int]) -> "DrawRequest":
        """Some rows of it."""
        columns = vars(self).values()
        return DrawRequest(*(v[rows] if torch.is_tensor(v) else [v[row] for row in rows if v] for v in columns))

    def pairs(self) -> list[list[Pair]]:
        """N x M pairs of a text and a seed; equal ones are one picture."""
        rows = zip(self.rewrites, self.seeds.tolist(), strict=True)
        return [[(text, seed) for seed in seeds] for text, seeds in rows]


Score = Callable[[DrawRequest, Pictures], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class DrawResult:
    """The pictures, each reward's (N,) mean over a rewrite's pictures, and the seconds of both."""

    images: Pictures
    parts: dict[str, torch.Tensor]
    seconds: dict[str, float]  # images; rewards: what they take beyond the drawing


def draw_and_score(generator: Generator, score: Score, request: DrawRequest, overlap: bool = False) -> DrawResult:
    """Draw what is asked for, equal pairs once, and score it; it raises what the generator or the rewards raise.

    Args:
        score: gives each reward's (N,) scores of what was asked for and drawn.
        overlap: score the groups that are drawn to their end in a thread, while the next batch is drawn. The pictures
            are the same to the last bit. A reward sees whole groups, but no longer all of them in one call.
    """
    if overlap:
        return _draw_while_scoring(generator, score, request)
    clock = time.perf_counter()
    pairs = request.pairs()
    flat = iter(generator.generate_images(*zip(*(pair for row in pairs for pair in row), strict=True)))
    images = [[next(flat) for _ in row] for row in pairs]
    drawn = time.perf_counter()
    parts = score(request, images)
    return DrawResult(images, parts, {"images": drawn - clock, "rewards": time.perf_counter() - drawn})


def _draw_while_scoring(generator: Generator, score: Score, request: DrawRequest) -> DrawResult:
    """Score one part at a time in a thread; the seconds for which the drawing waits for it count as the rewards'."""
    clock, waited = time.perf_counter(), 0.0
    images: Pictures = []
    scoring: list[Future] = []
    try:
        for part, pictures in _whole_groups(generator, request):
            waited += _waited(scoring[-1:])
            scoring.append(started(score, part, pictures))
            images += pictures
        waited += _waited(scoring[-1:])
    except BaseException:
        wait(scoring, _UNWIND_SECONDS)  # models of an object must not compute for two at once
        raise
    scores = [part.result() for part in scoring]
    parts = {name: torch.cat([found[name] for found in scores]) for name in scores[0]}
    return DrawResult(images, parts, {"images": time.perf_counter() - clock - waited, "rewards": waited})


def _waited(scoring: Sequence[Future]) -> float:
    """Seconds until that is done; raises what the rewards raised."""
    began = time.perf_counter()
    for part in scoring:
        part.result()
    return time.perf_counter() - began


def _whole_groups(generator: Generator, request: DrawRequest) -> Iterator[tuple[DrawRequest, Pictures]]:
    """Rows with their pictures, in order, as soon as all of their groups are drawn.

    The batches are those that the generator makes of the whole, and equal pairs are drawn once in the whole.
    """
    pairs = request.pairs()
    drawn: dict[Pair, Image.Image | None] = {}
    begin = 0
    at_once = getattr(generator, "images_at_once", generator.batch_size)  # the second in a class of a user's own
    for batch in even_batches(list(dict.fromkeys(pair for row in pairs for pair in row)), at_once):
        drawn.update(zip(batch, generator.generate_images(*zip(*batch, strict=True)), strict=True))
        missing = next((row for row in range(begin, len(pairs)) if not drawn.keys() >= set(pairs[row])), None)
        groups = request.group_ids
        end = len(pairs) if missing is None else int(torch.searchsorted(groups, groups[missing]))
        if end > begin:
            yield request[begin:end], [[drawn[pair] for pair in row] for row in pairs[begin:end]]
            begin = end
