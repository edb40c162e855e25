"""Figures of the lessons on prompts, policy, its gradient and the generator (notebooks 01 to 03)."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import FancyBboxPatch

from grpo_kit.config import KitError
from grpo_kit.show import style
from grpo_kit.show.curves import Curve
from grpo_kit.show.intervals import name_rows

_TINT = LinearSegmentedColormap.from_list("tint", [style.PAPER, "#f6c08a"])  # white: certain; orange: a choice
_TOKEN_CHARACTERS = 96  # characters of tokens in a row of a token figure
_CHARACTER = 0.092  # inches of one character of the token font
# of the bars of a policy before and after
_LOOKS = (dict(color=style.FAINT, edgecolor=style.GREY, lw=0.6), dict(color=style.BLUE))


@style.styled
def seed_figure(table: pd.DataFrame) -> style.Drawing:
    """Draw what the latent seed does: a row a prompt, the highest mean on top, a dot a picture (a row of the table).

    A `KitError` where the table has no rewards.
    """
    if "reward" not in table or table["reward"].notna().sum() == 0:
        raise KitError("seed_figure: found no values in reward. Pass one row a picture.")
    by = ["prompt_id", "user_prompt"] if "prompt_id" in table else "user_prompt"  # two may have the same words
    rewards = table.groupby(by)["reward"]
    means = rewards.mean().sort_values(ascending=False)
    figure = style.new_figure(8.6, 0.9 + 0.24 * len(means))
    axes = figure.subplots()
    for y, (prompt, mean) in enumerate(means.items()):
        values = rewards.get_group(prompt)
        dots = dict(ls="", marker="o", ms=4.5, color=style.BLUE, alpha=0.35, mec="none", zorder=2)
        axes.plot([values.min(), values.max()], [y, y], color=style.FAINT, lw=1.2, zorder=1)
        axes.plot(values, [y] * len(values), **dots)
        axes.plot(mean, y, marker="|", ms=11, mew=2.6, color=style.INK, zorder=3)
    axes.set_title("reward: a dot a picture, a bar the prompt's mean")
    name_rows(axes, list(means.index.get_level_values("user_prompt")), width=56)
    axes.tick_params(axis="y", labelsize=8.5)
    return figure


@style.styled
def flow_figure(paths: Mapping[str, Curve], targets: Sequence[float]) -> style.Drawing:
    """Draw paths from noise to the data, which lie at `targets`, in one dimension, a panel for each number of steps.

    `paths` is title → (noise levels (S + 1,) from 1 to 0, positions (S + 1, K) of K points), else a `KitError`.
    """
    figure = style.new_figure(2.9 * max(1, len(paths)), 2.6)
    grid = style.panel_grid(figure, max(1, len(paths)), sharey=True)
    for axes, (title, (levels, positions)) in zip(grid, paths.items(), strict=False):
        positions = np.asarray(positions, dtype=float)
        if positions.ndim != 2 or len(positions) != len(levels):
            found = f"{positions.shape} for {len(levels)} noise levels"
            raise KitError(f"flow_figure: positions of shape {found}, allowed: (levels, points). Stack the steps.")
        axes.plot(levels, positions, color=style.BLUE, lw=1, marker=".", ms=4)
        axes.plot([0] * len(targets), targets, ls="", marker="*", ms=13, color=style.VERMILION, mec="white", zorder=4)
        axes.invert_xaxis()
        axes.set(title=style.plain_text(title, 60), xlabel="noise level")
    grid[0].set_ylabel("x")
    if len(targets):
        style.label(grid[0], "data", (0, max(targets)), (-9, 7), ha="right", color=style.VERMILION)
    return figure


@style.styled
def distribution_figure(words: Sequence[str], distributions: Mapping[str, Sequence[float]]) -> style.Drawing:
    """Draw probabilities (title → one a word, else a `KitError`), a panel a distribution, each bar with its value."""
    lengths = {len(values) for values in distributions.values()}
    if lengths != {len(words)}:
        raise KitError(f"distribution_figure: found {sorted(lengths)} values, allowed: {len(words)}, one a word.")
    figure = style.new_figure(0.5 + max(2.9, 0.76 * len(words)) * len(distributions), 2.6)
    grid = style.panel_grid(figure, len(distributions), sharey=True)
    for axes, (title, values) in zip(grid, distributions.items(), strict=True):
        bars = axes.bar(range(len(words)), [float(v) for v in values], color=style.BLUE, width=0.66)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=9)
        axes.set_xticks(range(len(words)), [style.plain_text(word, 14) for word in words])
        axes.set_title(style.plain_text(title, 80))
        axes.tick_params(axis="x", length=0)
        axes.margins(y=0.14)
    grid[0].set_ylabel("probability")
    return figure


@style.styled
def token_figure(rows: Sequence[Sequence[str]], probabilities: Sequence[Sequence[float]]) -> style.Drawing:
    """Draw texts, a row of tokens each: below a token its probability, and the darker, the less certain it was.

    A `KitError` where there is no text, or one with another number of tokens than probabilities.
    """
    found = [(len(row), len(chances)) for row, chances in zip(rows, probabilities, strict=False)]
    if not rows or len(rows) != len(probabilities) or any(a != b for a, b in found):
        raise KitError(f"token_figure: found {found} tokens and probabilities, allowed: one each. Pass equal lengths.")
    figure = style.Drawing()
    axes = style.bare(figure.add_axes((0, 0, 1, 1)))
    box = dict(boxstyle="round,pad=0,rounding_size=0.05", edgecolor=style.GREY, lw=0.7)
    middle = dict(ha="center", va="center", family="DejaVu Sans Mono")
    height = 0.0
    for row, chances in zip(rows, probabilities, strict=True):
        column = 0.0
        for token, chance in zip(row, map(float, chances), strict=True):
            text = style.plain_text(token.replace("\n", "↵"), 24).strip() or "␣"
            size = max(len(text), 3) + 1.0
            if column and column + size + 0.6 > _TOKEN_CHARACTERS:
                column, height = 2.0, height + 0.62  # the next line, indented, since it continues the one above
            x, width, face = column * _CHARACTER, size * _CHARACTER, _TINT(1.0 - min(max(chance, 0.0), 1.0))
            axes.add_patch(FancyBboxPatch((x, -height - 0.33), width, 0.27, facecolor=face, **box))
            axes.text(x + width / 2, -height - 0.2, text, fontsize=10, **middle)
            written = f"{chance:.2f}" if chance >= 0.005 or chance == 0 else "<.01"  # a small one is not zero
            axes.text(x + width / 2, -height - 0.45, written, fontsize=8, color=style.GREY, **middle)
            column += size + 0.6
        height += 0.62 + 0.16
    width = _TOKEN_CHARACTERS * _CHARACTER + 0.3
    figure.set_size_inches(width, height)
    axes.set(xlim=(-0.15, width - 0.15), ylim=(-height, 0))
    return figure


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
