"""Figures of a run: training curves, groups, before and after, comparisons with intervals, grids of images.

Every function returns a figure and touches nothing else. Raw values are faint, moving averages strong; labels stand at
their lines; user text is laid out as text, never as mathematics.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from PIL import Image

from grpo_kit.config import KitError
from grpo_kit.runs.record import ImageKey
from grpo_kit.show.style import (
    BLUE,
    FAINT,
    GREY,
    INK,
    VARIANT_COLOURS,
    VARIANT_MARKERS,
    VARIANT_NAMES,
    VARIANTS,
    VERMILION,
    Drawing,
    bare,
    format_metric,
    metric_name,
    new_figure,
    plain_text,
    score_text,
    styled,
)

# column of metrics.jsonl → (title, what to look for, key in a validation or None)
CURVES = {
    "reward": ("reward", "what GRPO trains; should rise", "reward"),
    "rewards/gold/mean": ("gold check", "never trained on; should rise with it", "gold"),
    "kl": ("KL from the initial policy", "starts at 0; grows as the policy moves", None),
    "rewards/keeps_objects/mean": ("keeps the user's objects", "falls when the reward is gamed", "keeps_objects"),
    "reward_std": ("spread of the reward in a group", "what is left to choose from", None),
    "completions/mean_length": ("tokens in a rewrite", "a jump is a warning", None),
}
COLUMNS = 3
HALO = [withStroke(linewidth=2.5, foreground="white")]  # keeps a label readable on a line


@styled
def training_curves(
    metrics: pd.DataFrame,
    validations: Sequence[Mapping] = (),
    panels: Sequence[str] = tuple(CURVES),
    sentinel: Mapping | None = None,
) -> Drawing:
    """Draw what training logged: each iteration faint, a moving average strong, held-out validations as points.

    Args:
        metrics: a row an iteration, columns as in metrics.jsonl.
        validations: the periodic validations, as in validation_iter_*.json.
        panels: which columns to draw; a column that was not logged is left out.
        sentinel: the content of sentinel.json: the score that it judges by is drawn too, and a divergence is marked by
            a line in every panel.

    Raises:
        KitError: none of the columns was logged.
    """
    judged = f"rewards/{(sentinel or {}).get('held_out')}/mean"
    wanted = dict.fromkeys((*panels[:1], judged, *panels[1:]) if judged not in panels else panels)
    drawn = [name for name in wanted if name in metrics and metrics[name].notna().any()]
    if not drawn:
        raise KitError(f"training curves: found no column of {', '.join(panels)}. Train at least one iteration first.")
    columns = min(COLUMNS, len(drawn))
    rows = -(-len(drawn) // columns)
    figure = new_figure(3.7 * columns, 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).flatten()
    for axes, name in zip(grid, drawn, strict=False):
        _draw_curve(axes, metrics["iteration"], metrics[name], validations, name)
    if sentinel and sentinel.get("divergence"):
        _mark_divergence(grid[: len(drawn)], sentinel["divergence"])
    for axes in grid[len(drawn) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(drawn) - columns) : len(drawn)]:
        axes.set_xlabel("iteration")
        axes.tick_params(labelbottom=True)
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)
    return figure


def _draw_curve(axes: Axes, steps: pd.Series, values: pd.Series, validations: Sequence[Mapping], name: str) -> None:
    title, reading, validated = CURVES.get(name) or _monitor(name)
    steps, values = steps[values.notna()], values.dropna()  # what is measured now and then, such as KL where beta is 0
    window = max(1, len(values) // 8)
    smooth = values.rolling(window, min_periods=1, center=True).mean()
    axes.plot(steps, values, color=BLUE, alpha=0.3, lw=0.9)
    axes.plot(steps, smooth, color=BLUE, lw=2.2, marker="o" if len(values) == 1 else "")  # one point is no line yet
    points = [(v["iteration"], _validated(v, validated)) for v in validations if validated is not None]
    points = [(x, y) for x, y in points if y is not None]
    if points:
        axes.plot(
            *zip(*points, strict=True),
            color=VERMILION,
            lw=0.8,
            ls=(0, (3, 2)),
            marker="o",
            ms=5.5,
            mec="white",
            mew=0.8,
        )
    axes.set_title(title, pad=17)
    axes.text(0, 1.03, reading, transform=axes.transAxes, color=GREY, fontsize=8)
    axes.margins(x=0.03, y=0.14)
    if points:
        _name_points(axes, points, smooth.iloc[-1])


def _name_points(axes: Axes, points: Sequence[tuple[float, float]], curve_ends: float) -> None:
    """Write what the points are beside the last one, on the side away from the curve, and make room there."""
    (_, low), (_, high) = axes.transData.inverted().transform(axes.transAxes.transform([(0, 0), (1, 1)]))
    above = points[-1][1] >= curve_ends
    axes.set_ylim((low, high + 0.12 * (high - low)) if above else (low - 0.12 * (high - low), high))
    _label(axes, "held out", points[-1], (0, 6 if above else -14), ha="right", color=VERMILION)


def _monitor(column: str) -> tuple[str, str, str]:
    """Title, reading and validated score of a column that has no panel of its own, `rewards/<name>/mean` above all."""
    score = column.removeprefix("rewards/").removesuffix("/mean")
    return metric_name(score), "", score


def _mark_divergence(panels: Sequence[Axes], divergence: Mapping) -> None:
    """A line where the sentinel found that the reward is gamed, named in the first panel; a thin one where it began."""
    for axes in panels:
        axes.axvline(divergence["since"], color=INK, lw=0.8, ls=(0, (1, 2)), zorder=1.5)
        axes.axvline(divergence["iteration"], color=INK, lw=1.4, ls=(0, (5, 2)), zorder=1.5)
    first = panels[0]
    left = divergence["iteration"] > sum(first.get_xlim()) / 2  # on the side where there is room
    point = (divergence["iteration"], first.get_ylim()[0])
    _label(first, "divergence", point, (-4 if left else 4, 4), ha="right" if left else "left", weight="bold")


def _label(axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], **kwargs: object) -> None:
    """Write `text` at a point of the data, `offset` printer's points away from it."""
    axes.annotate(text, point, xytext=offset, textcoords="offset points", path_effects=HALO, **kwargs)


def _validated(validation: Mapping, key: str) -> float | None:
    return validation["reward"] if key == "reward" else validation["rewards"].get(key)


@styled
def image_grid(
    images: Sequence[Image.Image], captions: Sequence[str] = (), columns: int = 6, size: float = 1.7
) -> Drawing:
    """Draw images in a grid, each with its caption below.

    Args:
        images: what to show.
        captions: one text an image, or none at all.
        columns: images in a row.
        size: inches of one image's side.

    Raises:
        KitError: there is no image, or there are captions for other than every image.
    """
    if not images or len(captions) not in (0, len(images)):
        raise KitError(f"image_grid: found {len(images)} images and {len(captions)} captions. Give a caption for each.")
    columns = min(columns, len(images))
    texts = [wrap(caption, int(size * 13), 8) for caption in captions] or [""] * len(images)
    lines = max(text.count("\n") + 1 if text else 0 for text in texts)
    rows = -(-len(images) // columns)
    figure = new_figure(size * columns, rows * (size + 0.185 * lines + 0.15))
    figure.get_layout_engine().set(h_pad=0.05, w_pad=0.05)
    for axes, image, text in zip(_cells(figure, rows, columns, len(images)), images, texts, strict=True):
        show_image(axes, image)
        axes.set_xlabel(text, fontsize=8.5, labelpad=4)
    return figure


def _cells(figure: Drawing, rows: int, columns: int, used: int) -> list[Axes]:
    cells = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for axes in cells:
        bare(axes)
    return cells[:used]


def show_image(axes: Axes, image: Image.Image | None, edge: str | None = None, width: float = 1.0) -> None:
    """Draw an image as it is: no smoothing between the pixels of a small one; the frame is faint, or `edge`."""
    if image is None:
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.text(0.5, 0.5, "no picture", ha="center", va="center", color=GREY)
    else:
        axes.imshow(image, interpolation="nearest" if image.width < 128 else "antialiased")
    for spine in axes.spines.values():
        spine.set(visible=True, color=edge or FAINT, linewidth=width, capstyle="butt")


def wrap(text: object, width: int, lines: int) -> str:
    """Return `text` broken to `lines` lines of at most `width` characters, the rest cut with an ellipsis."""
    parts = [textwrap.wrap(part, width) or [""] for part in plain_text_lines(text)]
    broken = [line for part in parts for line in part]
    if len(broken) > lines:
        broken = broken[:lines]
        broken[-1] = broken[-1][: width - 1].rstrip() + "…"
    return "\n".join(broken)


def plain_text_lines(text: object) -> list[str]:
    """Return the lines of a caption, each made safe to lay out."""
    return [plain_text(line) for line in str(text).split("\n")]


@styled
def group_figure(
    images: Sequence[Image.Image | None],
    texts: Sequence[str],
    rewards: Sequence[float],
    advantages: Sequence[float],
    prompt: str,
) -> Drawing:
    """Draw one group, best reward first: each image framed by the sign and size of its advantage.

    Above the group's mean the frame is blue and solid, below it orange and dashed; the thicker, the further away.

    Args:
        images, texts, rewards, advantages: one of each a sample.
        prompt: what the user wrote.

    Raises:
        KitError: the four do not have the same length, or the group is empty.
    """
    sizes = {len(images), len(texts), len(rewards), len(advantages)}
    if len(sizes) != 1 or 0 in sizes:
        raise KitError(f"group_figure: found lengths {sorted(sizes)}, allowed: one of each a sample. Pass one group.")
    images, texts = list(images), list(texts)
    rewards, advantages = [float(r) for r in rewards], [float(a) for a in advantages]
    order = sorted(range(len(images)), key=lambda i: _for_sorting(rewards[i]), reverse=True)
    columns = min(len(order), 4 if len(order) % 4 == 0 else 6)
    rows = -(-len(order) // columns)
    figure = new_figure(2.05 * columns, 0.3 + 2.75 * rows)
    figure.get_layout_engine().set(h_pad=0.06, w_pad=0.07)
    spread = pd.Series(rewards).std()
    figure.suptitle(f"“{plain_text(prompt, 90)}”   reward spread {spread:.3f}", x=0.01, ha="left", weight="bold")
    for axes, i in zip(_cells(figure, rows, columns, len(order)), order, strict=True):
        _draw_sample(axes, images[i], texts[i], rewards[i], advantages[i])
    return figure


def _for_sorting(reward: float) -> float:
    return reward if reward == reward else float("-inf")


def _draw_sample(axes: Axes, image: Image.Image | None, text: str, reward: float, advantage: float) -> None:
    colour = GREY if advantage == 0 else BLUE if advantage > 0 else VERMILION
    show_image(axes, image, colour, 1.2 + 2.2 * min(abs(advantage), 2.0))
    for spine in axes.spines.values():
        spine.set_linestyle("-" if advantage >= 0 else (0, (2.2, 0.9)))
    scores = f"{format_metric('reward', reward)}   {advantage:+.2f}".replace("-", "−")
    axes.set_title(scores, color=colour if advantage else INK, fontsize=10.5, loc="center", pad=7)
    axes.set_xlabel(wrap(text, 27, 4), fontsize=8.5, labelpad=6)


@styled
def learning_figure(advantages: Sequence[float], changes: Sequence[float]) -> Drawing:
    """Draw what a step did: each sample's advantage against the change of its log-probability.

    Args:
        advantages, changes: one of each a sample; the change is new minus old, summed over the sample's tokens.
    """
    figure = new_figure(5.2, 3.6)
    axes = figure.subplots()
    axes.axhline(0, color=GREY, lw=0.8)
    axes.axvline(0, color=GREY, lw=0.8)
    for above, colour, marker in ((True, BLUE, "o"), (False, VERMILION, "s")):
        points = [(float(a), float(c)) for a, c in zip(advantages, changes, strict=True) if (a > 0) == above]
        if points:
            axes.plot(*zip(*points, strict=True), ls="", marker=marker, color=colour, mec="white", mew=0.8, ms=7)
    axes.set(xlabel="advantage", ylabel="change of log-probability")
    axes.set_title("What the step made likelier, and less likely")
    return figure


@styled
def gallery_figure(
    rows: pd.DataFrame, images: Mapping[ImageKey, Image.Image], cases: Sequence[tuple[int, int]]
) -> Drawing:
    """Draw before and after: a row a case, a column a variant, all at that case's latent seed.

    Args:
        rows: an evaluation's rows (prompt_id, variant, seed, user_prompt, text, reward, gold).
        images: (prompt_id, variant, seed) → picture.
        cases: which (prompt_id, seed), in this order.

    Raises:
        KitError: the rows hold none of these cases.
    """
    table = rows.set_index(["prompt_id", "seed", "variant"]).sort_index()
    cases = [case for case in cases if case in table.index]
    if not cases:
        raise KitError("gallery_figure: found no row of these prompts and seeds. Choose from the evaluation's rows.")
    variants = [v for v in VARIANTS if v in set(rows["variant"])]
    figure = new_figure(2.2 * len(variants), 0.5 + 2.7 * len(cases))
    figure.get_layout_engine().set(h_pad=0.07, w_pad=0.09)
    cells = iter(_cells(figure, len(cases), len(variants), len(cases) * len(variants)))
    for number, (prompt_id, seed) in enumerate(cases):
        for variant in variants:
            axes = next(cells)
            if (prompt_id, seed, variant) in table.index:
                _draw_case(axes, table.loc[(prompt_id, seed, variant)], images.get((prompt_id, variant, seed)))
            if number == 0:
                axes.set_title(VARIANT_NAMES[variant], color=VARIANT_COLOURS[variant], fontsize=11.5, loc="center")
    return figure


def _draw_case(axes: Axes, row: pd.Series, image: Image.Image | None) -> None:
    show_image(axes, image)
    axes.set_xlabel(f"{wrap(row['text'], 28, 3)}\n{score_text(row)}", fontsize=8.5, labelpad=4)


@styled
def comparison_plot(results: Mapping, metrics: Sequence[str] = ("reward", "gold")) -> Drawing:
    """Draw each variant's mean with its interval, and below it the paired differences against zero.

    Args:
        results: what final_results.json holds.
        metrics: a column of panels each; one that was not measured is left out.

    Raises:
        KitError: the results hold none of the metrics.
    """
    measured = [m for m in metrics if any(m in values for values in results.get("variants", {}).values())]
    if not measured:
        raise KitError(f"comparison_plot: found no results for {', '.join(metrics)}. Run the evaluation first.")
    known = [v for v in VARIANTS if v in results["variants"]]
    variants = [*known, *(v for v in results["variants"] if v not in known)][::-1]  # saved runs come last
    pairs = list(results.get("differences", {}))[::-1]
    figure = new_figure(5.4 * len(measured), 1.0 + 0.42 * len(variants) + 0.9 + 0.42 * len(pairs))
    heights = [len(variants) + 0.5, len(pairs) + 0.5] if pairs else [1]
    grid = figure.subplots(len(heights), len(measured), squeeze=False, height_ratios=heights, sharey="row")
    for column, metric in enumerate(measured):
        _draw_means(grid[0][column], results, variants, metric)
        if pairs:
            _draw_differences(grid[1][column], results, pairs, metric)
    figure.get_layout_engine().set(h_pad=0.09, w_pad=0.09)
    return figure


def _draw_means(axes: Axes, results: Mapping, variants: Sequence[str], metric: str) -> None:
    for y, variant in enumerate(variants):
        value = results["variants"][variant].get(metric)
        if value is not None:
            look = VARIANT_COLOURS.get(variant, INK), VARIANT_MARKERS.get(variant, "o")
            _draw_interval(axes, y, value, metric, *look)
    axes.set_title(f"{metric_name(metric)}, mean over prompts")
    axes.set_yticks(range(len(variants)), [plain_text(VARIANT_NAMES.get(v, v), 40) for v in variants])
    _tidy_rows(axes, len(variants), metric)


def _draw_differences(axes: Axes, results: Mapping, pairs: Sequence[str], metric: str) -> None:
    axes.axvline(0, color=INK, lw=1)
    for y, pair in enumerate(pairs):
        value = results["differences"][pair].get(metric)
        if value is not None:
            variant = pair.split("-")[0]
            _draw_interval(
                axes, y, value, metric, VARIANT_COLOURS.get(variant, INK), VARIANT_MARKERS.get(variant, "o"), True
            )
    axes.set_title("paired difference (0: no change)")
    axes.set_yticks(range(len(pairs)), [pair.replace("-", " − ") for pair in pairs])
    _tidy_rows(axes, len(pairs), metric)


def _draw_interval(
    axes: Axes, y: int, value: Mapping, metric: str, colour: str, marker: str, signed: bool = False
) -> None:
    axes.plot([value["low"], value["high"]], [y, y], color=colour, lw=3.2, alpha=0.55, solid_capstyle="butt")
    axes.plot(value["mean"], y, marker=marker, color=colour, ms=8, mec="white", mew=1)
    text = format_metric(metric, value["mean"], signed)
    _label(axes, text, (value["mean"], y), (0, 7), ha="center", fontsize=9.5)


def _tidy_rows(axes: Axes, count: int, metric: str) -> None:
    axes.set_ylim(-0.6, count - 0.2)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.12)
    if format_metric(metric, 0.0).endswith("%"):
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}".replace("-", "−"))


@styled
def category_plot(results: Mapping, metrics: Sequence[str] = ("reward", "gold")) -> Drawing:
    """Draw the way from the raw prompt to the trained policy in each category, and where the oracle stands.

    Args:
        results: what final_results.json holds.
        metrics: a column of panels each; one that was not measured is left out.

    Raises:
        KitError: the results hold no categories with these metrics.
    """
    categories = results.get("by_category", {})
    measured = [m for m in metrics if any(m in values.get("trained", {}) for values in categories.values())]
    if not measured:
        raise KitError(f"category_plot: found no categories with {', '.join(metrics)}. Run the evaluation first.")
    names = sorted(categories, reverse=True)
    figure = new_figure(5.4 * len(measured), 1.3 + 0.4 * len(names))
    figure.get_layout_engine().set(w_pad=0.09)
    for axes, metric in zip(figure.subplots(1, len(measured), squeeze=False, sharey=True)[0], measured, strict=True):
        for y, name in enumerate(names):
            _draw_way(axes, y, categories[name], metric)
        axes.set_title(metric_name(metric))
        axes.set_yticks(range(len(names)), [plain_text(name, 30) for name in names])
        _tidy_rows(axes, len(names), metric)
    figure.legend(handles=_variant_marks(categories), loc="outside upper left", ncols=4, frameon=False)
    return figure


def _variant_marks(categories: Mapping) -> list[Line2D]:
    present = [v for v in VARIANTS if any(v in values for values in categories.values())]
    marks = {v: dict(marker=VARIANT_MARKERS[v], color=VARIANT_COLOURS[v], ls="", ms=7.5) for v in present}
    return [Line2D([], [], label=VARIANT_NAMES[v], **style) for v, style in marks.items()]


def _draw_way(axes: Axes, y: int, values: Mapping, metric: str) -> None:
    """Draw one category: a line from raw to trained, a mark for each variant that was measured."""
    points = {v: values[v][metric] for v in VARIANTS if values.get(v, {}).get(metric) is not None}
    if "raw" in points and "trained" in points:
        axes.plot([points["raw"], points["trained"]], [y, y], color=BLUE, lw=2.6, alpha=0.35, zorder=1)
    for variant, x in points.items():
        small = variant in ("initial", "oracle")
        style = dict(marker=VARIANT_MARKERS[variant], color=VARIANT_COLOURS[variant], ms=7.5 if small else 9)
        axes.plot(x, y, mec="white", mew=1, ls="", zorder=2 if small else 3, **style)
