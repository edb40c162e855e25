"""Figures of the lessons on prompts, policy and generator (notebooks 01 to 03)."""

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


@style.styled
def seed_figure(table: pd.DataFrame) -> style.Drawing:
    """Draw what the latent seed does: a row a prompt, the highest mean on top, a dot a picture (a row of the table).

    A `KitError` where the table has no rewards.
    """
    if "reward" not in table or table["reward"].notna().sum() == 0:
        raise KitError("seed_figure: found no values in reward. Pass one row a picture.")
    rewards = table.groupby("user_prompt")["reward"]
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
    name_rows(axes, list(means.index), width=56)
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
