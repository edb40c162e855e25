"""Figures of the lesson on rewards (notebook 04)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from grpo_kit.config import KitError
from grpo_kit.evaluation.table import metric_name, number_text
from grpo_kit.show import style
from grpo_kit.show.images import show_image
from grpo_kit.show.intervals import draw_interval, name_rows

if TYPE_CHECKING:  # it loads torch
    from grpo_kit.evaluation.audit import Audit


@style.styled
def vectors_figure(vectors: Mapping[str, Sequence[float]], anchor: str) -> style.Drawing:
    """Draw plane vectors, name → (x, y), brought to length 1, each with its cosine to the one named `anchor`.

    A `KitError` where there is no such vector, or one has length 0.
    """
    if anchor not in vectors or any(not np.hypot(*vector) for vector in vectors.values()):
        raise KitError(f"vectors_figure: found {anchor!r}, allowed: a name of {', '.join(vectors)}, all longer than 0.")
    units = {name: np.asarray(vector, float) / np.hypot(*vector) for name, vector in vectors.items()}
    figure = style.new_figure(6.2, 3.9)
    axes = style.bare(figure.subplots())
    angles = np.linspace(0, 2 * np.pi, 200)
    axes.plot(np.cos(angles), np.sin(angles), color=style.FAINT, lw=1)
    for name, unit in units.items():
        colour = style.INK if name == anchor else style.BLUE if unit @ units[anchor] > 0 else style.VERMILION
        axes.annotate("", unit, (0, 0), arrowprops=dict(arrowstyle="-|>", color=colour, lw=2.2, shrinkA=0, shrinkB=0))
        cosine = "" if name == anchor else f"\ncosine {number_text(unit @ units[anchor], '+.2f')}"
        side = dict(ha="left" if unit[0] >= 0 else "right", va="bottom" if unit[1] >= 0 else "top")
        style.label(axes, style.plain_text(name, 60) + cosine, unit, 5 * unit, color=colour, **side)
    axes.set(xlim=(-2.4, 2.4), ylim=(-1.25, 1.35), aspect="equal")
    return figure


@style.styled
def similarity_figure(
    similarity: Sequence[Sequence[float]], images: Sequence[Image.Image], texts: Sequence[str]
) -> style.Drawing:
    """Draw a table of similarities, a row a text and a column an image; the best image of each text is framed.

    A `KitError` where the table has another shape.
    """
    table = np.asarray(similarity, dtype=float)
    if table.shape != (len(texts), len(images)) or not table.size:
        found = f"a table {table.shape} for {len(texts)} texts and {len(images)} images"
        raise KitError(f"similarity_figure: found {found}. Give a row for each text and a column for each image.")
    figure = style.new_figure(2.6 + 0.95 * len(images), 1.1 + 0.5 * len(texts))
    figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02, hspace=0.01)
    grid = figure.add_gridspec(2, len(images), height_ratios=(0.95, 0.5 * len(texts)))
    for column, image in enumerate(images):
        show_image(style.bare(figure.add_subplot(grid[0, column])), image)
    axes = figure.add_subplot(grid[1, :])
    axes.imshow(table, cmap="Blues", vmin=table.min(), vmax=table.max() + 0.35 * np.ptp(table), aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        axes.text(column, row, number_text(value, ".2f"), ha="center", va="center", path_effects=style.HALO)
    for row, best in enumerate(table.argmax(axis=1)):
        axes.add_patch(Rectangle((best - 0.47, row - 0.44), 0.94, 0.88, fill=False, edgecolor=style.VERMILION, lw=2.2))
    style.bare(axes).set_yticks(range(len(texts)), [style.wrap(text, 34, 2) for text in texts])
    axes.tick_params(length=0)
    return figure


@style.styled
def agreement_figure(proxy: Sequence[float], gold: Sequence[float], title: str = "") -> style.Drawing:
    """Draw each sample's proxy reward against its gold score, and the mean proxy of each third of the gold scale.

    Points are moved a little sideways, always in the same way, since gold takes few values; samples without both scores
    are left out, and a `KitError` where none has both.
    """
    pairs = np.array([(g, p) for g, p in zip(gold, proxy, strict=True) if np.isfinite(g) and np.isfinite(p)], float)
    if not len(pairs):
        raise KitError("agreement_figure: found no sample with both scores. Score the same samples by both.")
    figure = style.new_figure(6.2, 3.4)
    axes = figure.subplots()
    sideways = np.random.default_rng(0).uniform(-0.016, 0.016, len(pairs))
    axes.plot(pairs[:, 0] + sideways, pairs[:, 1], ls="", marker="o", ms=4.5, color=style.BLUE, alpha=0.35, mew=0)
    for low, high in ((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1)):
        inside = pairs[(pairs[:, 0] >= low) & ((pairs[:, 0] < high) | (high == 1)), 1]
        if len(inside):
            axes.plot([low + 0.015, high - 0.015], [inside.mean()] * 2, color=style.INK, lw=2.2)
            words = f"mean {number_text(inside.mean(), '.2f')}"
            style.label(axes, words, ((low + high) / 2, inside.mean()), (0, 4), ha="center")
    axes.set(xlabel="gold check: share of what was asked that the picture shows", ylabel="proxy reward")
    axes.set_title(style.plain_text(title))
    return figure


@style.styled
def winners_figure(chosen: Mapping[str, Mapping[str, float]], random_choice: float, title: str = "") -> style.Drawing:
    """Draw what each reward's winners are worth, with intervals, beside a winner that is chosen blindly.

    `chosen` is reward → {"mean", "low", "high"} of the judge's score of the group's best by that reward,
    `random_choice` the judge's mean over all samples.
    """
    figure = style.new_figure(6.6, 0.9 + 0.42 * len(chosen))
    axes = figure.subplots()
    for y, value in enumerate(chosen.values()):
        better = value["low"] > random_choice
        look = {"color": style.BLUE, "marker": "o"} if better else {"color": style.VERMILION, "marker": "s"}
        draw_interval(axes, y, value, **look, text=number_text(value["mean"], ".2f"))
    axes.axvline(random_choice, color=style.GREY, lw=1.2, ls=style.DASHED)
    name_rows(axes, list(chosen))
    style.label(axes, "chosen blindly", (random_choice, len(chosen) - 0.45), (4, 2), va="bottom", color=style.GREY)
    axes.set_title(style.plain_text(title))
    return figure


_AUDIT_PANELS = (  # column of an audit's table, title, limits of a scale that is the same for all audits
    ("rank within", "agreement with gold\n(ranks, within prompts)", (-1.05, 1.05)),
    ("seed share", "the seed's share\nof the variance", (-0.05, 1.05)),
    ("edges", "samples at the\nceiling ●, floor ○", (-0.05, 1.05)),
    ("idle words", "idle words: in rewrite ●,\nin request ○ (std)", None),
    ("ms per image", "ms an image", None),
)
_AUDIT_PAIRS = {"edges": ("at ceiling", "at floor"), "idle words": ("idle words, rewrite", "idle words, user")}


@style.styled
def audit_figure(audits: Audit | Sequence[Audit]) -> style.Drawing:
    """Draw what audits found, a line a reward: agreement with gold, noise, saturation, idle words, cost.

    A bar is an interval. What was not measured (gold, a text that was never drawn twice) is left empty. No reward, or
    one that was audited twice, is a `KitError`.
    """
    table = pd.concat([one.table() for one in ([audits] if hasattr(audits, "table") else audits)] or [pd.DataFrame()])
    if table.empty or table.index.has_duplicates:
        raise KitError(f"audit_figure: found {len(table)} rewards ({', '.join(table.index)}). Give each of them once.")
    panels = [panel for panel in _AUDIT_PANELS if panel[0] in table or panel[0] in _AUDIT_PAIRS]
    figure = style.new_figure(1.8 + 1.9 * len(panels), 1.3 + 0.3 * len(table))
    rows = range(len(table))
    for axes, (name, title, limits) in zip(style.panel_grid(figure, len(panels), sharey=True), panels, strict=True):
        if f"{name}, low" in table:
            axes.hlines(rows, table[f"{name}, low"], table[f"{name}, high"], color=style.BLUE, lw=3, alpha=0.4)
        filled, *hollow = _AUDIT_PAIRS.get(name, (name,))
        for column in hollow:
            axes.plot(table[column], rows, ls="", marker="o", ms=8, mfc="none", mec=style.VERMILION, mew=1.5)
        axes.plot(table[filled], rows, ls="", marker="o", ms=6, color=style.BLUE, mec="white", mew=0.6)
        if name == "ms per image":
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(numticks=4))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.axvline(0, color=style.GREY, lw=1, ls=style.DASHED)
        axes.set_title(title, fontsize=8.5)
        name_rows(axes, [metric_name(reward) for reward in table.index], width=30)
        if limits:
            axes.set_xlim(limits)
    return figure
