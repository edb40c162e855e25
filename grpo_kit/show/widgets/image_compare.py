"""Image compare: one held-out prompt drawn raw, by the initial and by the trained policy, from the same noise."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from grpo_kit.config import KitError
from grpo_kit.evaluation.table import VARIANT_NAMES, VARIANTS, format_metric
from grpo_kit.runs.record import RunRecord
from grpo_kit.show.style import VARIANT_COLOURS, Drawing, plain_text, score_text
from grpo_kit.show.widgets.cards import Card, card_sheet
from grpo_kit.show.widgets.kept_groups import open_run
from grpo_kit.show.widgets.picture_box import PictureBox, button, dropdown, on_change, row

if TYPE_CHECKING:
    from grpo_kit.evaluation.evaluate import EvalResult

MOST_SEEDS, LINES = 4, 3


class ImageCompare(PictureBox):
    """A prompt of an evaluation in every variant: a column a variant, a row a latent seed.

    Args:
        run: a run folder with an evaluation, its record, or what `evaluate` returned.
        prompt_id: which prompt to open; the first by default.

    Raises:
        KitError: the run has not been evaluated, or has no such prompt.
    """

    def __init__(self, run: "RunRecord | Path | str | EvalResult", prompt_id: int | None = None) -> None:
        if isinstance(run, (RunRecord, Path, str)):
            run = open_run(run)
            if run.evaluation.empty:
                how = "Evaluate it first: gk.evaluate(kit, run_dir=...)."
                raise KitError(f"run {run.path}: found no evaluation. {how}")
            self._rows, self._images = run.evaluation, run.evaluation_images()
        else:
            self._rows, self._images = run.rows, run.images
        ids = [int(i) for i in sorted(self._rows["prompt_id"].unique())]
        if prompt_id is not None and prompt_id not in ids:
            raise KitError(f"prompt_id: found {prompt_id}, allowed: {ids[0]} to {ids[-1]}. Choose an evaluated prompt.")
        names = self._rows.drop_duplicates("prompt_id").set_index("prompt_id")["user_prompt"]
        options = [(f"{i}: {plain_text(names[i], 70)}", i) for i in ids]
        self.prompt = dropdown("prompt", options, ids[0] if prompt_id is None else prompt_id, 540)
        previous, following = button("‹ previous", lambda: self._step(-1)), button("next ›", lambda: self._step(1))
        super().__init__([row([previous, self.prompt, following])])
        on_change([self.prompt], self.redraw)

    def _step(self, by: int) -> None:
        ids = [i for _, i in self.prompt.options]
        self.prompt.value = ids[(ids.index(self.prompt.value) + by) % len(ids)]

    @property
    def rows(self) -> pd.DataFrame:
        """The rows of the prompt that is shown."""
        return self._rows[self._rows["prompt_id"] == self.prompt.value]

    @property
    def variants(self) -> list[str]:
        """The variants of this prompt, in their usual order."""
        return [variant for variant in VARIANTS if variant in set(self.rows["variant"])]

    @property
    def seeds(self) -> list[int]:
        """The first few seeds of this prompt whose pictures were kept; all of them where none was."""
        drawn = {seed for prompt_id, _, seed in self._images if prompt_id == self.prompt.value}
        every = sorted(int(seed) for seed in self.rows["seed"].unique())
        return [seed for seed in every if seed in drawn or not drawn][:MOST_SEEDS]

    def figures(self) -> list[Drawing]:
        """Return a sheet of cards, as high as the prompt with the most pictures needs."""
        table, first = self.rows.set_index(["seed", "variant"]), self.rows.iloc[0]
        cards = []
        for seed in self.seeds:
            for variant in self.variants:
                shown = table.loc[(seed, variant)] if (seed, variant) in table.index else None
                image = self._images.get((int(self.prompt.value), variant, seed))
                words = {} if shown is None else dict(text=shown["text"], note=score_text(shown))
                words |= dict(beside=f"mean {self._mean(variant)}") if seed == self.seeds[0] else {}
                cards.append(Card(image, VARIANT_NAMES[variant], colour=VARIANT_COLOURS[variant], **words))
        most = min(MOST_SEEDS, len({seed for _, _, seed in self._images}) or self._rows["seed"].nunique())
        note = f"{first['category']}, {first['difficulty']} · each row starts from the same noise · "
        note += f"mean: of the rewards of {table.index.get_level_values('seed').nunique()} seeds"
        lines = [LINES] + [0] * (most - 1)  # the texts stand below the first row
        return [card_sheet(cards, len(self.variants), lines, f"“{first['user_prompt']}”", note, note_lines=1)]

    def _mean(self, variant: str) -> str:
        """Return a variant's mean reward over all its seeds."""
        return format_metric("reward", self.rows.loc[self.rows["variant"] == variant, "reward"].mean())

    def reading(self) -> list[str]:
        """Return the prompt with each variant's mean reward over all seeds, then each variant's text."""
        texts = self.rows.drop_duplicates("variant").set_index("variant")["text"]
        means = ", ".join(f"{VARIANT_NAMES[variant]} {self._mean(variant)}" for variant in self.variants)
        first = f"“{self.rows['user_prompt'].iloc[0]}”, mean reward of {self.rows['seed'].nunique()} seeds: {means}."
        return [first, *(f"{VARIANT_NAMES[variant]}: {texts[variant]}" for variant in self.variants)]
