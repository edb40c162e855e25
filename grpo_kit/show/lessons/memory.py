"""The figure of the lesson on scaling up (notebook 10): what lies in memory in each phase of an iteration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from grpo_kit.config import KitError
from grpo_kit.show.intervals import name_rows
from grpo_kit.show.style import (
    BLUE,
    DASHED,
    GREEN,
    GREY,
    INK,
    ORANGE,
    VERMILION,
    Drawing,
    new_figure,
    panel_grid,
    plain_text,
    styled,
)

_RESIDENT = {"policy": (BLUE, ""), "generator": (GREEN, "//"), "reward": (GREY, "..")}  # part → colour, hatching
_GIGA = 1e9  # bytes in a GB


@styled
def memory_figure(plans: Mapping[str, Mapping]) -> Drawing:
    """Draw the memory of each phase of an iteration: what lies there all the time, and what the phase adds.

    Args:
        plans: title → a plan's numbers, as `grpo-kit plan --json` prints them; a panel each, all on one scale.

    Raises:
        KitError: there is no plan.
    """
    if not plans:
        raise KitError("memory_figure: found no plan. Pass {title: as_json(plan, steps)}.")
    rows = [len(list(_phases(plan))) for plan in plans.values()]
    figure = new_figure(9.2, 0.7 + sum(0.3 * count + 0.65 for count in rows))
    panels = panel_grid(figure, len(plans), columns=1, sharex=True, height_ratios=rows)
    for axes, (title, plan) in zip(panels, plans.items(), strict=True):
        _draw(axes, title, plan)
    panels[-1].set_xlabel("GB")
    figure.legend(handles=list(_key()), loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)
    return figure


def _phases(plan: Mapping) -> Iterator[tuple[str, float]]:
    """Each phase's name and the bytes that it adds, in the order of an iteration."""
    for part, found in plan["parts"].items():
        for name, phase in found["phases"].items():
            yield f"{part}: {name}", phase["peak"]


def _draw(axes: Axes, title: str, plan: Mapping) -> None:
    phases = list(_phases(plan))
    places = range(len(phases))
    left = 0.0
    for part, (colour, hatch) in _RESIDENT.items():
        width = plan["parts"][part]["resident"] / _GIGA
        axes.barh(places, width, left=left, color=colour, alpha=0.55, hatch=hatch, edgecolor="white", height=0.62)
        left += width
    left = plan["resident"] / _GIGA  # pictures lie there too where the device is the host
    fits = [plan["resident"] + added <= plan["room"] for _, added in phases]
    colours = [ORANGE if good else VERMILION for good in fits]
    axes.barh(places, [added / _GIGA for _, added in phases], left=left, color=colours, edgecolor="white", height=0.62)
    axes.axvline(plan["room"] / _GIGA, color=INK, lw=1.4, ls=DASHED)
    name_rows(axes, [name for name, _ in phases])
    axes.set_title(f"{plain_text(title, 60)}: {'fits' if all(fits) else 'does not fit'}")


def _key() -> Iterator[Artist]:
    """An entry for each part that stays, for what a phase adds, and for the device's room."""
    for part, (colour, hatch) in _RESIDENT.items():
        yield Patch(facecolor=colour, alpha=0.55, hatch=hatch, edgecolor="white", label=f"{part} stays")
    yield Patch(facecolor=ORANGE, label="the phase adds")
    yield Patch(facecolor=VERMILION, label="adds too much")
    yield Line2D([], [], color=INK, lw=1.4, ls=DASHED, label="room")
