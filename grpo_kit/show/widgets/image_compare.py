"""Image compare: one held-out prompt drawn raw, by the initial and by the trained policy, from the same noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import ipywidgets
import pandas as pd

from grpo_kit.config import KitError
from grpo_kit.runs.record import RunRecord
from grpo_kit.show.images import gallery_figure
from grpo_kit.show.style import (
    VARIANT_COLOURS,
    VARIANT_NAMES,
    VARIANTS,
    Drawing,
    format_metric,
    plain_text,
    score_text,
    styled,
)
from grpo_kit.show.widgets.groups import open_run
from grpo_kit.show.widgets.layout import side_by_side
from grpo_kit.show.widgets.markup import escape, grid, heading, picture, sheet
from grpo_kit.show.widgets.twin import TwinBox

if TYPE_CHECKING:
    from grpo_kit.evaluation.evaluate import EvalResult

SIDE, ROW_HEIGHT, HEAD_HEIGHT = 190, 236, 186  # pixels
MOST_SEEDS = 4


class ImageCompare(TwinBox):
    """A prompt of an evaluation in every variant: a column a variant, a row a latent seed.

    Args:
        run: a run folder with an evaluation, its record, or what `evaluate` returned.
        prompt_id: which prompt to open; the first by default.

    Raises:
        KitError: the run has not been evaluated, or has no such prompt.
    """

    def __init__(self, run: RunRecord | Path | str | EvalResult, prompt_id: int | None = None) -> None:
        self._rows, self._images = _evaluation(run)
        ids = [int(i) for i in sorted(self._rows["prompt_id"].unique())]
        if prompt_id is not None and prompt_id not in ids:
            raise KitError(f"prompt_id: found {prompt_id}, allowed: {ids[0]} to {ids[-1]}. Choose an evaluated prompt.")
        names = self._rows.drop_duplicates("prompt_id").set_index("prompt_id")["user_prompt"]
        options = [(f"{i}: {plain_text(names[i], 70)}", i) for i in ids]
        self.prompt = ipywidgets.Dropdown(
            options=options,
            value=ids[0] if prompt_id is None else prompt_id,
            description="prompt",
            layout=ipywidgets.Layout(width="520px"),
        )
        self._page = ipywidgets.HTML(layout=self._page_layout())
        buttons = [ipywidgets.Button(description=text, layout=ipywidgets.Layout(width="100px")) for text in STEPS]
        for button in buttons:
            button.on_click(lambda button: self._step(STEPS[button.description]))
        super().__init__([side_by_side([buttons[0], self.prompt, buttons[1]]), self._page])
        self.prompt.observe(lambda _: self._draw(), names="value")
        self._draw()

    def _page_layout(self) -> ipywidgets.Layout:
        """Return a layout as high as every prompt needs: stepping through prompts moves nothing below."""
        seeds = min(MOST_SEEDS, len({seed for _, _, seed in self._images}) or self._rows["seed"].nunique())
        return ipywidgets.Layout(height=f"{HEAD_HEIGHT + ROW_HEIGHT * seeds}px", overflow="auto")

    def _step(self, by: int) -> None:
        ids = [i for _, i in self.prompt.options]
        self.prompt.value = ids[(ids.index(self.prompt.value) + by) % len(ids)]

    @property
    def rows(self) -> pd.DataFrame:
        """The rows of the prompt that is shown."""
        return self._rows[self._rows["prompt_id"] == self.prompt.value]

    @property
    def seeds(self) -> list[int]:
        """The first few seeds of this prompt whose pictures were kept; all of them where none was."""
        drawn = {seed for prompt_id, _, seed in self._images if prompt_id == self.prompt.value}
        every = sorted(int(seed) for seed in self.rows["seed"].unique())
        return [seed for seed in every if seed in drawn or not drawn][:MOST_SEEDS]

    def _draw(self) -> None:
        rows = self.rows
        variants = [v for v in VARIANTS if v in set(rows["variant"])]
        table = rows.set_index(["seed", "variant"])
        cells = [_column_head(rows[rows["variant"] == variant]) for variant in variants]
        for seed in self.seeds:
            cells += [self._cell(table, seed, variant) for variant in variants]
        self._page.value = sheet(heading(*self._heading()) + grid(cells, len(variants), 240))

    def _cell(self, table: pd.DataFrame, seed: int, variant: str) -> str:
        if (seed, variant) not in table.index:
            return "<div></div>"
        shown = table.loc[(seed, variant)]
        image = self._images.get((int(self.prompt.value), variant, int(seed)))
        return f"<div>{picture(image, shown['text'], SIDE)}<div>{escape(score_text(shown))}</div></div>"

    def _heading(self) -> tuple[str, str]:
        first = self.rows.iloc[0]
        note = f"{first['category']}, {first['difficulty']} · each row starts from the same noise"
        return f"“{first['user_prompt']}”", note

    @styled
    def figures(self) -> list[Drawing]:
        """Return the same grid as a figure."""
        cases = [(self.prompt.value, seed) for seed in self.seeds]
        figure = gallery_figure(self._rows, self._images, cases)
        figure.suptitle(plain_text(self._heading()[0], 90), x=0.01, ha="left", weight="bold")
        return [figure]

    def summary(self) -> str:
        """Return the prompt and each variant's mean reward over its seeds."""
        means = self.rows.groupby("variant")["reward"].mean()
        scores = ", ".join(f"{VARIANT_NAMES[v]} {format_metric('reward', means[v])}" for v in VARIANTS if v in means)
        return f"Image compare: {self._heading()[0]}; mean reward: {scores}"


STEPS = {"‹ previous": -1, "next ›": 1}


def _evaluation(run: RunRecord | Path | str | EvalResult) -> tuple[pd.DataFrame, Mapping]:
    """Return an evaluation's rows and pictures."""
    if isinstance(run, (RunRecord, Path, str)):
        record = open_run(run)
        if record.evaluation.empty:
            raise KitError(f"run {record.path}: found no evaluation. Evaluate it first: gk.evaluate(kit, run_dir=...).")
        return record.evaluation, record.evaluation_images()
    return run.rows, run.images


def _column_head(rows: pd.DataFrame) -> str:
    """Return a variant's name over the text that the generator got, and its mean reward over all seeds."""
    first, colour = rows.iloc[0], VARIANT_COLOURS[rows["variant"].iloc[0]]
    name = f'<b style="color:{colour};font-size:16px">{VARIANT_NAMES[first["variant"]]}</b>'
    mean = f"reward {format_metric('reward', rows['reward'].mean())}, mean of {len(rows)} seeds"
    text = f'<div style="height:60px;overflow-y:auto">{escape(first["text"])}</div><div>{escape(mean)}</div>'
    return f'<div style="border-top:4px solid {colour};padding-top:4px">{name}{text}</div>'
