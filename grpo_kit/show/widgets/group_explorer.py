"""The group explorer: which rewrites of a prompt did better than their siblings, and what the step made of them."""

from __future__ import annotations

from pathlib import Path

import ipywidgets
import pandas as pd

from grpo_kit.runs.record import RunRecord
from grpo_kit.show.frame import signed
from grpo_kit.show.style import Drawing, plain_text
from grpo_kit.show.widgets.group_cards import CARD_HEIGHT, group_cards, tint_legend
from grpo_kit.show.widgets.group_sheet import group_sheet
from grpo_kit.show.widgets.groups import (
    chosen_group,
    chosen_iteration,
    clip_range,
    open_run,
    prompt_of,
    range_text,
    spreads,
)
from grpo_kit.show.widgets.layout import side_by_side
from grpo_kit.show.widgets.markup import heading, sheet
from grpo_kit.show.widgets.tokens import measures_of
from grpo_kit.show.widgets.twin import TwinBox

COLUMNS = 4
TALLEST = 1150  # pixels; larger groups scroll
TINTS = {"change": "change", "ratio": "ratio", "kl": "KL"}


class GroupExplorer(TwinBox):
    """The groups of a run's kept rollouts, one at a time.

    Each picture is framed by its advantage, blue and solid above the group's mean, orange and dashed below. The tokens
    of a rewrite are tinted by what the step did to them: the change of their log-probability, the ratio, or their KL
    from the reference.

    Args:
        run: a run folder, or its record.
        iteration: which kept rollout to open; the last by default.
        group: which of its prompts, counted from 0; by default the one whose rewards differ most.

    Raises:
        KitError: the run kept no such rollout, or it has no such group.
    """

    def __init__(self, run: RunRecord | Path | str, iteration: int | None = None, group: int | None = None) -> None:
        self._record = open_run(run)
        self._clip = clip_range(self._record)
        first = chosen_iteration(self._record, iteration)
        self._rollout = self._record.rollout(first)
        self._make_controls(first, chosen_group(self._rollout, group))
        self._page = ipywidgets.HTML(layout=_page_layout(self._rollout))
        previous, following = (_button(text) for text in ("‹ previous", "next ›"))
        previous.on_click(lambda _: self._step(-1))
        following.on_click(lambda _: self._step(1))
        choosers = side_by_side([previous, self.iteration, self.prompt, following])
        looks = side_by_side([ipywidgets.Label("order"), self.order, ipywidgets.Label("tint tokens by"), self.tint])
        super().__init__([choosers, looks, self._page])
        self.iteration.observe(lambda change: self._open(change["new"]), names="value")
        for control in (self.prompt, self.order, self.tint):
            control.observe(lambda _: self._draw(), names="value")
        self._draw()

    def _make_controls(self, iteration: int, group: int) -> None:
        kept = self._record.rollout_iterations
        self.iteration = ipywidgets.Dropdown(
            options=kept, value=iteration, description="iteration", layout=ipywidgets.Layout(width="180px")
        )
        self.prompt = ipywidgets.Dropdown(
            options=self._prompts(), value=group, description="prompt", layout=ipywidgets.Layout(width="520px")
        )
        style = {"button_width": "auto"}
        orders = [("best first", "reward"), ("as sampled", "sample")]
        self.order = ipywidgets.ToggleButtons(options=orders, style=style)
        tints = [(TINTS[name], name) for name in measures_of(self._rollout)]
        self.tint = ipywidgets.ToggleButtons(options=[*tints, ("none", None)], style=style)

    def _prompts(self) -> list[tuple[str, int]]:
        apart = spreads(self._rollout)
        names = {g: plain_text(prompt_of(self._rollout, g), 60) for g in apart.index}
        return [(f"{names[g]}   (rewards {apart[g]:.3f} apart)", int(g)) for g in apart.index]

    def _open(self, iteration: int) -> None:
        """Show another iteration, at the group whose rewards differ most."""
        self._rollout = self._record.rollout(iteration)
        self._choose(chosen_group(self._rollout, None))

    def _choose(self, group: int) -> None:
        """Offer the prompts of this iteration and open one, drawn once."""
        with self.prompt.hold_trait_notifications():
            self.prompt.options = self._prompts()
            self.prompt.value = group
        self._draw()

    def _step(self, by: int) -> None:
        """Go to the next or previous prompt; past an iteration's end to the neighbouring iteration."""
        groups = [group for _, group in self._prompts()]
        place = groups.index(self.prompt.value) + by
        if 0 <= place < len(groups):
            self.prompt.value = groups[place]
            return
        kept = list(self.iteration.options)
        self.iteration.value = kept[(kept.index(self.iteration.value) + by) % len(kept)]
        self.prompt.value = self.prompt.options[0 if by > 0 else -1][1]

    @property
    def group(self) -> pd.DataFrame:
        """The rows of the group that is shown, in the order chosen."""
        rows = self._rollout[self._rollout["group_id"] == self.prompt.value]
        if self.order.value == "sample":
            return rows.sort_values("sample").reset_index(drop=True)
        return rows.sort_values("reward", ascending=False, kind="stable").reset_index(drop=True)

    def _draw(self) -> None:
        group = self.group
        legend = tint_legend(group, self.tint.value, self._clip) if self.tint.value else ""
        cards = group_cards(self._record, group, self.tint.value, self._clip, COLUMNS)
        self._page.value = sheet(heading(self._title(), self._note(group)) + legend + cards)

    def _title(self) -> str:
        return f"“{prompt_of(self._rollout, self.prompt.value)}”"

    def _note(self, group: pd.DataFrame) -> str:
        """Return the raw spread beside the advantages that were made of it."""
        rewards, advantages = group["reward"], group["advantage"]
        where = f"iteration {self.iteration.value}, {len(group)} rewrites"
        scaled = f"advantages from {signed(advantages.min())} to {signed(advantages.max())}"
        return f"{where} · {range_text(rewards)} · {scaled}"

    def figures(self) -> list[Drawing]:
        """Return the group as a figure."""
        group = self.group
        return [group_sheet(self._record, group, self._title(), self._note(group), self.tint.value, self._clip)]

    def summary(self) -> str:
        """Return which group is shown, and its numbers."""
        return f"Group explorer: {self._title()}, {self._note(self.group)}"


def _button(text: str) -> ipywidgets.Button:
    return ipywidgets.Button(description=text, layout=ipywidgets.Layout(width="100px"))


def _page_layout(rollout: pd.DataFrame) -> ipywidgets.Layout:
    """Return a layout as high as the rollout's largest group: stepping through groups moves nothing below."""
    rows = -(-int(rollout["group_id"].value_counts().max()) // COLUMNS)
    return ipywidgets.Layout(height=f"{min(TALLEST, 130 + CARD_HEIGHT * rows)}px", overflow="auto")
