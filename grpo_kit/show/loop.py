"""The one picture of the kit: how a prompt becomes a better prompt, in six numbered stages.

Every notebook shows it with its own stage highlighted, and the code's comments carry the same numbers. The four rewards
are the hand-made toy of notebook 00, and the advantages are computed from them here as they are there.
The README's copy is drawn by `loop_figure().save(Path("notebooks/images/loop.png"), dpi=140)`.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from grpo_kit.config import KitError
from grpo_kit.evaluation.table import number_text
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
MIDDLE = (LANES[0] + LANES[-1]) / 2
# stage → left edge, middle and right edge of its column
COLUMNS = {
    "prompts": (0.06, 0.95, 1.78),
    "rewrites": (1.86, 3.85, 5.02),
    "images": (5.16, 6.75, 7.5),
    "rewards": (7.77, 8.75, 9.73),
    "advantages": (9.77, 10.75, 11.73),
}
# first and last x of an arrow in every lane → the stages that it belongs to
ARROWS = {
    (2.64, 2.94): ("rewrites",),
    (4.93, 5.3): ("rewrites", "images"),
    (5.94, 6.34): ("images",),
    (7.16, 7.98): ("images", "rewards"),
    (9.36, 9.7): ("rewards", "advantages"),
}
BACK = -0.55  # the height of the way back
POLICY, GENERATOR, ZERO = 2.32, 5.62, COLUMNS["advantages"][1]  # their x
RED = "#c8102e"
DIM = "#aeb6bf"  # text and lines of the stages that are not highlighted
GROUND = "#e8f1f8"  # behind the stages that are
ROUND = "round,rounding_size=0.12"
Pair = tuple[float, float]


@styled
def loop_figure(highlight: int | Sequence[int] = ()) -> Drawing:
    """Draw the loop, with a stage or several highlighted by their numbers from 1; none shows all in full colour.

    A `KitError` where there is no such stage.
    """
    stages = dict(enumerate(STAGES, start=1))
    chosen = [highlight] if isinstance(highlight, int) else highlight
    if not set(chosen) <= stages.keys():
        raise KitError(f"highlight: found {highlight!r}, allowed: 1 to {len(STAGES)}. Choose a stage.")
    loop = _Loop({stages[number] for number in chosen})
    loop.draw_columns()
    loop.draw_models()
    loop.draw_samples()
    loop.draw_way_back()
    return loop.figure


def toy_advantages(eps: float = 1e-4) -> np.ndarray:
    """Return the advantages of the toy group: its rewards minus their mean, over their unbiased standard deviation."""
    rewards = np.array(TOY_REWARDS)
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + eps)


class _Loop:
    """The figure, which of its stages are highlighted (all where none is named), and the shapes that it is made of.

    Boxes and texts stand around their point.
    """

    def __init__(self, named: set[str]) -> None:
        self.named = named
        self.figure = Drawing(figsize=(11.9, 5.8))
        self.axes = bare(self.figure.add_axes((0, 0, 1, 1)))
        self.axes.set(xlim=(0.05, 11.95), ylim=(-1.05, 4.75))

    def ink(self, *stages: str, colour: str = INK) -> str:
        """The colour of what belongs to these stages: dim where none of them is highlighted."""
        return colour if not self.named or self.named & set(stages) else DIM

    def _box(self, x: float, y: float, size: Pair, face: str, shape: str = "square", **look: object) -> None:
        corner, look = (x - size[0] / 2, y - size[1] / 2), {"edgecolor": "none", "zorder": 2} | look
        self.axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=f"{shape},pad=0", facecolor=face, **look))

    def _arrow(self, start: Pair, end: Pair, colour: str, head: float = 9, lw: float = 1.1) -> None:
        look = dict(arrowstyle="-|>", mutation_scale=head, color=colour, lw=lw, zorder=1)
        self.axes.add_patch(FancyArrowPatch(start, end, **look))

    def _text(self, x: float, y: float, text: str, colour: str, fontsize: float, **look: object) -> None:
        self.axes.text(x, y, text, color=colour, fontsize=fontsize, **{"va": "center", "zorder": 3} | look)

    def _badge(self, x: float, y: float, stage: str) -> None:
        self._box(x, y, (0.34, 0.34), self.ink(stage), "circle", zorder=4)
        number = str(list(STAGES).index(stage) + 1)
        self._text(x, y - 0.01, number, PAPER, 9.5, ha="center", weight="bold", zorder=5)

    def _card(self, x: float, y: float, size: Pair, words: str, stage: str, **look: object) -> None:
        edge = self.ink(stage, colour=GREY)
        self._box(x, y, size, PAPER, "round,rounding_size=0.08", edgecolor=edge, lw=1.1)
        self._text(x, y, words, self.ink(stage), ha="center", **look)

    def draw_columns(self) -> None:
        """Each stage's number, name and words, on a coloured ground where highlighted; the prompt below the first."""
        for stage, (left, x, right) in COLUMNS.items():
            if stage in self.named:
                self._box((left + right) / 2, 2.45, (right - left, 4.5), GROUND, ROUND, zorder=0)
            self._badge(x - 0.56, 4.45, stage)
            self._text(x - 0.31, 4.44, stage, self.ink(stage), 11, weight="bold")
            self._text(x - 0.73, 4.2, STAGES[stage], self.ink(stage), 8.8, va="top", linespacing=1.25)
        self._card(0.95, MIDDLE, (1.55, 0.72), f"“{TOY_PROMPT}”", "prompts", fontsize=9, style="italic")
        self._arrow((1.74, MIDDLE), (1.98, MIDDLE), self.ink("prompts", "rewrites", colour=GREY))

    def draw_models(self) -> None:
        """Policy and generator as bars that all four lanes pass."""
        for x, name, kind, face in (
            (POLICY, "policy", "VLM, learning", self.ink("rewrites", "step", colour=BLUE)),
            (GENERATOR, "generator", "SD3, frozen", self.ink("images", colour=GREY)),
        ):
            size, face = (0.6, LANES[0] - LANES[-1] + 0.76), FAINT if face == DIM else face
            self._box(x, MIDDLE, size, face, "round,rounding_size=0.1")
            self._text(x - 0.09, MIDDLE, name, PAPER, 12, rotation=90, ha="center", weight="bold")
            self._text(x + 0.14, MIDDLE, kind, PAPER, 8.5, rotation=90, ha="center")

    def draw_samples(self) -> None:
        """The four lanes: a rewrite, its picture, its reward, and its advantage around the group's mean."""
        mean, words = self.ink("advantages", colour=GREY), self.ink("advantages")
        self.axes.plot([ZERO, ZERO], [LANES[-1] - 0.35, LANES[0] + 0.35], color=mean, lw=1)
        samples = zip(LANES, TOY_REWRITES, TOY_REWARDS, toy_advantages(), strict=True)
        for lane, (y, rewrite, reward, advantage) in enumerate(samples):
            for (start, end), stages in ARROWS.items():
                self._arrow((start, y), (end, y), self.ink(*stages, colour=GREY))
            self._card(3.93, y, (1.95, 0.5), rewrite, "rewrites", fontsize=8.5)
            self.draw_picture(lane, y)
            self._box(8.08 + reward / 2, y, (reward, 0.26), self.ink("rewards", colour=GREY))
            self._text(8.16 + reward, y, f"{reward:.2f}", self.ink("rewards"), 10)
            colour, side, across = (BLUE, "right", -0.08) if advantage > 0 else (VERMILION, "left", 0.08)
            self._box(ZERO + 0.21 * advantage, y, (0.42 * advantage, 0.26), self.ink("advantages", colour=colour))
            self._text(ZERO + across, y, number_text(advantage, "+.2f"), words, 10, ha=side)

    def draw_picture(self, lane: int, y: float) -> None:
        """What a rewrite gives: what was asked for, the same faded, one too few, another shape."""
        self._box(6.75, y, (0.68, 0.68), PAPER, edgecolor=self.ink("images", colour=GREY), lw=1.1)
        alpha = (1.0, 0.3, 1.0, 1.0)[lane] * (0.25 if self.ink("images") == DIM else 1.0)
        for x in ((6.6, 6.9), (6.6, 6.9), (6.75,), ())[lane]:
            self._box(x, y, (0.26, 0.26), RED, "circle", alpha=alpha, zorder=3)
        if lane == 3:
            self._box(6.75, y, (0.34, 0.34), RED, alpha=alpha, zorder=3)

    def draw_way_back(self) -> None:
        """The step: from the advantages, below everything, up into the policy."""
        colour, ground = self.ink("step", colour=BLUE), GROUND if "step" in self.named else PAPER
        line = dict(color=colour, lw=1.8, solid_capstyle="round", zorder=1)
        self.axes.plot([ZERO, ZERO, POLICY], [0.14, BACK, BACK], **line)
        self._arrow((POLICY, BACK), (POLICY, 0.36), colour, 15, 1.8)
        if "step" in self.named:
            self._box(6.6, BACK, (8.0, 0.8), GROUND, ROUND, zorder=1)
        box = dict(boxstyle="round,pad=0.35", facecolor=ground, edgecolor="none")
        self._text((POLICY + ZERO) / 2 + 0.55, BACK, STAGES["step"], self.ink("step"), 9.5, ha="center", bbox=box)
        self._text(3.2, BACK, "GRPO step", self.ink("step"), 11, weight="bold", bbox=box)
        self._badge(2.95, BACK, "step")
