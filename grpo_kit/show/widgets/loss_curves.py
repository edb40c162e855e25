"""The picture of the loss playground: one token's loss over its ratio, and the push that its log-probability gets."""

from __future__ import annotations

import torch
from matplotlib.artist import Artist
from matplotlib.axes import Axes

from grpo_kit.show.frame import signed
from grpo_kit.show.one_token import TokenSettings, loss_and_push
from grpo_kit.show.style import BLUE, FAINT, GREY, INK, VERMILION, Drawing, styled

HIGHEST_RATIO, HIGHEST = 3.0, 3.2  # of the axes
STEPS = 241


class LossCurves:
    """Two panels over the ratio: loss and push, each with the unbounded line, the open range, and a marked point."""

    @styled
    def __init__(self) -> None:
        self.figure = _empty()
        self._panels = [_Panel(axes) for axes in self.figure.axes]
        self.moving = [artist for panel in self._panels for artist in panel.artists]
        self._ratios = torch.linspace(0.01, HIGHEST_RATIO, STEPS, dtype=torch.float64)

    def show(self, ratio: float, advantage: float, settings: TokenSettings) -> tuple[float, float]:
        """Draw the curves and the point; returns the point's loss and push."""
        curves = loss_and_push(self._ratios, advantage, settings)
        point = [
            float(values) for values in loss_and_push(torch.tensor([ratio], dtype=torch.float64), advantage, settings)
        ]
        for panel, curve, value, sign in zip(self._panels, curves, point, (-1, 1), strict=True):
            plain = sign * advantage * self._ratios
            panel.show(self._ratios.tolist(), curve.tolist(), plain.tolist(), settings.open_range, (ratio, value))
        return point[0], point[1]


class _Panel:
    """What moves in one panel."""

    def __init__(self, axes: Axes) -> None:
        self._range = axes.axvspan(0, 1, facecolor=FAINT, alpha=0.45, lw=0)
        self._plain = axes.plot([], [], color=GREY, lw=1.2, ls=(0, (4, 3)))[0]
        self._curve = axes.plot([], [], color=BLUE, lw=2.6)[0]
        self._stem = axes.plot([], [], color=VERMILION, lw=1, ls=":")[0]
        self._point = axes.plot([], [], marker="o", ms=9, color=VERMILION, mec="white", mew=1.2, ls="")[0]
        box = dict(facecolor="white", edgecolor="none", pad=1.5, alpha=0.85)
        self._value = axes.text(0, 0, "", color=VERMILION, weight="bold", fontsize=11, bbox=box)
        self.artists: list[Artist] = list(vars(self).values())

    def show(
        self,
        ratios: list[float],
        curve: list[float],
        plain: list[float],
        open_range: tuple[float, float],
        point: tuple[float, float],
    ) -> None:
        """Move everything; a point beyond the axes is drawn at their edge, its value stays true."""
        self._range.set(x=open_range[0], width=min(open_range[1], HIGHEST_RATIO) - open_range[0])
        self._plain.set_data(ratios, plain)
        self._curve.set_data(ratios, curve)
        ratio, value = point
        height = max(-HIGHEST, min(HIGHEST, value))
        self._stem.set_data([ratio, ratio], [0, height])
        self._point.set_data([ratio], [height])
        right = ratio < 0.8 * HIGHEST_RATIO
        self._value.set(x=ratio + (0.08 if right else -0.08), y=height + (0.3 if height < 2.6 else -0.5))
        self._value.set(ha="left" if right else "right", text=signed(value))


@styled
def _empty() -> Drawing:
    figure = Drawing(figsize=(11.4, 3.7))
    left, right = figure.subplots(1, 2, gridspec_kw=dict(left=0.045, right=0.99, top=0.83, bottom=0.14, wspace=0.12))
    _frame(left, "loss of one token", "dashed: −ratio × advantage, with nothing held back; grey: between the bounds")
    _frame(
        right, "push on its log-probability", "minus the gradient: above 0 likelier, below 0 less likely, at 0 nothing"
    )
    return figure


def _frame(axes: Axes, title: str, note: str) -> None:
    axes.set(xlim=(0, HIGHEST_RATIO), ylim=(-HIGHEST, HIGHEST), xlabel="ratio, new / old probability of the token")
    axes.axhline(0, color=INK, lw=0.8)
    axes.axvline(1, color=GREY, lw=0.8)
    axes.set_title(title, pad=18)
    axes.text(0, 1.03, note, transform=axes.transAxes, color=GREY, fontsize=8)
