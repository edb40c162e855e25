"""Turns: the policy reads what it wrote, sees what that gave, and writes again.

N = P·G rows write in each turn. A conversation that several rows go on from stands once: the prompts in the first turn,
and in the second where all rewrites of a group go on from one picture (branches).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from grpo_kit.config.seeds import derive_seed
from grpo_kit.models.conversation import Conversation, LookAt, Turn, is_kept, shown
from grpo_kit.models.drawing import DrawRequest, Pictures
from grpo_kit.models.generator import Generator
from grpo_kit.shapeworld.verify import said_of


def origins(request: DrawRequest, size: int, from_one: bool) -> list[int]:
    """Which row of the turn before each of N rows goes on from: its own, or one that its group draws lots for."""
    rows = range(len(request.group_ids))
    if not from_one:
        return list(rows)
    starts = [row - row % size for row in rows]
    return [start + derive_seed(int(request.seeds[start, 0]), "branch") % size for start in starts]


def with_turn(
    asked: Sequence[Conversation],
    texts: Sequence[str],
    images: Pictures,
    goes_on: Sequence[int],
    request: DrawRequest,
    look_at: LookAt,
) -> list[Conversation]:
    """The conversations that go on from some rows, each once, with what these rows wrote and what it gave."""
    found, size = [], len(goes_on) // len(asked)
    for row in dict.fromkeys(goes_on):
        image, before = images[row][0], asked[row // size]
        said = image is not None and look_at == "words"
        words = said_of(image, str(request.metadata[row].get("target") or request.prompts[row])) if said else ""
        found.append(replace(before, turns=(*before.turns, Turn(str(texts[row]), image, words))))
    return found


def rows_to_draw(texts: Sequence[str], before: Sequence[str]) -> list[int]:
    """The rows of a later turn that draw: they neither keep their picture nor repeat the words that gave it."""
    return [row for row, (text, old) in enumerate(zip(texts, before, strict=True)) if text != old and not is_kept(text)]


def what_is_read(asked: list[Conversation], look_at: LookAt, count: int) -> list[Conversation]:
    """What the policy is shown of the conversations of so many prompts."""
    return shown(asked, look_at, len(asked) // count) if any(one.pictures for one in asked) else asked


def by_prompt(turns: Sequence[Sequence], count: int) -> list:
    """The entries of all turns, those of each of so many prompts together, in the order of the turns."""
    sized = [(turn, len(turn) // count) for turn in turns]
    return [turn[p * size + k] for p in range(count) for turn, size in sized for k in range(size)]


def contexts_drawn_again(
    generator: Generator,
    asked: list[Conversation],
    texts: Sequence[str],
    request: DrawRequest,
    turns: int,
    branched: bool,
    look_at: LookAt,
) -> list[Conversation]:
    """What the policy read in a rollout whose pictures are not at hand, from its first conversations and its rewrites.

    Args:
        asked: P conversations, as they began.
        texts: what was written, in the order of a rollout's rows.
        request: of one turn, with the rewrites left out.
    """
    P, N = len(asked), len(request.group_ids)
    grid, reads = [texts[start : start + N // P] for start in range(0, len(texts), N // P)], []
    images: Pictures = []
    before: list[str] = []
    for turn in range(turns):
        reads.append(what_is_read(asked, look_at, P))
        if turn + 1 == turns:
            break
        written = [text for group in grid[turn::turns] for text in group]
        goes_on = origins(request, N // P, branched and turn == 1)
        again = rows_to_draw(written, [before[row] for row in goes_on]) if turn else goes_on
        drawn = generator.generate_images([written[row] for row in again], request.seeds[again, 0].tolist())
        images = [images[row] for row in goes_on] if turn else [[None] for _ in goes_on]
        for row, image in zip(again, drawn, strict=True):
            images[row] = [image]
        before = written
        asked = with_turn(asked, written, images, origins(request, N // P, branched and not turn), request, look_at)
    return by_prompt(reads, P)


def turn_columns(texts: Sequence[str], P: int, T: int, branched: bool, first_prompt: int = 0) -> dict[str, object]:
    """What the rows of P prompts and T > 1 turns have beside those of one: which context each answers, and more."""
    G = len(texts) // (P * T)
    place, turn, sample = torch.meshgrid(torch.arange(P), torch.arange(T), torch.arange(G), indexing="ij")
    per_turn = torch.tensor([1, 1 if branched else G, *[G] * (T - 2)])  # contexts of a prompt
    starts, sizes = per_turn.cumsum(0) - per_turn, per_turn[turn]
    contexts = (first_prompt + place) * per_turn.sum() + starts[turn] + sample * sizes // G
    kept = torch.tensor([is_kept(text) for text in texts]) & (turn.flatten() > 0)
    return {"turns": T, "branched": branched, "context_ids": contexts.flatten(), "kept": kept}
