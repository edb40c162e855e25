"""Figures of notebook 02b: a policy that can be listed, estimates of its gradient, and what becomes of it."""

from collections.abc import Mapping, Sequence

import numpy as np

from grpo_kit.config import KitError
from grpo_kit.show import style
from grpo_kit.show.intervals import name_rows

_LOOKS = (dict(color=style.FAINT, edgecolor=style.GREY, lw=0.6), dict(color=style.BLUE))


@style.styled
def texts_figure(texts: Sequence[str], rewards: Sequence[float], policies: Mapping[str, np.ndarray]) -> style.Drawing:
    """Draw every text with its reward and a bar for its probability under one policy, or two; the best text on top."""
    counts = {len(chances) for chances in (rewards, *policies.values())}
    if counts != {len(texts)} or not 1 <= len(policies) <= 2:
        found = f"{len(policies)} policies, {sorted(counts)} values"
        raise KitError(f"texts_figure: found {found}, allowed: 1 or 2, and one value a text.")
    order = np.lexsort((-np.asarray(next(iter(policies.values()))), -np.asarray(rewards)))
    figure = style.new_figure(7.2, 0.9 + (0.15 + 0.12 * len(policies)) * len(texts))
    axes, height, looks = figure.subplots(), 0.76 / len(policies), _LOOKS[2 - len(policies) :]
    for number, (look, chances) in enumerate(zip(looks, policies.values(), strict=True)):
        places = np.arange(len(texts)) + (number - (len(policies) - 1) / 2) * height
        values = np.asarray(chances)[order]
        bars = axes.barh(places, values, height, zorder=2, **look)
        axes.bar_label(bars, [f"{value:.1%}" for value in values], padding=3, fontsize=8)
    name_rows(axes, [f"{texts[i]}   {style.signed(rewards[i], 1)}" for i in order])
    axes.set(title="text, its reward, and how likely the policy is to write it", xlabel="probability")
    axes.margins(x=0.09)
    chances = zip(*policies.values(), strict=True)
    told = [
        f"{text}: reward {reward:.1f}, {' then '.join(f'{p:.1%}' for p in found)}"
        for text, reward, found in zip(texts, rewards, chances, strict=True)
    ]
    figure.alt = f"Probabilities of {len(texts)} texts. " + "; ".join(told)
    if len(policies) == 2:
        looks = {name: dict(color=colour, lw=6) for name, colour in zip(policies, ("#9aa3ad", style.BLUE), strict=True)}
        style.legend_above(figure, looks, columns=2)
    return figure


@style.styled
def estimates_figure(estimates: Mapping[str, np.ndarray], exact: np.ndarray) -> style.Drawing:
    """Draw estimates (title → (n, D)) of a gradient `exact` (D,), a dot each, in a plane that holds it.

    To the right is the direction of the exact gradient, upwards the one in which the first panel's estimates differ
    most; both in lengths of the exact gradient. Grey: estimates that point downhill.
    """
    length = np.linalg.norm(exact)
    along = exact / length
    rest = next(iter(estimates.values()))
    rest = rest - rest.mean(axis=0) - np.outer((rest - rest.mean(axis=0)) @ along, along)
    across = np.linalg.svd(rest, full_matrices=False)[2][0]
    figure, told = style.new_figure(4.3 * len(estimates), 3.7), []
    panels = style.panel_grid(figure, len(estimates), sharex=True, sharey=True)
    for axes, (title, found) in zip(panels, estimates.items(), strict=True):
        x, y = found @ along / length, found @ across / length
        axes.plot(x, y, ls="", marker=".", ms=4, color=style.BLUE, alpha=0.25, mec="none")
        axes.plot(x.mean(), y.mean(), ls="", marker="P", ms=14, color=style.VERMILION, mec="white", zorder=5)
        axes.annotate("", (1, 0), (0, 0), arrowprops=dict(arrowstyle="-|>", color=style.INK, lw=2), zorder=6)
        told.append(f"{title}: {(x <= 0).mean():.1%} of the estimates point downhill")
        style.explain(axes, style.plain_text(title, 60), told[-1].rpartition(": ")[2])
        axes.set_xlabel("along the exact gradient")
    low, high = panels[0].get_xlim()
    for axes in panels:
        axes.axvspan(low, 0, color=style.FAINT, alpha=0.55, lw=0, zorder=0)
        axes.set_xlim(low, high)
    words = dict(color=style.VERMILION, weight="bold")
    style.label(panels[0], "mean", (panels[0].lines[1].get_xdata()[0], 0), (8, 10), **words)
    panels[0].set_ylabel("across it")
    figure.alt = "Clouds of estimates around the exact gradient. " + ". ".join(told)
    return figure


@style.styled
def climb_figure(climbs: Mapping[str, np.ndarray], exact: Sequence[float], goal: float) -> style.Drawing:
    """Draw the expected reward over steps (title → (seeds, steps)): seeds faint, their mean strong, `exact` dashed."""
    figure, told = style.new_figure(3.5 * len(climbs), 3.0), []
    lowest = min(curves.min() for curves in climbs.values())
    for axes, (title, curves) in zip(style.panel_grid(figure, len(climbs), sharey=True), climbs.items(), strict=True):
        axes.plot(curves.T, color=style.BLUE, lw=0.8, alpha=0.3)
        axes.plot(curves.mean(axis=0), color=style.BLUE, lw=2.2)
        axes.plot(exact, color=style.INK, lw=1.3, ls=style.DASHED)
        axes.axhline(goal, color=style.GREY, lw=0.8)
        axes.set(title=style.plain_text(title, 60), xlabel="step", ylim=(lowest - 0.03, None))
        told.append(f"{title}: mean {curves[:, -1].mean():.2f}, lowest {curves[:, -1].min():.2f}")
    figure.axes[0].set_ylabel("expected reward J")
    style.label(figure.axes[0], "exact gradient", (len(exact) // 3, exact[len(exact) // 3]), (6, -16), color=style.INK)
    figure.alt = "Expected reward over steps, at the end " + "; ".join(told)
    return figure
