"""Figures of the lessons on groups and the loss (notebooks 05 and 06).

Those on clip, KL and token weights draw what the kit's own functions return: the picture cannot differ from the code.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from grpo_kit.config import KitError
from grpo_kit.show import style
from grpo_kit.show.curves import draw_curve, ticks_at
from grpo_kit.show.intervals import name_rows

SIDES = ((1.0, "better than its group (A > 0)", style.BLUE), (-1.0, "worse than its group (A < 0)", style.VERMILION))
ESTIMATORS = {
    "k1": (style.VERMILION, style.DASHED, 0),
    "k2": (style.GREEN, (0, (1, 1.2)), -1),
    "k3": (style.BLUE, "-", -1),
}
_LARGEST_RATIO = 3.0  # of the clip's axis


def _draw_samples(axes: Axes, x: np.ndarray, y: np.ndarray, above: np.ndarray) -> None:
    """Draw samples as points: blue discs those above their group's mean, orange squares the others."""
    for chosen, colour, marker in ((above, style.BLUE, "o"), (~above, style.VERMILION, "s")):
        if chosen.any():
            axes.plot(x[chosen], y[chosen], ls="", marker=marker, color=colour, mec="white", mew=0.8, ms=7)


@style.styled
def group_rows_figure(groups: Mapping[str, Sequence[float]], title: str = "reward") -> style.Drawing:
    """Draw each group's rewards on a line of its own: its samples, its mean as a tick, its standard deviation in words.

    NaN is left out, equal rewards are stacked; no group, or one without a reward, is a `KitError`.
    """
    values = {name: np.sort(np.asarray(rewards, float)[np.isfinite(rewards)]) for name, rewards in groups.items()}
    if not values or not all(map(len, values.values())):
        raise KitError(f"group_rows_figure: found {len(values)} groups, allowed: at least one, each with a reward.")
    figure = style.new_figure(7.6, 0.85 + 0.5 * len(values))
    axes = figure.subplots()
    for y, rewards in enumerate(values.values()):
        mean, spread = rewards.mean(), rewards.std(ddof=1) if len(rewards) > 1 else 0.0
        axes.plot([rewards[0], rewards[-1]], [y, y], color=style.FAINT, lw=1.5, zorder=1)
        equal_before = np.arange(len(rewards)) - np.searchsorted(rewards, rewards)
        _draw_samples(axes, rewards, y - 0.17 * equal_before, rewards > mean)
        axes.plot([mean, mean], [y - 0.27, y + 0.27], color=style.INK, lw=2)
        axes.text(1.01, y, f"std {spread:.3f}", transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    name_rows(axes, list(values), width=36, lines=2)
    axes.set_title(style.plain_text(title))
    return figure


@style.styled
def group_size_figure(
    sizes: Sequence[int], errors: Sequence[float], deviation: float, chances: Mapping[str, Sequence[float]]
) -> style.Drawing:
    """Draw what a larger group buys: a steadier baseline, and a better chance that it holds something good.

    At each group size G, `errors` are the measured standard errors of the group's mean, beside the curve deviation / √G
    of one reward's standard deviation; `chances` is what a group may hold → the share of groups that hold it.
    """
    figure = style.new_figure(8.6, 3.0)
    left, right = style.panel_grid(figure, 2)
    fine = np.geomspace(min(sizes), max(sizes), 100)
    left.plot(fine, deviation / np.sqrt(fine), color=style.GREY, lw=1.2)
    left.plot(sizes, errors, ls="", marker="o", color=style.BLUE, mec="white", ms=8)
    style.label(left, "std / √G", (fine[40], deviation / np.sqrt(fine[40])), (6, 4), color=style.GREY)
    left.set(title="standard error of the baseline", ylim=(0, None))
    middle = len(sizes) // 2
    for number, (name, shares) in enumerate(chances.items()):
        look = style.series_look(number)
        draw_curve(right, sizes, shares, **look)
        style.label(right, style.plain_text(name, 40), (sizes[middle], shares[middle]), (7, -11), color=look["color"])
    right.set(title="groups that hold at least one…", ylim=(0, 1.05))
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    for axes in (left, right):
        axes.set_xlabel("group size G")
        ticks_at(axes, sizes)
    return figure


@style.styled
def clipping_figure(epsilon: float = 0.2) -> style.Drawing:
    """Draw a token's loss against its ratio, clipped at 1 ± `epsilon`, for A = ±1; grey where it has no gradient."""
    import torch

    from grpo_kit.show.pushes import loss_and_push

    ratios = np.linspace(0.02, _LARGEST_RATIO, 299)
    figure = style.new_figure(8.6, 3.2)
    for axes, (advantage, title, colour) in zip(style.panel_grid(figure, 2), SIDES, strict=True):
        losses, pushes = map(torch.Tensor.numpy, loss_and_push(torch.from_numpy(ratios), advantage, epsilon=epsilon))
        axes.plot(ratios, -advantage * ratios, color=style.GREY, lw=1.1, ls=style.DASHED)
        axes.plot(ratios, losses, color=colour, lw=2.4)
        edges = np.flatnonzero(np.diff(np.concatenate(([0], (pushes == 0).astype(int), [0]))))
        for start, end in edges.reshape(-1, 2) - (0, 1):  # first and last place of each unbroken run without a push
            axes.axvspan(ratios[start], ratios[end], color=style.FAINT, alpha=0.55, lw=0)
            middle = (ratios[start] + ratios[end]) / 2
            axes.text(middle, 0.04, "no gradient", transform=axes.get_xaxis_transform(), ha="center", fontsize=8.5)
        axes.axvline(1, color=style.INK, lw=0.8)
        low, high = sorted((0.0, -advantage * _LARGEST_RATIO))
        limits = dict(xlim=(0, _LARGEST_RATIO), ylim=(low - 0.35, high + 0.15))
        axes.set(title=title, xlabel="ratio: new / old probability", **limits)
        side = "right" if advantage < 0 else "left"
        style.label(axes, "unclipped", (2.4, -advantage * 2.4), (0, 6), color=style.GREY, ha=side)
    figure.axes[0].set_ylabel("loss of the token")
    return figure


@style.styled
def kl_estimators_figure() -> style.Drawing:
    """Draw the three estimates of the KL divergence, and their slopes, against how far a token has moved."""
    import torch

    from grpo_kit.grpo import kl_divergence

    moved = torch.linspace(-2.2, 2.2, 221, dtype=torch.float64).unsqueeze(1).requires_grad_()
    figure = style.new_figure(8.6, 3.2)
    panels, titles = style.panel_grid(figure, 2), ("estimate", "its slope: how hard it pulls back")
    for name, (colour, line, end) in ESTIMATORS.items():
        estimate = kl_divergence(moved, torch.zeros_like(moved), name)
        slope = torch.autograd.grad(estimate.sum(), moved)[0]
        for axes, curve in zip(panels, (estimate.detach(), slope), strict=True):
            places, heights = moved.detach().flatten(), curve.flatten()
            axes.plot(places, heights, color=colour, lw=2.2, ls=line)
            place, side = (float(places[end]), float(heights[end])), "left" if end else "right"
            style.label(axes, name, place, (4 if end else -4, 0), color=colour, weight="bold", ha=side, va="center")
    for axes, title in zip(panels, titles, strict=True):
        axes.axhline(0, color=style.INK, lw=0.8)
        axes.axvline(0, color=style.INK, lw=0.8)
        axes.set(title=title, xlabel="log of policy / reference", ylim=(-2.6, 5.2), xlim=(-2.7, 2.7))
    return figure


@style.styled
def token_weights_figure(lengths: tuple[int, int] = (10, 100), max_completion_length: int = 120) -> style.Drawing:
    """Draw how much a token of a short row weighs against one of a long row, under each loss type.

    `lengths` are those of the two rows, `max_completion_length` is the limit, which dr_grpo divides by.
    """
    import torch

    from grpo_kit.grpo import LOSS_TYPES, token_weights

    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    weights = {name: token_weights(mask, name, max_completion_length)[:, 0].tolist() for name in LOSS_TYPES}
    figure = style.new_figure(7.6, 3.5)
    axes = figure.subplots()
    for y, (short, long) in enumerate(weights.values()):
        axes.plot([short, long], [y, y], color=style.FAINT, lw=3, zorder=1)
        axes.plot(short, y, marker="o", color=style.BLUE, ms=12, mec="white", ls="")
        axes.plot(long, y, marker="s", color=style.VERMILION, ms=6, mec="white", ls="")
        words = f"{short / long:.3g} : 1"
        axes.text(1.01, y, words, transform=axes.get_yaxis_transform(), va="center", weight="bold")
    for place, length, colour in zip(weights["grpo"], lengths, (style.BLUE, style.VERMILION), strict=True):
        style.label(axes, f"row of {length}", (place, 0), (0, 8), color=colour, ha="center")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    name_rows(axes, list(weights))
    axes.set_title("weight of one token in the loss")
    return figure


@style.styled
def learning_figure(advantages: Sequence[float], changes: Sequence[float]) -> style.Drawing:
    """Draw what a step did to each sample: its advantage against new − old log-probability, summed over its tokens."""
    figure = style.new_figure(5.2, 3.6)
    axes = figure.subplots()
    axes.axhline(0, color=style.GREY, lw=0.8)
    axes.axvline(0, color=style.GREY, lw=0.8)
    x, y = (np.array([float(value) for value in values]) for values in (advantages, changes))
    _draw_samples(axes, x, y, x > 0)
    axes.set(xlabel="advantage", ylabel="change of log-probability")
    axes.set_title("What the step made likelier, and less likely")
    return figure
