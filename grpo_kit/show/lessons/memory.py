"""The figure of the lesson on scaling up (notebook 10): what lies in memory in each phase of an iteration."""

from collections.abc import Mapping

import numpy as np

from grpo_kit.config import KitError
from grpo_kit.show import style
from grpo_kit.show.intervals import name_rows

# part → colour, hatching
_RESIDENT = {"policy": (style.BLUE, ""), "generator": (style.GREEN, "//"), "reward": (style.GREY, "..")}
_GIGA = 1e9  # bytes in a GB


@style.styled
def memory_figure(plans: Mapping[str, Mapping]) -> style.Drawing:
    """Draw a bar for each phase of an iteration: the memory that stays, and what the phase adds to it.

    A panel is a plan (none: a `KitError`), title → its numbers as `grpo-kit plan --json` prints them, on one scale.
    """
    if not plans:
        raise KitError("memory_figure: found no plan. Pass {title: as_json(plan, steps)}.")
    rows = [sum(len(part["phases"]) for part in plan["parts"].values()) for plan in plans.values()]
    figure = style.new_figure(9.2, 0.7 + sum(0.3 * count + 0.65 for count in rows))
    panels = style.panel_grid(figure, len(plans), columns=1, sharex=True, height_ratios=rows)
    for axes, (title, plan) in zip(panels, plans.items(), strict=True):
        parts = plan["parts"].items()
        names = [f"{part}: {name}" for part, found in parts for name in found["phases"]]
        added = np.array([phase["peak"] for _, found in parts for phase in found["phases"].values()])
        fits = plan["resident"] + added <= plan["room"]
        places, left, look = range(len(names)), 0.0, {"edgecolor": "white", "height": 0.62}
        for part, (colour, hatch) in _RESIDENT.items():
            width = plan["parts"][part]["resident"] / _GIGA
            axes.barh(places, width, left=left, color=colour, alpha=0.55, hatch=hatch, label=f"{part} stays", **look)
            left += width
        left = plan["resident"] / _GIGA  # pictures lie there too where the device is the host
        axes.barh(places, added * fits / _GIGA, left=left, color=style.ORANGE, label="the phase adds", **look)
        axes.barh(places, added * ~fits / _GIGA, left=left, color=style.VERMILION, label="adds too much", **look)
        axes.axvline(plan["room"] / _GIGA, color=style.INK, lw=1.4, ls=style.DASHED, label="room")
        name_rows(axes, names)
        axes.margins(x=0)
        axes.set_title(f"{style.plain_text(title, 60)}: {'fits' if fits.all() else 'does not fit'}")
    panels[-1].set_xlabel("GB")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)
    return figure
