"""Figures of pictures: a grid with captions, a group with its rewards and advantages, before and after.

User text is laid out as text, never as mathematics.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from grpo_kit.config import KitError
from grpo_kit.config.media import Medium, thumbnail
from grpo_kit.evaluation.table import VARIANT_NAMES, VARIANTS, format_metric, number_text
from grpo_kit.runs.record import ImageKey
from grpo_kit.show import style

SMOOTH_FROM = 128  # pixels across; smaller pictures show their pixels
COLUMNS = 3  # of a film's pictures where one picture stands for it


def show_image(axes: Axes, image: Medium | None, below: str = "", advantage: float | None = None) -> None:
    """Draw an image as it is, no smoothing between the pixels of a small one, framed by its advantage; a text below."""
    style.bare(axes)
    if image is None:
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.text(0.5, 0.5, "no picture", ha="center", va="center", color=style.GREY)
    else:
        image = thumbnail(image, COLUMNS)
        axes.imshow(image, interpolation="nearest" if image.width < SMOOTH_FROM else "antialiased")
    axes.spines[:].set(visible=True, **style.frame_of(advantage))
    axes.set_xlabel(below, fontsize=8.5, labelpad=4 if advantage is None else 6)


@style.styled
def image_grid(
    images: Sequence[Medium], captions: Sequence[str] = (), columns: int = 6, size: float = 1.7
) -> style.Drawing:
    """Draw images of `size` inches in a grid, with a caption for each or none at all, else a `KitError`."""
    if not images or len(captions) not in (0, len(images)):
        raise KitError(f"image_grid: found {len(images)} images and {len(captions)} captions. Give a caption for each.")
    columns = min(columns, len(images))
    texts = [style.wrap(caption, int(size * 13), 8) for caption in captions] or [""] * len(images)
    lines = max(text.count("\n") + 1 if text else 0 for text in texts)
    figure = style.new_figure(size * columns, -(-len(images) // columns) * (size + 0.185 * lines + 0.15))
    for axes, image, text in zip(style.panel_grid(figure, len(images), columns), images, texts, strict=True):
        show_image(axes, image, text)
    return figure


@style.styled
def group_figure(
    images: Sequence[Medium | None],
    texts: Sequence[str],
    rewards: Sequence[float],
    advantages: Sequence[float],
    prompt: str,
) -> style.Drawing:
    """Draw a group, one of each a sample (else a `KitError`), best reward first: each image framed by its advantage.

    Above the group's mean the frame is blue and solid, below it orange and dashed; the thicker, the further away.
    """
    sizes = {len(images), len(texts), len(rewards), len(advantages)}
    if len(sizes) != 1 or 0 in sizes:
        raise KitError(f"group_figure: found lengths {sorted(sizes)}, allowed: one of each a sample. Pass one group.")
    columns = min(len(images), 4 if len(images) % 4 == 0 else 6)
    figure = style.new_figure(2.05 * columns, 0.3 + 2.75 * -(-len(images) // columns))
    spread = pd.Series(rewards, dtype=float).std()
    figure.suptitle(
        f"“{style.plain_text(prompt, 90)}”   standard deviation of rewards {spread:.3f}",
        x=0.01,
        ha="left",
        weight="bold",
    )
    samples = list(zip(images, texts, map(float, rewards), map(float, advantages), strict=True))
    samples.sort(key=lambda sample: -np.inf if np.isnan(sample[2]) else sample[2], reverse=True)
    panels = style.panel_grid(figure, len(samples), columns)
    for axes, (image, text, reward, advantage) in zip(panels, samples, strict=True):
        show_image(axes, image, style.wrap(text, 27, 4), advantage)
        title = f"{format_metric('reward', reward)}   {number_text(advantage, '+.2f')}"
        colour = style.frame_of(advantage)["edgecolor"] if advantage else style.INK
        axes.set_title(title, color=colour, fontsize=10.5, loc="center", pad=7)
    return figure


@style.styled
def gallery_figure(
    rows: pd.DataFrame, images: Mapping[ImageKey, Medium], cases: Sequence[tuple[int, int]]
) -> style.Drawing:
    """Draw before and after: a row a case (prompt_id, seed), a column a variant, all from that case's latent seed.

    `rows` are an evaluation's (prompt_id, variant, seed, text, reward, gold), `images` its pictures; a `KitError` where
    the rows hold none of these cases.
    """
    table = rows.set_index(["prompt_id", "seed", "variant"]).sort_index()
    cases = [case for case in cases if case in table.index]
    if not cases:
        raise KitError("gallery_figure: found no row of these prompts and seeds. Choose from the evaluation's rows.")
    variants = [v for v in VARIANTS if v in set(rows["variant"])]
    figure = style.new_figure(2.2 * len(variants), 0.5 + 2.7 * len(cases))
    panels = style.panel_grid(figure, len(cases) * len(variants), len(variants))
    for axes, variant in zip(panels, variants, strict=False):
        axes.set_title(VARIANT_NAMES[variant], color=style.VARIANT_COLOURS[variant], fontsize=11.5, loc="center")
    places = [(prompt_id, seed, variant) for prompt_id, seed in cases for variant in variants]
    for axes, (prompt_id, seed, variant) in zip(panels, places, strict=True):
        style.bare(axes)
        if (prompt_id, seed, variant) in table.index:
            row = table.loc[(prompt_id, seed, variant)]
            words = f"{style.wrap(row['text'], 28, 3)}\n{style.score_text(row)}"
            show_image(axes, images.get((prompt_id, variant, seed)), words)
    return figure
