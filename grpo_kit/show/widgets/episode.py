"""An episode: what the policy wrote in each turn, the picture that it gave, and what was changed after a look at it."""

import difflib
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from grpo_kit.config import KitError
from grpo_kit.config.seeds import derive_seed
from grpo_kit.evaluation.table import format_metric
from grpo_kit.grpo import group_advantages
from grpo_kit.runs.record import RunRecord, read_run
from grpo_kit.show.style import BLUE, VERMILION, Drawing, plain_text, signed
from grpo_kit.show.widgets.cards import Card, card_sheet
from grpo_kit.show.widgets.kept_groups import open_image, parts_text
from grpo_kit.show.widgets.picture_box import PictureBox, dropdown, on_change, row, steps
from grpo_kit.show.widgets.tokens import Token

if TYPE_CHECKING:
    from grpo_kit.rollout import Rollout  # here, since it loads every model's class

LINES, NOTE_LINES = 3, 3
NOTE = "episode, turn: its advantage · dashed: words that the next turn drops · underlined: words that are new"


class EpisodeExplorer(PictureBox):
    """Two episodes of a prompt side by side: a card a turn, its advantage above, its words and its rewards below.

    Words that the next turn drops are underlined with dashes, words that are new with a line. An advantage compares a
    turn with the same turn of the prompt's other episodes. It opens at the episodes that were given most and least.

    Args:
        source: a rollout with several turns, else a `KitError`; or a run, a folder or its record, that kept one.
        iteration: which of a run's kept rollouts; the last one if not given.
    """

    def __init__(self, source: "Rollout | RunRecord | Path | str", iteration: int | None = None) -> None:
        self.rows, self.turns, self._branched = _read(source, iteration)
        if self.turns < 2:
            raise KitError("episodes: found a rollout of 1 turn, allowed: 2 or more. Set generation_settings.turns.")
        self.size = int(self.rows["sample"].max()) + 1
        names = self.rows.loc[self.rows["group_id"] % self.turns == 0].drop_duplicates("group_id")
        prompts = [(plain_text(text, 70), place) for place, text in enumerate(names["user_prompt"])]
        self.prompt = dropdown("prompt", prompts, 0, 540)
        every = [(f"episode {number + 1}", number) for number in range(self.size)]
        self.left, self.right = dropdown("left", every, 0, 180), dropdown("right", every, self.size - 1, 180)
        self._open()
        super().__init__([steps(self._step, self.prompt), row([self.left, self.right])])
        on_change([self.prompt], self._open)
        on_change([self.left, self.right], self.redraw)

    def _step(self, by: int) -> None:
        self.prompt.index = (self.prompt.index + by) % len(self.prompt.options)

    def _open(self) -> None:
        """Show the episodes of the prompt whose last turn was given most and least."""
        last = self._turn(self.turns - 1)["reward"].fillna(float("-inf")).tolist()
        with self.drawn_once():
            self.left.value = max(range(self.size), key=last.__getitem__)
            self.right.value = min(range(self.size), key=last.__getitem__)

    def _turn(self, turn: int) -> pd.DataFrame:
        """The rows of a turn of the prompt that is shown, in the order of the episodes."""
        return self.rows[self.rows["group_id"] == self.rows["group_id"].min() + self.prompt.value * self.turns + turn]

    def episode(self, number: int) -> list[dict]:
        """A row a turn; where all go on from one first picture (branches), the first is that one's."""
        turns = [self._turn(turn).to_dict("records") for turn in range(self.turns)]
        first = derive_seed(turns[0][0]["image_seed"], "branch") % self.size if self._branched else number
        return [turns[0][first], *(rows[number] for rows in turns[1:])]

    def figures(self) -> list[Drawing]:
        """Return a sheet with the two episodes beside each other, or below each other where they are long."""
        cards = [card for number in (self.left.value, self.right.value) for card in self._cards(number)]
        columns, lines = (4, [LINES]) if self.turns == 2 else (self.turns, [LINES, LINES])
        return [card_sheet(cards, columns, lines, f"“{self.prompt.label}”", NOTE, NOTE_LINES)]

    def _cards(self, number: int) -> list[Card]:
        rows, cards = self.episode(number), []
        for turn, one in enumerate(rows):
            before, after = (other["enhanced_prompt"] for other in rows[max(0, turn - 1) :][:2])
            words = changed_words(before, after)[bool(turn)]
            title = f"{number + 1}, turn {turn + 1}: {signed(one['advantage'])}"
            given = f"given {format_metric('reward', one['reward'])}"
            cards.append(Card(one["image"], title, given, "", words, parts_text(one), one["advantage"]))
        return cards

    def reading(self) -> list[str]:
        """Return the prompt and how it went on, then each turn with its numbers and its whole text."""
        texts = [f"“{self.prompt.label}”: episodes {self.left.value + 1} and {self.right.value + 1} of {self.size}."]
        for number in (self.left.value, self.right.value):
            for turn, one in enumerate(self.episode(number)):
                numbers = f"given {format_metric('reward', one['reward'])}, advantage {signed(one['advantage'])}"
                said = f"{numbers}, {parts_text(one)}: “{one['enhanced_prompt']}”"
                texts.append(f"episode {number + 1}, turn {turn + 1}: {said}")
        return texts


def _read(source: "Rollout | RunRecord | Path | str", iteration: int | None) -> tuple[pd.DataFrame, int, bool]:
    """A table as a run keeps it with the pictures opened, the number of turns, and whether they are branches."""
    if not isinstance(source, RunRecord | Path | str):
        rewards, groups = source.rewards.float(), source.group_ids
        advantages = group_advantages(rewards.where(rewards.isfinite(), math.nan), groups)
        columns = {"group_id": groups, "image_seed": source.image_seeds[:, 0], "reward": rewards}
        columns |= {"advantage": advantages} | {f"reward/{key}": part for key, part in source.reward_parts.items()}
        rows = pd.DataFrame({name: values.tolist() for name, values in columns.items()})
        rows["user_prompt"] = [source.prompts[group - int(groups[0])].user_prompt for group in groups.tolist()]
        rows = rows.assign(enhanced_prompt=source.enhanced_prompts, sample=rows.groupby("group_id").cumcount())
        return rows.assign(image=[images[0] for images in source.images]), source.turns, source.branched
    record = source if isinstance(source, RunRecord) else read_run(source)
    kept, settings = record.rollout_iterations, record.config.get("generation_settings", {})
    rows = record.rollout(iteration if iteration is not None else kept[-1] if kept else 0)
    rows["image"] = [open_image(record, name) for name in rows["thumbnail"]]
    return rows, settings.get("turns", 1), settings.get("branches", False)


def changed_words(before: str, after: str) -> tuple[list[Token], list[Token]]:
    """Both texts in words: those that go are tinted below 0, those that are new above, all others not at all."""
    texts = [re.findall(r"\s*\S+", text) for text in (before, after)]
    same: tuple[set[int], set[int]] = (set(), set())
    for a, b, count in difflib.SequenceMatcher(None, *texts, autojunk=False).get_matching_blocks():
        same[0].update(range(a, a + count))
        same[1].update(range(b, b + count))
    return tuple(
        [Token(plain_text(word, 60), 0.0, False, 0.0 if i in kept else tint, colour) for i, word in enumerate(words)]
        for words, kept, (tint, colour) in zip(texts, same, ((-1.0, VERMILION), (1.0, BLUE)), strict=True)
    )
