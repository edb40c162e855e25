"""The picture of the loss playground: one token's loss over its ratio, and the push that its log-probability gets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes

from grpo_kit.show.frame import signed
from grpo_kit.show.one_token import TokenSettings, loss_and_push
from grpo_kit.show.style import BLUE, FAINT, GREY, INK, VERMILION, Drawing, styled

HIGHEST_RATIO, HIGHEST = 3.0, 3.2  # of the axes
STEPS = 241
PANELS = {
    "loss of one token": "dashed: −ratio × advantage, with nothing held back; grey: between the bounds",
    "push on its log-probability": "minus the gradient: above 0 more likely, below 0 less likely, at 0 nothing",
}


@styled
def empty_figure() -> Drawing:
    """Return the axes: loss and push over the ratio."""
    figure = Drawing(figsize=(11.4, 3.7))
    places = dict(left=0.045, right=0.985, top=0.83, bottom=0.15, wspace=0.12)
    panels = figure.subplots(1, 2, gridspec_kw=places)
    for axes, (title, note) in zip(panels, PANELS.items(), strict=True):
        axes.set(xlim=(0, HIGHEST_RATIO), ylim=(-HIGHEST, HIGHEST), xlabel="ratio, new / old probability of the token")
        axes.axhline(0, color=INK, lw=0.8)
        axes.axvline(1, color=GREY, lw=0.8)
        axes.set_title(title, pad=19)
        axes.text(0, 1.03, note, transform=axes.transAxes, color=GREY, fontsize=9)
    return figure


def draw_curves(panels: Sequence[Axes], ratio: float, advantage: float, settings: TokenSettings) -> tuple[float, float]:
    """Draw into the axes of `empty_figure`: curve, line without a bound, range between the bounds, marked point.

    A point beyond the axes is drawn at their edge; the value beside it stays true.

    Returns:
        The point's loss and push.
    """
    ratios = torch.cat([torch.linspace(0.01, HIGHEST_RATIO, STEPS), torch.tensor([ratio])]).double()
    curves = [values.tolist() for values in loss_and_push(ratios, advantage, settings)]
    low, high = settings.open_range
    right = ratio < 0.8 * HIGHEST_RATIO
    for axes, (*curve, value), sign in zip(panels, curves, (-1, 1), strict=True):
        places, height = ratios[:-1].tolist(), max(-HIGHEST, min(HIGHEST, value))
        axes.axvspan(low, min(high, HIGHEST_RATIO), facecolor=FAINT, alpha=0.45, lw=0)
        axes.plot(places, [sign * advantage * place for place in places], color=GREY, lw=1.2, ls=(0, (4, 3)))
        axes.plot(places, curve, color=BLUE, lw=2.6)
        axes.plot([ratio, ratio], [0, height], color=VERMILION, lw=1, ls=":")
        axes.plot(ratio, height, marker="o", ms=9, color=VERMILION, mec="white", mew=1.2)
        box = dict(facecolor="white", edgecolor="none", pad=1.5, alpha=0.85)
        words = dict(color=VERMILION, weight="bold", fontsize=12, bbox=box, ha="left" if right else "right")
        place = ratio + (0.08 if right else -0.08), height + (0.3 if height < 2.6 else -0.5)
        axes.text(*place, signed(value), **words)
    return curves[0][-1], curves[1][-1]
