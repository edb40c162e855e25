"""Image compare: one held-out prompt drawn raw, by the initial and by the trained policy, from the same noise."""

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from grpo_kit.config import KitError
from grpo_kit.evaluation.table import VARIANT_NAMES, VARIANTS, format_metric
from grpo_kit.runs.record import RunRecord, read_run
from grpo_kit.show.style import VARIANT_COLOURS, Drawing, plain_text, score_text
from grpo_kit.show.widgets.cards import Card, card_sheet
from grpo_kit.show.widgets.picture_box import PictureBox, dropdown, on_change, steps

if TYPE_CHECKING:
    from grpo_kit.evaluation.evaluate import EvalResult

MOST_SEEDS, LINES = 4, 3


class ImageCompare(PictureBox):
    """A prompt of an evaluation in every variant: a column a variant, a row a latent seed.

    A run is a folder with an evaluation (else a `KitError`), its record, or what `evaluate` returned.
    """

    def __init__(self, run: "RunRecord | Path | str | EvalResult") -> None:
        if isinstance(run, (RunRecord, Path, str)):
            run = run if isinstance(run, RunRecord) else read_run(run)
            if run.evaluation.empty:
                how = "Evaluate it first: gk.evaluate(kit, run_dir=...)."
                raise KitError(f"run {run.path}: found no evaluation. {how}")
            self._rows, self._images = run.evaluation, run.evaluation_images()
        else:
            self._rows, self._images = run.rows, run.images
        names = self._rows.drop_duplicates("prompt_id").set_index("prompt_id")["user_prompt"].sort_index()
        options = [(f"{i}: {plain_text(name, 70)}", int(i)) for i, name in names.items()]
        self.prompt = dropdown("prompt", options, options[0][1], 540)
        super().__init__([steps(self._step, self.prompt)])
        on_change([self.prompt], self.redraw)

    def _step(self, by: int) -> None:
        self.prompt.index = (self.prompt.index + by) % len(self.prompt.options)

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
                image = self._images.get((int(self.prompt.value), variant, seed))
                words = {"beside": f"mean {self._mean(variant)}"} if seed == self.seeds[0] else {}
                if (seed, variant) in table.index:
                    shown = table.loc[(seed, variant)]
                    words |= {"text": shown["text"], "note": score_text(shown)}
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
