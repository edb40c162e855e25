"""The group explorer: which rewrites of a prompt did better than the others, and what the step made of them."""

import ipywidgets
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba

from grpo_kit.config.media import as_html, kind_of
from grpo_kit.evaluation.table import format_metric
from grpo_kit.show.style import GREY, VERMILION, Drawing, signed, styled
from grpo_kit.show.widgets.cards import DEEPEST, GAP, WIDTH, Card, card_sheet
from grpo_kit.show.widgets.kept_groups import GroupBox, open_image, parts_text, range_text
from grpo_kit.show.widgets.picture_box import PAGE, on_change, row, steps
from grpo_kit.show.widgets.tokens import MEASURES, Token, tinted

COLUMNS, LINES, NOTE_LINES = 4, 4, 3


class GroupExplorer(GroupBox):
    """The groups of a run's kept rollouts, one at a time.

    Each picture is framed by its advantage, blue and solid above the group's mean, orange and dashed below. The tokens
    of a rewrite are tinted by what the step did to them: the change of their log-probability, the ratio, or their KL
    from the reference. Unfold *as text* for whole rewrites and each token's number. See `GroupBox` for the arguments.
    Films and sounds play above the picture, in the same order.
    """

    def controls(self) -> list[ipywidgets.Widget]:
        """Return the choice of a group, of the samples' order and of the tint."""
        training = self.record.config.get("training_settings", {})
        low, high = training.get("epsilon", 0.2), training.get("epsilon_high")
        self._clip = 1 - low, 1 + (low if high is None else high)  # the ratios that the run's clip left alone
        tints = [(m.short, n) for n, m in MEASURES.items() if {"tokens", "new_logprobs", m.other} <= set(self.rollout)]
        options = [("best first", "reward"), ("as sampled", "sample")], [*tints, ("none", None)]
        style = {"button_width": "auto"}
        self.order, self.tint = (ipywidgets.ToggleButtons(options=choices, style=style) for choices in options)
        on_change([self.order, self.tint], self.redraw)
        first = open_image(self.record, next(iter(self.rollout["thumbnail"].dropna()), None))
        self.plays = first is not None and kind_of(first) != "image"
        self.players = ipywidgets.HTML(layout=PAGE)
        views = [ipywidgets.Label("order"), self.order, ipywidgets.Label("tint tokens by"), self.tint]
        return [steps(self._step, self.iteration, self.prompt), row(views), *[self.players] * self.plays]

    def draw(self) -> None:
        """Show the present state, and what of it plays."""
        super().draw()
        rows = self.group.to_dict("records") if self.plays else []
        media = [(open_image(self.record, one["thumbnail"]), one["enhanced_prompt"]) for one in rows]
        shown = [as_html(one, text) for one, text in media if one is not None]
        self.players.value = f'<div style="display:flex;flex-wrap:wrap;gap:14px">{"".join(shown)}</div>'

    def _step(self, by: int) -> None:
        """Go to the next or previous prompt; past an iteration's end to the neighbouring iteration."""
        place = self.prompt.index + by
        if 0 <= place < len(self.prompt.options):
            self.prompt.index = place
            return
        with self.drawn_once():
            self.iteration.index = (self.iteration.index + by) % len(self.iteration.options)
            self.prompt.index = 0 if by > 0 else len(self.prompt.options) - 1

    @property
    def group(self) -> pd.DataFrame:
        """The rows of the group that is shown, in the order chosen."""
        rows = self.rollout[self.rollout["group_id"] == self.prompt.value]
        best_first = self.order.value == "reward"
        return rows.sort_values(self.order.value, ascending=not best_first, kind="stable").reset_index(drop=True)

    def _tokens(self, group: pd.DataFrame) -> tuple[list[list[Token]], float]:
        if self.tint.value is None:
            return [[]] * len(group), 0.0
        return tinted(group, self.tint.value, self._clip)

    def figures(self) -> list[Drawing]:
        """Return the group as a sheet of cards, as high as the rollout's largest group needs."""
        group, mean = self.group, self.group["reward"].mean()
        tokens, full = self._tokens(group)
        cards = []
        for sample, drawn in zip(group.to_dict("records"), tokens, strict=True):
            reward, advantage, text = sample["reward"], sample["advantage"], sample["enhanced_prompt"]
            distance = signed(reward - mean, 3) if reward == reward else "not scored"
            beside = f"reward {format_metric('reward', reward)} ({distance})"
            unsaid = drawn and text.strip() not in "".join(token.text for token in drawn)
            note = parts_text(sample) + (f" · drawn: {text}" if unsaid else "")
            image = open_image(self.record, sample["thumbnail"])
            cards.append(Card(image, signed(advantage), beside, text, drawn, note, advantage))
        rows = -(-int(self.rollout["group_id"].value_counts().max()) // COLUMNS)
        title = f"“{self.name_of(self.prompt.value)}”"
        figure = card_sheet(cards, COLUMNS, [LINES] * rows, title, self._note(group), NOTE_LINES, foot=0.35)
        if self.tint.value is not None:
            _draw_scale(figure.axes[0], self.tint.value, full, self._clip)
        return [figure]

    def _note(self, group: pd.DataFrame) -> str:
        """Return the rewards' range and deviation beside the advantages that were made of them."""
        rewards, advantages = group["reward"], group["advantage"]
        where = f"iteration {self.iteration.value}, {len(group)} rewrites"
        scaled = f"advantages from {signed(advantages.min())} to {signed(advantages.max())}"
        return f"{where} · {range_text(rewards)} · {scaled}"

    def reading(self) -> list[str]:
        """Return the group, then each sample with its numbers, its whole rewrite and its tokens' values."""
        group = self.group
        texts = [f"“{self.name_of(self.prompt.value)}”, {self._note(group)}."]
        for sample, tokens in zip(group.to_dict("records"), self._tokens(group)[0], strict=True):
            scores = f"reward {format_metric('reward', sample['reward'])}, advantage {signed(sample['advantage'])}"
            values = " ".join(f"{token.text.strip()} ({token.value:.3f})" for token in tokens)
            measured = f"; {MEASURES[self.tint.value].name} of its tokens: {values}" if values else ""
            texts.append(f"{scores}, {parts_text(sample)}: “{sample['enhanced_prompt']}”{measured}")
        return texts


@styled
def _draw_scale(axes: Axes, measure: str, full: float, clip: tuple[float, float]) -> None:
    """Draw how to read the tints in the sheet's foot: the scale, and what underlines and outlines mean."""
    low, high = signed(-full), signed(full)
    words = "dashed underline: less likely than before; solid: more likely"
    if measure == "kl":
        low, high, words = "0", f"{full:.3f}", "darker: further from the reference"
    if measure == "ratio":
        low, high = (f"{np.exp(size):.2f}" for size in (-full, full))
        words = f"dashed: less likely; solid: more likely; outlined: outside the clip, {clip[0]:g} to {clip[1]:g}"
    tints = np.linspace(0 if measure == "kl" else -1, 1, 64)
    scale = [to_rgba(VERMILION if tint < 0 else MEASURES[measure].above, DEEPEST * abs(tint)) for tint in tints]
    middle = axes.get_ylim()[0] - 0.2
    axes.imshow([scale], extent=(3.4, 4.9, middle + 0.08, middle - 0.08), aspect="auto", interpolation="bilinear")
    axes.text(GAP, middle, MEASURES[measure].name, va="center", weight="bold", fontsize=10.5)
    axes.text(3.35, middle, low, va="center", ha="right", fontsize=10.5)
    axes.text(4.95, middle, high, va="center", fontsize=10.5)
    axes.text(WIDTH - GAP, middle, words, va="center", ha="right", color=GREY, fontsize=9.5)
