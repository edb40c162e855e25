"""The one picture of the kit: how a prompt becomes a better prompt, in six numbered stages.

Every notebook shows it re-lit at its own stage, and the code's comments carry the same numbers:

    1 prompts → 2 rewrites → 3 images → 4 rewards → 5 advantages → 6 step → (back to 2)

The four rewards are the hand-made toy of notebook 00, and the advantages are computed from them here as they are there.
The README's copy is drawn by `loop_figure().save(Path("notebooks/images/loop.png"), dpi=140)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

from grpo_kit.config import KitError
from grpo_kit.show.style import BLUE, FAINT, GREY, INK, PAPER, VERMILION, Drawing, bare, styled

STAGES = {
    "prompts": "what the user asks for",
    "rewrites": "the policy writes\nG rewrites",
    "images": "the generator\ndraws each one",
    "rewards": "every image is scored\nagainst the user's words",
    "advantages": "better or worse\nthan its own group",
    "step": "make the rewrites above their group's mean likelier, the others less likely",
}
TOY_PROMPT = "a pair of\ncrimson balls"
TOY_REWRITES = ("two red circles, sharp", "two red circles, faded", "a red circle, sharp", "a red square, sharp")
TOY_REWARDS = (0.80, 0.60, 0.40, 0.20)

LANES = (3.30, 2.45, 1.60, 0.75)  # the height of each sample's lane
COLUMNS = {"prompts": 0.95, "rewrites": 3.85, "images": 6.75, "rewards": 8.75, "advantages": 10.75}
BACK = -0.55  # the height of the way back
RED = "#c8102e"
DIM = "#aeb6bf"  # text and lines of the stages that are not lit


@dataclass(frozen=True)
class _Light:
    """Which stages are lit; all of them when there is none."""

    stages: frozenset[str]

    def on(self, *stages: str) -> bool:
        return not self.stages or not self.stages.isdisjoint(stages)

    def ink(self, *stages: str, colour: str = INK) -> str:
        return colour if self.on(*stages) else DIM


@styled
def loop_figure(highlight: str | int | Sequence[str | int] | None = None) -> Drawing:
    """Draw the loop, with some stages lit.

    Args:
        highlight: a stage by name or by number from 1, or several; None lights them all.

    Raises:
        KitError: there is no such stage.
    """
    figure = Drawing(figsize=(11.9, 5.8))
    axes = bare(figure.add_axes((0, 0, 1, 1)))
    axes.set(xlim=(0.05, 11.95), ylim=(-1.05, 4.75))
    chosen = [highlight] if isinstance(highlight, (str, int)) else highlight or []
    light = _Light(frozenset(_stage(stage) for stage in chosen))
    _draw_headings(axes, light)
    _draw_prompt(axes, light)
    _draw_model(axes, 2.32, "policy", "VLM, learning", light, "rewrites", BLUE)
    _draw_rewrites(axes, light)
    _draw_model(axes, 5.62, "generator", "SD3, frozen", light, "images", GREY)
    _draw_images(axes, light)
    _draw_rewards(axes, light)
    _draw_advantages(axes, light)
    _draw_step(axes, light)
    return figure


def _stage(highlight: str | int) -> str:
    names = list(STAGES)
    if highlight in names:
        return highlight
    if isinstance(highlight, int) and 1 <= highlight <= len(names):
        return names[highlight - 1]
    raise KitError(f"highlight: found {highlight!r}, allowed: 1 to {len(names)} or {', '.join(names)}. Choose a stage.")


def _draw_headings(axes: Axes, light: _Light) -> None:
    for number, (stage, x) in enumerate(COLUMNS.items(), start=1):
        if stage in light.stages:
            _lit_panel(axes, stage, x)
        _badge(axes, x - 0.56, 4.45, number, light.on(stage))
        axes.text(x - 0.31, 4.44, stage, va="center", fontsize=11, weight="bold", color=light.ink(stage))
        axes.text(x - 0.73, 4.2, STAGES[stage], va="top", fontsize=8.8, color=light.ink(stage), linespacing=1.25)


def _lit_panel(axes: Axes, stage: str, x: float) -> None:
    left, right = {"prompts": (0.06, 1.78), "rewrites": (1.86, 5.02), "images": (5.16, 7.5)}.get(
        stage, (x - 0.98, x + 0.98)
    )
    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch((left, 0.2), right - left, 4.5, boxstyle=style, facecolor="#e8f1f8", edgecolor="none", zorder=0)
    )


def _badge(axes: Axes, x: float, y: float, number: int, lit: bool) -> None:
    axes.add_patch(Circle((x, y), 0.17, facecolor=INK if lit else DIM, edgecolor="none", zorder=4))
    axes.text(x, y - 0.01, str(number), ha="center", va="center", color=PAPER, fontsize=9.5, weight="bold", zorder=5)


def _card(axes: Axes, x: float, y: float, width: float, height: float, text: str, lit: bool, **kwargs: object) -> None:
    style = "round,pad=0,rounding_size=0.08"
    edge = GREY if lit else DIM
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=PAPER, edgecolor=edge, lw=1.1, zorder=2)
    )
    colour = INK if lit else DIM
    axes.text(x, y, text, ha="center", va="center", color=colour, zorder=3, **({"fontsize": 9} | kwargs))


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, bend: float = 0.0) -> None:
    connection = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, color=colour, lw=1.1, connectionstyle=connection, zorder=1
        )
    )


def _draw_prompt(axes: Axes, light: _Light) -> None:
    middle = float(np.mean(LANES))
    _card(axes, 0.95, middle, 1.55, 0.72, f"“{TOY_PROMPT}”", light.on("prompts"), style="italic")
    _arrow(axes, (1.74, middle), (1.98, middle), light.ink("prompts", "rewrites", colour=GREY))


def _draw_model(axes: Axes, x: float, name: str, kind: str, light: _Light, stage: str, colour: str) -> None:
    """Draw a model as a bar that all four lanes pass."""
    lit = light.on(stage) or (name == "policy" and light.on("step"))
    low, high = LANES[-1] - 0.38, LANES[0] + 0.38
    style = "round,pad=0,rounding_size=0.1"
    face = colour if lit else FAINT
    axes.add_patch(
        FancyBboxPatch((x - 0.3, low), 0.6, high - low, boxstyle=style, facecolor=face, edgecolor="none", zorder=2)
    )
    middle = (low + high) / 2
    label = dict(rotation=90, ha="center", va="center", color=PAPER, zorder=3)
    axes.text(x - 0.09, middle, name, fontsize=12, weight="bold", **label)
    axes.text(x + 0.14, middle, kind, fontsize=8.5, **label)


def _draw_rewrites(axes: Axes, light: _Light) -> None:
    lit = light.on("rewrites")
    for y, text in zip(LANES, TOY_REWRITES, strict=True):
        _arrow(axes, (2.64, y), (2.94, y), light.ink("rewrites", colour=GREY))
        _card(axes, 3.93, y, 1.95, 0.5, text, lit, fontsize=8.5)
        _arrow(axes, (4.93, y), (5.3, y), light.ink("rewrites", "images", colour=GREY))


def _draw_images(axes: Axes, light: _Light) -> None:
    """Draw what the four rewrites give: right, faded, one too few, and another thing altogether."""
    for lane, y in enumerate(LANES):
        _arrow(axes, (5.94, y), (6.34, y), light.ink("images", colour=GREY))
        edge = light.ink("images", colour=GREY)
        axes.add_patch(Rectangle((6.41, y - 0.34), 0.68, 0.68, facecolor=PAPER, edgecolor=edge, lw=1.1, zorder=2))
        alpha = (1.0, 0.3, 1.0, 1.0)[lane] * (1.0 if light.on("images") else 0.25)
        if lane == 3:
            axes.add_patch(
                Rectangle((6.58, y - 0.17), 0.34, 0.34, facecolor=RED, edgecolor="none", alpha=alpha, zorder=3)
            )
        for x in {0: (6.6, 6.9), 1: (6.6, 6.9), 2: (6.75,)}.get(lane, ()):
            axes.add_patch(Circle((x, y), 0.13, facecolor=RED, edgecolor="none", alpha=alpha, zorder=3))
        _arrow(axes, (7.16, y), (7.98, y), light.ink("images", "rewards", colour=GREY))


def _draw_rewards(axes: Axes, light: _Light) -> None:
    colour = light.ink("rewards", colour=GREY)
    for y, reward in zip(LANES, TOY_REWARDS, strict=True):
        axes.add_patch(Rectangle((8.08, y - 0.13), reward, 0.26, facecolor=colour, edgecolor="none", zorder=2))
        x = 8.08 + reward + 0.08
        axes.text(x, y, f"{reward:.2f}", va="center", fontsize=10, color=light.ink("rewards"), zorder=3)
        _arrow(axes, (9.36, y), (9.7, y), light.ink("rewards", "advantages", colour=GREY))


def _draw_advantages(axes: Axes, light: _Light) -> None:
    """Draw the advantages as bars to the right (likelier) and to the left (less likely) of the group's mean."""
    zero = COLUMNS["advantages"]
    axes.plot([zero, zero], [LANES[-1] - 0.35, LANES[0] + 0.35], color=light.ink("advantages", colour=GREY), lw=1)
    for y, value in zip(LANES, toy_advantages(), strict=True):
        colour = light.ink("advantages", colour=BLUE if value > 0 else VERMILION)
        axes.add_patch(Rectangle((zero, y - 0.13), 0.42 * value, 0.26, facecolor=colour, edgecolor="none", zorder=2))
        inner = zero - 0.08 if value > 0 else zero + 0.08
        side = "right" if value > 0 else "left"
        axes.text(
            inner,
            y,
            f"{value:+.2f}".replace("-", "−"),
            ha=side,
            va="center",
            fontsize=10,
            color=light.ink("advantages"),
            zorder=3,
        )


def _draw_step(axes: Axes, light: _Light) -> None:
    """Draw the way back: from the advantages, below everything, up into the policy."""
    colour = light.ink("step", colour=BLUE)
    right, left, width = COLUMNS["advantages"], 2.32, 1.8
    axes.plot([right, right, left], [0.14, BACK, BACK], color=colour, lw=width, solid_capstyle="round", zorder=1)
    axes.add_patch(
        FancyArrowPatch(
            (left, BACK), (left, 0.36), arrowstyle="-|>", mutation_scale=15, color=colour, lw=width, zorder=1
        )
    )
    if "step" in light.stages:
        style = "round,pad=0,rounding_size=0.12"
        axes.add_patch(FancyBboxPatch((2.6, -0.95), 8.0, 0.8, boxstyle=style, facecolor="#e8f1f8", edgecolor="none"))
    middle = (left + right) / 2
    box = dict(boxstyle="round,pad=0.35", facecolor="#e8f1f8" if "step" in light.stages else PAPER, edgecolor="none")
    words = dict(va="center", color=light.ink("step"), bbox=box, zorder=3)
    axes.text(middle + 0.55, BACK, STAGES["step"], ha="center", fontsize=9.5, **words)
    axes.text(3.2, BACK, "GRPO step", fontsize=11, weight="bold", **words)
    _badge(axes, 2.95, BACK, 6, light.on("step"))


def toy_advantages(eps: float = 1e-4) -> np.ndarray:
    """Return the advantages of the toy group: its rewards minus their mean, over their unbiased standard deviation."""
    rewards = np.array(TOY_REWARDS)
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + eps)
