"""Be the reward: order the images of a group by clicking, and your ranking is what the next step learns from."""

import math
from collections.abc import Sequence
from functools import partial

import ipywidgets

from grpo_kit.config import KitError
from grpo_kit.config.media import Medium
from grpo_kit.show.style import BLUE, GREY, Drawing
from grpo_kit.show.widgets.cards import Card, card_sheet
from grpo_kit.show.widgets.picture_box import PAGE, PictureBox, button

LINES = 3


class BeTheReward(PictureBox):
    """The images of a group, each with a button: click the best first, then the next best, down to the worst.

    A second click on a button takes its image out of the order again.

    Args:
        images, texts: each sample's picture (None: it has none) and rewrite; two at least, else a `KitError`.
        prompt: what the user asked for.
        default: one reward a sample, which count until every image is ranked: so that a run in which nobody clicks can
            go on. Without it `rewards` is an error until then, since nobody's opinion is not a reward.
    """

    def __init__(
        self,
        images: Sequence[Medium | None],
        texts: Sequence[str],
        prompt: str,
        default: Sequence[float] | None = None,
    ) -> None:
        self._images, self._texts, self._prompt = list(images), [str(text) for text in texts], str(prompt)
        self._default = None if default is None else [float(value) for value in default]
        count = len(self._images)
        if count < 2 or len(self._texts) != count:
            found = f"{count} images and {len(self._texts)} texts"
            raise KitError(f"BeTheReward: found {found}, allowed: at least 2 images and a text each. Pass one group.")
        finite = [value for value in self._default or () if math.isfinite(value)]
        if self._default is not None and not len(finite) == len(self._default) == count:
            found = f"{len(self._default)} rewards, {len(finite)} of them finite"
            raise KitError(f"default: found {found}, allowed: {count} finite ones. Pass one an image.")
        self._columns = 5 if count % 5 == 0 and count % 4 else 4
        self.order: list[int] = []  # of the samples, best first
        width = f"{100 / self._columns - 2:.1f}%"
        self.buttons = [button("", partial(self._click, number), width) for number in range(count)]
        self.reset_button = button("start again", self.reset, "120px")
        super().__init__(pictures=-(-count // self._columns))
        rows: list[ipywidgets.Widget] = []  # of cards, each card with its button below
        for start, picture in zip(self._starts, self.pictures, strict=True):
            rows += [picture, ipywidgets.HBox(self.buttons[start : start + self._columns], layout=PAGE)]
        self.children = [*rows, self.reset_button, self.words, self.folded]

    @property
    def _starts(self) -> range:
        """The first image of each row."""
        return range(0, len(self._images), self._columns)

    def _click(self, number: int) -> None:
        if number in self.order:
            self.order.remove(number)
        else:
            self.order.append(number)
        self.redraw()

    def reset(self) -> None:
        """Forget the order."""
        self.order.clear()
        self.redraw()

    def draw(self) -> None:
        """Show each image's place on its button; the pictures are drawn once, so that quick clicks keep their order."""
        for number, each in enumerate(self.buttons):
            each.description = self._place(number) or "choose"
            each.button_style = "primary" if number in self.order else ""
        if not self.pictures[0].value:
            super().draw()
        self.write(self.reading())

    def _place(self, number: int) -> str:
        """Return an image's place in the order: `1 (best)`, `2`, …, `8 (worst)`; nothing where it has none."""
        if number not in self.order:
            return ""
        rank = self.order.index(number)
        return f"{rank + 1}" + (" (best)" if rank == 0 else " (worst)" if rank == len(self._images) - 1 else "")

    @property
    def ranked(self) -> bool:
        """Whether every image has its place."""
        return len(self.order) == len(self._images)

    @property
    def rewards(self) -> list[float]:
        """One reward a sample, in the given order: 1 for the best image, 0 for the worst, evenly spaced between.

        A `KitError` where not every image is ranked, and there is no `default`.
        """
        if self.ranked:
            last = len(self.order) - 1
            return [1 - self.order.index(number) / last for number in range(len(self.order))]
        if self._default is not None:
            return list(self._default)
        found = f"{len(self.order)} of {len(self._images)} images ranked"
        raise KitError(f"rewards: found {found}, allowed: all. Click the others, or pass default= to go on without.")

    def figures(self) -> list[Drawing]:
        """Return the images in rows, each with its place in the order, or with its number."""
        cards = []
        for number, (image, text) in enumerate(zip(self._images, self._texts, strict=True)):
            colour = BLUE if number in self.order else GREY
            cards.append(Card(image, self._place(number) or f"image {number + 1}", text=text, colour=colour))
        heading = f"“{self._prompt}”", "Which image shows it best? Click that one first."
        rows = [cards[start : start + self._columns] for start in self._starts]
        return [card_sheet(row, self._columns, [LINES], *(heading if row is rows[0] else ())) for row in rows]

    def reading(self) -> list[str]:
        """Say how far the ranking is, and what each image was drawn from."""
        if self.ranked:
            state = f"All {len(self.order)} are ranked. Rewards: {', '.join(f'{r:.2f}' for r in self.rewards)}."
        else:
            state = f"{len(self.order)} of {len(self._images)} are ranked. Click the best of those that are left."
            state += " Until then the default rewards count." if self._default is not None else ""
        return [state, f"“{self._prompt}”", *(f"image {i}: {text}" for i, text in enumerate(self._texts, start=1))]
